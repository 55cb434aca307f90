//! Where each tensor lies in the flat vectors of weights, gradients and moments. The order is fragment
//! by fragment, so that a fragment is one contiguous range and reading or writing it is one copy.

use std::ops::Range;

use atoll_core::manifest::Manifest;
use atoll_core::model::{ModelConfig, Tensor};

/// The places of all tensors.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    /// In the order of [`ModelConfig::tensors`].
    pub(crate) tensors: Vec<Range<usize>>,
    /// In the order of the manifest; none without a manifest.
    pub(crate) fragments: Vec<Range<usize>>,
    /// `(V, D)`.
    pub(crate) embedding: Range<usize>,
    /// One per layer.
    pub(crate) layers: Vec<Layer>,
    /// `(D)`.
    pub(crate) norm: Range<usize>,
    /// `(V, D)`; the embedding itself if they are tied.
    pub(crate) head: Range<usize>,
}

/// The places of one layer's tensors, all `(out, in)` or `(D)`.
#[derive(Debug, Clone)]
pub(crate) struct Layer {
    pub(crate) q: Range<usize>,
    pub(crate) k: Range<usize>,
    pub(crate) v: Range<usize>,
    pub(crate) o: Range<usize>,
    pub(crate) gate: Range<usize>,
    pub(crate) up: Range<usize>,
    pub(crate) down: Range<usize>,
    pub(crate) attention_norm: Range<usize>,
    pub(crate) mlp_norm: Range<usize>,
}

impl Layout {
    /// The tensors one after the other.
    pub(crate) fn sequential(config: &ModelConfig) -> Self {
        let mut end = 0;
        let place = |len: usize| {
            end += len;
            end - len..end
        };
        let tensors: Vec<Range<usize>> = config.tensors().iter().map(Tensor::len).map(place).collect();
        Self::name(config, tensors, Vec::new())
    }

    /// Fragment after fragment. The manifest must have the tensors of `config`.
    pub(crate) fn by_fragment(config: &ModelConfig, manifest: &Manifest) -> Self {
        let mut tensors = vec![0..0; manifest.tensors().len()];
        let mut fragments = Vec::new();
        let mut start = 0;
        for id in manifest.fragments() {
            let end = start + manifest.fragment_len(id).unwrap_or(0);
            for place in manifest.places(id) {
                tensors[place.tensor] = start + place.range.start..start + place.range.end;
            }
            fragments.push(start..end);
            start = end;
        }
        Self::name(config, tensors, fragments)
    }

    /// Gives the places their names, in the order in which [`ModelConfig::tensors`] declares them.
    fn name(config: &ModelConfig, tensors: Vec<Range<usize>>, fragments: Vec<Range<usize>>) -> Self {
        let mut places = tensors.iter().cloned();
        let mut next = || places.next().expect("one place for each of the model's tensors");
        let embedding = next();
        let mut layer = || Layer {
            q: next(),
            k: next(),
            v: next(),
            o: next(),
            gate: next(),
            up: next(),
            down: next(),
            attention_norm: next(),
            mlp_norm: next(),
        };
        let layers = (0..config.num_hidden_layers).map(|_| layer()).collect();
        let norm = next();
        let head = if config.tie_word_embeddings { embedding.clone() } else { next() };
        Self { tensors, fragments, embedding, layers, norm, head }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fragments_are_contiguous_and_hold_their_tensors() {
        let config = ModelConfig::preset("nano", 96, 16).unwrap();
        let manifest = Manifest::balanced(config.tensors(), 3);
        let weights = config.initial_weights(1);
        let flat = manifest.gather(&weights).concat();
        let layout = Layout::by_fragment(&config, &manifest);
        for (place, tensor) in layout.tensors.iter().zip(&weights) {
            assert_eq!(&flat[place.clone()], tensor);
        }
        assert_eq!(layout.head, layout.embedding);
        assert_eq!(Layout::sequential(&config).tensors.last().unwrap().end, config.parameters());
    }
}
