"""A device that is not there is a sentence, not a stack trace."""

import importlib.metadata
import importlib.util
import subprocess
import sys

import atoll
import pytest
import torch
from atoll import devices


def refusal(name):
    with pytest.raises(atoll.AtollError) as refused:
        atoll.TorchEngine(atoll.Llama, device=name)
    assert refused.value.__cause__ is None and "\nhint: " in str(refused.value)
    return str(refused.value)


def test_the_cpu_is_always_there():
    assert devices.find("cpu") == torch.device("cpu")


def test_an_unknown_device_is_met_with_those_that_are_known():
    assert refusal("tpu:0") == (
        "there is no device 'tpu:0'\nhint: Atoll knows cpu, cuda, npu, musa, mlu, xpu, mps, with a number as in cuda:0"
    )


@pytest.mark.parametrize("name", ["cuda:0", "xpu:0", "mps"])
def test_an_absent_device_is_said_to_be_absent(name):
    kind = name.partition(":")[0]
    backend = getattr(torch, kind, None) or getattr(torch.backends, kind, None)
    if backend is not None and backend.is_available():
        pytest.skip(f"{name} is there")
    said = refusal(name)
    assert said.startswith(f"the device '{name}' (") and "cannot be used here: " in said


@pytest.mark.parametrize("name", ["npu", "musa", "mlu"])
def test_a_plugin_that_is_not_installed_is_named(name):
    if importlib.util.find_spec(f"torch_{name}"):
        pytest.skip(f"torch_{name} is installed")
    assert f"needs the PyTorch plug-in torch_{name}, which is not installed\nhint: pip install torch_{name}" in refusal(name)


def test_a_plugin_that_breaks_is_a_sentence(monkeypatch, tmp_path):
    (tmp_path / "torch_npu.py").write_text("raise ImportError('libascendcl.so: cannot open shared object file\\nmore')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch_npu", raising=False)
    assert refusal("npu:0") == (
        "the device 'npu' (Huawei Ascend) cannot be used here: torch_npu cannot be loaded: "
        "libascendcl.so: cannot open shared object file\n"
        "hint: it needs the CANN toolkit (source its set_env.sh) and the Ascend driver; "
        f"torch_npu must be the version that belongs to torch {torch.__version__}"
    )


def test_the_real_ascend_plugin_without_cann_is_a_sentence():
    if importlib.util.find_spec("torch_npu") is None:
        pytest.skip("SKIPPED LOUDLY: torch_npu is not installed; `pip install torch_npu` in the version of torch")
    code = "import atoll; atoll.TorchEngine(atoll.Llama, device='npu:0')"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr
    assert said.splitlines()[-2].startswith("atoll.AtollError: the device 'npu")
    assert "CANN" in said.splitlines()[-1]


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), MemoryError()])
def test_no_memory_is_a_sentence(error):
    engine = atoll.TorchEngine(atoll.Llama)
    with pytest.raises(atoll.AtollError, match='cpu is out of memory for a step of 8 rows\nhint: join with fewer rows='):
        with engine.memory("a step of 8 rows"):
            raise error
