//! How fast tokens come out, one text at a time: Atoll's generator beside llama.cpp with the same weights.
//!
//! In every round each says [`TOKENS`] tokens after an empty context. Atoll's time includes choosing the
//! likeliest token; `llama-bench` does not choose, it goes on with a random one.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde_json::Value;
use tempfile::TempDir;

use super::gguf::{self, Storage};
use super::others::{Look, Others};
use super::spec::{self, Number, Spec, Work};
use super::{Missing, PAUSE, time_is_up, turns, worker};
use crate::{Arguments, Figures, median, quantile};

const PRESET: &str = "mini";
const THREADS: usize = 2;
const TOKENS: usize = 128;
const ATOLL: &str = "Atoll";
const LLAMA_CPP: &str = "llama.cpp";

/// Somebody who speaks.
struct Voice {
    who: &'static str,
    storage: Storage,
    /// Says some tokens; returns how many came per second.
    say: Box<dyn FnMut() -> Result<f64>>,
    /// Whose number is known: one that lives through all rounds.
    process: Option<u32>,
    /// Round by round.
    tokens_per_second: Vec<f64>,
}

pub(crate) fn run(arguments: &Arguments, missing: &mut Missing) -> Result<Figures> {
    let (rounds, seconds_max) = if arguments.quick { (7, 15) } else { (21, 300) };
    let began = Instant::now();
    let llama = Llama::find(&arguments.llama_bench).map_err(|error| missing.add(format!("llama.cpp. {error:#}"))).ok();
    let mut voices = vec![atoll(Number::Fp32, Storage::Fp32)?, atoll(Number::Bf16, Storage::Bf16)?];
    if let Some(llama) = &llama {
        voices.extend(llama.voices()?);
    }
    let mut others = Others::default();
    for round in 0..rounds {
        if time_is_up(round, began, seconds_max) {
            break;
        }
        take_turns(round, &mut voices, &mut others, missing)?;
    }
    print(&voices, others);
    let mut figures = figures(&voices);
    figures.extend(others.share().map(|share| ("generate_others_processor_share".to_string(), share)));
    Ok(figures)
}

/// Each speaks once. Who fails is not asked again.
fn take_turns(round: usize, voices: &mut Vec<Voice>, others: &mut Others, missing: &mut Missing) -> Result<()> {
    let mut failed = Vec::new();
    for index in turns(round, voices.len()) {
        let voice = &mut voices[index];
        sleep(PAUSE);
        let before = voice.process.and_then(Look::at);
        let said = (voice.say)();
        others.add(before.as_ref(), voice.process.and_then(Look::at).as_ref());
        match said {
            Ok(speed) => voice.tokens_per_second.push(speed),
            Err(error) if voice.who == ATOLL => return Err(error.context("Atoll's generator")),
            Err(error) => failed.push((index, error)),
        }
    }
    failed.sort_by_key(|(index, _)| std::cmp::Reverse(*index));
    for (index, error) in failed {
        let voice = voices.remove(index);
        missing.add(format!("{} {}. {error:#}", voice.who, voice.storage.name()));
    }
    Ok(())
}

fn atoll(number: Number, storage: Storage) -> Result<Voice> {
    let mut side = worker::start(&Spec::new(Work::Generate, PRESET, number, THREADS)?)?;
    side.ask(TOKENS)?;
    let process = Some(side.process());
    let say = move || Ok(TOKENS as f64 / side.ask(TOKENS)?.seconds);
    Ok(Voice { who: ATOLL, storage, say: Box::new(say), process, tokens_per_second: Vec::new() })
}

/// `llama-bench` and the model in its format.
struct Llama {
    program: PathBuf,
    /// One file for each storage; it lasts as long as this.
    folder: TempDir,
}

impl Llama {
    fn find(program: &Path) -> Result<Self> {
        let hint = "hint: build llama.cpp's llama-bench and name it with --llama-bench PATH";
        let asked = Command::new(program).arg("--help").stdout(Stdio::null()).stderr(Stdio::null()).status();
        let status = asked.with_context(|| format!("{} cannot start; {hint}", program.display()))?;
        if !status.success() {
            bail!("{} --help fails; {hint}", program.display());
        }
        Ok(Self { program: program.to_path_buf(), folder: tempfile::tempdir()? })
    }
    /// One for each way to store weights: f16 is what processors without bf16 arithmetic like best.
    fn voices(&self) -> Result<Vec<Voice>> {
        let model = spec::model(PRESET)?;
        let weights = model.initial_weights(1);
        let mut voices = Vec::new();
        for storage in [Storage::Fp32, Storage::Bf16, Storage::F16] {
            let file = self.folder.path().join(format!("{}.gguf", storage.name()));
            gguf::write(&file, &model, &weights, storage)?;
            let program = self.program.clone();
            let say = move || speak(&program, &file);
            voices.push(Voice {
                who: LLAMA_CPP,
                storage,
                say: Box::new(say),
                process: None,
                tokens_per_second: Vec::new(),
            });
        }
        Ok(voices)
    }
}

/// Runs `llama-bench` once; it warms up before it measures.
fn speak(program: &Path, file: &Path) -> Result<f64> {
    let (tokens, threads) = (TOKENS.to_string(), THREADS.to_string());
    let mut command = Command::new(program);
    command.args(["-p", "0", "-n", &tokens, "-t", &threads, "-r", "1", "-ngl", "0", "-o", "json", "-m"]).arg(file);
    let output = command.output()?;
    if !output.status.success() {
        let complaints = String::from_utf8_lossy(&output.stderr).into_owned();
        bail!("llama-bench failed: {}", complaints.trim().lines().last().unwrap_or("it did not say why"));
    }
    tokens_per_second(&String::from_utf8_lossy(&output.stdout))
}

/// What `llama-bench -o json` measured for generation.
fn tokens_per_second(json: &str) -> Result<f64> {
    let tests: Vec<Value> = serde_json::from_str(json).context("llama-bench did not answer in JSON")?;
    let test = tests.iter().find(|test| test["n_gen"] == TOKENS && test["n_prompt"] == 0);
    let speed = test.and_then(|test| test["avg_ts"].as_f64()).filter(|&speed| speed.is_finite() && speed > 0.0);
    speed.context("llama-bench measured no generation")
}

fn print(voices: &[Voice], others: Others) {
    let rounds = voices.first().map_or(0, |voice| voice.tokens_per_second.len());
    println!("\nGeneration: {PRESET}, threads: {THREADS}, one text, {TOKENS} tokens, rounds: {rounds}");
    others.print();
    println!("numbers   who         tokens/s   (quartiles)     Atoll is");
    for voice in voices {
        let [low, middle, high] = [0.25, 0.5, 0.75].map(|share| quantile(voice.tokens_per_second.clone(), share));
        let quartiles = format!("({low:.0} – {high:.0})");
        let against = match rival(voices, voice) {
            Some(atoll) => format!("× {:.2}", atoll.speed_over(voice)),
            None => String::new(),
        };
        let (numbers, who) = (voice.storage.name(), voice.who);
        println!("{}", format!("{numbers:7}   {who:9} {middle:10.0}   {quartiles:15} {against}").trim_end());
    }
}

/// Atoll with the same numbers; against f16, which it has not, with bf16.
fn rival<'a>(voices: &'a [Voice], voice: &Voice) -> Option<&'a Voice> {
    let storage = if voice.storage == Storage::F16 { Storage::Bf16 } else { voice.storage };
    let rival = voices.iter().find(|rival| rival.who == ATOLL && rival.storage == storage);
    rival.filter(|_| voice.who != ATOLL)
}

impl Voice {
    /// How many times as fast as `other`: the median of the rounds' ratios.
    fn speed_over(&self, other: &Self) -> f64 {
        median(
            self.tokens_per_second.iter().zip(&other.tokens_per_second).map(|(ours, theirs)| ours / theirs).collect(),
        )
    }
}

fn figures(voices: &[Voice]) -> Figures {
    let mut figures = Figures::new();
    for voice in voices {
        let numbers = voice.storage.name();
        let who = if voice.who == ATOLL { "atoll" } else { "llama_cpp" };
        let speed = median(voice.tokens_per_second.clone());
        figures.insert(format!("generate_{numbers}_{who}_tokens_per_second"), speed);
        if let Some(atoll) = rival(voices, voice) {
            figures.insert(format!("generate_vs_llama_cpp_{numbers}"), atoll.speed_over(voice));
        }
    }
    figures
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llama_benchs_answer_is_understood() {
        // As llama-bench prints it, with fewer fields.
        let answer = r#"[
          { "backends": "CPU", "model_type": "llama ?B BF16", "n_threads": 2, "n_prompt": 512, "n_gen": 0,
            "avg_ts": 7100.002165, "stddev_ts": 140.341520, "samples_ts": [ 7100.002165 ] },
          { "backends": "CPU", "model_type": "llama ?B BF16", "n_threads": 2, "n_prompt": 0, "n_gen": 128,
            "avg_ns": 1076767880, "avg_ts": 118.881588, "stddev_ts": 1.041811, "samples_ts": [ 118.881588 ] }
        ]"#;
        assert_eq!(tokens_per_second(answer).unwrap(), 118.881588);
        assert!(tokens_per_second("[]").unwrap_err().to_string().contains("no generation"));
        assert!(tokens_per_second("error: no model").is_err());
    }
}
