//! What can go wrong with a site's data, as sentences for the person who brought it.

use std::fmt;
use std::path::{Path, PathBuf};

use atoll_core::hash::Digest;

use crate::data::text::Skipped;

const REDO: &str = "delete this folder and start again with --data naming the text; it is ingested anew";

/// Why text could not become batches.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum DataError {
    /// The path is the empty string.
    #[error("the path of the data is empty\nhint: give a file or a folder, such as --data books/")]
    NoPath,
    /// There is nothing at this path.
    #[error("there is no {}\nhint: check the spelling; a relative path starts at {}", path.display(), here())]
    NotFound {
        /// The path as given.
        path: PathBuf,
    },
    /// A file or folder is there and cannot be read.
    #[error("cannot read {}: {reason}\nhint: check its permissions, and that it was copied completely", path.display())]
    Unreadable {
        /// The file or folder.
        path: PathBuf,
        /// What the system or the decompressor says.
        reason: String,
    },
    /// A file could not be written.
    #[error("cannot write {}: {reason}\nhint: check the free space and the permissions of its folder", path.display())]
    Unwritable {
        /// The file.
        path: PathBuf,
        /// What the system says.
        reason: String,
    },
    /// The source holds no text.
    #[error("found no document in {}{skipped}\nhint: Atoll reads {FORMATS}", path.display())]
    NoDocument {
        /// The source.
        path: PathBuf,
        /// What was there and could not be used.
        skipped: Skipped,
    },
    /// A line is not one JSON object.
    #[error("{}, line {line}: {reason}\nhint: each line must be one JSON object, such as {{\"text\": \"...\"}}", path.display())]
    MalformedJson {
        /// The file.
        path: PathBuf,
        /// Its line, counted from 1.
        line: u64,
        /// What the parser says.
        reason: String,
    },
    /// A JSON object lacks the text field.
    #[error("{}, line {line}: there is no field '{field}'\nhint: this line has {}; name the one with the text by --text-field", path.display(), list(found))]
    MissingField {
        /// The file.
        path: PathBuf,
        /// Its line, counted from 1.
        line: u64,
        /// The field looked for.
        field: String,
        /// The fields there are.
        found: Vec<String>,
    },
    /// A parquet file lacks the text column.
    #[error("{} has no column '{column}' of text\nhint: it has {}; name the one with the text by --text-field", path.display(), list(found))]
    MissingColumn {
        /// The file.
        path: PathBuf,
        /// The column looked for.
        column: String,
        /// The columns of text that there are.
        found: Vec<String>,
    },
    /// A parquet file cannot be decoded.
    #[error("{}{}: {reason}\nhint: check that the file is complete; Atoll reads parquet with no, snappy or zstd compression", path.display(), at_row(*row))]
    Parquet {
        /// The file.
        path: PathBuf,
        /// The row, counted from 1, where it is known.
        row: Option<u64>,
        /// What the decoder says.
        reason: String,
    },
    /// The default corpus is not on this machine.
    #[error("the default corpus is incomplete: found no source of {name} under {}\nhint: give your own text with --data, or run `cargo fetch` in Atoll's repository", searched.display())]
    NoCorpus {
        /// The crate that is missing, with its version.
        name: String,
        /// Cargo's registry folder.
        searched: PathBuf,
    },
    /// A tokenizer cannot be used.
    #[error(
        "the tokenizer cannot be used: {reason}\nhint: give a tokenizer.json of Hugging Face's `tokenizers`, or let Atoll train one"
    )]
    BadTokenizer {
        /// What is wrong with it.
        reason: String,
    },
    /// A tokenizer has no token that ends a document.
    #[error("the tokenizer has no end-of-text token\nhint: add one of {} to tokenizer.json", super::tokenizer::END_OF_TEXT.join(", "))]
    NoEndOfText,
    /// A vocabulary is too small for every byte to have a token.
    #[error(
        "a vocabulary of {wanted} is too small\nhint: a byte-level tokenizer needs at least {} tokens: 256 bytes and the end of text",
        super::tokenizer::VOCABULARY_MIN
    )]
    SmallVocabulary {
        /// The size asked for.
        wanted: usize,
    },
    /// The share of held-out text is not a share.
    #[error("the held-out share {share} must be above 0 and at most 1\nhint: 0.02 holds out one document in fifty")]
    BadShare {
        /// The share asked for.
        share: f64,
    },
    /// The caller wanted it.
    #[error("reading the text was stopped\nhint: the same command begins to read again")]
    Stopped,
    /// There are too few tokens to train on and to evaluate with.
    #[error("{} holds {tokens} tokens, too few to split into training and held-out text\nhint: bring at least a few pages", path.display())]
    TooLittleText {
        /// The source.
        path: PathBuf,
        /// Tokens found.
        tokens: u64,
    },
    /// The training split has no window of this length.
    #[error("{} has {tokens} training tokens, fewer than one window of {context} + 1\nhint: bring more text or train with a shorter context", path.display())]
    TooFewTokens {
        /// The dataset's folder.
        path: PathBuf,
        /// Its training tokens.
        tokens: u64,
        /// The context asked for.
        context: usize,
    },
    /// A window beyond the end was asked for.
    #[error("{} has no {split} window {index} at context {context}\nhint: this is a mistake in Atoll; please report it", path.display())]
    NoSuchWindow {
        /// The dataset's folder.
        path: PathBuf,
        /// The split's name.
        split: &'static str,
        /// The window asked for.
        index: u64,
        /// The context asked for.
        context: usize,
    },
    /// The folder is no dataset.
    #[error("{} is not a dataset: it has no dataset.json\nhint: {REDO}", path.display())]
    NotADataset {
        /// The folder.
        path: PathBuf,
    },
    /// A dataset's `dataset.json` cannot be understood.
    #[error("{} is damaged: {reason}\nhint: {REDO}", path.display())]
    DamagedManifest {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A shard is not what its dataset says.
    #[error("the shard {} is damaged: {reason}\nhint: {REDO}", path.display())]
    DamagedShard {
        /// The shard.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The dataset was made with another tokenizer.
    #[error("{} was made with the tokenizer {found}, and this run uses {wanted}\nhint: use another folder, or delete this one and ingest the text again", path.display())]
    OtherTokenizer {
        /// The dataset's folder.
        path: PathBuf,
        /// The tokenizer it was made with.
        found: Digest,
        /// The tokenizer of the run.
        wanted: Digest,
    },
}

/// The formats, for hints.
const FORMATS: &str = ".txt, .md, .rst and source files, .jsonl and .json lines, .parquet, and .gz or .zst of these; \
                       hidden folders and target/ are skipped";

impl DataError {
    pub(crate) fn unreadable(path: &Path, reason: impl fmt::Display) -> Self {
        Self::Unreadable { path: path.to_path_buf(), reason: reason.to_string() }
    }

    pub(crate) fn unwritable(path: &Path, reason: impl fmt::Display) -> Self {
        Self::Unwritable { path: path.to_path_buf(), reason: reason.to_string() }
    }

    pub(crate) fn bad_tokenizer(reason: impl fmt::Display) -> Self {
        Self::BadTokenizer { reason: reason.to_string() }
    }
}

fn here() -> String {
    std::env::current_dir().map_or_else(|_| "the working directory".to_string(), |path| path.display().to_string())
}

fn list(names: &[String]) -> String {
    if names.is_empty() { "none".to_string() } else { names.join(", ") }
}

fn at_row(row: Option<u64>) -> String {
    row.map_or_else(String::new, |row| format!(", row {row}"))
}
