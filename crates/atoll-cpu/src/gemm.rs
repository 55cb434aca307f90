//! Matrix products over packed operands: the one place where the engine's time goes.
//!
//! A product is computed tile by tile, [`ROWS`] × [`COLUMNS`], with the whole tile in registers. The right
//! operand lies in *panels* of [`COLUMNS`] columns (see [`panels`]), so that the innermost loop reads
//! it straight ahead; the left operand is read row by row, or from panels of [`ROWS`] rows.
//!
//! ```text
//! for a block of depth that fits the first cache, for each right panel, for each [`ROWS`] rows:
//!     tile ← 0;  for each word of depth: tile ← tile + left[rows] ⊗ right[columns];  out ← out + tile
//! ```
//!
//! One element is always summed in that order by one thread, so its bits depend neither on the number of
//! threads nor on who computed it. Two kernels do the innermost loop: [`avx512`], and [`portable`], its
//! twin in safe code, which is compiled for AVX2 and plain processors too.

mod avx512;
pub(crate) mod panels;
mod peak;
mod portable;
#[cfg(test)]
mod tests;

use std::sync::OnceLock;

use crate::words::Precision;
pub use peak::peak;

/// Rows of a tile.
pub(crate) const ROWS: usize = 8;
/// Columns of a tile.
pub(crate) const COLUMNS: usize = 32;
/// Words of depth that are summed in registers before a tile is added to the result: a right panel of
/// this depth is 24 KiB, which the first cache holds.
const DEPTH: usize = 192;

/// The left operand. Depth is `groups` times `steps` words; the strides say where they lie.
#[derive(Clone, Copy)]
pub(crate) struct Left<'a> {
    pub(crate) words: &'a [u32],
    pub(crate) rows: usize,
    /// From one panel of [`ROWS`] rows to the next.
    pub(crate) panel: usize,
    /// From one row of a panel to the next.
    pub(crate) row: usize,
    /// From one word of depth to the next.
    pub(crate) step: usize,
    /// From one group to the next.
    pub(crate) group: usize,
}

impl<'a> Left<'a> {
    /// Rows of `stride` words, of which each panel reads from its first word on.
    pub(crate) fn rows(words: &'a [u32], rows: usize, stride: usize) -> Self {
        Self { words, rows, panel: ROWS * stride, row: stride, step: 1, group: 0 }
    }
}

/// The right operand, in panels of [`COLUMNS`] words for each word of depth.
#[derive(Clone, Copy)]
pub(crate) struct Right<'a> {
    pub(crate) words: &'a [u32],
    pub(crate) columns: usize,
    /// From one panel to the next.
    pub(crate) panel: usize,
    /// From one group to the next.
    pub(crate) group: usize,
}

/// What a product sums over.
#[derive(Clone, Copy)]
pub(crate) struct Depth {
    pub(crate) groups: usize,
    /// Words of depth in each group.
    pub(crate) steps: usize,
}

/// The result: row-major, perhaps some columns of a wider matrix.
pub(crate) struct Out<'a> {
    pub(crate) data: &'a mut [f32],
    pub(crate) stride: usize,
}

/// What happens to the old elements of the result.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Write {
    /// They are overwritten.
    Set,
    /// The product is added to them.
    Add,
}

/// A column of tiles, which share a right panel: what a kernel is asked for.
struct Strip<'a> {
    left: &'a [u32],
    left_panel: usize,
    left_row: usize,
    left_step: usize,
    left_group: usize,
    right: &'a [u32],
    right_group: usize,
    /// Words from `right` to the right operand that comes next, which is fetched meanwhile.
    next: usize,
    depth: Depth,
    out: &'a mut [f32],
    out_stride: usize,
    rows: usize,
    /// At most [`COLUMNS`].
    columns: usize,
    write: Write,
}

impl Strip<'_> {
    /// Panics unless every element that a kernel touches lies inside its slice.
    #[inline(always)]
    fn check(&self) {
        let Depth { groups, steps } = self.depth;
        assert!(groups > 0 && steps > 0 && self.rows > 0 && (1..=COLUMNS).contains(&self.columns));
        // Either the last row is the farthest, or the last one of the panel before.
        let last = self.rows - 1;
        let place = |row: usize| {
            (row / ROWS).saturating_mul(self.left_panel).saturating_add((row % ROWS).saturating_mul(self.left_row))
        };
        let row = place(last).max(place((self.rows / ROWS * ROWS).saturating_sub(1)));
        let far = |count: usize, stride: usize| (count - 1).saturating_mul(stride);
        let depth = far(steps, self.left_step).saturating_add(far(groups, self.left_group));
        let left = row.saturating_add(depth);
        assert!(left < self.left.len(), "left operand inside its slice");
        let right = far(groups, self.right_group).saturating_add(steps.saturating_mul(COLUMNS));
        assert!(right <= self.right.len(), "right operand inside its slice");
        let out = far(self.rows, self.out_stride).saturating_add(self.columns);
        assert!(out <= self.out.len(), "result inside its slice");
    }
}

/// Computes a column of tiles.
type Kernel = fn(&mut Strip<'_>);

/// The kernels of this processor, in the order of [`Precision`].
fn kernel(precision: Precision) -> Kernel {
    static KERNELS: OnceLock<[Kernel; 2]> = OnceLock::new();
    let [f32, bf16] = *KERNELS.get_or_init(|| {
        let portable = [portable::f32 as Kernel, portable::bf16 as Kernel];
        [avx512::f32().unwrap_or(portable[0]), avx512::bf16().unwrap_or(portable[1])]
    });
    match precision {
        Precision::F32 => f32,
        Precision::Bf16 => bf16,
    }
}

/// Whether this processor has instructions for products of `bf16`.
pub(crate) fn multiplies_bf16() -> bool {
    avx512::bf16().is_some()
}

/// `out = left · right`, or added to it, on this thread.
pub(crate) fn product(
    precision: Precision,
    out: Out<'_>,
    write: Write,
    left: Left<'_>,
    right: Right<'_>,
    depth: Depth,
) {
    if left.rows > 0 {
        product_by(kernel(precision), out, write, left, right, depth);
    }
}

fn product_by(kernel: Kernel, out: Out<'_>, write: Write, left: Left<'_>, right: Right<'_>, depth: Depth) {
    let Out { data, stride } = out;
    let place =
        |block: &Block, column| column / COLUMNS * right.panel + block.group * right.group + block.step * COLUMNS;
    let mut blocks = blocks(depth).enumerate().peekable();
    while let Some((index, block)) = blocks.next() {
        let after = blocks.peek().map_or(0, |(_, block)| place(block, 0));
        for column in (0..right.columns).step_by(COLUMNS) {
            let panel = place(&block, column);
            let next = if column + COLUMNS < right.columns { place(&block, column + COLUMNS) } else { after };
            kernel(&mut Strip {
                left: &left.words[block.group * left.group + block.step * left.step..],
                left_panel: left.panel,
                left_row: left.row,
                left_step: left.step,
                left_group: left.group,
                right: &right.words[panel..],
                right_group: right.group,
                next: next.wrapping_sub(panel),
                depth: block.depth,
                out: &mut data[column..],
                out_stride: stride,
                rows: left.rows,
                columns: COLUMNS.min(right.columns - column),
                write: if index == 0 { write } else { Write::Add },
            });
        }
    }
}

/// A part of the depth that is summed in registers.
struct Block {
    group: usize,
    step: usize,
    depth: Depth,
}

/// Blocks of about [`DEPTH`] words: some whole groups, or an even part of the only one.
fn blocks(depth: Depth) -> impl Iterator<Item = Block> {
    let Depth { groups, steps } = depth;
    let (count, size) = if groups == 1 {
        let count = steps.div_ceil(DEPTH).max(1);
        (count, steps.div_ceil(count))
    } else {
        let size = (DEPTH / steps).max(1);
        (groups.div_ceil(size), size)
    };
    (0..count).map(move |index| {
        let first = index * size;
        if groups == 1 {
            Block { group: 0, step: first, depth: Depth { groups: 1, steps: size.min(steps - first) } }
        } else {
            Block { group: first, step: 0, depth: Depth { groups: size.min(groups - first), steps } }
        }
    })
}
