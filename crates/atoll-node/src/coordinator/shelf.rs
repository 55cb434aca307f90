//! What the coordinator hands out by content address: deltas of commits, the weights of fragments as
//! they are now, and the tokenizer.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use atoll_core::hash::{Digest, little_endian};
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
    /// Payloads of commits.
    payloads: Recent,
    /// Weights of fragments, also of versions that are past: whoever has begun to fetch one gets all of it, though commits
    /// go on, and may come back to it after its connection or its process was lost.
    weights: Recent,
    /// Digest of each fragment as last committed.
    current: Mutex<Vec<Digest>>,
    /// Weights that are made as soon as a fragment is at that digest.
    expected: Mutex<VecDeque<Digest>>,
    /// Held while bytes are made: a site asks for the same ones over all its connections at once.
    making: Mutex<()>,
}

/// What was asked for lately, newest last.
#[derive(Debug)]
struct Recent {
    bytes: Mutex<VecDeque<(Digest, Bytes)>>,
    most: usize,
}

/// Payloads of each fragment that are at hand.
const PAYLOADS: usize = 4;
/// Versions of each fragment's weights that are at hand: sites that join at the same time need not wait for each other.
const VERSIONS: usize = 3;

impl Shelf {
    /// A shelf over a model, its payloads and a tokenizer.
    pub(crate) fn new(global: Arc<Mutex<Global>>, store: Store, tokenizer: Vec<u8>, current: Vec<Digest>) -> Self {
        let tokenizer = (Digest::of(&tokenizer), Arc::new(tokenizer));
        let recent = |each: usize| Recent { bytes: Mutex::default(), most: each * current.len().max(1) };
        let (payloads, weights) = (recent(PAYLOADS), recent(VERSIONS));
        Self {
            global,
            store,
            tokenizer,
            payloads,
            weights,
            current: Mutex::new(current),
            expected: Mutex::default(),
            making: Mutex::default(),
        }
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
        let mut expected = lock(&self.expected);
        let Some(index) = expected.iter().position(|at| *at == digest) else { return };
        expected.remove(index);
        drop(expected);
        self.get(digest);
    }

    /// Has weights made once they are there, however soon they are others.
    pub(crate) fn expect(&self, digest: Digest) {
        let mut expected = lock(&self.expected);
        if !expected.contains(&digest) {
            expected.push_back(digest);
        }
        while expected.len() > self.weights.most {
            expected.pop_front();
        }
    }

    /// Puts a commit's payload where it will be asked for soon.
    pub(crate) fn offer(&self, digest: Digest, bytes: Bytes) {
        self.payloads.put(digest, bytes);
    }

    /// The bytes of that address if they need no reading from disk and no copying.
    pub(crate) fn at_hand(&self, digest: Digest) -> Option<Bytes> {
        if digest == self.tokenizer.0 {
            return Some(self.tokenizer.1.clone());
        }
        self.payloads.again(digest).or_else(|| self.weights.again(digest))
    }

    /// The bytes of that address, or nothing if they are not here (any more). May read the disk, and wait for another
    /// that does.
    pub(crate) fn get(&self, digest: Digest) -> Option<Bytes> {
        let _making = lock(&self.making);
        if let Some(bytes) = self.at_hand(digest) {
            return Some(bytes);
        }
        let (shelf, bytes) = match self.weights(digest) {
            Some(bytes) => (&self.weights, bytes),
            None => (&self.payloads, self.store.get(digest)?),
        };
        let bytes = Arc::new(bytes);
        shelf.put(digest, bytes.clone());
        Some(bytes)
    }

    /// The bytes of a fragment, if it is at that digest now.
    fn weights(&self, digest: Digest) -> Option<Vec<u8>> {
        let index = lock(&self.current).iter().position(|current| *current == digest)?;
        let bytes = little_endian(&lock(&self.global).theta[index]).into_owned();
        // A step that is computed but not yet committed may have moved the weights on.
        (Digest::of(&bytes) == digest).then_some(bytes)
    }
}

impl Recent {
    fn put(&self, digest: Digest, bytes: Bytes) {
        let mut recent = lock(&self.bytes);
        if recent.iter().all(|(at, _)| *at != digest) {
            recent.push_back((digest, bytes));
        }
        while recent.len() > self.most {
            recent.pop_front();
        }
    }

    /// Bytes that are here; asking keeps them.
    fn again(&self, digest: Digest) -> Option<Bytes> {
        let mut recent = lock(&self.bytes);
        let index = recent.iter().position(|(at, _)| *at == digest)?;
        let entry = recent.remove(index)?;
        let bytes = entry.1.clone();
        recent.push_back(entry);
        Some(bytes)
    }
}

/// Locks; a thread that panicked while holding the lock has left plain data behind.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
