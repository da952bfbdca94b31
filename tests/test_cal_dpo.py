"""Cal-DPO against published numbers, closed forms and exact minimisers; then whole runs."""

import math

import cal_dpo
import pytest
import released
import torch
import torch.nn.functional as F
from cal_dpo import PRESETS, Args, cal_dpo_loss, pair_losses
from conftest import records
from dpo import dpo_loss
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

import common

# Eight pairs: log-probs of chosen and rejected under the policy, then under the reference, beta,
# and both lengths.
PAIRS = {
    "A": (-10, -12, -10, -12, 0.1, 8, 10),
    "B": (-45.5, -60.25, -50, -55, 0.1, 20, 25),
    "C": (-52, -58, -50, -55, 0.1, 26, 20),
    "D": (-30, -20, -25, -24, 0.5, 10, 8),
    "E": (-120.75, -98.5, -118, -99.125, 0.001, 60, 50),
    "F": (-3.2, -4.1, -3, -5, 1, 2, 4),
    "G": (-75, -75, -70, -80, 0.01, 30, 40),
    "H": (-45, -65, -50, -60, 0.1, 18, 30),
}
# Loss, and its derivatives by the chosen and the rejected log-prob, of the released implementations
# in float64: lam 1; lam 0.5; lam 1 with the released code's shift at 0.3.
SUMMED = {
    "A": (50.69314718, -10.5, 10.5, 25.69314718, -5.5, 5.5, 58.69314718, -14.5, 6.5),
    "B": (
        0.312558293,
        -1.000058291,
        -0.4999417087,
        0.156308293,
        -0.5000582913,
        -0.2499417087,
        11.31255829,
        -5.000058291,
        -4.499941709,
    ),
    "C": (
        53.31326169,
        -14.26894142,
        4.268941421,
        26.81326169,
        -7.268941421,
        2.268941421,
        81.31326169,
        -18.26894142,
        0.2689414214,
    ),
    "D": (
        70.0001234,
        -12.99987661,
        10.99987661,
        39.5001234,
        -6.999876605,
        5.999876605,
        71.1201234,
        -13.79987661,
        10.19987661,
    ),
    "E": (
        503386.36177070,
        -1006.466914,
        1002.216914,
        251694.8852,
        -503.716914,
        501.591914,
        584236.3618,
        -1406.466914,
        602.216914,
    ),
    "F": (
        3.837335325,
        -2.150260106,
        3.550260106,
        2.612335325,
        -1.450260106,
        2.150260106,
        3.637335325,
        -2.550260106,
        3.150260106,
    ),
    "G": (
        6060.000045,
        -110.9999546,
        110.9999546,
        3035.000045,
        -55.9999546,
        55.9999546,
        6860.000045,
        -150.9999546,
        70.9999546,
    ),
    "H": (
        4.539889922e-05,
        -4.53978687e-05,
        4.53978687e-05,
        4.539889922e-05,
        -4.53978687e-05,
        4.53978687e-05,
        8.000045399,
        -4.000045398,
        -3.999954602,
    ),
}
# The same of log-probs per token (derivatives still by the sums): lam 0.5; lam 1.
AVERAGED = {
    "A": (25.69314718, -0.6875, 0.55, 50.69314718, -1.3125, 1.05),
    "B": (23.37147863, -0.2583966506, 0.2073173205, 46.24384113, -0.4971466506, 0.3989173205),
    "C": (25.30610006, -0.2137946912, 0.2665869448, 49.95492403, -0.4090609634, 0.5090869448),
    "D": (3.563261688, -0.2231058579, 0.2788823223, 5.813261688, -0.3731058579, 0.4663823223),
    "E": (250029.8905, -8.342673542, 10.01054158, 500059.0583, -16.67677076, 20.01079158),
    "F": (1.311605104, -0.5902711524, 0.3263855762, 1.754417604, -0.8902711524, 0.5076355762),
    "G": (2515.454611, -1.691302359, 1.267435103, 5030.059646, -3.363524581, 2.520560103),
    "H": (23.32566265, -0.28405026, 0.1741338597, 46.15590956, -0.546395939, 0.3352449708),
}
# Other contrasts at lam 1.
CONTRASTS = {
    "slic": {
        "A": (51, -11, 11),
        "B": (0.3125, -1, -0.5),
        "C": (53, -14, 4),
        "D": (71, -13, 11),
        "H": (0, 0, 0),
    },
    "ipo": {
        "A": (75, -20, 20),
        "B": (22.875, 8.5, -10),
        "C": (69, -22, 12),
        "D": (161, -32, 30),
        "H": (25, 10, -10),
    },
}


def doubles(values, **options):
    """Numbers, or rows of numbers, as float64 tensors with one dimension."""
    tensors = []
    for value in values:
        tensor = torch.tensor(value, dtype=torch.float64).reshape(-1)
        tensors.append(tensor.requires_grad_(options.get("requires_grad", False)))
    return tensors


def loss_and_slopes(name, average=False, loss=cal_dpo_loss, **options):
    *logps, beta, n_w, n_l = PAIRS[name]
    logps = doubles(logps, requires_grad=True)
    lengths = (n_w, n_l, n_w, n_l) if average else (1, 1, 1, 1)
    value = loss(*(x / n for x, n in zip(logps, lengths)), beta, **options)
    value.sum().backward()
    return value.item(), logps[0].grad.item(), logps[1].grad.item()


@pytest.mark.parametrize("name", PAIRS)
def test_published_losses_and_gradients(name):
    def published(*values):
        return pytest.approx(values, rel=5e-9, abs=1e-12)  # ten printed digits or fewer

    assert loss_and_slopes(name) == published(*SUMMED[name][:3])
    assert loss_and_slopes(name, lam=0.5) == published(*SUMMED[name][3:6])
    assert loss_and_slopes(name, average=True, lam=0.5) == published(*AVERAGED[name][:3])
    assert loss_and_slopes(name, average=True) == published(*AVERAGED[name][3:])
    for contrast, rows in CONTRASTS.items():
        if name in rows:
            assert loss_and_slopes(name, contrast=contrast) == published(*rows[name])

    # The released Pythia code has a shift, here 1/2; its commands leave it at 0, which selects DPO.
    theirs = {"loss": released.cal_dpo_loss_pythia}
    assert loss_and_slopes(name, **theirs, shift=0.3) == published(*SUMMED[name][6:])
    assert loss_and_slopes(name, **theirs, shift=0.5) == published(*SUMMED[name][:3])
    print("released:", loss_and_slopes(name, **theirs), " here:", loss_and_slopes(name))
    assert loss_and_slopes(name, **theirs) == loss_and_slopes(name, loss=dpo_loss)


def test_an_unknown_contrast_is_an_error():
    with pytest.raises(ValueError, match="unknown contrast 'hinge'"):
        loss_and_slopes("A", contrast="hinge")


def test_released_last_version():
    """lam is 0.5; each pair gets the mean calibration of its batch; rewards are log-probs."""
    logps = doubles(zip(PAIRS["B"][:4], PAIRS["C"][:4]))
    theirs = released.cal_dpo_loss_ultrafeedback(*logps, 0.1)
    ours = cal_dpo_loss(*logps, 0.1)
    print("released:", theirs.tolist(), " here:", ours.tolist())
    assert theirs.tolist() == pytest.approx([13.328183292964663, 13.641386687518223], rel=1e-12)
    assert ours.tolist() == pytest.approx([0.312558292964663, 53.31326168751822], rel=1e-12)
    at_half = cal_dpo_loss(*logps, 0.1, lam=0.5).mean().item()
    assert theirs.mean().item() == pytest.approx(at_half, rel=1e-12)  # only the mean is right
    assert theirs.mean().item() == pytest.approx(13.484784990, abs=1e-9)

    # A pair that the policy still ranks right, although its margin has fallen.
    pair = doubles([[-10.0], [-12.0], [-5.0], [-9.0]])
    chosen, rejected = released.cal_dpo_logged_rewards(*pair[:2])
    metrics = common.pair_metrics(*pair, 0.1)
    print("released accuracy:", (chosen > rejected).float().item(), " here:", metrics)
    assert (chosen > rejected).item()
    assert metrics["rewards/accuracies"].item() == 0 and metrics["ranking_accuracy"].item() == 1


def test_closed_forms():
    torch.manual_seed(0)
    c, r, rc, rr = (10 * torch.randn(4, 64, dtype=torch.float64)).unbind()
    r_w, r_l, h = c - rc, r - rr, c - rc - r + rr
    for beta, lam in ((0.1, 1.0), (0.001, 1.0), (0.001, 0.5)):
        start = cal_dpo_loss(c, r, c, r, beta, lam)
        torch.testing.assert_close(start, torch.full_like(start, math.log(2) + lam / (2 * beta**2)))
        expanded = F.softplus(-h) - lam / beta * h + lam * (r_w**2 + r_l**2) + lam / (2 * beta**2)
        torch.testing.assert_close(cal_dpo_loss(c, r, rc, rr, beta, lam), expanded)
    base = cal_dpo_loss(c, r, rc, rr, 0.1)
    for k in (-3.0, 7.0):  # what DPO cannot see: a constant of the prompt
        change = cal_dpo_loss(c + k, r + k, rc, rr, 0.1) - base
        torch.testing.assert_close(change, 2 * k * (r_w + r_l) + 2 * k**2)
    torch.testing.assert_close(cal_dpo_loss(c, r, rc, rr, 0.1, lam=0), dpo_loss(c, r, rc, rr, 1.0))
    swapped = cal_dpo_loss(r, c, rr, rc, -0.1) - dpo_loss(r, c, rr, rc, 1.0)  # targets negated
    torch.testing.assert_close(swapped, base - dpo_loss(c, r, rc, rr, 1.0))
    # On the targets there is nothing to calibrate.
    at_targets = cal_dpo_loss(rc + 5, rr - 5, rc, rr, 0.1)
    torch.testing.assert_close(at_targets, dpo_loss(rc + 5, rr - 5, rc, rr, 1.0))


def minimise(loss, theta):
    """theta where the smooth loss is least, by L-BFGS in float64."""
    theta = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [theta],
        lr=1,
        max_iter=2000,
        tolerance_grad=1e-12,
        tolerance_change=1e-16,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        value = loss(theta)
        value.backward()
        return value

    optimizer.step(closure)
    return theta.detach()


@pytest.mark.parametrize(
    "beta, lam, expected",
    [
        (1, 1, 0.6133753224),
        (1, 0.5, 0.6983426357),
        (0.5, 1, 1.0541466799),
        (0.5, 0.5, 1.0997884840),
        (0.1, 1, 5.0000226979),
        (0.1, 0.5, 5.0000453937),
        (0.01, 1, 50.0),
    ],
)
def test_minimiser_of_a_pair(beta, lam, expected):
    r = minimise(lambda x: cal_dpo_loss(x[:1], x[1:], 0, 0, beta, lam).sum(), [0.0, 0.0])
    assert r.tolist() == pytest.approx([expected, -expected], abs=1e-7)
    assert expected == pytest.approx(
        1 / (2 * beta) + 1 / (2 * lam) / (1 + math.exp(2 * expected)), abs=1e-9
    )


def test_minimiser_with_ipo_is_a_compromise():
    """IPO wants a margin 1/(2 beta), the calibration twice that."""
    r = minimise(lambda x: cal_dpo_loss(x[:1], x[1:], 0, 0, 0.1, contrast="ipo").sum(), [0.0, 0.0])
    assert r.tolist() == pytest.approx([1 / 0.3, -1 / 0.3], abs=1e-9)


@pytest.mark.parametrize(
    "beta, at_1, at_half, least",
    [
        (2, 0.68250447, 0.72248834, 0.42740179),
        (1, 0.75091392, 0.77647711, 0.33390633),
        (0.5, 0.84595797, 0.85613195, 0.42355743),
        (0.1, 0.99668451, 0.99668992, 18.58117542),
    ],
)
def test_two_responses_share_the_probability(beta, at_1, at_half, least):
    # policy (p, 1 - p), reference uniform; p on a fine grid of logits
    logit = torch.linspace(-1, 8, 900_001, dtype=torch.float64)
    for lam, expected in ((1.0, at_1), (0.5, at_half)):
        losses = cal_dpo_loss(
            F.logsigmoid(logit), F.logsigmoid(-logit), -math.log(2), -math.log(2), beta, lam
        )
        assert logit[losses.argmin()].sigmoid().item() == pytest.approx(
            expected, abs=3e-6
        )  # grid step 1e-5
        assert lam == 0.5 or losses.min().item() == pytest.approx(least, abs=1e-8)
    dpo = dpo_loss(F.logsigmoid(logit), F.logsigmoid(-logit), -math.log(2), -math.log(2), beta)
    assert dpo.argmin() == len(logit) - 1  # DPO has no finite minimiser


FEATURES = torch.tensor(
    [[1, 0], [1, -0.5], [0, 2]], dtype=torch.float64
)  # chosen, rejected, another response


def log_ratios(theta):
    return (FEATURES @ theta).log_softmax(0) + math.log(3)  # to a uniform reference


def test_likelihood_displacement():
    # Plain gradient descent from the reference: chosen and rejected look alike, so DPO lowers both.
    losses = {
        "dpo": lambda r: dpo_loss(r[0], r[1], 0, 0, 1.0),
        "cal": lambda r: cal_dpo_loss(r[0], r[1], 0, 0, 1.0),
    }
    path = {}
    for name, loss in losses.items():
        theta = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        for step in range(1, 101):
            (slope,) = torch.autograd.grad(loss(log_ratios(theta)), theta)
            theta = (theta - 0.05 * slope).detach().requires_grad_()
            path[name, step] = log_ratios(theta).tolist()
    for name, at_1, at_10, at_100 in (
        ("dpo", -0.00634139, -0.07070361, -1.22402570),
        ("cal", -0.01957673, -0.09161402, 0.03164058),
    ):
        assert [path[name, n][0] for n in (1, 10, 100)] == pytest.approx(
            [at_1, at_10, at_100], abs=1e-8
        )
    rejected = [path["cal", n][1] for n in (1, 10, 100)]
    assert rejected == pytest.approx([-0.03832673, -0.19010101, -0.28332055], abs=1e-8)


@pytest.mark.parametrize(
    "beta, r_w, r_l, least",
    [(1, 0.613375, -0.613375, 0.28286163), (0.1, 1.096386, -5.009816, 15.24052695)],
)
def test_minimiser_under_the_ceiling(beta, r_w, r_l, least):
    # r_w is at most log 3: beta = 1 asks for 0.5 and gets it, beta = 0.1 asks for 5 and does not
    loss = lambda theta: cal_dpo_loss(*log_ratios(theta)[:2], 0, 0, beta)
    theta = minimise(loss, [0.0, 0.0])
    assert log_ratios(theta)[:2].tolist() == pytest.approx([r_w, r_l], abs=2e-6)
    assert loss(theta).item() == pytest.approx(least, abs=1e-7)


def logged(monkeypatch, logps, **options):
    """pair_losses of given log-probs: a row (chosen, rejected, ref chosen, ref rejected) a pair."""
    table = torch.tensor(logps, dtype=torch.float32)
    given = table[:, :2].flatten().requires_grad_()
    monkeypatch.setattr(cal_dpo, "response_logps", lambda model, batch: (given, None))
    batch = {"index": list(range(len(table)))}
    losses, values = pair_losses(None, batch, table[:, 2:], Args(**options))
    assert losses.requires_grad and not any(x.requires_grad for x in values.values())
    return losses.tolist(), {name: x.tolist() for name, x in values.items()}


def test_logged_parts(monkeypatch):
    def close(values):
        return pytest.approx(values, rel=1e-7, abs=1e-6)

    losses, values = logged(monkeypatch, [PAIRS["B"][:4], PAIRS["C"][:4]], beta=0.1)
    assert losses == values["loss"] == close([0.312558292964663, 53.31326168751822])
    assert values["preference_part"] == close([5.8292964662989805e-05, 0.31326168751822286])
    # without the constant 1/(2 beta^2)
    assert values["calibration_part"] == close([0.3125 - 50, 53.0 - 50])
    assert values["log_ratios/chosen"] == close([4.5, -2])
    assert values["log_ratios/rejected"] == close([-5.25, -3])
    assert values["rewards/chosen"] == close([0.45, -0.2])
    assert values["rewards/rejected"] == close([-0.525, -0.3])
    assert values["rewards/accuracies"] == [1, 1]
    assert values["unreachable"] == [0, 0]  # 5 nats of 50

    # beta = 0.001: the constant is 500,000; float32 would keep five digits of the parts
    losses, values = logged(monkeypatch, [PAIRS["E"][:4]], beta=0.001)
    assert losses == close([503386.36177069996])
    assert values["unreachable"] == [1]  # 500 nats of 118
    dpo_part = math.log1p(math.exp(3.375))
    assert values["preference_part"] == close([dpo_part])
    calibration = 503386.36177069996 - 500_000 - dpo_part
    assert values["calibration_part"] == [pytest.approx(calibration, abs=1e-6)]


def test_from_given_sums(monkeypatch):
    # the log-probs that test_dpo.py gets from logits by formula, with 3, 2, 2, 4 scored tokens
    sums = [
        [-7.1403482867, -4.0578547111, -8.6500711368, -4.4105169893],
        [-6.2002323232, -6.7518763224, -4.8291566555, -8.7644893335],
    ]

    def close(*values):
        return pytest.approx(values, rel=2e-6)  # the sums pass through float32

    assert logged(monkeypatch, sums, beta=0.1)[0] == close(41.10641519, 93.18439452)
    assert logged(monkeypatch, sums, beta=0.5)[0] == close(2.36289976, 18.11488509)
    halves = [sum(logged(monkeypatch, sums, beta=beta, lam=0.5)[0]) / 2 for beta in (0.1, 0.5)]
    assert halves == close(34.49531124, 6.04205502)

    # the same formula of log-probs per token
    lengths = torch.tensor([[3.0, 2, 3, 2], [2, 4, 2, 4]], dtype=torch.float64)
    means = (torch.tensor(sums, dtype=torch.float64) / lengths).unbind(1)
    assert cal_dpo_loss(*means, 1.0).tolist() == close(1.00042628, 3.86641909)
    assert cal_dpo_loss(*means, 1.0, lam=0.5).mean().item() == pytest.approx(1.71611000, rel=2e-6)


def settle(losses_of, model, batch, reference, steps, lr):
    """Full-batch AdamW, clip 10 -> mean r_w, mean r_l, and the first step's gradient norm."""
    optimizer, norms = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0), []
    for _ in range(steps):
        sums = common.response_logps(model, batch)[0].view(-1, 2)
        losses_of(*sums.unbind(1), *reference.unbind(1)).mean().backward()
        norms.append(common.clip_gradients(model, 10.0).item())
        optimizer.step()
        optimizer.zero_grad()
    sums = common.response_logps(model, batch)[0].view(-1, 2).detach()
    assert (sums[:, 0] <= 0).all()  # a log-probability, so r_w has a ceiling
    return *(sums - reference).mean(0).tolist(), norms[0]


def test_chosen_reward_on_a_small_model():
    """r_w can rise by a fraction of a nat only: the reference knows the chosen responses well.

    Chosen and rejected ones differ in 3 of 8 tokens.  DPO lowers r_w by nats, Cal-DPO at beta 0.1
    does not, and at 0.001 it does.
    """
    common.setup(0)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 32, (32, 14), generator=draw)
    other = ids.clone()
    for row in other:
        row[6 + torch.randperm(8, generator=draw)[:3]] = torch.randint(1, 32, (3,), generator=draw)
    rows = [
        dict(prompt_ids=a[:6], responses=[a[6:] + [0], b[6:] + [0]])
        for a, b in zip(ids.tolist(), other.tolist())
    ]
    (batch,) = common.pack_pairs(rows, 10_000)
    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=32,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=256,
        )
    )
    settle(lambda c, r, rc, rr: -c, model, batch, torch.zeros(32, 2), 90, 2e-3)  # SFT
    reference, start = (
        common.response_logps(model, batch)[0].view(-1, 2).detach(),
        model.state_dict(),
    )
    start = {name: x.clone() for name, x in start.items()}
    assert -2 < reference[:, 0].mean() < -0.05 and reference[:, 1].mean() < -10
    ends = {}
    for name, loss in (
        ("dpo", lambda *logps: dpo_loss(*logps, 0.1)),
        ("near", lambda *logps: cal_dpo_loss(*logps, 0.1)),
        ("far", lambda *logps: cal_dpo_loss(*logps, 0.001)),
    ):
        model.load_state_dict(start)
        ends[name] = settle(loss, model, batch, reference, 60, 3e-4)
    assert ends["dpo"][0] < -1
    assert ends["near"][0] > 0 and abs(ends["near"][1] + 5) < 0.5
    assert ends["far"][0] < 0 and ends["far"][1] < -20
    assert (
        ends["far"][2] > 50 * ends["near"][2] > 50 * ends["dpo"][2]
    )  # gradients of the order 1/beta


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


@pytest.mark.parametrize(
    "options", [{}, {"beta": 0.001, "lam": 0.5}, {"contrast": "ipo"}, {"contrast": "slic"}]
)
def test_run(blank, tmp_path, options, pictures):
    history = cal_dpo.main(args(blank, tmp_path / "run", lr=1e-4, **options))
    training = [r for r in history if "loss" in r]
    last = [r for r in history if "eval_loss" in r][-1]
    beta, lam = options.get("beta", 0.1), options.get("lam", 1.0)
    constant = lam / (2 * beta**2)
    at_start = {"dpo": math.log(2), "ipo": 1 / (4 * beta**2), "slic": 1}  # policy = reference
    start = at_start[options.get("contrast", "dpo")]
    assert training[0]["preference_part"] == pytest.approx(start, abs=1e-5)
    assert training[0]["loss"] == pytest.approx(start + constant, rel=1e-6)
    assert training[0]["log_ratios/chosen"] == pytest.approx(0, abs=1e-4)
    parts = last["eval_preference_part"] + last["eval_calibration_part"]
    assert last["eval_loss"] == pytest.approx(parts + constant, rel=1e-9)
    assert training[0]["unreachable"] == (
        beta == 0.001
    )  # 500 nats of 200; 5 of 200, or of log 400 = 6 a token
    assert training[-1]["loss"] < training[0]["loss"]
    assert 0 <= training[-1]["clipped_steps"] <= 1 and records(tmp_path / "run") == history
    assert (tmp_path / "run" / "figures" / "curves.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(beta=0.0), "--beta 0.0: must be from 1e-09"),
        (dict(beta=math.nan), "--beta nan: must be from 1e-09"),
        (dict(lam=-1.0), "--lam -1.0: must be from 0"),
        (dict(lam=math.nan), "--lam nan: must be from 0"),
        (dict(contrast="hinge"), "--contrast must be dpo, ipo or slic"),
    ],
)
def test_bad_input_is_one_line(blank, tmp_path, change, message):
    with pytest.raises(SystemExit) as stop:
        cal_dpo.main(args(blank, tmp_path / "run", **change))
    assert message in str(stop.value) and "\n" not in str(stop.value)
    assert not (tmp_path / "run").exists()


def test_presets():
    assert [PRESETS[name].beta for name in ("hh", "tldr", "ultrafeedback")] == [0.1, 0.001, 0.001]
    assert all(preset.lam == 1 and preset.contrast == "dpo" for preset in PRESETS.values())
    assert (PRESETS["ultrafeedback"].max_length, PRESETS["ultrafeedback"].max_prompt_length) == (
        1024,
        512,
    )
