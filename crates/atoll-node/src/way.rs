//! The way to whoever leads a run: its addresses, the greeting, and bytes that are fetched over a connection of their own.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail};
use atoll_core::hash::Digest;
use atoll_core::wire::{CHUNK, Frame, Hello, Purpose, Welcome};

use crate::acquaintance::Acquaintance;
use crate::identity::{Identity, Ticket};
use crate::link::{Dialer, Link, SILENCE_SECONDS, is_foreign_key, read_frame, within, write_frame};
use crate::shared::PATIENCE;

/// Who wants to go where.
#[derive(Clone)]
pub(crate) struct Way {
    pub(crate) dialer: Dialer,
    acquaintance: Acquaintance,
    pub(crate) doors: Doors,
    pub(crate) hello: Hello,
}

/// Where coordinators of the run may be found: at most one of them leads.
#[derive(Debug, Clone)]
pub(crate) struct Doors {
    addresses: Vec<String>,
    /// Which one to try first: the last that opened.
    first: Arc<AtomicUsize>,
    /// The latest epoch that a coordinator has led in.
    epoch: Arc<AtomicU64>,
}

impl Doors {
    pub(crate) fn new(addresses: Vec<String>) -> Self {
        Self { addresses, first: Arc::default(), epoch: Arc::default() }
    }

    /// Those to try, in this order. Data go where control went.
    fn to_try(&self, purpose: Purpose) -> Vec<(usize, &String)> {
        let count = self.addresses.len();
        let first = self.first.load(Ordering::Relaxed);
        let tries = if purpose == Purpose::Data { count.min(1) } else { count };
        (first..first + tries).map(|index| index % count).map(|index| (index, &self.addresses[index])).collect()
    }

    /// All but the one that opened last.
    pub(crate) fn others(&self) -> Vec<String> {
        let first = self.first.load(Ordering::Relaxed);
        let others = self.addresses.iter().enumerate().filter(|(index, _)| *index != first);
        others.map(|(_, address)| address.clone()).collect()
    }

    /// The one that opened last.
    pub(crate) fn last(&self) -> Option<String> {
        self.addresses.get(self.first.load(Ordering::Relaxed)).cloned()
    }

    /// Notes that a coordinator of that epoch opened; false if another has led since.
    fn opened(&self, index: usize, epoch: u64) -> bool {
        let is_latest = self.epoch.fetch_max(epoch, Ordering::Relaxed) <= epoch;
        if is_latest {
            self.first.store(index, Ordering::Relaxed);
        }
        is_latest
    }

    /// Whoever was there does not answer any more.
    pub(crate) fn try_another(&self) {
        let next = (self.first.load(Ordering::Relaxed) + 1) % self.addresses.len().max(1);
        self.first.store(next, Ordering::Relaxed);
    }

    /// Seconds of silence after which another door is tried, if the longest pause between two answers was of late so long.
    pub(crate) fn patience(&self, longest: f64) -> f64 {
        let most = SILENCE_SECONDS as f64;
        if self.addresses.len() > 1 { (PAUSES * longest).clamp(SILENCE_MIN, most) } else { most }
    }
}

/// Silence of so many times the longest pause of late is no accident; nor is it before so many seconds.
const PAUSES: f64 = 4.0;
const SILENCE_MIN: f64 = 3.0;

/// A refusal, told apart from failures that a retry may mend.
#[derive(Debug, thiserror::Error)]
#[error("{why}")]
pub(crate) struct Refused {
    why: String,
    /// Whether there was nobody else to ask. One that was deposed and does not know it yet may not know this site.
    is_certain: bool,
}

/// Refusals one after the other.
#[derive(Default)]
pub(crate) struct Refusals {
    since: Option<Instant>,
}

/// So long a leader that cannot reach the object store may go on without knowing that another leads.
const DOUBT: Duration = PATIENCE;

impl Refusals {
    /// Whether it is of no use to try again after this failure.
    pub(crate) fn are_final(&mut self, failure: &anyhow::Error) -> bool {
        let Some(refused) = failure.downcast_ref::<Refused>() else {
            self.since = None;
            return false;
        };
        let since = self.since.get_or_insert_with(Instant::now);
        refused.is_certain || since.elapsed() >= DOUBT
    }
}

/// What a knock at a door was answered with.
enum Answer {
    Opened(Box<Link>, Box<Welcome>),
    Refused(String),
}

impl Way {
    /// The way that a ticket shows, for the owner of this key, who remembers in `folder` by which keys coordinators are known.
    pub(crate) fn new(ticket: &Ticket, identity: &Identity, folder: &Path, engine: &str, device: &str) -> Result<Self> {
        let (engine, device) = (engine.to_string(), device.to_string());
        let (purpose, secret) = (Purpose::Enlist, Some(ticket.secret.0));
        let hello = Hello { purpose, secret, successor: None, layout: None, engine, device };
        let acquaintance = Acquaintance::open(folder, ticket.coordinator)?;
        let dialer = Dialer::new(identity, ticket.coordinator)?;
        dialer.trust(acquaintance.keys());
        Ok(Self { dialer, acquaintance, doors: Doors::new(ticket.addresses.clone()), hello })
    }

    /// Connects and introduces itself.
    pub(crate) async fn greet(&self, purpose: Purpose) -> Result<(Link, Welcome)> {
        let (mut problem, mut refusal) = (anyhow!("the ticket names no address"), None);
        let mut refusals = 0;
        for (index, address) in self.doors.to_try(purpose) {
            match self.knock(address, purpose).await {
                Ok(Answer::Opened(link, welcome)) if self.doors.opened(index, welcome.epoch) => {
                    self.learn(welcome.keys.clone());
                    return Ok((*link, *welcome));
                }
                Ok(Answer::Opened(..)) => {
                    problem = anyhow!("the coordinator at {address} does not lead the run any more");
                }
                Ok(Answer::Refused(why)) => {
                    refusals += 1;
                    refusal.get_or_insert(why);
                }
                Err(error) => problem = error,
            }
        }
        Err(refusal.map_or(problem, |why| Refused { why, is_certain: refusals == self.doors.addresses.len() }.into()))
    }

    /// Knows coordinators by these keys from now on.
    fn learn(&self, keys: Vec<Digest>) {
        if self.acquaintance.learn(keys.clone()) {
            let words: Vec<String> = keys.iter().map(|key| key.short().to_string()).collect();
            tracing::info!("the coordinators are known by {} from now on", words.join(" and "));
            self.dialer.trust(keys);
        }
    }

    /// The coordinator that is connected says that there is, or will be, this key.
    pub(crate) fn expect(&self, next: Digest) {
        let known = self.acquaintance.keys();
        if !known.contains(&next) {
            self.learn(known.into_iter().take(1).chain([next]).collect());
        }
    }

    /// Connects to whoever is at that address, leading or not; none if this site is not let in there.
    pub(crate) async fn visit(&self, address: &str, purpose: Purpose) -> Result<Option<Link>> {
        Ok(match self.knock(address, purpose).await? {
            Answer::Opened(link, _) => Some(*link),
            Answer::Refused(_) => None,
        })
    }

    async fn knock(&self, address: &str, purpose: Purpose) -> Result<Answer> {
        let opened = async {
            let mut link = self.dialer.dial(address).await?;
            write_frame(&mut link, &Frame::hello(Hello { purpose, ..self.hello.clone() })).await?;
            let answer = within(SILENCE_SECONDS, read_frame(&mut link)).await??;
            anyhow::Ok((link, answer))
        };
        // Behind another door may be somebody who answers sooner.
        let patience = Duration::from_secs_f64(self.doors.patience(1.0));
        let opened = tokio::time::timeout(patience, opened).await;
        match opened.unwrap_or_else(|_| Err(anyhow!("the coordinator at {address} does not answer"))) {
            Ok((link, Some(Frame::Welcome(welcome)))) => Ok(Answer::Opened(Box::new(link), welcome)),
            Ok((_, Some(Frame::Refused(why)))) => Ok(Answer::Refused(why)),
            Ok(_) => bail!("the coordinator at {address} hung up; it may be standing by"),
            Err(error) if is_foreign_key(&error) => Ok(Answer::Refused(format!(
                "the coordinator at {address} has another key than this site knows\nhint: ask the operator for a new ticket; if the key was not changed on purpose, somebody else is answering there"
            ))),
            Err(error) => Err(error),
        }
    }
}

/// Gets that may be unanswered over one connection.
const GETS_AHEAD: usize = 32;

/// Fetches some bytes over a connection that is used for nothing else meanwhile; none if they are not there (any more).
pub(crate) async fn fetch(link: &mut Link, digest: Digest, bytes: u64) -> Result<Option<Vec<u8>>> {
    let (mut buffer, mut asked, mut lengths, mut is_there) = (Vec::new(), 0, VecDeque::new(), true);
    while asked < bytes || !lengths.is_empty() {
        while is_there && asked < bytes && lengths.len() < GETS_AHEAD {
            let length = (bytes - asked).min(CHUNK as u64) as u32;
            write_frame(link, &Frame::Get { digest, offset: asked, length }).await?;
            asked += u64::from(length);
            lengths.push_back(length as usize);
        }
        // Each get has its answer, also those that were sent before it came out that there is nothing.
        let Some(expected) = lengths.pop_front() else { break };
        match within(SILENCE_SECONDS, read_frame(link)).await?? {
            Some(Frame::Chunk { bytes, .. }) if bytes.len() == expected => buffer.extend(bytes),
            Some(Frame::Missing(_)) => is_there = false,
            _ => bail!("the coordinator does not send what was asked for"),
        }
    }
    if !is_there {
        return Ok(None);
    }
    if Digest::of(&buffer) != digest {
        bail!("what the coordinator sent arrived damaged");
    }
    Ok(Some(buffer))
}

/// Fetches the run's tokenizer.
pub(crate) async fn fetch_tokenizer(link: &mut Link, welcome: &Welcome) -> Result<Vec<u8>> {
    const BYTES_MAX: u64 = 256 << 20;
    if welcome.tokenizer_bytes > BYTES_MAX {
        bail!("the coordinator announces a tokenizer of {} bytes", welcome.tokenizer_bytes);
    }
    let tokenizer = fetch(link, welcome.tokenizer, welcome.tokenizer_bytes).await?;
    tokenizer.ok_or_else(|| anyhow!("the coordinator does not send the tokenizer"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(is_certain: bool) -> anyhow::Error {
        Refused { why: "it does not know this site".to_string(), is_certain }.into()
    }

    #[test]
    fn a_refusal_is_believed_at_once_only_if_nobody_else_may_lead() {
        assert!(Refusals::default().are_final(&refusal(true)));
        assert!(!Refusals::default().are_final(&anyhow!("nobody answers")));
        let mut refusals = Refusals::default();
        assert!(!refusals.are_final(&refusal(false)) && !refusals.are_final(&refusal(false)));
        refusals.since = Instant::now().checked_sub(DOUBT);
        assert!(refusals.are_final(&refusal(false)), "it was said for long enough");
        refusals.are_final(&anyhow!("nobody answers"));
        assert!(!refusals.are_final(&refusal(false)), "and then nobody answered, which begins it anew");
    }
}
