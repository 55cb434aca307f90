//! From the loss back to the embedding: for each layer a pass through SwiGLU, one to attention's output,
//! one of attention, one to the layer's input, and one for the gradients of its weights.

use itertools::izip;

use super::kept::{LayerKept, Work, logit_tokens};
use super::{Llama, Shape, TOKENS};
use crate::attention::{self, HeadGradients, Known, Sequence};
use crate::gemm::panels::{LeftGroups, RightGroups, fill, fill_tokens};
use crate::gemm::{COLUMNS, Depth, Left, Out, ROWS, Right, Write, product};
use crate::layout::Layer;
use crate::loss::cross_entropy;
use crate::math::add_scaled;
use crate::pool::Pool;
use crate::rope::Turn;
use crate::scratch::take;
use crate::words::Precision;
use crate::{norm, swiglu};

/// Rows of logits that a thread has at once, so that they stay in its cache.
const LOGIT_ROWS: usize = 16;

impl Llama {
    /// Summed loss after [`forward`](Self::forward); writes the gradient of the final residual stream and
    /// adds those of the head and the final norm.
    pub(super) fn loss_and_gradient(&mut self, pool: &Pool, weights: &[f32], scale: f32, gradient: &mut [f32]) -> f64 {
        let Self { shape, layout, packed, kept, work, scratch, .. } = self;
        let (d, vocab, precision) = (shape.d, shape.vocab, shape.precision);
        let gain = &weights[layout.norm.clone()];
        let last = kept.residual.len() - 1;
        let tokens = logit_tokens(*shape);
        let Work { d_x, d_gain, d_logits, h_head, .. } = work;
        pool.each(d_x.chunks_mut(1 << 16), |d_x| d_x.fill(0.0));
        d_gain.fill(0.0);
        let chunks = izip!(
            kept.residual[last].chunks(tokens * d),
            kept.inverse_rms[last].chunks_mut(tokens),
            kept.targets.chunks(tokens),
            kept.nats.chunks_mut(tokens),
            d_x.chunks_mut(tokens * d),
            d_gain.chunks_mut(tokens / TOKENS * d),
        );
        for (x, inverse_rms, targets, nats, d_x, d_gain) in chunks {
            let blocks = izip!(
                x.chunks(TOKENS * d),
                inverse_rms.chunks_mut(TOKENS),
                targets.chunks(TOKENS),
                nats.chunks_mut(TOKENS),
                d_x.chunks_mut(TOKENS * d),
                d_gain.chunks_mut(d),
                d_logits.groups_mut(),
                h_head.groups_mut(),
            );
            pool.each_with(scratch, blocks, |scratch, block| {
                let (x, inverse_rms, targets, nats, d_x, d_gain, d_logits, h) = block;
                let n = nats.len();
                let normed = take(&mut scratch.normed, n * d);
                norm::forward(x, gain, shape.eps, inverse_rms, normed);
                fill::<COLUMNS>(precision, normed, d, 0..d, h);
                let words = take(&mut scratch.words, n * precision.words(d));
                precision.encode_rows(normed, d, words);
                for first in (0..TOKENS).step_by(LOGIT_ROWS) {
                    let rows = first.min(n)..n.min(first + LOGIT_ROWS);
                    let logits = take(&mut scratch.wide, rows.len() * vocab);
                    let h = &words[rows.start * precision.words(d)..rows.end * precision.words(d)];
                    shape.product(logits, Write::Set, h, d, &packed.head.forward);
                    cross_entropy(logits, vocab, &targets[rows.clone()], Some(scale), &mut nats[rows.clone()]);
                    let tokens = first..first + LOGIT_ROWS;
                    fill_tokens::<ROWS>(precision, logits, vocab, 0..vocab, tokens, d_logits);
                    let words = take(&mut scratch.logit_words, rows.len() * precision.words(vocab));
                    precision.encode_rows(logits, vocab, words);
                    let d_h = &mut normed[rows.start * d..rows.end * d];
                    shape.product(d_h, Write::Set, words, vocab, &packed.head.backward);
                }
                norm::backward(x, inverse_rms, gain, normed, d_x, d_gain);
            });
            let right = (&*h_head, d);
            let sum = (precision, d_logits.depth(nats.len()));
            pool.each(tasks(&mut gradient[layout.head.clone()], d_logits, 0, right, sum), Task::run);
        }
        add_gain(d_gain, &mut gradient[layout.norm.clone()]);
        kept.nats.iter().map(|&nats| f64::from(nats)).sum()
    }

    /// From the final residual stream's gradient back to the embedding, adding to `gradient`.
    pub(super) fn backward(&mut self, pool: &Pool, weights: &[f32], gradient: &mut [f32]) {
        for layer in (0..self.layout.layers.len()).rev() {
            self.swiglu_backward(pool, weights, gradient, layer);
            self.output_backward(pool, layer);
            self.attention_backward(pool, layer);
            self.project_backward(pool, weights, gradient, layer);
            self.weights_backward(pool, gradient, layer);
        }
        // Tokens repeat, so rows of the embedding are added up on one thread.
        let (d, d_embedding) = (self.shape.d, &mut gradient[self.layout.embedding.clone()]);
        for (d_x, &token) in self.work.d_x.chunks(d).zip(&self.kept.inputs) {
            add_scaled(&mut d_embedding[token as usize * d..][..d], 1.0, d_x);
        }
    }

    /// Through SwiGLU and its norm.
    fn swiglu_backward(&mut self, pool: &Pool, weights: &[f32], gradient: &mut [f32], layer: usize) {
        let Self { shape, layout, packed, kept, work, scratch, .. } = self;
        let (d, inner, precision) = (shape.d, shape.inner, shape.precision);
        let place = layout.layers[layer].mlp_norm.clone();
        let (gain, operands) = (&weights[place.clone()], &packed.layers[layer]);
        work.d_gain.fill(0.0);
        let blocks = izip!(
            kept.residual[2 * layer + 1].chunks(TOKENS * d),
            kept.inverse_rms[2 * layer + 1].chunks(TOKENS),
            kept.layers[layer].gate_up.words().chunks(TOKENS * precision.words(2 * inner)),
            work.d_x.chunks_mut(TOKENS * d),
            work.d_gain.chunks_mut(d),
            work.d_down.groups_mut(),
            work.inner.groups_mut(),
            work.d_gate_up.groups_mut(),
            work.h_mlp.groups_mut(),
        );
        pool.each_with(scratch, blocks, |scratch, block| {
            let (x, inverse_rms, kept, d_x, d_gain, d_down, inner_group, d_gate_up, h) = block;
            let n = inverse_rms.len();
            let words = take(&mut scratch.words, n * precision.words(d));
            precision.encode_rows(d_x, d, words);
            fill::<ROWS>(precision, d_x, d, 0..d, d_down);
            let d_inner = take(&mut scratch.inner, n * inner);
            shape.product(d_inner, Write::Set, words, d, &operands.down.backward);
            let wide = take(&mut scratch.wide, n * 2 * inner);
            precision.decode_rows(kept, 2 * inner, wide);
            swiglu::backward(wide, inner, d_inner);
            fill::<COLUMNS>(precision, d_inner, inner, 0..inner, inner_group);
            fill_parts(*shape, wide, &[inner, inner], d_gate_up);
            let words = take(&mut scratch.words, n * precision.words(2 * inner));
            precision.encode_rows(wide, 2 * inner, words);
            let normed = take(&mut scratch.normed, n * d);
            norm::apply(x, inverse_rms, gain, normed);
            fill::<COLUMNS>(precision, normed, d, 0..d, h);
            shape.product(normed, Write::Set, words, 2 * inner, &operands.gate_up.backward);
            norm::backward(x, inverse_rms, gain, normed, d_x, d_gain);
        });
        add_gain(&work.d_gain, &mut gradient[place]);
    }

    /// To the output of attention.
    fn output_backward(&mut self, pool: &Pool, layer: usize) {
        let Self { shape, packed, kept, work, scratch, .. } = self;
        let (d, q, precision) = (shape.d, shape.heads.q_width(), shape.precision);
        let operand = &packed.layers[layer].o.backward;
        let blocks = izip!(
            work.d_x.chunks(TOKENS * d),
            kept.layers[layer].attended.words().chunks(TOKENS * precision.words(q)),
            work.d_attended.words_mut().chunks_mut(TOKENS * precision.words(q)),
            work.d_o.groups_mut(),
            work.attended.groups_mut(),
        );
        pool.each_with(scratch, blocks, |scratch, (d_x, attended, d_attended, d_o, attended_group)| {
            let n = d_x.len() / d;
            fill::<ROWS>(precision, d_x, d, 0..d, d_o);
            let words = take(&mut scratch.words, n * precision.words(d));
            precision.encode_rows(d_x, d, words);
            let wide = take(&mut scratch.wide, n * q);
            precision.decode_rows(attended, q, wide);
            fill::<COLUMNS>(precision, wide, q, 0..q, attended_group);
            shape.product(wide, Write::Set, words, d, operand);
            precision.encode_rows(wide, q, d_attended);
        });
    }

    /// To rotated queries, keys and values, head by head.
    fn attention_backward(&mut self, pool: &Pool, layer: usize) {
        let Self { shape, kept, work, scratch, .. } = self;
        let (heads, length) = (shape.heads, kept.length);
        let q_words = shape.precision.words(heads.q_width());
        let LayerKept { qkv, attended, log_sum, .. } = &kept.layers[layer];
        let starts = kept.starts.chunks(length).chain(std::iter::repeat(&[][..]));
        let sequences = izip!(
            qkv.words().chunks(length * heads.stride()),
            starts,
            attended.words().chunks(length * q_words),
            work.d_attended.words().chunks(length * q_words),
            log_sum.chunks(length * heads.queries),
        );
        let sequences = sequences
            .map(|(words, starts, out, d_out, log_sum)| (Sequence { words, starts }, Known { out, d_out, log_sum }));
        let tasks = izip!(
            sequences.flat_map(|sequence| (0..heads.keys).map(move |shared| (sequence, shared))),
            work.d_q.chunks_mut(heads.group() * length * heads.dim),
            work.d_k.chunks_mut(length * heads.dim),
            work.d_v.chunks_mut(length * heads.dim),
        );
        pool.each_with(scratch, tasks, |scratch, (((sequence, known), shared), q, k, v)| {
            let gradients = HeadGradients { q, k, v };
            attention::backward(heads, shared, sequence, known, gradients, &mut scratch.attention);
        });
    }

    /// Through rotation, the projections and their norm.
    fn project_backward(&mut self, pool: &Pool, weights: &[f32], gradient: &mut [f32], layer: usize) {
        let Self { shape, rope, layout, packed, kept, work, scratch, .. } = self;
        let (d, precision, heads, length) = (shape.d, shape.precision, shape.heads, kept.length);
        let width = heads.width();
        let rotated = (width, heads.q_width() + heads.kv_width());
        let place = layout.layers[layer].attention_norm.clone();
        let (gain, operand) = (&weights[place.clone()], &packed.layers[layer].qkv.backward);
        let Work { d_x, d_gain, d_q, d_k, d_v, d_qkv, h_attention, .. } = work;
        let parts = [(&**d_q, heads.queries), (&**d_k, heads.keys), (&**d_v, heads.keys)];
        d_gain.fill(0.0);
        let blocks = izip!(
            kept.residual[2 * layer].chunks(TOKENS * d),
            kept.inverse_rms[2 * layer].chunks(TOKENS),
            d_x.chunks_mut(TOKENS * d),
            d_gain.chunks_mut(d),
            d_qkv.groups_mut(),
            h_attention.groups_mut(),
        );
        pool.each_with(scratch, blocks.enumerate(), |scratch, (block, (x, inverse_rms, d_x, d_gain, d_qkv, h))| {
            let n = inverse_rms.len();
            let wide = take(&mut scratch.wide, n * width);
            for (row, wide) in wide.chunks_mut(width).enumerate() {
                gather(&parts, block * TOKENS + row, length, heads.dim, wide);
            }
            rope.rotate(wide, rotated, block * TOKENS, length, Turn::Back);
            fill_parts(*shape, wide, &[heads.q_width(), heads.kv_width(), heads.kv_width()], d_qkv);
            let words = take(&mut scratch.words, n * precision.words(width));
            precision.encode_rows(wide, width, words);
            let normed = take(&mut scratch.normed, n * d);
            norm::apply(x, inverse_rms, gain, normed);
            fill::<COLUMNS>(precision, normed, d, 0..d, h);
            shape.product(normed, Write::Set, words, width, operand);
            norm::backward(x, inverse_rms, gain, normed, d_x, d_gain);
        });
        add_gain(d_gain, &mut gradient[place]);
    }

    /// Gradients of the layer's matrices, dW = dyᵀ x.
    fn weights_backward(&mut self, pool: &Pool, gradient: &mut [f32], layer: usize) {
        let Self { shape, layout, kept, work, .. } = self;
        let (d, inner, heads) = (shape.d, shape.inner, shape.heads);
        let sum = (shape.precision, work.d_o.depth(kept.inputs.len()));
        let Layer { q, k, v, o, gate, up, down, .. } = layout.layers[layer].clone();
        let matrices = gradient.get_disjoint_mut([q, k, v, o, gate, up, down]).expect("tensors do not overlap");
        let [q, k, v, o, gate, up, down] = matrices;
        let (q_panels, kv_panels) = (heads.q_width().div_ceil(ROWS), heads.kv_width().div_ceil(ROWS));
        let h_attention = (&work.h_attention, d);
        let h_mlp = (&work.h_mlp, d);
        let all = tasks(gate, &work.d_gate_up, 0, h_mlp, sum)
            .chain(tasks(up, &work.d_gate_up, inner.div_ceil(ROWS), h_mlp, sum))
            .chain(tasks(down, &work.d_down, 0, (&work.inner, inner), sum))
            .chain(tasks(q, &work.d_qkv, 0, h_attention, sum))
            .chain(tasks(k, &work.d_qkv, q_panels, h_attention, sum))
            .chain(tasks(v, &work.d_qkv, q_panels + kv_panels, h_attention, sum))
            .chain(tasks(o, &work.d_o, 0, (&work.attended, heads.q_width()), sum));
        pool.each(all, Task::run);
    }
}

/// Rows of a weight's gradient that are one task.
const ROWS_EACH: usize = 64;

/// Some rows of the gradient of a matrix.
struct Task<'a> {
    out: &'a mut [f32],
    left: Left<'a>,
    right: Right<'a>,
    depth: Depth,
    precision: Precision,
}

impl Task<'_> {
    fn run(self) {
        let out = Out { data: self.out, stride: self.right.columns };
        product(self.precision, out, Write::Add, self.left, self.right, self.depth);
    }
}

/// The gradient `(out, in)` in pieces of [`ROWS_EACH`] rows; its rows are the features of `left` from panel `panel` on.
fn tasks<'a>(
    gradient: &'a mut [f32],
    left: &'a LeftGroups,
    panel: usize,
    (right, width): (&'a RightGroups, usize),
    (precision, depth): (Precision, Depth),
) -> impl Iterator<Item = Task<'a>> + Send {
    gradient.chunks_mut(ROWS_EACH * width).enumerate().map(move |(index, out)| {
        let left = left.left(panel + index * ROWS_EACH / ROWS, out.len() / width);
        Task { out, left, right: right.right(width), depth, precision }
    })
}

/// Fills a group with features that come in parts, each of which begins a panel.
fn fill_parts(shape: Shape, rows: &[f32], parts: &[usize], mut group: &mut [u32]) {
    let stride = parts.iter().sum();
    let mut start = 0;
    for &part in parts {
        let words = part.div_ceil(ROWS) * shape.precision.words(TOKENS) * ROWS;
        let (panels, rest) = group.split_at_mut(words);
        fill::<ROWS>(shape.precision, rows, stride, start..start + part, panels);
        (start, group) = (start + part, rest);
    }
}

/// Puts together the row of token `token` from gradients by head: `(B, heads, T, hd)` each.
fn gather(parts: &[(&[f32], usize)], token: usize, length: usize, dim: usize, row: &mut [f32]) {
    let (sequence, position) = (token / length, token % length);
    let mut heads = row.chunks_mut(dim);
    for &(part, count) in parts {
        for (head, out) in heads.by_ref().take(count).enumerate() {
            let place = ((sequence * count + head) * length + position) * dim;
            out.copy_from_slice(&part[place..place + dim]);
        }
    }
}

/// Adds up the parts of a gain's gradient in their order.
fn add_gain(parts: &[f32], gradient: &mut [f32]) {
    parts.chunks(gradient.len()).for_each(|part| add_scaled(gradient, 1.0, part));
}
