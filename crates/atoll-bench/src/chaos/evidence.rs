//! All that is known of a storm afterwards: what the benchmark noted, the journal in the object store, what sites were
//! told, what their engines did.

use std::fs;
use std::path::Path;
use std::time::UNIX_EPOCH;

use anyhow::{Context, Result, bail};
use atoll_core::journal::{Chain, Entry};
use atoll_node::site::told::Told;

use super::COORDINATORS;
use super::weather::Notes;
use crate::emulated::{Diary, Moment};
use crate::scenario::{diary, run_dir, store};

/// All of it.
pub(super) struct Evidence {
    pub(super) notes: Notes,
    /// The journal in the object store, each entry with the moment at which it was put there.
    pub(super) entries: Vec<(f64, Entry)>,
    pub(super) sites: Vec<SiteEvidence>,
    /// Control connections that ended: when, which coordinator's, which site's.
    pub(super) gone: Vec<(f64, String, String)>,
}

/// What is known of a site.
pub(super) struct SiteEvidence {
    pub(super) name: String,
    /// What its engines did, in the order of time.
    pub(super) moments: Vec<Moment>,
    /// What it was told.
    pub(super) told: Vec<Told>,
}

/// What the benchmark noted.
const NOTES: &str = "storm.json";

impl Notes {
    /// Keeps them, with the times of the journal's segments.
    pub(super) fn save(&mut self, folder: &Path) -> Result<()> {
        self.segments = segments(folder)?;
        Ok(fs::write(folder.join(NOTES), serde_json::to_vec(self)?)?)
    }
}

impl Evidence {
    pub(super) fn read(folder: &Path, sites: &[String]) -> Result<Self> {
        let path = folder.join(NOTES);
        let text = fs::read(&path).with_context(|| format!("{} cannot be read: no storm was there", path.display()))?;
        let notes: Notes = serde_json::from_slice(&text)?;
        let entries = entries(folder, &notes)?;
        let site = |name: &String| SiteEvidence {
            name: name.clone(),
            moments: Diary::read(&diary(folder, name)),
            told: told(folder, name),
        };
        Ok(Self {
            notes,
            entries,
            sites: sites.iter().map(site).collect(),
            gone: COORDINATORS.iter().flat_map(|place| gone(folder, place)).collect(),
        })
    }
}

fn segments(folder: &Path) -> Result<Vec<(u64, f64)>> {
    let mut segments = Vec::new();
    for file in fs::read_dir(store(folder).join("journal"))? {
        let file = file?;
        let Ok(first) = file.file_name().to_string_lossy().parse() else { continue };
        segments.push((first, file.metadata()?.modified()?.duration_since(UNIX_EPOCH)?.as_secs_f64()));
    }
    segments.sort_by_key(|(first, _)| *first);
    Ok(segments)
}

fn entries(folder: &Path, notes: &Notes) -> Result<Vec<(f64, Entry)>> {
    let (mut chain, mut entries) = (Chain::default(), Vec::new());
    for (first, at) in &notes.segments {
        if *first != entries.len() as u64 + 1 {
            bail!("the journal in the object store has a gap before entry {first}");
        }
        for line in fs::read_to_string(store(folder).join(format!("journal/{first:012}")))?.lines() {
            entries.push((*at, chain.read(line).with_context(|| format!("the segment {first} is damaged"))?));
        }
    }
    Ok(entries)
}

fn told(folder: &Path, site: &str) -> Vec<Told> {
    let log = fs::read_to_string(folder.join("lab").join(format!("{site}.log"))).unwrap_or_default();
    log.lines().filter_map(Told::read).collect()
}

fn gone(folder: &Path, place: &str) -> Vec<(f64, String, String)> {
    let text = fs::read_to_string(run_dir(folder, place).events()).unwrap_or_default();
    let events = text.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let gone = events.filter(|event| event["event"] == "gone");
    gone.filter_map(|event| Some((event["at"].as_f64()?, place.to_string(), event["site"].as_str()?.to_string())))
        .collect()
}
