//! Matrix products over slices: a safe face for the one function that this crate takes from a library.
//!
//! [`product`] runs on the calling thread. [`matmul`] cuts the result into tiles and gives each to one
//! thread; every element is summed over the whole inner dimension by a single call, so the bits do not
//! depend on who computed it. Shapes are checked here, once; nothing else in the crate is `unsafe`.
#![allow(unsafe_code)]

use gemm_common::Parallelism;
use rayon::prelude::*;

/// A matrix read from a slice, perhaps transposed or a column range of a wider one.
#[derive(Clone, Copy)]
pub(crate) struct Mat<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

/// A matrix written to a slice, row-major, perhaps a column range of a wider one.
pub(crate) struct MatMut<'a> {
    data: &'a mut [f32],
    rows: usize,
    cols: usize,
    stride: usize,
}

/// What happens to the old elements of the result.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Write {
    /// They are overwritten.
    Set,
    /// The product is added to them.
    Add,
}

impl<'a> Mat<'a> {
    /// All of `data` as a matrix with `cols` columns.
    pub(crate) fn new(data: &'a [f32], cols: usize) -> Self {
        assert_eq!(data.len() % cols, 0, "whole rows");
        Self { data, rows: data.len() / cols, cols, row_stride: cols, col_stride: 1 }
    }

    /// `rows` rows, from row `start` on.
    pub(crate) fn rows(self, start: usize, rows: usize) -> Self {
        assert!(start + rows <= self.rows, "rows inside the matrix");
        Self { data: &self.data[start * self.row_stride..], rows, ..self }
    }

    /// `cols` columns, from column `start` on.
    pub(crate) fn columns(self, start: usize, cols: usize) -> Self {
        assert!(self.col_stride == 1 && start + cols <= self.cols, "columns inside the matrix");
        Self { data: &self.data[start..], cols, ..self }
    }

    /// Rows become columns.
    pub(crate) fn t(self) -> Self {
        let (rows, cols) = (self.cols, self.rows);
        Self { data: self.data, rows, cols, row_stride: self.col_stride, col_stride: self.row_stride }
    }

    /// Whether every element lies in the slice.
    fn fits(&self) -> bool {
        fits(self.data.len(), (self.rows, self.row_stride), (self.cols, self.col_stride))
    }
}

impl<'a> MatMut<'a> {
    /// All of `data` as a matrix with `cols` columns.
    pub(crate) fn new(data: &'a mut [f32], cols: usize) -> Self {
        assert_eq!(data.len() % cols, 0, "whole rows");
        Self { rows: data.len() / cols, data, cols, stride: cols }
    }

    /// `cols` columns, from column `start` on.
    pub(crate) fn columns(self, start: usize, cols: usize) -> Self {
        assert!(start + cols <= self.cols, "columns inside the matrix");
        Self { data: &mut self.data[start..], cols, ..self }
    }
}

/// `out = scale · a b`, or added to it: (M,N) from (M,K) and (K,N), on this thread.
pub(crate) fn product(out: MatMut<'_>, write: Write, scale: f32, a: Mat<'_>, b: Mat<'_>) {
    let MatMut { data, rows, cols, stride } = out;
    check(rows, cols, a, b);
    assert!(fits(data.len(), (rows, stride), (cols, 1)), "result inside its slice");
    let all = Tile { row: 0, rows, col: 0, cols };
    // SAFETY: `data` is borrowed mutably and holds the whole tile, as asserted; `a` and `b` were checked.
    unsafe { multiply(data.as_mut_ptr(), stride, all, write, scale, a, b) }
}

/// `out = a b`, or added to it: (M,N) from (M,K) and (K,N), on all threads of the present pool.
pub(crate) fn matmul(out: &mut [f32], write: Write, a: Mat<'_>, b: Mat<'_>) {
    let (m, n) = (a.rows, b.cols);
    check(m, n, a, b);
    assert_eq!(out.len(), m * n, "result of {m} × {n}");
    let (rows, cols) = tile_size(m, n);
    let across = n.div_ceil(cols);
    let out = Shared(out.as_mut_ptr());
    (0..m.div_ceil(rows) * across).into_par_iter().with_max_len(1).for_each(|index| {
        let (row, col) = (index / across * rows, index % across * cols);
        let tile = Tile { row, rows: rows.min(m - row), col, cols: cols.min(n - col) };
        // SAFETY: tiles are disjoint and inside `out`, which is borrowed mutably and has m·n elements.
        unsafe { multiply(out.pointer(), n, tile, write, 1.0, a, b) }
    });
}

/// A rectangle of the result.
#[derive(Clone, Copy)]
struct Tile {
    row: usize,
    rows: usize,
    col: usize,
    cols: usize,
}

/// The result's first element, known to all threads; each writes to its own tile only.
struct Shared(*mut f32);

// SAFETY: the pointer is used for disjoint tiles only, see `matmul`.
unsafe impl Sync for Shared {}

impl Shared {
    fn pointer(&self) -> *mut f32 {
        self.0
    }
}

/// Rows and columns of a tile: large, so that packing is cheap, but enough tiles for some threads. Tall
/// tiles go first, because transposing the columns' operand is the dearest part of packing.
fn tile_size(m: usize, n: usize) -> (usize, usize) {
    let (mut rows, mut cols) = (512, 512);
    let tiles = |rows: usize, cols: usize| m.div_ceil(rows) * n.div_ceil(cols);
    while tiles(rows, cols) < 8 && cols > 128 {
        cols /= 2;
    }
    while tiles(rows, cols) < 8 && rows > 64 {
        rows /= 2;
    }
    (rows, cols)
}

/// Whether a slice of `len` elements holds every element of these rows and columns, given as (count, stride).
fn fits(len: usize, rows: (usize, usize), cols: (usize, usize)) -> bool {
    rows.0 == 0 || cols.0 == 0 || (rows.0 - 1) * rows.1 + (cols.0 - 1) * cols.1 < len
}

fn check(m: usize, n: usize, a: Mat<'_>, b: Mat<'_>) {
    let shapes = [a.rows, a.cols, b.rows, b.cols];
    assert!(a.rows == m && b.cols == n && a.cols == b.rows && a.cols > 0, "({m}, {n}) from {shapes:?}");
    assert!(a.fits() && b.fits(), "operands inside their slices");
}

/// Computes one tile.
///
/// # Safety
/// `out` with `stride` elements per row must be valid for writes in `tile`, by this thread alone, and
/// `check` must have passed for a result that contains `tile`.
unsafe fn multiply(out: *mut f32, stride: usize, tile: Tile, write: Write, scale: f32, a: Mat<'_>, b: Mat<'_>) {
    if tile.rows == 0 || tile.cols == 0 {
        return;
    }
    let add = write == Write::Add;
    // The library prefers column-major results, so it is asked for (a b)ᵀ = bᵀ aᵀ.
    // SAFETY: all offsets are inside the slices, as the caller and `check` promise.
    unsafe {
        gemm_f32::gemm::f32::get_gemm_fn()(
            tile.cols,
            tile.rows,
            a.cols,
            out.add(tile.row * stride + tile.col),
            stride as isize,
            1,
            add,
            b.data.as_ptr().add(tile.col * b.col_stride),
            b.row_stride as isize,
            b.col_stride as isize,
            a.data.as_ptr().add(tile.row * a.row_stride),
            a.row_stride as isize,
            a.col_stride as isize,
            if add { 1.0 } else { 0.0 },
            scale,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use atoll_core::rng::Rng;

    fn random(rng: &mut Rng, len: usize) -> Vec<f32> {
        (0..len).map(|_| rng.normal() as f32).collect()
    }

    fn close(one: &[f32], two: &[f32]) -> bool {
        one.iter().zip(two).all(|(a, b)| (a - b).abs() < 1e-3)
    }

    /// Every odd shape and both transpositions against three loops.
    #[test]
    fn products_are_those_of_the_definition() {
        let mut rng = Rng::new(1);
        for (m, n, k) in [(1, 1, 1), (1, 700, 33), (5, 3, 7), (130, 67, 19), (513, 600, 40), (64, 1, 9)] {
            let (a, b) = (random(&mut rng, m * k), random(&mut rng, k * n));
            let mut expected = vec![0.0f32; m * n];
            for (i, row) in expected.chunks_mut(n).enumerate() {
                for (j, element) in row.iter_mut().enumerate() {
                    *element = (0..k).map(|l| a[i * k + l] * b[l * n + j]).sum();
                }
            }
            let b_t: Vec<f32> = (0..n * k).map(|index| b[index % k * n + index / k]).collect();
            let mut out = vec![f32::NAN; m * n];
            matmul(&mut out, Write::Set, Mat::new(&a, k), Mat::new(&b, n));
            assert!(close(&out, &expected), "{m} {n} {k}");
            matmul(&mut out, Write::Set, Mat::new(&a, k), Mat::new(&b_t, k).t());
            assert!(close(&out, &expected), "{m} {n} {k} transposed");
            product(MatMut::new(&mut out, n), Write::Add, -1.0, Mat::new(&a, k), Mat::new(&b, n));
            assert!(out.iter().all(|x| x.abs() < 1e-3), "{m} {n} {k} added");
        }
    }

    #[test]
    fn columns_are_a_part() {
        let wide: Vec<f32> = (0..12).map(|x| x as f32).collect(); // (3,4)
        let mut out = vec![0.0; 12];
        let identity = [1.0, 0.0, 0.0, 1.0];
        let part = MatMut::new(&mut out, 4).columns(1, 2);
        product(part, Write::Set, 1.0, Mat::new(&wide, 4).columns(2, 2), Mat::new(&identity, 2));
        assert_eq!(out, [0.0, 2.0, 3.0, 0.0, 0.0, 6.0, 7.0, 0.0, 0.0, 10.0, 11.0, 0.0]);
    }
}
