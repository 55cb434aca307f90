use super::panels::*;
use super::*;
use crate::pool::Pool;
use std::time::Instant;

fn time(name: &str, flop: f64, mut f: impl FnMut()) {
    f();
    let mut best = f64::INFINITY;
    for _ in 0..10 {
        let t = Instant::now();
        f();
        best = best.min(t.elapsed().as_secs_f64());
    }
    println!("{name:40} {:.0} GFLOP/s  {:.0} us", flop / best / 1e9, best * 1e6);
}

#[test]
#[ignore]
fn products() {
    let pool = Pool::new(1);
    for p in [Precision::F32, Precision::Bf16] {
        println!("{p:?} peak {:.0}", peak(p, 1) / 1e9);
        for (n, width, cols) in [(64, 384, 640), (64, 384, 384), (64, 384, 2048), (64, 1024, 384), (64, 2048, 384), (64, 384, 8192), (64, 8192, 384), (16, 384, 8192), (32, 384, 2048), (128, 384, 2048)] {
            // several row blocks so that the left side is not the same
            let blocks = 8;
            let w = vec![0.5f32; width * cols];
            let x = vec![0.5f32; blocks * n * width];
            let mut words = vec![0u32; blocks * n * p.words(width)];
            p.encode_rows(&x, width, &mut words);
            let mut panels = Panels::default();
            panels.pack(&pool, p, Stack { parts: &[&w], width: cols });
            let mut out = vec![0f32; n * cols];
            time(&format!("rows {n}x{width}x{cols}"), 2.0 * (blocks * n * width * cols) as f64, || {
                for words in words.chunks(n * p.words(width)) {
                    product(p, Out { data: &mut out, stride: cols }, Write::Set, Left::rows(words, n, p.words(width)), panels.right(), panels.depth());
                }
            });
        }
        for (tokens, a, b) in [(2048, 1024, 384), (2048, 384, 1024), (2048, 384, 384), (2048, 128, 384), (1024, 8192, 384), (512, 8192, 384)] {
            let (mut l, mut r) = (LeftGroups::default(), RightGroups::default());
            l.resize(p, tokens, &[a]);
            r.resize(p, tokens, &[b]);
            let mut out = vec![0f32; a * b];
            time(&format!("dW {tokens} tokens {a}x{b}"), 2.0 * (tokens * a * b) as f64, || {
                for (i, out) in out.chunks_mut(64 * b).enumerate() { let rows = out.len() / b;
                    product(p, Out { data: out, stride: b }, Write::Add, l.left(i * 8, rows), r.right(b), l.depth(tokens));
                }
            });
        }
        for seen in [64, 128, 256] {
            let w = vec![0.5f32; 256 * 64];
            let words = vec![0u32; 64 * p.words(640)];
            let mut panels = Panels::default();
            panels.pack(&pool, p, Stack { parts: &[&w], width: 256 });
            let mut out = vec![0f32; 64 * 256];
            time(&format!("S 64x64x{seen}"), 2.0 * (64 * 64 * seen) as f64, || {
                product(p, Out { data: &mut out, stride: seen }, Write::Set, Left::rows(&words, 64, p.words(640)), Right { columns: seen, ..panels.right() }, panels.depth());
            });
            let w = vec![0.5f32; seen * 64];
            let words = vec![0u32; 64 * p.words(seen)];
            panels.pack(&pool, p, Stack { parts: &[&w], width: 64 });
            time(&format!("PV 64x{seen}x64"), 2.0 * (64 * 64 * seen) as f64, || {
                product(p, Out { data: &mut out, stride: 64 }, Write::Set, Left::rows(&words, 64, p.words(seen)), panels.right(), panels.depth());
            });
            let (mut l, mut r) = (LeftGroups::default(), RightGroups::default());
            l.resize(p, 64, &[seen]);
            r.resize(p, 64, &[64]);
            time(&format!("dV {seen}x64x64"), 2.0 * (64 * 64 * seen) as f64, || {
                product(p, Out { data: &mut out, stride: 64 }, Write::Add, l.left(0, seen), r.right(64), l.depth(64));
            });
        }
    }
}
