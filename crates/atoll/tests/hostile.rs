//! A site that lies, before a real coordinator and beside a real site: it speaks the real protocol over real TLS, and
//! whatever it contributes is wrong in its own way. What the machines make of each lie is told by the core's tests; here
//! it has to come all the way from the wire to the operator and back to the liar.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use atoll_core::codec::Codec;
use atoll_core::data::{DatasetId, Ranges};
use atoll_core::hash::Digest;
use atoll_core::journal::{Book, Entry, Settled};
use atoll_core::manifest::FragmentId;
use atoll_core::round::{Receipt, Standing, Status, Vitals};
use atoll_core::wire::{CHUNK, Frame, Purpose};
use atoll_node::identity::{Identity, Ticket};
use atoll_node::link::{Dialer, Link, read_frame, write_frame};
use atoll_node::report::Report;
use atoll_node::run::Terms;
use common::{Lab, atoll, entries, greet, text, wait};

// ---- what it says ----

/// A contribution to fragment 0 as it goes out: the receipt, the payload, and the bytes that the payload is said to have.
struct Parcel {
    receipt: Receipt,
    payload: Vec<u8>,
    total: u64,
}

impl Parcel {
    /// Puts another payload in, under its own right name.
    fn hold(&mut self, payload: Vec<u8>) {
        self.receipt.payload = Digest::of(&payload);
        (self.receipt.bytes, self.total) = (payload.len() as u64, payload.len() as u64);
        self.payload = payload;
    }

    /// Overwrites some bytes of the payload; behind a header of five come the weights as `f32`.
    fn overwrite(&mut self, at: usize, bytes: &[u8]) {
        let mut payload = self.payload.clone();
        payload[at..at + bytes.len()].copy_from_slice(bytes);
        self.hold(payload);
    }
}

/// What is done to a contribution, and what site and operator read of it.
type Lie = (fn(&mut Parcel), &'static str);

const LIES: [Lie; 10] = [
    (|parcel| parcel.overwrite(0, &[9]), "codec 9 is unknown"),
    (|parcel| parcel.hold(parcel.payload[..200].to_vec()), "the payload has 200 bytes, expected "),
    (|parcel| parcel.hold(Codec::F32.encode(&[0.0; 3]).unwrap()), "is for 3 values, and no fragment has so many"),
    (|parcel| parcel.total = u64::MAX, "no payload of this model has more than "),
    (|parcel| parcel.receipt.fragment = FragmentId(9), "there is no fragment 9"),
    (|parcel| parcel.receipt.base = 1 << 40, "fragment 0 has no version 1099511627776 yet"),
    (|parcel| parcel.overwrite(5, &f32::NAN.to_le_bytes()), "not finite"),
    (|parcel| parcel.overwrite(5, &f32::NEG_INFINITY.to_le_bytes()), "not finite"),
    (|parcel| parcel.overwrite(5, &1e30f32.to_le_bytes()), "its length is 1.000e30, and "),
    (|parcel| parcel.payload[7] ^= 1, "not those that its name promises"),
];

// ---- who says it ----

/// A site without an engine.
struct Liar {
    dialer: Dialer,
    address: String,
    secret: [u8; 32],
    control: Link,
    status: Status,
    /// Leased samples.
    held: Ranges,
    /// Weights of fragment 0, and the tokens of a sample.
    len: usize,
    context: u64,
    contributions: u64,
}

impl Liar {
    /// Comes in with a ticket, and says that it has this dataset.
    async fn join(lab: &Lab, name: &str, dataset: DatasetId, samples: u64) -> Self {
        let ticket = Ticket::from_text(&lab.ticket(name)).unwrap();
        let identity = Identity::load_or_create(&PathBuf::from(lab.path(&format!("{name}.key")))).unwrap();
        let dialer = Dialer::new(&identity, ticket.coordinator).unwrap();
        let (address, secret) = (lab.listen(), ticket.secret.0);
        let (control, terms) = enter(&dialer, &address, secret, Purpose::Control).await;
        let manifest = terms.config.manifest(&terms.model);
        let status = Status {
            session: 1,
            number: 0,
            dataset,
            samples,
            fragments: vec![None; manifest.fragments().count()],
            due: vec![Some(1); manifest.fragments().count()],
            outstanding: Vec::new(),
            leases_seen: 0,
            unspent: 0,
            wants: 64,
            evaluation: None,
            drained: false,
            leaving: false,
            vitals: Vitals { step_seconds: 0.1, loss: 1.0, ..Vitals::default() },
        };
        let (len, context) = (manifest.fragment_len(FragmentId(0)).unwrap(), terms.config.training.context as u64);
        Self { dialer, address, secret, control, status, held: Ranges::new(), len, context, contributions: 0 }
    }

    /// Says where it stands, as lively as any site and with the model up to date, and hears where the run stands.
    async fn talk(&mut self, outstanding: &[Receipt]) -> Standing {
        self.say(outstanding).await;
        let standing = loop {
            match read_frame(&mut self.control).await.unwrap() {
                Some(Frame::Standing(standing)) if standing.heard == self.status.number => break *standing,
                Some(Frame::Standing(_)) => {}
                other => panic!("{other:?}"),
            }
        };
        let seen = self.status.leases_seen;
        for (number, ranges) in standing.leases.iter().filter(|(number, _)| *number > seen) {
            self.held.insert(ranges);
            self.status.leases_seen = *number;
        }
        self.status.fragments = standing.fragments.iter().copied().map(Some).collect();
        standing
    }

    /// Leaves; nobody answers that.
    async fn leave(&mut self) {
        self.status.leaving = true;
        self.say(&[]).await;
    }

    async fn say(&mut self, outstanding: &[Receipt]) {
        self.status.number += 1;
        self.status.vitals.steps += 1;
        self.status.outstanding = outstanding.to_vec();
        self.status.unspent = self.held.len();
        write_frame(&mut self.control, &Frame::Status(Box::new(self.status.clone()))).await.unwrap();
    }

    /// Contributes a lie; returns its samples and what it is told.
    async fn contribute(&mut self, lie: fn(&mut Parcel)) -> (u64, Ranges, String) {
        let mut standing = self.talk(&[]).await;
        while self.held.len() < 4 {
            standing = self.talk(&[]).await;
        }
        let parcel = self.parcel(standing.fragments[0].0, lie);
        self.put(&parcel).await;
        let receipt = parcel.receipt;
        loop {
            let standing = self.talk(std::slice::from_ref(&receipt)).await;
            match standing.settled.into_iter().find(|(number, _)| *number == receipt.number) {
                Some((number, Settled::Refused(why))) => return (number, receipt.ranges, why),
                Some(other) => panic!("a lie is in the model: {other:?}"),
                None => tokio::time::sleep(std::time::Duration::from_millis(20)).await,
            }
        }
    }

    /// A contribution with which all is well but for the lie.
    fn parcel(&mut self, base: u64, lie: fn(&mut Parcel)) -> Parcel {
        self.contributions += 1;
        let ranges = self.held.take_first(4);
        // No two have the same name.
        let payload = Codec::F32.encode(&vec![1e-3 * self.contributions as f32; self.len]).unwrap();
        let receipt = Receipt {
            number: self.contributions,
            fragment: FragmentId(0),
            base,
            steps: 1,
            tokens: ranges.len() * self.context,
            norm: 1.0,
            payload: Digest::of(&payload),
            bytes: payload.len() as u64,
            ranges,
        };
        let mut parcel = Parcel { receipt, total: payload.len() as u64, payload };
        lie(&mut parcel);
        parcel
    }

    /// Sends a payload over a connection of its own, and waits until the coordinator has it or hangs up.
    async fn put(&self, Parcel { receipt, payload, total }: &Parcel) {
        let (mut link, _) = enter(&self.dialer, &self.address, self.secret, Purpose::Data).await;
        for (chunk, bytes) in payload.chunks(CHUNK).enumerate() {
            let (digest, offset) = (receipt.payload, (chunk * CHUNK) as u64);
            let frame = Frame::Put { digest, total: *total, offset, bytes: bytes.to_vec() };
            write_frame(&mut link, &frame).await.unwrap();
        }
        while let Ok(Some(frame)) = read_frame(&mut link).await {
            if frame == Frame::Have(receipt.payload) {
                return;
            }
        }
    }
}

async fn enter(dialer: &Dialer, address: &str, secret: [u8; 32], purpose: Purpose) -> (Link, Terms) {
    match greet(dialer, address, Some(secret), purpose).await {
        (link, Some(Frame::Welcome(welcome))) => (link, Terms::read(&welcome.config).unwrap()),
        (_, other) => panic!("{other:?}"),
    }
}

/// Comes in, is leased samples, and is gone with its last word, while the coordinator is still talking to it.
async fn run_away(lab: &Lab, name: &str) {
    let (dataset, samples) = dataset(&lab.run());
    let mut liar = Liar::join(lab, name, dataset, samples).await;
    while liar.held.is_empty() {
        liar.talk(&[]).await;
    }
    for _ in 0..8 {
        liar.say(&[]).await;
    }
    liar.leave().await;
}

// ---- what comes of it ----

/// The dataset of the first site that joined.
fn dataset(run: &Path) -> (DatasetId, u64) {
    let joined = |entry: &Entry| match entry {
        Entry::Joined { dataset, samples, .. } => Some((*dataset, *samples)),
        _ => None,
    };
    entries(run).iter().find_map(joined).unwrap()
}

/// Lies until there are no more lies, then stays for some commits, and leaves.
async fn visit(lab: &Lab) -> Vec<(u64, Ranges, String)> {
    let (dataset, samples) = dataset(&lab.run());
    let mut liar = Liar::join(lab, "liar", dataset, samples).await;
    let mut told = Vec::new();
    for (lie, reason) in LIES {
        let (number, ranges, why) = liar.contribute(lie).await;
        assert!(why.contains(reason), "{reason}: it is told {why:?}");
        told.push((number, ranges, why));
    }
    let commits = |standing: &Standing| standing.fragments.iter().map(|(version, _)| version).sum::<u64>();
    let before = commits(&liar.talk(&[]).await);
    while commits(&liar.talk(&[]).await) < before + 8 {
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    liar.leave().await;
    told
}

#[test]
fn every_lie_is_refused_and_told_and_the_run_reaches_its_goal() {
    let lab = Lab::new(1_000_000, &[]);
    let mut coordinator = lab.coordinate();
    let mut honest = lab.join("a", &lab.ticket("a"), &[]);
    lab.wait_for("a commit", |report| report.commits > 0);
    let _logs = Logs(&lab);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let told = runtime.block_on(visit(&lab));
    operator_sees(&lab, &told);
    let report = lab.finish(&mut coordinator);
    assert!(wait(&mut honest).success(), "{}", lab.log("a"));
    assert!(report.state == "finished" && report.tokens >= 1_000_000, "{report:?}");
    samples_went_back(&lab, &told);
    model_is_untouched(&lab, &report);
}

/// A connection that breaks while something is said to the site takes nothing with it that the site has said.
#[test]
fn who_leaves_without_listening_has_left() {
    let lab = Lab::new(1_000_000_000, &[]);
    let _coordinator = lab.coordinate();
    let _honest = lab.join("a", &lab.ticket("a"), &[]);
    lab.wait_for("a commit", |report| report.commits > 0);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let names: Vec<String> = (0..12).map(|number| format!("hasty-{number}")).collect();
    names.iter().for_each(|name| runtime.block_on(run_away(&lab, name)));
    let is_back = |entry: &Entry, name: &str| matches!(entry, Entry::Returned { site, .. } if site.to_string() == name);
    let back = || {
        let entries = entries(&lab.run());
        names.iter().filter(|name| entries.iter().any(|entry| is_back(entry, name))).count()
    };
    let began = std::time::Instant::now();
    // Far sooner than the patience with those who fall silent.
    while back() < names.len() && began.elapsed().as_secs() < 5 {
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    assert_eq!(back(), names.len(), "{}", lab.log("coordinator"));
}

/// What coordinator and site said, for whoever has to find out why the test fails.
struct Logs<'a>(&'a Lab);

impl Drop for Logs<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}\n{}", self.0.log("coordinator"), self.0.log("a"));
        }
    }
}

/// Every reason is in `events.jsonl`, the last one in `status.json` and in what `atoll status` prints.
fn operator_sees(lab: &Lab, told: &[(u64, Ranges, String)]) {
    let events = fs::read_to_string(lab.run().join("events.jsonl")).unwrap();
    let events: Vec<serde_json::Value> = events.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let refused: BTreeMap<u64, &str> = events
        .iter()
        .filter(|event| event["event"] == "refused" && event["site"] == "liar")
        .map(|event| (event["number"].as_u64().unwrap(), event["why"].as_str().unwrap()))
        .collect();
    assert_eq!(refused, told.iter().map(|(number, _, why)| (*number, why.as_str())).collect());
    let (_, _, last) = told.last().unwrap();
    let counted = told.len() as u64;
    lab.wait_for("the operator to see it", |report| {
        report.sites.iter().any(|site| site.name == "liar" && site.refused == counted && &site.refusal == last)
    });
    let printed = text(&atoll(&["status", &lab.path("run")]).stdout);
    assert!(printed.contains(&format!("{counted} contributions refused, the latest: {last}")), "{printed}");
}

/// With each refusal the samples are free again; in the end they are in the model by the honest site's work, or free for it.
fn samples_went_back(lab: &Lab, told: &[(u64, Ranges, String)]) {
    let told: BTreeMap<u64, &Ranges> = told.iter().map(|(number, ranges, _)| (*number, ranges)).collect();
    let (dataset, _) = dataset(&lab.run());
    let (mut book, mut refusals) = (Book::default(), 0);
    for entry in entries(&lab.run()) {
        book.apply(&entry).unwrap();
        assert_eq!(book.ledger.verify(), Ok(()));
        if let Entry::Refused { site, number, ranges, why, .. } = &entry {
            assert_eq!((site.to_string(), ranges), ("liar".to_string(), told[number]), "{why}");
            assert!(book.ledger.pool(dataset).unwrap().returned.contains(ranges));
            refusals += 1;
        }
    }
    assert_eq!(refusals, told.len());
    let pool = book.ledger.pool(dataset).unwrap();
    let honest = pool.held.iter().filter(|(site, _)| site.to_string() == "a").map(|(_, held)| held);
    let mut back = pool.consumed.clone();
    honest.chain([&pool.returned]).for_each(|ranges| back.insert(ranges));
    assert!(told.values().all(|ranges| back.contains(ranges)), "what was refused is anybody's to train on");
    assert!(!pool.held.keys().any(|site| site.to_string() == "liar"), "it has left and holds nothing");
}

/// Only the honest site's work is in the model, whose digests are those of its own copy and of the journal.
fn model_is_untouched(lab: &Lab, report: &Report) {
    let site = |name: &str| report.sites.iter().find(|site| site.name == name).unwrap();
    assert_eq!((site("liar").tokens, site("liar").contributions), (0, 0));
    assert_eq!((site("a").tokens, site("a").digest_mismatches, site("a").refused), (report.tokens, 0, 0));
    let contributors = |entry: &Entry| match entry {
        Entry::Committed(commit) => commit.contributions.iter().map(|accepted| accepted.site.to_string()).collect(),
        _ => Vec::new(),
    };
    assert!(entries(&lab.run()).iter().flat_map(contributors).all(|site| site == "a"));
    lab.replay();
}
