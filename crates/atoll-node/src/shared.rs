//! What of a run lies in its object store, so that another coordinator can go on with it.
//!
//! ```text
//! journal/<entry>          the lines from that entry on that were appended at once; never replaced, never dropped
//! payloads/<hash>          contributions in the commits since the oldest snapshot here
//! snapshots/<entries>      names the chunks of a snapshot and of the journal before it; written last
//! chunks/<epoch>/<hash>    their bytes
//! leader                   who leads, and a number that grows as long as it lives
//! ```
//!
//! **The journal is the lease.** An entry is in the run once its segment is here, and a segment can be put under a name
//! only once. Two coordinators that both think they lead want the same next name; one gets it. Whoever takes over begins
//! with [`Entry::Leads`](atoll_core::journal::Entry::Leads): it is what the earlier leader comes upon, even years
//! later, so segments stay. Clocks decide nothing.

use std::fs;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use atoll_core::hash::Digest;
use serde::{Deserialize, Serialize};

use crate::data::file;
use crate::objects::{Created, Objects, StoreFailed};
use crate::run::{RunDir, write_atomically};
use crate::snapshot;

/// A run's place in an object store.
#[derive(Debug, Clone)]
pub struct Shared {
    objects: Objects,
}

/// What a leader says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Beat {
    /// The epoch that it leads.
    pub epoch: u64,
    /// Which process it is.
    pub holder: Digest,
    /// Where sites reach it.
    pub address: String,
    /// Grows from beat to beat.
    pub number: u64,
    /// What it does.
    pub state: State,
}

/// What a leader does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// It leads.
    Leading,
    /// It stopped in good order; whoever waits may go on.
    Stopped,
    /// The run is finished, and all who were there know.
    Finished,
}

/// What became of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Published {
    /// It is the next one.
    Ours,
    /// Another coordinator's is: it leads now.
    Taken,
}

/// A snapshot here.
#[derive(Debug, Serialize, Deserialize)]
struct Parcel {
    files: Vec<Item>,
}

/// A file of a snapshot, by its path in the run folder.
#[derive(Debug, Serialize, Deserialize)]
struct Item {
    path: String,
    bytes: u64,
    /// Names of its chunks, in order.
    chunks: Vec<String>,
}

/// Bytes of a chunk: a transfer that was cut off goes on behind the last whole one.
const CHUNK: u64 = 32 << 20;
/// The journal grows at its end, and what is whole need not be put again.
const JOURNAL_CHUNK: u64 = 1 << 20;
/// Entries that are hardly ever more in one segment.
const SEGMENT_USUAL: u64 = 64;
/// A store that does not take the journal for so long ends the coordinator.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

impl Shared {
    /// Opens the place at `address`.
    ///
    /// # Errors
    /// If the address is none.
    pub fn open(address: &str) -> Result<Self> {
        Ok(Self { objects: Objects::open(address)? })
    }

    /// The store.
    pub fn objects(&self) -> &Objects {
        &self.objects
    }

    // ---- the journal ----

    /// Whether a run has begun here.
    ///
    /// # Errors
    /// If the store fails.
    pub fn has_begun(&self) -> Result<bool> {
        self.objects.has(&segment_name(1))
    }

    /// The lines that begin with entry number `first`, if they were appended at once.
    ///
    /// # Errors
    /// If the store fails.
    pub fn segment(&self, first: u64) -> Result<Option<String>> {
        let bytes = self.objects.get(&segment_name(first))?;
        bytes.map(|bytes| String::from_utf8(bytes).context("the journal in the object store is damaged")).transpose()
    }

    /// The line of entry number `entry`, and what stands behind it in its segment, which is nothing if it is the last there; none
    /// if the entry is not here.
    ///
    /// # Errors
    /// If the store fails.
    pub fn rest_behind(&self, entry: u64) -> Result<Option<(String, String)>> {
        // What is appended at once is little, and a run may have millions of segments: it is not worth a list of them.
        for begin in (entry.saturating_sub(SEGMENT_USUAL).max(1)..=entry).rev() {
            if let Some(lines) = self.segment(begin)? {
                return Ok(rest(&lines, entry - begin + 1));
            }
        }
        let names = self.objects.list("journal")?;
        let begin = names.iter().filter_map(|name| name.parse().ok()).filter(|begin: &u64| *begin <= entry).max();
        let Some(begin) = begin else { return Ok(None) };
        Ok(self.segment(begin)?.and_then(|lines| rest(&lines, entry - begin + 1)))
    }

    /// Puts the lines from entry number `first` on, unless another coordinator has. Tries for a while if the store fails:
    /// whether an attempt that brought no answer has put them is seen when the next one does.
    ///
    /// # Errors
    /// If the store fails for long; whether they are there is then not known.
    pub fn publish(&self, first: u64, lines: &str) -> Result<Published> {
        let (name, began) = (segment_name(first), Instant::now());
        let mut pause = Duration::from_millis(100);
        loop {
            match self.objects.create(&name, lines.as_bytes()) {
                Ok(Created::Now) => return Ok(Published::Ours),
                Ok(Created::Before) => match self.segment(first) {
                    Ok(Some(there)) if there == lines => return Ok(Published::Ours),
                    Ok(Some(_)) => return Ok(Published::Taken),
                    Ok(None) => {}
                    Err(error) => tracing::warn!("{error:#}; trying on"),
                },
                Err(error) if began.elapsed() > PATIENCE => return Err(error),
                Err(error) => tracing::warn!("{error:#}; trying on"),
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_secs(5));
        }
    }

    /// Whether somebody has put a segment that begins with that entry.
    ///
    /// # Errors
    /// If the store fails.
    pub fn has_segment(&self, first: u64) -> Result<bool> {
        self.objects.has(&segment_name(first))
    }

    // ---- payloads ----

    /// Keeps a contribution.
    ///
    /// # Errors
    /// If the store fails.
    pub fn put_payload(&self, digest: Digest, bytes: &[u8]) -> Result<()> {
        self.objects.put(&payload_name(digest), bytes)
    }

    /// A contribution, if it is here and undamaged.
    ///
    /// # Errors
    /// If the store fails.
    pub fn payload(&self, digest: Digest) -> Result<Option<Vec<u8>>> {
        Ok(self.objects.get(&payload_name(digest))?.filter(|bytes| Digest::of(bytes) == digest))
    }

    /// Drops contributions. What stays behind because the store fails costs room, nothing else.
    pub fn drop_payloads(&self, payloads: &[Digest]) {
        for digest in payloads {
            if let Err(error) = self.objects.remove(&payload_name(*digest)) {
                tracing::debug!("{error:#}");
            }
        }
    }

    // ---- snapshots ----

    /// Numbers of entries that the snapshots here sum up, oldest first.
    ///
    /// # Errors
    /// If the store fails.
    pub fn snapshots(&self) -> Result<Vec<u64>> {
        Ok(self.objects.list("snapshots")?.iter().filter_map(|name| name.parse().ok()).collect())
    }

    /// Puts a snapshot's folder, and the first `offset` bytes of the journal, which lie before it. Chunks that are here
    /// already are not put again: after a cut it goes on.
    ///
    /// # Errors
    /// If the disk or the store fails.
    pub fn save_snapshot(&self, dir: &RunDir, entries: u64, offset: u64, epoch: u64) -> Result<()> {
        let folder = dir.snapshots().join(format!("{entries:012}"));
        let mut files = vec![self.save_file(&dir.journal(), "journal.jsonl", offset, JOURNAL_CHUNK, epoch)?];
        for file in fs::read_dir(&folder).with_context(|| format!("{} cannot be read", folder.display()))? {
            let file = file?;
            let (name, bytes) = (file.file_name().to_string_lossy().into_owned(), file.metadata()?.len());
            let path = format!("snapshots/{entries:012}/{name}");
            files.push(self.save_file(&file.path(), &path, bytes, CHUNK, epoch)?);
        }
        self.objects.put(&snapshot_name(entries), &serde_json::to_vec(&Parcel { files })?)
    }

    fn save_file(&self, from: &Path, path: &str, bytes: u64, chunk: u64, epoch: u64) -> Result<Item> {
        let place = || format!("{} cannot be read", from.display());
        let mut file = fs::File::open(from).with_context(place)?;
        let mut chunks = Vec::new();
        for offset in (0..bytes).step_by(chunk as usize) {
            let mut buffer = vec![0; chunk.min(bytes - offset) as usize];
            file.seek(SeekFrom::Start(offset)).and_then(|_| file.read_exact(&mut buffer)).with_context(place)?;
            // A leader that was deposed drops only chunks of its own epoch and of earlier ones.
            let name = format!("chunks/{epoch:06}/{}", Digest::of(&buffer));
            if !self.objects.has(&name)? {
                self.objects.put(&name, &buffer)?;
            }
            chunks.push(name);
        }
        Ok(Item { path: path.to_string(), bytes, chunks })
    }

    /// Fetches the newest whole snapshot into a run folder that has none. What had arrived when a fetch was cut off is used.
    ///
    /// # Errors
    /// If the store or the disk fails, or the snapshot is damaged. Until it is whole and in place,
    /// [`is_fetching`] says so.
    pub fn fetch_snapshot(&self, dir: &RunDir) -> Result<Option<u64>> {
        let mut snapshots = self.snapshots()?;
        let Some(mut entries) = snapshots.pop() else { return Ok(None) };
        loop {
            match (self.fetch_one(dir, entries), snapshots.pop()) {
                (Err(error), Some(older)) if !error.is::<StoreFailed>() => {
                    tracing::warn!("{error:#}; an older one is tried");
                    entries = older;
                }
                (fetched, _) => return fetched.map(|is_there| is_there.then_some(entries)),
            }
        }
    }

    /// Fetches one snapshot; false if it is gone by now.
    fn fetch_one(&self, dir: &RunDir, entries: u64) -> Result<bool> {
        let Some(parcel) = self.parcel(entries)? else { return Ok(false) };
        let arriving = fetching(dir);
        file::make_folder(&arriving).with_context(|| format!("{} cannot be made", arriving.display()))?;
        let new = arriving.join("run");
        for item in &parcel.files {
            self.fetch_file(item, &arriving, &new)?;
        }
        snapshot::verify(&new.join("snapshots").join(format!("{entries:012}")))?;
        file::make_folder(&dir.snapshots()).with_context(|| format!("{} cannot be made", dir.snapshots().display()))?;
        for path in [PathBuf::from("journal.jsonl"), Path::new("snapshots").join(format!("{entries:012}"))] {
            let to = dir.0.join(&path);
            let _ = fs::remove_dir_all(&to); // From an attempt that was cut off here.
            file::rename(&new.join(&path), &to).with_context(|| format!("{} cannot be put in place", to.display()))?;
        }
        fs::remove_dir_all(&arriving).with_context(|| format!("{} cannot be removed", arriving.display()))?;
        Ok(true)
    }

    fn parcel(&self, entries: u64) -> Result<Option<Parcel>> {
        let bytes = self.objects.get(&snapshot_name(entries))?;
        let parcel = bytes.map(|bytes| serde_json::from_slice(&bytes)).transpose();
        parcel.with_context(|| format!("the snapshot {entries} in the object store is damaged"))
    }

    fn fetch_file(&self, item: &Item, arriving: &Path, new: &Path) -> Result<()> {
        let is_plain = Path::new(&item.path).components().all(|part| matches!(part, std::path::Component::Normal(_)));
        if !is_plain {
            bail!("a snapshot in the object store names {}, which leads out of the run folder", item.path);
        }
        let path = new.join(&item.path);
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).with_context(|| format!("{} cannot be made", folder.display()))?;
        }
        let mut chunks = Vec::new();
        for name in &item.chunks {
            chunks.push(self.fetch_chunk(name, arriving)?);
        }
        file::write_with(&path, |temporary| {
            let mut file = fs::File::create(temporary)?;
            chunks.iter().try_for_each(|chunk| file.write_all(&fs::read(chunk)?))
        })
        .with_context(|| format!("{} cannot be written", path.display()))?;
        match fs::metadata(&path)?.len() {
            bytes if bytes == item.bytes => Ok(()),
            bytes => bail!("{} has {bytes} bytes in the object store, not {}", item.path, item.bytes),
        }
    }

    /// Fetches a chunk into a file, unless it is there already.
    fn fetch_chunk(&self, name: &str, arriving: &Path) -> Result<PathBuf> {
        let hash = name.rsplit('/').next().unwrap_or_default();
        let digest: Digest = hash.parse().map_err(|_| anyhow::anyhow!("{name} is no chunk"))?;
        let path = arriving.join(digest.to_string());
        if fs::read(&path).is_ok_and(|bytes| Digest::of(&bytes) == digest) {
            return Ok(path);
        }
        match self.objects.get(name)? {
            Some(bytes) if Digest::of(&bytes) == digest => write_atomically(&path, &bytes).map(|()| path),
            Some(_) => bail!("{name} is damaged in the object store\nhint: an older snapshot there may still be whole"),
            None => bail!("{name} is missing in the object store\nhint: an older snapshot there may still be whole"),
        }
    }

    /// Drops all but the newest `keep` snapshots, and the chunks that only they need; returns what the oldest one kept sums up.
    ///
    /// # Errors
    /// If the store fails.
    pub fn prune(&self, keep: usize) -> Result<u64> {
        let mut kept = self.snapshots()?;
        let old: Vec<u64> = kept.drain(..kept.len().saturating_sub(keep)).collect();
        let chunks = |entries: &[u64]| -> Result<Vec<String>> {
            let parcels: Vec<Option<Parcel>> = entries.iter().map(|at| self.parcel(*at)).collect::<Result<_>>()?;
            Ok(parcels.into_iter().flatten().flat_map(|parcel| parcel.files).flat_map(|item| item.chunks).collect())
        };
        let (needed, unneeded) = (chunks(&kept)?, chunks(&old)?);
        old.iter().try_for_each(|entries| self.objects.remove(&snapshot_name(*entries)))?;
        let unneeded = unneeded.iter().filter(|name| !needed.contains(name));
        unneeded.into_iter().try_for_each(|name| self.objects.remove(name))?;
        Ok(kept.first().copied().unwrap_or(0))
    }

    // ---- the leader ----

    /// Says that this coordinator leads.
    ///
    /// # Errors
    /// If the store fails.
    pub fn beat(&self, beat: &Beat) -> Result<()> {
        self.objects.put("leader", &serde_json::to_vec(beat)?)
    }

    /// Who said last that it leads.
    ///
    /// # Errors
    /// If the store fails.
    pub fn leader(&self) -> Result<Option<Beat>> {
        // What cannot be understood is no sign of life.
        Ok(self.objects.get("leader")?.and_then(|bytes| serde_json::from_slice(&bytes).ok()))
    }
}

/// Line number `count` of these, and what stands behind it; none if they are not so many.
fn rest(lines: &str, count: u64) -> Option<(String, String)> {
    let all: Vec<&str> = lines.split_inclusive('\n').collect();
    let line = all.get((count as usize).checked_sub(1)?)?;
    Some((line.trim_end().to_string(), all[count as usize..].concat()))
}

/// Whether a snapshot was being fetched into that run folder when its process died.
pub fn is_fetching(dir: &RunDir) -> bool {
    fetching(dir).exists()
}

fn fetching(dir: &RunDir) -> PathBuf {
    dir.0.join("fetching")
}

fn segment_name(first: u64) -> String {
    format!("journal/{first:012}")
}

fn snapshot_name(entries: u64) -> String {
    format!("snapshots/{entries:012}")
}

fn payload_name(digest: Digest) -> String {
    format!("payloads/{digest}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shared() -> (tempfile::TempDir, Shared, RunDir) {
        let folder = tempfile::tempdir().unwrap();
        let shared = Shared::open(&folder.path().join("store").to_string_lossy()).unwrap();
        let dir = RunDir(folder.path().join("run"));
        fs::create_dir_all(dir.snapshots().join("000000000002")).unwrap();
        fs::write(dir.journal(), "one\ntwo\nthree\n").unwrap();
        fs::write(dir.snapshots().join("000000000002/book.json"), "a book").unwrap();
        (folder, shared, dir)
    }

    #[test]
    fn a_segment_belongs_to_whoever_came_first() {
        let (_folder, shared, _) = shared();
        assert_eq!(shared.rest_behind(1).unwrap(), None);
        assert_eq!(shared.publish(1, "a\nb\n").unwrap(), Published::Ours);
        assert_eq!(shared.publish(1, "a\nb\n").unwrap(), Published::Ours, "an answer may be lost");
        assert_eq!(shared.publish(1, "c\n").unwrap(), Published::Taken);
        assert_eq!(shared.publish(3, "d\n").unwrap(), Published::Ours);
        assert_eq!(shared.segment(2).unwrap(), None);
        let behind = |entry| shared.rest_behind(entry).unwrap();
        let at = |line: &str, rest: &str| Some((line.to_string(), rest.to_string()));
        assert_eq!((behind(1), behind(2), behind(3), behind(4)), (at("a", "b\n"), at("b", ""), at("d", ""), None));
        assert_eq!(shared.publish(4, &"e\n".repeat(100)).unwrap(), Published::Ours);
        assert_eq!((behind(101), behind(103), behind(104)), (at("e", "e\ne\n"), at("e", ""), None));
    }

    #[test]
    fn a_snapshot_goes_there_and_back() {
        let (folder, shared, dir) = shared();
        shared.save_snapshot(&dir, 2, 8, 1).unwrap();
        let other = RunDir(folder.path().join("other"));
        assert_eq!(shared.fetch_snapshot(&other).unwrap(), Some(2));
        assert_eq!(fs::read_to_string(other.journal()).unwrap(), "one\ntwo\n");
        assert_eq!(fs::read_to_string(other.snapshots().join("000000000002/book.json")).unwrap(), "a book");
        assert!(!is_fetching(&other));
    }

    #[test]
    fn damage_in_the_store_is_seen_and_leaves_the_folder_as_it_was() {
        let (folder, shared, dir) = shared();
        shared.save_snapshot(&dir, 2, 8, 1).unwrap();
        let chunks = folder.path().join("store/chunks/000001");
        for chunk in fs::read_dir(&chunks).unwrap() {
            fs::write(chunk.unwrap().path(), "x").unwrap();
        }
        let other = RunDir(folder.path().join("other"));
        let error = shared.fetch_snapshot(&other).unwrap_err().to_string();
        assert!(error.contains("damaged") && error.contains("hint:"), "{error}");
        assert!(!other.journal().exists() && !other.snapshots().exists());
    }

    #[test]
    fn an_older_snapshot_is_fetched_if_the_newest_is_damaged() {
        let (folder, shared, dir) = shared();
        shared.save_snapshot(&dir, 2, 8, 1).unwrap();
        let newest = dir.snapshots().join("000000000003");
        fs::create_dir(&newest).unwrap();
        fs::write(newest.join("book.json"), "a book").unwrap();
        snapshot::seal(&newest).unwrap();
        // Damaged before it was put there, so that every chunk is what its name says.
        fs::write(newest.join("book.json"), "a look").unwrap();
        shared.save_snapshot(&dir, 3, 14, 1).unwrap();
        let other = RunDir(folder.path().join("other"));
        assert_eq!(shared.fetch_snapshot(&other).unwrap(), Some(2));
        assert_eq!(fs::read_to_string(other.journal()).unwrap(), "one\ntwo\n");
        assert!(!other.snapshots().join("000000000003").exists() && !is_fetching(&other));
    }

    #[test]
    fn old_snapshots_go_with_the_chunks_that_only_they_need() {
        let (folder, shared, dir) = shared();
        shared.save_snapshot(&dir, 2, 8, 1).unwrap();
        fs::rename(dir.snapshots().join("000000000002"), dir.snapshots().join("000000000003")).unwrap();
        shared.save_snapshot(&dir, 3, 14, 1).unwrap();
        assert_eq!(shared.prune(1).unwrap(), 3);
        assert_eq!(shared.snapshots().unwrap(), [3]);
        assert_eq!(fs::read_dir(folder.path().join("store/chunks/000001")).unwrap().count(), 2);
        let other = RunDir(folder.path().join("other"));
        assert_eq!(shared.fetch_snapshot(&other).unwrap(), Some(3));
    }

    #[test]
    fn no_path_leads_out_of_the_folder() {
        let (folder, shared, _) = shared();
        let parcel = r#"{"files": [{"path": "../evil", "bytes": 0, "chunks": []}]}"#;
        shared.objects().put("snapshots/000000000009", parcel.as_bytes()).unwrap();
        let other = RunDir(folder.path().join("other"));
        assert!(shared.fetch_snapshot(&other).unwrap_err().to_string().contains("leads out"));
        assert!(!folder.path().join("evil").exists());
    }
}
