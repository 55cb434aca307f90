//! How weights are written for the wire. A codec is a pure function from a slice of `f32` to bytes
//! and back; a payload names its codec and its length, so it can be decoded without context.
//!
//! ```text
//! payload   0        1              5
//!           | codec  | count: u32   | body …                      (little endian throughout)
//! f32       body = count × 4 bytes
//! bf16      body = count × 2 bytes, round to nearest even, saturating
//! e3m0      body = for each block of 128 values
//!                  | scale: bf16 | 64 bytes, two values each, low nibble first |
//!           nibble = sign (bit 3) and exponent e (bits 0–2): 0, or ± scale · 2^(e−7)
//! ```
//!
//! E3M0 costs 4.125 bits per value; Streaming DiLoCo (arXiv 2501.18512, section 3.3) found it to
//! carry pseudo-gradients without loss. The scale is fitted by least squares after the exponents are
//! chosen, because rounding to powers of two alone shrinks what it rounds.
//!
//! Every byte string decodes or is refused: no panic, no allocation from an unchecked length, and
//! nothing that is not finite comes out.

use half::bf16;
use serde::{Deserialize, Serialize};

/// A way to write weights. The numbers are the wire's and are never used again for something else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[repr(u8)]
pub enum Codec {
    /// Exact.
    F32 = 1,
    /// The upper half of an `f32`.
    Bf16 = 2,
    /// Sign and exponent in blocks with a scale: 4.125 bits per value.
    E3m0 = 3,
}

/// Why bytes are no payload, or values have none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// A value is NaN or infinite.
    #[error("value {index} is not finite")]
    NonFinite {
        /// Its position.
        index: usize,
    },
    /// The first byte names no codec.
    #[error("codec {0} is unknown")]
    UnknownCodec(u8),
    /// The payload is not for this fragment.
    #[error("the payload is for {found} values, expected {expected}")]
    Count {
        /// What it says.
        found: usize,
        /// What the fragment has.
        expected: usize,
    },
    /// The payload is cut short or has bytes to spare.
    #[error("the payload has {found} bytes, expected {expected}")]
    Length {
        /// What there is.
        found: usize,
        /// What codec and count call for.
        expected: usize,
    },
}

const HEADER: usize = 5;
const BLOCK: usize = 128;
const BLOCK_BYTES: usize = 2 + BLOCK / 2;

impl Codec {
    /// All codecs.
    pub const ALL: [Codec; 3] = [Codec::F32, Codec::Bf16, Codec::E3m0];

    /// Bytes of the payload for `count` values.
    pub fn payload_len(self, count: usize) -> usize {
        HEADER
            + match self {
                Codec::F32 => count * 4,
                Codec::Bf16 => count * 2,
                Codec::E3m0 => count.div_ceil(BLOCK) * BLOCK_BYTES,
            }
    }

    /// Writes `values` as a payload.
    ///
    /// # Errors
    /// [`CodecError::NonFinite`] names the first value that is NaN or infinite.
    ///
    /// # Panics
    /// If there are 2³² values or more; manifests are far smaller.
    pub fn encode(self, values: &[f32]) -> Result<Vec<u8>, CodecError> {
        check_finite(values)?;
        let mut payload = Vec::with_capacity(self.payload_len(values.len()));
        payload.push(self as u8);
        payload.extend(u32::try_from(values.len()).expect("a fragment has fewer than 2^32 weights").to_le_bytes());
        match self {
            Codec::F32 => payload.extend(values.iter().flat_map(|value| value.to_le_bytes())),
            Codec::Bf16 => payload.extend(values.iter().flat_map(|&value| saturate(value).to_le_bytes())),
            Codec::E3m0 => values.chunks(BLOCK).for_each(|block| payload.extend(encode_block(block))),
        }
        Ok(payload)
    }

    fn from_number(number: u8) -> Result<Self, CodecError> {
        Self::ALL.into_iter().find(|codec| *codec as u8 == number).ok_or(CodecError::UnknownCodec(number))
    }
}

/// Reads a payload for a fragment of `count` weights.
///
/// # Errors
/// If the bytes are not such a payload or hold a value that is not finite.
pub fn decode(payload: &[u8], count: usize) -> Result<Vec<f32>, CodecError> {
    let Some((header, body)) = payload.split_at_checked(HEADER) else {
        return Err(CodecError::Length { found: payload.len(), expected: HEADER });
    };
    let codec = Codec::from_number(header[0])?;
    let found = u32::from_le_bytes([header[1], header[2], header[3], header[4]]) as usize;
    if found != count {
        return Err(CodecError::Count { found, expected: count });
    }
    if payload.len() != codec.payload_len(count) {
        return Err(CodecError::Length { found: payload.len(), expected: codec.payload_len(count) });
    }
    let values: Vec<f32> = match codec {
        Codec::F32 => body.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        Codec::Bf16 => body.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        Codec::E3m0 => body.chunks_exact(BLOCK_BYTES).flat_map(decode_block).take(count).collect(),
    };
    check_finite(&values)?;
    Ok(values)
}

/// Refuses values that are NaN or infinite.
///
/// # Errors
/// [`CodecError::NonFinite`] names the first one.
pub fn check_finite(values: &[f32]) -> Result<(), CodecError> {
    match values.iter().position(|value| !value.is_finite()) {
        Some(index) => Err(CodecError::NonFinite { index }),
        None => Ok(()),
    }
}

/// To bf16, with the largest finite value in place of infinity.
fn saturate(value: f32) -> bf16 {
    bf16::from_f32(value.clamp(bf16::MIN.to_f32(), bf16::MAX.to_f32()))
}

/// Magnitude of exponent `e` in units of the scale: 0 for 0, else 2^(e−7).
fn level(e: u8) -> f32 {
    if e == 0 { 0.0 } else { f32::from_bits((u32::from(e) + 120) << 23) }
}

/// The exponent whose level is nearest to `ratio` ≥ 0. Between 2^k and 2^(k+1) the border is
/// 1.5·2^k, so the exponent of ratio·4/3 decides; below half the smallest level it is zero.
fn nearest_exponent(ratio: f32) -> u8 {
    let floor = (ratio * (4.0 / 3.0)).to_bits() >> 23;
    if ratio < level(1) * 0.5 { 0 } else { floor.clamp(121, 127) as u8 - 120 }
}

fn encode_block(block: &[f32]) -> [u8; BLOCK_BYTES] {
    let peak = block.iter().fold(0.0f32, |peak, value| peak.max(value.abs()));
    let mut nibbles = [0u8; BLOCK];
    let (mut along, mut square) = (0.0f64, 0.0f64);
    // A peak below the normal numbers has no usable reciprocal; such a block is zero.
    if peak >= f32::MIN_POSITIVE {
        for (nibble, &value) in nibbles.iter_mut().zip(block) {
            let e = nearest_exponent(value.abs() / peak);
            *nibble = e | if value < 0.0 { 8 } else { 0 };
            along += f64::from(value.abs()) * f64::from(level(e));
            square += f64::from(level(e) * level(e));
        }
    }
    let scale = if square > 0.0 { saturate((along / square) as f32) } else { bf16::ZERO };
    let mut bytes = [0u8; BLOCK_BYTES];
    bytes[..2].copy_from_slice(&scale.to_le_bytes());
    for (byte, pair) in bytes[2..].iter_mut().zip(nibbles.chunks_exact(2)) {
        *byte = pair[0] | pair[1] << 4;
    }
    bytes
}

fn decode_block(bytes: &[u8]) -> impl Iterator<Item = f32> {
    let scale = bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32();
    let value = move |nibble: u8| if nibble & 8 == 0 { level(nibble & 7) } else { -level(nibble & 7) } * scale;
    bytes[2..].iter().flat_map(move |byte| [value(byte & 15), value(byte >> 4)])
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn values() -> impl Strategy<Value = Vec<f32>> {
        prop::collection::vec(prop_oneof![-1.0f32..1.0, -1e-6f32..1e-6, -1e30f32..1e30, Just(0.0)], 0..400)
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    proptest! {
        #[test]
        fn length_is_as_announced_and_a_second_trip_changes_nothing(values in values()) {
            for codec in Codec::ALL {
                let payload = codec.encode(&values).unwrap();
                prop_assert_eq!(payload.len(), codec.payload_len(values.len()));
                let once = decode(&payload, values.len()).unwrap();
                let twice = decode(&codec.encode(&once).unwrap(), values.len()).unwrap();
                prop_assert_eq!(&once, &twice, "{:?}", codec);
                if codec == Codec::F32 {
                    prop_assert_eq!(&once, &values);
                }
            }
        }

        #[test]
        fn bf16_is_within_one_part_in_256(values in values()) {
            let back = decode(&Codec::Bf16.encode(&values).unwrap(), values.len()).unwrap();
            for (value, back) in values.iter().zip(back) {
                prop_assert!((value - back).abs() <= value.abs() / 256.0, "{value} {back}");
            }
        }

        /// Quantization keeps at least cos² = 0.9 of a normal block's energy and never turns it around.
        #[test]
        fn e3m0_points_where_the_block_points(seed: u64, size in 1usize..300, exponent in -20i32..20) {
            let mut rng = crate::rng::Rng::new(seed);
            let values: Vec<f32> = (0..size).map(|_| (rng.normal() * 2f64.powi(exponent)) as f32).collect();
            let back = decode(&Codec::E3m0.encode(&values).unwrap(), size).unwrap();
            let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum::<f64>();
            let cosine = dot(&values, &back) / (dot(&values, &values) * dot(&back, &back)).sqrt();
            prop_assert!(cosine > 0.95, "{cosine}");
        }

        #[test]
        fn any_bytes_decode_or_are_refused(mut bytes in prop::collection::vec(any::<u8>(), 0..400), count in 0usize..600, tidy: bool) {
            if tidy && bytes.len() >= 5 {
                bytes[0] %= 4;
                bytes[1..5].copy_from_slice(&(count as u32).to_le_bytes());
                if let Ok(codec) = Codec::from_number(bytes[0]) {
                    bytes.resize(codec.payload_len(count), 0x5a);
                }
            }
            if let Ok(values) = decode(&bytes, count) {
                prop_assert_eq!(values.len(), count);
                prop_assert!(values.iter().all(|value| value.is_finite()));
            }
        }
    }

    #[test]
    fn the_bytes_are_these() {
        let values = [1.0, -0.5, 0.25, 0.0];
        assert_eq!(hex(&Codec::F32.encode(&values).unwrap()), "01040000000000803f000000bf0000803e00000000");
        assert_eq!(hex(&Codec::Bf16.encode(&values).unwrap()), "0204000000803f00bf803e0000");
        let e3m0 = hex(&Codec::E3m0.encode(&values).unwrap());
        assert_eq!(&e3m0[..18], "0304000000803fe705");
        assert!(e3m0[18..].bytes().all(|digit| digit == b'0'));
    }

    #[test]
    fn what_is_not_finite_is_refused_both_ways() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for codec in Codec::ALL {
                assert_eq!(codec.encode(&[0.0, bad]), Err(CodecError::NonFinite { index: 1 }));
            }
        }
        let infinite = [2, 1, 0, 0, 0, 0x80, 0x7f];
        assert_eq!(decode(&infinite, 1), Err(CodecError::NonFinite { index: 0 }));
    }

    #[test]
    fn wrong_lengths_are_named() {
        let payload = Codec::F32.encode(&[1.0; 3]).unwrap();
        assert_eq!(decode(&payload, 4), Err(CodecError::Count { found: 3, expected: 4 }));
        assert_eq!(decode(&payload[..9], 3), Err(CodecError::Length { found: 9, expected: 17 }));
        assert_eq!(decode(&[], 0), Err(CodecError::Length { found: 0, expected: 5 }));
        assert_eq!(decode(&[9, 0, 0, 0, 0], 0), Err(CodecError::UnknownCodec(9)));
    }
}
