//! Pieces of weights that are still to be asked for, of which every connection takes what it can move: the healthiest donor gives
//! most.

use std::collections::VecDeque;
use std::sync::Mutex;

use atoll_core::hash::Digest;
use atoll_core::wire::Frame;
use tokio::sync::{Notify, SemaphorePermit};

use super::window::Window;
use crate::coordinator::lock;

/// What is to be fetched, in the order of asking.
#[derive(Default)]
pub(super) struct Pile {
    parts: Mutex<VecDeque<Part>>,
    changed: Notify,
}

/// Pieces of the weights of that address.
struct Part {
    digest: Digest,
    pieces: VecDeque<Piece>,
}

/// Some bytes of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) digest: Digest,
    pub(super) offset: u64,
    pub(super) length: u32,
}

impl Piece {
    /// Asks for it.
    pub(super) fn get(self) -> Frame {
        let Self { digest, offset, length } = self;
        Frame::Get { digest, offset, length }
    }
}

impl Pile {
    /// Adds pieces, or gives back what was taken and not moved.
    pub(super) fn add(&self, pieces: impl IntoIterator<Item = Piece>) {
        let mut parts = lock(&self.parts);
        for piece in pieces {
            let index = parts.iter().position(|part| part.digest == piece.digest).unwrap_or_else(|| {
                parts.push_back(Part { digest: piece.digest, pieces: VecDeque::new() });
                parts.len() - 1
            });
            parts[index].pieces.push_back(piece);
        }
        drop(parts);
        self.changed.notify_waiters();
    }

    /// Weights of which there are pieces.
    pub(super) fn digests(&self) -> Vec<Digest> {
        lock(&self.parts).iter().map(|part| part.digest).collect()
    }

    /// Forgets what is not wanted any more.
    pub(super) fn retain(&self, is_wanted: impl Fn(&Digest) -> bool) {
        lock(&self.parts).retain(|part| is_wanted(&part.digest));
    }

    /// Waits for a piece of weights that `fits`, and for room to ask for it, which nobody holds before there is one. Nothing is taken
    /// if the wait is given up.
    pub(super) async fn take<'a>(
        &self,
        window: &'a Window,
        fits: impl Fn(&Digest) -> bool,
    ) -> (SemaphorePermit<'a>, Piece) {
        loop {
            self.until(|| self.has(&fits).then_some(())).await;
            let room = window.room().await;
            if let Some(piece) = self.find(&fits) {
                return (room, piece);
            }
        }
    }

    fn has(&self, fits: impl Fn(&Digest) -> bool) -> bool {
        lock(&self.parts).iter().any(|part| fits(&part.digest))
    }

    /// Waits until more has come and `look` has found something.
    pub(super) async fn until<T>(&self, look: impl Fn() -> Option<T>) -> T {
        loop {
            let mut changed = std::pin::pin!(self.changed.notified());
            changed.as_mut().enable(); // Before the look: what comes after it is noticed.
            if let Some(found) = look() {
                return found;
            }
            changed.await;
        }
    }

    fn find(&self, fits: impl Fn(&Digest) -> bool) -> Option<Piece> {
        let mut parts = lock(&self.parts);
        let index = parts.iter().position(|part| fits(&part.digest))?;
        let piece = parts[index].pieces.pop_front();
        if parts[index].pieces.is_empty() {
            parts.remove(index);
        }
        piece
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn each_takes_what_fits_in_the_order_of_asking() {
        let (pile, window, of) = (Pile::default(), Window::new(9, 9), |name: &str| Digest::of(name.as_bytes()));
        let piece = |name, offset| Piece { digest: of(name), offset, length: 1 };
        let take = async |name: &str| pile.take(&window, |digest| *digest == of(name)).await.1;
        pile.add([piece("a", 0), piece("a", 1), piece("b", 0)]);
        assert_eq!(take("b").await, piece("b", 0));
        assert_eq!(pile.digests(), [of("a")]);
        let give = async {
            assert_eq!(take("a").await, piece("a", 0));
            pile.add([piece("c", 7)]);
        };
        assert_eq!(tokio::join!(take("c"), give).0, piece("c", 7));
    }

    #[tokio::test]
    async fn who_waits_for_pieces_holds_no_room() {
        let (pile, window) = (Pile::default(), Window::new(1, 1));
        let waits = pile.take(&window, |_| true);
        tokio::select! {
            biased;
            _ = waits => panic!("there is nothing"),
            _room = window.room() => {}
        }
    }
}
