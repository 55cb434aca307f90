//! A finished dataset: two splits of tokens in shards, and `dataset.json`, which is written last and so
//! says that all else is there.
//!
//! A split is one stream of tokens across documents and shards. **Training** window `i` at context T
//! holds the tokens `i·T ..= i·T + T`: its last token is the next window's first, so every token but
//! the very first is a target once. **Held-out** windows begin with an end of text instead, and the
//! last one is shorter: every held-out token is a target exactly once, so summed losses divide by the
//! held-out text's bytes without a remainder.

use std::fs;
use std::path::{Path, PathBuf};

use atoll_core::data::DatasetId;
use atoll_core::hash::Digest;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::data::shards::{Shard, ShardInfo};
use crate::data::{DataError, Tokenizer, file};

const MANIFEST: &str = "dataset.json";
const TOKENIZER: &str = "tokenizer.json";
const FORMAT: &str = "atoll dataset 1";

/// One of the two parts of a dataset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Split {
    /// What engines train on.
    Train,
    /// What they are measured on.
    HeldOut,
}

impl Split {
    /// Its name in file names and messages.
    pub fn name(self) -> &'static str {
        match self {
            Split::Train => "train",
            Split::HeldOut => "held_out",
        }
    }
}

/// `dataset.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Manifest {
    pub(crate) format: String,
    pub(crate) tokenizer: Digest,
    pub(crate) end_of_text: u32,
    /// The share of documents by hash that is held out.
    pub(crate) held_out_share: f64,
    /// Names what this was made from, to know when to make it again. No part of the dataset's name.
    pub(crate) recipe: Digest,
    pub(crate) train: Vec<ShardInfo>,
    pub(crate) held_out: Vec<ShardInfo>,
}

impl Manifest {
    pub(crate) fn new(tokenizer: &Tokenizer, held_out_share: f64, recipe: Digest) -> Self {
        Self {
            format: FORMAT.to_string(),
            tokenizer: tokenizer.hash(),
            end_of_text: tokenizer.end_of_text(),
            held_out_share,
            recipe,
            train: Vec::new(),
            held_out: Vec::new(),
        }
    }

    pub(crate) fn read(folder: &Path) -> Result<Self, DataError> {
        let path = folder.join(MANIFEST);
        let bytes = fs::read(&path).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => DataError::NotADataset { path: folder.to_path_buf() },
            _ => DataError::unreadable(&path, error),
        })?;
        let damaged = |reason: String| DataError::DamagedManifest { path: path.clone(), reason };
        let manifest: Self = serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string()))?;
        match manifest.format.as_str() {
            FORMAT => Ok(manifest),
            other => Err(damaged(format!("its format is '{other}', and this Atoll reads '{FORMAT}'"))),
        }
    }

    /// Writes the tokenizer and, last, the manifest.
    pub(crate) fn write(&self, folder: &Path, tokenizer: &Tokenizer) -> Result<(), DataError> {
        let json = serde_json::to_vec_pretty(self).map_err(|error| DataError::unwritable(folder, error))?;
        for (name, bytes) in [(TOKENIZER, tokenizer.json()), (MANIFEST, &json)] {
            let path = folder.join(name);
            file::write(&path, bytes).map_err(|error| DataError::unwritable(&path, error))?;
        }
        Ok(())
    }

    /// Hash of the tokenizer, the rule of the split and all shards.
    fn id(&self) -> DatasetId {
        let head = [Digest::of(FORMAT.as_bytes()), self.tokenizer, Digest::of(&self.held_out_share.to_le_bytes())];
        let shards = |split: &[ShardInfo]| Digest::of_all(split.iter().map(|shard| &shard.hash));
        DatasetId(Digest::of_all(head.iter().chain(&[shards(&self.train), shards(&self.held_out)])))
    }
}

/// Takes away whatever an ingest has left in `folder`, the manifest first.
pub(crate) fn clear(folder: &Path) -> Result<(), DataError> {
    let remove = |path: &Path| match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(DataError::unwritable(path, error)),
        _ => Ok(()),
    };
    remove(&folder.join(MANIFEST))?;
    for entry in fs::read_dir(folder).map_err(|error| DataError::unreadable(folder, error))? {
        let path = entry.map_err(|error| DataError::unreadable(folder, error))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.ends_with(".tokens") || (name.contains(".tokens.") && name.ends_with(".tmp")) {
            remove(&path)?;
        }
    }
    Ok(())
}

/// Whether `path` is the folder of a finished dataset rather than text.
pub fn is_dataset(path: &Path) -> bool {
    let head = |path: PathBuf| {
        use std::io::Read;
        let mut head = Vec::new();
        fs::File::open(path)?.take(256).read_to_end(&mut head).map(|_| head)
    };
    let is_ours = |head: Vec<u8>| head.windows(FORMAT.len()).any(|part| part == FORMAT.as_bytes());
    head(path.join(MANIFEST)).is_ok_and(is_ours)
}

/// A finished dataset, its shards verified and mapped.
#[derive(Debug)]
pub struct Dataset {
    folder: PathBuf,
    manifest: Manifest,
    train: Stream,
    held_out: Stream,
}

impl Dataset {
    /// Opens the dataset in `folder`.
    ///
    /// # Errors
    /// If there is none, or a shard is missing, truncated or altered, by name.
    pub fn open(folder: &Path) -> Result<Self, DataError> {
        let manifest = Manifest::read(folder)?;
        let train = Stream::open(folder, &manifest.train, manifest.tokenizer)?;
        let held_out = Stream::open(folder, &manifest.held_out, manifest.tokenizer)?;
        Ok(Self { folder: folder.to_path_buf(), manifest, train, held_out })
    }

    /// Its name: equal exactly when tokenizer, split rule and tokens are.
    pub fn id(&self) -> DatasetId {
        self.manifest.id()
    }

    /// Its folder.
    pub fn path(&self) -> &Path {
        &self.folder
    }

    /// The tokenizer that it was made with.
    pub fn tokenizer_hash(&self) -> Digest {
        self.manifest.tokenizer
    }

    /// The token that stands after every document.
    pub fn end_of_text(&self) -> u32 {
        self.manifest.end_of_text
    }

    /// Loads that tokenizer, which lies beside the shards.
    ///
    /// # Errors
    /// If `tokenizer.json` is missing or is not the one that the dataset was made with.
    pub fn tokenizer(&self) -> Result<Tokenizer, DataError> {
        let path = self.folder.join(TOKENIZER);
        let tokenizer = Tokenizer::from_bytes(fs::read(&path).map_err(|error| DataError::unreadable(&path, error))?)?;
        self.check_tokenizer(tokenizer.hash()).map(|()| tokenizer)
    }

    /// Whether the dataset was made with the tokenizer of that hash.
    ///
    /// # Errors
    /// [`DataError::OtherTokenizer`] if not.
    pub fn check_tokenizer(&self, wanted: Digest) -> Result<(), DataError> {
        check_tokenizer(&self.folder, self.manifest.tokenizer, wanted)
    }

    /// The share of documents that was held out when the dataset was made.
    pub fn held_out_share(&self) -> f64 {
        self.manifest.held_out_share
    }

    /// Training windows of `context` targets each.
    pub fn samples(&self, context: usize) -> u64 {
        self.train.tokens().saturating_sub(1) / context.max(1) as u64
    }

    /// Held-out windows of at most `context` targets each.
    pub fn held_out_samples(&self, context: usize) -> u64 {
        self.held_out.tokens().div_ceil(context.max(1) as u64)
    }

    /// Appends the tokens of window `index` to `tokens`: `context + 1`, or fewer in the last held-out window.
    ///
    /// # Errors
    /// If there is no such window; then nothing is appended.
    pub fn window(&self, split: Split, index: u64, context: usize, tokens: &mut Vec<u32>) -> Result<(), DataError> {
        let count = match split {
            Split::Train => self.samples(context),
            Split::HeldOut => self.held_out_samples(context),
        };
        if index >= count {
            let (path, split) = (self.folder.clone(), split.name());
            return Err(DataError::NoSuchWindow { path, split, index, context });
        }
        let start = index * context as u64;
        let end = start + context as u64;
        match split {
            Split::Train => self.train.read(start, end + 1, tokens),
            Split::HeldOut => {
                if start == 0 {
                    tokens.push(self.manifest.end_of_text);
                }
                self.held_out.read(start.saturating_sub(1), end.min(self.held_out.tokens()), tokens);
            }
        }
        Ok(())
    }

    /// Tokens of a split, ends of text included.
    pub fn tokens(&self, split: Split) -> u64 {
        self.shards(split).iter().map(|shard| shard.tokens).sum()
    }

    /// Documents of a split.
    pub fn documents(&self, split: Split) -> u64 {
        self.shards(split).iter().map(|shard| shard.documents).sum()
    }

    /// Bytes of a split's text: the denominator of bits per byte.
    pub fn text_bytes(&self, split: Split) -> u64 {
        self.shards(split).iter().map(|shard| shard.text_bytes).sum()
    }

    /// A split's shards, in order.
    pub fn shards(&self, split: Split) -> &[ShardInfo] {
        match split {
            Split::Train => &self.manifest.train,
            Split::HeldOut => &self.manifest.held_out,
        }
    }
}

pub(crate) fn check_tokenizer(folder: &Path, found: Digest, wanted: Digest) -> Result<(), DataError> {
    if found == wanted {
        return Ok(());
    }
    Err(DataError::OtherTokenizer { path: folder.to_path_buf(), found, wanted })
}

/// The tokens of a split, as if its shards were one.
#[derive(Debug)]
struct Stream {
    shards: Vec<Shard>,
    /// Where each shard begins in the stream, and where the last one ends.
    starts: Vec<u64>,
}

impl Stream {
    fn open(folder: &Path, shards: &[ShardInfo], tokenizer: Digest) -> Result<Self, DataError> {
        let opened: Vec<_> = shards.par_iter().map(|info| Shard::open(folder, info, tokenizer)).collect();
        let shards = opened.into_iter().collect::<Result<Vec<Shard>, _>>()?;
        let mut starts = vec![0];
        for shard in &shards {
            starts.push(starts.last().copied().unwrap_or(0) + shard.len());
        }
        Ok(Self { shards, starts })
    }

    fn tokens(&self) -> u64 {
        self.starts.last().copied().unwrap_or(0)
    }

    /// Appends the tokens from `start` to `end` ≤ [`tokens`](Self::tokens).
    fn read(&self, mut start: u64, end: u64, tokens: &mut Vec<u32>) {
        let mut index = self.starts.partition_point(|&first| first <= start) - 1;
        while start < end {
            let (first, next) = (self.starts[index], self.starts[index + 1]);
            let until = end.min(next);
            self.shards[index].read(start - first, until - first, tokens);
            (start, index) = (until, index + 1);
        }
    }
}
