//! What this processor could do at most: fused multiply-adds that never leave the registers.

use std::hint::black_box;
use std::time::Instant;

use crate::engine::Precision;
use crate::math::simd;

/// Independent sums, enough to hide the latency of an addition.
const LANES: usize = 192;

/// Floating-point operations per second of fused multiply-adds that stay in registers, on that many threads.
pub fn peak(_precision: Precision, threads: usize) -> f64 {
    let one = || std::thread::spawn(one_thread);
    let running: Vec<_> = (0..threads.max(1)).map(|_| one()).collect();
    running.into_iter().map(|thread| thread.join().unwrap_or(0.0)).sum()
}

fn one_thread() -> f64 {
    const STEPS: usize = 1_000_000;
    let (a, b) = (black_box(0.999_f32), black_box(0.001_f32));
    let began = Instant::now();
    let sums = simd(
        #[inline(always)]
        || {
            let mut sums = [1.0f32; LANES];
            for _ in 0..STEPS {
                for sum in &mut sums {
                    *sum = sum.mul_add(a, b);
                }
            }
            sums
        },
    );
    black_box(sums);
    (2 * LANES * STEPS) as f64 / began.elapsed().as_secs_f64()
}
