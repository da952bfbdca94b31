"""A method beside common.py in an empty folder, changed as README says, and run there.

The changes are read from README's blocks of lines that go (-) and come (+).
"""

import importlib.util
import json
import re
import shutil

import pytest
import torch
from conftest import ROOT, records, run_all
from transformers import AutoModelForCausalLM
from transformers.generation.logits_process import EpsilonLogitsWarper


def changes(text):
    """The blocks of changes of a page: {file: [(old text, new text), ...]}"""
    found = {}
    for name, body in re.findall(r"^```diff\n--- (\S+)\n(.*?)^```$", text, re.M | re.S):
        hunks = []
        for hunk in re.split(r"^@@.*\n", body, flags=re.M):
            lines = hunk.splitlines(keepends=True)
            assert all(line[0] in " +-" for line in lines), f"{name}: {lines}"
            old = "".join(line[1:] for line in lines if line[0] != "+")
            new = "".join(line[1:] for line in lines if line[0] != "-")
            hunks.append((old, new))
        found[name] = hunks
    return found


CHANGES = changes((ROOT / "README.md").read_text())


def changed(name):
    """The text of methods/<name> with README's changes, if it has any for it."""
    text = (ROOT / "methods" / name).read_text()
    for old, new in CHANGES.get(name, []):
        assert text.count(old) == 1, f"README's change of {name} has no one place for:\n{old}"
        text = text.replace(old, new)
    return text


def flags(**options):
    """Options as they are typed."""
    typed = []
    for option, value in options.items():
        values = value if isinstance(value, tuple) else (value,)
        typed += ["--" + option.replace("_", "-"), *map(str, values)]
    return typed


def commands(blank, own):
    """What is run of each changed method.  own: a file with a potential."""
    model, data = blank / "model", blank / "pairs.jsonl"
    loss = dict(beta=0.1, lr=1e-4, batch_size=39, max_steps=4, warmup_steps=0, eval_pairs=2)
    learner = dict(prompt="Once", T=2, potential=f"{own}:lower", learner="cdq", lr=3e-3)
    learner |= dict(twist="linear", K=64, max_steps=30, eval_every=30, exact=20, bound_K=(4, 8))
    adaptor = dict(sampling_types="epsilon_cutoff=0.0025", temperatures=1.0, max_length=96)
    return {
        "dpo.py": flags(model=model, data=data, **loss),
        "twisted_smc.py": flags(model=model, runs=4, **learner),
        "imh_adaptors.py": ["generate"]
        + flags(model=model, ref_model=model, data=data, prompts=2, samples=2, **adaptor),
        "dpl.py": ["synthetic", "bets", *flags(steps=20, width=8, batch_size=64)],
    }


@pytest.fixture(scope="module")
def carried(blank, tmp_path_factory):
    """Each method that README changes: changed, in a folder of its own beside common.py, and run.

    -> {file: (its folder, what the run in folder/out printed)}
    """
    own = tmp_path_factory.mktemp("potential") / "own.py"
    # phi is 1 for texts that begin with a letter of the first half or a sign, and e^-4 for others.
    own.write_text(
        "def lower(prompts, responses):\n"
        "    return [-4.0 * (response[:1] >= 'm') for response in responses]\n\n\n"
        "lower.log_bound = 0.0\n"
    )
    folders = {}
    jobs = []
    for name, command in commands(blank, own).items():
        folder = tmp_path_factory.mktemp(name.removesuffix(".py"))
        (folder / name).write_text(changed(name))
        shutil.copy(ROOT / "common.py", folder)
        folders[name] = folder
        jobs.append((folder, [name, *command, "--out", "out"]))

    # The folder is all that a method has: only torch and the other libraries are imported once.
    found = {}
    for name, done in zip(folders, run_all(jobs, tmp_path_factory.mktemp("jobs"))):
        assert done["code"] == 0, f"{name}: {done['message']} {done['traceback']} {done['stderr']}"
        found[name] = (folders[name], done["stdout"])
    return found


def module_at(path):
    """A changed file as a module, beside the one of the same name that is here."""
    spec = importlib.util.spec_from_file_location(f"carried_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_changes_four_methods():
    assert set(CHANGES) == {"dpo.py", "twisted_smc.py", "imh_adaptors.py", "dpl.py"}


def test_a_new_loss(carried):
    folder, _ = carried["dpo.py"]
    steps = [record for record in records(folder / "out") if "loss" in record]
    # The policy is the reference at first: every hinge is 1.  As long as no margin reaches 1, the
    # mean hinge is 1 less the mean margin, which is logged beside it.
    assert steps[0]["loss"] == 1
    for record in steps:
        assert record["loss"] == pytest.approx(1 - record["rewards/margins"], abs=1e-6)
    assert steps[-1]["loss"] < 0.99


def test_a_new_learner(carried):
    folder, printed = carried["twisted_smc.py"]
    assert "cdq, seed 0" in printed
    before, after = records(folder / "out" / "cdq-seed0")
    assert (before["step"], after["step"]) == (0, 30)
    assert after["kl_q_sigma"] < before["kl_q_sigma"] - 0.1


def test_a_new_adaptor(carried, blank):
    folder, _ = carried["imh_adaptors.py"]
    module = module_at(folder / "imh_adaptors.py")

    # What it keeps is what the library keeps.
    torch.manual_seed(0)
    logits = 3 * torch.randn(50, 40)
    for x in (0.01, 0.1, 0.9):
        log_q, _ = module.adapt(logits, f"epsilon_cutoff={x}")
        theirs = EpsilonLogitsWarper(x)(None, logits).log_softmax(-1)
        torch.testing.assert_close(log_q, theirs)

    # The run drew no token below the cutoff, by the library's own forward pass.
    model = AutoModelForCausalLM.from_pretrained(blank / "model", dtype=torch.float32).eval()
    drawn = 0
    for path in (folder / "out" / "samples").glob("*/*.json"):
        for row in json.loads(path.read_text()):
            ids = torch.tensor([row["prompt_ids"] + row["ids"]])
            with torch.no_grad():
                p = model(ids).logits[0].softmax(-1)
            at = torch.arange(len(row["prompt_ids"]) - 1, ids.shape[1] - 1)
            # up to rounding: the sampler's pass goes through a cache
            assert (p[at, row["ids"]] >= 0.0025 - 1e-6).all()
            assert (p[at] < 0.0024).any(1).all()  # there was something to leave out
            drawn += len(row["ids"])
    assert drawn > 20


def test_a_new_hidden_context(carried):
    folder, printed = carried["dpl.py"]
    assert "corr. Borda" in printed

    # Its Borda count by counting: pairs of 200,000 draws, in ten bins of the first alternative.
    module = module_at(folder / "dpl.py")
    generator = torch.Generator().manual_seed(0)
    sides, first_wins = module.draw_pairs("bets", 200_000, False, generator)
    first = sides[:200_000]
    bins = (10 * first[:, 0]).long()
    for i in range(10):
        wins = first_wins[bins == i, 0].double()
        expected = module.borda("bets", first[bins == i]).mean().item()
        # five standard errors of about 20,000 coins
        assert wins.mean().item() == pytest.approx(expected, abs=5 * 0.5 / 20_000**0.5)
