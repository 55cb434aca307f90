//! Muon's heart: the orthogonal matrix nearest to an update, by Newton–Schulz iterations (Jordan et al., 2024).
//!
//! ```text
//! X ← X / ‖X‖;  some times:  A = X Xᵀ,  X ← a X + (b A + c A²) X
//! ```
//!
//! All singular values go towards 1 (into about 0.7 to 1.2 in five iterations with these a, b, c). One matrix
//! is one thread's work; a step has many matrices.

use crate::gemm::panels::Panels;
use crate::gemm::{Depth, Left, Out, Right, Write, product};
use crate::math::{add_scaled, simd};
use crate::scratch::take;
use crate::words::Precision;

/// The steepest quintic at 0 that keeps the unit interval.
const COEFFICIENTS: [f32; 3] = [3.4445, -4.7750, 2.0315];
/// Keeps a gradient of zeros from dividing by zero.
const EPS: f64 = 1e-7;

/// Buffers of one thread.
#[derive(Default)]
pub(crate) struct Scratch {
    /// The update, `(rows, columns)`.
    pub(crate) update: Vec<f32>,
    turned: Vec<f32>,
    gram: Vec<f32>,
    powers: Vec<f32>,
    next: Vec<f32>,
    words: Vec<u32>,
    panels: Panels,
}

/// Makes the matrix `(rows, columns)` in `scratch.update` orthogonal.
pub(crate) fn orthogonalize(precision: Precision, rows: usize, columns: usize, iterations: u32, scratch: &mut Scratch) {
    if rows <= columns {
        return iterate(precision, rows, columns, iterations, scratch);
    }
    turn(&scratch.update[..rows * columns], columns, take(&mut scratch.turned, rows * columns));
    std::mem::swap(&mut scratch.update, &mut scratch.turned);
    iterate(precision, columns, rows, iterations, scratch);
    turn(&scratch.update[..rows * columns], rows, take(&mut scratch.turned, rows * columns));
    std::mem::swap(&mut scratch.update, &mut scratch.turned);
}

/// Writes the transpose of a matrix of that width.
fn turn(matrix: &[f32], width: usize, turned: &mut [f32]) {
    let height = matrix.len() / width;
    for (row, matrix) in matrix.chunks(width).enumerate() {
        for (column, &x) in matrix.iter().enumerate() {
            turned[column * height + row] = x;
        }
    }
}

/// The iterations for a matrix that is at least as wide as high.
fn iterate(precision: Precision, m: usize, n: usize, iterations: u32, scratch: &mut Scratch) {
    let Scratch { update, gram, powers, next, words, panels, .. } = scratch;
    let x = take(update, m * n);
    let norm = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
    let share = (1.0 / norm.max(EPS)) as f32;
    x.iter_mut().for_each(|x| *x *= share);
    let [a, b, c] = COEFFICIENTS;
    let (gram, powers, next) = (take(gram, m * m), take(powers, m * m), take(next, m * n));
    for _ in 0..iterations {
        let stride = precision.words(n);
        let x_words = take(words, m * stride);
        precision.encode_rows(x, n, x_words);
        panels.pack_words(x_words, m, stride, stride);
        multiply(precision, gram, x_words, n, panels.right(), panels.depth());

        let gram_words = take(words, m * precision.words(m));
        precision.encode_rows(gram, m, gram_words);
        let rows = &*gram;
        panels.pack_rows(precision, m, m, |row| &rows[row * m..][..m]);
        multiply(precision, powers, gram_words, m, panels.right(), panels.depth());
        simd(
            #[inline(always)]
            || powers.iter_mut().zip(&*gram).for_each(|(square, a)| *square = b * a + c * *square),
        );

        let power_words = take(words, m * precision.words(m));
        precision.encode_rows(powers, m, power_words);
        let rows = &*x;
        panels.pack_rows(precision, m, n, |row| &rows[row * n..][..n]);
        multiply(precision, next, power_words, m, panels.right(), panels.depth());
        simd(
            #[inline(always)]
            || add_scaled(next, a, x),
        );
        x.copy_from_slice(next);
    }
}

/// `out = left · right`, where `left` has rows of `width` elements.
fn multiply(precision: Precision, out: &mut [f32], left: &[u32], width: usize, right: Right<'_>, depth: Depth) {
    let stride = precision.words(width);
    let left = Left::rows(left, left.len() / stride, stride);
    product(precision, Out { data: out, stride: right.columns }, Write::Set, left, right, depth);
}

#[cfg(test)]
mod tests {
    use super::*;
    use atoll_core::rng::Rng;

    #[test]
    fn rows_or_columns_become_nearly_orthonormal() {
        for (precision, rows, columns) in [(Precision::F32, 12, 50), (Precision::Bf16, 33, 70), (Precision::F32, 45, 9)]
        {
            let mut rng = Rng::new(3);
            let update = (0..rows * columns).map(|_| rng.normal() as f32).collect();
            let mut scratch = Scratch { update, ..Scratch::default() };
            orthogonalize(precision, rows, columns, 5, &mut scratch);
            let mut turned = vec![0.0; rows * columns];
            turn(&scratch.update[..rows * columns], columns, &mut turned);
            let (matrix, width) = if rows <= columns { (&scratch.update, columns) } else { (&turned, rows) };
            for (i, one) in matrix.chunks(width).enumerate() {
                for (j, two) in matrix.chunks(width).enumerate().take(i + 1) {
                    let product: f32 = one.iter().zip(two).map(|(a, b)| a * b).sum();
                    let bounds = if i == j { 0.4..1.5 } else { -0.4..0.4 };
                    assert!(bounds.contains(&product), "{precision:?} {rows} × {columns}: rows {i} and {j}: {product}");
                }
            }
        }
    }
}
