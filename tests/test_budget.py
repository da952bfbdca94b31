"""No result depends on the memory knob or on the number of processes: every training method, three
budgets of tokens, one process and two.  Losses agree to a relative 1e-5 and weights to 1e-5: sums
in fp32, taken in another order.
"""

import json
import math

import pytest
from conftest import ROOT, records, run
from safetensors.torch import load_file

import common

# name: module, class of arguments, options
RUNS = {
    "sft": ("sft", dict(eval_examples=8)),
    "dpo": ("dpo", dict(eval_pairs=8)),
    "cal_dpo": ("cal_dpo", dict(eval_pairs=8)),
    "dpo_gamma": ("dpo_gamma", dict(eval_pairs=8, gamma=(0.5,))),
    "dpl base": ("dpl", dict(type="base", eval_pairs=8)),
    "dpl mean and variance": ("dpl", dict(type="mean_and_variance", eval_pairs=8)),
    "dpl categorical": ("dpl", dict(type="categorical", entropy="batch", eval_pairs=8)),
}
BUDGETS = (200, 700, 10**5)

SCRIPT = """
import json, sys
sys.path[:0] = [".", "methods"]
import importlib
for name, module, options in json.loads(sys.argv[1]):
    method = importlib.import_module(module)
    if "gamma" in options:
        options["gamma"] = tuple(options["gamma"])
    method.main(method.Args(**options))
"""


def options_of(name, blank, out, budget):
    """The options of a run of four steps."""
    _, own = RUNS[name]
    shared = dict(
        model=str(blank / "model"),
        data=str(blank / "pairs.jsonl"),
        out=str(out),
        lr=5e-5,  # RMSprop makes steps of rounding errors where a gradient is zero
        batch_size=8,
        tokens_per_microbatch=budget,
    )
    if name.startswith("dpl"):
        return {**shared, **own, "max_steps": 4}
    return {**shared, **own, "max_steps": 4, "warmup_steps": 0, "eval_every": 16}


def one_process(names, blank, folder, budget, processes=0):
    """Run the methods one after the other in one launch."""
    jobs = []
    for name in names:
        module, _ = RUNS[name]
        out = folder / f"{name}-{budget}-{processes}"
        jobs.append((name, module, options_of(name, blank, out, budget)))
    script = folder / "script.py"
    script.write_text(SCRIPT)
    run(script, json.dumps(jobs), processes=processes, PYTHONPATH=str(ROOT), timeout=600)


@pytest.fixture(scope="module")
def runs(blank, tmp_path_factory):
    """The folder of all runs."""
    folder = tmp_path_factory.mktemp("budget")
    for budget in BUDGETS:
        one_process(RUNS, blank, folder, budget)
    one_process(RUNS, blank, folder, BUDGETS[0], processes=2)
    return folder


def weights_and_losses(out):
    """What a run ends with."""
    if not (out / "model").is_dir():  # of a sweep, its only run
        (out,) = [path for path in out.iterdir() if path.is_dir() and path.name != "figures"]
    losses = []
    for record in records(out):
        for key in ("loss", "eval_loss"):
            if key in record:
                losses.append(record[key])
    return load_file(out / "model" / "model.safetensors"), losses


@pytest.mark.parametrize("name", RUNS)
def test_budget_and_processes_change_nothing(name, runs):
    wanted, wanted_losses = weights_and_losses(runs / f"{name}-{BUDGETS[-1]}-0")
    assert len(wanted_losses) >= 5 and all(map(math.isfinite, wanted_losses))
    others = [f"{name}-{budget}-0" for budget in BUDGETS[:-1]]
    for other in (*others, f"{name}-{BUDGETS[0]}-2"):
        found, losses = weights_and_losses(runs / other)
        assert losses == pytest.approx(wanted_losses, rel=1e-5, abs=1e-5)
        for key, value in wanted.items():
            assert (found[key] - value).abs().max().item() <= 1e-5, (other, key)


def test_the_budgets_differ(blank):
    """The smallest budget makes several micro-batches of a step, the largest one."""
    rows = common.load_pairs(str(blank / "pairs.jsonl"), "train")
    tokenizer = common.load_tokenizer(str(blank / "model"))
    batch = common.tokenize_pairs(rows[:8], tokenizer, what=None)
    numbers = [len(common.pack_pairs(batch, budget, 0, 1)) for budget in BUDGETS]
    assert numbers[0] >= 3 and numbers[-1] == 1
