//! The default corpus, for a first run without any data: the Rust sources and documentation of crates
//! that Atoll itself is built from, at the versions of its own `Cargo.lock`. Every machine that has
//! built Atoll has them unpacked in Cargo's registry, so nothing is downloaded and nothing is shipped.
//!
//! The dataset must be the same on every machine. Hence the crates are a fixed list rather than the
//! whole lock file, of which Cargo unpacks only what the machine's platform and the commands run so
//! far have needed; files are named from their crate on; and their order is that of these names.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use crate::data::text::walk;
use crate::data::{DataError, Source};

const LOCK: &str = include_str!("../../../../Cargo.lock");

/// Larger files are generated tables.
const FILE_BYTES_MAX: u64 = 256 << 10;

/// Text beyond this is left out.
pub const CORPUS_BYTES_MAX: u64 = 48 << 20;

/// Crates that Atoll needs on every platform, in order.
#[rustfmt::skip]
const CRATES: [&str; 40] = [
    "aho-corasick", "blake3", "bytes", "chrono", "compact_str", "crossbeam-epoch", "crossbeam-utils",
    "fancy-regex", "flate2", "half", "itertools", "libm", "log", "memchr", "memmap2", "miniz_oxide", "nom",
    "num-bigint", "num-traits", "once_cell", "parquet", "proc-macro2", "rayon", "rayon-core", "regex",
    "regex-automata", "regex-syntax", "ryu", "safetensors", "serde", "serde_core", "serde_derive", "serde_json",
    "smallvec", "thiserror", "tokenizers", "unicode-segmentation", "zerocopy", "zstd", "zstd-safe",
];

/// The default corpus of this machine.
///
/// # Errors
/// If a crate of the list is not in Cargo's registry.
pub fn source() -> Result<Source, DataError> {
    let home = env::var_os("CARGO_HOME").map(PathBuf::from).filter(|path| !path.as_os_str().is_empty());
    let home = home.or_else(|| env::home_dir().map(|home| home.join(".cargo"))).unwrap_or_default();
    source_in(&home)
}

/// The default corpus as found in the Cargo home `home`.
///
/// # Errors
/// If a crate of the list is not in its registry.
pub fn source_in(home: &Path) -> Result<Source, DataError> {
    let registry = home.join("registry").join("src");
    let mut files = Vec::new();
    for name in CRATES {
        let folder = versioned(name);
        let found = unpacked(&registry, &folder);
        let root = found.ok_or_else(|| DataError::NoCorpus { name: folder.clone(), searched: registry.clone() })?;
        let mut sources = walk(&root, &|name| name.ends_with(".rs") || name.ends_with(".md"))?;
        sources.retain(|file| file.bytes <= FILE_BYTES_MAX);
        sources.iter_mut().for_each(|file| file.name = format!("{folder}/{}", file.name));
        files.append(&mut sources);
    }
    let mut bytes = 0;
    files.retain(|file| {
        bytes += file.bytes;
        bytes <= CORPUS_BYTES_MAX
    });
    Ok(Source::of_files(registry, files))
}

/// The crate's folder name: its name and its version in the lock file (the last one, if it has several).
fn versioned(name: &str) -> String {
    let head = format!("name = \"{name}\"\nversion = \"");
    let version = LOCK.rsplit_once(&head).and_then(|(_, rest)| rest.split('"').next());
    format!("{name}-{}", version.unwrap_or("?"))
}

/// Where a registry has unpacked the crate. The folder between is named after the registry's host.
fn unpacked(registry: &Path, folder: &str) -> Option<PathBuf> {
    let hosts = fs::read_dir(registry).ok()?.flatten();
    hosts.map(|host| host.path().join(folder)).filter(|path| path.is_dir()).min()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::TextField;

    #[test]
    fn every_crate_of_the_list_is_in_the_lock_file_once_and_in_order() {
        for name in CRATES {
            assert!(!versioned(name).ends_with("-?"), "{name} is not in Cargo.lock: take it from the list");
        }
        assert!(CRATES.is_sorted());
    }

    fn fake_registry(host: &str) -> tempfile::TempDir {
        let home = tempfile::tempdir().unwrap();
        for name in CRATES {
            let folder = home.path().join("registry/src").join(host).join(versioned(name));
            fs::create_dir_all(folder.join("src")).unwrap();
            fs::write(folder.join("README.md"), format!("# {name}")).unwrap();
            fs::write(folder.join("src/lib.rs"), format!("//! {name}")).unwrap();
            fs::write(folder.join("Cargo.toml"), "[package]").unwrap();
            fs::write(folder.join("src/tables.rs"), vec![b' '; FILE_BYTES_MAX as usize + 1]).unwrap();
        }
        home
    }

    fn documents(source: &Source) -> Vec<String> {
        let mut documents = Vec::new();
        let mut push = |document: crate::data::text::Document<'_>| {
            documents.push(document.text.to_string());
            Ok(())
        };
        source.visit(&TextField::default(), &mut push).unwrap();
        documents
    }

    #[test]
    fn the_corpus_does_not_depend_on_the_registrys_name() {
        let (a, b) = (fake_registry("a.example-1"), fake_registry("b.example-2"));
        let a = documents(&source_in(a.path()).unwrap());
        assert_eq!(a, documents(&source_in(b.path()).unwrap()));
        assert_eq!(a.len(), 2 * CRATES.len());
        assert_eq!(a[..2], ["# aho-corasick", "//! aho-corasick"]);
    }

    #[test]
    fn a_missing_crate_is_named() {
        let home = fake_registry("a.example-1");
        fs::remove_dir_all(home.path().join("registry/src/a.example-1").join(versioned("zstd"))).unwrap();
        for (home, name) in [(home.path(), "zstd"), (Path::new("nowhere"), "aho-corasick")] {
            let error = source_in(home).unwrap_err().to_string();
            assert!(error.contains(&format!("found no source of {name}-")), "{error}");
            assert!(error.contains("\nhint: give your own text with --data"), "{error}");
        }
    }
}
