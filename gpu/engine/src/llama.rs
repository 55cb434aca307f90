//! The passes over a micro-batch of B rows of T tokens, N = B·T. Of each layer are kept: what comes in, queries, keys,
//! values and results of its attention, the stream in its middle, and both halves of SwiGLU; the rest is computed
//! again. Logits are made, used and dropped for some tokens at a time.

use atoll_core::model::ModelConfig;
use burn::tensor::{Device, IndexingUpdateOp, Int, Tensor};

use crate::arithmetic::{Precision, Rope, indices, norm, norm_back, silu, silu_slope};
use crate::attention::{self, Mask};

/// Logits that exist at once.
const LOGITS: usize = 1 << 24;

/// Rows of one micro-batch, as in [`Batch`](atoll_core::engine::Batch).
pub(crate) struct Windows<'a> {
    /// T.
    pub(crate) length: usize,
    /// `(B,T+1)`.
    pub(crate) tokens: &'a [u32],
    /// `(B,T)` or empty.
    pub(crate) starts: &'a [u32],
}

/// The passes of a Llama; its weights are the caller's, one tensor for each of
/// [`ModelConfig::tensors`], gains as `(1,D)`.
pub(crate) struct Llama {
    model: ModelConfig,
    precision: Precision,
    rope: Rope,
    device: Device,
}

/// The weights of a layer or their gradients: q, k, v, o, gate, up, down and the gains of attention and SwiGLU.
type Layer = [Tensor<2>; 9];

/// What a layer keeps for the way back.
struct Kept {
    /// `(N,D)`.
    x: Tensor<2>,
    attention: attention::Kept,
    /// `(N,D)`, behind attention.
    middle: Tensor<2>,
    /// `(N,I)`.
    gate: Tensor<2>,
    /// `(N,I)`.
    up: Tensor<2>,
}

/// A micro-batch on the device.
struct Inputs {
    rows: usize,
    /// `(N)`.
    tokens: Tensor<1, Int>,
    /// `(N)`.
    targets: Tensor<1, Int>,
    mask: Mask,
}

impl Llama {
    pub(crate) fn new(model: &ModelConfig, precision: Precision, device: &Device) -> Self {
        Self { model: model.clone(), precision, rope: Rope::new(model, device), device: device.clone() }
    }

    /// Losses of the tokens in nats, `(N,1)`.
    pub(crate) fn losses(&self, weights: &[Tensor<2>], windows: &Windows<'_>) -> Tensor<2> {
        let inputs = self.inputs(windows);
        let mut x = weights[0].clone().select(0, inputs.tokens.clone());
        for layer in self.layers(weights) {
            x = self.layer(layer, &inputs, x).0;
        }
        let y = norm(&x, self.gain(weights), self.model.rms_norm_eps);
        let chunks = self.chunks(y, &inputs.targets);
        Tensor::cat(chunks.map(|(y, targets)| self.logits(weights, y).losses(targets)).collect(), 0)
    }

    /// Losses of the tokens in nats, `(N,1)`, and the gradient of `share` times their sum, shaped as the weights.
    pub(crate) fn losses_and_gradient(
        &self,
        weights: &[Tensor<2>],
        windows: &Windows<'_>,
        share: f32,
    ) -> (Tensor<2>, Vec<Tensor<2>>) {
        let inputs = self.inputs(windows);
        let mut x = weights[0].clone().select(0, inputs.tokens.clone());
        let mut kept = Vec::new();
        for layer in self.layers(weights) {
            let (next, keeps) = self.layer(layer, &inputs, x);
            kept.push(keeps);
            x = next;
        }
        let (losses, dx, ends) = self.ends(weights, &inputs, &x, share);
        let (dx, layers) = self.layers_back(weights, &inputs, kept, dx);
        (losses, self.gradient(&inputs, dx, layers, ends))
    }

    fn inputs(&self, windows: &Windows<'_>) -> Inputs {
        let Windows { length, tokens, starts } = *windows;
        let rows = || tokens.chunks(length + 1);
        Inputs {
            rows: rows().len(),
            tokens: indices(rows().flat_map(|row| &row[..length]).copied(), &self.device),
            targets: indices(rows().flat_map(|row| &row[1..]).copied(), &self.device),
            mask: Mask::new(starts, length, &self.device),
        }
    }

    fn layers<'a>(&self, weights: &'a [Tensor<2>]) -> &'a [Layer] {
        weights[1..].as_chunks().0.get(..self.model.num_hidden_layers).expect("a model has its layers")
    }

    /// The last norm's.
    fn gain<'a>(&self, weights: &'a [Tensor<2>]) -> &'a Tensor<2> {
        &weights[1 + 9 * self.model.num_hidden_layers]
    }

    /// The map to logits: of its own, or the embedding.
    fn head<'a>(&self, weights: &'a [Tensor<2>]) -> &'a Tensor<2> {
        if self.model.tie_word_embeddings { &weights[0] } else { &weights[weights.len() - 1] }
    }

    /// One layer, for x `(N,D)`.
    fn layer(&self, layer: &Layer, inputs: &Inputs, x: Tensor<2>) -> (Tensor<2>, Kept) {
        let [q, k, v, o, gate, up, down, attention_gain, mlp_gain] = layer;
        let (eps, precision) = (self.model.rms_norm_eps, self.precision);
        let y = norm(&x, attention_gain, eps);
        let heads = |map| self.split(inputs, precision.through(y.clone(), map));
        let (q, k, v) = (self.rope.turn(heads(q)), self.rope.turn(heads(k)), heads(v));
        let attention = attention::forward(precision, &inputs.mask, q, k, v);
        let middle = x.clone() + precision.through(join(attention.out.clone()), o);

        let y = norm(&middle, mlp_gain, eps);
        let (gate, up) = (precision.through(y.clone(), gate), precision.through(y, up));
        let out = middle.clone() + precision.through(silu(gate.clone()) * up.clone(), down);
        (out, Kept { x, attention, middle, gate, up })
    }

    /// The gradients of what comes into a layer, `(N,D)`, and of its weights, for that of what comes out.
    fn layer_back(&self, layer: &Layer, inputs: &Inputs, kept: Kept, dout: Tensor<2>) -> (Tensor<2>, Layer) {
        let [q, k, v, o, gate, up, down, attention_gain, mlp_gain] = layer;
        let (eps, precision) = (self.model.rms_norm_eps, self.precision);
        let Kept { x, attention, middle, gate: gated, up: upper } = kept;

        let y = norm(&middle, mlp_gain, eps);
        let opened = silu(gated.clone());
        let dinner = precision.back(dout.clone(), down);
        let ddown = precision.slope(dout.clone(), opened.clone() * upper.clone());
        let dgated = dinner.clone() * upper * silu_slope(gated);
        let dupper = dinner * opened;
        let dy = precision.back(dgated.clone(), gate) + precision.back(dupper.clone(), up);
        let (dgate, dup) = (precision.slope(dgated, y.clone()), precision.slope(dupper, y));
        let (dmiddle, dmlp_gain) = norm_back(dy, &middle, mlp_gain, eps);
        let dmiddle = dout + dmiddle;

        let y = norm(&x, attention_gain, eps);
        let dresult = self.split(inputs, precision.back(dmiddle.clone(), o));
        let do_ = precision.slope(dmiddle.clone(), join(attention.out.clone()));
        let [dq, dk, dv] = attention::backward(precision, &inputs.mask, &attention, &dresult);
        let (dq, dk, dv) = (join(self.rope.turn_back(dq)), join(self.rope.turn_back(dk)), join(dv));
        let dy = precision.back(dq.clone(), q) + precision.back(dk.clone(), k) + precision.back(dv.clone(), v);
        let [dq, dk, dv] = [dq, dk, dv].map(|d| precision.slope(d, y.clone()));
        let (dx, dattention_gain) = norm_back(dy, &x, attention_gain, eps);
        (dmiddle + dx, [dq, dk, dv, do_, dgate, dup, ddown, dattention_gain, dmlp_gain])
    }

    /// From the last layer to the first: the gradients of the first's input and of all their weights, in order.
    fn layers_back(
        &self,
        weights: &[Tensor<2>],
        inputs: &Inputs,
        kept: Vec<Kept>,
        mut dx: Tensor<2>,
    ) -> (Tensor<2>, Vec<Tensor<2>>) {
        let mut gradients = Vec::new();
        for (layer, kept) in self.layers(weights).iter().zip(kept).rev() {
            let (next, gradient) = self.layer_back(layer, inputs, kept, dx);
            gradients.push(gradient);
            dx = next;
        }
        (dx, gradients.into_iter().rev().flatten().collect())
    }

    /// The last norm and the head, there and back, for x `(N,D)`: losses `(N,1)`, dx `(N,D)`, gradients of gain and head.
    fn ends(
        &self,
        weights: &[Tensor<2>],
        inputs: &Inputs,
        x: &Tensor<2>,
        share: f32,
    ) -> (Tensor<2>, Tensor<2>, [Tensor<2>; 2]) {
        let (gain, head) = (self.gain(weights), self.head(weights));
        let y = norm(x, gain, self.model.rms_norm_eps);
        let (mut losses, mut dy, mut dhead) = (Vec::new(), Vec::new(), head.zeros_like());
        for (y, targets) in self.chunks(y, &inputs.targets) {
            let logits = self.logits(weights, y.clone());
            losses.push(logits.losses(targets.clone()));
            let dlogits = logits.slopes(targets, share);
            dy.push(self.precision.back(dlogits.clone(), head));
            dhead = dhead + self.precision.slope(dlogits, y);
        }
        let (dx, dgain) = norm_back(Tensor::cat(dy, 0), x, gain, self.model.rms_norm_eps);
        (Tensor::cat(losses, 0), dx, [dgain, dhead])
    }

    /// All gradients in the order of the weights. A tied head's goes into the embedding's.
    fn gradient(
        &self,
        inputs: &Inputs,
        dx: Tensor<2>,
        layers: Vec<Tensor<2>>,
        [dgain, dhead]: [Tensor<2>; 2],
    ) -> Vec<Tensor<2>> {
        let tied = self.model.tie_word_embeddings;
        let embedding = if tied { dhead.clone() } else { dhead.zeros_like() };
        let embedding = embedding.select_assign(0, inputs.tokens.clone(), dx, IndexingUpdateOp::Add);
        let head = (!tied).then_some(dhead);
        std::iter::once(embedding).chain(layers).chain([dgain]).chain(head).collect()
    }

    /// y `(N,D)` and its targets, for so many tokens at a time as there may be logits of.
    fn chunks(&self, y: Tensor<2>, targets: &Tensor<1, Int>) -> impl Iterator<Item = (Tensor<2>, Tensor<1, Int>)> {
        let [count, _] = y.dims();
        let most = (LOGITS / self.model.vocab_size).max(1);
        let targets = targets.clone();
        (0..count).step_by(most).map(move |first| {
            let len = most.min(count - first);
            (y.clone().narrow(0, first, len), targets.clone().narrow(0, first, len))
        })
    }

    fn logits(&self, weights: &[Tensor<2>], y: Tensor<2>) -> Logits {
        let logits = self.precision.through(y, self.head(weights));
        let most = logits.clone().max_dim(1);
        let logarithms = (logits.clone() - most.clone()).exp().sum_dim(1).log() + most;
        Logits { logits, logarithms }
    }

    /// x `(N,heads·d)` as `(B,heads,T,d)`.
    fn split(&self, inputs: &Inputs, x: Tensor<2>) -> Tensor<4> {
        let ([count, width], head_dim) = (x.dims(), self.model.head_dim);
        x.reshape([inputs.rows, count / inputs.rows, width / head_dim, head_dim]).swap_dims(1, 2)
    }
}

/// x `(B,heads,T,d)` as `(N,heads·d)`.
fn join(x: Tensor<4>) -> Tensor<2> {
    let [rows, heads, length, width] = x.dims();
    x.swap_dims(1, 2).reshape([rows * length, heads * width])
}

/// Logits `(n,V)` of some tokens and the logarithms of their softmax's denominators `(n,1)`.
struct Logits {
    logits: Tensor<2>,
    logarithms: Tensor<2>,
}

impl Logits {
    /// In nats, `(n,1)`.
    fn losses(&self, targets: Tensor<1, Int>) -> Tensor<2> {
        self.logarithms.clone() - self.logits.clone().gather(1, targets.unsqueeze_dim(1))
    }

    /// The gradient of `share` times the sum of the losses: `share` · (softmax − one at the target), `(n,V)`.
    fn slopes(self, targets: Tensor<1, Int>, share: f32) -> Tensor<2> {
        let softmax = (self.logits - self.logarithms.clone()).exp().mul_scalar(share);
        let ones = self.logarithms.full_like(-share);
        softmax.scatter(1, targets.unsqueeze_dim(1), ones, IndexingUpdateOp::Add)
    }
}
