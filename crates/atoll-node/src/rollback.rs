//! Back to an earlier commit: model, outer optimizer and ledger return together, and what came later is set aside whole.
//!
//! ```text
//! RUN/.rollback/   journal.jsonl snapshots/      what is to be, written and synced first
//! RUN/set-aside/<entries>/                       what was: a run folder that `atoll replay` understands
//! RUN/rollback                                   the name of that folder; from here on the rollback is carried through
//! ```
//!
//! Before the file `rollback` is there nothing has happened; once it is, whoever works on the folder next finishes what
//! it says, by renames of which each is done or not. So nothing is lost, whenever the process dies.
//!
//! The new journal is the old one up to the commit, then whoever was let in or revoked since (a key that is out stays
//! out, a ticket that is used up stays used up), then [`Entry::RolledBack`]: it closes all sessions, so that sites with
//! later weights start over from the model as it is now.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use atoll_core::journal::{Book, Chain, Entry};
use atoll_core::outer::Global;
use atoll_core::site::SiteId;

use crate::coordinator::Prepared;
use crate::data::file;
use crate::journal::{JournalFile, read_on};
use crate::run::{RunDir, write_atomically};
use crate::snapshot::{self, Place};
use crate::store::Store;

/// What a rollback did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RolledBack {
    /// Commits that the run had.
    pub from: u64,
    /// Commits that it has now.
    pub to: u64,
    /// Where everything is that it had.
    pub aside: PathBuf,
}

/// Takes the run of a stopped coordinator back to the moment after its commit number `to`; 0 is before the first.
///
/// # Errors
/// If a coordinator lives, the commit cannot be reached, or the disk fails; the run is then as it was.
pub fn roll_back(prepared: &Prepared, to: u64) -> Result<RolledBack> {
    let dir = &prepared.dir;
    let _hold = dir.hold()?;
    finish(dir)?;
    let past = Past::read(prepared, to)?;
    let from = past.commits();
    let name = free_name(dir, past.entries());
    prepare(prepared, past, from)?;
    set_aside(dir, &name)?;
    write_atomically(&intent(dir), name.as_bytes())?;
    finish(dir)?;
    Ok(RolledBack { from, to, aside: aside(dir, &name) })
}

/// Carries a rollback through that was begun, or forgets one that never began.
///
/// # Errors
/// If the disk fails; then the next call goes on.
pub fn finish(dir: &RunDir) -> Result<()> {
    if let Some(name) = begun(dir)? {
        for (from, to) in moves(dir, &name) {
            carry_out(&from, &to)?;
        }
        remove(&intent(dir), |path| fs::remove_file(path))?;
    }
    remove(&new(dir).0, |path| fs::remove_dir_all(path))
}

/// Fails if a rollback has begun and is not finished: what the folder holds does not belong together yet.
///
/// # Errors
/// If so.
pub fn check_finished(dir: &RunDir) -> Result<()> {
    match begun(dir)? {
        None => Ok(()),
        Some(_) => bail!(
            "a rollback of {0} has begun and is not finished\nhint: `atoll coordinate {0}` finishes it first",
            dir.0.display()
        ),
    }
}

fn new(dir: &RunDir) -> RunDir {
    RunDir(dir.0.join(".rollback"))
}

fn intent(dir: &RunDir) -> PathBuf {
    dir.0.join("rollback")
}

fn aside(dir: &RunDir, name: &str) -> PathBuf {
    dir.0.join("set-aside").join(name)
}

fn begun(dir: &RunDir) -> Result<Option<String>> {
    match fs::read_to_string(intent(dir)) {
        Ok(name) => Ok(Some(name)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("{} cannot be read", intent(dir).display())),
    }
}

/// A name that no earlier rollback has used.
fn free_name(dir: &RunDir, entries: u64) -> String {
    let names = (0..).map(|again| if again == 0 { format!("{entries:012}") } else { format!("{entries:012}-{again}") });
    names.into_iter().find(|name| !aside(dir, name).exists()).unwrap_or_default()
}

/// In this order; each is done once its target is there or its source is not.
fn moves(dir: &RunDir, name: &str) -> Vec<(PathBuf, PathBuf)> {
    let (new, aside) = (new(dir).0, aside(dir, name));
    let out = |file: &str| (dir.0.join(file), aside.join(file));
    let into = |file: &str| (new.join(file), dir.0.join(file));
    let replaced = ["journal.jsonl", "snapshots"].into_iter().flat_map(|file| [out(file), into(file)]);
    replaced.chain(["status.json", "report.json", "model"].into_iter().map(out)).collect()
}

fn carry_out(from: &Path, to: &Path) -> Result<()> {
    if to.exists() || !from.exists() {
        return Ok(());
    }
    file::rename(from, to).with_context(|| format!("{} cannot become {}", from.display(), to.display()))
}

fn remove(path: &Path, how: impl FnOnce(&Path) -> std::io::Result<()>) -> Result<()> {
    match how(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("{} cannot be removed", path.display()))
        }
        _ => Ok(()),
    }
}

// ---- what was ----

/// The run at the commit to return to, and what followed.
struct Past {
    global: Global,
    book: Book,
    chain: Chain,
    offset: u64,
    /// The entries behind that point, and the journal's hash behind them.
    later: Vec<Entry>,
    last: Chain,
}

impl Past {
    /// Computes the state after commit number `to` again, from the newest undamaged snapshot that is not later.
    fn read(prepared: &Prepared, to: u64) -> Result<Self> {
        let Prepared { dir, model, manifest, config, .. } = prepared;
        let folders = snapshots_for(dir, to)?;
        let newest_first = folders.iter().map(PathBuf::as_path);
        let (global, Place { book, chain, offset }) = snapshot::load(newest_first, model, manifest, config.seed)?;
        let store = Store::open(dir.payloads())?;
        let mut past = Self { global, book, chain, offset, later: Vec::new(), last: chain };
        read_on(&dir.journal(), offset, chain, |entry, chain, offset| {
            past.last = chain;
            if past.book.commits() == to {
                past.later.push(entry);
                return Ok(());
            }
            if let Entry::Committed(commit) = &entry {
                snapshot::replay(&mut past.global, commit, &store)?;
            }
            (past.chain, past.offset) = (chain, offset);
            past.book.apply(&entry).map_err(|error| anyhow!("the journal contradicts itself: {error}"))
        })?;
        past.checked(dir, to)
    }

    fn checked(self, dir: &RunDir, to: u64) -> Result<Self> {
        let latest = self.commits();
        if to > latest {
            return Err(unreachable(dir, to, latest));
        }
        if to == latest {
            bail!("the run in {} is at commit {to} already\nhint: choose an earlier commit", dir.0.display());
        }
        Ok(self)
    }

    /// Commits of the run as it was.
    fn commits(&self) -> u64 {
        let later = self.later.iter().filter(|entry| matches!(entry, Entry::Committed(_)));
        self.book.commits() + later.count() as u64
    }

    fn entries(&self) -> u64 {
        self.book.entries + self.later.len() as u64
    }

    /// The latest session of each site: a later one is told from it.
    fn sessions(&self) -> BTreeMap<SiteId, u64> {
        let mut sessions: BTreeMap<SiteId, u64> =
            self.book.sites.iter().map(|(site, member)| (site.clone(), member.session)).collect();
        for entry in &self.later {
            if let Entry::Joined { site, session, .. } = entry {
                sessions.insert(site.clone(), *session);
            }
        }
        sessions
    }

    /// What follows the commit in the new journal.
    fn epilogue(&self, from: u64) -> Vec<Entry> {
        let back = Entry::RolledBack { from, to: self.book.commits(), journal: self.last.0, sessions: self.sessions() };
        self.later.iter().filter(|entry| entry.is_about_people()).cloned().chain([back]).collect()
    }
}

/// The snapshots that are not later than commit number `to`, newest first. Of one that does not say where it stands nobody knows.
fn snapshots_for(dir: &RunDir, to: u64) -> Result<Vec<PathBuf>> {
    let snapshots = snapshot::list(dir);
    if snapshots.is_empty() {
        bail!("{} has no snapshot to go back to\nhint: the run has not begun", dir.0.display());
    }
    let (mut found, mut newest) = (Vec::new(), None);
    for (_, folder) in snapshots.into_iter().rev() {
        match snapshot::place(&folder) {
            Ok(place) if place.book.commits() <= to => found.push(folder),
            Ok(place) => newest = newest.max(Some(place.book.commits())),
            Err(error) => tracing::warn!("a snapshot is damaged, so another has to do: {error:#}"),
        }
    }
    match newest {
        _ if !found.is_empty() => Ok(found),
        Some(newest) => Err(unreachable(dir, to, newest)),
        None => {
            bail!("every snapshot in {} is damaged\nhint: restore the folder from a backup", dir.snapshots().display())
        }
    }
}

/// Says what can be reached instead.
fn unreachable(dir: &RunDir, to: u64, latest: u64) -> anyhow::Error {
    let oldest = snapshot::list(dir).first().and_then(|(_, folder)| snapshot::place(folder).ok());
    let oldest = oldest.map_or(0, |place| place.book.commits());
    anyhow!(
        "commit {to} of {} cannot be reached: what is kept goes from commit {oldest} to commit {latest}\nhint: choose one of these; `keep = \"all\"` in run.toml keeps everything from the start",
        dir.0.display()
    )
}

// ---- what is to be ----

/// Writes the journal and the snapshots that are to be, beside those that are.
fn prepare(prepared: &Prepared, mut past: Past, from: u64) -> Result<()> {
    let (dir, new) = (&prepared.dir, new(&prepared.dir));
    let later = past.epilogue(from);
    file::make_folder(&new.0).with_context(|| format!("{} cannot be made", new.0.display()))?;
    let journal = fs::read(dir.journal()).context("the journal cannot be read")?;
    let kept = usize::try_from(past.offset).ok().and_then(|offset| journal.get(..offset));
    write_atomically(&new.journal(), kept.context("the journal has become shorter")?)?;
    let mut journal = JournalFile::open(&new.journal(), past.offset, past.chain, |_| bail!("there is more to read"))?;
    journal.append(&later)?;
    for entry in &later {
        past.book.apply(entry).map_err(|error| anyhow!("the rollback does not follow: {error}"))?;
    }
    past.book.ledger.verify().map_err(|why| anyhow!("the ledger does not add up: {why}"))?;
    for (entries, folder) in snapshot::list(dir) {
        if entries <= past.book.entries - later.len() as u64 {
            link_all(&folder, &new.snapshots().join(folder.file_name().unwrap_or_default()))?;
        }
    }
    link(&dir.tokenizer(), &new.tokenizer())?; // Snapshots are whole Hugging Face folders.
    snapshot::save(&new, &prepared.model, &past.global, &past.book, journal.chain, journal.offset)?;
    Ok(())
}

/// Begins the folder of what was with all that stays where it is.
fn set_aside(dir: &RunDir, name: &str) -> Result<()> {
    let old = RunDir(aside(dir, name));
    for folder in [dir.0.join("set-aside"), old.0.clone()] {
        file::make_folder(&folder).with_context(|| format!("{} cannot be made", folder.display()))?;
    }
    // Copies: the operator may go on editing.
    write_atomically(&old.config(), &fs::read(dir.config())?)?;
    write_atomically(&old.tokenizer(), &fs::read(dir.tokenizer())?)?;
    link_all(&dir.payloads(), &old.payloads())
}

/// A second name for every file of a folder; they never change.
fn link_all(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to).with_context(|| format!("{} cannot be made", to.display()))?;
    for entry in fs::read_dir(from).with_context(|| format!("{} cannot be read", from.display()))? {
        let entry = entry?;
        link(&entry.path(), &to.join(entry.file_name()))?;
    }
    file::sync_folder(&to.join("all")).with_context(|| format!("{} cannot be synced", to.display()))
}

/// A second name for a file, or a copy where the file system has no second names.
fn link(from: &Path, to: &Path) -> Result<()> {
    if to.exists() || fs::hard_link(from, to).is_ok() {
        return Ok(());
    }
    let bytes = fs::read(from).with_context(|| format!("{} cannot be read", from.display()))?;
    write_atomically(to, &bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every file below `folder` with what it holds.
    fn files(folder: &Path, found: &mut BTreeMap<PathBuf, String>) {
        for entry in fs::read_dir(folder).unwrap().flatten() {
            match entry.path() {
                path if path.is_dir() => files(&path, found),
                path => drop(found.insert(path.clone(), fs::read_to_string(path).unwrap())),
            }
        }
    }

    /// A folder in which a rollback has begun and the first `done` moves were carried out.
    fn begin(done: usize) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let dir = RunDir(folder.path().to_path_buf());
        for (name, text) in [
            ("journal.jsonl", "old"),
            ("snapshots/9/book.json", "old"),
            ("status.json", "old"),
            (".rollback/journal.jsonl", "new"),
            (".rollback/snapshots/5/book.json", "new"),
            ("set-aside/9/run.toml", "old"),
            ("rollback", "9"),
        ] {
            let path = dir.0.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        moves(&dir, "9").iter().take(done).for_each(|(from, to)| carry_out(from, to).unwrap());
        folder
    }

    #[test]
    fn a_rollback_that_has_begun_is_finished_wherever_it_stopped() {
        for done in 0..=7 {
            let folder = begin(done);
            let dir = RunDir(folder.path().to_path_buf());
            assert!(check_finished(&dir).is_err());
            for _ in 0..2 {
                finish(&dir).unwrap();
                let mut found = BTreeMap::new();
                files(&dir.0, &mut found);
                let names = ["journal.jsonl", "set-aside/9/journal.jsonl", "set-aside/9/run.toml"].into_iter().chain([
                    "set-aside/9/snapshots/9/book.json",
                    "set-aside/9/status.json",
                    "snapshots/5/book.json",
                ]);
                let wanted: BTreeMap<PathBuf, String> = names
                    .map(|name| (dir.0.join(name), if name.contains("set-aside") { "old" } else { "new" }.to_string()))
                    .collect();
                assert_eq!(found, wanted, "after {done} moves");
            }
            assert!(check_finished(&dir).is_ok());
        }
    }

    #[test]
    fn a_rollback_that_has_not_begun_leaves_no_trace() {
        let folder = begin(0);
        let dir = RunDir(folder.path().to_path_buf());
        fs::remove_file(intent(&dir)).unwrap();
        finish(&dir).unwrap();
        assert_eq!(fs::read_to_string(dir.journal()).unwrap(), "old");
        assert!(!new(&dir).0.exists() && dir.snapshots().join("9").exists());
    }
}
