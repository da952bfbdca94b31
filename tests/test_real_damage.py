"""Real preference pairs, damaged at random, through every command that reads data.

REAL_DATA and REAL_MODELS name the folders, ../shared/data and ../shared/models by default; where
they are not there, and without --deep, nothing is run.  Bytes are flipped, lines cut, columns
retyped, dropped and swapped.  A command goes on with every row kept or counted, or ends with one
line; no text of the data is printed.
"""

import copy
import gzip
import importlib
import json
import os
import random
import re
import shutil
from pathlib import Path

import pytest
from conftest import ROOT
from launcher import Launcher

import common

DATA = Path(os.environ.get("REAL_DATA", ROOT.parent / "shared" / "data"))
DATA = DATA / "relabeled_hh_rlhf" / "both" / "test.jsonl.gz"
MODEL = Path(os.environ.get("REAL_MODELS", ROOT.parent / "shared" / "models")) / "stories260K"
COPIES = 200
WHOLE_COPIES = 5  # of all rows; the others have ROWS of them
ROWS = 200
pytestmark = pytest.mark.skipif(
    not (DATA.is_file() and MODEL.is_dir()), reason="no real pairs, or no real model here"
)

# command: its options, and the function before which it has read all its data
READERS = {
    "sft": ({}, "start_run"),
    "dpo": ({}, "start_run"),
    "cal_dpo": ({}, "start_run"),
    "dpo_gamma": ({"gamma": (1.0,)}, "start_run"),
    "dpl": ({"max_length": 256}, "new_reward_model"),
    "dpl evaluate": ({"checkpoints": ("x",), "max_length": 256}, "load_reward_model"),
    "generate": ({"judge": "none", "max_prompt_length": 256}, "load_model"),
    "ranking_accuracy": ({}, "start_run"),
    "imh_adaptors": ({"reward": "implicit"}, "start_run"),
}


class Read(Exception):
    """All data have been read."""


def stop(*arguments, **keywords):
    """In the place of what follows the reading."""
    raise Read


# ---- damage


def flip_bytes(lines, rng):
    """Up to twenty bytes of any value."""
    data = bytearray("".join(lines).encode())
    for _ in range(rng.randint(1, 20)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


def cut_lines(lines, rng):
    """A line loses its end, or the file does."""
    at = rng.randrange(len(lines))
    short = lines[at][: rng.randrange(len(lines[at]))]
    if rng.random() < 0.5:
        return "".join([*lines[:at], short]).encode()
    return "".join([*lines[:at], short + "\n", *lines[at + 1 :]]).encode()


def retype(value, rng):
    """Another value in the place of a cell."""
    half = str(value)[: len(str(value)) // 2]
    others = [None, 7, 0.5, True, [], {}, "", [value], {"x": value}, half, "\ud83d", "</s>"]
    if rng.random() < 0.002:  # a chat ends every run on a model without a chat template
        return [{"role": "user", "content": value}]
    return rng.choice(others)


def change_columns(lines, rng):
    """Cells of some rows have another type; now and then a column is away, or two are swapped."""
    rows = [json.loads(line) for line in lines]
    for row in rng.sample(rows, rng.randint(1, len(rows) // 2)):
        name = rng.choice(list(row))
        row[name] = retype(row[name], rng)
    if rng.random() < 0.15:
        row = rng.choice(rows)
        del row[rng.choice(list(row))]
    if rng.random() < 0.2:
        row = rng.choice(rows)
        row["chosen"], row["rejected"] = row.get("rejected"), row.get("chosen")
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def damaged(lines, rng):
    """One damage of a random kind -> bytes"""
    draw = rng.random()
    if draw < 0.2:
        return flip_bytes(lines, rng)
    if draw < 0.4:
        return cut_lines(lines, rng)
    return change_columns(lines, rng)


# ---- commands


def numbers_of(line):
    """Rows kept, dropped and repeated, as a line of `report` has them."""
    kept, dropped = re.search(r": kept (\d+), dropped (\d+)", line).groups()
    repeated = re.search(r"; repeated (\d+)", line)
    return int(kept), int(dropped), int(repeated[1]) if repeated else 0


def read_with(command, path, folder, monkeypatch):
    """The command's reading part -> its refusal, or the lines that it has said."""
    name, _, function = command.partition(" ")
    module = importlib.import_module(name)
    options, next_step = READERS[command]
    kind = module.ScoreArgs if function else module.Args
    places = {"data": str(path), "out": str(folder / "out")}
    if name == "ranking_accuracy":
        places.update(data=(str(path),), model=(str(MODEL),))
    elif not function:
        places["model"] = str(MODEL)
    if name == "imh_adaptors":
        places["ref_model"] = str(MODEL)
    said = []
    with monkeypatch.context() as patch:
        patch.setattr(common, "say", said.append)
        patch.setattr(module, next_step, stop)
        if function:
            patch.setattr(module, "load_head", lambda checkpoint: None)
            patch.setattr(module, "load_tokenizer", lambda name: common.load_tokenizer(str(MODEL)))
        try:
            if name == "imh_adaptors":
                module.main(kind(**places, **options), "generate")
            else:
                module.main(kind(**places, **options))
        except Read:
            return "", said
        except SystemExit as error:
            assert isinstance(error.code, str), (command, error.code)
            return error.code, said
    raise AssertionError(f"{command} does not come to {next_step}")


def check_counts(said, rows):
    """Every row of the file is kept or counted, at each stage of the reading."""
    kept_before = rows
    for line in said:
        if ": kept " not in line:
            continue
        kept, dropped, repeated = numbers_of(line)
        if re.search(r" (test|train): kept", line) or ": items: kept" in line:
            # One split after the other; ranking's items are made of what its split has kept.
            kept_before = rows if "items" not in line else kept_before
        assert kept + dropped + repeated == kept_before, (kept, dropped, repeated, kept_before)
        kept_before = kept


@pytest.fixture
def fast_tokens(monkeypatch):
    """Token ids by the length of a text: 8 MB of text are tokenised in no time.

    Short texts have one for each character, so that "1" has the same ids after a newline.
    """

    def ids_of(tokenizer, texts):
        found = []
        for text in texts:
            if len(text) < 10:
                found.append([3 + ord(character) % 200 for character in text])
            else:
                found.append([3 + len(text) % 200] * (len(text) // 5))
        return found

    monkeypatch.setattr(common, "_ids_of", ids_of)
    monkeypatch.setattr(common, "show_example", lambda *arguments: None)


def test_damaged_real_pairs(tmp_path, monkeypatch, request, record_property, fast_tokens):
    if not request.config.getoption("--deep"):
        pytest.skip("takes minutes: --deep")
    common.setup(0)
    with gzip.open(DATA, "rt") as file:
        lines = file.readlines()
    rng = random.Random(0)
    outcomes = {command: {"read": 0, "refused": 0} for command in READERS}
    read_once = common.read_rows
    rows_of = {}

    def read_rows(path):
        """The file is the same for every command: it is parsed once."""
        if not rows_of:
            try:
                rows_of[0] = read_once(path)
            except SystemExit as error:
                rows_of[0] = error
        if isinstance(rows_of[0], SystemExit):
            raise SystemExit(rows_of[0].code)
        return copy.copy(rows_of[0])

    path = tmp_path / "test.jsonl"
    for number in range(COPIES):
        some = lines
        if number >= WHOLE_COPIES:
            some = rng.sample(lines, ROWS)
        path.write_bytes(damaged(some, rng))
        rows_of.clear()
        for command in READERS:
            module = importlib.import_module(command.partition(" ")[0])
            with monkeypatch.context() as patch:
                patch.setattr(common, "read_rows", read_rows)
                if hasattr(module, "read_rows"):
                    patch.setattr(module, "read_rows", read_rows)
                refused, said = read_with(command, path, tmp_path, monkeypatch)
            assert not (tmp_path / "out").exists()
            if refused:
                assert "\n" not in refused and len(refused) <= 200, (command, refused[:400])
                outcomes[command]["refused"] += 1
            else:
                check_counts(said, len(rows_of[0]))
                outcomes[command]["read"] += 1
    for command, found in outcomes.items():
        print(f"{command}: {found}")
        assert sum(found.values()) == COPIES and min(found.values()) > 10
    record_property("damaged real inputs", COPIES)


# ---- whole runs


def test_whole_runs_on_damaged_real_pairs(tmp_path, request, record_property):
    """A few copies, from reading to the last figure."""
    if not request.config.getoption("--deep"):
        pytest.skip("takes minutes: --deep")
    with gzip.open(DATA, "rt") as file:
        lines = [line for line in file if len(line) < 1200]
    few = dict(model=str(MODEL), max_length=256, batch_size=4, max_steps=2)
    training = dict(few, max_prompt_length=128, eval_every=8)
    imh = dict(model=str(MODEL), ref_model=str(MODEL), reward="implicit", temperatures=(1.0,))
    imh.update(sampling_types=("top_k=9",), prompts=2, samples=2, max_length=200)
    imh.update(max_prompt_length=190)
    runs = {
        "sft": dict(training, eval_examples=4),
        "dpo": dict(training, eval_pairs=4),
        "cal_dpo": dict(training, eval_pairs=4),
        "dpo_gamma": dict(training, eval_pairs=4, gamma=(1.0,)),
        "dpl": dict(few, eval_pairs=4),
        "generate": dict(model=str(MODEL), judge="none", max_new_tokens=4, prompts=4),
        "ranking_accuracy": dict(model=(str(MODEL),), sample=8),
        "imh_adaptors generate": imh,
    }
    rng = random.Random(1)
    launcher = Launcher()
    outcomes = {0: 0, 1: 0}
    for number in range(3):
        path = tmp_path / str(number) / "test.jsonl"
        path.parent.mkdir()
        damage = (change_columns, change_columns, flip_bytes)[number]
        path.write_bytes(damage(rng.sample(lines, 60), rng))
        for command, options in runs.items():
            data = (str(path),) if command == "ranking_accuracy" else str(path)
            out = tmp_path / "out"
            cache = str(tmp_path / "cache")
            options = {**options, "data": data, "out": str(out)}
            ended = launcher.run(command, options, cache=cache)
            assert ended.code in (0, 1), (command, ended.err[-2000:])
            if ended.code:
                ended.line()
            outcomes[ended.code] += 1
            shutil.rmtree(out, ignore_errors=True)
    launcher.close()
    print(outcomes)
    assert outcomes[0] > 8
