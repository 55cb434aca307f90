//! From tokens to the loss: for each layer a pass to queries, keys and values, one of attention, one
//! through SwiGLU.

use itertools::izip;

use super::kept::LayerKept;
use super::{Llama, TOKENS};
use crate::attention::{self, BLOCK, Sequence};
use crate::gemm::Write;
use crate::loss::cross_entropy;
use crate::pool::Pool;
use crate::rope::Turn;
use crate::scratch::take;
use crate::{norm, swiglu};

impl Llama {
    /// Fills `kept` up to the final residual stream.
    pub(super) fn forward(&mut self, pool: &Pool, weights: &[f32]) {
        self.embed(pool, weights);
        for layer in 0..self.layout.layers.len() {
            self.project(pool, weights, layer);
            self.attend(pool, layer);
            self.finish_layer(pool, weights, layer);
        }
    }

    fn embed(&mut self, pool: &Pool, weights: &[f32]) {
        let (d, embedding) = (self.shape.d, &weights[self.layout.embedding.clone()]);
        let blocks = self.kept.residual[0].chunks_mut(TOKENS * d).zip(self.kept.inputs.chunks(TOKENS));
        pool.each(blocks, |(x, tokens)| {
            for (x, &token) in x.chunks_mut(d).zip(tokens) {
                x.copy_from_slice(&embedding[token as usize * d..][..d]);
            }
        });
    }

    /// Queries, keys and values of a layer, rotated.
    fn project(&mut self, pool: &Pool, weights: &[f32], layer: usize) {
        let Self { shape, rope, layout, packed, kept, scratch, .. } = self;
        let (d, precision, heads, length) = (shape.d, shape.precision, shape.heads, kept.length);
        let gain = &weights[layout.layers[layer].attention_norm.clone()];
        let operand = &packed.layers[layer].qkv.forward;
        let blocks = izip!(
            kept.residual[2 * layer].chunks(TOKENS * d),
            kept.inverse_rms[2 * layer].chunks_mut(TOKENS),
            kept.layers[layer].qkv.words_mut().chunks_mut(TOKENS * heads.stride()),
        );
        pool.each_with(scratch, blocks.enumerate(), |scratch, (block, (x, inverse_rms, qkv))| {
            let n = inverse_rms.len();
            let normed = take(&mut scratch.normed, n * d);
            norm::forward(x, gain, shape.eps, inverse_rms, normed);
            let words = take(&mut scratch.words, n * precision.words(d));
            precision.encode_rows(normed, d, words);
            let wide = take(&mut scratch.wide, n * heads.width());
            shape.product(wide, Write::Set, words, d, operand);
            let rotated = (heads.width(), heads.q_width() + heads.kv_width());
            rope.rotate(wide, rotated, block * TOKENS, length, Turn::Forward);
            precision.encode_rows(wide, heads.width(), qkv);
        });
    }

    /// Attention of a layer, a block of queries at a time.
    fn attend(&mut self, pool: &Pool, layer: usize) {
        let Self { shape, kept, scratch, .. } = self;
        let (heads, length) = (shape.heads, kept.length);
        let q_words = shape.precision.words(heads.q_width());
        let LayerKept { qkv, attended, log_sum, .. } = &mut kept.layers[layer];
        let starts = kept.starts.chunks(length).chain(std::iter::repeat(&[][..]));
        let rows = izip!(
            qkv.words().chunks(length * heads.stride()),
            starts,
            attended.words_mut().chunks_mut(length * q_words),
            log_sum.chunks_mut(length * heads.queries),
        );
        let blocks = rows.flat_map(|(words, starts, attended, log_sum)| {
            let blocks = attended.chunks_mut(BLOCK * q_words).zip(log_sum.chunks_mut(BLOCK * heads.queries));
            // The last blocks see the most keys, so they go first.
            blocks.enumerate().rev().map(move |(block, out)| (Sequence { words, starts }, block * BLOCK, out))
        });
        pool.each_with(scratch, blocks, |scratch, (sequence, first, (out, log_sum))| {
            attention::forward(heads, sequence, first, out, log_sum, &mut scratch.attention);
        });
    }

    /// What attention adds to the residual stream, and SwiGLU.
    fn finish_layer(&mut self, pool: &Pool, weights: &[f32], layer: usize) {
        let Self { shape, layout, packed, kept, scratch, .. } = self;
        let (d, inner, precision) = (shape.d, shape.inner, shape.precision);
        let gain = &weights[layout.layers[layer].mlp_norm.clone()];
        let operands = &packed.layers[layer];
        let LayerKept { attended, gate_up, .. } = &mut kept.layers[layer];
        let [before, middle, after, ..] = &mut kept.residual[2 * layer..] else { unreachable!("2·L + 1 of them") };
        let q_width = shape.heads.q_width();
        let blocks = izip!(
            before.chunks(TOKENS * d),
            attended.words().chunks(TOKENS * precision.words(q_width)),
            middle.chunks_mut(TOKENS * d),
            kept.inverse_rms[2 * layer + 1].chunks_mut(TOKENS),
            gate_up.words_mut().chunks_mut(TOKENS * precision.words(2 * inner)),
            after.chunks_mut(TOKENS * d),
        );
        pool.each_with(scratch, blocks, |scratch, (before, attended, middle, inverse_rms, kept, after)| {
            let n = inverse_rms.len();
            middle.copy_from_slice(before);
            shape.product(middle, Write::Add, attended, q_width, &operands.o.forward);
            let normed = take(&mut scratch.normed, n * d);
            norm::forward(middle, gain, shape.eps, inverse_rms, normed);
            let words = take(&mut scratch.words, n * precision.words(d));
            precision.encode_rows(normed, d, words);
            let gate_up = take(&mut scratch.wide, n * 2 * inner);
            shape.product(gate_up, Write::Set, words, d, &operands.gate_up.forward);
            precision.encode_rows(gate_up, 2 * inner, kept);
            let y = take(&mut scratch.inner, n * inner);
            swiglu::forward(gate_up, inner, y);
            let words = take(&mut scratch.words, n * precision.words(inner));
            precision.encode_rows(y, inner, words);
            after.copy_from_slice(middle);
            shape.product(after, Write::Add, words, inner, &operands.down.forward);
        });
    }

    /// Summed loss after [`forward`](Self::forward).
    pub(super) fn loss(&mut self, pool: &Pool, weights: &[f32]) -> f64 {
        let Self { shape, layout, packed, kept, scratch, .. } = self;
        let (d, vocab, precision) = (shape.d, shape.vocab, shape.precision);
        let gain = &weights[layout.norm.clone()];
        let last = kept.residual.len() - 1;
        let blocks = izip!(
            kept.residual[last].chunks(TOKENS * d),
            kept.inverse_rms[last].chunks_mut(TOKENS),
            kept.targets.chunks(TOKENS),
            kept.nats.chunks_mut(TOKENS),
        );
        pool.each_with(scratch, blocks, |scratch, (x, inverse_rms, targets, nats)| {
            let normed = take(&mut scratch.normed, x.len());
            norm::forward(x, gain, shape.eps, inverse_rms, normed);
            let words = take(&mut scratch.words, nats.len() * precision.words(d));
            precision.encode_rows(normed, d, words);
            let logits = take(&mut scratch.wide, nats.len() * vocab);
            shape.product(logits, Write::Set, words, d, &packed.head.forward);
            cross_entropy(logits, vocab, targets, None, nats);
        });
        kept.nats.iter().map(|&nats| f64::from(nats)).sum()
    }
}
