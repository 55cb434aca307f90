"""Whether transformers reads a folder that Atoll exported: python check_export.py FOLDER

Checks that every weight arrives bit for bit, that the model computes something finite, and that the
tokenizer brings text back unchanged. Needs torch, transformers and safetensors.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXT = "A site trains on its own text: naïve — 漢字 🏝\n\n  <tab>\t, 12345 tokens."


def main(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    loaded = model.state_dict()
    for name, weight in load_file(folder / "model.safetensors").items():
        assert weight.dtype == torch.float32 and torch.equal(loaded.pop(name), weight), name
    assert set(loaded) <= {"lm_head.weight"}, f"transformers made up {sorted(loaded)}"
    if loaded:
        assert model.config.tie_word_embeddings
        assert torch.equal(loaded["lm_head.weight"], model.model.embed_tokens.weight)

    config = json.loads((folder / "config.json").read_text())
    rope = getattr(model.config, "rope_parameters", None) or {"rope_theta": model.config.rope_theta}
    assert rope["rope_theta"] == config["rope_theta"]
    assert model.config.rms_norm_eps == config["rms_norm_eps"]
    assert model.config.head_dim == config["head_dim"]

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0]) == TEXT, tokenizer.decode(ids[0])
    assert tokenizer.eos_token_id == model.config.eos_token_id == model.generation_config.eos_token_id
    logits = model(ids).logits
    assert logits.shape == (1, ids.shape[1], config["vocab_size"]) and bool(torch.isfinite(logits).all())
    print(f"ok: {model.num_parameters()} parameters, {ids.shape[1]} tokens, {type(tokenizer).__name__}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
