//! `atoll coordinate`.

use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::Result;
use atoll_node::coordinator::{Ending, Options, coordinate, runtime};
use atoll_node::run::RunDir;

use crate::{cpu, stop};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The run folder, made by `atoll new`.
    dir: PathBuf,
    /// Address and port to listen on; port 0 takes a free one.
    #[arg(long, default_value = "0.0.0.0:7700")]
    listen: String,
    /// Wait behind the coordinator that leads the run, and lead it as soon as that one is gone. The folder needs run.toml,
    /// tokenizer.json and coordinator.key of the run, and the text of coordinator.trial_text if that is set; the rest comes from the object store that coordinator.store names.
    #[arg(long)]
    standby: bool,
    /// The run goes on in another object store than before, which is empty. Every other coordinator of the run must have been
    /// stopped and be given the new address first.
    #[arg(long, conflicts_with = "standby")]
    new_store: bool,
    /// Stop when standard input ends.
    #[arg(long, hide = true)]
    supervised: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let flag = stop::flag(arguments.supervised)?;
    let (sender, receiver) = tokio::sync::watch::channel(false);
    let runtime = runtime()?;
    let dir = RunDir(arguments.dir.clone());
    let ending = runtime.block_on(async {
        tokio::spawn(async move {
            while !flag.load(Ordering::SeqCst) {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            let _ = sender.send(true); // The coordinator may have ended by itself.
            sender.closed().await;
        });
        let Arguments { standby, new_store, .. } = *arguments;
        let options = Options { listen: arguments.listen.clone(), standby, new_store };
        coordinate(&dir, &options, Some(cpu::judge), receiver).await
    })?;
    match ending {
        Ending::StoodBy(false) => println!("stopped; another coordinator leads the run, or none"),
        Ending::StoodBy(true) => println!("the run is finished; it did not need this coordinator"),
        Ending::Finished(report) => println!(
            "finished: {} commits, {} tokens, model in {}",
            report.commits,
            report.tokens,
            dir.model().display()
        ),
        Ending::Stopped(report) => {
            println!("stopped after {} commits; the same command goes on", report.commits);
        }
    }
    Ok(())
}
