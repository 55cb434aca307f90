//! What an operator wants done about members of a run: files in the run folder, in the order of their names. A coordinator
//! takes them up within a second, before it lets anybody in, and when it begins to lead; once the journal has an act its file
//! goes. So none is lost, whoever dies, and asking twice does no harm.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};
use std::{fs, io};

use anyhow::{Context, Result};
use atoll_core::hash::Digest;
use atoll_core::journal::{Act, Chain, Entry};
use atoll_core::site::SiteId;

use crate::data::file;
use crate::journal::read_entries;
use crate::run::{RunDir, write_atomically};

/// Asks for something to be done; returns the file that is there until it is.
///
/// # Errors
/// If the run folder cannot be written.
pub fn ask(dir: &RunDir, act: &Act) -> Result<PathBuf> {
    let folder = dir.acts();
    file::make_folder(&folder).with_context(|| format!("{} cannot be made", folder.display()))?;
    let text = serde_json::to_vec(act)?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
    let path = folder.join(format!("{now:024}-{}.json", Digest::of(&text).short()));
    write_atomically(&path, &text)?;
    Ok(path)
}

/// All that was asked for and is not in the journal yet, oldest first.
///
/// # Errors
/// If one cannot be understood: nobody may be let in whom the operator wants out.
pub(crate) fn pending(dir: &RunDir) -> Result<Vec<(PathBuf, Act)>> {
    let folder = dir.acts();
    let files = match fs::read_dir(&folder) {
        Ok(files) => files.collect::<io::Result<Vec<_>>>(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => Err(error),
    };
    let files = files.with_context(|| {
        format!("{} cannot be read\nhint: it must be readable for whoever runs the coordinator", folder.display())
    })?;
    let paths = files.into_iter().map(|file| file.path());
    let mut paths: Vec<PathBuf> =
        paths.filter(|path| path.extension().is_some_and(|extension| extension == "json")).collect();
    paths.sort();
    let read = |path: PathBuf| {
        let text = fs::read(&path).with_context(|| format!("{} cannot be read", path.display()))?;
        let act = serde_json::from_slice(&text);
        let act = act.with_context(|| {
            format!("{} says nothing that can be done\nhint: remove it, and ask again", path.display())
        })?;
        Ok((path, act))
    };
    paths.into_iter().map(read).collect()
}

/// The journal has it.
///
/// # Errors
/// If the file cannot be removed.
pub(crate) fn done(path: &Path) -> Result<()> {
    fs::remove_file(path).with_context(|| format!("{} cannot be removed", path.display()))
}

/// What is known of a site.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Known {
    /// Its key, and whether that was revoked; none if no key was ever let in as that site.
    pub key: Option<(Digest, bool)>,
    /// Whether it has unused tickets.
    pub is_invited: bool,
}

/// What journal and folder say of a site.
///
/// # Errors
/// If one of them cannot be read.
pub fn known(dir: &RunDir, site: &SiteId) -> Result<Known> {
    let (mut known, mut tickets) = (Known::default(), BTreeSet::new());
    let entries = if dir.journal().exists() { read_entries(&dir.journal(), 0, Chain::default())? } else { Vec::new() };
    for entry in entries {
        match entry {
            Entry::Invited { ticket, invitation, .. } if invitation.site == *site => _ = tickets.insert(ticket),
            Entry::Withdrawn { site: other, .. } if other == *site => tickets.clear(),
            Entry::Admitted { site: other, key, ticket, .. } if other == *site => {
                tickets.remove(&ticket);
                known.key = Some((key, false));
            }
            Entry::Rekeyed { site: other, to: key, .. } if other == *site => known.key = Some((key, false)),
            Entry::Revoked { site: other, key, .. } if other == *site => known.key = Some((key, true)),
            _ => {}
        }
    }
    known.is_invited = !tickets.is_empty();
    for (_, act) in pending(dir)? {
        known.is_invited |= matches!(act, Act::Invite(_, invitation) if invitation.site == *site);
    }
    Ok(known)
}
