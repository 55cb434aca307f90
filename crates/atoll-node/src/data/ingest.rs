//! Documents to a dataset. Each document is dropped if an identical one came before, goes to the
//! held-out split if its BLAKE3 hash, read as a fraction, is below the held-out share (so the same
//! document is held out at every site, whatever else the site has), becomes tokens with an end of text
//! behind them, and is appended to its split's shards in the order of the source.
//!
//! A small source may leave one split without a document. Then the document whose hash is nearest
//! moves there; a single document is cut in two.
//!
//! An ingest may be killed at any time: what it leaves is no dataset, and the next one begins anew. A
//! finished dataset of the same text, options and tokenizer is opened instead of made again. Processes
//! that ingest into one folder wait for each other.

use std::collections::HashSet;
use std::fs::{self, File};
use std::ops::ControlFlow;
use std::path::Path;

use atoll_core::hash::Digest;
use rayon::prelude::*;

use crate::data::dataset::{self, Dataset, Manifest, Split};
use crate::data::shards::{SHARD_BYTES_MAX, ShardInfo, ShardWriter};
use crate::data::text::{Document, Skipped};
use crate::data::{DataError, Source, TextField, Tokenizer};

/// Text that is encoded at a time, on all threads.
const BATCH_BYTES: usize = 4 << 20;
/// A single document's held-out part has at least this many tokens, as far as half of it allows.
const HELD_OUT_TOKENS_MIN: usize = 256;

/// How to make a dataset.
#[derive(Debug, Clone, PartialEq)]
pub struct IngestOptions {
    /// Share of the documents that is held out, above 0 and at most 1.
    pub held_out: f64,
    /// Where the text is in JSON lines and parquet files.
    pub text_field: TextField,
    /// Size of a shard in bytes, at most 64 MiB.
    pub shard_bytes: usize,
}

impl Default for IngestOptions {
    fn default() -> Self {
        Self { held_out: 0.02, text_field: TextField::default(), shard_bytes: SHARD_BYTES_MAX }
    }
}

/// How far an ingest has come.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct IngestProgress {
    /// Files finished.
    pub files_done: usize,
    /// Files in the source.
    pub files: usize,
    /// Documents kept.
    pub documents: u64,
    /// Documents dropped because an identical one came before.
    pub duplicates: u64,
    /// Bytes of text kept.
    pub text_bytes: u64,
    /// Tokens written.
    pub tokens: u64,
    /// What was no document; known at the end.
    pub skipped: Skipped,
}

/// Makes a dataset of `source` in `folder`, or opens the one that is there. `progress` is asked after each
/// few megabytes of text whether to go on.
///
/// # Errors
/// If a document cannot be read, there is too little text, `folder` cannot be written, or holds a
/// dataset of another tokenizer.
pub fn ingest(
    source: &Source,
    tokenizer: &Tokenizer,
    folder: &Path,
    options: &IngestOptions,
    progress: &mut dyn FnMut(IngestProgress) -> ControlFlow<()>,
) -> Result<Dataset, DataError> {
    if !(options.held_out > 0.0 && options.held_out <= 1.0) {
        return Err(DataError::BadShare { share: options.held_out });
    }
    fs::create_dir_all(folder).map_err(|error| DataError::unwritable(folder, error))?;
    let _lock = lock(folder)?;
    let mut manifest = Manifest::new(tokenizer, options.held_out, recipe(source, options));
    if let Some(dataset) = reuse(folder, &manifest)? {
        return Ok(dataset);
    }
    let [train, held_out] = write_splits(&Job { source, tokenizer, folder, options }, progress)?;
    (manifest.train, manifest.held_out) = (train, held_out);
    manifest.write(folder, tokenizer)?;
    Dataset::open(folder)
}

/// Held until dropped; on file systems without locks, nothing.
fn lock(folder: &Path) -> Result<Option<File>, DataError> {
    let path = folder.join("ingest.lock");
    let file = File::options().create(true).truncate(false).write(true).open(&path);
    let file = file.map_err(|error| DataError::unwritable(&path, error))?;
    Ok(file.lock().is_ok().then_some(file))
}

/// Names all that decides what an ingest writes, except the tokenizer.
fn recipe(source: &Source, options: &IngestOptions) -> Digest {
    let IngestOptions { held_out, text_field, shard_bytes } = options;
    let options = format!("{held_out:?} {shard_bytes} {}", text_field.0);
    Digest::of_all([&source.signature(), &Digest::of(options.as_bytes())])
}

/// The finished dataset in `folder` if it is what `wanted` would become. A damaged one is made again.
fn reuse(folder: &Path, wanted: &Manifest) -> Result<Option<Dataset>, DataError> {
    let Ok(found) = Manifest::read(folder) else { return Ok(None) };
    dataset::check_tokenizer(folder, found.tokenizer, wanted.tokenizer)?;
    let is_same = found.recipe == wanted.recipe && found.held_out_share == wanted.held_out_share;
    Ok(if is_same { Dataset::open(folder).ok() } else { None })
}

/// What to make of what, and where.
#[derive(Clone, Copy)]
struct Job<'a> {
    source: &'a Source,
    tokenizer: &'a Tokenizer,
    folder: &'a Path,
    options: &'a IngestOptions,
}

impl Job<'_> {
    fn writer(&self, split: Split) -> ShardWriter {
        let Self { tokenizer, folder, options, .. } = self;
        ShardWriter::new(folder, split.name(), tokenizer.hash(), tokenizer.vocab_size(), options.shard_bytes)
    }
}

/// The shards of both splits, neither of them empty.
fn write_splits(
    job: &Job<'_>,
    progress: &mut dyn FnMut(IngestProgress) -> ControlFlow<()>,
) -> Result<[Vec<ShardInfo>; 2], DataError> {
    let mut rule = SplitRule { share: job.options.held_out, moved: None };
    let (found, shards) = write_pass(job, rule, progress)?;
    // A share of 1 holds everything out: text that is only looked at.
    if found.held_out > 0 && (found.train > 0 || job.options.held_out == 1.0) {
        return Ok(shards);
    }
    if found.train + found.held_out == 1 {
        return write_single(job);
    }
    let moves_to_train = found.train == 0;
    rule.moved = Some(if moves_to_train { (found.greatest, Split::Train) } else { (found.least, Split::HeldOut) });
    Ok(write_pass(job, rule, progress)?.1)
}

/// Which split a document belongs to.
#[derive(Clone, Copy)]
struct SplitRule {
    share: f64,
    /// The one document that goes to a split that would be empty.
    moved: Option<(Digest, Split)>,
}

impl SplitRule {
    fn split(&self, document: Digest) -> Split {
        if let Some((moved, split)) = self.moved
            && moved == document
        {
            return split;
        }
        // Big endian, so that the order of fractions is the order of digests.
        let head = document.0.first_chunk().map_or(0, |head| u64::from_be_bytes(*head));
        let fraction = head as f64 / 2f64.powi(64);
        if fraction < self.share { Split::HeldOut } else { Split::Train }
    }
}

/// The documents that a pass has found.
#[derive(Clone, Copy)]
struct Found {
    train: u64,
    held_out: u64,
    least: Digest,
    greatest: Digest,
}

fn write_pass(
    job: &Job<'_>,
    rule: SplitRule,
    progress: &mut dyn FnMut(IngestProgress) -> ControlFlow<()>,
) -> Result<(Found, [Vec<ShardInfo>; 2]), DataError> {
    dataset::clear(job.folder)?;
    let mut pass = Pass::new(job, rule, progress);
    let skipped = job.source.visit(&job.options.text_field, &mut |document| pass.push(document))?;
    if pass.found.train + pass.found.held_out == 0 {
        return Err(DataError::NoDocument { path: job.source.path().to_path_buf(), skipped });
    }
    pass.finish(skipped)
}

/// One reading of the source.
struct Pass<'a> {
    tokenizer: &'a Tokenizer,
    rule: SplitRule,
    /// Half of the hash of each document seen: 16 bytes a document.
    seen: HashSet<[u8; 16]>,
    batch: Vec<(Split, String)>,
    batch_bytes: usize,
    train: ShardWriter,
    held_out: ShardWriter,
    found: Found,
    state: IngestProgress,
    progress: &'a mut dyn FnMut(IngestProgress) -> ControlFlow<()>,
}

impl<'a> Pass<'a> {
    fn new(job: &Job<'a>, rule: SplitRule, progress: &'a mut dyn FnMut(IngestProgress) -> ControlFlow<()>) -> Self {
        Self {
            tokenizer: job.tokenizer,
            rule,
            seen: HashSet::new(),
            batch: Vec::new(),
            batch_bytes: 0,
            train: job.writer(Split::Train),
            held_out: job.writer(Split::HeldOut),
            found: Found { train: 0, held_out: 0, least: Digest([0xff; 32]), greatest: Digest::default() },
            state: IngestProgress { files: job.source.files(), ..IngestProgress::default() },
            progress,
        }
    }

    fn push(&mut self, document: Document<'_>) -> Result<(), DataError> {
        let hash = Digest::of(document.text.as_bytes());
        self.state.files_done = document.file;
        if !self.seen.insert(hash.0.first_chunk().copied().unwrap_or_default()) {
            self.state.duplicates += 1;
            return Ok(());
        }
        let split = self.rule.split(hash);
        match split {
            Split::Train => self.found.train += 1,
            Split::HeldOut => self.found.held_out += 1,
        }
        self.found.least = self.found.least.min(hash);
        self.found.greatest = self.found.greatest.max(hash);
        self.batch_bytes += document.text.len();
        self.batch.push((split, document.text.to_string()));
        if self.batch_bytes >= BATCH_BYTES {
            self.write_batch()?;
        }
        Ok(())
    }

    fn write_batch(&mut self) -> Result<(), DataError> {
        let batch = std::mem::take(&mut self.batch);
        let encoded: Vec<_> = batch.par_iter().map(|(_, text)| encode_document(self.tokenizer, text)).collect();
        for ((split, text), tokens) in batch.iter().zip(encoded) {
            let (tokens, text_bytes) = (tokens?, text.len() as u64);
            match split {
                Split::Train => self.train.push(&tokens, text_bytes)?,
                Split::HeldOut => self.held_out.push(&tokens, text_bytes)?,
            }
            self.state.documents += 1;
            self.state.text_bytes += text_bytes;
            self.state.tokens += tokens.len() as u64;
        }
        self.batch_bytes = 0;
        if (self.progress)(self.state).is_break() { Err(DataError::Stopped) } else { Ok(()) }
    }

    fn finish(mut self, skipped: Skipped) -> Result<(Found, [Vec<ShardInfo>; 2]), DataError> {
        (self.state.files_done, self.state.skipped) = (self.state.files, skipped);
        self.write_batch()?;
        Ok((self.found, [self.train.finish()?, self.held_out.finish()?]))
    }
}

fn encode_document(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>, DataError> {
    let mut tokens = tokenizer.encode(text)?;
    tokens.push(tokenizer.end_of_text());
    Ok(tokens)
}

/// The source's only document, cut in two: its last tokens are held out.
fn write_single(job: &Job<'_>) -> Result<[Vec<ShardInfo>; 2], DataError> {
    dataset::clear(job.folder)?;
    let mut text = String::new();
    job.source.visit(&job.options.text_field, &mut |document| {
        text.clear();
        text.push_str(document.text);
        Ok(())
    })?;
    let tokens = encode_document(job.tokenizer, &text)?;
    let share = (tokens.len() as f64 * job.options.held_out).ceil() as usize;
    let held_out = share.max(HELD_OUT_TOKENS_MIN.min(tokens.len() / 2));
    if held_out == 0 || held_out + 2 > tokens.len() {
        let path = job.source.path().to_path_buf();
        return Err(DataError::TooLittleText { path, tokens: tokens.len() as u64 });
    }
    let (first, last) = tokens.split_at(tokens.len() - held_out);
    let last_bytes: usize = last.iter().map(|&token| job.tokenizer.token_bytes(token)).sum();
    let (mut train, mut held_out) = (job.writer(Split::Train), job.writer(Split::HeldOut));
    train.push(first, text.len().saturating_sub(last_bytes) as u64)?;
    held_out.push(last, last_bytes as u64)?;
    Ok([train.finish()?, held_out.finish()?])
}

#[cfg(test)]
mod tests;
