//! TBD

pub mod data;
pub mod hf;
