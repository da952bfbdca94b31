"""Packing and log-probabilities against the naive form: one padded row per response, all logits,
fp32.
"""

import math
import random

import pytest
import torch
import torch.distributed as dist
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
)

import common
from common import pack_pairs, response_hiddens, response_logps, setup, token_logps

V = 97
TINY = dict(
    vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
)
NO_DROPOUT = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
FAMILIES = {
    "gpt_neox": GPTNeoXConfig(**TINY, max_position_embeddings=128, rotary_pct=0.5),
    "llama": LlamaConfig(**TINY, num_key_value_heads=2, max_position_embeddings=128),
    "gpt2": GPT2Config(
        vocab_size=V,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=128,
        bos_token_id=0,
        eos_token_id=0,
        **NO_DROPOUT,
    ),
}


@pytest.fixture(autouse=True)
def group_of_one():
    setup(0)


def make(config):
    """A random model whose weights are larger than at initialisation, so that attention matters."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    return model


def random_rows(n=6, seed=0, responses=2):
    rng = random.Random(seed)
    ids = lambda lo, hi: [rng.randrange(1, V) for _ in range(rng.randint(lo, hi))]
    return [
        dict(prompt_ids=ids(1, 12), responses=[ids(1, 9) for _ in range(responses)], row=i)
        for i in range(n)
    ]


def naive(model, rows):
    """Sum over each response of log softmax(all logits)[target], one unpadded row at a time.

    -> (responses,)
    """
    sums = []
    for row in rows:
        for response in row["responses"]:
            logits = model(
                input_ids=torch.tensor([row["prompt_ids"] + response]), use_cache=False
            ).logits[0]
            log_p = logits[len(row["prompt_ids"]) - 1 : -1].log_softmax(-1)
            sums.append(sum(log_p[t, token] for t, token in enumerate(response)))
    return torch.stack(sums)


def gradients(model, value):
    model.zero_grad()
    value.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("responses", [1, 2, 4])
def test_packed_equals_naive(family, responses):
    # fp32 sums of up to 9 log-probs of size about 10: 1e-5 relative to 100 leaves a factor of ten
    # for rounding
    model, rows = make(FAMILIES[family]), random_rows(responses=responses)
    (batch,) = pack_pairs(rows, 10_000)
    sums, counts = response_logps(model, batch)
    expected = naive(model, rows)
    assert model.packs
    torch.testing.assert_close(sums, expected, atol=1e-5, rtol=1e-5)
    assert counts.tolist() == [len(r) for row in rows for r in row["responses"]]
    weights = torch.linspace(-1, 1, len(sums))
    ours, theirs = (gradients(model, (weights * x).sum()) for x in (sums, naive(model, rows)))
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_float64_agrees_to_rounding():
    model, rows = make(FAMILIES["llama"]).double(), random_rows()
    sums, _ = response_logps(model, pack_pairs(rows, 10_000)[0])
    torch.testing.assert_close(
        sums.double(), naive(model, rows), atol=1e-5, rtol=1e-6
    )  # the head is fp32 by contract


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_composition_does_not_matter(family):
    model, rows = make(FAMILIES[family]), random_rows(7)
    together = torch.empty(7, 2)
    for budget in (10_000, 40, 1):
        seen = []
        for batch in pack_pairs(rows, budget):
            together[batch["index"]] = response_logps(model, batch)[0].detach().view(-1, 2)
            seen += batch["index"]
        assert sorted(seen) == list(range(7))
        torch.testing.assert_close(
            together.flatten(), naive(model, rows).detach(), atol=1e-5, rtol=1e-5
        )


def test_chunked_head_equals_kept_logits(monkeypatch):
    model, rows = make(FAMILIES["gpt_neox"]), random_rows(150)
    (batch,) = pack_pairs(rows, 10_000)
    kept = response_logps(model, batch)[0]
    kept_gradient = gradients(model, kept.square().mean())
    monkeypatch.setattr(common, "LOGITS_BYTES", 1)  # 512 rows at a time
    assert len(batch["targets"]) > 1024
    chunked = response_logps(model, batch)[0]
    torch.testing.assert_close(chunked, kept, atol=1e-5, rtol=1e-6)
    assert (
        gradients(model, chunked.square().mean()) - kept_gradient
    ).norm() <= 1e-5 * kept_gradient.norm()


def test_head_gradient_against_finite_differences():
    torch.manual_seed(0)
    inputs = [
        torch.randn(5, 4, dtype=torch.float64),
        torch.randn(11, 4, dtype=torch.float64),
        torch.randn(11, dtype=torch.float64),
    ]
    targets, weights = (
        torch.tensor([0, 3, 10, 3, 7]),
        torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0], dtype=torch.float64),
    )
    f = lambda *x: (common.HeadLogps.apply(*x, targets).double() * weights).sum()
    exact = lambda h, w, b: (
        (h @ w.T + b).log_softmax(-1)[torch.arange(5), targets] * weights
    ).sum()
    ours = torch.autograd.grad(f(*[x.requires_grad_() for x in inputs]), inputs)
    theirs = torch.autograd.grad(exact(*inputs), inputs)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)  # log-sum-exp is fp32


def test_second_backward_through_the_same_graph():
    model, rows = make(FAMILIES["gpt_neox"]), random_rows(2)
    sums = response_logps(model, pack_pairs(rows, 10_000)[0])[0].sum()
    model.zero_grad()
    sums.backward(retain_graph=True)
    first = model.get_output_embeddings().weight.grad.clone()
    model.zero_grad()
    sums.backward()
    torch.testing.assert_close(model.get_output_embeddings().weight.grad, first)


def test_bf16_head_stays_close_to_fp32():
    # one bf16 rounding of a logit of size 10 is 0.03; sums in fp32 keep it there, a bf16 log-sum-
    # exp would not
    torch.manual_seed(0)
    hidden, weight, targets = (
        torch.randn(512, 64),
        torch.randn(5000, 64) / 8,
        torch.randint(5000, (512,)),
    )
    exact = (hidden @ weight.T).log_softmax(-1)[torch.arange(512), targets]
    ours = common.HeadLogps.apply(hidden.bfloat16(), weight.bfloat16(), None, targets)
    assert ours.dtype == torch.float32
    assert (ours - exact).abs().max() < 5e-2
    assert abs((ours - exact).sum()) < 1.0


def test_hidden_of_the_last_token():
    model, rows = make(FAMILIES["llama"]), random_rows(4)
    hiddens = response_hiddens(model, pack_pairs(rows, 10_000)[0])
    for hidden, (row, response) in zip(hiddens, [(x, r) for x in rows for r in x["responses"]]):
        ids = torch.tensor([row["prompt_ids"] + response])
        expected = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, -1]
        torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=1e-5)


def test_all_sequences_sum_to_one():
    model = make(GPTNeoXConfig(**{**TINY, "vocab_size": 3}, max_position_embeddings=16))
    rows = [dict(prompt_ids=[1], responses=[[a, b] for a in range(3) for b in range(3)])]
    sums, _ = response_logps(model, pack_pairs(rows, 10_000)[0])
    total = sums.exp().sum()
    assert abs(total - 1) < 1e-6
    assert gradients(model, total).abs().max() < 1e-6  # a constant has no gradient


@pytest.mark.parametrize(
    "config, what",
    [
        (
            BloomConfig(vocab_size=V, hidden_size=32, n_layer=2, n_head=4),
            "ALiBi outside the attention interface",
        ),
        (Gemma2Config(**TINY, num_key_value_heads=2, head_dim=8), "capped logits"),
        (CohereConfig(**TINY, num_key_value_heads=2, logit_scale=0.3), "scaled logits"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_families_that_do_not_pack_get_plain_rows(config, what, capsys):
    model, rows = make(config).eval(), random_rows(3)
    sums, _ = response_logps(model, pack_pairs(rows, 10_000)[0])
    assert not model.packs, what
    assert "packing fails" in capsys.readouterr().out
    torch.testing.assert_close(sums, naive(model, rows), atol=1e-4, rtol=1e-5)
    with pytest.raises(SystemExit, match="cannot be packed"):
        response_hiddens(model, pack_pairs(rows, 10_000)[0])


def test_the_check_notices_a_leak(monkeypatch):
    # responses that see each other: what the check is for
    leaky = lambda module, q, k, v, mask, scaling=None, segments=None, **kw: (
        common.sdpa_attention_forward(module, q, k, v, None, scaling=scaling, is_causal=True)
    )
    monkeypatch.setitem(common.AttentionInterface._global_mapping, "packed", leaky)
    model = make(FAMILIES["llama"])
    response_logps(model, pack_pairs(random_rows(3), 10_000)[0])
    assert not model.packs


def test_sliding_window_longer_rows_are_refused():
    model = make(
        MistralConfig(**TINY, num_key_value_heads=2, sliding_window=16, max_position_embeddings=128)
    )
    short = [dict(prompt_ids=[5, 6, 7], responses=[[8, 9], [10]])]
    torch.testing.assert_close(
        response_logps(model, pack_pairs(short, 99)[0])[0], naive(model, short)
    )
    with pytest.raises(SystemExit, match="--max-length 16"):
        response_logps(
            model, pack_pairs([dict(prompt_ids=[5] * 12, responses=[[8] * 9, [10]])], 99)[0]
        )


def test_gradient_checkpointing_keeps_each_batch_own_segments():
    model = make(FAMILIES["llama"])
    a, b = (pack_pairs(random_rows(3, seed), 10_000)[0] for seed in (1, 2))
    plain = gradients(model, response_logps(model, a)[0].sum() + response_logps(model, b)[0].sum())
    model.gradient_checkpointing_enable()
    checkpointed = gradients(
        model, response_logps(model, a)[0].sum() + response_logps(model, b)[0].sum()
    )
    torch.testing.assert_close(checkpointed, plain, atol=1e-6, rtol=1e-5)


def test_packing_covers_every_row_once_with_equal_counts():
    for n, budget, world in ((7, 50, 1), (7, 50, 2), (7, 1, 2), (5, 10_000, 4), (64, 60, 3)):
        rows = random_rows(n)
        shares = [pack_pairs(rows, budget, rank, world) for rank in range(world)]
        assert len({len(share) for share in shares}) == 1  # or FSDP would hang
        assert sorted(i for share in shares for batch in share for i in batch["index"]) == list(
            range(n)
        )
        tokens = [batch["input_ids"].shape[1] for share in shares for batch in share]
        if world == 1:
            longest = max(len(r["prompt_ids"]) + sum(map(len, r["responses"])) for r in rows)
            assert max(tokens) <= max(budget, longest)


def test_fewer_rows_than_processes():
    with pytest.raises(SystemExit, match="2 rows for 3 processes"):
        pack_pairs(random_rows(2), 100, 0, 3)


def test_token_logps_by_hand():
    # logits of three tokens (0, log 2, log 5) at each position: probabilities 1/8, 2/8, 5/8
    hidden, weight = torch.ones(3, 1), torch.tensor([[0.0], [math.log(2)], [math.log(5)]])
    logps = common.HeadLogps.apply(hidden, weight, None, torch.tensor([0, 1, 2]))
    torch.testing.assert_close(logps.exp(), torch.tensor([1 / 8, 2 / 8, 5 / 8]))
    assert dist.get_world_size() == 1 and token_logps is common.token_logps
