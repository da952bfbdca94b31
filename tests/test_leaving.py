"""How a run on GPUs ends: no traceback, right exit codes, one line for what a flag can prevent.

There is no GPU here: what it would say or do is put in its place.
"""

import dpo
import pytest
import torch
from conftest import ROOT, run

import common

# A group as on GPUs, which is not gloo alone.
COMPOSITE = """
import sys; sys.path[:0] = ['.', 'methods']
import torch.distributed as dist
make = dist.init_process_group
dist.init_process_group = lambda backend, **others: make("cpu:gloo", **others)
import common, dpo
"""
SHORT = "batch_size=8, max_steps=2, eval_pairs=2, out={out!r}, model={model!r}, data={data!r}"


def complaints(done):
    """Lines on stderr, but one that torch prints of a group "cpu:gloo", not of one with NCCL."""
    return [line for line in done.stderr.splitlines() if "function hasHooks" not in line]


def script(blank, tmp_path, lines):
    """A file with COMPOSITE, then lines in which ARGS stands for the options of a short run."""
    paths = dict(
        out=str(tmp_path / "run"), model=str(blank / "model"), data=str(blank / "pairs.jsonl")
    )
    args = f"dpo.Args({SHORT.format(**paths)})"
    (tmp_path / "script.py").write_text(COMPOSITE + lines.replace("ARGS", args))
    return tmp_path / "script.py"


@pytest.mark.parametrize("processes", [0, 2])
def test_the_end_of_a_run(processes, blank, tmp_path):
    """monitored_barrier is of gloo: all ranks meet in a group of their own."""
    file = script(blank, tmp_path, "dpo.main(ARGS); assert common.meeting is not None")
    done = run(file, processes=processes, PYTHONPATH=str(ROOT))
    assert "Traceback" not in done.stderr and "Error" not in done.stderr
    if not processes:
        assert complaints(done) == []
    assert (tmp_path / "run" / "model").is_dir()


OUT_OF_MEMORY = """
import torch
def full(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\\nGPU 0 has ...")
dpo.pair_losses = full
dpo.main(ARGS)
"""


def test_out_of_gpu_memory(blank, tmp_path):
    """One line with the flags that need less and the budget that was tried; exit code 1."""
    file = script(blank, tmp_path, OUT_OF_MEMORY)
    done = run(file, check=False, PYTHONPATH=str(ROOT))
    assert done.returncode == 1
    (line,) = complaints(done)
    assert len(line) <= 200 and line.startswith("out of GPU memory")
    for flag in ("--tokens-per-microbatch below 8192", "--gradient-checkpointing", "--dtype bf"):
        assert flag in line


@pytest.mark.parametrize("words", ["CUDA error: out of memory\n...", "CUBLAS_STATUS_ALLOC_FAILED"])
def test_a_library_out_of_gpu_memory(words, capsys):
    """NCCL, cuBLAS and captured steps have errors and words of their own."""
    common._say_in_one_line(None, RuntimeError, RuntimeError(words), None)
    line = capsys.readouterr().err
    assert line == "out of GPU memory: --dtype bfloat16, or more processes under torchrun\n"


GONE = """
if dist.get_rank() == 0:
    os._exit(3)
print("what it had to say")
def wait(*_):
    import time
    time.sleep(60)
dist.destroy_process_group = wait  # NCCL waits for the rank that is gone
"""


def test_a_rank_that_is_gone_is_not_waited_for(tmp_path):
    """The others end, with what they have printed and exit code 1."""
    lines = "import os\ncommon.setup(0)\n" + GONE
    (tmp_path / "script.py").write_text(COMPOSITE + lines)
    done = run(tmp_path / "script.py", processes=2, check=False, timeout=50)
    assert done.returncode == 1 and "exit code 1" in done.stderr
    assert done.stdout == "what it had to say\n" and "Traceback" not in done.stderr


def test_a_compiler_that_fails_and_other_errors(capsys):
    """The first has a remedy in one line; an error of ours keeps its traceback."""
    broken = type("InductorError", (RuntimeError,), {"__module__": "torch._inductor.exc"})
    for args, remedy in ((dpo.Args(), "--no-compile"), (None, "set TORCHDYNAMO_DISABLE=1")):
        common._say_in_one_line(args, broken, broken("no ptxas\nat ..."), None)
        line = capsys.readouterr().err
        assert line == f"torch cannot compile here (InductorError: no ptxas): {remedy}\n"
    common._say_in_one_line(None, ValueError, ValueError("ours"), None)
    assert "ValueError: ours" in capsys.readouterr().err


def test_fewer_gpus_than_processes(monkeypatch):
    """One line of one process, before they wait for each other."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    common._require_gpus(4)
    with pytest.raises(SystemExit, match="4 processes, but 1 GPUs here: --nproc-per-node 1"):
        common._require_gpus(1)
    monkeypatch.setattr(common, "LOCAL_RANK", 2)
    with pytest.raises(SystemExit) as stop:
        common._require_gpus(1)
    assert stop.value.code == 1


def test_a_gpu_without_bf16(monkeypatch):
    monkeypatch.setattr(common, "CUDA", True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    with pytest.raises(SystemExit, match="--dtype bfloat16: this GPU does not compute in it"):
        common.load_model("tiny", "bfloat16", train=True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    common._require_dtype("bfloat16")


WITHOUT_A_NETWORK = """
import ctypes, sys
sys.path[:0] = ['.', 'methods']
NEW_USER, NEW_NETWORK = 0x10000000, 0x40000000
if ctypes.CDLL(None).unshare(NEW_USER | NEW_NETWORK):
    raise SystemExit(77)  # not allowed here
import common
common.setup(0)
"""


def test_no_loopback_interface(tmp_path):
    """gloo needs it, also for a process alone: one line, exit code 1."""
    (tmp_path / "script.py").write_text(WITHOUT_A_NETWORK)
    done = run(tmp_path / "script.py", check=False, PYTHONPATH=str(ROOT))
    if done.returncode == 77:
        pytest.skip("a process may not leave the network here")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "`ip link set lo up` may help" in line and len(line) <= 200
