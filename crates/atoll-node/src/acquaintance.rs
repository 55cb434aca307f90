//! By which keys a site knows the coordinators of its run: the one that its ticket names, until a coordinator with that key says
//! that there will be another. What it said outlives the process, in the site's folder.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::{fs, io};

use anyhow::{Context, Result};
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
    /// The keys that count: the one that was proven last, and the next one if there is to be another.
    keys: Vec<Digest>,
}

impl Acquaintance {
    /// What `folder` remembers for a ticket that names this key.
    ///
    /// # Errors
    /// If it cannot be read: an earlier key must not be trusted because a later one was forgotten.
    pub(crate) fn open(folder: &Path, ticket: Digest) -> Result<Self> {
        let path = folder.join("coordinator.keys");
        let remembered = match fs::read(&path) {
            Ok(text) => Some(serde_json::from_slice::<Known>(&text).map_err(io::Error::from)),
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            Err(error) => Some(Err(error)),
        };
        let remembered = remembered.transpose().with_context(|| {
            let path = path.display();
            format!("{path} does not say by which keys the coordinators are known\nhint: if it is damaged, remove it and ask the operator for a new ticket")
        })?;
        let known = remembered.filter(|known| known.ticket == ticket && !known.keys.is_empty());
        let known = known.unwrap_or_else(|| Known { ticket, keys: vec![ticket] });
        Ok(Self { path, known: Arc::new(Mutex::new(known)) })
    }

    /// The keys that count.
    pub(crate) fn keys(&self) -> Vec<Digest> {
        lock(&self.known).keys.clone()
    }

    /// Takes over what a coordinator said that has proven one of them; whether that is news. If it cannot be written down it
    /// holds for as long as this process lives.
    pub(crate) fn learn(&self, keys: Vec<Digest>) -> bool {
        let mut known = lock(&self.known);
        if keys.is_empty() || known.keys == keys {
            return false;
        }
        known.keys = keys;
        let written = serde_json::to_vec(&*known).map_err(anyhow::Error::from);
        if let Err(error) = written.and_then(|text| write_atomically(&self.path, &text)) {
            tracing::warn!("the next process of this site will not know the coordinators' keys: {error:#}");
        }
        true
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
        assert!(first.learn(vec![a, b]) && !first.learn(vec![a, b]) && !first.learn(vec![]));
        assert!(first.learn(vec![b]));
        assert_eq!(Acquaintance::open(folder.path(), a).unwrap().keys(), [b]);
        assert_eq!(Acquaintance::open(folder.path(), c).unwrap().keys(), [c], "a newer ticket");
        fs::write(folder.path().join("coordinator.keys"), "nonsense").unwrap();
        let error = format!("{:#}", Acquaintance::open(folder.path(), a).err().unwrap());
        assert!(error.contains("hint:"), "{error}");
    }

    #[test]
    fn what_cannot_be_written_down_holds_all_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let [a, b] = ["a", "b"].map(|name| Digest::of(name.as_bytes()));
        let known = Acquaintance::open(&folder.path().join("gone"), a).unwrap();
        assert!(known.learn(vec![a, b]));
        assert_eq!(known.keys(), [a, b]);
    }
}
