"""The table of the varlen attention call, against attention with a mask; on the CPU, where a loop
over the pieces stands in for the kernel.
"""

import random

import pytest
import torch
from loops import varlen_reference
from test_logps import FAMILIES, TINY, gradients, make, naive, random_rows
from transformers import AutoModelForCausalLM, Gemma3TextConfig, MistralConfig

import common
from common import pack_pairs, response_hiddens, response_logps, setup


@pytest.fixture
def varlen(monkeypatch):
    """The form of a GPU, with the reference in the place of the kernel."""
    setup(0)
    monkeypatch.setattr(common, "VARLEN", True)
    monkeypatch.setattr(common, "VARLEN_DTYPES", (torch.float32, torch.float64))
    monkeypatch.setattr(common, "VARLEN_ASKS", True)
    monkeypatch.setattr(common, "varlen_attn", varlen_reference)
    return monkeypatch


def positions_and_owners(segments):
    """Of each packed token its row, its response (0: the prompt) and its position."""
    found = []
    for row, (prompt, *responses) in enumerate(segments):
        found += [(row, 0, i) for i in range(prompt)]
        for number, n in enumerate(responses, 1):
            found += [(row, number, prompt + i) for i in range(n)]
    return found


def mask_of(segments, window):
    """Which token sees which: the definition.  -> (N, N)"""
    tokens = positions_and_owners(segments)
    seen = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    for i, (row, response, position) in enumerate(tokens):
        for j, (other_row, other_response, other_position) in enumerate(tokens):
            same = row == other_row and other_response in (0, response)
            before = other_position <= position
            near = window is None or other_position > position - window
            seen[i, j] = same and before and near
    return seen


SHAPES = {
    "one response": [(3, 4), (1, 1), (6, 2)],
    "two": [(3, 4, 2), (5, 1, 1), (1, 3, 6)],
    "many": [(4, 2, 3, 1, 5), (2, 1, 1, 1)],
    "mixed": [(3, 4), (2, 2, 2), (5, 1, 2, 3, 4, 5)],
    "an empty response": [(3, 0, 2), (2, 2, 0)],
    "a prompt of length 0": [(0, 3, 2), (2, 1, 1)],
}


@pytest.mark.parametrize("heads, shared", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("multiples", [(1, 1, 1, 1), (16, 32, 8, 4)])
def test_table_equals_mask(shape, window, heads, shared, multiples, varlen):
    """Output and gradients in float64, with and without rounded sizes."""
    names = ("ROUNDED", "ROUNDED_KEYS", "ROUNDED_PIECES", "ROUNDED_LENGTH")
    for name, multiple in zip(names, multiples):
        varlen.setattr(common, name, multiple)
    segments = SHAPES[shape]
    table = common.varlen_table(segments)
    n = sum(map(sum, segments))
    for length, multiple in zip((n + table.padding, len(table.gather)), multiples):
        assert length % multiple == 0
    assert len(table.queries) % multiples[2] == 0 and table.longest_key % multiples[3] == 0

    torch.manual_seed(0)
    q = torch.randn(1, heads, n + table.padding, 8, dtype=torch.float64, requires_grad=True)
    k, v = (
        torch.randn(1, shared, n + table.padding, 8, dtype=torch.float64, requires_grad=True)
        for _ in range(2)
    )
    out = common._varlen_attention(q, k, v, table, 0.3, window)[0, :n]
    expected = torch.nn.functional.scaled_dot_product_attention(
        q[:, :, :n], k[:, :, :n], v[:, :, :n], mask_of(segments, window), scale=0.3, enable_gqa=True
    )[0].transpose(0, 1)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    weights = torch.randn_like(out)
    ours = torch.autograd.grad((out * weights).sum(), (q, k, v))
    theirs = torch.autograd.grad((expected * weights).sum(), (q, k, v))
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


def test_random_tables(varlen):
    """Every query finds the keys of its own row in their order, whatever the lengths."""
    rng = random.Random(0)
    for _ in range(50):
        segments = []
        for _ in range(rng.randint(1, 6)):
            responses = [rng.randint(1, 9) for _ in range(rng.randint(1, 4))]
            segments.append((rng.randint(1, 12), *responses))
        table = common.varlen_table(segments)
        tokens = positions_and_owners(segments)
        assert table.gather[table.own].tolist() == list(range(len(tokens) + table.padding))
        assert table.gather[table.again_at].tolist() == table.again.tolist()
        pieces = zip(table.queries.tolist(), table.queries[1:].tolist(), table.keys[1:].tolist())
        for start, stop, key_stop in pieces:
            if start == len(tokens):
                break  # the padding
            row, response, position = tokens[stop - 1]
            keys = table.gather[key_stop - position - 1 : key_stop].tolist()
            assert [tokens[i][2] for i in keys] == list(range(position + 1))
            assert {tokens[i][0] for i in keys} == {row}
            assert {tokens[i][1] for i in keys} <= {0, 1, response}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("responses", [1, 2, 4])
def test_log_probs_and_gradients_of_a_model(family, responses, varlen):
    """The bounds are those of attention piece by piece in test_logps.py."""
    model, rows = make(FAMILIES[family]), random_rows(responses=responses)
    (batch,) = pack_pairs(rows, 10_000)
    sums, _ = response_logps(model, batch)
    assert model.packs and model.varlen
    torch.testing.assert_close(sums, naive(model, rows), atol=1e-5, rtol=1e-5)
    weights = torch.linspace(-1, 1, len(sums))
    ours, theirs = (gradients(model, (weights * x).sum()) for x in (sums, naive(model, rows)))
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
    (piecewise,) = pack_pairs(rows, 10_000)
    model.varlen = False
    torch.testing.assert_close(response_logps(model, piecewise)[0], sums, atol=1e-5, rtol=1e-5)


def before_2_13(q, k, v, *lengths, scale=None, window_size=(-1, -1)):
    """varlen_attn of torch 2.11, which sees from the sizes that heads share their keys."""
    options = dict(scale=scale, window_size=window_size, enable_gqa=q.shape[1] != k.shape[1])
    return varlen_reference(q, k, v, *lengths, **options)


def test_grouped_heads_before_torch_2_13(varlen):
    varlen.setattr(common, "VARLEN_ASKS", False)
    varlen.setattr(common, "varlen_attn", before_2_13)
    model = make(FAMILIES["llama"])
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    rows = random_rows(4)
    (batch,) = pack_pairs(rows, 10**5)
    found, _ = response_logps(model, batch)
    assert model.varlen and model.packs
    torch.testing.assert_close(found, naive(model, rows), atol=1e-5, rtol=1e-5)


def test_hiddens_and_gradient_checkpointing(varlen):
    """Each batch has its own table when a layer is computed again in backward."""
    model = make(FAMILIES["llama"])
    a, b = (pack_pairs(random_rows(3, seed), 10_000)[0] for seed in (1, 2))
    hiddens = response_hiddens(model, a)
    ids = torch.tensor([a["rows"][0]["prompt_ids"] + a["rows"][0]["responses"][1]])
    expected = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, -1]
    torch.testing.assert_close(hiddens[1], expected, atol=1e-5, rtol=1e-5)
    both = lambda: response_logps(model, a)[0].sum() + response_logps(model, b)[0].sum()
    plain = gradients(model, both())
    model.gradient_checkpointing_enable()
    torch.testing.assert_close(gradients(model, both()), plain, atol=1e-6, rtol=1e-5)


WINDOWS = {
    "mistral": MistralConfig(
        **TINY, num_key_value_heads=2, sliding_window=16, max_position_embeddings=128
    ),
    "gemma 3": Gemma3TextConfig(
        **TINY,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=8,
        max_position_embeddings=128,
        layer_types=["sliding_attention", "full_attention"],
    ),
}


@pytest.mark.parametrize("family", WINDOWS)
def test_rows_beyond_a_sliding_window_are_packed(family, varlen):
    """The varlen call cuts the window of each layer, as the library's mask does."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(WINDOWS[family], dtype=torch.float32).eval()
    rows = random_rows(4)
    rows.append(dict(prompt_ids=list(range(1, 25)), responses=[[8] * 9, [10, 11], [12] * 20]))
    (batch,) = pack_pairs(rows, 10_000)
    assert common.packs(model, batch) and model.varlen
    torch.testing.assert_close(
        response_logps(model, batch)[0], naive(model, rows), atol=1e-4, rtol=1e-5
    )


def test_without_the_kernel_attention_goes_piece_by_piece(varlen, capsys):
    """A driver or a head size that the kernel does not take: the fallback, with a line."""

    def refuses(*_, **__):
        raise RuntimeError("FlashAttention only supports head dimension at most 256")

    varlen.setattr(common, "varlen_attn", refuses)
    model, rows = make(FAMILIES["llama"]), random_rows()
    sums, _ = response_logps(model, pack_pairs(rows, 10_000)[0])
    assert model.packs and not model.varlen
    line = capsys.readouterr().out
    assert "piece by piece" in line and "head dimension at most 256" in line
    torch.testing.assert_close(sums, naive(model, rows), atol=1e-5, rtol=1e-5)


def test_a_wrong_kernel_is_noticed(varlen, capsys):
    """Causal from the first key on, and not up to the last: an old kernel's alignment."""

    def top_left(q, k, v, queries, keys, *sizes, **options):
        options["window_size"] = (0, 0)
        return varlen_reference(q, k, v, queries, keys, *sizes, **options)

    varlen.setattr(common, "varlen_attn", top_left)
    model = make(FAMILIES["llama"])
    response_logps(model, pack_pairs(random_rows(), 10_000)[0])
    assert model.packs and not model.varlen and "a log-prob differs" in capsys.readouterr().out


def test_fp32_takes_no_kernel(varlen):
    varlen.setattr(common, "VARLEN_DTYPES", (torch.bfloat16, torch.float16))
    model = make(FAMILIES["gpt2"])
    response_logps(model, pack_pairs(random_rows(), 10_000)[0])
    assert model.packs and not model.varlen


def test_bf16_under_fsdp_and_in_a_copy(varlen, blank, capsys):
    """The probe takes the tolerance of the compute dtype, not that of the fp32 weights."""
    varlen.setattr(common, "VARLEN_DTYPES", (torch.bfloat16, torch.float16))
    exact = common.load_model(blank / "model", train=True)
    rows = random_rows(responses=3)
    expected = naive(exact, rows)
    copied = common.load_model(blank / "model", "bfloat16", train=True)
    sharded = common.load_model(blank / "model", train=True)
    sharded.compute_dtype = torch.bfloat16
    common._shard(sharded, torch.bfloat16)
    found = []
    for model in (copied, sharded):
        (batch,) = pack_pairs(rows, 10_000)
        sums, _ = response_logps(model, batch)
        module = common.computing(model)
        assert module.packs and module.varlen
        sums.sum().backward()
        # Up to 9 tokens a response, each within the 5e-2 of a bf16 log-prob.
        torch.testing.assert_close(sums, expected, atol=0.2, rtol=1e-2)
        found.append(sums)
    assert torch.equal(*found)
    assert capsys.readouterr().out == ""


# The reference as an operator, as which the compiler sees the kernel.


@torch.library.custom_op("tests::varlen", mutates_args=())
def varlen_operator(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    queries: torch.Tensor,
    keys: torch.Tensor,
    longest_query: int,
    longest_key: int,
    left: int,
    grouped: bool,
) -> torch.Tensor:
    options = dict(window_size=(left, 0), enable_gqa=grouped)
    return varlen_reference(q, k, v, queries, keys, longest_query, longest_key, **options)


@varlen_operator.register_fake
def _(q, *others):
    return torch.empty_like(q)


@torch.library.custom_op("tests::varlen_backward", mutates_args=())
def varlen_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    queries: torch.Tensor,
    keys: torch.Tensor,
    longest_query: int,
    longest_key: int,
    left: int,
    grouped: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    d_q, d_k, d_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    copies = q.shape[1] // k.shape[1]
    for a, b, c, d in zip(queries, queries[1:], keys, keys[1:]):
        for head in range(q.shape[1]):
            its = head // copies
            mine, theirs, values = q[a:b, head], k[c:d, its], v[c:d, its]
            scale = q.shape[2] ** -0.5
            unseen = torch.ones(len(mine), len(theirs), dtype=torch.bool)
            unseen = unseen.triu(len(theirs) - len(mine) + 1)
            p = (mine @ theirs.T * scale).masked_fill(unseen, -torch.inf).softmax(-1)
            d_p = grad[a:b, head] @ values.T
            d_scores = p * (d_p - (d_p * p).sum(-1, keepdim=True)) * scale
            d_q[a:b, head] = d_scores @ theirs
            d_k[c:d, its] += d_scores.T @ mine
            d_v[c:d, its] += p.T @ grad[a:b, head]
    return d_q, d_k, d_v


@varlen_backward.register_fake
def _(grad, q, k, v, *others):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5])
    ctx.others = inputs[5:]


def backward(ctx, grad):
    gradients = varlen_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.others)
    return *gradients, *[None] * 6


varlen_operator.register_autograd(backward, setup_context=keep)


def varlen_kernel(q, k, v, *lengths, scale, window_size, enable_gqa=False):
    return varlen_operator(q, k, v, *lengths, window_size[0], enable_gqa)


@pytest.mark.parametrize("family, checkpointing", [("gpt_neox", False), ("llama", True)])
def test_compiled_layers(family, checkpointing, varlen, monkeypatch):
    """The numbers of layers that are not compiled; and a layer is compiled for a few sizes only."""
    from torch._dynamo.testing import CompileCounterWithBackend

    monkeypatch.setattr(common, "varlen_attn", varlen_kernel)
    for name in ("_log_softmax_at", "_logits_gradient"):
        monkeypatch.setattr(common, name, getattr(common, name))  # _compile replaces them
    torch._dynamo.reset()
    model = make(FAMILIES[family])
    if checkpointing:
        model.gradient_checkpointing_enable()
    batches = []
    for seed in range(4):
        batches += pack_pairs(random_rows(4 + 3 * seed, seed, 2), 10_000)
    batches += pack_pairs(random_rows(9, 9, 4), 10_000)
    plain = [gradients(model, response_logps(model, batch)[0].sum()) for batch in batches]
    counter = CompileCounterWithBackend("aot_eager")
    common._compile(model, counter)
    for batch, expected in zip(batches, plain):
        found = gradients(model, response_logps(model, batch)[0].sum())
        assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert counter.frame_count <= 4, "compiled for every batch"


def test_why_layers_are_not_compiled(varlen, capsys):
    """One line each: a short run, attention piece by piece, no compiler."""
    varlen.setattr(common, "CUDA", True)
    varlen.setattr(common, "_compile", lambda module: print("compiled"))
    varlen.setattr(common.importlib.util, "find_spec", lambda name: name)
    model = make(FAMILIES["llama"])

    def said(steps, wanted=True):
        common.compile_layers(model, wanted, steps)
        return capsys.readouterr().out

    assert said(10**4, wanted=False) == ""
    assert said(10**4) == "compiled\n"
    assert said(299) == "decoder layers are not compiled: 299 steps are too few to pay for it\n"
    varlen.setattr(common.shutil, "which", lambda name: None)
    assert "a C compiler is missing" in said(10**4)
    varlen.setattr(common.importlib.util, "find_spec", lambda name: None)
    assert "Triton is missing" in said(10**4)
    common.computing(model).varlen = False
    assert "piece by piece" in said(10**4)


def test_a_batch_is_moved_once(varlen):
    """All its tensors and those of its table, to a device that is not the CPU."""
    (batch,) = pack_pairs(random_rows(), 10_000)
    moved = common._on_device(batch, torch.device("meta"))
    tensors = [x for x in [*moved.values(), *vars(moved["table"]).values()] if torch.is_tensor(x)]
    assert len(tensors) == 7 + 6 and all(x.is_meta for x in tensors)
    assert common._on_device(batch, torch.device("meta")) is moved
    # It stays until another one comes.
    (other,) = pack_pairs(random_rows(3), 10_000)
    assert common._on_device(other, torch.device("meta")) is not moved
    assert common.moved_last[0] is other
    assert common._on_device(batch, torch.device("cpu")) is batch
