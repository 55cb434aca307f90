//! One simulated run: a queue of things that will happen, and what becomes of them.
//!
//! [`coordinator`] and [`site`] are the shells around the two machines, with disks, a network and
//! processes of their own; [`faults`] and [`disk`] break them; [`witness`] believes nobody's bookkeeping.

mod coordinator;
mod disk;
mod failover;
mod faults;
mod happening;
mod site;
mod witness;

use std::cell::RefCell;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::rc::Rc;

use atoll_core::hash::Digest;
use atoll_core::manifest::Manifest;
use atoll_core::outer::Global;
use atoll_core::rng::Rng;
use atoll_core::round::{Event, Phase, SiteEvent};
use atoll_core::site::Time;

use crate::{Description, Habitat, Hardships};
use disk::Disk;
use failover::Post;
use happening::Happening;
use site::Island;
use witness::{Witness, check};

/// How a world ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// Hash of everything that happened.
    pub trace: Digest,
    /// Tokens in the model.
    pub tokens: u64,
    /// Commits.
    pub commits: u64,
    /// How often a coordinator took the run over; 0 in a world with one.
    pub epochs: u64,
    /// What went wrong with disks.
    pub disk_failures: DiskFailures,
    /// Digest of the model.
    pub digest: Digest,
    /// What the habitat says of the finished model: see [`Habitat::error`].
    pub error: f64,
    /// Simulated seconds.
    pub seconds: f64,
    /// What each site gave and took, in their order.
    pub sites: Vec<Presence>,
    /// The finished model, by fragment.
    pub theta: Vec<Vec<f32>>,
}

/// How often disks failed somebody.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DiskFailures {
    /// Writes of a coordinator that found no room.
    pub full: u64,
    /// Entries of which a coordinator does not know whether they are written.
    pub torn: u64,
    /// Payloads in which a bit flipped.
    pub flipped: u64,
    /// Failures of a site's disk.
    pub sites: u64,
}

/// What one site gave and took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Presence {
    /// Its tokens in the model.
    pub tokens: u64,
    /// Its contributions that were merged.
    pub contributions: u64,
    /// Those of them that missed the round they were made for.
    pub late: u64,
    /// Those of which the guard took something because of how they look.
    pub guarded: u64,
    /// Bytes of payloads that it sent.
    pub bytes_up: u64,
    /// Bytes of payloads and weights that were sent to it.
    pub bytes_down: u64,
    /// How often a process of it took up what an earlier one had not delivered of a fragment.
    pub recalled: u64,
}

/// Lives the world of `description` to its end with the engines of `habitat`.
///
/// # Errors
/// The first invariant that did not hold, with the simulated time; or why an engine failed.
pub fn run(description: Description, habitat: &mut dyn Habitat) -> Result<Outcome, String> {
    World::new(description, habitat).run()
}

/// The coordinator looks up at least this often.
const COORDINATOR_TICK_SECONDS: f64 = 0.25;

/// Bytes by their content address.
type Store = BTreeMap<Digest, Rc<Vec<u8>>>;

struct World<'a> {
    description: Description,
    habitat: &'a mut dyn Habitat,
    manifest: Manifest,
    chance: Rng,
    now: Time,
    queue: BinaryHeap<Reverse<(Time, u64)>>,
    happenings: BTreeMap<u64, Happening>,
    scheduled: u64,
    trace: Digest,
    faults_left: u32,
    disk_faults_left: u32,
    disk: Disk,
    /// Where coordinators are: one, or two that have the same disk.
    posts: Vec<Post>,
    sites: Vec<Island>,
    witness: Witness,
}

thread_local! {
    static VERBOSE: RefCell<bool> = RefCell::new(std::env::var_os("ATOLL_SIM_TRACE").is_some());
}

impl<'a> World<'a> {
    fn new(description: Description, habitat: &'a mut dyn Habitat) -> Self {
        let sites = description.sites.iter().cloned().map(Island::new).collect();
        let posts = if description.hardships.standby { 2 } else { 1 };
        Self {
            chance: description.chance.clone(),
            manifest: habitat.manifest(),
            habitat,
            now: Time(1_000_000),
            queue: BinaryHeap::new(),
            happenings: BTreeMap::new(),
            scheduled: 0,
            trace: Digest::default(),
            faults_left: description.hardships.crashes + description.hardships.cuts,
            disk_faults_left: description.hardships.disk_faults,
            disk: Disk::new(posts > 1, description.chance.clone()),
            posts: (0..posts).map(|_| Post::default()).collect(),
            sites,
            witness: Witness::default(),
            description,
        }
    }

    fn run(mut self) -> Result<Outcome, String> {
        let Hardships { crashes, disk_faults, .. } = self.description.hardships;
        check(self.description.keeps_payloads || crashes + disk_faults == 0, || {
            "a coordinator that keeps no payloads cannot recover from a crash".into()
        })?;
        self.begin();
        for post in 0..self.posts.len() {
            self.after(post as f64, Happening::CoordinatorStarts(post));
        }
        for index in 0..self.sites.len() {
            let delay = self.chance.unit();
            self.after(delay, Happening::SiteStarts(index));
        }
        if self.faults_left > 0 {
            self.after(1.0, Happening::Fault);
        }
        if self.disk_faults_left > 0 {
            self.after(1.5, Happening::DiskFault);
        }
        while let Some(Reverse((time, number))) = self.queue.pop() {
            let happening = self.happenings.remove(&number).ok_or("the queue names nothing")?;
            self.now = time;
            self.note(&happening);
            self.happen(happening).map_err(|broken| format!("at {:.3} s: {broken}", self.seconds()))?;
            if self.sites.iter().all(|site| site.finished) {
                return self.close();
            }
            if self.seconds() > self.description.seconds_max {
                break;
            }
        }
        Err(self.unfinished())
    }

    fn unfinished(&self) -> String {
        let Some((_, head)) = self.leader() else { return "the coordinator never came back".into() };
        let rounds = 0..self.description.sync.fragments;
        let waiting: Vec<_> = rounds.map(|index| head.machine.waiting(self.now, index)).collect();
        let tokens = head.machine.book().tokens;
        format!("the run did not finish; {tokens} tokens in the model; rounds wait for {waiting:?}")
    }

    fn first_weights(&self) -> Global {
        Global::new(self.manifest.clone(), self.habitat.first_weights())
    }

    fn lens(&self) -> Vec<usize> {
        self.manifest.fragments().map(|fragment| self.manifest.fragment_len(fragment).unwrap_or(0)).collect()
    }

    /// Simulated seconds so far.
    fn seconds(&self) -> f64 {
        self.now.0 as f64 / 1e6
    }

    fn after(&mut self, seconds: f64, happening: Happening) {
        self.scheduled += 1;
        self.queue.push(Reverse((self.now.after(seconds), self.scheduled)));
        self.happenings.insert(self.scheduled, happening);
    }

    fn note(&mut self, happening: &Happening) {
        let line = format!("{} {happening:?}", self.now.0);
        VERBOSE.with_borrow(|verbose| {
            if *verbose {
                eprintln!("{}", line.chars().take(1000).collect::<String>());
            }
        });
        self.trace = Digest::of_all([&self.trace, &Digest::of(line.as_bytes())]);
    }

    /// Sends between the coordinator and site number `index`, over a link that may lose, double and
    /// delay; `seconds` more than that.
    fn send(&mut self, index: usize, seconds: f64, happening: &Happening) {
        let hardships = self.description.hardships;
        let seconds = seconds + self.sites[index].residence.link.delay;
        let copies = if self.chance.chance(hardships.doubling) { 2 } else { 1 };
        for _ in 0..copies {
            if !self.chance.chance(hardships.loss) {
                let delay = 0.001 + self.chance.unit() * hardships.delay;
                self.after(seconds + delay, happening.clone());
            }
        }
    }

    fn happen(&mut self, happening: Happening) -> Result<(), String> {
        if let Some(seconds) = self.pause_of(&happening) {
            self.after(seconds, happening);
            return Ok(());
        }
        match happening {
            Happening::CoordinatorStarts(post) => self.start_coordinator(post),
            Happening::CoordinatorTick(post, life) if life == self.posts[post].life => {
                self.after(COORDINATOR_TICK_SECONDS, Happening::CoordinatorTick(post, life));
                self.tick(post)
            }
            Happening::CoordinatorWakes(post, life) if life == self.posts[post].life => {
                self.tell_coordinator(post, Event::Tick)
            }
            Happening::Claim(post, life, entries) if life == self.posts[post].life => self.claim(post, entries),
            Happening::Merged(post, life, merged, bytes) if life == self.posts[post].life => {
                self.finish_merge(post, merged, bytes)
            }
            Happening::Tried(post, life, tried) if life == self.posts[post].life => {
                self.tell_coordinator(post, Event::Tried(tried))
            }
            Happening::Doubt(index, connection) if self.sites[index].connection == connection => self.doubt(index),
            Happening::Status(index, connection, status) if self.linked(index, connection) => {
                let site = self.sites[index].residence.name.clone();
                self.tell_coordinator_of(index, Event::Heard(site, status))
            }
            Happening::Payload(index, connection, digest, bytes) if self.linked(index, connection) => {
                self.receive_payload(index, connection, digest, &bytes.0)
            }
            Happening::Request(index, connection, digest) if self.linked(index, connection) => {
                self.deliver(index, connection, digest);
                Ok(())
            }
            Happening::Standing(index, connection, standing) if self.linked(index, connection) => {
                self.tell_site(index, SiteEvent::Standing(standing))
            }
            Happening::Acknowledged(index, connection, digest, done) if self.sites[index].connection == connection => {
                self.tell_site(index, SiteEvent::Uploaded(digest, done))
            }
            Happening::Delivered(index, connection, digest, bytes) if self.sites[index].connection == connection => {
                self.receive_delivery(index, digest, bytes)
            }
            Happening::Pushed(index, connection, digest, bytes) if self.sites[index].connection == connection => {
                self.receive_push(index, digest, bytes)
            }
            Happening::Worked(index, life, work) if self.sites[index].life == life => self.tell_work(index, work),
            Happening::StepDone(index, life) if self.sites[index].life == life => self.finish_step(index),
            Happening::SiteTick(index, life) if self.sites[index].life == life => {
                self.after(0.5, Happening::SiteTick(index, life));
                self.tell_site(index, SiteEvent::Tick)
            }
            Happening::SiteStarts(index) => self.start_site(index),
            Happening::Reconnect(index, life) if self.sites[index].life == life => self.connect(index),
            Happening::Fault => self.fault(),
            Happening::DiskFault => {
                self.fail_a_disk();
                Ok(())
            }
            _ => Ok(()), // It was meant for a connection or a life that is over.
        }
    }

    fn linked(&self, index: usize, connection: u64) -> bool {
        let site = &self.sites[index];
        site.connection == connection && site.post.is_some_and(|post| self.posts[post].head().is_some())
    }

    fn close(mut self) -> Result<Outcome, String> {
        let seconds = self.seconds();
        let (_, head) = self.leader().ok_or("the run finished without a coordinator")?;
        let book = head.machine.book();
        check(head.machine.phase() == Phase::Finished, || "sites finished before the run".into())?;
        if self.description.keeps_payloads {
            let (replayed, global, _) = self.replay()?;
            check(&replayed == book, || "the journal does not rebuild the book".into())?;
            check(global == head.global, || "the journal does not rebuild the model".into())?;
        }
        let counted = head.machine.seconds();
        check(counted <= seconds + 1e-3, || format!("{counted} s of training were counted in {seconds} s"))?;
        let consumed = book.ledger.consumed() * self.description.context;
        check(book.tokens == consumed, || "tokens were counted twice".into())?;
        let sites = self.presences();
        let tokens: Vec<u64> = sites.iter().map(|site| site.tokens).collect();
        let theta = head.global.theta.clone();
        let outcome = Outcome {
            trace: self.trace,
            tokens: book.tokens,
            commits: book.commits(),
            epochs: book.epoch,
            disk_failures: self.disk.failures,
            digest: book.digest(),
            error: self.habitat.error(&theta, &tokens).map_err(|error| error.to_string())?,
            seconds,
            sites,
            theta,
        };
        self.see_rot()?;
        Ok(outcome)
    }

    /// One bit that has flipped in the journal, or in what it needs, is found before anything is believed.
    fn see_rot(&mut self) -> Result<(), String> {
        if self.description.hardships.disk_faults == 0 {
            return Ok(());
        }
        let what = self.disk.rot();
        check(self.replay().is_err(), || format!("a bit has flipped in {what}, and nobody has noticed"))
    }

    fn presences(&self) -> Vec<Presence> {
        let presence = |island: &Island| {
            let share = self.witness.share_of(&island.residence.name);
            Presence {
                tokens: share.samples * self.description.context,
                contributions: share.contributions,
                late: share.late,
                guarded: island.guarded,
                bytes_up: island.bytes_up,
                bytes_down: island.bytes_down,
                recalled: island.recalled,
            }
        };
        self.sites.iter().map(presence).collect()
    }
}
