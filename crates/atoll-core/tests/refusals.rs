//! What becomes of a contribution that is wrong: the real machines of coordinator and sites, joined by a shell without
//! a network, and a site that lies once.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::{BTreeMap, VecDeque};

use atoll_core::codec::{Codec, Payload};
use atoll_core::data::{DatasetId, Ranges};
use atoll_core::delta::{Change, Feedback, Follow, Local};
use atoll_core::engine::Progress;
use atoll_core::hash::{Digest, from_little_endian};
use atoll_core::journal::{Book, Entry, Evaluated, Role, Settled};
use atoll_core::manifest::{FragmentId, Manifest};
use atoll_core::model::{Tensor, TensorKind};
use atoll_core::outer::Global;
use atoll_core::round::{
    Coordinator, Event, Goal, Merge, Merged, Order, Phase, Receipt, Seen, Setting, Site, SiteEvent, SiteOrder,
    SiteSettings, Standing, Status, Stop, Sync,
};
use atoll_core::site::{SiteId, Time};
use atoll_core::team::Alone;

const CONTEXT: u64 = 4;
const ROWS: u64 = 2;
const GOAL: u64 = 2_000;

fn manifest() -> Manifest {
    let tensors = vec![Tensor::new("a", &[8, 8], TensorKind::Matrix), Tensor::new("b", &[7], TensorKind::Vector)];
    Manifest::balanced(tensors, 2)
}

fn site(name: &str) -> SiteId {
    name.parse().unwrap()
}

fn first_model() -> Global {
    Global::new(manifest(), vec![vec![0.5; 64], vec![1.0; 7]])
}

// ---- a coordinator without a network ----

struct Desk {
    machine: Coordinator,
    global: Global,
    payloads: BTreeMap<Digest, Vec<u8>>,
    deltas: BTreeMap<Digest, Vec<u8>>,
    journal: Vec<Entry>,
    told: VecDeque<(SiteId, Standing)>,
    now: Time,
}

impl Desk {
    fn new(sites: &[&str]) -> Self {
        let (mut book, global) = (Book::default(), first_model());
        let mut journal = vec![Entry::Began {
            run: "r".into(),
            seed: 1,
            context: CONTEXT,
            layout: manifest().fingerprint(),
            theta: global.digests(),
        }];
        journal.extend(sites.iter().map(|name| Entry::Admitted {
            site: site(name),
            key: Digest::of(name.as_bytes()),
            ticket: Digest::of(name.as_bytes()),
            role: Role::Train,
        }));
        journal.iter().for_each(|entry| book.apply(entry).unwrap());
        let exact = Setting::Is(Codec::F32);
        let sync = Sync { fragments: 2, steps: Setting::Is(4), up: exact, down: exact, ..Sync::default() };
        let goal = Goal { tokens: Some(GOAL), minutes: None };
        let machine = Coordinator::new(sync, goal, book, vec![64, 7]);
        let (payloads, deltas, told) = Default::default();
        Self { machine, global, payloads, deltas, journal, told, now: Time(1_000_000) }
    }

    fn handle(&mut self, event: Event) {
        let model = self.global.digests();
        let orders = self.machine.handle(self.now, event);
        self.machine.book().ledger.verify().unwrap();
        let refuses = orders.iter().any(|order| matches!(order, Order::Record(Entry::Refused { .. })));
        let merges = orders.iter().any(|order| matches!(order, Order::Merge(_)));
        for order in orders {
            match order {
                Order::Record(entry) => self.journal.push(entry),
                Order::Tell(site, standing) => self.told.push_back((site, *standing)),
                Order::Merge(merge) => self.merge(&merge),
                Order::Push(..) => {} // Sites fetch.
                Order::Forget(payload) => drop(self.payloads.remove(&payload)),
                Order::Halt(why) => panic!("{why}"),
            }
        }
        if refuses && !merges {
            assert_eq!(self.global.digests(), model, "a refusal leaves the model alone");
        }
    }

    fn merge(&mut self, merge: &Merge) {
        let Merge { fragment, version, contributions, recipe, .. } = merge;
        let payload = |digest| Some(merge.found(digest, self.payloads.get(&digest)?.clone()));
        let step = self.global.perform(*fragment, *version, contributions, recipe, &payload, &Alone).unwrap();
        let (fragment, bytes) = (*fragment, step.payload.len() as u64);
        self.deltas.insert(step.delta, step.payload);
        let merged = Merged { fragment, delta: step.delta, bytes, digest: step.digest, measures: step.measures };
        self.handle(Event::Merged(merged));
    }

    /// Takes in a payload as the gate does: it believes only what it sees.
    fn arrive(&mut self, from: &SiteId, name: Digest, bytes: &[u8]) {
        let seen = Payload::check_any(bytes, &[64, 7], &Alone);
        let seen = seen.map(|payload| Seen::of(&payload, &Alone)).map_err(|error| error.to_string());
        match seen {
            _ if Digest::of(bytes) != name => self.handle(Event::Useless(from.clone(), name, "another name".into())),
            Err(why) => self.handle(Event::Useless(from.clone(), name, why)),
            Ok(seen) => {
                self.payloads.insert(name, bytes.to_vec());
                self.handle(Event::Arrived(from.clone(), name, seen));
            }
        }
    }

    fn fetch(&self, digest: Digest) -> Option<Vec<u8>> {
        let weights = self.global.theta.iter().find(|theta| Digest::of_weights(theta) == digest);
        let weights = weights.map(|theta| theta.iter().flat_map(|weight| weight.to_le_bytes()).collect());
        self.deltas.get(&digest).cloned().or(weights)
    }

    fn refusals(&self) -> Vec<(SiteId, u64, Ranges, String)> {
        let refused = |entry: &Entry| match entry {
            Entry::Refused { site, number, ranges, why, .. } => {
                Some((site.clone(), *number, ranges.clone(), why.clone()))
            }
            _ => None,
        };
        self.journal.iter().filter_map(refused).collect()
    }

    /// The journal alone rebuilds the book.
    fn replay(&self) {
        let mut book = Book::default();
        self.journal.iter().for_each(|entry| book.apply(entry).unwrap());
        assert_eq!(&book, self.machine.book());
        assert_eq!(book.digest(), Digest::of_all(&self.global.digests()));
    }
}

// ---- a site without a network ----

/// Changes a receipt and its payload.
type Lie = fn(&mut Receipt, &mut Vec<u8>);

struct Island {
    name: SiteId,
    machine: Site,
    local: Local,
    weights: Vec<Vec<f32>>,
    leases: Ranges,
    payloads: BTreeMap<Digest, Vec<u8>>,
    /// What its contributions up to this number are turned into, and what their payloads become.
    lie: Option<Lie>,
    lies: u64,
    forged: BTreeMap<Digest, (Digest, Vec<u8>)>,
    /// Reasons that it was told.
    told: Vec<String>,
    /// Steps that take until the next moment.
    ordered: u32,
    stopped: bool,
}

impl Island {
    fn new(name: &str, session: u64, lie: Option<Lie>) -> Self {
        let settings = SiteSettings {
            fragment_lens: vec![64, 7],
            dataset: DatasetId(Digest::of(name.as_bytes())),
            samples: 1000,
            samples_per_step: ROWS,
            session,
            begun: Vec::new(),
        };
        Self {
            name: site(name),
            machine: Site::new(settings),
            local: Local::new(&manifest(), Follow::Carry, Feedback::Weights),
            weights: first_model().theta,
            leases: Ranges::new(),
            payloads: BTreeMap::new(),
            lie,
            lies: 1,
            forged: BTreeMap::new(),
            told: Vec::new(),
            ordered: 0,
            stopped: false,
        }
    }

    fn handle(&mut self, desk: &mut Desk, event: SiteEvent) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front().filter(|_| !self.stopped) {
            for order in self.machine.handle(desk.now, event) {
                events.extend(self.obey(desk, order));
            }
        }
    }

    fn obey(&mut self, desk: &mut Desk, order: SiteOrder) -> Option<SiteEvent> {
        match order {
            SiteOrder::Train(steps) => self.ordered = steps,
            SiteOrder::Grant(ranges) => self.leases.insert(&ranges),
            SiteOrder::DropLeases => self.leases = Ranges::new(),
            SiteOrder::Contribute(fragment, codec) => {
                let weights = self.weights[fragment.index()].clone();
                let payload = self.local.contribute(fragment, weights, codec, &Alone).unwrap();
                let (digest, bytes) = (payload.digest, payload.bytes.len() as u64);
                self.payloads.insert(digest, payload.bytes);
                let (norm, agreement) = (payload.norm, payload.agreement);
                return Some(SiteEvent::Contributed { fragment, payload: digest, bytes, norm, agreement });
            }
            SiteOrder::Rebase(fragment, why) => {
                self.told.push(why);
                let change = self.local.rebase(fragment);
                self.change(fragment, change);
                return Some(SiteEvent::Rebased(fragment));
            }
            SiteOrder::Commit(notice) => {
                let payload = desk.fetch(notice.delta).unwrap();
                let (digest, change) = self.local.commit(notice.fragment, payload, &Alone).unwrap();
                self.change(notice.fragment, change);
                return Some(SiteEvent::Applied {
                    fragment: notice.fragment,
                    version: notice.version,
                    digest,
                    overwritten: false,
                });
            }
            SiteOrder::Install(fragment, version, digest) => {
                let bytes = desk.fetch(digest).unwrap();
                let (digest, change) = self.local.install(fragment, from_little_endian(&bytes)).unwrap();
                self.change(fragment, change);
                return Some(SiteEvent::Applied { fragment, version, digest, overwritten: true });
            }
            SiteOrder::Evaluate(request) => {
                let evaluated = Evaluated { commits: 0, nats: 1.0, tokens: 1, bytes: 1 };
                return Some(SiteEvent::Evaluated(request, evaluated));
            }
            SiteOrder::Upload(digest) => {
                let own = (digest, self.payloads[&digest].clone());
                let (name, bytes) = self.forged.get(&digest).cloned().unwrap_or(own);
                desk.arrive(&self.name, name, &bytes);
                return Some(SiteEvent::Uploaded(digest, true));
            }
            SiteOrder::Fetch { digest, .. } => {
                return Some(SiteEvent::Fetched(digest, desk.fetch(digest).is_some()));
            }
            SiteOrder::Report(status) => self.report(desk, *status),
            SiteOrder::Stop(stop) => {
                assert_eq!(stop, Stop::Finished);
                self.stopped = true;
            }
            SiteOrder::Delivered(fragment) => self.local.delivered(fragment),
            SiteOrder::Progress(_) | SiteOrder::Forget(_) | SiteOrder::Recall(_) => {}
        }
        None
    }

    /// Steps that move all weights a little.
    fn train(&mut self) -> SiteEvent {
        let steps = std::mem::take(&mut self.ordered);
        if steps == 0 {
            return SiteEvent::Tick;
        }
        self.weights.iter_mut().flatten().for_each(|weight| *weight += 0.01 * steps as f32);
        let trained = self.leases.take_first(u64::from(steps) * ROWS);
        let progress = Progress { steps, tokens: trained.len() * CONTEXT, loss: 1.0 };
        // So slow that leases for a minute are few.
        SiteEvent::Stepped { progress, trained, seconds: 10.0 }
    }

    fn change(&mut self, fragment: FragmentId, change: Change) {
        match change {
            Change::Write(weights) => self.weights[fragment.index()] = weights,
            Change::Add(change) => atoll_core::delta::add(&mut self.weights[fragment.index()], &change),
        }
    }

    fn report(&mut self, desk: &mut Desk, mut status: Status) {
        if let Some(lie) = self.lie {
            for receipt in status.outstanding.iter_mut().filter(|receipt| receipt.number <= self.lies) {
                let own = receipt.payload;
                let mut bytes = self.payloads[&own].clone();
                lie(receipt, &mut bytes);
                if bytes != self.payloads[&own] {
                    receipt.payload = Digest::of(&bytes);
                }
                self.forged.insert(own, (receipt.payload, bytes));
            }
        }
        desk.handle(Event::Heard(self.name.clone(), Box::new(status)));
    }
}

/// Lets both train until the run is finished.
fn live(desk: &mut Desk, islands: &mut [Island]) {
    for island in islands.iter_mut() {
        island.handle(desk, SiteEvent::Connected);
    }
    for _ in 0..2_000 {
        desk.now = desk.now.after(0.1);
        desk.handle(Event::Tick);
        while let Some((site, standing)) = desk.told.pop_front() {
            let island = islands.iter_mut().find(|island| island.name == site).unwrap();
            island.handle(desk, SiteEvent::Standing(Box::new(standing)));
        }
        for island in islands.iter_mut() {
            let event = island.train();
            island.handle(desk, event);
        }
        if islands.iter().all(|island| island.stopped) {
            return;
        }
    }
    panic!("the run does not end: {:?}", desk.machine.waiting(desk.now, 0));
}

fn f32s(count: usize, value: f32) -> Vec<u8> {
    let mut bytes = Codec::F32.encode(&vec![0.0; count]).unwrap();
    bytes[5..9].copy_from_slice(&value.to_le_bytes());
    bytes
}

/// What is done to the first contribution, to fragment 0 of 64 weights, and what site and operator read.
const LIES: [(Lie, &str); 17] = [
    // It does not decode.
    (|_, bytes| bytes[0] = 9, "codec 9 is unknown"),
    (|_, bytes| *bytes = Vec::new(), "has 0 bytes"),
    (|_, bytes| *bytes = b"not a payload".to_vec(), "no fragment has so many"),
    // It has the wrong length.
    (|_, bytes| bytes.truncate(200), "the payload has 200 bytes, expected 261"),
    (|_, bytes| *bytes = f32s(65, 0.0), "the payload is for 65 values, and no fragment has so many"),
    (|_, bytes| *bytes = f32s(7, 0.0), "its payload is for 7 weights, and fragment 0 has 64"),
    // It names what does not exist.
    (|receipt, _| receipt.fragment = FragmentId(9), "there is no fragment 9"),
    (|receipt, _| receipt.base = 99, "fragment 0 has no version 99 yet"),
    // It holds what is no number, or is too long, and its site says that all is well.
    (|_, bytes| *bytes = f32s(64, f32::NAN), "not finite"),
    (|_, bytes| *bytes = f32s(64, f32::NEG_INFINITY), "not finite"),
    (|_, bytes| *bytes = f32s(64, 1e9), "its length is 1.000e9"),
    (|receipt, _| receipt.norm = f64::NAN, "its length is not finite"),
    // It is not what its name says.
    (|receipt, _| receipt.payload = Digest::of(b"other"), "another name"),
    // It counts work that its samples cannot hold.
    (|receipt, _| receipt.tokens *= 1000, "it claims 2 steps on 16000 tokens, and its 4 samples have 16"),
    (|receipt, _| receipt.steps = 5, "it claims 5 steps on 16 tokens, and its 4 samples have 16"),
    (|receipt, _| receipt.tokens = 0, "it holds no training"),
    (|receipt, _| receipt.ranges = Ranges::span(500, 504), "samples that are not leased to this site"),
];

#[test]
fn a_wrong_contribution_is_refused_its_samples_go_back_and_the_run_goes_on() {
    for (lie, reason) in LIES {
        let mut desk = Desk::new(&["good", "liar"]);
        let mut islands = [Island::new("good", 1, None), Island::new("liar", 1, Some(lie))];
        live(&mut desk, &mut islands);
        let refusals = desk.refusals();
        let Some((who, number, ranges, why)) = refusals.first() else { panic!("{reason}: nothing was refused") };
        assert!((who, *number) == (&site("liar"), 1) && why.contains(reason), "{reason}: {refusals:?}");
        assert_eq!(islands[1].told.first(), Some(why), "the site is told");
        assert!(islands[0].told.is_empty());

        // The samples were in the pool again: a later lease holds them, and now they are in the model.
        let lent = |entry: &Entry| match entry {
            Entry::Leased { site, ranges: lease, .. } if site == who => lease.intersects(ranges),
            _ => false,
        };
        let times = desk.journal.iter().filter(|entry| lent(entry)).count();
        assert!(ranges.is_empty() || times >= 2, "{reason}: leased {times} times");
        let book = desk.machine.book();
        assert_eq!(desk.machine.phase(), Phase::Finished);
        assert!(book.tokens >= GOAL && book.sites[who].tokens > 0, "{reason}: the liar goes on in honesty");
        let settled = &book.sites[who].settled[&1].settled;
        assert_eq!(settled, &Settled::Refused(why.clone()));
        desk.replay();
    }
}

#[test]
fn a_site_that_only_lies_holds_nobody_up() {
    let mut desk = Desk::new(&["good", "liar"]);
    // Two live, so more than half of them are both: a round that waited for the liar would wait for ever.
    let lie: Lie = |_, bytes| bytes[0] = 9;
    let liar = Island { lies: u64::MAX, ..Island::new("liar", 1, Some(lie)) };
    live(&mut desk, &mut [Island::new("good", 1, None), liar]);
    assert!(desk.refusals().len() > 2, "{:?}", desk.refusals());
    let book = desk.machine.book();
    assert_eq!(book.sites[&site("liar")].tokens, 0);
    assert!(book.tokens >= GOAL && book.sites[&site("good")].tokens == book.tokens);
    desk.replay();
}

#[test]
fn a_payload_may_be_here_before_its_receipt() {
    let mut desk = Desk::new(&["a"]);
    let mut island = Island::new("a", 1, None);
    // Whatever the site is about to contribute, garbage has come under a name before.
    let (good, bad) = (f32s(64, 1.0), b"garbage".to_vec());
    desk.arrive(&site("a"), Digest::of(&good), &good);
    desk.arrive(&site("a"), Digest::of(&bad), &bad);
    assert_eq!(desk.payloads.len(), 1);
    island.lie = Some(|_, bytes| *bytes = b"garbage".to_vec());
    live(&mut desk, std::slice::from_mut(&mut island));
    assert_eq!(desk.refusals().len(), 1);
    desk.replay();
}

#[test]
fn payloads_that_nobody_claims_do_not_pile_up() {
    let mut desk = Desk::new(&["a", "b"]);
    for value in 1..1000 {
        let bytes = f32s(64, value as f32);
        desk.arrive(&site("a"), Digest::of(&bytes), &bytes);
    }
    assert!(desk.payloads.len() <= 4, "{} payloads are kept", desk.payloads.len());
    let mut islands = [Island::new("a", 1, None), Island::new("b", 1, None)];
    live(&mut desk, &mut islands);
    assert!(desk.refusals().is_empty());
}

/// A status of a site that has joined, with these receipts.
fn status(desk: &Desk, number: u64, outstanding: Vec<Receipt>) -> Event {
    let fragments = desk.machine.book().fragments.iter().map(|book| Some((book.version, book.digest)));
    Event::Heard(
        site("a"),
        Box::new(Status {
            session: 1,
            number,
            dataset: DatasetId(Digest::of(b"a")),
            samples: 1000,
            fragments: fragments.collect(),
            due: vec![None; 2],
            outstanding,
            leases_seen: number.min(1),
            unspent: 0,
            wants: 100,
            evaluation: None,
            drained: false,
            leaving: false,
            vitals: Default::default(),
        }),
    )
}

fn receipt(number: u64, fragment: u16, payload: &[u8], ranges: Ranges) -> Receipt {
    let (tokens, payload, bytes) = (ranges.len() * CONTEXT, Digest::of(payload), payload.len() as u64);
    Receipt { number, fragment: FragmentId(fragment), base: 0, steps: 1, tokens, norm: 1.0, payload, bytes, ranges }
}

#[test]
fn one_payload_for_two_fragments_is_judged_for_each() {
    let mut desk = Desk::new(&["a"]);
    desk.handle(status(&desk, 1, Vec::new()));
    let bytes = f32s(7, 1.0);
    let receipts = vec![receipt(1, 0, &bytes, Ranges::span(0, 4)), receipt(2, 1, &bytes, Ranges::span(4, 8))];
    desk.handle(status(&desk, 2, receipts));
    desk.arrive(&site("a"), Digest::of(&bytes), &bytes);
    let [(_, 1, ranges, why)] = &desk.refusals()[..] else { panic!("{:?}", desk.refusals()) };
    assert_eq!((ranges, why.as_str()), (&Ranges::span(0, 4), "its payload is for 7 weights, and fragment 0 has 64"));
    let book = desk.machine.book();
    assert_eq!((book.fragments[0].version, book.fragments[1].version), (0, 1), "the other one is in the model");
    assert!(book.ledger.pool(DatasetId(Digest::of(b"a"))).unwrap().returned.contains_span(0, 4));
    desk.replay();
}

#[test]
fn tokens_are_those_since_the_last_contribution_to_the_fragment() {
    let (long, short) = (f32s(64, 1.0), f32s(7, 1.0));
    let claim = |desk: &mut Desk, receipt: Receipt, bytes: &[u8], tokens: u64| {
        let number = receipt.number;
        desk.handle(status(desk, number + 1, vec![Receipt { tokens, ..receipt }]));
        desk.arrive(&site("a"), Digest::of(bytes), bytes);
        desk.refusals().iter().any(|(_, refused, ..)| *refused == number)
    };
    let mut desk = Desk::new(&["a"]);
    desk.handle(status(&desk, 1, Vec::new()));
    // Four samples, then two; the second contribution stands for the steps on all six.
    assert!(!claim(&mut desk, receipt(1, 0, &long, Ranges::span(0, 4)), &long, 16));
    assert!(!claim(&mut desk, receipt(2, 1, &short, Ranges::span(4, 6)), &short, 24));
    // Since its last one, to which the first four belong, fragment 0 has seen two and one.
    assert!(claim(&mut desk, receipt(3, 0, &long, Ranges::span(6, 7)), &long, 16));
    // A refused contribution was one all the same: its steps are gone.
    assert!(claim(&mut desk, receipt(4, 0, &long, Ranges::span(7, 8)), &long, 8));
    assert!(!claim(&mut desk, receipt(5, 0, &long, Ranges::span(8, 9)), &long, 4));
    // Fragment 1 has seen those of all three.
    assert!(!claim(&mut desk, receipt(6, 1, &short, Ranges::span(9, 10)), &short, 16));
    desk.replay();
}

#[test]
fn a_second_contribution_before_the_first_is_settled_is_refused() {
    let mut desk = Desk::new(&["a"]);
    desk.handle(status(&desk, 1, Vec::new()));
    let bytes = f32s(64, 1.0);
    let receipts = vec![receipt(1, 0, b"x", Ranges::span(0, 4)), receipt(2, 0, &bytes, Ranges::span(4, 8))];
    desk.handle(status(&desk, 2, receipts));
    let [(_, 2, _, why)] = &desk.refusals()[..] else { panic!("{:?}", desk.refusals()) };
    assert_eq!(why, "the last contribution to fragment 0 is not settled yet");
}

#[test]
fn vitals_that_cannot_be_are_not_listened_to() {
    let mut desk = Desk::new(&["a"]);
    let Event::Heard(name, status) = status(&desk, 1, Vec::new()) else { unreachable!() };
    for spoil in [
        (|status: &mut Status| status.vitals.loss = f64::NAN) as fn(&mut Status),
        |status| status.vitals.step_seconds = -1.0,
        |status| status.vitals.steps = u64::MAX,
    ] {
        let mut spoilt = status.clone();
        spoil(&mut spoilt);
        desk.handle(Event::Heard(name.clone(), spoilt));
        assert!(desk.told.is_empty() && desk.journal.len() == 2);
    }
    desk.handle(Event::Heard(name, status));
    assert_eq!(desk.told.len(), 1);
}

/// The first contribution of a run may be a single step at the foot of the schedule; a site that had to wait then comes with
/// many, and large ones.
#[test]
fn a_contribution_may_be_as_much_longer_as_it_has_more_steps() {
    let mut desk = Desk::new(&["a"]);
    desk.handle(status(&desk, 1, Vec::new()));
    let mut is_refused = |number: u64, steps: u64, value: f32, ranges: Ranges| {
        let bytes = f32s(64, value);
        desk.handle(status(&desk, number + 1, vec![Receipt { steps, ..receipt(number, 0, &bytes, ranges) }]));
        desk.arrive(&site("a"), Digest::of(&bytes), &bytes);
        desk.refusals().iter().any(|(_, refused, ..)| *refused == number)
    };
    assert!(!is_refused(1, 1, 1e-3, Ranges::span(0, 1)));
    assert!(is_refused(2, 1, 0.15, Ranges::span(1, 5)), "a single step is not 150 times as long");
    assert!(!is_refused(3, 4, 0.15, Ranges::span(5, 9)), "four are");
    desk.replay();
}

#[test]
fn looking_at_the_held_out_loss_takes_a_small_part_of_the_time() {
    let looks = |took: u64| {
        let (mut desk, mut asked, mut looks, mut steps) = (Desk::new(&["a"]), None, 0, 0);
        for second in 1..=600 {
            let Event::Heard(name, mut status) = status(&desk, second, Vec::new()) else { unreachable!() };
            steps += u64::from(asked.is_none()); // Whoever looks does not train.
            (status.vitals.steps, status.vitals.step_seconds) = (steps, 0.2);
            if let Some((request, since)) = asked
                && second >= since + took
            {
                status.evaluation = Some((request, Evaluated { commits: 0, nats: 1.0, tokens: 1, bytes: 1 }));
                (asked, looks) = (None, looks + 1);
            }
            desk.handle(Event::Heard(name, status));
            let wanted = desk.told.back().and_then(|(_, standing)| standing.evaluate);
            asked = asked.or_else(|| wanted.map(|request| (request, second)));
            desk.now = desk.now.after(1.0);
        }
        looks
    };
    assert!((17..=20).contains(&looks(1)), "twice a minute: {}", looks(1));
    assert!((4..=5).contains(&looks(12)), "a tenth of the time: {}", looks(12));
    assert_eq!(looks(40), 2, "and none is in vain, however long it takes");
}
