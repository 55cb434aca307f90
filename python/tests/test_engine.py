"""TorchEngine obeys the laws of all engines, computes the golden numbers, and agrees with the native engine."""

import json
import math

import atoll
import numpy
import pytest
import torch
from atoll import _atoll


def engine_of(golden, **options):
    """An opened engine with the golden weights and batches."""
    engine = atoll.TorchEngine(atoll.Llama, **options)
    engine.open(_atoll.describe(golden.model, golden.training, golden.FRAGMENTS), atoll.Batches.of(golden.batches()))
    for fragment, part in enumerate(golden.weights(engine.run)):
        engine.write(fragment, part)
    return engine


def test_it_obeys_the_laws_of_all_engines(golden):
    def make():
        torch.manual_seed(3)
        return atoll.TorchEngine(atoll.Llama)

    _atoll.check_laws(make, golden.model, golden.training, golden.FRAGMENTS)


def test_parameters_in_bf16_obey_them_too(tied):
    def make():
        torch.manual_seed(3)
        return atoll.TorchEngine(lambda config: atoll.Llama(config).bfloat16())

    _atoll.check_laws(make, tied.model, tied.training, tied.FRAGMENTS)


def test_a_broken_engine_is_found(tied):
    class Forgetful(atoll.TorchEngine):
        def write(self, fragment, weights):
            pass

    with pytest.raises(atoll.AtollError, match="read must return exactly what write was given"):
        _atoll.check_laws(lambda: Forgetful(atoll.Llama), tied.model, tied.training, tied.FRAGMENTS)


def test_logits_and_gradients_are_those_of_hugging_face(golden):
    engine = engine_of(golden)
    batch = engine.next_batch()
    scores = engine.model(batch.tokens[:, :-1]).detach().numpy()
    assert abs(scores.ravel() - golden.tensors["logits"].ravel()).max() < 1e-5
    loss, _ = engine.gradients(batch)
    assert abs(loss - golden.numbers["loss"]) < 1e-6
    for tensor, parameter in engine.tensors:
        theirs = golden.tensors["gradient." + tensor.name].reshape(tensor.shape)
        assert abs(parameter.grad.numpy() - theirs).max() < 2e-6, tensor.name


def test_training_is_that_of_hugging_face(golden):
    engine = engine_of(golden)
    for step, theirs in enumerate(golden.numbers["losses"]):
        _, ours = engine.train(1)
        assert abs(ours - theirs) < 1e-5, f"step {step}"
    for tensor, parameter in engine.tensors:
        weights = parameter.detach().double().flatten()
        projection = (weights * torch.arange(len(weights)).double().cos()).sum().item()
        assert abs(weights.norm().item() - golden.numbers["final_norms"][tensor.name]) < 1e-5, tensor.name
        assert abs(projection - golden.numbers["final_projections"][tensor.name]) < 2e-5, tensor.name


@pytest.mark.parametrize("embedding_rate, embedding_floor", [(1.0, 0.0), (8.0, 0.0), (64.0, 1.0)])
def test_losses_agree_with_the_native_engine_to_a_millionth(golden, embedding_rate, embedding_floor):
    training = json.loads(golden.training)
    training["optimizer"]["embedding_rate"] = embedding_rate
    training["optimizer"]["embedding_floor"] = embedding_floor
    golden.numbers["optimizer"] = training["optimizer"]
    torch_engine = engine_of(golden)
    native = atoll.NativeEngine(golden.model, golden.training, golden.FRAGMENTS, atoll.Batches.of(golden.batches()))
    for fragment, part in enumerate(golden.weights(torch_engine.run)):
        native.write(fragment, part)
    for step in range(5):
        ours, theirs = torch_engine.train(1)[1], native.train(1)[1]
        assert abs(ours - theirs) < 1e-6 * max(1.0, abs(theirs)), f"step {step}: {ours} and {theirs}"
    batch = golden.batches()[0]
    nats = torch_engine.evaluate(atoll.Batches.of([batch]).next(len(batch)))
    assert math.isclose(nats, native.evaluate(batch), rel_tol=1e-6)


def test_micro_batches_add_up_to_the_whole(tied):
    whole = engine_of(tied)
    whole_loss, whole_norm = whole.gradients(whole.next_batch())
    parts = engine_of(tied)
    batch = parts.next_batch()
    parts.run = type(parts.run)(parts.run.model, parts.run.training, 1, parts.run.tensors, parts.run.fragments)
    loss, norm = parts.gradients(batch)
    assert math.isclose(loss, whole_loss, rel_tol=1e-6) and math.isclose(norm, whole_norm, rel_tol=1e-5)


def test_bf16_learns_what_fp32_learns(tied):
    exact, rounded = engine_of(tied), engine_of(tied, precision="bf16")
    for _ in range(len(tied.batches())):
        assert abs(exact.train(1)[1] - rounded.train(1)[1]) < 0.02


def test_what_bf16_parameters_round_away_is_not_lost(tied):
    engine = atoll.TorchEngine(lambda config: atoll.Llama(config).bfloat16())
    engine.open(_atoll.describe(tied.model, tied.training, 1), atoll.Batches.of(tied.batches()))
    exact = tied.weights(engine.run)[0]
    engine.write(0, exact)
    tiny = numpy.full_like(exact, 1e-6)
    for _ in range(100):
        engine.add(0, tiny)
        exact = exact + tiny
    after = numpy.empty_like(exact)
    engine.read(0, after)
    assert numpy.array_equal(after, exact)


def test_a_token_sees_only_its_own_document():
    from atoll.engine import sees

    starts = torch.tensor([[0, 0, 2, 2]])
    assert sees(starts).int().tolist() == [[[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]]


def test_what_is_not_finite_is_named_before_it_reaches_the_weights(tied):
    engine = engine_of(tied)
    engine.weights.parameters["model.norm.weight"].data[0] = math.nan
    before = [parameter.detach().clone() for _, parameter in engine.tensors]
    with pytest.raises(atoll.NonFinite, match="the loss became non-finite at inner step 1\nhint: "):
        engine.train(1)
    for (tensor, parameter), was in zip(engine.tensors, before):
        assert torch.equal(parameter.nan_to_num(), was.nan_to_num()), tensor.name


def test_the_feed_ends_with_starved(tied):
    engine = engine_of(tied)
    engine.train(len(tied.batches()))
    with pytest.raises(atoll.Starved):
        engine.train(1)


def test_own_optimizers_are_stepped(tied):
    engine = engine_of(tied, optimizer=lambda parameters: torch.optim.SGD(parameters, 0.1))
    first = engine.train(1)[1]
    assert math.isfinite(first) and isinstance(engine.optimizer, torch.optim.SGD)
