//! What is to be sent to a site over its data connections: they take pieces from one queue, so that a slow stream
//! takes less of it, and every piece goes over whichever stream has room.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex};

use anyhow::{Result, bail};
use atoll_core::hash::Digest;
use atoll_core::site::SiteId;
use atoll_core::wire::{CHUNK, Frame};
use tokio::sync::Semaphore;

use super::shelf::{Bytes, lock};

/// The queues of all connected sites.
#[derive(Default)]
pub(super) struct Outgoings(Mutex<BTreeMap<SiteId, Arc<Outgoing>>>);

/// The queue of one site, until it begins anew.
pub(super) struct Outgoing {
    pieces: Mutex<VecDeque<Piece>>,
    /// As many permits as there are pieces.
    ready: Semaphore,
}

/// Something to send.
pub(super) enum Piece {
    /// As it is.
    Say(Frame),
    /// A part of a payload that was not asked for.
    Push { digest: Digest, bytes: Bytes, offset: usize },
    /// A part that was asked for.
    Answer { digest: Digest, offset: u64, length: u32 },
}

/// Pieces that a site may leave waiting when it asks for another; ours never have so many.
const PIECES_MAX: usize = 1 << 16;

impl Outgoings {
    /// A site begins anew: what was queued for its earlier connections is dropped, and they end.
    pub(super) fn open(&self, site: &SiteId) {
        let outgoing = Outgoing { pieces: Mutex::default(), ready: Semaphore::new(0) };
        if let Some(earlier) = lock(&self.0).insert(site.clone(), Arc::new(outgoing)) {
            earlier.ready.close();
        }
    }

    /// The queue of a site.
    pub(super) fn of(&self, site: &SiteId) -> Option<Arc<Outgoing>> {
        lock(&self.0).get(site).cloned()
    }

    /// Sends a payload that a site has not asked for.
    pub(super) fn push(&self, site: &SiteId, digest: Digest, bytes: &Bytes) {
        let Some(outgoing) = self.of(site) else { return };
        let pieces = (0..bytes.len()).step_by(CHUNK).map(|offset| Piece::Push { digest, bytes: bytes.clone(), offset });
        let mut queue = lock(&outgoing.pieces);
        let before = queue.len();
        queue.extend(pieces);
        outgoing.ready.add_permits(queue.len() - before);
    }
}

impl Outgoing {
    /// Queues an answer behind what waits already.
    ///
    /// # Errors
    /// If the site asks for more than it takes.
    pub(super) fn answer(&self, piece: Piece) -> Result<()> {
        let mut queue = lock(&self.pieces);
        if queue.len() >= PIECES_MAX {
            bail!("the site asks for more than it takes");
        }
        queue.push_back(piece);
        self.ready.add_permits(1);
        Ok(())
    }

    /// Queues a short word in front of all payloads.
    ///
    /// # Errors
    /// If the site asks for more than it takes.
    pub(super) fn say(&self, frame: Frame) -> Result<()> {
        let mut queue = lock(&self.pieces);
        if queue.len() >= PIECES_MAX {
            bail!("the site asks for more than it takes");
        }
        queue.push_front(Piece::Say(frame));
        self.ready.add_permits(1);
        Ok(())
    }

    /// Waits for the next piece.
    ///
    /// # Errors
    /// If the site has begun anew.
    pub(super) async fn next(&self) -> Result<Piece> {
        loop {
            self.ready.acquire().await?.forget();
            if let Some(piece) = lock(&self.pieces).pop_front() {
                return Ok(piece);
            }
        }
    }
}

impl Piece {
    /// A part of a payload as a frame.
    pub(super) fn put(digest: Digest, bytes: &Bytes, offset: usize) -> Frame {
        let end = bytes.len().min(offset + CHUNK);
        Frame::Put { digest, total: bytes.len() as u64, offset: offset as u64, bytes: bytes[offset..end].to_vec() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_site_that_takes_nothing_may_ask_so_often_and_no_more() {
        let (outgoings, site) = (Outgoings::default(), "greedy".parse().unwrap());
        outgoings.open(&site);
        let outgoing = outgoings.of(&site).unwrap();
        let digest = Digest::of(b"asked for");
        let ask = || outgoing.answer(Piece::Answer { digest, offset: 0, length: 1 });
        for _ in 0..PIECES_MAX {
            ask().unwrap();
        }
        assert!(ask().is_err() && outgoing.say(Frame::Missing(digest)).is_err());
        // What the run itself has for it still gets there.
        let bytes = Bytes::from(vec![0; CHUNK + 1]);
        outgoings.push(&site, digest, &bytes);
        assert_eq!(lock(&outgoing.pieces).len(), PIECES_MAX + 2);
        assert!(size_of::<Piece>() <= 160, "flood.rs counts on it");
    }
}
