"""Sampling on a GPU against the CPU: the same sets, the same draws for the same uniforms; the pool
of token rows and its captured step.
"""

import imh_adaptors
import pytest
import test_pool
import torch
import twisted_smc
from test_sampling import PROMPTS, V, build, full_forward

import common

if not torch.cuda.is_available():
    pytest.skip("no CUDA device, so its sampling is not tested", allow_module_level=True)

FILTERS = [
    {},
    {"top_k": 1},
    {"top_k": 50},
    {"top_p": 0.9},
    {"typical_p": 0.9},
    {"min_p": 0.05},
    {"eta_cutoff": 0.0009},
    {"top_k": 300, "top_p": 0.8},
]


def rows(n, V, spread, ties):
    scores = spread * torch.randn(n, V, generator=torch.Generator().manual_seed(0))
    if ties:
        scores = (4 * scores).round() / 4
    return scores


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("V", [5000, 50304])
def test_kept_sets_are_those_of_the_cpu(filters, ties, V):
    if not filters:
        pytest.skip("no filter, no set")
    log_pi = rows(64, V, 2.0, ties).log_softmax(-1)  # made once, so that both get the same bits
    p = log_pi.exp()
    here = common.kept_by_all(log_pi, p, filters, imh_adaptors.kept_set)
    there = common.kept_by_all(log_pi.cuda(), p.cuda(), filters, imh_adaptors.kept_set)
    different = (here != there.cpu()).sum(-1)
    if len(filters) == 1 and "typical_p" not in filters and "eta_cutoff" not in filters:
        assert different.max() == 0
    else:  # an entropy, or a second normalisation: one token may lie within rounding of the edge
        assert different.max() <= 1


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_the_same_uniforms_draw_the_same_tokens(filters):
    scores = rows(2000, 3000, 2.0, ties=False)
    u = torch.rand(2000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    kept_set = imh_adaptors.kept_set
    tokens, log_q, log_sum = common.sample_kept(scores, u, filters, kept_set)
    found, found_q, found_sum = common.sample_kept(scores.cuda(), u.cuda(), filters, kept_set)
    same = found.cpu() == tokens
    assert same.float().mean() > 0.998  # a uniform within 1e-6 of an edge of the CDF may flip
    torch.testing.assert_close(found_q.cpu()[same], log_q[same], atol=2e-3, rtol=0)
    torch.testing.assert_close(found_sum.cpu(), log_sum, atol=1e-5, rtol=0)


@pytest.mark.parametrize("filters", [{"top_k": 20}, {"top_p": 0.9}, {"typical_p": 0.7}], ids=str)
def test_draws_have_the_law_of_the_kept_set(filters):
    """400,000 draws: none outside of the set; total variation as of exact draws (McDiarmid)."""
    n, V = 400_000, 700
    scores = rows(1, V, 2.0, ties=True)
    log_pi = scores.log_softmax(-1)
    kept = common.kept_by_all(log_pi, log_pi.exp(), filters, imh_adaptors.kept_set)
    law = (log_pi.exp() * kept)[0].double()
    law = law / law.sum()
    u = torch.rand(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    counts = torch.zeros(V, dtype=torch.float64)
    for part in u.cuda().split(n // 10):
        every = scores.cuda().expand(len(part), -1)
        tokens, _, _ = common.sample_kept(every, part, filters, imh_adaptors.kept_set)
        counts += tokens.cpu().bincount(minlength=V)
    assert counts[kept[0] == 0].sum() == 0
    distance = (counts / n - law).abs().sum().item() / 2
    assert distance < (law * (1 - law) / n).sqrt().sum().item() / 2 + 0.003


@pytest.mark.parametrize("case", test_pool.CASES, ids=str)
def test_the_kernel(case):
    common.setup(0)
    test_pool.compare_kernel(*case, "cuda")


def test_a_step_that_cannot_be_captured(monkeypatch, capsys):
    """Refused before the capture, after which torch would be of no use."""
    model = on_gpu("llama")
    layer = model.base_model.layers[0]
    forward = layer.forward

    def waits(hidden, *others, **options):
        hidden.sum().item()
        return forward(hidden, *others, **options)

    monkeypatch.setattr(layer, "forward", waits)
    stream = torch.cuda.current_stream()
    cache, _, _ = common.prefill(model, PROMPTS, 4)
    assert model.decodes and not isinstance(cache, common.PoolTurn)
    assert "slabs, and steps are not captured" in capsys.readouterr().out
    assert torch.cuda.current_stream() == stream
    assert torch.cuda.get_sync_debug_mode() == 0
    assert torch.rand(2, device="cuda").isfinite().all()


def on_gpu(family, dtype=torch.float32):
    common.setup(0)
    return build(family).to("cuda", dtype)


@pytest.mark.parametrize("family", ["neox", "llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_captured_steps(family, dtype):
    """Against the eager step, which writes and reads the same rows, and against whole texts."""
    model = on_gpu(family, dtype)
    turn, _, _ = common.prefill(model, PROMPTS, 6, copies=2)
    assert model.pools and model.decodes
    texts = [list(prompt) for prompt in PROMPTS for _ in range(2)]
    reference = build(family)
    a_logit = 1e-4 if dtype == torch.float32 else 5e-2
    for step in range(6):
        ancestors = (torch.arange(8) * 3 + step) % 8 // 2 * 2
        common.reorder(turn, ancestors.cuda())
        tokens = torch.arange(8) + 5 * step
        texts = [texts[i] + [token] for i, token in zip(ancestors.tolist(), tokens.tolist())]
        hidden, logits = common.decode_step(model, turn, tokens.cuda())
        again = common._run_in_pool(model, turn.pool, 8)
        torch.testing.assert_close(hidden, again[0], atol=a_logit, rtol=a_logit)
        torch.testing.assert_close(logits, again[1], atol=a_logit, rtol=a_logit)
        expected = torch.stack([full_forward(reference, text)[1] for text in texts])
        worst = (logits.float().cpu() - expected).abs().max()
        assert worst <= a_logit * expected.abs().max()
    assert list(turn.pool.captured) == [8]
    del turn

    # A batch with fewer slots has a step of its own in the same pool.
    turn, _, _ = common.prefill(model, PROMPTS, 6)
    common.decode_step(model, turn, torch.arange(4).cuda())
    assert list(turn.pool.captured) == [8, 4]


@pytest.mark.parametrize("family", ["neox", "llama"])
def test_the_same_tokens_as_on_the_cpu(family):
    """For the same uniforms, resampled at every step, in two batches with one capture."""
    generator = torch.Generator().manual_seed(3)
    uniforms = torch.rand(20, 16, generator=generator, dtype=torch.float64)
    ancestors = torch.randint(0, 16, (20, 16), generator=generator)
    expected, expected_logps = test_pool.decode(build(family), uniforms, ancestors)
    model = on_gpu(family)
    steps = []
    for _ in range(2):
        tokens, logps = test_pool.decode(model, uniforms.cuda(), ancestors.cuda())
        assert torch.equal(tokens.cpu(), expected)
        torch.testing.assert_close(logps.cpu(), expected_logps, atol=1e-3, rtol=0)
        steps.append(common.POOLS[model].captured[16])
    assert steps[0] is steps[1]


def test_resampling_does_not_wait_for_the_gpu():
    model = on_gpu("llama")
    turn, _, _ = common.prefill(model, PROMPTS[:1], 4, copies=32)
    tokens = torch.arange(32, device="cuda")
    ancestors = tokens.flip(0) // 2
    common.decode_step(model, turn, tokens)  # captured
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            common.reorder(turn, common.stay_in_place(ancestors))
            common.decode_step(model, turn, tokens)
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Twisted:
    """What smc asks for: p0 of a model, and beside it a random linear twist on its states."""

    def __init__(self, model, prompt, n, T):
        self.decoder = twisted_smc.Decoder(model, prompt, n, T, V)
        weight = torch.randn(32, V, generator=torch.Generator().manual_seed(0))
        self.weight = 0.1 * weight.to(model.device)

    def __call__(self, last, ancestors):
        hidden, logits = self.decoder.step(last, ancestors)
        return logits, hidden @ self.weight


def log_phi(tokens):
    return (tokens.sum(-1) % 7).double() / 2


def true_log_Z(model, prompt, T):
    """Of all V^T sequences, by whole texts on the CPU."""
    texts = [list(prompt)]
    log_p = torch.zeros(1)
    for _ in range(T):
        _, logits = common._run_whole(model, texts)
        log_p = (log_p[:, None] + logits.log_softmax(-1)).flatten()
        texts = [text + [token] for text in texts for token in range(V)]
    tokens = torch.tensor(texts)[:, len(prompt) :]
    return (log_p.double() + log_phi(tokens)).logsumexp(0)


@pytest.mark.parametrize("proposal", ["twist", "base"])
def test_smc_against_enumeration(proposal):
    """E Z-hat = Z: the mean of 200 runs, resampled at every step, is within five standard errors.

    False alarm: one in a million.
    """
    T, K, N = 2, 16, 200
    model = on_gpu("llama")
    torch.manual_seed(0)
    with torch.no_grad():
        scores = Twisted(model, PROMPTS[0], N * K, T)
        found = twisted_smc.smc(scores, log_phi, T, K, N, proposal=proposal)
    assert model.pools
    ratio = (found.log_Z.cpu() - true_log_Z(build("llama"), PROMPTS[0], T)).exp()
    assert ratio.std() < 0.5
    assert abs(ratio.mean() - 1) < 5 * ratio.std() / N**0.5


def test_without_triton(monkeypatch, capsys):
    monkeypatch.setattr(common, "triton", None)
    model = on_gpu("llama")
    cache, _, _ = common.prefill(model, PROMPTS, 4)
    assert model.decodes and not isinstance(cache, common.PoolTurn)
    assert "slabs, and steps are not captured: Triton is not" in capsys.readouterr().out


def test_a_trained_body_is_read_anew():
    """A captured step reads the weights as they are, moved in place."""
    model = on_gpu("neox")
    for change in (0.0, 0.1):
        with torch.no_grad():
            model.base_model.layers[0].mlp.dense_4h_to_h.weight.add_(change)
        turn, _, _ = common.prefill(model, PROMPTS, 2)
        _, logits = common.decode_step(model, turn, torch.zeros(4, dtype=torch.long).cuda())
        del turn
        whole = [prompt + [0] for prompt in PROMPTS]
        _, expected = common._run_whole(model, whole)
        torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-3)
