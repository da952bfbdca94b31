"""Nonsense for every command: one line with the place and the remedy, and nothing left behind.

The table is made from the commands' own options, so that a new option is in it: every number out of
its range, NaN, infinity, an empty list.  Then files that are not what they should be, and random
ones (hypothesis): rows in are rows kept and rows counted, never a traceback.
"""

import contextlib
import dataclasses
import importlib
import io
import json
import math
import random
import re
import string
import sys

import pytest
import torch
import tyro
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
    "dpl score": ("dpl", "ScoreArgs", {}),
    "dpl summarize": ("dpl", "SummarizeArgs", {}),
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
    assert len(CASES) >= 300
    assert {command for command, _, _ in CASES} == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_number_has_a_range(command):
    missing = numeric_options(command).keys() - ranges_of(module_of(command)).keys()
    assert not missing


@pytest.mark.parametrize("command", COMMANDS)
def test_numbers_out_of_range(command, tmp_path, monkeypatch, record_property):
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
    assert tried == sum(owner == command for owner, _, _ in CASES) > 0
    record_property("table cases", tried)


# ---- files of rows


def rows_in(path, split="test"):
    """load_pairs, with the numbers of rows that its line says: rows, kept, dropped; or its line."""
    said = []
    monkey = pytest.MonkeyPatch()
    monkey.setattr(common, "say", said.append)
    try:
        rows = common.load_pairs(str(path), split, pairs=False)
    except SystemExit as error:
        return one_line(error)
    finally:
        monkey.undo()
    numbers = said[-1].split("kept ")[1].split(" (")[0].split(";")[0].split(", dropped ")
    return rows, int(numbers[0]), int(numbers[1])


def test_a_list_of_responses_is_no_pair(tmp_path):
    """A pair that has lost its chosen response is not trained on the list that it also has."""
    path = tmp_path / "test.jsonl"
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "responses": ["b", "a"]}
    path.write_text(json.dumps(row) + "\n")
    (found,) = common.load_pairs(str(path), "test")
    assert (found["chosen"], found["rejected"]) == ("a", "b")
    del row["chosen"]
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(SystemExit) as refused:
        common.load_pairs(str(path), "test")
    assert "row 1 has no 'chosen'" in one_line(refused.value)
    (found,) = common.load_pairs(str(path), "test", pairs=False)
    assert found["responses"] == ["b", "a"]


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
    """The number of random examples: n, or 25 times as many with --deep; it is recorded."""
    if request.config.getoption("--deep"):
        n = 25 * n
    request.node.user_properties.append(("random examples", n))
    return n


def random_settings(n):
    """Settings of hypothesis for n examples, the same in every run."""
    checks = list(HealthCheck)
    return settings(max_examples=n, deadline=None, derandomize=True, suppress_health_check=checks)


@pytest.mark.parametrize("kind", ["pairs", "shp", "tldr"])
def test_random_rows(kind, tmp_path, request):
    """Rows in are rows kept and rows counted; what is kept can be tokenised."""
    layouts = {"pairs": pair_rows, "shp": shp_rows, "tldr": tldr_rows}
    path = tmp_path / "test.jsonl"
    fast = words_tokenizer()

    @random_settings(examples(request, 400))
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
            assert len(found) <= 200
            outcomes["line"] += 1
        else:
            assert len(found[0]) == found[1]
            outcomes["rows"] += 1
    print(outcomes)
    assert min(outcomes.values()) > 10


def test_random_packs(request):
    """Any lengths, any budget, any number of processes: every token once, in a row of its own."""

    @random_settings(examples(request, 200))
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


def numbers_of(line):
    """How many rows a line of `report` has kept, dropped and, if it says so, seen before."""
    kept, dropped = re.search(r": kept (\d+), dropped (\d+)", line).groups()
    repeated = re.search(r"; repeated (\d+)", line)
    return int(kept), int(dropped), int(repeated[1]) if repeated else 0


def test_random_lengths(request):
    """Rows of any texts and any limits: kept and counted, and no row is longer than it may be."""
    fast = words_tokenizer()
    short_texts = st.text(st.sampled_from("ab \n"), max_size=30)
    row = st.fixed_dictionaries({"prompt": short_texts, "chosen": short_texts})

    @random_settings(examples(request, 100))
    @given(st.lists(row, min_size=1, max_size=6), st.integers(-1, 40), st.integers(-1, 40))
    def check(rows, max_length, max_prompt_length):
        said = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(common, "say", said.append)
            try:
                kept = common.tokenize_pairs(rows, fast, max_length, max_prompt_length)
            except SystemExit as error:
                assert "no row is left" in one_line(error) or "max_prompt_length" in error.code
                return
        said_kept, dropped, _ = numbers_of(said[0])
        assert len(kept) == said_kept and said_kept + dropped == len(rows)
        for one in kept:
            assert len(one["prompt_ids"]) + max(map(len, one["responses"])) <= max_length

    check()


# ---- adaptors

pieces = st.one_of(
    st.sampled_from(["top_k50", "top_p090", "greedy", "ancestral", "temperature=2", "top_p=.5"]),
    st.builds(
        "{}={}".format,
        st.sampled_from(["top_k", "top_p", "min_p", "typical_p", "eta_cutoff", "temperature", ""]),
        st.one_of(st.floats(), st.integers(-9, 10**6), st.text(max_size=4)),
    ),
    st.text(st.characters(codec=None), max_size=200),
)


def test_random_sampling_types(request):
    """Any text is an adaptor, or is refused in a line; what is an adaptor has numbers in range."""
    imh = module_of("imh_adaptors")

    @random_settings(examples(request, 200))
    @given(st.lists(pieces, min_size=1, max_size=3))
    def check(parts):
        try:
            adaptor = imh.parse_adaptor(",".join(parts), 50)
        except SystemExit as error:
            assert "adaptor" in one_line(error)
            return
        assert set(adaptor) <= {*imh.ORDER, "temperature"}
        assert all(value > 0 for value in adaptor.values())
        assert imh.parse_adaptor(adaptor, 50) == adaptor

    check()


LOGITS = st.one_of(
    st.floats(-1e4, 1e4, width=32),
    st.sampled_from([-math.inf, math.inf, math.nan, 0.0, -0.0, 1.0, 88.0, -1e30, 3e38]),
)


def test_random_scores(request):
    """Scores with -inf, NaN, ties, flat or peaked: a law over tokens that have mass, or a line."""
    imh = module_of("imh_adaptors")
    adaptors = st.lists(
        st.sampled_from(
            ["top_k=3", "top_p=0.9", "typical_p=0.5", "eta_cutoff=0.01", "min_p=0.2"]
            + ["temperature=0.01", "temperature=100", "top_k=0", "top_p=1e-9"]
        ),
        min_size=1,
        max_size=3,
    )
    rows = st.one_of(
        st.lists(LOGITS, min_size=6, max_size=6),
        st.sampled_from([0.0, -5.0]).map(lambda value: [value] * 6),  # flat
        st.integers(0, 5).map(lambda i: [1e4 * (j == i) for j in range(6)]),  # peaked
    )

    @random_settings(examples(request, 200))
    @given(rows, adaptors, st.floats(0, 1, exclude_max=True))
    def check(scores, parts, u):
        logits = torch.tensor([scores])
        try:
            log_q, log_kept = imh.adapt(logits, ",".join(parts))
        except SystemExit as error:
            # Refused are scores that are no law: NaN, +inf, or nothing but -inf.
            assert "keeps nothing" in one_line(error)
            assert not logits.softmax(-1).isfinite().all() or "temperature" in ",".join(parts)
            return
        assert log_q.logsumexp(-1).abs() < 1e-5 and log_kept.isfinite().all()
        assert (log_q[logits == -math.inf] == -math.inf).all()
        token, log_p = common.sample_tokens(log_q, torch.tensor([u]))
        assert log_p.isfinite() and log_q[0, token] > -math.inf

    check()


def test_random_chains(request):
    """Log-weights with -inf and ties, flat or peaked: every state is a draw that was proposed."""
    imh = module_of("imh_adaptors")
    weights = st.one_of(st.floats(-1e6, 1e6), st.sampled_from([-math.inf, 0.0, 0.0, 1e300]))

    @random_settings(examples(request, 100))
    @given(st.lists(weights, min_size=2, max_size=12), st.integers(0, 99))
    def check(log_w, seed):
        generator = torch.Generator().manual_seed(seed)
        log_w = torch.tensor(log_w, dtype=torch.float64)
        log_u = torch.rand(len(log_w), dtype=torch.float64, generator=generator).log()
        held = imh.imh_chain(log_w, log_u).tolist()
        expected = [0]
        for i in range(1, len(log_w)):  # Eq. 5, a step at a time
            now = log_w[expected[-1]]
            ratio = log_w[i] - now if log_w[i] != now else torch.tensor(0.0)
            expected.append(i if log_u[i] < ratio else expected[-1])
        assert held == expected

    check()


# ---- flags

values = st.one_of(
    st.integers(-3, 10**7).map(str),
    st.floats().map(str),
    st.sampled_from(
        ["", "nan", "-inf", "1e400", "True", "tiny", "none", "0x1", "-", "--", "9" * 30]
    ),
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=300),
)


def entry(command):
    """What a command line is read with: the default of tyro, and the check that follows."""
    module = module_of(command)
    _, kind, _ = COMMANDS[command]
    if command.startswith("dpl"):
        default = getattr(module, kind)()
    else:
        default = module.PRESETS["tiny"]
    return module, default


@pytest.mark.parametrize("command", COMMANDS)
def test_random_flags(command, tmp_path, request, monkeypatch):
    """Random values of random options: tyro's exit code 2, or a line, or options in range."""
    monkeypatch.chdir(tmp_path)
    module, default = entry(command)
    names = [field.name for field in dataclasses.fields(default)]
    option = st.tuples(st.sampled_from(names), st.lists(values, max_size=2))
    ranges = ranges_of(module)
    outcomes = {"tyro": 0, "line": 0, "taken": 0}

    @random_settings(examples(request, 40))
    @given(st.lists(option, min_size=1, max_size=3))
    def check(options):
        words = []
        for name, found in options:
            words += ["--" + name.replace("_", "-"), *found]
        try:
            with (
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(io.StringIO()),
            ):
                args = tyro.cli(type(default), default=default, args=words)
        except SystemExit as error:
            assert error.code in (0, 2)  # 0: --help
            outcomes["tyro"] += 1
            return
        try:
            if command == "imh_adaptors":
                module.check(args, "all")
            else:
                module.check(args)
        except SystemExit as error:
            one_line(error)
            outcomes["line"] += 1
            return
        for name in names:
            value = getattr(args, name)
            if name in ranges and is_number(value):
                for one in value if isinstance(value, tuple) else (value,):
                    assert ranges[name][0] <= one <= ranges[name][1], (name, one)
        outcomes["taken"] += 1

    check()
    assert not list(tmp_path.iterdir())
    assert outcomes["tyro"] + outcomes["line"] > 0


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
    for part, name in (("data", "train.jsonl"), ("model", "model.safetensors")):
        (tmp_path / part).mkdir()
        (tmp_path / part / name).write_text("{}\n" * 2000)
        manifest = {"sha256": common._hashes(tmp_path / part)}
        assert not common._is_whole(tmp_path)
        common.write(tmp_path / part / "COMPLETE.json", manifest)
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
