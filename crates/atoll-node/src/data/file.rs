//! Files that appear whole or not at all: written under another name, flushed, then renamed.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Runs `write` on a temporary sibling of `path` and puts the result in place.
pub(crate) fn write_with(path: &Path, write: impl FnOnce(&Path) -> io::Result<()>) -> io::Result<()> {
    let temporary = temporary_name(path);
    let written = write(&temporary)
        .and_then(|()| File::options().write(true).open(&temporary)?.sync_all())
        .and_then(|()| rename(&temporary, path));
    if written.is_err() {
        // The first error is the one to report; a leftover costs room, nothing else.
        let _ = fs::remove_file(&temporary);
    }
    written
}

/// Puts `bytes` at `path`.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    write_with(path, |temporary| File::create(temporary)?.write_all(bytes))
}

/// Renames a file or folder within its folder; when this returns, the new name outlasts a crash.
pub(crate) fn rename(from: &Path, to: &Path) -> io::Result<()> {
    fs::rename(from, to)?;
    sync_folder(to)
}

/// Makes a folder, if need be, whose name outlasts a crash.
pub(crate) fn make_folder(path: &Path) -> io::Result<()> {
    fs::create_dir_all(path)?;
    sync_folder(path)
}

/// A name of its own for each attempt: two threads may write the same file at the same time.
fn temporary_name(path: &Path) -> PathBuf {
    static ATTEMPTS: AtomicU64 = AtomicU64::new(0);
    let attempt = ATTEMPTS.fetch_add(1, Ordering::Relaxed);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.{}-{attempt}.tmp", std::process::id()))
}

/// Makes the names beside `path`, its own among them, durable. Windows has no such call and needs none.
pub(crate) fn sync_folder(path: &Path) -> io::Result<()> {
    let Some(folder) = path.parent().filter(|_| cfg!(unix)) else { return Ok(()) };
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    File::open(folder)?.sync_all()?;
    #[cfg(test)]
    synced::note(folder);
    Ok(())
}

/// Which folders were synced: no test can pull the plug, so it asks here.
#[cfg(test)]
pub(crate) mod synced {
    use std::cell::RefCell;
    use std::path::{Path, PathBuf};

    thread_local! {
        static FOLDERS: RefCell<Vec<PathBuf>> = const { RefCell::new(Vec::new()) };
    }

    pub(super) fn note(folder: &Path) {
        FOLDERS.with_borrow_mut(|folders| folders.push(folder.to_path_buf()));
    }

    /// The folders that this thread has synced since the last call, in that order.
    pub(crate) fn take() -> Vec<PathBuf> {
        FOLDERS.take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_name_is_synced_where_it_appears() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        write(&path, b"whole").unwrap();
        assert_eq!(synced::take(), [folder.path()]);
        rename(&path, &folder.path().join("other")).unwrap();
        assert_eq!(synced::take(), [folder.path()]);
        assert!(rename(&path, &folder.path().join("third")).is_err());
        assert!(synced::take().is_empty());
    }
}
