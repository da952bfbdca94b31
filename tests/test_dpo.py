"""DPO against published numbers, closed forms and its own special cases; then the whole run."""

import json
import math
import subprocess
import sys

import dpo
import pytest
import released
import scipy.stats
import torch
from conftest import ROOT, records, run
from dpo import Args, dpo_loss

import common
from common import HeadLogps, pair_metrics

# Eight pairs: log-probs of chosen and rejected under the policy, then under the reference, and
# beta; with the loss and its derivative by the chosen log-prob for label smoothing 0 and 0.1, from
# the released implementation in float64.
TABLE = [
    (-10, -12, -10, -12, 0.1, 0.6931471806, -0.05, 0.6931471806, -0.04),
    (-45.5, -60.25, -50, -55, 0.1, 0.3200469003, -0.02738850187, 0.4175469003, -0.01738850187),
    (-52, -58, -50, -55, 0.1, 0.6443966601, -0.04750208125, 0.6543966601, -0.03750208125),
    (-30, -20, -25, -24, 0.5, 4.511047745, -0.4945065287, 4.061047745, -0.4445065287),
    (
        -120.75,
        -98.5,
        -118,
        -99.125,
        0.001,
        0.6948361044,
        -0.0005008437492,
        0.6944986044,
        -0.0004008437492,
    ),
    (-3.2, -4.1, -3, -5, 1, 1.387335325, -0.7502601056, 1.277335325, -0.6502601056),
    (-75, -75, -70, -80, 0.01, 0.7443966601, -0.005249791875, 0.7343966601, -0.004249791875),
    (-45, -65, -50, -60, 0.1, 0.3132616875, -0.02689414214, 0.4132616875, -0.01689414214),
]


def test_by_hand():
    # rewards 0.5 * (-1 + 3) = 1 and 0.5 * (-4 + 4) = 0, so the loss is log(1 + e^-1) = 0.3133
    logps = [torch.tensor([v]) for v in (-1.0, -4.0, -3.0, -4.0)]
    torch.testing.assert_close(
        dpo_loss(*logps, beta=0.5), torch.tensor([0.3133]), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("row", TABLE)
def test_published_losses_and_gradients(row):
    *logps, beta, loss, slope, smooth_loss, smooth_slope = row
    for eps, expected, expected_slope in ((0.0, loss, slope), (0.1, smooth_loss, smooth_slope)):
        logps_ = [torch.tensor([float(x)], dtype=torch.float64, requires_grad=True) for x in logps]
        losses = dpo_loss(*logps_, beta, eps)
        losses.sum().backward()
        assert losses.item() == pytest.approx(expected, rel=1e-9)  # ten printed digits
        assert logps_[0].grad.item() == pytest.approx(expected_slope, rel=1e-9)
        assert logps_[1].grad.item() == pytest.approx(-expected_slope, rel=1e-9)


def test_invariants():
    torch.manual_seed(0)
    logps = list((10 * torch.randn(4, 64, dtype=torch.float64)).unbind())
    equal = dpo_loss(logps[0], logps[1], logps[0], logps[1], 0.3)
    torch.testing.assert_close(equal, torch.full_like(equal, math.log(2)))
    # a constant of the prompt cancels, as beta log Z(x) does in the paper
    shifted = dpo_loss(logps[0] + 7, logps[1] + 7, logps[2], logps[3], 0.3)
    torch.testing.assert_close(shifted, dpo_loss(*logps, 0.3), atol=1e-12, rtol=1e-12)
    swapped = dpo_loss(logps[1], logps[0], logps[3], logps[2], 0.3, label_smoothing=0.9)
    torch.testing.assert_close(swapped, dpo_loss(*logps, 0.3, label_smoothing=0.1))


def test_extreme_margins_stay_finite():
    logps = [
        torch.tensor([-1e4, -1.0], requires_grad=True),
        torch.tensor([-1.0, -1e4]),
        torch.zeros(2),
        torch.zeros(2),
    ]
    losses = dpo_loss(*logps, beta=1.0)
    losses.sum().backward()
    torch.testing.assert_close(losses.detach(), torch.tensor([9999.0, 0.0]))
    assert logps[0].grad.tolist() == [-1.0, 0.0]


def test_pipeline_from_logits_to_loss():
    # logits by formula, labels as below, -100 is unscored: two chosen rows, then two rejected ones
    labels = [
        [-100, -100, -100, 4, 5, 0],
        [-100, 3, 0, -100, -100, -100],
        [-100, -100, -100, 6, 0, -100],
        [-100, 1, 5, 6, 0, -100],
    ]
    b, t, v = (
        x.double()
        for x in torch.meshgrid(torch.arange(4), torch.arange(6), torch.arange(7), indexing="ij")
    )
    sums = {}
    for name, logits in (
        ("policy", (1 + b + 2 * t + 3 * v).sin()),
        ("reference", (1 + b + 2 * t + 3 * v).cos()),
    ):
        scored = [
            (i, t - 1, x) for i, row in enumerate(labels) for t, x in enumerate(row) if x != -100
        ]
        hidden = torch.stack([logits[i, at] for i, at, _ in scored])
        logps = HeadLogps.apply(
            hidden, torch.eye(7, dtype=torch.float64), None, torch.tensor([x for *_, x in scored])
        )
        sums[name] = torch.zeros(4, dtype=torch.float64).index_add(
            0, torch.tensor([i for i, *_ in scored]), logps.double()
        )
    published = [-7.1403482867, -6.2002323232, -4.0578547111, -6.7518763224]
    torch.testing.assert_close(
        sums["policy"], torch.tensor(published).double(), atol=2e-6, rtol=0
    )  # fp32 log-softmax
    published = [-8.6500711368, -4.8291566555, -4.4105169893, -8.7644893335]
    torch.testing.assert_close(
        sums["reference"], torch.tensor(published).double(), atol=2e-6, rtol=0
    )
    logps = (*sums["policy"].split(2), *sums["reference"].split(2))
    for beta, eps, expected in (
        (0.1, 0, [0.63696671, 0.87657554]),
        (0.1, 0.1, [0.64853731, 0.84273866]),
        (0.5, 0, [0.44514845, 1.86089449]),
    ):
        losses = dpo_loss(*logps, beta, eps)
        torch.testing.assert_close(losses, torch.tensor(expected).double(), atol=2e-6, rtol=0)
    metrics = pair_metrics(*logps, 0.1)
    rewards = [metrics["rewards/chosen"].tolist(), metrics["rewards/rejected"].tolist()]
    assert rewards == [
        pytest.approx([0.15097229, -0.13710757], abs=1e-6),
        pytest.approx([0.03526623, 0.20126130], abs=1e-6),
    ]
    four = pair_metrics(
        *torch.tensor([[1.0, 0, 1, 0, 0], [0, 1, 0, 1, 0], [1, 1, 0, 0, 0], [0, 0, 1, 1, 0]]), 0.1
    )
    pairs = [
        [name for name in ("kept", "lost", "fixed", "missed") if four[name][i]] for i in range(5)
    ]
    assert pairs == [
        ["kept"],
        ["lost"],
        ["fixed"],
        ["missed"],
        ["kept"],
    ]  # by Eq. 1 of the ranking paper a tie is right, before and now
    assert four["ranking_accuracy"].tolist() == [1, 0, 1, 0, 0.5]  # of an accuracy it is half


def test_optimiser_steps():
    # RMSprop has no bias correction: with a constant unit gradient its first step is ten times the
    # learning rate, here 5e-7 / 151 in the first step of the warm-up
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.RMSprop([weight], lr=5e-7)
    optimizer.param_groups[0]["lr"] = 5e-7 * min(1, 1 / (150 + 1))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(3.31125828e-09, rel=1e-8)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert weight.item() == pytest.approx(-3.31125795e-08, rel=1e-7)


def args(blank, out, **changes):
    settings = dict(
        model=str(blank / "model"),
        data=str(blank / "pairs.jsonl"),
        out=str(out),
        lr=1e-3,
        batch_size=8,
        warmup_steps=0,
        max_steps=6,
        eval_every=16,
        eval_pairs=12,
        tokens_per_microbatch=256,
    )
    return Args(**{**settings, **changes})


def test_learns_and_writes_a_run(blank, tmp_path, pictures):
    history = dpo.main(args(blank, tmp_path / "run", max_steps=24))
    training = [r for r in history if "loss" in r]
    held_out = [r for r in history if "eval_loss" in r]
    assert training[0]["loss"] == pytest.approx(
        math.log(2), abs=1e-6
    )  # policy = reference, dropout off
    assert held_out[0]["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert training[-1]["loss"] < 0.6 and training[-1]["rewards/accuracies"] > 0.6
    assert [r["step"] for r in training] == list(range(24))
    assert [r["step"] for r in held_out] == [*range(0, 24, 2), 24]
    assert {
        "rewards/margins",
        "ranking_accuracy",
        "grad_norm",
        "clipped_steps",
        "lr",
        "tokens_per_s",
        "rows_per_s",
        "peak_GiB",
        "logps/chosen",
    } <= set(training[0])
    assert records(tmp_path / "run") == history
    flags = json.loads((tmp_path / "run" / "config.json").read_text())
    assert flags["beta"] == 0.1 and flags["torch"] == torch.__version__
    assert (tmp_path / "run" / "figures" / "curves.png").stat().st_size > 10_000
    trained = common.load_model(
        str(tmp_path / "run")
    )  # the exported model gives the last evaluation again
    tokenizer = common.load_tokenizer(str(tmp_path / "run"))
    rows = common.tokenize_pairs(common.load_pairs(str(blank / "pairs.jsonl"), "test"), tokenizer)
    (batch,) = common.pack_pairs(common.subset(rows, 12, seed=0), 10_000)
    logps = common.response_logps(trained, batch)[0].view(-1, 2).mean(0)
    assert logps[0].item() == pytest.approx(held_out[-1]["eval_logps/chosen"], abs=1e-3)


def test_micro_batches_do_not_change_the_step(blank, tmp_path):
    runs = [
        dpo.main(args(blank, tmp_path / str(budget), tokens_per_microbatch=budget))
        for budget in (64, 256, 10_000)
    ]
    for one, *others in zip(*runs):
        for other in others:
            for name in ("loss", "grad_norm", "rewards/margins", "eval_loss"):
                if name in one:
                    assert other[name] == pytest.approx(one[name], rel=1e-5, abs=1e-5), name


def test_reference_is_computed_once(blank, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "CACHE", tmp_path / "cache")
    loaded = []
    load_model = common.load_model
    monkeypatch.setattr(
        common, "load_model", lambda name, *a, **k: loaded.append(name) or load_model(name, *a, **k)
    )
    dpo.main(args(blank, tmp_path / "a", max_steps=2))
    assert len(loaded) == 2  # one pass over the training rows, one over the held-out ones
    dpo.main(args(blank, tmp_path / "b", max_steps=2, beta=0.7))
    assert len(loaded) == 2  # another beta: from the cache
    dpo.main(args(blank, tmp_path / "c", max_steps=2, max_length=40, max_prompt_length=8))
    assert len(loaded) == 4  # another truncation: other rows
    dpo.main(args(blank, tmp_path / "d", max_steps=2, dtype="bfloat16"))
    assert len(loaded) == 6  # another dtype


def test_cached_reference_equals_live_reference(blank):
    model, tokenizer = (
        common.load_model(str(blank / "model")),
        common.load_tokenizer(str(blank / "model")),
    )
    rows = common.tokenize_pairs(common.load_pairs(str(blank / "pairs.jsonl"), "train"), tokenizer)
    cached = common.reference_logps(str(blank / "model"), tokenizer, rows, "float32", 100)
    for batch in common.pack_pairs(rows, 300):
        live = common.response_logps(model, batch)[0].view(-1, 2)
        torch.testing.assert_close(cached[batch["index"]], live, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(beta=0.0), "--beta 0.0: must be from 1e-09"),
        (dict(label_smoothing=0.5), "--label-smoothing"),
        (dict(data="nowhere.jsonl"), "nowhere.jsonl"),
        (dict(model="no/such/model"), "no/such/model"),
        (dict(batch_size=400), "fewer than one batch"),
        (dict(batch_size=0), "--batch-size"),
        (dict(batch_size=-8), "--batch-size"),
        (dict(warmup_steps=-5), "--warmup-steps -5: must be from 0"),
        (dict(max_grad_norm=math.nan), "--max-grad-norm nan"),
        (dict(lr=math.inf), "--lr inf"),
        (dict(eval_pairs=0), "--eval-pairs 0"),
        (dict(beta=math.nan), "--beta nan: must be from 1e-09"),
        (dict(ref_model="OTHER"), "different vocabularies"),
    ],
)
def test_bad_input_is_one_line(blank, tmp_path, change, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if change.get("ref_model"):
        tokenizer = common.load_tokenizer(str(blank / "model"))
        tokenizer.add_tokens(["<new>"])
        model = common.load_model(str(blank / "model"))
        model.resize_token_embeddings(len(tokenizer))
        common.save_model(model, tokenizer, tmp_path / "other")
        change = dict(ref_model=str(tmp_path / "other"))
    with pytest.raises(SystemExit) as stop:
        dpo.main(args(blank, tmp_path / "run", **change))
    assert message in str(stop.value) and "\n" not in str(stop.value)
    assert not (tmp_path / "run" / "model").exists()


def test_command_line():
    file = str(ROOT / "methods" / "dpo.py")
    argv = f"import sys, runpy; sys.argv = [{file!r}, '--help']"
    code = f"{argv}; runpy.run_path({file!r}, run_name='__main__')"
    shown = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import atexit, sys\natexit.register(lambda: print('torch' in sys.modules))\n{code}",
        ],
        capture_output=True,
        text=True,
    )
    assert shown.returncode == 0 and shown.stdout.rstrip().endswith(
        "False"
    )  # flags are parsed before torch
    for preset in dpo.PRESETS:
        assert preset in shown.stdout
    unknown = run(file, "hhh", check=False)
    assert (
        unknown.returncode == 1
        and unknown.stderr.strip() == "no preset 'hhh': choose one of tiny, hh, tldr"
    )
    assert run(file, "--betta", "1", check=False).returncode == 2


def test_preset_cadence():
    hh = dpo.PRESETS["hh"]
    assert (
        hh.eval_every // hh.batch_size * hh.batch_size == 4992
    )  # examples, rounded down to whole steps
    assert 160800 // hh.batch_size == 2512 and 92858 // dpo.PRESETS["tldr"].batch_size == 1450


def test_released_order_of_the_data():
    """In the released code the seed of the run does not reach the order of the data."""
    published = {
        8: ([2, 4, 1, 3, 0, 5, 7, 6], [1, 3, 2, 6, 7, 5, 0, 4]),
        10: ([8, 7, 2, 4, 1, 5, 3, 9, 0, 6], [1, 2, 8, 3, 9, 5, 6, 4, 0, 7]),
    }
    for n, epochs in published.items():
        assert released.dpo_data_order(n, 2, seed=0) == list(epochs)
        assert released.dpo_data_order(n, 2, seed=1) == list(epochs)
    ours = [common.batch_order(8, 8, 0, seed) for seed in (0, 1)]
    print("released, seeds 0 and 1:", published[8][0], published[8][0], " here:", *ours)
    assert ours[0] != ours[1] and sorted(ours[0]) == sorted(ours[1]) == list(range(8))


def test_released_partial_batches():
    """100 pairs, batches of 32, four epochs: the released code drops 4 pairs in each epoch."""
    theirs, ours = released.dpo_optimiser_steps(100, 32, 4), common.optimiser_steps(100, 32, 4)
    print(f"released: {theirs} steps, here: {ours}")
    assert (theirs, ours) == (12, 12 + 4 * 4 // 32)
    assert common.optimiser_steps(100, 32, 8) == released.dpo_optimiser_steps(100, 32, 8) + 1
    seen = sum((common.batch_order(100, 32, step, seed=0) for step in range(4)), [])
    assert set(seen[:100]) == set(range(100))  # every pair once before any comes again


def test_released_dtypes(blank):
    """Policy in bf16, reference in fp16: the log-ratios are not 0 before the first step."""
    folder = str(blank / "model")
    rows = common.load_pairs(str(blank / "pairs.jsonl"), "train")
    rows = common.tokenize_pairs(rows, common.load_tokenizer(folder))[:8]
    theirs = released.dpo_log_ratios_at_the_start(folder, rows)
    (batch,) = common.pack_pairs(rows, 1_000_000)
    with torch.no_grad():
        policy, _ = common.response_logps(common.load_model(folder, "bfloat16"), batch)
        reference, _ = common.response_logps(common.load_model(folder, "bfloat16"), batch)
    print(
        "released, largest:", theirs.abs().max().item(), " here:", (policy - reference).abs().max()
    )
    assert theirs.abs().max() > 1e-3
    assert torch.equal(policy, reference)


def load_file(path, *rows, pairs=True):
    """What load_pairs makes of a file with these rows, or the line that says why none is left."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        return common.load_pairs(str(path), "train", pairs=pairs)
    except SystemExit as stop:
        return str(stop)


def test_released_transcripts(tmp_path):
    """Two transcripts that differ before the last turn: the released code cuts one amid a word."""
    chosen = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d"
    rejected = "\n\nHuman: a\n\nAssistant: b and\n\nHuman: c\n\nAssistant: e"
    theirs = released.hh_responses(chosen, rejected)
    ours = load_file(tmp_path / "hh.jsonl", {"chosen": chosen, "rejected": rejected})
    print("released:", theirs, " here:", ours)
    assert theirs == (" d", "ant: e")
    assert "dropped 1 (prompt is not a common prefix: 1, the first is row 1)" in ours


def test_released_ties(tmp_path):
    """Two answers of one score: the released code prefers the second."""
    answers = [{"text": text, "pm_score": 3} for text in ("one", "two")]
    ours = load_file(tmp_path / "se.jsonl", {"question": "q", "answers": answers})
    print("released:", released.se_preferred(3, 3), " here:", ours)
    assert released.se_preferred(3, 3) == "j"
    assert "dropped 1 (equal scores: 1, the first is row 1)" in ours


def test_released_summaries(tmp_path):
    """A null post is "None" in the released code, and targets of SFT have no space before them."""
    post = {"subreddit": "x", "title": "T", "post": "P", "summary": "short"}
    null = {**post, "post": None}
    theirs = [released.tldr_texts(row) for row in (post, null)]
    (ours,) = load_file(tmp_path / "tldr.jsonl", post, null, pairs=False)
    print("released:", theirs, " here:", ours)
    assert theirs[0] == ("SUBREDDIT: r/x\nTITLE: T\nPOST: P\nTL;DR:", "short")
    assert theirs[1][0] == "SUBREDDIT: r/x\nTITLE: T\nPOST: None\nTL;DR:"
    assert (ours["prompt"], ours["chosen"]) == (theirs[0][0], " short")


@pytest.mark.parametrize(
    "accuracy, n, words",
    [
        (0.7, 200, "holds: on mine.jsonl"),
        (0.3, 200, "does not hold: on mine.jsonl"),
        (0.7, 10, "too few to tell: on mine.jsonl"),
    ],
)
def test_the_claim_follows_the_held_out_pairs(accuracy, n, words):
    _, shown = dpo.claim({"eval_rewards/accuracies": accuracy}, n, "mine.jsonl")
    low, high = scipy.stats.binomtest(round(accuracy * n), n).proportion_ci(method="wilson")
    assert shown.startswith(words)
    assert shown.endswith(f"({accuracy:.3f} [{low:.3f}, {high:.3f}] of {n})")


def test_the_tiny_world_is_not_presented_as_the_paper():
    _, shown = dpo.claim({"eval_rewards/accuracies": 0.7}, 200, "tiny")
    assert shown.startswith("holds: in the tiny world")
