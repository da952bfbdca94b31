"""One process computes in a bf16 copy of its fp32 weights; several in FSDP2's mixed precision: the
same numbers, the same checkpoints, bit for bit on a CPU.
"""

import gc
import shutil
import weakref

import pytest
import torch
from conftest import records, run
from safetensors.torch import load_file
from test_logps import random_rows

import common
from common import load_checkpoint, load_model, pack_pairs, response_logps, save_checkpoint, setup

ROWS = random_rows(8)  # of token ids below 97, which the model of `blank` has


@pytest.fixture(autouse=True)
def group_of_one():
    setup(0)


def sharded_model(blank):
    """The model as several processes hold it: FSDP2, bf16 compute, here over a group of one."""
    model = load_model(blank / "model", train=True)
    model.compute_dtype = torch.bfloat16
    return common._shard(model, torch.bfloat16)


def copied_model(blank):
    """The model as one process holds it."""
    model = load_model(blank / "model", "bfloat16", train=True)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.dtype for p in common.computing(model).parameters()} == {torch.bfloat16}
    return model


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def train(model, optimizer, steps):
    """Steps of two micro-batches each, clipped -> log-probs and gradient norms on the way."""
    seen = []
    for step in range(steps):
        batches = pack_pairs(ROWS, 80)
        assert len(batches) > 1
        for batch in batches:
            logps, _ = response_logps(model, batch)
            (logps.view(-1, 2) @ torch.tensor([-1.0, 1.0]) * (1 + step)).mean().backward()
            seen.append(logps.detach().clone())
        seen.append(common.clip_gradients(model, 1.0))
        optimizer.step()
        optimizer.zero_grad()
    return seen


@pytest.mark.parametrize("kind", ["RMSprop", "AdamW", "fused AdamW"])
def test_the_same_numbers_as_fsdp(blank, kind):
    """Log-probs, norms, weights and the optimiser's state after three steps, in every bit."""
    found = []
    for model in (copied_model(blank), sharded_model(blank)):
        if kind == "RMSprop":
            optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3)
        else:
            fused = kind.startswith("fused") or None
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
        values = train(model, optimizer, 3)
        assert common.computing(model).packs
        values += [whole(p.detach()) for p in model.parameters()]
        for state in optimizer.state.values():
            values += [whole(state[name]) for name in state]
        found.append(values)
    assert len(found[0]) == len(found[1])
    for ours, theirs in zip(*found):
        assert torch.equal(ours, theirs)


def test_gradients_are_added_in_fp32(blank):
    """Two micro-batches: the sum of their bf16 gradients, which bf16 could not hold."""
    model = copied_model(blank)
    batches = pack_pairs(ROWS, 80)
    apart = []
    for batch in batches:
        response_logps(model, batch)[0].sum().backward()
        apart.append([p.grad.clone() for p in model.parameters()])
        assert all(p.grad is None for p in common.computing(model).parameters())
        model.zero_grad()
    for batch in batches:
        response_logps(model, batch)[0].sum().backward()
    rounded = 0
    for p, *parts in zip(model.parameters(), *apart):
        assert all(torch.equal(part, part.bfloat16().float()) for part in parts)
        expected = parts[0]
        for part in parts[1:]:
            expected = expected + part
        assert torch.equal(p.grad, expected)
        rounded += (expected != expected.bfloat16().float()).sum().item()
    assert rounded > 0


def test_gradient_checkpointing_and_plain_calls_reach_the_copy(blank):
    model = copied_model(blank)
    (batch,) = pack_pairs(ROWS, 10**4)
    response_logps(model, batch)[0].sum().backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable()
    assert common.computing(model).is_gradient_checkpointing
    response_logps(model, batch)[0].sum().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), plain))
    logits = model(torch.tensor([[5, 6, 7]])).logits
    assert logits.dtype == torch.bfloat16


def test_the_copy_follows_the_weights(blank, tmp_path):
    """However they change: an optimiser, a checkpoint, by hand."""
    model = copied_model(blank)
    half = common.computing(model)
    for change in ("optimiser", "by hand", "checkpoint"):
        optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-2)
        if change == "optimiser":
            save_checkpoint(tmp_path, 1, model, optimizer)
            train(model, optimizer, 1)
        elif change == "by hand":
            with torch.no_grad():
                model.get_input_embeddings().weight.mul_(1.5)
        else:
            load_checkpoint(tmp_path, model, optimizer)
        stale = [
            not torch.equal(a, b.bfloat16()) for a, b in zip(half.parameters(), model.parameters())
        ]
        assert any(stale), change
        common.computing(model)
        for a, b in zip(half.parameters(), model.parameters()):
            assert torch.equal(a, b.bfloat16())


def test_checkpoints_are_the_same_files(blank, tmp_path):
    """Written by one form and read by the other, in both directions; then the same steps."""
    makers = {"copy": copied_model, "shards": sharded_model}
    for name, make in makers.items():
        model = make(blank)
        optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3)
        train(model, optimizer, 2)
        save_checkpoint(tmp_path / name, 2, model, optimizer)
    names = [sorted(f.name for f in (tmp_path / name / "step-2").iterdir()) for name in makers]
    assert names[0] == names[1]
    for reader, writer in (("copy", "shards"), ("shards", "copy"), ("copy", "copy")):
        model = makers[reader](blank)
        optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3)
        step, _ = load_checkpoint(tmp_path / writer, model, optimizer)
        assert step == 2
        seen = train(model, optimizer, 1)
        if reader == "copy" and writer == "shards":
            expected = seen
        assert all(torch.equal(a, b) for a, b in zip(seen, expected))


def test_runs_of_one_and_of_two_processes(blank, tmp_path):
    """DPO in bf16: a run of two goes on as one, and the other way round; files hold fp32."""
    command = ["methods/dpo.py", "--model", blank / "model", "--data", blank / "pairs.jsonl"]
    command += ["--batch-size", 8, "--lr", 1e-3, "--warmup-steps", 0, "--eval-pairs", 2]
    command += ["--dtype", "bfloat16", "--save-every", 8, "--tokens-per-microbatch", 150]
    run(*command, "--out", tmp_path / "1", "--max-steps", 3)
    run(*command, "--out", tmp_path / "2", "--max-steps", 3, processes=2)
    weights = load_file(tmp_path / "1" / "model" / "model.safetensors")
    assert all(w.dtype == torch.float32 for w in weights.values())
    for n in ("1", "2"):
        shutil.copytree(tmp_path / n, tmp_path / f"{n}-on")
        shutil.rmtree(tmp_path / f"{n}-on" / "model")
    run(*command, "--out", tmp_path / "1-on", "--max-steps", 5, "--resume", processes=2)
    run(*command, "--out", tmp_path / "2-on", "--max-steps", 5, "--resume")
    # bf16 keeps 8 bits, and other micro-batches have other roundings.
    last = [[r for r in records(tmp_path / n) if "loss" in r][-1] for n in ("1-on", "2-on")]
    assert last[0]["step"] == last[1]["step"] == 4
    assert last[0]["loss"] == pytest.approx(last[1]["loss"], abs=5e-2)


def test_a_model_is_freed_with_its_copy(blank):
    """Weights, their copies and gradients: nothing of a trained model outlives it."""
    model = copied_model(blank)
    for batch in pack_pairs(ROWS, 1000):
        response_logps(model, batch)[0].sum().backward()
    copy = model.compute_copy
    kept = [weakref.ref(x) for x in (model, copy, *copy.weights, *copy.copies, copy.module)]
    del model, copy
    gc.collect()
    assert all(reference() is None for reference in kept)
