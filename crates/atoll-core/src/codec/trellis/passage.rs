//! What a payload says of one chunk, and how a piece of it is cut up into such passages.
//!
//! ```text
//! even      piece = passages of the payload's number of words each, about all rows
//! uneven    piece = | ff ff | passage … | zeros |
//!           passage = | words: 4 bits, lowest; kind: 4 bits | if kind > 0, rows: u32, lowest first | words … |
//!           about 32 >> kind rows of 128 weights, side by side; about all of them where kind is 0
//! ```
//!
//! A gain is not negative, so no even piece begins with the two bytes of an uneven one.

use super::{CHUNK, Shape, gain, is_gain, left_by};

/// Weights of a row: of those that a chunk is about, or not.
pub(super) const ROW: usize = 128;
/// Rows of a whole chunk.
pub(super) const ROWS: usize = CHUNK / ROW;
/// Kinds of passages that are about some rows only.
pub(super) const KINDS: usize = 3;
/// Most words of a passage in an uneven piece.
pub(super) const WORDS_MAX: u8 = 15;
/// What an uneven piece begins with.
pub(super) const MARK: [u8; 2] = [0xff; 2];
/// Bytes before the words of a passage about all rows of its chunk.
pub(super) const HEAD: usize = 1;

/// So many words about some rows of a chunk.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Passage<'a> {
    /// A bit for each row that it is about.
    pub(super) rows: u32,
    /// Weights that a word speaks of, side by side.
    pub(super) shape: Shape,
    pub(super) words: &'a [u8],
}

/// Rows of a chunk of `len` weights.
pub(super) fn rows_of(len: usize) -> usize {
    len.div_ceil(ROW)
}

/// Bytes before the words of a passage of that kind.
pub(super) fn head_of(kind: usize) -> usize {
    if kind == 0 { HEAD } else { HEAD + size_of::<u32>() }
}

/// How the rows of a passage of that kind lie side by side in a chunk of `len` weights.
pub(super) fn shape_of(kind: usize, len: usize) -> Shape {
    if kind == 0 { Shape::new(len) } else { Shape::new((ROWS >> kind) * ROW) }
}

impl<'a> Passage<'a> {
    /// All `words` about a chunk of `len` weights.
    #[inline(always)]
    pub(super) fn even(len: usize, words: &'a [u8]) -> Self {
        Self { rows: u32::MAX, shape: Shape::new(len), words }
    }

    /// The passage about a chunk of `len` weights that an uneven piece goes on with, and what follows it.
    pub(super) fn read(len: usize, bytes: &'a [u8]) -> Option<(Self, &'a [u8])> {
        let (&head, rest) = bytes.split_first()?;
        let (words, kind) = (usize::from(head & 15), usize::from(head >> 4));
        let (rows, rest) = match kind {
            0 => (u32::MAX, rest),
            _ => rest.split_first_chunk().map(|(rows, rest)| (u32::from_le_bytes(*rows), rest))?,
        };
        let is_sane = kind <= KINDS && (kind == 0 || rows.count_ones() as usize == ROWS >> kind);
        let is_inside = kind == 0 || (u64::from(rows) >> rows_of(len)) == 0;
        if !(is_sane && is_inside) {
            return None;
        }
        let shape = shape_of(kind, len);
        let (words, rest) = rest.split_at_checked(words * shape.word())?;
        Some((Self { rows, shape, words }, rest))
    }

    /// Writes what [`read`](Self::read) finds before the words of a passage of that `kind`.
    pub(super) fn write_head(&self, words: u8, kind: usize, head: &mut [u8]) {
        head[0] = words | (kind as u8) << 4;
        let rows = &mut head[HEAD..];
        rows.copy_from_slice(&self.rows.to_le_bytes()[..rows.len()]);
    }

    /// Its words.
    #[inline(always)]
    pub(super) fn words(&self) -> impl Iterator<Item = &'a [u8]> + use<'a> {
        self.words.chunks_exact(self.shape.word())
    }

    /// Share that it tells of the energy of what it is about.
    pub(crate) fn told(&self) -> f64 {
        1.0 - left_by(self.words().count())
    }

    /// Multiplies the `values` of its chunk with what it is taken to leave of what there is to say of each; where it speaks,
    /// `times` that.
    pub(crate) fn leave(&self, times: f32, values: &mut [f32]) {
        if self.words.is_empty() {
            return;
        }
        let left = left_by(self.words().count()) as f32 * times;
        for (row, values) in values.chunks_mut(ROW).enumerate() {
            if self.is_about(row * ROW) {
                values.iter_mut().for_each(|value| *value *= left);
            }
        }
    }

    /// Whether it speaks of the weight at `place` of its chunk.
    #[inline(always)]
    pub(crate) fn is_about(&self, place: usize) -> bool {
        !self.words.is_empty() && self.rows >> (place / ROW) & 1 == 1
    }

    /// Whether it is about all of its chunk.
    #[inline(always)]
    pub(crate) fn is_about_all(&self) -> bool {
        self.rows == u32::MAX
    }

    /// Whether it is about something, and has no words to spare for it.
    #[inline(always)]
    pub(crate) fn is_silent(&self) -> bool {
        self.rows != 0 && self.words.is_empty()
    }

    /// Whether only finite values come out.
    pub(super) fn is_sound(&self) -> bool {
        self.words().all(|word| is_gain(gain(word)))
    }

    /// Writes the rows of `values` that it is about side by side into `room`, zeros behind them.
    #[inline(always)]
    pub(super) fn gather(&self, values: &[f32], room: &mut [f32]) {
        if self.is_about_all() {
            let (told, rest) = room.split_at_mut(values.len());
            told.copy_from_slice(values);
            return rest.fill(0.0);
        }
        let rows = values.chunks(ROW).enumerate().filter(|(row, _)| self.rows >> row & 1 == 1);
        for (room, (_, row)) in room.chunks_mut(ROW).zip(rows) {
            let (told, rest) = room.split_at_mut(row.len());
            told.copy_from_slice(row);
            rest.fill(0.0);
        }
    }

    /// The way back, which leaves other rows alone.
    #[inline(always)]
    pub(super) fn scatter(&self, room: &[f32], values: &mut [f32]) {
        if self.is_about_all() {
            return values.copy_from_slice(&room[..values.len()]);
        }
        let rows = values.chunks_mut(ROW).enumerate().filter(|(row, _)| self.rows >> row & 1 == 1);
        for ((_, row), room) in rows.zip(room.chunks(ROW)) {
            row.copy_from_slice(&room[..row.len()]);
        }
    }
}

/// The passages of a piece, chunk by chunk; none where bytes are malformed.
#[derive(Debug, Clone)]
pub(crate) struct Passages<'a> {
    /// Weights that are to come.
    len: usize,
    bytes: &'a [u8],
    /// Bytes of each passage of an even piece.
    even: Option<usize>,
}

impl<'a> Passages<'a> {
    /// Those of a piece about `len` weights in a payload of so many `words`.
    #[inline(always)]
    pub(crate) fn of(len: usize, words: u8, piece: &'a [u8]) -> Self {
        match piece.strip_prefix(&MARK) {
            Some(bytes) => Self { len, bytes, even: None },
            None => Self { len, bytes: piece, even: Some(Shape::new(CHUNK).bytes(words)) },
        }
    }

    /// That about chunk number `number`; silence if it is malformed.
    #[inline(always)]
    pub(crate) fn at(mut self, number: usize) -> Passage<'a> {
        if let Some(bytes) = self.even {
            (self.len, self.bytes) = (self.len - number * CHUNK, &self.bytes[number * bytes..]);
            return self.next().flatten().unwrap_or_default();
        }
        self.nth(number).flatten().unwrap_or_default()
    }

    /// Whether all were read, and bytes that are left are zeros.
    pub(super) fn is_done(&self) -> bool {
        self.len == 0 && self.bytes.iter().all(|&byte| byte == 0)
    }
}

impl<'a> Iterator for Passages<'a> {
    type Item = Option<Passage<'a>>;

    #[inline(always)]
    fn next(&mut self) -> Option<Self::Item> {
        let len = CHUNK.min(self.len);
        if len == 0 {
            return None;
        }
        self.len -= len;
        let read = match self.even {
            Some(bytes) => {
                let (words, rest) = self.bytes.split_at(bytes.min(self.bytes.len()));
                Some((Passage::even(len, words), rest))
            }
            None => Passage::read(len, self.bytes),
        };
        let Some((passage, rest)) = read else { return Some(None) };
        self.bytes = rest;
        Some(Some(passage))
    }
}
