//! A coordinator and its sites in one thread, without a network. The coordinator's machine, its look at payloads, the
//! merge and the outer step are the product's; the sites only say what sites say.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail, ensure};
use atoll_core::codec::Payload;
use atoll_core::data::{DatasetId, Ranges};
use atoll_core::hash::Digest;
use atoll_core::journal::{Book, Entry, Role};
use atoll_core::manifest::{FragmentId, Manifest};
use atoll_core::model::ModelConfig;
use atoll_core::outer::Global;
use atoll_core::plan;
use atoll_core::rng::Rng;
use atoll_core::round::{
    Coordinator, Event, Goal, Merge, Merged, Order, Receipt, Seen, Setting, Standing, Status, Sync, Vitals,
};
use atoll_core::site::{SiteId, Time};
use atoll_node::crew::Crew;
use cpu_time::ProcessTime;

/// The fragment whose rounds are measured. The others are never written, so that they take no memory.
const FRAGMENT: FragmentId = FragmentId(0);
/// Payloads that differ; more sites than that share them under names of their own.
const KINDS: usize = 8;
/// Values of which all wishes are made, and the longest stretch that is read at once.
const TABLE: usize = 1 << 20;
const STRETCH: usize = 4096;
/// Tokens of a sample.
const CONTEXT: u64 = 1024;
/// Inner steps, and samples, behind a contribution.
const STEPS: u64 = 32;
const SAMPLES: u64 = 4 * STEPS;
/// Seconds between two rounds, as the machine's clock counts.
const ROUND_SECONDS: f64 = 1.0;
/// An idle site contributes after so many steps: nobody waits for it.
const IDLE_STEPS: u32 = 1_000_000;

/// What a round cost: processor seconds of all threads together, by what they were spent on, and seconds that passed.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Cost {
    /// Deciding: the machine.
    pub(super) machine: f64,
    /// Looking at payloads: their names, blocks and lengths.
    pub(super) payloads: f64,
    /// Merge and outer step.
    pub(super) step: f64,
    pub(super) wall: f64,
}

impl Cost {
    /// Processor seconds for everything.
    pub(super) fn together(&self) -> f64 {
        self.machine + self.payloads + self.step
    }
}

/// Does `work` and adds to `sum` the processor seconds that it took.
fn timed<R>(sum: &mut f64, work: impl FnOnce() -> R) -> R {
    let began = ProcessTime::now();
    let result = work();
    *sum += began.elapsed().as_secs_f64();
    result
}

// ---- the model ----

/// A global model, and payloads for one of its fragments.
pub(super) struct Model {
    global: Global,
    digests: Vec<Digest>,
    payloads: Vec<Vec<u8>>,
}

impl Model {
    /// The layout that a run with that preset has.
    pub(super) fn layout(preset: &str) -> Result<Manifest> {
        let model = ModelConfig::preset(preset, 8192, CONTEXT as usize);
        let model = model.with_context(|| format!("there is no preset {preset}"))?;
        Ok(Manifest::balanced(model.tensors(), Sync::default().fragments))
    }

    pub(super) fn new(manifest: Manifest) -> Result<Self> {
        let lens = manifest.fragments().map(|fragment| manifest.fragment_len(fragment).unwrap_or(0));
        let theta: Vec<Vec<f32>> = lens.map(|len| vec![0.0; len]).collect();
        let payloads = payloads(theta[FRAGMENT.index()].len())?;
        let global = Global::new(manifest, theta);
        let digests = global.digests();
        Ok(Self { global, digests, payloads })
    }

    /// Weights of the fragment whose rounds are measured.
    pub(super) fn weights(&self) -> usize {
        self.global.theta[FRAGMENT.index()].len()
    }

    /// An outer step that nobody contributed to: what a round costs whoever takes part.
    pub(super) fn step_alone(&mut self) -> Result<Cost> {
        let sync = Sync::default();
        let recipe = sync.recipe(plan::THINNEST.1, 1.0, sync.guard());
        let merge = Merge { fragment: FRAGMENT, version: 1, contributions: Vec::new(), squares: Vec::new(), recipe };
        let (mut cost, began) = (Cost::default(), Instant::now());
        timed(&mut cost.step, || self.perform(&merge))?;
        cost.wall = began.elapsed().as_secs_f64();
        Ok(cost)
    }

    fn perform(&mut self, merge: &Merge) -> Result<Merged> {
        let Merge { version, contributions, recipe, .. } = merge;
        let payload = |name| {
            let index = contributions.iter().position(|accepted| accepted.payload == name)?;
            Some(merge.found(name, self.payloads[index % KINDS].clone()))
        };
        let global = &mut self.global;
        let step = Crew.run(|| global.perform(FRAGMENT, *version, contributions, recipe, &payload, &Crew));
        let step = step.map_err(|error| anyhow!(error))?;
        self.digests[FRAGMENT.index()] = step.digest;
        let (delta, bytes) = (step.delta, step.payload.len() as u64);
        Ok(Merged { fragment: FRAGMENT, delta, bytes, digest: step.digest, measures: step.measures })
    }

    /// As the coordinator looks at what has come from site number `index`.
    fn look_at(&self, index: usize) -> Result<Seen> {
        let payload = &self.payloads[index % KINDS];
        std::hint::black_box(Digest::of(payload));
        let lens: Vec<usize> = self.global.theta.iter().map(Vec::len).collect();
        Ok(Seen::of(&Payload::check_any(payload, &lens, &Crew)?, &Crew))
    }
}

/// Contributions in a row of a site whose wishes are long-tailed, as those of training are.
fn payloads(weights: usize) -> Result<Vec<Vec<u8>>> {
    let mut rng = Rng::new(1);
    let table: Vec<f32> =
        (0..TABLE + STRETCH).map(|_| (rng.normal() * (0.5 * rng.normal()).exp() * 1e-3) as f32).collect();
    let mut residual = vec![0.0; weights];
    let payload = |kind: usize| {
        // An odd number of values apart, so that neighbouring blocks and payloads have nothing in common.
        let offset = kind * 100_003;
        plan::THINNEST.0.encode_prepared(&mut residual, kind as u8, &Crew, |start, wish| {
            let from = (start + start / TABLE * 7919 + offset) % TABLE;
            wish.iter_mut().zip(&table[from..]).for_each(|(wish, noise)| *wish += noise);
        })
    };
    (0..KINDS).map(payload).collect::<Result<_, _>>().map_err(|error| anyhow!(error))
}

// ---- a site ----

/// A site that follows every commit at once and has enough leases for its next contribution.
struct Islet {
    status: Status,
    leases: Ranges,
    contributes: bool,
    /// The name of its payloads.
    payload: Digest,
}

impl Islet {
    fn new(name: &SiteId, fragments: usize, contributes: bool) -> Self {
        let link = plan::Link { up: 1e8, down: 1e8, rtt: 0.05 };
        let status = Status {
            session: 1,
            number: 0,
            dataset: DatasetId(Digest::of(b"all sites have the same")),
            samples: 1 << 40,
            fragments: vec![None; fragments],
            due: vec![Some(IDLE_STEPS); fragments],
            outstanding: Vec::new(),
            leases_seen: 0,
            unspent: 0,
            wants: 4 * SAMPLES,
            evaluation: None,
            drained: false,
            leaving: false,
            vitals: Vitals { step_seconds: ROUND_SECONDS / STEPS as f64, link, ..Vitals::default() },
        };
        Self { status, leases: Ranges::new(), contributes, payload: Digest::of(name.to_string().as_bytes()) }
    }

    fn hear(&mut self, standing: &Standing) {
        let status = &mut self.status;
        status.fragments = standing.fragments.iter().copied().map(Some).collect();
        status.outstanding.retain(|receipt| standing.settled.iter().all(|(number, _)| *number != receipt.number));
        let seen = status.leases_seen;
        for (number, ranges) in standing.leases.iter().filter(|(number, _)| *number > seen) {
            self.leases.insert(ranges);
            status.leases_seen = *number;
        }
    }

    /// What it says after another round of training.
    fn report(&mut self) -> Status {
        self.status.vitals.steps += STEPS;
        if self.contributes && self.leases.len() >= SAMPLES {
            let receipt = self.contribute();
            self.status.outstanding.push(receipt);
        }
        self.status.number += 1;
        self.status.unspent = self.leases.len();
        self.status.clone()
    }

    fn contribute(&mut self) -> Receipt {
        let base = self.status.fragments[FRAGMENT.index()].map_or(0, |(version, _)| version);
        Receipt {
            number: self.status.number,
            fragment: FRAGMENT,
            base,
            steps: STEPS,
            tokens: SAMPLES * CONTEXT,
            norm: 1.0,
            payload: self.payload,
            bytes: 0,
            ranges: self.leases.take_first(SAMPLES),
        }
    }
}

// ---- the coordinator ----

/// A coordinator with sites that contribute to every round, and others that are there and do not.
pub(super) struct Fleet {
    machine: Coordinator,
    sites: BTreeMap<SiteId, Islet>,
    now: Time,
}

impl Fleet {
    /// All have joined and are about to contribute for the first time.
    pub(super) fn new(model: &mut Model, contributing: usize, idle: usize) -> Result<Self> {
        let lens: Vec<usize> = model.global.theta.iter().map(Vec::len).collect();
        let mut sites = BTreeMap::new();
        for index in 0..contributing + idle {
            let name: SiteId = format!("site-{index:04}").parse()?;
            let islet = Islet::new(&name, lens.len(), index < contributing);
            sites.insert(name, islet);
        }
        let (up, down) = plan::THINNEST;
        let (up, down) = (Setting::Is(up), Setting::Is(down));
        let sync = Sync { quorum: contributing, up, down, ..Sync::default() };
        let machine = Coordinator::new(sync, Goal::default(), book(model, sites.keys())?, lens);
        let mut fleet = Self { machine, sites, now: Time(1_000_000) };
        // With the first report a site joins, with the second it says which weights it has been told of.
        let mut cost = Cost::default();
        let names: Vec<SiteId> = fleet.sites.keys().cloned().collect();
        for name in &names {
            let status = fleet.sites.get_mut(name).map(Islet::report);
            fleet.handle(
                Event::Heard(name.clone(), Box::new(status.context("every site has a status")?)),
                model,
                &mut cost,
            )?;
        }
        Ok(fleet)
    }

    /// Every site reports once, contributions come in one after the other, and are merged.
    pub(super) fn round(&mut self, model: &mut Model) -> Result<Cost> {
        let (mut cost, began) = (Cost::default(), Instant::now());
        let before = self.version();
        self.now = self.now.after(ROUND_SECONDS);
        let reports: Vec<(SiteId, Status)> =
            self.sites.iter_mut().map(|(name, islet)| (name.clone(), islet.report())).collect();
        for (name, status) in reports {
            self.handle(Event::Heard(name, Box::new(status)), model, &mut cost)?;
        }
        let contributing = self.sites.iter().filter(|(_, islet)| islet.contributes);
        let sent: Vec<(SiteId, Digest)> = contributing.map(|(name, islet)| (name.clone(), islet.payload)).collect();
        for (index, (name, payload)) in sent.into_iter().enumerate() {
            let seen = timed(&mut cost.payloads, || model.look_at(index))?;
            self.handle(Event::Arrived(name, payload, seen), model, &mut cost)?;
        }
        cost.wall = began.elapsed().as_secs_f64();
        ensure!(self.version() == before + 1, "the round was not merged: {:?}", self.machine.waiting(self.now, 0));
        Ok(cost)
    }

    fn version(&self) -> u64 {
        self.machine.book().fragments[FRAGMENT.index()].version
    }

    fn handle(&mut self, event: Event, model: &mut Model, cost: &mut Cost) -> Result<()> {
        let orders = timed(&mut cost.machine, || self.machine.handle(self.now, event));
        for order in orders {
            match order {
                Order::Tell(site, standing) => {
                    let islet = self.sites.get_mut(&site).context("only sites are told")?;
                    islet.hear(&standing);
                }
                Order::Merge(merge) => {
                    let merged = timed(&mut cost.step, || model.perform(&merge))?;
                    self.handle(Event::Merged(merged), model, cost)?;
                }
                Order::Record(Entry::Refused { why, .. }) | Order::Halt(why) => bail!("a round went wrong: {why}"),
                Order::Record(_) | Order::Push(..) | Order::Forget(_) => {}
            }
        }
        Ok(())
    }
}

/// The book of a run that has begun and let these sites in.
fn book<'a>(model: &Model, sites: impl Iterator<Item = &'a SiteId>) -> Result<Book> {
    let mut book = Book::default();
    book.apply(&Entry::Began {
        run: "scale".to_string(),
        seed: 1,
        context: CONTEXT,
        layout: model.global.manifest().fingerprint(),
        theta: model.digests.clone(),
    })?;
    for site in sites {
        let key = Digest::of(site.to_string().as_bytes());
        book.apply(&Entry::Admitted { site: site.clone(), key, ticket: key, role: Role::Train })?;
    }
    Ok(book)
}

#[cfg(test)]
mod tests {
    use super::*;
    use atoll_core::model::{Tensor, TensorKind};

    #[test]
    fn those_who_contribute_are_merged_and_those_who_do_not_are_not_waited_for() -> Result<()> {
        let tensors = (0..4).map(|index| Tensor::new(format!("t{index}"), &[64, 96], TensorKind::Matrix));
        let mut model = Model::new(Manifest::balanced(tensors.collect(), 4))?;
        let mut fleet = Fleet::new(&mut model, 11, 5)?;
        for rounds in 1..=3 {
            let cost = fleet.round(&mut model)?;
            assert!(cost.payloads > 0.0 && cost.step > 0.0 && cost.machine > 0.0);
            let book = fleet.machine.book();
            assert_eq!(fleet.version(), rounds);
            assert_eq!(book.tokens, 11 * rounds * SAMPLES * CONTEXT);
            let counts: Vec<u64> = book.sites.values().map(|member| member.contributions).collect();
            assert_eq!(counts, [vec![rounds; 11], vec![0; 5]].concat());
        }
        Ok(())
    }
}
