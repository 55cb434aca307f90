//! `atoll revoke`: takes a site's key off the run's list, and its tickets with it.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use atoll_core::site::SiteId;
use atoll_node::identity::Ticket;
use atoll_node::revocation;
use atoll_node::run::{RunConfig, RunDir};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The run folder.
    dir: PathBuf,
    /// The site's name.
    site: SiteId,
}

/// A living coordinator looks twice a second.
const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let Arguments { dir, site } = arguments;
    let dir = RunDir(dir.clone());
    RunConfig::load(&dir.config())?;
    let withdrawn = Ticket::withdraw(&dir, site)?;
    match revocation::key_of(&dir, site)? {
        None if withdrawn == 0 => bail!(
            "the run in {} knows no site {site}\nhint: `atoll status {0}` lists those that have joined",
            dir.0.display()
        ),
        None => println!("{site} never joined; its tickets are withdrawn"),
        Some((_, true)) => println!("the key of {site} was revoked before"),
        Some((key, false)) => {
            revocation::ask(&dir, site, key)?;
            wait_for_the_coordinator(&dir, site)?;
        }
    }
    Ok(())
}

/// Waits until the journal has it, if there is somebody to write it.
fn wait_for_the_coordinator(dir: &RunDir, site: &SiteId) -> Result<()> {
    let began = Instant::now();
    while revocation::is_pending(dir, site) {
        if dir.hold().is_ok() {
            println!("no coordinator is running; {site} will be refused from the moment that one starts");
            return Ok(());
        }
        if began.elapsed() > PATIENCE {
            bail!(
                "the coordinator has not taken the revocation up\nhint: look at its log; the revocation stays in {} until it does",
                dir.revocations().display()
            );
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    println!("the key of {site} is revoked: it is disconnected, and what it had leased is back in the pool");
    Ok(())
}
