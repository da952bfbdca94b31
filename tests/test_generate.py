import csv
import dataclasses
import json
import math
import os
import shutil
import sys
import threading
import time
from functools import partial
from pathlib import Path

import dpl
import generate as method
import numpy as np
import pyarrow.parquet
import pytest
import torch
import transformers
from conftest import ROOT, run
from generate import (
    Args,
    Question,
    main,
    other_responses,
    respond,
    sampler,
    scores,
    summarise,
    wilson,
)
from scipy.stats import binomtest
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    GPTNeoXForSequenceClassification,
    LlamaConfig,
)

import common
from common import load_tokenizer

V, END = 61, 0
PROMPTS = [[5, 9, 2], [7], [11, 3, 8, 40, 22, 1, 60], [4, 4, 4, 30], [9, 9]]
SHAPE = dict(
    vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
)
CONFIGS = {
    "neox": GPTNeoXConfig(**SHAPE),
    "llama": LlamaConfig(**SHAPE, num_key_value_heads=2),
    "gpt2": GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64),
}


@pytest.fixture(params=CONFIGS)
def model(request):
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(CONFIGS[request.param], dtype=torch.float32).eval()
    for weight in model.parameters():  # the default 0.02 makes every distribution flat
        weight.data *= 6 if weight.dim() > 1 else 1
    return model


WARPERS = {  # the library's own filters
    "top_k": transformers.TopKLogitsWarper,
    "top_p": transformers.TopPLogitsWarper,
    "min_p": transformers.MinPLogitsWarper,
}


@torch.no_grad()
def naive(model, prompt, uniforms, how, boost=0.0):
    """One response by full forward passes without padding or cache, by the inverse CDF."""
    ids = list(prompt)
    for u in uniforms.tolist():
        logits = model(torch.tensor([ids]), use_cache=False).logits[:, -1]
        logits[:, END] += boost
        logits = logits / how.temperature
        for name, x in how.filters.items():
            logits = WARPERS[name](x)(None, logits)
        p = logits.double().softmax(-1)[0]
        ids.append(int((p.cumsum(0) <= u).sum()))
        if ids[-1] == END:
            break
    return ids[len(prompt) :]


def test_left_padded_greedy_equals_unpadded_greedy(model):
    greedy = sampler(temperature=0)
    found = respond(model, PROMPTS, torch.zeros(5, 12), greedy, [END], V)
    assert found == [naive(model, prompt, torch.zeros(12), greedy) for prompt in PROMPTS]


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7, "top_k": 20}, {"top_p": 0.9, "min_p": 0.02}]
)
def test_a_response_depends_on_its_own_prompt_and_uniforms(model, options, monkeypatch):
    # 40 responses, of which most end early, against one by one: the last one is alone at the end
    prompts, how = PROMPTS * 8, sampler(**options)
    u = torch.rand(40, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # The end-of-text token becomes likely enough that responses end at many different times.
    for name in ("prefill", "decode_step"):
        monkeypatch.setattr(method, name, partial(boosted, getattr(method, name)))
    found = respond(model, prompts, u, how, [END], V)
    assert found == [naive(model, prompt, row, how, 2.0) for prompt, row in zip(prompts, u)]
    ended = [ids for ids in found if END in ids]
    assert (
        len(ended) > 5
        and len({len(ids) for ids in found}) > 5
        and all(ids.index(END) == len(ids) - 1 for ids in ended)
    )
    assert all(len(ids) == 24 for ids in found if END not in ids)
    part = respond(model, prompts[3:9], u[3:9], how, [END], V)
    assert part == found[3:9]


def boosted(function, *inputs):
    """What prefill or decode_step returns, with a higher logit of the end-of-text token."""
    *others, logits = function(*inputs)
    return *others, torch.cat([logits[:, :1] + 2, logits[:, 1:]], 1)


def test_no_token_above_the_tokenizer_is_drawn(model):
    u = torch.rand(400, 5, generator=torch.Generator().manual_seed(0))
    found = respond(
        model, PROMPTS[:1] * 400, u, sampler(), [-1], 50
    )  # an embedding of 61 rows, a tokenizer of 50
    assert max(map(max, found)) < 50 and len(set(sum(found, []))) > 10


def test_filters_keep_the_sets_of_their_definitions():
    p = torch.tensor([[0.4, 0.3, 0.15, 0.1, 0.05]])
    kept = {
        (): 5,
        (("top_k", 2),): 2,
        (("top_p", 0.6),): 2,
        (("top_p", 0.9),): 4,
        (("min_p", 0.3),): 3,
        (("temperature", 0),): 1,
        (("temperature", 0), ("top_p", 0.9)): 1,
    }
    for options, n in kept.items():
        filters = sampler(**dict(options)).filters
        if filters:
            found = common.kept_by_all(p.log(), p, filters, method.kept_set)
            assert found.sum() == n and found[0, :n].all(), options
    # a temperature of 2 makes probabilities proportional to the square root
    hot = common.tempered(p.log(), sampler(temperature=2.0).temperature).softmax(-1)
    torch.testing.assert_close(hot, p.sqrt() / p.sqrt().sum())
    with pytest.raises(SystemExit, match="top-p"):
        method.check(Args(top_p=1.5))
    with pytest.raises(ValueError, match="unknown filter"):
        method.kept_set(p.log(), p, "top_q", 1)


def test_wilson_interval():
    for k, n in ((0, 10), (5, 10), (8, 10), (10, 10), (123, 256)):
        exact = binomtest(k, n).proportion_ci(method="wilson")
        assert wilson(k, n) == pytest.approx((exact.low, exact.high), abs=1e-6)
    # by hand, z^2 = 3.8415: k = 0 gives 0 .. z^2 / (n + z^2)
    assert wilson(0, 10) == pytest.approx((0, 3.841459 / 13.841459), abs=1e-6)
    assert wilson(2.5, 10)[0] < 0.25 < wilson(2.5, 10)[1]


# A prompt of the tiny world: --judge tiny knows no others.
TINY = "\n\nHuman: Tell me a story about a fox in a cave.\n\nAssistant:"


def compare(args, rows):
    return method.compare(args, rows, other_responses(args, rows))


def response_rows(n=6):
    return [
        {"row": i // 2, "prompt": f"{TINY}{i}", "response": "x" * (i % 3 + 1), "chosen": "xx"}
        for i in range(n)
    ]


def judge_command(tmp_path, body):
    path = tmp_path / "judge.py"
    path.write_text(
        "import json, sys\nfor line in sys.stdin:\n    q = json.loads(line)\n    " + body + "\n"
    )
    return f"{sys.executable} {path}"


LONGER = 'n = len(q["a"]) - len(q["b"]); print("A" if n > 0 else "B" if n < 0 else "tie")'


def test_command_judge_is_symmetric_under_swap(tmp_path):
    method.setup(0)
    args = Args(judge_command=judge_command(tmp_path, LONGER))
    rows = compare(args, response_rows())
    assert [row["outcome"] for row in rows] == [-1, 0, 1] * 2
    swapped = compare(
        args, [row | {"response": row["other"], "chosen": row["response"]} for row in rows]
    )
    assert [row["outcome"] for row in swapped] == [1, 0, -1] * 2
    here, there = summarise(rows), summarise(swapped)
    assert here.win_rate + there.win_rate == pytest.approx(1) and here.ties == there.ties == 2
    assert here.low + there.high == pytest.approx(1)


def test_a_judge_that_prefers_a_place_makes_ties(tmp_path):
    method.setup(0)
    rows = compare(Args(judge_command=judge_command(tmp_path, 'print("A")')), response_rows())
    summary = summarise(rows)
    assert summary.ties == 6 and summary.win_rate == 0.5
    # "A" in one order and "tie" in the other: half an answer for the response, so a win
    body = 'print("A" if q["a"] == "x" else "tie")'
    rows = compare(Args(judge_command=judge_command(tmp_path, body)), response_rows())
    assert [row["outcome"] for row in rows] == [1, 0, 0] * 2


def test_summary_counts_prompts_not_samples():
    rows = [
        {"row": i // 4, "outcome": [1, 1, 0, -1][i % 4], "score": 1.0, "other_score": 0.0}
        for i in range(40)
    ]
    summary = summarise(rows)
    assert (summary.wins, summary.ties, summary.losses, summary.prompts) == (20, 10, 10, 10)
    assert summary.win_rate == 0.625 and (summary.low, summary.high) == wilson(6.25, 10)


@pytest.fixture
def options(blank):
    return dict(
        model=str(blank / "model"),
        data=str(blank / "pairs.jsonl"),
        max_new_tokens=8,
        batch_size=7,
        seed=3,
    )


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_run_writes_responses_verdicts_and_figure(options, tmp_path, pictures):
    summary = main(Args(**options, samples=2, out=str(tmp_path / "a")))
    rows, data = lines(tmp_path / "a" / "responses.jsonl"), lines(ROOT / options["data"])
    data = data[-(len(data) // 5) :]  # the test split of a file alone that is so short
    assert [(row["row"], row["sample"]) for row in rows] == [
        (i, k) for i in range(len(data)) for k in (0, 1)
    ]
    assert all(
        rows[2 * i]["prompt"] == row["prompt"] and rows[2 * i]["chosen"] == row["chosen"]
        for i, row in enumerate(data)
    )
    assert rows[0]["response"] != rows[1]["response"] and all(row["tokens"] <= 8 for row in rows)
    assert summary.wins + summary.ties + summary.losses == len(rows) == 2 * summary.prompts
    assert len(lines(tmp_path / "a" / "judged.jsonl")) == len(rows)
    assert (tmp_path / "a" / "figures" / "scores.png").stat().st_size > 5000 and not (
        tmp_path / "a/parts"
    ).exists()

    same = main(
        Args(
            **options,
            samples=2,
            out=str(tmp_path / "b"),
            against=str(tmp_path / "a/responses.jsonl"),
        )
    )
    assert same.ties == len(rows) and same.win_rate == 0.5  # the same seed: the same responses
    again = main(
        Args(
            out=str(tmp_path / "a"),
            responses=str(tmp_path / "a" / "responses.jsonl"),
            overwrite=True,
        )
    )
    assert (
        again == summary and lines(tmp_path / "a" / "responses.jsonl") == rows
    )  # judging deletes nothing


@pytest.fixture
def many(options, blank, tmp_path):
    """All 48 rows as a test split: seven batches."""
    shutil.copy(blank / "pairs.jsonl", tmp_path / "test.jsonl")
    return options | {"data": str(tmp_path / "test.jsonl")}


def test_a_killed_run_resumes(many, tmp_path, monkeypatch):
    main(Args(**many, out=str(tmp_path / "whole")))
    calls = []

    def fail(*inputs):
        calls.append(inputs)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return respond(*inputs)

    monkeypatch.setattr(method, "respond", fail)
    with pytest.raises(KeyboardInterrupt):
        main(Args(**many, out=str(tmp_path / "killed")))
    assert len(list((tmp_path / "killed" / "parts").glob("*.jsonl"))) == 3
    assert not (tmp_path / "killed" / "responses.jsonl").exists()
    with pytest.raises(SystemExit, match="--resume"):
        main(Args(**many, out=str(tmp_path / "killed")))
    main(Args(**many, out=str(tmp_path / "killed"), resume=True))
    assert len(calls) == 8  # four, then the four of seven batches that were missing
    texts = [(tmp_path / name / "responses.jsonl").read_bytes() for name in ("whole", "killed")]
    assert texts[0] == texts[1]
    main(Args(**many, out=str(tmp_path / "killed"), resume=True))
    assert len(calls) == 8  # nothing left to generate
    main(Args(**many, out=str(tmp_path / "killed"), overwrite=True))
    assert len(calls) == 15


def test_two_processes_write_what_one_writes(many, tmp_path):
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in many.items()]
    main(Args(**many, out=str(tmp_path / "one")))
    done = run("methods/generate.py", *flags, f"--out={tmp_path / 'two'}", processes=2)
    assert done.stdout.count("win_rate") == 1  # one table
    for file in ("responses.jsonl", "judged.jsonl"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def classifier(folder, blank, labels=1):
    torch.manual_seed(0)
    shutil.copytree(blank / "model", folder)
    config = GPTNeoXConfig.from_pretrained(folder, num_labels=labels)
    GPTNeoXForSequenceClassification(config).save_pretrained(folder)
    return folder


def test_classifier_scores_the_last_token_of_each_text(blank, tmp_path):
    method.setup(0)
    folder = classifier(tmp_path / "reward", blank)
    questions = [
        Question(row["prompt"], row["chosen"][: 10 * i], "")
        for i, row in enumerate(lines(blank / "pairs.jsonl")[:9])
    ]
    found = scores(Args(judge=str(folder), batch_size=4), questions)
    model, tokenizer = (
        GPTNeoXForSequenceClassification.from_pretrained(folder).eval(),
        load_tokenizer(folder),
    )
    for question, score in zip(questions, found):
        text = question.prompt + (question.response or " ")
        hidden = model.gpt_neox(torch.tensor([tokenizer(text).input_ids])).last_hidden_state
        assert model.score(hidden[0, -1]).item() == pytest.approx(
            score, abs=1e-5
        )  # without any padding
    assert len(set(found)) == 9


def test_distributional_reward_model_scores_by_its_mean(blank, tmp_path):
    options = dict(
        model=str(blank / "model"), data=str(blank / "pairs.jsonl"), max_steps=2, batch_size=4
    )
    dpl.main(dpl.Args(type="mean_and_variance", **options, out=str(tmp_path / "dpl")))
    row = lines(blank / "pairs.jsonl")[0]
    found = scores(
        Args(judge=str(tmp_path / "dpl")),
        [Question(row["prompt"], row["chosen"], ""), Question(row["prompt"], "", "")],
    )
    model, tokenizer, _ = dpl.load_reward_model(str(tmp_path / "dpl"), "float32")
    hidden = model.base_model(
        torch.tensor([tokenizer(row["prompt"] + row["chosen"]).input_ids])
    ).last_hidden_state
    assert found[0] == pytest.approx(model.score(hidden[0, -1])[0].item(), abs=1e-5)
    assert np.isfinite(found).all()


def test_tiny_model_earns_the_known_mean_reward(tmp_path):
    # the grammar's mean reward is 0.125, its standard deviation below 2; four standard errors
    summary = main(Args(max_new_tokens=64, prompts=128, out=str(tmp_path / "tiny")))
    assert abs(summary.score - 0.125) < 4 * 2 / 128**0.5
    assert (
        summary.other_score > summary.score and summary.win_rate < 0.5
    )  # readers chose the others


def refused(args, *words):
    with pytest.raises(SystemExit) as stop:
        main(args)
    message = str(stop.value)
    assert "\n" not in message and all(word in message for word in words), message
    assert len(message.replace(str(TEMPORARY[-1]), "/tmp/x")) <= 200, message


TEMPORARY = [""]  # the folder of the test, whose long name the user did not choose


@pytest.fixture(autouse=True)
def remember(tmp_path):
    TEMPORARY.append(tmp_path)


def test_bad_input_ends_in_one_line(options, blank, tmp_path):
    out = dict(options, out=str(tmp_path / "out"))
    small = shutil.copytree(blank / "model", tmp_path / "mixed")
    torch.manual_seed(0)
    config = GPTNeoXConfig.from_pretrained(small, vocab_size=300)
    AutoModelForCausalLM.from_config(config).save_pretrained(small)
    refused(Args(**out | {"model": str(small)}), "400", "300", "resize them")
    assert not (tmp_path / "out" / "responses.jsonl").exists()
    refused(Args(**out | {"max_new_tokens": 600}, overwrite=True), "reads 512 tokens")
    refused(Args(**options, top_p=2.0, out=str(tmp_path / "p")), "--top-p")
    assert not (tmp_path / "p").exists()
    refused(Args(**out | {"max_new_tokens": 0}), "--max-new-tokens", "from 1")

    (tmp_path / "empty.jsonl").write_text("")
    refused(
        Args(responses=str(tmp_path / "empty.jsonl"), out=str(tmp_path / "e")),
        "empty.jsonl",
        "no rows",
    )
    (tmp_path / "bad.jsonl").write_text('{"prompt": "p", "response": "r"}\n{"prompt": "p"}\n')
    refused(
        Args(responses=str(tmp_path / "bad.jsonl"), out=str(tmp_path / "e")), "bad.jsonl", "row 2"
    )
    refused(Args(responses=str(tmp_path / "none.jsonl"), out=str(tmp_path / "e")), "none.jsonl")
    assert not (tmp_path / "e").exists()

    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in response_rows()))
    judged = dict(responses=str(tmp_path / "rows.jsonl"), out=str(tmp_path / "j"), overwrite=True)
    refused(Args(**judged, judge_command="echo no model >&2; exit 3"), "exit code 3", "no model")
    refused(Args(**judged, judge_command="cat"), "12 lines for 12 questions", "line 1 is")
    refused(Args(**judged, judge_command="echo A"), "1 lines for 12 questions")
    refused(Args(**judged, judge_command="true"), "0 lines for 12 questions")
    refused(Args(**judged, against=str(tmp_path / "bad2.jsonl")), "bad2.jsonl")
    other = [row | {"prompt": "another"} for row in response_rows()]
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in other))
    refused(Args(**judged, against=str(tmp_path / "other.jsonl")), "other.jsonl", "--data")
    refused(Args(**judged, judge=str(blank / "model")), "not a reward model")
    refused(Args(**judged, judge=str(classifier(tmp_path / "two", blank, 2))), "not a reward model")
    assert not (tmp_path / "j").exists()


NUMERIC = [field.name for field in dataclasses.fields(Args) if field.type in (int, float)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1, 10**12])
@pytest.mark.parametrize("name", NUMERIC)
def test_numbers_out_of_range_are_refused_before_anything_is_loaded(name, value, monkeypatch):
    monkeypatch.delattr(method, "setup")  # a run would begin with it
    refused(Args(**{name: value}), "--" + name.replace("_", "-"), str(value))


def test_a_temperature_that_overflows_is_refused_and_presets_are_not():
    refused(Args(temperature=1e-30), "--temperature", "greedy")
    for preset in method.PRESETS.values():
        method.check(preset)
    method.check(Args(temperature=0.0, top_p=0.0, min_p=1.0))
    assert {"temperature", "top_p", "min_p", "prompts", "seed", "samples"} < set(NUMERIC)


def test_sizes_beyond_the_memory_are_refused_with_their_bytes(options, tmp_path, monkeypatch):
    out = tmp_path / "big"
    big = options | {"data": str(shutil.copy(options["data"], tmp_path / "test.jsonl"))}
    monkeypatch.setattr(method, "memory", lambda device=None: 10**9)
    refused(Args(**big, samples=10**6, out=str(out)), "48 prompts", str(48 * 10**9), "--samples")
    uniforms = torch.empty(7, 8, dtype=torch.float64, device="meta")
    logits = torch.empty(7, 400, device="meta")  # a tokenizer of 400 tokens
    size = uniforms.nbytes + logits.nbytes
    room = {"bytes": size - 1}
    monkeypatch.setattr(method, "ROW_BYTES", 1)
    monkeypatch.setattr(method, "memory", lambda device=None: room["bytes"])
    refused(Args(**big, out=str(out)), "--batch-size 7", f"{size} bytes")
    assert not out.exists()
    room["bytes"] = size
    main(Args(**big, judge="none", out=str(out)))  # it fits exactly


WRONG_ROWS = {
    "no prompt": {"response": "r"},
    "null": {"prompt": "p", "response": None},
    "number": {"prompt": "p", "response": 3},
    "list": {"prompt": ["p"], "response": "r"},
    "chosen": {"prompt": "p", "response": "r", "chosen": 0.5},
    "surrogate": {"prompt": "p", "response": "\ud83d"},
    "row": {"prompt": "p", "response": "r", "row": [1]},
}


@pytest.mark.parametrize("flag", ["responses", "against"])
@pytest.mark.parametrize("row", WRONG_ROWS.values(), ids=WRONG_ROWS)
def test_rows_of_others_are_named(row, flag, options, tmp_path):
    good, bad, out = tmp_path / "good.jsonl", tmp_path / "bad.jsonl", tmp_path / "out"
    good.write_text(json.dumps({"prompt": TINY, "response": "r", "chosen": "c"}) + "\n")
    bad.write_text(good.read_text() + json.dumps(row) + "\n")
    args = Args(**{"responses": str(good), "out": str(out), flag: str(bad)})
    refused(args, f"{bad}: row 2: ")
    assert not out.exists()
    main(dataclasses.replace(args, **{flag: str(good)}))  # the corrected command runs
    assert len(lines(out / "judged.jsonl")) == 1


def damage_truncated(path, others):
    path.write_bytes(path.read_bytes()[:-30])


def damage_fewer(path, others):
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines()[:-1]))


def damage_another(path, others):
    shutil.copy(others, path)


def damage_types(path, others):
    rows = lines(path)
    rows[2]["response"] = 7
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def damage_huge(path, others):
    os.truncate(path, 10**12)  # a hole: no disk holds it, and no memory


def damage_empty(path, others):
    path.write_bytes(b"")


DAMAGES = [
    damage_truncated,
    damage_fewer,
    damage_another,
    damage_types,
    damage_huge,
    damage_empty,
]


def test_a_damaged_part_is_drawn_again(many, tmp_path, monkeypatch, capsys):
    main(Args(**many, out=str(tmp_path / "whole"), judge="none"))
    stops = iter([False] * 6 + [True])  # six of seven batches
    stop_requested = method.stop_requested
    monkeypatch.setattr(method, "stop_requested", lambda: next(stops))
    out = tmp_path / "stopped"
    with pytest.raises(SystemExit) as stop:
        main(Args(**many, out=str(out), judge="none"))
    assert stop.value.code == 143
    parts = sorted((out / "parts").iterdir())
    assert len(parts) == 6
    for damage, path in zip(DAMAGES, parts, strict=True):
        damage(path, others=parts[3])
    monkeypatch.setattr(method, "stop_requested", stop_requested)
    main(Args(**many, out=str(out), judge="none", resume=True))
    printed = capsys.readouterr().out
    for path in parts:
        assert f"{path}: " in printed and max(map(len, printed.splitlines())) < 10**4
    assert printed.count("it is drawn again") == 6
    whole, resumed = (tmp_path / x / "responses.jsonl" for x in ("whole", "stopped"))
    assert whole.read_bytes() == resumed.read_bytes()


def test_a_part_that_is_damaged_at_the_end_is_named(many, tmp_path, monkeypatch):
    join = method.join

    def damage_and_join(args, work, out):
        damage_truncated(method.part_path(out, 4), None)
        join(args, work, out)

    monkeypatch.setattr(method, "join", damage_and_join)
    out = tmp_path / "out"
    refused(Args(**many, out=str(out)), "000004.jsonl", "--resume")
    assert not (out / "responses.jsonl").exists()


def broken_judges(folder, blank):
    """Folders that are no reward models, and a word of the message."""
    empty = folder / "empty"
    empty.mkdir()
    yield empty, "config.json"
    for name, text in (("torn", '{"architectures": ['), ("list", "[]"), ("bytes", "\x00\xff")):
        judge = shutil.copytree(blank / "model", folder / name)
        (judge / "config.json").write_text(text)
        yield judge, "config.json"
    yield blank / "model", "not a reward model"
    yield classifier(folder / "two", blank, 2), "not a reward model"
    wrong = {"id2label": 3}, {"dpl": 3}, {"dpl": {"K": 1}}
    for name, config in zip(("three", "dpl", "K"), wrong):
        judge = classifier(folder / name, blank)
        values = json.loads((judge / "config.json").read_text())
        (judge / "config.json").write_text(json.dumps(values | config))
        yield judge, "reward model" if name == "three" else "config.json"
    judge = classifier(folder / "headless", blank)
    shutil.copy(blank / "model" / "model.safetensors", judge)
    yield judge, "lack score.weight"
    judge = classifier(folder / "half", blank)
    os.truncate(judge / "model.safetensors", 1000)
    yield judge, "restore"


def test_a_judge_that_is_none_leaves_no_run_folder(options, blank, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "good.jsonl").write_text('{"prompt": "p", "response": "r", "chosen": "c"}\n')
    for judge, word in broken_judges(tmp_path, blank):
        refused(Args(**options, judge=str(judge), out=str(out)), word)
        rows = dict(responses=str(tmp_path / "good.jsonl"), out=str(out))
        refused(Args(**rows, judge=str(judge)), word)
        assert not out.exists(), judge
    refused(Args(**options, judge_command="python 'ask.py", out=str(out)), "--judge-command")
    other = [row | {"prompt": "another"} for row in response_rows()]
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in other))
    refused(Args(**options, against=str(tmp_path / "other.jsonl"), out=str(out)), "other prompts")
    assert not out.exists()
    main(Args(**options, judge=str(classifier(tmp_path / "good", blank)), out=str(out)))


def test_rewards_that_are_not_finite_are_refused(blank, tmp_path):
    method.setup(0)
    folder = classifier(tmp_path / "reward", blank)
    model = GPTNeoXForSequenceClassification.from_pretrained(folder)
    model.score.weight.data[:] = math.nan
    model.save_pretrained(folder)
    with pytest.raises(SystemExit, match="gives nan for 'r'; a reward must be a finite number"):
        scores(Args(judge=str(folder)), [Question("p", "r", "")])


def test_a_folder_that_cannot_hold_the_run_is_refused_first(options, tmp_path, monkeypatch):
    monkeypatch.delattr(method, "prepare")  # nothing is loaded
    (tmp_path / "file").write_text("")
    refused(Args(**options, out=str(tmp_path / "file")), "another --out")
    refused(Args(**options, out=str(tmp_path / "file" / "below")), "another --out")
    refused(Args(**options, out=str(tmp_path)), "--resume goes on")
    refused(Args(**options, out=str(tmp_path), overwrite=True), "deletes nothing")
    refused(Args(**options, out=str(tmp_path / "none"), resume=True), "without --resume")


def test_the_others_may_be_in_the_folder_that_is_overwritten(options, tmp_path):
    out = tmp_path / "out"
    first = main(Args(**options, out=str(out), judge="none"))
    texts = [row["response"] for row in lines(out / "responses.jsonl")]
    against = str(out / "responses.jsonl")
    changed = options | {"seed": 4}
    main(Args(**changed, out=str(out), against=against, overwrite=True))
    judged = lines(out / "judged.jsonl")
    assert first is None and [row["other"] for row in judged] == texts
    assert texts != [row["response"] for row in judged]


@pytest.mark.parametrize(
    "command, words",
    [
        ("yes A", "and more"),
        ("head -c 20000 /dev/zero | tr '\\0' x", "line 1 is"),
        ("printf '\\377\\376\\n'", "line 1 is"),
        ("head -c 20000 /dev/zero | tr '\\0' '\\1' >&2; exit 5", "exit code 5"),
        ("kill -9 $$", "exit code -9"),
        ("no-such-judge", "exit code 127"),
    ],
)
def test_output_of_a_judge_that_is_no_answer(command, words, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in response_rows()))
    judged = dict(responses=str(tmp_path / "rows.jsonl"), out=str(tmp_path / "j"))
    refused(Args(**judged, judge_command=command), "--judge-command", words)
    assert not (tmp_path / "j").exists()


def test_a_signal_ends_a_judge_command_and_what_it_started(tmp_path):
    method.setup(0)
    log = tmp_path / "pids"
    command = f"sleep 60 & echo $! >> {log}; sleep 60"
    common.signals.clear()
    timer = threading.Timer(1, common.signals.append, [15])
    timer.start()
    begun = time.time()
    try:
        with pytest.raises(SystemExit) as stop:
            scores(Args(judge_command=command), [Question("p", "a", "b")])
    finally:
        timer.join()
        common.signals.clear()
    assert stop.value.code == 143 and time.time() - begun < 5
    state = Path(f"/proc/{log.read_text().strip()}/stat")
    while time.time() - begun < 20:  # a killed process goes when the machine comes to it
        if not state.exists() or state.read_text().split()[2] == "Z":
            return  # gone, or dead
        time.sleep(0.1)
    raise AssertionError("what the judge has started goes on")


def test_judging_ends_within_a_batch(blank, tmp_path, monkeypatch):
    dpl.main(
        dpl.Args(
            type="base",
            model=str(blank / "model"),
            data=str(blank / "pairs.jsonl"),
            max_steps=1,
            batch_size=4,
            out=str(tmp_path / "dpl"),
        )
    )
    rows = lines(blank / "pairs.jsonl")
    questions = [Question(row["prompt"], row["chosen"], "") for row in rows]
    reward = str(classifier(tmp_path / "reward", blank))
    # Asked before every batch of 8 of the 48.
    for judge, stop_at in ((reward, 1), (reward, 6), (str(tmp_path / "dpl"), 5)):
        asked = []

        def stop(asked=asked, stop_at=stop_at):
            asked.append(1)
            return len(asked) == stop_at

        monkeypatch.setattr(method, "stop_requested", stop)
        with pytest.raises(SystemExit) as stopped:
            scores(Args(judge=judge, batch_size=8), questions)
        assert stopped.value.code == 143 and len(asked) == stop_at


def test_command_line(tmp_path):
    done = run("methods/generate.py", "nonsense", check=False)
    assert (
        done.returncode == 1
        and "choose one of tiny, hh, tldr" in done.stderr
        and done.stderr.count("\n") == 1
    )
    done = run(
        "methods/generate.py",
        "--responses",
        tmp_path / "x.jsonl",
        "--out",
        tmp_path / "o",
        check=False,
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "x.jsonl" in done.stderr


# Your own prompts, and your own judge.

SHORT = """
def short(prompts, responses):
    assert len(prompts) == len(responses)
    return [-len(response) for response in responses]
def chats(prompts, responses):
    return [len(prompt) for prompt in prompts]
def none(prompts, responses): pass
def leaves(prompts, responses): raise SystemExit
def fewer(prompts, responses): return [1.0]
def nan(prompts, responses): return [float("nan")] * len(responses)
def strings(prompts, responses): return ["1"] * len(responses)
def alone(responses): return [1.0] * len(responses)
"""


def prompt_files(folder):
    """Files of the same three prompts, and the prompts; one of them is a chat where that can be."""
    chat = [{"role": "user", "content": "Hi"}]
    prompts = ["A fox,", chat, "Once"]
    texts = ["A fox,", json.dumps(chat), "Once"]
    (folder / "a.txt").write_bytes("\r\n".join([*texts[:1], "", *texts[1:], ""]).encode())
    rows = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
    (folder / "a.jsonl").write_text(rows)
    with (folder / "a.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["prompt"], *[[text] for text in texts]])
    table = pyarrow.table({"prompt": texts})
    pyarrow.parquet.write_table(table, folder / "a.parquet")
    return prompts, sorted(folder.glob("a.*"))


def test_prompts_alone_are_read_whole_in_every_form(tmp_path):
    prompts, files = prompt_files(tmp_path)
    assert len(files) == 4
    for file in files:
        assert [row["prompt"] for row in common.load_prompts(str(file))] == prompts, file
        assert [row["prompt"] for row in common.load_prompts("tiny", str(file))] == prompts, file
    # 40 rows of prompts have no test split; with responses they have one of two rows.
    path = tmp_path / "many.jsonl"
    path.write_text('{"prompt": "p"}\n' * 40)
    assert len(common.load_prompts(str(path))) == 40
    path.write_text('{"prompt": "p", "chosen": "c"}\n' * 40)
    assert len(common.load_prompts(str(path))) == 8


def test_a_prompt_is_text_as_it_stands_unless_it_is_json_of_messages():
    for text in ("Hi", " Hi ", "[1, 2]", "[", '[{"a": 1}]', "see notes.txt"):
        assert common.load_prompts("tiny", text) == [{"prompt": text}]
    chat = [{"role": "user", "content": "Hi"}]
    assert common.load_prompts("tiny", json.dumps(chat)) == [{"prompt": chat}]
    for text, word in ((str(chat), "no JSON"), ("notes.txt", "no such file")):
        with pytest.raises(SystemExit, match=word):
            common.load_prompts("tiny", text)


def test_unusable_prompts_are_counted(tmp_path, capsys):
    path = tmp_path / "p.jsonl"
    rows = [{"prompt": "p"}, {"prompt": " "}, {"prompt": None}, {"prompt": 3}, {"other": 1}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row["prompt"] for row in common.load_prompts(str(path))] == ["p"]
    assert "kept 1, dropped 4 (a prompt or response is null: 2, the first is row 3" in (
        capsys.readouterr().out
    )
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(SystemExit, match="one a line"):
        common.load_prompts(str(tmp_path / "empty.txt"))


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.py").write_text(SHORT)
    return f"{tmp_path}/own.py"


def test_prompts_without_responses_get_samples_and_a_mean_score(options, own, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("A fox\nOnce upon\nA cat\nA dog\n")
    out = tmp_path / "out"
    args = Args(**options | {"data": str(tmp_path / "p.txt")}, out=str(out))
    assert main(args) is None  # the tiny world's judge does not know them
    printed = capsys.readouterr().out
    assert "not judged: --judge tiny" in printed and printed.count("sample: ") == 3
    assert f"4 samples: {out}/responses.jsonl" in printed and not (out / "judged.jsonl").exists()
    rows = lines(out / "responses.jsonl")
    assert [row["prompt"] for row in rows] == ["A fox", "Once upon", "A cat", "A dog"]

    # A judge of one's own: the mean of its scores, of the same responses.
    main(dataclasses.replace(args, judge=f"{own}:short", overwrite=True))
    judged = lines(out / "judged.jsonl")
    mean = np.mean([-len(row["response"]) for row in rows])
    assert f"mean score {mean:.4g}\n" in capsys.readouterr().out
    assert [row["score"] for row in judged] == [-len(row["response"]) for row in rows]
    main(dataclasses.replace(args, judge_command="cat", overwrite=True))
    assert "give --against" in capsys.readouterr().out

    # Against the responses of another run there is a win rate.
    against = dataclasses.replace(args, judge=f"{own}:short", against=str(out / "responses.jsonl"))
    assert main(dataclasses.replace(against, out=str(tmp_path / "two"))).win_rate == 0.5


def test_one_prompt_on_the_command_line(options, own, tmp_path):
    args = Args(**options, prompt="A fox", samples=3, judge=f"{own}:chats", out=str(tmp_path / "o"))
    main(args)
    judged = lines(tmp_path / "o/judged.jsonl")
    assert [row["prompt"] for row in judged] == ["A fox"] * 3
    assert [row["score"] for row in judged] == [5.0] * 3


def test_an_own_judge_compares_with_the_chosen_responses(options, own, tmp_path):
    summary = main(Args(**options, judge=f"{own}:short", out=str(tmp_path / "o")))
    for row in lines(tmp_path / "o/judged.jsonl"):
        shorter = len(row["chosen"]) - len(row["response"])
        assert row["outcome"] == np.sign(shorter)
    assert summary.wins + summary.ties + summary.losses == 9  # of the 48, a fifth


@pytest.mark.parametrize(
    "name, words",
    [
        ("none", ["None", "no numbers"]),
        ("leaves", ["calls sys.exit", "line 8"]),
        ("fewer", ["(1,)", "2 responses"]),
        ("nan", ["gives nan"]),
        ("strings", ["no numbers"]),
        ("alone", ["TypeError", "function(prompts, responses)"]),
        ("absent", ["no function absent"]),
    ],
)
def test_an_own_judge_that_is_wrong_is_named_before_sampling(options, own, tmp_path, name, words):
    args = Args(**options, judge=f"{own}:{name}", out=str(tmp_path / "o"))
    refused(args, f"--judge {own}:{name}: ", *words)
    assert not (tmp_path / "o").exists()


def test_names_of_judges_that_are_nothing(options, tmp_path, own):
    args = Args(**options, out=str(tmp_path / "o"))
    refused(dataclasses.replace(args, judge=own), "own.py:FUNCTION")
    refused(dataclasses.replace(args, judge=f"{tmp_path}/no.py:f"), "there is no file")
    refused(dataclasses.replace(args, judge="own:short"), "FILE.py:FUNCTION")
    (tmp_path / "torn.py").write_text("1 / 0")
    refused(dataclasses.replace(args, judge=f"{tmp_path}/torn.py:f"), "line 1 raises ZeroDivision")


def test_what_compares_needs_a_judge_that_knows_the_prompts(options, tmp_path):
    (tmp_path / "r.jsonl").write_text('{"prompt": "p", "response": "r", "chosen": "c"}\n')
    args = Args(responses=str(tmp_path / "r.jsonl"), out=str(tmp_path / "o"))
    refused(args, "--judge tiny", "FILE.py:FUNCTION")
    assert not (tmp_path / "o").exists()
