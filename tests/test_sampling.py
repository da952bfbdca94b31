import copy
import math

import imh_adaptors
import pytest
import torch
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig

import common
from common import decode_step, prefill, reorder, sample_tokens, stay_in_place

V = 61
CONFIGS = {
    "neox": GPTNeoXConfig(
        vocab_size=V,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    ),
    "llama": LlamaConfig(
        vocab_size=V,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    ),
    "gpt2": GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64),
}
PROMPTS = [[5, 9, 2], [7], [11, 3, 8, 40, 22, 1, 60], [4, 4, 4, 30]]


def build(family, dtype=torch.float32, attention="sdpa", **changes):
    torch.manual_seed(1)
    config = copy.deepcopy(CONFIGS[family])
    config._attn_implementation = attention
    for name, value in changes.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for weight in model.parameters():  # the default 0.02 makes every distribution flat
        if weight.dim() > 1:
            weight.data *= 6
    return model.to(dtype)


@pytest.fixture(params=CONFIGS)
def model(request):
    return build(request.param)


@torch.no_grad()
def full_forward(model, ids):
    """Logits and final-norm hidden state after one unpadded id list, without any cache."""
    out = model.base_model(torch.tensor([ids]), use_cache=False).last_hidden_state[0, -1]
    return out, model.get_output_embeddings()(out)


def check(model, sequences, hidden, logits, atol=2e-5):
    """atol: fp32 sums in another order, logits of size 10."""
    for ids, h, z in zip(sequences, hidden, logits, strict=True):
        expected_h, expected_z = full_forward(model, ids)
        torch.testing.assert_close(h, expected_h, atol=atol, rtol=1e-5)
        torch.testing.assert_close(z, expected_z, atol=atol, rtol=1e-5)


@pytest.mark.parametrize("prompts", [PROMPTS, [p[:1] * 5 for p in PROMPTS], PROMPTS[:1]])
def test_cached_steps_equal_full_forward(model, prompts):
    cache, hidden, logits = prefill(model, prompts, 6)
    assert cache.padded == (len(set(map(len, prompts))) > 1)
    sequences = [list(p) for p in prompts]
    check(model, sequences, hidden, logits)
    for step in range(6):
        tokens = torch.tensor([(7 * step + 13 * i) % V for i in range(len(prompts))])
        hidden, logits = decode_step(model, cache, tokens)
        for ids, token in zip(sequences, tokens.tolist()):
            ids.append(token)
        check(model, sequences, hidden, logits)


def test_eager_attention_and_copies():
    model = build("llama", attention="eager")
    cache, hidden, logits = prefill(model, PROMPTS, 2, copies=3)
    sequences = [list(p) for p in PROMPTS for _ in range(3)]
    check(model, sequences, hidden, logits)
    for step in range(2):
        tokens = (torch.arange(12) * 5 + step) % V
        hidden, logits = decode_step(model, cache, tokens)
        sequences = [ids + [t] for ids, t in zip(sequences, tokens.tolist())]
        check(model, sequences, hidden, logits)


def test_nothing_is_concatenated():
    model = build("neox")
    cache, _, _ = prefill(model, PROMPTS[:1], 4, copies=5)
    before = [slab.data_ptr() for layer in cache.layers for slab in (layer.keys, layer.values)]
    for _ in range(4):
        decode_step(model, cache, torch.zeros(5, dtype=torch.long))
    assert before == [
        slab.data_ptr() for layer in cache.layers for slab in (layer.keys, layer.values)
    ]
    assert cache.get_seq_length() == 3 + 4


def test_bf16_model_decodes_like_its_own_full_forward():
    model = build("neox", torch.bfloat16)
    cache, hidden, logits = prefill(model, PROMPTS, 3)
    assert logits.dtype == torch.bfloat16 and torch.isfinite(logits).all()
    sequences = [list(p) for p in PROMPTS]
    for step in range(3):
        tokens = torch.arange(4) + step
        hidden, logits = decode_step(model, cache, tokens)
        sequences = [ids + [t] for ids, t in zip(sequences, tokens.tolist())]
    for ids, z in zip(
        sequences, logits
    ):  # bf16 keeps 8 bits: errors of a percent of the logits' spread
        expected = full_forward(model, ids)[1].float()
        assert (z.float() - expected).abs().max() < 0.05 * expected.std()
    tokens, logps = sample_tokens(logits, torch.full((4,), 0.3))
    assert logps.dtype == torch.float32
    expected = logits.float().log_softmax(-1)[torch.arange(4), tokens]
    torch.testing.assert_close(logps, expected, atol=1e-5, rtol=0)


def grow(model, ancestors_per_step, prompts, copies):
    """Decode with resampling; every step is compared with a full forward of the surviving texts."""
    cache, hidden, logits = prefill(model, prompts, len(ancestors_per_step), copies)
    sequences = [list(p) for p in prompts for _ in range(copies)]
    for step, ancestors in enumerate(ancestors_per_step):
        ancestors = torch.tensor(ancestors)
        reorder(cache, ancestors)
        sequences = [sequences[a] for a in ancestors.tolist()]
        tokens = (torch.arange(len(ancestors)) * 11 + 3 * step) % V
        hidden, logits = decode_step(model, cache, tokens)
        sequences = [ids + [t] for ids, t in zip(sequences, tokens.tolist())]
        check(model, sequences, hidden, logits)
    return cache


def test_reorder_equals_full_recomputation(model):
    # before the first step; a permutation, in which slots overwrite each other; all from one;
    # shrinking
    grow(
        model,
        [[1, 1, 0, 2], [3, 0, 1, 2], [2, 2, 2, 2], [0, 1, 2, 3], [3, 1], [1, 0], [1]],
        PROMPTS[:1],
        4,
    )


def test_reorder_across_prompts_of_different_length(model):
    # slot 2 takes over another prompt, then slot 3, its old neighbour, copies it: the prompt moves
    # too
    grow(
        model,
        [[0, 1, 4, 3, 4, 5], [0, 1, 2, 2, 4, 5], [1, 5, 2, 2, 0, 2], [4, 1, 2, 3, 4]],
        PROMPTS[:3],
        2,
    )


def test_reorder_leaves_survivors_and_a_shared_prompt_alone():
    model = build("neox")
    cache, _, _ = prefill(model, PROMPTS[2:3], 3, copies=4)
    decode_step(model, cache, torch.tensor([1, 2, 3, 4]))
    keys = cache.layers[1].keys
    before, prompt = keys.clone(), cache.prompt_length
    keys[3, :, :prompt] = 99.0  # a mark that only a copy of the prompt would remove
    reorder(cache, torch.tensor([0, 1, 2, 1]))
    assert torch.equal(keys[:3], before[:3]) and (keys[3, :, :prompt] == 99.0).all()
    assert torch.equal(keys[3, :, prompt:], before[1, :, prompt:])


def test_stay_in_place_keeps_the_multiset_and_every_survivor():
    generator = torch.Generator().manual_seed(0)
    for n in (1, 2, 5, 64):
        for _ in range(20):
            ancestors = torch.randint(0, n, (n,), generator=generator)
            placed = stay_in_place(ancestors)
            assert torch.equal(placed.sort().values, ancestors.sort().values)
            for survivor in ancestors.unique():
                assert placed[survivor] == survivor
    assert stay_in_place(torch.tensor([5, 1, 7])).tolist() in (
        [5, 1, 7],
        [7, 1, 5],
    )  # three of eight
    assert stay_in_place(torch.tensor([], dtype=torch.long)).tolist() == []


def test_sampling_frequencies_match_the_softmax():
    # chi-square at level 0.001 (the chance of a false alarm with another seed), expected counts all
    # above 5
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(37, generator=generator) * 1.5 + 100.0  # not normalised
    scores[[0, 12, 36]] = -torch.inf
    n = 200_000
    tokens, logps = sample_tokens(scores.expand(n, -1), torch.rand(n, generator=generator))
    p = scores.double().softmax(-1)
    counts = tokens.bincount(minlength=37)
    assert counts[p == 0].sum() == 0 and (n * p[p > 0]).min() > 5
    assert chisquare(counts[p > 0].numpy(), (n * p[p > 0]).numpy()).pvalue > 0.001
    torch.testing.assert_close(
        logps.double(), p.log()[tokens], atol=2e-6, rtol=0
    )  # fp32 rounding of exp


def test_sampling_inverts_the_cdf_exactly():
    p = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0], dtype=torch.float64)
    u = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-53, 1.0], dtype=torch.float64)
    tokens, logps = sample_tokens(p.log().expand(7, -1), u)
    assert tokens.tolist() == [1, 1, 3, 3, 4, 4, 4]
    torch.testing.assert_close(logps, p.log()[tokens], atol=1e-15, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_edges_of_u_never_reach_a_token_without_mass(dtype):
    generator = torch.Generator().manual_seed(0)
    scores = (torch.randn(64, 50_304, generator=generator) * 20).to(
        dtype
    )  # most probabilities underflow
    scores[:, :3] = scores[:, -3:] = -torch.inf
    for u in (0.0, 1e-45, 0.5, 1 - 2**-24, 1.0):
        tokens, logps = sample_tokens(scores, torch.full((64,), u))
        assert (
            torch.isfinite(logps).all() and torch.isfinite(scores.gather(1, tokens[:, None])).all()
        )


def test_logps_are_normalised_by_the_sum_they_were_drawn_from():
    # a fp32 softmax over 50,304 ids sums to 1 within 1e-5 only; the recorded log q is good to fp32
    # rounding
    scores = torch.randn(32, 50_304, generator=torch.Generator().manual_seed(0)) * 3
    tokens, logps = sample_tokens(scores, torch.linspace(0.01, 0.99, 32))
    exact = scores.double().log_softmax(-1)[torch.arange(32), tokens]
    torch.testing.assert_close(logps.double(), exact, atol=2e-6, rtol=0)


def test_one_row_and_rows_that_do_not_fill_a_block():
    scores = torch.randn(11, 9, generator=torch.Generator().manual_seed(0))
    u = torch.linspace(0.01, 0.99, 11)
    tokens, logps = sample_tokens(scores, u)
    assert tokens.shape == logps.shape == (11,)
    for i in range(11):
        token, logp = sample_tokens(scores[i : i + 1], u[i : i + 1])
        assert token.shape == (1,) and token == tokens[i] and logp == logps[i]


def test_padded_vocabulary_is_cut_by_slicing():
    # an embedding of 64 rows, a tokenizer of 50: the caller passes scores[:, :50]; none of 10,000
    # draws above
    model = build("neox", vocab_size=64)
    _, _, logits = prefill(model, PROMPTS[:1], 1, copies=10_000)
    u = torch.rand(10_000, generator=torch.Generator().manual_seed(0))
    tokens, logps = sample_tokens(logits[:, :50], u)
    assert tokens.max() < 50 and len(tokens.unique()) > 5
    expected = full_forward(model, PROMPTS[0])[1][:50].log_softmax(-1)
    torch.testing.assert_close(logps, expected[tokens], atol=2e-5, rtol=0)  # normalised over the 50


def test_all_ids_of_a_flat_model_are_drawn():
    # the library's sampler keeps 50 ids unless told otherwise; here a flat 300-token distribution
    # is covered
    u = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    assert (
        len(sample_tokens(torch.zeros(20_000, 300), u)[0].unique()) == 300
    )  # missed with probability 1e-26


def test_recorded_logps_equal_teacher_forcing(model):
    # 5,120 tokens: no -inf, 1e-4 per token in fp32
    slots, steps = 128, 40
    cache, _, logits = prefill(model, PROMPTS[:1], steps, copies=slots)
    uniforms = torch.rand(steps, slots, generator=torch.Generator().manual_seed(0))
    tokens, logps = [], []
    for t in range(steps):
        token, logp = sample_tokens(logits, uniforms[t])
        tokens, logps = tokens + [token], logps + [logp]
        if t + 1 < steps:
            _, logits = decode_step(model, cache, token)
    tokens, logps = torch.stack(tokens, 1), torch.stack(logps, 1)
    ids = torch.cat([torch.tensor(PROMPTS[:1]).expand(slots, -1), tokens], 1)
    with torch.no_grad():
        scored = model(ids, use_cache=False).logits[:, 2:-1].log_softmax(-1)
    scored = scored.gather(2, tokens[..., None])[..., 0]
    assert torch.isfinite(logps).all() and (scored - logps).abs().max() < 1e-4


def test_results_carry_no_graph(model):
    cache, hidden, logits = prefill(model, PROMPTS, 2)
    hidden, logits = decode_step(model, cache, torch.zeros(4, dtype=torch.long))
    assert not hidden.requires_grad and not logits.requires_grad
    twist = torch.nn.Linear(32, 1)
    twist(hidden).sum().backward()  # a head on the hidden states can be trained
    assert twist.weight.grad.abs().sum() > 0


def test_empty_prompt_is_refused():
    with pytest.raises(SystemExit, match="prompt 1 has no tokens"):
        prefill(build("neox"), [[3], [], [4, 5]], 2)
    with pytest.raises(SystemExit, match="prompt 0 has no tokens"):
        prefill(build("neox"), [[]], 2)


# ---- sets of tokens, and draws from them


def adversarial_rows(V):
    """Log-probs (n, V), float32: ties, flat, peaked, with -inf, one token, and ordinary rows."""
    generator = torch.Generator().manual_seed(V)
    rows = [torch.zeros(V), torch.randint(0, 3, (V,), generator=generator).float()]
    rows.append((torch.arange(V) // 3).flip(0) * 0.01)  # ties of three
    rows.append(60.0 * (torch.arange(V) == V // 2))  # the others have no mass in float32
    rows.append(torch.where(torch.arange(V) == V - 1, 0.0, -torch.inf))  # one token
    odd = torch.arange(V) % 2 == (V > 1)
    rows.append(torch.where(odd, 0.0, -torch.inf))  # half of them, tied
    for spread in (1e-6, 0.1, 1.0, 5.0, 40.0):
        rows.append(spread * torch.randn(V, generator=generator))
    return torch.stack(rows).log_softmax(-1)


def defined_set(cost, p, x=None, k=None):
    """By a sort of the whole row: by cost, and equal costs by index; then counted or added up."""
    order = cost.argsort(stable=True)
    if k is None:
        mass = (p.double() / p.double().sum())[order].cumsum(0)
        k = int((mass < max(x - 1e-6, 1e-9)).sum()) + 1
    kept = torch.zeros_like(p)
    kept[order[:k]] = 1.0
    return kept


@pytest.mark.parametrize("V", [1, 2, 50, 300, 3000])
def test_sets_without_a_sort_are_those_of_the_definition(V):
    log_pi = adversarial_rows(V)
    p = log_pi.exp()
    entropy = torch.special.entr(p).sum(-1, keepdim=True)
    for cost in (-log_pi, (-log_pi - entropy).abs()):
        for k in {1, min(2, V), (V + 1) // 2, V}:
            found = common.cheapest(cost, k)
            for row in range(len(cost)):
                assert torch.equal(found[row], defined_set(cost[row], p[row], k=k)), (row, k)
        for x in (1e-9, 0.1, 0.5, 0.9, 0.999, 1.0):
            histogram = common.fewest_with_mass(cost, p, x)
            bisection = common._fewest_by_bisection(cost, p, max(x - 1e-6, 1e-9))
            for row in range(len(cost)):
                expected = defined_set(cost[row], p[row], x=x)
                assert torch.equal(histogram[row], expected), (row, x)
                assert torch.equal(bisection[row], expected), (row, x)


def test_the_bisection_compiles_in_one_piece():
    """Traced without a break, as a GPU needs it; here the traced calls run as they are."""
    p = adversarial_rows(300).exp()
    graphs = []

    def as_it_is(graph, inputs):
        graphs.append(graph)
        return graph.forward

    bits = (-p.log()).contiguous().view(torch.int32)
    goal = 0.9 * p.sum(-1, keepdim=True, dtype=torch.float64)
    compiled = torch.compile(common._largest_kept, backend=as_it_is, fullgraph=True)
    for ours, plain in zip(compiled(bits, p, goal), common._largest_kept(bits, p, goal)):
        assert torch.equal(ours, plain)
    # torch 2.11 fails to compile sums along rows as long as those of a vocabulary.
    (graph,) = graphs
    assert not any("cumsum" in str(node.target) for node in graph.graph.nodes)


def test_cutoffs_keep_what_reaches_them_and_the_likeliest():
    log_pi = torch.tensor([[0.5, 0.25, 0.25, 0.0]]).log()
    assert common.above_cutoff(log_pi, math.log(0.25)).tolist() == [[1, 1, 1, 0]]
    assert common.above_cutoff(log_pi, torch.tensor([[0.0]])).tolist() == [[1, 0, 0, 0]]
    ties = torch.full((1, 4), 0.25).log()
    assert common.above_cutoff(ties, 0.0).tolist() == [[1, 0, 0, 0]]  # the first of them


@pytest.mark.parametrize("V", [1, 255, 256, 257, 1000])
def test_a_draw_in_two_steps_is_the_inverse_cdf(V):
    """Against one cumulated sum in float64, with probabilities of which many are 0."""
    generator = torch.Generator().manual_seed(V)
    p = torch.rand(40, V, generator=generator, dtype=torch.float64)
    p = p * (torch.rand(40, V, generator=generator) < 0.2)
    p[:, V // 2] += 0.01
    p[0] = 0.0
    p[0, V - 1] = 1.0
    cdf = p.cumsum(-1)
    for u in (0.0, 0.1, 0.5, 0.999, 1 - 2**-53, 1.0):
        uniforms = torch.full((40,), u, dtype=torch.float64)
        tokens, log_probs = common.draw_in_block([common.draw_block(p, uniforms)])
        assert (p.gather(1, tokens[:, None]) > 0).all()
        torch.testing.assert_close(log_probs, (p / cdf[:, -1:])[range(40), tokens].log())
        # The goal u lies on the token's stretch of the CDF.
        high = (cdf / cdf[:, -1:])[range(40), tokens]
        low = high - (p / cdf[:, -1:])[range(40), tokens]
        assert (low - 1e-12 <= u).all() and (u <= high + 1e-12).all()


@pytest.mark.parametrize("name, x", [("top_k", 20), ("top_p", 0.9), ("typical_p", 0.7)])
def test_draws_from_a_kept_set(name, x):
    """100,000 draws: none outside of the set, and total variation as of exact draws.

    The mean distance of exact draws is at most sum_v sqrt(p (1 - p) / n) / 2, and it exceeds its
    mean by 0.006 with a chance below exp(-2 n 0.006^2), which is 1e-3 (McDiarmid).
    """
    n, V = 100_000, 700
    generator = torch.Generator().manual_seed(0)
    scores = 2 * torch.randn(V, generator=generator)
    scores[:5] = scores[5]  # ties
    log_pi = scores.log_softmax(-1)
    p = log_pi.exp()
    cost = -log_pi
    if name == "typical_p":
        cost = (cost - (p * cost).sum()).abs()
    kept = defined_set(cost, p, x=x, k=x if name == "top_k" else None)
    law = (p * kept).double()
    law = law / law.sum()

    counts = torch.zeros(V, dtype=torch.float64)
    for _ in range(10):
        u = torch.rand(n // 10, generator=generator, dtype=torch.float64)
        rows = scores.expand(n // 10, -1)
        tokens, log_q, log_sum = common.sample_kept(rows, u, {name: x}, imh_adaptors.kept_set)
        counts += tokens.bincount(minlength=V)
        torch.testing.assert_close(log_q.double(), law.log()[tokens], atol=3e-6, rtol=0)
        torch.testing.assert_close(log_sum, rows.logsumexp(-1), atol=3e-6, rtol=0)
    assert counts[kept == 0].sum() == 0
    distance = (counts / n - law).abs().sum().item() / 2
    mean = (law * (1 - law) / n).sqrt().sum().item() / 2
    assert distance < mean + 0.006


def test_a_filter_acts_on_what_the_last_one_left():
    p = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    kept = common.kept_by_all(p.log(), p, {"top_k": 3, "top_p": 0.7}, imh_adaptors.kept_set)
    assert kept.tolist() == [[1, 1, 0, 0]]  # of 4/9, 3/9, 2/9 the first two hold .78
    kept = common.kept_by_all(p.log(), p, {"top_p": 0.9, "top_k": 4}, imh_adaptors.kept_set)
    assert kept.tolist() == [[1, 1, 1, 0]]  # four of three tokens are three


def test_scores_that_are_no_distribution_are_refused():
    u = torch.full((3,), 0.5)
    for bad in (torch.nan, torch.inf, -torch.inf):
        scores = torch.zeros(3, 40)
        scores[1] = bad
        for filters in ({}, {"top_p": 0.9}, {"top_k": 3}):
            with pytest.raises(SystemExit, match="keeps nothing at 1 of 3 positions"):
                common.sample_kept(scores, u, filters, imh_adaptors.kept_set)


def test_the_head_reads_contiguous_states(model):
    """Of several prompts at once; a view with gaps would cost a product for each row."""
    seen = []
    head = model.requires_grad_(False).get_output_embeddings()
    head.register_forward_hook(lambda _, inputs, out: seen.append(inputs[0].is_contiguous()))
    cache, hidden, _ = prefill(model, PROMPTS, 2)
    decode_step(model, cache, torch.zeros(4, dtype=torch.long))
    assert seen and all(seen) and hidden.shape == (4, 32)
