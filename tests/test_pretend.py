"""The tests of a GPU, where there is none: on the two of pretend.py."""

import os
import subprocess
import sys

import pytest
import torch.utils.backend_registration
from conftest import ROOT

FILES = ("test_pretend_rules", "test_cuda", "test_cuda_sampling", "test_cuda_commands")
# What takes long there, and is like another test.
LEFT_OUT = "law or 50304 or resumed or (gpus and float32)"
LEFT_OUT += " or (twenty and not float32-dpl and not bfloat16-dpo)"


@pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no devices written in Python",
)
@pytest.mark.parametrize("file", FILES)
def test_on_a_pretended_gpu(file):
    command = [sys.executable, "tests/pretend.py", "-m", "pytest", "-n", "0", f"tests/{file}.py"]
    environment = {**os.environ, "PRETEND_GPU": "2"}
    environment.pop("CUDA_VISIBLE_DEVICES", None)  # by which conftest.py hides what is there
    for name in list(environment):
        if name.startswith("PYTEST_"):
            del environment[name]  # of the workers that run this test
    done = subprocess.run(
        [*command, "-k", f"not ({LEFT_OUT})"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout.splitlines()[-1] or file != "test_pretend_rules"
