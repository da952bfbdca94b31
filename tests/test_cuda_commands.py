"""Commands on a GPU: they run to their ends without a warning, and write what they should.

`python -m pytest -n 0 tests/test_cuda_commands.py`.  What they compute is compared with the CPU in
test_cuda.py and test_cuda_sampling.py.
"""

import pytest
import torch
from conftest import run
from test_cuda import HIDDEN, train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here, or hidden")

OWN = """
def short(prompts, responses):
    return [-len(response) for response in responses]
short.log_bound = 0
"""
DPL = ("--batch-size", 8, "--max-steps", 2, "--data", "{pairs}")
SMC = ("--model", "{model}", "--prompt", "Once", "--T", 4, "--K", 6, "--bound-K", 2, 5)
SMC += ("--runs", 3, "--max-steps", 2, "--eval-every", 2, "--exact", 3)
SHORT = ("--potential", "{own}:short")
COMMANDS = {
    "sft": ("sft", "--model", "{model}", "--data", "{pairs}", "--max-steps", 2),
    "dpo_gamma": ("dpo_gamma", "--model", "{model}", "--data", "{pairs}", "--gamma", 0.5, 1.5)
    + ("--max-steps", 2, "--batch-size", 8),
    "ranking": ("ranking_accuracy", "--model", "{model}", "--data", "{pairs}"),
    "generate": ("generate", "--model", "{model}", "--data", "{pairs}", "--judge", "{own}:short")
    + ("--top-p", 0.9, "--max-new-tokens", 6),
    "imh": ("imh_adaptors", "--model", "{model}", "--ref-model", "{model}", "--data", "{pairs}")
    + ("--reward", "{own}:short", "--prompts", 3, "--samples", 4, "--max-length", 60)
    + ("--sampling-types", "ancestral_strict", "top_p090", "--temperatures", 1.0)
    + ("--chain-length", 200, "--burn-in", 9, "--corpus-size", 20),
    "ctl": ("twisted_smc", *SMC, *SHORT, "--learner", "ctl"),
    "rl with a body": ("twisted_smc", *SMC, *SHORT, "--learner", "rl", "--twist", "body"),
    "ppo with a body": ("twisted_smc", *SMC, *SHORT, "--learner", "ppo", "--twist", "body"),
    "infilling": ("twisted_smc", *SMC, "--potential", "infilling", "--c", 2, "--learner", "dpg"),
    "policy": ("twisted_smc", *SMC, *SHORT, "--learner", "policy", "--policy", "{model}"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command(name, blank, tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    places = dict(own=tmp_path / "own.py", model=blank / "model", pairs=blank / "pairs.jsonl")
    method, *flags = (str(word).format(**places) for word in COMMANDS[name])
    done = run(f"methods/{method}.py", *flags, "--out", tmp_path / "run")
    assert done.stderr == ""
    assert "\nhere:  " in done.stdout and any((tmp_path / "run").iterdir())


def test_a_reward_model(blank, tmp_path):
    """It is trained, evaluated, and asked for scores."""
    inputs = ("--data", blank / "pairs.jsonl")
    reward = tmp_path / "reward"
    train("dpl", blank, reward, "--max-steps", 2)
    asked = ("--checkpoints", reward, *inputs, "--out")
    for command in ("evaluate", "score"):
        done = run("methods/dpl.py", command, *asked, tmp_path / command)
        assert done.stderr == "" and (tmp_path / command).exists()


def test_a_trained_twist_is_sampled(blank, tmp_path):
    places = dict(model=blank / "model", own=tmp_path / "own.py")
    (tmp_path / "own.py").write_text(OWN)
    flags = [str(word).format(**places) for word in (*SMC, *SHORT)]
    run("methods/twisted_smc.py", *flags, "--learner", "ctl", "--out", tmp_path / "run")
    done = run("methods/twisted_smc.py", "sample", tmp_path / "run", "--runs", 3)
    assert done.stderr == "" and "samples.jsonl" in done.stdout


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU here, or none")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_gpus(dtype, blank, tmp_path):
    """FSDP2 against one process of the CPU in fp32, over twenty steps."""
    expected = train("dpo", blank, tmp_path / "cpu", **HIDDEN)
    found = train("dpo", blank, tmp_path / "gpus", "--dtype", dtype, processes=2)
    bound = 1e-3 if dtype == "float32" else 5e-2
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=bound, abs=bound)
