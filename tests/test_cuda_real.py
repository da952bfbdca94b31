"""Real pairs on a GPU: `python -m pytest -n 0 -s tests/test_cuda_real.py`.

SFT and DPO of a small real model beside the same runs of the CPU; then DPO in the shape of the
preset hh: Pythia-2.8B with random weights, 30 steps of 64 pairs.
"""

import json
import os
import statistics

import pytest
import torch
from benchmark_cuda import pythia_config  # with the shapes of GPUs
from conftest import records, run
from test_cuda import HIDDEN, needs_card
from test_real import DATA, MODELS
from transformers import AutoModelForCausalLM, AutoTokenizer

import common

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here, or hidden"),
    pytest.mark.skipif(not (DATA.exists() and MODELS.exists()), reason="no real pairs here"),
]
STEPS = 4 if "PRETEND_GPU" in os.environ else 20


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A folder with short pairs to train on, and others that are held out."""
    folder = tmp_path_factory.mktemp("pairs")
    short = []
    for row in common.load_pairs(str(DATA), "test"):
        length = len(row["prompt"]) + max(len(row["chosen"]), len(row["rejected"]))
        if length < 700:
            short.append({key: row[key] for key in ("prompt", "chosen", "rejected")})
    for split, part in (("train", short[:320]), ("test", short[320:384])):
        lines = [json.dumps(row) + "\n" for row in part]
        (folder / f"{split}.jsonl").write_text("".join(lines))
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_the_curves_of_the_cpu(method, dtype, pairs, tmp_path):
    """Losses of every step, and of the held-out pairs at the end."""
    flags = ("--model", MODELS / "stories260K", "--data", pairs, "--max-steps", STEPS)
    flags += ("--batch-size", 16, "--lr", 1e-4, "--warmup-steps", 2, "--eval-pairs", 64)
    if method == "sft":
        flags = ["--eval-examples" if flag == "--eval-pairs" else flag for flag in flags]
    found = {}
    for device, hidden in (("cpu", HIDDEN), ("gpu", {})):
        own = () if hidden else ("--dtype", dtype)
        done = run(f"methods/{method}.py", *flags, *own, "--out", tmp_path / device, **hidden)
        assert done.stderr == ""
        found[device] = records(tmp_path / device)
    bound = 1e-3 if dtype == "float32" else 2e-2
    for ours, theirs in zip(found["gpu"], found["cpu"], strict=True):
        for name in ("loss", "eval_loss"):
            if name in theirs:
                assert ours[name] == pytest.approx(theirs[name], rel=bound, abs=bound)


@needs_card
def test_the_shape_of_the_preset(tmp_path):
    """Seconds a step, memory and loss of the preset hh, for the table of README."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(pythia_config("2.8b")).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(MODELS / "pythia-tokenizer").save_pretrained(tmp_path / "model")
    del model
    torch.cuda.empty_cache()
    flags = ("hh", "--model", tmp_path / "model", "--data", DATA, "--max-steps", 30)
    flags += ("--eval-pairs", 64, "--dtype", "bfloat16", "--out", tmp_path / "run")
    done = run("methods/dpo.py", *flags, timeout=550)
    lines = [line for line in records(tmp_path / "run") if "loss" in line]
    assert len(lines) == 30 and all(abs(line["loss"]) < 5 for line in lines)
    speed = statistics.median(line["rows_per_s"] for line in lines[5:])
    peak = max(line["peak_GiB"] for line in lines)
    print(f"\n{64 / speed:.2f} s a step, {peak:.1f} GiB; last loss {lines[-1]['loss']:.3f}")
    print("\n".join(line for line in done.stdout.splitlines() if "GiB" in line))
