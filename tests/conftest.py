"""What several tests share: a small random model with a tokenizer, a file of pairs, and a way to
run a method.
"""

import gc
import inspect
import json
import os
import random
import subprocess
import sys
import types
from pathlib import Path

# The garbage collector need not walk what is imported and collected from here on, now or in tests:
# see pytest_collection_modifyitems.
gc.disable()

import forks
import matplotlib.figure
import pytest
import tokenizers
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

# The suite is that of a CPU, on every machine: a GPU is hidden, but from `pytest test_cuda.py`.
if any("test_cuda" in argument for argument in sys.argv):
    os.environ["TEST_CUDA"] = "1"  # for workers of pytest-xdist, too
if "TEST_CUDA" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import common

gc.disable()  # common.py has enabled it again

os.environ["OMP_NUM_THREADS"] = (
    "1"  # their number decides the last bits, and tests compare bytes across processes
)
torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[1]


def pytest_addoption(parser):
    parser.addoption("--deep", action="store_true", help="25 times as many random examples")


# What a quick test does not use, itself or through functions and fixtures of tests/.
NOT_QUICK = {"main", "subprocess", "run", "run_all", "Popen", "tiny_folder", "build_tiny", "fork"}
NOT_QUICK |= {"optim"}  # it trains
NOT_QUICK |= {"exact", "toy", "figures", "train", "fit", "synthetic"}  # commands of a method

SLOW = (  # and by the clock: more than two seconds each, several times
    "test_unbiased_and_upper_bound_identity",
    "test_true_log_Z_of_the_default_run",
    "test_a_response_depends_on_its_own_prompt_and_uniforms",
)


def names_used(function, seen):
    """The names in a function's code, and in that of functions of tests/ that it calls."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is None or code in seen:
        return set()
    seen.add(code)
    codes = [code]
    names = set()
    while codes:  # functions within functions, too
        inner = codes.pop()
        names.update(inner.co_names)
        codes += [x for x in inner.co_consts if isinstance(x, types.CodeType)]
    for name in list(names):
        called = inspect.unwrap(function).__globals__.get(name)
        if inspect.isfunction(called) and str(ROOT / "tests") in called.__code__.co_filename:
            names |= names_used(called, seen)
    return names


# Files that take minutes: two run side by side, so that the longest must not come last.
LONG = (
    "test_pretend",
    "test_readme",
    "test_imh_adaptors",
    "test_twisted_smc",
    "test_dpl",
    "test_faults",
    "test_real",
)


def pytest_collection_modifyitems(items):
    """The longest files first; and mark what `pytest -m quick` runs while one writes.

    That takes two minutes of two cores at most.
    """
    items.sort(key=lambda item: not item.path.name.startswith(LONG))
    for item in items:
        seen = set()
        names = names_used(item.function, seen)
        for definitions in item._fixtureinfo.name2fixturedefs.values():
            for definition in definitions:
                names |= names_used(definition.func, seen)
        random = hasattr(item.function, "hypothesis")  # many examples
        real = item.path.name.startswith("test_real")  # large files
        slow = item.originalname in SLOW
        if not (names & NOT_QUICK or random or real or slow):
            item.add_marker(pytest.mark.quick)
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def blank(tmp_path_factory):
    """A folder with model/ (random GPT-NeoX, two layers of width 32, dropout 0.1 in its config) and
    pairs.jsonl.
    """
    folder, rng = tmp_path_factory.mktemp("blank"), random.Random(0)
    rows = [common.tiny_row(rng) for _ in range(48)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer, bpe.decoder = (
        byte_level(add_prefix_space=False),
        tokenizers.decoders.ByteLevel(),
    )
    bpe.train_from_iterator(
        [row["prompt"] + row["chosen"] for row in rows],
        tokenizers.trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=sorted(byte_level.alphabet()),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|endoftext|>", bos_token="<|endoftext|>"
    )
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=512,
            rotary_pct=0.5,
            attention_dropout=0.1,
            hidden_dropout=0.1,
        )
    )
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


# Figures are made but not drawn, which takes longer than a short run.
draw = matplotlib.figure.Figure.savefig
matplotlib.figure.Figure.savefig = forks.plain_picture


@pytest.fixture
def pictures(monkeypatch):
    """In the tests that ask for it, figures are drawn."""
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", draw)


_servers = []  # of forks.py: the one of this process, once it is needed


def begin(*command, processes=0, **environment):
    """Start a method as a user would, or with as many processes as torchrun would -> forks.Started

    Importing torch is saved; `run(..., fresh=True)` is a start from nothing.
    """
    if not _servers:
        _servers.append(forks.Server())
    return _servers[0].start(command, processes, **environment)


def pytest_unconfigure():
    while _servers:
        _servers.pop().close()


def run(*command, processes=0, timeout=300, check=True, fresh=False, **environment):
    """Run a method as a user would, in a process of its own or in several -> the finished process,
    with text.

    fresh=True: by python or torchrun themselves, which takes seconds longer.
    """
    if not fresh:
        done = begin(*command, processes=processes, **environment).wait(timeout)
    else:
        start = [sys.executable]
        if processes:
            start += ["-m", "torch.distributed.run", "--standalone"]
            start += ["--nproc-per-node", str(processes)]
        fixed = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [*start, *map(str, command)],
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=ROOT,
            env={**os.environ, **fixed, **environment},
        )
    assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def records(out):
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def run_all(jobs, folder, timeout=600):
    """Run [(folder, [file, argument, ...]), ...] in one process -> for each what drive.py says.

    That is {"code", "message", "stdout", "stderr", "traceback"}; it costs one start of torch.
    """
    listed = []
    for where, argv in jobs:
        listed.append({"folder": str(where), "argv": list(map(str, argv))})
    (folder / "jobs.json").write_text(json.dumps(listed))
    run(ROOT / "tests/drive.py", folder / "jobs.json", folder / "done.json", timeout=timeout)
    return json.loads((folder / "done.json").read_text())


COUNTED = {  # property of a test: what its numbers add up to
    "faults": "faults injected: kills, signals, full disks, two at once, damage",
    "table cases": "bad values of the options' table, each refused in one line",
    "random examples": "random inputs: data, tokenisation, packing, adaptors, flags",
    "damaged real inputs": "damaged copies of the real pairs, each through every reading command",
}


def pytest_terminal_summary(terminalreporter):
    """The numbers that tests have recorded, added up; "nothing lost" if no test has failed."""
    totals = dict.fromkeys(COUNTED, 0)
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name in totals:
                totals[name] += value
    failed = terminalreporter.getreports("failed") or terminalreporter.getreports("error")
    for name, total in totals.items():
        if total:
            verdict = "" if failed else "; nothing lost"
            terminalreporter.write_line(f"{total} {COUNTED[name]}{verdict}")
