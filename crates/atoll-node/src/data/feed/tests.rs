use std::sync::Arc;

use super::*;
use crate::data::{IngestOptions, Sample, Source, Tokenizer, ingest};

const CONTEXT: usize = 16;

fn dataset() -> (tempfile::TempDir, Arc<Dataset>) {
    let folder = tempfile::tempdir().unwrap();
    let mut sample = Sample::default();
    for n in 0..40 {
        let text = format!("Island {n} trains on {} tokens of its own text. ", n * n).repeat(3);
        sample.push(&text);
        std::fs::write(folder.path().join(format!("{n}.txt")), text).unwrap();
    }
    let tokenizer = Tokenizer::train(&sample, 280).unwrap();
    let source = Source::open(folder.path()).unwrap();
    let options = IngestOptions::default();
    let dataset =
        ingest(&source, &tokenizer, &folder.path().join("out"), &options, &mut |_| std::ops::ControlFlow::Continue(()))
            .unwrap();
    (folder, Arc::new(dataset))
}

fn feed(dataset: &Arc<Dataset>, seed: u64) -> (Leases, LeasedFeed) {
    let leases = Leases::new();
    let feed = LeasedFeed::new(Arc::clone(dataset), leases.clone(), seed, CONTEXT).unwrap();
    (leases, feed)
}

/// The rows that a feed gives for a grant, by whatever batch sizes.
fn rows(feed: &mut LeasedFeed, leases: &Leases, grant: (u64, u64), sizes: &[usize]) -> Vec<Vec<u32>> {
    leases.grant(&Ranges::span(grant.0, grant.1));
    let mut batch = Batch::default();
    let mut rows = Vec::new();
    for &size in sizes.iter().cycle() {
        let size = size.min(leases.available() as usize);
        if size == 0 {
            return rows;
        }
        feed.next(size, &mut batch).unwrap();
        assert_eq!((batch.rows, batch.length, batch.tokens.len()), (size, CONTEXT, size * (CONTEXT + 1)));
        rows.extend(batch.tokens.chunks(CONTEXT + 1).map(<[u32]>::to_vec));
    }
    rows
}

#[test]
fn an_epoch_gives_every_sample_once_and_the_next_in_another_order() {
    let (_folder, dataset) = dataset();
    let samples = dataset.samples(CONTEXT);
    let (leases, mut feed) = feed(&dataset, 7);
    let first = rows(&mut feed, &leases, (0, samples), &[3, 1, 8]);
    let second = rows(&mut feed, &leases, (samples, 2 * samples), &[5]);
    let window = |index| {
        let mut tokens = Vec::new();
        dataset.window(Split::Train, index, CONTEXT, &mut tokens).unwrap();
        tokens
    };
    let mut expected: Vec<_> = (0..samples).map(window).collect();
    expected.sort();
    assert_ne!(first, second);
    for mut epoch in [first, second] {
        epoch.sort();
        assert_eq!(epoch, expected);
    }
    assert_eq!(leases.take_trained(), Ranges::span(0, 2 * samples));
    assert!(leases.take_trained().is_empty());
}

#[test]
fn two_sites_agree_on_every_position() {
    let (_folder, dataset) = dataset();
    let samples = dataset.samples(CONTEXT);
    let (leases, mut whole) = feed(&dataset, 7);
    let all = rows(&mut whole, &leases, (0, 2 * samples), &[4]);
    let ((leases_a, mut a), (leases_b, mut b)) = (feed(&dataset, 7), feed(&dataset, 7));
    let middle = samples / 2 + 3;
    let late = rows(&mut b, &leases_b, (middle, 2 * samples), &[1, 6]);
    let early = rows(&mut a, &leases_a, (0, middle), &[2]);
    assert_eq!([early, late].concat(), all);
    let (leases, mut other) = feed(&dataset, 8);
    assert_ne!(rows(&mut other, &leases, (0, 2 * samples), &[4]), all);
}

#[test]
fn a_starved_feed_consumes_nothing() {
    let (_folder, dataset) = dataset();
    let (leases, mut feed) = feed(&dataset, 7);
    let mut batch = Batch::default();
    assert_eq!(feed.next(1, &mut batch), Err(EngineError::Starved { wanted: 1 }));
    leases.grant(&Ranges::from(vec![(0, 2), (10, 11)]));
    leases.set_progress(0.25);
    assert_eq!(feed.next(4, &mut batch), Err(EngineError::Starved { wanted: 4 }));
    assert_eq!(leases.available(), 3);
    assert!(leases.take_trained().is_empty());
    feed.next(3, &mut batch).unwrap();
    assert_eq!(batch.progress, 0.25);
    assert_eq!(leases.take_trained(), Ranges::from(vec![(0, 2), (10, 11)]));
}

#[test]
fn cleared_leases_are_not_trained() {
    let (_folder, dataset) = dataset();
    let (leases, mut feed) = feed(&dataset, 7);
    leases.grant(&Ranges::span(0, 10));
    feed.next(4, &mut Batch::default()).unwrap();
    leases.clear();
    assert_eq!(leases.available(), 0);
    assert_eq!(leases.take_trained(), Ranges::span(0, 4));
}

#[test]
fn batches_reuse_their_memory() {
    let (_folder, dataset) = dataset();
    let (leases, mut feed) = feed(&dataset, 7);
    leases.grant(&Ranges::span(0, 100));
    let mut batch = Batch::default();
    feed.next(8, &mut batch).unwrap();
    let places = |batch: &Batch, feed: &LeasedFeed| (batch.tokens.as_ptr(), feed.positions.as_ptr());
    let first = places(&batch, &feed);
    for _ in 0..5 {
        feed.next(8, &mut batch).unwrap();
        assert_eq!(places(&batch, &feed), first);
    }
}

#[test]
fn too_little_text_for_one_window_is_refused() {
    let (_folder, dataset) = dataset();
    let error = LeasedFeed::new(dataset, Leases::new(), 7, 1 << 20).unwrap_err().to_string();
    assert!(error.contains("fewer than one window of 1048576 + 1\nhint: bring more text"), "{error}");
}
