//! Content addresses. Every block of bytes that travels between sites is named by its BLAKE3 hash,
//! so that what arrives can be verified, stored once and asked for again by name.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use blake3::hazmat::{ChainingValue, HasherExt, Mode, merge_subtrees_non_root, merge_subtrees_root};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::team::{Team, share_out};

/// A BLAKE3 hash: the name of some bytes. Shown and journaled as 64 hexadecimal digits, 32 bytes on the wire.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Digest(pub [u8; 32]);

/// Bytes that a team's member hashes at a time. A power of two, so that they are a subtree of BLAKE3's tree.
const SUBTREE: usize = 1 << 18;

/// Weights as they are stored, sent and hashed: little-endian `f32`. On most machines they lie in memory like that.
pub fn little_endian(weights: &[f32]) -> Cow<'_, [u8]> {
    if cfg!(target_endian = "little") {
        return Cow::Borrowed(bytemuck::cast_slice(weights));
    }
    Cow::Owned(weights.iter().flat_map(|weight| weight.to_le_bytes()).collect())
}

/// The weights whose little-endian `f32` bytes these are; what is left over of an incomplete one is dropped.
pub fn from_little_endian(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

impl Digest {
    /// The name of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }

    /// The name of a slice of weights: the hash of their little-endian `f32` bytes. It is therefore
    /// also the content address of those bytes on the wire.
    pub fn of_weights(weights: &[f32]) -> Self {
        Self::of(&little_endian(weights))
    }

    /// [`of_weights`](Self::of_weights), shared out.
    pub fn of_weights_by(weights: &[f32], team: &dyn Team) -> Self {
        if size_of_val(weights) <= SUBTREE || cfg!(target_endian = "big") {
            return Self::of_weights(weights);
        }
        let subtrees = bytemuck::cast_slice(weights).chunks(SUBTREE);
        let nodes = share_out(subtrees, team, |number, bytes| {
            let mut hasher = blake3::Hasher::new();
            hasher.set_input_offset((number * SUBTREE) as u64);
            hasher.update(bytes).finalize_non_root()
        });
        let (left, right) = branches(&nodes);
        Self(*merge_subtrees_root(&node(left), &node(right), Mode::Hash).as_bytes())
    }

    /// One name for a list of names: how the fragments' digests make the model's.
    pub fn of_all<'a>(parts: impl IntoIterator<Item = &'a Digest>) -> Self {
        let mut hasher = blake3::Hasher::new();
        for part in parts {
            hasher.update(&part.0);
        }
        Self(*hasher.finalize().as_bytes())
    }

    /// The first ten digits, for people.
    pub fn short(&self) -> String {
        self.to_string()[..10].to_string()
    }
}

/// The node above `nodes`.
fn node(nodes: &[ChainingValue]) -> ChainingValue {
    if let [only] = nodes {
        return *only;
    }
    let (left, right) = branches(nodes);
    merge_subtrees_non_root(&node(left), &node(right), Mode::Hash)
}

/// Two or more nodes as BLAKE3 parts them: as many as possible to the left, but a power of two, and some to the right.
fn branches(nodes: &[ChainingValue]) -> (&[ChainingValue], &[ChainingValue]) {
    nodes.split_at(nodes.len().next_power_of_two() / 2)
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.short())
    }
}

/// The text was not 64 hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a digest is 64 hexadecimal digits")]
pub struct DigestError;

impl FromStr for Digest {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Self, DigestError> {
        if text.len() != 64 || !text.is_ascii() {
            return Err(DigestError);
        }
        let mut bytes = [0u8; 32];
        for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
            let pair = std::str::from_utf8(pair).map_err(|_| DigestError)?;
            *byte = u8::from_str_radix(pair, 16).map_err(|_| DigestError)?;
        }
        Ok(Self(bytes))
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() { serializer.collect_str(self) } else { self.0.serialize(serializer) }
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if !deserializer.is_human_readable() {
            return <[u8; 32]>::deserialize(deserializer).map(Self);
        }
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::team::Alone;

    #[test]
    fn weights_are_addressed_by_their_little_endian_bytes() {
        let weights: Vec<f32> = (0..3000).map(|i| i as f32 * 0.5 - 7.0).collect();
        let bytes: Vec<u8> = weights.iter().flat_map(|w| w.to_le_bytes()).collect();
        assert_eq!(Digest::of_weights(&weights), Digest::of(&bytes));
    }

    #[test]
    fn a_team_finds_the_same_name() {
        for len in [0, 1, SUBTREE / 4, SUBTREE / 4 + 1, SUBTREE / 2, 5 * SUBTREE / 4 + 77, 8 * SUBTREE / 4] {
            let weights: Vec<f32> = (0..len).map(|i| i as f32 * 0.25 - 3.0).collect();
            assert_eq!(Digest::of_weights_by(&weights, &Alone), Digest::of_weights(&weights), "{len}");
        }
    }

    #[test]
    fn text_round_trips_and_nonsense_is_refused() {
        let digest = Digest::of(b"atoll");
        assert_eq!(digest.to_string().parse(), Ok(digest));
        for bad in ["", "12", &"é".repeat(32), &"g".repeat(64)] {
            assert_eq!(bad.parse::<Digest>(), Err(DigestError), "{bad}");
        }
    }
}
