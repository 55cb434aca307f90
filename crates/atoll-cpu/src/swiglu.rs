//! SwiGLU: y = silu(gate) ⊙ up with silu(x) = x·σ(x). A row `(2·I)` holds gate and then up.

use crate::math::{sigmoid, simd};

/// Writes y `(n,I)` for `gate_up` `(n,2·I)`.
pub(crate) fn forward(gate_up: &[f32], inner: usize, y: &mut [f32]) {
    simd(
        #[inline(always)]
        || {
            for (y, gate_up) in y.chunks_mut(inner).zip(gate_up.chunks(2 * inner)) {
                let (gate, up) = gate_up.split_at(inner);
                for ((y, gate), up) in y.iter_mut().zip(gate).zip(up) {
                    *y = gate * sigmoid(*gate) * up;
                }
            }
        },
    );
}

/// Replaces gate and up by their gradients, and dy by y.
pub(crate) fn backward(gate_up: &mut [f32], inner: usize, dy: &mut [f32]) {
    simd(
        #[inline(always)]
        || {
            for (dy, gate_up) in dy.chunks_mut(inner).zip(gate_up.chunks_mut(2 * inner)) {
                let (gate, up) = gate_up.split_at_mut(inner);
                for ((gate, up), dy) in gate.iter_mut().zip(up).zip(dy) {
                    let s = sigmoid(*gate);
                    let silu = *gate * s;
                    let y = silu * *up;
                    (*gate, *up) = (*dy * *up * (s + silu * (1.0 - s)), *dy * silu);
                    *dy = y;
                }
            }
        },
    );
}
