#!/usr/bin/env python3
"""One accelerator, the same Llama: Atoll's engine without Python, PyTorch eager, PyTorch compiled.

    cd gpu && cargo build --release --features vulkan && strip target/release/atoll      # some 60 MB to carry to the machine
    python bench/gpu.py --atoll gpu/target/release/atoll --device vulkan:0 --torch cuda --json results.json

Contenders run one after the other, each as a process of its own, in f32 and with bf16 factors over f32 weights. Tokens per second are
those of the median step; the share is of the device's own rate of large matrix products, measured by PyTorch in the same precision in the
same run. Memory is the device's: PyTorch's own count for PyTorch, what `nvidia-smi` sees more than before for Atoll. What fails or is not there
is said and has no figure. It runs on CPUs too (`--device cpu --torch cpu --models nano`), to try the script.
"""

import argparse
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

TRAIN = Path(__file__).resolve().parents[1] / "crates/atoll-bench/python/train.py"
#            hidden inner layers heads keys head_dim
MODELS = {
    "nano": (128, 384, 4, 4, 2, 32),
    "small": (768, 2048, 12, 12, 4, 64),
    "medium": (1024, 2816, 24, 16, 4, 64),
    "large": (2048, 5632, 22, 32, 4, 64),
}
PRODUCT = """
import sys, time, torch
device, kind, n = sys.argv[1], getattr(torch, sys.argv[2]), int(sys.argv[3])
a, b = (torch.randn(n, n, device=device, dtype=kind) for _ in range(2))
wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
best = 1e9
for _ in range(10):
    wait(); began = time.perf_counter()
    for _ in range(4): a @ b
    wait(); best = min(best, (time.perf_counter() - began) / 4)
print(2 * n**3 / best)
"""


def main():
    arguments = parse()
    rows = []
    print(f"{'model':8} {'factors':8} {'contender':16} {'tokens/s':>10} {'s a step':>9} {'share':>7} {'memory':>10}")
    for precision in arguments.precisions.split(","):
        ceiling = product_rate(arguments, precision)
        for model in arguments.models.split(","):
            for name, run in contenders(arguments).items():
                rows.append({"model": model, "factors": precision, "contender": name, **attempt(run, arguments, model, precision)})
                show(rows[-1], ceiling)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"machine": machine(arguments), "rows": rows}, indent=1))
    print(f"\nmachine: {machine(arguments)}")
    sys.exit(0 if all("error" not in row for row in rows) else 1)


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--atoll", required=True, help="an atoll that knows the device")
    parser.add_argument("--device", default="vulkan:0", help="its name at Atoll: see `atoll devices`")
    parser.add_argument("--torch", default="cuda", help="its name at PyTorch; 'none' leaves PyTorch out")
    parser.add_argument("--models", default="small,large", help=", ".join(MODELS))
    parser.add_argument("--precisions", default="f32,bf16")
    parser.add_argument("--vocab", type=int, default=50304)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--timeout", type=float, default=240, help="seconds for each contender")
    parser.add_argument("--json", help="a file for the results")
    return parser.parse_args()


def contenders(arguments):
    found = {"Atoll": atoll}
    if arguments.torch != "none":
        found["PyTorch eager"] = lambda *of: pytorch(*of, compiled=False)
        found["PyTorch compiled"] = lambda *of: pytorch(*of, compiled=True)
    return found


def attempt(run, *of):
    """What it measured, or why it did not."""
    try:
        return run(*of)
    except subprocess.TimeoutExpired:
        return {"error": "it took too long"}
    except (subprocess.CalledProcessError, OSError, ValueError, KeyError) as error:
        said = getattr(error, "stderr", None) or str(error)
        return {"error": said.strip().splitlines()[-1] if said.strip() else repr(error)}


def atoll(arguments, model, precision):
    sizes = ["--preset", model, "--vocab", arguments.vocab, "--context", arguments.context, "--rows", arguments.rows]
    line = [arguments.atoll, "measure", "--json", "--device", arguments.device, "--precision", precision, "--steps", arguments.steps, *sizes]
    with Memory() as memory:
        done = subprocess.run(list(map(str, line)), capture_output=True, text=True, timeout=arguments.timeout, check=True)
    said = json.loads(done.stdout)
    return {
        "parameters": said["parameters"],
        "tokens_per_second": said["tokens_per_second"],
        "seconds": said["median_seconds"],
        "gflops": said["gflops"],
        "device_bytes": memory.grown,
    }


def pytorch(arguments, model, precision, compiled):
    hidden, inner, layers, heads, keys, head_dim = MODELS[model]
    spec = dict(vocab=arguments.vocab, d=hidden, inner=inner, layers=layers, heads=heads, keys=keys, head_dim=head_dim)
    spec |= dict(length=arguments.context, rows=arguments.rows, precision=precision, compiled=compiled, threads=0, device=arguments.torch)
    steps = "2\n" + "1\n" * arguments.steps  # The first two compile and touch memory.
    line = [sys.executable, str(TRAIN), json.dumps(spec)]
    done = subprocess.run(line, input=steps, capture_output=True, text=True, timeout=arguments.timeout, check=True)
    answers = [json.loads(answer) for answer in done.stdout.splitlines()][1:]
    seconds = sorted(answer["seconds"] for answer in answers)[len(answers) // 2]
    tokens = arguments.rows * arguments.context
    return {"tokens_per_second": tokens / seconds, "seconds": seconds, "device_bytes": answers[-1].get("device_bytes")}


def product_rate(arguments, precision):
    """Operations per second of a large product, the device's practical peak; none if there is no PyTorch to measure it."""
    if arguments.torch == "none":
        return None
    size = 1024 if arguments.torch == "cpu" else 8192
    line = [sys.executable, "-c", PRODUCT, arguments.torch, {"f32": "float32", "bf16": "bfloat16"}[precision], str(size)]
    done = subprocess.run(line, capture_output=True, text=True)
    return float(done.stdout) if done.returncode == 0 else None


class Memory:
    """Looks at the first NVIDIA device's memory while something else uses it, where `nvidia-smi` tells."""

    def __enter__(self):
        self.grown, self.most, self.over = None, 0, threading.Event()
        self.before = self.used()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()
        if self.before is not None:
            self.grown = max(self.most - self.before, 0)

    def watch(self):
        while self.before is not None and not self.over.wait(0.2):
            self.most = max(self.most, self.used() or 0)

    @staticmethod
    def used():
        if not shutil.which("nvidia-smi"):
            return None
        asked = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
        done = subprocess.run(asked, capture_output=True, text=True)
        return int(done.stdout.strip()) << 20 if done.returncode == 0 else None


def show(row, ceiling):
    head = f"{row['model']:8} {row['factors']:8} {row['contender']:16}"
    if "error" in row:
        print(f"{head} MISSING: {row['error']}")
        return
    row["share"] = share = share_of(row, ceiling)
    memory = row["device_bytes"]
    print(
        f"{head} {row['tokens_per_second']:>10,.0f} {row['seconds']:>9.4f} {f'{share:.1%}' if share else '':>7}"
        f" {f'{memory / 2**30:.2f} GiB' if memory else '':>10}",
        flush=True,
    )


FLOP = {}


def share_of(row, ceiling):
    """The share of the ceiling: per token as many operations for all contenders as Atoll counts for the model."""
    if "gflops" in row:
        FLOP[row["model"]] = row["gflops"] * 1e9 / row["tokens_per_second"]
    flop = FLOP.get(row["model"])
    return row["tokens_per_second"] * flop / ceiling if flop and ceiling else None


def machine(arguments):
    smi = shutil.which("nvidia-smi")
    if smi:
        return subprocess.run([smi, "--query-gpu=name,driver_version", "--format=csv,noheader"], capture_output=True, text=True).stdout.strip()
    return f"no NVIDIA driver; Atoll on {arguments.device}, PyTorch on {arguments.torch}"


if __name__ == "__main__":
    main()
