"""The worked example of CONTRIBUTING.md, SimPO: its loss by hand, a whole run, the contract."""

import ast
import importlib.util
import json
import math
import re
import shutil

import pytest
import torch
from conftest import ROOT, records, run
from test_contract import (
    LEAST_COMMENTS,
    MOST,
    figures,
    options_of,
    printed_help,
    references,
    unexplained,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

EXAMPLE = ROOT / "tests" / "examples" / "simpo.py"
BETA, GAMMA = 2.5, 0.6


@pytest.fixture(scope="module")
def simpo():
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("simpo", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def by_hand(chosen, rejected, beta, gamma):
    """The loss of one pair, from the probabilities of its tokens.

    exp(beta mean log p) is the geometric mean of the probabilities to the power beta; the sigmoid
    of a difference is a share of a sum.
    """
    good = math.prod(chosen) ** (beta / len(chosen))
    bad = math.prod(rejected) ** (beta / len(rejected))
    return -math.log(good / (good + bad * math.exp(gamma)))


def test_loss_by_hand(simpo):
    chosen, rejected = [0.5, 0.2, 0.9], [0.4, 0.8]
    sums = [torch.tensor([sum(map(math.log, p))], dtype=torch.float64) for p in (chosen, rejected)]
    counts = [torch.tensor([3]), torch.tensor([2])]
    for beta, gamma in ((2.5, 0.6), (0.1, 0.0), (1.0, 3.0)):
        loss = simpo.simpo_loss(*sums, *counts, beta, gamma)
        assert loss.item() == pytest.approx(by_hand(chosen, rejected, beta, gamma), rel=1e-12)


def test_the_margin_is_what_the_loss_asks_for(simpo):
    """Where the rewards differ by gamma exactly, the loss is log 2, whatever the lengths."""
    chosen_tokens, rejected_tokens = torch.tensor([7, 30]), torch.tensor([11, 2])
    rejected = torch.tensor([-20.0, -3.0], dtype=torch.float64)
    mean = rejected / rejected_tokens + GAMMA / BETA
    counts = (chosen_tokens, rejected_tokens)
    loss = simpo.simpo_loss(mean * chosen_tokens, rejected, *counts, BETA, GAMMA)
    torch.testing.assert_close(loss, torch.full((2,), math.log(2), dtype=torch.float64))


def probabilities(model, tokenizer, prompt, response):
    """The probability of each token of the response and of the end, by the library's forward."""
    ids = tokenizer(prompt)["input_ids"]
    answer = tokenizer(response)["input_ids"] + [tokenizer.eos_token_id]
    with torch.no_grad():
        p = model(torch.tensor([ids + answer])).logits[0].double().softmax(-1)
    return [p[len(ids) + i - 1, token].item() for i, token in enumerate(answer)]


def test_a_run_of_the_example(blank, tmp_path):
    """Carried to another folder beside common.py; its first loss is that of the library's model."""
    for path in (EXAMPLE, ROOT / "common.py"):
        shutil.copy(path, tmp_path)
    out = tmp_path / "out"
    options = dict(model=blank / "model", data=blank / "pairs.jsonl", out=out, beta=BETA)
    options |= dict(gamma=GAMMA, lr=1e-3, batch_size=39, max_steps=6, warmup_steps=0, eval_pairs=2)
    command = [str(tmp_path / "simpo.py")]
    for name, value in options.items():
        command += ["--" + name.replace("_", "-"), str(value)]
    done = run(*command)
    assert "held out loss" in done.stdout
    assert (out / "model" / "model.safetensors").is_file()
    assert (out / "figures" / "curves.png").is_file()

    # All 39 training rows are the first batch: its loss is the mean of theirs.
    model = AutoModelForCausalLM.from_pretrained(blank / "model", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(blank / "model")
    losses = []
    for line in (blank / "pairs.jsonl").read_text().splitlines()[:39]:
        row = json.loads(line)
        texts = (row["chosen"], row["rejected"])
        sides = [probabilities(model, tokenizer, row["prompt"], text) for text in texts]
        losses.append(by_hand(*sides, BETA, GAMMA))
    steps = [record for record in records(out) if "loss" in record]
    # float32 log-probs of some tens of nats, here against float64 from the logits on
    assert steps[0]["loss"] == pytest.approx(sum(losses) / len(losses), abs=2e-5)
    assert steps[-1]["loss"] < steps[0]["loss"]  # six steps on the same 39 pairs


def test_the_example_keeps_the_contract():
    text = EXAMPLE.read_text()
    assert len(text.splitlines()) <= 150
    found, comments, places = figures(EXAMPLE)
    assert not [name for name, value in found.items() if value > MOST[name]], places
    assert comments >= LEAST_COMMENTS
    assert unexplained(printed_help(EXAMPLE)) == []
    for option in options_of(ast.parse(text)):
        read_by_common = option.target.id in ("out", "overwrite")  # in start_run
        assert re.search(rf"args\.{option.target.id}\b", text) or read_by_common
    doc, code = text.split('"""', 2)[1:]
    assert references(doc) - references(code) == set()
