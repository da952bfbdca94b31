"""studies/compare_preferences.py: its claim, its win rates, and what stands for an evaluation."""

import math
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import ROOT

sys.path.append(str(ROOT / "studies"))
import compare_preferences as study  # noqa: E402
import summary  # noqa: E402


def test_the_claim_follows_the_runs():
    rng = np.random.default_rng(0)
    accuracy = rng.random(15)
    noise = rng.random(15) / 10
    for win_rate, words in (
        (accuracy + noise, "holds"),
        (noise - accuracy, "does not hold"),
        (rng.random(15), "too few to tell"),
    ):
        paper, shown = study.claim(accuracy, win_rate)
        assert "Fig. 4" in paper and shown.startswith(f"{words}: in the tiny world")
        oracle = scipy.stats.pearsonr(accuracy, win_rate)
        low, high = oracle.confidence_interval()
        assert shown.endswith(f"({oracle.statistic:+.2f} [{low:+.2f}, {high:+.2f}])")

    # Three runs, or runs that are all the same.
    assert study.claim(accuracy[:3], accuracy[:3] ** 2)[1].startswith("too few to tell")
    assert study.claim(np.ones(15), accuracy)[1].startswith("too few to tell")


def test_a_tie_is_half_a_win():
    base = np.array([1.0, 2.0, 3.0, 4.0])
    assert study.win_rates(base, base) == 0.5
    both = np.array([base + 1, [0.0, 3.0, 3.0, 5.0]])
    assert study.win_rates(both, base).tolist() == [1.0, (0 + 1 + 0.5 + 1) / 4]


def test_a_watch_evaluates_as_the_method_does(monkeypatch):
    rows = [{"reward": 1.0}, {"reward": -2.0}]
    monkeypatch.setattr(study, "sample", lambda model, tokenizer, rows, copies, seed: rows)
    calls = []
    watch = study.Watch(lambda *arguments: calls.append(arguments) or "found", rows, None, 0)
    assert watch("model", 1, 2) == "found" and calls == [("model", 1, 2)]
    assert watch.rewards == [[1.0, -2.0]]


def test_every_method_has_a_module():
    for name in study.METHODS:
        module, options = study.module_and_options(name)
        assert module.Args(**options).beta == float(re.search(r"beta (\S+)", name)[1])
    with pytest.raises(ValueError, match="unknown method"):
        study.module_and_options("SFT")
    assert math.isnan(study.correlation([1, 1], [1, 2]))


def test_the_summary_has_every_claim_and_figure(tmp_path, capsys):
    claims = {"dpo": "holds", "sweep/gamma-0": "does not hold"}
    for name, verdict in claims.items():
        folder = tmp_path / name
        (folder / "figures").mkdir(parents=True)
        (folder / "figures" / "a.png").write_bytes(b"")
        shown = f"{verdict}: on x < y it works (0.6 [0.5, 0.7] of 9)"
        (folder / "claim.txt").write_text(f"paper: P\nhere:  {shown}\n")
        (folder / "log.txt").write_text("a table\n12 s\n")
    (tmp_path / "claim.txt").write_text("no claim")
    summary.main(summary.Args(str(tmp_path)))
    rows = [line for line in capsys.readouterr().out.splitlines() if "0.6 [0.5, 0.7] of 9" in line]
    assert [row.split("  ")[0] for row in rows] == list(claims)
    assert all(row.endswith(" 12 s") and claims[row.split("  ")[0]] in row for row in rows)
    page = (tmp_path / "index.html").read_text()
    for name in claims:
        assert f"<img src='{name}/figures/a.png' alt='on x &lt; y it works (0.6" in page
    with pytest.raises(SystemExit, match="no finished runs; bash run_all.sh makes them"):
        summary.main(summary.Args(str(tmp_path / "dpo" / "figures")))


def test_run_all_goes_on_where_it_was_stopped(tmp_path):
    """With a python that notes what it is to run, and fails for one method the first time."""
    shutil.copy(ROOT / "run_all.sh", tmp_path)
    stub = tmp_path / "python"
    stub.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/notes\necho "here:  holds: x (1)"\n')
    stub.write_text(stub.read_text() + f'case "$1" in */dpo.py) [ -f {tmp_path}/ok ];; esac\n')
    stub.chmod(0o755)

    def run_all(*names):
        (tmp_path / "notes").write_text("")
        done = subprocess.run(
            ["bash", str(tmp_path / "run_all.sh"), *names],
            env={**os.environ, "PYTHON": str(stub)},
            capture_output=True,
            text=True,
        )
        ran = re.findall(r"^methods/(\w+)\.py", (tmp_path / "notes").read_text(), re.M)
        return done, sorted(ran)

    # The first time DPO fails, and generate, which needs it, is not begun; then these are run.
    done, ran = run_all()
    assert done.returncode == 1 and "dpo: FAILED, results/dpo.log" in done.stdout
    others = ["cal_dpo", "dpl", "dpo_gamma", "imh_adaptors", "ranking_accuracy", "sft"]
    assert ran == sorted(["dpo", "twisted_smc", *others])
    (tmp_path / "ok").touch()
    done, ran = run_all()
    assert done.returncode == 0 and "dpl: done before" in done.stdout
    assert ran == ["dpo", "generate"]
    assert re.search(r"^dpo: \d+ s; holds: x \(1\)$", done.stdout, re.M)
    assert len(done.stdout.splitlines()) < 48  # two screens

    # Some, again; and none that is not there.
    assert run_all("dpl", "sft")[1] == ["dpl", "sft"]
    done, ran = run_all("sgd")
    assert done.returncode == 1 and ran == [] and done.stdout.startswith("no sgd: choose from dpl")


def test_study_draws_where_the_model_is(monkeypatch):
    """The uniforms lie on the model's device: here one that holds no numbers."""
    devices = []

    def drawn(model, prompts, uniforms, *_):
        devices.append(uniforms.device.type)
        return [[5] for _ in prompts]

    monkeypatch.setattr(study, "respond", drawn)
    tokenizer = study.load_tokenizer("tiny")
    rows = [{"prompt": "\n\nHuman: Hi.\n\nAssistant:", "prompt_ids": [5, 6]}]
    monkeypatch.setattr(study, "tiny_reward", lambda prompt, text: 0.0)
    model = SimpleNamespace(device=torch.device("meta"))
    study.sample(model, tokenizer, rows, copies=2, seed=0)
    assert devices == ["meta"]
