//! The journal as the heart sees it: what is appended is durable in the run folder and, if the run has an object store,
//! was put there first.

use std::sync::Arc;

use anyhow::{Result, bail};
use atoll_core::journal::{Chain, Entry};

use crate::journal::JournalFile;
use crate::shared::{Published, Shared};

/// The journal of a coordinator that leads.
pub(super) struct Log {
    journal: JournalFile,
    shared: Option<Arc<Shared>>,
    /// Number of the entry that comes next.
    next: u64,
}

impl Log {
    /// The journal of `entries` entries goes on.
    pub(super) fn new(journal: JournalFile, shared: Option<Arc<Shared>>, entries: u64) -> Self {
        Self { journal, shared, next: entries + 1 }
    }

    /// The number of the entry that comes next.
    pub(super) fn next(&self) -> u64 {
        self.next
    }

    /// Hash over all lines, and their bytes.
    pub(super) fn end(&self) -> (Chain, u64) {
        (self.journal.chain, self.journal.offset)
    }

    /// Appends entries. When this returns they outlast this machine, if there is an object store, and else its process.
    ///
    /// # Errors
    /// If another coordinator leads now, or store or disk do not take them; then none of them may be acted upon.
    pub(super) fn append(&mut self, entries: &[Entry]) -> Result<()> {
        let lines = self.journal.lines(entries);
        if let Some(shared) = &self.shared {
            // A slow store must not hold up connections.
            let published = tokio::task::block_in_place(|| shared.publish(self.next, &lines.text))?;
            if published == Published::Taken {
                bail!(deposed());
            }
        }
        self.journal.write(&lines)?;
        self.next += entries.len() as u64;
        Ok(())
    }
}

/// What a coordinator says that is not the leader any more.
pub(super) fn deposed() -> String {
    "another coordinator leads this run now, so this one stops; nothing that it did since is in the run\nhint: start it again with --standby, and it follows"
        .to_string()
}
