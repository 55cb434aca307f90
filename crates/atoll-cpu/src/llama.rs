//! The model over a batch: forward, loss, backward. N = B·T tokens, D the residual width, Q = H·hd,
//! KV = key heads · hd, I the inner width of SwiGLU, V the vocabulary.
//!
//! ```text
//! x ← embedding[tokens]                                                  (N,D)
//! per layer   x ← x + attention(rope(h Wqᵀ), rope(h Wkᵀ), h Wvᵀ) Woᵀ      h = norm(x)
//!             x ← x + swiglu(h Wgᵀ, h Wuᵀ) Wdᵀ                            h = norm(x)
//! logits = norm(x) Eᵀ, a chunk of rows at a time                         (R,V)
//! ```
//!
//! The backward pass reads what [`Activations`] kept and computes the cheap rest again (norms,
//! SwiGLU, probabilities). Gradients of q, k, v, gate and up overwrite the activations they belong to.
//!
//! The numbers, for preset `mini` (12.6 M parameters, V 8192) on 8 × 256 tokens:
//!
//! ```text
//! kept      2·D + 2·Q + 2·KV + 2·I = 3840 floats per token and layer      6 layers: 189 MB
//! work      4·D + 2·Q + 2·KV + I = 3584 floats per token, and the logits            46 MB
//! weights, gradient, two moments                                                   201 MB
//! work of a token: 6 × parameters = 76 MFLOP, attention 5 MFLOP                    166 GFLOP a step
//! ```

use atoll_core::model::ModelConfig;
use rayon::prelude::*;

use crate::TILE_ROWS;
use crate::attention::{self, HeadGradients, Heads, Inputs, Known, Outputs};
use crate::gemm::{Mat, Write, matmul};
use crate::layout::{Layer, Layout};
use crate::loss::cross_entropy;
use crate::math::add_scaled;
use crate::rope::{Rope, Turn};
use crate::{norm, swiglu};

/// Logits that exist at once: 16 MiB.
const LOGITS: usize = 1 << 22;

/// A micro-batch: `rows` windows of `length + 1` tokens.
#[derive(Clone, Copy)]
pub(crate) struct Windows<'a> {
    pub(crate) rows: usize,
    pub(crate) length: usize,
    pub(crate) tokens: &'a [u32],
}

/// The model's shape with everything that its passes need besides weights.
pub(crate) struct Llama {
    pub(crate) config: ModelConfig,
    pub(crate) layout: Layout,
    heads: Heads,
    rope: Rope,
    kept: Activations,
    work: Workspace,
}

/// What the forward pass keeps for the backward pass.
#[derive(Default)]
struct Activations {
    length: usize,
    inputs: Vec<u32>,
    targets: Vec<u32>,
    layers: Vec<LayerActivations>,
    /// The residual stream, `(N,D)`; after the last layer, what the final norm reads.
    x: Vec<f32>,
    inverse_rms: Vec<f32>,
}

/// What one layer keeps.
#[derive(Default, Clone)]
struct LayerActivations {
    /// The residual stream before attention, `(N,D)`.
    x_attention: Vec<f32>,
    /// And before SwiGLU, `(N,D)`.
    x_mlp: Vec<f32>,
    /// Of `x_attention`, `(N)`.
    inverse_rms_attention: Vec<f32>,
    /// Of `x_mlp`, `(N)`.
    inverse_rms_mlp: Vec<f32>,
    /// After rotation, `(N,Q)`.
    q: Vec<f32>,
    /// After rotation, `(N,KV)`.
    k: Vec<f32>,
    /// `(N,KV)`.
    v: Vec<f32>,
    /// Output of attention, `(N,Q)`.
    attended: Vec<f32>,
    /// ln Σ eˢ of each query, `(N,H)`.
    log_sum: Vec<f32>,
    /// `(N,I)`.
    gate: Vec<f32>,
    /// `(N,I)`.
    up: Vec<f32>,
}

/// Buffers whose contents live no longer than one part of a pass.
#[derive(Default)]
struct Workspace {
    /// A normed residual stream, `(N,D)`.
    normed: Vec<f32>,
    /// The output of SwiGLU or its gradient, `(N,I)`.
    inner: Vec<f32>,
    /// A chunk of logits, `(R,V)`.
    logits: Vec<f32>,
    /// Loss of each token, `(N)`.
    nats: Vec<f32>,
    /// Gradient of the residual stream, `(N,D)`.
    d_x: Vec<f32>,
    /// Gradient of `normed`, `(N,D)`.
    d_normed: Vec<f32>,
    /// Gradient of `attended`, `(N,Q)`.
    d_attended: Vec<f32>,
    /// Gradients by head, `(B,H,T,hd)` and `(B,KV,T,hd)`.
    d_q: Vec<f32>,
    d_k: Vec<f32>,
    d_v: Vec<f32>,
}

impl Llama {
    pub(crate) fn new(config: ModelConfig, layout: Layout) -> Self {
        let layers = vec![LayerActivations::default(); config.num_hidden_layers];
        let kept = Activations { layers, ..Activations::default() };
        let (heads, rope) = (Heads::new(&config), Rope::new(&config));
        Self { config, layout, heads, rope, kept, work: Workspace::default() }
    }

    /// Summed loss of `windows` in nats.
    pub(crate) fn nats(&mut self, weights: &[f32], windows: Windows<'_>) -> f64 {
        self.forward(weights, windows);
        self.loss(weights, None)
    }

    /// The same, and adds `scale` times its gradient to `gradient`.
    pub(crate) fn nats_and_gradient(
        &mut self,
        weights: &[f32],
        windows: Windows<'_>,
        scale: f32,
        gradient: &mut [f32],
    ) -> f64 {
        self.forward(weights, windows);
        let nats = self.loss(weights, Some((scale, gradient)));
        self.backward(weights, gradient);
        nats
    }

    /// Fills `kept` up to the final residual stream, and `work.normed` with its norm.
    fn forward(&mut self, weights: &[f32], windows: Windows<'_>) {
        self.fit(windows);
        let Self { config, layout, heads, rope, kept, work } = self;
        let d = config.hidden_size;
        let embedding = &weights[layout.embedding.clone()];
        kept.x.par_chunks_mut(d).zip(&kept.inputs).with_min_len(TILE_ROWS).for_each(|(x, &token)| {
            x.copy_from_slice(&embedding[token as usize * d..][..d]);
        });
        for (places, layer) in layout.layers.iter().zip(&mut kept.layers) {
            let pass = Pass { config, heads: *heads, rope, length: kept.length, places, weights };
            pass.attention_forward(layer, &mut kept.x, work);
            pass.mlp_forward(layer, &mut kept.x, work);
        }
        let gain = &weights[layout.norm.clone()];
        norm::forward(&kept.x, gain, config.rms_norm_eps, &mut kept.inverse_rms, &mut work.normed);
    }

    /// Summed loss after [`forward`](Self::forward). With a scale and a gradient, also adds the head's
    /// gradient and writes that of the normed residual stream to `work.d_normed`.
    fn loss(&mut self, weights: &[f32], mut backward: Option<(f32, &mut [f32])>) -> f64 {
        let (d, vocab) = (self.config.hidden_size, self.config.vocab_size);
        let head = Mat::new(&weights[self.layout.head.clone()], d);
        let Workspace { normed, logits, nats, d_normed, .. } = &mut self.work;
        let rows = logits_rows(vocab);
        let chunks = normed.chunks(rows * d).zip(d_normed.chunks_mut(rows * d));
        let chunks = chunks.zip(self.kept.targets.chunks(rows)).zip(nats.chunks_mut(rows));
        for (((normed, d_normed), targets), nats) in chunks {
            let logits = &mut logits[..targets.len() * vocab];
            matmul(logits, Write::Set, Mat::new(normed, d), head.t());
            let scale = backward.as_ref().map(|(scale, _)| *scale);
            cross_entropy(logits, vocab, targets, scale, nats);
            if let Some((_, gradient)) = &mut backward {
                let d_head = &mut gradient[self.layout.head.clone()];
                matmul(d_head, Write::Add, Mat::new(logits, vocab).t(), Mat::new(normed, d));
                matmul(d_normed, Write::Set, Mat::new(logits, vocab), head);
            }
        }
        nats.iter().map(|&nats| f64::from(nats)).sum()
    }

    /// From `work.d_normed` back to the embedding, adding to `gradient`.
    fn backward(&mut self, weights: &[f32], gradient: &mut [f32]) {
        let Self { config, layout, heads, rope, kept, work } = self;
        work.d_x.fill(0.0);
        let (gain, d_gain) = (&weights[layout.norm.clone()], &mut gradient[layout.norm.clone()]);
        norm::backward(&kept.x, &kept.inverse_rms, gain, &work.d_normed, &mut work.d_x, d_gain);
        for (places, layer) in layout.layers.iter().zip(&mut kept.layers).rev() {
            let pass = Pass { config, heads: *heads, rope, length: kept.length, places, weights };
            pass.mlp_backward(layer, work, gradient);
            pass.attention_backward(layer, work, gradient);
        }
        // Tokens repeat, so rows of the embedding are added up on one thread.
        let (d, d_embedding) = (config.hidden_size, &mut gradient[layout.embedding.clone()]);
        for (d_x, &token) in work.d_x.chunks(d).zip(&kept.inputs) {
            add_scaled(&mut d_embedding[token as usize * d..][..d], 1.0, d_x);
        }
    }

    /// Takes in the tokens and gives every buffer its size. Memory is kept when a batch is smaller.
    fn fit(&mut self, windows: Windows<'_>) {
        let Windows { rows, length, tokens } = windows;
        assert!(length <= self.config.max_position_embeddings && tokens.len() == rows * (length + 1));
        let split = |range: std::ops::Range<usize>| {
            tokens.chunks(length + 1).flat_map(move |window| window[range.clone()].iter().copied())
        };
        self.kept.inputs.clear();
        self.kept.inputs.extend(split(0..length));
        self.kept.targets.clear();
        self.kept.targets.extend(split(1..length + 1));
        self.kept.length = length;
        self.resize(rows * length);
    }

    fn resize(&mut self, n: usize) {
        let (d, inner, vocab) = (self.config.hidden_size, self.config.intermediate_size, self.config.vocab_size);
        let (q, kv) = (self.heads.q_width(), self.heads.kv_width());
        for layer in &mut self.kept.layers {
            size([&mut layer.x_attention, &mut layer.x_mlp], n * d);
            size([&mut layer.inverse_rms_attention, &mut layer.inverse_rms_mlp], n);
            size([&mut layer.q, &mut layer.attended], n * q);
            size([&mut layer.k, &mut layer.v], n * kv);
            size([&mut layer.gate, &mut layer.up], n * inner);
            size([&mut layer.log_sum], n * self.heads.queries);
        }
        let work = &mut self.work;
        size([&mut self.kept.x, &mut work.normed, &mut work.d_x, &mut work.d_normed], n * d);
        size([&mut self.kept.inverse_rms, &mut work.nats], n);
        size([&mut work.d_attended, &mut work.d_q], n * q);
        size([&mut work.d_k, &mut work.d_v], n * kv);
        size([&mut work.inner], n * inner);
        size([&mut work.logits], n.min(logits_rows(vocab)) * vocab);
    }
}

/// Gives each buffer `len` elements; those that it gains are 0.
fn size<const COUNT: usize>(buffers: [&mut Vec<f32>; COUNT], len: usize) {
    buffers.into_iter().for_each(|buffer| buffer.resize(len, 0.0));
}

/// Rows of logits that are computed at once.
fn logits_rows(vocab: usize) -> usize {
    (LOGITS / vocab).clamp(64, 1024)
}

/// One layer of one pass.
struct Pass<'a> {
    config: &'a ModelConfig,
    heads: Heads,
    rope: &'a Rope,
    length: usize,
    places: &'a Layer,
    weights: &'a [f32],
}

impl<'a> Pass<'a> {
    /// A weight matrix `(out, in)`.
    fn matrix(&self, place: &std::ops::Range<usize>, inputs: usize) -> Mat<'a> {
        Mat::new(&self.weights[place.clone()], inputs)
    }

    /// x ← x + attention(norm(x)).
    fn attention_forward(&self, layer: &mut LayerActivations, x: &mut [f32], work: &mut Workspace) {
        let (d, eps) = (self.config.hidden_size, self.config.rms_norm_eps);
        let (q_width, kv_width) = (self.heads.q_width(), self.heads.kv_width());
        copy(x, &mut layer.x_attention);
        let gain = &self.weights[self.places.attention_norm.clone()];
        norm::forward(x, gain, eps, &mut layer.inverse_rms_attention, &mut work.normed);
        let h = Mat::new(&work.normed, d);
        matmul(&mut layer.q, Write::Set, h, self.matrix(&self.places.q, d).t());
        matmul(&mut layer.k, Write::Set, h, self.matrix(&self.places.k, d).t());
        matmul(&mut layer.v, Write::Set, h, self.matrix(&self.places.v, d).t());
        self.rope.rotate(&mut layer.q, q_width, 0, self.length, Turn::Forward);
        self.rope.rotate(&mut layer.k, kv_width, 0, self.length, Turn::Forward);
        let inputs = Inputs { q: &layer.q, k: &layer.k, v: &layer.v };
        let outputs = Outputs { out: &mut layer.attended, log_sum: &mut layer.log_sum };
        attention::forward(self.heads, self.length, inputs, outputs);
        matmul(x, Write::Add, Mat::new(&layer.attended, q_width), self.matrix(&self.places.o, q_width).t());
    }

    /// x ← x + swiglu(norm(x)).
    fn mlp_forward(&self, layer: &mut LayerActivations, x: &mut [f32], work: &mut Workspace) {
        let (d, inner) = (self.config.hidden_size, self.config.intermediate_size);
        copy(x, &mut layer.x_mlp);
        let gain = &self.weights[self.places.mlp_norm.clone()];
        norm::forward(x, gain, self.config.rms_norm_eps, &mut layer.inverse_rms_mlp, &mut work.normed);
        let h = Mat::new(&work.normed, d);
        matmul(&mut layer.gate, Write::Set, h, self.matrix(&self.places.gate, d).t());
        matmul(&mut layer.up, Write::Set, h, self.matrix(&self.places.up, d).t());
        swiglu::forward(&layer.gate, &layer.up, &mut work.inner);
        matmul(x, Write::Add, Mat::new(&work.inner, inner), self.matrix(&self.places.down, inner).t());
    }

    /// Adds this half layer's gradients, and to `work.d_x` what came through it.
    fn mlp_backward(&self, layer: &mut LayerActivations, work: &mut Workspace, gradient: &mut [f32]) {
        let (d, inner) = (self.config.hidden_size, self.config.intermediate_size);
        let (places, d_x) = (self.places, Mat::new(&work.d_x, d));
        swiglu::forward(&layer.gate, &layer.up, &mut work.inner);
        matmul(&mut gradient[places.down.clone()], Write::Add, d_x.t(), Mat::new(&work.inner, inner));
        matmul(&mut work.inner, Write::Set, d_x, self.matrix(&places.down, inner));
        swiglu::backward(&mut layer.gate, &mut layer.up, &work.inner);

        let gain = &self.weights[places.mlp_norm.clone()];
        norm::apply(&layer.x_mlp, &layer.inverse_rms_mlp, gain, &mut work.normed);
        let (h, d_gate, d_up) = (Mat::new(&work.normed, d), Mat::new(&layer.gate, inner), Mat::new(&layer.up, inner));
        matmul(&mut gradient[places.gate.clone()], Write::Add, d_gate.t(), h);
        matmul(&mut gradient[places.up.clone()], Write::Add, d_up.t(), h);
        matmul(&mut work.d_normed, Write::Set, d_gate, self.matrix(&places.gate, d));
        matmul(&mut work.d_normed, Write::Add, d_up, self.matrix(&places.up, d));
        let d_gain = &mut gradient[places.mlp_norm.clone()];
        norm::backward(&layer.x_mlp, &layer.inverse_rms_mlp, gain, &work.d_normed, &mut work.d_x, d_gain);
    }

    /// Adds this half layer's gradients, and to `work.d_x` what came through it.
    fn attention_backward(&self, layer: &mut LayerActivations, work: &mut Workspace, gradient: &mut [f32]) {
        let (d, width, places) = (self.config.hidden_size, self.heads.q_width(), self.places);
        let d_x = Mat::new(&work.d_x, d);
        matmul(&mut gradient[places.o.clone()], Write::Add, d_x.t(), Mat::new(&layer.attended, width));
        matmul(&mut work.d_attended, Write::Set, d_x, self.matrix(&places.o, width));
        self.heads_backward(layer, work);

        let gain = &self.weights[places.attention_norm.clone()];
        norm::apply(&layer.x_attention, &layer.inverse_rms_attention, gain, &mut work.normed);
        let h = Mat::new(&work.normed, d);
        let projections = [(&places.q, &layer.q), (&places.k, &layer.k), (&places.v, &layer.v)];
        for (index, (place, d_output)) in projections.into_iter().enumerate() {
            let d_output = Mat::new(d_output, place.len() / d);
            let write = if index == 0 { Write::Set } else { Write::Add };
            matmul(&mut gradient[place.clone()], Write::Add, d_output.t(), h);
            matmul(&mut work.d_normed, write, d_output, self.matrix(place, d));
        }
        let d_gain = &mut gradient[places.attention_norm.clone()];
        let (x, inverse_rms) = (&layer.x_attention, &layer.inverse_rms_attention);
        norm::backward(x, inverse_rms, gain, &work.d_normed, &mut work.d_x, d_gain);
    }

    /// From `work.d_attended` to the gradients before rotation, which replace q, k and v.
    fn heads_backward(&self, layer: &mut LayerActivations, work: &mut Workspace) {
        let (length, dim) = (self.length, self.heads.dim);
        let (width, kv_width) = (self.heads.q_width(), self.heads.kv_width());
        let inputs = Inputs { q: &layer.q, k: &layer.k, v: &layer.v };
        let known = Known { out: &layer.attended, d_out: &work.d_attended, log_sum: &layer.log_sum };
        let gradients = HeadGradients { q: &mut work.d_q, k: &mut work.d_k, v: &mut work.d_v };
        attention::backward(self.heads, length, inputs, known, gradients);
        attention::to_tokens(&work.d_q, length, dim, width, &mut layer.q);
        attention::to_tokens(&work.d_k, length, dim, kv_width, &mut layer.k);
        attention::to_tokens(&work.d_v, length, dim, kv_width, &mut layer.v);
        self.rope.rotate(&mut layer.q, width, 0, length, Turn::Back);
        self.rope.rotate(&mut layer.k, kv_width, 0, length, Turn::Back);
    }
}

fn copy(from: &[f32], to: &mut [f32]) {
    const TILE: usize = 1 << 16;
    to.par_chunks_mut(TILE).zip(from.par_chunks(TILE)).for_each(|(to, from)| to.copy_from_slice(from));
}
