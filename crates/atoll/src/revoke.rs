//! `atoll revoke`: takes a site's key off the run's list, and its tickets with it.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use atoll_core::journal::Act;
use atoll_core::site::SiteId;
use atoll_node::acts::{self, Known};
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
    let Known { key, is_invited } = acts::known(&dir, site)?;
    let living = key.and_then(|(key, is_revoked)| (!is_revoked).then_some(key));
    if living.is_none() && !is_invited {
        match key {
            Some(_) => println!("the key of {site} was revoked before"),
            None => bail!(
                "the run in {} knows no site {site}\nhint: `atoll status {0}` lists those that have joined",
                dir.0.display()
            ),
        }
        return Ok(());
    }
    let asked = acts::ask(&dir, &Act::Revoke(site.clone(), living))?;
    match (is_taken_up(&dir, &asked)?, key, living) {
        (false, ..) => println!("no coordinator is running; {site} will be refused from the moment that one starts"),
        (true, None, _) => println!("{site} never joined; its tickets are withdrawn"),
        (true, _, None) => println!("the key of {site} was revoked before; its tickets are withdrawn"),
        (true, ..) => {
            println!("the key of {site} is revoked: it is disconnected, and what it had leased is back in the pool");
        }
    }
    Ok(())
}

/// Waits until the journal has what was asked for; false if there is nobody to write it.
pub(crate) fn is_taken_up(dir: &RunDir, asked: &Path) -> Result<bool> {
    let began = Instant::now();
    while asked.exists() {
        if dir.hold().is_ok() {
            return Ok(false);
        }
        if began.elapsed() > PATIENCE {
            bail!(
                "the coordinator has not taken it up\nhint: look at its log; if it stands by, do it where the one is that leads; {} stays until it is done",
                asked.display()
            );
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(true)
}
