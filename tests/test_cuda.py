"""Training on a GPU against training on a CPU in fp32: `python -m pytest -n 0 tests/test_cuda.py`.

The rest of the suite hides the GPU.  Bounds of bf16: a log-prob is within 5e-2 of its fp32 value, a
gradient within 2e-2 of its norm.  In fp32 both are sums in another order.
"""

import copy
import json
import os
import shutil

import benchmark
import dpo
import pytest
import torch
from conftest import records, run
from test_logps import random_rows
from test_plan import pythia
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig, MistralConfig

import common
from common import pack_pairs, response_hiddens, response_logps

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="no GPU here, or hidden: run `python -m pytest -n 0 tests/test_cuda.py` where there is",
)
needs_card = pytest.mark.skipif("PRETEND_GPU" in os.environ, reason="only a card shows it")
GPU = "cuda"

SMALL = dict(vocab_size=97, hidden_size=256, num_hidden_layers=2, intermediate_size=512)
NO_DROPOUT = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
FAMILIES = {
    "gpt_neox": GPTNeoXConfig(**SMALL, num_attention_heads=4, max_position_embeddings=128),
    "llama": LlamaConfig(**SMALL, num_attention_heads=4, num_key_value_heads=2),
    "heads of 80": LlamaConfig(
        **{**SMALL, "hidden_size": 160}, num_attention_heads=2, num_key_value_heads=1
    ),
    "gpt2": GPT2Config(
        vocab_size=97, n_embd=256, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0, **NO_DROPOUT
    ),
}


@pytest.fixture(autouse=True)
def group_of_one():
    common.setup(0)


def two_models(config, dtype):
    """The same random weights on the CPU in fp32, and on the GPU in dtype."""
    torch.manual_seed(0)
    on_cpu = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    on_gpu = copy.deepcopy(on_cpu).to(GPU)
    for parameter in on_gpu.parameters():
        parameter.data = parameter.data.to(dtype)
    on_gpu.compute_dtype = dtype
    return on_cpu, on_gpu


def scores_and_gradient(model, rows):
    """Log-probs of the responses, and the gradient of a weighted sum, in fp32 on the CPU."""
    model.zero_grad()
    (batch,) = pack_pairs(rows, 10**5)
    logps, _ = response_logps(model, batch)
    (logps * torch.linspace(-1, 1, len(logps)).to(logps.device)).sum().backward()
    gradients = [p.grad.float().cpu().flatten() for p in model.parameters()]
    return logps.detach().cpu(), torch.cat(gradients)


@pytest.mark.parametrize("responses", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probs_and_gradients(family, responses, dtype):
    on_cpu, on_gpu = two_models(FAMILIES[family], dtype)
    rows = random_rows(24, responses=responses)
    expected, expected_gradient = scores_and_gradient(on_cpu, rows)
    found, gradient = scores_and_gradient(on_gpu, rows)
    assert on_gpu.packs and on_gpu.varlen == (dtype == torch.bfloat16)
    tokens = torch.tensor([len(r) for row in rows for r in row["responses"]])
    a_token, of_norm = (1e-4, 1e-4) if dtype == torch.float32 else (5e-2, 2e-2)
    assert ((found - expected).abs() <= a_token * tokens).all()
    assert (gradient - expected_gradient).norm() <= of_norm * expected_gradient.norm()


def test_hiddens_and_gradient_checkpointing():
    on_cpu, on_gpu = two_models(FAMILIES["llama"], torch.bfloat16)
    (batch,) = pack_pairs(random_rows(8), 10**5)
    expected = response_hiddens(on_cpu, batch)
    found = response_hiddens(on_gpu, batch).float().cpu()
    assert (found - expected).norm() <= 2e-2 * expected.norm()
    _, plain = scores_and_gradient(on_gpu, random_rows(8))
    on_gpu.gradient_checkpointing_enable()
    _, again = scores_and_gradient(on_gpu, random_rows(8))
    assert (again - plain).norm() <= 1e-3 * plain.norm()  # sums by atomic additions


def test_rows_beyond_a_sliding_window():
    config = MistralConfig(**SMALL, num_attention_heads=4, num_key_value_heads=2, sliding_window=16)
    on_cpu, on_gpu = two_models(config, torch.bfloat16)
    rows = random_rows(4) + [dict(prompt_ids=[5] * 30, responses=[[8] * 9, [10], [12] * 20])]
    expected, _ = scores_and_gradient(on_cpu, rows)
    found, _ = scores_and_gradient(on_gpu, rows)
    assert on_gpu.varlen and 16 in on_gpu.windows
    tokens = torch.tensor([len(r) for row in rows for r in row["responses"]])
    assert ((found - expected).abs() <= 5e-2 * tokens).all()


@needs_card
def test_compiled_layers():
    """The same numbers but for roundings, for batches of several sizes; few compilations."""
    torch._dynamo.reset()
    _, on_gpu = two_models(FAMILIES["gpt_neox"], torch.bfloat16)
    sizes = (4, 40, 90, 150)
    plain = [scores_and_gradient(on_gpu, random_rows(n, n)) for n in sizes]
    common.compile_layers(on_gpu, True, 10**6)
    assert "forward" in vars(on_gpu.base_model.layers[0])  # it has its own, compiled
    for n, (logps, gradient) in zip(sizes, plain):
        found, found_gradient = scores_and_gradient(on_gpu, random_rows(n, n))
        assert (found - logps).abs().max() <= 0.2
        assert (found_gradient - gradient).norm() <= 2e-2 * gradient.norm()


def test_no_wait_for_the_gpu_within_a_step(blank):
    """Forward, backward, clipping and update: the first wait of a step is that of log."""
    model = common.load_model(blank / "model", "bfloat16", train=True)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-4)
    rows = random_rows(12)
    for step in range(3):
        if step == 2:
            torch.cuda.set_sync_debug_mode("error")
        try:
            for batch in pack_pairs(rows, 80):
                logps, _ = response_logps(model, batch)
                reference = common.to_device(torch.zeros(len(logps)), logps.device)
                (logps - reference).view(-1, 2).diff(dim=1).mean().backward()
            norm = common.clip_gradients(model, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert norm.is_cuda and norm.isfinite()


def test_a_copy_gives_the_numbers_of_fsdp(blank):
    """On a CPU they are the same in every bit; here sums by atomic additions come between."""
    found = []
    for sharded in (False, True):
        if sharded:
            model = common.load_model(blank / "model", train=True)
            model.compute_dtype = torch.bfloat16
            common._shard(model, torch.bfloat16)
        else:
            model = common.load_model(blank / "model", "bfloat16", train=True)
        for batch in pack_pairs(random_rows(8), 80):
            response_logps(model, batch)[0].sum().backward()
        gradients = [p.grad for p in model.parameters()]
        whole = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients]
        found.append(torch.cat([g.flatten() for g in whole]).cpu())
    assert (found[0] - found[1]).norm() <= 1e-3 * found[1].norm()


@needs_card
def test_the_plan_against_the_measured_peak():
    """A DPO step of 64 pairs with HH's lengths in the shape of Pythia-410m, in bf16: 15 %."""
    shape = pythia(1024, 24, 16)
    with torch.device(GPU):
        model = AutoModelForCausalLM.from_config(shape.config, dtype=torch.float32).train()
    model.compute_dtype = torch.bfloat16
    common.compute_in_copy(model)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-7)
    common.compile_layers(model, True, 10**6)
    rows = benchmark.hh_pairs(64, 1)
    for step in range(3):
        if step == 2:  # compiled, and with the optimiser's state
            torch.cuda.reset_peak_memory_stats()
        for batch in pack_pairs(rows, 16384):
            response_logps(model, batch)[0].mean().backward()
        common.clip_gradients(model, 10.0)
        optimizer.step()
        optimizer.zero_grad()
    needed = common.need(shape, dpo.PYTHIA, rows, 1, 1)
    assert needed.peak() == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.15)


# Whole runs: with the GPU, and with the GPU hidden.

COMMON = ("--batch-size", 8, "--max-steps", 20, "--eval-pairs", 2, "--tokens-per-microbatch", 400)
RUNS = {
    "dpo": ("methods/dpo.py", "--lr", 1e-4, "--warmup-steps", 2),
    "cal_dpo": ("methods/cal_dpo.py", "--lr", 1e-4, "--warmup-steps", 2),
    "dpl": ("methods/dpl.py", "train", "--lr", 1e-4),
}
HIDDEN = dict(CUDA_VISIBLE_DEVICES="")


def train(name, blank, out, *flags, **environment):
    """A run of twenty steps, or of as many as flags say -> its training records."""
    inputs = ("--model", blank / "model", "--data", blank / "pairs.jsonl", "--epochs", 9)
    done = run(*RUNS[name], *COMMON, *inputs, "--out", out, *flags, **environment)
    assert done.stderr == ""  # no traceback, no warning
    return [line for line in records(out) if "loss" in line]


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_twenty_steps(name, dtype, blank, tmp_path):
    """Losses and gradient norms of all steps; weights that moved come apart slowly."""
    expected = train(name, blank, tmp_path / "cpu", **HIDDEN)
    found = train(name, blank, tmp_path / "gpu", "--dtype", dtype)
    assert len(found) == len(expected) == 20
    bound = 1e-3 if dtype == "float32" else 5e-2
    for ours, theirs in zip(found, expected):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=bound, abs=bound)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=2 * bound, abs=bound)


def test_checkpoints_cross_over(blank, tmp_path):
    """Ten steps on one device and ten on the other are the twenty of either."""
    whole = train("dpo", blank, tmp_path / "whole", **HIDDEN)
    save = ("--save-every", 80)  # pairs: after ten steps
    for first, second in ((HIDDEN, {}), ({}, HIDDEN)):
        out = tmp_path / ("cpu-gpu" if first else "gpu-cpu")
        train("dpo", blank, out, *save, "--max-steps", 10, **first)
        shutil.rmtree(out / "model")
        found = train("dpo", blank, out, *save, "--resume", **second)
        assert [line["step"] for line in found] == list(range(20))
        for ours, theirs in zip(found, whole):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3, abs=1e-3)


def test_a_resumed_run_agrees(blank, tmp_path):
    """On a CPU in every bit; here to 1e-6, as atomic additions have no order."""
    whole = train("dpo", blank, tmp_path / "whole", "--save-every", 80)
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "model")
    shutil.rmtree(tmp_path / "again" / "step-20")
    found = train("dpo", blank, tmp_path / "again", "--save-every", 80, "--resume")
    for ours, theirs in zip(found, whole):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5, abs=1e-6)


def test_more_processes_than_gpus(blank, tmp_path):
    """One line, exit code 1, nothing made."""
    processes = torch.cuda.device_count() + 1
    flags = ("--model", blank / "model", "--data", blank / "pairs.jsonl", "--out", tmp_path / "run")
    done = run("methods/dpo.py", *flags, processes=processes, check=False)
    assert done.returncode == 1
    assert f"{processes} processes, but {processes - 1} GPUs here" in done.stderr
    assert not (tmp_path / "run").exists()


@needs_card
def test_out_of_memory_is_one_line(blank, tmp_path):
    """A share of the memory that holds the model and not a step."""
    config = json.loads((blank / "model" / "config.json").read_text())
    assert config["hidden_size"] == 32
    code = (
        "import sys; sys.path[:0] = ['.', 'methods']\n"
        "import torch, dpo; torch.cuda.set_per_process_memory_fraction(1e-4)\n"
        f"dpo.main(dpo.Args(model={str(blank / 'model')!r}, out={str(tmp_path / 'run')!r}, "
        f"data={str(blank / 'pairs.jsonl')!r}, batch_size=36, max_steps=2, eval_pairs=2))"
    )
    (tmp_path / "script.py").write_text(code)
    done = run(tmp_path / "script.py", check=False)
    assert done.returncode == 1
    assert "out of GPU memory" in done.stderr and "Traceback" not in done.stderr
