"""Every command of README.md and CONTRIBUTING.md is run, with small numbers; none is left out.

A command is a line of a bash block, or a piece of text set as code that begins as a command does.
Each kind has a rule below; one that no rule knows fails the test, and so does a new command of a
known kind that does not work.  What a preset has to download is refused here in one line: the
command must get that far.  All methods run in one process (tests/drive.py), on a blank model.
"""

import csv
import functools
import importlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run, run_all
from test_carry import changed
from test_contract import METHODS

sys.path.insert(1, str(ROOT / "studies"))

PAGES = ("README.md", "CONTRIBUTING.md")
WORDS = "python python3 bash sh torchrun pip pytest ruff diff git source cp patch".split()
CAPTURED = dict(capture_output=True, text=True)
METHOD = re.compile(r"(?:methods/)?(\w+)\.py$")


# ---- The commands of a page


def code_lines(text):
    """The lines of the bash blocks of a page, each command for itself."""
    found = []
    for block in re.findall(r"^```(?:bash|sh)\n(.*?)^```$", text, re.M | re.S):
        for line in block.splitlines():
            found.append(line.partition("  #")[0].strip())
    return found


def code_spans(text):
    """What is set as code within lines; in a row of a table a list goes on: `X.py a`, `b`."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    found = []
    for cell in re.split(r"\n|(?<!\\)\|", text):
        method = None  # the last one that the cell names
        for span in re.findall(r"`([^`]+)`", cell):
            words = span.split()
            if METHOD.match(words[0]) and Path(ROOT, "methods", Path(words[0]).name).is_file():
                method = words[0]
            elif method and words[0] in names_of(Path(method).stem):
                span = f"{method} {span}"
            found.append(span)
    return found


def names_of(method):
    """The presets and commands of a method, which come before its flags."""
    module = importlib.import_module(method)
    return {*getattr(module, "PRESETS", {}), *getattr(module, "COMMANDS", ())}


def is_command(text):
    """Does it begin as a command does?  A method alone, as `methods/sft.py`, is run, too."""
    first, *more = text.split()
    return (first in WORDS and more) or (first.startswith("methods/") and first.endswith(".py"))


def all_commands():
    """The commands of the pages, each once, in their order."""
    found = {}
    for page in PAGES:
        text = (ROOT / page).read_text()
        for command in code_lines(text) + code_spans(text):
            for part in command.split(" && "):
                if part.strip() and is_command(part):
                    found[re.sub("^python (?=methods/)", "", part.strip())] = page
    return list(found)


COMMANDS = all_commands()


# ---- What is run of a method: the command as it stands, with small numbers after it

SMALL = {  # option: a small number of it
    "max_steps": "2",
    "batch_size": "8",
    "steps": "2",
    "width": "8",
    "eval_pairs": "4",
    "eval_examples": "4",
    "eval_every": "8",
    "K": "4",
    "T": "2",
    "exact": "4",
    "bound_K": "2 3",
    "runs": "2",
    "prompts": "2",
    "samples": "2",
    "max_new_tokens": "4",
    "chain_length": "20",
    "burn_in": "2",
    "corpus_size": "4",
    "temperatures": "1.0",
    "sampling_types": "top_k=5",
}
PLACEHOLDERS = {"G": "0.5", "T": "base", "S": "both"}  # beside those of a model
IMH_PARTS = ("generate", "score", "imh", "figures")  # one goes on where the other has ended


def options_of(method, names):
    """The options with which a command starts, as an instance of its Args."""
    module = importlib.import_module(method)
    presets = getattr(module, "PRESETS", None)  # of dpl.py these are its commands
    if presets is None:  # a study
        return module.Args()
    for name in names:
        if name in presets:
            return presets[name]
    return next(iter(presets.values()))


def needs_hub(options):
    """Is the model or the data one that has to be downloaded?"""
    for name in ("model", "data"):
        if getattr(options, name, "tiny") not in ("tiny", "tiny-untrained", "", (), ("tiny",)):
            return True
    return False


def write_own_files(folder, pairs):
    """The files of a reader's own that README's commands name, with the rows of `pairs`."""
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    shutil.copy(pairs, folder / "pairs.jsonl")
    with open(folder / "pairs.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["prompt", "chosen", "rejected", "group"])
        for i, row in enumerate(rows):
            table.writerow([row["prompt"], row["chosen"], row["rejected"], "ab"[i % 2]])
    prompts = [json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows[:4]]
    (folder / "prompts.jsonl").write_text("".join(prompts))
    (folder / "prompts.txt").write_text("Once upon a time\nThere was\n")
    (own,) = re.findall(
        r"^```python\n(# own.py.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S
    )
    (folder / "own.py").write_text(own)


class Plan:
    """The jobs of tests/drive.py for the commands of methods, and where each is among them."""

    def __init__(self, blank, folder):
        self.model = str(blank / "model")
        self.data = str(blank / "pairs.jsonl")
        self.folder = folder
        self.jobs = []
        self.place = {}  # command: its number in jobs
        self.at_the_hub = set()  # commands that end where they have to download
        self.carried = folder / "carried"
        self.carried.mkdir()
        shutil.copy(ROOT / "common.py", self.carried)
        self.made = []  # folders that earlier commands were told to write
        write_own_files(folder, Path(self.data))

    def add(self, command):
        """A command of a method, of a copy that was carried away, or of torchrun with one."""
        words = shlex.split(command)
        while not words[0].endswith(".py"):
            words.pop(0)
        method = Path(words[0]).stem
        file = ROOT / words[0]
        if "/" not in words[0]:
            file = self.carried / f"{method}.py"
            file.write_text(changed(f"{method}.py"))

        # The words before the first flag are presets and commands.
        names = []
        for word in words[1:]:
            if word.startswith("-"):
                break
            names.append(word)
        typed = []
        for before, word in zip(words, words[1:]):
            if before == "--out":
                self.made.append(word)
            typed.append(self.value_of(word))
        options = options_of(method, names)
        self.place[command] = len(self.jobs)
        flags = {name: value for name, value in SMALL.items() if hasattr(options, name)}
        if method == "imh_adaptors":  # its responses end with this length, on a blank model
            flags["max_length"] = "40"
        if needs_hub(options):
            self.at_the_hub.add(command)
        else:
            flags.update(self.local(method, names))
        flags["out"] = self.out_of(method, names)
        argv = [str(file), *typed]
        for name, value in flags.items():
            flag = "--" + name.replace("_", "-")
            if hasattr(options, name) and flag not in typed:  # else as the command has it
                argv += [flag, *value.split()]
        self.jobs.append((self.folder, argv))

    def value_of(self, word):
        """What stands for a placeholder, or for a run that is not there."""
        if any(word == out or word.startswith(f"{out}/") for out in self.made):
            return word
        if word in ("A", "M", "P", "MODEL") or word.startswith("results/"):
            return self.model
        return PLACEHOLDERS.get(word, word)

    def out_of(self, method, names):
        """Where the command writes: into a folder of its own, but for those that go on."""
        name = f"out-{len(self.jobs)}"
        first = (names or [""])[0]
        if method == "dpl" and first == "train" and not self.is_taken("dpl-trained"):
            name = "dpl-trained"
        if method == "dpo_gamma" and not first and not self.is_taken("sweep"):
            name = "sweep"
        if method == "dpl" and first in ("evaluate", "score"):
            name = f"{first}.jsonl"
        if method == "imh_adaptors" and first in IMH_PARTS:
            if first != "generate" or not self.is_taken("imh"):
                name = "imh"
        return str(self.folder / name)

    def is_taken(self, name):
        """Does an earlier command write there?"""
        return any(str(self.folder / name) in argv for _, argv in self.jobs)

    def local(self, method, names):
        """The blank model and its pairs, and what earlier commands have left."""
        local = {"model": self.model, "data": self.data, "ref_model": self.model}
        if method == "dpl" and not names:
            del local["data"]  # its experiment is one on the readers of the tiny world
        if method == "compare_preferences":
            local["seeds"] = "0"
        local["sweep"] = str(self.folder / "sweep")
        local["checkpoints"] = str(self.folder / "dpl-trained")
        local["files"] = str(self.folder / "evaluate.jsonl")
        return local


@pytest.fixture(scope="module")
def ran(blank, tmp_path_factory):
    """All commands of methods and studies, run -> the Plan, and what drive.py says of each job."""
    folder = tmp_path_factory.mktemp("commands")
    plan = Plan(blank, folder)
    for command in COMMANDS:
        if of_a_method(command):
            plan.add(command)
    return plan, run_all(plan.jobs, folder, timeout=1200)


LAUNCHER = r"(?:python |torchrun --standalone --nproc-per-node \d+ )?"


def of_a_method(command):
    """Does the command run a file of methods/, here or carried away, or of studies/?"""
    found = re.match(rf"{LAUNCHER}(methods/|studies/|)(\w+\.py)(?: |$)", command)
    return found is not None and (ROOT / (found[1] or "methods/") / found[2]).is_file()


def check_method(command, ran):
    """It ends well, or in one line that says what could not be had from the hub."""
    plan, done = ran
    place = plan.place[command]
    outcome = done[place]
    shown = f"{plan.jobs[place][1]}: {outcome['message']}\n{outcome['traceback']}"
    assert not outcome["traceback"], shown
    if "--lora" in command and importlib.util.find_spec("peft") is None:
        assert outcome["code"] == 1 and "peft" in outcome["message"], shown
    elif '"role"' in command:  # the blank model has no template for a chat
        assert outcome["code"] == 1 and "no chat template" in outcome["message"], shown
    elif command in plan.at_the_hub:
        assert outcome["code"] == 1, shown
        missing = "hub" in outcome["message"] or "No such file" in outcome["message"]
        assert missing and "\n" not in outcome["message"], shown
    else:
        assert outcome["code"] == 0, shown + outcome["stderr"][-2000:]


# ---- The other kinds of commands


def check_run_all(tmp_path):
    """run_all.sh with a python that only notes what it is to run: each is a file that is here."""
    shutil.copy(ROOT / "run_all.sh", tmp_path)
    notes = tmp_path / "notes"
    stub = tmp_path / "python"
    stub.write_text(f'#!/bin/sh\necho "$@" >> {notes}\n')
    stub.chmod(0o755)
    done = subprocess.run(
        ["bash", str(tmp_path / "run_all.sh")],
        env={**os.environ, "PYTHON": str(stub)},
        **CAPTURED,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    started = notes.read_text().splitlines()
    for line in started:
        assert line.startswith("-c ") or (ROOT / line.split()[0]).is_file(), line
    for path in (ROOT / "methods").glob("*.py"):
        assert any(line.startswith(f"methods/{path.name}") for line in started), path


def check_pytest(words):
    """Not run within itself: the files and the names that it selects are there."""
    for before, word in zip(["", *words], words):
        if word.startswith("tests/"):
            assert (ROOT / word.partition("::")[0]).is_file(), word
        if before == "-k":
            path = next(w for w in words if w.startswith("tests/"))
            assert word in (ROOT / path).read_text(), f"{path} has no {word}"
        if before == "-m" and word != "pytest":
            assert f'"{word}:' in (ROOT / "pyproject.toml").read_text(), f"no marker {word}"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command(command, request, tmp_path):
    words = shlex.split(command)
    if of_a_method(command):
        check_method(command, request.getfixturevalue("ran"))
    elif command == "bash run_all.sh":
        check_run_all(tmp_path)
    elif command.startswith("pip install -r "):
        assert all((ROOT / word).is_file() for word in words[3:] if word != "-r")
    elif command.startswith("python -m pytest") or words[0] == "pytest":
        check_pytest(words)
    elif re.fullmatch(r"(python -m )?ruff (check|format --check|format) \.", command):
        pass  # test_contract.py runs ruff on everything
    elif words[0] == "diff":
        done = subprocess.run(words, cwd=ROOT, **CAPTURED)
        assert done.returncode == 1 and done.stdout  # they differ
    elif command in ("python docs/build.py", "python docs/build.py --pictures"):
        pass  # test_docs.py runs it on a copy, and with --check
    elif command.startswith("python tests/benchmark.py"):
        check_benchmark(words[2:])
    elif command.startswith("python tests/pretend.py "):
        # test_pretend.py makes whole runs so
        done = subprocess.run([sys.executable, *words[1:], "--help"], cwd=ROOT, **CAPTURED)
        assert done.returncode == 0 and f"usage: {words[2]}" in done.stdout, done.stderr
    elif command.startswith("python tests/test_contract.py "):
        figures_of = [sys.executable, *words[1:]]
        done = subprocess.run(figures_of, cwd=ROOT, **CAPTURED)
        assert "nodes a statement" in done.stdout, done.stderr
    else:
        pytest.fail(f"{command}: no rule runs it; add one")


def check_benchmark(names):
    """The names that are given are benchmarks, and one of these runs, with few rows."""
    text = (ROOT / "tests/benchmark.py").read_text()
    for name in names:
        assert f'    "{name}": {name},' in text, f"no benchmark {name}"
    assert re.search(r"tokenise .*x \[.* agree to", benchmark_of_few_rows())


@functools.cache
def benchmark_of_few_rows():
    """What the benchmark prints of 40 rows."""
    few = "import benchmark; benchmark.setup(0); benchmark.tokenise(40, 2)"
    return run("-c", few, cwd=ROOT / "tests").stdout


# ---- And that none is left out


def test_commands_are_found():
    page = "a `python x.py`, `beta` and `--beta 1`\n```bash\nruff check . && git x  # why\n```\n"
    row = "| `train.py loss=sft` | `methods/sft.py hh`, `tldr`, or `hh --lr 1` |"
    assert code_lines(page) == ["ruff check . && git x"]
    assert code_spans(page) == ["python x.py", "beta", "--beta 1"]
    spans = code_spans(row)
    assert spans[1:] == ["methods/sft.py hh", "methods/sft.py tldr", "methods/sft.py hh --lr 1"]
    assert [bool(is_command(span)) for span in spans] == [False, True, True, True]
    assert len(COMMANDS) > 40


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_every_method_has_a_command(path):
    assert any(f"methods/{path.name}" in command for command in COMMANDS)


def test_every_flag_is_one():
    """What is set as code and begins with -- is an option of a method or of a script."""
    text = ""
    for folder in ("methods", "studies", "tests", "docs"):
        for path in (ROOT / folder).glob("*.py"):
            text += path.read_text()
    for page in PAGES:
        for span in code_spans((ROOT / page).read_text()):
            if not is_command(span) and not span.startswith("--"):
                continue  # a command of a paper's repository
            for flag in re.findall(r"(?<![\w-])--([a-z][a-z-]*)", span):
                name = flag.replace("-", "_")
                known = re.search(rf"^    {name}: |--{flag}\b", text, re.M)
                assert known, f"{page}: `{span}`: no option --{flag}"
