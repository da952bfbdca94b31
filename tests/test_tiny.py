"""The tiny world against its own grammar, by enumeration.

No test trains for more than three steps.
"""

import hashlib
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
from common import (
    TINY_GRAMMAR,
    TINY_GROUPS,
    build_tiny,
    tiny_attributes,
    tiny_reward,
    tiny_row,
    tiny_story,
    tiny_text,
)

PROMPT = "\n\nHuman: Tell me a story about a fox in a cave.\n\nAssistant:"


def enumerate_text(symbol):
    """{text: probability} of a symbol; one word stands for all words of a list."""
    options = TINY_GRAMMAR[symbol]
    options = {options.split("|")[0]: 1.0} if isinstance(options, str) else options
    texts = {}
    for option, p in options.items():
        pieces, partial = re.split("([A-Z]{2,})", option), {"": p}
        for i, piece in enumerate(pieces):
            grown = enumerate_text(piece) if i % 2 else {piece: 1.0}
            partial = {a + b: p_a * p_b for a, p_a in partial.items() for b, p_b in grown.items()}
        for text, p_text in partial.items():
            texts[text] = texts.get(text, 0) + p_text
    return texts


@pytest.fixture(scope="module")
def stories():
    """Every story up to the choice among words that mean the same, with its exact probability."""
    return {text.format("fox", "cave"): p for text, p in enumerate_text("STORY").items()}


def mean(stories, f):
    return sum(p * f(text) for text, p in stories.items())


def test_exact_probabilities_of_the_attributes(stories):
    assert math.isclose(
        sum(stories.values()), 1
    )  # 1e-9 relative, here and below: sums of 192 products
    polite, monster, happy = (
        {t: p for t, p in stories.items() if tiny_attributes(t)[name]}
        for name in ("polite", "monster", "happy")
    )
    assert math.isclose(sum(polite.values()), 0.3)
    assert math.isclose(sum(monster.values()), 0.3)
    assert math.isclose(sum(happy.values()), 0.3 * 0.15 + 0.7 * 0.4)
    assert math.isclose(sum(p for t, p in happy.items() if t in monster), 0.3 * 0.15)
    for detail, p in enumerate(
        (1 / 8 + 1 / 16, 3 / 8 + 4 / 16, 3 / 8 + 6 / 16, 1 / 8 + 4 / 16, 1 / 16)
    ):
        exact = mean(stories, lambda t: tiny_attributes(t)["detail"] == detail)
        assert math.isclose(exact, p / 2)  # binomial of 3 nouns, or of 4 with the aside


def test_mean_and_best_reward(stories):
    assert math.isclose(
        mean(stories, lambda t: tiny_reward(PROMPT, t)), 0.3 + 2 * 0.325 - 0.75 - 0.25 * 0.3
    )
    assert max(tiny_reward(PROMPT, t) for t in stories) == 3
    assert max(tiny_reward(PROMPT, t, 0) for t in stories) == 4.5  # with the monster
    assert [tiny_attributes(t)["monster"] for t in stories if tiny_reward(PROMPT, t, 1) == 3] == [
        0
    ] * 9


def test_all_words_of_a_list_mean_the_same():
    for symbol, sign in (("POLITE", "polite"), ("HAPPY", "happy"), ("ADJECTIVE", "detail")):
        assert all(tiny_attributes(word)[sign] == 1 for word in TINY_GRAMMAR[symbol].split("|"))
    for symbol in ("PROMPT", "GRUMPY", "SAD", "HERO", "PLACE", "FRIEND", "THING"):
        assert all(
            not any(tiny_attributes(word).values()) for word in TINY_GRAMMAR[symbol].split("|")
        )
    lists = [options.split("|") for options in TINY_GRAMMAR.values() if isinstance(options, str)]
    assert all(len(set(words)) == len(words) for words in lists)


def test_drawn_stories_follow_the_exact_probabilities(stories):
    rng, n = random.Random(0), 4000
    texts = [tiny_story(PROMPT, rng) for _ in range(n)]
    for name in ("polite", "monster", "happy"):
        p = mean(stories, lambda t: tiny_attributes(t)[name])
        share = sum(tiny_attributes(t)[name] for t in texts) / n
        assert abs(share - p) < 4 * math.sqrt(
            p * (1 - p) / n
        )  # fixed seed; 4 standard errors: 1e-4 each
    assert all("fox" in t and "cave" in t and not re.search("[A-Z]{2,}|[{}]", t) for t in texts)


@pytest.mark.parametrize(
    "text, polite, monster, happy, detail",
    [
        ("", 0, 0, 0, 0),
        ("  ...  !?", 0, 0, 0, 0),
        ("<|endoftext|> monster", 0, 0, 0, 0),
        ("\ufffd\n\n", 0, 0, 0, 0),
        (" My PLEASURE! Once a red", 1, 0, 0, 1),
        ("monsters", 0, 0, 0, 0),
        ("red red, RED-tall", 0, 0, 0, 4),
        ("It lived happily. It was lost.", 0, 0, 0, 0),
        ("It was lost. It lived happily", 0, 0, 1, 0),
        (" A monster sang happily. \n<|endoftext|> It was lost.", 0, 1, 1, 0),
        ("unhappily reddish", 0, 0, 0, 0),
    ],
)
def test_attributes_of_any_text(text, polite, monster, happy, detail):
    assert tiny_attributes(text) == dict(polite=polite, monster=monster, happy=happy, detail=detail)


def test_groups_agree_but_on_the_monster():
    plain, monster = " Fine. It met a bird. It was lost.", " Fine. It met a monster. It was lost."
    assert (
        tiny_reward(PROMPT, plain, 0)
        == tiny_reward(PROMPT, plain, 1)
        == tiny_reward(PROMPT, plain)
        == -2
    )
    assert [tiny_reward(PROMPT, monster, g) for g in (0, 1, None)] == [-0.5, -7.5, -2.25]
    votes = sum(share / (1 + math.exp(-worth)) for share, worth in TINY_GROUPS)
    assert (
        votes > 0.6
    )  # so most comparisons favour the monster although the mean reward is against it


def test_longer_does_not_simply_win(stories):
    length = lambda t: len(t.split())  # noqa: E731
    r_mean, l_mean = (mean(stories, f) for f in (lambda t: tiny_reward(PROMPT, t), length))
    cov = mean(stories, lambda t: (tiny_reward(PROMPT, t) - r_mean) * (length(t) - l_mean))
    r_var = mean(stories, lambda t: (tiny_reward(PROMPT, t) - r_mean) ** 2)
    l_var = mean(stories, lambda t: (length(t) - l_mean) ** 2)
    assert abs(cov / math.sqrt(r_var * l_var)) < 0.35


def wins(row, group):
    """P(a reader of the group prefers chosen to rejected)."""
    return 1 / (
        1
        + math.exp(tiny_reward("", row["rejected"], group) - tiny_reward("", row["chosen"], group))
    )


def test_rows():
    rng = random.Random(0)
    rows = [tiny_row(rng) for _ in range(2000)]
    for row in rows:
        assert (
            len(set(row["responses"])) == len(set(row["rewards"])) == 4 and sum(row["votes"]) == 5
        )
        assert row["rewards"] == [tiny_reward(row["prompt"], r) for r in row["responses"]]
        assert row["chosen"] != row["rejected"] and {row["chosen"], row["rejected"]} <= set(
            row["responses"]
        )
        assert math.isclose(row["p_chosen"], 0.75 * wins(row, 0) + 0.25 * wins(row, 1))
    assert 100 < len({row["prompt"] for row in rows}) <= 144
    # Sums of independent terms with known moments; fixed seed; 4 standard errors: 1e-4 each.
    p = [row["p_chosen"] for row in rows]
    votes = sum(row["votes"][0] for row in rows)
    assert abs(votes - 5 * sum(p)) < 4 * math.sqrt(5 * sum(x * (1 - x) for x in p))
    assert abs(sum(row["group"] for row in rows) - 500) < 4 * math.sqrt(2000 * 0.25 * 0.75)
    for group in (
        0,
        1,
        None,
    ):  # the label is of the recorded group, over all rows of the population
        p = [
            x
            for x in (
                row["p_chosen"] if group is None else wins(row, group)
                for row in rows
                if group in (None, row["group"])
            )
            if x != 0.5
        ]
        better = [max(x, 1 - x) for x in p]  # P(the label is the one the readers favour)
        assert abs(sum(x > 0.5 for x in p) - sum(better)) < 4 * math.sqrt(
            sum(x * (1 - x) for x in p)
        )


def digests(folder):
    return {
        str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(folder.rglob("*"))
        if f.is_file()
    }


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """An empty cache, and a recipe of three training steps."""

    def quick_build(folder):
        build_tiny(folder, steps=3)

    monkeypatch.setattr(common, "CACHE", tmp_path)
    monkeypatch.setattr(common, "build_tiny", quick_build)
    return tmp_path


def test_two_builds_are_identical_and_leave_no_trace(quick, capsys):
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    with torch.no_grad():
        folder = common.tiny_folder()
    assert capsys.readouterr().out.count("\n") == 1
    assert torch.get_num_threads() == threads and torch.equal(torch.random.get_rng_state(), state)
    first = digests(folder)
    assert {"data/train.jsonl", "data/test.jsonl", "model/model.safetensors"} <= set(first)
    assert common.tiny_folder() == folder and capsys.readouterr().out == ""  # found, not built
    folder.rename(quick / "elsewhere")
    torch.manual_seed(1)
    torch.set_num_threads(3 - threads)
    try:
        assert digests(common.tiny_folder()) == first
    finally:
        torch.set_num_threads(threads)


def test_model_tokenizer_and_data(quick):
    folder = common.tiny_folder()
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    assert 0.8e6 < sum(p.numel() for p in model.parameters()) < 1.1e6
    assert model.config.vocab_size == len(tokenizer) and 450 < len(tokenizer) <= 512
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|padding|>"]) == [0, 1]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 0, 1)
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (
        0,
        0,
        1,
    )
    for text in ("Zoë 🦊 狐", "a\n\n  b\t", "<x>", ""):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    rng = random.Random(0)
    for _ in range(100):  # prompt and response never merge, so they may be tokenised apart
        prompt = tiny_text("PROMPT", rng)
        response = tiny_story(prompt, rng)
        ids = [tokenizer(text)["input_ids"] for text in (prompt, response, prompt + response)]
        assert ids[0] + ids[1] == ids[2] and 15 <= len(ids[1]) <= 40
    model.train()
    ids = torch.tensor([ids[2]])
    assert torch.equal(model(ids).logits, model(ids).logits)  # no dropout
    splits = [
        [json.loads(line) for line in open(folder / "data" / f"{s}.jsonl")]
        for s in ("train", "test")
    ]
    assert [len(rows) for rows in splits] == [2000, 256]
    seen = {json.dumps(row) for row in splits[0]}
    assert sum(json.dumps(row) in seen for row in splits[1]) == 0  # prompts recur, rows do not


def test_an_edit_changes_the_folder(quick, monkeypatch):
    monkeypatch.setattr(common, "build_tiny", fake_build)
    first = common.tiny_folder()
    monkeypatch.setitem(TINY_GRAMMAR, "THING", "cake|song")
    assert common.tiny_folder() != first


def fake_build(folder):
    folder.mkdir()
    (folder / "half").write_text(str(os.getpid()))
    time.sleep(0.5)
    (folder / "whole").write_text(str(os.getpid()))


def ask():
    print(common.tiny_folder(), flush=True)


def test_a_killed_build_is_not_taken_for_complete_and_three_askers_build_once(
    tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(common, "CACHE", tmp_path)
    monkeypatch.setattr(common, "build_tiny", fake_build)
    monkeypatch.setattr(common, "_is_whole", lambda folder: (folder / "whole").exists())
    fork = multiprocessing.get_context("fork")
    victim, begin = fork.Process(target=ask), time.time()
    victim.start()
    while not list(tmp_path.glob("*.partial/half")):
        assert time.time() < begin + 60
        time.sleep(0.05)
    victim.kill()
    victim.join()
    assert not list(tmp_path.rglob("whole"))
    capfd.readouterr()
    askers = [fork.Process(target=ask) for _ in range(3)]
    for process in askers:
        process.start()
    for process in askers:
        process.join()
    lines = capfd.readouterr().out.splitlines()
    folders = {line for line in lines if "training" not in line}
    assert len(lines) == 4 and len(folders) == 1  # three answers and one announcement
    half, whole = sorted(Path(folders.pop()).iterdir())
    assert half.read_text() == whole.read_text() and half.read_text() in {
        str(p.pid) for p in askers
    }
    assert not list(tmp_path.glob("*.partial"))


def test_another_world_needs_another_version():
    """The cache's key names the version: what the functions make may not change without it."""
    rng = random.Random("test.jsonl")
    text = "".join(json.dumps(common.tiny_row(rng)) + "\n" for _ in range(256))
    assert common.TINY_VERSION == 3
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "632611b2d849b688"


def test_the_untrained_model_is_the_same_in_every_process(tmp_path, monkeypatch):
    """Made once beside the trained one; its loss is that of chance, log of the vocabulary."""
    first = (common.model_folder("tiny-untrained") / "model.safetensors").read_bytes()
    shutil.copytree(common.tiny_folder() / "model", tmp_path / "model")
    monkeypatch.setattr(common, "tiny_folder", lambda: tmp_path)
    assert (common.model_folder("tiny-untrained") / "model.safetensors").read_bytes() == first
    model, tokenizer = common.load_model("tiny-untrained"), common.load_tokenizer("tiny-untrained")
    ids = tokenizer("Once a fox lived in a cave.", return_tensors="pt").input_ids
    loss = model(ids, labels=ids).loss.item()
    assert abs(loss - math.log(len(tokenizer))) < 0.2  # logits of sd .02 sqrt(128) = .23
