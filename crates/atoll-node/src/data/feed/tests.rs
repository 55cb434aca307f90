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
    packed_feed(dataset, seed, Packing::Stream)
}

fn packed_feed(dataset: &Arc<Dataset>, seed: u64, packing: Packing) -> (Leases, LeasedFeed) {
    let leases = Leases::new();
    let feed = LeasedFeed::new(Arc::clone(dataset), leases.clone(), seed, CONTEXT, packing).unwrap();
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

/// One epoch of packed batches, of several sizes.
fn epoch(dataset: &Arc<Dataset>, packing: Packing) -> Vec<Batch> {
    let (leases, mut feed) = packed_feed(dataset, 7, packing);
    leases.grant(&Ranges::span(0, dataset.samples(CONTEXT)));
    let mut batches = Vec::new();
    for size in [5, 1, 8].into_iter().cycle() {
        let mut batch = batches.last().cloned().unwrap_or_default();
        let size = size.min(leases.available() as usize);
        if size == 0 {
            break;
        }
        feed.next(size, &mut batch).unwrap();
        batches.push(batch);
    }
    batches
}

/// Asserts of each token what `starts` promises: it sees a run of its own document that reaches back to
/// the document's beginning or the row's.
fn check_starts(row: &[u32], starts: &[u32], end_of_text: u32) {
    assert_eq!(starts.len(), CONTEXT);
    for (position, &start) in starts.iter().enumerate() {
        let start = start as usize;
        assert!(start <= position);
        assert!(!row[start..position].contains(&end_of_text), "{row:?} {starts:?} sees another document");
        assert!(start == 0 || row[start - 1] == end_of_text, "{row:?} {starts:?} misses its document's start");
    }
}

#[test]
fn a_token_sees_its_own_document_only() {
    let (_folder, dataset) = dataset();
    let end_of_text = dataset.end_of_text();
    let mut documents = 0;
    for batch in epoch(&dataset, Packing::Documents) {
        for (row, starts) in batch.tokens.chunks(CONTEXT + 1).zip(batch.starts.chunks(CONTEXT)) {
            check_starts(row, starts, end_of_text);
        }
        assert_eq!(batch.starts.len(), batch.rows * batch.length);
        documents += batch.starts.iter().zip(0..).filter(|&(&start, at)| start > 0 && start == at % 16).count();
    }
    // Every document but the first begins behind another's end; only a row's first token does not show it.
    let all = dataset.documents(Split::Train) as usize;
    assert!(documents > all / 2 && documents < all, "{documents} of {all}");
}

#[test]
fn packing_changes_nothing_but_what_is_seen() {
    let (_folder, dataset) = dataset();
    let (stream, documents) = (epoch(&dataset, Packing::Stream), epoch(&dataset, Packing::Documents));
    assert!(stream.iter().all(|batch| batch.starts.is_empty()));
    assert!(stream.iter().map(|batch| &batch.tokens).eq(documents.iter().map(|batch| &batch.tokens)));
}

#[test]
fn batches_reuse_their_memory() {
    let (_folder, dataset) = dataset();
    let (leases, mut feed) = packed_feed(&dataset, 7, Packing::Documents);
    leases.grant(&Ranges::span(0, 100));
    let mut batch = Batch::default();
    feed.next(8, &mut batch).unwrap();
    let places =
        |batch: &Batch, feed: &LeasedFeed| (batch.tokens.as_ptr(), batch.starts.as_ptr(), feed.positions.as_ptr());
    let first = places(&batch, &feed);
    for _ in 0..5 {
        feed.next(8, &mut batch).unwrap();
        assert_eq!(places(&batch, &feed), first);
    }
}

#[test]
fn too_little_text_for_one_window_is_refused() {
    let (_folder, dataset) = dataset();
    let error = LeasedFeed::new(dataset, Leases::new(), 7, 1 << 20, Packing::Stream).unwrap_err().to_string();
    assert!(error.contains("fewer than one window of 1048576 + 1\nhint: bring more text"), "{error}");
}
