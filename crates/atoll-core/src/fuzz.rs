//! What must hold for any bytes from outside. A [`Target`] is one decoder: a law that panics where it is broken, and
//! some strings that the decoder reads well, from which others are made. `cargo test` tries each on some thousands;
//! the folder `fuzz/` digs deeper with libFuzzer. Hashes protect some of the decoders from mutated bytes; there a law
//! also seals what it is given, as somebody would who means it.

mod laws;

use std::panic::catch_unwind;

use crate::rng::Rng;

/// One decoder.
pub struct Target {
    /// Its name; there is a file of that name in `fuzz/fuzz_targets`.
    pub name: &'static str,
    /// Panics if what must hold for these bytes does not.
    pub law: fn(&[u8]),
    /// Strings that it reads well.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

/// The decoders of this crate.
pub const TARGETS: [Target; 6] = [
    Target { name: "payload", law: laws::payload, seeds: laws::payloads },
    Target { name: "frame", law: laws::frame, seeds: laws::frames },
    Target { name: "status", law: laws::status, seeds: laws::statuses },
    Target { name: "standing", law: laws::standing, seeds: laws::standings },
    Target { name: "journal", law: laws::journal, seeds: laws::journals },
    Target { name: "name", law: laws::name, seeds: laws::names },
];

/// Longest string that is tried.
const LENGTH_MAX: usize = 1 << 16;
/// Changes of one string at most.
const EDITS_MAX: u64 = 4;
/// Words that decoders are likely to trip over.
const WORDS: [&[u8]; 12] = [
    &[0; 8],
    &[0xff; 8],
    &[0xff, 0xff, 0xff, 0x7f],
    &[0, 0, 0xc0, 0x7f], // NaN as f32,
    &[0xc0, 0x7f],       // and as bf16.
    &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01],
    b"-1",
    b"18446744073709551615",
    b"1e999",
    b"null",
    b"\"",
    "\u{10ffff}".as_bytes(),
];

impl Target {
    /// Tries the law on all seeds, and on so many strings made of them or of nothing, always the same.
    ///
    /// # Errors
    /// The bytes for which it is broken, in hexadecimal digits.
    pub fn hold(&self, cases: u64) -> Result<(), String> {
        let seeds = (self.seeds)();
        let made = (0..cases).map(|case| mutated(&seeds, &mut Rng::new(case)));
        for bytes in seeds.iter().cloned().chain(made) {
            let law = self.law;
            catch_unwind(|| law(&bytes)).map_err(|_| {
                let digits: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
                format!("{} is broken for {digits}", self.name)
            })?;
        }
        Ok(())
    }
}

/// A string made from `seeds` by a few changes; now and then from nothing.
fn mutated(seeds: &[Vec<u8>], rng: &mut Rng) -> Vec<u8> {
    let pick = |rng: &mut Rng| match seeds {
        [] => Vec::new(),
        _ => seeds[rng.below(seeds.len() as u64) as usize].clone(),
    };
    if rng.chance(0.05) {
        return (0..rng.below(300)).map(|_| rng.next_u64() as u8).collect();
    }
    let mut bytes = pick(rng);
    for _ in 0..1 + rng.below(EDITS_MAX) {
        let other = pick(rng);
        edit(&mut bytes, &other, rng);
    }
    bytes.truncate(LENGTH_MAX);
    bytes
}

/// Changes `bytes` in one place; `other` has something to put there.
fn edit(bytes: &mut Vec<u8>, other: &[u8], rng: &mut Rng) {
    let place = |len: usize, rng: &mut Rng| rng.below(len as u64 + 1) as usize;
    let (at, word) = (place(bytes.len(), rng), WORDS[rng.below(WORDS.len() as u64) as usize]);
    match rng.below(7) {
        0 if at < bytes.len() => bytes[at] ^= 1 << rng.below(8),
        1 if at < bytes.len() => bytes[at] = rng.next_u64() as u8,
        2 => bytes.truncate(at),
        3 => drop(bytes.drain(at..place(bytes.len() - at, rng) + at)),
        4 => drop(bytes.splice(at..at, word.iter().copied())),
        5 => {
            let end = bytes.len().min(at + word.len());
            bytes[at..end].copy_from_slice(&word[..end - at]);
        }
        _ => {
            let from = place(other.len(), rng);
            let part = &other[from..from + place(other.len() - from, rng)];
            drop(bytes.splice(at..at, part.iter().copied()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_law_holds_for_any_bytes() {
        for target in TARGETS {
            target.hold(2_000).unwrap();
        }
    }

    #[test]
    fn a_broken_law_is_found_and_its_bytes_are_told() {
        let law = |bytes: &[u8]| assert!(!bytes.contains(&7), "no sevens");
        let target = Target { name: "sevens", law, seeds: || vec![vec![1; 20]] };
        let broken = target.hold(2_000).unwrap_err();
        assert!(broken.starts_with("sevens is broken for ") && broken.contains("07"), "{broken}");
    }
}
