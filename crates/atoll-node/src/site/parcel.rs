//! Bytes that are fetched: weights into the vector that becomes the site's Θ, everything else as bytes.

/// A place for bytes, and the bytes when all are there.
#[derive(Debug)]
pub(super) enum Parcel {
    Bytes(Vec<u8>),
    /// Little-endian, whatever the processor.
    Weights(Vec<f32>),
}

impl Parcel {
    /// Room for so many bytes.
    pub(super) fn of_bytes(len: usize) -> Self {
        Parcel::Bytes(vec![0; len])
    }

    /// Room for weights of so many bytes.
    pub(super) fn of_weights(len: usize) -> Self {
        if len.is_multiple_of(size_of::<f32>()) {
            Parcel::Weights(vec![0.0; len / size_of::<f32>()])
        } else {
            Self::of_bytes(len) // These will not be weights.
        }
    }

    pub(super) fn as_bytes(&self) -> &[u8] {
        match self {
            Parcel::Bytes(bytes) => bytes,
            Parcel::Weights(weights) => bytemuck::cast_slice(weights),
        }
    }

    pub(super) fn as_mut_bytes(&mut self) -> &mut [u8] {
        match self {
            Parcel::Bytes(bytes) => bytes,
            Parcel::Weights(weights) => bytemuck::cast_slice_mut(weights),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.as_bytes().len()
    }

    pub(super) fn into_bytes(self) -> Vec<u8> {
        match self {
            Parcel::Bytes(bytes) => bytes,
            weights @ Parcel::Weights(_) => weights.as_bytes().to_vec(),
        }
    }

    pub(super) fn into_weights(self) -> Vec<f32> {
        match self {
            Parcel::Bytes(bytes) => atoll_core::hash::from_little_endian(&bytes),
            Parcel::Weights(mut weights) => {
                if cfg!(target_endian = "big") {
                    weights.iter_mut().for_each(|weight| *weight = f32::from_bits(u32::from_le(weight.to_bits())));
                }
                weights
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_what_their_bytes_say() {
        let weights = [1.5f32, -0.0, f32::MIN_POSITIVE];
        let bytes: Vec<u8> = weights.iter().flat_map(|weight| weight.to_le_bytes()).collect();
        for mut parcel in [Parcel::of_weights(12), Parcel::of_bytes(12)] {
            parcel.as_mut_bytes().copy_from_slice(&bytes);
            assert_eq!((parcel.len(), parcel.as_bytes()), (12, &bytes[..]));
            let bits = |weights: &[f32]| weights.iter().map(|weight| weight.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&parcel.into_weights()), bits(&weights));
        }
        assert_eq!(Parcel::of_weights(5).into_bytes(), [0; 5]);
    }
}
