"""A model that is not the run's is refused by name, shape and what was expected."""

import json

import atoll
import pytest
import torch
from atoll import _atoll


def refusal(golden, change=None, model=None):
    shape = json.loads(golden.model) | (change or {})
    engine = atoll.TorchEngine(model or atoll.Llama(shape))
    with pytest.raises(atoll.AtollError) as refused:
        engine.open(_atoll.describe(golden.model, golden.training, 3), atoll.Batches.of(golden.batches()))
    return str(refused.value)


def test_another_shape_is_named(tied):
    said = refusal(tied, {"intermediate_size": 48})
    assert "model.layers.0.mlp.gate_proj.weight has the shape (48, 32), expected (56, 32)" in said
    assert "and 3 more\nhint: " in said and "intermediate_size=56" in said


def test_a_missing_tensor_and_a_superfluous_one_are_named(tied):
    assert "model.layers.1.self_attn.q_proj.weight (32, 32) is missing" in refusal(tied, {"num_hidden_layers": 1})
    assert "lm_head.weight (80, 32) is not in the run" in refusal(tied, {"tie_word_embeddings": False})


def test_a_frozen_tensor_is_named(tied):
    model = atoll.Llama(json.loads(tied.model))
    model.model.norm.weight.requires_grad_(False)
    assert "model.norm.weight is frozen" in refusal(tied, model=model)


def test_wrappers_do_not_change_names(tied):
    wrapped = torch.nn.Module()
    wrapped.module = atoll.Llama(json.loads(tied.model))
    engine = atoll.TorchEngine(wrapped)
    engine.open(_atoll.describe(tied.model, tied.training, 3), atoll.Batches.of(tied.batches()))
    assert set(engine.weights.parameters) == {tensor.name for tensor in engine.run.tensors}
