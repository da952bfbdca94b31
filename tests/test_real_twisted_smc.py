"""Twisted SMC on a real language model of 512 tokens, where infilling T = 2, c = 1 can be
enumerated.

Its folder is REAL_MODELS/stories260K, or ../shared/models/stories260K beside the repository;
without it nothing is collected.
"""

import os
from pathlib import Path

import pytest
import torch
import twisted_smc as t

MODELS = Path(os.environ.get("REAL_MODELS", Path(__file__).resolve().parents[2] / "shared/models"))
STORIES = MODELS / "stories260K"
PROMPT = "Once upon a time, there was a"


def settings(out, **options):
    return t.Args(
        **(
            dict(
                model=str(STORIES),
                prompt=PROMPT,
                potential="infilling",
                T=2,
                c=1,
                K=10,
                conditions=10,
                twist="mlp",
                lr=3e-3,
                exact=150,
                runs=150,
                bound_K=(16,),
                max_steps=80,
                eval_every=80,
                out=str(out),
            )
            | options
        )
    )


def tree(world):
    """log p0(s_1) (V,), log p0(s_2 | s_1) (V, V) and log p0(o | s_1, s_2) (V, V, V), and the
    states before s_1 and s_2."""
    V, block = world.V, 16
    decoder = world.decoder(V)
    h1, one = decoder.step()
    h2, two = decoder.step(torch.arange(V, device=one.device))
    three = torch.empty(V, V, V, device=one.device)
    for start in range(0, V, block):
        s1, s2 = (
            x.to(one.device)
            for x in torch.cartesian_prod(torch.arange(V), torch.arange(start, start + block)).T
        )
        decoder = world.decoder(V * block)
        decoder.step()
        decoder.step(s1)
        _, logits = decoder.step(s2)
        three[:, start : start + block] = logits.log_softmax(-1).view(V, block, V)
    return one[0].log_softmax(-1), two.log_softmax(-1), three, h1[:1], h2


@torch.no_grad()
def exact_values(world, twist, conditions, levels):
    """Exact log Z(o), KL(q | sigma_o) and KL(sigma_o | q) for each condition, from the levels of
    the tree."""
    one, two, three, h1, h2 = levels
    values = []
    for o in conditions:
        log_sigma = (one[:, None] + two + three[:, :, o]).double()
        log_Z = log_sigma.logsumexp((0, 1))
        log_sigma = log_sigma - log_Z
        log_q = one[:, None] + two
        if twist is not None:
            e = world.embed(twist, torch.tensor([[o]], device=one.device))
            z1, z2 = h1, h2
            if twist.body is not None:
                decoder = world.decoder(world.V, body=twist.body)
                z1 = decoder.step()[0][:1]
                z2 = decoder.step(torch.arange(world.V, device=one.device))[0]
            log_q = (one + twist(z1, e)[0]).log_softmax(-1)[:, None] + (
                two + twist(z2, e)
            ).log_softmax(-1)
        log_q = log_q.double()
        values.append(
            [
                log_Z,
                (log_q.exp() * (log_q - log_sigma)).sum(),
                (log_sigma.exp() * (log_sigma - log_q)).sum(),
            ]
        )
    return torch.tensor(values, dtype=torch.float64)


if STORIES.is_dir():

    @pytest.fixture(scope="module")
    def world():
        t.setup(0)
        return t.lm_world(t.load_model(str(STORIES)), t.load_tokenizer(str(STORIES)), settings(""))

    @pytest.fixture(scope="module")
    def levels(world):
        return tree(world)

    def test_exact_entropies_and_log_Z(world, levels):
        """E_o log Z(o) = -H(o): values found independently, in float64; here the model runs in
        float32."""
        one, two, three, _, _ = levels
        p = (one[:, None] + two).double().exp()
        Z = sum(p[a] @ three[a].double().exp() for a in range(world.V))
        log_Z = exact_values(world, None, [315], levels)[0, 0].item()
        assert len(t.load_tokenizer(str(STORIES))(PROMPT).input_ids) == 9
        assert (Z * Z.log()).sum().item() == pytest.approx(-2.7153363237, abs=2e-5)
        assert (p * -(three.double().exp() * three).sum(-1)).sum().item() == pytest.approx(
            0.6151178113, abs=2e-5
        )
        assert -(one.double().exp() * one).sum().item() == pytest.approx(1.8304062933, abs=2e-5)
        assert Z.argmax() == 315 and log_Z == pytest.approx(-0.8789467890, abs=2e-5)
        tokenizer = t.load_tokenizer(str(STORIES))
        assert tokenizer.convert_ids_to_tokens(315) == "ir"
        o = tokenizer.convert_tokens_to_ids("o")
        assert Z[o].log().item() == pytest.approx(-1.901216, abs=2e-5)

    def test_bounds_and_kls_meet_exact_values(world, levels, tmp_path):
        """Conditional bounds hold log Z(o) between them, and a trained twist's KLs are the exact
        ones within their error."""
        torch.manual_seed(0)
        record = t.main(settings(tmp_path / "run", learner="dpg"))["dpg", 0][-1]
        o = torch.load(tmp_path / "run" / "exact_samples.pt")["o"]
        twist = t.make_twist(settings(""), "dpg", world, t.load_model(str(STORIES)))
        optimizer = torch.optim.Adam([p for p in twist.parameters() if p.requires_grad])
        assert t.load_checkpoint(tmp_path / "run" / "dpg-seed0", twist, optimizer)[0] == 80
        # for the conditions of the record
        exact = exact_values(world, twist, o[:, 0].tolist(), levels).mean(0)
        # log Z is the midpoint of bounds on the very same conditions: off by at most half of the
        # gap and its noise
        slack = record["gap"] / 2 + 0.05
        assert record["log_Z"] == pytest.approx(exact[0].item(), abs=slack)
        assert record["smc_lower_16"] - 0.05 < exact[0] < record["smc_upper_16"] + 0.05
        assert record["kl_q_sigma"] == pytest.approx(
            exact[1].item(), abs=2 * record["kl_q_sigma_ci"] + slack
        )
        assert record["kl_sigma_q"] == pytest.approx(
            exact[2].item(), abs=2 * record["kl_sigma_q_ci"] + slack
        )
        # I(s; o) is the distance of sigma_o from p0: half of it is learned
        assert exact[2] < 2.1002185124 / 2
