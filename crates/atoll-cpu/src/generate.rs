//! Text from a model, one token at a time. Keys and values of earlier tokens are cached, so a new token
//! costs one row through the network. A full context is not the end: its last half is read again, and
//! generation goes on from there.

use atoll_core::engine::EngineError;
use atoll_core::model::ModelConfig;
use atoll_core::rng::Rng;
use rayon::ThreadPool;
use serde::{Deserialize, Serialize};

use crate::attention::{self, Heads, Inputs, Outputs};
use crate::engine::{Precision, thread_pool};
use crate::gemm::{Mat, Write, matmul};
use crate::layout::{Layer, Layout};
use crate::math::max;
use crate::rope::{Rope, Turn};
use crate::{norm, swiglu};

/// How the next token is drawn from the logits.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Sampling {
    /// Divides the logits; 0 always takes the likeliest token.
    pub temperature: f32,
    /// Draws among the likeliest `top_k` tokens; 0 among all.
    pub top_k: usize,
    /// Draws among the likeliest tokens that together have this probability; 1 among all.
    pub top_p: f32,
    /// The same seed gives the same text.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 1.0, top_k: 0, top_p: 1.0, seed: 0 }
    }
}

/// A model that continues texts.
pub struct Generator {
    config: ModelConfig,
    pool: ThreadPool,
    reader: Reader,
}

/// The endless continuation of a prompt: take as many tokens as wanted, stop at one that says so.
pub struct Tokens<'a> {
    generator: &'a mut Generator,
    sampling: Sampling,
    rng: Rng,
    /// The prompt and everything said since; what the cache holds is its end.
    text: Vec<u32>,
    /// How much of the end of `text` has not been read yet.
    unread: usize,
}

impl Generator {
    /// A generator with these weights, one vector per tensor in the order of [`ModelConfig::tensors`],
    /// on that many threads (0 takes one per core; the text does not depend on it).
    ///
    /// # Errors
    /// [`EngineError::Device`] if the configuration is unsound or the weights are another model's.
    pub fn new(
        config: &ModelConfig,
        weights: &[Vec<f32>],
        _precision: Precision,
        threads: usize,
    ) -> Result<Self, EngineError> {
        let problems = config.problems();
        if !problems.is_empty() {
            return Err(EngineError::Device(problems.join("\n")));
        }
        let tensors = config.tensors();
        if tensors.len() != weights.len() || tensors.iter().zip(weights).any(|(t, w)| t.len() != w.len()) {
            return Err(EngineError::Device("these weights are not of the model's tensors".to_string()));
        }
        let reader = Reader::new(config, weights.concat());
        Ok(Self { config: config.clone(), pool: thread_pool(threads)?, reader })
    }

    /// Continues `prompt`, of which the end counts if it is longer than the context.
    ///
    /// # Errors
    /// [`EngineError::Data`] if the prompt is empty or a token is outside of the vocabulary.
    pub fn generate(&mut self, prompt: &[u32], sampling: &Sampling) -> Result<Tokens<'_>, EngineError> {
        self.check(prompt)?;
        self.reader.forget();
        let unread = prompt.len().min(self.config.max_position_embeddings);
        let (text, rng) = (prompt.to_vec(), Rng::new(sampling.seed));
        Ok(Tokens { generator: self, sampling: sampling.clone(), rng, text, unread })
    }

    /// The logits after each of `tokens`, `(T, V)`.
    ///
    /// # Errors
    /// [`EngineError::Data`] if there are none or more than the context has, or one is outside of the vocabulary.
    pub fn logits(&mut self, tokens: &[u32]) -> Result<Vec<f32>, EngineError> {
        self.check(tokens)?;
        if tokens.len() > self.config.max_position_embeddings {
            let (have, most) = (tokens.len(), self.config.max_position_embeddings);
            return Err(EngineError::Data(format!("{have} tokens do not fit a context of {most}")));
        }
        self.reader.forget();
        let Self { pool, reader, .. } = self;
        Ok(pool.install(|| {
            reader.read(tokens);
            reader.logits(tokens.len())
        }))
    }

    fn check(&self, tokens: &[u32]) -> Result<(), EngineError> {
        let vocab = self.config.vocab_size;
        if tokens.is_empty() {
            return Err(EngineError::Data("there is no token to continue".to_string()));
        }
        match tokens.iter().find(|&&token| token as usize >= vocab) {
            Some(token) => Err(EngineError::Data(format!("token {token} is outside of the vocabulary of {vocab}"))),
            None => Ok(()),
        }
    }
}

impl Tokens<'_> {
    /// Reads what is unread and returns the logits of the next token, `(V)`.
    fn next_logits(&mut self) -> Vec<f32> {
        let Generator { config, pool, reader } = &mut *self.generator;
        if reader.seen + self.unread > config.max_position_embeddings {
            reader.forget();
            self.unread = (config.max_position_embeddings / 2).max(1);
        }
        let unread = &self.text[self.text.len() - self.unread..];
        pool.install(|| {
            reader.read(unread);
            reader.logits(1)
        })
    }
}

impl Iterator for Tokens<'_> {
    type Item = u32;

    fn next(&mut self) -> Option<u32> {
        let logits = self.next_logits();
        let token = draw(&logits, &self.sampling, &mut self.rng);
        self.text.push(token);
        self.unread = 1;
        Some(token)
    }
}

/// Draws a token.
fn draw(logits: &[f32], sampling: &Sampling, rng: &mut Rng) -> u32 {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    let likeliest_first = |&a: &usize, &b: &usize| logits[b].total_cmp(&logits[a]).then(a.cmp(&b));
    let kept = if sampling.temperature <= 0.0 { 1 } else { sampling.top_k };
    if kept > 0 && kept < order.len() {
        order.select_nth_unstable_by(kept - 1, likeliest_first);
        order.truncate(kept);
    }
    // Sorting a whole vocabulary costs as much as a small network, so it is done only where order counts.
    if order.len() < logits.len() || sampling.top_p < 1.0 {
        order.sort_unstable_by(likeliest_first);
    }
    if order.len() == 1 {
        return order[0] as u32;
    }
    let most = max(logits);
    let weight = |&token: &usize| f64::from((logits[token] - most) / sampling.temperature).exp();
    let weights: Vec<f64> = order.iter().map(weight).collect();
    order[pick(&weights, f64::from(sampling.top_p), rng)] as u32
}

/// An index drawn by these weights, among the first that make up `share` of their sum.
fn pick(weights: &[f64], share: f64, rng: &mut Rng) -> usize {
    let index_at = |target: f64| {
        let mut sum = 0.0;
        let reaches = |weight: &f64| {
            sum += weight;
            sum > target
        };
        weights.iter().position(reaches).unwrap_or(weights.len() - 1)
    };
    let total: f64 = weights.iter().sum();
    let last = if share < 1.0 { index_at(total * share) } else { weights.len() - 1 };
    let kept: f64 = weights[..=last].iter().sum();
    index_at(kept * rng.unit()).min(last)
}

/// The forward pass over a few tokens at a time, with its cache.
struct Reader {
    config: ModelConfig,
    layout: Layout,
    heads: Heads,
    rope: Rope,
    weights: Vec<f32>,
    /// Tokens in the cache.
    seen: usize,
    /// Rotated keys and values of each layer, `(seen, KV·hd)`.
    cache: Vec<(Vec<f32>, Vec<f32>)>,
    /// The normed residual stream of the tokens read last, `(n, D)`.
    normed: Vec<f32>,
}

impl Reader {
    fn new(config: &ModelConfig, weights: Vec<f32>) -> Self {
        Self {
            layout: Layout::sequential(config),
            heads: Heads::new(config),
            rope: Rope::new(config),
            seen: 0,
            cache: vec![(Vec::new(), Vec::new()); config.num_hidden_layers],
            normed: Vec::new(),
            config: config.clone(),
            weights,
        }
    }

    /// Empties the cache.
    fn forget(&mut self) {
        self.seen = 0;
        for (keys, values) in &mut self.cache {
            keys.clear();
            values.clear();
        }
    }

    /// Reads `tokens` after those that were read before.
    fn read(&mut self, tokens: &[u32]) {
        let d = self.config.hidden_size;
        let embedding = &self.weights[self.layout.embedding.clone()];
        let row = |&token: &u32| &embedding[token as usize * d..][..d];
        let mut x = tokens.iter().map(row).collect::<Vec<_>>().concat(); // (n,D)
        for layer in 0..self.layout.layers.len() {
            self.attention(layer, &mut x);
            self.mlp(&self.layout.layers[layer], &mut x);
        }
        self.seen += tokens.len();
        self.normed = self.norm(&x, self.layout.norm.clone());
    }

    /// Logits after the last `rows` tokens read, `(rows, V)`.
    fn logits(&self, rows: usize) -> Vec<f32> {
        let d = self.config.hidden_size;
        let normed = &self.normed[self.normed.len() - rows * d..];
        self.linear(normed, d, self.layout.head.clone())
    }

    fn attention(&mut self, index: usize, x: &mut [f32]) {
        let Layer { q, k, v, o, attention_norm, .. } = self.layout.layers[index].clone();
        let (d, heads, first) = (self.config.hidden_size, self.heads, self.seen);
        let n = x.len() / d;
        let h = self.norm(x, attention_norm);
        let (mut q, mut k, v) = (self.linear(&h, d, q), self.linear(&h, d, k), self.linear(&h, d, v));
        self.rope.rotate(&mut q, heads.q_width(), first, n, Turn::Forward);
        self.rope.rotate(&mut k, heads.kv_width(), first, n, Turn::Forward);
        let (keys, values) = &mut self.cache[index];
        keys.extend_from_slice(&k);
        values.extend_from_slice(&v);
        let (mut out, mut log_sum) = (vec![0.0; q.len()], vec![0.0; n * heads.queries]);
        let inputs = Inputs { q: &q, k: keys, v: values };
        attention::continued(heads, first, inputs, Outputs { out: &mut out, log_sum: &mut log_sum });
        self.add_linear(x, &out, heads.q_width(), o);
    }

    fn mlp(&self, places: &Layer, x: &mut [f32]) {
        let (d, inner) = (self.config.hidden_size, self.config.intermediate_size);
        let h = self.norm(x, places.mlp_norm.clone());
        let (gate, up) = (self.linear(&h, d, places.gate.clone()), self.linear(&h, d, places.up.clone()));
        let mut y = vec![0.0; gate.len()];
        swiglu::forward(&gate, &up, &mut y);
        self.add_linear(x, &y, inner, places.down.clone());
    }

    fn norm(&self, x: &[f32], gain: std::ops::Range<usize>) -> Vec<f32> {
        let (mut y, mut inverse_rms) = (vec![0.0; x.len()], vec![0.0; x.len() / gain.len()]);
        norm::forward(x, &self.weights[gain], self.config.rms_norm_eps, &mut inverse_rms, &mut y);
        y
    }

    /// x Wᵀ: (n, out) from x (n, inputs).
    fn linear(&self, x: &[f32], inputs: usize, place: std::ops::Range<usize>) -> Vec<f32> {
        let mut y = vec![0.0; x.len() / inputs * (place.len() / inputs)];
        matmul(&mut y, Write::Set, Mat::new(x, inputs), Mat::new(&self.weights[place], inputs).t());
        y
    }

    /// y ← y + x Wᵀ.
    fn add_linear(&self, y: &mut [f32], x: &[f32], inputs: usize, place: std::ops::Range<usize>) {
        matmul(y, Write::Add, Mat::new(x, inputs), Mat::new(&self.weights[place], inputs).t());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drawn(sampling: &Sampling) -> Vec<usize> {
        let logits = [0.0, 2.0, 1.0, -1.0, 1.5];
        let mut rng = Rng::new(sampling.seed);
        let mut counts = vec![0; logits.len()];
        (0..4000).for_each(|_| counts[draw(&logits, sampling, &mut rng) as usize] += 1);
        counts
    }

    #[test]
    fn temperature_zero_takes_the_likeliest_and_the_first_of_equals() {
        let greedy = Sampling { temperature: 0.0, ..Sampling::default() };
        assert_eq!(drawn(&greedy), [0, 4000, 0, 0, 0]);
        assert_eq!(draw(&[1.0, 3.0, 3.0], &greedy, &mut Rng::new(0)), 1);
    }

    #[test]
    fn top_k_and_top_p_bound_the_choice() {
        let top_k = drawn(&Sampling { top_k: 2, ..Sampling::default() });
        assert!(top_k[1] > top_k[4] && top_k[4] > 1000 && top_k[1] + top_k[4] == 4000, "{top_k:?}");
        // Probabilities: 0.46, 0.28, 0.17, 0.06, 0.02.
        let top_p = drawn(&Sampling { top_p: 0.5, ..Sampling::default() });
        assert_eq!(top_p[1] + top_p[4], 4000);
        assert_eq!(drawn(&Sampling { top_p: 0.0, ..Sampling::default() })[1], 4000);
    }

    #[test]
    fn frequencies_are_the_probabilities() {
        let counts = drawn(&Sampling::default());
        let exact = [0.0621, 0.4588, 0.1688, 0.0228, 0.2783];
        for (count, p) in counts.iter().zip(exact) {
            assert!((*count as f64 / 4000.0 - p).abs() < 0.03, "{counts:?}");
        }
    }
}
