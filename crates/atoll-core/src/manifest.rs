//! The manifest: every tensor of the model, which fragment it is synchronized with, and a
//! fingerprint of that layout. Two engines whose manifests have the same fingerprint may train
//! together; nothing else about them needs to be alike.
//!
//! A **fragment** is a subset of the tensors that crosses the network together. Its weights are the
//! concatenation of its tensors in manifest order. Fragments are balanced, so that each round
//! moves about the same number of bytes.

use std::fmt;
use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::hash::Digest;
use crate::model::{ModelConfig, Tensor};

/// Names a fragment: `0..manifest.fragments()`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct FragmentId(pub u16);

impl FragmentId {
    /// Its position in a list of fragments.
    pub fn index(self) -> usize {
        usize::from(self.0)
    }
}

impl fmt::Display for FragmentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "fragment {}", self.0)
    }
}

/// The layout of a model: tensors, their fragments, their places.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    tensors: Vec<Tensor>,
    /// For each fragment its tensors as indices into `tensors`, ascending.
    fragments: Vec<Vec<usize>>,
    fingerprint: Digest,
}

/// A tensor's place inside its fragment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Index of the tensor in [`Manifest::tensors`].
    pub tensor: usize,
    /// Where its elements are in the fragment's weights.
    pub range: Range<usize>,
}

impl Manifest {
    /// Distributes `tensors` over at most `fragments` fragments of nearly equal size: largest tensor
    /// first, each into the fragment that is smallest so far (Graham's rule, at most 4/3 of the
    /// best possible). Deterministic; ties go to the lower fragment.
    ///
    /// # Panics
    /// If there are no tensors or no fragments; both are checked where a run is configured.
    pub fn balanced(tensors: Vec<Tensor>, fragments: usize) -> Self {
        assert!(!tensors.is_empty() && fragments > 0, "a manifest needs tensors and fragments");
        let count = fragments.min(tensors.len()).min(usize::from(u16::MAX));
        let mut order: Vec<usize> = (0..tensors.len()).collect();
        order.sort_by_key(|&index| std::cmp::Reverse(tensors[index].len()));
        let mut sizes = vec![0usize; count];
        let mut members = vec![Vec::new(); count];
        for index in order {
            let (smallest, _) = sizes.iter().enumerate().min_by_key(|&(_, size)| size).expect("count > 0");
            sizes[smallest] += tensors[index].len();
            members[smallest].push(index);
        }
        members.iter_mut().for_each(|fragment| fragment.sort_unstable());
        let fingerprint = fingerprint(&tensors, &members);
        Self { tensors, fragments: members, fingerprint }
    }

    /// All tensors, in the model's order.
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// All fragments, ascending.
    pub fn fragments(&self) -> impl ExactSizeIterator<Item = FragmentId> + use<> {
        (0..self.fragments.len()).map(|index| FragmentId(index as u16))
    }

    /// The tensors of `fragment` and their places in its weights; empty for an unknown fragment.
    pub fn places(&self, fragment: FragmentId) -> impl Iterator<Item = Place> + '_ {
        let members = self.fragments.get(fragment.index()).map_or(&[][..], Vec::as_slice);
        members.iter().scan(0, |start, &tensor| {
            let range = *start..*start + self.tensors[tensor].len();
            *start = range.end;
            Some(Place { tensor, range })
        })
    }

    /// Number of weights in `fragment`, or `None` if there is no such fragment.
    pub fn fragment_len(&self, fragment: FragmentId) -> Option<usize> {
        let members = self.fragments.get(fragment.index())?;
        Some(members.iter().map(|&tensor| self.tensors[tensor].len()).sum())
    }

    /// Weights of zero in this layout, a vector per fragment.
    pub fn zeros(&self) -> Vec<Vec<f32>> {
        self.fragments().map(|fragment| vec![0.0; self.fragment_len(fragment).unwrap_or(0)]).collect()
    }

    /// Number of parameters of the whole model.
    pub fn parameters(&self) -> usize {
        self.tensors.iter().map(Tensor::len).sum()
    }

    /// Names this layout: equal exactly when names, shapes, order and fragments are.
    pub fn fingerprint(&self) -> Digest {
        self.fingerprint
    }

    /// The first tensor in which this layout is not the model's, in words.
    pub fn difference(&self, model: &ModelConfig) -> Option<String> {
        let (ours, theirs) = (model.tensors(), self.tensors());
        let first = ours.iter().zip(theirs).find(|(ours, theirs)| ours != theirs);
        let describe = |(ours, theirs): (&Tensor, &Tensor)| {
            let ((a, b), (c, d)) = ((&ours.name, &ours.shape), (&theirs.name, &theirs.shape));
            format!("the manifest has {c} {d:?} where the model has {a} {b:?}")
        };
        let count = || format!("the manifest has {} tensors, the model {}", theirs.len(), ours.len());
        first.map(describe).or_else(|| (ours.len() != theirs.len()).then(count))
    }

    /// Splits per-tensor weights (one vector per tensor, in manifest order) into per-fragment weights.
    ///
    /// # Panics
    /// If a tensor is missing or has another length.
    pub fn gather(&self, weights: &[Vec<f32>]) -> Vec<Vec<f32>> {
        assert_eq!(weights.len(), self.tensors.len(), "one vector per tensor");
        let fragment = |id: FragmentId| {
            let mut gathered = Vec::with_capacity(self.fragment_len(id).unwrap_or(0));
            for place in self.places(id) {
                assert_eq!(weights[place.tensor].len(), place.range.len(), "{}", self.tensors[place.tensor].name);
                gathered.extend_from_slice(&weights[place.tensor]);
            }
            gathered
        };
        self.fragments().map(fragment).collect()
    }

    /// The inverse of [`gather`](Self::gather): per-fragment weights back to one vector per tensor.
    ///
    /// # Panics
    /// If a fragment is missing or has another length.
    pub fn scatter(&self, fragments: &[Vec<f32>]) -> Vec<Vec<f32>> {
        let mut weights = vec![Vec::new(); self.tensors.len()];
        for (id, values) in self.fragments().zip(fragments) {
            for place in self.places(id) {
                weights[place.tensor] = values[place.range].to_vec();
            }
        }
        weights
    }
}

/// Hash of the layout in a canonical text: a line per tensor, with its fragment.
fn fingerprint(tensors: &[Tensor], fragments: &[Vec<usize>]) -> Digest {
    let mut home = vec![0usize; tensors.len()];
    for (fragment, members) in fragments.iter().enumerate() {
        members.iter().for_each(|&tensor| home[tensor] = fragment);
    }
    let line = |(tensor, fragment): (&Tensor, &usize)| format!("{} {:?} {fragment}\n", tensor.name, tensor.shape);
    let text: String = tensors.iter().zip(&home).map(line).collect();
    Digest::of(text.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fragments_are_balanced_and_cover_every_weight_once() {
        let config = ModelConfig::preset("mini", 8192, 256).unwrap();
        let manifest = Manifest::balanced(config.tensors(), 4);
        let sizes: Vec<usize> = manifest.fragments().map(|f| manifest.fragment_len(f).unwrap()).collect();
        assert_eq!(sizes.iter().sum::<usize>(), config.parameters());
        let (low, high) = (sizes.iter().min().unwrap(), sizes.iter().max().unwrap());
        assert!((*high as f64) < 1.05 * *low as f64, "{sizes:?}");
    }

    #[test]
    fn gather_and_scatter_are_inverse() {
        let config = ModelConfig::preset("nano", 64, 16).unwrap();
        let manifest = Manifest::balanced(config.tensors(), 3);
        let weights = config.initial_weights(7);
        assert_eq!(manifest.scatter(&manifest.gather(&weights)), weights);
    }

    #[test]
    fn the_fingerprint_sees_names_shapes_and_fragments() {
        let config = ModelConfig::preset("nano", 64, 16).unwrap();
        let base = Manifest::balanced(config.tensors(), 3).fingerprint();
        assert_eq!(base, Manifest::balanced(config.tensors(), 3).fingerprint());
        assert_ne!(base, Manifest::balanced(config.tensors(), 2).fingerprint());
        let mut renamed = config.tensors();
        renamed[0].name.push('x');
        assert_ne!(base, Manifest::balanced(renamed, 3).fingerprint());
    }
}
