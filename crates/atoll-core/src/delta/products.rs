//! Dot products and lengths, summed in a fixed order: the same bits on every machine.
//!
//! Stretches of 512 products are added up in `f32`, which is off by some 10⁻⁶ of the lengths and twice as fast, their sums in
//! `f64`. Where numbers are so small or so large that `f32` may lose some, everything is added up in `f64`.

use crate::simd::simd;

/// Sums that grow side by side.
const LANES: usize = 32;
/// Products that are added up in `f32`.
const STRETCH: usize = 16 * LANES;
/// Within these bounds no product that counts in a sum is lost in `f32`.
const SAFE: std::ops::Range<f64> = 1e-25..1e35;

/// A sum of products that grows piece by piece. Every piece but the last is a multiple of [`STRETCH`].
#[derive(Debug)]
pub(crate) struct Products {
    sums: [f64; LANES],
    rest: f64,
    is_exact: bool,
}

impl Products {
    /// The sum of all pieces that `add_all` adds, which it must be able to do twice.
    #[inline(always)]
    pub(crate) fn sum(add_all: impl Fn(&mut Self)) -> f64 {
        let quick = Self::new(false).total(&add_all);
        if SAFE.contains(&quick.abs()) { quick } else { Self::new(true).total(&add_all) }
    }

    #[inline(always)]
    fn new(is_exact: bool) -> Self {
        Self { sums: [0.0; LANES], rest: 0.0, is_exact }
    }

    #[inline(always)]
    fn total(mut self, add_all: &impl Fn(&mut Self)) -> f64 {
        add_all(&mut self);
        let mut total = self.rest;
        for sum in self.sums {
            total += sum;
        }
        total
    }

    /// Adds a · b.
    #[inline(always)]
    pub(crate) fn add(&mut self, a: &[f32], b: &[f32]) {
        for (a, b) in a.chunks(STRETCH).zip(b.chunks(STRETCH)) {
            let ((a, a_rest), (b, b_rest)) = (a.as_chunks(), b.as_chunks());
            if self.is_exact {
                self.add_exactly(a, b);
            } else {
                self.add_quickly(a, b);
            }
            for (a, b) in a_rest.iter().zip(b_rest) {
                self.rest += f64::from(*a) * f64::from(*b);
            }
        }
    }

    #[inline(always)]
    fn add_quickly(&mut self, a: &[[f32; LANES]], b: &[[f32; LANES]]) {
        let mut lanes = [0.0f32; LANES];
        for (a, b) in a.iter().zip(b) {
            for lane in 0..LANES {
                lanes[lane] += a[lane] * b[lane];
            }
        }
        for (sum, lane) in self.sums.iter_mut().zip(lanes) {
            *sum += f64::from(lane);
        }
    }

    #[inline(always)]
    fn add_exactly(&mut self, a: &[[f32; LANES]], b: &[[f32; LANES]]) {
        for (a, b) in a.iter().zip(b) {
            for lane in 0..LANES {
                self.sums[lane] += f64::from(a[lane]) * f64::from(b[lane]);
            }
        }
    }
}

/// Dot product.
pub fn dot(a: &[f32], b: &[f32]) -> f64 {
    simd(
        #[inline(always)]
        || {
            Products::sum(
                #[inline(always)]
                |products| products.add(a, b),
            )
        },
    )
}

/// Squared length: [`dot`] with itself, bit for bit.
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
    fn nothing_is_lost_of_numbers_that_are_tiny_or_huge() {
        let mut rng = crate::rng::Rng::new(4);
        let [a, b]: [Vec<f32>; 2] = std::array::from_fn(|_| (0..5000).map(|_| rng.normal() as f32).collect());
        let plain: f64 = a.iter().zip(&b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
        assert!((dot(&a, &b) - plain).abs() < 1e-6 * norm(&a) * norm(&b));
        for scale in [1e-30, 1.0, 1e25] {
            let [a, b] = [&a, &b].map(|v| v.iter().map(|x| x * scale).collect::<Vec<f32>>());
            assert!(
                (cosine(&a, &b) - plain / (norm(&a) * norm(&b)) * f64::from(scale).powi(2)).abs() < 1e-5,
                "{scale}"
            );
            assert!((cosine(&a, &a) - 1.0).abs() < 1e-12, "{scale}");
        }
        assert_eq!((square(&[]), cosine(&[0.0; 40], &[1.0; 40])), (0.0, 0.0));
    }
}
