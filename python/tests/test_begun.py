"""A model that others began: Hugging Face folders and GGUF files as the beginning of a run."""

import json
import struct

import atoll
import conftest
import numpy
import pytest
from atoll import gguf

GOLDEN = "untied"
# Keys of GGUF for the golden model's sizes.
SIZES = {
    "llama.embedding_length": "hidden_size",
    "llama.feed_forward_length": "intermediate_size",
    "llama.block_count": "num_hidden_layers",
    "llama.attention.head_count": "num_attention_heads",
    "llama.attention.head_count_kv": "num_key_value_heads",
    "llama.attention.key_length": "head_dim",
    "llama.context_length": "max_position_embeddings",
}


def text(said):
    return struct.pack("<Q", len(said.encode())) + said.encode()


def pair(key, value):
    """A key and its value, as GGUF writes them."""
    if isinstance(value, str):
        return text(key) + struct.pack("<I", 8) + text(value)
    if isinstance(value, float):
        return text(key) + struct.pack("<If", 6, value)
    if isinstance(value, int):
        return text(key) + struct.pack("<II", 4, value)
    kind, write = (8, text) if isinstance(value[0], str) else (5, lambda number: struct.pack("<i", number))
    return text(key) + struct.pack("<IIQ", 9, kind, len(value)) + b"".join(map(write, value))


def neighbours(weights, dim):
    """From halves together to neighbours together: what llama.cpp's own converter does."""
    return weights.reshape(-1, 2, dim // 2, weights.shape[1]).swapaxes(1, 2).reshape(weights.shape)


def written(path, model, tensors, tokenizer, changes=()):
    """A GGUF file of F32 weights, by Hugging Face's names."""
    pairs = {"general.architecture": "llama", "llama.rope.freq_base": float(model["rope_theta"]),
             "llama.attention.layer_norm_rms_epsilon": float(model["rms_norm_eps"]), **tokenizer,
             **{key: model[name] for key, name in SIZES.items()}, **dict(changes)}
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    names |= {f"model.layers.{layer}.{ours}": f"blk.{layer}.{theirs}"
              for layer in range(model["num_hidden_layers"]) for ours, theirs in gguf.PARTS.items()}
    places, data = b"", b""
    for name, weights in tensors.items():
        if "q_proj" in name or "k_proj" in name:
            weights = neighbours(weights, model["head_dim"])
        shape = weights.shape[::-1]
        places += text(names[name.removesuffix(".weight")] + ".weight") + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, len(data))
        data += weights.astype("<f4").tobytes()
        data += b"\0" * (-len(data) % 32)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(pairs)) + b"".join(pair(*each) for each in pairs.items()) + places
    path.write_bytes(head + b"\0" * (-len(head) % 32) + data)


@pytest.fixture
def golden():
    return conftest.Golden(GOLDEN)


def alphabet(size):
    """A tokenizer without merges, in GGUF's words: an end of text, then the 256 bytes of byte-level BPE, then filler."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in printable] + [chr(256 + index) for index in range(256 - len(printable))]
    tokens = ["<|endoftext|>", *letters, "ab", *(f"filler{index}" for index in range(size - 258))]
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [3] + [1] * (len(tokens) - 1), "tokenizer.ggml.merges": ["a b"]}


def model_and_weights(golden, vocabulary=300):
    """The golden model with a vocabulary that has room for bytes."""
    model = golden.numbers["model"] | {"vocab_size": vocabulary}
    weights = {name.removeprefix("weight."): array for name, array in golden.tensors.items() if name.startswith("weight.")}
    random = numpy.random.default_rng(1)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = random.standard_normal((vocabulary, model["hidden_size"]), dtype=numpy.float32) * numpy.float32(0.02)
    shapes = {name: array for name, array in weights.items()}
    return model, shapes


def test_a_gguf_file_becomes_the_folder_that_it_was_made_of(golden, tmp_path):
    model, weights = model_and_weights(golden)
    written(tmp_path / "model.gguf", model, weights, alphabet(300))
    gguf.convert(tmp_path / "model.gguf", tmp_path / "folder")
    said = json.loads((tmp_path / "folder/config.json").read_text())
    assert {key: said[key] for key in model} == model
    for name, array in conftest.safetensors(tmp_path / "folder/model.safetensors").items():
        assert numpy.array_equal(array, weights[name].reshape(array.shape)), name


BLOCK = numpy.arange(32, dtype=numpy.uint8)
HALF = struct.pack("<e", 0.5)


@pytest.mark.parametrize("kind, raw, expected", [
    (1, struct.pack("<2e", 1.5, -2.0), [1.5, -2.0]),
    (30, bytes.fromhex("c03f00c0"), [1.5, -2.0]),
    (8, HALF + bytes(BLOCK), BLOCK * 0.5),
    (2, HALF + bytes.fromhex("8f" * 16), [3.5] * 16 + [0.0] * 16),
    (3, HALF + struct.pack("<e", -1.0) + bytes.fromhex("2f" * 16), [6.5] * 16 + [0.0] * 16),
    (6, HALF + bytes.fromhex("ffff0000") + bytes.fromhex("2f" * 16), [7.5] * 16 + [-7.0] * 16),
    (7, HALF + struct.pack("<e", -1.0) + bytes.fromhex("0000ffff") + bytes.fromhex("2f" * 16), [6.5] * 16 + [8.0] * 16),
])
def test_blocks_of_bytes_are_the_weights_they_stand_for(kind, raw, expected):
    _, size, read = gguf.BLOCKS[kind]
    assert read(numpy.frombuffer(raw, numpy.uint8).reshape(-1, size)).ravel().tolist() == list(map(float, expected))


def test_what_is_no_model_for_atoll_is_said_in_a_sentence(golden, tmp_path):
    model, weights = model_and_weights(golden)
    path = tmp_path / "model.gguf"

    def refusal(*changes):
        written(path, model, weights, alphabet(300), changes)
        with pytest.raises(atoll.AtollError, match="\nhint: ") as refused:
            gguf.convert(path, tmp_path / "folder")
        assert not (tmp_path / "folder").exists()
        return str(refused.value)

    assert "the architecture qwen2 is not supported" in refusal(("general.architecture", "qwen2"))
    assert "rope scaling is not supported" in refusal(("llama.rope.scaling.type", "yarn"))
    assert "a tokenizer of the kind llama, smollm" in refusal(("tokenizer.ggml.model", "llama"))
    whole = path.read_bytes()
    for length in (0, 3, 40, len(whole) // 3):
        path.write_bytes(whole[:length])
        with pytest.raises(atoll.AtollError, match="\nhint: "):
            gguf.convert(path, tmp_path / "other")


def continued(golden, lab, tmp_path):
    """Makes the lab's run one that continues the golden model; the model's shape."""
    model, weights = model_and_weights(golden)
    written(tmp_path / "model.gguf", model, weights, alphabet(300))
    gguf.convert(tmp_path / "model.gguf", tmp_path / "begun")
    lab.run = lab.folder / "continued"
    lab.atoll("new", lab.run, "--from", tmp_path / "begun", "--tokens", 20_000)
    return model


def test_a_run_continues_a_model_and_hands_it_back(golden, lab, tmp_path):
    lab = lab(20_000)
    model = continued(golden, lab, tmp_path)
    lab.change('steps = "auto"', "steps = 8")
    lab.change("learning_rate = 2e-4", "learning_rate = 3e-3")
    assert "context = 24" in (lab.run / "run.toml").read_text(), "no more than the model sees"
    measured = lambda folder: json.loads(lab.atoll("eval", folder, "--data", lab.text, "--json"))["bits_per_byte"]
    before = measured(tmp_path / "begun")
    coordinator, native = lab.coordinate(), lab.join("native")
    assert native.wait() == 0 and coordinator.wait() == 0, lab.log("coordinator")
    lab.atoll("export", lab.run, tmp_path / "trained")
    trained = json.loads((tmp_path / "trained/config.json").read_text())
    assert {key: trained[key] for key in model} == model
    assert measured(tmp_path / "trained") < 0.95 * before


def test_a_model_that_is_not_the_runs_any_more_is_refused(golden, lab, tmp_path):
    lab = lab(20_000)
    continued(golden, lab, tmp_path)
    lab.change("rope_theta = ", "rope_theta = 7")
    process = lab.spawn("coordinator", [conftest.atoll_command(), "coordinate", lab.run, "--listen", lab.address])
    assert process.wait(60) != 0
    assert "holds another model than run.toml describes\nhint: " in lab.log("coordinator")
