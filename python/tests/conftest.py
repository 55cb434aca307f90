"""What the tests share: a small run with real processes, and the tiny models whose numbers are known."""

import json
import os
import random
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import atoll  # Before torch.
import numpy
import pytest

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "crates/atoll-cpu/tests/golden"
PATIENCE_SECONDS = 120
WORDS = ["reef", "tide", "palm", "shell", "current", "island", "lagoon", "coral", "sand", "wave"]
SMALL = """preset = "nano"
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 1
num_attention_heads = 2
num_key_value_heads = 1
head_dim = 16"""


def atoll_command():
    """The `atoll` command: $ATOLL, or the newest that was built here."""
    named = os.environ.get("ATOLL")
    built = [ROOT / "target" / profile / "atoll" for profile in ("release", "debug")]
    found = [Path(named)] if named else [path for path in built if path.exists()]
    if not found:
        pytest.fail("there is no `atoll` command; `cargo build -p atoll` makes one, or name one in $ATOLL")
    return str(max(found, key=lambda path: path.stat().st_mtime))


class Lab:
    """A run folder for a model of about 20,000 weights, some text, and processes that end with the test."""

    def __init__(self, folder, tokens, changes=()):
        self.folder, self.processes = folder, []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        self.text, self.run = folder / "text", folder / "run"
        self.write_text(self.text, 60)
        self.atoll("new", self.run, "--data", self.text, "--vocab", 300, "--preset", "nano", "--tokens", tokens)
        usual = [
            ('preset = "nano"', SMALL),
            ("context = 256", "context = 32"),
            ('steps = "auto"', "steps = 8"),
            ('keep = "snapshots"', 'keep = "all"'),
        ]
        for before, after in [*usual, *changes]:
            self.change(before, after)

    def write_text(self, folder, documents):
        folder.mkdir()
        for document in range(documents):
            words = random.Random(document).choices(WORDS, k=600)
            (folder / f"{document:03}.txt").write_text(" ".join(words))

    def change(self, before, after):
        path = self.run / "run.toml"
        text = path.read_text()
        assert before in text, f"run.toml does not say {before}"
        path.write_text(text.replace(before, after, 1))

    def atoll(self, *arguments):
        done = subprocess.run([atoll_command(), *map(str, arguments)], stdin=subprocess.DEVNULL, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def spawn(self, name, arguments):
        log = open(self.folder / f"{name}.log", "w")
        process = subprocess.Popen(list(map(str, arguments)), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.processes.append(process)
        return process

    def log(self, name):
        return (self.folder / f"{name}.log").read_text()

    def coordinate(self):
        process = self.spawn("coordinator", [atoll_command(), "coordinate", self.run, "--listen", self.address])
        host, port = self.address.split(":")
        self.until("the coordinator listens", lambda: not socket.socket().connect_ex((host, int(port))))
        return process

    def ticket(self, site):
        return self.atoll("ticket", self.run, site, "--address", self.address)

    def join(self, site, *more, command=None):
        arguments = ["join", self.ticket(site), "--data", self.text, "--dir", self.folder / site]
        threads = [] if "--device" in more else ["--threads", 1]
        return self.spawn(site, [command or atoll_command(), *arguments, *threads, *more])

    def shape(self):
        """The run's model, in the words of config.json."""
        vocabulary = int(re.search(r"# tokenizer .* \((\d+) tokens\)", self.atoll("check", self.run))[1])
        said = dict(line.split(" = ") for line in SMALL.splitlines()[1:])
        rest = dict(max_position_embeddings=32, rope_theta=10000.0, rms_norm_eps=1e-5, tie_word_embeddings=True)
        return dict(vocab_size=vocabulary, **{key: int(value) for key, value in said.items()}, **rest)

    def options(self, site):
        """What a Python site joins with."""
        return dict(data=self.text, dir=self.folder / site)

    def status(self):
        try:
            return json.loads((self.run / "status.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return None

    def state(self, site):
        """What the coordinator last said of a site; None before it has said anything."""
        sites = (self.status() or {}).get("sites", [])
        return next((known["state"] for known in sites if known["name"] == site), None)

    def report(self):
        self.until("the report", (self.run / "report.json").exists)
        return json.loads((self.run / "report.json").read_text())

    def until(self, what, holds):
        began = time.monotonic()
        while not holds():
            assert time.monotonic() - began < PATIENCE_SECONDS, f"waited in vain for {what}"
            time.sleep(0.02)

    def end(self):
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def lab(tmp_path):
    """Makes labs: `lab(tokens, [(line of run.toml, new line), ...])`."""
    labs = []

    def make(tokens, changes=()):
        (folder := tmp_path / f"lab{len(labs)}").mkdir()
        labs.append(Lab(folder, tokens, changes))
        return labs[-1]

    yield make
    for each in labs:
        each.end()


class Golden:
    """The numbers that `make_golden.py` wrote with Hugging Face's Llama and PyTorch's optimizers."""

    FRAGMENTS = 3

    def __init__(self, name):
        self.numbers = json.loads((GOLDEN / f"{name}.json").read_text())
        self.tensors = safetensors(GOLDEN / f"{name}.safetensors")

    @property
    def model(self):
        return json.dumps(self.numbers["model"])

    @property
    def training(self):
        numbers = self.numbers
        said = dict(context=numbers["length"], rows=numbers["rows"], optimizer=numbers["optimizer"], muon=numbers["muon"])
        return json.dumps({key: value for key, value in said.items() if value is not None})

    def batches(self):
        return list(self.tensors["tokens"].reshape(-1, self.numbers["rows"], self.numbers["length"] + 1).astype(numpy.int64))

    def weights(self, run):
        """The first weights, a vector per fragment."""
        flat = lambda tensor: self.tensors["weight." + tensor.name].ravel()
        return [numpy.concatenate([flat(tensor) for tensor in members]) for members in run.fragments]


def safetensors(path):
    """All tensors of a file; the format is a length, a JSON header and bytes."""
    kinds = {"F32": numpy.float32, "I32": numpy.int32}
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)

    def tensor(about):
        first, last = about["data_offsets"]
        return numpy.frombuffer(data[start + first : start + last], kinds[about["dtype"]]).reshape(about["shape"])

    return {name: tensor(about) for name, about in header.items()}


@pytest.fixture(params=["tied", "untied", "muon"])
def golden(request):
    return Golden(request.param)


@pytest.fixture
def tied():
    return Golden("tied")


def pytest_report_header(config):
    import torch

    return f"torch {torch.__version__}, python {sys.version.split()[0]}"
