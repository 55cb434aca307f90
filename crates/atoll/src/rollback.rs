//! `atoll rollback`: takes a stopped run back to an earlier commit.

use std::path::PathBuf;

use anyhow::Result;
use atoll_node::coordinator::Prepared;
use atoll_node::rollback::roll_back;
use atoll_node::run::RunDir;

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The run folder; its coordinator must be stopped.
    dir: PathBuf,
    /// The commit to return to, counted over all fragments as `atoll status` does; 0 is before the first.
    #[arg(long, value_name = "COMMIT")]
    to: u64,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let prepared = Prepared::read(&RunDir(arguments.dir.clone()))?;
    let done = roll_back(&prepared, arguments.to)?;
    println!("the run is at commit {} again, model and ledger; {} commits are undone", done.to, done.from - done.to);
    println!("what was is in {}, whole; remove it when nobody will miss it", done.aside.display());
    if prepared.config.coordinator.store.is_some() {
        println!(
            "its object store still has what came later: stop all its coordinators, give them an empty prefix in coordinator.store, and"
        );
        println!(
            "say --new-store the first time; a standby begins with run.toml, tokenizer.json and coordinator.key only"
        );
    }
    println!("`atoll coordinate {}` goes on; sites that come back start over from this model", arguments.dir.display());
    Ok(())
}
