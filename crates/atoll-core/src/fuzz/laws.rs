//! The laws of this crate's decoders.

use std::fmt::{Debug, Display};
use std::str::FromStr;

use crate::codec::{self, Codec, CodecError, Payload, Squares};
use crate::data::{DatasetId, Ranges};
use crate::engine::Progress;
use crate::hash::Digest;
use crate::journal::{Accepted, Book, Chain, Commit, Entry, Evaluated, Invitation, Notice, Role, Settled};
use crate::manifest::FragmentId;
use crate::outer::{Averaging, Guard, OuterRule, Recipe};
use crate::rng::Rng;
use crate::round::{
    Coordinator, Event, Goal, Merged, Order, Phase, Receipt, Seen, Site, SiteEvent, SiteSettings, Standing, Status,
    Sync, Vitals,
};
use crate::site::{SiteId, Time};
use crate::team::Alone;
use crate::wire::{Answer, Frame, HEADER, Hello, Purpose, Request, Welcome, WireError};

// ---- payloads ----

const COUNTS: [usize; 5] = [0, 7, 64, 300, 5000];

/// A payload is refused, or all of its readings are finite and say the same.
pub(super) fn payload(bytes: &[u8]) {
    for count in COUNTS {
        match Payload::check(bytes, count, &Alone) {
            Ok(payload) => read(&payload, count),
            Err(error) => assert!(!error.to_string().is_empty()),
        }
        // An outer step reads what was checked before; a file may have changed meanwhile.
        if let Ok(unchecked) = Payload::parse(bytes, count) {
            unchecked.values(&Alone);
            unchecked.silence(&mut vec![1.0; count]);
            unchecked.visit(0..count, |place, _| assert!(place < count));
        }
    }
    match Payload::check_any(bytes, &COUNTS, &Alone) {
        Ok(payload) => assert!(COUNTS.contains(&payload.count())),
        Err(CodecError::Foreign { found }) => assert!(!COUNTS.contains(&found)),
        Err(_) => COUNTS.iter().for_each(|&count| assert!(codec::decode(bytes, count).is_err())),
    }
}

fn read(payload: &Payload<'_>, count: usize) {
    let values = payload.values(&Alone);
    assert!(values.len() == count && values.iter().all(|value| value.is_finite()));
    let (mut visited, mut sums) = (vec![0.0; count], vec![0.0; count]);
    payload.visit(0..count, |place, value| visited[place] = value);
    payload.add_to(&mut sums, &Alone);
    assert_eq!((&visited, &sums), (&values, &values));
    let seen = Seen::of(payload, &Alone);
    assert!(seen.norm.is_finite() && seen.norm >= 0.0 && seen.weights == count);
    let again = payload.codec().encode(&values).expect("finite values can be encoded");
    assert_eq!(again.len(), payload.codec().payload_len(count));
}

pub(super) fn payloads() -> Vec<Vec<u8>> {
    let mut rng = Rng::new(1);
    let mut values = COUNTS.map(|count| (0..count).map(|_| rng.normal() as f32).collect::<Vec<f32>>()).to_vec();
    // Of which a codec may speak in part only.
    values.push((0..5000).map(|at| if at / 128 % 11 == 2 { rng.normal() as f32 } else { 0.0 }).collect());
    let encode = |codec: Codec| values.iter().filter_map(move |values| codec.encode(values).ok()).collect::<Vec<_>>();
    let payloads: Vec<Vec<u8>> = Codec::ALL.into_iter().flat_map(encode).collect();
    assert!(payloads.iter().any(|payload| payload[0] == 6 && payload.get(7..9) == Some(&[0xff; 2])), "none is uneven");
    payloads
}

// ---- frames ----

/// What comes over a connection is frames, or is refused before anything is allocated for it. A frame can be said again
/// and means the same.
pub(super) fn frame(bytes: &[u8]) {
    let mut rest = bytes;
    while let Some((header, body)) = rest.split_first_chunk::<HEADER>() {
        let Ok((length, kind)) = Frame::header(*header) else { return };
        let body = &body[..length.min(body.len())];
        match Frame::decode(kind, body) {
            Ok(frame) => {
                let (said, again) = (format!("{frame:?}"), frame.encode());
                // NaN equals nothing, so what frames look like is compared.
                let meant = Frame::decode(kind, &again[HEADER..]).map(|frame| format!("{frame:?}"));
                assert_eq!(meant, Ok(said));
            }
            Err(error) => assert!(error != WireError::TooLong(length)),
        }
        rest = &rest[HEADER + body.len()..];
    }
}

pub(super) fn frames() -> Vec<Vec<u8>> {
    let digest = Digest::of(b"x");
    let hello = Hello {
        purpose: Purpose::Control,
        secret: Some([7; 32]),
        successor: None,
        layout: Some(digest),
        engine: "e".into(),
        device: "d".into(),
    };
    let welcome = Welcome {
        run: "r".into(),
        site: "s".parse().expect("a good name"),
        config: "{}".into(),
        layout: digest,
        tokenizer: digest,
        tokenizer_bytes: 1 << 40,
        session: 9,
        epoch: 2,
        keys: vec![digest; 2],
    };
    let frames = [
        Frame::hello(hello),
        Frame::Welcome(Box::new(welcome)),
        Frame::Refused("no".into()),
        Frame::Status(Box::new(a_status())),
        Frame::Standing(Box::new(a_standing())),
        Frame::Put { digest, total: 10, offset: 3, bytes: vec![1, 2] },
        Frame::Have(digest),
        Frame::Get { digest, offset: 1 << 33, length: 5 },
        Frame::Chunk { digest, offset: 0, bytes: vec![1; 9] },
        Frame::Missing(digest),
    ];
    let site: SiteId = "s".parse().expect("a good name");
    let invitation = Invitation { site: site.clone(), role: Role::default(), expires: Some(1 << 31) };
    let requests = [Request::Look, Request::Model, Request::Invite(digest, invitation), Request::Revoke(site)];
    let answers =
        [Answer::Report("{}".into()), Answer::Model(vec![digest; 2]), Answer::Done, Answer::Refused("no".into())];
    let frames = frames.into_iter().chain(requests.map(Frame::Ask)).chain(answers.map(Frame::Answer));
    frames.map(|frame| frame.encode()).collect()
}

#[test]
fn there_is_a_seed_of_every_kind_of_frame() {
    let kinds: std::collections::BTreeSet<u8> = frames().iter().map(|frame| frame[HEADER - 1]).collect();
    let known = (0..=u8::MAX).filter(|&kind| Frame::decode(kind, &[]) != Err(WireError::UnknownKind(kind)));
    assert_eq!(kinds, known.collect());
}

// ---- what the machines are told ----

const LENS: [usize; 2] = [64, 7];

/// Whatever a site says, the coordinator stays sound: no sample is lost or counted twice, and its book follows from
/// its journal.
pub(super) fn status(bytes: &[u8]) {
    let Ok(Frame::Status(status)) = Frame::decode(4, bytes) else { return };
    let (mut machine, mut book) = (coordinator(), began());
    let liar: SiteId = "liar".parse().expect("a good name");
    let mut now = Time(1_000_000);
    let mut events = vec![Event::Heard(liar.clone(), Box::new(a_status()))];
    let payloads = status.outstanding.iter().map(|receipt| receipt.payload);
    let seen = Seen { weights: 64, norm: 1.0, squares: Squares::default() };
    let arrivals = payloads.map(|payload| Event::Arrived(liar.clone(), payload, seen.clone()));
    events.push(Event::Heard(liar.clone(), status.clone()));
    events.extend(arrivals.take(100));
    events.push(Event::Heard(liar, status));
    events.push(Event::Tick);
    while let Some(event) = (!events.is_empty()).then(|| events.remove(0)) {
        now = now.after(1.0);
        for order in machine.handle(now, event) {
            match order {
                Order::Record(entry) => assert_eq!(book.apply(&entry), Ok(())),
                Order::Halt(why) => panic!("{why}"),
                Order::Merge(merge) => {
                    let (fragment, delta) = (merge.fragment, Digest::of(b"delta"));
                    let merged = Merged { fragment, delta, bytes: 1, digest: delta, measures: Default::default() };
                    events.insert(0, Event::Merged(merged));
                }
                Order::Tell(..) | Order::Push(..) | Order::Forget(_) => {}
            }
        }
        machine.wake_at(now);
        assert_eq!(machine.book().ledger.verify(), Ok(()));
        assert_eq!(machine.book(), &book);
    }
}

fn began() -> Book {
    let mut book = Book::default();
    for name in ["honest", "liar"] {
        let digest = Digest::of(name.as_bytes());
        let site: SiteId = name.parse().expect("a good name");
        if book.entries == 0 {
            let began =
                Entry::Began { run: "r".into(), seed: 1, context: 4, layout: digest, theta: vec![digest; LENS.len()] };
            book.apply(&began).expect("the first entry");
        }
        book.apply(&Entry::Admitted { site, key: digest, ticket: digest, role: Role::Train }).expect("a new site");
    }
    book
}

fn coordinator() -> Coordinator {
    Coordinator::new(Sync::default(), Goal { tokens: Some(1000), minutes: None }, began(), LENS.to_vec())
}

fn a_status() -> Status {
    let receipt = Receipt {
        number: 1,
        fragment: FragmentId(0),
        base: 0,
        steps: 2,
        tokens: 16,
        norm: 1.0,
        payload: Digest::of(b"payload"),
        bytes: 261,
        ranges: Ranges::span(0, 4),
    };
    let second = Receipt { number: 2, fragment: FragmentId(1), ranges: Ranges::span(6, 9), ..receipt.clone() };
    let digest = Digest::of(b"honest");
    Status {
        session: 1,
        number: 3,
        dataset: DatasetId(digest),
        samples: 1000,
        fragments: vec![Some((0, digest)), None],
        due: vec![Some(4), None],
        outstanding: vec![receipt, second],
        leases_seen: 0,
        unspent: 3,
        wants: 100,
        evaluation: Some((1, Evaluated { commits: 1, nats: 1.0, tokens: 1, bytes: 1 })),
        drained: false,
        leaving: false,
        vitals: Vitals { steps: 10, tokens: 80, loss: 2.0, step_seconds: 0.1, ..Vitals::default() },
    }
}

pub(super) fn statuses() -> Vec<Vec<u8>> {
    let leaving = Status { leaving: true, session: 2, ..a_status() };
    let empty = Status { outstanding: Vec::new(), fragments: Vec::new(), due: Vec::new(), ..a_status() };
    [a_status(), leaving, empty].map(|status| Frame::Status(Box::new(status)).encode()[HEADER..].to_vec()).to_vec()
}

/// Whatever a coordinator says, a site stays sound: it says something that can be sent, and goes on.
pub(super) fn standing(bytes: &[u8]) {
    let Ok(Frame::Standing(standing)) = Frame::decode(5, bytes) else { return };
    let digest = Digest::of(b"honest");
    let mut site = Site::new(SiteSettings {
        fragment_lens: LENS.to_vec(),
        dataset: DatasetId(digest),
        samples: 1000,
        samples_per_step: 2,
        session: 1,
        begun: vec![None, Some((1, digest))],
    });
    let progress = Progress { steps: 1, tokens: 8, loss: 1.0 };
    let stepped = SiteEvent::Stepped { progress, trained: Ranges::span(0, 2), seconds: 0.1 };
    let applied =
        |index: u16| SiteEvent::Applied { fragment: FragmentId(index), version: 1, digest, overwritten: true };
    let contributed = |index: u16| SiteEvent::Contributed {
        fragment: FragmentId(index),
        payload: digest,
        bytes: 1,
        norm: 1.0,
        agreement: 0.0,
    };
    let heard = SiteEvent::Standing(standing);
    let events = [
        SiteEvent::Connected,
        SiteEvent::Standing(Box::new(a_standing())),
        SiteEvent::Fetched(digest, true),
        applied(0),
        applied(1),
        stepped,
        contributed(0),
        contributed(1),
        heard.clone(),
        SiteEvent::Uploaded(digest, true),
        SiteEvent::Fetched(digest, false),
        heard,
        SiteEvent::Tick,
    ];
    for (event, second) in events.into_iter().zip(1..) {
        site.handle(Time(second * 1_000_000), event);
        site.state();
    }
}

fn a_standing() -> Standing {
    let digest = Digest::of(b"honest");
    let notice = Notice { fragment: FragmentId(0), version: 2, delta: digest, bytes: 10, digest };
    Standing {
        number: 1,
        session: 1,
        open: true,
        heard: 1,
        phase: Phase::Training,
        progress: 0.5,
        steps: 4,
        up: Codec::Sparse(96),
        fragments: vec![(1, digest), (1, digest)],
        notices: vec![notice],
        pushed: vec![2, 0],
        settled: vec![(1, Settled::Committed(2)), (2, Settled::Refused("no".into()))],
        wanted: vec![1],
        leases: vec![(1, Ranges::span(0, 100))],
        evaluate: Some(1),
        delivered: vec![None, Some(digest)],
        successor: None,
    }
}

pub(super) fn standings() -> Vec<Vec<u8>> {
    let later = Standing { number: 2, fragments: vec![(2, Digest::default()), (1, Digest::default())], ..a_standing() };
    let closed = Standing { number: 3, open: false, ..a_standing() };
    let closing = Standing { number: 4, phase: Phase::Closing, ..a_standing() };
    [a_standing(), later, closed, closing]
        .map(|standing| Frame::Standing(Box::new(standing)).encode()[HEADER..].to_vec())
        .to_vec()
}

// ---- the journal ----

/// A line is the next one of its journal or is refused, and an entry follows from the book or leaves its ledger sound.
pub(super) fn journal(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let (mut chain, mut book) = (Chain::default(), Book::default());
    for line in text.lines() {
        let before = chain;
        if chain.read(line).is_err() {
            assert_eq!(chain, before, "a refused line leaves no trace");
        }
        chain = before;
        let Ok(entry) = chain.read(&before.seal(line)) else { continue };
        // What is read is written again as the same entry, NaN and spaces aside.
        let written = Chain::default().write(&entry);
        assert_eq!(Chain::default().read(&written).as_ref(), Ok(&entry));
        if book.apply(&entry).is_err() {
            return;
        }
        assert_eq!(book.ledger.verify(), Ok(()));
    }
    assert_eq!(book.commits(), book.fragments.iter().map(|fragment| fragment.version).sum::<u64>());
}

pub(super) fn journals() -> Vec<Vec<u8>> {
    let site: SiteId = "oslo".parse().expect("a good name");
    let digest = Digest::of(b"x");
    let accepted = Accepted {
        site: site.clone(),
        number: 1,
        payload: digest,
        base: 0,
        steps: 2,
        tokens: 16,
        weight: 128.0,
        norm: 1.0,
        trust: 0.0,
        quality: 0.0,
        ranges: Ranges::span(0, 4),
    };
    let recipe = Recipe {
        merge: Averaging::Radial,
        rule: OuterRule::default(),
        codec: Codec::Sparse(224),
        share: 1.0,
        guard: Guard::default(),
    };
    let commit = Commit {
        fragment: FragmentId(1),
        version: 1,
        contributions: vec![accepted],
        recipe,
        delta: digest,
        bytes: 10,
        digest,
        agreements: vec![Some(0.5)],
        seconds: 1.5,
    };
    let refused = Entry::Refused {
        site: site.clone(),
        number: 2,
        fragment: FragmentId(0),
        ranges: Ranges::span(6, 8),
        why: "no".into(),
    };
    let invitation = Invitation { site: site.clone(), role: Role::Train, expires: Some(7) };
    let entries = [
        Entry::Began { run: "r".into(), seed: 1, context: 4, layout: digest, theta: vec![digest; 2] },
        Entry::Leads { epoch: 1, holder: digest },
        Entry::Invited { ticket: digest, invitation, by: None },
        Entry::Admitted { site: site.clone(), key: digest, ticket: digest, role: Role::Train },
        Entry::Joined { site: site.clone(), session: 1, dataset: DatasetId(digest), samples: 100 },
        Entry::Leased { site: site.clone(), number: 1, ranges: Ranges::span(0, 10) },
        Entry::Committed(commit),
        refused,
        Entry::Evaluated(Evaluated { commits: 1, nats: 1.0, tokens: 1, bytes: 1 }),
        Entry::Returned { site: site.clone(), why: "gone".into() },
        Entry::RolledBack { from: 3, to: 1, journal: digest, sessions: [(site.clone(), 2)].into() },
        Entry::Rekeyed { site: site.clone(), from: digest, to: Digest::of(b"new") },
        Entry::Withdrawn { site: site.clone(), by: None },
        Entry::Revoked { site, key: Digest::of(b"new"), by: Some("admin".parse().expect("a good name")) },
        Entry::Succession { key: Digest::of(b"next") },
        Entry::Finished,
    ];
    let lines: Vec<String> =
        entries.iter().map(|entry| serde_json::to_string(entry).expect("entries are plain data")).collect();
    (3..=lines.len()).map(|count| lines[..count].join("\n").into_bytes()).collect()
}

// ---- names ----

/// What is read as a name is written as the same name.
pub(super) fn name(bytes: &[u8]) {
    fn again<T: FromStr<Err: Display> + Display + PartialEq + Debug>(text: &str) {
        match text.parse::<T>() {
            Ok(name) => assert_eq!(name.to_string().parse::<T>().ok(), Some(name)),
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    }
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    again::<SiteId>(text);
    again::<Codec>(text);
    again::<Digest>(text);
}

pub(super) fn names() -> Vec<Vec<u8>> {
    let digest = Digest::of(b"x").to_string();
    ["lisbon-a100", "f32", "sparse:96", &digest].map(|name| name.as_bytes().to_vec()).to_vec()
}
