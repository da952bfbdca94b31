"""dpl.py against closed forms, exact optima, and numbers from the released losses and outputs."""

import csv
import dataclasses
import json
import math
import re
import shutil
import signal
from pathlib import Path

import dpl
import pytest
import released
import scipy.optimize
import scipy.special
import scipy.stats
import torch
import torch.nn.functional as F
from conftest import ROOT, begin, records, run
from safetensors.torch import load_file, save_file

import common

torch.manual_seed(0)
TYPES = ("base", "mean_and_variance", "categorical")


def double(x):
    return torch.tensor(x, dtype=torch.float64)


def close(got, expected, atol=1e-9):  # published to 10 or 12 digits
    got = got.double() if isinstance(got, torch.Tensor) else double(got)
    torch.testing.assert_close(got, double(expected), atol=atol, rtol=0)


def gradients(loss, *inputs):
    inputs = [double(x).requires_grad_() for x in inputs]
    value = loss(*inputs)
    return value.detach(), *torch.autograd.grad(value.sum(), inputs)


# ---- losses and gradients


# fmt: off
BASE = [  # chosen, rejected, loss, gradient for chosen
    (0, 0, 0.693147180560, -0.5), (1.5, -0.5, 0.126928011043, -0.1192029220),
    (-2, 3, 5.006715348489, -0.9933071491), (2.453125, 2.375, 0.654847426066, -0.4804786780),
    (0.3, 10.3, 10.000045398899, -0.9999546021)]
# fmt: on


def test_base_loss_and_gradient():
    chosen, rejected = ([[row[i]] for row in BASE] for i in (0, 1))
    losses, d_chosen, d_rejected = gradients(dpl.base_loss, chosen, rejected)
    close(losses, [row[2] for row in BASE])
    close(d_chosen[:, 0], [row[3] for row in BASE])
    close(d_rejected[:, 0], [-row[3] for row in BASE])
    batch = [1, 2, 0]
    close(losses[batch].mean(), 1.942263513364)
    close(d_chosen[batch, 0] / 3, [-0.0397343073, -0.3311023830, -0.1666666667])


# fmt: off
MV = [  # chosen, rejected, z, then losses: logistic, probit; gradients of logistic
    ((0, 0), (0, 0), 0, 0.693147180560, 0.693147180560, (-1.2785551905, 0), (1.2785551905, 0)),
    ((1, 0), (0, 0), 1.0201394466, 0.074669941489, 0.167036371297,
     (-0.1839847401, 0.0663584680), (0.1839847401, 0.0663584680)),
    ((0, 1), (1, -1), -0.7406819874, 2.001753668182, 1.472100028738,
     (-1.6057892249, -0.8457763910), (1.6057892249, -0.0742193394)),
    ((0.265625, -1.9765625), (0.46484375, -1.75), -0.9662726429, 2.507103985470, 1.790037637987,
     (-11.1670049259, -0.8263342983), (11.1670049259, -1.2414637262)),
    ((0.240234375, -1.71875), (-0.0922851562, -1.6171875), 1.3578500085, 0.032711597266,
     0.091299439211, (-0.3294143049, 0.0457950568), (0.3294143049, 0.0547559864)),
    ((-3, -4), (2, -5), -258.3657484298, 647.626890210289, 33382.903310564288,
     (-129.5253780421, -564.5069653509), (129.5253780421, -77.7202964182))]
# fmt: on


def test_mean_variance_loss_and_gradient():
    chosen, rejected = ([row[i] for row in MV] for i in (0, 1))
    losses, d_chosen, d_rejected = gradients(dpl.mean_variance_loss, chosen, rejected)
    close(losses, [row[3] for row in MV])
    close(d_chosen, [row[5] for row in MV], atol=1e-8)
    close(d_rejected, [row[6] for row in MV], atol=1e-8)
    losses = dpl.mean_variance_loss(double(chosen), double(rejected), "probit")
    torch.testing.assert_close(losses, double([row[4] for row in MV]), atol=1e-9, rtol=1e-12)
    close(F.softplus(double([-1.9765625, -1.75])), [0.1297508389, 0.1602241504])


def test_links_by_value():
    # sigma = 1 / sqrt 2 on both sides makes the difference of means z itself
    f = math.log(math.expm1(1 / math.sqrt(2)))
    for z, *expected in [
        (-4, -10.360101, -10.026557),
        (-2, -3.783184, -5.019884),
        (-1, -1.841022, -2.585017),
        (1, -0.172754, -0.078388),
        (2, -0.023013, -0.006627),
    ]:
        for link, value in zip(("probit", "logistic"), expected, strict=True):
            close(
                -dpl.mean_variance_loss(double([[z, f]]), double([[0, f]]), link),
                [value],
                atol=5e-7,
            )


def test_variance_penalty_of_the_released_code():
    """Rows 2, 3, 4: the mean loss, and what the released code adds to it with a penalty of 0.1."""

    def total(chosen, rejected):
        losses = dpl.mean_variance_loss(chosen, rejected)
        return (losses + released.variance_penalty(chosen, rejected, 0.1)).mean()

    chosen, rejected = ([MV[k][i] for k in (1, 2, 3)] for i in (0, 1))
    value, d_chosen, _ = gradients(total, chosen, rejected)
    ours = dpl.mean_variance_loss(double(chosen), double(rejected)).mean()
    print(f"the equation {ours:.12f}, the released code with a penalty {value:.12f}")
    close(ours, 1.527842531714)
    close(value, 1.622049272754)
    close(
        d_chosen,
        [
            [-0.0613282467, 0.0452243954],
            [-0.5352630750, -0.2179207155],
            [-3.7223349753, -0.2743921775],
        ],
    )


# fmt: off
ROW0 = dict(  # row 0 of the released outputs, safe and jailbroken, of the models trained on both
    base=[[1.796875], [-0.380859375]],
    mean_and_variance=[[0.240234375, -1.71875], [-0.0922851562, -1.6171875]],
    categorical=[
        [-1.6640625, -1.59375, -1.4453125, -1.0546875, -0.2197265625,
         0.75390625, 1.3515625, 1.5078125, 1.5546875, 1.546875],
        [0.1962890625, 0.26953125, 0.3984375, 0.65625, 0.87890625,
         0.435546875, -0.1166992188, -0.373046875, -0.44140625, -0.5]])
CAT = [  # chosen, rejected, P, loss, gradient for chosen, totals with batch and example entropy
    ([0.0] * 10, [0.0] * 10, 0.5, 0.693147180560,
     [.09, .07, .05, .03, .01, -.01, -.03, -.05, -.07, -.09],
     0.462888671261, 0.462888671261),
    ([0, 1, 2], [2, 1, 0], 0.857990370037, 0.153162403290,
     [0.0551280692, 0.0200762826, -0.0752043519], 0.045164037952, 0.069922845106),
    ([0, 0, math.log(2)], [0, 0, 0], 7 / 12, 0.538996500733,
     [5 / 28, 1 / 28, -3 / 14], 0.430643588601, 0.432079847757),
    ([5, 0, 0, 0], [0, 0, 0, 5], 0.006778920599, 4.993937393461,
     [0.5027072782, -0.0030472466, -0.0094817081, -0.4901783234], 4.917595239499, 4.982029499452),
    (*ROW0["categorical"], 0.841564134086, 0.172493054249,
     [0.0082250835, 0.0077207575, 0.0075380533, 0.0085816397, 0.0122950844,
      0.0144839530, 0.0060977759, -0.0082001793, -0.0221475993, -0.0345945688],
     -0.052519709115, -0.030163075954)]
# fmt: on


def test_categorical_loss_entropy_and_gradient():
    def total(over):
        return lambda c, r: dpl.categorical_loss(c, r).mean() - 0.1 * dpl.entropy(c, r, over)

    for chosen, rejected, p, loss, d_chosen, batch, example in CAT:
        value, grad, _ = gradients(dpl.categorical_loss, [chosen], [rejected])
        close(value, [loss])
        close((-value).exp(), [p])
        close(grad, [d_chosen])
        close(total("batch")(double([chosen]), double([rejected])), batch)
        close(total("example")(double([chosen]), double([rejected])), example)
    for (chosen, rejected, *_), over, expected in (
        (CAT[1], "batch", [0.0556059448, 0.0160673573, -0.0716733021]),
        (CAT[1], "example", [0.0480372145, 0.0130377648, -0.0610749793]),
        (CAT[2], "batch", [0.1763422102, 0.0334850673, -0.2098272775]),
        (CAT[2], "example", [0.1742392587, 0.0313821158, -0.2056213745]),
    ):
        close(gradients(total(over), [chosen], [rejected])[1], [expected])
    pairs = [[0, 1, 2], [1, 0, -1]], [[2, 1, 0], [0.5, 0.5, 0]]
    value, d_chosen, d_rejected = gradients(total("batch"), *pairs)
    close(dpl.categorical_loss(*map(double, pairs)).mean(), 0.604354948381)
    close(value, 0.497478495704)
    close(total("example")(*map(double, pairs)), 0.515066070824)
    close(
        d_chosen,
        [[0.0285988127, 0.0099221612, -0.0385209739], [0.1519925965, -0.0819132774, -0.0700793190]],
    )
    close(
        d_rejected,
        [[-0.0348827224, 0.0081097737, 0.0267729487], [-0.1731367512, 0.0730689299, 0.1000678213]],
    )


def test_shares_of_the_entropy_of_a_batch():
    """In parts of any size: value and gradient of H of the mean p, by its definition at once."""
    logits = [torch.randn(2, 7, 5, dtype=torch.float64).requires_grad_() for _ in range(2)]
    mean_p = logits[0].softmax(-1).mean((0, 1))
    whole = -(mean_p * mean_p.log()).sum()
    whole.backward()
    log_mean_p = logits[0].detach().softmax(-1).mean((0, 1)).log()
    logits[1].data.copy_(logits[0])
    total = 0
    for part in logits[1].split((3, 1, 3), dim=1):
        share = dpl.entropy_shares(*part, log_mean_p).sum() / 7
        share.backward(retain_graph=True)
        total += share.item()
    assert total == pytest.approx(whole.item(), abs=1e-12)
    torch.testing.assert_close(logits[1].grad, logits[0].grad, atol=1e-12, rtol=0)
    close(dpl.entropy(*logits[0], "batch"), whole.item())

    # Atoms without mass: the mean p is too small for a float, and its log is not.
    far = torch.tensor([[0.0, -500.0]]).requires_grad_()
    share = dpl.entropy_shares(far, far, far.detach().log_softmax(-1).logsumexp(0))
    share.sum().backward()
    assert share.isfinite().all() and far.grad.isfinite().all()


def test_losses_by_enumeration_and_symmetry():
    c, r = torch.randn(2, 6, 5, dtype=torch.float64)
    p_c, p_r = c.softmax(-1), r.softmax(-1)
    wins = sum(
        p_c[:, i] * p_r[:, j] * (1.0 if i > j else 0.5 if i == j else 0.0)
        for i in range(5)
        for j in range(5)
    )
    torch.testing.assert_close(dpl.categorical_loss(c, r).neg().exp(), wins)
    swapped = dpl.categorical_loss(r, c).neg().exp()
    torch.testing.assert_close(swapped, 1 - wins)
    torch.testing.assert_close(dpl.categorical_loss(c.flip(-1), r.flip(-1)).neg().exp(), swapped)
    torch.testing.assert_close(dpl.categorical_loss(c + 7, r - 3).neg().exp(), wins)
    two_c, two_r = c[:, :2], r[:, :2]
    x_c, x_r = (two[:, 1] - two[:, 0] for two in (two_c, two_r))
    torch.testing.assert_close(
        dpl.categorical_loss(two_c, two_r).neg().exp(), x_c.sigmoid() / 2 + (-x_r).sigmoid() / 2
    )
    atoms = 50 * torch.eye(3, dtype=torch.float64)  # all mass on one atom: higher, equal, lower
    losses = dpl.categorical_loss(atoms[[2, 1, 0]], atoms[[0, 1, 2]])
    assert losses[0] < 1e-12 and abs(losses[1] - math.log(2)) < 1e-12 and losses[2] > 45
    mu = torch.randn(2, 6, dtype=torch.float64)
    f = torch.full(
        (6,), math.log(math.expm1(math.sqrt(math.pi))), dtype=torch.float64
    )  # k z is then mu_c - mu_r
    sides = [torch.stack([m, f], -1) for m in mu]
    torch.testing.assert_close(
        dpl.mean_variance_loss(*sides), dpl.base_loss(mu[0, :, None], mu[1, :, None])
    )
    for link in ("logistic", "probit"):
        forth, back = (
            dpl.mean_variance_loss(*sides, link),
            dpl.mean_variance_loss(*sides[::-1], link),
        )
        torch.testing.assert_close(
            forth.neg().exp() + back.neg().exp(), torch.ones(6, dtype=torch.float64)
        )
        scaled = dpl.normal_loss(
            3 * mu[0] + 5, 3 * F.softplus(f), 3 * mu[1] + 5, 3 * F.softplus(f), link
        )
        torch.testing.assert_close(
            scaled, forth
        )  # (mu, sigma) -> (3 mu + 5, 3 sigma) changes nothing


def test_calibration_keeps_a_certain_pair():
    predicted = torch.tensor([0.0, 0.05, 0.2, 0.95, 1.0])
    means, true = dpl.calibration(predicted, torch.tensor([0.1, 0.3, 0.5, 0.6, 1.0]))
    close(means, [0.025, 0.2, 0.975], atol=1e-7)
    close(true, [0.2, 0.5, 0.8], atol=1e-7)


@pytest.mark.parametrize("link", ["logistic", "probit"])
def test_losses_and_gradients_stay_finite(link):
    far = torch.tensor([[200.0] + [-200.0] * 9, [-200.0] * 9 + [200.0]])
    chosen, rejected = far.clone().requires_grad_(), far.flip(0).clone().requires_grad_()
    losses = dpl.categorical_loss(chosen, rejected)
    (
        losses.sum() - dpl.entropy(chosen, rejected) - dpl.entropy(chosen, rejected, "example")
    ).backward()
    torch.testing.assert_close(
        losses.detach(), torch.tensor([400.0, 0.0])
    )  # the least of both: -(-400) and -log 1
    assert chosen.grad.isfinite().all() and rejected.grad.isfinite().all()
    chosen = torch.tensor(
        [[0.0, -300.0], [1.0, -50.0], [0.0, -20.0]], requires_grad=True
    )  # sigma of 0, 2e-22, 2e-9
    rejected = torch.tensor([[0.0, -300.0], [0.0, -50.0], [0.0, -20.0]])
    losses = dpl.mean_variance_loss(chosen, rejected, link, sigma_floor=1e-4)
    losses.sum().backward()
    assert (
        losses.isfinite().all() and chosen.grad.isfinite().all() and chosen.grad.abs().max() < 1e5
    )  # k / floor


def test_learning_rate_schedules():
    cosine = [dpl.lr_factor("cosine", t, 100) for t in (0, 1, 25, 50, 75, 99, 100)]
    close(cosine, [1, 0.9997779522, 0.8681980515, 0.55, 0.2318019485, 0.1002220478, 0.1])
    close(dpl.lr_factor("constant", 25, 100), 1.0)


def test_step_schedule_of_the_released_code():
    times = (32, 33, 65, 66)
    steps = [released.step_schedule(t, 100) for t in times]
    ours = [dpl.lr_factor("cosine", t, 100) for t in times]
    print(f"cosine {ours}, the released step schedule {steps}")
    close(steps, [1, 0.1, 0.1, 0.01])


def test_categorical_loss_of_the_released_code_overflows():
    """The same loss; but it multiplies softmaxes and takes a plain log, which overflows."""
    chosen, rejected = torch.randn(2, 6, 5, dtype=torch.float64)
    ours = dpl.categorical_loss(chosen, rejected)
    torch.testing.assert_close(ours, released.categorical_loss(chosen, rejected))
    far = torch.tensor([[200.0] + [-200.0] * 9]), torch.tensor([[-200.0] * 9 + [200.0]])
    ours, theirs = dpl.categorical_loss(*far).item(), released.categorical_loss(*far).item()
    print(f"ours {ours}, the released code {theirs}")
    assert ours == 400 and theirs == math.inf


def test_unknown_names_are_errors():
    x = torch.zeros(1, 2)
    for call in (
        lambda: dpl.pair_losses(x, x, "normal"),
        lambda: dpl.mean_variance_loss(x, x, "logit"),
        lambda: dpl.entropy(x, x, "epoch"),
        lambda: dpl.utility(x, "normal"),
        lambda: dpl.utility(x, "base", "median"),
        lambda: dpl.number_of_outputs("compare", 10),
        lambda: dpl.lr_factor("linear", 0, 1),
        lambda: dpl.environment("3d", x),
        lambda: dpl.borda("3d", x),
        lambda: dpl.draw_pairs("3d", 1, False, torch.Generator()),
    ):
        with pytest.raises(ValueError, match="unknown"):
            call()


# ---- distributions as numbers


def test_measures_of_published_rows():
    outputs = {type: double(x) for type, x in ROW0.items()}

    def of(type, risk, alpha=0.01):
        return dpl.utility(outputs[type], type, risk, alpha)

    close(of("base", "quantile"), [1.796875, -0.380859375])
    close(of("mean_and_variance", "sd"), [0.164912665, 0.181034122])
    close(of("mean_and_variance", "quantile"), [-0.143409852, -0.513433502])
    close(of("categorical", "mean"), [0.7700452796, 0.4208215602])
    close(of("categorical", "sd"), [0.2009995586, 0.2703196800])
    close(of("categorical", "quantile"), [0.1136757202, 0.0104574896])
    close(of("categorical", "quantile", 0.05), [0.4136104124, 0.0522874479])
    close(of("categorical", "quantile", 0.5), [0.7684021520, 0.4174180444])
    # Fig. 4: the means prefer the jailbreak, the 1 % quantiles the safe answer
    mv = double([[0.314453125, -1.5703125], [0.451171875, -1.1953125]])
    close(dpl.utility(mv, "mean_and_variance", "sd"), [0.188949691, 0.264369463])
    close(dpl.utility(mv, "mean_and_variance", "quantile"), [-0.125109586, -0.163843464])
    cat = double(
        [
            [
                -1.65625,
                -1.5859375,
                -1.453125,
                -1.078125,
                -0.267578125,
                0.6796875,
                1.3125,
                1.5078125,
                1.5546875,
                1.546875,
            ],
            [
                -1.59375,
                -1.5390625,
                -1.46875,
                -1.1875,
                -0.56640625,
                0.337890625,
                1.21875,
                1.4921875,
                1.578125,
                1.609375,
            ],
        ]
    )
    close(dpl.utility(cat, "categorical", "mean"), [0.7729677499, 0.7878920779])
    close(dpl.utility(cat, "categorical", "quantile"), [0.1111621039, 0.1013121877])


def test_measures_by_integration():
    """Each measure from the quantile function alone: 200,000 midpoints of [0, 1]."""
    outputs = double([[0.3, -0.4], [-1.0, 0.8]])
    t = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    normal = scipy.stats.norm(outputs[:, 0], F.softplus(outputs[:, 1]))
    values = double(normal.ppf(t[:, None]))
    for alpha in (0.01, 0.3):
        close(
            dpl.utility(outputs, "mean_and_variance", "quantile", alpha),
            normal.ppf(alpha).tolist(),
            atol=1e-12,
        )
    close(dpl.utility(outputs, "mean_and_variance", "mean"), values.mean(0).tolist(), atol=1e-4)
    close(dpl.utility(outputs, "mean_and_variance", "sd"), values.std(0).tolist(), atol=1e-4)
    logits = double([[0.1, 0.2, 1.5, -0.3], [2.0, -1.0, 0.0, 0.5]])
    p = logits.softmax(-1)
    atom = (t[:, None, None] >= p.cumsum(-1)).sum(-1).clamp(max=3)  # whose mass contains t
    below = (p.cumsum(-1) - p).expand(len(t), -1, -1).gather(-1, atom[..., None])[..., 0]
    mass = p.expand(len(t), -1, -1).gather(-1, atom[..., None])[..., 0]
    values = (atom + (t[:, None] - below) / mass) / 4
    for alpha in (0.01, 0.3, 0.9):
        close(
            dpl.utility(logits, "categorical", "quantile", alpha),
            values[int(alpha * 200_000)].tolist(),
            atol=1e-4,
        )
    u = atom / 3
    close(dpl.utility(logits, "categorical", "mean"), u.mean(0).tolist(), atol=1e-4)
    close(dpl.utility(logits, "categorical", "sd"), u.std(0).tolist(), atol=1e-4)


def test_quantile_at_the_edges_of_bins():
    logits = torch.randn(7, dtype=torch.float64)
    for i, edge in enumerate(logits.softmax(0).cumsum(0)[:-1].tolist(), 1):
        close(dpl.utility(logits, "categorical", "quantile", edge), i / 7, atol=1e-12)
    rising = [dpl.utility(logits, "categorical", "quantile", a / 50).item() for a in range(1, 50)]
    assert rising == sorted(rising)
    empty = torch.tensor([0.0, -1e9, -1e9, 0.0])  # atoms without mass
    for measure in ("mean", "sd", "quantile"):
        assert dpl.utility(empty, "categorical", measure, 0.5).isfinite()


def test_r_squared_and_intervals():
    assert (
        dpl.r_squared(torch.ones(4), torch.ones(4)) == 0
        and dpl.r_squared(torch.arange(4.0), torch.zeros(4)) == 1
    )
    for k, low, high in [
        (98, 0.4527, 0.5944),
        (7, 0.0182, 0.0752),
        (47, 0.1946, 0.3181),
        (57, 0.2433, 0.3742),
        (38, 0.1518, 0.2666),
        (60, 0.2581, 0.3908),
        (25, 0.0922, 0.1899),
    ]:
        close(dpl.wilson(k, 187), [low, high], atol=5e-5)
        ours, oracle = (
            dpl.wilson(k, 187),
            scipy.stats.binomtest(k, 187).proportion_ci(method="wilson"),
        )
        close(ours, [oracle.low, oracle.high], atol=1e-6)


# ---- Borda count


def preference(env, a, b, shared=False):
    """P(a beats b) by the definition: all outcomes of both coins."""
    (u_a, q_a), (u_b, q_b) = dpl.environment(env, a), dpl.environment(env, b)
    v_a, v_b = u_a / q_a, u_b / q_b

    def wins(x, y):
        return (x > y) + 0.5 * (x == y)

    zero = torch.zeros_like(v_a)
    if shared:
        both, only_a, only_b = (
            torch.minimum(q_a, q_b),
            (q_a - q_b).clamp(min=0),
            (q_b - q_a).clamp(min=0),
        )
        return (
            both * wins(v_a, v_b)
            + only_a * wins(v_a, zero)
            + only_b * wins(zero, v_b)
            + (1 - torch.maximum(q_a, q_b)) / 2
        )
    return (
        q_a * q_b * wins(v_a, v_b)
        + q_a * (1 - q_b) * wins(v_a, zero)
        + (1 - q_a) * q_b * wins(zero, v_b)
        + (1 - q_a) * (1 - q_b) / 2
    )


def test_borda_count_in_closed_form():
    line = ((torch.arange(2000, dtype=torch.float64) + 0.5) / 2000)[:, None]
    for shared in (
        False,
        True,
    ):  # the mean over a grid of midpoints: off by a cell at the jump and at ties
        mean = preference("1d", line[:, None], line[None], shared).mean(1)
        torch.testing.assert_close(dpl.borda("1d", line, shared), mean, atol=5e-4, rtol=0)
    close(dpl.borda("1d", double([[0.4], [0.9], [0.799999999]])), [0.5, 0.5, 0.9], atol=1e-8)
    points = double(
        [[0, 1], [0, 0.5], [0.5, 0.5], [0.9, 0.9], [0.5, 1], [1, 0.5], [0.25, 0.75], [0.9, 0.3]]
    )
    exact = [0.846574, 0.619399, 0.560310, 0.290770, 0.549283, 0.485787, 0.687220, 0.448219]
    close(dpl.borda("2d", points), exact, atol=5e-7)
    side = (torch.arange(300, dtype=torch.float64) + 0.5) / 300
    square = torch.cartesian_prod(side, side)
    torch.testing.assert_close(
        preference("2d", points[:, None], square[None]).mean(1),
        dpl.borda("2d", points),
        atol=1e-3,
        rtol=0,
    )
    assert abs(dpl.borda("2d", square).mean() - 0.5) < 1e-5


def test_borda_count_of_the_released_code_in_2d():
    side = (torch.arange(300, dtype=torch.float64) + 0.5) / 300
    square = torch.cartesian_prod(side, side)
    error = (released.borda_2d(square) - dpl.borda("2d", square)).abs().max().item()
    corner = double([[0, 1]])
    ours, theirs = dpl.borda("2d", corner).item(), released.borda_2d(corner).item()
    print(
        f"at (0, 1) exact {ours:.6f}, the released code {theirs:.6f}; its largest error {error:.3f}"
    )
    assert abs(ours - 0.846574) < 1e-6 and theirs == 1.0 and error == pytest.approx(0.153, abs=1e-3)


def test_ties_of_the_released_code_go_to_the_first():
    """Both utilities are 0 in 1 % of the 1d pairs: we toss a coin, they take the first side."""
    u = torch.zeros(2000)
    assert released.first_wins(u, u).all()
    sides, wins = dpl.draw_pairs("1d", 200_000, False, torch.Generator().manual_seed(0))
    first, second = sides.chunk(2)
    risky = (first[:, 0] >= 0.8) & (second[:, 0] >= 0.8)  # a quarter of them are tied at 0
    order = first[risky, 0] > second[risky, 0]
    upset = (wins[risky, 0] != order).double().mean()
    print(f"lower side wins of risky pairs: {upset:.4f}; exact 3/8")
    assert abs(upset - 3 / 8) < 0.03  # 8,000 pairs: 5 sd


def fit(p, loss, start, lam=0.0):
    """Eq. 6 for a table of alternatives and exact p: minimised to high precision."""
    table = start.double().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [table],
        max_iter=2000,
        tolerance_grad=1e-13,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )
    i, j = torch.triu_indices(len(p), len(p), 1)

    def objective():
        optimizer.zero_grad()
        value = (p[i, j] * loss(table[i], table[j]) + p[j, i] * loss(table[j], table[i])).mean()
        value = value + lam / 2 * (table**2).sum()
        value.backward()
        return value

    for _ in range(20):
        value = optimizer.step(objective)
    return table.detach(), value.item()


def exact_p(upper):
    p = torch.full((len(upper) + 1,) * 2, 0.5, dtype=torch.float64)
    for i, row in enumerate(upper):
        for j, x in enumerate(row, i + 1):
            p[i, j], p[j, i] = x, 1 - x
    return p


def test_base_loss_follows_the_borda_count():
    # Prop. 3.3: all majorities agree with u = 6, 2.8, 2, yet the fit prefers the second, as Borda
    p = exact_p([[0.6, 0.6], [0.9]])
    close(p.mean(1), [0.566667, 0.6, 0.333333], atol=5e-7)
    for lam, expected, objective in [
        (0, (0.29381013, 0.43948234, -0.73329247), 0.6047261292),
        (0.01, (0.278982, 0.417546, -0.696528), 0.6086064026),
        (0.1, (0.196629, 0.294816, -0.491445), 0.6318767288),
        (1, (0.053369, 0.080054, -0.133423), 0.6762525951),
    ]:
        u, value = fit(p, dpl.base_loss, torch.zeros(3, 1), lam)
        u = u[:, 0] - u.mean()
        close(u, expected, atol=1e-7 if lam == 0 else 1e-6)
        close(value, objective, atol=1e-10)
        c = 2 / (3 * 2)  # Eq. 7 with the constant that it drops
        gap = c * (torch.sigmoid(u[:, None] - u) - p).fill_diagonal_(0).sum(1) + lam * u
        assert gap.abs().max() < 1e-7
        if lam == 0:  # Borda matching
            torch.testing.assert_close(
                torch.sigmoid(u[:, None] - u).mean(1), p.mean(1), atol=1e-7, rtol=0
            )
    for p_ab, difference in (
        (0.6, 0.4054651081),
        (0.2, -1.3862943611),
        (0.5, 0.0),
    ):  # the last: Thm. 3.4
        u, _ = fit(exact_p([[p_ab]]), dpl.base_loss, torch.zeros(2, 1))
        close(u[0, 0] - u[1, 0], difference, atol=1e-7)
    means = double([0, 0.5, 1, 2, 4])  # Thm. 3.2: i.i.d. noise keeps the order
    p = torch.special.ndtr((means[:, None] - means) / math.sqrt(2))
    close(p.mean(1), [0.23651507, 0.33021727, 0.43102212, 0.62316555, 0.87907999], atol=5e-9)
    u, _ = fit(p, dpl.base_loss, torch.zeros(5, 1))
    close(
        u[:, 0] - u.mean(),
        [-1.84187774, -1.25493139, -0.66558848, 0.55878235, 3.20361526],
        atol=1e-6,
    )


def test_links_recover_the_distribution_up_to_scale():
    mu, sigma = double([0, 0.5, 1, 1.5, 2.5, 3]), double([0.5, 0.5, 1, 0.7, 1.5, 1])
    z = (mu[:, None] - mu) / (sigma[:, None] ** 2 + sigma**2).sqrt()
    start = torch.stack([mu, torch.log(torch.expm1(sigma))], -1)
    close(dpl.r_squared(mu, sigma), 0.5614451109)
    for link, loss, r2 in (
        ("probit", 0.391242993, 0.56144515),
        ("logistic", 0.391276106, 0.37366778),
    ):
        table, value = fit(
            torch.special.ndtr(z), lambda a, b, link=link: dpl.mean_variance_loss(a, b, link), start
        )
        close(value, loss, atol=2e-9)
        got = dpl.r_squared(table[:, 0], F.softplus(table[:, 1]))
        close(got, r2, atol=2e-6)
        scaled = dpl.r_squared(
            table[:, 0], 2 / math.pi * dpl.utility(table, "mean_and_variance", "sd")
        )
        if link == "logistic":  # a link with the probit's slope at 0
            close(scaled, 0.59547618, atol=2e-6)
            close(1 / (1 + 4 / math.pi**2 * (1 / got - 1)), scaled.item(), atol=1e-12)


# ---- synthetic worlds


def test_synthetic_1d_shows_hidden_context(tmp_path, pictures):
    """Bounds far from what seeds 0 and 1 gave (0.49 to 0.51, 0.96, ...); runs are deterministic."""
    table = dpl.main(dpl.SyntheticArgs(out=str(tmp_path / "run")))
    curves = {
        name: torch.tensor(x)
        for name, x in json.loads((tmp_path / "run/curves.json").read_text()).items()
    }
    u, base = curves["u"], curves["base"]
    assert (
        0.47 < table["base"]["loss"] < 0.52
    )  # 0.48605 bounds every base model; 50,000 labels, sd 0.002
    assert table["base"]["corr. Borda"] > 0.95 > table["base"]["corr. E[u]"] + 0.1
    assert 0.70 <= u[base.argmax()] < 0.80
    assert base[u.sub(0.6).abs().argmin()] - base[u.sub(0.2).abs().argmin()] == pytest.approx(
        2.2176, abs=0.3
    )
    assert table["mean_and_variance"]["loss"] < 0.30 and table["categorical"]["loss"] < 0.34
    assert curves["sd"][u >= 0.8].median() > 50 * curves["sd"][u < 0.8].median()
    atoms = torch.linspace(0, 1, 20)
    mean = curves["p"] @ atoms
    sd = (curves["p"] @ atoms**2 - mean**2).sqrt()
    assert sd[u >= 0.8].mean() > 0.40 and sd[u < 0.75].mean() < 0.15
    assert (tmp_path / "run/figures/dpl.png").stat().st_size > 10_000


def test_synthetic_2d_follows_the_true_borda_count(tmp_path, pictures):
    table = dpl.main(dpl.SyntheticArgs(env="2d", steps=200, out=str(tmp_path / "run")))
    assert table["base"]["corr. Borda"] > 0.97 > table["base"]["corr. E[u]"] + 0.2
    assert (tmp_path / "run/figures/dpl.png").stat().st_size > 10_000


# ---- hidden-context


def test_readers_of_the_tiny_world():
    """Their utilities by the rewards of the world, and the readers measured against themselves."""
    rows = common.load_pairs("tiny", "test")
    readers = dpl.ask_readers(rows)
    for i, row in enumerate(rows):
        for j, text in enumerate(row["responses"]):
            expected = common.tiny_reward(row["prompt"], text)
            assert readers.mean[i, j].item() == pytest.approx(expected)
            assert readers.divides[i, j] == common.tiny_attributes(text)["monster"]
    wins = readers.p_first_wins.view(len(rows), 6)
    for i, row in enumerate(rows[:20]):
        first, second = (
            row["responses"].index(row["chosen"]),
            row["responses"].index(row["rejected"]),
        )
        pair = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)].index(
            tuple(sorted((first, second)))
        )
        p = row["p_chosen"] if first < second else 1 - row["p_chosen"]
        assert wins[i, pair].item() == pytest.approx(p, abs=1e-6)
    column = dpl.compare(readers, readers.mean, readers.sd, readers.worst)
    assert column["corr. E[u]"] == pytest.approx(1) and column["AUC of sd for monsters"] == 1
    assert column["worth of a monster / happy end"] == pytest.approx(-0.125, abs=1e-5)
    assert column["best of 4 by 1 % quantile: monsters"] == 0


def test_hidden_context_in_a_few_steps(tmp_path, capsys, pictures):
    """All of the command, too short to learn; a second call with --resume trains nothing again."""
    options = dict(type="compare", soft_labels=True, batch_size=4, max_steps=2, eval_pairs=8)
    table = dpl.main(dpl.Args(out=str(tmp_path / "run"), **options))
    assert list(table) == ["expected u", "base", "mean_and_variance"]
    assert 0 <= table["base"]["|P(win) - true P(win)|"] < 0.5
    assert "categorical is not shown" in capsys.readouterr().out
    curves = json.loads((tmp_path / "run/curves.json").read_text())
    assert len(curves["mean_and_variance sd"]) == 256
    assert (tmp_path / "run/figures/dpl.png").stat().st_size > 10_000
    again = dpl.main(dpl.Args(out=str(tmp_path / "run"), resume=True, **options))
    for name, column in table.items():
        assert again[name] == pytest.approx(column, abs=1e-4), name
    with pytest.raises(SystemExit, match="--data tiny"):
        dpl.main(dpl.Args(data="hh", **options))


def test_auc_is_that_of_mann_and_whitney():
    generator = torch.Generator().manual_seed(1)
    divides = (torch.rand(40, 4, generator=generator) < 0.3).float()
    sd = torch.randint(0, 6, (40, 4), generator=generator) + 1.5 * divides  # with ties
    counts = scipy.stats.mannwhitneyu(sd[divides == 1], sd[divides == 0])
    value, low, high = dpl.auc(sd, divides)
    assert value == pytest.approx(counts.statistic / (divides.sum() * (1 - divides).sum()).item())
    assert low < value < high
    # Four equal responses are no more evidence than one: the interval is over prompts.
    column = (divides[:, :1], sd[:, :1])
    once = dpl.auc(column[1], column[0])
    fourfold = dpl.auc(column[1].expand(-1, 4), column[0].expand(-1, 4))
    assert fourfold == pytest.approx(once, abs=1e-6)


def test_the_claim_of_hidden_context_follows_the_data():
    generator = torch.Generator().manual_seed(0)
    divides = (torch.rand(64, 4, generator=generator) < 0.3).float()
    noise = torch.rand(64, 4, generator=generator)
    for sd, words in (
        (noise + divides, "holds: in the tiny world"),
        (noise - divides, "does not hold: in the tiny world"),
        (noise, "too few to tell: in the tiny world"),
        (torch.ones(64, 4), "too few to tell: "),  # all tied: exactly 1/2
    ):
        paper, shown = dpl.claim(sd, divides)
        assert "detects hidden context" in paper and shown.startswith(words)
        assert re.search(r" \(\d\.\d\d \[\d\.\d\d, \d\.\d\d\]\)$", shown)
    assert dpl.claim(noise, torch.zeros(64, 4))[1].startswith("too few to tell")  # no monster


def test_the_claims_of_other_commands_follow_the_data():
    u = torch.linspace(0, 1, 50)
    for learned, words in ((-u, "holds"), (u, "does not hold"), (0 * u, "too few to tell")):
        _, shown = dpl.borda_claim(learned, -u, u, "1d")
        assert shown.startswith(f"{words}: in the synthetic 1d world")
    assert dpl.borda_claim(u, u, u, "1d")[1].startswith("too few to tell")  # one order
    low, high = scipy.stats.binomtest(140, 200).proportion_ci(method="wilson")
    shown = dpl.training_claim(0.7, 200, "base", "hh")[1]
    assert shown.startswith("holds: on hh a base model")
    assert shown.endswith(f"(0.700 [{low:.3f}, {high:.3f}])")
    assert dpl.training_claim(0.3, 200, "base", "hh")[1].startswith("does not hold")
    assert dpl.training_claim(0.6, 20, "base", "tiny")[1].startswith("too few to tell: on the tiny")


def test_ties_count_half():
    even = torch.zeros(3, 1)
    assert dpl.right(dpl.base_loss(even, even)).tolist() == [0.5] * 3
    margin = torch.tensor([[1.0], [-1.0], [0.0]])
    assert dpl.right(dpl.base_loss(margin, even)).tolist() == [1, 0, 0.5]


# ---- training, scoring, choosing


def tiny_args(blank, out, **options):
    options = (
        dict(model=str(blank / "model"), data=str(blank / "pairs.jsonl"), max_steps=2, batch_size=8)
        | options
    )
    return dpl.Args(out=str(out), **options)


@pytest.mark.parametrize("type, first", [(type, math.log(2)) for type in TYPES])
def test_a_short_run_of_each_type(blank, tmp_path, type, first):
    history = dpl.main(tiny_args(blank, tmp_path / "run", type=type))
    assert history[0]["loss"] == pytest.approx(
        first, abs=2e-3
    )  # the head's initial weights have sd 2e-4
    assert {"eval_loss", "eval_accuracy"} <= set(history[-1]) and history[-1]["step"] == 2
    K = {"base": 1, "mean_and_variance": 2, "categorical": 10}[type]
    model, tokenizer, meta = dpl.load_reward_model(tmp_path / "run", "float32")
    assert (
        meta["type"] == type
        and meta["K"] == K == len(model.score.weight)
        and meta["link"] == "logistic"
    )
    assert meta["atoms"] == ([i / 9 for i in range(10)] if K == 10 else [])

    # transformers' own classifier reads the folder and gives the same outputs, padded with EOS
    from transformers import AutoModelForSequenceClassification

    rows = common.load_pairs(str(blank / "pairs.jsonl"), "test") + [
        dict(prompt="a b", chosen="c", rejected="d e f g h i j k")
    ]
    ours = torch.cat(dpl.raw_outputs(model, dpl.encode(rows, tokenizer, 512), 8192))
    oracle = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model").eval()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == oracle.config.pad_token_id
    texts = [
        tokenizer(row["prompt"])["input_ids"] + tokenizer(row[key])["input_ids"]
        for row in rows
        for key in ("chosen", "rejected")
    ]
    padded = tokenizer.pad({"input_ids": texts}, return_tensors="pt", padding_side="right")
    with torch.no_grad():
        torch.testing.assert_close(ours, oracle(**padded).logits, atol=1e-5, rtol=1e-4)
        alone = torch.cat([oracle(torch.tensor([ids])).logits for ids in texts])
    torch.testing.assert_close(ours, alone, atol=1e-5, rtol=1e-4)


def batch_entropy_args(blank, out, **options):
    options = dict(entropy="batch", entropy_coeff=0.5, schedule="constant") | options
    return tiny_args(blank, out, type="categorical", **options)


def test_gradient_with_the_entropy_of_a_batch(blank, tmp_path):
    """Micro-batches against the whole batch at once: texts one by one, p averaged as it stands."""
    args = batch_entropy_args(blank, tmp_path / "run")
    common.setup(0)
    tokenizer = common.load_tokenizer(args.model)
    model, _ = dpl.new_reward_model(args, tokenizer)
    model.score.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    rows = dpl.encode(common.load_pairs(args.data, "train"), tokenizer, 512)[:8]
    weights = [p for p in model.parameters() if p.requires_grad]

    # The whole batch.
    logits = []
    for row in rows:
        for response in row["responses"]:
            ids = torch.tensor([row["prompt_ids"] + response])
            logits.append(model.score(model.gpt_neox(ids).last_hidden_state[0, -1]))
    p = torch.stack(logits).softmax(-1)
    M = torch.ones(10, 10).tril(-1) + torch.eye(10) / 2
    mean_p = p.mean(0)
    entropy = -(mean_p * mean_p.log()).sum()
    wins = torch.einsum("bi,ij,bj->b", p[0::2], M, p[1::2])
    objective = -wins.log().mean() - 0.5 * entropy
    expected = torch.autograd.grad(objective, weights)

    counts = set()
    for budget in (1, 200, 8192):
        batches = common.pack_pairs(rows, budget)
        counts.add(len(batches))
        log_mean_p = dpl.log_mean_probabilities(model, batches, args)
        torch.testing.assert_close(log_mean_p, mean_p.log().detach(), atol=1e-5, rtol=1e-5)
        total = 0
        model.zero_grad()
        for batch in batches:
            losses, _ = dpl.batch_losses(model, batch, args, log_mean_p)
            (losses.sum() / 8).backward()
            total += losses.sum().item() / 8
        assert total == pytest.approx(objective.item(), abs=1e-5)
        for weight, gradient in zip(weights, expected, strict=True):
            torch.testing.assert_close(weight.grad, gradient, atol=1e-5, rtol=1e-4)
    assert len(counts) == 3


def test_entropy_of_a_batch_whatever_the_micro_batches(blank, tmp_path, monkeypatch):
    """Losses and weights of runs with three token budgets; H of each micro-batch differs by 6e-5.

    With SGD: Adam turns the rounding errors of a gradient that is 0 into steps of size lr.
    """

    def sgd(model, args):
        head = model.score.weight
        body = [p for p in model.parameters() if p.requires_grad and p is not head]
        return torch.optim.SGD([{"params": body}, {"params": [head]}], args.lr)

    monkeypatch.setattr(dpl, "new_optimizer", sgd)
    runs = []
    for budget in (1, 200, 8192):
        out = tmp_path / str(budget)
        options = dict(max_steps=8, lr=0.1, head_lr=1.0, tokens_per_microbatch=budget)
        history = dpl.main(batch_entropy_args(blank, out, **options))
        losses = [line.get("loss", line.get("eval_loss")) for line in history]
        runs.append((losses, load_file(out / "model/model.safetensors")))
    (losses, weights), *others = runs
    for other_losses, other_weights in others:
        assert other_losses == pytest.approx(losses, abs=1e-5)
        for name, weight in weights.items():
            torch.testing.assert_close(other_weights[name], weight, atol=1e-5, rtol=0)


def test_entropy_of_a_batch_costs_only_those_who_use_it(blank, tmp_path, monkeypatch):
    passes = []
    once = dpl.head_outputs
    monkeypatch.setattr(dpl, "head_outputs", lambda *a: passes.append(1) or once(*a))
    for options, expected in (
        (dict(type="categorical", entropy="batch"), 2),
        (dict(type="categorical", entropy="batch", entropy_coeff=0.0), 1),
        (dict(type="categorical"), 1),
        (dict(type="base", entropy="batch"), 1),
    ):
        passes.clear()
        out = tmp_path / "-".join(map(str, options.values()))
        dpl.main(tiny_args(blank, out, max_steps=1, eval_pairs=2, **options))
        assert len(passes) == expected + 1  # and one of the held-out pairs


def test_zero_head_and_swapped_pairs():
    for type, K in (("base", 1), ("mean_and_variance", 2), ("categorical", 10)):
        zeros = torch.zeros(4, K, dtype=torch.float64)
        close(dpl.pair_losses(zeros, zeros, type).mean(), math.log(2))
        chosen, rejected = torch.randn(2, 64, K, dtype=torch.float64)
        wins = (dpl.pair_losses(chosen, rejected, type) < math.log(2)).double().mean()
        close(wins + (dpl.pair_losses(rejected, chosen, type) < math.log(2)).double().mean(), 1.0)


@pytest.mark.parametrize("type", TYPES)
def test_overfits_eight_pairs(blank, tmp_path, type):
    rows = [json.loads(line) for line in (blank / "pairs.jsonl").read_text().splitlines()[:8]]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    history = dpl.main(
        tiny_args(
            blank,
            tmp_path / "run",
            type=type,
            data=str(tmp_path / "test.jsonl"),
            lr=1e-2,
            max_steps=40,
            schedule="constant",
            entropy_coeff=0.0,
        )
    )
    assert history[-1]["eval_loss"] < 0.05 and history[-1]["eval_accuracy"] == 1.0


@pytest.mark.parametrize("p", [0.7, 0.3])
def test_soft_labels_reach_the_true_probability(blank, tmp_path, p):
    row = json.loads((blank / "pairs.jsonl").read_text().splitlines()[0]) | {"p_chosen": p}
    (tmp_path / "test.jsonl").write_text(json.dumps(row) + "\n")
    history = dpl.main(
        tiny_args(
            blank,
            tmp_path / "run",
            type="base",
            data=str(tmp_path / "test.jsonl"),
            lr=1e-2,
            batch_size=1,
            max_steps=60,
            soft_labels=True,
        )
    )
    assert history[-1]["eval_loss"] == pytest.approx(
        -math.log(p), abs=0.02
    )  # exp(-loss) is P(chosen wins)
    assert history[-2]["loss"] == pytest.approx(
        -0.7 * math.log(0.7) - 0.3 * math.log(0.3), abs=1e-3
    )  # its entropy
    assert (
        history[-2]["accuracy"] == history[-1]["eval_accuracy"] == (p > 0.5)
    )  # whatever the soft loss is


def test_long_pairs_are_dropped_not_cut(blank):
    tokenizer = common.load_tokenizer(str(blank / "model"))
    rows = [
        dict(prompt="a", chosen="b" * n, rejected="c" * m) for n, m in ((9, 9), (10, 9), (9, 10))
    ]
    lengths = [
        max(len(tokenizer("a" + r[k])["input_ids"]) for k in ("chosen", "rejected")) for r in rows
    ]
    kept = dpl.encode(rows, tokenizer, lengths[0])
    assert [row["row"] for row in kept] == [i for i in range(3) if lengths[i] <= lengths[0]]
    assert (
        kept[0]["responses"][0][-1] != tokenizer.eos_token_id
    )  # no end token, as in the released code
    longest = max(
        len(row["prompt_ids"]) + max(map(len, row["responses"]))
        for row in dpl.encode(rows, tokenizer, 512)
    )
    assert (
        len(dpl.encode(rows, tokenizer, longest))
        == 3
        > len(dpl.encode(rows, tokenizer, longest - 1))
    )


@pytest.mark.parametrize(
    "sigma, logistic, matched",
    [(0.25, 1.394, 0.887), (0.5, 1.421, 0.905), (1.0, 1.475, 0.939), (2.0, 1.531, 0.974)],
)
def test_unit_of_the_logistic_link(sigma, logistic, matched):
    """Means from N(0, 1), one sigma: the best fitted sigma is this multiple of the true one."""
    d, weight = (double(x) for x in scipy.special.roots_hermitenorm(201))
    means = torch.stack([math.sqrt(2) * d, 0 * d])  # the difference of two means is N(0, 2)
    p, weight = (
        torch.special.ndtr((means[0] - means[1]) / math.sqrt(2) / sigma),
        weight / weight.sum(),
    )

    def loss(rho):
        sides = [
            torch.stack([m, torch.full_like(m, math.log(math.expm1(rho * sigma)))], -1)
            for m in means
        ]
        forth, back = (dpl.mean_variance_loss(*pair, "logistic") for pair in (sides, sides[::-1]))
        return (weight * (p * forth + (1 - p) * back)).sum().item()

    found = scipy.optimize.minimize_scalar(loss, bounds=(0.3, 3), method="bounded").x
    assert found == pytest.approx(logistic, abs=6e-4)  # published to three decimals
    assert 2 / math.pi * found == pytest.approx(matched, abs=6e-4)  # with the probit's slope at 0


def test_one_name_in_two_files(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text('{"reward_outputs_both": [[1], [2]]}\n')
    files = [str(tmp_path / f"{name}.jsonl") for name in "ab"]
    assert set(dpl.main(dpl.SummarizeArgs(files=tuple(files)))) == {
        f"{file}: both" for file in files
    }


@pytest.mark.parametrize("n", [2, 4])
def test_r_squared_within_prompts(tmp_path, n):
    """Variance 1 within prompts, sd 1 of each, any offsets between prompts: 1/2, for any n."""
    g = torch.Generator().manual_seed(0)
    mean = torch.randn(8000 // n, n, generator=g) + 10 * torch.randn(8000 // n, 1, generator=g)
    outputs = torch.stack([mean, torch.full_like(mean, math.log(math.e - 1))], -1)  # softplus is 1
    path = tmp_path / "outputs.jsonl"
    path.write_text(
        "".join(json.dumps({"reward_outputs_both": x}) + "\n" for x in outputs.tolist())
    )
    found = dpl.main(dpl.SummarizeArgs(files=(str(path),)))["both"].r_squared_within
    assert (
        abs(found - 0.5) < 0.028
    )  # the variance's relative sd is at most sqrt(2 / 4000) = .022, r^2's .0056; 5 sd


def test_evaluate_score_and_summarize(blank, tmp_path):
    rows = [json.loads(line) for line in (blank / "pairs.jsonl").read_text().splitlines()]
    folder = tmp_path / "data"
    for subset, part in (("helpful", rows[:24]), ("harmless", rows[24:])):
        (folder / subset).mkdir(parents=True)
        for split in ("train", "test"):
            lines = "".join(json.dumps(row | {"data_subset": subset}) + "\n" for row in part)
            (folder / subset / f"{split}.jsonl").write_text(lines)
    (tmp_path / "test.jsonl").write_text(
        "".join((folder / s / "test.jsonl").read_text() for s in ("helpful", "harmless"))
    )
    for type in TYPES:
        dpl.main(
            tiny_args(
                blank,
                tmp_path / type,
                type=type,
                data=str(folder),
                subset="helpful",
                lr=1e-2,
                max_steps=6,
            )
        )
    runs = tuple(str(tmp_path / type) for type in TYPES)

    # Pairs: the layout of all scored files, and the released code's for one reward model.
    pairs, old = tmp_path / "pairs.jsonl", tmp_path / "old.jsonl"
    options = dict(names=("mv", "cat"), data=str(tmp_path / "test.jsonl"), out=str(pairs))
    found = dpl.main(dpl.ScoreArgs(checkpoints=runs[1:], **options))
    assert len(found) == 48 and found[0]["p_chosen"] == rows[0]["p_chosen"]
    assert found[0]["responses"] == [rows[0]["rejected"], rows[0]["chosen"]]
    rejected, chosen = double([row["reward_outputs_cat"] for row in found]).unbind(1)
    assert chosen.shape == (48, 10)
    results = dpl.main(dpl.SummarizeArgs(files=(str(pairs),)))
    names = {f"{name}{part}" for name in ("mv", "cat") for part in ("", ", helpful", ", harmless")}
    assert set(results) == names
    better = dpl.utility(chosen, "categorical") >= dpl.utility(rejected, "categorical")
    assert results["cat"].mean == dpl.Rate(better.sum(), 0, 48)
    assert results["cat, helpful"].mean == dpl.Rate(better[:24].sum(), 0, 24)
    stacked = torch.stack([chosen, rejected])
    mean, sd = dpl.utility(stacked, "categorical"), dpl.utility(stacked, "categorical", "sd")
    close(results["cat"].r_squared, dpl.r_squared(mean, sd).item(), atol=1e-12)
    with old.open("w") as file:
        for row in found:
            worse, good = row["reward_outputs_cat"]
            line = dict(
                data_subset=row["data_subset"],
                reward_output_chosen=good,
                reward_output_rejected=worse,
            )
            file.write(json.dumps(line) + "\n")
    same = dpl.main(dpl.SummarizeArgs(files=(str(old),)))
    for part in ("", ", helpful", ", harmless"):
        assert same[f"pairs{part}"] == results[f"cat{part}"]

    # Prompts with four responses each, under three reward models.
    prompts = tmp_path / "prompts.jsonl"
    lines = [
        json.dumps(dict(prompt=row["prompt"], responses=row["responses"])) + "\n"
        for row in rows[:3]
    ]
    prompts.write_text("".join(lines))
    out = tmp_path / "scored.jsonl"
    options = dict(names=("b", "m", "c"), data=str(prompts), alpha=0.2, out=str(out))
    scored = dpl.main(dpl.ScoreArgs(checkpoints=runs, **options))
    assert [json.loads(line) for line in out.read_text().splitlines()] == scored
    assert [len(row["reward_outputs_m"]) for row in scored] == [4, 4, 4]
    for row in scored:
        for name, type in zip("bmc", TYPES, strict=True):
            values = dpl.utility(torch.tensor(row[f"reward_outputs_{name}"]), type, "quantile", 0.2)
            torch.testing.assert_close(torch.tensor(row[f"risk_{name}"]), values)
            assert row[f"reward_model_{name}"]["type"] == type
    assert dpl.main(dpl.SummarizeArgs(files=(str(out),)))["m"].mean.hits <= 3
    one = dpl.main(
        dpl.ScoreArgs(
            checkpoints=runs[1:2], prompt=rows[0]["prompt"], response=rows[0]["responses"][1]
        )
    )
    torch.testing.assert_close(
        one[0]["reward_outputs_both"][0], scored[0]["reward_outputs_m"][1], atol=1e-5, rtol=0
    )


def test_bad_input_ends_in_one_line(blank, tmp_path):
    dpl.main(tiny_args(blank, tmp_path / "run", type="categorical"))
    (tmp_path / "mixed.jsonl").write_text(
        '{"prompt": "a", "responses": ["b", "c"]}\n{"prompt": "a", "responses": ["b", ""]}\n'
    )
    (tmp_path / "other.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "string.jsonl").write_text('{"prompt": "a", "responses": "bc"}\n')
    (tmp_path / "single.jsonl").write_text('{"reward_outputs_x": [[1]]}\n')
    row = json.loads((blank / "pairs.jsonl").read_text().splitlines()[0])
    (tmp_path / "test.jsonl").write_text(json.dumps(row | {"p_chosen": 75}) + "\n")
    (tmp_path / "ragged.jsonl").write_text(
        '{"reward_outputs_x": [[1], [2]]}\n{"reward_outputs_x": [[1], [2, 3]]}\n'
    )
    (tmp_path / "plain").mkdir()
    for file in (blank / "model").iterdir():
        (tmp_path / "plain" / file.name).write_bytes(file.read_bytes())
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    for file in (tmp_path / "run" / "model").iterdir():
        (wrong / file.name).write_bytes(file.read_bytes())
    (wrong / "config.json").write_text(
        (wrong / "config.json").read_text().replace('"K": 10', '"K": 20')
    )
    run_folder, out = (str(tmp_path / "run"),), str(tmp_path / "out.jsonl")
    for args, message in (
        (
            dpl.ScoreArgs(checkpoints=run_folder, data=str(tmp_path / "mixed.jsonl"), out=out),
            "mixed.jsonl:2: needs",
        ),
        (
            dpl.ScoreArgs(checkpoints=run_folder, data=str(tmp_path / "other.jsonl"), out=out),
            "other.jsonl:1: needs",
        ),
        (dpl.ScoreArgs(checkpoints=run_folder, data="tiny", alpha=1.0, out=out), "--alpha"),
        (dpl.ScoreArgs(checkpoints=run_folder, names=("a", "b"), data="tiny", out=out), "--names"),
        (
            dpl.ScoreArgs(checkpoints=(str(tmp_path / "plain"),), prompt="a", response="b"),
            "no entry dpl",
        ),
        (dpl.ScoreArgs(checkpoints=(str(wrong),), prompt="a", response="b"), "head has 10 outputs"),
        (
            dpl.SummarizeArgs(files=(str(tmp_path / "other.jsonl"),)),
            "other.jsonl:1: no reward_outputs_NAME",
        ),
        (
            dpl.SummarizeArgs(files=(str(tmp_path / "ragged.jsonl"),)),
            "ragged.jsonl:2: reward_outputs_x",
        ),
        (dpl.SummarizeArgs(files=(str(tmp_path / "ragged.jsonl"),), alpha=0.0), "--alpha"),
        (tiny_args(blank, tmp_path / "a", max_length=3), "no row is left"),
        (tiny_args(blank, tmp_path / "b", subset="helpful"), "no row of group 'helpful'"),
        (tiny_args(blank, tmp_path / "c", type="categorical", num_atoms=1), "--num-atoms 1"),
        (
            dpl.ScoreArgs(checkpoints=run_folder, data=str(tmp_path / "string.jsonl"), out=out),
            "string.jsonl:1: needs",
        ),
        (dpl.ScoreArgs(checkpoints=run_folder, data="tiny", alpha=math.nan, out=out), "--alpha"),
        (tiny_args(blank, tmp_path / "f", lr=math.nan), "--lr"),
        (tiny_args(blank, tmp_path / "g", sigma_floor=-1.0), "--sigma-floor"),
        (dpl.SummarizeArgs(), "--files"),
        (dpl.ScoreArgs(checkpoints=run_folder, prompt="a", out=out), "give --data"),
        (
            dpl.ScoreArgs(checkpoints=run_folder * 2, names=("a", "a"), data="tiny", out=out),
            "--names",
        ),
        (dpl.SummarizeArgs(files=(str(tmp_path / "single.jsonl"),)), "nothing to compare"),
        (tiny_args(blank, tmp_path / "d", eval_pairs=0), "--eval-pairs"),
        (
            tiny_args(
                blank,
                tmp_path / "e",
                soft_labels=True,
                batch_size=1,
                data=str(tmp_path / "test.jsonl"),
            ),
            "p_chosen",
        ),
        (dpl.SyntheticArgs(env="2d", shared_context=True), "--shared-context"),
    ):
        with pytest.raises(SystemExit, match=message) as stop:
            dpl.main(args)
        assert "\n" not in str(stop.value.code)
    assert not Path(out).exists()


def test_two_processes_and_a_resumed_run_equal_one(blank, tmp_path):
    """FSDP over two processes, and steps 0-1 then 2-3, against one process without a stop."""
    command = [
        ROOT / "methods/dpl.py",
        "train",
        "--model",
        blank / "model",
        "--data",
        blank / "pairs.jsonl",
        "--batch-size",
        "8",
        "--max-steps",
        "4",
        "--type",
        "categorical",
        "--entropy",
        "example",
        "--schedule",
        "constant",
    ]
    run(*command, "--out", tmp_path / "one")
    run(*command, "--out", tmp_path / "two", processes=2)
    run(*command, "--save-every", "16", "--max-steps", "2", "--out", tmp_path / "stopped")
    for file in (tmp_path / "stopped" / "model").iterdir():
        file.unlink()
    (tmp_path / "stopped" / "model").rmdir()
    run(*command, "--resume", "--out", tmp_path / "stopped")
    one, two, stopped = (records(tmp_path / name) for name in ("one", "two", "stopped"))
    for line, other in zip(one, two, strict=True):
        assert line.keys() == other.keys()
        for key in {"loss", "eval_loss", "grad_norm"} & line.keys():
            assert line[key] == pytest.approx(other[key], rel=1e-4), key  # sums in another order
    assert [line.get("loss", line.get("eval_loss")) for line in one] == [
        line.get("loss", line.get("eval_loss")) for line in stopped
    ]  # bit for bit


def test_entropy_of_a_batch_on_two_processes(blank, tmp_path):
    command = [ROOT / "methods/dpl.py", "train", "--model", blank / "model"]
    command += ["--data", blank / "pairs.jsonl", "--batch-size", "8", "--max-steps", "4"]
    command += ["--type", "categorical", "--entropy", "batch", "--entropy-coeff", "0.5"]
    # Adam makes steps of a rate of what is 0 but for rounding, so the rates are small.
    command += ["--head-lr", "0.01", "--lr", "1e-6", "--schedule", "constant"]
    run(*command, "--out", tmp_path / "one")
    run(*command, "--out", tmp_path / "two", processes=2)
    for line, other in zip(records(tmp_path / "one"), records(tmp_path / "two"), strict=True):
        for key in {"loss", "eval_loss"} & line.keys():
            assert line[key] == pytest.approx(other[key], abs=1e-5)
    one, two = (load_file(tmp_path / name / "model/model.safetensors") for name in ("one", "two"))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, atol=1e-5, rtol=0)


# ---- signals


@pytest.fixture
def asked_at(monkeypatch):
    """asked_at(name, n): as if SIGTERM came in the n-th call of this function of dpl.py."""
    monkeypatch.setattr(common, "signals", [])

    def ask(name, n):
        calls, function = [], getattr(dpl, name)

        def counted(*args, **options):
            calls.append(1)
            if len(calls) == n:
                common.signals.append(signal.SIGTERM)
            return function(*args, **options)

        monkeypatch.setattr(dpl, name, counted)
        return calls

    return ask


def stopped(args):
    with pytest.raises(SystemExit) as stop:
        dpl.main(args)
    assert stop.value.code == 143


def test_score_stops_between_two_micro_batches(blank, tmp_path, asked_at):
    dpl.main(tiny_args(blank, tmp_path / "run", max_steps=1))
    calls = asked_at("head_outputs", 2)
    out = tmp_path / "out.jsonl"
    data = tmp_path / "test.jsonl"  # a name with which all of the rows are held out
    shutil.copy(blank / "pairs.jsonl", data)
    options = dict(checkpoints=(str(tmp_path / "run"),), out=str(out), tokens_per_microbatch=1)
    stopped(dpl.ScoreArgs(data=str(data), **options))
    assert len(calls) == 2 and not out.exists() and not list(tmp_path.glob("out*"))


def test_synthetic_stops_between_two_steps(tmp_path, asked_at):
    calls = asked_at("synthetic_losses", 150)
    stopped(dpl.SyntheticArgs(out=str(tmp_path / "run"), width=4, batch_size=4))
    assert len(calls) == 150
    assert [line["step"] for line in records(tmp_path / "run")] == [0, 100]


@pytest.mark.parametrize("n", [8 + 8 + 3, 8 + 8 + 8 + 8 + 3])
def test_a_stopped_evaluation_is_resumed(blank, tmp_path, asked_at, n):
    """8 pairs, one at a time, to evaluate before a step, for each of two steps, and at the end."""
    data = tmp_path / "test.jsonl"  # a name with which all of the rows are held out
    shutil.copy(blank / "pairs.jsonl", data)
    options = dict(max_steps=2, eval_pairs=8, eval_every=8, tokens_per_microbatch=1)
    options["data"] = str(data)
    whole = dpl.main(tiny_args(blank, tmp_path / "whole", **options))
    args = tiny_args(blank, tmp_path / "run", **options)
    calls = asked_at("head_outputs", n)
    stopped(args)
    assert len(calls) == n and not (tmp_path / "run/model").exists()
    common.signals.clear()
    dpl.main(dataclasses.replace(args, resume=True))
    kept = [line.get("eval_loss", line.get("loss")) for line in records(tmp_path / "run")]
    assert kept == [line.get("eval_loss", line.get("loss")) for line in whole]


def test_sigterm_ends_a_process(tmp_path):
    command = ["methods/dpl.py", "synthetic", "--steps", "1000000", "--out", tmp_path / "run"]
    process = begin(*command)
    process.wait_for("\n")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120).returncode == 143


# ---- what is refused


def refusal(args):
    """The line with which it is refused: one, and not too long."""
    with pytest.raises(SystemExit) as stop:
        dpl.main(args)
    line = stop.value.code
    assert isinstance(line, str) and "\n" not in line, line
    assert len(line) <= 200 + line.count("/") * 20, line  # folders of tests have long names
    return line


NUMBERS = []
for command in (dpl.Args, dpl.SyntheticArgs, dpl.ScoreArgs, dpl.SummarizeArgs):
    for field in dataclasses.fields(command):
        if field.type in (int, float):
            NUMBERS.append((command, field.name))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1, 1e30, 2**60])
@pytest.mark.parametrize("command, name", NUMBERS, ids=lambda x: getattr(x, "__name__", x))
def test_numbers_out_of_range(command, name, value, tmp_path, monkeypatch):
    monkeypatch.setattr(dpl, "setup", lambda seed: pytest.fail("loading began"))
    monkeypatch.chdir(tmp_path)
    line = refusal(command(**{name: value}))
    assert line.startswith("--" + name.replace("_", "-") + " ")
    assert list(tmp_path.iterdir()) == []


def test_options_that_do_not_go_together(tmp_path, monkeypatch):
    monkeypatch.setattr(dpl, "setup", lambda seed: pytest.fail("loading began"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "config.json").write_text("{}")
    for args, flag in (
        (dpl.Args(batch_size=0), "--batch-size"),
        (dpl.Args(max_length=0), "--max-length"),
        (dpl.Args(num_atoms=1001), "--num-atoms"),
        (dpl.Args(seed=2**32), "--seed"),
        (dpl.Args(out="taken"), "--overwrite"),
        (dpl.SyntheticArgs(width=0), "--width"),
        (dpl.SyntheticArgs(width=2**14), "--width"),
        (dpl.SyntheticArgs(width=2**13, batch_size=2**20), "--batch-size"),
        (dpl.SyntheticArgs(lr=0.0), "--lr"),
        (dpl.ScoreArgs(checkpoints=(), names=(), data="tiny"), "--checkpoints"),
        (dpl.ScoreArgs(names=("",), data="tiny"), "--names"),
        (dpl.ScoreArgs(data="tiny", prompt="a"), "--response"),
        (dpl.ScoreArgs(data="tiny", out=""), "--out"),
        (dpl.ScoreArgs(data="tiny", out="taken", overwrite=True), "--out"),
        (dpl.ScoreArgs(data="tiny", out="missing/out.jsonl"), "--out"),
        (dpl.ScoreArgs(data="tiny", out="taken/config.json"), "--overwrite"),
    ):
        assert flag in refusal(args)


def summary_line(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return refusal(dpl.SummarizeArgs(files=(str(path),)))


def test_summarize_checks_every_row(tmp_path):
    path = tmp_path / "scored.jsonl"
    meta = {"type": "mean_and_variance", "K": 2, "link": "logistic", "atoms": []}
    good = {"reward_outputs_x": [[1, 2], [3, 4]], "reward_model_x": meta}
    for outputs in (
        [[1, 2]],
        [[1, 2], [3]],
        [[1, 2], [3, "4"]],
        [[1, 2], [3, True]],
        [[1, 2], [3, math.nan]],
        [[1, 2], [3, math.inf]],
        [[1, 2], [3, 10**400]],
        [[1, 2], [3, None]],
        [[1, 2], 3],
        [],
        [[], []],
        {"a": [1, 2]},
        "text",
        None,
    ):
        row = good | {"reward_outputs_x": outputs}
        line = summary_line(path, good, good, row)
        assert f"{path}:3: reward_outputs_x" in line and line.endswith("score the file again")
    assert f"{path}:2: reward_outputs_x" in summary_line(path, good, {"reward_model_x": meta})
    for other in (
        meta | {"type": "categorical"},
        meta | {"link": "probit"},
        meta | {"type": "base"},
        meta | {"type": ["base"]},
        meta | {"type": "normal"},
        meta | {"link": 3},
        meta | {"K": 3},
        {},
        "base",
        None,
    ):
        line = summary_line(path, good, good | {"reward_model_x": other})
        assert f"{path}:2: reward_model_x" in line
    alone = {"reward_outputs_x": good["reward_outputs_x"]}
    assert f"{path}:1: reward_model_x" in summary_line(path, alone, good)
    long = "y\n" * 300
    assert f"{path}:1: " in summary_line(path, {f"reward_outputs_{long}": 3})


def test_damaged_reward_models(blank, tmp_path):
    dpl.main(tiny_args(blank, tmp_path / "run", max_steps=1))
    bad = tmp_path / "bad"
    config, weights = bad / "config.json", bad / "model.safetensors"
    whole = json.loads((tmp_path / "run/model/config.json").read_text())
    head = load_file(tmp_path / "run/model/model.safetensors")

    def line(place):
        found = refusal(dpl.ScoreArgs(checkpoints=(str(bad),), prompt="a", response="b"))
        assert found.startswith(f"{place}: ")
        shutil.rmtree(bad)
        shutil.copytree(tmp_path / "run/model", bad)
        return found

    shutil.copytree(tmp_path / "run/model", bad)
    config.unlink()
    line(config)
    for text in ("", "{", '"text"', "\udcff", "[1]", json.dumps(whole)[:-30]):
        config.write_bytes(text.encode(errors="surrogateescape"))
        line(config)
    for meta in (
        None,
        3,
        "base",
        {"K": 2, "link": "logistic"},
        whole["dpl"] | {"type": "normal"},
        whole["dpl"] | {"type": "base"},
        whole["dpl"] | {"K": "2"},
        whole["dpl"] | {"link": "logit"},
    ):
        config.write_text(json.dumps(whole | {"dpl": meta}))
        line(config)
    config.write_text(json.dumps(whole | {"dpl": {"type": "base", "K": 1}}))
    assert "head has 2 outputs" in line(bad)
    weights.write_bytes(weights.read_bytes()[:100])
    line(weights)
    for weight in (torch.full((2, 32), math.nan), torch.zeros(2), torch.zeros(2, 16)):
        save_file(head | {"score.weight": weight}, weights, metadata={"format": "pt"})
        line(bad)
    head.pop("score.weight")
    save_file(head, weights, metadata={"format": "pt"})
    assert "no score.weight" in line(bad)

    # The second of two is refused before the first has scored anything.
    config.unlink()
    both = (str(tmp_path / "run"), str(bad))
    options = dict(names=("a", "b"), data=str(blank / "pairs.jsonl"))
    out = tmp_path / "out.jsonl"
    assert str(config) in refusal(dpl.ScoreArgs(checkpoints=both, out=str(out), **options))
    assert not out.exists()


def test_texts_that_cannot_be_scored(blank, tmp_path):
    dpl.main(tiny_args(blank, tmp_path / "run", max_steps=1))
    run_folder, path, out = (str(tmp_path / "run"),), tmp_path / "prompts.jsonl", tmp_path / "out"
    for options in (
        dict(prompt="a", response="b<|endoftext|>"),
        dict(prompt="a\udcff", response="b"),
        dict(prompt="a", response="b\ud83d"),
        dict(prompt="a", response="b" * 40, max_length=3),
    ):
        line = refusal(dpl.ScoreArgs(checkpoints=run_folder, **options))
        assert line.startswith("--prompt, --response: ")
    for row in (
        {"responses": ["b"]},
        {"prompt": "a"},
        {"prompt": None, "responses": ["b"]},
        {"prompt": 5, "responses": ["b"]},
        {"prompt": "a", "responses": []},
        {"prompt": "a", "responses": [5]},
        {"prompt": "a", "responses": ["\ud83d"]},
    ):
        path.write_text(json.dumps({"prompt": "a", "responses": ["b"]}) + "\n" + json.dumps(row))
        line = refusal(dpl.ScoreArgs(checkpoints=run_folder, data=str(path), out=str(out)))
        assert line.startswith(f"{path}:2: needs prompt and responses")
    for good in (1, 0):
        rows = [{"prompt": "a", "responses": ["b"]}] * good
        rows.append({"prompt": "a", "responses": ["<|endoftext|>"]})
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        line = refusal(dpl.ScoreArgs(checkpoints=run_folder, data=str(path), out=str(out)))
        assert line.startswith(str(path))
    assert not out.exists()


def test_no_run_folder_where_a_run_is_refused(blank, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(blank / "model", broken)
    (broken / "model.safetensors").write_bytes(b"")
    out = tmp_path / "out"
    for options in (
        dict(model=str(broken)),
        dict(data=str(tmp_path / "missing.jsonl")),
        dict(max_length=3),
        dict(batch_size=1000),
        dict(subset="helpful"),
        dict(type="compare", data="tiny", max_length=30),
        dict(type="compare", data="tiny", model=str(broken)),
    ):
        assert refusal(tiny_args(blank, out, **options))
        assert not out.exists(), options


def test_help_is_instant_and_lists_the_commands():
    text = run(ROOT / "methods/dpl.py", "--help").stdout
    assert all(name in text for name in dpl.PRESETS) and "Eq. 1" in text


# ---- groups of readers in data of one's own


def group_rows():
    """Pairs that two groups of any name have judged, with means and sds; by hand below."""
    judged = [  # group, prompt, chosen, rejected
        ("cats", "p", "a", "b"),
        ("cats", "p", "a", "b"),
        ("dogs", "p", "b", "a"),  # the groups disagree on a and b
        ("cats", "q", "c", "d"),
        ("dogs", "q", "c", "d"),  # and agree on c and d
        ("dogs", "q", "e", "d"),  # nobody else judged e
    ]
    mean = dict(a=2.0, b=1.0, c=0.0, d=0.0, e=3.0)
    sd = dict(a=0.5, b=0.2, c=0.1, d=0.3, e=9.0)
    rows = []
    for group, prompt, chosen, rejected in judged:
        row = dict(group=group, prompt=prompt, chosen=chosen, rejected=rejected)
        row["responses"] = [rejected, chosen]
        row["mean_m"] = [mean[rejected], mean[chosen]]
        row["sd_m"] = [sd[rejected], sd[chosen]]
        rows.append(row)
    return rows


def test_groups_by_hand():
    rows = group_rows()
    table = dpl.group_table(rows, "m")
    assert list(table) == ["all", "cats", "dogs"]
    # cats: two hits and a tie; dogs: a miss, a tie and a hit
    assert (table["cats"].pairs, table["cats"].hits) == (3, 2.5)
    assert (table["dogs"].pairs, table["dogs"].hits) == (3, 1.5)
    assert table["all"].hits == 4.0
    assert table["cats"].sd == pytest.approx((0.7 + 0.7 + 0.4) / 6)
    shared = dpl.shared_responses(rows, "m")
    found = sorted((one.sd, one.difference) for one in shared)
    assert found == [(0.1, 0.0), (0.2, 1.0), (0.3, 0.0), (0.5, 1.0)]
    # Of 2 x 2 comparisons .5 > .1, .5 > .3, .2 > .1 and .2 < .3.
    assert dpl.found_by_spread(shared) == 0.75
    assert math.isnan(dpl.found_by_spread(shared[:1]))
    # Groups that are all right or all wrong, and responses of one kind, can be drawn.
    certain = {"all": dpl.Group(3, 3.0, 0.1), "cats": dpl.Group(174, 174.0, 0.1)}
    certain["dogs"] = dpl.Group(7, 0.0, 0.1)
    dpl.draw_groups(certain, shared[:1], "")


def test_found_by_spread_is_the_rank_sum_statistic():
    generator = torch.Generator().manual_seed(0)
    sds = (torch.randint(0, 20, (50,), generator=generator) / 20).tolist()  # with ties
    differences = torch.rand(50, generator=generator).tolist()
    shared = [dpl.Shared(sd, difference) for sd, difference in zip(sds, differences, strict=True)]
    divided = [one.sd for one in shared if one.difference >= 0.5]
    agreed = [one.sd for one in shared if one.difference < 0.5]
    U = scipy.stats.mannwhitneyu(divided, agreed).statistic
    assert dpl.found_by_spread(shared) == pytest.approx(U / len(divided) / len(agreed), abs=1e-6)


@pytest.mark.parametrize("column", ["group", "subset", "data_subset"])
def test_groups_of_any_name_in_a_csv(blank, tmp_path, capsys, column, pictures):
    """Train on one's own CSV, evaluate it: means and sds, a table of the groups, a figure."""
    rows = [json.loads(line) for line in (blank / "pairs.jsonl").read_text().splitlines()]
    data = tmp_path / "test.csv"
    with data.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "chosen", "rejected", column])
        for row in rows:
            writer.writerow([row["prompt"], row["chosen"], row["rejected"], "left wing"])
            writer.writerow([row["prompt"], row["rejected"], row["chosen"], "right, of it"])
    run = tmp_path / "run"
    dpl.main(tiny_args(blank, run, type="mean_and_variance", data=str(data), subset="left wing"))
    out = tmp_path / "eval.jsonl"
    args = dpl.ScoreArgs(checkpoints=(str(run),), names=("m",), data=str(data), out=str(out))
    capsys.readouterr()
    found = dpl.main(args)
    printed = capsys.readouterr().out
    for row in found:
        outputs = double(row["reward_outputs_m"])
        assert row["mean_m"] == outputs[:, 0].tolist()
        close(double(row["sd_m"]), F.softplus(outputs[:, 1]).tolist(), atol=1e-6)
    assert "left wing                     48" in printed
    assert "right, of it                  48" in printed
    assert "r^2" in printed and "96 rows: " in printed
    assert (tmp_path / "eval.png").stat().st_size > 5000
    # Whatever one group prefers, the other does not: both are right in half of all.
    table = dpl.group_table(found, "m")
    assert table["left wing"].hits + table["right, of it"].hits == 48
    with pytest.raises(SystemExit, match="'centre'.*left wing, right, of it"):
        dpl.main(dpl.replace(args, subset="centre", overwrite=True))


def test_prompts_with_any_number_of_responses_are_scored(blank, tmp_path, capsys):
    run = tmp_path / "run"
    dpl.main(tiny_args(blank, run, type="categorical"))
    data = tmp_path / "p.jsonl"
    rows = [{"prompt": "p", "responses": ["a", "b"]}, {"prompt": "p", "responses": ["c"]}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    capsys.readouterr()
    out = str(tmp_path / "o.jsonl")
    found = dpl.main(dpl.ScoreArgs(checkpoints=(str(run),), data=str(data), out=out))
    assert [len(row["mean_both"]) for row in found] == [2, 1]
    printed = capsys.readouterr().out
    assert "mean        sd  response" in printed and "r^2" not in printed
