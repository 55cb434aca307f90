use std::ops::ControlFlow;
use std::path::PathBuf;

use super::*;
use crate::data::{Sample, is_dataset};

/// A folder with `text/` and room for datasets.
struct Place(tempfile::TempDir);

impl Place {
    fn new(documents: &[(&str, &str)]) -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        fs::create_dir(place.text()).unwrap();
        documents.iter().for_each(|(name, text)| fs::write(place.text().join(name), text).unwrap());
        place
    }

    fn numbered(count: usize) -> Self {
        let names: Vec<String> = (0..count).map(|n| format!("{n:03}.txt")).collect();
        let texts: Vec<String> = (0..count).map(document).collect();
        Self::new(&names.iter().zip(&texts).map(|(n, t)| (n.as_str(), t.as_str())).collect::<Vec<_>>())
    }

    fn text(&self) -> PathBuf {
        self.0.path().join("text")
    }

    fn out(&self) -> PathBuf {
        self.0.path().join("out")
    }

    fn ingest(&self, options: &IngestOptions) -> Result<(Dataset, usize), DataError> {
        let mut calls = 0;
        let dataset = ingest(&Source::open(&self.text())?, &tokenizer(300), &self.out(), options, &mut |_| {
            calls += 1;
            ControlFlow::Continue(())
        })?;
        Ok((dataset, calls))
    }
}

fn document(n: usize) -> String {
    format!("Document {n} — says {}. ", "é wörd ".repeat(n % 7 + 1)).repeat(4)
}

fn tokenizer(vocab_size: usize) -> Tokenizer {
    let mut sample = Sample::default();
    (0..50).for_each(|n| sample.push(&document(n)));
    Tokenizer::train(&sample, vocab_size).unwrap()
}

fn share(held_out: f64) -> IngestOptions {
    IngestOptions { held_out, ..IngestOptions::default() }
}

/// All tokens of a split, put together from its windows.
fn stream(dataset: &Dataset, split: Split, context: usize) -> Vec<u32> {
    let mut stream = Vec::new();
    let mut window = Vec::new();
    let count = match split {
        Split::Train => dataset.samples(context),
        Split::HeldOut => dataset.held_out_samples(context),
    };
    for index in 0..count {
        window.clear();
        dataset.window(split, index, context, &mut window).unwrap();
        assert!(window.len() == context + 1 || (split == Split::HeldOut && index + 1 == count && window.len() > 1));
        if let Some(&last) = stream.last() {
            assert_eq!(last, window[0], "windows share one token");
        }
        stream.extend_from_slice(&window[usize::from(index > 0)..]);
    }
    stream
}

#[test]
fn every_token_is_in_the_windows_in_the_order_of_the_source() {
    let place = Place::numbered(60);
    // Shards of 100 tokens: windows cross many borders.
    let options = IngestOptions { shard_bytes: 64 + 200, ..share(0.2) };
    let (dataset, _) = place.ingest(&options).unwrap();
    let tokenizer = tokenizer(300);
    let rule = SplitRule { share: 0.2, moved: None };
    let mut expected = [Vec::new(), vec![tokenizer.end_of_text()]];
    let mut bytes = [0, 0];
    for n in 0..60 {
        let text = document(n);
        let split = rule.split(Digest::of(text.as_bytes()));
        expected[split as usize].extend(encode_document(&tokenizer, &text).unwrap());
        bytes[split as usize] += text.len();
    }
    for context in [1, 7, 64, 333] {
        let train = stream(&dataset, Split::Train, context);
        assert_eq!(train, expected[0][..train.len()]);
        assert!(expected[0].len() - train.len() < context);
        let held_out = stream(&dataset, Split::HeldOut, context);
        assert_eq!(held_out, expected[1]);
        let targets: usize = held_out[1..].iter().map(|&token| tokenizer.token_bytes(token)).sum();
        assert_eq!(targets as u64, dataset.text_bytes(Split::HeldOut));
    }
    assert!(dataset.shards(Split::Train).len() > 3);
    assert_eq!(dataset.tokens(Split::Train), expected[0].len() as u64);
    assert_eq!([Split::Train, Split::HeldOut].map(|split| dataset.text_bytes(split) as usize), bytes);
    assert_eq!(dataset.documents(Split::Train) + dataset.documents(Split::HeldOut), 60);
    assert!((5..20).contains(&dataset.documents(Split::HeldOut)));
    assert_eq!(dataset.tokenizer().unwrap().hash(), tokenizer.hash());
}

#[test]
fn the_order_in_which_files_appear_changes_nothing() {
    let (a, b) = (Place::numbered(20), Place::numbered(0));
    (0..20).rev().for_each(|n| fs::write(b.text().join(format!("{n:03}.txt")), document(n)).unwrap());
    let (a, b) = (a.ingest(&share(0.1)).unwrap().0, b.ingest(&share(0.1)).unwrap().0);
    assert_eq!(a.id(), b.id());
    assert_eq!(stream(&a, Split::Train, 16), stream(&b, Split::Train, 16));
    let c = Place::numbered(20).ingest(&share(0.2)).unwrap().0;
    let d = Place::numbered(21).ingest(&share(0.1)).unwrap().0;
    assert!(a.id() != c.id() && a.id() != d.id());
}

#[test]
fn duplicates_are_dropped() {
    let place = Place::new(&[("a.txt", "same"), ("b.txt", "same"), ("c.txt", "other"), ("d.txt", " \n")]);
    let mut last = IngestProgress::default();
    let source = Source::open(&place.text()).unwrap();
    ingest(&source, &tokenizer(300), &place.out(), &share(0.5), &mut |progress| {
        last = progress;
        ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!((last.documents, last.duplicates, last.skipped.blank, last.text_bytes), (2, 1, 1, 9));
    assert_eq!((last.files_done, last.files), (4, 4));
}

#[test]
fn no_split_stays_empty() {
    let place = Place::numbered(6);
    let mut hashes: Vec<(Digest, String)> = (0..6).map(|n| (Digest::of(document(n).as_bytes()), document(n))).collect();
    hashes.sort();
    let (dataset, _) = place.ingest(&share(1e-9)).unwrap();
    assert_eq!((dataset.documents(Split::Train), dataset.documents(Split::HeldOut)), (5, 1));
    assert_eq!(dataset.text_bytes(Split::HeldOut), hashes[0].1.len() as u64, "the smallest hash moved");
    let (dataset, _) = place.ingest(&share(1.0 - 1e-12)).unwrap();
    assert_eq!((dataset.documents(Split::Train), dataset.documents(Split::HeldOut)), (1, 5));
    assert_eq!(dataset.text_bytes(Split::Train), hashes[5].1.len() as u64, "the greatest hash moved");
}

#[test]
fn a_single_document_is_cut_in_two() {
    let text = (0..400).map(document).collect::<String>();
    let place = Place::new(&[("book.txt", &text)]);
    let tokenizer = tokenizer(300);
    let whole = encode_document(&tokenizer, &text).unwrap();
    let (dataset, _) = place.ingest(&share(0.02)).unwrap();
    let held_out = (whole.len() as f64 * 0.02).ceil() as usize;
    assert!(held_out > HELD_OUT_TOKENS_MIN);
    assert_eq!(dataset.tokens(Split::HeldOut), held_out as u64);
    assert_eq!(stream(&dataset, Split::HeldOut, 50)[1..], whole[whole.len() - held_out..]);
    assert_eq!(dataset.tokens(Split::Train), (whole.len() - held_out) as u64);
    let bytes = dataset.text_bytes(Split::Train) + dataset.text_bytes(Split::HeldOut);
    assert_eq!(bytes, text.len() as u64);

    let error = Place::new(&[("a.txt", "x")]).ingest(&share(0.9)).unwrap_err().to_string();
    assert!(error.contains("holds 2 tokens, too few to split"), "{error}");
}

#[test]
fn a_finished_dataset_is_opened_and_a_changed_source_is_not() {
    let place = Place::numbered(10);
    assert!(!is_dataset(&place.out()) && !is_dataset(&place.text()));
    let (first, calls) = place.ingest(&share(0.1)).unwrap();
    assert!(calls > 0 && is_dataset(&place.out()));
    let (second, calls) = place.ingest(&share(0.1)).unwrap();
    assert_eq!((second.id(), calls), (first.id(), 0));
    assert_eq!(Dataset::open(&place.out()).unwrap().id(), first.id());
    let (third, calls) = place.ingest(&share(0.3)).unwrap();
    assert!(third.id() != first.id() && calls > 0);
    fs::write(place.text().join("new.txt"), "one more").unwrap();
    let (fourth, calls) = place.ingest(&share(0.3)).unwrap();
    assert!(fourth.id() != third.id() && calls > 0);
}

#[test]
fn an_unfinished_dataset_is_made_again() {
    let place = Place::numbered(10);
    let (first, _) = place.ingest(&share(0.1)).unwrap();
    // As if the machine had died: shards of another attempt, no manifest.
    fs::remove_file(place.out().join("dataset.json")).unwrap();
    fs::write(place.out().join("train-00007.tokens"), "left over").unwrap();
    fs::write(place.out().join("train-00000.tokens"), "half").unwrap();
    fs::write(place.out().join(".train-00001.tokens.12.tmp"), "half").unwrap();
    let error = Dataset::open(&place.out()).unwrap_err().to_string();
    assert!(error.contains("is not a dataset: it has no dataset.json\nhint: "), "{error}");
    let (second, calls) = place.ingest(&share(0.1)).unwrap();
    assert!(calls > 0);
    assert_eq!(second.id(), first.id());
    let mut names: Vec<_> = fs::read_dir(place.out()).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    let expected = ["dataset.json", "held_out-00000.tokens", "ingest.lock", "tokenizer.json", "train-00000.tokens"];
    assert_eq!(names, expected);
}

#[test]
fn damage_is_found_by_name_and_mended_where_the_text_is() {
    let place = Place::numbered(10);
    let (first, _) = place.ingest(&share(0.1)).unwrap();
    let path = place.out().join("train-00000.tokens");
    let mut bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    let error = Dataset::open(&place.out()).unwrap_err().to_string();
    assert!(error.contains("train-00000.tokens is damaged: it ends after"), "{error}");
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&path, &bytes).unwrap();
    let error = Dataset::open(&place.out()).unwrap_err().to_string();
    assert!(error.contains("train-00000.tokens is damaged: its bytes do not match its BLAKE3 hash\nhint: "), "{error}");
    assert_eq!(place.ingest(&share(0.1)).unwrap().0.id(), first.id());

    fs::write(place.out().join("dataset.json"), "{\"format\": \"atoll dataset 1\"").unwrap();
    let error = Dataset::open(&place.out()).unwrap_err().to_string();
    assert!(error.contains("dataset.json is damaged: EOF"), "{error}");
}

#[test]
fn another_tokenizer_and_impossible_shares_are_refused() {
    let place = Place::numbered(10);
    place.ingest(&share(0.1)).unwrap();
    let (ours, theirs) = (tokenizer(280), tokenizer(300));
    let source = Source::open(&place.text()).unwrap();
    let error = ingest(&source, &ours, &place.out(), &share(0.1), &mut |_| ControlFlow::Continue(())).unwrap_err();
    let text = error.to_string();
    assert!(text.contains(&ours.hash().to_string()) && text.contains(&theirs.hash().to_string()), "{text}");
    assert!(matches!(error, DataError::OtherTokenizer { .. }));
    for share_ in [0.0, 1.5, -1.0, f64::NAN] {
        assert!(matches!(place.ingest(&share(share_)), Err(DataError::BadShare { .. })));
    }
    let blank = Place::new(&[("a.txt", ""), ("b.txt", " ")]);
    let error = blank.ingest(&share(0.1)).unwrap_err().to_string();
    assert!(error.contains("(blank documents: 2)\nhint: Atoll reads"), "{error}");
}

#[test]
fn processes_that_share_a_folder_wait_for_each_other() {
    let place = Place::numbered(30);
    let ids: Vec<_> = std::thread::scope(|scope| {
        let start = || scope.spawn(|| place.ingest(&share(0.1)).unwrap().0.id());
        [start(), start(), start()].map(|thread| thread.join().unwrap()).to_vec()
    });
    assert!(ids.iter().all(|id| *id == ids[0]));
}

#[test]
fn a_window_beyond_the_end_is_refused() {
    let (dataset, _) = Place::numbered(10).ingest(&share(0.1)).unwrap();
    let mut tokens = vec![5];
    let error = dataset.window(Split::Train, dataset.samples(32), 32, &mut tokens).unwrap_err();
    assert!(error.to_string().contains("no train window"), "{error}");
    assert_eq!(tokens, [5]);
    assert_eq!(dataset.samples(usize::MAX / 2), 0);
}

#[test]
fn a_share_of_one_holds_everything_out() {
    let place = Place::numbered(4);
    let dataset = place.ingest(&share(1.0)).unwrap().0;
    assert_eq!((dataset.documents(Split::Train), dataset.documents(Split::HeldOut)), (0, 4));
    assert!(dataset.held_out_samples(8) > 0);
}

#[test]
fn an_ingest_can_be_stopped() {
    let place = Place::numbered(4);
    let source = Source::open(&place.text()).unwrap();
    let stopped = ingest(&source, &tokenizer(280), &place.out(), &share(0.3), &mut |_| ControlFlow::Break(()));
    assert!(matches!(stopped, Err(DataError::Stopped)));
    assert!(!is_dataset(&place.out()));
}
