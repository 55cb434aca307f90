//! The files under a folder, in an order that the file system has no say in.

use std::fs::{self, Metadata};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use crate::data::{DataError, is_dataset};

/// One file of a source.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct SourceFile {
    /// Its name relative to the source, with `/` between folders.
    pub(crate) name: String,
    pub(crate) path: PathBuf,
    pub(crate) bytes: u64,
    pub(crate) modified_ns: u64,
}

impl SourceFile {
    pub(crate) fn new(path: &Path, name: String, metadata: &Metadata) -> Self {
        let modified = metadata.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        let modified_ns = modified.map_or(0, |age| age.as_nanos() as u64);
        Self { name, path: path.to_path_buf(), bytes: metadata.len(), modified_ns }
    }
}

/// The files under `root` whose relative name `keep` accepts, sorted by that name. Hidden entries,
/// `target/`, finished datasets and links to folders are left out.
pub(crate) fn walk(root: &Path, keep: &dyn Fn(&str) -> bool) -> Result<Vec<SourceFile>, DataError> {
    let mut files = Vec::new();
    let mut folders = vec![(root.to_path_buf(), String::new())];
    while let Some((folder, prefix)) = folders.pop() {
        let unreadable = |error| DataError::unreadable(&folder, error);
        for entry in fs::read_dir(&folder).map_err(unreadable)? {
            let entry = entry.map_err(unreadable)?;
            let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
            let kind = entry.file_type().map_err(unreadable)?;
            if name.starts_with('.') || (kind.is_dir() && (name == "target" || is_dataset(&path))) {
                continue;
            }
            let name = format!("{prefix}{name}");
            if kind.is_dir() {
                folders.push((path, format!("{name}/")));
            } else if keep(&name) {
                let metadata = fs::metadata(&path).map_err(|error| DataError::unreadable(&path, error))?;
                if metadata.is_file() {
                    files.push(SourceFile::new(&path, name, &metadata));
                }
            }
        }
    }
    files.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    Ok(files)
}
