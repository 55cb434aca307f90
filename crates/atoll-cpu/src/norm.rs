//! RMSNorm: y = g ⊙ x·r with r = 1/√(mean(x²) + ε), row by row.

use crate::math::{dot, simd};

/// Writes r `(n)` and y `(n,D)` for x `(n,D)` and the gain g `(D)`.
pub(crate) fn forward(x: &[f32], gain: &[f32], eps: f32, inverse_rms: &mut [f32], y: &mut [f32]) {
    let d = gain.len();
    simd(
        #[inline(always)]
        || {
            for (r, x) in inverse_rms.iter_mut().zip(x.chunks(d)) {
                *r = 1.0 / (dot(x, x) / d as f32 + eps).sqrt();
            }
        },
    );
    apply(x, inverse_rms, gain, y);
}

/// Writes y `(n,D)` once r `(n)` is known.
pub(crate) fn apply(x: &[f32], inverse_rms: &[f32], gain: &[f32], y: &mut [f32]) {
    let d = gain.len();
    simd(
        #[inline(always)]
        || {
            for ((y, x), &r) in y.chunks_mut(d).zip(x.chunks(d)).zip(inverse_rms) {
                for ((y, x), g) in y.iter_mut().zip(x).zip(gain) {
                    *y = g * (x * r);
                }
            }
        },
    );
}

/// Adds to dx `(n,D)` and dg `(D)`, given dy `(n,D)`, which is spent:
///
/// dg = Σ dy ⊙ x·r over the rows, and dx = r·(g ⊙ dy) − x·r³/D · Σ (g ⊙ dy ⊙ x).
pub(crate) fn backward(
    x: &[f32],
    inverse_rms: &[f32],
    gain: &[f32],
    dy: &mut [f32],
    dx: &mut [f32],
    d_gain: &mut [f32],
) {
    let d = gain.len();
    simd(
        #[inline(always)]
        || {
            for (((x, dy), dx), &r) in x.chunks(d).zip(dy.chunks_mut(d)).zip(dx.chunks_mut(d)).zip(inverse_rms) {
                for (((dy, x), g), d_gain) in dy.iter_mut().zip(x).zip(gain).zip(d_gain.iter_mut()) {
                    *d_gain += *dy * (x * r);
                    *dy *= g;
                }
                let pull = dot(dy, x) * r * r * r / d as f32;
                for ((dx, dy), x) in dx.iter_mut().zip(dy.iter()).zip(x) {
                    *dx += r * dy - x * pull;
                }
            }
        },
    );
}
