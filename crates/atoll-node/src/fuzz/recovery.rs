//! The law of a run folder whose coordinator starts again: snapshot, book and journal.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::LazyLock;

use atoll_core::codec::Codec;
use atoll_core::data::{DatasetId, Ranges};
use atoll_core::hash::Digest;
use atoll_core::journal::{Accepted, Book, Chain, Commit, Entry, Role};
use atoll_core::manifest::{FragmentId, Manifest};
use atoll_core::outer::{Averaging, Found, Global, Guard, OuterRule, Recipe};
use atoll_core::round::{Coordinator, Event, Goal, Sync};
use atoll_core::site::Time;

use super::laws::{in_folder, is_told, small_model};
use crate::coordinator::lock;
use crate::crew::Crew;
use crate::journal::{JournalFile, read_entries};
use crate::run::RunDir;
use crate::snapshot;
use crate::store::Store;

const SEED: u64 = 1;

/// A run that has begun, and one commit after its snapshot.
struct Past {
    /// All files by their path in the run folder.
    files: BTreeMap<String, Vec<u8>>,
    /// The entries behind the snapshot, and the journal's hash and bytes before them.
    later: Vec<Entry>,
    chain: Chain,
    before: Vec<u8>,
}

static PAST: LazyLock<Past> = LazyLock::new(live);

const BOOK: &str = "snapshots/000000000005/book.json";
const SNAPSHOT: &str = "snapshots/000000000005";
const DIGESTS: &str = "snapshots/000000000005/digests.json";
const JOURNAL: &str = "journal.jsonl";

fn manifest() -> Manifest {
    Manifest::balanced(small_model().tensors(), 2)
}

fn live() -> Past {
    in_folder(&[], |folder| {
        let dir = RunDir(folder.to_path_buf());
        let store = Store::open(dir.payloads()).expect("a folder can be made");
        let mut global = Global::new(manifest(), manifest().gather(&small_model().initial_weights(1)));
        let (mut book, mut journal) = (Book::default(), open(&dir));
        let mut record = |book: &mut Book, entries: &[Entry]| {
            entries.iter().for_each(|entry| book.apply(entry).expect("it is the next one"));
            journal.append(entries).expect("the disk takes it");
            (journal.chain, journal.offset)
        };
        let (chain, offset) = record(&mut book, &first_entries(&global));
        snapshot::save(&dir, &small_model(), &global, &book, chain, offset).expect("the disk takes it");
        let later = [commit(&mut global, &store), Entry::Finished];
        record(&mut book, &later);
        let mut files = BTreeMap::new();
        gather(folder, folder, &mut files);
        let before = files[JOURNAL][..offset as usize].to_vec();
        Past { files, later: later.to_vec(), chain, before }
    })
}

fn open(dir: &RunDir) -> JournalFile {
    JournalFile::open(&dir.journal(), 0, Chain::default(), |_| Ok(())).expect("the disk takes it")
}

fn first_entries(global: &Global) -> [Entry; 5] {
    let (digest, site) = (Digest::of(b"x"), || "oslo".parse().expect("a good name"));
    let (layout, theta) = (manifest().fingerprint(), global.digests());
    [
        Entry::Began { run: "r".into(), seed: SEED, context: 4, layout, theta },
        Entry::Admitted { site: site(), key: digest, ticket: digest, role: Role::Train },
        Entry::Joined { site: site(), session: 1, dataset: DatasetId(digest), samples: 100 },
        Entry::Leased { site: site(), number: 1, ranges: Ranges::span(0, 10) },
        Entry::Leased { site: site(), number: 2, ranges: Ranges::span(10, 20) },
    ]
}

/// Fragment 0 moves a little.
fn commit(global: &mut Global, store: &Store) -> Entry {
    let fragment = FragmentId(0);
    let bytes = Codec::F32.encode(&vec![0.01; global.theta[0].len()]).expect("finite values can be encoded");
    let payload = Digest::of(&bytes);
    store.put(payload, &bytes).expect("the disk takes it");
    let accepted = Accepted {
        site: "oslo".parse().expect("a good name"),
        number: 1,
        payload,
        base: 0,
        steps: 2,
        tokens: 16,
        weight: 128.0,
        norm: 1.0,
        trust: 0.0,
        quality: 0.0,
        ranges: Ranges::span(0, 4),
    };
    let (merge, guard) = (Averaging::Radial, Guard::default());
    let recipe = Recipe { merge, rule: OuterRule::default(), codec: Codec::F32, share: 1.0, guard };
    let contributions = vec![accepted];
    let step =
        global.perform(fragment, 1, &contributions, &recipe, &|digest| store.get(digest).map(Found::from), &Crew);
    let step = step.expect("its payload is here");
    store.put(step.delta, &step.payload).expect("the disk takes it");
    let (delta, bytes, digest) = (step.delta, step.payload.len() as u64, step.digest);
    let (version, agreements, seconds) = (1, Vec::new(), 1.5);
    Entry::Committed(Commit { fragment, version, contributions, recipe, delta, bytes, digest, agreements, seconds })
}

/// All files beneath `folder`, by their path in `root`.
fn gather(root: &Path, folder: &Path, files: &mut BTreeMap<String, Vec<u8>>) {
    for entry in std::fs::read_dir(folder).expect("the folder is there").flatten() {
        let path = entry.path();
        if path.is_dir() {
            gather(root, &path, files);
        } else {
            let name = path.strip_prefix(root).unwrap_or(&path).to_string_lossy().into_owned();
            files.insert(name, std::fs::read(&path).expect("it is there"));
        }
    }
}

/// The run starts again as a coordinator can go on with, or its operator is told what is damaged, whatever is in the
/// book, in the journal, in entries that somebody sealed, or among the hashes of the snapshot's files. The first byte tells which.
pub(super) fn law(bytes: &[u8]) {
    let Some((place, bytes)) = bytes.split_first() else { return };
    let past = &*PAST;
    let (name, bytes) = match place % 4 {
        0 => (BOOK, bytes.to_vec()),
        1 => (JOURNAL, bytes.to_vec()),
        2 => (JOURNAL, sealed(past, bytes)),
        _ => (DIGESTS, bytes.to_vec()),
    };
    let files = past.files.iter().map(|(path, good)| (path.as_str(), if path == name { &bytes } else { good }));
    in_folder(&files.map(|(path, bytes)| (path, bytes.as_slice())).collect::<Vec<_>>(), |folder| {
        let dir = RunDir(folder.to_path_buf());
        if name != DIGESTS {
            // Otherwise nobody would look at what is in it.
            snapshot::seal(&folder.join(SNAPSHOT)).expect("the disk takes it");
        }
        let store = Store::open(dir.payloads()).expect("a folder can be made");
        match snapshot::recover(&dir, &small_model(), &manifest(), SEED, &store) {
            Ok(None) => {}
            Ok(Some(recovered)) => goes_on(&dir, recovered),
            Err(error) => is_told(&format!("{error:#}")),
        }
    });
}

/// The journal up to the snapshot, and these lines behind it with the hashes that they ought to have.
fn sealed(past: &Past, bytes: &[u8]) -> Vec<u8> {
    let (mut chain, mut journal) = (past.chain, past.before.clone());
    for json in String::from_utf8_lossy(bytes).lines() {
        let line = chain.seal(json);
        // What is no entry ends the journal anyway.
        let _ = chain.read(&line);
        journal.extend(line.bytes().chain([b'\n']));
    }
    journal
}

fn goes_on(dir: &RunDir, recovered: snapshot::Recovered) {
    let snapshot::Recovered { journal, book, global, .. } = recovered;
    let global = lock(&global);
    assert_eq!(book.ledger.verify(), Ok(()));
    assert_eq!(book.digest(), Digest::of_all(&global.digests()));
    let entries = read_entries(&dir.journal(), PAST.before.len() as u64, PAST.chain);
    assert!(entries.is_ok_and(|entries| entries.len() <= book.entries as usize), "what was read can be read again");
    let lens = global.theta.iter().map(Vec::len).collect();
    let mut machine = Coordinator::new(Sync::default(), Goal { tokens: Some(1000), minutes: None }, book, lens);
    for second in 1..100 {
        machine.handle(Time(second * 1_000_000), Event::Tick);
    }
    assert_eq!(machine.book().ledger.verify(), Ok(()));
    drop(journal);
}

pub(super) fn seeds() -> Vec<Vec<u8>> {
    let past = &*PAST;
    let json = past.later.iter().map(|entry| serde_json::to_string(entry).expect("entries are plain data"));
    let later = json.collect::<Vec<_>>().join("\n").into_bytes();
    let all = [past.files[BOOK].clone(), past.files[JOURNAL].clone(), later, past.files[DIGESTS].clone()];
    (0..).zip(all).map(|(place, bytes)| [vec![place], bytes].concat()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_seeds_recover_with_the_commit_after_the_snapshot() {
        for (place, seed) in (0u8..).zip(seeds()) {
            assert_eq!(seed[0], place);
            law(&seed);
        }
        let past = &*PAST;
        let files: Vec<(&str, &[u8])> =
            past.files.iter().map(|(path, bytes)| (path.as_str(), bytes.as_slice())).collect();
        in_folder(&files, |folder| {
            let dir = RunDir(folder.to_path_buf());
            let store = Store::open(dir.payloads()).unwrap();
            let recovered = snapshot::recover(&dir, &small_model(), &manifest(), SEED, &store).unwrap().unwrap();
            assert_eq!((recovered.book.commits(), recovered.book.finished), (1, true));
        });
    }

    #[test]
    fn commits_since_an_older_snapshot_are_computed_again_if_the_newest_is_damaged() {
        let files = PAST.files.iter().map(|(path, bytes)| (path.as_str(), bytes.as_slice()));
        in_folder(&files.collect::<Vec<_>>(), |folder| {
            let dir = RunDir(folder.to_path_buf());
            let store = Store::open(dir.payloads()).unwrap();
            let recover = || snapshot::recover(&dir, &small_model(), &manifest(), SEED, &store);
            let snapshot::Recovered { journal, book, global, .. } = recover().unwrap().unwrap();
            let global = lock(&global).clone();
            let newest = snapshot::save(&dir, &small_model(), &global, &book, journal.chain, journal.offset).unwrap();
            let weights = newest.join("model.safetensors");
            let mut bytes = std::fs::read(&weights).unwrap();
            *bytes.last_mut().unwrap() ^= 1;
            std::fs::write(&weights, bytes).unwrap();
            // A journal that ends before the damaged snapshot is not gone on with.
            let whole = std::fs::read(dir.journal()).unwrap();
            std::fs::write(dir.journal(), &PAST.before).unwrap();
            let error = format!("{:#}", recover().unwrap_err());
            assert!(error.contains("a snapshot speaks of 7") && newest.exists(), "{error}");
            std::fs::write(dir.journal(), whole).unwrap();
            let again = recover().unwrap().unwrap();
            assert!(*lock(&again.global) == global && again.book == book && !newest.exists());
        });
    }
}
