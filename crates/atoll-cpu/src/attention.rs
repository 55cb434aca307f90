//! Causal grouped-query attention: for each query head, softmax(scale · q kᵀ) v over the tokens up to
//! its own. Several query heads share one key and value head.
//!
//! The scores are never stored: a block of queries meets all of its keys in a scratch buffer, and only
//! ln Σ eˢ of each query is kept, from which the backward pass finds the probabilities again (as in
//! FlashAttention; Dao et al., 2022).
//!
//! q and the output are `(N, H·hd)`, k and v `(N, KV·hd)`; N = B·T tokens.

use atoll_core::model::ModelConfig;
use rayon::prelude::*;

use crate::gemm::{Mat, MatMut, Write, product};
use crate::math::{dot, exp, exp_and_sum, max, simd};

/// Queries that meet their keys at once.
const BLOCK: usize = 64;

/// The heads.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Heads {
    /// Query heads, H.
    pub(crate) queries: usize,
    /// Key and value heads, KV.
    pub(crate) keys: usize,
    /// Width of each, hd.
    pub(crate) dim: usize,
}

impl Heads {
    pub(crate) fn new(config: &ModelConfig) -> Self {
        let (queries, keys) = (config.num_attention_heads, config.num_key_value_heads);
        Self { queries, keys, dim: config.head_dim }
    }

    /// Width of q, H·hd.
    pub(crate) fn q_width(self) -> usize {
        self.queries * self.dim
    }

    /// Width of k and of v, KV·hd.
    pub(crate) fn kv_width(self) -> usize {
        self.keys * self.dim
    }

    /// Query heads for each key head.
    fn group(self) -> usize {
        self.queries / self.keys
    }

    fn scale(self) -> f32 {
        1.0 / (self.dim as f32).sqrt()
    }
}

/// What a layer's attention read.
#[derive(Clone, Copy)]
pub(crate) struct Inputs<'a> {
    pub(crate) q: &'a [f32],
    pub(crate) k: &'a [f32],
    pub(crate) v: &'a [f32],
}

/// What it found: the output `(N, H·hd)` and ln Σ eˢ `(N, H)`.
pub(crate) struct Outputs<'a> {
    pub(crate) out: &'a mut [f32],
    pub(crate) log_sum: &'a mut [f32],
}

/// Attention inside each row of `length` tokens.
pub(crate) fn forward(heads: Heads, length: usize, inputs: Inputs<'_>, outputs: Outputs<'_>) {
    let Outputs { out, log_sum } = outputs;
    let rows = out.par_chunks_mut(length * heads.q_width()).zip(log_sum.par_chunks_mut(length * heads.queries));
    rows.enumerate().for_each(|(row, (out, log_sum))| {
        continued(heads, 0, inputs.row(heads, length, row), Outputs { out, log_sum });
    });
}

/// Attention of one row whose queries begin at position `first`; keys and values begin at 0.
pub(crate) fn continued(heads: Heads, first: usize, inputs: Inputs<'_>, outputs: Outputs<'_>) {
    let (q, kv) = (heads.q_width(), heads.kv_width());
    let Outputs { out, log_sum } = outputs;
    let blocks = out.par_chunks_mut(BLOCK * q).zip(log_sum.par_chunks_mut(BLOCK * heads.queries));
    let blocks = blocks.zip(inputs.q.par_chunks(BLOCK * q)).enumerate();
    blocks.for_each_init(Vec::new, |scores, (block, ((out, log_sum), queries))| {
        let first = first + block * BLOCK;
        let seen = (first + queries.len() / q) * kv;
        let inputs = Inputs { q: queries, k: &inputs.k[..seen], v: &inputs.v[..seen] };
        attend(heads, first, inputs, Outputs { out, log_sum }, scores);
    });
}

/// One block of queries, of which the first stands at position `first`, against all keys up to its end.
fn attend(heads: Heads, first: usize, inputs: Inputs<'_>, outputs: Outputs<'_>, scores: &mut Vec<f32>) {
    let Outputs { out, log_sum } = outputs;
    let (width, dim, seen) = (heads.q_width(), heads.dim, inputs.k.len() / heads.kv_width());
    scores.resize(inputs.q.len() / width * seen, 0.0); // (block, seen)
    for head in 0..heads.queries {
        let shared = head / heads.group() * dim;
        let q = Mat::new(inputs.q, width).columns(head * dim, dim);
        let k = Mat::new(inputs.k, heads.kv_width()).columns(shared, dim);
        let v = Mat::new(inputs.v, heads.kv_width()).columns(shared, dim);
        product(MatMut::new(scores, seen), Write::Set, heads.scale(), q, k.t());
        for (row, scores) in scores.chunks_mut(seen).enumerate() {
            log_sum[row * heads.queries + head] = simd(|| softmax(scores, first + row + 1));
        }
        let out = MatMut::new(out, width).columns(head * dim, dim);
        product(out, Write::Set, 1.0, Mat::new(scores, seen), v);
    }
}

/// Softmax over the first `visible` scores, zero after them; returns ln Σ eˢ.
#[inline(always)]
fn softmax(scores: &mut [f32], visible: usize) -> f32 {
    let (visible, hidden) = scores.split_at_mut(visible);
    let most = max(visible);
    let sum = exp_and_sum(visible, most);
    let share = 1.0 / sum;
    visible.iter_mut().for_each(|p| *p *= share);
    hidden.fill(0.0);
    most + sum.ln()
}

/// What the backward pass knows about the output: itself, its gradient, and ln Σ eˢ.
#[derive(Clone, Copy)]
pub(crate) struct Known<'a> {
    pub(crate) out: &'a [f32],
    pub(crate) d_out: &'a [f32],
    pub(crate) log_sum: &'a [f32],
}

/// Gradients head by head, so that each task writes its own piece: dq is `(B, H, T, hd)`, dk and dv
/// are `(B, KV, T, hd)`. [`to_tokens`] brings them back into the order of tokens.
pub(crate) struct HeadGradients<'a> {
    pub(crate) q: &'a mut [f32],
    pub(crate) k: &'a mut [f32],
    pub(crate) v: &'a mut [f32],
}

/// Writes the gradients of q, k and v; a task takes one key head of one row and its query heads.
pub(crate) fn backward(
    heads: Heads,
    length: usize,
    inputs: Inputs<'_>,
    known: Known<'_>,
    gradients: HeadGradients<'_>,
) {
    let piece = length * heads.dim;
    let HeadGradients { q, k, v } = gradients;
    let tasks = q.par_chunks_mut(heads.group() * piece).zip(k.par_chunks_mut(piece));
    let tasks = tasks.zip(v.par_chunks_mut(piece)).enumerate();
    tasks.for_each_init(Scratch::default, |scratch, (task, ((q, k), v))| {
        let (row, shared) = (task / heads.keys, task % heads.keys);
        let inputs = inputs.row(heads, length, row);
        let known = known.row(heads, length, row);
        backward_heads(heads, shared, inputs, known, HeadGradients { q, k, v }, scratch);
    });
}

impl<'a> Inputs<'a> {
    /// Those of row `row`.
    fn row(self, heads: Heads, length: usize, row: usize) -> Self {
        let part = |x: &'a [f32], width: usize| &x[row * length * width..(row + 1) * length * width];
        let (q, kv) = (heads.q_width(), heads.kv_width());
        Self { q: part(self.q, q), k: part(self.k, kv), v: part(self.v, kv) }
    }
}

impl<'a> Known<'a> {
    /// What is known of row `row`.
    fn row(self, heads: Heads, length: usize, row: usize) -> Self {
        let part = |x: &'a [f32], width: usize| &x[row * length * width..(row + 1) * length * width];
        let q = heads.q_width();
        Self { out: part(self.out, q), d_out: part(self.d_out, q), log_sum: part(self.log_sum, heads.queries) }
    }
}

/// Buffers of one task, `(block, seen)` each.
#[derive(Default)]
struct Scratch {
    probabilities: Vec<f32>,
    d_scores: Vec<f32>,
}

/// Key head `shared` of one row, with the query heads that share it.
fn backward_heads(
    heads: Heads,
    shared: usize,
    inputs: Inputs<'_>,
    known: Known<'_>,
    gradients: HeadGradients<'_>,
    scratch: &mut Scratch,
) {
    let HeadGradients { q, k, v } = gradients;
    k.fill(0.0);
    v.fill(0.0);
    let length = k.len() / heads.dim;
    for (member, q) in q.chunks_mut(length * heads.dim).enumerate() {
        let head = shared * heads.group() + member;
        for (block, q) in q.chunks_mut(BLOCK * heads.dim).enumerate() {
            let seen = block * BLOCK + q.len() / heads.dim;
            let gradients = HeadGradients { q, k: &mut k[..seen * heads.dim], v: &mut v[..seen * heads.dim] };
            backward_block(heads, head, block * BLOCK, inputs, known, gradients, scratch);
        }
    }
}

/// One block of one query head, its first query at position `first`, against all keys up to its end.
/// Sets dq `(block, hd)`, adds to dk and dv `(seen, hd)`.
fn backward_block(
    heads: Heads,
    head: usize,
    first: usize,
    inputs: Inputs<'_>,
    known: Known<'_>,
    gradients: HeadGradients<'_>,
    scratch: &mut Scratch,
) {
    let (dim, seen, shared) = (heads.dim, gradients.k.len() / heads.dim, head / heads.group());
    let queries = |x| Mat::new(x, heads.q_width()).rows(first, seen - first).columns(head * dim, dim);
    let keys = |x| Mat::new(x, heads.kv_width()).rows(0, seen).columns(shared * dim, dim);
    let (q, d_out, k, v) = (queries(inputs.q), queries(known.d_out), keys(inputs.k), keys(inputs.v));

    let Scratch { probabilities: p, d_scores: ds } = scratch;
    p.resize((seen - first) * seen, 0.0);
    ds.resize((seen - first) * seen, 0.0);
    product(MatMut::new(p, seen), Write::Set, heads.scale(), q, k.t());
    product(MatMut::new(ds, seen), Write::Set, 1.0, d_out, v.t());
    for ((p, ds), query) in p.chunks_mut(seen).zip(ds.chunks_mut(seen)).zip(first..) {
        backward_row(heads, head, query, known, p, ds);
    }
    let (p, ds) = (Mat::new(p, seen), Mat::new(ds, seen));
    let HeadGradients { q: d_q, k: d_k, v: d_v } = gradients;
    product(MatMut::new(d_v, dim), Write::Add, 1.0, p.t(), d_out);
    product(MatMut::new(d_k, dim), Write::Add, 1.0, ds.t(), q);
    product(MatMut::new(d_q, dim), Write::Set, 1.0, ds, k);
}

/// Turns the scores of one query into probabilities p, and dp into ds = scale · p ⊙ (dp − Σ p ⊙ dp).
/// That sum is out · d_out, so it needs no pass over the keys.
fn backward_row(heads: Heads, head: usize, query: usize, known: Known<'_>, p: &mut [f32], ds: &mut [f32]) {
    let place = (query * heads.queries + head) * heads.dim;
    let (log_sum, scale) = (known.log_sum[query * heads.queries + head], heads.scale());
    simd(|| {
        let mean = dot(&known.out[place..place + heads.dim], &known.d_out[place..place + heads.dim]);
        let visible = p.iter_mut().zip(ds.iter_mut()).take(query + 1);
        for (p, ds) in visible {
            *p = exp(*p - log_sum);
            *ds = scale * *p * (*ds - mean);
        }
        p[query + 1..].fill(0.0);
        ds[query + 1..].fill(0.0);
    });
}

/// `(B, heads, T, hd)` to `(B, T, heads·hd)`.
pub(crate) fn to_tokens(by_head: &[f32], length: usize, dim: usize, width: usize, tokens: &mut [f32]) {
    let rows = tokens.par_chunks_mut(length * width).zip(by_head.par_chunks(length * width));
    rows.for_each(|(tokens, by_head)| {
        tokens.par_chunks_mut(width).enumerate().with_min_len(crate::TILE_ROWS).for_each(|(position, token)| {
            for (head, part) in token.chunks_mut(dim).enumerate() {
                let place = (head * length + position) * dim;
                part.copy_from_slice(&by_head[place..place + dim]);
            }
        });
    });
}
