//! What the passes are made of. All tensors are `f32` between these functions; in [`Precision::Bf16`] the operands of a
//! product are rounded to `bf16` on their way into it, and its result, which the device sums in `f32`, on its way out.

use atoll_core::model::ModelConfig;
use burn::tensor::{Device, FloatDType, Int, Tensor, TensorData};

/// What operands of matrix products are rounded to. Weights, moments and the residual stream are `f32` in both.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Precision {
    /// 32 bits.
    #[default]
    F32,
    /// The upper half of an `f32`, for devices that multiply it.
    Bf16,
}

impl Precision {
    /// `left · right`, as many times as there are leading dimensions.
    pub(crate) fn product<const N: usize>(self, left: Tensor<N>, right: Tensor<N>) -> Tensor<N> {
        match self {
            Self::F32 => left.matmul(right),
            Self::Bf16 => left.cast(FloatDType::BF16).matmul(right.cast(FloatDType::BF16)).cast(FloatDType::F32),
        }
    }

    /// x `(N,in)` through a map `(out,in)`: `(N,out)`.
    pub(crate) fn through(self, x: Tensor<2>, map: &Tensor<2>) -> Tensor<2> {
        self.product(x, map.clone().transpose())
    }

    /// What [`through`](Self::through) turns dy `(N,out)` into: dx `(N,in)`.
    pub(crate) fn back(self, dy: Tensor<2>, map: &Tensor<2>) -> Tensor<2> {
        self.product(dy, map.clone())
    }

    /// The map's gradient `(out,in)`, for dy `(N,out)` and x `(N,in)`.
    pub(crate) fn slope(self, dy: Tensor<2>, x: Tensor<2>) -> Tensor<2> {
        self.product(dy.transpose(), x)
    }
}

/// `values` on the device, `(rows, columns)`.
pub(crate) fn matrix(values: Vec<f32>, rows: usize, columns: usize, device: &Device) -> Tensor<2> {
    Tensor::from_data(TensorData::new(values, [rows, columns]), device)
}

/// Tokens on the device.
pub(crate) fn indices(tokens: impl Iterator<Item = u32>, device: &Device) -> Tensor<1, Int> {
    let tokens: Vec<i32> = tokens.map(|token| token as i32).collect();
    let count = tokens.len();
    Tensor::from_data(TensorData::new(tokens, [count]), device)
}

/// Sum of all elements, `(1,1)`, always in the same order.
pub(crate) fn total(x: Tensor<2>) -> Tensor<2> {
    x.sum_dim(1).sum_dim(0)
}

/// r `(N,1)` = 1/√(mean(x²) + ε) of x `(N,D)`.
fn inverse_rms(x: &Tensor<2>, eps: f32) -> Tensor<2> {
    x.clone().square().mean_dim(1).add_scalar(eps).sqrt().recip()
}

/// RMSNorm of x `(N,D)` with the gain `(1,D)`: y = g ⊙ x·r.
pub(crate) fn norm(x: &Tensor<2>, gain: &Tensor<2>, eps: f32) -> Tensor<2> {
    x.clone() * inverse_rms(x, eps) * gain.clone()
}

/// The gradients of [`norm`], dx `(N,D)` and dg `(1,D)`, for dy `(N,D)`: with u = x·r,
///
/// dg = Σ dy ⊙ u over the rows, and dx = r·(g ⊙ dy − u · mean(g ⊙ dy ⊙ u)).
pub(crate) fn norm_back(dy: Tensor<2>, x: &Tensor<2>, gain: &Tensor<2>, eps: f32) -> (Tensor<2>, Tensor<2>) {
    let r = inverse_rms(x, eps);
    let unit = x.clone() * r.clone();
    let gain_slope = (dy.clone() * unit.clone()).sum_dim(0);
    let dy = dy * gain.clone();
    let along = (dy.clone() * unit.clone()).mean_dim(1);
    ((dy - unit * along) * r, gain_slope)
}

/// silu(x) = x·σ(x).
pub(crate) fn silu(x: Tensor<2>) -> Tensor<2> {
    x.clone() * sigmoid(x)
}

/// The slope of [`silu`]: σ(x)·(1 + x·(1 − σ(x))).
pub(crate) fn silu_slope(x: Tensor<2>) -> Tensor<2> {
    let sigma = sigmoid(x.clone());
    sigma.clone() * (x * (sigma.neg().add_scalar(1.0))).add_scalar(1.0)
}

/// σ(x) = 1/(1 + e^(−x)), which is 0 and 1 for the largest x.
fn sigmoid(x: Tensor<2>) -> Tensor<2> {
    x.neg().exp().add_scalar(1.0).recip()
}

/// Rotary positions, Hugging Face's rotate-half: at position p, the pair (xᵢ, xᵢ₊ₕ) of a head, h = half its width, is
/// turned by the angle p·θ^(−i/h).
pub(crate) struct Rope {
    /// Cosines and sines of each pair, twice beside each other, `(1,1,positions,2h)`.
    cos: Tensor<4>,
    sin: Tensor<4>,
}

impl Rope {
    /// For all positions that the model knows.
    pub(crate) fn new(model: &ModelConfig, device: &Device) -> Self {
        let (half, theta) = (model.head_dim / 2, f64::from(model.rope_theta));
        let frequency: Vec<f32> = (0..half).map(|i| theta.powf(-(i as f64) / half as f64) as f32).collect();
        let positions = model.max_position_embeddings;
        let table = |of: fn(f32) -> f32| {
            let row = |p: usize| frequency.iter().chain(&frequency).map(move |f| of(p as f32 * f));
            let values: Vec<f32> = (0..positions).flat_map(row).collect();
            Tensor::from_data(TensorData::new(values, [1, 1, positions, 2 * half]), device)
        };
        Self { cos: table(f32::cos), sin: table(f32::sin) }
    }

    /// Turns x `(B,heads,T,2h)`, whose tokens are at positions 0 to T.
    pub(crate) fn turn(&self, x: Tensor<4>) -> Tensor<4> {
        let (cos, sin) = self.at(&x);
        x.clone() * cos + turned(x) * sin
    }

    /// Turns back: a rotation's transpose is its inverse.
    pub(crate) fn turn_back(&self, dx: Tensor<4>) -> Tensor<4> {
        let (cos, sin) = self.at(&dx);
        dx.clone() * cos - turned(dx) * sin
    }

    fn at(&self, x: &Tensor<4>) -> (Tensor<4>, Tensor<4>) {
        let length = x.dims()[2];
        (self.cos.clone().narrow(2, 0, length), self.sin.clone().narrow(2, 0, length))
    }
}

/// (−second half, first half) of each head.
fn turned(x: Tensor<4>) -> Tensor<4> {
    let half = x.dims()[3] / 2;
    let (first, second) = (x.clone().narrow(3, 0, half), x.narrow(3, half, half));
    Tensor::cat(vec![second.neg(), first], 3)
}
