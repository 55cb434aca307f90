//! Memory that a thread uses again and again.

/// The first `len` elements, more than before if need be; their values are whatever was left there.
pub(crate) fn take<T: Copy + Default>(buffer: &mut Vec<T>, len: usize) -> &mut [T] {
    if buffer.len() < len {
        buffer.resize(len, T::default());
    }
    &mut buffer[..len]
}
