//! Codecs that write every weight: `f32`, `bf16`, E3M0.

use half::bf16;

use super::Codec;

/// Weights in a block of E3M0.
pub(super) const BLOCK: usize = 128;
/// Bytes of such a block, full or not.
pub(super) const BLOCK_BYTES: usize = 2 + BLOCK / 2;

/// Writes what bytes of such a codec say; of another one, nothing.
#[inline(always)]
pub(super) fn decode(codec: Codec, bytes: &[u8], values: &mut [f32]) {
    match codec {
        Codec::F32 => decode_f32(bytes, values),
        Codec::Bf16 => decode_bf16(bytes, values),
        Codec::E3m0 => decode_e3m0(bytes, values),
        Codec::Sparse(_) | Codec::Tcq(_) => {}
    }
}

#[inline(always)]
pub(super) fn encode_f32(values: &[f32], out: &mut [u8]) {
    for (out, value) in out.as_chunks_mut().0.iter_mut().zip(values) {
        *out = value.to_le_bytes();
    }
}

#[inline(always)]
fn decode_f32(bytes: &[u8], values: &mut [f32]) {
    for (value, bytes) in values.iter_mut().zip(bytes.as_chunks().0) {
        *value = f32::from_le_bytes(*bytes);
    }
}

#[inline(always)]
pub(super) fn encode_bf16(values: &[f32], out: &mut [u8]) {
    for (out, value) in out.as_chunks_mut().0.iter_mut().zip(values) {
        *out = saturate(*value).to_le_bytes();
    }
}

#[inline(always)]
fn decode_bf16(bytes: &[u8], values: &mut [f32]) {
    for (value, bytes) in values.iter_mut().zip(bytes.as_chunks().0) {
        *value = widen(*bytes);
    }
}

/// To the nearest bf16, of two the even one, with the largest finite value in place of infinity. For finite values.
#[inline(always)]
pub(super) fn saturate(value: f32) -> bf16 {
    const MAX: f32 = f32::from_bits(0x7f7f_0000);
    let bits = value.clamp(-MAX, MAX).to_bits();
    bf16::from_bits(((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16)
}

/// A bf16 is the upper half of an `f32`.
#[inline(always)]
pub(super) fn widen(bytes: [u8; 2]) -> f32 {
    f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16)
}

/// What a nibble stands for, in units of the scale: ± 0 for exponent 0, else ± 2^(e−7). No look-up and no case, so that a
/// vector does many: as the exponent of an `f32` it is ± 0 or ± 2^(e−127), which is [`half()`] …
#[inline(always)]
const fn level(nibble: u8) -> f32 {
    f32::from_bits((half(nibble) as u32) << 16) * UP
}

/// … as a bf16, and this lifts it.
const UP: f32 = f32::from_bits((120 + 127) << 23);

#[inline(always)]
const fn half(nibble: u8) -> u16 {
    let nibble = nibble as u16;
    (nibble & 8) << 12 | (nibble & 7) << 7
}

/// The exponent whose level is nearest to `ratio` ≥ 0. Between 2^k and 2^(k+1) the border is
/// 1.5·2^k, so the exponent of ratio·4/3 decides; below half the smallest level it is zero.
#[inline(always)]
fn nearest_exponent(ratio: f32) -> u8 {
    let floor = (ratio * (4.0 / 3.0)).to_bits() >> 23;
    if ratio < level(1) * 0.5 { 0 } else { floor.clamp(121, 127) as u8 - 120 }
}

#[inline(always)]
pub(super) fn encode_e3m0(values: &[f32], out: &mut [u8]) {
    for (block, out) in values.chunks(BLOCK).zip(out.as_chunks_mut().0) {
        encode_block(block, out);
    }
}

#[inline(always)]
fn encode_block(block: &[f32], out: &mut [u8; BLOCK_BYTES]) {
    let peak = f32::from_bits(greatest(block));
    let mut nibbles = [0u8; BLOCK];
    let mut scale = bf16::ZERO;
    // A peak below the normal numbers has no usable reciprocal; such a block is zero.
    if peak >= f32::MIN_POSITIVE {
        for (nibble, &value) in nibbles.iter_mut().zip(block) {
            *nibble = nearest_exponent(value.abs() / peak) | if value < 0.0 { 8 } else { 0 };
        }
        scale = fit(block, &nibbles);
    }
    out[..2].copy_from_slice(&scale.to_le_bytes());
    for (byte, [low, high]) in out[2..].iter_mut().zip(nibbles.as_chunks().0) {
        *byte = low | high << 4;
    }
}

/// The scale with which the nibbles are nearest to the block: least squares. Neither sum loses a bit, in whatever order: of a
/// product the lowest bit is at most 36 below the peak's highest, so 128 of them take 44 of 53 bits.
#[inline(always)]
fn fit(block: &[f32], nibbles: &[u8; BLOCK]) -> bf16 {
    const LANES: usize = 16;
    let (mut alongs, mut squares) = ([0.0f64; LANES], [0.0f32; LANES]);
    let mut whole = [0.0; BLOCK];
    whole[..block.len()].copy_from_slice(block);
    for (values, nibbles) in whole.as_chunks::<LANES>().0.iter().zip(nibbles.as_chunks::<LANES>().0) {
        for lane in 0..LANES {
            let level = level(nibbles[lane]);
            alongs[lane] += f64::from(values[lane]) * f64::from(level);
            squares[lane] += level * level;
        }
    }
    let (mut along, mut square) = (0.0, 0.0);
    for lane in 0..LANES {
        along += alongs[lane];
        square += f64::from(squares[lane]);
    }
    saturate((along / square) as f32) // The peak's own level is 1.
}

#[inline(always)]
fn decode_e3m0(bytes: &[u8], values: &mut [f32]) {
    let (blocks, rest) = values.as_chunks_mut::<BLOCK>();
    let (bytes, _) = bytes.as_chunks::<BLOCK_BYTES>();
    for (block, bytes) in blocks.iter_mut().zip(bytes) {
        decode_block(bytes, block);
    }
    if let Some(bytes) = bytes.get(blocks.len()).filter(|_| !rest.is_empty()) {
        let mut block = [0.0; BLOCK];
        decode_block(bytes, &mut block);
        rest.copy_from_slice(&block[..rest.len()]);
    }
}

#[inline(always)]
fn decode_block(bytes: &[u8; BLOCK_BYTES], block: &mut [f32; BLOCK]) {
    let scale = widen([bytes[0], bytes[1]]);
    let mut halves = [0u16; BLOCK];
    for (pair, &byte) in halves.as_chunks_mut().0.iter_mut().zip(&bytes[2..]) {
        *pair = [half(byte & 15), half(byte >> 4)];
    }
    for (value, half) in block.iter_mut().zip(halves) {
        *value = widen(half.to_le_bytes()) * UP * scale;
    }
}

/// The greatest magnitude's bits, which order like magnitudes; beyond those of infinity if something is not a number.
#[inline(always)]
pub(super) fn greatest(values: &[f32]) -> u32 {
    let mut greatest = 0i32;
    for value in values {
        greatest = greatest.max((value.to_bits() & 0x7fff_ffff) as i32);
    }
    greatest as u32
}
