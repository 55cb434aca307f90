//! The decoders of all crates by name. What must hold for each is told where it lives, in a module `fuzz`.

use atoll_core::fuzz::Target;

/// All decoders.
pub fn targets() -> impl Iterator<Item = Target> {
    atoll_core::fuzz::TARGETS.into_iter().chain(atoll_node::fuzz::TARGETS)
}

/// The law of a decoder.
pub fn law(name: &str) -> fn(&[u8]) {
    targets().find(|target| target.name == name).unwrap_or_else(|| panic!("there is no decoder {name}")).law
}
