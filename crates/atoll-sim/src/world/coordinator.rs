//! The coordinator's shell: what it makes durable, and what it serves.

use std::collections::BTreeMap;
use std::rc::Rc;

use atoll_core::codec::Payload;
use atoll_core::hash::{Digest, little_endian};
use atoll_core::journal::{Book, Entry, Role};
use atoll_core::outer::{Found, Global, Reason, StepError, step_alone};
use atoll_core::round::{Coordinator, Event, Merge, Merged, Order, Seen, Tried};
use atoll_core::site::SiteId;
use atoll_core::team::Alone;

use super::disk::Append;
use super::failover::Duty;
use super::happening::{Bytes, Happening};
use super::witness::{SPOILT, check};
use super::{COORDINATOR_TICK_SECONDS, Store, World};

/// What trying a commit's contributions takes.
const TRIAL_SECONDS: f64 = 0.3;

/// A coordinator that leads.
pub(super) struct Head {
    pub(super) machine: Coordinator,
    pub(super) global: Global,
    deltas: Store,
    /// Entries that the journal has, as far as it knows.
    pub(super) entries: usize,
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
        for entry in &entries {
            self.disk.append(self.now, entry);
        }
    }

    /// Rebuilds everything from the disk, recomputing every outer step, and leads from there.
    pub(super) fn lead(&mut self, post: usize) -> Result<(), String> {
        self.disk.mend();
        let (book, global, deltas) = self.replay()?;
        self.witness.see_start(&book.fragments.iter().map(|fragment| fragment.version).collect::<Vec<_>>())?;
        let machine = Coordinator::new(self.description.sync.clone(), self.description.goal, book, self.lens());
        self.posts[post].duty = Duty::Leads(Box::new(Head { machine, global, deltas, entries: self.disk.entries }));
        for index in 0..self.sites.len() {
            let delay = 0.1 + self.chance.unit();
            self.after(delay, Happening::Reconnect(index, self.sites[index].life));
        }
        Ok(())
    }

    pub(super) fn replay(&self) -> Result<(Book, Global, Store), String> {
        let (mut book, mut global, mut deltas) = (Book::default(), self.first_weights(), BTreeMap::new());
        let payload = |digest| self.disk.payload(digest).map(Found::from);
        for entry in &self.disk.read().map_err(|error| error.to_string())? {
            book.apply(entry).map_err(|error| error.to_string())?;
            if let Entry::Committed(commit) = entry {
                let step = global.replay(commit, &payload, &Alone).map_err(|error| error.to_string())?;
                deltas.insert(step.delta, Rc::new(step.payload));
            }
        }
        check(book.digest() == Digest::of_all(&global.digests()), || "the book's digest is not the model's".into())?;
        Ok((book, global, deltas))
    }

    /// Tells the coordinator that a site is connected to.
    pub(super) fn tell_coordinator_of(&mut self, index: usize, event: Event) -> Result<(), String> {
        self.sites[index].post.map_or(Ok(()), |post| self.tell_coordinator(post, event))
    }

    pub(super) fn tell_coordinator(&mut self, post: usize, event: Event) -> Result<(), String> {
        let now = self.posts[post].clock(self.now);
        let Some(head) = self.posts[post].head_mut() else { return Ok(()) };
        let orders = head.machine.handle(now, event);
        head.machine.book().ledger.verify()?;
        // A crash may come between any two orders.
        let crash = self.faults_left > 0 && self.chance.chance(0.0005);
        let until = if crash { self.chance.below(orders.len() as u64 + 1) as usize } else { orders.len() };
        for order in orders.into_iter().take(until) {
            self.carry_out(post, order)?;
        }
        if crash && self.posts[post].head().is_some() {
            self.faults_left -= 1;
            self.crash_coordinator(post)?;
        }
        self.wake_coordinator(post);
        Ok(())
    }

    /// Schedules what the coordinator would not see in time with its ticks, such as a window's end.
    fn wake_coordinator(&mut self, post: usize) {
        let (now, life) = (self.posts[post].clock(self.now), self.posts[post].life);
        let Some(head) = self.posts[post].head() else { return };
        let (at, _) = head.machine.wake_at(now);
        let wakes = self.posts[post].wakes;
        let is_planned = wakes > now && wakes <= at;
        if !is_planned && at > now && at < now.after(COORDINATOR_TICK_SECONDS) {
            self.posts[post].wakes = at;
            self.after(at.seconds_since(now), Happening::CoordinatorWakes(post, life));
        }
    }

    fn carry_out(&mut self, post: usize, order: Order) -> Result<(), String> {
        if self.posts[post].head().is_none() {
            return Ok(()); // It came out that it does not lead any more.
        }
        match order {
            Order::Record(entry) => self.record(post, &entry)?,
            Order::Tell(site, standing) => {
                self.witness.see_standing(&standing);
                let index = self.index_of(&site)?;
                if self.sites[index].post == Some(post) {
                    let connection = self.sites[index].connection;
                    self.send(index, 0.0, &Happening::Standing(index, connection, standing));
                }
            }
            Order::Merge(merge) => self.merge(post, &merge)?,
            Order::Push(site, digest) => self.push(post, &site, digest)?,
            Order::Halt(why) => return Err(why),
            Order::Forget(digest) => self.forget(post, digest),
        }
        Ok(())
    }

    /// Appends to the journal, unless somebody else has since this coordinator looked.
    fn record(&mut self, post: usize, entry: &Entry) -> Result<(), String> {
        let there = self.disk.entries;
        match self.posts[post].head_mut() {
            Some(head) if head.entries == there => head.entries += 1,
            _ => return self.depose(post),
        }
        let epoch = self.posts[post].head().map_or(0, |head| head.machine.book().epoch);
        let appended = self.disk.append(self.now, entry);
        if self.disk.entries > there {
            self.witness.see_author(entry, epoch)?;
            self.witness.see_entry(entry, &self.sites)?;
        }
        if appended == Append::Failed { self.crash_coordinator(post) } else { Ok(()) }
    }

    fn merge(&mut self, post: usize, merge: &Merge) -> Result<(), String> {
        let life = self.posts[post].life;
        let tried = self.attempt(post, merge);
        let Some(head) = self.posts[post].head_mut() else { return Ok(()) };
        let payload = |digest| Some(merge.found(digest, self.disk.payload(digest)?));
        let step =
            head.global.perform(merge.fragment, merge.version, &merge.contributions, &merge.recipe, &payload, &Alone);
        let step = match step {
            // There is no room for what is to be sent.
            Ok(_) if self.disk.is_full(self.now) => return self.crash_coordinator(post),
            Ok(step) => step,
            Err(error @ (StepError::Missing(payload) | StepError::Codec { payload, .. })) => {
                return self.tell_coordinator(post, Event::Unmergeable(merge.fragment, payload, error.to_string()));
            }
            Err(error) => return Err(error.to_string()),
        };
        self.disk.merge(&merge.contributions);
        for (accepted, verdict) in merge.contributions.iter().zip(&step.measures.verdicts) {
            let index = self.index_of(&accepted.site)?;
            self.sites[index].guarded += u64::from(verdict.reason.is_some_and(|reason| reason > Reason::Heavy));
        }
        let bytes = step.payload.len() as u64;
        let merged =
            Merged { fragment: merge.fragment, delta: step.delta, bytes, digest: step.digest, measures: step.measures };
        let seconds = 0.001 + self.chance.unit() * 0.05;
        self.after(seconds, Happening::Merged(post, life, merged, Bytes(Rc::new(step.payload))));
        if let Some(tried) = tried {
            self.after(TRIAL_SECONDS, Happening::Tried(post, life, tried));
        }
        Ok(())
    }

    /// Tries each contribution alone, in every other merge of a habitat that has text for it.
    fn attempt(&mut self, post: usize, merge: &Merge) -> Option<Tried> {
        let mut theta = self.posts[post].head()?.global.theta.clone();
        let before = self.habitat.trial(&theta).filter(|_| merge.version % 2 == 1)?;
        let index = merge.fragment.index();
        let own = theta[index].clone();
        let mut after = Vec::new();
        for accepted in &merge.contributions {
            theta[index] = step_alone(&own, &self.disk.payload(accepted.payload)?, &Alone).ok()?;
            after.push((accepted.site.clone(), self.habitat.trial(&theta)?, accepted.steps));
        }
        Some(Tried { fragment: merge.fragment, version: merge.version, before, after })
    }

    pub(super) fn finish_merge(&mut self, post: usize, merged: Merged, bytes: Bytes) -> Result<(), String> {
        if let Some(head) = self.posts[post].head_mut() {
            head.deltas.insert(merged.delta, bytes.0);
        }
        self.tell_coordinator(post, Event::Merged(merged))
    }

    /// A world that keeps all payloads ignores this, to replay from them.
    fn forget(&mut self, post: usize, digest: Digest) {
        if self.description.keeps_payloads {
            return;
        }
        self.disk.forget(digest);
        if let Some(head) = self.posts[post].head_mut() {
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
        if !self.disk.put(self.now, digest, bytes.clone()) {
            return Ok(()); // Nothing says that it is here, so it will be sent again.
        }
        self.send(index, 0.0, &Happening::Acknowledged(index, connection, digest, true));
        let site = self.sites[index].residence.name.clone();
        let seen = Payload::check_any(bytes, &self.lens(), &Alone);
        let seen = seen.map(|payload| Seen::of(&payload, &Alone)).map_err(|error| error.to_string());
        self.tell_coordinator_of(index, Event::Arrived(site.clone(), digest, seen?))?;
        // Now and then a payload turns out to be useless, perhaps when it is being merged already.
        if self.chance.chance(self.description.hardships.loss / 10.0) {
            self.tell_coordinator_of(index, Event::Useless(site, digest, SPOILT.into()))?;
        }
        Ok(())
    }

    /// Answers a request of site number `index`.
    pub(super) fn deliver(&mut self, index: usize, connection: u64, digest: Digest) {
        let head = self.sites[index].post.and_then(|post| self.posts[post].head_mut());
        let bytes = head.and_then(|head| {
            let bytes = head.bytes(digest)?;
            // Weights that were asked for are there for a while, though commits move on.
            head.deltas.entry(digest).or_insert_with(|| bytes.clone());
            Some(bytes)
        });
        let count = bytes.as_ref().map_or(0, |bytes| bytes.len());
        let seconds = self.sites[index].occupy_down(self.now, count);
        self.send(index, seconds, &Happening::Delivered(index, connection, digest, bytes.map(Bytes)));
    }

    /// Sends a commit to a site that has not asked for it.
    fn push(&mut self, post: usize, site: &SiteId, digest: Digest) -> Result<(), String> {
        let index = self.index_of(site)?;
        if self.sites[index].post != Some(post) {
            return Ok(());
        }
        let Some(bytes) = self.posts[post].head().and_then(|head| head.bytes(digest)) else { return Ok(()) };
        let seconds = self.sites[index].occupy_down(self.now, bytes.len());
        let connection = self.sites[index].connection;
        self.send(index, seconds, &Happening::Pushed(index, connection, digest, Bytes(bytes)));
        Ok(())
    }

    fn index_of(&self, site: &SiteId) -> Result<usize, String> {
        self.sites.iter().position(|island| &island.residence.name == site).ok_or_else(|| format!("who is {site}?"))
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
