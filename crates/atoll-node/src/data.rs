//! From a site's text to the batches of its engine. Text never leaves the site; what others learn is
//! the dataset's name and its counts.
//!
//! ```text
//! files ──text──▶ documents ──tokenizer──▶ tokens ──shards──▶ dataset ──feed──▶ batches
//!                    │                                            ▲                ▲
//!                    └── ingest: drop duplicates, hold 2 % out ───┘                │
//!                                 leases from the coordinator (positions) ─────────┘
//! ```
//!
//! | module | holds |
//! |---|---|
//! | [`text`] | files of many formats as one ordered stream of documents |
//! | [`corpus`] | the default text: sources of crates that every build of Atoll has unpacked |
//! | [`tokenizer`] | text to tokens and back, and how many bytes each token stands for |
//! | [`shards`] | tokens on disk: the bytes of a shard |
//! | [`ingest`](mod@ingest) | documents to a finished dataset: duplicates, held-out split, reuse |
//! | [`dataset`] | a finished dataset: its name, its windows |
//! | [`feed`] | leased positions to batches |
//!
//! Everything is deterministic: the same files give the same dataset, bit for bit, on any machine and
//! in any directory order, and the same leases give the same batches.

pub mod corpus;
pub mod dataset;
mod error;
pub mod feed;
pub(crate) mod file;
pub mod ingest;
pub(crate) mod map;
pub mod shards;
pub mod text;
pub mod tokenizer;

pub use dataset::{Dataset, Split, is_dataset};
pub use error::DataError;
pub use feed::{LeasedFeed, Leases};
pub use ingest::{IngestOptions, IngestProgress, ingest};
pub use text::{Source, TextField};
pub use tokenizer::{Sample, Tokenizer};
