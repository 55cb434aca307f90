"""Alignment: equal engines are found equal, and a planted error is found in its layer."""

import json
import os
import subprocess
import sys

import atoll
import conftest
import pytest
import torch
from atoll import _atoll, align, llama
from atoll.run import Run
from torch import nn
from torch.nn import functional

MODEL = dict(vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, head_dim=16, max_position_embeddings=64, rope_theta=10000.0, rms_norm_eps=1e-5,
             tie_word_embeddings=True)
TRAINING = dict(context=32, rows=4)


def engine_of(model=atoll.Llama, precision="fp32", shape=MODEL, training=TRAINING, feed=()):
    engine = atoll.TorchEngine(model, precision=precision)
    engine.open(_atoll.describe(json.dumps(shape), json.dumps(training), 3), atoll.Batches.of(list(feed)))
    return engine


def found(model=atoll.Llama, precision="fp32", shape=MODEL, training=TRAINING):
    engine = engine_of(model, precision, shape, training)
    return align.compare(engine, engine.run).first



def planted(layer, plant):
    """A Llama with an error in one layer."""

    def build(shape):
        model = atoll.Llama(shape)
        plant(model.model.layers[layer])
        return model

    return build


def interleaved(layer):
    """Rotary embedding that turns neighbours, not halves."""

    class Interleaved(llama.Attention):
        def forward(self, x, mask):
            rows, length, _ = x.shape
            split = lambda y, heads: y.view(rows, length, heads, self.dim).transpose(1, 2)
            turns = llama.angles(length, self.dim, self.theta, x.device)
            cos, sin = (part[:, : self.dim // 2].repeat_interleave(2, -1) for part in turns)
            neighbours = lambda y: torch.stack([-y[..., 1::2], y[..., ::2]], -1).flatten(-2)
            turned = lambda y: y * cos + neighbours(y) * sin
            q, k = turned(split(self.q_proj(x), self.heads)), turned(split(self.k_proj(x), self.kv_heads))
            v, group = split(self.v_proj(x), self.kv_heads), self.heads // self.kv_heads
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
            return self.o_proj(llama.attend(q, k, v, mask).transpose(1, 2).reshape(rows, length, -1))

    layer.self_attn.__class__ = Interleaved


def without_epsilon(layer):
    layer.input_layernorm.eps = 0.0


class Transposed(nn.Linear):
    def forward(self, x):
        return functional.linear(x, self.weight.T)


def transposed(layer):
    layer.self_attn.q_proj.__class__ = Transposed  # It is square, so that no shape gives it away.


ERRORS = [
    (interleaved, "model.layers.1.self_attn.heads"),
    (without_epsilon, "model.layers.1.input_layernorm"),
    (transposed, "model.layers.1.self_attn.q_proj"),
]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("tied", [True, False])
def test_equal_engines_are_aligned(precision, tied):
    shape = MODEL | {"tie_word_embeddings": tied}
    assert found(precision=precision, shape=shape) is None
    assert found(precision=precision, shape=shape, training=TRAINING | {"packing": "documents"}) is None


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("plant, module", ERRORS)
def test_a_planted_error_is_found_where_it_is(plant, module, precision):
    assert found(planted(1, plant), precision) == f"the first module that differs is {module}"


def test_an_error_of_the_backward_pass_alone_is_found():
    class Halved(torch.autograd.Function):
        forward = staticmethod(lambda context, x: x.clone())
        backward = staticmethod(lambda context, gradient: gradient / 2)

    class Careless(llama.MLP):
        def forward(self, x):
            return self.down_proj(Halved.apply(functional.silu(self.gate_proj(x)) * self.up_proj(x)))

    careless = lambda layer: setattr(layer.mlp, "__class__", Careless)
    said = found(planted(2, careless))
    assert said.startswith("all outputs agree, and the first gradient that differs is that of model.layers.2.")


def differences(steps, training):
    engine = engine_of(training=training)
    feed = list(align.batches(engine.run, steps, 4, 32))
    return [abs(ours - theirs) for ours, theirs in align.losses(engine, engine.run, steps, feed)]


def test_losses_agree_to_a_millionth_at_first_and_to_a_thousandth_over_a_hundred_steps():
    training = TRAINING | {"optimizer": {"learning_rate": 1e-3, "warmup_steps": 50}}
    apart = differences(100, training)
    assert max(apart[:5]) < 6e-6, "a millionth of a loss of 5.7"
    assert max(apart) < 1e-3


def test_an_optimizer_that_differs_is_found_after_its_first_step():
    engine = engine_of()
    feed = list(align.batches(engine.run, 5, 4, 32))
    other = TRAINING | {"optimizer": {"learning_rate": 4e-3}}
    run = Run.parse(_atoll.describe(json.dumps(MODEL), json.dumps(other), 3))
    _, step = align.curve(align.losses(engine, run, 5, feed), align.TOLERANCES["fp32"])
    assert step == 2


# ---- at joining ----


def at_joining(policy, model, **options):
    engine = engine_of(model, **options)
    run = json.loads(_atoll.describe(json.dumps(MODEL), json.dumps(TRAINING), 3)) | {"align": policy}
    align.at_joining(engine, json.dumps(run))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("plant, module", ERRORS)
def test_a_site_that_differs_is_warned_or_refused(plant, module, precision, caplog):
    with pytest.raises(atoll.AtollError, match=f"does not compute .* differs is {module}\nhint: "):
        at_joining("refuse", planted(1, plant), precision=precision)
    assert not caplog.records
    at_joining("warn", planted(1, plant), precision=precision)
    assert module in caplog.text


def test_a_site_that_is_aligned_hears_nothing(caplog):
    at_joining("refuse", atoll.Llama)
    assert not caplog.records


def test_a_run_refuses_a_site_that_differs_and_goes_on(lab):
    lab = lab(20_000, [('align = "warn"', 'align = "refuse"')])
    coordinator, native = lab.coordinate(), lab.join("native")
    wrong = atoll.TorchEngine(planted(0, without_epsilon))
    with pytest.raises(atoll.AtollError, match="the first module that differs is model.layers.0.input_layernorm\nhint: "):
        atoll.join(lab.ticket("torch"), wrong, **lab.options("torch"))
    assert coordinator.wait() == 0 and native.wait() == 0
    assert all(site["contributions"] == 0 for site in lab.report()["sites"] if site["name"] == "torch")


# ---- from the command line ----


def command(lab, *arguments, folder):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(folder)])}
    line = [conftest.atoll_command(), "align", lab.run, "--interpreter", sys.executable, *arguments]
    done = subprocess.run(list(map(str, line)), env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_the_command_says_aligned_and_exits_well(lab, tmp_path):
    code, said, error = command(lab(20_000), "--steps", 6, folder=tmp_path)
    assert code == 0, error
    assert said.splitlines()[-1].startswith("aligned: ") and "model.layers.0" in said


def test_the_command_names_the_layer_and_fails(lab, tmp_path):
    lab = lab(20_000)
    (tmp_path / "mine.py").write_text(
        "import atoll\ndef build(shape):\n    model = atoll.Llama(shape)\n"
        "    model.model.layers[0].post_attention_layernorm.eps = 0.0\n    return model\n"
    )
    code, said, _ = command(lab, "--python", "mine:build", folder=tmp_path)
    assert code == 1
    assert said.splitlines()[-1] == "differs: the first module that differs is model.layers.0.post_attention_layernorm"
    code, _, error = command(lab, "--python", "mine:absent", folder=tmp_path)
    assert code == 1 and "there is no 'mine:absent'" in error and "\nhint: " in error
