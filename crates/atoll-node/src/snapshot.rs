//! Snapshots, and recovery from them. A snapshot is a folder named after the number of journal entries
//! that it sums up: the model as a Hugging Face folder, the outer optimizer's state, and the book with
//! the journal's hash and length at that point. It is made under another name and renamed when whole; hashes of its
//! files are in it, so that no run goes on from what has changed since.
//!
//! Recovery takes the newest snapshot that is whole and undamaged and computes every later commit again from its payloads,
//! comparing digests: the coordinator is rebuilt bit for bit or says what is missing.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, anyhow, bail};
use atoll_core::codec::check_finite;
use atoll_core::hash::{Digest, from_little_endian, little_endian};
use atoll_core::journal::{Book, Chain, Commit, Entry};
use atoll_core::manifest::Manifest;
use atoll_core::model::ModelConfig;
use atoll_core::outer::{Found, Global};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};

use crate::crew::Crew;
use crate::data::file;
use crate::hf;
use crate::journal::JournalFile;
use crate::run::{CoordinatorSection, Keep, RunDir, write_atomically};
use crate::store::Store;

/// The book of a snapshot, and where the journal goes on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Place {
    /// The book.
    pub book: Book,
    /// The journal's hash there.
    pub chain: Chain,
    /// The journal's length there.
    pub offset: u64,
}

/// Hashes of a snapshot's other files by their names.
const DIGESTS: &str = "digests.json";
/// What recovery reads.
const READ: [&str; 3] = ["book.json", "model.safetensors", "outer.safetensors"];

/// A run as it was when its coordinator last lived.
#[derive(Debug)]
pub struct Recovered {
    /// The journal, open for more.
    pub journal: JournalFile,
    /// The sum of its entries.
    pub book: Book,
    /// The model: whoever keeps it up to date and whoever hands it out share it.
    pub global: Arc<Mutex<Global>>,
    /// Payloads of the commits since each snapshot still there, by the commits' entry number.
    pub payloads: BTreeMap<u64, Vec<Digest>>,
}

/// Writes a snapshot of `global` and `book`, which belong to each other and to this point of the journal.
///
/// # Errors
/// If the disk does not take it; older snapshots are untouched.
pub fn save(
    dir: &RunDir,
    model: &ModelConfig,
    global: &Global,
    book: &Book,
    chain: Chain,
    offset: u64,
) -> Result<PathBuf> {
    let folder = dir.snapshots().join(format!("{:012}", book.entries));
    if folder.exists() && book.entries > 1 {
        return Ok(folder);
    }
    let _ = fs::remove_dir_all(&folder);
    let new = dir.snapshots().join(format!(".{:012}.new", book.entries));
    let _ = fs::remove_dir_all(&new);
    file::make_folder(&dir.snapshots()).with_context(|| format!("{} cannot be made", dir.snapshots().display()))?;
    fs::create_dir(&new).with_context(|| format!("{} cannot be made", new.display()))?;
    hf::save(&new, model, &global.tensors(), fs::read(dir.tokenizer()).ok().as_deref())?;
    write_atomically(&new.join("outer.safetensors"), &outer_state(global)?)?;
    let place = Place { book: book.clone(), chain, offset };
    write_atomically(&new.join("book.json"), &serde_json::to_vec(&place)?)?;
    seal(&new)?;
    file::rename(&new, &folder).with_context(|| format!("{} cannot be renamed", new.display()))?;
    Ok(folder)
}

/// Writes down what is in the files of a snapshot.
pub(crate) fn seal(folder: &Path) -> Result<()> {
    write_atomically(&folder.join(DIGESTS), &serde_json::to_vec_pretty(&digests(folder)?)?)
}

/// Sees that the files of a snapshot are what they were.
///
/// # Errors
/// If one is not.
pub fn verify(folder: &Path) -> Result<()> {
    let path = folder.join(DIGESTS);
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == ErrorKind::NotFound => {
            tracing::warn!("{} has no hashes of its files, so nobody can tell whether it is damaged", folder.display());
            return Ok(());
        }
        Err(error) => return Err(error).with_context(|| format!("{} cannot be read", path.display())),
    };
    let noted: BTreeMap<String, Digest> =
        serde_json::from_slice(&bytes).with_context(|| format!("{} is damaged", path.display()))?;
    let found = digests(folder)?;
    // No file is opened because its name stands there: it may come from elsewhere. What somebody put beside ours is his.
    match noted.keys().map(String::as_str).chain(READ).find(|&name| noted.get(name) != found.get(name)) {
        Some(name) => bail!("{name:?} in {} is not what it was when it was written", folder.display()),
        None => Ok(()),
    }
}

/// The hash of each file of a snapshot; what is hidden is none of its.
fn digests(folder: &Path) -> Result<BTreeMap<String, Digest>> {
    let mut digests = BTreeMap::new();
    for file in fs::read_dir(folder).with_context(|| format!("{} cannot be read", folder.display()))? {
        let file = file?;
        let name = file.file_name().to_string_lossy().into_owned();
        if name != DIGESTS && !name.starts_with('.') && file.file_type().is_ok_and(|kind| kind.is_file()) {
            digests.insert(name.clone(), digest(&folder.join(name))?);
        }
    }
    Ok(digests)
}

fn digest(path: &Path) -> Result<Digest> {
    let mut hasher = blake3::Hasher::new();
    let read = fs::File::open(path).and_then(|file| hasher.update_reader(file).map(drop));
    read.with_context(|| format!("{} cannot be read", path.display()))?;
    Ok(Digest(*hasher.finalize().as_bytes()))
}

/// All whole snapshots, oldest first, with their entry numbers.
pub fn list(dir: &RunDir) -> Vec<(u64, PathBuf)> {
    let listing = fs::read_dir(dir.snapshots()).into_iter().flatten().flatten();
    let mut found: Vec<(u64, PathBuf)> =
        listing.filter_map(|folder| Some((folder.file_name().to_str()?.parse().ok()?, folder.path()))).collect();
    found.sort();
    found
}

/// Removes what a crash left half written.
fn sweep(dir: &RunDir) {
    for entry in fs::read_dir(dir.snapshots()).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with('.') {
            let _ = fs::remove_dir_all(entry.path()); // It costs room, nothing else.
        }
    }
}

/// Drops all but the newest `keep` snapshots, and the `first` if it is to stay; returns the entry number of the oldest one kept.
pub fn prune(dir: &RunDir, keep: usize, first: bool) -> u64 {
    let mut snapshots = list(dir);
    let cut = snapshots.len().saturating_sub(keep);
    for (_, folder) in snapshots.drain(usize::from(first).min(cut)..cut) {
        // Renamed first, so that a snapshot is whole or not in the list.
        let old = folder.with_file_name(format!(".{}.old", folder.file_name().unwrap_or_default().to_string_lossy()));
        let _ = fs::rename(&folder, &old).and_then(|()| fs::remove_dir_all(old));
    }
    snapshots.first().map_or(0, |(entries, _)| *entries)
}

/// Drops snapshots, and the payloads of commits before the oldest one, that the policy does not keep; returns these.
pub(crate) fn retire(
    dir: &RunDir,
    policy: &CoordinatorSection,
    payloads: &mut BTreeMap<u64, Vec<Digest>>,
    book: &Book,
) -> Vec<Digest> {
    let all = policy.keep == Keep::All;
    let oldest = prune(dir, policy.snapshots, all);
    if all {
        return Vec::new();
    }
    let later = payloads.split_off(&(oldest + 1));
    let old = std::mem::replace(payloads, later);
    let kept = needed(payloads, book);
    old.into_values().flatten().filter(|digest| !kept.contains(digest)).collect()
}

/// Rebuilds a run from its newest undamaged snapshot and its journal; newer ones that are damaged are set aside. `None`
/// if the run has never begun.
///
/// # Errors
/// If journal, all snapshots or payloads are damaged or missing; nothing that anybody needs is changed then.
pub fn recover(
    dir: &RunDir,
    model: &ModelConfig,
    manifest: &Manifest,
    seed: u64,
    store: &Store,
) -> Result<Option<Recovered>> {
    sweep(dir);
    let snapshots = list(dir);
    let Some((reached, _)) = snapshots.last() else {
        if fs::metadata(dir.journal()).is_ok_and(|file| file.len() > 0) {
            bail!(
                "{} has a journal but no snapshot\nhint: restore the folder snapshots/ from a backup",
                dir.0.display()
            );
        }
        return Ok(None);
    };
    let (damaged, newest) = choose(newest_first(&snapshots))?;
    let (mut global, place) = read(newest, model, manifest, seed)?;
    if *reached == 1 && fs::metadata(dir.journal()).map_or(0, |file| file.len()) == 0 {
        return Ok(None); // The crash came between the first snapshot and the first entry.
    }
    let mut payloads = BTreeMap::new();
    if let Some((oldest, _)) = snapshots.first().filter(|_| snapshots.len() > 1) {
        note_payloads(dir, *oldest, place.book.entries, &mut payloads)?;
    }
    let mut book = place.book;
    let journal = JournalFile::open(&dir.journal(), place.offset, place.chain, |entry| {
        if let Entry::Committed(commit) = &entry {
            replay(&mut global, commit, store)?;
            payloads.insert(book.entries + 1, addresses(commit));
        }
        book.apply(&entry)
            .map_err(|error| anyhow!("the journal contradicts itself: {error}\nhint: restore it from a backup"))
    })?;
    if Digest::of_all(&global.digests()) != book.digest() {
        bail!(
            "the snapshot {} does not hold the model that the journal speaks of\nhint: move it away; an older one and the journal do as well",
            newest.display()
        );
    }
    if book.entries < *reached {
        bail!(
            "the journal {} has {} entries, a snapshot speaks of {reached}\nhint: restore it from a backup",
            dir.journal().display(),
            book.entries
        );
    }
    damaged.into_iter().for_each(set_aside);
    Ok(Some(Recovered { journal, book, global: Arc::new(Mutex::new(global)), payloads }))
}

/// The newest undamaged snapshot in a run folder.
///
/// # Errors
/// If there is none.
pub fn newest(dir: &RunDir) -> Result<PathBuf> {
    choose(newest_first(&list(dir))).map(|(_, folder)| folder.to_path_buf())
}

fn newest_first(snapshots: &[(u64, PathBuf)]) -> impl Iterator<Item = &Path> {
    snapshots.iter().rev().map(|(_, folder)| folder.as_path())
}

/// The first undamaged one of these snapshots, behind the damaged ones that come before it.
fn choose<'a>(snapshots: impl Iterator<Item = &'a Path>) -> Result<(Vec<&'a Path>, &'a Path)> {
    let mut damaged = Vec::new();
    for folder in snapshots {
        match verify(folder) {
            Ok(()) => return Ok((damaged, folder)),
            Err(error) => tracing::warn!("a snapshot is damaged, so another has to do: {error:#}"),
        }
        damaged.push(folder);
    }
    Err(match damaged.first() {
        Some(first) => anyhow!(
            "every snapshot is damaged, also {}\nhint: restore the folder snapshots/ from a backup",
            first.display()
        ),
        None => anyhow!("there is no snapshot\nhint: a run has one as soon as it has begun"),
    })
}

/// Takes a damaged snapshot off the list, for whoever wants to know what happened to it.
fn set_aside(folder: &Path) {
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    let aside = folder.with_file_name(format!("damaged-{name}"));
    let _ = fs::remove_dir_all(&aside);
    match file::rename(folder, &aside) {
        Ok(()) => tracing::warn!("it is {} now and may be deleted", aside.display()),
        Err(error) => tracing::warn!("{} cannot be renamed: {error}", folder.display()),
    }
}

/// Computes one journaled commit again.
///
/// # Errors
/// If a payload is gone or the result differs.
pub fn replay(global: &mut Global, commit: &Commit, store: &Store) -> Result<()> {
    let step = global
        .replay(commit, &|digest| store.get(digest).map(Found::from), &Crew)
        .map_err(|error| {
            let Commit { fragment, version, .. } = commit;
            anyhow!(
                "{fragment} version {version} cannot be computed again: {error}\nhint: restore payloads/ and the journal from a backup"
            )
        })?;
    store.put(step.delta, &step.payload)
}

/// What recomputes a run: the model of the first undamaged one of these snapshots, and the book then.
///
/// # Errors
/// If all are damaged, or `run.toml` describes another run.
pub fn load<'a>(
    folders: impl Iterator<Item = &'a Path>,
    model: &ModelConfig,
    manifest: &Manifest,
    seed: u64,
) -> Result<(Global, Place)> {
    read(choose(folders)?.1, model, manifest, seed)
}

fn damaged(folder: &Path) -> String {
    let folder = folder.display();
    format!("the snapshot {folder} is damaged\nhint: move it away; another one and the journal do as well")
}

/// [`load`] for a snapshot that is verified.
fn read(folder: &Path, model: &ModelConfig, manifest: &Manifest, seed: u64) -> Result<(Global, Place)> {
    let whole = || damaged(folder);
    let (stored, tensors) = hf::load(folder).with_context(whole)?;
    if &stored != model {
        bail!(
            "run.toml describes another model than the run began with\nhint: undo the change to [model] or the tokenizer, or begin a new run"
        );
    }
    let place = place(folder).with_context(whole)?;
    if place.book.seed != seed {
        bail!(
            "run.toml has seed {seed}, the run began with {}\nhint: undo the change; the order of samples follows from the seed",
            place.book.seed
        );
    }
    if place.book.layout != manifest.fingerprint() {
        bail!(
            "run.toml describes another layout than the run began with\nhint: undo the change to sync.fragments, or begin a new run"
        );
    }
    place.book.ledger.verify().map_err(anyhow::Error::msg).with_context(whole)?;
    let mut global = Global::new(manifest.clone(), manifest.gather(&tensors));
    let state = fs::read(folder.join("outer.safetensors")).with_context(whole)?;
    restore_outer(&mut global, &state).with_context(whole)?;
    Ok((global, place))
}

/// The book of a snapshot, without the model.
///
/// # Errors
/// If it cannot be read.
pub fn place(folder: &Path) -> Result<Place> {
    let path = folder.join("book.json");
    let bytes = fs::read(&path).with_context(|| format!("{} cannot be read", path.display()))?;
    serde_json::from_slice(&bytes).with_context(|| format!("{} is damaged", path.display()))
}

pub(crate) fn addresses(commit: &Commit) -> Vec<Digest> {
    commit.contributions.iter().map(|accepted| accepted.payload).chain([commit.delta]).collect()
}

/// Payloads that [`addresses`] names, for the commits between two entry numbers.
fn note_payloads(dir: &RunDir, from: u64, to: u64, payloads: &mut BTreeMap<u64, Vec<Digest>>) -> Result<()> {
    let mut number = 0;
    let journal = fs::read_to_string(dir.journal()).context("the journal cannot be read")?;
    for line in journal.lines() {
        number += 1;
        if number <= from || number > to || !line.contains("\"committed\"") {
            continue;
        }
        let json = line.split_once(' ').map_or("", |(_, json)| json);
        if let Ok(Entry::Committed(commit)) = serde_json::from_str(json) {
            payloads.insert(number, addresses(&commit));
        }
    }
    Ok(())
}

/// Every payload that a later start may need.
pub fn needed(payloads: &BTreeMap<u64, Vec<Digest>>, book: &Book) -> BTreeSet<Digest> {
    let tails = book.fragments.iter().flat_map(|fragment| fragment.tail.iter().map(|notice| notice.delta));
    payloads.values().flatten().copied().chain(tails).collect()
}

pub(crate) fn outer_state(global: &Global) -> Result<Vec<u8>> {
    let rho = global.rho.iter().flat_map(|rho| rho.to_le_bytes()).collect();
    let mut parts: Vec<(String, Cow<'_, [u8]>)> = (0..global.theta.len())
        .flat_map(|index| {
            [("momentum", &global.momentum[index]), ("residual", &global.residual[index])]
                .map(|(name, values)| (format!("{name}.{index}"), little_endian(values)))
        })
        .collect();
    parts.push(("rho".to_string(), Cow::Owned(rho)));
    let views: Vec<(&String, TensorView<'_>)> =
        parts.iter().map(|(name, data)| Ok((name, view(name, data)?))).collect::<Result<_>>()?;
    Ok(safetensors::serialize(views, None)?)
}

/// Everything is `f32` but ρ, of which there is one `f64` a fragment.
fn view<'a>(name: &str, data: &'a [u8]) -> Result<TensorView<'a>> {
    let (kind, size) = if name == "rho" { (Dtype::F64, 8) } else { (Dtype::F32, 4) };
    Ok(TensorView::new(kind, vec![data.len() / size], data)?)
}

pub(crate) fn restore_outer(global: &mut Global, state: &[u8]) -> Result<()> {
    let tensors = SafeTensors::deserialize(state)?;
    let values = |name: &str, index: usize| -> Result<Vec<f32>> {
        let name = format!("{name}.{index}");
        let tensor = tensors.tensor(&name)?;
        let values = from_little_endian(tensor.data());
        check_finite(&values).with_context(|| name)?;
        Ok(values)
    };
    let rho = tensors.tensor("rho")?;
    let rho: Vec<f64> = rho.data().as_chunks::<8>().0.iter().map(|bytes| f64::from_le_bytes(*bytes)).collect();
    if rho.len() != global.rho.len() || !rho.iter().all(|rho| rho.abs() <= 1.0) {
        bail!("rho is no cosine of each fragment");
    }
    global.rho = rho;
    for (index, theta) in global.theta.iter().enumerate() {
        let (momentum, residual) = (values("momentum", index)?, values("residual", index)?);
        // There is no momentum before the first step.
        if residual.len() != theta.len() || !(momentum.is_empty() || momentum.len() == theta.len()) {
            bail!("momentum or residual of fragment {index} has the wrong length");
        }
        (global.momentum[index], global.residual[index]) = (momentum, residual);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::coordinator::lock;

    fn small() -> (ModelConfig, Manifest, Global) {
        let model = ModelConfig::preset("nano", 300, 32).unwrap();
        let manifest = Manifest::balanced(model.tensors(), 2);
        let global = Global::new(manifest.clone(), manifest.gather(&model.initial_weights(1)));
        (model, manifest, global)
    }

    #[test]
    fn a_snapshot_outlasts_a_crash() {
        let folder = tempfile::tempdir().unwrap();
        let dir = RunDir(folder.path().to_path_buf());
        let (model, manifest, global) = small();
        let book = Book { seed: 7, layout: manifest.fingerprint(), ..Book::default() };
        file::synced::take();
        let saved = save(&dir, &model, &global, &book, Chain::default(), 0).unwrap();
        let synced = file::synced::take();
        assert_eq!(synced.first(), Some(&dir.0), "the folder of snapshots is new");
        assert_eq!(synced.last(), Some(&dir.snapshots()), "the last thing is the snapshot's own name");
        assert_eq!(load([saved.as_path()].into_iter(), &model, &manifest, 7).unwrap().0, global);
    }

    #[test]
    fn one_bit_of_the_newest_snapshot_costs_nothing_but_an_older_one() {
        let folder = tempfile::tempdir().unwrap();
        let dir = RunDir(folder.path().to_path_buf());
        let (model, manifest, global) = small();
        let store = Store::open(dir.payloads()).unwrap();
        let mut journal = JournalFile::open(&dir.journal(), 0, Chain::default(), |_| Ok(())).unwrap();
        let (layout, theta) = (manifest.fingerprint(), global.digests());
        let mut book = Book::default();
        let began = Entry::Began { run: "r".into(), seed: 7, context: 4, layout, theta };
        let mut saved = [began, Entry::Finished].into_iter().map(|entry| {
            book.apply(&entry).unwrap();
            journal.append(&[entry]).unwrap();
            save(&dir, &model, &global, &book, journal.chain, journal.offset).unwrap()
        });
        let (oldest, newest) = (saved.next().unwrap(), saved.next().unwrap());
        let recovered = || recover(&dir, &model, &manifest, 7, &store);
        for file in fs::read_dir(&newest).unwrap().map(|file| file.unwrap().path()).collect::<Vec<_>>() {
            let good = fs::read(&file).unwrap();
            let mut bad = good.clone();
            bad[good.len() / 2] ^= 1;
            fs::write(&file, bad).unwrap();
            let again = recovered().unwrap().unwrap();
            let global_again = lock(&again.global).clone();
            assert_eq!((global_again, again.book.entries, again.book.finished), (global.clone(), 2, true), "{file:?}");
            let aside = dir.snapshots().join("damaged-000000000002");
            assert!(!newest.exists() && aside.exists());
            fs::rename(aside, &newest).unwrap();
            fs::write(&file, good).unwrap();
        }
        recovered().unwrap().unwrap();
        [oldest, newest.clone()].iter().for_each(|folder| fs::write(folder.join("book.json"), "{}").unwrap());
        let error = format!("{:#}", recovered().unwrap_err());
        assert!(error.contains("every snapshot is damaged") && error.contains("hint:"), "{error}");
        assert!(newest.exists(), "nothing is changed");
    }
}
