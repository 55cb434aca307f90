//! `atoll ticket`: what one site needs to join.

use std::path::PathBuf;

use anyhow::{Result, bail};
use atoll_core::site::SiteId;
use atoll_node::identity::{Identity, Ticket};
use atoll_node::report::Report;
use atoll_node::run::{RunConfig, RunDir};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The run folder.
    dir: PathBuf,
    /// The site's name: a-z, 0-9 and -.
    site: SiteId,
    /// Where the site finds the coordinator, host:port; may be given several times.
    #[arg(long, value_name = "HOST:PORT")]
    address: Vec<String>,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let dir = RunDir(arguments.dir.clone());
    let config = RunConfig::load(&dir.config())?;
    let key = Identity::load(&dir.key())?;
    let addresses = addresses(arguments, &config, &dir)?;
    let ticket = Ticket::issue(&dir, &config.name, arguments.site.clone(), addresses, key.fingerprint)?;
    println!("{}", ticket.to_text());
    Ok(())
}

fn addresses(arguments: &Arguments, config: &RunConfig, dir: &RunDir) -> Result<Vec<String>> {
    if !arguments.address.is_empty() {
        return Ok(arguments.address.clone());
    }
    if let Some(address) = &config.coordinator.advertise {
        return Ok(vec![address.clone()]);
    }
    let listen = Report::load(&dir.status()).ok().and_then(|report| report.listen);
    match listen {
        Some(address) if !address.starts_with("0.0.0.0") && !address.starts_with("[::]") => Ok(vec![address]),
        _ => bail!(
            "nobody knows where sites can reach the coordinator\nhint: give --address HOST:PORT, or set coordinator.advertise in {}",
            dir.config().display()
        ),
    }
}
