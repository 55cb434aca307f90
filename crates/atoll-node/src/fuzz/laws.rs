//! The laws of this crate's decoders. Most of them read files, so the bytes are put into one.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, Waker};

use atoll_core::codec::{Codec, check_finite};
use atoll_core::delta::residual::{self, Residual};
use atoll_core::hash::Digest;
use atoll_core::journal::{Act, Invitation, Role};
use atoll_core::manifest::Manifest;
use atoll_core::model::ModelConfig;
use atoll_core::outer::Global;
use atoll_core::site::SiteId;
use atoll_core::wire::Frame;
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};

use crate::coordinator::arriving::{Added, Arriving};
use crate::data::shards::{Shard, ShardInfo};
use crate::data::{Dataset, IngestOptions, Sample, Source, Split, TextField, Tokenizer, ingest};
use crate::identity::{Identity, Ticket};
use crate::link::read_frame;
use crate::report::Report;
use crate::run::{RunConfig, RunDir, Terms};
use crate::shared::{Beat, Shared, State};
use crate::wan::Wan;
use crate::{acts, hf, site, snapshot};

/// Shows `law` a folder with these files, which is gone afterwards.
pub(super) fn in_folder<T>(files: &[(&str, &[u8])], law: impl FnOnce(&Path) -> T) -> T {
    static FOLDERS: AtomicU64 = AtomicU64::new(0);
    struct Folder(PathBuf);
    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0); // It lies where the system sweeps.
        }
    }
    let number = FOLDERS.fetch_add(1, Ordering::Relaxed);
    let folder = Folder(std::env::temp_dir().join(format!("atoll-fuzz-{}-{number}", std::process::id())));
    fs::create_dir_all(&folder.0).expect("a folder can be made");
    for (name, bytes) in files {
        let path = folder.0.join(name);
        let parent = path.parent().unwrap_or(&folder.0);
        fs::create_dir_all(parent).and_then(|()| fs::write(&path, bytes)).expect("a file can be written");
    }
    law(&folder.0)
}

/// The files that `make` leaves in a folder.
fn files_of(make: impl FnOnce(&Path)) -> BTreeMap<String, Vec<u8>> {
    in_folder(&[], |folder| {
        make(folder);
        let entries = fs::read_dir(folder).expect("the folder is there").flatten();
        let files = entries.filter(|entry| entry.path().is_file());
        files
            .map(|file| (file.file_name().to_string_lossy().into_owned(), fs::read(file.path()).expect("it is there")))
            .collect()
    })
}

/// Whoever gets this sentence can do something about it.
pub(super) fn is_told(error: &impl ToString) {
    let said = error.to_string();
    assert!(said.contains("hint: "), "no hint in: {said}");
}

// ---- what the operator decides ----

/// `run.toml` is refused with a hint, or with all that is wrong with it; what is left can be built.
pub(super) fn run_toml(bytes: &[u8]) {
    let loaded = in_folder(&[("run.toml", bytes)], |folder| RunConfig::load(&folder.join("run.toml")));
    match loaded {
        Ok(config) => build(&config),
        Err(error) => is_told(&format!("{error:#}")),
    }
}

fn build(config: &RunConfig) {
    if !config.problems().is_empty() {
        return;
    }
    let model = config.model.resolve(1 << 12, config.training.context).expect("it had no problem");
    let manifest = config.manifest(&model);
    assert_eq!(manifest.parameters(), model.parameters());
    let again = toml::to_string(config).expect("settings can be written");
    assert_eq!(toml::from_str::<RunConfig>(&again).as_ref(), Ok(config));
}

pub(super) fn run_tomls() -> Vec<Vec<u8>> {
    let all = toml::to_string(&RunConfig::default()).expect("settings can be written");
    let some = "name = \"reef\"\n[model]\npreset = \"nano\"\nhidden_size = 64\n[training]\npacking = \"documents\"\n\
                [training.muon]\nmomentum = 0.9\n[sync]\nfragments = 2\nsteps = \"auto\"\nup = \"sparse:96\"\n\
                outer = { rule = \"nesterov\", learning_rate = 0.7, momentum = 0.9 }\n[goal]\nminutes = 1.5\n";
    vec![all.into_bytes(), some.as_bytes().to_vec()]
}

/// What a coordinator says of its run is refused with a hint, or a site can build it.
pub(super) fn terms(bytes: &[u8]) {
    match Terms::read(&String::from_utf8_lossy(bytes)) {
        Ok(terms) => assert!(terms.config.manifest(&terms.model).parameters() > 0),
        Err(error) => is_told(&error),
    }
}

pub(super) fn all_terms() -> Vec<Vec<u8>> {
    let model = ModelConfig::preset("nano", 300, 32).expect("a preset");
    vec![serde_json::to_vec(&Terms { config: RunConfig::default(), model }).expect("terms are plain data")]
}

// ---- keys and tickets ----

/// A ticket is refused with a hint, or written again as the same ticket, whoever made its check digits.
pub(super) fn ticket(bytes: &[u8]) {
    let look = |text: &str| match Ticket::from_text(text) {
        Ok(ticket) => assert_eq!(Ticket::from_text(&ticket.to_text()).ok(), Some(ticket)),
        Err(error) => is_told(&error),
    };
    look(&String::from_utf8_lossy(bytes));
    let check = Digest::of(bytes).to_string();
    look(&format!("atoll1.{}.{}", URL_SAFE_NO_PAD.encode(bytes), &check[..8]));
}

pub(super) fn tickets() -> Vec<Vec<u8>> {
    let digest = Digest::of(b"x");
    let site: SiteId = "oslo".parse().expect("a good name");
    let addresses = vec!["[::1]:1".into(), "host:7000".into()];
    let ticket = Ticket { run: "r".into(), site, addresses, coordinator: digest, secret: digest, expires: Some(1) };
    vec![ticket.to_text().into_bytes(), serde_json::to_vec(&ticket).expect("a ticket is plain data")]
}

/// A key file is refused or is a key: as PEM, and as what PEM would hold.
pub(super) fn key(bytes: &[u8]) {
    let pem = format!("-----BEGIN PRIVATE KEY-----\n{}\n-----END PRIVATE KEY-----\n", STANDARD.encode(bytes));
    for file in [bytes, pem.as_bytes()] {
        let loaded = in_folder(&[("site.key", file)], |folder| Identity::load(&folder.join("site.key")));
        match loaded {
            Ok(identity) => assert_ne!(identity.fingerprint, Digest::default()),
            Err(error) => assert!(error.to_string().contains("site.key")),
        }
    }
}

pub(super) fn keys() -> Vec<Vec<u8>> {
    let files = files_of(|folder| drop(Identity::load_or_create(&folder.join("site.key"))));
    let pem = files.values().next().cloned().unwrap_or_default();
    let text = String::from_utf8_lossy(&pem).into_owned();
    let inner = text.lines().filter(|line| !line.starts_with('-')).collect::<String>();
    vec![pem, STANDARD.decode(inner).expect("it was made so")]
}

// ---- connections ----

/// Bytes of a connection are frames or end it; puts make a payload of what they say, or are told why not.
pub(super) fn link(bytes: &[u8]) {
    let site: SiteId = "oslo".parse().expect("a good name");
    let arriving = Arriving::new(&[64, 7]);
    let mut rest = bytes;
    while let Some(frame) = next_frame(&mut rest) {
        let Frame::Put { digest, total, offset, bytes } = frame else { continue };
        match arriving.add(&site, digest, total, offset, &bytes) {
            Ok(Added::Whole(buffer)) => {
                assert_eq!(buffer.len() as u64, total);
                assert_eq!(buffer[offset as usize..][..bytes.len()], bytes);
            }
            Ok(Added::Part | Added::NoRoom) => {}
            Err(why) => assert!(!why.is_empty()),
        }
    }
}

/// Bytes that are all here are read at once, without a runtime.
fn next_frame(rest: &mut &[u8]) -> Option<Frame> {
    let mut reading = Box::pin(read_frame(rest));
    match reading.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(frame) => frame.ok().flatten(),
        Poll::Pending => unreachable!("a slice has nothing to wait for"),
    }
}

pub(super) fn links() -> Vec<Vec<u8>> {
    let put = |name: u8, total: u64, offset: u64, bytes: &[u8]| {
        Frame::Put { digest: Digest([name; 32]), total, offset, bytes: bytes.to_vec() }.encode()
    };
    let whole = [put(1, 5, 3, &[3, 4]), put(2, 4, 0, &[1; 4]), put(1, 5, 0, &[0, 1, 2])].concat();
    let get = Frame::Get { digest: Digest([1; 32]), offset: 0, length: 9 }.encode();
    vec![whole, [put(3, 261, 0, &[7; 99]), get, put(3, 261, 99, &[7; 162])].concat()]
}

// ---- text and tokens ----

/// A shard whose hash is right is refused, or has as many tokens as it says.
pub(super) fn shard(bytes: &[u8]) {
    let word = |at: usize| bytes.get(at..at + 8).map_or(0, |b| u64::from_le_bytes(b.try_into().unwrap_or_default()));
    let tokenizer = Digest(bytes.get(16..48).and_then(|b| b.try_into().ok()).unwrap_or_default());
    let info = ShardInfo {
        file: "train-00000.tokens".into(),
        hash: Digest::of(bytes),
        tokens: word(48),
        documents: word(56),
        text_bytes: 1,
    };
    match in_folder(&[(&info.file, bytes)], |folder| Shard::open(folder, &info, tokenizer)) {
        Ok(shard) => {
            let mut tokens = Vec::new();
            shard.read(0, shard.len(), &mut tokens);
            assert_eq!((tokens.len() as u64, shard.len()), (info.tokens, info.tokens));
        }
        Err(error) => is_told(&error),
    }
}

pub(super) fn shards() -> Vec<Vec<u8>> {
    let shards = dataset_files().into_iter().filter(|(name, _)| name.ends_with(".tokens"));
    let mut shards: Vec<Vec<u8>> = shards.map(|(_, bytes)| bytes[..bytes.len().min(400)].to_vec()).collect();
    for shard in &mut shards {
        let tokens = ((shard.len() - 64) / 2) as u64;
        shard[48..56].copy_from_slice(&tokens.to_le_bytes());
    }
    shards
}

/// The files of a small dataset.
fn dataset_files() -> BTreeMap<String, Vec<u8>> {
    let document = "a site trains on its own text, and the coordinator merges. ".repeat(9);
    let lines: String = (0..40).map(|number| format!("{{\"text\": \"{number} {document}\"}}\n")).collect();
    let tokenizer = small_tokenizer();
    in_folder(&[("text.jsonl", lines.as_bytes())], |text| {
        let source = Source::open(text).expect("there is text");
        files_of(|folder| {
            let options = IngestOptions { held_out: 0.2, ..IngestOptions::default() };
            let done = ingest(&source, &tokenizer, folder, &options, &mut |_| std::ops::ControlFlow::Continue(()));
            assert!(done.is_ok(), "{done:?}");
        })
    })
}

/// What `dataset.json` says of good shards is refused with a hint, or every window that it promises is there.
pub(super) fn dataset(bytes: &[u8]) {
    use std::sync::LazyLock;
    static FILES: LazyLock<BTreeMap<String, Vec<u8>>> = LazyLock::new(dataset_files);
    let files = FILES.iter().map(|(name, good)| (name.as_str(), if name == "dataset.json" { bytes } else { good }));
    in_folder(&files.collect::<Vec<_>>(), |folder| match Dataset::open(folder) {
        Ok(dataset) => {
            let mut tokens = Vec::new();
            for (split, windows) in [(Split::Train, dataset.samples(8)), (Split::HeldOut, dataset.held_out_samples(8))]
            {
                assert!(dataset.window(split, windows, 8, &mut tokens).is_err());
                let last = windows.checked_sub(1).map(|last| dataset.window(split, last, 8, &mut tokens));
                assert!(last.is_none_or(|last| last.is_ok()));
                let _counts = (dataset.tokens(split), dataset.documents(split), dataset.text_bytes(split));
            }
        }
        Err(error) => is_told(&error),
    });
}

pub(super) fn datasets() -> Vec<Vec<u8>> {
    dataset_files().remove("dataset.json").into_iter().collect()
}

/// The first byte tells what the others are called.
const TEXTS: [&str; 7] = ["a.txt", "a.jsonl", "a.json", "a.txt.gz", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"];

/// Text of any format is refused with a hint or is documents that are not blank.
pub(super) fn text(bytes: &[u8]) {
    let Some((format, bytes)) = bytes.split_first() else { return };
    let name = TEXTS[usize::from(*format) % TEXTS.len()];
    let visited = in_folder(&[(name, bytes)], |folder| {
        Source::open(folder)?.visit(&TextField("text".into()), &mut |document| {
            assert!(!document.text.trim().is_empty());
            Ok(())
        })
    });
    if let Err(error) = visited {
        is_told(&error);
    }
}

pub(super) fn texts() -> Vec<Vec<u8>> {
    let plain = "reef tide\npalm".as_bytes().to_vec();
    let lines =
        b"{\"id\": 1, \"text\": \"reef \\u00e9\"}\n\n{\"text\": null}\n{\"text\": \"tide\", \"x\": [1, {}]}\n".to_vec();
    let gzip = |bytes: &[u8]| {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).and_then(|()| encoder.finish()).expect("memory takes it")
    };
    let zst = |bytes: &[u8]| zstd::stream::encode_all(bytes, 1).expect("memory takes it");
    let all = [plain.clone(), lines.clone(), lines.clone(), gzip(&plain), gzip(&lines), zst(&lines), parquet()];
    (0..).zip(all).map(|(format, bytes)| [vec![format], bytes].concat()).collect()
}

/// A parquet file with a nullable text column.
fn parquet() -> Vec<u8> {
    use parquet::data_type::{ByteArray, ByteArrayType};
    use parquet::errors::ParquetError;
    let write = || -> Result<Vec<u8>, ParquetError> {
        let schema = "message m { REQUIRED INT64 id; OPTIONAL BYTE_ARRAY text (UTF8); }";
        let schema = parquet::schema::parser::parse_message_type(schema)?;
        let mut writer =
            parquet::file::writer::SerializedFileWriter::new(Vec::new(), schema.into(), Default::default())?;
        let mut group = writer.next_row_group()?;
        if let Some(mut column) = group.next_column()? {
            column.typed::<parquet::data_type::Int64Type>().write_batch(&[1, 2], None, None)?;
            column.close()?;
        }
        if let Some(mut column) = group.next_column()? {
            let texts = [ByteArray::from("reef")];
            column.typed::<ByteArrayType>().write_batch(&texts, Some(&[1, 0]), None)?;
            column.close()?;
        }
        group.close()?;
        writer.into_inner()
    };
    write().expect("memory takes it")
}

/// A `tokenizer.json` is refused with a hint, or reads and writes text.
pub(super) fn tokenizer(bytes: &[u8]) {
    match Tokenizer::from_bytes(bytes) {
        Ok(tokenizer) => {
            assert!((tokenizer.end_of_text() as usize) < tokenizer.vocab_size());
            if let Ok(tokens) = tokenizer.encode("a site, and é\n") {
                assert!(tokens.iter().all(|&token| (token as usize) < tokenizer.vocab_size()));
                let _text = tokenizer.decode(&tokens);
            }
        }
        Err(error) => is_told(&error),
    }
}

fn small_tokenizer() -> Tokenizer {
    let mut sample = Sample::default();
    sample.push(&"a site trains on its own text, and the coordinator merges. ".repeat(9));
    Tokenizer::train(&sample, 280).expect("a small vocabulary")
}

pub(super) fn tokenizers() -> Vec<Vec<u8>> {
    let added = r#"[{"id": 1, "content": "</s>", "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": true}]"#;
    let short = format!(
        r#"{{"version": "1.0", "truncation": null, "padding": null, "post_processor": null, "added_tokens": {added},
        "normalizer": null, "pre_tokenizer": null, "decoder": {{"type": "ByteFallback"}}, "model": {{"type": "BPE",
        "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
        "fuse_unk": false, "byte_fallback": true, "ignore_merges": false, "vocab": {{"a": 0, "</s>": 1, " ": 2,
        " a": 3, "<0xC3>": 4}}, "merges": [[" ", "a"]]}}}}"#
    );
    vec![small_tokenizer().json().to_vec(), short.into_bytes()]
}

// ---- models ----

pub(super) fn small_model() -> ModelConfig {
    ModelConfig {
        vocab_size: 9,
        hidden_size: 4,
        intermediate_size: 6,
        num_hidden_layers: 1,
        num_attention_heads: 1,
        num_key_value_heads: 1,
        head_dim: 4,
        max_position_embeddings: 8,
        rope_theta: 1e4,
        rms_norm_eps: 1e-5,
        tie_word_embeddings: true,
    }
}

fn model_files() -> BTreeMap<String, Vec<u8>> {
    let model = small_model();
    files_of(|folder| {
        let saved = hf::save(folder, &model, &model.initial_weights(1), None);
        assert_eq!(saved, Ok(()));
    })
}

/// A `config.json` is refused with a hint, or describes a model that can be built.
pub(super) fn model_config(bytes: &[u8]) {
    match in_folder(&[("config.json", bytes)], hf::load_config) {
        Ok(config) => assert!(config.problems().is_empty() && config.parameters() > 0),
        Err(error) => is_told(&error),
    }
}

pub(super) fn model_configs() -> Vec<Vec<u8>> {
    let old = br#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 9, "hidden_size": 4,
        "intermediate_size": 6, "num_hidden_layers": 1, "num_attention_heads": 1, "rope_theta": 10000.0,
        "rope_scaling": null, "hidden_act": "silu", "max_position_embeddings": 8}"#;
    model_files().remove("config.json").into_iter().chain([old.to_vec()]).collect()
}

/// Weights are refused with a hint, or are those of the model and finite: in one file, by an index, and in a snapshot.
pub(super) fn weights(bytes: &[u8]) {
    let model = small_model();
    let mut files = model_files();
    files.remove("model.safetensors");
    for name in ["model.safetensors", "model.safetensors.index.json"] {
        let others = files.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice()));
        let loaded = in_folder(&others.chain([(name, bytes)]).collect::<Vec<_>>(), hf::load);
        match loaded {
            Ok((config, weights)) => {
                assert_eq!(config, model);
                let fits = |(tensor, weights): (&atoll_core::model::Tensor, &Vec<f32>)| tensor.len() == weights.len();
                assert!(model.tensors().iter().zip(&weights).all(fits));
                assert!(weights.iter().all(|weights| check_finite(weights).is_ok()));
            }
            Err(error) => is_told(&error),
        }
    }
    let mut global = small_global();
    if snapshot::restore_outer(&mut global, bytes).is_ok() {
        let sound = |(theta, momentum): (&Vec<f32>, &Vec<f32>)| momentum.is_empty() || momentum.len() == theta.len();
        assert!(global.theta.iter().zip(&global.momentum).all(sound));
        assert!(global.momentum.iter().chain(&global.residual).all(|values| check_finite(values).is_ok()));
    }
}

fn small_global() -> Global {
    let manifest = Manifest::balanced(small_model().tensors(), 2);
    let theta = manifest.gather(&small_model().initial_weights(1));
    Global::new(manifest, theta)
}

pub(super) fn all_weights() -> Vec<Vec<u8>> {
    let index = br#"{"weight_map": {"model.norm.weight": "model-1.safetensors"}}"#.to_vec();
    let outer = snapshot::outer_state(&small_global()).expect("plain tensors");
    model_files().remove("model.safetensors").into_iter().chain([index, outer]).collect()
}

// ---- small files ----

/// Weights of the fragment of which a site owes something.
const OWED: usize = 9;

/// Files that a node has left for itself are read or as good as not there: what an operator sees, an act, a site's
/// session and what it still owes.
pub(super) fn site_files(bytes: &[u8]) {
    in_folder(&[("status.json", bytes), ("session", bytes)], |folder| {
        if let Ok(report) = Report::load(&folder.join("status.json")) {
            assert!(serde_json::to_vec(&report).is_ok());
        }
        assert!(site::next_session(folder, 3).is_ok_and(|session| session > 3));
    });
    // Whatever the layout is, and whatever contribution the first part is of, it is asked for.
    if let (Some(layout), Some(after)) = (bytes.first_chunk(), bytes.get(33..).and_then(<[u8]>::first_chunk))
        && let Some(owed) = residual::recall(bytes, Digest(*layout), OWED, Digest(*after))
    {
        assert!(owed.values.len() == OWED && check_finite(&owed.values).is_ok());
    }
    in_folder(&[("acts/1.json", bytes)], |folder| match acts::pending(&RunDir(folder.to_path_buf())) {
        Ok(acts) => assert_eq!(acts.len(), 1),
        Err(error) => is_told(&error),
    });
}

pub(super) fn all_site_files() -> Vec<Vec<u8>> {
    let report = serde_json::to_vec(&Report::default()).expect("a report is plain data");
    let owed = Residual { after: Digest::of(b"payload"), values: vec![1.0; OWED] };
    let sent = Codec::Sparse(1024).encode(&[1.0; OWED]).expect("finite");
    let residuals = [residual::file(Digest::of(b"layout")), residual::left(&owed), residual::sent(&sent)].concat();
    let (site, key): (SiteId, _) = ("oslo".parse().expect("a good name"), Digest::of(b"key"));
    let invitation = Invitation { site: site.clone(), role: Role::Observe, expires: Some(7) };
    let [revoke, invite] = [Act::Revoke(site, Some(key)), Act::Invite(key, invitation)]
        .map(|act| serde_json::to_vec(&act).expect("acts are plain data"));
    vec![report, residuals, b"1790000000000000".to_vec(), revoke, invite]
}

// ---- object stores ----

/// Whatever lies in an object store is read, refused, or as good as not there; and no file is written outside the run folder.
pub(super) fn shared(bytes: &[u8]) {
    let files =
        [("store/leader", bytes), ("store/snapshots/000000000003", bytes), ("store/journal/000000000001", bytes)];
    in_folder(&files, |folder| {
        let shared = Shared::open(&folder.join("store").to_string_lossy()).expect("a folder");
        let _ = shared.leader().expect("it is there");
        assert!(shared.segment(1).is_ok_and(|text| text.is_some()) || std::str::from_utf8(bytes).is_err());
        let before = files_below(folder);
        let run = RunDir(folder.join("run"));
        if let Err(error) = shared.fetch_snapshot(&run) {
            assert!(!error.to_string().is_empty());
        }
        let outside = |path: &String| !path.starts_with("run");
        assert!(files_below(folder).into_iter().filter(outside).eq(before), "only the run folder is written to");
    });
}

/// Paths of all files in a folder, sorted.
fn files_below(folder: &Path) -> Vec<String> {
    let mut files = Vec::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(next) = folders.pop() {
        for file in fs::read_dir(&next).into_iter().flatten().flatten() {
            let path = file.path();
            if path.is_dir() {
                folders.push(path);
            } else if let Ok(below) = path.strip_prefix(folder) {
                files.push(below.to_string_lossy().into_owned());
            }
        }
    }
    files.sort();
    files
}

pub(super) fn all_shared() -> Vec<Vec<u8>> {
    let (address, state) = ("host:7000".to_string(), State::Leading);
    let beat = Beat { epoch: 2, holder: Digest::of(b"me"), address, number: 7, state };
    let chunk = format!("chunks/000001/{}", Digest::of(b"chunk"));
    let parcel = serde_json::json!({"files": [
        {"path": "journal.jsonl", "bytes": 0, "chunks": []},
        {"path": "snapshots/000000000003/book.json", "bytes": 5, "chunks": [chunk]},
        {"path": "../evil", "bytes": 0, "chunks": []},
    ]});
    vec![serde_json::to_vec(&beat).expect("a beat is plain data"), parcel.to_string().into_bytes()]
}

// ---- links ----

/// A link's text is refused with a hint, or written again as the same link.
pub(super) fn wan(bytes: &[u8]) {
    match String::from_utf8_lossy(bytes).parse::<Wan>() {
        Ok(link) => {
            assert_eq!(link.to_string().parse::<Wan>().ok(), Some(link));
            assert!((0.0..1.0).contains(&link.loss()) && !link.in_words().is_empty());
        }
        Err(error) => is_told(&error),
    }
}

pub(super) fn wans() -> Vec<Vec<u8>> {
    ["50mbit,50ms,5ms,0.1%", "2 %, 0.5 S , 250us,1.5Mbit", "0ms"].map(|link| link.as_bytes().to_vec()).to_vec()
}
