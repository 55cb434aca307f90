//! A keyed permutation of `0..n` in constant memory: a Feistel network over the next even number of
//! bits with cycle walking (Black and Rogaway, CT-RSA 2002). Any site can ask which sample stands at
//! any position, and nobody has to store or send an order.

use crate::data::DatasetId;
use crate::rng::mix;

const ROUNDS: u64 = 4;

/// The order in which one epoch visits `n` samples.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Permutation {
    n: u64,
    half_bits: u32,
    key: u64,
}

impl Permutation {
    /// The order of `epoch` over the `n` > 0 samples of `dataset` in the run of that `seed`.
    pub fn new(n: u64, seed: u64, dataset: DatasetId, epoch: u64) -> Self {
        let bits = u64::BITS - n.saturating_sub(1).leading_zeros();
        let name = dataset.0.0.first_chunk().map_or(0, |head| u64::from_le_bytes(*head));
        let key = mix(mix(seed ^ name).wrapping_add(epoch));
        Self { n, half_bits: bits.div_ceil(2).max(1), key }
    }

    /// The sample at `position` < n.
    pub fn sample(&self, position: u64) -> u64 {
        debug_assert!(position < self.n);
        let mut value = position;
        loop {
            value = self.scramble(value);
            if value < self.n {
                return value;
            }
        }
    }

    fn scramble(&self, value: u64) -> u64 {
        let mask = (1u64 << self.half_bits) - 1;
        let (mut left, mut right) = (value >> self.half_bits, value & mask);
        for round in 0..ROUNDS {
            let turned = left ^ (mix(self.key ^ (round << 56) ^ right) & mask);
            (left, right) = (right, turned);
        }
        (left << self.half_bits) | right
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hash::Digest;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_sample_is_visited_once(n in 1u64..3000, seed: u64, epoch in 0u64..5) {
            let order = Permutation::new(n, seed, DatasetId(Digest::of(b"d")), epoch);
            let mut seen = vec![false; n as usize];
            for position in 0..n {
                let sample = order.sample(position) as usize;
                prop_assert!(!std::mem::replace(&mut seen[sample], true));
            }
        }
    }

    #[test]
    fn epochs_seeds_and_datasets_differ() {
        let dataset = |name: &[u8]| DatasetId(Digest::of(name));
        let order = |seed, d: &[u8], epoch| {
            let permutation = Permutation::new(1000, seed, dataset(d), epoch);
            (0..1000).map(|p| permutation.sample(p)).collect::<Vec<_>>()
        };
        let base = order(1, b"a", 0);
        assert_ne!(base, order(1, b"a", 1));
        assert_ne!(base, order(2, b"a", 0));
        assert_ne!(base, order(1, b"b", 0));
        assert_ne!(base, (0..1000).collect::<Vec<_>>());
    }
}
