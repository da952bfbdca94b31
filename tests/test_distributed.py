"""One process, torchrun with one and torchrun with two: the same numbers (FSDP2 on gloo)."""

import shutil

import pytest
import torch
from conftest import records, run
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

import common

PAIRS = (
    "methods/dpo.py",
    "--batch-size",
    8,
    "--lr",
    1e-3,
    "--warmup-steps",
    0,
    "--max-steps",
    6,
    "--eval-every",
    16,
    "--eval-pairs",
    2,
    "--tokens-per-microbatch",
    150,
)
NUMBERS = (
    "loss",
    "grad_norm",
    "rewards/chosen",
    "rewards/margins",
    "logps/rejected",
    "eval_loss",
    "eval_logps/chosen",
)


def inputs(blank):
    return ("--model", blank / "model", "--data", blank / "pairs.jsonl")


@pytest.fixture(scope="module")
def one(blank, tmp_path_factory):
    """The run of one plain process, which saves after three and six steps."""
    out = tmp_path_factory.mktemp("one") / "run"
    run(*PAIRS, *inputs(blank), "--out", out, "--save-every", 24, fresh=True)
    return out


def same(a, b, rel):
    a, b = records(a), records(b)
    assert [r["step"] for r in a] == [r["step"] for r in b]
    for x, y in zip(a, b):
        for name in NUMBERS:
            if name in x:
                assert y[name] == pytest.approx(x[name], rel=rel, abs=rel), (x["step"], name)


def test_two_processes(blank, one, tmp_path):
    two = tmp_path / "two"
    run(*PAIRS, *inputs(blank), "--out", two, "--save-every", 24, processes=2, fresh=True)
    same(one, tmp_path / "two", 1e-5)
    a, b = (load_file(out / "model" / "model.safetensors") for out in (one, tmp_path / "two"))
    assert a.keys() == b.keys()
    assert (
        max((a[k] - b[k]).abs().max().item() for k in a) < 1e-4
    )  # six steps of RMSprop on sums in another order
    # a checkpoint of two processes continues on one, and the other way round
    for folder, processes in ((tmp_path / "two", 0), (one, 2)):
        copy = tmp_path / f"resumed{processes}"
        shutil.copytree(folder, copy)
        for name in ("model", "step-6"):
            shutil.rmtree(copy / name)
        run(
            *PAIRS,
            *inputs(blank),
            "--out",
            copy,
            "--save-every",
            24,
            "--resume",
            processes=processes,
        )
        same(one, copy, 1e-5)


def test_torchrun_with_one_process_is_bitwise_the_plain_run(blank, one, tmp_path):
    run(*PAIRS, *inputs(blank), "--out", tmp_path / "run", processes=1)
    same(one, tmp_path / "run", 0)
    a, b = (load_file(out / "model" / "model.safetensors") for out in (one, tmp_path / "run"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_bf16_compute_keeps_fp32_weights(blank, one, tmp_path):
    run(*PAIRS, *inputs(blank), "--out", tmp_path / "run", "--dtype", "bfloat16", processes=2)
    a, b = (records(out) for out in (one, tmp_path / "run"))
    assert a[1]["loss"] == pytest.approx(
        b[1]["loss"], abs=2e-3
    )  # log 2: policy and reference round alike
    assert a[1]["grad_norm"] == pytest.approx(b[1]["grad_norm"], rel=5e-2)
    weights = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(w.dtype == torch.float32 for w in weights.values())


def test_weights_that_stay_gathered(blank, one, tmp_path):
    """The same run, with weights that a step gathers once; evaluations are between the steps."""
    flags = ("--no-reshard-after-forward", "--out", tmp_path / "run")
    run(*PAIRS, *inputs(blank), *flags, processes=2)
    same(one, tmp_path / "run", 1e-5)


def test_when_weights_stay_gathered(blank, monkeypatch):
    """From forward to backward of a training step, and not after an evaluation."""
    common.setup(0)
    monkeypatch.setattr(common, "rank_and_world", lambda: (0, 2))  # so that load_model shards
    model = common.load_model(blank / "model", train=True, reshard=False)
    monkeypatch.undo()
    batch = next(iter(common.pack_pairs([{"prompt_ids": [5, 6], "responses": [[7, 8], [9]]}], 64)))
    weight = model.base_model.layers[0].mlp.dense_h_to_4h

    loss = common.response_logps(model, batch)[0].sum()
    assert not isinstance(weight.weight, DTensor)
    loss.backward()
    assert isinstance(weight.weight, DTensor)
    with torch.no_grad():
        common.response_logps(model, batch)
    assert isinstance(weight.weight, DTensor)


def test_sft_with_two_processes(blank, tmp_path):
    command = (
        "methods/sft.py",
        *PAIRS[1:7],
        "--max-steps",
        3,
        "--eval-examples",
        2,
        "--tokens-per-microbatch",
        150,
        "--objective",
        "mean",
        *inputs(blank),
    )
    for processes in (0, 2):
        run(*command, "--out", tmp_path / str(processes), processes=processes)
    a, b = (records(tmp_path / str(n)) for n in (0, 2))
    for x, y in zip(a, b):
        for name in ("loss", "grad_norm", "eval_loss"):
            if name in x:
                assert y[name] == pytest.approx(x[name], rel=1e-5), name
