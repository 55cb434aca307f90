//! SwiGLU: y = silu(gate) ⊙ up with silu(x) = x·σ(x), element by element over `(N, inner)`.

use rayon::prelude::*;

use crate::math::{sigmoid, simd};

/// Elements per task.
const TILE: usize = 1 << 14;

/// Writes y.
pub(crate) fn forward(gate: &[f32], up: &[f32], y: &mut [f32]) {
    y.par_chunks_mut(TILE).zip(gate.par_chunks(TILE)).zip(up.par_chunks(TILE)).for_each(|((y, gate), up)| {
        simd(|| {
            for ((y, gate), up) in y.iter_mut().zip(gate).zip(up) {
                *y = gate * sigmoid(*gate) * up;
            }
        });
    });
}

/// Replaces gate and up by their gradients, given dy.
pub(crate) fn backward(gate: &mut [f32], up: &mut [f32], dy: &[f32]) {
    let tiles = gate.par_chunks_mut(TILE).zip(up.par_chunks_mut(TILE)).zip(dy.par_chunks(TILE));
    tiles.for_each(|((gate, up), dy)| {
        simd(|| {
            for ((gate, up), dy) in gate.iter_mut().zip(up.iter_mut()).zip(dy) {
                let s = sigmoid(*gate);
                let silu = *gate * s;
                (*gate, *up) = (dy * *up * (s + silu * (1.0 - s)), dy * silu);
            }
        });
    });
}
