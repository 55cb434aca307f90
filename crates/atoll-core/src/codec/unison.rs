//! Payloads of trellis-coded quantization that speak in one turn: what they say is added up before it is rotated back, once for all.

use super::{CHUNK, Payload, trellis};

/// That all payloads speak in this turn.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Unison(u8);

impl Unison {
    /// If these are such.
    pub(crate) fn of<'a>(mut payloads: impl Iterator<Item = &'a Payload<'a>>) -> Option<Self> {
        let turn = payloads.next()?.turn()?;
        payloads.all(|payload| payload.turn() == Some(turn)).then_some(Self(turn))
    }

    /// Whether all of these speak of all of chunk number `number`.
    #[inline(always)]
    pub(crate) fn holds<'a>(self, number: usize, mut payloads: impl Iterator<Item = &'a Payload<'a>>) -> bool {
        payloads.all(|payload| payload.chunk(number).passage.is_about_all())
    }

    /// Writes the sum of what chunk number `number` of each says, times its share, and adds to `alongs` how far each goes
    /// along that sum.
    #[inline(always)]
    pub(crate) fn add_up<'a>(
        self,
        number: usize,
        shares: impl Iterator<Item = (&'a Payload<'a>, f32)>,
        sum: &mut [f32; CHUNK],
        alongs: &mut [f64],
    ) {
        let chunks = shares.map(|(payload, share)| (payload.chunk(number).passage, share));
        trellis::add_up(self.0, chunks, sum, alongs);
    }
}
