//! How an operator revokes a site's key: a file in the run folder, named after the site, that holds the key's fingerprint.
//! A coordinator takes it up within a second, before it lets anybody in, and when it starts; once the journal has
//! the revocation the file goes. So it is never lost, whoever dies, and asking twice does no harm.

use std::fs;

use anyhow::{Context, Result, bail};
use atoll_core::hash::Digest;
use atoll_core::journal::{Chain, Entry};
use atoll_core::site::SiteId;

use crate::data::file;
use crate::journal::read_entries;
use crate::run::{RunDir, write_atomically};

/// Asks for the key of a site to be taken off the list.
///
/// # Errors
/// If the run folder cannot be written.
pub fn ask(dir: &RunDir, site: &SiteId, key: Digest) -> Result<()> {
    let folder = dir.revocations();
    file::make_folder(&folder).with_context(|| format!("{} cannot be made", folder.display()))?;
    write_atomically(&folder.join(site.to_string()), key.to_string().as_bytes())
}

/// Whether a revocation of that site waits for a coordinator.
pub fn is_pending(dir: &RunDir, site: &SiteId) -> bool {
    dir.revocations().join(site.to_string()).exists()
}

/// All that was asked for and is not in the journal yet.
///
/// # Errors
/// If one cannot be understood: nobody may be let in whom the operator wants out.
pub(crate) fn pending(dir: &RunDir) -> Result<Vec<(SiteId, Digest)>> {
    let files = fs::read_dir(dir.revocations()).into_iter().flatten().flatten();
    let names = files.filter_map(|file| Some((file.file_name().to_str()?.parse().ok()?, file.path())));
    let read = |(site, path): (SiteId, std::path::PathBuf)| {
        let text = fs::read_to_string(&path).with_context(|| format!("{} cannot be read", path.display()))?;
        match text.trim().parse() {
            Ok(key) => Ok((site, key)),
            Err(_) => bail!("{} holds no fingerprint\nhint: remove it and `atoll revoke` again", path.display()),
        }
    };
    names.map(read).collect()
}

/// The journal has it.
///
/// # Errors
/// If the file cannot be removed.
pub(crate) fn done(dir: &RunDir, site: &SiteId) -> Result<()> {
    let path = dir.revocations().join(site.to_string());
    fs::remove_file(&path).with_context(|| format!("{} cannot be removed", path.display()))
}

/// The key that a site has by the journal, and whether it was revoked; none if no key was ever let in as that site.
///
/// # Errors
/// If the journal cannot be read.
pub fn key_of(dir: &RunDir, site: &SiteId) -> Result<Option<(Digest, bool)>> {
    if !dir.journal().exists() {
        return Ok(None);
    }
    let mut found = None;
    for entry in read_entries(&dir.journal(), 0, Chain::default())? {
        match entry {
            Entry::Admitted { site: other, key, .. } if other == *site => found = Some((key, false)),
            Entry::Revoked { site: other, key } if other == *site => found = Some((key, true)),
            _ => {}
        }
    }
    Ok(found)
}
