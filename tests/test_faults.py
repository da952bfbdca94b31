"""Kill, damage, fill the disk, feed it nonsense: nothing is lost, nothing half-written, one line
says what to do.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import dpo
import pytest
import torch
from conftest import ROOT, records, run
from safetensors.torch import load_file
from test_dpo import args

FLAGS = (
    "--batch-size",
    8,
    "--lr",
    1e-3,
    "--warmup-steps",
    0,
    "--max-steps",
    40,
    "--eval-every",
    80,
    "--eval-pairs",
    2,
    "--save-every",
    24,
)


def command(blank, out, *more):
    return [
        "methods/dpo.py",
        "--model",
        blank / "model",
        "--data",
        blank / "pairs.jsonl",
        "--out",
        out,
        *FLAGS,
        *more,
    ]


@pytest.fixture(scope="module")
def whole(blank, tmp_path_factory):
    """An uninterrupted run with checkpoints."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run(*command(blank, out))
    return out


def assert_same_run(a, b):
    """Bit for bit: the exported weights, and every logged number that is not a time or a memory."""
    weights = [load_file(out / "model" / "model.safetensors") for out in (a, b)]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    timeless = [
        [{k: v for k, v in r.items() if not k.endswith(("_per_s", "_GiB"))} for r in records(out)]
        for out in (a, b)
    ]
    assert timeless[0] == timeless[1]


def test_kill_nine_and_resume_bit_for_bit(blank, whole, tmp_path):
    out, rng, kills = tmp_path / "run", random.Random(1), 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    while not (out / "model").exists() and kills < 30:
        flags = ["--resume"] if (out / "config.json").exists() else []
        process = subprocess.Popen(
            [sys.executable, *map(str, command(blank, out, *flags))],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        seen, limit = 0, rng.randint(5, 20)
        for line in (
            process.stdout
        ):  # kill after a few steps, wherever that is: also in the middle of a save
            seen += line.startswith("step ")
            if seen > limit:
                time.sleep(rng.random() / 10)
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
        process.communicate()
    assert kills >= 2
    assert_same_run(whole, out)
    assert not list(out.glob("*.tmp"))


def test_sigterm_saves_and_leaves(blank, whole, tmp_path):
    out = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, *map(str, command(blank, out))],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    for line in process.stdout:
        if line.startswith("step     10"):
            process.send_signal(signal.SIGTERM)
            break
    process.communicate()
    assert process.returncode == 143
    saved = max(int(p.name[5:]) for p in out.glob("step-*"))
    assert saved >= 11 and [r["step"] for r in records(out) if "loss" in r] == list(range(saved))
    run(*command(blank, out, "--resume"))
    assert_same_run(whole, out)


def damage(folder, how):
    shard = next(folder.glob("*.distcp"))
    if how == "flip":
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
    elif how == "truncate":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif how == "no shard":
        shard.unlink()
    else:
        (folder / "COMPLETE.json").unlink()


@pytest.mark.parametrize("how", ["flip", "truncate", "no shard", "no manifest"])
def test_damaged_checkpoint_is_named_and_skipped(blank, whole, tmp_path, how):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "model")
    newest, older = sorted(out.glob("step-*"), key=lambda p: -int(p.name[5:]))[:2]
    damage(newest, how)
    done = run(*command(blank, out, "--resume"))
    assert f"skip {newest.name}: damaged" in done.stdout
    assert_same_run(whole, out)


def test_all_checkpoints_damaged_never_starts_afresh(blank, whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "model")
    for folder in out.glob("step-*"):
        damage(folder, "flip")
    before = (out / "metrics.jsonl").read_bytes()
    done = run(*command(blank, out, "--resume"), check=False)
    assert done.returncode == 1 and "no checkpoint is undamaged" in done.stderr
    assert (out / "metrics.jsonl").read_bytes() == before


def test_resume_of_a_finished_run_changes_nothing(blank, whole):
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.is_file()}
    done = run(*command(blank, whole, "--resume"))
    assert "finished" in done.stdout
    assert {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    "more, message",
    [
        ([], "--resume goes on, --overwrite deletes it"),
        (["--resume", "--beta", "0.3"], "beta 0.1 -> 0.3"),
    ],
)
def test_runs_are_not_mixed(blank, whole, more, message):
    before = (whole / "metrics.jsonl").read_bytes()
    done = run(*command(blank, whole, *more), check=False)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
    assert (whole / "metrics.jsonl").read_bytes() == before


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


def test_disk_full_while_saving(blank, tmp_path):
    # a file where the checkpoint's temporary folder must go stands for a disk that does not take it
    out = tmp_path / "run"
    code = (
        "import sys, pathlib; sys.path[:0] = ['.', 'methods']\n"
        "import dpo, common; save = common.save_checkpoint\n"
        "def full(out, step, *a, **k):\n    if step == 6: (out / 'step-6.tmp').write_text('')\n"
        "    return save(out, step, *a, **k)\n"
        "dpo.save_checkpoint = full\n"
        f"dpo.main(dpo.Args(model={str(blank / 'model')!r}, data={str(blank / 'pairs.jsonl')!r}, "
        f"out={str(out)!r}, batch_size=8, max_steps=12, save_every=24, eval_pairs=2))"
    )
    done = run("-c", code, check=False)
    assert done.returncode == 1 and "step-6" in done.stderr and "Traceback" not in done.stderr
    assert json.loads((out / "step-3" / "COMPLETE.json").read_text())["step"] == 3


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
