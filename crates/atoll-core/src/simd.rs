//! Loops compiled for several instruction sets, chosen at run time.

/// Runs `work` compiled for the widest vectors that this processor has. `work` itself and everything that it calls
/// must be inlined to profit: write the closure as `#[inline(always)] || …` and its loops with `for`; what `for_each`,
/// `sum` and `fold` call inside is often compiled on its own, for the oldest processors. Arithmetic in `work` gives the
/// same bits with every instruction set as long as it fixes the order of its sums.
#[inline(always)]
pub fn simd<R>(work: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(work)
}
