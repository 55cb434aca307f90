//! A run from afar: what the owner of a key can do without training. Everybody may look at the run, fetch its model and
//! change its own key; administrators invite and revoke.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use atoll_core::hash::{Digest, from_little_endian};
use atoll_core::journal::Invitation;
use atoll_core::site::SiteId;
use atoll_core::wire::{Answer, Frame, Purpose, Request, Welcome};
use tokio::runtime::Runtime;

use crate::acquaintance::Acquaintance;
use crate::data::file;
use crate::hf;
use crate::identity::{Identity, Ticket};
use crate::link::{Link, SILENCE_SECONDS, read_frame, within, write_frame};
use crate::report::Report;
use crate::run::{RunDir, Terms};
use crate::way::{Refused, Way, fetch, fetch_tokenizer};

/// The owner of a key, who knows the way to a run.
pub struct Remote {
    dir: RunDir,
    ticket: Ticket,
    runtime: Runtime,
}

/// A model changes while it is fetched; so often its pieces are asked for anew.
const TRIES: usize = 20;

impl Remote {
    /// With the key in `dir`, which is made if there is none, to the run that `ticket` names.
    ///
    /// # Errors
    /// If the folder cannot be made.
    pub fn new(dir: PathBuf, ticket: Ticket) -> Result<Self> {
        fs::create_dir_all(&dir).with_context(|| format!("{} cannot be made", dir.display()))?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        Ok(Self { dir: RunDir(dir), ticket, runtime })
    }

    /// How the run does.
    ///
    /// # Errors
    /// If the coordinator cannot be reached, or refuses.
    pub fn look(&self) -> Result<Report> {
        match self.ask(Request::Look)? {
            Answer::Report(json) => serde_json::from_str(&json).context("the coordinator's report is not understood"),
            other => Err(unexpected(&other)),
        }
    }

    /// Invites as `invitation` says; what it returns is for the one invited.
    ///
    /// # Errors
    /// If the coordinator cannot be reached, or this key may not invite.
    pub fn invite(&self, invitation: Invitation, addresses: Vec<String>) -> Result<Ticket> {
        let addresses = if addresses.is_empty() { self.ticket.addresses.clone() } else { addresses };
        let mut ticket = Ticket::make(&self.ticket.run, &invitation, addresses, self.ticket.coordinator)?;
        self.demand(Request::Invite(ticket.hash(), invitation))?;
        // The key that was proven meanwhile may be another than this site's ticket names.
        let known = Acquaintance::open(&self.dir.0, self.ticket.coordinator)?.keys();
        ticket.coordinator = known.first().copied().unwrap_or(ticket.coordinator);
        Ok(ticket)
    }

    /// Takes a site's key off the list, and its unused tickets with it.
    ///
    /// # Errors
    /// If the coordinator cannot be reached, this key may not revoke, or there is no such site.
    pub fn revoke(&self, site: &SiteId) -> Result<()> {
        self.demand(Request::Revoke(site.clone()))
    }

    /// Writes the model as it is now to `folder`, as a Hugging Face folder.
    ///
    /// # Errors
    /// If the coordinator cannot be reached, or the folder cannot be written.
    pub fn fetch_model(&self, folder: &Path) -> Result<()> {
        let identity = self.identity()?;
        self.runtime.block_on(async {
            let (mut link, welcome) = self.way(&identity)?.greet(Purpose::Desk).await?;
            let terms = Terms::read(&welcome.config)?;
            let tokenizer = fetch_tokenizer(&mut link, &welcome).await?;
            let manifest = terms.config.manifest(&terms.model);
            let lens = manifest.fragments().map(|id| manifest.fragment_len(id).unwrap_or(0));
            let theta = fetch_theta(&mut link, &lens.collect::<Vec<usize>>()).await?;
            hf::save(folder, &terms.model, &manifest.scatter(&theta), Some(&tokenizer))?;
            Ok(())
        })
    }

    /// Gives this site a new key. If that is interrupted, doing it again finishes it.
    ///
    /// # Errors
    /// If the coordinator cannot be reached or refuses, or the site is running.
    pub fn rekey(&self) -> Result<()> {
        let _hold = self.dir.hold()?;
        let (old, new) = (self.identity()?, Identity::load_or_create(&self.next_key())?);
        let mut way = self.way(&old)?;
        way.hello.successor = Some(new.fingerprint);
        match self.runtime.block_on(way.greet(Purpose::Desk)) {
            Ok(_) => {}
            // It may be that the coordinator has done it, and we did not hear of that.
            Err(error) if error.is::<Refused>() => match self.runtime.block_on(self.way(&new)?.greet(Purpose::Desk)) {
                Ok(_) => {}
                Err(_) => return Err(error),
            },
            Err(error) => return Err(error),
        }
        file::rename(&self.next_key(), &self.key())
            .with_context(|| format!("{} cannot be replaced", self.key().display()))
    }

    fn key(&self) -> PathBuf {
        self.dir.0.join("site.key")
    }

    fn next_key(&self) -> PathBuf {
        self.dir.0.join("site.key.next")
    }

    fn identity(&self) -> Result<Identity> {
        Identity::load_or_create(&self.key())
    }

    fn way(&self, identity: &Identity) -> Result<Way> {
        Way::new(&self.ticket, identity, &self.dir.0, "none", "a desk")
    }

    fn demand(&self, request: Request) -> Result<()> {
        match self.ask(request)? {
            Answer::Done => Ok(()),
            Answer::Refused(why) => bail!(why),
            other => Err(unexpected(&other)),
        }
    }

    fn ask(&self, request: Request) -> Result<Answer> {
        let identity = self.identity()?;
        self.runtime.block_on(async {
            let (mut link, _): (Link, Welcome) = self.way(&identity)?.greet(Purpose::Desk).await?;
            ask(&mut link, request).await
        })
    }
}

async fn ask(link: &mut Link, request: Request) -> Result<Answer> {
    write_frame(link, &Frame::Ask(request)).await?;
    match within(SILENCE_SECONDS, read_frame(link)).await?? {
        Some(Frame::Answer(answer)) => Ok(answer),
        _ => bail!("the coordinator hung up"),
    }
}

fn unexpected(answer: &Answer) -> anyhow::Error {
    anyhow!("the coordinator answers something else than it was asked: {answer:?}")
}

/// Fetches every fragment's weights: those of this moment, or of a later one if they have gone before they were asked for.
async fn fetch_theta(link: &mut Link, lens: &[usize]) -> Result<Vec<Vec<f32>>> {
    let mut theta: Vec<Option<Vec<f32>>> = vec![None; lens.len()];
    for _ in 0..TRIES {
        let digests: Vec<Digest> = match ask(link, Request::Model).await? {
            Answer::Model(digests) if digests.len() == lens.len() => digests,
            other => return Err(unexpected(&other)),
        };
        for (index, digest) in digests.into_iter().enumerate() {
            if theta[index].is_none() {
                let bytes = fetch(link, digest, 4 * lens[index] as u64).await?;
                theta[index] = bytes.map(|bytes| from_little_endian(&bytes));
            }
        }
        if let Some(theta) = theta.iter().cloned().collect() {
            return Ok(theta);
        }
    }
    bail!("the model changes faster than it can be fetched\nhint: try again")
}
