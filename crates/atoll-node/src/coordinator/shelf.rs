//! What the coordinator hands out by content address: deltas of commits, the weights of fragments as
//! they are now, and the tokenizer.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use atoll_core::hash::Digest;
use atoll_core::outer::Global;

use crate::store::Store;

/// Bytes to hand out.
pub(crate) type Bytes = Arc<Vec<u8>>;

/// A cache in front of disk and model.
#[derive(Debug)]
pub(crate) struct Shelf {
    global: Arc<Mutex<Global>>,
    store: Store,
    tokenizer: (Digest, Bytes),
    /// Recently asked for, newest last.
    recent: Mutex<VecDeque<(Digest, Bytes)>>,
    /// Digest of each fragment as last committed.
    current: Mutex<Vec<Digest>>,
    recent_max: usize,
}

impl Shelf {
    /// A shelf over a model, its payloads and a tokenizer.
    pub(crate) fn new(global: Arc<Mutex<Global>>, store: Store, tokenizer: Vec<u8>, current: Vec<Digest>) -> Self {
        let tokenizer = (Digest::of(&tokenizer), Arc::new(tokenizer));
        let recent_max = 4 * current.len().max(1);
        Self { global, store, tokenizer, recent: Mutex::default(), current: Mutex::new(current), recent_max }
    }

    /// Address and length of the tokenizer.
    pub(crate) fn tokenizer(&self) -> (Digest, u64) {
        (self.tokenizer.0, self.tokenizer.1.len() as u64)
    }

    /// Notes that a fragment was committed.
    pub(crate) fn committed(&self, index: usize, digest: Digest) {
        if let Some(current) = lock(&self.current).get_mut(index) {
            *current = digest;
        }
    }

    /// Puts bytes where they will be asked for soon.
    pub(crate) fn offer(&self, digest: Digest, bytes: Bytes) {
        let mut recent = lock(&self.recent);
        if recent.iter().all(|(at, _)| *at != digest) {
            recent.push_back((digest, bytes));
        }
        while recent.len() > self.recent_max {
            recent.pop_front();
        }
    }

    /// The bytes of that address if they need no reading from disk and no copying.
    pub(crate) fn at_hand(&self, digest: Digest) -> Option<Bytes> {
        if digest == self.tokenizer.0 { Some(self.tokenizer.1.clone()) } else { self.again(digest) }
    }

    /// The bytes of that address, or nothing if they are not here (any more). May read the disk.
    pub(crate) fn get(&self, digest: Digest) -> Option<Bytes> {
        if let Some(bytes) = self.at_hand(digest) {
            return Some(bytes);
        }
        let bytes = Arc::new(self.weights(digest).or_else(|| self.store.get(digest))?);
        self.offer(digest, bytes.clone());
        Some(bytes)
    }

    /// Bytes asked for before; asking keeps them, so that a slow site gets all of what it began to fetch.
    fn again(&self, digest: Digest) -> Option<Bytes> {
        let mut recent = lock(&self.recent);
        let index = recent.iter().position(|(at, _)| *at == digest)?;
        let entry = recent.remove(index)?;
        let bytes = entry.1.clone();
        recent.push_back(entry);
        Some(bytes)
    }

    /// The bytes of a fragment, if it is at that digest now.
    fn weights(&self, digest: Digest) -> Option<Vec<u8>> {
        let index = lock(&self.current).iter().position(|current| *current == digest)?;
        let bytes: Vec<u8> = lock(&self.global).theta[index].iter().flat_map(|weight| weight.to_le_bytes()).collect();
        // A step that is computed but not yet committed may have moved the weights on.
        (Digest::of(&bytes) == digest).then_some(bytes)
    }
}

/// Locks; a thread that panicked while holding the lock has left plain data behind.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
