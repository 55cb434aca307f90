"""Makes a Hugging Face folder of a GGUF file, so that `atoll new --from FOLDER` continues its model.

    python -m atoll.gguf model.gguf FOLDER

GGUF (version 2 and 3, little-endian) is

    "GGUF"  u32 version  u64 tensors  u64 pairs
    pairs:    name  u32 type  value                                  a name is a u64 length and its bytes
    tensors:  name  u32 dimensions  u64 each, innermost first  u32 type  u64 offset
    data:     every tensor begins at a multiple of general.alignment, 32 if nothing is said

Weights in F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0 and Q5_1 are read, and written as F32. In GGUF the rows of queries and keys are
in the order in which llama.cpp turns them, neighbours together; Hugging Face's Llama turns halves.
"""

import json
import mmap
import struct
import sys
from pathlib import Path

import numpy

from ._atoll import AtollError

SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
# Longer than any name or list of a vocabulary; what says more is damaged.
LONGEST = 1 << 24
CONTROL = 3

# Pre-tokenizers by llama.cpp's names, as tokenizer.json says them.
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
PRE_TOKENIZERS = {
    "gpt-2": BYTE_LEVEL,
    "smollm": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL]},
}


# ---- the file ----


class Reader:
    """Reads values one after the other; never past the end."""

    def __init__(self, data, path):
        self.data, self.path, self.at = data, path, 0

    def take(self, count):
        if self.at + count > len(self.data):
            raise damaged(self.path, "it ends too early")
        self.at += count
        return self.data[self.at - count : self.at]

    def scalar(self, kind):
        return struct.unpack(kind, self.take(struct.calcsize(kind)))[0]

    def length(self):
        length = self.scalar("<Q")
        if length > LONGEST:
            raise damaged(self.path, f"a length of {length} cannot be")
        return length

    def text(self):
        return bytes(self.take(self.length())).decode(errors="replace")

    def value(self, kind):
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            of = self.scalar("<I")
            return [self.value(of) for _ in range(self.length())]
        if kind not in SCALARS:
            raise damaged(self.path, f"there is no type {kind}")
        return self.scalar(SCALARS[kind])


class File:
    """A GGUF file: `pairs` by key, and tensors by name."""

    def __init__(self, path):
        self.path = path
        try:
            with open(path, "rb") as file:
                self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise AtollError(f"{path} cannot be read: {error}\nhint: name a GGUF file") from None
        reader = Reader(self.data, path)
        if bytes(reader.take(4)) != b"GGUF" or reader.scalar("<I") not in (2, 3):
            raise damaged(path, "it does not begin as a GGUF file of version 2 or 3")
        tensors, pairs = reader.length(), reader.length()
        self.pairs = dict((reader.text(), reader.value(reader.scalar("<I"))) for _ in range(pairs))
        self.places = dict(self.place(reader) for _ in range(tensors))
        alignment = max(int(self.pairs.get("general.alignment", 32)), 1)
        self.start = -(-reader.at // alignment) * alignment

    def place(self, reader):
        name = reader.text()
        shape = [reader.length() for _ in range(min(reader.scalar("<I"), 8))][::-1]
        return name, (shape, reader.scalar("<I"), reader.scalar("<Q"))

    def tensor(self, name):
        """A tensor's weights, float32, outermost dimension first."""
        if name not in self.places:
            raise damaged(self.path, f"it has no tensor {name}")
        shape, kind, offset = self.places[name]
        if kind not in BLOCKS:
            raise AtollError(f"{self.path}: {name} is stored in GGUF's type {kind}, which Atoll does not read\n"
                             "hint: take the model in F16, BF16 or Q8_0")
        weights, size, read = BLOCKS[kind]
        blocks = -(-int(numpy.prod(shape)) // weights)
        reader = Reader(self.data, self.path)
        reader.at = self.start + offset
        raw = numpy.frombuffer(reader.take(blocks * size), numpy.uint8).reshape(blocks, size)
        return read(raw).reshape(shape).astype(numpy.float32)

    def said(self, key):
        if key not in self.pairs:
            raise damaged(self.path, f"it does not say {key}")
        return self.pairs[key]


def damaged(path, why):
    return AtollError(f"{path} is damaged or no GGUF file: {why}\nhint: copy or download it again")


# ---- blocks to weights; a block is a row of bytes ----


def half(raw, at):
    """A column of F16, as float32."""
    return numpy.ascontiguousarray(raw[:, at : at + 2]).view(numpy.float16).astype(numpy.float32)


def nibbles(raw):
    """Low halves of 16 bytes, then their high halves."""
    return numpy.concatenate([raw & 15, raw >> 4], 1).astype(numpy.float32)


def fifth_bits(raw):
    """32 bits, each worth 16."""
    return numpy.unpackbits(raw, axis=1, bitorder="little").astype(numpy.float32) * 16


def bf16(raw):
    return (numpy.ascontiguousarray(raw).view(numpy.uint16).astype(numpy.uint32) << 16).view(numpy.float32)


# By GGUF's type: weights of a block, its bytes, and what it says.
BLOCKS = {
    0: (1, 4, lambda raw: numpy.ascontiguousarray(raw).view(numpy.float32)),
    1: (1, 2, lambda raw: half(raw, 0)),
    2: (32, 18, lambda raw: half(raw, 0) * (nibbles(raw[:, 2:]) - 8)),  # Q4_0: scale, 32 nibbles
    3: (32, 20, lambda raw: half(raw, 0) * nibbles(raw[:, 4:]) + half(raw, 2)),  # Q4_1: scale, least, 32 nibbles
    6: (32, 22, lambda raw: half(raw, 0) * (nibbles(raw[:, 6:]) + fifth_bits(raw[:, 2:6]) - 16)),  # Q5_0
    7: (32, 24, lambda raw: half(raw, 0) * (nibbles(raw[:, 8:]) + fifth_bits(raw[:, 4:8])) + half(raw, 2)),  # Q5_1
    8: (32, 34, lambda raw: half(raw, 0) * numpy.ascontiguousarray(raw[:, 2:]).view(numpy.int8)),  # Q8_0
    30: (1, 2, bf16),
}


# ---- the model ----

PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def config_of(file):
    """What config.json says."""
    kind = file.said("general.architecture")
    if kind != "llama":
        raise AtollError(f"{file.path}: the architecture {kind} is not supported\nhint: Atoll trains plain Llamas")
    strange = next((name for name in file.places if name.endswith(".bias") or "rope_freqs" in name), None)
    if strange is not None or file.pairs.get("llama.rope.scaling.type", "none") != "none":
        raise AtollError(f"{file.path}: {strange or 'rope scaling'} is not supported\nhint: Atoll trains Llamas without biases and rope scaling")
    heads, width = file.said("llama.attention.head_count"), file.said("llama.embedding_length")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": file.places["token_embd.weight"][0][0] if "token_embd.weight" in file.places else 0,
        "hidden_size": width,
        "intermediate_size": file.said("llama.feed_forward_length"),
        "num_hidden_layers": file.said("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.pairs.get("llama.attention.head_count_kv", heads),
        "head_dim": file.pairs.get("llama.attention.key_length", width // heads),
        "max_position_embeddings": file.said("llama.context_length"),
        "rope_theta": shortest(file.pairs.get("llama.rope.freq_base", 10000.0)),
        "rms_norm_eps": shortest(file.said("llama.attention.layer_norm_rms_epsilon")),
        "tie_word_embeddings": "output.weight" not in file.places,
        "hidden_act": "silu",
        "torch_dtype": "float32",
    }


def shortest(number):
    """The shortest decimal of a float32: 1e-05, not 9.99999974737875e-06."""
    return float(str(numpy.float32(number)))


def tensors_of(file, config):
    """Hugging Face's names and the weights, one after the other."""
    yield "model.embed_tokens.weight", file.tensor("token_embd.weight")
    for layer in range(config["num_hidden_layers"]):
        for part, name in PARTS.items():
            weights = file.tensor(f"blk.{layer}.{name}.weight")
            if name in ("attn_q", "attn_k"):
                weights = halves(weights, config["head_dim"])
            yield f"model.layers.{layer}.{part}.weight", weights
    yield "model.norm.weight", file.tensor("output_norm.weight")
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", file.tensor("output.weight")


def halves(weights, dim):
    """Rows of heads from neighbours together, as llama.cpp turns them, to halves."""
    return weights.reshape(-1, dim // 2, 2, weights.shape[1]).swapaxes(1, 2).reshape(weights.shape)


def tokenizer_of(file):
    """What tokenizer.json says."""
    kind, before = file.said("tokenizer.ggml.model"), file.pairs.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or before not in PRE_TOKENIZERS:
        raise AtollError(f"{file.path} has a tokenizer of the kind {kind}, {before}, which Atoll does not read\n"
                         "hint: copy the model's tokenizer.json into the folder, and say --no-tokenizer")
    tokens, kinds = file.said("tokenizer.ggml.tokens"), file.said("tokenizer.ggml.token_type")
    plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [dict(id=i, content=token, **plain) for i, (token, kind) in enumerate(zip(tokens, kinds)) if kind == CONTROL],
        "normalizer": None,
        "pre_tokenizer": PRE_TOKENIZERS[before],
        "post_processor": None,
        "decoder": BYTE_LEVEL,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
            "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ", 1) for merge in file.said("tokenizer.ggml.merges")],
        },
    }


def write_weights(path, tensors):
    """Writes (name, float32 array) pairs as safetensors."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    tensors = list(tensors)
    for name, weights in tensors:
        header[name] = {"dtype": "F32", "shape": list(weights.shape), "data_offsets": [end, end + weights.nbytes]}
        end += weights.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, weights in tensors:
            file.write(numpy.ascontiguousarray(weights))


def convert(path, folder, tokenizer=True):
    """Makes the folder."""
    file, folder = File(path), Path(folder)
    config = config_of(file)
    said = tokenizer_of(file) if tokenizer else None
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder / "model.safetensors", tensors_of(file, config))
    if said is not None:
        (folder / "tokenizer.json").write_text(json.dumps(said, ensure_ascii=False))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def main():
    paths = [argument for argument in sys.argv[1:] if argument != "--no-tokenizer"]
    if len(paths) != 2:
        print("usage: python -m atoll.gguf FILE.gguf FOLDER [--no-tokenizer]", file=sys.stderr)
        return 2
    try:
        convert(*paths, tokenizer="--no-tokenizer" not in sys.argv)
    except AtollError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{paths[1]} is ready: atoll new RUN --from {paths[1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
