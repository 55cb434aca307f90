//! `atoll rekey`: another key for the coordinators of a run.

use std::path::PathBuf;

use anyhow::Result;
use atoll_node::run::{RunConfig, RunDir};
use atoll_node::succession;

use crate::revoke::is_taken_up;
use crate::ticket::must_not_stand_by;

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The run folder.
    dir: PathBuf,
    /// Put the next key, which the sites have been told of, in place of the present one. The coordinator must have been stopped.
    #[arg(long)]
    finish: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let dir = RunDir(arguments.dir.clone());
    RunConfig::load(&dir.config())?;
    if arguments.finish {
        let key = succession::finish(&dir)?;
        println!("the coordinator in {} has the key {} now", dir.0.display(), key.short());
        return Ok(());
    }
    must_not_stand_by(&dir, "make the next key where the one is that leads, and copy it")?;
    let (key, asked) = succession::announce(&dir)?;
    match is_taken_up(&dir, &asked)? {
        true => println!("the next key is {}: sites are told of it, now or when they connect", key.short()),
        false => println!("no coordinator is running; sites are told of the next key, {}, once one leads", key.short()),
    }
    println!(
        "To go over to it, stop the coordinator, say `atoll rekey {0} --finish`, and start it again. Those that stand by get a copy of {1}\nand do so first. Sites that have not been connected by then need new tickets, and so does whoever has not used his.",
        dir.0.display(),
        dir.next_key().display()
    );
    Ok(())
}
