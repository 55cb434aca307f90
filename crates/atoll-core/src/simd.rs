//! Loops compiled for several instruction sets, chosen at run time, and memory asked for in time.

/// Runs `work` compiled for the widest vectors that this processor has. `work` itself and everything that it calls
/// must be inlined to profit: write the closure as `#[inline(always)] || …` and its loops with `for`; what `for_each`,
/// `sum` and `fold` call inside is often compiled on its own, for the oldest processors. Arithmetic in `work` gives the
/// same bits with every instruction set as long as it fixes the order of its sums.
#[inline(always)]
pub fn simd<R>(work: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(work)
}

/// Bytes that come from memory at a time.
const LINE: usize = 64;

/// Has the memory send `bytes` to the nearest cache while the processor goes on: for whoever reads several vectors in turns, of
/// each too little for the processor to see where it goes on. Without effect where the language knows no such instruction.
#[inline(always)]
pub(crate) fn fetch(bytes: &[u8]) {
    #[cfg(target_arch = "x86_64")]
    if let Some(sse) = pulp::core_arch::x86::Sse::try_new() {
        for line in bytes.chunks(LINE) {
            sse._mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(line.as_ptr().cast());
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (bytes, LINE);
}
