//! PyTorch's side: `python/train.py` in a Python that has PyTorch.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

use super::side::Side;
use super::spec::Spec;

const SCRIPT: &str = include_str!("../../python/train.py");

/// A Python with PyTorch.
pub(crate) struct Torch {
    python: PathBuf,
    folder: TempDir,
    pub(crate) version: String,
}

impl Torch {
    /// Asks `python`, else `$PYTHON`, else `python3` for its PyTorch.
    pub(crate) fn find(python: Option<&Path>) -> Result<Self> {
        const HINT: &str = "hint: name a Python that has PyTorch with --python PATH";
        let usual = || env::var_os("PYTHON").map_or_else(|| PathBuf::from("python3"), PathBuf::from);
        let python = python.map_or_else(usual, Path::to_path_buf);
        let program = python.display();
        let asked = Command::new(&python).args(["-c", "import torch; print(torch.__version__)"]).output();
        let output = asked.with_context(|| format!("{program} cannot start; {HINT}"))?;
        if !output.status.success() {
            bail!("{program} cannot import torch; {HINT}");
        }
        let folder = tempfile::tempdir()?;
        fs::write(folder.path().join("train.py"), SCRIPT)?;
        let version = String::from_utf8_lossy(&output.stdout).trim().to_string();
        Ok(Self { python, folder, version })
    }

    pub(crate) fn start(&self, spec: &Spec) -> Result<Side> {
        let script = self.folder.path().join("train.py");
        Side::start(Command::new(&self.python).arg(script).arg(serde_json::to_string(spec)?))
    }
}
