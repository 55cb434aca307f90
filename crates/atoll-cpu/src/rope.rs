//! Rotary positions: at position p, the pair (xᵢ, xᵢ₊ₕ) of a head, h = half its width, is turned by the
//! angle p·θ^(−i/h). This is Hugging Face's rotate-half convention, not the interleaved one.

use atoll_core::model::ModelConfig;

use crate::math::simd;

/// Cosines and sines, `(positions, h)` each.
pub(crate) struct Rope {
    half: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

/// Which way to turn. The backward pass turns back, because a rotation's transpose is its inverse.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Turn {
    Forward,
    Back,
}

impl Rope {
    /// For all positions that the model knows.
    pub(crate) fn new(config: &ModelConfig) -> Self {
        let half = config.head_dim / 2;
        let theta = f64::from(config.rope_theta);
        let frequency: Vec<f32> = (0..half).map(|i| theta.powf(-(i as f64) / half as f64) as f32).collect();
        let positions = 0..config.max_position_embeddings;
        let angles: Vec<f32> = positions.flat_map(|p| frequency.iter().map(move |f| p as f32 * f)).collect();
        let cos = angles.iter().map(|angle| angle.cos()).collect();
        let sin = angles.iter().map(|angle| angle.sin()).collect();
        Self { half, cos, sin }
    }

    /// Turns the heads in the first `width` elements of each row of x `(n, stride)`, which are the tokens at
    /// positions first, first + 1, …, beginning again at 0 after `length`.
    pub(crate) fn rotate(
        &self,
        x: &mut [f32],
        (stride, width): (usize, usize),
        first: usize,
        length: usize,
        turn: Turn,
    ) {
        for (row, x) in x.chunks_mut(stride).enumerate() {
            self.rotate_row(&mut x[..width], (first + row) % length, turn);
        }
    }

    fn rotate_row(&self, x: &mut [f32], position: usize, turn: Turn) {
        let angles = position * self.half..(position + 1) * self.half;
        let (cos, sin) = (&self.cos[angles.clone()], &self.sin[angles]);
        let sign = if turn == Turn::Forward { 1.0 } else { -1.0 };
        simd(
            #[inline(always)]
            || {
                for head in x.chunks_exact_mut(2 * self.half) {
                    let (low, high) = head.split_at_mut(self.half);
                    for (((a, b), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
                        let sin = sign * sin;
                        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
                    }
                }
            },
        );
    }
}
