//! Causal grouped-query attention: for each query head, softmax(scale · q kᵀ) v over the tokens up to
//! its own, or over those of its own document. Several query heads share one key and value head.
//!
//! The scores are never stored: a block of queries meets all of its keys in a scratch buffer, and only
//! ln Σ eˢ of each query is kept, from which the backward pass finds the probabilities again (as in
//! FlashAttention; Dao et al., 2022).
//!
//! A token's row of words holds its query heads, its key heads and its value heads one after the other.

use atoll_core::model::ModelConfig;

use crate::gemm::panels::{LeftGroups, Panels, RightGroups, TOKENS, fill};
use crate::gemm::{COLUMNS, Depth, Left, Out, ROWS, Right, Write, product};
use crate::math::{dot, exp, exp_and_sum, max, simd};
use crate::scratch;
use crate::words::Precision;

/// Queries that meet their keys at once.
pub(crate) const BLOCK: usize = TOKENS;

/// The heads, and how they lie in a row of words.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Heads {
    /// Query heads, H.
    pub(crate) queries: usize,
    /// Key and value heads, KV.
    pub(crate) keys: usize,
    /// Width of each, hd.
    pub(crate) dim: usize,
    pub(crate) precision: Precision,
}

/// The tokens that attend to each other: one row of a batch, or a new text.
#[derive(Clone, Copy)]
pub(crate) struct Sequence<'a> {
    /// Queries, keys and values, `(T, words(Q + 2·KV))`.
    pub(crate) words: &'a [u32],
    /// For each token the first that it may see, `(T)`; empty if that is the first of all.
    pub(crate) starts: &'a [u32],
}

impl Heads {
    pub(crate) fn new(config: &ModelConfig, precision: Precision) -> Self {
        let (queries, keys) = (config.num_attention_heads, config.num_key_value_heads);
        Self { queries, keys, dim: config.head_dim, precision }
    }

    /// Width of q, H·hd.
    pub(crate) fn q_width(self) -> usize {
        self.queries * self.dim
    }

    /// Width of k and of v, KV·hd.
    pub(crate) fn kv_width(self) -> usize {
        self.keys * self.dim
    }

    /// Width of a row, Q + 2·KV.
    pub(crate) fn width(self) -> usize {
        self.q_width() + 2 * self.kv_width()
    }

    /// Query heads for each key head.
    pub(crate) fn group(self) -> usize {
        self.queries / self.keys
    }

    /// What a score is multiplied with, 1/√hd.
    pub(crate) fn scale(self) -> f32 {
        1.0 / (self.dim as f32).sqrt()
    }

    /// Words of a row.
    pub(crate) fn stride(self) -> usize {
        self.precision.words(self.width())
    }

    /// Words of a head.
    fn head_words(self) -> usize {
        self.precision.words(self.dim)
    }

    /// Words of a row before query head `head`.
    fn q_place(self, head: usize) -> usize {
        head * self.head_words()
    }

    /// Words of a row before key head `shared`.
    fn k_place(self, shared: usize) -> usize {
        (self.queries + shared) * self.head_words()
    }

    /// Words of a row before value head `shared`.
    fn v_place(self, shared: usize) -> usize {
        (self.queries + self.keys + shared) * self.head_words()
    }
}

/// Buffers of one thread.
#[derive(Default)]
pub(crate) struct Scratch {
    /// Kᵀ, `(hd, T)`.
    keys_transposed: Panels,
    /// K, `(T, hd)`.
    keys: Panels,
    /// V, `(T, hd)`, or in the backward pass Vᵀ.
    values: Panels,
    decoded: Vec<f32>,
    /// `(block, T)`.
    scores: Vec<f32>,
    d_scores: Vec<f32>,
    row_words: Vec<u32>,
    /// `(block, hd)`.
    heads: [Vec<f32>; 3],
    left: LeftGroups,
    right: RightGroups,
}

/// Writes the output of a block of queries, the first at position `first`: words `(block, words(Q))` and
/// ln Σ eˢ `(block, H)`.
pub(crate) fn forward(
    heads: Heads,
    sequence: Sequence<'_>,
    first: usize,
    out: &mut [u32],
    log_sum: &mut [f32],
    scratch: &mut Scratch,
) {
    let (precision, dim, stride) = (heads.precision, heads.dim, heads.stride());
    let count = log_sum.len() / heads.queries;
    let seen = first + count;
    let out_stride = precision.words(heads.q_width());
    let Scratch { keys_transposed, values, decoded, scores, row_words, heads: [attended, ..], .. } = scratch;
    let scores = scratch::take(scores, count * seen);
    let attended = scratch::take(attended, count * dim);
    let p_words = scratch::take(row_words, count * precision.words(seen));
    for shared in 0..heads.keys {
        keys_transposed.pack_words(&sequence.words[heads.k_place(shared)..], seen, stride, heads.head_words());
        pack_head(heads, sequence, heads.v_place(shared), seen, decoded, values);
        for head in shared * heads.group()..(shared + 1) * heads.group() {
            let queries = Left::rows(&sequence.words[first * stride + heads.q_place(head)..], count, stride);
            let out_of = |data| Out { data, stride: seen };
            product(precision, out_of(scores), Write::Set, queries, keys_transposed.right(), keys_transposed.depth());
            let rows = scores.chunks_mut(seen).zip(log_sum.chunks_mut(heads.queries)).zip(first..);
            let shares = simd(
                #[inline(always)]
                || {
                    let mut shares = [0.0; BLOCK];
                    for (((scores, log_sum), position), share) in rows.zip(&mut shares) {
                        let (most, sum) = weigh(scores, sequence.visible(position), heads.scale());
                        log_sum[head] = most + sum.ln();
                        *share = 1.0 / sum;
                    }
                    shares
                },
            );
            precision.encode_rows(scores, seen, p_words);
            let weights = Left::rows(p_words, count, precision.words(seen));
            let depth = Depth { groups: 1, steps: precision.words(seen) };
            product(precision, Out { data: attended, stride: dim }, Write::Set, weights, values.right(), depth);
            let rows = attended.chunks_mut(dim).zip(out.chunks_mut(out_stride));
            simd(
                #[inline(always)]
                || {
                    for ((attended, out), share) in rows.zip(shares) {
                        attended.iter_mut().for_each(|x| *x *= share);
                        precision.encode(attended, &mut out[heads.q_place(head)..][..heads.head_words()]);
                    }
                },
            );
        }
    }
}

impl Sequence<'_> {
    /// The tokens that the one at `position` sees.
    #[inline(always)]
    fn visible(&self, position: usize) -> std::ops::Range<usize> {
        self.starts.get(position).map_or(0, |&start| start as usize)..position + 1
    }
}

/// Replaces visible scores by e^(scale·s − most) and all others by 0; returns `most` and their sum.
#[inline(always)]
fn weigh(scores: &mut [f32], visible: std::ops::Range<usize>, scale: f32) -> (f32, f32) {
    scores[..visible.start].fill(0.0);
    scores[visible.end..].fill(0.0);
    let visible = &mut scores[visible];
    visible.iter_mut().for_each(|s| *s *= scale);
    let most = max(visible);
    (most, exp_and_sum(visible, most))
}

/// Packs the first `seen` rows of the head at `place` with depth along the rows.
fn pack_head(
    heads: Heads,
    sequence: Sequence<'_>,
    place: usize,
    seen: usize,
    decoded: &mut Vec<f32>,
    panels: &mut Panels,
) {
    let dim = heads.dim;
    let rows = scratch::take(decoded, seen * dim);
    decode_head(heads.precision, sequence.words, heads.stride(), place, rows, dim);
    let rows = &*rows;
    panels.pack_rows(heads.precision, seen, dim, |row| &rows[row * dim..][..dim]);
}

/// Decodes one head of rows that are `stride` words apart.
fn decode_head(precision: Precision, words: &[u32], stride: usize, place: usize, rows: &mut [f32], dim: usize) {
    simd(
        #[inline(always)]
        || {
            for (row, words) in rows.chunks_mut(dim).zip(words.chunks(stride)) {
                precision.decode(&words[place..][..precision.words(dim)], row);
            }
        },
    );
}

/// What the backward pass knows about one sequence's output: itself and its gradient, `(T, words(Q))`,
/// and ln Σ eˢ `(T, H)`.
#[derive(Clone, Copy)]
pub(crate) struct Known<'a> {
    pub(crate) out: &'a [u32],
    pub(crate) d_out: &'a [u32],
    pub(crate) log_sum: &'a [f32],
}

/// Gradients head by head, so that each task writes its own piece: dq `(group, T, hd)`, dk and dv `(T, hd)`.
pub(crate) struct HeadGradients<'a> {
    pub(crate) q: &'a mut [f32],
    pub(crate) k: &'a mut [f32],
    pub(crate) v: &'a mut [f32],
}

/// Writes the gradients of key head `shared` of one sequence and of the query heads that share it.
pub(crate) fn backward(
    heads: Heads,
    shared: usize,
    sequence: Sequence<'_>,
    known: Known<'_>,
    gradients: HeadGradients<'_>,
    scratch: &mut Scratch,
) {
    let HeadGradients { q: d_q, k: d_k, v: d_v } = gradients;
    let (dim, stride) = (heads.dim, heads.stride());
    let length = d_k.len() / dim;
    let Scratch { keys_transposed, keys, values, decoded, .. } = scratch;
    keys_transposed.pack_words(&sequence.words[heads.k_place(shared)..], length, stride, heads.head_words());
    values.pack_words(&sequence.words[heads.v_place(shared)..], length, stride, heads.head_words());
    pack_head(heads, sequence, heads.k_place(shared), length, decoded, keys);
    d_k.fill(0.0);
    d_v.fill(0.0);
    for (member, d_q) in d_q.chunks_mut(length * dim).enumerate() {
        let head = shared * heads.group() + member;
        for (block, d_q) in d_q.chunks_mut(BLOCK * dim).enumerate() {
            let seen = block * BLOCK + d_q.len() / dim;
            let gradients = HeadGradients { q: d_q, k: &mut d_k[..seen * dim], v: &mut d_v[..seen * dim] };
            backward_block(heads, head, block * BLOCK, sequence, known, gradients, scratch);
        }
    }
}

/// One block of one query head, its first query at position `first`, against all keys up to its end.
/// Sets dq `(block, hd)`, adds to dk and dv `(seen, hd)`.
fn backward_block(
    heads: Heads,
    head: usize,
    first: usize,
    sequence: Sequence<'_>,
    known: Known<'_>,
    gradients: HeadGradients<'_>,
    scratch: &mut Scratch,
) {
    let HeadGradients { q: d_q, k: d_k, v: d_v } = gradients;
    let Heads { precision, dim, .. } = heads;
    let (stride, out_stride) = (heads.stride(), precision.words(heads.q_width()));
    let seen = d_k.len() / dim;
    let count = seen - first;
    let Scratch { keys_transposed, keys, values, scores, d_scores, row_words, heads: rows, left, right, .. } = scratch;
    let (p, ds) = (scratch::take(scores, count * seen), scratch::take(d_scores, count * seen));
    let [queries, out, d_out] = rows.each_mut().map(|rows| scratch::take(rows, count * dim));
    let place = heads.q_place(head);
    decode_head(precision, &sequence.words[first * stride..], stride, place, queries, dim);
    decode_head(precision, &known.out[first * out_stride..], out_stride, place, out, dim);
    decode_head(precision, &known.d_out[first * out_stride..], out_stride, place, d_out, dim);

    let rows = |words, stride| Left::rows(words, count, stride);
    let q_left = rows(&sequence.words[first * stride + place..], stride);
    let d_out_left = rows(&known.d_out[first * out_stride + place..], out_stride);
    let into = |data| Out { data, stride: seen };
    product(precision, into(p), Write::Set, q_left, first_columns(keys_transposed, seen), keys_transposed.depth());
    product(precision, into(ds), Write::Set, d_out_left, first_columns(values, seen), values.depth());
    simd(
        #[inline(always)]
        || {
            let rows = p.chunks_mut(seen).zip(ds.chunks_mut(seen)).zip(out.chunks(dim).zip(d_out.chunks(dim)));
            for (((p, ds), (out, d_out)), position) in rows.zip(first..) {
                let log_sum = known.log_sum[position * heads.queries + head];
                backward_row(p, ds, sequence.visible(position), dot(out, d_out), log_sum, heads.scale());
            }
        },
    );

    let mut add = |gradient, rows: &[f32], right_rows: &[f32]| {
        left.resize(precision, BLOCK, &[seen]);
        right.resize(precision, BLOCK, &[dim]);
        left.groups_mut().for_each(|group| fill::<ROWS>(precision, rows, seen, 0..seen, group));
        right.groups_mut().for_each(|group| fill::<COLUMNS>(precision, right_rows, dim, 0..dim, group));
        let out = Out { data: gradient, stride: dim };
        product(precision, out, Write::Add, left.left(0, seen), right.right(dim), left.depth(BLOCK));
    };
    add(d_v, p, d_out);
    add(d_k, ds, queries);
    let ds_words = scratch::take(row_words, count * precision.words(seen));
    precision.encode_rows(ds, seen, ds_words);
    let depth = Depth { groups: 1, steps: precision.words(seen) };
    let ds_left = rows(ds_words, precision.words(seen));
    product(precision, Out { data: d_q, stride: dim }, Write::Set, ds_left, keys.right(), depth);
}

/// The first `columns` columns of the operand.
fn first_columns(panels: &Panels, columns: usize) -> Right<'_> {
    Right { columns, ..panels.right() }
}

/// Turns the scores of one query into probabilities p, and dp into ds = scale · p ⊙ (dp − Σ p ⊙ dp).
/// That sum is out · d_out, here `mean`, so it needs no pass over the keys.
#[inline(always)]
fn backward_row(p: &mut [f32], ds: &mut [f32], visible: std::ops::Range<usize>, mean: f32, log_sum: f32, scale: f32) {
    for row in [&mut *p, &mut *ds] {
        row[..visible.start].fill(0.0);
        row[visible.end..].fill(0.0);
    }
    for (p, ds) in p[visible.clone()].iter_mut().zip(&mut ds[visible]) {
        *p = exp(scale * *p - log_sum);
        *ds = scale * *p * (*ds - mean);
    }
}
