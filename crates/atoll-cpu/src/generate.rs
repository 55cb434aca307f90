//! Text from a model, one token at a time. Keys and values of earlier tokens are cached, so a new token
//! costs one row through the network. A full context is not the end: its last half is read again, and
//! generation goes on from there.

use atoll_core::engine::EngineError;
use atoll_core::model::ModelConfig;
use atoll_core::rng::Rng;
use serde::{Deserialize, Serialize};

use crate::math::max;
use crate::pool::Pool;
use crate::reader::{Piece, Reader};
use crate::words::Precision;

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
    pool: Pool,
    reader: Reader,
}

/// The endless continuation of a prompt: take as many tokens as wanted, stop at one that says so.
pub struct Tokens<'a>(Batched<'a>);

/// The endless continuations of several prompts, a token of each at a time.
pub struct Batched<'a> {
    generator: &'a mut Generator,
    sampling: Sampling,
    texts: Vec<Text>,
}

/// One of the texts.
struct Text {
    rng: Rng,
    /// The prompt and everything said since; what the cache holds is its end.
    tokens: Vec<u32>,
    /// How much of the end of `tokens` has not been read yet.
    unread: usize,
}

impl Generator {
    /// A generator with these weights, one vector per tensor in the order of [`ModelConfig::tensors`], whose
    /// matrices it keeps in that precision, on that many threads (0 takes one per core; the text does not depend on it).
    ///
    /// # Errors
    /// [`EngineError::Device`] if the configuration is unsound or the weights are another model's.
    pub fn new(
        config: &ModelConfig,
        weights: &[Vec<f32>],
        precision: Precision,
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
        let pool = Pool::new(threads);
        let reader = Reader::new(config, precision, &weights.concat(), &pool);
        Ok(Self { config: config.clone(), pool, reader })
    }

    /// Continues `prompt`, of which the end counts if it is longer than the context.
    ///
    /// # Errors
    /// [`EngineError::Data`] if the prompt is empty or a token is outside of the vocabulary.
    pub fn generate(&mut self, prompt: &[u32], sampling: &Sampling) -> Result<Tokens<'_>, EngineError> {
        self.generate_batch(&[prompt], sampling).map(Tokens)
    }

    /// Continues several prompts at once, which reads the weights once for all of them. Each text is the one
    /// that [`generate`](Self::generate) gives for its prompt, the n-th with the seed raised by n.
    ///
    /// # Errors
    /// [`EngineError::Data`] if a prompt is empty or a token is outside of the vocabulary.
    pub fn generate_batch(&mut self, prompts: &[&[u32]], sampling: &Sampling) -> Result<Batched<'_>, EngineError> {
        prompts.iter().try_for_each(|prompt| self.check(prompt))?;
        self.reader.begin(prompts.len());
        let context = self.config.max_position_embeddings;
        let text = |(prompt, seed): (&&[u32], u64)| Text {
            rng: Rng::new(sampling.seed.wrapping_add(seed)),
            unread: prompt.len().min(context),
            tokens: prompt.to_vec(),
        };
        let texts = prompts.iter().zip(0..).map(text).collect();
        Ok(Batched { generator: self, sampling: sampling.clone(), texts })
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
        self.reader.begin(1);
        let normed = self.reader.read(&self.pool, &[Piece { text: 0, tokens }]);
        Ok(self.reader.logits(&self.pool, &normed))
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

impl Batched<'_> {
    /// Reads what is unread and returns the logits of each text's next token, `(texts, V)`.
    fn next_logits(&mut self) -> Vec<f32> {
        let Generator { config, pool, reader } = &mut *self.generator;
        for (index, text) in self.texts.iter_mut().enumerate() {
            if reader.seen(index) + text.unread > config.max_position_embeddings {
                reader.forget(index);
                text.unread = (config.max_position_embeddings / 2).max(1);
            }
        }
        let unread = |(index, text)| {
            let Text { tokens, unread, .. }: &Text = text;
            Piece { text: index, tokens: &tokens[tokens.len() - unread..] }
        };
        let pieces: Vec<Piece<'_>> = self.texts.iter().enumerate().map(unread).collect();
        let normed = reader.read(pool, &pieces);
        // Only the last token of each text has a successor to be drawn.
        let mut end = 0;
        let last = pieces.iter().map(|piece| {
            end += piece.tokens.len() * config.hidden_size;
            &normed[end - config.hidden_size..end]
        });
        let last = last.collect::<Vec<_>>().concat();
        reader.logits(pool, &last)
    }
}

impl Iterator for Batched<'_> {
    type Item = Vec<u32>;

    fn next(&mut self) -> Option<Vec<u32>> {
        let logits = self.next_logits();
        let Self { generator, sampling, texts } = self;
        let texts = texts.iter_mut().zip(logits.chunks(generator.config.vocab_size));
        let drawn = texts.map(|(text, logits)| {
            let token = draw(logits, sampling, &mut text.rng);
            text.tokens.push(token);
            text.unread = 1;
            token
        });
        Some(drawn.collect())
    }
}

impl Iterator for Tokens<'_> {
    type Item = u32;

    fn next(&mut self) -> Option<u32> {
        self.0.next().and_then(|tokens| tokens.first().copied())
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
