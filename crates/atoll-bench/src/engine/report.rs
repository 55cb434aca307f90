//! From seconds to what a reader sees and a script keeps: a table for each shape, figures with stable names.
//!
//! A figure of `mini` on 2 threads, the shape that the goals name, has no prefix: `fp32_vs_torch_eager`. The
//! others say whose they are: `small_2_threads_fp32_vs_torch_eager`, `micro_threads_2_vs_1`.

use std::time::{Duration, Instant};

use anyhow::Result;
use atoll_core::model::ModelConfig;

use super::others::Others;
use super::side::Answer;
use super::spec::{self, Cell, Contender, LENGTH, Number, ROWS, VOCABULARY};
use super::torch::Torch;
use crate::{Figures, median, quantile};

/// How long the peak is measured in each round.
const PEAK_TIME: Duration = Duration::from_millis(200);

const MEBIBYTE: f64 = 1_048_576.0;

/// What the rounds told of one cell.
pub(crate) struct Measured {
    pub(crate) cell: Cell,
    /// Of one step, round by round.
    pub(crate) seconds: Vec<f64>,
    pub(crate) peak_bytes: Option<f64>,
    pub(crate) loss: Option<f64>,
}

/// What the processor did at most in fused multiply-adds, round by round.
pub(crate) struct Ceiling {
    pub(crate) number: Number,
    pub(crate) threads: usize,
    pub(crate) flops: Vec<f64>,
}

/// All of one shape.
pub(crate) struct Results {
    pub(crate) preset: &'static str,
    pub(crate) model: ModelConfig,
    pub(crate) cells: Vec<Measured>,
    pub(crate) ceilings: Vec<Ceiling>,
    pub(crate) others: Others,
}

/// What is compared, and how.
pub(crate) fn introduce(torch: Option<&Torch>) {
    let torch = torch.map_or_else(|| "no PyTorch".to_string(), |torch| format!("PyTorch {}", torch.version));
    println!("Training: Atoll's CPU engine beside {torch}; a Llama, vocabulary {VOCABULARY}, batch {ROWS} × {LENGTH}.");
    println!("All contenders of a shape take turns of one step; each is a process of its own.");
    println!("tokens/s: median and quartiles of the rounds. Atoll is: median of the rounds' ratios.");
    println!("FLOP per token = 6 · parameters + 12 · layers · heads · head_dim · {LENGTH}/2 (causal attention).");
    println!(
        "Share: of the peak of fused multiply-adds on what the first cache holds, same numbers and threads, round by round;"
    );
    println!("none: the peak was passed, so somebody had disturbed it.");
}

impl Measured {
    pub(crate) fn new(cell: Cell) -> Self {
        Self { cell, seconds: Vec::new(), peak_bytes: None, loss: None }
    }

    pub(crate) fn add(&mut self, answer: &Answer) {
        self.seconds.push(answer.seconds);
        self.peak_bytes = answer.peak_bytes;
        self.loss = answer.loss;
    }

    /// Below which this share of the rounds' speeds lies.
    fn tokens_per_second(&self, share: f64) -> f64 {
        quantile(self.seconds.iter().map(|seconds| (ROWS * LENGTH) as f64 / seconds).collect(), share)
    }

    /// How many times as fast as `other`.
    fn speed_over(&self, other: &Self) -> f64 {
        median(other.seconds.iter().zip(&self.seconds).map(|(theirs, ours)| theirs / ours).collect())
    }

    fn memory_over(&self, other: &Self) -> Option<f64> {
        Some(self.peak_bytes? / other.peak_bytes?)
    }
}

impl Ceiling {
    pub(crate) fn new(number: Number, threads: usize) -> Self {
        Self { number, threads, flops: Vec::new() }
    }

    /// For some time, so that it meets whoever else is on the machine as a step does.
    pub(crate) fn measure(&mut self) {
        let began = Instant::now();
        let mut burst_flops = Vec::new();
        while began.elapsed() < PEAK_TIME {
            burst_flops.push(atoll_cpu::peak(self.number.precision(), self.threads));
        }
        self.flops.push(mean(&burst_flops));
    }
}

impl Results {
    pub(crate) fn new(
        preset: &'static str,
        cells: Vec<Measured>,
        ceilings: Vec<Ceiling>,
        others: Others,
    ) -> Result<Self> {
        Ok(Self { preset, model: spec::model(preset)?, cells, ceilings, others })
    }

    fn find(&self, contender: Contender, number: Number, threads: usize) -> Option<&Measured> {
        self.cells.iter().find(|measured| {
            let Cell { contender: c, number: n, threads: t, .. } = measured.cell;
            (c, n, t) == (contender, number, threads)
        })
    }

    /// Of the peak of its numbers and threads, in the same round. A peak that somebody passed is none.
    fn share(&self, measured: &Measured) -> Option<f64> {
        let Cell { number, threads, .. } = measured.cell;
        let ceiling = self.ceilings.iter().find(|ceiling| (ceiling.number, ceiling.threads) == (number, threads))?;
        let flop = self.model.flop_per_token(LENGTH) * (ROWS * LENGTH) as f64;
        let rounds = measured.seconds.iter().zip(&ceiling.flops);
        Some(median(rounds.map(|(seconds, peak)| flop / seconds / peak).collect())).filter(|&share| share <= 1.0)
    }

    pub(crate) fn print(&self) {
        let rounds = self.cells.first().map_or(0, |measured| measured.seconds.len());
        let millions = self.model.parameters() as f64 / 1e6;
        println!("\n{}: {millions:.1} M parameters, rounds: {rounds}", self.preset);
        for Ceiling { number, threads, flops } in &self.ceilings {
            let gflops = median(flops.clone()) / 1e9;
            println!("peak, {}, threads: {threads}: {gflops:.0} GFLOP/s", number.name());
        }
        self.others.print();
        println!(
            "threads   numbers   who                tokens/s   (quartiles)       peak MiB   share    loss   Atoll is"
        );
        self.cells.iter().for_each(|measured| self.print_row(measured));
    }

    fn print_row(&self, measured: &Measured) {
        let Cell { threads, number, contender, .. } = measured.cell;
        let [low, middle, high] = [0.25, 0.5, 0.75].map(|share| measured.tokens_per_second(share));
        let quartiles = format!("({low:.0} – {high:.0})");
        let memory = measured.peak_bytes.map_or_else(|| "?".to_string(), |bytes| format!("{:.0}", bytes / MEBIBYTE));
        let share = self.share(measured).map_or_else(|| "none".to_string(), |share| format!("{:.1} %", share * 100.0));
        let loss = measured.loss.map_or_else(|| "?".to_string(), |loss| format!("{loss:.2}"));
        let against = match self.find(Contender::Atoll, number, threads) {
            Some(atoll) if contender != Contender::Atoll => format!("× {:.2}", atoll.speed_over(measured)),
            _ => String::new(),
        };
        let row = format!(
            "{threads:>7}   {:7}   {:16} {middle:10.0}   {quartiles:16} {memory:>9}   {share:>6}   {loss:>5}   {against}",
            number.name(),
            contender.title()
        );
        println!("{}", row.trim_end());
    }

    pub(crate) fn figures(&self) -> Figures {
        let mut figures = Figures::new();
        let mut threads: Vec<usize> = self.ceilings.iter().map(|ceiling| ceiling.threads).collect();
        threads.dedup();
        for threads in threads {
            for number in Number::BOTH {
                self.add_comparisons(&mut figures, number, threads);
            }
        }
        self.add_scaling(&mut figures);
        figures.extend(self.others.share().map(|share| (self.others_name(), share)));
        self.cells.iter().for_each(|measured| self.add_cell(&mut figures, measured));
        figures
    }

    /// Atoll against the others, and against the processor.
    fn add_comparisons(&self, figures: &mut Figures, number: Number, threads: usize) {
        let Some(atoll) = self.find(Contender::Atoll, number, threads) else { return };
        let prefix = self.prefix(threads);
        let name = number.name();
        for contender in [Contender::Eager, Contender::Compiled] {
            if let Some(other) = self.find(contender, number, threads) {
                figures.insert(format!("{prefix}{name}_vs_{}", contender.name()), atoll.speed_over(other));
            }
        }
        if let Some(share) = self.share(atoll) {
            figures.insert(format!("{prefix}fma_peak_share_{name}"), share);
        }
        let eager = self.find(Contender::Eager, number, threads);
        if let Some(ratio) = eager.and_then(|eager| atoll.memory_over(eager)) {
            figures.insert(format!("{prefix}memory_vs_torch{}", suffix(number)), ratio);
        }
    }

    /// What a second thread brings to Atoll.
    fn add_scaling(&self, figures: &mut Figures) {
        let prefix = if self.preset == "mini" { String::new() } else { format!("{}_", self.preset) };
        for number in Number::BOTH {
            let of = |threads| self.find(Contender::Atoll, number, threads);
            if let (Some(two), Some(one)) = (of(2), of(1)) {
                figures.insert(format!("{prefix}threads_2_vs_1{}", suffix(number)), two.speed_over(one));
            }
        }
    }

    fn add_cell(&self, figures: &mut Figures, measured: &Measured) {
        let Cell { preset, threads, number, contender } = measured.cell;
        let name = format!("{preset}_{threads}_threads_{}_{}", number.name(), contender.name());
        figures.insert(format!("{name}_tokens_per_second"), measured.tokens_per_second(0.5));
        if let Some(bytes) = measured.peak_bytes {
            figures.insert(format!("{name}_peak_bytes"), bytes);
        }
    }

    /// `small` is measured in two parts.
    fn others_name(&self) -> String {
        let numbers: Vec<&str> = Number::BOTH
            .into_iter()
            .filter(|&number| self.ceilings.iter().any(|ceiling| ceiling.number == number))
            .map(Number::name)
            .collect();
        format!("{}_{}_others_processor_share", self.preset, numbers.join("_"))
    }

    fn prefix(&self, threads: usize) -> String {
        let named_by_the_goals = (self.preset, threads) == ("mini", 2);
        if named_by_the_goals { String::new() } else { format!("{}_{threads}_threads_", self.preset) }
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// Figures of fp32 go without saying.
fn suffix(number: Number) -> &'static str {
    match number {
        Number::Fp32 => "",
        Number::Bf16 => "_bf16",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(contender: Contender, threads: usize, seconds: &[f64], bytes: f64) -> Measured {
        let cell = Cell { preset: "mini", threads, number: Number::Fp32, contender };
        Measured { cell, seconds: seconds.to_vec(), peak_bytes: Some(bytes), loss: Some(9.0) }
    }

    fn results(cells: Vec<Measured>) -> Results {
        let ceiling = |threads| Ceiling { number: Number::Fp32, threads, flops: vec![1e12; 3] };
        Results::new("mini", cells, vec![ceiling(2), ceiling(1)], Others::default()).unwrap()
    }

    #[test]
    fn a_ratio_is_the_median_of_the_rounds() {
        // The machine was four times slower in the last round, for both.
        let atoll = measured(Contender::Atoll, 2, &[1.0, 1.0, 4.0], 100.0);
        let eager = measured(Contender::Eager, 2, &[1.5, 2.0, 8.0], 400.0);
        let slower = measured(Contender::Atoll, 1, &[1.8, 1.9, 7.6], 100.0);
        let figures = results(vec![atoll, eager, slower]).figures();
        assert_eq!(figures["fp32_vs_torch_eager"], 2.0);
        assert_eq!(figures["memory_vs_torch"], 0.25);
        assert_eq!(figures["threads_2_vs_1"], 1.9);
        assert_eq!(figures["mini_2_threads_fp32_atoll_tokens_per_second"], 2048.0);
        let share = 2048.0 * spec::model("mini").unwrap().flop_per_token(LENGTH) / 1e12;
        assert!((figures["fma_peak_share_fp32"] - share).abs() < 1e-12);
    }

    #[test]
    fn a_peak_that_was_passed_is_no_peak() {
        let figures = results(vec![measured(Contender::Atoll, 2, &[0.1], 100.0)]).figures();
        assert!(!figures.contains_key("fma_peak_share_fp32"), "1.6 TFLOP/s of 1");
    }

    #[test]
    fn what_was_not_measured_has_no_figure() {
        let figures = results(vec![measured(Contender::Atoll, 2, &[1.0], 100.0)]).figures();
        let names: Vec<&str> = figures.keys().map(String::as_str).collect();
        let cell = "mini_2_threads_fp32_atoll";
        assert_eq!(names, ["fma_peak_share_fp32", &format!("{cell}_peak_bytes"), &format!("{cell}_tokens_per_second")]);
    }
}
