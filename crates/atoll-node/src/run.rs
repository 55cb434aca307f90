//! The run folder, and `run.toml`: what the operator decides about a run.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use atoll_core::manifest::Manifest;
use atoll_core::model::{ModelConfig, PRESETS};
use atoll_core::outer::Robust;
use atoll_core::round::{Goal, Sync};
use atoll_core::training::Training;
use serde::{Deserialize, Serialize};

use crate::data::file;

/// Everything that `run.toml` says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RunConfig {
    /// Name of the run.
    pub name: String,
    /// Seed of first weights and sample order.
    pub seed: u64,
    /// What becomes of a site whose engine does not compute what the native engine does.
    pub align: Align,
    /// The model.
    pub model: ModelSection,
    /// Batch, context, inner optimizer.
    pub training: Training,
    /// Rounds and outer step.
    pub sync: Sync,
    /// When the run is done.
    pub goal: Goal,
    /// How text becomes tokens.
    pub data: DataSection,
    /// The coordinator's housekeeping.
    pub coordinator: CoordinatorSection,
}

impl Default for RunConfig {
    fn default() -> Self {
        Self {
            name: "run".to_string(),
            seed: 1,
            align: Align::Warn,
            model: ModelSection::default(),
            training: Training::default(),
            sync: Sync::default(),
            goal: Goal { tokens: Some(100_000_000), minutes: None },
            data: DataSection::default(),
            coordinator: CoordinatorSection::default(),
        }
    }
}

/// What becomes of a site whose engine does not compute what the native engine does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Align {
    /// It says so, and takes part.
    Warn,
    /// It does not take part.
    Refuse,
}

/// The `[model]` table: a preset, and whatever is to be different from it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[expect(missing_docs, reason = "the fields are those of ModelConfig")]
pub struct ModelSection {
    pub preset: String,
    /// If it is more than the tokenizer's, as in models that others began.
    pub vocab_size: Option<usize>,
    pub hidden_size: Option<usize>,
    pub intermediate_size: Option<usize>,
    pub num_hidden_layers: Option<usize>,
    pub num_attention_heads: Option<usize>,
    pub num_key_value_heads: Option<usize>,
    pub head_dim: Option<usize>,
    pub max_position_embeddings: Option<usize>,
    pub rope_theta: Option<f32>,
    pub rms_norm_eps: Option<f32>,
    pub tie_word_embeddings: Option<bool>,
}

impl Default for ModelSection {
    fn default() -> Self {
        Self {
            preset: "micro".to_string(),
            vocab_size: None,
            hidden_size: None,
            intermediate_size: None,
            num_hidden_layers: None,
            num_attention_heads: None,
            num_key_value_heads: None,
            head_dim: None,
            max_position_embeddings: None,
            rope_theta: None,
            rms_norm_eps: None,
            tie_word_embeddings: None,
        }
    }
}

impl ModelSection {
    /// The table that says every size of `model`.
    pub fn of(model: &ModelConfig) -> Self {
        Self {
            vocab_size: Some(model.vocab_size),
            hidden_size: Some(model.hidden_size),
            intermediate_size: Some(model.intermediate_size),
            num_hidden_layers: Some(model.num_hidden_layers),
            num_attention_heads: Some(model.num_attention_heads),
            num_key_value_heads: Some(model.num_key_value_heads),
            head_dim: Some(model.head_dim),
            max_position_embeddings: Some(model.max_position_embeddings),
            rope_theta: Some(model.rope_theta),
            rms_norm_eps: Some(model.rms_norm_eps),
            tie_word_embeddings: Some(model.tie_word_embeddings),
            ..Self::default()
        }
    }

    /// The model for a vocabulary and a context, or every reason why there is none.
    ///
    /// # Errors
    /// The reasons.
    pub fn resolve(&self, vocab_size: usize, context: usize) -> Result<ModelConfig, Vec<String>> {
        let Some(mut model) = ModelConfig::preset(&self.preset, vocab_size, context) else {
            let names: Vec<&str> = PRESETS.iter().map(|(name, _)| *name).collect();
            return Err(vec![format!("model.preset = \"{}\" is none of {}", self.preset, names.join(", "))]);
        };
        fn set<T: Copy>(field: &mut T, wish: Option<T>) {
            *field = wish.unwrap_or(*field);
        }
        set(&mut model.vocab_size, self.vocab_size);
        set(&mut model.max_position_embeddings, self.max_position_embeddings);
        set(&mut model.hidden_size, self.hidden_size);
        set(&mut model.intermediate_size, self.intermediate_size);
        set(&mut model.num_hidden_layers, self.num_hidden_layers);
        set(&mut model.num_attention_heads, self.num_attention_heads);
        set(&mut model.num_key_value_heads, self.num_key_value_heads);
        set(&mut model.head_dim, self.head_dim);
        set(&mut model.rope_theta, self.rope_theta);
        set(&mut model.rms_norm_eps, self.rms_norm_eps);
        set(&mut model.tie_word_embeddings, self.tie_word_embeddings);
        let mut problems = model.problems();
        for (name, least, wish) in [
            ("vocab_size", vocab_size, self.vocab_size),
            ("max_position_embeddings", context, self.max_position_embeddings),
        ] {
            if let Some(wish) = wish.filter(|&wish| wish < least) {
                let needs = if name == "vocab_size" { "the tokenizer has" } else { "training.context is" };
                problems.push(format!("model.{name} = {wish} is too small: {needs} {least}"));
            }
        }
        if problems.is_empty() { Ok(model) } else { Err(problems) }
    }
}

/// The `[data]` table.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DataSection {
    /// Share of the documents that is never trained on.
    pub held_out: f64,
    /// Field or column that holds the text in .jsonl and .parquet files.
    pub text_field: String,
}

impl Default for DataSection {
    fn default() -> Self {
        Self { held_out: 0.02, text_field: "text".to_string() }
    }
}

/// The `[coordinator]` table.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CoordinatorSection {
    /// Address that tickets name, if it is not the one listened on: `host:port`.
    pub advertise: Option<String>,
    /// The object store that a standby follows: a folder, or `s3://bucket/prefix?…`, `obs://`, `oss://`, `cos://`.
    pub store: Option<String>,
    /// Text like the sites', a path in the run folder or a whole one: contributions are tried on what of it is held out,
    /// now and then, and whoever keeps doing harm loses its weight.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trial_text: Option<PathBuf>,
    /// Seconds between two snapshots.
    pub snapshot_seconds: f64,
    /// Snapshots kept.
    pub snapshots: usize,
    /// Which contributions are kept so that commits can be computed again.
    pub keep: Keep,
}

impl Default for CoordinatorSection {
    fn default() -> Self {
        Self {
            advertise: None,
            store: None,
            trial_text: None,
            snapshot_seconds: 60.0,
            snapshots: 2,
            keep: Keep::Snapshots,
        }
    }
}

/// Which payloads are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Keep {
    /// Those since the oldest snapshot kept.
    Snapshots,
    /// All, so that the run can be replayed from its first commit.
    All,
}

impl RunConfig {
    /// Reads `run.toml`.
    ///
    /// # Errors
    /// If it cannot be read, is no TOML or says something unknown.
    pub fn load(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path)
            .with_context(|| format!("{} cannot be read\nhint: `atoll new DIR` makes a run folder", path.display()))?;
        toml::from_str(&text).map_err(|error| {
            anyhow::anyhow!("{} is malformed: {error}\nhint: `atoll new` writes a commented example", path.display())
        })
    }

    /// Every problem that can be seen without looking at a tokenizer's size.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = [self.sync.problems(), self.training.problems()].concat();
        match self.model.resolve(self.model.vocab_size.unwrap_or(1 << 12), self.training.context) {
            Ok(model) if problems.is_empty() => problems.extend(self.fragment_problem(&model)),
            Ok(_) => {}
            Err(more) => problems.extend(more),
        }
        if self.goal.tokens.is_none() && self.goal.minutes.is_none() {
            problems.push("goal: neither tokens nor minutes is set, so the run would never end".to_string());
        }
        if self.goal.minutes.is_some_and(|minutes| !(minutes.is_finite() && minutes > 0.0)) {
            problems.push("goal.minutes must be positive".to_string());
        }
        if self.goal.tokens == Some(0) {
            problems.push("goal.tokens must be positive".to_string());
        }
        if !(self.data.held_out > 0.0 && self.data.held_out < 1.0) {
            problems.push(format!("data.held_out = {} must be above 0 and below 1", self.data.held_out));
        }
        let seconds = self.coordinator.snapshot_seconds;
        if !(seconds.is_finite() && seconds > 0.0) {
            problems.push(format!("coordinator.snapshot_seconds = {seconds} must be positive"));
        }
        if self.coordinator.trial_text.is_some() && self.sync.robust != Robust::Guard {
            problems
                .push("coordinator.trial_text needs sync.robust = \"guard\": nothing else heeds trials".to_string());
        }
        if self.coordinator.snapshots == 0 {
            problems.push("coordinator.snapshots must be at least 1".to_string());
        }
        problems
    }

    /// Why fragments of `model` cannot be written for the wire, if they cannot.
    fn fragment_problem(&self, model: &ModelConfig) -> Option<String> {
        let manifest = self.manifest(model);
        let largest = manifest.fragments().filter_map(|fragment| manifest.fragment_len(fragment)).max()?;
        (largest > u32::MAX as usize).then(|| {
            format!(
                "sync.fragments = {} leaves {largest} weights to one fragment, {} is the most",
                self.sync.fragments,
                u32::MAX
            )
        })
    }

    /// Where the text for trials is, if there are to be any.
    ///
    /// # Errors
    /// If there is nothing.
    pub fn trial_text(&self, dir: &RunDir) -> Result<Option<PathBuf>> {
        let Some(text) = self.coordinator.trial_text.as_ref().map(|text| dir.0.join(text)) else { return Ok(None) };
        if !text.exists() {
            bail!(
                "coordinator.trial_text names {}, and there is nothing\nhint: a file or folder of text like the sites', or leave it out",
                text.display()
            );
        }
        Ok(Some(text))
    }

    /// The manifest of `model` under this configuration.
    pub fn manifest(&self, model: &ModelConfig) -> Manifest {
        Manifest::balanced(model.tensors(), self.sync.fragments)
    }
}

/// What a site is told of the run: its configuration and the model that follows from it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Terms {
    /// The configuration.
    pub config: RunConfig,
    /// The model, with the tokenizer's vocabulary.
    pub model: ModelConfig,
}

impl Terms {
    /// What concerns sites of `config`.
    pub fn of(config: &RunConfig, model: &ModelConfig) -> Self {
        let mut config = config.clone();
        // Nobody's business but the coordinators'.
        (config.coordinator.store, config.coordinator.trial_text) = (None, None);
        Self { config, model: model.clone() }
    }

    /// Reads what a coordinator says of its run, and finds everything that a site could not work with.
    ///
    /// # Errors
    /// If it is not understood, or describes no run.
    pub fn read(json: &str) -> Result<Self> {
        let terms: Self = serde_json::from_str(json).map_err(|error| {
            anyhow::anyhow!(
                "the run's terms are not understood: {error}\nhint: site and coordinator need the same version of Atoll"
            )
        })?;
        let problems = [terms.config.problems(), terms.model.problems()].concat();
        if !problems.is_empty() {
            bail!("the run's terms describe no run: {}\nhint: tell its operator", problems.join("; "));
        }
        Ok(terms)
    }
}

/// The folder of a run at its coordinator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunDir(pub PathBuf);

#[expect(missing_docs, reason = "each method names the file it names")]
impl RunDir {
    pub fn config(&self) -> PathBuf {
        self.0.join("run.toml")
    }

    pub fn key(&self) -> PathBuf {
        self.0.join("coordinator.key")
    }

    pub fn next_key(&self) -> PathBuf {
        self.0.join("coordinator.key.next")
    }

    pub fn tokenizer(&self) -> PathBuf {
        self.0.join("tokenizer.json")
    }

    pub fn first(&self) -> PathBuf {
        self.0.join("first")
    }

    pub fn acts(&self) -> PathBuf {
        self.0.join("acts")
    }

    pub fn journal(&self) -> PathBuf {
        self.0.join("journal.jsonl")
    }

    pub fn payloads(&self) -> PathBuf {
        self.0.join("payloads")
    }

    pub fn snapshots(&self) -> PathBuf {
        self.0.join("snapshots")
    }

    pub fn model(&self) -> PathBuf {
        self.0.join("model")
    }

    pub fn trials(&self) -> PathBuf {
        self.0.join("trials")
    }

    pub fn status(&self) -> PathBuf {
        self.0.join("status.json")
    }

    pub fn report(&self) -> PathBuf {
        self.0.join("report.json")
    }

    pub fn events(&self) -> PathBuf {
        self.0.join("events.jsonl")
    }

    pub fn lock(&self) -> PathBuf {
        self.0.join(".lock")
    }

    /// Keeps every other process from working on this folder until the file is dropped.
    ///
    /// # Errors
    /// If another process holds it.
    pub fn hold(&self) -> Result<fs::File> {
        let path = self.lock();
        let file = fs::File::create(&path).with_context(|| format!("{} cannot be written", path.display()))?;
        match file.try_lock() {
            Ok(()) => Ok(file),
            Err(fs::TryLockError::WouldBlock) => bail!(
                "{} is in use by another process\nhint: `atoll status {}` shows it; stop it first",
                self.0.display(),
                self.0.display()
            ),
            Err(fs::TryLockError::Error(error)) => {
                Err(error).with_context(|| format!("{} cannot be locked", path.display()))
            }
        }
    }
}

/// Writes a file so that it is either the old one or the whole new one, whatever happens.
///
/// # Errors
/// If the disk does not take it.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    file::write(path, bytes).with_context(|| {
        format!("{} cannot be written\nhint: is the disk full, or the folder read-only?", path.display())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use atoll_core::training::{Muon, Packing};

    #[test]
    fn the_defaults_have_no_problem_and_survive_toml() {
        let config = RunConfig::default();
        assert_eq!(config.problems(), Vec::<String>::new());
        let text = toml::to_string(&config).unwrap();
        assert_eq!(toml::from_str::<RunConfig>(&text).unwrap(), config);
    }

    #[test]
    fn muon_and_packing_survive_toml() {
        let text = "[training]\npacking = 'documents'\n[training.muon]\nmomentum = 0.9\n";
        let config: RunConfig = toml::from_str(text).unwrap();
        assert_eq!(config.training.packing, Packing::Documents);
        assert_eq!(config.training.muon, Some(Muon { momentum: 0.9, ..Muon::default() }));
        assert_eq!(config.problems(), Vec::<String>::new());
        assert_eq!(toml::from_str::<RunConfig>(&toml::to_string(&config).unwrap()).unwrap(), config);
        assert!(toml::from_str::<RunConfig>("[training.muon]\nmomentun = 0.9\n").is_err());
    }

    #[test]
    fn all_problems_come_at_once() {
        let text = "[model]\npreset = 'huge'\n[sync]\nsteps = 0\nfragments = 0\n[goal]\nminutes = -1.0\n";
        let config: RunConfig = toml::from_str(text).unwrap();
        assert_eq!(config.problems().len(), 4, "{:?}", config.problems());
    }

    #[test]
    fn a_model_that_others_began_keeps_its_sizes() {
        let model = ModelConfig { vocab_size: 4000, ..ModelConfig::preset("nano", 300, 512).unwrap() };
        let section = ModelSection::of(&model);
        assert_eq!(section.resolve(300, 64).unwrap(), model);
        assert_eq!(section.resolve(4001, 1024).unwrap_err().len(), 2);
        assert_eq!(toml::from_str::<ModelSection>(&toml::to_string(&section).unwrap()).unwrap(), section);
    }

    #[test]
    fn a_preset_can_be_changed_in_part() {
        let section = ModelSection { num_hidden_layers: Some(2), ..ModelSection::default() };
        let model = section.resolve(1000, 64).unwrap();
        assert_eq!((model.num_hidden_layers, model.hidden_size, model.vocab_size), (2, 256, 1000));
    }
}
