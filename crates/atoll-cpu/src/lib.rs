//! The engine that runs everywhere: a Llama trained and sampled on the CPU, its forward and backward
//! passes written by hand over flat `f32` vectors. All weights are one vector, all gradients another,
//! laid out so that a manifest's fragment is one contiguous piece; activations are allocated once. Sums are
//! `f32` throughout; operands of products are `f32` or `bf16`, see [`Precision`].
//!
//! One inner step of [`CpuEngine`]:
//!
//! ```text
//! feed → tokens → embedding → L × (attention, SwiGLU) → norm → logits, loss     llama (forward)
//!                     gradient ← backward, the same road in reverse               llama (backward)
//!                     norm of the gradient → clip → AdamW → weights               optimizer
//! ```
//!
//! **The bits do not depend on the number of threads.** Work is cut into tiles whose size follows from
//! the shapes alone, each tile is computed by one thread, and partial sums are added in a fixed order.
//!
//! | module | holds |
//! |---|---|
//! | `words` | `f32` or pairs of `bf16` in 32-bit words: what products read |
//! | `gemm` | matrix products: packing, blocking, a kernel for AVX-512 and its portable twin |
//! | `pool` | threads that spin between passes |
//! | `math` | vectorized `exp`, dot products |
//! | `layout` | where each tensor lies in the flat vectors |
//! | `norm`, `rope`, `attention`, `swiglu`, `loss` | the parts of a Llama, for some rows on one thread |
//! | `llama` | the passes over a batch, forward and backward |
//! | `optimizer`, `muon` | clipping, AdamW, Muon |
//! | [`engine`](CpuEngine) | `atoll_core`'s engine trait |
//! | `reader`, [`generate`](Generator) | texts with a key–value cache, sampling |
//!
//! `unsafe` is in two files: `gemm/avx512.rs` (pointers of the kernel) and `pool.rs` (one lifetime).

mod attention;
mod engine;
mod gemm;
mod generate;
mod layout;
mod llama;
mod loss;
mod math;
mod muon;
mod norm;
mod optimizer;
mod pool;
mod reader;
mod rope;
mod scratch;
mod swiglu;
mod words;

pub use engine::{CpuEngine, Gradients, Options};
pub use gemm::peak;
pub use generate::{Batched, Generator, Sampling, Tokens};
pub use llama::Output;
pub use pool::Pool;
pub use words::Precision;
