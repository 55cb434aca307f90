//! `atoll replay`: computes every commit again from the journal and the payloads that were kept, and
//! compares digests.

use std::path::PathBuf;

use anyhow::{Result, anyhow, bail};
use atoll_core::hash::Digest;
use atoll_core::journal::Entry;
use atoll_node::coordinator::Prepared;
use atoll_node::journal::read_entries;
use atoll_node::rollback;
use atoll_node::run::RunDir;
use atoll_node::snapshot;
use atoll_node::store::Store;

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The run folder.
    dir: PathBuf,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let dir = RunDir(arguments.dir.clone());
    rollback::check_finished(&dir)?;
    let prepared = Prepared::read(&dir)?;
    let store = Store::open(dir.payloads())?;
    let Some((_, oldest)) = snapshot::list(&dir).into_iter().next() else {
        bail!("{} has no snapshot to replay from\nhint: the run has not begun", dir.0.display());
    };
    let (mut global, place) = snapshot::load(&oldest, &prepared.model, &prepared.manifest, prepared.config.seed)?;
    let mut book = place.book;
    let from = book.commits();
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
    println!("{} commits computed again, all digests equal", book.commits() - from);
    if from > 0 {
        println!("{from} earlier commits are summed up by {}", oldest.display());
    }
    println!("{} tokens in the model, each once; digest {digest}", book.tokens);
    Ok(())
}
