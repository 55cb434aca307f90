//! Cyclic codecs: of a chunk every so manieth weight, in 2 or in 4 bits. Which ones it is goes round with the versions of
//! a fragment, so after a full turn every weight has had its time.
//!
//! All sites speak of the same weights in the same round, and no position has to be sent. Sparse averaging of parameters
//! in turn is SPARTA's (Baioumy and Cheah 2025); the greatest ones, which [sparse](super::sparse) takes, are different
//! ones at each site, and a mean of what few sites have sent is far from what they have learnt.

use super::dense::{self, BLOCK, e3m0_bytes};
use super::levels::{self, LEVEL_BYTES, Table};
use super::sparse::CHUNK;

/// Which weights of a chunk a payload speaks of: numbers `at`, `at + of`, `at + 2 of` and so on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Turn {
    /// Payloads in a full turn; at least 1.
    pub of: u8,
    /// The number of this one, below `of`.
    pub at: u8,
}

impl Turn {
    /// The one whose time it is at that version.
    pub(super) fn at(self, version: u64) -> Self {
        Self { at: (version % u64::from(self.of)) as u8, ..self }
    }

    pub(super) fn is_sound(self) -> bool {
        self.at < self.of
    }

    /// Weights for which a chunk of `len` has room, whatever the turn.
    pub(super) fn room(self, len: usize) -> usize {
        len.div_ceil(usize::from(self.of))
    }

    /// Places in a chunk of `len` weights.
    #[inline(always)]
    fn places(self, len: usize) -> impl ExactSizeIterator<Item = usize> + Clone {
        (usize::from(self.at)..len.max(usize::from(self.at))).step_by(usize::from(self.of))
    }
}

/// Bits of each weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Depth {
    /// One of four [levels].
    Two,
    /// E3M0.
    Four,
}

/// Bytes of a chunk of `len` weights.
pub(super) fn bytes(depth: Depth, turn: Turn, len: usize) -> usize {
    let room = turn.room(len);
    match depth {
        Depth::Two => LEVEL_BYTES + levels::code_bytes(room),
        Depth::Four => (0..room).step_by(BLOCK).map(|start| e3m0_bytes(BLOCK.min(room - start))).sum(),
    }
}

/// Writes the chunk of finite `values` into zeros.
#[inline(always)]
pub(super) fn encode(depth: Depth, turn: Turn, values: &[f32], out: &mut [u8]) {
    let places = turn.places(values.len());
    match depth {
        Depth::Two => {
            let (table, codes) = out.split_at_mut(LEVEL_BYTES);
            levels::write(values, places, table, codes);
        }
        Depth::Four => {
            let mut gathered = [0f32; CHUNK];
            let count = places.len();
            gathered.iter_mut().zip(places).for_each(|(value, place)| *value = values[place]);
            let blocks = gathered[..count].chunks(BLOCK).zip(out.chunks_mut(e3m0_bytes(BLOCK)));
            blocks.for_each(|(block, out)| dense::encode_e3m0(block, out));
        }
    }
}

/// Shows each weight that a chunk of `len` speaks of; `None` if something is not finite.
#[inline(always)]
pub(super) fn visit(
    depth: Depth,
    turn: Turn,
    len: usize,
    bytes: &[u8],
    mut show: impl FnMut(usize, f32),
) -> Option<()> {
    match depth {
        Depth::Two => {
            let (table, codes) = bytes.split_at_checked(LEVEL_BYTES)?;
            let table = Table::read(table);
            turn.places(len).enumerate().for_each(|(rank, place)| show(place, table.value(codes, rank)));
            table.is_finite().then_some(())
        }
        Depth::Four => {
            let mut finite = true;
            let values = bytes.chunks(e3m0_bytes(BLOCK)).flat_map(dense::decode_e3m0);
            for (place, value) in turn.places(len).zip(values) {
                finite &= value.is_finite();
                show(place, value);
            }
            finite.then_some(())
        }
    }
}
