"""SFT: the objective against a direct computation, multi-turn rows, and the whole run."""

import json
import math

import pytest
import sft
import torch
from conftest import records
from sft import Args, sft_loss
from transformers import AutoModelForCausalLM, AutoTokenizer

from common import tokenize_pairs


def args(blank, out, **changes):
    settings = dict(
        model=str(blank / "model"),
        data=str(blank / "pairs.jsonl"),
        out=str(out),
        lr=1e-3,
        batch_size=8,
        warmup_steps=0,
        max_steps=4,
        eval_every=16,
        eval_examples=2,
        tokens_per_microbatch=128,
    )
    return Args(**{**settings, **changes})


def test_published_pipeline():
    # the sums of token log-probs of two responses, and the loss: their negative mean over examples
    losses = sft_loss(torch.tensor([-7.1403482867, -6.2002323232], dtype=torch.float64))
    assert losses.mean().item() == pytest.approx(6.6702903049, abs=1e-9)
    assert (losses.sum() / 5).item() == pytest.approx(
        2.6681161220, abs=1e-9
    )  # --objective mean: 5 scored tokens


def library_loss(blank, objective):
    """Loss and gradient norm of the file's training rows, through the library's own head loss."""
    tokenizer = AutoTokenizer.from_pretrained(blank / "model")
    model = AutoModelForCausalLM.from_pretrained(blank / "model", dtype=torch.float32).eval()
    rows = [json.loads(line) for line in (blank / "pairs.jsonl").read_text().splitlines()][:39]
    total, tokens = 0.0, 0
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        response = tokenizer(row["chosen"])["input_ids"] + [tokenizer.eos_token_id]
        labels = torch.tensor([[-100] * len(prompt) + response])
        total = total + model(torch.tensor([prompt + response]), labels=labels).loss * len(response)
        tokens += len(response)
    loss = total / (len(rows) if objective == "sum" else tokens)
    loss.backward()
    return loss.item(), torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()


@pytest.mark.parametrize("objective", ["sum", "mean"])
def test_step_equals_the_library_loss(blank, tmp_path, objective):
    history = sft.main(
        args(blank, tmp_path / "run", batch_size=39, max_steps=1, objective=objective)
    )
    loss, norm = library_loss(blank, objective)
    first = next(r for r in history if "grad_norm" in r)
    assert first["grad_norm"] == pytest.approx(
        norm, rel=1e-5
    )  # of the objective, whatever the micro-batches
    expected = loss if objective == "sum" else loss * first["tokens"]
    assert first["loss"] == pytest.approx(
        expected, rel=1e-6
    )  # the logged loss is per response in both cases


def test_learns(blank, tmp_path):
    history = sft.main(args(blank, tmp_path / "run", max_steps=30, lr=3e-3))
    held_out = [r["eval_loss_per_token"] for r in history if "eval_loss_per_token" in r]
    assert held_out[0] > math.log(256) and held_out[-1] < 0.7 * held_out[0]
    assert (
        records(tmp_path / "run") == history
        and (tmp_path / "run" / "figures" / "curves.png").exists()
    )


def test_every_turn_is_one_row():
    text = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    turns = sft.every_turn({"prompt": text, "chosen": " d"})
    assert [(t["prompt"], t["chosen"]) for t in turns] == [
        ("\n\nHuman: a\n\nAssistant:", " b"),
        (text, " d"),
    ]
    chat = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    turns = sft.every_turn({"prompt": chat, "chosen": [{"role": "assistant", "content": "d"}]})
    assert [(len(t["prompt"]), t["chosen"][0]["content"]) for t in turns] == [(1, "b"), (3, "d")]


def test_one_row_per_prompt(blank, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(blank / "model")
    rows = [{"prompt": p, "chosen": c} for p, c in (("a:", " 1"), ("b:", " 2"), ("a:", " 3"))]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = dict(data=str(tmp_path / "test.jsonl"))
    kept = sft.load_rows(args(blank, "", one_per_prompt=True, **data), "test", tokenizer)
    assert [tokenizer.decode(row["responses"][0][:-1]) for row in kept] == [
        " 3",
        " 2",
    ]  # the last of each prompt
    assert len(sft.load_rows(args(blank, "", **data), "test", tokenizer)) == 3
    with (tmp_path / "test.jsonl").open(
        "a"
    ) as file:  # nothing says which response is to be learned
        file.write('{"prompt": "c:", "responses": [" 4", " 5"]}\n')
    with pytest.raises(SystemExit, match="need chosen"):
        sft.load_rows(args(blank, "", **data), "test", tokenizer)
    assert all(
        len(row["responses"]) == 1 for row in tokenize_pairs([{**rows[0], "n": 1}], tokenizer)
    )
