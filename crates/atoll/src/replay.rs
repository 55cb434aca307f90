//! `atoll replay`: computes every commit again from the journal and the payloads that were kept, and
//! compares digests.

use std::path::PathBuf;

use anyhow::Result;
use atoll_node::replay::{Replayed, replay};
use atoll_node::run::RunDir;

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The run folder.
    dir: PathBuf,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let Replayed { commits, before, tokens, digest } = replay(&RunDir(arguments.dir.clone()))?;
    println!("{commits} commits computed again, all digests equal");
    if before > 0 {
        println!("{before} earlier commits are summed up by the oldest undamaged snapshot");
    }
    println!("{tokens} tokens in the model, each once; digest {digest}");
    Ok(())
}
