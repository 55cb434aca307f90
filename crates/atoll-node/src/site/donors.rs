//! Weights from coordinators that stand by, beside those from the one that leads; and from that one over more connections,
//! since a kernel lets each send a few megabytes ahead. A donor is asked first whether it has what is wanted, or comes to
//! it within a moment; then its connections take pieces from the same pile as the leader's. Nothing else is asked of it,
//! what it owes when it fails goes back on the pile, and a site that finds none is no worse off.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use atoll_core::hash::Digest;
use atoll_core::wire::{Frame, Purpose};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::net::{Origin, Stream};
use super::pile::Piece;
use super::window::Window;
use crate::link::{Link, read_frame, write_frame};
use crate::way::Way;

/// Fewer bytes are not worth another handshake …
const WORTH_ASKING: u64 = 256 << 10;
/// … with the leader, that is asked already.
const WORTH_MORE: u64 = 16 << 20;
/// A donor that owes something and has been silent for so long is given up.
const PATIENCE: Duration = Duration::from_secs(3);
/// After a donor was of no use: it may not have heard yet that this site is a member.
const TRY_AGAIN: Duration = Duration::from_secs(1);
/// Pieces that a connection may owe at first and at most.
const OWED: (usize, usize) = (4, 256);

/// Whether what donors give can be trusted to be what its name says; false for ever once it was not.
#[derive(Clone, Default)]
pub(super) struct Suspicion(Arc<AtomicBool>);

impl Suspicion {
    pub(super) fn raise(&self) {
        if !self.0.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                "weights of which a coordinator that stands by gave a part were damaged; those that stand by are asked for nothing more"
            );
        }
    }

    pub(super) fn is_raised(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// A coordinator that may have weights.
#[derive(Clone)]
pub(super) struct Donor {
    pub(super) address: String,
    /// Whether it is the one that leads.
    pub(super) leads: bool,
    pub(super) way: Way,
    /// Connections to it.
    pub(super) streams: usize,
    pub(super) suspicion: Suspicion,
}

impl Donor {
    /// Takes as much from it as it can give, as long as there is something to fetch. A site that `joins` is about to fetch the
    /// model, so a leader is not waited with.
    pub(super) async fn ask(self, stream: Stream, joins: bool) {
        let worth = if self.leads { WORTH_MORE } else { WORTH_ASKING };
        let mut at_once = self.leads && joins && stream.largest as u64 >= worth;
        while self.leads || !self.suspicion.is_raised() {
            stream.pile.until(|| (at_once || stream.weights_to_come() >= worth).then_some(())).await;
            at_once = false;
            if let Err(error) = self.visit(&stream).await {
                tracing::debug!("nothing more from {}: {error:#}", self.address);
            }
            tokio::time::sleep(TRY_AGAIN).await;
        }
    }

    /// Over all connections, once there is one.
    async fn visit(&self, stream: &Stream) -> Result<()> {
        let Some(first) = self.way.visit(&self.address, Purpose::Fetch).await? else { return Ok(()) };
        let mut links = JoinSet::new();
        links.spawn(self.clone().take(stream.clone(), first));
        for _ in 1..self.streams {
            let (donor, stream) = (self.clone(), stream.clone());
            links.spawn(async move {
                let link = donor.way.visit(&donor.address, Purpose::Fetch).await?;
                if let Some(link) = link { donor.take(stream, link).await } else { Ok(()) }
            });
        }
        let mut result = Ok(());
        while let Some(end) = links.join_next().await {
            result = end?;
        }
        result
    }

    async fn take(self, stream: Stream, link: Link) -> Result<()> {
        let mut account = Account::new(stream, self.suspicion, self.leads);
        let result = account.keep(link).await;
        if account.given > 0 {
            tracing::info!("{} stood by and gave {:.1} MB of weights", self.address, account.given as f64 / 1e6);
        }
        result
    }
}

/// What a connection to a donor has and owes. What it owes when it ends goes back on the pile.
struct Account {
    stream: Stream,
    suspicion: Suspicion,
    leads: bool,
    window: Arc<Window>,
    owed: Vec<Piece>,
    /// Weights that the donor was asked whether it has, those of which it has not said it, and those that it has.
    asked: BTreeSet<Digest>,
    unsaid: BTreeSet<Digest>,
    has: BTreeSet<Digest>,
    given: u64,
}

impl Account {
    fn new(stream: Stream, suspicion: Suspicion, leads: bool) -> Self {
        let window = Arc::new(Window::new(OWED.0, OWED.1));
        let (asked, unsaid, has) = Default::default();
        Self { stream, suspicion, leads, window, owed: Vec::new(), asked, unsaid, has, given: 0 }
    }

    /// Asks and takes until the donor fails, or hangs up because it was asked nothing for long.
    async fn keep(&mut self, link: Link) -> Result<()> {
        let (mut reader, mut writer) = tokio::io::split(link);
        let (frames, mut answers) = mpsc::channel(OWED.1);
        // On its own, since a frame must not be given up halfway.
        let read = async {
            while let Some(frame) = read_frame(&mut reader).await? {
                frames.send(frame).await?;
            }
            bail!("it hung up")
        };
        let (pile, window) = (self.stream.pile.clone(), self.window.clone());
        let talk = async {
            loop {
                // The leader has what it told of.
                let to_ask = |digest: &Digest| !self.leads && !self.asked.contains(digest);
                let unasked = || pile.digests().into_iter().find(to_ask);
                let owes = !(self.owed.is_empty() && self.unsaid.is_empty());
                tokio::select! {
                    biased;
                    Some(frame) = answers.recv() => self.take(frame)?,
                    digest = pile.until(unasked) => {
                        self.asked.insert(digest);
                        self.unsaid.insert(digest);
                        write_frame(&mut writer, &Frame::Get { digest, offset: 0, length: 0 }).await?;
                    }
                    (room, piece) = pile.take(&window, |digest| self.leads || self.has.contains(digest)) => {
                        window.ask(room, Instant::now());
                        self.owed.push(piece);
                        write_frame(&mut writer, &piece.get()).await?;
                    }
                    // Whether the leader is silent is seen on the control connection.
                    () = tokio::time::sleep(PATIENCE), if owes && !self.leads => bail!("it fell silent"),
                }
            }
        };
        tokio::select! { result = talk => result, result = read => result }
    }

    fn take(&mut self, frame: Frame) -> Result<()> {
        match frame {
            Frame::Chunk { digest, bytes, .. } if bytes.is_empty() => {
                self.unsaid.remove(&digest);
                self.has.insert(digest);
                Ok(())
            }
            Frame::Chunk { digest, offset, bytes } => {
                let piece = Piece { digest, offset, length: bytes.len() as u32 };
                let Some(index) = self.owed.iter().position(|owed| *owed == piece) else {
                    bail!("it sent what nobody asked for")
                };
                self.owed.remove(index);
                self.window.answered(Instant::now());
                if self.leads {
                    return self.stream.arrive(digest, offset, &bytes, Origin::Aside);
                }
                self.given += bytes.len() as u64;
                if self.suspicion.is_raised() {
                    bail!("what a donor gave was damaged");
                }
                self.stream.arrive(digest, offset, &bytes, Origin::Donor)
            }
            // The leader has moved on: nobody is asked for these any more.
            Frame::Missing(digest) if self.leads => {
                let owed = self.owed.len();
                self.owed.retain(|piece| piece.digest != digest);
                (self.owed.len()..owed).for_each(|_| self.window.given_up());
                self.stream.lack(digest);
                Ok(())
            }
            // It never had it, or has it no more. It took its time to say so, and may be asked again.
            Frame::Missing(digest) => {
                self.unsaid.remove(&digest);
                self.asked.remove(&digest);
                self.has.remove(&digest);
                let (back, owed) = std::mem::take(&mut self.owed).into_iter().partition(|piece| piece.digest == digest);
                self.owed = owed;
                self.give_back(back);
                Ok(())
            }
            _ => bail!("it answered something else"),
        }
    }

    fn give_back(&self, pieces: Vec<Piece>) {
        pieces.iter().for_each(|_| self.window.given_up());
        self.stream.pile.add(pieces.into_iter().filter(|piece| self.stream.wants(piece.digest)));
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        self.give_back(self.owed.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::super::net::{Incoming, tests::fetching};
    use super::*;

    fn account(leads: bool, digest: Digest) -> (Account, std::sync::mpsc::Receiver<Incoming>) {
        let (stream, inbox) = fetching(digest, 4);
        let mut account = Account::new(stream, Suspicion::default(), leads);
        for offset in 0..2 {
            let room = account.window.clone();
            room.ask(room.try_room().unwrap(), Instant::now());
            account.owed.push(Piece { digest, offset, length: 1 });
        }
        account.stream.pile.add((2..4).map(|offset| Piece { digest, offset, length: 1 }));
        (account, inbox)
    }

    /// Else it would be asked for the same again and again.
    #[test]
    fn nobody_asks_on_for_what_the_leader_has_no_more() {
        let digest = Digest::of(b"weights");
        let (mut account, inbox) = account(true, digest);
        for _ in 0..2 {
            account.take(Frame::Missing(digest)).unwrap();
        }
        assert!(account.owed.is_empty() && account.stream.pile.digests().is_empty());
        assert!(account.window.try_room().is_some(), "there is room for other weights");
        assert!(matches!(inbox.try_recv(), Ok(Incoming::Fetched(missing, None)) if missing == digest));
        assert!(inbox.try_recv().is_err(), "told once");
        drop(account);
    }

    #[test]
    fn what_a_donor_owes_goes_back_as_long_as_it_is_wanted() {
        let digest = Digest::of(b"weights");
        let (mut donor, _inbox) = account(false, digest);
        let pile = donor.stream.pile.clone();
        donor.take(Frame::Missing(digest)).unwrap();
        assert_eq!(pile.digests(), [digest], "others may have it");
        donor.stream.lack(digest);
        donor.owed.push(Piece { digest, offset: 0, length: 1 });
        drop(donor);
        assert!(pile.digests().is_empty(), "nobody waits for it");
    }
}
