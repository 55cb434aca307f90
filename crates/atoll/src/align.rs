//! `atoll align`: whether a model in Python computes what the native engine computes. Both are run by `python -m atoll.align`,
//! which gets the run's shape on its standard input; its exit says the verdict.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, anyhow};
use atoll_node::coordinator::Prepared;
use atoll_node::run::RunDir;

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The run folder.
    dir: PathBuf,
    /// A function from the model's shape, a dict, to a PyTorch module; or an atoll.TorchEngine.
    #[arg(long, value_name = "MODULE:FUNCTION", default_value = "atoll:Llama")]
    python: String,
    /// The device that it computes on.
    #[arg(long, default_value = "cpu")]
    device: String,
    /// What it computes in: fp32, bf16 or fp16. The native engine always computes in fp32 here.
    #[arg(long, default_value = "fp32")]
    precision: String,
    /// Training steps whose losses are compared.
    #[arg(long, default_value_t = 10)]
    steps: u32,
    /// The Python that has PyTorch and atoll; without it $PYTHON, or python3.
    #[arg(long, value_name = "PATH")]
    interpreter: Option<PathBuf>,
}

pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    let prepared = Prepared::read(&RunDir(arguments.dir.clone()))?;
    let said = serde_json::json!({
        "name": arguments.python,
        "model": prepared.model,
        "training": prepared.config.training,
        "fragments": prepared.config.sync.fragments,
    });
    let named = arguments.interpreter.clone().or_else(|| std::env::var_os("PYTHON").map(PathBuf::from));
    let program = named.unwrap_or_else(|| PathBuf::from("python3"));
    let interpreter = program.display();
    let mut python = Command::new(&program)
        .args(["-m", "atoll.align", "--python", &arguments.python, "--device", &arguments.device])
        .args(["--precision", &arguments.precision, "--steps", &arguments.steps.to_string()])
        .stdin(Stdio::piped())
        .spawn()
        .with_context(|| {
            format!("{interpreter} cannot be started\nhint: name a Python with --interpreter or in $PYTHON")
        })?;
    let told = python.stdin.take().expect("its standard input is a pipe").write_all(said.to_string().as_bytes());
    let verdict = python.wait()?;
    match verdict.code() {
        Some(0) => Ok(ExitCode::SUCCESS),
        Some(1) => Ok(ExitCode::FAILURE),
        _ => Err(told.err().map_or_else(|| anyhow!("no verdict"), anyhow::Error::from).context(format!(
            "{interpreter} could not compare the engines: {verdict}\nhint: it needs torch and atoll (`pip install ./python`); what it said is above"
        ))),
    }
}
