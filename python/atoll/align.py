"""Proof that an engine computes what the native engine computes, or the first module in which it does not.

    probe weights, tokens ──▶ both engines ──▶ every module's output      forward, in the order of computing
                                               every tensor's gradient    backward
    first weights, batches ─▶ both engines ──▶ the loss of every step     optimizer and schedule

Two arrays differ by ‖ours − theirs‖ / ‖theirs‖. What comes before the first module that differs agrees, so the error is
there. `atoll align` shows all of it; a site that joins compares one small batch, module by module if its engine can be
looked into, and by its loss if not.
"""

import argparse
import ctypes
import importlib
import json
import logging
import math
import sys
from dataclasses import dataclass

import numpy

from ._atoll import AtollError, Batch, Batches, NativeEngine, describe
from .run import Run

log = logging.getLogger("atoll")


@dataclass(frozen=True)
class Tolerance:
    """How far an engine that computes in a precision may be from the native one in fp32."""

    output: float
    """Of a module's output, per root of the layers before it."""
    gradient: float
    """Of a tensor's gradient, per root of the model's layers."""
    first_losses: float
    """Of the losses of the first five steps, in nats per token."""
    losses: float
    """Of all later ones."""


TOLERANCES = {
    "fp32": Tolerance(output=2e-5, gradient=1e-4, first_losses=1e-6, losses=1e-3),
    "bf16": Tolerance(output=2e-2, gradient=3e-2, first_losses=2e-2, losses=5e-2),
    "fp16": Tolerance(output=3e-3, gradient=6e-3, first_losses=3e-3, losses=2e-2),
}
FIRST_STEPS = 5
# What is computed at joining: enough tokens to see any error, few enough for a large model on the host's processor.
ROWS, TOKENS = 2, 32
# What each of these modules multiplies its matrix with is another module's output.
FED_BY = {
    "self_attn.q_proj": "input_layernorm",
    "self_attn.k_proj": "input_layernorm",
    "self_attn.v_proj": "input_layernorm",
    "mlp.gate_proj": "post_attention_layernorm",
    "mlp.up_proj": "post_attention_layernorm",
}


# ---- what both engines are given ----


def probe_weights(run, seed=7):
    """Weights by tensor name under which each part of a Llama shows in the loss.

    First weights hide errors: attention is nearly even, so that positions do not matter, and ε is small beside what is
    normed. Here scores have the size of one, the residual stream that of √ε, and logits are near one again.
    """
    random = numpy.random.default_rng(seed)
    quiet = 2 * math.sqrt(run.model["rms_norm_eps"])
    return {tensor.name: probe(run, tensor, quiet, random) for tensor in run.tensors}


def probe(run, tensor, quiet, random):
    noise = random.standard_normal(tensor.shape, dtype=numpy.float32)
    if tensor.kind == "vector":
        loud = 1 / (quiet * math.sqrt(run.model["hidden_size"])) if tensor.name == "model.norm.weight" else 1.0
        is_tied = run.model["tie_word_embeddings"]
        return (1 + 0.1 * noise) * numpy.float32(loud if is_tied else 1.0)
    if tensor.name == "model.embed_tokens.weight":
        return noise * numpy.float32(quiet)
    into_stream = tensor.name.endswith(("o_proj.weight", "down_proj.weight"))
    return noise * numpy.float32((quiet if into_stream else 1.0) / math.sqrt(tensor.shape[1]))


def first_weights(run, seed=1):
    """Weights by tensor name as a run may begin with."""
    random = numpy.random.default_rng(seed)
    normal = lambda shape: random.standard_normal(shape, dtype=numpy.float32) * numpy.float32(0.02)
    ones = lambda shape: numpy.ones(shape, numpy.float32)
    return {tensor.name: (ones if tensor.kind == "vector" else normal)(tensor.shape) for tensor in run.tensors}


def batches(run, count, rows, length, seed=3):
    """Made-up text with something to learn in it, (rows, length + 1) tokens each: each token has four successors."""
    random = numpy.random.default_rng(seed)
    vocabulary = run.model["vocab_size"]
    successors = random.integers(vocabulary, size=(vocabulary, 4))
    for _ in range(count):
        tokens = numpy.empty((rows, length + 1), numpy.int64)
        tokens[:, 0] = random.integers(vocabulary, size=rows)
        for at in range(length):
            tokens[:, at + 1] = successors[tokens[:, at], random.integers(4, size=rows)]
        yield tokens


def probe_batch(run):
    """A small batch; packed by document if the run's are."""
    length = min(TOKENS, run.training["context"])
    tokens = next(batches(run, 1, min(ROWS, run.rows), length))
    if run.training["packing"] != "documents":
        return Batch(tokens)
    starts = numpy.zeros((len(tokens), length), numpy.int64)
    starts[:, length // 2 :] = length // 2
    return Batch(tokens, starts)


def write(engine, run, weights):
    """Gives an engine the weights, which are by tensor name."""
    for fragment, members in enumerate(run.fragments):
        flat = numpy.concatenate([weights[tensor.name].ravel() for tensor in members])
        engine.write(fragment, flat.astype(numpy.float32, copy=False))


def native(run, feed=()):
    """The native engine for the same run."""
    model, training = json.dumps(run.model), json.dumps(run.training)
    return NativeEngine(model, training, len(run.fragments), Batches.of(list(feed)))


# ---- comparing ----


@dataclass(frozen=True)
class Difference:
    """How much one thing differs, and how much it may."""

    what: str
    """A module, or a tensor whose gradient it is."""
    layer: str
    """The layer that it belongs to, or itself."""
    value: float
    allowed: float

    @property
    def is_within(self):
        return self.value <= self.allowed  # Not if it is NaN.


@dataclass(frozen=True)
class Found:
    """What the comparison of one batch found: modules in the order of computing, tensors in the model's."""

    outputs: list
    gradients: list

    @property
    def first(self):
        """Where the error is, in words; None if there is none."""
        for output in self.outputs:
            if not output.is_within:
                return f"the first module that differs is {output.what}"
        for gradient in reversed(self.gradients):  # Backward comes from the loss.
            if not gradient.is_within:
                return f"all outputs agree, and the first gradient that differs is that of {gradient.what}"
        return None


class Probe:
    """Weights and a batch for both engines, and what the native one makes of them."""

    def __init__(self, run):
        self.run, self.weights, self.batch = run, probe_weights(run), probe_batch(run)
        reference = native(run)
        write(reference, run, self.weights)
        self.loss, self.outputs, self.gradients = reference.trace(self.batch)

    def give(self, engine):
        """Writes the weights, which the engine keeps."""
        write(engine, self.run, self.weights)


def compare(engine, run):
    """Compares one batch's outputs and gradients under probe weights, which the engine keeps."""
    probe = Probe(run)
    probe.give(engine)
    return differences(engine, probe)


def differences(engine, probe):
    """Compares an engine that has the probe's weights."""
    tolerance, run = TOLERANCES[precision_of(engine)], probe.run
    ours = Watch(engine.model, [name for name, _ in probe.outputs])
    with ours:
        own_gradients = engine.gradients_of(probe.batch)
    layers = run.model["num_hidden_layers"]
    depth = lambda name: math.sqrt(1 + (int(name.split(".")[2]) if name.startswith("model.layers.") else layers))
    seen = ours.seen
    forward = [
        Difference(name, layer_of(name), difference(seen[name], theirs), tolerance.output * depth(name))
        for name, theirs in known(probe.outputs, probe.weights)
        if name in seen
    ]
    backward = [
        Difference(name, layer_of(name), difference(own_gradients[name], theirs), tolerance.gradient * depth("all"))
        for name, theirs in probe.gradients
    ]
    return Found(forward, backward)


def known(outputs, weights):
    """The reference's outputs, and those of projections, which follow from them."""
    for name, values in outputs:
        yield name, values
        layer, _, part = name.rpartition(".")
        for module in [module for module, feeder in FED_BY.items() if feeder == part]:
            yield f"{layer}.{module}", values @ weights[f"{layer}.{module}.weight"].T
    yield "lm_head", values @ weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).T


def difference(ours, theirs):
    """‖ours − theirs‖ / ‖theirs‖."""
    ours, theirs = ours.ravel().astype(numpy.float64), theirs.ravel().astype(numpy.float64)
    if len(ours) != len(theirs):
        return math.inf
    return float(numpy.linalg.norm(ours - theirs) / max(numpy.linalg.norm(theirs), 1e-30))


def layer_of(name):
    """`model.layers.3.mlp` belongs to `model.layers.3`, everything else to the module itself."""
    parts = name.removesuffix(".weight").split(".")
    return ".".join(parts[:3]) if parts[:2] == ["model", "layers"] else ".".join(parts)


class Watch:
    """Sees what modules give while it is entered: `seen`, by the module's name, (N, width) arrays in fp32."""

    def __init__(self, model, names):
        from .weights import bare

        self.modules = {bare(name): module for name, module in model.named_modules()}
        self.names, self.parts, self.hooks = names, {}, []

    def __enter__(self):
        for name in self.names:
            layer, _, part = name.rpartition(".")
            if part == "heads" and f"{layer}.o_proj" in self.modules:
                projection = self.modules[f"{layer}.o_proj"]
                self.hooks.append(projection.register_forward_pre_hook(self.note_input(name)))
            elif name in self.modules:
                self.watch(name)
            for module in [module for module, feeder in FED_BY.items() if feeder == part]:
                self.watch(f"{layer}.{module}")
        self.watch("lm_head")
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()

    def watch(self, name):
        if name in self.modules:
            self.hooks.append(self.modules[name].register_forward_hook(lambda _, __, output: self.note(name, output)))

    def note_input(self, name):
        return lambda _, inputs: self.note(name, inputs)

    def note(self, name, output):
        tensor = output[0] if isinstance(output, (tuple, list)) else output
        host = tensor.detach().float().cpu().numpy()
        self.parts.setdefault(name, []).append(host.reshape(-1, host.shape[-1]))

    @property
    def seen(self):
        return {name: numpy.concatenate(parts) for name, parts in self.parts.items()}


def precision_of(engine):
    return getattr(engine, "computes_in", "fp32")


# ---- at joining ----


def at_joining(engine, run):
    """Compares an opened engine with the native one before it takes part; warns or refuses as run.toml says.

    Any engine is asked for a loss. One that can say what its modules give is compared module by module too, and the first
    that differs is named. Weights are left as probes: the coordinator's come next.
    """
    run = Run.parse(run)
    if run.align is None:
        return
    said = objection(engine, run)
    return_free_memory()  # The native engine's, as much as several models.
    if said is not None and run.align == "refuse":
        raise AtollError(said)
    if said is not None:
        log.warning(said)


def objection(engine, run):
    """Why an opened engine should not take part in a run, or None."""
    probe = Probe(run)
    probe.give(engine)
    theirs, ours = probe.loss, engine.evaluate(probe.batch) / probe.batch.tokens[:, 1:].size
    found = differences(engine, probe) if hasattr(engine, "gradients_of") else None
    where = found.first if found is not None else None
    if where is None and abs(ours - theirs) <= TOLERANCES[precision_of(engine)].output * (1 + abs(theirs)):
        return None
    return (
        f"this engine does not compute what the native engine does: on the same weights and tokens its loss is {ours:.6g}, "
        f"not {theirs:.6g}{'' if where is None else f'; {where}'}\nhint: `atoll align` shows every layer; "
        'align = "warn" in run.toml lets such sites take part'
    )


def return_free_memory():
    """Gives what glibc's allocator keeps for later back to the system; nothing elsewhere."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


# ---- from the command line ----


def losses(engine, run, steps, feed):
    """Pairs of our and the native engine's loss, step by step from the same first weights."""
    reference, weights = native(run, feed), first_weights(run)
    engine.leased, engine.steps = Batches.of(feed), 0
    write(reference, run, weights)
    write(engine, run, weights)
    for _ in range(steps):
        yield engine.train(1)[1], reference.train(1)[1]


def table(found):
    """Lines with the largest difference of each layer."""
    layers = list(dict.fromkeys(difference.layer for difference in [*found.outputs, *found.gradients]))
    order = lambda name: (name != "model.embed_tokens", name in ("model.norm", "lm_head"), name == "lm_head")
    worst = lambda differences: max(differences, key=lambda each: math.inf if math.isnan(each.value) else each.value / each.allowed)
    yield f"{'':24} {'forward':>10} {'allowed':>10} {'backward':>10} {'allowed':>10}"
    for layer in sorted(layers, key=order):
        parts = [[each for each in kind if each.layer == layer] for kind in (found.outputs, found.gradients)]
        shown = [f"{worst(part).value:10.1e} {worst(part).allowed:10.1e}" if part else " " * 21 for part in parts]
        differs = any(not each.is_within for part in parts for each in part)
        yield f"{layer:24} {shown[0]} {shown[1]}{'   differs' if differs else ''}".rstrip()


def curve(pairs, tolerance):
    """Lines with some of the losses, and the first step whose losses differ too much, or None."""
    lines, first = [f"{'step':>6} {'loss':>12} {'native':>12} {'difference':>12}"], None
    for step, (ours, theirs) in enumerate(pairs, 1):
        allowed = (tolerance.first_losses if step <= FIRST_STEPS else tolerance.losses) * max(1.0, abs(theirs))
        differs = not abs(ours - theirs) <= allowed
        if step <= FIRST_STEPS or step % 20 == 0 or (differs and first is None):
            lines.append(f"{step:6} {ours:12.6f} {theirs:12.6f} {ours - theirs:12.1e}{'   differs' if differs else ''}")
        first = step if differs and first is None else first
    return lines, first


def engine_of(name, device, precision):
    """The engine, or an engine of the model, that `module:function` makes."""
    from .engine import TorchEngine

    module, _, function = name.partition(":")
    sys.path.insert(0, "")
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise AtollError(f"there is no '{name}': {error}\nhint: name a function from the model's shape, a dict, to a module, as "
                         "my_models:build") from None
    return make if isinstance(make, TorchEngine) else TorchEngine(make, device=device, precision=precision)


def report(engine, said, steps):
    """Prints both comparisons; whether all is within what is allowed."""
    text = describe(json.dumps(said["model"]), json.dumps(said["training"]), said["fragments"])
    run = Run.parse(text)
    feed = list(batches(run, steps, run.samples, run.training["context"]))
    engine.open(text, Batches.of(feed))
    print(f"{said['name']}: {engine.describe()}, beside the native engine in fp32\n")
    found = compare(engine, run)
    print("\n".join(table(found)), flush=True)
    lines, step = curve(losses(engine, run, steps, feed), TOLERANCES[precision_of(engine)])
    print("\n" + "\n".join(lines) + "\n")
    if found.first is not None:
        print(f"differs: {found.first}")
    elif step is not None:
        print(f"differs: outputs and gradients agree, losses from step {step} on do not: look at the optimizer and its schedule")
    else:
        print(f"aligned: {len(found.outputs)} outputs, {len(found.gradients)} gradients and {steps} steps agree")
    return found.first is None and step is None


def main():
    """`python -m atoll.align`, which `atoll align` calls with the run as JSON on standard input."""
    arguments = argparse.ArgumentParser(prog="atoll align")
    arguments.add_argument("--python", default="atoll:Llama")
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--precision", default="fp32")
    arguments.add_argument("--steps", type=int, default=10)
    wishes = arguments.parse_args()
    try:
        engine = engine_of(wishes.python, wishes.device, wishes.precision)
        return 0 if report(engine, json.load(sys.stdin), wishes.steps) else 1
    except AtollError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
