//! The documents of a path, as one stream whose order depends on nothing but the names of the files.
//!
//! | file | documents |
//! |---|---|
//! | `.txt .md .rst`, source code | one: the whole file; skipped and counted if it is not UTF-8 |
//! | `.jsonl`, `.json` | one per line: the text field of the line's JSON object |
//! | `.parquet` | one per row: the text column |
//! | `.gz`, `.zst` of the first two | as above |
//!
//! A folder is read recursively in the order of the files' relative names, without hidden entries and
//! `target/`. Memory holds one document at a time (or 128 rows of a parquet file).

mod columns;
mod files;
mod lines;

use std::fmt;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use atoll_core::hash::Digest;

use crate::data::DataError;
pub(crate) use files::{SourceFile, walk};

/// The JSON field or parquet column that holds the text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TextField(pub String);

impl Default for TextField {
    fn default() -> Self {
        Self("text".to_string())
    }
}

/// Files to read documents from, in order.
#[derive(Debug, Clone, PartialEq)]
pub struct Source {
    root: PathBuf,
    files: Vec<SourceFile>,
}

/// One document and where it is from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Document<'a> {
    /// Index of its file in the source.
    pub file: usize,
    /// The text; never blank.
    pub text: &'a str,
}

/// What a source holds that is no document.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Skipped {
    /// Files that are not UTF-8.
    pub not_utf8: u64,
    /// Documents that are null, empty or white space.
    pub blank: u64,
}

/// What the visitor of a stream of documents is.
pub(crate) type Visitor<'v> = dyn FnMut(&str) -> Result<(), DataError> + 'v;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Format {
    Text,
    JsonLines,
    Parquet,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Packing {
    Plain,
    Gzip,
    Zstd,
}

impl Source {
    /// Lists the documents' files under `path`, a file or a folder.
    ///
    /// # Errors
    /// If the path is empty or missing, cannot be listed, or holds no file of a known format.
    pub fn open(path: &Path) -> Result<Self, DataError> {
        if path.as_os_str().is_empty() {
            return Err(DataError::NoPath);
        }
        let metadata = std::fs::metadata(path).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => DataError::NotFound { path: path.to_path_buf() },
            _ => DataError::unreadable(path, error),
        })?;
        let files = if metadata.is_dir() {
            walk(path, &|name| format_of(name).is_some())?
        } else {
            vec![SourceFile::new(path, path.file_name().unwrap_or_default().to_string_lossy().into_owned(), &metadata)]
        };
        if files.is_empty() {
            return Err(DataError::NoDocument { path: path.to_path_buf(), skipped: Skipped::default() });
        }
        Ok(Self { root: path.to_path_buf(), files })
    }

    /// A source of files that were listed elsewhere, in the order of their names.
    pub(crate) fn of_files(root: PathBuf, files: Vec<SourceFile>) -> Self {
        Self { root, files }
    }

    /// The path that was opened.
    pub fn path(&self) -> &Path {
        &self.root
    }

    /// Number of files.
    pub fn files(&self) -> usize {
        self.files.len()
    }

    /// Bytes of all files on disk.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes).sum()
    }

    /// Changes when a file is added, removed, renamed, resized or touched: whether to ingest again.
    pub fn signature(&self) -> Digest {
        let mut hasher = blake3::Hasher::new();
        for file in &self.files {
            hasher.update(&(file.name.len() as u64).to_le_bytes());
            hasher.update(file.name.as_bytes());
            hasher.update(&file.bytes.to_le_bytes());
            hasher.update(&file.modified_ns.to_le_bytes());
        }
        Digest(*hasher.finalize().as_bytes())
    }

    /// Shows every document to `visit`, in order.
    ///
    /// # Errors
    /// The first unreadable file, malformed line or missing field, by name; or what `visit` returns.
    pub fn visit(
        &self,
        field: &TextField,
        visit: &mut dyn FnMut(Document<'_>) -> Result<(), DataError>,
    ) -> Result<Skipped, DataError> {
        let mut skipped = Skipped::default();
        for (file, SourceFile { name, path, .. }) in self.files.iter().enumerate() {
            let mut blank = 0;
            let mut each = |text: &str| {
                if text.trim_ascii().is_empty() {
                    blank += 1;
                    return Ok(());
                }
                visit(Document { file, text })
            };
            let (format, packing) = format_of(name).unwrap_or((Format::Text, Packing::Plain));
            match format {
                Format::Text => skipped.not_utf8 += visit_text(path, packing, &mut each)?,
                Format::JsonLines => lines::visit(path, unpack(path, packing)?, &field.0, &mut each)?,
                Format::Parquet => columns::visit(path, &field.0, &mut each)?,
            }
            skipped.blank += blank;
        }
        Ok(skipped)
    }
}

/// Visits a whole file as one document; returns 1 if it is not UTF-8, else 0.
fn visit_text(path: &Path, packing: Packing, visit: &mut Visitor<'_>) -> Result<u64, DataError> {
    let mut bytes = Vec::new();
    unpack(path, packing)?.read_to_end(&mut bytes).map_err(|error| DataError::unreadable(path, error))?;
    match std::str::from_utf8(&bytes) {
        Ok(text) => visit(text).map(|()| 0),
        Err(_) => Ok(1),
    }
}

fn unpack(path: &Path, packing: Packing) -> Result<Box<dyn BufRead>, DataError> {
    let open = || -> std::io::Result<Box<dyn BufRead>> {
        let file = File::open(path)?;
        Ok(match packing {
            Packing::Plain => Box::new(BufReader::with_capacity(1 << 16, file)),
            Packing::Gzip => {
                Box::new(BufReader::with_capacity(1 << 16, flate2::read::MultiGzDecoder::new(BufReader::new(file))))
            }
            Packing::Zstd => {
                let mut decoder = zstd::stream::read::Decoder::new(file)?;
                decoder.window_log_max(31)?;
                Box::new(BufReader::with_capacity(1 << 16, decoder))
            }
        })
    };
    open().map_err(|error| DataError::unreadable(path, error))
}

/// What the name of a file says about its content; `None` if nothing.
fn format_of(name: &str) -> Option<(Format, Packing)> {
    let name = name.to_ascii_lowercase();
    let (inner, packing) = match name.rsplit_once('.')? {
        (inner, "gz") => (inner, Packing::Gzip),
        (inner, "zst") => (inner, Packing::Zstd),
        _ => (name.as_str(), Packing::Plain),
    };
    let extension = inner.rsplit_once('.')?.1;
    match extension {
        "jsonl" | "json" | "ndjson" => Some((Format::JsonLines, packing)),
        "parquet" if packing == Packing::Plain => Some((Format::Parquet, packing)),
        _ => TEXT_EXTENSIONS.contains(&extension).then_some((Format::Text, packing)),
    }
}

#[rustfmt::skip]
const TEXT_EXTENSIONS: [&str; 72] = [
    "txt", "md", "rst",
    "adb", "ads", "asm", "bash", "c", "cc", "clj", "cmake", "cpp", "cs", "css", "cu", "cuh", "cxx", "dart", "el",
    "erl", "ex", "exs", "f", "f90", "fs", "go", "h", "hh", "hpp", "hs", "html", "ini", "java", "jl", "js", "jsx",
    "kt", "lisp", "lua", "m", "mjs", "ml", "mli", "mm", "nim", "php", "pl", "proto", "py", "pyi", "r", "rb", "rs",
    "s", "scala", "scm", "scss", "sh", "sol", "sql", "swift", "tcl", "tex", "toml", "ts", "tsx", "v", "vim", "xml",
    "yaml", "yml", "zig",
];

impl fmt::Display for Skipped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.not_utf8, self.blank) {
            (0, 0) => Ok(()),
            (files, 0) => write!(f, " (files that are not UTF-8: {files})"),
            (0, blank) => write!(f, " (blank documents: {blank})"),
            (files, blank) => write!(f, " (files that are not UTF-8: {files}, blank documents: {blank})"),
        }
    }
}

#[cfg(test)]
mod tests;
