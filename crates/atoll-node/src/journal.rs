//! The journal on disk: one line per entry, appended and synced before anything that follows from it
//! is announced. A line that a crash cut short was never announced and is dropped; damage anywhere
//! else is an error, because nothing after it can be trusted.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use atoll_core::journal::{Chain, Entry};

use crate::data::file;

/// An open journal.
#[derive(Debug)]
pub struct JournalFile {
    path: PathBuf,
    file: File,
    /// Hash over all lines so far.
    pub chain: Chain,
    /// Bytes of all lines so far.
    pub offset: u64,
}

/// Lines that come next, and the hash over all lines behind them.
#[derive(Debug)]
pub struct Lines {
    /// The lines, each with its end.
    pub text: String,
    chain: Chain,
}

impl JournalFile {
    /// Opens the journal behind `offset`, where its hash was `chain`, and hands each entry from there
    /// on to `visit`. A torn last line is cut off.
    ///
    /// # Errors
    /// If the file cannot be read, or is damaged before its last line.
    pub fn open(path: &Path, offset: u64, chain: Chain, mut visit: impl FnMut(Entry) -> Result<()>) -> Result<Self> {
        let place = || format!("the journal {}", path.display());
        let file = OpenOptions::new().read(true).append(true).create(true).open(path).with_context(place)?;
        let length = file.metadata().with_context(place)?.len();
        file::sync_folder(path).with_context(place)?;
        if length < offset {
            bail!("{} has {length} bytes, its snapshot speaks of {offset}\nhint: restore it from a backup", place());
        }
        let mut journal = Self { path: path.to_path_buf(), file, chain, offset };
        read_on(path, offset, chain, |entry, chain, offset| {
            (journal.chain, journal.offset) = (chain, offset);
            visit(entry)
        })?;
        if journal.offset < length {
            journal.file.set_len(journal.offset).with_context(place)?;
            journal.file.sync_all().with_context(place)?;
        }
        Ok(journal)
    }

    /// Appends entries and waits until the disk has them.
    ///
    /// # Errors
    /// If the disk does not take them; then none of them may be acted upon.
    pub fn append(&mut self, entries: &[Entry]) -> Result<()> {
        self.write(&self.lines(entries))
    }

    /// The lines that would record `entries`.
    pub fn lines(&self, entries: &[Entry]) -> Lines {
        let mut lines = Lines { text: String::new(), chain: self.chain };
        for entry in entries {
            lines.text.push_str(&lines.chain.write(entry));
            lines.text.push('\n');
        }
        lines
    }

    /// Takes lines that another coordinator wrote for the lines to come next.
    ///
    /// # Errors
    /// If they are not.
    pub fn understand(&self, text: String) -> Result<(Lines, Vec<Entry>)> {
        let mut chain = self.chain;
        let read = |line: &str| chain.read(line).map_err(|error| anyhow::anyhow!("{error}"));
        let entries = text.lines().map(read).collect::<Result<_>>()?;
        Ok((Lines { text, chain }, entries))
    }

    /// Appends lines and waits until the disk has them.
    ///
    /// # Errors
    /// If the disk does not take them; then none of them may be acted upon.
    pub fn write(&mut self, lines: &Lines) -> Result<()> {
        let Lines { text, chain } = lines;
        let write = self.file.write_all(text.as_bytes()).and_then(|()| self.file.sync_data());
        if let Err(error) = write {
            // Leave no half line behind, if the disk still lets us.
            let _ = self.file.set_len(self.offset);
            return Err(error).with_context(|| {
                format!(
                    "the journal {} cannot be written\nhint: make room on the disk and start again; nothing is lost",
                    self.path.display()
                )
            });
        }
        (self.chain, self.offset) = (*chain, self.offset + text.len() as u64);
        Ok(())
    }
}

/// Reads the entries behind `offset`, where the hash was `chain`, without touching the file: also beside
/// a living coordinator. A line that is being written is left out.
///
/// # Errors
/// If the file cannot be read or is damaged.
pub fn read_entries(path: &Path, offset: u64, chain: Chain) -> Result<Vec<Entry>> {
    let mut entries = Vec::new();
    read_on(path, offset, chain, |entry, _, _| {
        entries.push(entry);
        Ok(())
    })?;
    Ok(entries)
}

/// Like [`read_entries`], one by one; with each entry the hash and the length of the journal behind it.
///
/// # Errors
/// If the file cannot be read or is damaged, or `visit` says so.
pub fn read_on(
    path: &Path,
    mut offset: u64,
    mut chain: Chain,
    mut visit: impl FnMut(Entry, Chain, u64) -> Result<()>,
) -> Result<()> {
    let place = || format!("the journal {}", path.display());
    let mut reader = BufReader::new(File::open(path).with_context(place)?);
    reader.seek(SeekFrom::Start(offset)).with_context(place)?;
    let mut line = Vec::new();
    while reader.read_until(b'\n', &mut line).with_context(place)? > 0 {
        let entry = chain.read_whole(&line).map_err(|error| {
            anyhow::anyhow!("{} is damaged at byte {offset}: {error}\nhint: restore it from a backup", place())
        })?;
        let Some(entry) = entry else { break };
        offset += line.len() as u64;
        line.clear();
        visit(entry, chain, offset)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use atoll_core::hash::Digest;
    use std::fs;

    fn entries() -> Vec<Entry> {
        let began = Entry::Began { run: "r".into(), seed: 1, context: 8, layout: Digest::of(b"l"), theta: vec![] };
        vec![began, Entry::Finished]
    }

    fn read(path: &Path) -> Result<Vec<Entry>> {
        let mut seen = Vec::new();
        JournalFile::open(path, 0, Chain::default(), |entry| {
            seen.push(entry);
            Ok(())
        })?;
        Ok(seen)
    }

    #[test]
    fn every_cut_of_the_last_line_leaves_the_lines_before_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal.jsonl");
        JournalFile::open(&path, 0, Chain::default(), |_| Ok(())).unwrap().append(&entries()).unwrap();
        let whole = fs::read(&path).unwrap();
        assert_eq!(read(&path).unwrap(), entries());
        let first = whole.iter().position(|&byte| byte == b'\n').unwrap() + 1;
        for cut in first..whole.len() {
            fs::write(&path, &whole[..cut]).unwrap();
            assert_eq!(read(&path).unwrap(), entries()[..1]);
            assert_eq!(fs::read(&path).unwrap().len(), first, "the torn line must be gone");
        }
    }

    #[test]
    fn the_name_of_a_new_journal_is_synced() {
        let folder = tempfile::tempdir().unwrap();
        file::synced::take();
        assert_eq!(read(&folder.path().join("journal.jsonl")).unwrap(), []);
        assert_eq!(file::synced::take(), [folder.path()]);
    }

    #[test]
    fn damage_is_named_and_nothing_is_thrown_away() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal.jsonl");
        JournalFile::open(&path, 0, Chain::default(), |_| Ok(())).unwrap().append(&entries()).unwrap();
        let mut bytes = fs::read(&path).unwrap();
        bytes[30] ^= 1;
        fs::write(&path, &bytes).unwrap();
        let error = format!("{:#}", read(&path).unwrap_err());
        assert!(error.contains("damaged at byte 0") && error.contains("hint:"), "{error}");
        assert_eq!(fs::read(&path).unwrap(), bytes);
    }
}
