import copy

import pytest
import torch
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig

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
