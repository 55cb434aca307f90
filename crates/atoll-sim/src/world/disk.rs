//! Disks, and how they fail: full for a while, a write cut short by the death of its process, bits that flip in what is
//! stored. What a shell makes of it is what `atoll-node` does: it reads nothing unverified and tells of nothing that is
//! not written.

use std::collections::BTreeSet;
use std::rc::Rc;

use atoll_core::hash::Digest;
use atoll_core::journal::{Accepted, Chain, Entry, LineError};
use atoll_core::rng::Rng;
use atoll_core::site::Time;

use super::happening::Happening;
use super::{DiskFailures, Store, World};

/// Longest time for which a disk is full, in seconds.
const FULL_MAX: f64 = 4.0;

/// What outlives a coordinator's process; two that stand by one another have it in common.
pub(super) struct Disk {
    /// Lines as [`Chain`] writes them. The last may be cut short.
    journal: Vec<u8>,
    /// Whole lines.
    pub(super) entries: usize,
    chain: Chain,
    payloads: Store,
    /// Contributions in the model: all of these are needed to compute it again.
    needed: BTreeSet<Digest>,
    /// Contributions that were merged, whether that has become a commit or not. What rots between the two is two
    /// failures in one: no disk can give it back.
    merged: BTreeSet<Digest>,
    /// Signs of life that whoever leads has given.
    pub(super) beats: u64,
    /// Nothing can be written until then.
    full_until: Time,
    /// Whether the process that appends next dies of it.
    tears: bool,
    pub(super) failures: DiskFailures,
    /// Appended to by two, and then whole or not at all.
    is_shared: bool,
    /// Chance of its own, so that the worlds of old seeds stay what they were.
    chance: Rng,
}

/// What became of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Append {
    /// It is in the journal.
    Done,
    /// Whoever wanted to write it must not act on it, and ends.
    Failed,
}

impl Disk {
    pub(super) fn new(is_shared: bool, chance: Rng) -> Self {
        Self {
            journal: Vec::new(),
            entries: 0,
            chain: Chain::default(),
            payloads: Store::new(),
            needed: BTreeSet::new(),
            merged: BTreeSet::new(),
            beats: 0,
            full_until: Time::default(),
            tears: false,
            failures: DiskFailures::default(),
            is_shared,
            chance,
        }
    }

    pub(super) fn append(&mut self, now: Time, entry: &Entry) -> Append {
        if self.is_full(now) {
            self.failures.full += 1;
            return Append::Failed;
        }
        let mut chain = self.chain;
        let line = chain.write(entry) + "\n";
        let tears = std::mem::take(&mut self.tears);
        self.failures.torn += u64::from(tears);
        if tears && !self.is_shared {
            let cut = self.chance.below(line.len() as u64) as usize;
            self.journal.extend(&line.as_bytes()[..cut]);
            return Append::Failed;
        }
        self.journal.extend(line.as_bytes());
        (self.chain, self.entries) = (chain, self.entries + 1);
        if let Entry::Committed(commit) = entry {
            self.needed.extend(addresses(&commit.contributions));
        }
        // A store may have taken what it never said it had.
        if tears { Append::Failed } else { Append::Done }
    }

    /// Drops what a crash has left of a line.
    pub(super) fn mend(&mut self) {
        let torn = self.journal.iter().rev().take_while(|&&byte| byte != b'\n').count();
        self.journal.truncate(self.journal.len() - torn);
    }

    pub(super) fn read(&self) -> Result<Vec<Entry>, LineError> {
        let mut chain = Chain::default();
        self.journal
            .split_inclusive(|&byte| byte == b'\n')
            .filter_map(|line| chain.read_whole(line).transpose())
            .collect()
    }

    /// Keeps a payload; false if there is no room.
    pub(super) fn put(&mut self, now: Time, digest: Digest, bytes: Rc<Vec<u8>>) -> bool {
        let has_room = !self.is_full(now);
        if has_room {
            self.payloads.insert(digest, bytes);
        }
        self.failures.full += u64::from(!has_room);
        has_room
    }

    /// A payload, if it is here and undamaged.
    pub(super) fn payload(&self, digest: Digest) -> Option<Vec<u8>> {
        self.payloads.get(&digest).filter(|bytes| Digest::of(bytes) == digest).map(|bytes| bytes.to_vec())
    }

    /// These are being merged.
    pub(super) fn merge(&mut self, contributions: &[Accepted]) {
        self.merged.extend(addresses(contributions));
    }

    pub(super) fn forget(&mut self, digest: Digest) {
        self.payloads.remove(&digest);
    }

    pub(super) fn is_full(&self, now: Time) -> bool {
        self.full_until > now
    }

    /// Something goes wrong; the address of a payload that is damaged by it.
    fn fail(&mut self, now: Time) -> Option<Digest> {
        match self.chance.below(3) {
            0 => self.full_until = now.after(self.chance.unit() * FULL_MAX),
            1 => self.tears = true,
            _ => return self.damage(|disk, payload| !disk.merged.contains(payload)),
        }
        None
    }

    /// Flips a bit in one of these payloads.
    fn damage(&mut self, may_be: impl Fn(&Self, &Digest) -> bool) -> Option<Digest> {
        let choice: Vec<Digest> = self.payloads.keys().filter(|payload| may_be(self, payload)).copied().collect();
        let digest = *choice.get(self.chance.below(choice.len().max(1) as u64) as usize)?;
        let bytes = Rc::make_mut(self.payloads.get_mut(&digest)?);
        flip(bytes, &mut self.chance);
        self.failures.flipped += 1;
        Some(digest)
    }

    /// Flips a bit of what a run is recomputed from, and says what it was.
    pub(super) fn rot(&mut self) -> String {
        let last_line =
            self.journal.len() - self.journal.iter().rev().skip(1).take_while(|&&byte| byte != b'\n').count() - 1;
        if self.chance.chance(0.5)
            && let Some(digest) = self.damage(|disk, payload| disk.needed.contains(payload))
        {
            return format!("the payload {digest}");
        }
        // Without its end the last line is one that was cut short.
        flip(&mut self.journal[..last_line], &mut self.chance);
        "the journal".to_string()
    }
}

fn addresses(contributions: &[Accepted]) -> impl Iterator<Item = Digest> {
    contributions.iter().map(|accepted| accepted.payload)
}

/// Flips a bit.
fn flip(bytes: &mut [u8], chance: &mut Rng) {
    let at = chance.below(bytes.len().max(1) as u64) as usize;
    if let Some(byte) = bytes.get_mut(at) {
        *byte ^= 1 << chance.below(8);
    }
}

/// A file of a site, which nobody syncs: whether it may be used, it says itself.
struct File {
    bytes: Vec<u8>,
    /// When it was written.
    written: Time,
    /// Whether all that belongs into it since has found room.
    is_open: bool,
}

/// The disk of a site.
#[derive(Default)]
pub(super) struct SiteDisk {
    files: Vec<File>,
    full_until: Time,
}

impl SiteDisk {
    /// Makes room for so many files.
    pub(super) fn open(&mut self, files: usize, now: Time) {
        self.files.resize_with(files, || File { bytes: Vec::new(), written: now, is_open: false });
    }

    pub(super) fn file(&self, index: usize) -> &[u8] {
        &self.files[index].bytes
    }

    pub(super) fn written(&self, index: usize) -> Time {
        self.files[index].written
    }

    /// Puts a file in the place of an older one, which stays if there is no room; false then.
    pub(super) fn write(&mut self, index: usize, now: Time, bytes: Vec<u8>) -> bool {
        let file = &mut self.files[index];
        (file.is_open, file.written) = (self.full_until <= now, now);
        if file.is_open {
            file.bytes = bytes;
        }
        file.is_open
    }

    /// Adds to a file. What has found no room leaves one to which nothing may be added any more.
    pub(super) fn append(&mut self, index: usize, now: Time, bytes: &[u8]) {
        let file = &mut self.files[index];
        if file.is_open {
            file.is_open = self.full_until <= now;
            // What fits is written.
            let fits = if file.is_open { bytes.len() } else { bytes.len() / 2 };
            file.bytes.extend(&bytes[..fits]);
        }
    }

    /// Something goes wrong.
    fn fail(&mut self, now: Time, chance: &mut Rng) {
        let index = chance.below(self.files.len().max(1) as u64) as usize;
        match (chance.below(3), self.files.get_mut(index)) {
            (0, _) => self.full_until = now.after(chance.unit() * FULL_MAX),
            (1, Some(file)) => file.bytes.truncate(chance.below(file.bytes.len() as u64 + 1) as usize),
            (_, Some(file)) => flip(&mut file.bytes, chance),
            _ => {}
        }
    }
}

impl World<'_> {
    /// The disk of a coordinator or of a site fails.
    pub(super) fn fail_a_disk(&mut self) {
        if self.disk_faults_left == 0 || self.seconds() > self.description.hardships.seconds {
            return;
        }
        self.disk_faults_left -= 1;
        let victim = self.disk.chance.below(self.sites.len() as u64 + 1) as usize;
        match victim.checked_sub(1) {
            None => {
                let damaged = self.disk.fail(self.now);
                damaged.into_iter().for_each(|payload| self.witness.see_damage(payload));
            }
            Some(index) => {
                let site = &mut self.sites[index];
                site.disk.fail(self.now, &mut self.disk.chance);
                self.witness.see_loss(&site.residence.name);
                self.disk.failures.sites += 1;
            }
        }
        let delay = self.disk.chance.unit() * 4.0;
        self.after(delay, Happening::DiskFault);
    }
}
