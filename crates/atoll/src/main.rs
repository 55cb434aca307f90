//! TBD
mod view;
fn main() {}
