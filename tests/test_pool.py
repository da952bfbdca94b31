"""Decoding with a pool of token rows, on the CPU: a plain loop stands in for the kernel.

Truth is the library's forward pass of the whole texts, without any cache.
"""

import contextlib
import gc
import os
import subprocess
import sys
from types import SimpleNamespace

import generate
import imh_adaptors
import numpy as np
import pytest
import test_families
import torch
from loops import attend_reference
from test_sampling import CONFIGS, PROMPTS, V, build, check, full_forward, grow
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

import common
from common import decode_step, prefill, reorder, sample_tokens, stay_in_place

SIZES = dict(
    vocab_size=V,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=64,
)
CASES = [  # heads, groups' keys, head size, dtype
    (4, 4, 64, torch.float32),
    (4, 2, 80, torch.float32),
    (6, 2, 128, torch.float32),
    (3, 1, 8, torch.float32),
    (4, 2, 64, torch.float16),
    (4, 2, 64, torch.bfloat16),
]


def compare_kernel(heads, keys_of, head_dim, dtype, device):
    """The kernel against the reference in fp32: slots of 1 to 40 tokens that share rows."""
    generator = torch.Generator().manual_seed(heads + head_dim)
    q = torch.randn(5, heads, head_dim, generator=generator).to(dtype)
    keys = torch.randn(100, keys_of, head_dim, generator=generator).to(dtype)
    values = torch.randn(100, keys_of, head_dim, generator=generator).to(dtype)
    table = torch.randint(0, 100, (7, 64), generator=generator, dtype=torch.int32)
    used = torch.tensor([1, 7, 8, 9, 40, 0, 3], dtype=torch.int32)
    expected = attend_reference(q.float(), keys.float(), values.float(), table, used, 0.3)
    inputs = [x.to(device) for x in (q, keys, values, table, used)]
    found = common.attend_by_table(*inputs, 0.3)
    assert found.dtype == dtype
    bits = {torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}[dtype]
    bound = 2.0 ** (1 - bits) * 4  # numbers of size 4, one rounding at the end
    bound += 2e-6 * 4  # sums of fp32 in another order
    torch.testing.assert_close(found.float().cpu(), expected, atol=bound, rtol=0)


def no_reason(model):
    return ""


@pytest.fixture
def pool(monkeypatch):
    """The form of a GPU, with the reference in the place of the kernel and no captured step."""
    monkeypatch.setattr(common, "_why_no_pool", no_reason)
    monkeypatch.setattr(common, "attend_by_table", attend_reference)
    return monkeypatch


@pytest.fixture(params=CONFIGS)
def model(request):
    return build(request.param)


def pool_of(turn):
    assert isinstance(turn, common.PoolTurn)
    return turn.pool


def check_table(pool, slots, lengths):
    """Within a slot no row twice; the newest token is the slot's own row, which no other has."""
    table, used = pool.table[:slots], pool.used[:slots]
    assert used.tolist() == lengths
    rows = [table[slot, : used[slot]].tolist() for slot in range(slots)]
    for slot in range(slots):
        assert len(set(rows[slot])) == len(rows[slot])
        assert 0 <= min(rows[slot]) and max(rows[slot]) < len(pool.cache.layers[0].keys)
    newest = [row[-1] for row in rows]
    for slot, row in enumerate(newest):
        assert not any(row in others for i, others in enumerate(rows) if i != slot)


@pytest.mark.parametrize("copies", [1, 3])
def test_steps_equal_full_forward(pool, model, copies):
    turn, hidden, logits = prefill(model, PROMPTS, 5, copies)
    assert model.pools and model.decodes
    texts = [list(prompt) for prompt in PROMPTS for _ in range(copies)]
    check(model, texts, hidden, logits)
    for step in range(5):
        tokens = (torch.arange(len(texts)) * 11 + 3 * step) % V
        hidden, logits = decode_step(model, turn, tokens)
        texts = [text + [token] for text, token in zip(texts, tokens.tolist())]
        check(model, texts, hidden, logits)
        check_table(pool_of(turn), len(texts), [len(text) for text in texts])
    with pytest.raises(IndexError, match="more steps"):
        decode_step(model, turn, tokens)


def test_forks_and_reorders(pool, model):
    """Ancestors repeated, dropped, exchanged; fewer slots; across prompts of other lengths."""
    from_one = [[1, 1, 0, 2], [3, 0, 1, 2], [2, 2, 2, 2], [0, 1, 2, 3], [3, 1], [1, 0], [1]]
    pool_of(grow(model, from_one, PROMPTS[:1], 4))
    of_several = [[0, 1, 4, 3, 4, 5], [0, 1, 2, 2, 4, 5], [1, 5, 2, 2, 0, 2], [4, 1, 2, 3, 4]]
    pool_of(grow(model, of_several, PROMPTS[:3], 2))


def test_a_quarter_of_the_slots(pool):
    """A step for fewer slots, once a quarter of them is enough."""
    model = build("llama")
    sizes = []

    def run(model, pool, slots, plain=common._run_in_pool):
        sizes.append(slots)
        return plain(model, pool, slots)

    pool.setattr(common, "_run_in_pool", run)
    grow(model, [list(range(n)) for n in (80, 33, 20, 18, 3)], PROMPTS[:1], 80)
    assert sizes[-5:] == [80, 80, 20, 20, 20]  # the probe's come before


class Recorded:
    """In the place of a CUDA graph: replay runs the recorded step into the tensors that it made."""

    def replay(self):
        for made, again in zip(self.made, common._run_in_pool(*self.step)):
            made.copy_(again)


class Capture:
    """In the place of torch.cuda's streams and graph; what runs within graph is recorded."""

    def __init__(self, plain):
        self.plain = plain
        self.recording = None
        self.captures = []  # numbers of slots

    def wait_stream(self, stream):
        pass

    def run(self, *step):
        made = self.plain(*step)
        if self.recording is not None:
            self.recording.step = step
            self.recording.made = made
            self.captures.append(step[2])
        return made

    @contextlib.contextmanager
    def graph(self, graph, capture_error_mode):
        self.recording = graph
        yield
        self.recording = None


@pytest.fixture
def capture(pool):
    capture = Capture(common._run_in_pool)
    pool.setattr(common, "CUDA", True)
    pool.setattr(common, "_run_in_pool", capture.run)
    pool.setattr(common, "refusing_waits", contextlib.nullcontext)
    pool.setattr(common, "_warming_stream", lambda: capture)
    pool.setattr(torch.cuda, "current_stream", lambda: capture)
    pool.setattr(torch.cuda, "stream", contextlib.nullcontext)
    pool.setattr(torch.cuda, "CUDAGraph", Recorded)
    pool.setattr(torch.cuda, "graph", capture.graph)
    return capture


def test_captured_steps(capture):
    """A replay reads and writes fixed tensors alone, is kept, and spoils no earlier result."""
    model = build("llama")
    common._probe_decoding(model)
    capture.captures.clear()
    for prompts in (PROMPTS[:1], [PROMPTS[2] * 2]):
        grow(model, [list(range(n)) for n in (80, 33, 20, 18, 3)], prompts, 80)
        assert capture.captures == [80, 20]  # once each
    turn, _, _ = prefill(model, PROMPTS, 2)
    first = decode_step(model, turn, torch.tensor([1, 2, 3, 4]))
    kept = [part.clone() for part in first]
    decode_step(model, turn, torch.tensor([5, 6, 7, 8]))
    for part, before in zip(first, kept):
        assert torch.equal(part, before)

    # Weights that move in place are read by the same replay.
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    del turn
    grow(model, [[0, 1, 2, 3], [3, 2, 1, 0]], PROMPTS, 1)
    assert capture.captures == [80, 20, 4]  # a batch with fewer slots has its own step

    # There is a bound on steps that are kept.
    for slots in range(5, 5 + common.MOST_CAPTURED):
        grow(model, [list(range(slots))], PROMPTS[:1], slots)
    assert 0 < len(common.POOLS[model].captured) <= common.MOST_CAPTURED


def test_no_key_moves(pool):
    model = build("llama")
    turn, _, _ = prefill(model, PROMPTS[1:3], 3, copies=2)
    decode_step(model, turn, torch.tensor([1, 2, 3, 4]))
    layer = pool_of(turn).cache.layers[1]
    tensors = [layer.keys, layer.values, turn.pool.table, turn.pool.used]
    places = [tensor.data_ptr() for tensor in tensors]
    before = layer.keys.clone()
    reorder(turn, torch.tensor([3, 3, 0, 0]))
    assert torch.equal(layer.keys, before)
    assert places == [tensor.data_ptr() for tensor in tensors]  # a graph finds them again
    assert turn.pool.used.tolist() == [8, 8, 2, 2]


def decode(model, uniforms, ancestors):
    """Tokens (T, n) and their log-probs, resampled before every step but the first."""
    turn, _, logits = prefill(model, PROMPTS, len(uniforms), copies=4)
    drawn = []
    for t, u in enumerate(uniforms):
        if t > 0:
            reorder(turn, ancestors[t])
            _, logits = decode_step(model, turn, drawn[-1][0][ancestors[t]])
        drawn.append(sample_tokens(logits, u))
    return [torch.stack(part) for part in zip(*drawn)]


@pytest.mark.parametrize("family", ["neox", "llama"])
def test_same_tokens_as_the_slab(family, monkeypatch):
    generator = torch.Generator().manual_seed(3)
    uniforms = torch.rand(20, 16, generator=generator, dtype=torch.float64)
    ancestors = torch.randint(0, 16, (20, 16), generator=generator)
    tokens, logps = decode(build(family), uniforms, ancestors)
    monkeypatch.setattr(common, "_why_no_pool", no_reason)
    monkeypatch.setattr(common, "attend_by_table", attend_reference)
    model = build(family)
    found, found_logps = decode(model, uniforms, ancestors)
    assert model.pools
    assert torch.equal(found, tokens)
    torch.testing.assert_close(found_logps, logps, atol=1e-4, rtol=0)


class Words(list):
    """What the adaptors' sampler asks of a tokenizer: how many tokens there are."""


def responses(model, prompts, uniforms, ends):
    """Of generate, then of the adaptors' sampler with two copies of a prompt: lists of ids."""
    how = generate.Sampler(temperature=0.8, filters={"top_p": 0.95})
    found = generate.respond(model, prompts, uniforms, how, ends.tolist(), V)
    drawn = imh_adaptors.sample(model, prompts[:4], 2, {"top_p": 0.9}, uniforms, Words(range(V)))
    return found + [response.ids for response in drawn]


def test_same_responses_of_the_methods(monkeypatch):
    """generate and the adaptors' sampler, whose slots become fewer, with slabs and with a pool."""
    generator = torch.Generator().manual_seed(5)
    uniforms = torch.rand(8, 12, generator=generator, dtype=torch.float64)
    prompts = [PROMPTS[i % 4] for i in range(8)]
    ends = torch.arange(12)  # a fifth of the vocabulary, so that most responses end early
    monkeypatch.setattr(imh_adaptors, "end_tokens", lambda model, tokenizer: ends.tolist())
    found = []
    for pooled in (False, True):
        if pooled:
            monkeypatch.setattr(common, "_why_no_pool", no_reason)
            monkeypatch.setattr(common, "attend_by_table", attend_reference)
        model = build("llama")
        found.append(responses(model, prompts, uniforms, ends))
        assert model.pools == pooled
    assert found[0] == found[1]
    assert len({len(response) for response in found[0]}) > 2


def test_bf16(pool):
    model = build("llama", torch.bfloat16)
    turn, _, logits = prefill(model, PROMPTS, 3)
    texts = [list(prompt) for prompt in PROMPTS]
    for step in range(3):
        tokens = torch.arange(4) + step
        _, logits = decode_step(model, turn, tokens)
        texts = [text + [token] for text, token in zip(texts, tokens.tolist())]
    assert pool_of(turn).cache.layers[0].keys.dtype == torch.bfloat16
    for text, z in zip(texts, logits):  # 8 bits: errors of a percent of the logits' spread
        expected = full_forward(model, text)[1].float()
        assert (z.float() - expected).abs().max() < 0.05 * expected.std()


def test_the_next_batch_takes_the_same_pool(pool):
    """Longer prompts and fewer slots too; not while the batch before goes on."""
    model = build("neox")
    turn, _, _ = prefill(model, PROMPTS, 5)
    kept = turn.pool
    other, hidden, logits = prefill(model, PROMPTS[:2], 5)
    assert other.pool is not kept and common.POOLS[model] is other.pool
    check(model, PROMPTS[:2], hidden, logits)
    decode_step(model, turn, torch.tensor([1, 2, 3, 4]))
    _, logits = decode_step(model, turn, torch.tensor([5, 6, 7, 8]))
    for i, prompt in enumerate(PROMPTS):  # of which the other batch changed nothing
        expected = full_forward(model, prompt + [1 + i, 5 + i])[1]
        torch.testing.assert_close(logits[i], expected, atol=2e-5, rtol=1e-5)

    del turn, kept, other
    turn = grow(model, [[0, 1, 2, 3]] * 5, PROMPTS, 1)
    kept = turn.pool
    del turn
    longer = [PROMPTS[2] * 2, [3], [9] * 20]
    turn = grow(model, [[2, 2, 0], [1, 2, 0], [0, 1]], longer, 1)
    assert turn.pool is kept


def test_a_pool_ends_with_its_model_and_its_weights(pool):
    model = build("neox")
    turn, _, _ = prefill(model, PROMPTS, 5)
    kept = turn.pool
    del turn
    model.double()  # weights at other addresses
    model.float()
    turn, _, _ = prefill(model, PROMPTS, 5)
    assert turn.pool is not kept
    before = len(common.POOLS)
    del model, turn, kept
    gc.collect()
    assert len(common.POOLS) < before


def test_memory_is_bounded(pool, capsys):
    """Prompt tokens once, up to the rounding, and a row for each slot and step."""
    model = build("llama")
    slots, room = 48, 40
    turn, _, logits = prefill(model, PROMPTS[:1], room, copies=slots)
    rows = [len(layer.keys) for layer in turn.pool.cache.layers]
    assert rows == [1024 + slots * room] * 2
    ancestors = torch.arange(slots).flip(0) // 2
    for _ in range(room):
        reorder(turn, ancestors)
        _, logits = decode_step(model, turn, logits.argmax(-1))
    assert [len(layer.keys) for layer in turn.pool.cache.layers] == rows
    assert turn.pool.where.max() == 3 + slots * room - 1 < rows[0]

    # From 1 GiB on it is said: 2 layers of keys and values, 2 heads of 8 numbers, 4 bytes.
    capsys.readouterr()
    keys = torch.empty(1, 2, 3, 8, device="meta")
    cache = SimpleNamespace(layers=[SimpleNamespace(keys=keys, values=keys)] * 2)
    common._make_pool(model, cache, 1024, 1000, 64, 4095)
    said = capsys.readouterr().out
    assert said == "keys and values: 1.0 GiB for 1024 slots of 4095 new tokens\n"


POOLED = ["gpt2", "opt", "mixtral", "qwen3", "phi", "cohere"]
NOT_POOLED = ["gpt-neo", "falcon with alibi", "bloom", "mpt"]  # biases, or attention of their own


@pytest.mark.parametrize("name", POOLED + NOT_POOLED)
def test_where_a_pool_is_exact(name, pool):
    """Twelve tokens against whole prefixes, in a pool where it is exact."""
    models = []

    def build_and_keep(name, build=test_families.build):
        models.append(build(name))
        return models[0]

    pool.setattr(test_families, "build", build_and_keep)
    test_families.test_twelve_tokens(name)
    assert models[0].pools == (name in POOLED)


@pytest.mark.parametrize("name", ["gpt-oss", "gemma 2", "mamba"])
def test_layers_that_do_not_see_all(name, monkeypatch):
    """A short probe would not find a window, so that the config is asked."""
    model = test_families.build(name)
    monkeypatch.setattr(common, "triton", "there")
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    assert "do not all attend" in common._why_no_pool(model)
    monkeypatch.setattr(common, "triton", None)
    assert common._why_no_pool(model) == "Triton is not installed"


def test_what_the_pool_does_not_take(pool, capsys):
    """Windows, large heads: slabs, and exact."""
    window = MistralConfig(**SIZES, sliding_window=32)
    large = LlamaConfig(**SIZES, head_dim=160)
    for config in (window, large):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        cache, hidden, logits = prefill(model, PROMPTS, 2)
        assert model.decodes and not model.pools
        check(model, PROMPTS, hidden, logits)
        assert not isinstance(cache, common.PoolTurn)
        assert model.config._attn_implementation == "sdpa"


def test_stay_in_place_against_counting():
    """Repeated, dropped and too large ancestors: survivors stay, dead slots take the rest."""
    generator = torch.Generator().manual_seed(0)
    for n in range(1, 12):
        for of in (n, n + 5):
            for _ in range(40):
                ancestors = torch.randint(0, of, (n,), generator=generator)
                left = ancestors.tolist()
                expected = [slot if slot in left else None for slot in range(n)]
                for slot in expected:
                    if slot is not None:
                        left.remove(slot)
                left.sort()
                expected = [left.pop(0) if slot is None else slot for slot in expected]
                assert stay_in_place(ancestors).tolist() == expected


def run_interpreted():
    """The kernel of all CASES in Triton's interpreter; on import of Triton that must be chosen."""
    import triton
    import triton.language
    from triton.runtime import jit

    def without_quotes(kind, plain=jit._normalize_ty):
        """The interpreter puts quotes around annotations, ours too."""
        return plain(kind.strip("'") if isinstance(kind, str) else kind)

    jit._normalize_ty = without_quotes
    common.triton, common.tl = triton, triton.language
    for case in CASES:
        compare_kernel(*case, "cpu")


def compile_kernel():
    """Compile the kernel for the GPU of CASES' sizes that is not here -> assembly of each"""
    import triton
    import triton.language
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    common.tl = triton.language
    kernel = triton.jit(common.attend_kernel)
    names = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
    found = []
    for _, _, head_dim, dtype in CASES:
        kinds = dict.fromkeys(("q", "keys", "values", "out"), names[dtype])
        kinds |= dict.fromkeys(("table", "used"), "*i32") | {"scale": "fp32"}
        kinds |= dict.fromkeys(("columns", "heads", "group"), "i32")
        fixed = {"D": head_dim, "PADDED": triton.next_power_of_2(head_dim)}
        fixed |= {"HEADS": common.HEADS, "TOKENS": common.TOKENS}
        kinds |= dict.fromkeys(fixed, "constexpr")
        source = ASTSource(kernel, kinds, constexprs=fixed)
        made = triton.compile(source, GPUTarget("cuda", 90, 32), options={"num_warps": 1})
        assert len(made.asm["cubin"]) > 0 and made.metadata.shared == 0
        found.append(made.asm["ptx"])
    return found


def test_the_kernel_compiles_without_a_gpu():
    """For compute capability 9.0; its vectors lie in registers, none in local memory."""
    pytest.importorskip("triton", reason="Triton is not installed")
    for assembly in compile_kernel():
        assert ".local" not in assembly


def test_the_kernel_in_an_interpreter():
    """Triton's own interpreter runs it without a GPU, where Triton is installed."""
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    release = tuple(map(int, triton.__version__.split(".")[:2]))
    numpy_release = tuple(map(int, np.__version__.split(".")[:2]))
    if release < (3, 7) and numpy_release >= (2, 4):
        pytest.skip("the interpreter of Triton before 3.7 runs no loop with NumPy 2.4 and later")
    code = "import sys; sys.path[:] = eval(sys.argv[1]); import test_pool as t; t.run_interpreted()"
    done = subprocess.run(
        [sys.executable, "-c", code, repr(sys.path)],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
