//! Another key for the coordinators of a run. Sites know coordinators by their key, so they are told of the next one by the present
//! one, and the journal with them, before it is used.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use atoll_core::hash::Digest;
use atoll_core::journal::{Act, Chain, Entry};

use crate::acts;
use crate::data::file;
use crate::identity::Identity;
use crate::journal::read_entries;
use crate::run::RunDir;

/// Makes the next key, unless there is one, and asks for it to be told. Returns its fingerprint and the file that is there until
/// the journal has it.
///
/// # Errors
/// If the run folder cannot be written.
pub fn announce(dir: &RunDir) -> Result<(Digest, PathBuf)> {
    let next = Identity::load_or_create(&dir.next_key())?;
    Ok((next.fingerprint, acts::ask(dir, &Act::Succeed(next.fingerprint))?))
}

/// Puts the next key in place of the present one, which is gone then. Returns its fingerprint.
///
/// # Errors
/// If the folder is in use, or there is no next key that the journal speaks of.
pub fn finish(dir: &RunDir) -> Result<Digest> {
    let _hold = dir.hold()?;
    let (path, folder) = (dir.next_key(), dir.0.display());
    if !path.exists() {
        bail!("{folder} has no next key\nhint: `atoll rekey {folder}` makes one, and has the run's sites told");
    }
    let next = Identity::load(&path)?.fingerprint;
    if told(dir)? != Some(next) {
        bail!(
            "the journal in {folder} does not speak of the key in {}, so no site knows it\nhint: say `atoll rekey {folder}` where the coordinator is that leads, and give the sites time to connect",
            path.display()
        );
    }
    file::rename(&path, &dir.key()).with_context(|| format!("{} cannot be replaced", dir.key().display()))?;
    Ok(next)
}

/// The key that the journal has told of last.
fn told(dir: &RunDir) -> Result<Option<Digest>> {
    let entries = if dir.journal().exists() { read_entries(&dir.journal(), 0, Chain::default())? } else { Vec::new() };
    let key = |entry| if let Entry::Succession { key } = entry { Some(key) } else { None };
    Ok(entries.into_iter().rev().find_map(key))
}
