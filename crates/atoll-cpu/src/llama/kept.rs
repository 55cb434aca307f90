//! What lives from one pass to another. Memory is allocated once and kept when a batch is smaller.

use crate::gemm::panels::{LeftGroups, RightGroups, TOKENS};
use crate::llama::{Shape, Windows};
use crate::words::Buffer;

/// What the forward pass keeps for the backward pass.
#[derive(Default)]
pub(super) struct Kept {
    pub(super) length: usize,
    pub(super) inputs: Vec<u32>,
    pub(super) targets: Vec<u32>,
    pub(super) starts: Vec<u32>,
    /// The residual stream `(N,D)` before each half layer, and after the last: 2·L + 1.
    pub(super) residual: Vec<Vec<f32>>,
    /// Of each of those, `(N)`.
    pub(super) inverse_rms: Vec<Vec<f32>>,
    pub(super) layers: Vec<LayerKept>,
    /// Loss of each token, `(N)`.
    pub(super) nats: Vec<f32>,
}

/// What one layer keeps.
#[derive(Default, Clone)]
pub(super) struct LayerKept {
    /// After rotation, `(N, words(Q + 2·KV))`.
    pub(super) qkv: Buffer,
    /// Output of attention, `(N, words(Q))`.
    pub(super) attended: Buffer,
    /// ln Σ eˢ of each query, `(N,H)`.
    pub(super) log_sum: Vec<f32>,
    /// `(N, words(2·I))`.
    pub(super) gate_up: Buffer,
}

impl Kept {
    pub(super) fn new(layers: usize) -> Self {
        Self {
            residual: vec![Vec::new(); 2 * layers + 1],
            inverse_rms: vec![Vec::new(); 2 * layers + 1],
            layers: vec![LayerKept::default(); layers],
            ..Self::default()
        }
    }

    /// Takes in the tokens and gives every buffer its size.
    pub(super) fn fit(&mut self, shape: Shape, windows: Windows<'_>) {
        let Windows { rows, length, tokens, starts } = windows;
        assert!(length <= shape.context && tokens.len() == rows * (length + 1), "whole windows that fit the context");
        let split = |range: std::ops::Range<usize>| {
            tokens.chunks(length + 1).flat_map(move |window| window[range.clone()].iter().copied())
        };
        self.inputs.clear();
        self.inputs.extend(split(0..length));
        self.targets.clear();
        self.targets.extend(split(1..length + 1));
        self.starts.clear();
        self.starts.extend_from_slice(starts);
        self.length = length;
        let (n, words) = (rows * length, |width| shape.precision.words(width));
        self.residual.iter_mut().for_each(|x| x.resize(n * shape.d, 0.0));
        self.inverse_rms.iter_mut().chain([&mut self.nats]).for_each(|r| r.resize(n, 0.0));
        for layer in &mut self.layers {
            layer.qkv.resize(n * shape.heads.stride());
            layer.attended.resize(n * words(shape.heads.q_width()));
            layer.log_sum.resize(n * shape.heads.queries, 0.0);
            layer.gate_up.resize(n * words(2 * shape.inner));
        }
    }
}

/// What passes of the backward direction hand to each other.
#[derive(Default)]
pub(super) struct Work {
    /// Gradient of the residual stream, `(N,D)`.
    pub(super) d_x: Vec<f32>,
    /// Gradient of `attended`, `(N, words(Q))`.
    pub(super) d_attended: Buffer,
    /// Gradients by head, `(B,H,T,hd)` and `(B,KV,T,hd)`.
    pub(super) d_q: Vec<f32>,
    pub(super) d_k: Vec<f32>,
    pub(super) d_v: Vec<f32>,
    /// Each group's part of the gradient of a gain, `(groups, D)`.
    pub(super) d_gain: Vec<f32>,
    /// Operands of the gradients of weights, dW = leftᵀ right.
    pub(super) d_down: LeftGroups,
    pub(super) inner: RightGroups,
    pub(super) d_gate_up: LeftGroups,
    pub(super) h_mlp: RightGroups,
    pub(super) d_o: LeftGroups,
    pub(super) attended: RightGroups,
    pub(super) d_qkv: LeftGroups,
    pub(super) h_attention: RightGroups,
    /// The same for the head, some tokens at a time.
    pub(super) d_logits: LeftGroups,
    pub(super) h_head: RightGroups,
}

/// Words of logits that exist at once beside those that threads work on: 16 MiB, unless the vocabulary is huge.
const LOGITS: usize = 1 << 22;

impl Work {
    pub(super) fn fit(&mut self, shape: Shape, rows: usize, length: usize) {
        let Shape { d, inner, precision, heads, .. } = shape;
        let (n, q, kv) = (rows * length, heads.q_width(), heads.kv_width());
        self.d_x.resize(n * d, 0.0);
        self.d_attended.resize(n * precision.words(q));
        self.d_q.resize(n * q, 0.0);
        self.d_k.resize(n * kv, 0.0);
        self.d_v.resize(n * kv, 0.0);
        self.d_gain.resize(n.div_ceil(TOKENS) * d, 0.0);
        self.d_down.resize(precision, n, &[d]);
        self.inner.resize(precision, n, &[inner]);
        self.d_gate_up.resize(precision, n, &[inner, inner]);
        self.h_mlp.resize(precision, n, &[d]);
        self.d_o.resize(precision, n, &[d]);
        self.attended.resize(precision, n, &[q]);
        self.d_qkv.resize(precision, n, &[q, kv, kv]);
        self.h_attention.resize(precision, n, &[d]);
        let chunk = logit_tokens(shape).min(n);
        self.d_logits.resize(precision, chunk, &[shape.vocab]);
        self.h_head.resize(precision, chunk, &[d]);
    }
}

/// Tokens whose gradients of logits exist at once: whole groups, and enough of them for some threads.
pub(super) fn logit_tokens(shape: Shape) -> usize {
    (LOGITS / shape.precision.words(shape.vocab * TOKENS)).max(6) * TOKENS
}
