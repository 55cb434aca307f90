//! Atoll's pure core. Nothing here reads a clock, a file or a socket: every decision is a function of
//! its inputs, so the same code runs in production, in the deterministic simulator and in replay.
//!
//! The modules in the order in which the data flows:
//!
//! | module | holds |
//! |---|---|
//! | [`model`] | the shape of the Llama that all sites train |
//! | [`manifest`] | its tensors, their fragments, the layout's fingerprint |
//! | [`data`] | sample ranges, the keyed permutation, leases and the ledger |
//! | [`training`] | batch, context, inner optimizer |
//! | [`engine`] | the trait behind which a device trains, and its conformance suite |
//! | [`delta`] | a site's copy of Θ, pseudo-gradients, carry |
//! | [`codec`] | weights to bytes and back |
//! | [`round`] | the machines of site and coordinator |
//! | [`plan`] | arithmetic of pace |
//! | [`outer`] | merge and outer step |
//! | [`journal`] | entries, and the book that is their sum |
//! | [`vigil`] | when a standby may think that the leader is gone |
//! | [`wire`] | frames |
//!
//! Beside them: [`hash`] (content addresses), [`site`] (names, time), [`rng`], [`simd`] and [`team`] (speed), and
//! [`fuzz`] (what must hold for any bytes from outside).

pub mod codec;
pub mod data;
pub mod delta;
pub mod engine;
pub mod fuzz;
pub mod hash;
pub mod journal;
pub mod manifest;
pub mod model;
pub mod outer;
pub mod plan;
pub mod rng;
pub mod round;
pub mod simd;
pub mod site;
pub mod team;
pub mod training;
pub mod vigil;
pub mod wire;
