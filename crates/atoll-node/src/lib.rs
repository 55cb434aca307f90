//! Atoll's node: everything that touches a disk, a socket or a clock. The decisions are made by the
//! machines of `atoll-core`; the shells here carry them out.
//!
//! | module | holds |
//! |---|---|
//! | [`data`] | text to token shards to leased batches |
//! | [`hf`] | Hugging Face folders |
//! | [`run`] | the run folder and `run.toml` |
//! | [`identity`] | keys and tickets |
//! | [`acts`] | what an operator wants done about members |
//! | [`remote`] | a run from afar: look at it, fetch its model, administer it |
//! | [`link`] | TLS connections that carry frames |
//! | [`wan`] | a thin, long, lossy link for trying things out |
//! | [`journal`] | the journal on disk |
//! | [`objects`] | object stores: a folder, S3, OBS, OSS, COS |
//! | [`shared`] | what of a run lies in its object store |
//! | [`store`] | payloads on disk, by content address |
//! | [`snapshot`] | the model and the book on disk; recovery |
//! | [`replay`] | every commit computed again |
//! | [`rollback`] | back to an earlier commit |
//! | [`crew`] | threads for work that falls into parts |
//! | [`coordinator`] | the coordinator's shell |
//! | [`site`] | the site's shell |
//! | [`memory`] | what this process holds of it |
//! | [`report`] | what an operator sees |
//! | [`fuzz`] | what must hold for any bytes from outside |

mod acquaintance;
pub mod acts;
pub mod coordinator;
pub mod crew;
pub mod data;
pub mod fuzz;
pub mod hf;
pub mod identity;
pub mod journal;
pub mod link;
pub mod memory;
pub mod objects;
pub mod remote;
pub mod replay;
pub mod report;
pub mod rollback;
pub mod run;
pub mod shared;
pub mod site;
pub mod snapshot;
pub mod store;
pub mod succession;
pub mod wan;
mod way;
