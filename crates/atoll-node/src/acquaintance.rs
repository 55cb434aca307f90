//! By which keys a site knows the coordinators of its run: the one that its ticket names, until a coordinator with that key says
//! that there will be another. What it said outlives the process, in the site's folder.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use anyhow::Result;
use atoll_core::hash::Digest;
use serde::{Deserialize, Serialize};

use crate::coordinator::lock;
use crate::run::write_atomically;

/// What is remembered.
#[derive(Clone)]
pub(crate) struct Acquaintance {
    path: PathBuf,
    known: Arc<Mutex<Known>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Known {
    /// The key that the ticket names: another ticket is another beginning.
    ticket: Digest,
    /// The keys that count.
    keys: Vec<Digest>,
}

impl Acquaintance {
    /// What `folder` remembers for a ticket that names this key.
    ///
    /// # Errors
    /// If it cannot be read.
    pub(crate) fn open(folder: &Path, ticket: Digest) -> Result<Self> {
        let path = folder.join("coordinator.keys");
        let remembered = fs::read(&path).ok().and_then(|text| serde_json::from_slice::<Known>(&text).ok());
        let known = remembered.filter(|known| known.ticket == ticket && !known.keys.is_empty());
        let known = known.unwrap_or_else(|| Known { ticket, keys: vec![ticket] });
        Ok(Self { path, known: Arc::new(Mutex::new(known)) })
    }

    /// The keys that count.
    pub(crate) fn keys(&self) -> Vec<Digest> {
        lock(&self.known).keys.clone()
    }

    /// Takes over what a coordinator said who has proven one of them; whether that is news.
    ///
    /// # Errors
    /// If it cannot be written down; then it is not taken over.
    pub(crate) fn learn(&self, keys: &[Digest]) -> Result<bool> {
        let mut known = lock(&self.known);
        if keys.is_empty() || known.keys == keys {
            return Ok(false);
        }
        let next = Known { ticket: known.ticket, keys: keys.to_vec() };
        write_atomically(&self.path, &serde_json::to_vec(&next)?)?;
        *known = next;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_learnt_holds_for_the_ticket_that_it_was_learnt_by() {
        let folder = tempfile::tempdir().unwrap();
        let [a, b, c] = ["a", "b", "c"].map(|name| Digest::of(name.as_bytes()));
        let first = Acquaintance::open(folder.path(), a).unwrap();
        assert_eq!(first.keys(), [a]);
        assert!(first.learn(&[a, b]).unwrap() && !first.learn(&[a, b]).unwrap() && !first.learn(&[]).unwrap());
        assert!(first.learn(&[b]).unwrap());
        assert_eq!(Acquaintance::open(folder.path(), a).unwrap().keys(), [b]);
        assert_eq!(Acquaintance::open(folder.path(), c).unwrap().keys(), [c], "a newer ticket");
        fs::write(folder.path().join("coordinator.keys"), "nonsense").unwrap();
        assert_eq!(Acquaintance::open(folder.path(), a).unwrap().keys(), [a]);
    }
}
