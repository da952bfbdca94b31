"""The benchmark of a card, run without one: every row comes out, and the FLOPs are right."""

import re
import sys

import pytest
import torch
from conftest import ROOT, run
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(ROOT / "tests"))
import benchmark
import benchmark_cuda


def test_every_row_of_a_card_comes_out():
    """On a CPU, with the smallest shape: losses of both sides agree; bf16 weights, so fp32 sums."""
    command = ["--device", "cpu", "--shapes", "mini", "--rounds", "1"]
    printed = run("tests/benchmark.py", *command).stdout
    assert "a CPU: nothing is measured" in printed
    found = re.findall(r"^(\w+) +mini", printed, re.M)
    assert found == ["dpo_step", "score", "smc", "generate", "generate"], printed
    (difference,) = re.findall(r"losses differ by (\S+)", printed)
    assert float(difference) < 1e-4


def test_a_card_that_is_not_there_is_one_line():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = run("tests/benchmark.py", "--device", "cuda", check=False)
    assert done.returncode == 1 and done.stderr.strip() == "--device cuda: no card is seen here"


def test_useful_flops_are_those_of_the_library():
    """Counted by torch for a token of the body, and for a row of the output matrix."""
    model = benchmark.GPTNeoXForCausalLM(
        benchmark.pythia_config("mini", attn_implementation="eager")
    )
    ids = torch.tensor([[5]])

    def counted(function):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            function(ids)
        return counter.get_total_flops()

    # Older releases of the library make the angles of a position as a product of matrices.
    angles = 2 * len(model.base_model.rotary_emb.inv_freq)
    rows = [dict(prompt_ids=[5], responses=[])]
    one = benchmark_cuda.useful_flops("mini", rows)
    assert counted(model.base_model) - one in (0, angles)

    # A response of two tokens after the prompt of one attends to 2 + 3 keys, the prompt to 1.
    rows = [dict(prompt_ids=[5], responses=[[6, 7]])]
    head = counted(model) - counted(model.base_model)
    attention = 4 * 2 * 16  # of one query and key, in two layers of width 16
    body = one - attention
    assert benchmark_cuda.useful_flops("mini", rows) == 3 * body + 6 * attention + 2 * head
