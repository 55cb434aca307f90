//! Packing operands. A weight matrix `(out, in)` is packed twice per step: with depth along *in*, for
//! y = x Wᵀ, and with depth along *out*, for dx = dy W. Activations are packed by the pass that makes them,
//! in groups of [`TOKENS`] tokens with depth along the tokens, for dW = dyᵀ x.
//!
//! ```text
//! Panels   [panel of 32 columns][word of depth][column]                      right operands
//! Groups   [64 tokens][panel of 8 or 32 features][word of tokens][feature]   left or right operands
//! ```

use std::ops::Range;

use super::{COLUMNS, Depth, Left, ROWS, Right};
use crate::math::simd;
use crate::pool::Pool;
use crate::words::{Buffer, Precision, pair};

/// Tokens of a group: what one task of a fused pass takes. Fixed, so that no sum depends on the threads.
pub(crate) const TOKENS: usize = 64;

/// Matrices of equal width, one below the other.
#[derive(Clone, Copy)]
pub(crate) struct Stack<'a> {
    pub(crate) parts: &'a [&'a [f32]],
    pub(crate) width: usize,
}

impl<'a> Stack<'a> {
    fn height(&self) -> usize {
        self.parts.iter().map(|part| part.len()).sum::<usize>() / self.width
    }

    /// Row `index`, if there is one.
    fn row(&self, index: usize) -> Option<&'a [f32]> {
        let mut start = index * self.width;
        for part in self.parts {
            match part.get(start..start + self.width) {
                Some(row) => return Some(row),
                None => start -= part.len(),
            }
        }
        None
    }
}

/// A right operand of which a panel holds the whole depth.
#[derive(Default)]
pub(crate) struct Panels {
    words: Buffer,
    columns: usize,
    steps: usize,
}

impl Panels {
    /// The operand.
    pub(crate) fn right(&self) -> Right<'_> {
        Right { words: self.words.words(), columns: self.columns, panel: self.steps * COLUMNS, group: 0 }
    }

    /// What a product with it sums over.
    pub(crate) fn depth(&self) -> Depth {
        Depth { groups: 1, steps: self.steps }
    }

    /// Sizes it; returns its panels.
    fn fit(&mut self, columns: usize, steps: usize) -> impl Iterator<Item = (usize, &mut [u32])> + Send {
        (self.columns, self.steps) = (columns, steps);
        self.words.resize(columns.div_ceil(COLUMNS) * COLUMNS * steps);
        self.words.words_mut().chunks_mut(steps * COLUMNS).enumerate()
    }

    /// Packs Wᵀ: a column for each row of `stack`, depth along the row.
    pub(crate) fn pack_transposed(&mut self, pool: &Pool, precision: Precision, stack: Stack<'_>) {
        let steps = precision.words(stack.width);
        pool.each(self.fit(stack.height(), steps), |(index, panel)| {
            let mut rows = vec![0; COLUMNS * steps];
            let sources = (index * COLUMNS..).map_while(|row| stack.row(row));
            simd(
                #[inline(always)]
                || {
                    let mut count = 0;
                    for (words, row) in rows.chunks_mut(steps).zip(sources) {
                        precision.encode(row, words);
                        count += 1;
                    }
                    transpose(&rows, steps, steps, count, panel);
                },
            );
        });
    }

    /// Packs W: a column for each column of `stack`, depth along its rows.
    pub(crate) fn pack(&mut self, pool: &Pool, precision: Precision, stack: Stack<'_>) {
        let steps = precision.words(stack.height());
        pool.each(self.fit(stack.width, steps), |(index, panel)| {
            let columns = index * COLUMNS..stack.width.min((index + 1) * COLUMNS);
            let row = |index| stack.row(index).map_or(&[][..], |row| &row[columns.clone()]);
            simd(
                #[inline(always)]
                || zip_rows::<COLUMNS>(precision, row, (steps, 0..steps), panel),
            );
        });
    }

    /// Packs Xᵀ on this thread: a column for each of `rows` rows of `steps` words, `stride` words apart.
    pub(crate) fn pack_words(&mut self, words: &[u32], rows: usize, stride: usize, steps: usize) {
        for (index, panel) in self.fit(rows, steps) {
            let count = COLUMNS.min(rows - index * COLUMNS);
            simd(
                #[inline(always)]
                || transpose(&words[index * COLUMNS * stride..], stride, steps, count, panel),
            );
        }
    }

    /// Packs X `(rows, columns)` on this thread: depth along the rows, `row(i)` being the i-th.
    pub(crate) fn pack_rows<'r>(
        &mut self,
        precision: Precision,
        rows: usize,
        columns: usize,
        row: impl Fn(usize) -> &'r [f32],
    ) {
        let steps = precision.words(rows);
        drop(self.fit(columns, steps));
        let row = |index| if index < rows { row(index) } else { &[] };
        simd(
            #[inline(always)]
            || zip_rows::<COLUMNS>(precision, row, (steps, 0..steps), self.words.words_mut()),
        );
    }
}

/// Writes each of `count` rows, `stride` words apart, as a column of the panel; columns beyond them are 0.
#[inline(always)]
fn transpose(rows: &[u32], stride: usize, steps: usize, count: usize, panel: &mut [u32]) {
    /// Words of each row that are moved together, a cache line.
    const PART: usize = 16;
    let panel = panel.as_chunks_mut::<COLUMNS>().0;
    if count < COLUMNS {
        panel.iter_mut().for_each(|columns| columns[count..].fill(0));
    }
    for (part, panel) in panel.chunks_mut(PART).enumerate() {
        for column in 0..count {
            let row = &rows[column * stride..][..steps][part * PART..];
            for (columns, &word) in panel.iter_mut().zip(row) {
                columns[column] = word;
            }
        }
    }
}

/// Fills a range of words of depth in panels of `WIDTH` columns and `steps` words of depth. Depth is along the
/// rows, of which `row` gives those of the range; rows and columns that are missing are 0. Some rows are read
/// side by side, because whole ones may lie a multiple of a cache's size apart.
#[inline(always)]
fn zip_rows<'r, const WIDTH: usize>(
    precision: Precision,
    row: impl Fn(usize) -> &'r [f32],
    (steps, range): (usize, Range<usize>),
    panels: &mut [u32],
) {
    /// Words of depth at a time: two cache lines of the narrowest panel.
    const PART: usize = 4;
    /// Columns at a time.
    const SPAN: usize = 256;
    let size = steps * WIDTH;
    let mut zipped = [[0; SPAN]; PART];
    for first in range.clone().step_by(PART) {
        for (span, panels) in panels.chunks_mut(SPAN / WIDTH * size).enumerate() {
            let from = |row: &'r [f32]| row.get(span * SPAN..).unwrap_or(&[]);
            for (step, words) in (first - range.start..range.len()).zip(&mut zipped) {
                match precision {
                    Precision::F32 => zip_row(from(row(step)), words, |words, row| {
                        words.iter_mut().zip(row).for_each(|(word, x)| *word = x.to_bits());
                    }),
                    Precision::Bf16 => zip_pair(from(row(2 * step)), from(row(2 * step + 1)), words),
                }
            }
            for (panel, words) in panels.chunks_mut(size).enumerate() {
                let words = words.as_chunks_mut::<WIDTH>().0[first..range.end].iter_mut();
                for (words, zipped) in words.zip(&zipped) {
                    words.copy_from_slice(&zipped[panel * WIDTH..][..WIDTH]);
                }
            }
        }
    }
}

/// Writes as many words as the row has elements, and then 0.
#[inline(always)]
fn zip_row(row: &[f32], words: &mut [u32], write: impl Fn(&mut [u32], &[f32])) {
    let count = words.len().min(row.len());
    let (words, rest) = words.split_at_mut(count);
    write(words, &row[..count]);
    rest.fill(0);
}

/// Writes pairs of elements of two rows, of which the second may be missing, and then 0.
#[inline(always)]
fn zip_pair(low: &[f32], high: &[f32], words: &mut [u32]) {
    zip_row(low, words, |words, low| match high.get(..low.len()) {
        Some(high) => words.iter_mut().zip(low).zip(high).for_each(|((word, &low), &high)| *word = pair(low, high)),
        None => words.iter_mut().zip(low).for_each(|(word, &low)| *word = pair(low, 0.0)),
    });
}

/// Activations in groups of [`TOKENS`] tokens, in panels of `WIDTH` features. Features come in parts, each of
/// which begins a panel.
#[derive(Default)]
pub(crate) struct Groups<const WIDTH: usize> {
    words: Buffer,
    /// Panels of all parts together.
    panels: usize,
    steps: usize,
}

/// Panels for a left operand.
pub(crate) type LeftGroups = Groups<ROWS>;
/// Panels for a right operand.
pub(crate) type RightGroups = Groups<COLUMNS>;

impl<const WIDTH: usize> Groups<WIDTH> {
    /// Sizes it for `tokens` tokens with these `parts` of features.
    pub(crate) fn resize(&mut self, precision: Precision, tokens: usize, parts: &[usize]) {
        self.panels = parts.iter().map(|part| part.div_ceil(WIDTH)).sum();
        self.steps = precision.words(TOKENS);
        self.words.resize(tokens.div_ceil(TOKENS) * self.size());
    }

    /// Words of a group.
    fn size(&self) -> usize {
        self.panels * self.steps * WIDTH
    }

    /// The groups, to be filled with [`fill`].
    pub(crate) fn groups_mut(&mut self) -> std::slice::ChunksMut<'_, u32> {
        let size = self.size().max(1);
        self.words.words_mut().chunks_mut(size)
    }

    /// What a product over the first `tokens` tokens sums over.
    pub(crate) fn depth(&self, tokens: usize) -> Depth {
        Depth { groups: tokens.div_ceil(TOKENS), steps: self.steps }
    }
}

impl Groups<ROWS> {
    /// `rows` features from panel `panel` on, as rows of a left operand.
    pub(crate) fn left(&self, panel: usize, rows: usize) -> Left<'_> {
        let size = self.steps * ROWS;
        Left { words: &self.words.words()[panel * size..], rows, panel: size, row: 1, step: ROWS, group: self.size() }
    }
}

impl Groups<COLUMNS> {
    /// The first `columns` features as columns of a right operand.
    pub(crate) fn right(&self, columns: usize) -> Right<'_> {
        Right { words: self.words.words(), columns, panel: self.steps * COLUMNS, group: self.size() }
    }
}

/// Fills one group, or the panels of one part of it, with rows of `stride` features, of which `part` counts.
/// Tokens that are missing are 0.
pub(crate) fn fill<const WIDTH: usize>(
    precision: Precision,
    rows: &[f32],
    stride: usize,
    part: Range<usize>,
    group: &mut [u32],
) {
    fill_tokens::<WIDTH>(precision, rows, stride, part, 0..TOKENS, group);
}

/// The same for some `tokens` of the group, which begin and end at whole words; `rows` has those alone.
pub(crate) fn fill_tokens<const WIDTH: usize>(
    precision: Precision,
    rows: &[f32],
    stride: usize,
    part: Range<usize>,
    tokens: Range<usize>,
    group: &mut [u32],
) {
    let count = rows.len() / stride;
    let row = |index| if index < count { &rows[index * stride..][part.clone()] } else { &[] };
    let range = precision.words(tokens.start)..precision.words(tokens.end);
    simd(
        #[inline(always)]
        || zip_rows::<WIDTH>(precision, row, (precision.words(TOKENS), range), group),
    );
}
