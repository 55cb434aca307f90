//! RMSNorm: y = g ⊙ x·r with r = 1/√(mean(x²) + ε), row by row.

use rayon::prelude::*;

use crate::TILE_ROWS;
use crate::math::{dot, simd};

/// Writes r `(N)` and y `(N,D)` for x `(N,D)` and the gain g `(D)`.
pub(crate) fn forward(x: &[f32], gain: &[f32], eps: f32, inverse_rms: &mut [f32], y: &mut [f32]) {
    let d = gain.len();
    inverse_rms.par_iter_mut().zip(x.par_chunks(d)).with_min_len(TILE_ROWS).for_each(|(r, x)| {
        *r = simd(|| 1.0 / (dot(x, x) / d as f32 + eps).sqrt());
    });
    apply(x, inverse_rms, gain, y);
}

/// Writes y `(N,D)` once r `(N)` is known.
pub(crate) fn apply(x: &[f32], inverse_rms: &[f32], gain: &[f32], y: &mut [f32]) {
    let d = gain.len();
    let rows = y.par_chunks_mut(d).zip(x.par_chunks(d)).zip(inverse_rms);
    rows.with_min_len(TILE_ROWS).for_each(|((y, x), &r)| {
        simd(|| {
            for ((y, x), g) in y.iter_mut().zip(x).zip(gain) {
                *y = g * (x * r);
            }
        });
    });
}

/// Adds to dx `(N,D)` and dg `(D)`, given dy `(N,D)`:
///
/// dg = Σ dy ⊙ x·r over the rows, and dx = r·(g ⊙ dy) − x·r³/D · Σ (g ⊙ dy ⊙ x).
pub(crate) fn backward(x: &[f32], inverse_rms: &[f32], gain: &[f32], dy: &[f32], dx: &mut [f32], d_gain: &mut [f32]) {
    let tile = TILE_ROWS * gain.len();
    let tiles = dx.par_chunks_mut(tile).zip(x.par_chunks(tile)).zip(dy.par_chunks(tile));
    let partial: Vec<Vec<f32>> = tiles
        .zip(inverse_rms.par_chunks(TILE_ROWS))
        .map(|(((dx, x), dy), inverse_rms)| backward_tile(x, inverse_rms, gain, dy, dx))
        .collect();
    for tile in &partial {
        d_gain.iter_mut().zip(tile).for_each(|(sum, part)| *sum += part);
    }
}

/// The rows of one tile; returns its part of dg `(D)`.
fn backward_tile(x: &[f32], inverse_rms: &[f32], gain: &[f32], dy: &[f32], dx: &mut [f32]) -> Vec<f32> {
    let d = gain.len();
    let mut d_gain = vec![0.0; d];
    let mut scaled = vec![0.0; d]; // g ⊙ dy
    simd(|| {
        for (((x, dy), dx), &r) in x.chunks(d).zip(dy.chunks(d)).zip(dx.chunks_mut(d)).zip(inverse_rms) {
            for i in 0..d {
                scaled[i] = gain[i] * dy[i];
                d_gain[i] += dy[i] * (x[i] * r);
            }
            let pull = dot(&scaled, x) * r * r * r / d as f32;
            for i in 0..d {
                dx[i] += r * scaled[i] - x[i] * pull;
            }
        }
    });
    d_gain
}
