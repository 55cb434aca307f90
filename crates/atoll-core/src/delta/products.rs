//! Dot products and lengths in `f64`, summed in a fixed order: the same bits on every machine, now and later.

use crate::simd::simd;

/// Sums that grow side by side. A journal's merges are computed again, so this number stays.
const LANES: usize = 16;

/// A sum of products that grows piece by piece.
#[derive(Debug, Default)]
pub(crate) struct Products {
    lanes: [f64; LANES],
    rest: f64,
}

impl Products {
    /// Adds a · b. What is added in pieces is the same sum as what is added at once, if each but the last is a multiple of
    /// [`LANES`]. Of an `a` that many are multiplied with, `f64` is made once.
    #[inline(always)]
    pub(crate) fn add<A: Copy + Into<f64>>(&mut self, a: &[A], b: &[f32]) {
        debug_assert_eq!(a.len(), b.len());
        let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
        for (a, b) in a.iter().zip(b) {
            for lane in 0..LANES {
                self.lanes[lane] += a[lane].into() * f64::from(b[lane]);
            }
        }
        for (a, b) in a_rest.iter().zip(b_rest) {
            self.rest += (*a).into() * f64::from(*b);
        }
    }

    /// All of it.
    #[inline(always)]
    pub(crate) fn total(&self) -> f64 {
        let mut total = 0.0;
        for lane in self.lanes {
            total += lane;
        }
        total + self.rest
    }
}

/// Dot product.
pub fn dot(a: &[f32], b: &[f32]) -> f64 {
    simd(
        #[inline(always)]
        || {
            let mut products = Products::default();
            products.add(a, b);
            products.total()
        },
    )
}

/// Squared length: [`dot`] with itself.
pub fn square(values: &[f32]) -> f64 {
    dot(values, values)
}

/// Euclidean length.
pub fn norm(values: &[f32]) -> f64 {
    square(values).sqrt()
}

/// Cosine of the angle between two vectors; 0 if one of them has no length.
pub fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let lengths = norm(a) * norm(b);
    if lengths > 0.0 { dot(a, b) / lengths } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bits_are_these() {
        let mut rng = crate::rng::Rng::new(1);
        let [a, b]: [Vec<f32>; 2] = std::array::from_fn(|_| (0..1000).map(|_| rng.unit() as f32).collect());
        assert_eq!(dot(&a, &b).to_bits(), 4_642_559_645_789_056_212);
    }

    #[test]
    fn a_sum_in_pieces_is_the_sum() {
        let mut rng = crate::rng::Rng::new(4);
        let [a, b]: [Vec<f32>; 2] = std::array::from_fn(|_| (0..1000).map(|_| rng.normal() as f32).collect());
        let mut products = Products::default();
        for (a, b) in a.chunks(3 * LANES).zip(b.chunks(3 * LANES)) {
            products.add(a, b);
        }
        assert_eq!(products.total().to_bits(), dot(&a, &b).to_bits());
        let plain: f64 = a.iter().zip(&b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
        assert!((dot(&a, &b) - plain).abs() < 1e-12 * norm(&a) * norm(&b));
        assert_eq!((square(&[]), cosine(&[0.0; 40], &[1.0; 40])), (0.0, 0.0));
    }
}
