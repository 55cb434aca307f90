//! Computes every commit of a run again, from its journal and the payloads that were kept, and compares digests.

use anyhow::{Result, anyhow, bail};
use atoll_core::hash::Digest;
use atoll_core::journal::Entry;

use crate::coordinator::Prepared;
use crate::journal::read_entries;
use crate::rollback;
use crate::run::RunDir;
use crate::snapshot;
use crate::store::Store;

/// A run that was computed again and found to be as its journal says.
#[derive(Debug, Clone, PartialEq)]
pub struct Replayed {
    /// Commits computed.
    pub commits: u64,
    /// Commits before these, summed up by the oldest snapshot.
    pub before: u64,
    /// Tokens in the model, each once.
    pub tokens: u64,
    /// Hash of the model.
    pub digest: Digest,
}

/// Computes the run in `dir` again, from its oldest undamaged snapshot on.
///
/// # Errors
/// If something is missing or damaged, a digest differs, or a token is in the model twice or in none of the places where
/// it could be.
pub fn replay(dir: &RunDir) -> Result<Replayed> {
    rollback::check_finished(dir)?;
    let prepared = Prepared::read(dir)?;
    let store = Store::open(dir.payloads())?;
    let snapshots = snapshot::list(dir);
    if snapshots.is_empty() {
        bail!("{} has no snapshot to replay from\nhint: the run has not begun", dir.0.display());
    }
    let oldest_first = snapshots.iter().map(|(_, folder)| folder.as_path());
    let Prepared { model, manifest, config, .. } = &prepared;
    let (mut global, place) = snapshot::load(oldest_first, model, manifest, config.seed)?;
    let mut book = place.book;
    let before = book.commits();
    for entry in read_entries(&dir.journal(), place.offset, place.chain)? {
        if let Entry::Committed(commit) = &entry {
            snapshot::replay(&mut global, commit, &store)?;
        }
        book.apply(&entry).map_err(|error| anyhow!("the journal contradicts itself: {error}"))?;
    }
    book.ledger.verify().map_err(|why| anyhow!("the ledger does not add up: {why}"))?;
    let digest = Digest::of_all(&global.digests());
    if digest != book.digest() {
        bail!("the model computed is {digest}, the journal says {}", book.digest());
    }
    Ok(Replayed { commits: book.commits() - before, before, tokens: book.tokens, digest })
}
