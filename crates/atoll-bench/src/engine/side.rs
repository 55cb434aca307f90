//! A process that works when asked. Every line on its standard input is a number of steps; its answer is one
//! line of JSON. Between the lines it sleeps. Atoll's processes and PyTorch's speak the same words.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, anyhow};
use serde::{Deserialize, Serialize};

/// What a process says after its steps.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Answer {
    /// How long the steps took by its own clock.
    pub(crate) seconds: f64,
    /// Loss of the last step, in nats per token; generation has none.
    pub(crate) loss: Option<f64>,
    /// The most memory that it ever held, where the system tells.
    pub(crate) peak_bytes: Option<f64>,
}

/// One such process.
pub(crate) struct Side {
    child: Child,
    questions: ChildStdin,
    answers: BufReader<ChildStdout>,
    /// What it wrote to standard error: of interest only if it dies.
    complaints: File,
}

impl Side {
    pub(crate) fn start(command: &mut Command) -> Result<Self> {
        let complaints = tempfile::tempfile()?;
        let command = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(complaints.try_clone()?);
        let mut child = command.spawn().with_context(|| format!("{} cannot start", command.get_program().display()))?;
        let questions = child.stdin.take().context("a child has an input")?;
        let answers = BufReader::new(child.stdout.take().context("a child has an output")?);
        Ok(Self { child, questions, answers, complaints })
    }

    /// Its number.
    pub(crate) fn process(&self) -> u32 {
        self.child.id()
    }

    /// Lets it take `steps` steps.
    pub(crate) fn ask(&mut self, steps: usize) -> Result<Answer> {
        let mut line = String::new();
        let asked = writeln!(self.questions, "{steps}").and_then(|()| self.answers.read_line(&mut line));
        match asked {
            Ok(bytes) if bytes > 0 => serde_json::from_str(&line).with_context(|| format!("it said: {}", line.trim())),
            _ => Err(anyhow!("the process died: {}", self.last_words())),
        }
    }

    /// The end of what it complained about.
    fn last_words(&mut self) -> String {
        let mut bytes = Vec::new();
        let read = self.complaints.rewind().and_then(|()| self.complaints.read_to_end(&mut bytes));
        let text = String::from_utf8_lossy(&bytes);
        let last = text.lines().rev().find(|line| !line.trim().is_empty());
        read.ok().and(last).unwrap_or("it did not say why").to_string()
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        // It holds nothing that must be saved, and may be in the middle of a long step.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_dies_is_quoted() {
        let mut side = Side::start(Command::new("sh").args(["-c", "read line; echo no such engine >&2"])).unwrap();
        assert!(side.ask(1).unwrap_err().to_string().contains("no such engine"));
    }

    #[test]
    fn an_answer_may_lack_what_the_process_does_not_know() {
        let script = r#"read line; echo "{\"seconds\": $line.5, \"loss\": null, \"peak_bytes\": 4096}""#;
        let mut side = Side::start(Command::new("sh").args(["-c", script])).unwrap();
        assert_eq!(side.ask(3).unwrap(), Answer { seconds: 3.5, loss: None, peak_bytes: Some(4096.0) });
    }
}
