//! Causal attention by blocks of queries. A block's scores against the keys before it are computed, used and dropped;
//! what is kept of them is one number a query, the logarithm of the softmax's denominator. The backward pass computes
//! each block's scores again from it, so that memory grows with T and not with T².
//!
//! ```text
//! S = Q Kᵀ / √d + mask      P = softmax(S) = exp(S − L)      O = P V
//! dV = Pᵀ dO      dS = P ⊙ (dO Vᵀ − rowsum(dO ⊙ O))      dQ = dS K / √d      dK = dSᵀ Q / √d
//! ```
//!
//! The G query heads that share a key head are taken as G times as many rows of queries, so nothing is repeated.

use std::ops::Range;

use burn::tensor::{Device, Int, Tensor, TensorData};

use crate::arithmetic::Precision;

/// Queries of a block.
const BLOCK: usize = 128;
/// What hides a score: its exponential is 0.
const HIDDEN: f32 = -1e30;

/// Which tokens see which.
pub(crate) struct Mask {
    /// The first position that each token sees, `(B,1,T,1)`; without it, tokens see all before them.
    starts: Option<Tensor<4>>,
    device: Device,
}

/// What attention keeps: queries `(B,H,T,d)`, keys and values `(B,K,T,d)`, results `(B,H,T,d)` and the logarithms
/// `(B,H,T,1)`.
pub(crate) struct Kept {
    pub(crate) q: Tensor<4>,
    pub(crate) k: Tensor<4>,
    pub(crate) v: Tensor<4>,
    pub(crate) out: Tensor<4>,
    logarithms: Tensor<4>,
}

impl Mask {
    /// For B rows of T tokens with these document starts, or none.
    pub(crate) fn new(starts: &[u32], length: usize, device: &Device) -> Self {
        let table = |starts: &[u32]| {
            let values: Vec<f32> = starts.iter().map(|&start| start as f32).collect();
            Tensor::from_data(TensorData::new(values, [starts.len() / length, 1, length, 1]), device)
        };
        Self { starts: (!starts.is_empty()).then(|| table(starts)), device: device.clone() }
    }

    /// What is added to the scores of these queries against all keys before the last of them, `(1 or B,1,queries,keys)`.
    fn of(&self, queries: &Range<usize>) -> Tensor<4> {
        let (rows, keys) = (positions(queries.clone(), &self.device), positions(0..queries.end, &self.device));
        let keys = keys.swap_dims(2, 3);
        // Positions are whole numbers: a difference is 0 or less, or at least 1.
        let mut hidden = (keys.clone() - rows).clamp(0.0, 1.0);
        if let Some(starts) = &self.starts {
            hidden = hidden + (starts.clone().narrow(2, queries.start, queries.len()) - keys).clamp(0.0, 1.0);
        }
        hidden.mul_scalar(HIDDEN)
    }
}

/// The positions as `f32`, `(1,1,n,1)`.
fn positions(range: Range<usize>, device: &Device) -> Tensor<4> {
    let count = range.len();
    Tensor::<1, Int>::arange(range.start as i64..range.end as i64, device).float().reshape([1, 1, count, 1])
}

fn blocks(length: usize) -> impl Iterator<Item = Range<usize>> {
    (0..length).step_by(BLOCK).map(move |start| start..length.min(start + BLOCK))
}

/// Rows `range` of each head of x `(B,heads,T,d)`.
fn rows(x: &Tensor<4>, range: &Range<usize>) -> Tensor<4> {
    x.clone().narrow(2, range.start, range.len())
}

/// x `(B,heads,n,w)` as `(B,shared,heads/shared · n,w)`.
fn share(x: Tensor<4>, shared: usize) -> Tensor<4> {
    let [batch, heads, count, width] = x.dims();
    x.reshape([batch, shared, heads / shared * count, width])
}

/// The inverse of [`share`].
fn unshare(x: Tensor<4>, heads: usize) -> Tensor<4> {
    let [batch, shared, count, width] = x.dims();
    x.reshape([batch, heads, shared * count / heads, width])
}

/// Attention of queries `(B,H,T,d)` to keys and values `(B,K,T,d)`, K a divisor of H.
pub(crate) fn forward(precision: Precision, mask: &Mask, q: Tensor<4>, k: Tensor<4>, v: Tensor<4>) -> Kept {
    let [_, heads, length, _] = q.dims();
    let (mut out, mut logarithms) = (Vec::new(), Vec::new());
    for block in blocks(length) {
        let scores = scores(precision, mask, &q, &k, &block);
        let most = scores.clone().max_dim(3);
        let weights = (scores - most.clone()).exp();
        let sum = weights.clone().sum_dim(3);
        let value = precision.product(share(weights, k.dims()[1]), rows(&v, &(0..block.end)));
        out.push(unshare(value, heads) / sum.clone());
        logarithms.push(most + sum.log());
    }
    Kept { q, k, v, out: Tensor::cat(out, 2), logarithms: Tensor::cat(logarithms, 2) }
}

/// The gradients of queries, keys and values, for the results' `(B,H,T,d)`.
pub(crate) fn backward(precision: Precision, mask: &Mask, kept: &Kept, dout: &Tensor<4>) -> [Tensor<4>; 3] {
    let Kept { q, k, v, out, logarithms } = kept;
    let [_, heads, length, width] = q.dims();
    let (shared, scale) = (k.dims()[1], scale(width));
    let along = (dout.clone() * out.clone()).sum_dim(3);
    let (mut dq, mut dk, mut dv) = (Vec::new(), k.zeros_like(), v.zeros_like());
    for block in blocks(length) {
        let before = 0..block.end;
        let (keys, values) = (rows(k, &before), rows(v, &before));
        let weights = (scores(precision, mask, q, k, &block) - rows(logarithms, &block)).exp();
        let dblock = share(rows(dout, &block), shared);
        let dweights = precision.product(dblock.clone(), values.swap_dims(2, 3));
        let dscores = weights.clone() * (unshare(dweights, heads) - rows(&along, &block)).mul_scalar(scale);
        let (weights, dscores) = (share(weights, shared), share(dscores, shared));
        dv = add_rows(dv, &before, precision.product(weights.swap_dims(2, 3), dblock));
        dq.push(unshare(precision.product(dscores.clone(), keys), heads));
        let queries = share(rows(q, &block), shared);
        dk = add_rows(dk, &before, precision.product(dscores.swap_dims(2, 3), queries));
    }
    [Tensor::cat(dq, 2), dk, dv]
}

/// Scores `(B,H,n,keys)` of the n queries of a block against the keys up to its last.
fn scores(precision: Precision, mask: &Mask, q: &Tensor<4>, k: &Tensor<4>, block: &Range<usize>) -> Tensor<4> {
    let [_, heads, _, width] = q.dims();
    let keys = rows(k, &(0..block.end)).swap_dims(2, 3);
    let scores = precision.product(share(rows(q, block), k.dims()[1]), keys);
    unshare(scores, heads).mul_scalar(scale(width)) + mask.of(block)
}

/// 1/√d.
fn scale(width: usize) -> f32 {
    1.0 / (width as f32).sqrt()
}

/// Adds `part` to those rows of each head of x.
fn add_rows(x: Tensor<4>, range: &Range<usize>, part: Tensor<4>) -> Tensor<4> {
    if range.len() == x.dims()[2] {
        return x + part;
    }
    let sum = rows(&x, range) + part;
    let [batch, heads, _, width] = x.dims();
    x.slice_assign([0..batch, 0..heads, range.clone(), 0..width], sum)
}
