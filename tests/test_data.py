"""Data and tokenization: every adapter on hand-made rows, every accepted source, every unusable
row.
"""

import csv
import dataclasses
import gzip
import json

import datasets
import pytest
import released
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import common
from common import (
    Judged,
    every_turn,
    list_rows,
    load_judged,
    load_pairs,
    pair_rows,
    shp_rows,
    tldr_rows,
    tokenize_pair,
    tokenize_pairs,
)

ROWS = [
    {"prompt": f"q{i}", "chosen": f" good {i}", "rejected": f" bad {i}", "extra": i}
    for i in range(4)
]
TALK = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: bye\n\nAssistant:"
CHAT = [{"role": "user", "content": "hi"}]
SAY = lambda text: [{"role": "assistant", "content": text}]  # noqa: E731


def integers(bos=False):
    """Words are the integers 1..99, their own ids; EOS = pad = 0; bos=True: id 100 before plain
    text.
    """
    vocabulary = {"<eos>": 0, **{str(i): i for i in range(1, 100)}, "<bos>": 100}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="99"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 100)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", pad_token="<eos>", bos_token="<bos>"
    )


def characters(spaced=False):
    """One id per character; spaced=True puts a word-boundary sign before any text, as sentencepiece
    does.
    """
    signs = ["</s>", "<s>", *map(chr, range(32, 127)), "\n", "▁"]
    core = Tokenizer(models.WordLevel({sign: i for i, sign in enumerate(signs)}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    if spaced:
        core.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        core.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", bos_token="<s>")
    fast.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}\n"
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    return fast


def numbers(first, last):
    return " ".join(map(str, range(first, last + 1)))


def write(path, text):
    (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8").write(text)
    return str(path)


def lines(rows):
    return "\n".join(json.dumps(row) for row in rows) + "\n"


# adapters


def test_transcripts_are_split_at_the_last_assistant_turn():
    (row,) = pair_rows({"chosen": TALK + " see you", "rejected": TALK + " go", "id": 7})
    assert row == {"prompt": TALK, "chosen": " see you", "rejected": " go", "id": 7}
    (longer,) = pair_rows({"chosen": TALK + " see", "rejected": TALK + " see you"})  # a prefix
    assert (longer["prompt"], longer["chosen"], longer["rejected"]) == (TALK, " see", " see you")
    other = TALK.replace("hello", "what") + " x"
    assert pair_rows({"chosen": TALK + " see you", "rejected": other}) == [
        "prompt is not a common prefix"
    ]
    assert row["prompt"] + row["chosen"] == TALK + " see you"


def test_transcripts_beside_a_prompt_column():
    start = TALK.removeprefix("\n\n")
    row = {
        "chosen": start + " see you",
        "rejected": start + " go",
        "prompt": start.removesuffix("\n\nAssistant:"),
    }
    assert pair_rows(row) == [{"prompt": start, "chosen": " see you", "rejected": " go"}]
    row["prompt"] = start  # the prompt already ends in the cue
    assert pair_rows(row) == [{"prompt": start, "chosen": " see you", "rejected": " go"}]
    plain = {"prompt": "a", "chosen": "ab", "rejected": "ac"}  # no transcript: left alone
    assert pair_rows(plain) == [plain]


def test_chat_messages():
    want = [{"prompt": CHAT, "chosen": SAY("good"), "rejected": SAY("bad")}]
    assert pair_rows({"prompt": CHAT, "chosen": SAY("good"), "rejected": SAY("bad")}) == want
    assert (
        pair_rows({"prompt": CHAT, "chosen": CHAT + SAY("good"), "rejected": CHAT + SAY("bad")})
        == want
    )
    assert (
        pair_rows({"prompt": "hi", "chosen": CHAT + SAY("good"), "rejected": CHAT + SAY("bad")})
        == want
    )
    assert pair_rows({"prompt": "hi", "chosen": SAY("good"), "rejected": SAY("bad")}) == want
    other = {"chosen": CHAT + SAY("good"), "rejected": SAY("bad")}
    assert pair_rows(other) == ["prompt is not a common prefix"]
    assert pair_rows({"messages": CHAT + SAY("good")}) == [
        {"prompt": CHAT, "chosen": SAY("good"), "messages": CHAT + SAY("good")}
    ]


def test_tldr():
    info = {"subreddit": "x", "title": "T", "post": "P"}
    row = {"info": info, "summaries": [{"text": " a"}, {"text": "b "}], "choice": 1}
    (pair,) = tldr_rows(row)
    assert pair["prompt"] == "SUBREDDIT: r/x\nTITLE: T\nPOST: P\nTL;DR:"
    assert (pair["chosen"], pair["rejected"], pair["cue"]) == (" b", " a", "\nTL;DR:")
    assert tldr_rows({**row, "choice": 0})[0]["chosen"] == " a"
    assert tldr_rows({**row, "info": {**info, "post": None}}) == ["null post"]
    (sft,) = tldr_rows({**info, "summary": "I did"})
    assert (sft["prompt"], sft["chosen"]) == (pair["prompt"], " I did") and "rejected" not in sft


def test_shp():
    row = {
        "history": "Q",
        "human_ref_A": "yes",
        "human_ref_B": "no",
        "score_A": 4,
        "score_B": 2,
        "labels": 1,
    }
    (pair,) = shp_rows(row)
    assert (pair["prompt"], pair["chosen"], pair["rejected"]) == (
        "\n\nHuman: Q\n\nAssistant:",
        " yes",
        " no",
    )
    (pair,) = shp_rows({**row, "score_B": 8, "labels": 0})
    assert (pair["chosen"], pair["rejected"]) == (" no", " yes")
    assert shp_rows({**row, "score_A": 3}) == ["score ratio below 2"]


def test_stack_exchange():
    scored = (("one", 1), ("two &lt; 3", 5), ("three", 1))
    question = '<p>Is <a href="x">it</a> <code>a&lt;b</code>?</p>\n'
    found = list_rows(
        {
            "question": question,
            "answers": [{"text": f"<p>{text}</p>", "pm_score": score} for text, score in scored],
        }
    )
    assert [(r["chosen"], r["rejected"]) for r in found if r != "equal scores"] == [
        (" two < 3", " one"),
        (" two < 3", " three"),
    ]
    assert found.count("equal scores") == 1
    assert found[0]["prompt"] == "\n\nHuman: Is it <code>a<b</code>?\n\nAssistant:"


def test_scored_lists_and_votes_are_pairs_to_train_on(tmp_path):
    scored = [
        {"response": text, "overall_score": score} for text, score in zip("pqr", ("9", 10, 9))
    ]
    path = tmp_path / "test.jsonl"
    write(path, lines([{"instruction": "x", "completions": scored}]))
    pairs = [(row["chosen"], row["rejected"]) for row in load_pairs(str(path), "train")]
    assert pairs == [(" q", " p"), (" q", " r")]  # as numbers, 9 < 10; p and r are equal

    answers = {"instruction": "x", "output_1": "p", "output_2": "q"}
    write(path, lines([{**answers, "preference": vote} for vote in (1, "2", 2.0, 0)]))
    found = load_pairs(str(path), "train")
    assert [row["chosen"] for row in found] == [" p", " q", " q"]
    assert found[0]["prompt"] == "\n\nHuman: x\n\nAssistant:"


def test_a_pair_is_a_pair_whatever_else_it_has(tmp_path):
    scored = [{"response": text, "overall_score": 1} for text in "st"]
    others = {"instruction": "y", "completions": scored, "answers": [], "preference": 1}
    row = {"prompt": "x", "chosen": "p", "rejected": "q", **others, "human_ref_A": "u"}
    path = tmp_path / "test.jsonl"
    write(path, lines([row]))
    assert load_pairs(str(path), "train") == [row]
    assert load_judged(str(path), "test") == [Judged("x", ["p", "q"], [1, 0])]


def test_split_all_is_both(tmp_path):
    numbers = lambda found: [int(one.prompt) for one in found]  # noqa: E731
    rows = [{"prompt": str(i), "chosen": "a", "rejected": "b"} for i in range(60)]
    write(tmp_path / "rows.jsonl", lines(rows))
    for split, expected in (("train", range(50)), ("test", range(50, 60)), ("all", range(60))):
        found = load_judged(str(tmp_path / "rows.jsonl"), split)
        assert numbers(found) == list(expected)
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "test.jsonl", lines(rows[:3]))
    write(folder / "train.jsonl", lines(rows[3:]))
    assert sorted(numbers(load_judged(str(folder), "all"))) == list(range(60))


def test_every_assistant_turn_once():
    found = every_turn({"prompt": TALK, "chosen": " see you", "id": 3})
    assert [(row["prompt"], row["chosen"], row["id"]) for row in found] == [
        ("\n\nHuman: hi\n\nAssistant:", " hello", 3),
        (TALK, " see you", 3),
    ]
    talk = CHAT + SAY("hello") + CHAT + SAY("bye")
    assert every_turn({"prompt": talk[:3], "chosen": talk[3:]}) == [
        {"prompt": talk[:1], "chosen": talk[1:2]},
        {"prompt": talk[:3], "chosen": talk[3:]},
    ]
    assert every_turn({"prompt": "q", "chosen": "a"}) == [{"prompt": "q", "chosen": "a"}]


# sources


@pytest.mark.parametrize(
    "name", "a.json b.json c.jsonl d.jsonl.gz e.csv f.csv.gz g.parquet".split()
)
def test_local_files(tmp_path, name):
    path, rows = tmp_path / name, ROWS
    if name.startswith("a"):
        write(path, json.dumps(ROWS, indent=1))
    elif ".json" in name:
        write(
            path, "\ufeff" + lines(ROWS).replace("\n", "\r\n\r\n")
        )  # a byte-order mark, blank lines
    elif ".csv" in name:
        with (gzip.open if name.endswith("gz") else open)(
            path, "wt", encoding="utf-8", newline=""
        ) as file:
            table = csv.DictWriter(file, list(ROWS[0]))
            table.writeheader()
            answers = ("1.50", "NA", 'two\nlines, "x"', "null")
            rows = [{**row, "chosen": answer} for row, answer in zip(ROWS, answers)]
            table.writerows(rows)
    else:
        datasets.Dataset.from_list(ROWS).to_parquet(path)
    assert load_pairs(str(path), "train") == load_pairs(path.as_posix(), "test") == rows


def test_unusual_line_separators_inside_strings(tmp_path):
    row = {**ROWS[0], "chosen": "a\u2028b\x85c\x0bd"}
    path = write(tmp_path / "x.jsonl", json.dumps(row, ensure_ascii=False) + "\n")
    assert load_pairs(path, "train") == [row]


def test_a_single_file_is_divided_and_a_folder_is_not(tmp_path, capsys):
    rows = [{**ROWS[0], "id": i} for i in range(50)]
    path = write(tmp_path / "pairs.jsonl", lines(rows))
    assert load_pairs(path, "train") == rows[:40] and load_pairs(path, "test") == rows[40:]
    assert "the last 10 of the file's 50 rows are its test split" in capsys.readouterr().out
    for n, held in ((400, 20), (200, 10), (199, 10), (40, 8), (20, 4)):
        path = write(tmp_path / "pairs.jsonl", lines([{**ROWS[0], "id": i} for i in range(n)]))
        assert [row["id"] for row in load_pairs(path, "test")] == list(range(n - held, n))
    path = write(tmp_path / "pairs.jsonl", lines(rows[:19]))  # too few to be divided
    assert len(load_pairs(path, "train")) == len(load_pairs(path, "test")) == 19
    (tmp_path / "pairs.jsonl").unlink()
    path = write(tmp_path / "test.jsonl.gz", lines(rows))
    assert load_pairs(path, "test") == rows
    write(tmp_path / "train-00000-of-00002.jsonl", lines(rows[:30]))
    write(tmp_path / "train-00001-of-00002.jsonl", lines(rows[30:]))
    assert load_pairs(str(tmp_path), "train") == rows and load_pairs(str(tmp_path), "test") == rows


def test_unusable_rows_are_counted(tmp_path, capsys):
    bad = [
        {**ROWS[0], **change}
        for change in (
            {"chosen": None},
            {"rejected": ""},
            {"rejected": ROWS[0]["chosen"]},
            {"chosen": " \n"},
            {"chosen": 3},
            {"chosen": ["a"]},
            {"prompt": None},
            {"prompt": "a \ud83d b"},
        )
    ]
    path = write(tmp_path / "x.jsonl", lines(ROWS + bad))
    assert load_pairs(path, "train") == ROWS
    assert capsys.readouterr().out == (
        f"{path} train: kept 4, dropped 8 (a prompt or response is null: 2, the first is row 5; "
        "empty response: 2, the first is row 6; "
        "chosen equals rejected: 1, the first is row 7; "
        "a prompt or response is not text but of type int: 1, the first is row 9; "
        "a prompt or response is a list, but not of chat messages: 1, the first is row 10; "
        "contains a lone surrogate, which is no character: 1, the first is row 12)\n"
    )
    path = write(
        tmp_path / "y.jsonl",
        lines(
            [{"chosen": TALK, "rejected": TALK + " go"}]
            + [{"chosen": TALK + " a", "rejected": TALK + " b"}]
        ),
    )  # an empty last turn
    assert len(load_pairs(path, "train")) == 1 and "empty response: 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("x.jsonl", lines(ROWS) + '{"prompt": \n', ["x.jsonl:5", "not JSON"]),
        ("x.json", '[{"prompt": "a"},\n {"prompt" "b"}]', ["x.json:2", "not JSON"]),
        ("x.jsonl", lines(ROWS) + "3\n", ["x.jsonl:5", "object"]),
        ("x.json", "[1, 2]", ["x.json:1", "object"]),
        ("x.jsonl.gz", None, ["x.jsonl.gz", "cannot be read"]),
        ("x.parquet", "no", ["x.parquet", "cannot be read"]),
        ("x.txt", "no", ["x.txt", ".jsonl"]),
        (
            "x.jsonl",
            lines([{"prompt": "a", "chosen": "b"}]),
            ["row 1", "'rejected'", "prompt, chosen"],
        ),
        (
            "x.jsonl",
            lines([{"asked": "a", "chosen": "b", "rejected": "c"}]),
            ["row 1", "'prompt'", "asked"],
        ),
        (
            "x.jsonl",
            lines([{"prompt": "a", "good": "b", "rejected": "c"}]),
            ["row 1", "'chosen'", "good"],
        ),
        ("x.jsonl", "", ["x.jsonl", "no train rows"]),
        (
            "x.jsonl",
            lines([{"prompt": "a", "chosen": "b", "rejected": "b"}]),
            ["no row is left", "rejected: 1"],
        ),
    ],
)
def test_bad_files_stop_with_one_line(tmp_path, name, text, words):
    path = tmp_path / name
    path.write_bytes(b"\x1f\x8bno") if text is None else (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit) as stop:
        load_pairs(str(path), "train")
    assert "\n" not in str(stop.value) and all(word in str(stop.value) for word in words), (
        stop.value
    )


def test_the_tiny_world_is_read_whole(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train.jsonl", lines(ROWS * 10))
    monkeypatch.setattr(common, "tiny_folder", lambda: tmp_path, raising=False)
    assert load_pairs("tiny", "train") == ROWS * 10


def test_missing_files_and_folders(tmp_path):
    for name, word in ((str(tmp_path / "no.jsonl"), "no.jsonl"), (str(tmp_path), "train.jsonl")):
        with pytest.raises(SystemExit, match=word):
            load_pairs(name, "train")


def test_sft_rows_and_ranked_responses(tmp_path):
    rows = [{"completion": "a"}, {"chosen": "b"}, {"responses": ["c", "d", "e"]}]
    path = write(tmp_path / "x.jsonl", lines([{"prompt": "q", **row} for row in rows]))
    found = load_pairs(path, "train", pairs=False)
    assert [row.get("chosen") for row in found] == ["a", "b", None]
    assert found[2] == {"prompt": "q", "responses": ["c", "d", "e"]}


HUB = {
    ("Anthropic/hh-rlhf", None, "test"): [{"chosen": TALK + " a", "rejected": TALK + " b"}],
    ("Anthropic/hh-rlhf", "harmless-base", "test"): [
        {"chosen": TALK + " c", "rejected": TALK + " d"},
        {"chosen": TALK + " e", "rejected": TALK + " f"},
    ],
    ("openai/summarize_from_feedback", "comparisons", "validation"): [
        {
            "info": {"subreddit": "x", "title": "T", "post": post},
            "choice": 0,
            "summaries": [{"text": "a"}, {"text": "b"}],
        }
        for post in ("P", None)
    ],
    ("UCL-DARK/openai-tldr-filtered", None, "test"): [
        {"subreddit": "x", "title": "T", "post": "P", "summary": "a"}
    ],
    ("stanfordnlp/SHP", None, "test"): [
        {
            "history": "Q",
            "human_ref_A": "a",
            "human_ref_B": "b",
            "labels": 1,
            "score_A": 4,
            "score_B": 2,
        }
    ],
    ("HuggingFaceH4/stack-exchange-preferences", None, "train"): [
        {
            "question": str(i),
            "answers": [{"text": "a", "pm_score": 2}, {"text": "b", "pm_score": 1}],
        }
        for i in range(300)
    ],
    ("HuggingFaceH4/ultrafeedback_binarized", None, "test_prefs"): [
        {
            "prompt": "hi",
            "chosen": CHAT + SAY("a"),
            "rejected": CHAT + SAY("b"),
            "score_chosen": 8.5,
        }
    ],
    ("someone/pairs", None, "test"): ROWS,
}


def test_hub_names(monkeypatch, capsys):
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda path, name=None, data_dir=None, split=None: datasets.Dataset.from_list(
            HUB[path, name or data_dir, split]
        ),
    )
    names = "hh hh-harmless-base tldr tldr-sft shp se ultrafeedback someone/pairs".split()
    kept = {name: load_pairs(name, "test") for name in names}
    assert {name: len(rows) for name, rows in kept.items()} == {
        "hh": 1,
        "hh-harmless-base": 2,
        "tldr": 1,
        "tldr-sft": 1,
        "shp": 1,
        "se": 3,
        "ultrafeedback": 1,
        "someone/pairs": 4,
    }
    assert (
        "tldr test: kept 1, dropped 1 (null post: 1, the first is row 2)\n"
        in capsys.readouterr().out
    )
    assert (
        kept["ultrafeedback"][0]["score_chosen"] == 8.5
        and kept["ultrafeedback"][0]["prompt"] == CHAT
    )
    train = load_pairs("se", "train")
    assert sorted(int(row["question"]) for row in train + kept["se"]) == list(
        range(300)
    )  # each in one split


def test_offline_hub_is_one_line(monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'Anthropic/hh-rlhf' on the Hub\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(SystemExit) as stop:
        load_pairs("hh", "train")
    line = str(stop.value)
    assert "Anthropic/hh-rlhf" in line and "give a file" in line and "\n" not in line


# tokenization


@pytest.mark.parametrize(
    "prompt, chosen, rejected, ids, first, second",
    [
        ("1 2 3", "11 12", "21 22 23", [1, 2, 3], [11, 12, 0], [21, 22, 23, 0]),
        (numbers(1, 7), "11 12 13", "21 22", [4, 5, 6, 7], [11, 12, 13, 0], [21, 22, 0]),
        (numbers(1, 7), numbers(11, 18), "21 22", [4, 5, 6, 7], list(range(11, 17)), [21, 22, 0]),
        ("1 2", numbers(11, 19), "21", [1, 2], list(range(11, 17)), [21, 0]),
    ],
)
def test_truncation_table(prompt, chosen, rejected, ids, first, second):
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    found = tokenize_pair(integers(), row, 10, 4)
    assert (found["prompt_ids"], found["responses"]) == (ids, [first, second])
    assert found["prompt_cut"] == (prompt == numbers(1, 7))
    assert found["responses_cut"] == (len(first) == 6)


def test_the_released_truncation_loses_the_cue():
    """Outside HH the released code keeps a prompt's start: of a long post "TL;DR:" is gone."""
    prompt, cue = list(range(1, 8)) + [50, 51], [50, 51]
    row = {
        "prompt": numbers(1, 7) + " 50 51",
        "cue": " 50 51",
        "chosen": "11 12 13",
        "rejected": "21",
    }
    ours = tokenize_pair(integers(), row, 10, 4)["prompt_ids"]
    theirs = released.cut_prompt(prompt, 4, keep="start")
    print("kept of the prompt: here", ours, "in the released code", theirs)
    assert ours == [1, 2, 50, 51] and theirs == [1, 2, 3, 4]
    assert released.cut_prompt(prompt, 4, keep="end") == [6, 7, 50, 51]  # HH, as here without a cue
    assert cue == ours[2:]


def test_the_cue_survives_truncation():
    row = {
        "prompt": numbers(1, 9) + " 50 51",
        "cue": " 50 51",
        "chosen": "11 12 13",
        "rejected": "21",
    }
    assert tokenize_pair(integers(), row, 10, 4)["prompt_ids"] == [1, 2, 50, 51]
    assert tokenize_pair(integers(True), row, 10, 4)["prompt_ids"] == [100, 1, 50, 51]
    assert tokenize_pair(integers(), {**row, "cue": ""}, 10, 4)["prompt_ids"] == [8, 9, 50, 51]
    assert tokenize_pair(integers(), row, 10, 1)["prompt_ids"] == [50]
    assert tokenize_pair(integers(), row, 99, 4)["prompt_ids"] == [*range(1, 10), 50, 51]


@pytest.mark.parametrize("bos", [False, True])
def test_limits_hold_for_all_lengths(bos):
    """Every length from 1 to twice the limit, for prompt and response: nothing too long, nothing
    emptied.
    """
    sizes = [(p, r) for p in range(1, 21) for r in range(1, 21)]
    rows = [
        {"prompt": numbers(1, p), "chosen": numbers(30, 29 + r), "rejected": "70"} for p, r in sizes
    ]
    found = tokenize_pairs(rows, integers(bos), 10, 4)
    assert len(found) == len(rows)
    for row, (p, r) in zip(found, sizes):
        assert len(row["prompt_ids"]) + max(map(len, row["responses"])) <= 10
        assert row["responses"][1] == [70, 0] and row["responses"][0][0] == 30
        assert (row["responses"][0][-1] == 0) == (row["responses_cut"] == 0)
        assert row["prompt_cut"] or len(row["prompt_ids"]) == p + bos
        if p + bos + r + 1 <= 10:
            assert row["responses"][0] == [*range(30, 30 + r), 0] and not row["prompt_cut"]


def test_one_bos_and_one_eos_for_plain_dialogue_and_chat_data():
    rows = [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": TALK, "chosen": " a", "rejected": " b"},
        {"prompt": CHAT, "chosen": SAY("a"), "rejected": SAY("b")},
        {"prompt": CHAT, "responses": ["a", SAY("b"), "c"]},
    ]
    fast = characters()
    found = tokenize_pairs(rows, fast)
    for row in found:
        for response in row["responses"]:
            ids = row["prompt_ids"] + response
            assert ids[0] == 1 and ids.count(1) == 1 and response.count(0) == 1
    assert fast.decode(found[2]["prompt_ids"]) == "<s>[user]hi</s>\n[assistant]"
    texts = [[fast.decode(ids) for ids in row["responses"]] for row in found]
    assert texts[:2] == [["a</s>", "b</s>"], [" a</s>", " b</s>"]]
    assert texts[2:] == [["a</s>\n", "b</s>\n"], ["a</s>\n", "b</s>\n", "c</s>\n"]]
    assert tokenize_pair(integers(True), rows[0])["prompt_ids"][0] == 100


@pytest.mark.parametrize("spaced", [False, True])
def test_prompt_and_response_join_without_a_seam(spaced):
    fast = characters(spaced)
    for prompt, response in (
        ("how m", "any"),
        ("how", " many"),
        ("a\n\nAssistant:", " I  see\n\nB"),
    ):
        (row,) = tokenize_pairs([{"prompt": prompt, "responses": [response]}], fast)
        assert (
            fast.decode(row["prompt_ids"][1:] + row["responses"][0]) == prompt + response + "</s>"
        )
        assert len(row["responses"][0]) == len(response) + 1  # one id a character: no space added


def test_dropped_rows_are_reported(capsys):
    good = {"prompt": "1", "chosen": "2", "rejected": "3"}
    rows = [
        good,
        {**good, "prompt": "1 <eos>"},
        {**good, "rejected": "3<eos>"},
        {**good, "prompt": "<bos> 1"},
        {**good, "chosen": None},
        {**good, "prompt": ""},
        {"prompt": numbers(1, 9), "responses": ["4", numbers(1, 8)]},
    ]
    found = tokenize_pairs(rows, integers(), 10, 4, what="train")
    assert [row["row"] for row in found] == [0, 6] and found[1]["responses"] == [
        [4, 0],
        [1, 2, 3, 4, 5, 6],
    ]
    assert capsys.readouterr().out.startswith(
        "train: kept 2, dropped 5 (contains the special token <eos>: 2, the first is row 2; "
        "contains the special token <bos>: 1, the first is row 4; "
        "empty response: 1, the first is row 5; empty prompt: 1, the first is row 6); "
        "prompts cut 1, responses cut 1\n"
    )
    assert tokenize_pair(integers(), rows[1]) is None
    assert tokenize_pairs(rows[5:6], integers(True))[0]["prompt_ids"] == [
        100
    ]  # BOS is context enough
    with pytest.raises(SystemExit, match="no row is left"):
        tokenize_pairs(rows[1:3], integers())


def test_bad_limits_and_missing_template():
    row = {"prompt": "1", "chosen": "2"}
    for limits in ((10, 10), (10, 0)):
        with pytest.raises(SystemExit, match="max_prompt_length"):
            tokenize_pairs([row], integers(), *limits)
    with pytest.raises(SystemExit, match="chat template"):
        tokenize_pairs([{"prompt": CHAT, "chosen": SAY("a")}], integers())


def test_blocks_keep_the_order():
    rows = [
        {"prompt": str(1 + i % 98), "responses": [str(1 + (i * j) % 98) for j in (3, 5, 7)]}
        for i in range(5000)
    ]
    rows[100]["prompt"] = "<eos>"
    found = tokenize_pairs(rows, integers())
    assert [row["row"] for row in found] == [i for i in range(5000) if i != 100]
    for row in found:
        source = rows[row["row"]]
        assert row["prompt_ids"] == [int(source["prompt"])]
        assert row["responses"] == [[int(text), 0] for text in source["responses"]]


# what will be trained


@dataclasses.dataclass
class Few:
    """The options that plan_steps reads."""

    batch_size: int | None = None
    epochs: int = 1
    max_steps: int = 0
    warmup_steps: int | None = None


@pytest.mark.parametrize(
    "n, options, batch_size, steps, warm_up",
    [
        (10_000, {}, 32, 312, 10),  # as always
        (640, {}, 32, 20, 2),  # 20 steps of 32, a tenth of them warm-up
        (50, {}, 2, 25, 2),  # 50 / 20
        (50, {"epochs": 4}, 5, 40, 4),  # a tenth of the rows
        (50, {"max_steps": 7}, 5, 7, 0),
        (3, {}, 1, 3, 0),
        (50, {"batch_size": 32}, 32, 1, 0),  # what is given stays, with a remark
        (50, {"warmup_steps": 10}, 2, 25, 10),
    ],
)
def test_batch_size_and_warm_up_fit_the_data(n, options, batch_size, steps, warm_up, capsys):
    args, found = common.plan_steps(Few(**options), n, held_out=2)
    assert (args.batch_size, found, args.warmup_steps) == (batch_size, steps, warm_up)
    (line,) = capsys.readouterr().out.splitlines()
    unused = max(0, n - steps * batch_size)
    start = f"to train: {n} rows in {steps} steps of {batch_size}, {warm_up} of them warm-up"
    assert line.startswith(f"{start}; {unused} rows unused; held out: 2")
    assert ("fewer than 20 steps teach little" in line) == (steps < 20)
    assert ("--warmup-steps 2 would be a tenth" in line) == ("warmup_steps" in options)


def test_a_batch_that_was_asked_for_must_fit():
    with pytest.raises(SystemExit, match="50 rows are fewer than one batch of 64: --batch-size"):
        common.plan_steps(Few(batch_size=64), 50, held_out=2)


def test_a_test_file_of_its_own(tmp_path):
    rows = [{"prompt": str(i), "chosen": "a", "rejected": "b"} for i in range(60)]
    mine, held = tmp_path / "mine.jsonl", tmp_path / "held.jsonl"
    write(mine, lines(rows))
    write(held, lines(rows[:40]))
    sizes = lambda test: [  # noqa: E731
        len(common.load_split(str(mine), test, split)) for split in ("train", "test")
    ]
    assert sizes("") == [50, 10]
    assert sizes(str(held)) == [60, 40]


def test_a_column_with_a_newline_in_its_name_is_one_line(tmp_path):
    (tmp_path / "test.csv").write_text('rompt,"chosen\nx",rejected\n1,2,3\n')
    with pytest.raises(
        SystemExit, match=r"^.*row 1 has no 'chosen', only rompt, chosen x, rejected$"
    ):
        load_pairs(str(tmp_path / "test.csv"), "test")
