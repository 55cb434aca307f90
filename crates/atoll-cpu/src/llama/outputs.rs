//! What the last forward pass computed, module by module with Hugging Face's names: to find the first one in which
//! another framework differs. It is worked out again from what is kept for the backward pass.

use super::Llama;
use crate::norm;

/// What a module gave for each token.
#[derive(Debug, Clone, PartialEq)]
pub struct Output {
    /// The module, such as `model.layers.0.mlp`; heads that are not projected yet are `….self_attn.heads`.
    pub module: String,
    /// `(N, width)`.
    pub values: Vec<f32>,
}

impl Llama {
    /// The outputs of the last forward pass with a loss, in the order in which they were computed.
    pub(crate) fn outputs(&self, weights: &[f32]) -> Vec<Output> {
        let mut outputs = vec![output("model.embed_tokens", self.kept.residual[0].clone())];
        for (index, layer) in self.layout.layers.iter().enumerate() {
            let module = |part: &str| format!("model.layers.{index}.{part}");
            let (first, second) = (2 * index, 2 * index + 1);
            outputs.extend([
                output(module("input_layernorm"), self.normed(first, &weights[layer.attention_norm.clone()])),
                output(module("self_attn.heads"), self.attended(index)),
                output(module("self_attn"), self.added(first)),
                output(module("post_attention_layernorm"), self.normed(second, &weights[layer.mlp_norm.clone()])),
                output(module("mlp"), self.added(second)),
            ]);
        }
        let last = self.kept.residual.len() - 1;
        outputs.push(output("model.norm", self.normed(last, &weights[self.layout.norm.clone()])));
        outputs
    }

    /// The residual stream at `point` after its norm, `(N,D)`.
    fn normed(&self, point: usize, gain: &[f32]) -> Vec<f32> {
        let x = &self.kept.residual[point];
        let mut normed = vec![0.0; x.len()];
        norm::apply(x, &self.kept.inverse_rms[point], gain, &mut normed);
        normed
    }

    /// What the half layer at `point` added to the residual stream, `(N,D)`.
    fn added(&self, point: usize) -> Vec<f32> {
        let (before, after) = (&self.kept.residual[point], &self.kept.residual[point + 1]);
        after.iter().zip(before).map(|(after, before)| after - before).collect()
    }

    /// The heads of a layer side by side, `(N,Q)`.
    fn attended(&self, layer: usize) -> Vec<f32> {
        let width = self.shape.heads.q_width();
        let mut heads = vec![0.0; self.kept.inputs.len() * width];
        self.shape.precision.decode_rows(self.kept.layers[layer].attended.words(), width, &mut heads);
        heads
    }
}

fn output(module: impl Into<String>, values: Vec<f32>) -> Output {
    Output { module: module.into(), values }
}
