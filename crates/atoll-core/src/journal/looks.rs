//! What was seen on held-out text: of the model by a site, of contributions by the coordinator.

use serde::{Deserialize, Serialize};

use crate::site::SiteId;

/// A contribution that was tried alone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Trial {
    /// Whose it is.
    pub site: SiteId,
    /// Nats per token with it.
    pub after: f64,
    /// How it helps beside the others, −1 to 1: see [`guard::help`](crate::outer::guard::help).
    pub help: f64,
}

/// Held-out loss after so many commits.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Evaluated {
    /// Sum of the fragments' versions at the evaluating site.
    pub commits: u64,
    /// Summed loss in nats.
    pub nats: f64,
    /// Tokens predicted.
    pub tokens: u64,
    /// Bytes of text that these tokens stand for.
    pub bytes: u64,
}

impl Evaluated {
    /// Bits per byte of text: the loss in a unit that does not depend on the tokenizer.
    pub fn bits_per_byte(&self) -> f64 {
        self.nats / std::f64::consts::LN_2 / (self.bytes.max(1) as f64)
    }
}
