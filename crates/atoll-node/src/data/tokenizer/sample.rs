//! A sample of a text for training a tokenizer: spread evenly over all of it, in one pass, without
//! knowing beforehand how long it is.

use crate::data::{DataError, Source, TextField};

/// Bytes that a sample may hold.
const SAMPLE_BYTES: usize = 16 << 20;
/// Texts are sampled in pieces of about this size.
const PIECE_BYTES: usize = 8 << 10;

/// Every `stride`-th piece of the text seen so far. When the sample is full, every second piece goes
/// and the stride doubles; so the same text gives the same sample.
#[derive(Debug, Clone)]
pub struct Sample {
    pieces: Vec<String>,
    bytes: usize,
    bytes_max: usize,
    seen: u64,
    stride: u64,
}

impl Default for Sample {
    fn default() -> Self {
        Self { pieces: Vec::new(), bytes: 0, bytes_max: SAMPLE_BYTES, seen: 0, stride: 1 }
    }
}

impl Sample {
    /// A sample of all documents of `source`, of at most 16 MiB.
    ///
    /// # Errors
    /// If a document cannot be read, or there is none.
    pub fn of(source: &Source, field: &TextField) -> Result<Self, DataError> {
        let mut sample = Self::default();
        let skipped = source.visit(field, &mut |document| {
            sample.push(document.text);
            Ok(())
        })?;
        if sample.pieces.is_empty() {
            return Err(DataError::NoDocument { path: source.path().to_path_buf(), skipped });
        }
        Ok(sample)
    }

    /// Shows a document to the sample.
    pub fn push(&mut self, document: &str) {
        let mut rest = document;
        while !rest.is_empty() {
            let (piece, after) = rest.split_at(piece_end(rest));
            self.push_piece(piece);
            rest = after;
        }
    }

    /// Bytes in the sample.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn pieces(&self) -> impl Iterator<Item = &str> + Send {
        self.pieces.iter().map(String::as_str)
    }

    fn push_piece(&mut self, piece: &str) {
        if self.seen.is_multiple_of(self.stride) {
            self.bytes += piece.len();
            self.pieces.push(piece.to_string());
        }
        self.seen += 1;
        while self.bytes > self.bytes_max && self.pieces.len() > 1 {
            self.halve();
        }
    }

    fn halve(&mut self) {
        let mut keep = false;
        self.pieces.retain(|_| {
            keep = !keep;
            keep
        });
        self.stride *= 2;
        self.bytes = self.pieces.iter().map(String::len).sum();
    }
}

/// Where the first piece of `text` ends: after the line in which it gets long enough, or at once where
/// lines are longer than a piece.
fn piece_end(text: &str) -> usize {
    if text.len() <= PIECE_BYTES {
        return text.len();
    }
    let line_end = text.as_bytes()[PIECE_BYTES..].iter().take(PIECE_BYTES).position(|&byte| byte == b'\n');
    let boundary = || (PIECE_BYTES..text.len()).find(|&place| text.is_char_boundary(place)).unwrap_or(text.len());
    line_end.map_or_else(boundary, |place| PIECE_BYTES + place + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_is_even_bounded_and_the_same_again() {
        let take = || {
            let mut sample = Sample { bytes_max: 10_000, ..Sample::default() };
            (0..10_000).for_each(|n| sample.push(&format!("{n:>10}")));
            sample
        };
        let sample = take();
        assert!((5_000..=10_000).contains(&sample.bytes()), "{}", sample.bytes());
        assert!(sample.pieces().eq(take().pieces()));
        let numbers: Vec<usize> = sample.pieces().map(|piece| piece.trim().parse().unwrap()).collect();
        assert!(numbers.iter().enumerate().all(|(index, &n)| n == index * sample.stride as usize));
        assert!(numbers.last().unwrap() + sample.stride as usize >= 10_000, "it reaches the end");
    }

    #[test]
    fn long_documents_are_cut_between_characters() {
        let mut sample = Sample::default();
        let document = "é".repeat(3 * PIECE_BYTES);
        sample.push(&document);
        assert!(sample.pieces.len() > 4);
        assert_eq!(sample.pieces.concat(), document);
    }
}
