"""Kill, stop, starve, damage: nothing is lost, nothing half-written, one line says what to do.

Every command that runs longer than a moment is killed (kill -9) and stopped (SIGTERM, Ctrl-C) at
random moments, and goes on to the same bytes as a run that nobody disturbed.  The disk fills up
under every kind of file: on a small file system where one may be mounted, and by a limit on the
size of files everywhere.  Two runs begin in one folder at the same instant.  With --deep a run is
killed at each single one of its files' events.
"""

import dataclasses
import json
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import dpo
import pytest
import torch
from conftest import ROOT, run
from launcher import Launcher
from test_dpo import args
from transformers import AutoModelForCausalLM

# ---- the commands


@dataclasses.dataclass
class Command:
    """How a command is run here."""

    command: str  # the method's module, and the function for imh_adaptors.py
    options: dict
    file: str = ""  # what it writes, if that is a file and not a folder
    again: str = "resume"  # the flag with which it goes on after a kill
    step: str = ""  # of an event: a step is done
    begin: str = ""  # the command whose results it needs in its folder
    before: str = ""  # what the launcher's child runs first


TRAINING = dict(batch_size=8, max_steps=6, lr=1e-3, eval_every=16, save_every=16)
PREFERENCES = dict(**TRAINING, eval_pairs=2, warmup_steps=0)
IMH = dict(
    sampling_types=("top_k=20", "greedy"),
    temperatures=(1.0,),
    prompts=4,
    samples=4,
    batch_size=4,
    max_length=48,
    max_prompt_length=40,
    chain_length=60,
    burn_in=10,
    corpus_size=10,
)
SMALL_TOY = """
import numpy as np
def few_corpora(p_plus, log_p, r):
    x = np.linspace(-7, -6.5, 200)
    return np.stack([x, p_plus @ np.log(p_plus) - x], 1)
module.toy_corpora = few_corpora
"""
SMALL_WORLDS = "module.exact.__defaults__ = (2, 32, 8, None)"
COMMANDS = {
    "sft": Command("sft", dict(**TRAINING, eval_examples=2, warmup_steps=0), step="metrics.jsonl"),
    "dpo": Command("dpo", PREFERENCES, step="metrics.jsonl"),
    "cal_dpo": Command("cal_dpo", PREFERENCES, step="metrics.jsonl"),
    "dpo_gamma": Command(
        "dpo_gamma", dict(PREFERENCES, gamma=(0.0, 1.0), max_steps=3), step="metrics.jsonl"
    ),
    "generate": Command(
        "generate",
        dict(data="TESTS", samples=2, batch_size=4, max_new_tokens=6, temperature=0.8),
        step="parts/",
    ),
    "dpl train": Command(
        "dpl", dict(**TRAINING, eval_pairs=2, type="categorical"), step="metrics.jsonl"
    ),
    "dpl score": Command(
        "dpl",
        dict(data="RESPONSES", checkpoints=("REWARD",), names=("x",), model=None, dtype="float32"),
        file="scored.jsonl",
        again="overwrite",
    ),
    "dpl evaluate": Command(
        "dpl",
        dict(data="TESTS", checkpoints=("REWARD",), names=("x",), model=None, max_length=1024),
        file="evaluated.jsonl",
        again="overwrite",
    ),
    "dpl synthetic": Command(
        "dpl",
        dict(env="1d", width=4, batch_size=8, steps=6, model=None, data=None),
        again="overwrite",
        step="metrics.jsonl",
    ),
    "ranking_accuracy": Command(
        "ranking_accuracy",
        dict(model=("MODEL", "OTHER"), data=("TESTS",), tokens_per_microbatch=300),
        step="records-",
    ),
    "twisted_smc": Command(
        "twisted_smc",
        dict(
            prompt="Once a fox",
            T=3,
            potential="OWN",
            learner="ctl",
            K=4,
            max_steps=4,
            eval_every=2,
            exact=6,
            bound_K=(4,),
            runs=3,
            seeds=2,
            data=None,
        ),
        step="metrics.jsonl",
    ),
    "imh generate": Command("imh_adaptors generate", dict(**IMH), step="samples/"),
    "imh score": Command("imh_adaptors score", dict(**IMH), step="scores/", begin="imh generate"),
    "imh imh": Command("imh_adaptors imh", dict(**IMH), again="", begin="imh score"),
    "imh figures": Command("imh_adaptors figures", dict(**IMH), again="", begin="imh imh"),
    "imh exact": Command("imh_adaptors exact", dict(**IMH), again="", before=SMALL_WORLDS),
    "imh all": Command("imh_adaptors all", dict(**IMH), before=SMALL_TOY),
}


class Bench:
    """The launcher, the files that the commands read, and their undisturbed runs."""

    def __init__(self, launcher, folder, blank):
        self.launcher = launcher
        self.folder = folder
        self.cache = folder / "cache"
        self.whole = {}  # command: (its folder, how it ended)
        self.names = {
            "MODEL": str(blank / "model"),
            "OTHER": str(folder / "other"),
            "PAIRS": str(blank / "pairs.jsonl"),
            "TESTS": str(folder / "test_pairs.jsonl"),
            "RESPONSES": str(folder / "responses.jsonl"),
            "REWARD": str(folder / "reward" / "run"),
            "OWN": f"{folder}/own.py:length",
        }

    def options(self, name, parent):
        """The options of a command that writes below the folder `parent`."""
        command = COMMANDS[name]
        found = {"model": "MODEL", "data": "PAIRS"}
        if name.startswith("imh"):
            found["ref_model"] = "OTHER"
        found.update(command.options)
        found["out"] = str(self.out(name, parent))
        for key, value in list(found.items()):
            if value is None:
                del found[key]
            elif isinstance(value, tuple):
                found[key] = tuple(self.names.get(one, one) for one in value)
            elif isinstance(value, str):
                found[key] = self.names.get(value, value)
        return found

    def out(self, name, parent):
        """Where a command writes."""
        return parent / (COMMANDS[name].file or "run")

    def begin(self, name, parent):
        """Put the results that a command needs into its folder."""
        parent.mkdir(parents=True, exist_ok=True)
        if COMMANDS[name].begin:
            folder, _ = self.undisturbed(COMMANDS[name].begin)
            shutil.copytree(folder, parent, dirs_exist_ok=True)

    def start(self, name, parent, goes_on=False, more=None, **faults):
        """Start a command; goes_on: with the flag for a run that was disturbed -> Run"""
        command = COMMANDS[name]
        options = {**self.options(name, parent), **(more or {})}
        out = self.out(name, parent)
        if goes_on and command.again == "overwrite" and out.exists() and self.holds(out):
            options["overwrite"] = True
        if goes_on and command.again == "resume" and self.may_resume(name, out):
            options["resume"] = True
        faults.setdefault("watch", [str(parent), str(self.cache)])
        faults.setdefault("cache", str(self.cache))
        faults["before"] = command.before + "\n" + faults.get("before", "")
        return self.launcher.start(command.command, options, **faults)

    def holds(self, out):
        """Is there a file, or a folder with something in it?"""
        return out.is_file() or any(out.iterdir())

    def may_resume(self, name, out):
        """What a user sees of it: a run folder with its config.json."""
        if name == "imh score":  # it begins where nothing has begun
            return True
        if name == "dpo_gamma":  # a folder for each run of the sweep
            out = out / "gamma-0"
        return (out / "config.json").is_file()

    def run(self, *arguments, **faults):
        """A command from start to end -> Ended"""
        return self.start(*arguments, **faults).wait()

    def undisturbed(self, name):
        """The run that nobody disturbs, made once -> its folder, Ended"""
        if name not in self.whole:
            parent = self.folder / "whole" / name
            self.begin(name, parent)
            ended = self.run(name, parent)
            assert ended.code == 0, ended.err[-3000:]
            self.whole[name] = (parent, ended)
        return self.whole[name]

    def finish(self, name, parent):
        """Let a disturbed command go on until its end; its files must be those of `undisturbed`."""
        ended = self.run(name, parent, goes_on=True)
        assert ended.code == 0, ended.out[-1000:] + ended.err[-3000:]
        folder, _ = self.undisturbed(name)
        assert_same_files(folder, parent)
        return ended


def same_content(path):
    """A file's content without what depends on the time, and on how the run was started."""
    if path.name == "metrics.jsonl":
        found = []
        for line in path.read_text().splitlines():
            record = json.loads(line)
            for name in list(record):
                if name.endswith(("_per_s", "_GiB")):
                    del record[name]
            found.append(record)
        return json.dumps(found)
    if path.name == "config.json":
        config = json.loads(path.read_text())
        for name in ("resume", "overwrite", "out"):
            config.pop(name, None)
        return config
    if path.name.startswith("records-"):  # in the order in which they were scored
        return sorted(path.read_text().splitlines())
    return path.read_bytes()


def files_in(parent):
    """Every file below a folder by its name, but those of checkpoints."""
    found = {}
    for path in sorted(parent.rglob("*")):
        name = str(path.relative_to(parent))
        if path.is_file() and "/step-" not in name and path.name != "filler":
            found[name] = path
    return found


def assert_same_files(one, other):
    """The same names and the same contents."""
    wanted = files_in(one)
    found = files_in(other)
    assert sorted(found) == sorted(wanted)
    for name, path in wanted.items():
        assert same_content(found[name]) == same_content(path), name


def assert_no_leftovers(*folders):
    """Nothing that was half-written is there."""
    for folder in folders:
        assert not [*folder.rglob("*.tmp"), *folder.rglob("*.partial")]


@pytest.fixture(scope="module")
def bench(blank, tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    # Another model with the same tokenizer, test pairs, responses to score, a potential.
    shutil.copytree(blank / "model", folder / "other")
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(folder / "other")
    for weight in model.parameters():
        weight.data += 0.02 * torch.randn_like(weight)
    model.save_pretrained(folder / "other")
    lines = (blank / "pairs.jsonl").read_text().splitlines(keepends=True)[:10]
    (folder / "test_pairs.jsonl").write_text("".join(lines))
    texts = []
    for line in lines:
        row = json.loads(line)
        texts.append(json.dumps({"prompt": row["prompt"], "responses": row["responses"]}) + "\n")
    (folder / "responses.jsonl").write_text("".join(texts))
    own = "def length(prompt, texts):\n    return [-len(text) / 10 for text in texts]\n"
    (folder / "own.py").write_text(own + "length.log_bound = 0\n")

    launcher = Launcher()
    found = Bench(launcher, folder, blank)
    found.begin("dpl train", folder / "reward")
    assert found.run("dpl train", folder / "reward").code == 0
    yield found
    launcher.close()


def moments(name, n):
    """Random numbers of a command, the same in every run of the tests."""
    rng = random.Random(name)
    return [rng.random() for _ in range(n)]


# ---- kill -9


@pytest.mark.parametrize("name", COMMANDS)
def test_killed_anywhere_it_goes_on_to_the_same_bytes(name, bench, tmp_path, record_property):
    """Killed before two random events of its files and once at a random time, then left alone."""
    _, ended = bench.undisturbed(name)
    bench.begin(name, tmp_path)
    first, second, third = moments(name, 3)
    kills = 0
    for share in (first, second / 2):
        number = 1 + int(share * len(ended.events))
        killed = bench.run(name, tmp_path, goes_on=True, kill_at=number)
        assert killed.code in (0, -signal.SIGKILL), killed.err[-2000:]
        kills += killed.code != 0
    process = bench.start(name, tmp_path, goes_on=True)
    time.sleep(third / 2)
    process.send(signal.SIGKILL)
    kills += process.wait().code != 0
    assert kills > 0
    bench.finish(name, tmp_path)
    assert_no_leftovers(tmp_path)
    record_property("faults", kills)


@pytest.mark.parametrize("name", COMMANDS)
def test_killed_at_every_event(name, bench, tmp_path, request, record_property):
    """A run for each event of the command's files: killed there, it goes on to the same bytes."""
    if not request.config.getoption("--deep"):
        pytest.skip("takes minutes: --deep")
    _, ended = bench.undisturbed(name)
    for number in range(1, len(ended.events) + 1):
        parent = tmp_path / str(number)
        bench.begin(name, parent)
        killed = bench.run(name, parent, kill_at=number)
        assert killed.code == -signal.SIGKILL
        bench.finish(name, parent)
        assert_no_leftovers(parent)
        shutil.rmtree(parent)
    record_property("faults", len(ended.events))


# ---- SIGTERM and Ctrl-C


@pytest.mark.parametrize("name", COMMANDS)
def test_asked_to_stop_it_stops_within_a_step(name, bench, tmp_path, record_property):
    """SIGTERM at a random event, then Ctrl-C at another one of the resumed run."""
    _, ended = bench.undisturbed(name)
    bench.begin(name, tmp_path)
    cases = 0
    first, second = moments(f"{name} stop", 2)
    for share, number in ((first, signal.SIGTERM), (second / 2, signal.SIGINT)):
        event = 1 + int(share * len(ended.events))
        stopped = bench.run(name, tmp_path, goes_on=True, signal_at=(event, int(number)))
        # A process that has not joined its group yet ends at once, by the signal itself.
        assert stopped.code in (0, 143, 130, -number), stopped.err[-2000:]
        assert "Traceback" not in stopped.err
        assert_no_leftovers(tmp_path)
        step = COMMANDS[name].step
        if step and stopped.code == 143:
            after = [line for line in stopped.events[event:] if step in line]
            written = [line for line in after if line.startswith(("open", "os.rename"))]
            assert len(written) <= 4, written
        cases += stopped.code != 0
    bench.finish(name, tmp_path)
    record_property("faults", cases)


# ---- a full disk

# what is written: the command, a part of the file's name, at which of its events
FULL = {
    "run's config": ("dpo", "config.json", 1),
    "metrics": ("dpo", "metrics.jsonl", 1),
    "metrics of dpl": ("dpl train", "metrics.jsonl", 1),
    "checkpoint": ("dpo", "step-4.tmp", 1),
    "checkpoint's manifest": ("dpo", "step-4.tmp/COMPLETE.json", 1),
    "checkpoint of a twist": ("twisted_smc", "step-2.tmp", 1),
    "model": ("dpo", "model.tmp", 1),
    "reward model": ("dpl train", "model.tmp", 1),
    "responses' parts": ("generate", "000001.jsonl", 1),
    "responses": ("generate", "responses.jsonl", 1),
    "judged responses": ("generate", "judged.jsonl", 1),
    "records": ("ranking_accuracy", "records-", 1),
    "samples": ("imh generate", "00001.json", 1),
    "scores": ("imh score", "00000.json", 3),
    "reference cache": ("dpo", ".logps", 1),
    "exact samples": ("twisted_smc", "exact_samples.pt", 1),
    "table": ("twisted_smc", "table.md", 1),
    "table of rankings": ("ranking_accuracy", "metrics.jsonl", 1),
    "table of chains": ("imh imh", "imh.json", 1),
    "curves": ("dpl synthetic", "curves.json", 1),
    "scored file": ("dpl score", "scored.jsonl", 1),
    "evaluated file": ("dpl evaluate", "evaluated.jsonl", 1),
    "exact draws": ("imh exact", "00000.json", 1),
    "figure": ("dpo", "curves.png", 1),
    "figure of scores": ("generate", "scores.png", 1),
    "figure of rankings": ("ranking_accuracy", "ranking.png", 1),
    "figure of twists": ("twisted_smc", "twisted_smc.png", 1),
    "figure of chains": ("imh figures", "correlations.png", 1),
    "figure of synthetic data": ("dpl synthetic", "dpl.png", 1),
}


def starve(bench, kind, parent, cache, folder):
    """Run a command whose disk is full at that file, then make room and let it go on."""
    name, file, number = FULL[kind]
    bench.undisturbed(name)
    bench.begin(name, parent)
    where = dict(cache=str(cache), watch=[str(parent), str(cache)])
    ended = bench.run(name, parent, full_at=(file, number, folder), **where)
    assert ended.code == 1, (ended.code, ended.out[-500:], ended.err[-2000:])
    line = ended.line()
    assert Path(file.replace(".tmp", "")).name.split("/")[0] in line, line
    assert "make room" in line, line
    assert_no_leftovers(parent, cache)
    Path(folder or parent, "filler").unlink(missing_ok=True)
    bench.finish(name, parent)


@pytest.mark.parametrize("kind", FULL)
def test_a_file_too_large_for_its_limit(kind, bench, tmp_path, record_property):
    """As `ulimit -f`: any file may end up too large, wherever the tests run."""
    starve(bench, kind, tmp_path / "x", tmp_path / "cache", "")
    record_property("faults", 1)


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory):
    """A file system of 24 MB."""
    folder = tmp_path_factory.mktemp("disk")
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()[:80]}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("kind", FULL)
def test_a_full_disk(kind, bench, small_disk, record_property):
    """A file system without a free byte."""
    for old in small_disk.iterdir():
        if old.is_dir():
            shutil.rmtree(old)
    starve(bench, kind, small_disk / "x", small_disk / "cache", str(small_disk))
    record_property("faults", 1)


# ---- two at once

TOGETHER = ("sft", "dpo_gamma", "generate", "dpl train", "dpl synthetic", "ranking_accuracy")
TOGETHER = (*TOGETHER, "twisted_smc", "imh generate", "imh score", "imh exact", "imh all")


@pytest.mark.parametrize("name", TOGETHER)
def test_two_at_once(name, bench, tmp_path, record_property):
    """Two fresh runs in one folder at the same instant: one goes on, the other says so."""
    bench.undisturbed(name)
    bench.begin(name, tmp_path)
    ended = [run.wait() for run in [bench.start(name, tmp_path) for _ in range(2)]]
    codes = sorted(one.code for one in ended)
    assert codes == [0, 1], [one.err[-1000:] for one in ended]
    (refused,) = [one for one in ended if one.code]
    assert "in use by another run" in refused.line()
    folder, _ = bench.undisturbed(name)
    assert_same_files(folder, tmp_path)
    record_property("faults", 1)


WAIT = """
import os, time
hold = common.append_line
def append_line(*arguments):
    hold(*arguments)
    while not os.path.exists(%r):
        time.sleep(0.01)
common.append_line = append_line
"""


@pytest.mark.parametrize("more", [{}, {"resume": True}, {"overwrite": True}])
def test_beside_a_living_run(more, bench, tmp_path, record_property):
    """Whatever its flags, a second run leaves the first one alone."""
    bench.undisturbed("dpo")
    go = tmp_path / "go"
    living = bench.start("dpo", tmp_path / "x", before=WAIT % str(go))
    metrics = tmp_path / "x" / "run" / "metrics.jsonl"
    while not metrics.exists():
        time.sleep(0.02)
    refused = bench.run("dpo", tmp_path / "x", more=more)
    assert refused.code == 1 and "in use by another run" in refused.line()
    go.write_text("")
    assert living.wait().code == 0
    folder, _ = bench.undisturbed("dpo")
    assert_same_files(folder, tmp_path / "x")
    record_property("faults", 1)


# ---- damage


def flip(path, share=0.5):
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[int(share * len(data))] ^= 1
    path.write_bytes(data)


def damage(folder, how):
    """Damage a checkpoint."""
    shard = next(folder.glob("*.distcp"))
    if how == "flip":
        flip(shard)
    elif how == "truncate":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif how == "no shard":
        shard.unlink()
    else:
        (folder / "COMPLETE.json").unlink()


def unfinished(bench, folder):
    """A copy of the undisturbed DPO run without its model: it is not finished."""
    whole, _ = bench.undisturbed("dpo")
    shutil.copytree(whole, folder, dirs_exist_ok=True)
    shutil.rmtree(folder / "run" / "model")
    return folder / "run"


@pytest.mark.parametrize("how", ["flip", "truncate", "no shard", "no manifest"])
def test_damaged_checkpoint_is_named_and_skipped(how, bench, tmp_path, record_property):
    out = unfinished(bench, tmp_path)
    newest, _ = sorted(out.glob("step-*"), key=lambda path: -int(path.name[5:]))[:2]
    damage(newest, how)
    ended = bench.finish("dpo", tmp_path)
    assert f"skip {newest.name}: damaged" in ended.out
    record_property("faults", 1)


def test_all_checkpoints_damaged_never_starts_afresh(bench, tmp_path, record_property):
    out = unfinished(bench, tmp_path)
    for folder in out.glob("step-*"):
        damage(folder, "flip")
    before = (out / "metrics.jsonl").read_bytes()
    ended = bench.run("dpo", tmp_path, goes_on=True)
    assert ended.code == 1 and "no checkpoint is undamaged" in ended.line()
    assert (out / "metrics.jsonl").read_bytes() == before
    record_property("faults", 1)


def test_damaged_reference_cache_is_scored_again(bench, tmp_path, record_property):
    """A flipped bit, a cut file: the line says it, and the run is that of an intact cache."""
    bench.undisturbed("dpo")
    for number, how in enumerate(("flip", "cut")):
        cache = tmp_path / str(number)
        shutil.copytree(bench.cache, cache)
        for path in (cache / "reference").glob("*.logps"):
            if how == "flip":
                flip(path)
            else:
                path.write_bytes(path.read_bytes()[:-3])
        parent = tmp_path / how
        bench.begin("dpo", parent)
        ended = bench.run("dpo", parent, cache=str(cache))
        assert ended.code == 0 and ended.out.count("damaged, so the reference scores") == 2
        folder, _ = bench.undisturbed("dpo")
        assert_same_files(folder, parent)
        record_property("faults", 1)


SMALL_WORLD = """
def build(folder):
    for part in ("data", "model"):
        (folder / part).mkdir(parents=True)
        (folder / part / "x").write_text("0123456789" * 100)
        common.write(folder / part / "COMPLETE.json", {"sha256": common._hashes(folder / part)})
common.build_tiny = build
module.main = lambda args: print(common.tiny_folder())
"""


@pytest.mark.parametrize("how", ["flip", "cut", "lost", "manifest"])
def test_damaged_tiny_world_is_built_again(how, bench, tmp_path, record_property):
    """The world itself takes a minute: a small one stands for it."""
    options = dict(model="x")
    faults = dict(before=SMALL_WORLD, cache=str(tmp_path))
    assert "training" in bench.launcher.run("dpo", options, **faults).out
    again = bench.launcher.run("dpo", options, **faults).out
    assert "training" not in again
    folder = Path(again.strip())
    if how == "flip":
        flip(folder / "data" / "x")
    elif how == "cut":
        (folder / "model" / "x").write_text("0123456789")
    elif how == "lost":
        (folder / "model" / "x").unlink()
    else:
        flip(folder / "data" / "COMPLETE.json", share=0.3)
    rebuilt = bench.launcher.run("dpo", options, **faults)
    assert "damaged, so it is built again" in rebuilt.out and rebuilt.code == 0
    assert (folder / "model" / "x").stat().st_size == 1000
    assert "training" not in bench.launcher.run("dpo", options, **faults).out
    record_property("faults", 1)


def test_a_tiny_world_that_finds_no_room(bench, tmp_path, record_property):
    for file in ("lock", "data/x", "model/COMPLETE.json"):
        full = dict(watch=[str(tmp_path)], full_at=(file, 1, ""))
        ended = bench.launcher.run(
            "dpo", dict(model="x"), before=SMALL_WORLD, cache=str(tmp_path), **full
        )
        assert ended.code == 1 and "make room" in ended.line()
        assert_no_leftovers(tmp_path)
        record_property("faults", 1)


DAMAGES = 12


@pytest.mark.parametrize(
    "name, files, remedy",
    [
        ("generate", "run/parts/*.jsonl", "drawn again"),
        ("ranking_accuracy", "run/records-*.jsonl", "delete"),
        ("imh generate", "run/samples/*/*.json", "made again"),
        ("imh score", "run/samples/*/*.json", "delete the file"),
        ("imh imh", "run/scores/*/*.json", "score it again"),
        ("twisted_smc", "run/exact_samples.pt", "delete it"),
    ],
)
def test_damaged_parts_are_made_again_or_refused(
    name, files, remedy, bench, tmp_path, record_property
):
    """A byte changed or bytes cut off, anywhere: made again with a line, or refused with one."""
    rng = random.Random(name)
    bench.undisturbed(name)
    seen = {"goes on": 0, "refused": 0}
    whole = tmp_path / "whole"
    bench.begin(name, whole)
    if name == "generate":  # its parts are there until it ends
        _, ended = bench.undisturbed(name)
        first = min(i for i, event in enumerate(ended.events) if "responses.jsonl" in event)
        bench.run(name, whole, kill_at=first + 1)
    else:
        ended = bench.run(name, whole)
    for number in range(DAMAGES):
        parent = tmp_path / str(number)
        shutil.copytree(whole, parent)
        path = rng.choice(sorted(parent.glob(files)))
        data = bytearray(path.read_bytes())
        if rng.random() < 0.3:
            data = data[: rng.randrange(1, len(data))]
        else:
            place = rng.randrange(len(data))
            data[place] = rng.choice([byte for byte in range(256) if byte != data[place]])
        path.write_bytes(data)
        ended = bench.run(name, parent, goes_on=True)
        if ended.code == 1:
            assert path.name in ended.line() and remedy in ended.line(), ended.line()
            seen["refused"] += 1
            continue
        assert ended.code == 0, ended.err[-2000:]
        folder, _ = bench.undisturbed(name)
        if name == "generate":
            assert remedy in ended.out
        if name == "imh generate":  # a checksum that has another name now is none, and no harm
            intact = path.read_bytes() == (whole / path.relative_to(parent)).read_bytes()
            assert intact == (remedy in ended.out)
        seen["goes on"] += 1
        if path.exists():  # then it may still be damaged, but harmlessly
            shutil.copy(whole / path.relative_to(parent), path)
        assert_same_files(folder, parent)
    record_property("faults", DAMAGES)
    print(name, seen)


# ---- a judge, or a model, that fails half-way


def test_a_failing_judge_command_keeps_the_responses(bench, tmp_path, record_property):
    """The line says how to go on; --resume judges what was sampled, and samples nothing again."""
    for number, command in enumerate(("exit 3", "echo A", "yes C | head -n 20")):
        parent = tmp_path / str(number)
        bench.begin("generate", parent)
        failed = bench.run("generate", parent, more={"judge_command": command})
        assert failed.code == 1 and "--resume judges them" in failed.line()
        responses = parent / "run" / "responses.jsonl"
        before = responses.read_bytes()
        goes_on = {"judge_command": "sed s/.*/tie/", "resume": True}
        ended = bench.run("generate", parent, more=goes_on)
        assert ended.code == 0 and responses.read_bytes() == before
        judged = (parent / "run" / "judged.jsonl").read_text().splitlines()
        assert [json.loads(line)["outcome"] for line in judged] == [0] * 20
        assert not [event for event in ended.events if "parts" in event]
        record_property("faults", 1)


FAIL = """
calls = []
score = module.score_batch
def score_batch(model, batch):
    calls.append(0)
    if len(calls) == %d:
        raise RuntimeError("out of memory")
    return score(model, batch)
module.score_batch = score_batch
"""


@pytest.mark.parametrize("at", [1, 2, 7])
def test_a_failure_half_way_keeps_what_is_scored(at, bench, tmp_path, record_property):
    """Of two models: all micro-batches up to the one that fails are in the records."""
    name = "ranking_accuracy"
    before = FAIL % at
    failed = bench.run(name, tmp_path, before=before)
    assert failed.code == 1
    line = failed.line()
    assert "out of memory" in line and "--resume goes on" in line
    lines = 0
    for path in (tmp_path / "run").glob("records-*.jsonl"):
        lines += len(path.read_text().splitlines())
    assert (lines > 0) == (at > 1)
    bench.finish(name, tmp_path)
    record_property("faults", 1)


# ---- what the runs of DPO hold to


def test_resume_of_a_finished_run_changes_nothing(bench):
    folder, _ = bench.undisturbed("dpo")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    ended = bench.run("dpo", folder, goes_on=True)
    assert ended.code == 0 and "finished" in ended.out
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert after == before


@pytest.mark.parametrize(
    "more, message",
    [
        ({}, "--resume goes on, --overwrite deletes it"),
        ({"resume": True, "beta": 0.3}, "beta 0.1 -> 0.3"),
    ],
)
def test_runs_are_not_mixed(more, message, bench):
    folder, _ = bench.undisturbed("dpo")
    before = (folder / "run" / "metrics.jsonl").read_bytes()
    ended = bench.run("dpo", folder, more=more)
    assert ended.code == 1 and message in ended.line()
    assert (folder / "run" / "metrics.jsonl").read_bytes() == before


def test_not_finite_stops_before_the_update(blank, tmp_path, monkeypatch):
    calls = []
    loss = dpo.dpo_loss
    monkeypatch.setattr(
        dpo,
        "dpo_loss",
        lambda *a: calls.append(0) or loss(*a) * (float("nan") if len(calls) > 9 else 1),
    )
    with pytest.raises(
        SystemExit, match=r"step \d+: the gradient is not finite, .* rows \[\d+.*step-8"
    ):
        dpo.main(
            args(
                blank,
                tmp_path / "run",
                save_every=16,
                max_steps=12,
                eval_every=10**6,
                tokens_per_microbatch=10**4,
            )
        )
    assert not (tmp_path / "run" / "model").exists()


def test_nan_on_one_rank_stops_both(blank, tmp_path):
    code = (
        "import sys; sys.path[:0] = ['.', 'methods']\n"
        "import dpo, torch.distributed as dist; loss = dpo.dpo_loss\n"
        "dpo.dpo_loss = lambda *a: loss(*a) * (float('nan') if dist.get_rank() == 1 else 1)\n"
        f"dpo.main(dpo.Args(model={str(blank / 'model')!r}, data={str(blank / 'pairs.jsonl')!r}, "
        f"out={str(tmp_path / 'run')!r}, batch_size=8, max_steps=3, eval_pairs=2))"
    )
    (tmp_path / "script.py").write_text(code)
    done = run(tmp_path / "script.py", processes=2, check=False, PYTHONPATH=str(ROOT))
    assert done.returncode != 0 and "the gradient is not finite" in done.stderr
    assert not list((tmp_path / "run").glob("model"))
