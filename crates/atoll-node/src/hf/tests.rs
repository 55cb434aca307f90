use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

use super::*;
use crate::data::Sample;

fn shape() -> ModelConfig {
    ModelConfig {
        vocab_size: 300,
        hidden_size: 24,
        intermediate_size: 40,
        num_hidden_layers: 2,
        num_attention_heads: 3,
        num_key_value_heads: 1,
        head_dim: 8,
        max_position_embeddings: 64,
        rope_theta: 10_000.0,
        rms_norm_eps: 1e-5,
        tie_word_embeddings: true,
    }
}

fn tokenizer() -> Tokenizer {
    let mut sample = Sample::default();
    sample.push("a site trains on its own text, and the coordinator merges. ".repeat(9).as_str());
    Tokenizer::train(&sample, 280).unwrap()
}

fn saved(config: &ModelConfig) -> (tempfile::TempDir, Vec<Vec<f32>>) {
    let folder = tempfile::tempdir().unwrap();
    let weights = config.initial_weights(3);
    save(folder.path(), config, &weights, None).unwrap();
    (folder, weights)
}

fn json_of(folder: &Path, name: &str) -> Value {
    serde_json::from_slice(&fs::read(folder.join(name)).unwrap()).unwrap()
}

/// The error of loading a folder whose `config.json` was edited.
fn refusal(edit: impl FnOnce(&mut Value)) -> String {
    let (folder, _) = saved(&shape());
    let mut config = json_of(folder.path(), "config.json");
    edit(&mut config);
    fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    error(folder.path())
}

fn error(folder: &Path) -> String {
    load(folder).unwrap_err().to_string().replace(&format!("{}/", folder.display()), "")
}

type Stored = (String, Vec<usize>, Dtype, Vec<u8>);

/// Stores tensors of any type as safetensors.
fn store(path: &Path, tensors: &[Stored]) {
    let view = |(name, shape, dtype, bytes)| (name, TensorView::new(dtype, shape, bytes).unwrap());
    let parts = tensors.iter().map(|tensor| (tensor.0.as_str(), tensor.1.clone(), tensor.2, tensor.3.as_slice()));
    let views: Vec<_> = parts.map(view).collect();
    safetensors::serialize_to_file(views.iter().map(|(name, view)| (*name, view)), None, path).unwrap();
}

/// The model's tensors, stored in `dtype`, which `encode` makes of a weight.
fn stored(config: &ModelConfig, weights: &[Vec<f32>], dtype: Dtype, encode: fn(f32) -> Vec<u8>) -> Vec<Stored> {
    let bytes = |weights: &[f32]| weights.iter().flat_map(|&weight| encode(weight)).collect();
    let tensors = config.tensors();
    tensors.iter().zip(weights).map(|(t, w)| (t.name.clone(), t.shape.clone(), dtype, bytes(w))).collect()
}

fn f32_bytes(weight: f32) -> Vec<u8> {
    weight.to_le_bytes().to_vec()
}

#[test]
fn what_is_saved_is_loaded_bit_for_bit() {
    for tied in [true, false] {
        let config = ModelConfig { tie_word_embeddings: tied, rope_theta: 500_000.0, ..shape() };
        let (folder, weights) = saved(&config);
        assert_eq!(load(folder.path()).unwrap(), (config, weights));
    }
}

#[test]
fn the_config_speaks_to_transformers_4_and_5() {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = tokenizer();
    save(folder.path(), &shape(), &shape().initial_weights(1), Some(tokenizer.json())).unwrap();
    let config = json_of(folder.path(), "config.json");
    let expected = [
        ("architectures", json!(["LlamaForCausalLM"])),
        ("model_type", json!("llama")),
        ("rope_theta", json!(10_000.0)),
        ("rope_parameters", json!({"rope_theta": 10_000.0, "rope_type": "default"})),
        ("dtype", json!("float32")),
        ("torch_dtype", json!("float32")),
        ("rms_norm_eps", json!(1e-5)),
        ("hidden_act", json!("silu")),
        ("attention_bias", json!(false)),
        ("bos_token_id", json!(0)),
        ("eos_token_id", json!(0)),
        ("tie_word_embeddings", json!(true)),
    ];
    for (field, value) in expected {
        assert_eq!(config[field], value, "{field}");
    }
    assert_eq!(fs::read(folder.path().join("tokenizer.json")).unwrap(), tokenizer.json());
    assert_eq!(json_of(folder.path(), "tokenizer_config.json")["eos_token"], "<|endoftext|>");
    assert_eq!(json_of(folder.path(), "generation_config.json")["eos_token_id"], 0);
    let bytes = fs::read(folder.path().join("model.safetensors")).unwrap();
    let (_, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!(metadata.metadata().as_ref().unwrap()["format"], "pt");
    let mut names: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    let expected =
        ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"];
    assert_eq!(names, expected, "nothing temporary stays");
}

#[test]
fn both_styles_of_config_are_read() {
    let read = |edit: &dyn Fn(&mut serde_json::Map<String, Value>)| {
        let (folder, _) = saved(&shape());
        let mut config = json_of(folder.path(), "config.json");
        edit(config.as_object_mut().unwrap());
        fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        load(folder.path()).unwrap().0
    };
    let old = read(&|config| {
        config.remove("rope_parameters");
        config["rope_theta"] = json!(500_000);
        config["rope_scaling"] = json!({"type": "default"});
    });
    assert_eq!(old.rope_theta, 500_000.0);
    let new = read(&|config| {
        config.remove("rope_theta");
        config.remove("rope_scaling");
        config.remove("head_dim");
        config["rope_parameters"]["rope_theta"] = json!(1e6);
    });
    assert_eq!((new.rope_theta, new.head_dim), (1e6, 8));
}

#[test]
fn halves_are_widened() {
    let (folder, weights) = saved(&shape());
    let path = folder.path().join("model.safetensors");
    store(&path, &stored(&shape(), &weights, Dtype::BF16, |w| half::bf16::from_f32(w).to_le_bytes().to_vec()));
    let rounded = |round: fn(f32) -> f32| weights.iter().map(|w| w.iter().map(|&w| round(w)).collect()).collect();
    let expected: Vec<Vec<f32>> = rounded(|w| half::bf16::from_f32(w).to_f32());
    assert_eq!(load(folder.path()).unwrap().1, expected);
    store(&path, &stored(&shape(), &weights, Dtype::F16, |w| half::f16::from_f32(w).to_le_bytes().to_vec()));
    let expected: Vec<Vec<f32>> = rounded(|w| half::f16::from_f32(w).to_f32());
    assert_eq!(load(folder.path()).unwrap().1, expected);
    store(&path, &stored(&shape(), &weights, Dtype::F64, |w| f64::from(w).to_le_bytes().to_vec()));
    assert!(error(folder.path()).contains(".weight is stored as F64\nhint: Atoll reads f32, bf16 and f16"));
}

#[test]
fn sharded_weights_are_put_together() {
    let config = ModelConfig { tie_word_embeddings: false, ..shape() };
    let (folder, weights) = saved(&config);
    fs::remove_file(folder.path().join("model.safetensors")).unwrap();
    let tensors = stored(&config, &weights, Dtype::F32, f32_bytes);
    let (first, second) = tensors.split_at(7);
    let names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
    store(&folder.path().join(names[0]), first);
    store(&folder.path().join(names[1]), second);
    let place = |index: usize| names[usize::from(index >= 7)];
    let map: serde_json::Map<_, _> =
        tensors.iter().enumerate().map(|(index, tensor)| (tensor.0.clone(), json!(place(index)))).collect();
    let index = folder.path().join("model.safetensors.index.json");
    fs::write(&index, json!({"metadata": {}, "weight_map": map}).to_string()).unwrap();
    assert_eq!(load(folder.path()).unwrap(), (config, weights));

    store(&folder.path().join(names[1]), &second[1..]);
    let missing = format!("model.safetensors.index.json lacks the tensor {}\nhint: ", second[0].0);
    assert!(error(folder.path()).starts_with(&missing), "{}", error(folder.path()));
    fs::remove_file(folder.path().join(names[1])).unwrap();
    assert!(error(folder.path()).starts_with(&format!("cannot read {}: ", names[1])));
    fs::write(&index, r#"{"weight_map": {"x": "../elsewhere"}}"#).unwrap();
    assert!(error(folder.path()).contains("'../elsewhere' is no file name"));
}

#[test]
fn what_could_only_be_misread_is_refused() {
    let set = |field: &str, value: Value| {
        let error = refusal(|config| config[field] = value);
        let (sentence, hint) = error.split_once("\nhint: ").unwrap();
        assert!(!hint.is_empty());
        sentence.strip_prefix("config.json: ").unwrap_or_else(|| panic!("{error}")).to_string()
    };
    assert_eq!(set("architectures", json!(["GPT2LMHeadModel"])), "the architecture GPT2LMHeadModel is not supported");
    assert_eq!(set("model_type", json!("mistral")), "the model type 'mistral' is not supported");
    assert_eq!(set("hidden_act", json!("gelu")), "hidden_act = gelu is not supported");
    assert_eq!(set("attention_bias", json!(true)), "attention_bias is not supported");
    assert_eq!(set("quantization_config", json!({"bits": 4})), "quantization_config is not supported");
    let scaling = "rope scaling of type llama3 is not supported";
    assert_eq!(set("rope_scaling", json!({"rope_type": "llama3", "factor": 8})), scaling);
    assert_eq!(set("rope_parameters", json!({"rope_type": "llama3", "rope_theta": 1e4})), scaling);
    assert_eq!(
        set("num_key_value_heads", json!(2)),
        "model.num_attention_heads = 3 must be a multiple of num_key_value_heads = 2"
    );
    assert!(
        refusal(|config| config["vocab_size"] = json!("many")).starts_with("config.json is damaged or truncated: ")
    );
}

#[test]
fn weights_that_are_not_the_models_are_refused() {
    let (folder, weights) = saved(&shape());
    let path = folder.path().join("model.safetensors");
    let whole = fs::read(&path).unwrap();
    for len in [whole.len() - 1, whole.len() / 2, 100, 3, 0] {
        fs::write(&path, &whole[..len]).unwrap();
        let error = error(folder.path());
        assert!(error.starts_with("model.safetensors is damaged or truncated: "), "{error}");
        assert!(error.ends_with("\nhint: copy or download it again"), "{error}");
    }
    let mut tensors = stored(&shape(), &weights, Dtype::F32, f32_bytes);
    (tensors[2].1, tensors[2].3) = (vec![1, 24], vec![0; 96]);
    store(&path, &tensors);
    let expected =
        "model.safetensors: model.layers.0.self_attn.k_proj.weight has the shape [1, 24], and config.json says [8, 24]";
    assert!(error(folder.path()).starts_with(expected), "{}", error(folder.path()));
    let mut tensors = stored(&shape(), &weights, Dtype::F32, f32_bytes);
    tensors.push(("lm_head.weight".to_string(), vec![1], Dtype::F32, vec![0; 4]));
    tensors.push(("model.layers.0.self_attn.rotary_emb.inv_freq".to_string(), vec![1], Dtype::F32, vec![0; 4]));
    store(&path, &tensors);
    assert_eq!(load(folder.path()).unwrap().1, weights, "what says nothing new is passed over");
    tensors.push(("model.layers.0.self_attn.q_proj.bias".to_string(), vec![1], Dtype::F32, vec![0; 4]));
    store(&path, &tensors);
    assert!(error(folder.path()).contains("holds the tensor model.layers.0.self_attn.q_proj.bias, which config.json"));
    fs::remove_file(&path).unwrap();
    assert!(error(folder.path()).starts_with("cannot read model.safetensors: "));
}

#[test]
fn a_model_that_does_not_fit_together_is_not_saved() {
    let folder = tempfile::tempdir().unwrap();
    let config = ModelConfig { vocab_size: 260, ..shape() };
    let refused = |weights: &[Vec<f32>], tokenizer: Option<&[u8]>| {
        save(folder.path(), &config, weights, tokenizer).unwrap_err().to_string()
    };
    let weights = config.initial_weights(1);
    let error = refused(&weights, Some(tokenizer().json()));
    assert!(error.contains("280 tokens in the tokenizer, 260 in the model"), "{error}");
    assert!(refused(&weights[1..], None).contains("19 tensors, and the model has 20"));
    let mut short = weights.clone();
    short[3].pop();
    assert!(refused(&short, None).contains("v_proj.weight of 191 elements for [8, 24]"));
}
