//! How fast and how small the codecs are.

use std::time::Instant;

use anyhow::Result;
use atoll_core::codec::{Codec, decode};
use atoll_core::delta::cosine;
use atoll_core::rng::Rng;

use crate::{Figures, median};

pub(crate) fn run(quick: bool) -> Result<Figures> {
    let count = if quick { 1 << 20 } else { 1 << 23 };
    let mut rng = Rng::new(1);
    let values: Vec<f32> = (0..count).map(|_| (rng.normal() * 1e-3) as f32).collect();
    let gigabytes = (count * 4) as f64 / 1e9;
    println!("{count} normal weights, one thread, median of 5\n");
    println!("codec     bits/weight   encode GB/s   decode GB/s   cosine");
    let mut figures = Figures::new();
    for codec in Codec::ALL {
        let (mut encode, mut decoded) = (Vec::new(), Vec::new());
        let (mut payload, mut back) = (Vec::new(), Vec::new());
        for _ in 0..5 {
            let began = Instant::now();
            payload = codec.encode(&values)?;
            encode.push(gigabytes / began.elapsed().as_secs_f64());
            let began = Instant::now();
            back = decode(&payload, count)?;
            decoded.push(gigabytes / began.elapsed().as_secs_f64());
        }
        let bits = payload.len() as f64 * 8.0 / count as f64;
        let (encode, decoded) = (median(encode), median(decoded));
        let name = format!("{codec:?}").to_lowercase();
        println!("{name:9} {bits:11.3}   {encode:11.2}   {decoded:11.2}   {:.4}", cosine(&values, &back));
        figures.insert(format!("{name}_bits_per_weight"), bits);
        figures.insert(format!("{name}_encode_gb_per_second"), encode);
        figures.insert(format!("{name}_decode_gb_per_second"), decoded);
    }
    Ok(figures)
}
