//! The model over a batch: forward, loss, backward. N = B·T tokens, D the residual width, Q = H·hd,
//! KV = key heads · hd, I the inner width of SwiGLU, V the vocabulary.
//!
//! ```text
//! x ← embedding[tokens]                                                  (N,D)
//! per layer   x ← x + attention(rope(h Wqᵀ), rope(h Wkᵀ), h Wvᵀ) Woᵀ      h = norm(x)
//!             x ← x + swiglu(h Wgᵀ, h Wuᵀ) Wdᵀ                            h = norm(x)
//! logits = norm(x) Eᵀ, some rows at a time                               (R,V)
//! ```
//!
//! Both directions are chains of *passes*. In a pass a thread takes [`TOKENS`] tokens and does everything
//! to them that needs no other tokens, while they are in its cache: norm, products, rotation, SwiGLU, and
//! packing for the products to come. Only attention and the gradients of weights, which mix tokens, are
//! passes of their own: three passes per layer forward ([`forward`]), five backward ([`backward`]).
//!
//! The numbers, for preset `mini` (12.6 M parameters, V 8192) on 8 × 256 tokens, in `f32` | `bf16`:
//!
//! ```text
//! kept      residual stream, q, k, v, attention, gate, up      6 layers: 192 MB | 117 MB
//! work      gradients by token, packed operands                           75 MB |  51 MB
//! weights, gradient, two moments                                         201 MB | 201 MB
//! packed weights, once in each direction                                 101 MB |  50 MB
//! work of a token: 6 × parameters = 76 MFLOP, attention 4 MFLOP           162 GFLOP a step
//! ```

mod backward;
mod forward;
mod kept;
mod outputs;

use atoll_core::model::ModelConfig;

use crate::attention::{self, Heads};
use crate::gemm::panels::{Panels, Stack, TOKENS};
use crate::gemm::{Left, Out, Write, product};
use crate::layout::{Layer, Layout};
use crate::pool::Pool;
use crate::rope::Rope;
use crate::words::Precision;
use kept::{Kept, Work};
pub use outputs::Output;

/// A micro-batch: `rows` windows of `length + 1` tokens.
#[derive(Clone, Copy)]
pub(crate) struct Windows<'a> {
    pub(crate) rows: usize,
    pub(crate) length: usize,
    pub(crate) tokens: &'a [u32],
    /// For each token the first in its row that it may see, `(rows, length)`; empty if that is the row's first.
    pub(crate) starts: &'a [u32],
}

/// The model's shape with everything that its passes need besides weights.
pub(crate) struct Llama {
    pub(crate) layout: Layout,
    shape: Shape,
    rope: Rope,
    packed: Packed,
    kept: Kept,
    work: Work,
    scratch: Vec<Scratch>,
}

/// The widths.
#[derive(Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) d: usize,
    pub(crate) inner: usize,
    pub(crate) vocab: usize,
    pub(crate) context: usize,
    pub(crate) eps: f32,
    pub(crate) heads: Heads,
    pub(crate) precision: Precision,
}

impl Shape {
    pub(crate) fn new(config: &ModelConfig, precision: Precision) -> Self {
        Self {
            d: config.hidden_size,
            inner: config.intermediate_size,
            vocab: config.vocab_size,
            context: config.max_position_embeddings,
            eps: config.rms_norm_eps,
            heads: Heads::new(config, precision),
            precision,
        }
    }

    /// `out = rows Wᵀ` or `rows W`, or added to it: (n, columns of the operand) from n rows of `width` features.
    pub(crate) fn product(self, out: &mut [f32], write: Write, rows: &[u32], width: usize, operand: &Panels) {
        let stride = self.precision.words(width);
        let (right, depth) = (operand.right(), operand.depth());
        let out = Out { data: out, stride: right.columns };
        product(self.precision, out, write, Left::rows(rows, rows.len() / stride, stride), right, depth);
    }
}

/// Weight matrices as right operands.
#[derive(Default)]
pub(crate) struct Packed {
    pub(crate) layers: Vec<PackedLayer>,
    pub(crate) head: Operand,
}

/// Those of one layer, `(out, in)`.
#[derive(Default)]
pub(crate) struct PackedLayer {
    /// `(Q + 2·KV, D)`.
    pub(crate) qkv: Operand,
    /// `(D, Q)`.
    pub(crate) o: Operand,
    /// `(2·I, D)`.
    pub(crate) gate_up: Operand,
    /// `(D, I)`.
    pub(crate) down: Operand,
}

/// A matrix in both directions.
#[derive(Default)]
pub(crate) struct Operand {
    /// For y = x Wᵀ.
    pub(crate) forward: Panels,
    /// For dx = dy W; empty where nothing is trained.
    backward: Panels,
}

/// Which directions are packed.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Directions {
    Forward,
    Both,
}

impl Packed {
    /// Packs all weights anew.
    pub(crate) fn pack(&mut self, pool: &Pool, shape: Shape, layout: &Layout, weights: &[f32], directions: Directions) {
        let pack = |operand: &mut Operand, parts: &[&std::ops::Range<usize>], width: usize| {
            let parts: Vec<&[f32]> = parts.iter().map(|&place| &weights[place.clone()]).collect();
            let stack = Stack { parts: &parts, width };
            operand.forward.pack_transposed(pool, shape.precision, stack);
            if directions == Directions::Both {
                operand.backward.pack(pool, shape.precision, stack);
            }
        };
        self.layers.resize_with(layout.layers.len(), PackedLayer::default);
        for (packed, Layer { q, k, v, o, gate, up, down, .. }) in self.layers.iter_mut().zip(&layout.layers) {
            pack(&mut packed.qkv, &[q, k, v], shape.d);
            pack(&mut packed.o, &[o], shape.heads.q_width());
            pack(&mut packed.gate_up, &[gate, up], shape.d);
            pack(&mut packed.down, &[down], shape.inner);
        }
        pack(&mut self.head, &[&layout.head], shape.d);
    }
}

/// Buffers of one thread.
#[derive(Default)]
struct Scratch {
    /// `(TOKENS, D)`.
    normed: Vec<f32>,
    /// `(TOKENS, widest)`.
    wide: Vec<f32>,
    /// `(TOKENS, I)`.
    inner: Vec<f32>,
    /// A left operand, `(TOKENS, words(widest))`.
    words: Vec<u32>,
    /// Some rows of logits, `(n, words(V))`.
    logit_words: Vec<u32>,
    attention: attention::Scratch,
}

impl Llama {
    pub(crate) fn new(config: &ModelConfig, layout: Layout, precision: Precision, pool: &Pool) -> Self {
        Self {
            layout,
            shape: Shape::new(config, precision),
            rope: Rope::new(config),
            packed: Packed::default(),
            kept: Kept::new(config.num_hidden_layers),
            work: Work::default(),
            scratch: (0..pool.threads()).map(|_| Scratch::default()).collect(),
        }
    }

    /// Packs the weights for the passes to come; to be called whenever they have changed.
    pub(crate) fn pack(&mut self, pool: &Pool, weights: &[f32], directions: Directions) {
        self.packed.pack(pool, self.shape, &self.layout, weights, directions);
    }

    /// Summed loss of `windows` in nats.
    pub(crate) fn nats(&mut self, pool: &Pool, weights: &[f32], windows: Windows<'_>) -> f64 {
        self.kept.fit(self.shape, windows);
        self.forward(pool, weights);
        self.loss(pool, weights)
    }

    /// The same, and adds `scale` times its gradient to `gradient`.
    pub(crate) fn nats_and_gradient(
        &mut self,
        pool: &Pool,
        weights: &[f32],
        windows: Windows<'_>,
        scale: f32,
        gradient: &mut [f32],
    ) -> f64 {
        self.kept.fit(self.shape, windows);
        self.work.fit(self.shape, windows.rows, windows.length);
        self.forward(pool, weights);
        let nats = self.loss_and_gradient(pool, weights, scale, gradient);
        self.backward(pool, weights, gradient);
        nats
    }

    /// The first thing that is not finite in the last forward pass, in words: where a loss was lost.
    pub(crate) fn first_non_finite(&self) -> Option<String> {
        let index = self.kept.residual.iter().position(|x| x.iter().any(|x| !x.is_finite()))?;
        Some(match (index, index % 2) {
            (0, _) => "an embedding".to_string(),
            (_, 1) => format!("the output of attention in layer {}", index / 2),
            _ => format!("the output of SwiGLU in layer {}", index / 2 - 1),
        })
    }
}
