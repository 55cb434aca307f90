//! The whole of Atoll in one thread and from one seed: the coordinator's and the sites' machines as
//! they run in production, a [`toy`] engine, and a network that loses, doubles, delays and reorders;
//! processes crash and come back. The same seed gives the same world to the last bit.
//!
//! [`simulate`] runs one world to its end and checks every invariant of ARCHITECTURE.md on the way.

pub mod toy;
mod world;

pub use world::{Hardships, Outcome, simulate};
