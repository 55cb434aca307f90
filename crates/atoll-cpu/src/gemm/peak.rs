//! What the processor could do at best: the measure that `bench engine` holds the engine against.

use std::time::Instant;

use super::{COLUMNS, Depth, ROWS, Strip, Write, kernel};
use crate::pool::Pool;
use crate::words::Precision;

/// Multiply-adds per second, counted as two operations each, of `threads` threads that compute one tile
/// over and over from the first cache: the median of some tenths of a second.
pub fn peak(precision: Precision, threads: usize) -> f64 {
    let pool = Pool::new(threads);
    let mut speeds: Vec<f64> = (0..9).map(|_| once(precision, &pool)).collect();
    speeds.sort_by(f64::total_cmp);
    speeds[speeds.len() / 2]
}

fn once(precision: Precision, pool: &Pool) -> f64 {
    /// Words of depth that are read over and over: both operands stay in the first cache.
    const STEPS: usize = 32;
    /// How often, before a tile is written.
    const REPEATS: usize = 256;
    const TILES: usize = 400;
    let began = Instant::now();
    pool.each(0..pool.threads(), |_| {
        let (left, right) = (vec![0; ROWS * STEPS], vec![0; COLUMNS * STEPS]);
        let mut out = vec![0.0; ROWS * COLUMNS];
        for _ in 0..TILES {
            kernel(precision)(&mut Strip {
                left: &left,
                left_panel: 0,
                left_row: 1,
                left_step: ROWS,
                left_group: 0,
                right: &right,
                right_group: 0,
                next: 0,
                depth: Depth { groups: REPEATS, steps: STEPS },
                out: &mut out,
                out_stride: COLUMNS,
                rows: ROWS,
                columns: COLUMNS,
                write: Write::Set,
            });
        }
    });
    let operations = 2 * ROWS * COLUMNS * STEPS * REPEATS * precision.per_word() * TILES * pool.threads();
    operations as f64 / began.elapsed().as_secs_f64()
}
