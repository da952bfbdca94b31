"""--plan: what a run needs, without weights and a GPU, against counted and measured bytes."""

import dataclasses
import re
import shutil

import benchmark
import cal_dpo
import dpl
import dpo
import dpo_gamma
import pytest
import sft
import torch
from conftest import run
from test_logps import make
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig

import common

SMALL = dict(vocab_size=5000, hidden_size=128, num_hidden_layers=6, num_attention_heads=4)
NO_DROPOUT = dict(attention_dropout=0.0, hidden_dropout=0.0)
CONFIGS = {
    "gpt_neox": GPTNeoXConfig(**SMALL, intermediate_size=512, **NO_DROPOUT),
    "llama": LlamaConfig(**SMALL, intermediate_size=344, num_key_value_heads=2),
}


@pytest.fixture(autouse=True)
def group_of_one():
    common.setup(0)


def storages(tensors):
    """The bytes of the memory that tensors lie in, each piece once."""
    found = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", CONFIGS)
def test_against_counted_bytes(family, dtype):
    """Weights, gradients and the optimiser's state to the byte, activations within 15 %, of layers
    that are not compiled."""
    model = make(CONFIGS[family]).to(getattr(torch, dtype))
    rows = [dict(row) for row in benchmark.hh_pairs(16, 0)]
    for row in rows:  # of a smaller vocabulary
        row["prompt_ids"] = [i % 5000 for i in row["prompt_ids"]]
        row["responses"] = [[i % 5000 for i in response] for response in row["responses"]]
    plain = dict(dtype=dtype, compile=False)
    args = dataclasses.replace(dpo.Args(), tokens_per_microbatch=10**5, **plain)
    (batch,) = common.pack_pairs(rows, 10**5)
    assert common.packs(model, batch)

    # What autograd keeps in a forward pass, but for the weights.
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        logps, _ = common.response_logps(model, batch)
    weights = storages(model.parameters())
    activations = sum(size for at, size in storages(kept).items() if at not in weights)
    needed = common.need(model, args, rows, 1, 1)
    assert needed.tokens == batch["input_ids"].shape[1] and needed.passes == 1
    size = model.dtype.itemsize
    logits = 2 * size * 5000 * len(batch["targets"])  # and their gradient: no saved tensors
    assert needed.activations - logits == pytest.approx(activations, rel=0.15)
    if dtype == "bfloat16":
        return  # what has these weights is a copy: see the next test
    logps.sum().backward()
    for state, kind in ((1, torch.optim.RMSprop), (2, torch.optim.AdamW)):
        optimizer = kind(model.parameters(), lr=1e-3)
        optimizer.step()
        moments = [x for s in optimizer.state.values() for x in s.values() if x.dim()]
        needed = common.need(model, args, rows, 1, state)
        assert needed.optimiser == sum(storages(moments).values())
    assert needed.weights == sum(weights.values())
    assert needed.gradients == sum(storages(p.grad for p in model.parameters()).values())


def test_a_bf16_copy_and_slices(blank):
    """One process has fp32 weights and a copy of half their size, several have a slice each."""
    model = common.load_model(blank / "model", "bfloat16", train=True)
    half = common.computing(model)
    whole = storages([*model.parameters(), *half.parameters()])
    args = dataclasses.replace(dpo.Args(), dtype="bfloat16")
    rows = benchmark.hh_pairs(8, 0)
    one = common.need(model, args, rows, 1, 1)
    assert one.weights == sum(whole.values())
    four = common.need(model, args, rows, 4, 1)
    assert four.gradients == one.gradients / 4 and four.optimiser == one.optimiser / 4
    assert four.passes == 1 and four.tokens == pytest.approx(one.tokens / 4, abs=1)
    frozen = common.need(model, args, rows, 1, 2, trained=False)
    assert frozen.weights == sum(storages(half.parameters()).values()) and frozen.gradients == 0


def pythia(width, layers, heads):
    """The shape of a Pythia model, without weights."""
    config = GPTNeoXConfig(
        vocab_size=50304,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    "shape, measured", [((1024, 24, 16), 15), ((2048, 24, 16), 34), ((2560, 32, 32), 60)]
)
def test_against_measured_peaks(shape, measured):
    """GiB of DPO steps of 64 pairs with HH's lengths on an H200: 410m, 1.4b, 2.8b, in bf16."""
    model = pythia(*shape)
    for seed in range(3):
        rows = benchmark.hh_pairs(64, seed)
        needed = common.need(model, dpo.PYTHIA, rows, 1, 1)
        assert needed.passes == 1
        assert needed.peak() / 2**30 == pytest.approx(measured, rel=0.15)


def test_what_lowers_it():
    """Checkpointing, a smaller budget, more processes; a second pass keeps the gradients."""
    model = pythia(1024, 24, 16)
    rows = benchmark.hh_pairs(64, 0)
    args = dpo.PYTHIA
    whole = common.need(model, args, rows, 1, 1)
    checkpointed = dataclasses.replace(args, gradient_checkpointing=True)
    assert common.need(model, checkpointed, rows, 1, 1).activations < whole.activations / 3
    small = common.need(model, dataclasses.replace(args, tokens_per_microbatch=2048), rows, 1, 1)
    assert small.passes == -(-whole.tokens // 2048) and small.tokens <= 2048
    assert small.peak() == small.weights + small.optimiser + max(
        small.activations + small.gradients, 2 * small.gradients
    )
    peaks = [common.need(model, args, rows, n, 1).peak() for n in (1, 2, 4, 8)]
    assert peaks == sorted(peaks, reverse=True)
    # All weights gathered, in place of one unit, are two bytes a weight more.
    layer = sum(w.numel() for w in model.base_model.layers[0].parameters())
    others = 23 * layer  # the unit is a layer, and what is outside of the layers
    gathered = dataclasses.replace(args, reshard_after_forward=False)
    grown = common.need(model, gathered, rows, 4, 1).weights
    assert grown == common.need(model, args, rows, 4, 1).weights + 2 * others


def test_a_short_run_is_planned_as_it_runs(blank, monkeypatch, capsys):
    """Fewer steps than pay for compiling: the line is that of --no-compile."""
    monkeypatch.setattr(common, "_plan_line", lambda n, needed: f"{n}: {needed.activations}")
    lines = []
    for steps, options in ((40, {}), (40, {"compile": False}), (400, {})):
        args = dataclasses.replace(
            dpo.PYTHIA, model=str(blank / "model"), plan=True, batch_size=8, **options
        )
        with pytest.raises(SystemExit):
            common.plan_memory(args, benchmark.hh_pairs(8, 0), steps, 1)
        lines.append([line for line in capsys.readouterr().out.splitlines() if line[:2] == "1:"])
    assert len(lines[0]) == 1 and lines[0] == lines[1] != lines[2]


COMMANDS = {
    "sft": (["methods/sft.py"], sft.Args),
    "dpo": (["methods/dpo.py"], dpo.Args),
    "cal_dpo": (["methods/cal_dpo.py"], cal_dpo.Args),
    "dpo_gamma": (["methods/dpo_gamma.py"], dpo_gamma.Args),
    "dpl": (["methods/dpl.py", "train"], dpl.Args),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_plan_needs_a_config_and_leaves_nothing(name, blank, tmp_path):
    """Every training command; the folder has no weights."""
    folder = tmp_path / "model"
    weights = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(blank / "model", folder, ignore=weights)
    command, _ = COMMANDS[name]
    flags = ["--model", folder, "--data", blank / "pairs.jsonl", "--out", tmp_path / "run"]
    done = run(*command, *flags, "--plan", "--batch-size", 8)
    lines = done.stdout.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("processes"))
    assert [int(line.split()[0]) for line in lines[at + 1 :]] == [1, 2, 4, 8]
    assert all(len(line.split()) == 9 for line in lines[at + 1 :])
    assert "million parameters" in lines[at - 2] and re.search(
        r"\d+ steps of 8 rows", lines[at - 1]
    )
    assert not (tmp_path / "run").exists() and done.stderr == ""


def plan(blank, tmp_path, monkeypatch, room, **flags):
    """The line with which DPO refuses to run in so many bytes; "" if it goes on."""
    monkeypatch.setattr(common, "room", lambda: room)
    monkeypatch.setattr(dpo, "start_run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    monkeypatch.setattr(dpo, "reference_logps", None)
    monkeypatch.setattr(dpo, "load_model", None)
    args = dpo.Args(
        model=str(blank / "model"),
        data=str(blank / "pairs.jsonl"),
        out=str(tmp_path / "run"),
        batch_size=36,
        **flags,
    )
    try:
        dpo.main(args)
    except KeyboardInterrupt:
        return ""
    except SystemExit as stop:
        return stop.code


def test_a_run_that_cannot_fit_is_refused_before_it_loads(blank, tmp_path, monkeypatch, capsys):
    """One line with what would be enough; nothing is made."""
    assert plan(blank, tmp_path, monkeypatch, 2**34) == ""
    assert "processes" not in capsys.readouterr().out  # a small run says nothing

    # Room for what needs more of two changes, each of them enough.
    args = dpo.Args(model=str(blank / "model"), data=str(blank / "pairs.jsonl"))
    tokenizer = common.load_tokenizer(args.model)
    rows = dpo.load_rows(args, "train", tokenizer)[:36]
    peaks = []
    for less in (dict(gradient_checkpointing=True), dict(tokens_per_microbatch=512)):
        changed = dataclasses.replace(args, **less)
        peaks.append(common.need(common._shape_of(args.model), changed, rows, 1, 1).peak())
    room = 1.05 * max(peaks)
    line = plan(blank, tmp_path, monkeypatch, room)
    assert len(line) <= 200 and "\n" not in line
    assert "a process needs about" in line and "--gradient-checkpointing" in line
    budget = int(re.search(r"--tokens-per-microbatch (\d+)", line)[1])
    assert plan(blank, tmp_path, monkeypatch, room, tokens_per_microbatch=budget) == ""
    assert plan(blank, tmp_path, monkeypatch, room, gradient_checkpointing=True) == ""
    assert plan(blank, tmp_path, monkeypatch, 10**3).endswith("a smaller --model")
    assert not (tmp_path / "run").exists()
