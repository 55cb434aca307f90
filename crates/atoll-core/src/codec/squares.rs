//! How long each chunk of a payload is. Whoever looks at a payload when it comes has to know its length; a merge, which needs
//! those of tensors, need not read all of it again for them.

use std::sync::Arc;

use super::{CHUNK, Payload, Unpacked};
use crate::simd::simd;
use crate::team::{Team, share_out};

/// Chunks that a team's member takes at a time.
const STRETCH: usize = 64;

/// Squared length of each chunk of a payload, in their order; none if nobody has looked.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Squares(Arc<[f64]>);

impl Squares {
    /// Those of a checked payload: 8 bytes for 4,096 weights.
    pub fn of(payload: &Payload<'_>, team: &dyn Team) -> Self {
        let chunks = payload.count().div_ceil(CHUNK);
        let stretches: Vec<_> = (0..chunks).step_by(STRETCH).map(|start| start..chunks.min(start + STRETCH)).collect();
        let squares = share_out(stretches, team, |_, numbers| {
            simd(
                #[inline(always)]
                || {
                    let (mut room, mut squares) = (Unpacked::default(), [0.0; STRETCH]);
                    for (square, number) in squares.iter_mut().zip(numbers.clone()) {
                        *square = room.square(payload, number);
                    }
                    squares[..numbers.len()].to_vec()
                },
            )
        });
        Self(squares.concat().into())
    }

    /// Euclidean length of the payload, summed in the order of chunks.
    pub fn norm(&self) -> f64 {
        self.0.iter().sum::<f64>().sqrt()
    }

    /// That of chunk number `number`, if it is known.
    #[inline(always)]
    pub(super) fn get(&self, number: usize) -> Option<f64> {
        self.0.get(number).copied()
    }
}
