//! The coordinator's shell: a disk that outlives it, and what it serves.

use std::collections::BTreeMap;
use std::rc::Rc;

use atoll_core::codec::Payload;
use atoll_core::hash::{Digest, little_endian};
use atoll_core::journal::{Book, Chain, Entry, Role};
use atoll_core::outer::{Global, Reason};
use atoll_core::round::{Coordinator, Event, Merge, Merged, Order, Seen};
use atoll_core::site::SiteId;
use atoll_core::team::Alone;

use super::happening::{Bytes, Happening};
use super::witness::{SPOILT, check};
use super::{COORDINATOR_TICK_SECONDS, Store, World};

/// What outlives the coordinator's process.
#[derive(Default)]
pub(super) struct Disk {
    journal: Vec<String>,
    chain: Chain,
    payloads: Store,
}

/// A living coordinator.
pub(super) struct Head {
    pub(super) machine: Coordinator,
    pub(super) global: Global,
    deltas: Store,
}

impl World<'_> {
    /// Writes the journal of a run that was just created, with all sites admitted.
    pub(super) fn begin(&mut self) {
        let mut entries = vec![Entry::Began {
            run: "simulated".into(),
            seed: 1,
            context: self.description.context,
            layout: self.manifest.fingerprint(),
            theta: self.first_weights().digests(),
        }];
        entries.extend(self.description.sites.iter().map(|site| Entry::Admitted {
            site: site.name.clone(),
            key: Digest::of(site.name.to_string().as_bytes()),
            ticket: Digest::of(site.name.to_string().as_bytes()),
            role: Role::Train,
        }));
        entries.iter().for_each(|entry| self.disk.append(entry));
    }

    /// Rebuilds everything from the disk, recomputing every outer step.
    pub(super) fn start_coordinator(&mut self) -> Result<(), String> {
        let (book, global, deltas) = self.replay()?;
        self.witness.see_start(&book.fragments.iter().map(|fragment| fragment.version).collect::<Vec<_>>())?;
        self.life += 1;
        let machine = Coordinator::new(self.description.sync.clone(), self.description.goal, book, self.lens());
        self.coordinator = Some(Head { machine, global, deltas });
        self.after(0.0, Happening::CoordinatorTick(self.life));
        for index in 0..self.sites.len() {
            let delay = 0.1 + self.chance.unit();
            self.after(delay, Happening::Reconnect(index, self.sites[index].life));
        }
        Ok(())
    }

    pub(super) fn replay(&self) -> Result<(Book, Global, Store), String> {
        let (mut book, mut global, mut chain) = (Book::default(), self.first_weights(), Chain::default());
        let mut deltas = BTreeMap::new();
        let payload = |digest| self.disk.payload(digest);
        for line in &self.disk.journal {
            let entry = chain.read(line).map_err(|error| error.to_string())?;
            book.apply(&entry).map_err(|error| error.to_string())?;
            if let Entry::Committed(commit) = &entry {
                let step = global.replay(commit, &payload, &Alone).map_err(|error| error.to_string())?;
                deltas.insert(step.delta, Rc::new(step.payload));
            }
        }
        check(book.digest() == Digest::of_all(&global.digests()), || "the book's digest is not the model's".into())?;
        Ok((book, global, deltas))
    }

    pub(super) fn tell_coordinator(&mut self, event: Event) -> Result<(), String> {
        let Some(head) = self.coordinator.as_mut() else { return Ok(()) };
        let orders = head.machine.handle(self.now, event);
        head.machine.book().ledger.verify()?;
        // A crash may come between any two orders.
        let crash = self.faults_left > 0 && self.chance.chance(0.0005);
        let until = if crash { self.chance.below(orders.len() as u64 + 1) as usize } else { orders.len() };
        for order in orders.into_iter().take(until) {
            self.carry_out(order)?;
        }
        if crash {
            self.faults_left -= 1;
            self.crash_coordinator()?;
        }
        self.wake_coordinator();
        Ok(())
    }

    /// Schedules what the coordinator would not see in time with its ticks, such as a window's end.
    fn wake_coordinator(&mut self) {
        let Some(head) = self.coordinator.as_ref() else { return };
        let (at, _) = head.machine.wake_at(self.now);
        let is_planned = self.wakes > self.now && self.wakes <= at;
        if !is_planned && at > self.now && at < self.now.after(COORDINATOR_TICK_SECONDS) {
            self.wakes = at;
            self.after(at.seconds_since(self.now), Happening::CoordinatorWakes(self.life));
        }
    }

    fn carry_out(&mut self, order: Order) -> Result<(), String> {
        match order {
            Order::Record(entry) => {
                self.witness.see_entry(&entry, &self.sites)?;
                self.disk.append(&entry);
            }
            Order::Tell(site, standing) => {
                self.witness.see_standing(&standing);
                let index = self.index_of(&site)?;
                let connection = self.sites[index].connection;
                self.send(index, 0.0, &Happening::Standing(index, connection, standing));
            }
            Order::Merge(merge) => self.merge(&merge)?,
            Order::Push(site, digest) => self.push(&site, digest)?,
            Order::Halt(why) => return Err(why),
            Order::Forget(digest) => self.forget(digest),
        }
        Ok(())
    }

    fn merge(&mut self, merge: &Merge) -> Result<(), String> {
        let Some(head) = self.coordinator.as_mut() else { return Ok(()) };
        let payload = |digest| self.disk.payload(digest);
        let step = head
            .global
            .perform(merge.fragment, merge.version, &merge.contributions, &merge.recipe, &payload, &Alone)
            .map_err(|error| error.to_string())?;
        for (accepted, verdict) in merge.contributions.iter().zip(&step.measures.verdicts) {
            let index = self.index_of(&accepted.site)?;
            self.sites[index].guarded += u64::from(verdict.reason.is_some_and(|reason| reason > Reason::Heavy));
        }
        let bytes = step.payload.len() as u64;
        let merged =
            Merged { fragment: merge.fragment, delta: step.delta, bytes, digest: step.digest, measures: step.measures };
        let seconds = 0.001 + self.chance.unit() * 0.05;
        self.after(seconds, Happening::Merged(self.life, merged, Bytes(Rc::new(step.payload))));
        Ok(())
    }

    pub(super) fn finish_merge(&mut self, merged: Merged, bytes: Bytes) -> Result<(), String> {
        if let Some(head) = self.coordinator.as_mut() {
            head.deltas.insert(merged.delta, bytes.0);
        }
        self.tell_coordinator(Event::Merged(merged))
    }

    /// A world that keeps all payloads ignores this, to replay from them.
    fn forget(&mut self, digest: Digest) {
        if self.description.keeps_payloads {
            return;
        }
        self.disk.payloads.remove(&digest);
        if let Some(head) = self.coordinator.as_mut() {
            head.forget_old_deltas();
        }
    }

    pub(super) fn receive_payload(
        &mut self,
        index: usize,
        connection: u64,
        digest: Digest,
        bytes: &Rc<Vec<u8>>,
    ) -> Result<(), String> {
        check(Digest::of(bytes) == digest, || "a payload arrived under a wrong name".into())?;
        self.disk.payloads.insert(digest, bytes.clone());
        self.send(index, 0.0, &Happening::Acknowledged(index, connection, digest, true));
        let site = self.sites[index].residence.name.clone();
        let seen = Payload::check_any(bytes, &self.lens(), &Alone).map(Seen::from).map_err(|error| error.to_string());
        self.tell_coordinator(Event::Arrived(site.clone(), digest, seen?))?;
        // Now and then a payload turns out to be useless, perhaps when it is being merged already.
        if self.chance.chance(self.description.hardships.loss / 10.0) {
            self.tell_coordinator(Event::Useless(site, digest, SPOILT.into()))?;
        }
        Ok(())
    }

    /// Answers a request of site number `index`.
    pub(super) fn deliver(&mut self, index: usize, connection: u64, digest: Digest) {
        let bytes = self.coordinator.as_ref().and_then(|head| head.bytes(digest));
        if let (Some(head), Some(bytes)) = (self.coordinator.as_mut(), &bytes) {
            // Weights that were asked for are there for a while, though commits move on.
            head.deltas.entry(digest).or_insert_with(|| bytes.clone());
        }
        let count = bytes.as_ref().map_or(0, |bytes| bytes.len());
        let seconds = self.sites[index].occupy_down(self.now, count);
        self.send(index, seconds, &Happening::Delivered(index, connection, digest, bytes.map(Bytes)));
    }

    /// Sends a commit to a site that has not asked for it.
    fn push(&mut self, site: &SiteId, digest: Digest) -> Result<(), String> {
        let index = self.index_of(site)?;
        let Some(bytes) = self.coordinator.as_ref().and_then(|head| head.bytes(digest)) else { return Ok(()) };
        let seconds = self.sites[index].occupy_down(self.now, bytes.len());
        let connection = self.sites[index].connection;
        self.send(index, seconds, &Happening::Pushed(index, connection, digest, Bytes(bytes)));
        Ok(())
    }

    fn index_of(&self, site: &SiteId) -> Result<usize, String> {
        self.sites.iter().position(|island| &island.residence.name == site).ok_or_else(|| format!("who is {site}?"))
    }
}

impl Disk {
    fn append(&mut self, entry: &Entry) {
        let line = self.chain.write(entry);
        self.journal.push(line);
    }

    fn payload(&self, digest: Digest) -> Option<Vec<u8>> {
        self.payloads.get(&digest).map(|bytes| bytes.to_vec())
    }
}

impl Head {
    /// What a coordinator serves: deltas by address, and the weights of each fragment by digest.
    fn bytes(&self, digest: Digest) -> Option<Rc<Vec<u8>>> {
        let weights = || {
            let fragment = self.global.theta.iter().find(|fragment| Digest::of_weights(fragment) == digest)?;
            Some(Rc::new(little_endian(fragment).into_owned()))
        };
        self.deltas.get(&digest).cloned().or_else(weights)
    }

    /// Drops the deltas that no notice names any more.
    fn forget_old_deltas(&mut self) {
        let notices = self.machine.book().fragments.iter().flat_map(|fragment| &fragment.tail);
        let named: Vec<Digest> = notices.map(|notice| notice.delta).collect();
        self.deltas.retain(|delta, _| named.contains(delta));
    }
}
