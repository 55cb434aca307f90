//! `atoll remote`: a run from afar, for whoever has a key of it.

use std::path::PathBuf;

use anyhow::{Result, bail};
use atoll_core::site::SiteId;
use atoll_node::remote::Remote;

use crate::{status, ticket};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The ticket that `atoll ticket` printed, or a file that holds it.
    ticket: String,
    /// The folder for its owner's key; without it, `atoll-SITE`.
    #[arg(long, value_name = "DIR", global = true)]
    dir: Option<PathBuf>,
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Look at the run.
    Status {
        /// Also tell how synchronization does.
        #[arg(long)]
        rounds: bool,
        /// Print the whole report as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Fetch the model as it is now, as a Hugging Face folder.
    Model {
        /// Where to put it.
        out: PathBuf,
    },
    /// Replace this site's key by a new one; the earlier one is good for nothing any more.
    Rekey,
    /// Print a ticket: what one site needs to join. For administrators.
    Ticket {
        /// The site's name: a-z, 0-9 and -.
        site: SiteId,
        /// Where the site finds the coordinator, if not where this ticket says.
        #[arg(long, value_name = "HOST:PORT")]
        address: Vec<String>,
        #[command(flatten)]
        terms: ticket::Terms,
    },
    /// Take a site's key off the list, at once and for good; its tickets too. For administrators.
    Revoke {
        /// The site's name.
        site: SiteId,
    },
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let ticket = ticket::read(&arguments.ticket)?;
    let dir = arguments.dir.clone().unwrap_or_else(|| ticket::folder(&ticket));
    let own = ticket.site.clone();
    let remote = Remote::new(dir, ticket)?;
    match &arguments.what {
        What::Status { rounds, json } => status::show(&remote.look()?, *rounds, *json)?,
        What::Model { out } => {
            if out.join("model.safetensors").exists() {
                bail!("{} holds a model already\nhint: choose another folder, or remove it", out.display());
            }
            remote.fetch_model(out)?;
            println!("{} holds the model", out.display());
        }
        What::Rekey => {
            remote.rekey()?;
            println!("{own} has a new key");
        }
        What::Ticket { site, address, terms } => {
            println!("{}", remote.invite(terms.invite(site.clone()), address.clone())?.to_text());
        }
        What::Revoke { site } => {
            remote.revoke(site)?;
            println!("the key of {site} is revoked, and its tickets are withdrawn");
        }
    }
    Ok(())
}
