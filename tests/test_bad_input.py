"""Nonsense for every command: one line with the place and the remedy, and nothing left behind.

The table is made from the commands' own options, so that a new option is in it: every number out of
its range, NaN, infinity, an empty list.  Then files that are not what they should be, and random
ones (hypothesis): rows in are rows kept and rows counted, never a traceback.
"""

import dataclasses
import importlib
import json
import math
import random
import string
import sys

import pytest
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import common

# command: module, name of its arguments' class, what a run needs beside its defaults
COMMANDS = {
    "sft": ("sft", "Args", {}),
    "dpo": ("dpo", "Args", {}),
    "cal_dpo": ("cal_dpo", "Args", {}),
    "dpo_gamma": ("dpo_gamma", "Args", {}),
    "ranking_accuracy": ("ranking_accuracy", "Args", {}),
    "generate": ("generate", "Args", {}),
    "twisted_smc": ("twisted_smc", "Args", {}),
    "imh_adaptors": ("imh_adaptors", "Args", {}),
    "dpl train": ("dpl", "Args", {}),
    "dpl synthetic": ("dpl", "SyntheticArgs", {}),
}


def module_of(command):
    """The method's module."""
    if str(ROOT / "methods") not in sys.path:
        sys.path.insert(0, str(ROOT / "methods"))
    return importlib.import_module(COMMANDS[command][0])


def ranges_of(module):
    """The least and largest value of every option of a method."""
    return {**common.RANGES, **module.RANGES}


def is_number(value):
    """A number, or a tuple of numbers."""
    if isinstance(value, tuple):
        return bool(value) and all(map(is_number, value))
    return isinstance(value, int | float) and not isinstance(value, bool)


def numeric_options(command):
    """Names and defaults of the options that are numbers, or tuples of numbers."""
    module = module_of(command)
    args = getattr(module, COMMANDS[command][1])()
    found = {}
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if is_number(value):
            found[field.name] = value
    return found


def bad_values(low, high, value):
    """What must be refused in the place of `value`."""
    below = low - 1
    above = high * 2 + 1
    found = [math.nan, math.inf, -math.inf, below, above]
    if isinstance(value, tuple):
        return [(), *[(one,) for one in found], (*value, math.nan)]
    return found


def bad_cases():
    """(command, option, value) of the whole table."""
    cases = []
    for command in COMMANDS:
        ranges = ranges_of(module_of(command))
        for name, value in numeric_options(command).items():
            if name in ranges:
                for bad in bad_values(*ranges[name], value):
                    cases.append((command, name, bad))
    return cases


CASES = bad_cases()


def one_line(error):
    """The message of a refusal, which must be one short line."""
    assert isinstance(error.code, str), error.code
    assert "\n" not in error.code and len(error.code) <= 200, error.code
    return error.code


def test_the_table_is_large():
    print(f"{len(CASES)} bad values of {len(COMMANDS)} commands")
    assert len(CASES) >= 300


@pytest.mark.parametrize("command", COMMANDS)
def test_every_number_has_a_range(command):
    missing = numeric_options(command).keys() - ranges_of(module_of(command)).keys()
    assert not missing


@pytest.mark.parametrize("command", COMMANDS)
def test_numbers_out_of_range(command, tmp_path, monkeypatch):
    module = module_of(command)
    _, kind, needs = COMMANDS[command]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "load_model", None)  # refused before anything is loaded
    tried = 0
    for owner, name, bad in CASES:
        if owner != command:
            continue
        args = getattr(module, kind)(**{**needs, name: bad})
        if hasattr(args, "out"):
            args = dataclasses.replace(args, out=str(tmp_path / "out"))
        with pytest.raises(SystemExit) as refused:
            module.main(args)
        line = one_line(refused.value)
        assert "--" + name.replace("_", "-") in line, (name, bad, line)
        assert not list(tmp_path.iterdir()), (name, bad)
        tried += 1
    assert tried >= 20


# ---- files of rows


def rows_in(path, split="test"):
    """load_pairs, with the numbers of rows that its line says: rows, kept, dropped; or its line."""
    said = []
    monkey = pytest.MonkeyPatch()
    monkey.setattr(common, "say", said.append)
    try:
        rows = common.load_pairs(str(path), split, pairs=False)
    except SystemExit as error:
        assert isinstance(error.code, str) and "\n" not in error.code
        return error.code
    finally:
        monkey.undo()
    numbers = said[-1].split("kept ")[1].split(" (")[0].split(";")[0].split(", dropped ")
    return rows, int(numbers[0]), int(numbers[1])


texts = st.text(st.characters(codec=None), max_size=12)
leaves = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts)
messages = st.lists(
    st.fixed_dictionaries({"role": texts, "content": st.one_of(texts, st.none(), leaves)}),
    max_size=3,
)
anything = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3), max_leaves=4)
cells = st.one_of(texts, messages, anything)
pair_rows = st.fixed_dictionaries(
    {"prompt": cells, "chosen": cells, "rejected": cells},
    optional={"responses": cells, "cue": leaves, "tools": cells, "extra": leaves},
)
shp_rows = st.fixed_dictionaries(
    {
        "history": cells,
        "human_ref_A": cells,
        "human_ref_B": cells,
        "score_A": leaves,
        "score_B": leaves,
    }
)
tldr_rows = st.fixed_dictionaries(
    {
        "info": st.one_of(
            leaves, st.fixed_dictionaries({"subreddit": cells, "title": cells, "post": cells})
        ),
        "summaries": st.one_of(leaves, st.lists(st.fixed_dictionaries({"text": cells}))),
        "choice": leaves,
    }
)
good_row = {"prompt": "q", "chosen": "a", "rejected": "b"}


def examples(request, n):
    """The number of random examples: n, or 25 times as many with --deep."""
    return n * (25 if request.config.getoption("--deep") else 1)


@pytest.mark.parametrize("kind", ["pairs", "shp", "tldr"])
def test_random_rows(kind, tmp_path, request):
    """Rows in are rows kept and rows counted; what is kept can be tokenised."""
    layouts = {"pairs": pair_rows, "shp": shp_rows, "tldr": tldr_rows}
    path = tmp_path / "test.jsonl"
    fast = words_tokenizer()

    @settings(
        max_examples=examples(request, 400),
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(layouts[kind], min_size=1, max_size=5))
    def check(rows):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        found = rows_in(path)
        if isinstance(found, str):
            assert "no row is left" in found or "has no" in found
            return
        kept, said_kept, said_dropped = found
        assert len(kept) == said_kept and said_kept + said_dropped == len(rows)
        encoded = common.encode_rows(kept, fast)
        assert len(encoded) == len(kept)
        for one in encoded:
            assert isinstance(one, str | common.Encoded)

    check()


def words_tokenizer():
    """A tokenizer of single characters with a chat template."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    signs = ["</s>", "?", *string.ascii_letters, *string.digits, " ", "\n"]
    core = Tokenizer(models.WordLevel({sign: i for i, sign in enumerate(signs)}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    found = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    found.chat_template = (
        "{% for m in messages %}{{ m['role'] }}\n{{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant\n{% endif %}"
    )
    return found


def test_random_bytes(tmp_path, request):
    """Flipped bytes, cut lines, columns of other types: rows or one line, whatever the format."""
    rows = [{"prompt": f"q {i}", "chosen": f"a {i}", "rejected": "b", "n": i} for i in range(8)]
    whole = "".join(json.dumps(row) + "\n" for row in rows).encode()
    table = "prompt,chosen,rejected\n" + "".join(f'q{i},"a, {i}",b\n' for i in range(8))
    rng = random.Random(0)
    outcomes = {"rows": 0, "line": 0}
    for number in range(examples(request, 300)):
        name, data = [("test.jsonl", whole), ("test.csv", table.encode())][number % 2]
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        if rng.random() < 0.3:
            del damaged[rng.randrange(len(damaged)) :]
        (tmp_path / name).write_bytes(damaged)
        found = rows_in(tmp_path / name)
        if isinstance(found, str):
            assert len(found) <= 300
            outcomes["line"] += 1
        else:
            assert len(found[0]) == found[1]
            outcomes["rows"] += 1
    print(outcomes)
    assert min(outcomes.values()) > 10


def test_random_packs(request):
    """Any lengths, any budget, any number of processes: every token once, in a row of its own."""

    @settings(max_examples=examples(request, 200), deadline=None, derandomize=True)
    @given(
        st.lists(st.lists(st.integers(1, 40), min_size=2, max_size=4), min_size=1, max_size=12),
        st.integers(1, 100),
        st.integers(1, 3),
    )
    def check(lengths, budget, world):
        rows = []
        for prompt, *responses in lengths:
            rows.append({"prompt_ids": [1] * prompt, "responses": [[2] * n for n in responses]})
        if len(rows) < world:
            with pytest.raises(SystemExit):
                common.pack_pairs(rows, budget, 0, world)
            return
        parts = [common.pack_pairs(rows, budget, rank, world) for rank in range(world)]
        assert len({len(part) for part in parts}) == 1
        seen = sorted(i for part in parts for batch in part for i in batch["index"])
        assert seen == list(range(len(rows)))
        total = sum(batch["input_ids"].numel() for part in parts for batch in part)
        assert total == sum(sum(row) for row in lengths)

    check()


# ---- run folders


def test_a_folder_in_use_is_left_alone(tmp_path):
    common.setup(0)
    args = module_of("dpo").Args(out=str(tmp_path / "run"))
    common.start_run(args, "dpo")
    code = (
        "import sys; sys.path[:0] = ['.', 'methods']\n"
        "import dpo, common; common.setup(0)\n"
        f"common.start_run(dpo.Args(out={str(tmp_path / 'run')!r}, overwrite=True), 'dpo')"
    )
    from conftest import run

    before = (tmp_path / "run" / "config.json").read_bytes()
    done = run("-c", code, check=False)
    assert done.returncode == 1 and "in use by another run" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "run" / "config.json").read_bytes() == before


def test_a_refused_run_leaves_the_folder_free(tmp_path):
    common.setup(0)
    dpo = module_of("dpo")
    common.start_run(dpo.Args(out=str(tmp_path / "run")), "dpo")  # and then it is refused
    common.start_run(dpo.Args(out=str(tmp_path / "run"), beta=0.2), "dpo")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["beta"] == 0.2
    with pytest.raises(SystemExit) as refused:
        cal_dpo = module_of("cal_dpo")
        common.start_run(cal_dpo.Args(out=str(tmp_path / "run"), resume=True), "cal_dpo")
    assert "holds a run of dpo, not of cal_dpo" in one_line(refused.value)


def test_a_damaged_line_of_metrics_is_named(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 0}\n{"step" 1}\n{"step": 2}\n')
    with pytest.raises(SystemExit) as refused:
        common._forget_lines_from(3, metrics)
    assert "metrics.jsonl:2: damaged" in one_line(refused.value)


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    """Every write of a file ends in `write` or `append_line`: both leave what was there."""
    path = tmp_path / "x.json"
    common.write(path, {"a": 1})
    common.append_line(tmp_path / "lines", "one")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(common.os, "fsync", full)
    with pytest.raises(SystemExit) as refused:
        common.write(path, {"a": 2})
    assert "No space left" in one_line(refused.value)
    assert json.loads(path.read_text()) == {"a": 1}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["lines", "x.json"]


def test_a_tiny_world_with_half_its_rows_is_not_whole(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_text("")
    for name, n in common.TINY_ROWS.items():
        (tmp_path / "data" / name).write_text("{}\n" * n)
    assert common._is_whole(tmp_path)
    (tmp_path / "data" / "train.jsonl").write_text("{}\n" * 1000)
    assert not common._is_whole(tmp_path)


def test_a_damaged_reference_cache_is_scored_again(tmp_path):
    values = b"0123" * 4
    path = tmp_path / "x.logps"
    checksum = common.hashlib.sha256(values).digest()
    path.write_bytes(checksum + values)
    assert common._read_cached(path, (2, 2)).shape == (2, 2)
    assert common._read_cached(path, (3, 2)) is None
    path.write_bytes(checksum + b"9" + values[1:])
    assert common._read_cached(path, (2, 2)) is None
    assert common._read_cached(tmp_path / "none", (2, 2)) is None
