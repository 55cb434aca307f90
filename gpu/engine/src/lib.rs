//! The engine for GPUs without Python: a Llama on [Burn](https://burn.dev)'s tensors, over WebGPU's shaders, Vulkan,
//! Metal, CUDA or ROCm. Burn gives arrays and their kernels; the passes are written by hand, as in `atoll-cpu`, because
//! then it is ours what is kept for the backward pass: never a matrix of T² scores.
//!
//! One inner step of [`BurnEngine`]:
//!
//! ```text
//! feed → tokens → embedding → L × (attention, SwiGLU) → norm → logits, loss     llama, attention
//!                     gradient ← backward, the same road in reverse             llama, attention
//!        losses, norms → host: finite? how long? → AdamW or Muon → weights       optimizer
//! ```
//!
//! The device is waited for once in a step, for as many numbers as there are tokens and tensors.
//!
//! | module | holds |
//! |---|---|
//! | [`device`](Api) | which devices there are, how fast they multiply |
//! | `arithmetic` | products in either precision, sums, norms, rotations: what the passes are made of |
//! | `attention` | causal attention by blocks of queries, forward and backward |
//! | `llama` | the passes over a micro-batch |
//! | `optimizer` | AdamW and Muon |
//! | [`engine`](BurnEngine) | `atoll_core`'s engine trait |
//!
//! A graphics driver that crashes takes its process along; that is one reason why a site is a process.

mod arithmetic;
mod attention;
mod device;
mod engine;
mod llama;
mod optimizer;

pub use arithmetic::Precision;
pub use device::{Api, Device, devices};
pub use engine::{BurnEngine, Gradients, Options};
