"""DPO^gamma against published numbers, DPO, Theorem 4.1 and exact minimisers; then whole sweeps."""

import json
import math
import sys

import dpo
import dpo_gamma
import pytest
import released
import torch
import torch.nn.functional as F
from conftest import ROOT, records, run
from dpo_gamma import PRESETS, Args, dpo_gamma_loss
from ranking_accuracy import loss_threshold

import common

sys.path.append(str(ROOT / "studies"))
import dpo_gamma_figures

# Four pairs: log-probs of chosen and rejected under the policy, then under the reference; beta 0.1.
LOGPS = [
    (-42.5, -120.25, -7, -33),
    (-55, -98.75, -7, -20),
    (-45, -130, -6, -35),
    (-50, -90, -9, -15.5),
]
LOSSES = {  # of the released implementation, float64
    0: (0.2519290813, 2.2601846030, 0.6931471806, 1.5410084538),
    0.25: (0.2811501362, 1.4250805832, 0.7313501408, 1.1797420321),
    0.5: (0.3132616875, 0.7709570478, 0.7709570478, 0.8687926040),
    1: (0.3868710061, 0.1460354111, 0.8543552445, 0.4200553357),
    1.5: (0.4740769842, 0.0210564845, 0.9432489460, 0.1797446354),
    2: (0.5759394199, 0.0028757602, 1.0374879505, 0.0716446920),
}
SLOPES = {  # by the chosen log-prob; by the rejected one, the negative
    0: (-0.0222700139, -0.0895668777, -0.05, -0.0785834983),
    0.5: (-0.0268941421, -0.0537429845, -0.0537429845, -0.0580542305),
    1: (-0.0320821301, -0.0135872897, -0.0574442517, -0.0342989537),
    2: (-0.0437823499, -0.0002871629, -0.0645656306, -0.0069138420),
}


def doubles(rows, **options):
    return [torch.tensor(row, dtype=torch.float64, **options) for row in rows]


@pytest.mark.parametrize("gamma", LOSSES)
def test_published_losses_and_gradients(gamma):
    logps = doubles(LOGPS, requires_grad=True)
    losses = dpo_gamma_loss(*logps, 0.1, gamma)
    losses.sum().backward()
    assert losses.tolist() == pytest.approx(LOSSES[gamma], abs=1e-10)
    if gamma in SLOPES:
        assert logps[0].grad.tolist() == pytest.approx(SLOPES[gamma], abs=1e-10)
        assert logps[1].grad.tolist() == pytest.approx([-x for x in SLOPES[gamma]], abs=1e-10)


def test_bigram_model():
    # Logits by formula, a row per previous token; prompt 1; end token 0.  Published sums, losses
    # and gradients.
    i, j = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    policy = (((3 * i + 5 * j + 1) % 7) / 2).double().requires_grad_()
    reference = ((2 * i + 3 * j) % 5).double() / 2
    score = lambda table, tokens: table.log_softmax(1)[[1, *tokens[:-1]], tokens].sum()
    logps = [score(table, y) for table in (policy, reference) for y in ([2, 3, 0], [3, 3, 1, 2, 0])]
    assert [x.item() for x in logps] == pytest.approx(
        [-7.623465320327, -11.286157151497, -4.079912330813, -6.413257392452], abs=1e-12
    )
    for gamma, expected in (
        (0, 0.148590516341),
        (0.5, 0.252372675530),
        (2, 0.975321840825),
        (1, 0.415046740445),
    ):
        loss = dpo_gamma_loss(*logps, 0.5, gamma)
        assert loss.item() == pytest.approx(expected, abs=1e-12)
    loss.backward()
    assert policy.grad.flatten().tolist() == pytest.approx(
        [
            0,
            0,
            0,
            0,
            -0.0538860217,
            -0.0198235596,
            -0.0072926800,
            0.0810022613,
            0.1698452916,
            0,
            0,
            -0.1698452916,
            -0.1924964956,
            0.1615123793,
            -0.1015156534,
            0.1324997697,
        ],
        abs=1e-10,
    )


def test_special_gammas():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        torch.manual_seed(0)
        c, r, rc, rr = (50 * torch.randn(4, 10_000)).to(dtype).unbind()
        for beta in (0.1, 0.37):
            ours = dpo_gamma_loss(c, r, rc, rr, beta, 1.0)
            assert torch.equal(ours, dpo.dpo_loss(c, r, rc, rr, beta))
            ours = dpo_gamma_loss(c, r, rc, rr, beta, 0.0)
            assert torch.equal(ours, dpo.dpo_loss(c, r, 0 * rc, 0 * rr, beta))
            for gamma in (0.5, 2.0):  # DPO with the reference to the power gamma
                ours = dpo_gamma_loss(c, r, rc, rr, beta, gamma)
                assert torch.equal(ours, dpo.dpo_loss(c, r, gamma * rc, gamma * rr, beta))


def test_theorem_4_1():
    # The threshold is the loss at which the policy's log-ratio is 0, for
    # c = log pi_ref(y_l|x)/pi_ref(y_w|x).
    published = {
        -32.2: 3.259177499,
        0: 0.6931471806,
        0.26: 0.6802316782,
        0.45: 0.6709002842,
        10: 0.3132616875,
        50: 0.006715348489,
        100: 4.539889922e-5,
        457.6: 1.338703837e-20,
    }
    c, expected = doubles([list(published), list(published.values())])
    zero = torch.zeros_like(c)
    found = dpo_gamma_loss(zero, zero, -c, zero, 0.1, 1.0)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(loss_threshold(c, 0.1, 1.0), expected, rtol=1e-9, atol=0)
    for loss, hardest in (
        (0.6, 1.958704),
        (0.3, 10.502256),
        (0.1, 22.521685),
        (0.05, 29.706281),
        (0.01, 46.001660),
    ):
        assert -math.log(math.expm1(loss)) / 0.1 == pytest.approx(hardest, abs=1e-6)
        c = torch.tensor([hardest], dtype=torch.float64)
        assert dpo_gamma_loss(zero[:1], zero[:1], -c, zero[:1], 0.1, 1.0).item() == pytest.approx(
            loss, abs=1e-7
        )
    torch.manual_seed(0)
    delta, c = 50 * torch.randn(2, 100_000, dtype=torch.float64)
    for gamma in (0.0, 0.5, 1.0, 2.0):
        losses = dpo_gamma_loss(delta, 0, -c, 0, 0.1, gamma)
        assert torch.equal(losses <= F.softplus(-0.1 * gamma * c), delta >= 0)
        assert torch.equal(losses <= loss_threshold(c, 0.1, gamma), delta >= 0)


@pytest.mark.parametrize(
    "beta, alpha, gamma, delta, least",
    [
        (0.5, 0.8, 1, 0.5753641449, 0.5004024235),
        (0.1, 0.75, 1, 8.7888983093, 0.5623351446),
        (0.5, 0.8, 0.5, 1.6739764336, 0.5004024235),
        (1, 0.6, 1, -1.7917594692, 0.6730116670),
    ],
)
def test_minimiser(beta, alpha, gamma, delta, least):
    # Of five responses, 0 is preferred to 3 by a share alpha of annotators; the policy is a free
    # softmax.
    reference = torch.tensor([0.05, 0.10, 0.15, 0.45, 0.25], dtype=torch.float64).log()
    theta = reference.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [theta],
        lr=1,
        max_iter=500,
        tolerance_grad=1e-13,
        tolerance_change=1e-18,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        logps = theta.log_softmax(0)
        value = alpha * dpo_gamma_loss(
            logps[0], logps[3], reference[0], reference[3], beta, gamma
        ) + (1 - alpha) * dpo_gamma_loss(
            logps[3], logps[0], reference[3], reference[0], beta, gamma
        )
        value.backward()
        return value

    assert optimizer.step(closure).item() >= least - 1e-9 and closure().item() == pytest.approx(
        least, abs=1e-9
    )
    found = (theta[0] - theta[3]).item()
    assert found == pytest.approx(
        delta, abs=1e-5
    )  # the loss is flat: an error of 1e-5 changes it by 1e-11
    assert delta == pytest.approx(
        gamma * math.log(0.05 / 0.45) + math.log(alpha / (1 - alpha)) / beta, abs=1e-9
    )


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


def test_sweep(blank, tmp_path, monkeypatch, pictures):
    monkeypatch.setattr(common, "CACHE", tmp_path / "cache")
    loaded, load_model = [], common.load_model
    monkeypatch.setattr(
        common, "load_model", lambda name, *a, **k: loaded.append(name) or load_model(name, *a, **k)
    )
    (tmp_path / "data").mkdir()  # as many pairs for testing as for training
    for split in ("train", "test"):
        (tmp_path / "data" / f"{split}.jsonl").write_text((blank / "pairs.jsonl").read_text())
    history = dpo_gamma.main(
        args(
            blank,
            tmp_path / "run",
            gamma=(0.0, 1.0, 2.0),
            data=str(tmp_path / "data"),
            eval_pairs=40,
        )
    )
    assert (
        len(loaded) == 2
    )  # the reference: one pass over the training pairs, one over the held-out ones
    runs = [records(tmp_path / "run" / f"gamma-{gamma}") for gamma in (0, 1, 2)]
    assert sum(runs, []) == history
    plain = dpo.main(
        dpo.Args(
            **{
                name: value
                for name, value in vars(
                    args(blank, tmp_path / "dpo", data=str(tmp_path / "data"), eval_pairs=40)
                ).items()
                if name != "gamma"
            }
        )
    )
    for ours, theirs in zip(runs[1], plain):  # to the bit, apart from clocks and memory
        assert {k: ours[k] for k in theirs if "_s" not in k and k != "peak_GiB"} == {
            k: v for k, v in theirs.items() if "_s" not in k and k != "peak_GiB"
        }
    for gamma, run_ in zip((0, 1, 2), runs):
        held_out = [r for r in run_ if "eval_loss" in r]
        assert held_out[0]["eval_distance"] == 0 < held_out[1]["eval_distance"]
        for r in held_out:
            assert r["eval_kept"] + r["eval_fixed"] == pytest.approx(r["eval_ranking_accuracy"])
            assert r["eval_kept"] + r["eval_lost"] == pytest.approx(
                held_out[0]["eval_ranking_accuracy"]
            )
            assert r["eval_kept"] + r["eval_lost"] + r["eval_fixed"] + r[
                "eval_missed"
            ] == pytest.approx(1)
        assert held_out[0]["eval_lost"] == held_out[0]["eval_fixed"] == 0
        options = dpo_gamma_figures.read_options(tmp_path / "run" / f"gamma-{gamma}")
        assert options.gamma == (gamma,) and options.eval_pairs == 40
        pairs = dpo_gamma_figures.score_pairs(options)  # of the saved model
        assert pairs["eval_loss"].mean().item() == pytest.approx(held_out[-1]["eval_loss"])
        below = pairs["eval_loss"] < F.softplus(-0.1 * gamma * pairs["eval_c"])
        assert len(below) == 40 and torch.equal(
            below, pairs["eval_ranking_accuracy"] == 1
        )  # Theorem 4.1
    figures = ROOT / "studies" / "dpo_gamma_figures.py"
    run(figures, "--sweep", tmp_path / "run", PICTURES="drawn")
    assert (tmp_path / "run" / "figures" / "ranking.png").stat().st_size > 10_000


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])  # whole weights; sharded weights
def test_distance_is_of_the_change(blank, tmp_path, dtype):
    history = dpo_gamma.main(args(blank, tmp_path / "run", gamma=(0.5,), max_steps=2, dtype=dtype))
    before, after = (
        common.load_model(str(path)).state_dict() for path in (blank / "model", tmp_path / "run")
    )
    squared = sum((after[name] - before[name]).square().sum().item() for name in before)
    assert history[-1]["eval_distance"] == pytest.approx(squared, rel=1e-4)  # float32 sums


def test_two_processes(blank, tmp_path):
    one = dpo_gamma.main(args(blank, tmp_path / "1", gamma=(2.0,), max_steps=2, eval_pairs=2))
    flags = {
        name: value
        for name, value in vars(args(blank, tmp_path / "2", max_steps=2, eval_pairs=2)).items()
        if value != getattr(Args, name)
    }
    run(
        ROOT / "methods" / "dpo_gamma.py",
        "--gamma",
        2,
        *(f"--{name.replace('_', '-')}={x}" for name, x in flags.items()),
        processes=2,
    )
    for a, b in zip(one, records(tmp_path / "2")):
        for name in {"loss", "grad_norm", "eval_loss", "eval_distance", "eval_fixed"} & set(a):
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-5), (
                name
            )  # another order of float32 sums
    run(ROOT / "studies" / "dpo_gamma_figures.py", "--sweep", tmp_path / "2")
    assert (tmp_path / "2" / "figures" / "ranking.png").exists()


def test_a_sweep_resumes_as_a_whole(blank, tmp_path, monkeypatch):
    """Stopped in its second run, a sweep goes on there, with the numbers of a whole one."""
    sweep = dict(gamma=(0.0, 1.0, 2.0), save_every=16)
    whole = dpo_gamma.main(args(blank, tmp_path / "whole", **sweep))

    def killed(*_):
        raise KeyboardInterrupt

    options = args(blank, tmp_path / "run", **sweep)
    with monkeypatch.context() as patch:
        calls = []
        patch.setattr(
            dpo_gamma,
            "stop_unless_finite",
            lambda *_: calls.append(1) if len(calls) < 9 else killed(),
        )
        with pytest.raises(KeyboardInterrupt):
            dpo_gamma.main(options)
    assert (tmp_path / "run" / "gamma-0" / "model").is_dir()
    assert (tmp_path / "run" / "gamma-1" / "step-2").is_dir()
    assert not (tmp_path / "run" / "gamma-2").exists()

    with pytest.raises(SystemExit, match="--resume goes on"):
        dpo_gamma.main(options)
    options.resume = True
    dpo_gamma.main(options)
    found = sum((records(tmp_path / "run" / f"gamma-{gamma}") for gamma in (0, 1, 2)), [])
    assert len(found) == len(whole)
    for ours, theirs in zip(found, whole):
        for name in {"step", "loss", "grad_norm", "eval_loss", "eval_distance"} & set(theirs):
            assert ours[name] == theirs[name], name
    with pytest.raises(SystemExit) as stop:  # all of it is finished
        dpo_gamma.main(options)
    assert stop.value.code == 0
    with pytest.raises(SystemExit, match="no run to resume"):
        dpo_gamma.main(args(blank, tmp_path / "none", resume=True, **sweep))


def test_released_loss():
    """Its gamma is never used, its alpha is the paper's gamma, and the default loss is DPO."""
    logps = doubles(LOGPS)
    default = released.dpo_gamma_loss(*logps, gamma=0.5)
    print("released, --gamma 0.5:", default.tolist(), " here:", dpo_gamma_loss(*logps, 0.1, 0.5))
    assert default.tolist() == pytest.approx(LOSSES[1], abs=1e-10)
    for gamma, expected in LOSSES.items():
        scaled = released.dpo_gamma_loss(*logps, alpha=gamma, loss_type="alpha_scaling")
        assert scaled.tolist() == pytest.approx(expected, abs=1e-10)


def test_released_learning_rate(blank, tmp_path):
    """Linear decay to 0 in the released code; here the rate is constant after the warm-up."""
    theirs = [released.dpo_gamma_learning_rate(step, 8, 1e-3, warmup_steps=2) for step in range(8)]
    history = dpo_gamma.main(
        args(blank, tmp_path / "run", gamma=(1.0,), max_steps=8, warmup_steps=2)
    )
    ours = [r["lr"] for r in history if "lr" in r]
    print("released:", theirs, " here:", ours)
    assert theirs[:3] == pytest.approx([0, 5e-4, 1e-3]) and theirs[7] == pytest.approx(1e-3 / 6)
    assert ours == pytest.approx([1e-3 / 3, 2e-3 / 3] + [1e-3] * 6)


def test_released_weight_norm(blank):
    """The norm of the weights says little about how far they have travelled."""
    model = common.load_model(str(blank / "model"))
    start = [weight.clone() for weight in model.parameters()]
    before = released.dpo_gamma_weight_norm(model).item()
    with torch.no_grad():
        for weight in model.parameters():
            weight.neg_()  # as far as it can go on the sphere
    after, distance = (
        released.dpo_gamma_weight_norm(model),
        dpo_gamma.squared_distance(model, start),
    )
    print("released:", before, after.item(), " here:", distance.item())
    assert after.item() == before
    assert distance.item() == pytest.approx(4 * before**2, rel=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(gamma=(1.0, math.nan)), "--gamma nan: must be from"),
        (dict(gamma=(math.inf,)), "--gamma inf: must be from"),
        (dict(gamma=()), "--gamma: give one number at least"),
        (dict(beta=0.0), "--beta 0.0: must be from"),
    ],
)
def test_bad_input_is_one_line(blank, tmp_path, change, message):
    with pytest.raises(SystemExit) as stop:
        dpo_gamma.main(args(blank, tmp_path / "run", **change))
    assert message in str(stop.value) and "\n" not in str(stop.value)
    assert not (tmp_path / "run").exists()


def test_preset():
    assert PRESETS["hh"].gamma == tuple(k / 4 for k in range(9)) and PRESETS["hh"].beta == 0.1
    assert (
        160800 * PRESETS["hh"].epochs // PRESETS["hh"].batch_size == 12562
    )  # Fig. 2 ends at step 12,500
    assert json.dumps(vars(PRESETS["tiny"]))  # every option can be recorded in config.json
