//! The forward pass over a few tokens of some texts, with a cache of keys and values for each: what
//! generation needs of a model. New texts are read like training batches; a single new token of a text
//! meets the cached keys one by one.

use std::ops::Range;

use atoll_core::model::ModelConfig;

use crate::attention::{self, BLOCK, Heads, Sequence};
use crate::gemm::panels::Panels;
use crate::gemm::{COLUMNS, Left, Out, Right, Write, product};
use crate::layout::{Layer, Layout};
use crate::llama::{Directions, Packed, Shape};
use crate::math::{add_scaled, dot, exp_and_sum, max, simd};
use crate::pool::Pool;
use crate::rope::{Rope, Turn};
use crate::words::Precision;
use crate::{norm, swiglu};

/// Weights and caches.
pub(crate) struct Reader {
    shape: Shape,
    rope: Rope,
    packed: Packed,
    /// `(V, D)`.
    embedding: Vec<f32>,
    /// Before attention and before SwiGLU of each layer, and the last one, `(D)` each.
    gains: Vec<Vec<f32>>,
    texts: Vec<Cache>,
}

/// What is known of one text.
#[derive(Clone, Default)]
struct Cache {
    /// Tokens read.
    seen: usize,
    /// Rotated keys, and values, of each layer, `(seen, KV·hd)`.
    layers: Vec<(Vec<f32>, Vec<f32>)>,
}

/// The next tokens of a text.
#[derive(Clone, Copy)]
pub(crate) struct Piece<'a> {
    pub(crate) text: usize,
    pub(crate) tokens: &'a [u32],
}

impl Reader {
    /// A reader of these weights, in the order of [`ModelConfig::tensors`].
    pub(crate) fn new(config: &ModelConfig, precision: Precision, weights: &[f32], pool: &Pool) -> Self {
        let layout = Layout::sequential(config);
        let shape = Shape::new(config, precision);
        let mut packed = Packed::default();
        packed.pack(pool, shape, &layout, weights, Directions::Forward);
        let norms = |layer: &Layer| [layer.attention_norm.clone(), layer.mlp_norm.clone()];
        let gains = layout.layers.iter().flat_map(norms).chain([layout.norm.clone()]);
        Self {
            shape,
            rope: Rope::new(config),
            packed,
            embedding: weights[layout.embedding.clone()].to_vec(),
            gains: gains.map(|place| weights[place].to_vec()).collect(),
            texts: Vec::new(),
        }
    }

    /// Begins that many new texts.
    pub(crate) fn begin(&mut self, texts: usize) {
        let cache = Cache { seen: 0, layers: vec![Default::default(); self.packed.layers.len()] };
        self.texts = vec![cache; texts];
    }

    /// Tokens of a text that were read.
    pub(crate) fn seen(&self, text: usize) -> usize {
        self.texts[text].seen
    }

    /// Forgets what was read of a text.
    pub(crate) fn forget(&mut self, text: usize) {
        let Cache { seen, layers } = &mut self.texts[text];
        *seen = 0;
        for (keys, values) in layers {
            keys.clear();
            values.clear();
        }
    }

    /// Reads the next tokens of some texts; returns the normed residual stream, `(all tokens, D)`. A text that
    /// was read before takes one token at a time.
    pub(crate) fn read(&mut self, pool: &Pool, pieces: &[Piece<'_>]) -> Vec<f32> {
        let d = self.shape.d;
        let row = |&token: &u32| &self.embedding[token as usize * d..][..d];
        let mut x = pieces.iter().flat_map(|piece| piece.tokens).map(row).collect::<Vec<_>>().concat(); // (n,D)
        for layer in 0..self.packed.layers.len() {
            self.attention(pool, layer, pieces, &mut x);
            self.mlp(pool, layer, &mut x);
        }
        for piece in pieces {
            self.texts[piece.text].seen += piece.tokens.len();
        }
        self.norm(&x, self.gains.len() - 1)
    }

    /// Logits `(n, V)` of rows `(n, D)` that [`read`](Self::read) returned.
    pub(crate) fn logits(&self, pool: &Pool, normed: &[f32]) -> Vec<f32> {
        self.linear(pool, normed, self.shape.d, &self.packed.head.forward)
    }

    /// x ← x + attention(norm(x)).
    fn attention(&mut self, pool: &Pool, layer: usize, pieces: &[Piece<'_>], x: &mut [f32]) {
        let heads = self.shape.heads;
        let (width, q_width) = (heads.width(), heads.q_width());
        let h = self.norm(x, 2 * layer);
        let mut qkv = self.linear(pool, &h, self.shape.d, &self.packed.layers[layer].qkv.forward);
        let mut attended = vec![0.0; qkv.len() / width * q_width];
        let mut rest = &mut qkv[..];
        for piece in pieces {
            let rows;
            (rows, rest) = rest.split_at_mut(piece.tokens.len() * width);
            self.remember(layer, piece.text, rows);
        }
        let (mut qkv, mut out, mut rows) = (&qkv[..], &mut attended[..], Vec::new());
        for piece in pieces {
            let Cache { seen, layers } = &self.texts[piece.text];
            assert!(*seen == 0 || piece.tokens.len() == 1, "a text goes on by one token");
            let ((text, qkv_rest), (text_out, out_rest)) =
                (qkv.split_at(piece.tokens.len() * width), out.split_at_mut(piece.tokens.len() * q_width));
            (qkv, out) = (qkv_rest, out_rest);
            if *seen == 0 && piece.tokens.len() > 1 {
                read_text(pool, heads, text, text_out);
            } else {
                let (keys, values) = &layers[layer];
                rows.push((&text[..q_width], &keys[..], &values[..], text_out));
            }
        }
        pool.each(rows.into_iter(), |(q, keys, values, out)| {
            simd(
                #[inline(always)]
                || meet(heads, q, keys, values, out),
            );
        });
        self.add_linear(pool, x, &attended, q_width, |packed| &packed.layers[layer].o.forward);
    }

    /// Rotates the queries and keys of a text's next tokens and adds keys and values to its cache.
    fn remember(&mut self, layer: usize, text: usize, qkv: &mut [f32]) {
        let heads = self.shape.heads;
        let (width, q_width, kv_width) = (heads.width(), heads.q_width(), heads.kv_width());
        let Cache { seen, layers } = &mut self.texts[text];
        self.rope.rotate(qkv, (width, q_width + kv_width), *seen, usize::MAX, Turn::Forward);
        let (keys, values) = &mut layers[layer];
        for row in qkv.chunks(width) {
            let (k, v) = row[q_width..].split_at(kv_width);
            keys.extend_from_slice(k);
            values.extend_from_slice(v);
        }
    }

    /// x ← x + swiglu(norm(x)).
    fn mlp(&self, pool: &Pool, layer: usize, x: &mut [f32]) {
        let inner = self.shape.inner;
        let h = self.norm(x, 2 * layer + 1);
        let gate_up = self.linear(pool, &h, self.shape.d, &self.packed.layers[layer].gate_up.forward);
        let mut y = vec![0.0; gate_up.len() / 2];
        swiglu::forward(&gate_up, inner, &mut y);
        self.add_linear(pool, x, &y, inner, |packed| &packed.layers[layer].down.forward);
    }

    fn norm(&self, x: &[f32], gain: usize) -> Vec<f32> {
        let gain = &self.gains[gain];
        let (mut y, mut inverse_rms) = (vec![0.0; x.len()], vec![0.0; x.len() / gain.len()]);
        norm::forward(x, gain, self.shape.eps, &mut inverse_rms, &mut y);
        y
    }

    /// x Wᵀ: (n, out) from x (n, width). Threads take columns, of which even a single row has enough.
    fn linear(&self, pool: &Pool, x: &[f32], width: usize, operand: &Panels) -> Vec<f32> {
        let precision = self.shape.precision;
        let (n, stride) = (x.len() / width, precision.words(width));
        let mut words = vec![0; n * stride];
        precision.encode_rows(x, width, &mut words);
        let columns = operand.right().columns;
        let pieces: Vec<Range<usize>> = pieces(columns, pool.threads());
        let mut parts: Vec<Vec<f32>> = vec![Vec::new(); pieces.len()];
        pool.each(pieces.iter().zip(&mut parts), |(piece, part)| {
            part.resize(n * piece.len(), 0.0);
            let whole = operand.right();
            let right =
                Right { words: &whole.words[piece.start / COLUMNS * whole.panel..], columns: piece.len(), ..whole };
            let out = Out { data: part, stride: piece.len() };
            product(precision, out, Write::Set, Left::rows(&words, n, stride), right, operand.depth());
        });
        let row = |row| parts.iter().zip(&pieces).map(move |(part, piece)| &part[row * piece.len()..][..piece.len()]);
        (0..n).flat_map(row).collect::<Vec<_>>().concat()
    }

    /// y ← y + x Wᵀ.
    fn add_linear(&self, pool: &Pool, y: &mut [f32], x: &[f32], width: usize, operand: impl Fn(&Packed) -> &Panels) {
        add_scaled(y, 1.0, &self.linear(pool, x, width, operand(&self.packed)));
    }
}

/// Columns in some pieces for each thread, each of whole panels.
fn pieces(columns: usize, threads: usize) -> Vec<Range<usize>> {
    let size = columns.div_ceil(COLUMNS * threads * 2).max(1) * COLUMNS;
    (0..columns).step_by(size).map(|start| start..columns.min(start + size)).collect()
}

/// Attention of a whole text: output `(T, H·hd)` from rows of queries, keys and values.
fn read_text(pool: &Pool, heads: Heads, qkv: &[f32], out: &mut [f32]) {
    let (length, q_width) = (qkv.len() / heads.width(), heads.q_width());
    let q_words = heads.precision.words(q_width);
    let mut words = vec![0; length * heads.stride()];
    heads.precision.encode_rows(qkv, heads.width(), &mut words);
    let (mut encoded, mut log_sum) = (vec![0; length * q_words], vec![0.0; length * heads.queries]);
    let sequence = Sequence { words: &words, starts: &[] };
    let blocks = encoded.chunks_mut(BLOCK * q_words).zip(log_sum.chunks_mut(BLOCK * heads.queries)).enumerate();
    let mut scratch: Vec<attention::Scratch> = (0..pool.threads()).map(|_| attention::Scratch::default()).collect();
    pool.each_with(&mut scratch, blocks, |scratch, (block, (out, log_sum))| {
        attention::forward(heads, sequence, block * BLOCK, out, log_sum, scratch);
    });
    heads.precision.decode_rows(&encoded, q_width, out);
}

/// Attention of one token: output `(H·hd)` from its queries and all keys and values, `(T, KV·hd)`.
#[inline(always)]
fn meet(heads: Heads, q: &[f32], keys: &[f32], values: &[f32], out: &mut [f32]) {
    let (dim, kv_width) = (heads.dim, heads.kv_width());
    for (head, (q, out)) in q.chunks(dim).zip(out.chunks_mut(dim)).enumerate() {
        let shared = head / heads.group() * dim;
        let mut scores: Vec<f32> =
            keys.chunks(kv_width).map(|k| heads.scale() * dot(q, &k[shared..shared + dim])).collect();
        let most = max(&scores);
        let share = 1.0 / exp_and_sum(&mut scores, most);
        out.fill(0.0);
        for (p, v) in scores.iter().zip(values.chunks(kv_width)) {
            add_scaled(out, p * share, &v[shared..shared + dim]);
        }
    }
}
