"""studies/compare_preferences.py: its claim, its win rates, and what stands for an evaluation."""

import math
import re
import sys

import numpy as np
import pytest
import scipy.stats
from conftest import ROOT

sys.path.append(str(ROOT / "studies"))
import compare_preferences as study  # noqa: E402


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
