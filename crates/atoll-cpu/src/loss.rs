//! Cross-entropy over logits, row by row: the loss is ln Σ eˡ − l_target, in nats.

use crate::math::{exp_and_sum, max, simd};

/// Writes the loss of each row of logits `(n,V)` into nats `(n)`. With `scale`, each row becomes its
/// gradient, scale·(softmax − one at the target); else its contents are spent.
pub(crate) fn cross_entropy(logits: &mut [f32], vocab: usize, targets: &[u32], scale: Option<f32>, nats: &mut [f32]) {
    simd(
        #[inline(always)]
        || {
            for ((row, &target), nats) in logits.chunks_mut(vocab).zip(targets).zip(nats) {
                *nats = row_loss(row, target as usize, scale);
            }
        },
    );
}

#[inline(always)]
fn row_loss(row: &mut [f32], target: usize, scale: Option<f32>) -> f32 {
    let (most, wanted) = (max(row), row[target]);
    let sum = exp_and_sum(row, most);
    if let Some(scale) = scale {
        let share = scale / sum;
        row.iter_mut().for_each(|x| *x *= share);
        row[target] -= scale;
    }
    sum.ln() + most - wanted
}
