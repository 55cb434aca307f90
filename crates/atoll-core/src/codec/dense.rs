//! Codecs that write every weight: `f32`, `bf16`, E3M0.

use half::bf16;

/// Weights in a block of E3M0.
pub(super) const BLOCK: usize = 128;
/// Bytes of such a block, full or not.
pub(super) const BLOCK_BYTES: usize = e3m0_bytes(BLOCK);

/// Bytes of so many weights with a common scale.
pub(super) const fn e3m0_bytes(count: usize) -> usize {
    2 + count.div_ceil(2)
}

/// To bf16, with the largest finite value in place of infinity.
pub(super) fn saturate(value: f32) -> bf16 {
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

/// Writes a block, of at most [`BLOCK`] weights, and zeros behind them.
pub(super) fn encode_e3m0(block: &[f32], out: &mut [u8]) {
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
    out[..2].copy_from_slice(&scale.to_le_bytes());
    for (byte, pair) in out[2..].iter_mut().zip(nibbles.chunks_exact(2)) {
        *byte = pair[0] | pair[1] << 4;
    }
}

pub(super) fn decode_e3m0(bytes: &[u8]) -> impl Iterator<Item = f32> {
    let scale = bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32();
    let value = move |nibble: u8| if nibble & 8 == 0 { level(nibble & 7) } else { -level(nibble & 7) } * scale;
    bytes[2..].iter().flat_map(move |byte| [value(byte & 15), value(byte >> 4)])
}
