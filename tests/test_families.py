"""Any decoder-only family: scored and decoded as its plain forward pass does, or refused in a line.

Each is a small random model; right is the library's forward pass on one row, no padding, no cache.
"""

import json
import math
import sys

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import common

V = 128
ENDS = dict(bos_token_id=0, eos_token_id=0, pad_token_id=0)
SMALL = dict(vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
WIDE = dict(SMALL, intermediate_size=64, **ENDS)
GROUPED = dict(WIDE, num_key_value_heads=2)
HEADS = dict(GROUPED, head_dim=8)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2)

# name: class of the config, its fields, and whether packed rows are exact for it
FAMILIES = {
    "gpt2": (
        "GPT2Config",
        dict(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=128),
        True,
    ),
    "gpt-neo": (
        "GPTNeoConfig",
        dict(
            vocab_size=V,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            window_size=8,
            max_position_embeddings=128,
        ),
        False,
    ),
    "gpt-neox": ("GPTNeoXConfig", WIDE, True),
    "opt": (
        "OPTConfig",
        dict(SMALL, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=128, **ENDS),
        True,
    ),
    "llama": ("LlamaConfig", GROUPED, True),
    "llama with tied heads": ("LlamaConfig", dict(GROUPED, tie_word_embeddings=True), True),
    "mistral with a window": ("MistralConfig", dict(GROUPED, sliding_window=24), True),
    "mixtral": ("MixtralConfig", dict(GROUPED, num_local_experts=4), True),
    "qwen2": ("Qwen2Config", GROUPED, True),
    "qwen3": ("Qwen3Config", HEADS, True),
    "gemma 2": ("Gemma2Config", dict(HEADS, sliding_window=24), False),
    "gemma 3 text": ("Gemma3TextConfig", dict(HEADS, sliding_window=24), True),
    "phi": ("PhiConfig", GROUPED, True),
    "phi-3": ("Phi3Config", GROUPED, True),
    "falcon": ("FalconConfig", dict(SMALL, bos_token_id=0, eos_token_id=0), False),
    "falcon with alibi": (
        "FalconConfig",
        dict(SMALL, alibi=True, multi_query=False, parallel_attn=False, bias=True, eos_token_id=0),
        False,
    ),
    "bloom": ("BloomConfig", dict(vocab_size=V, hidden_size=32, n_layer=2, n_head=4), False),
    "mpt": ("MptConfig", dict(vocab_size=V, d_model=32, n_layers=2, n_heads=4), False),
    "cohere": ("CohereConfig", GROUPED, False),
    "granite": ("GraniteConfig", dict(GROUPED, logits_scaling=4.0, residual_multiplier=0.5), False),
    "gpt-oss": (
        "GptOssConfig",
        dict(HEADS, sliding_window=24, num_local_experts=4, num_experts_per_tok=2),
        False,
    ),
    "mamba": (
        "MambaConfig",
        dict(vocab_size=V, hidden_size=32, num_hidden_layers=2, **ENDS),
        False,
    ),
    "mamba 2": (
        "Mamba2Config",
        dict(
            vocab_size=V,
            hidden_size=32,
            num_hidden_layers=2,
            num_heads=8,
            head_dim=8,
            state_size=16,
            n_groups=2,
            chunk_size=8,
            **ENDS,
        ),
        False,
    ),
    "rwkv": (
        "RwkvConfig",
        dict(
            vocab_size=V,
            hidden_size=32,
            num_hidden_layers=2,
            attention_hidden_size=32,
            intermediate_size=64,
            bos_token_id=0,
            eos_token_id=0,
        ),
        False,
    ),
    "lfm2": ("Lfm2Config", dict(GROUPED, layer_types=["conv", "full_attention"]), False),
    "jamba": (
        "JambaConfig",
        dict(
            GROUPED,
            num_experts=2,
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            use_mamba_kernels=False,
            mamba_d_state=8,
        ),
        False,
    ),
    "recurrent gemma": (
        "RecurrentGemmaConfig",
        dict(
            GROUPED,
            lru_width=32,
            attention_window_size=16,
            block_types=["recurrent", "attention"],
        ),
        False,
    ),
    "falcon-h1": (
        "FalconH1Config",
        dict(
            HEADS,
            mamba_d_ssm=32,
            mamba_n_heads=4,
            mamba_d_head=8,
            mamba_d_state=8,
            mamba_chunk_size=8,
            mamba_n_groups=1,
        ),
        False,
    ),
    "qwen3-next": (
        "Qwen3NextConfig",
        dict(
            HEADS,
            **EXPERTS,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=32,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            layer_types=["linear_attention", "full_attention"],
        ),
        False,
    ),
    "gemma 3": (
        "Gemma3Config",
        dict(
            text_config=dict(HEADS, sliding_window=24),
            vision_config=dict(
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                image_size=28,
                patch_size=14,
            ),
        ),
        True,
    ),
}


def numbers(n, start):
    """n token ids of no meaning, none of them the end token."""
    return [(7 * i * i + 3 * i + start) % (V - 4) + 2 for i in range(n)]


def build(name):
    """The model of a family with random weights, so large that every term matters."""
    kind, fields, _ = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**fields)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)
    model.tie_weights()
    return model


def plain_logps(model, row):
    """The definition: each response's sum of log-probs from one forward pass over its own row."""
    sums = []
    for response in row["responses"]:
        ids = torch.tensor([row["prompt_ids"] + response])
        logits = model(ids, use_cache=False).logits[0, :-1].float()
        log_p = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        sums.append(log_p[len(row["prompt_ids"]) - 1 :].sum())
    return torch.stack(sums)


ROWS = [
    dict(prompt_ids=numbers(9, 1), responses=[numbers(8, 2), numbers(5, 3)]),
    dict(prompt_ids=numbers(3, 4), responses=[numbers(4, 5), numbers(12, 6)]),
    dict(
        prompt_ids=numbers(30, 7), responses=[numbers(6, 8), numbers(20, 9)]
    ),  # beyond the windows
]


@pytest.mark.parametrize("name", FAMILIES)
def test_scoring(name):
    """fp32 sums of up to 20 log-probs: 1e-4 is a few hundred roundings."""
    model = build(name)
    wanted = torch.cat([plain_logps(model, row) for row in ROWS])
    (batch,) = common.pack_pairs(ROWS, 10**6)
    found, _ = common.response_logps(model, batch)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    assert model.packs == FAMILIES[name][2]


@pytest.mark.parametrize("name", FAMILIES)
def test_bf16_packs_what_fp32_packs(name):
    """Rounding to bf16 is not taken for a wrong mask, nor the other way round."""
    for size in (1, 4):
        model = build(name).to(torch.bfloat16)
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(size)
        (batch,) = common.pack_pairs(ROWS, 10**6)
        try:
            common.packs(model, batch)
        except RuntimeError as error:  # Mamba 2 does not compute in bf16 at all
            assert not FAMILIES[name][2] and "same dtype" in str(error)
            continue
        assert model.packs == FAMILIES[name][2]  # windows or not


@pytest.mark.parametrize("name", [name for name in FAMILIES if FAMILIES[name][2]])
def test_gradients_of_packed_rows(name):
    model = build(name)
    rows = ROWS[:2]  # shorter than the windows, so that these are packed
    weights = torch.tensor([1.0, -2.0, 0.5, 1.5])
    (batch,) = common.pack_pairs(rows, 10**6)
    (common.response_logps(model, batch)[0] * weights).sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    implementation = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    (torch.cat([plain_logps(model, row) for row in rows]) * weights).sum().backward()
    model.set_attn_implementation(implementation)
    for n, p in model.named_parameters():
        if p.grad is not None:
            scale = p.grad.abs().max().clamp(min=1.0).item()
            torch.testing.assert_close(found[n], p.grad, atol=2e-4 * scale, rtol=0)


WHOLE_PREFIXES = "mamba|mamba 2|rwkv|lfm2|jamba|recurrent gemma|falcon-h1|qwen3-next".split("|")


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_twelve_tokens(name):
    """Tokens of two prompts of different lengths, forked and reordered, against whole prefixes."""
    model = build(name)
    prompts = [numbers(12, 1), numbers(7, 9)]
    cache, _, logits = common.prefill(model, prompts, 12, copies=2)
    assert model.decodes == (name not in WHOLE_PREFIXES)  # as README's table says
    texts = [list(prompts[0]), list(prompts[0]), list(prompts[1]), list(prompts[1])]
    for step in range(12):
        wanted = [model(torch.tensor([text]), use_cache=False).logits[0, -1] for text in texts]
        torch.testing.assert_close(logits, torch.stack(wanted), atol=1e-4, rtol=0)
        tokens = logits.argmax(-1)
        tokens[1] = (tokens[1] + step) % V  # the copies part
        if step == 6:  # slot 0 goes on from slot 1, slot 3 from slot 2
            ancestors = torch.tensor([1, 1, 2, 2])
            common.reorder(cache, ancestors)
            texts = [list(texts[i]) for i in ancestors]
            tokens = tokens[ancestors]
        for text, token in zip(texts, tokens.tolist()):
            text.append(token)
        _, logits = common.decode_step(model, cache, tokens)


@pytest.mark.parametrize("kind", ["BertConfig", "RobertaConfig", "T5Config"])
def test_models_that_see_the_future_are_refused(kind, tmp_path):
    config = getattr(transformers, kind)(vocab_size=V)
    config.hidden_size = 32
    if kind == "T5Config":
        config = transformers.T5Config(vocab_size=V, d_model=32, d_kv=8, d_ff=64, num_layers=2)
        model = transformers.T5ForConditionalGeneration(config)
    else:
        config = getattr(transformers, kind)(**SMALL, intermediate_size=64)
        model = transformers.AutoModelForMaskedLM.from_config(config)
    model.save_pretrained(tmp_path)
    with pytest.raises(SystemExit) as refused:
        common.load_model(str(tmp_path))
    assert "\n" not in str(refused.value) and "decoder" in str(refused.value)


def saved_neox(folder):
    """A GPT-NeoX with random weights and a tokenizer of its vocabulary, in a folder."""
    words = Tokenizer(models.WordLevel({str(i): i for i in range(V)}, unk_token="0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="0")
    tokenizer.save_pretrained(folder)
    model = build("gpt-neox")
    model.save_pretrained(folder)
    return model, tokenizer


def test_an_adapter_is_merged_into_its_base(tmp_path):
    peft = pytest.importorskip("peft")
    model, _ = saved_neox(tmp_path / "base")
    model.name_or_path = str(tmp_path / "base")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    assert not list((tmp_path / "adapter").glob("tokenizer*"))
    ids = torch.tensor([numbers(12, 1)])
    with torch.no_grad():
        wanted = adapted.eval()(ids).logits
        found = common.load_model(str(tmp_path / "adapter"))(ids).logits
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert len(common.load_tokenizer(str(tmp_path / "adapter"))) == V


def test_an_adapter_without_peft_is_one_line(tmp_path, monkeypatch):
    saved_neox(tmp_path / "base")
    (tmp_path / "adapter").mkdir()
    where = {"base_model_name_or_path": str(tmp_path / "base")}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(where))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SystemExit, match="needs peft: pip install peft") as refused:
        common.load_model(str(tmp_path / "adapter"))
    assert "\n" not in str(refused.value)


def test_weights_that_are_not_finite_are_named(tmp_path):
    model, _ = saved_neox(tmp_path)
    model.get_output_embeddings().weight.data[3, 1] = math.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="holds NaN or infinity"):
        common.load_model(str(tmp_path))


def test_more_tokens_than_embeddings_are_refused(tmp_path):
    _, tokenizer = saved_neox(tmp_path)
    tokenizer.add_tokens(["more", "tokens"])
    tokenizer.save_pretrained(tmp_path)
    message = f"has {V + 2} tokens, the model only {V} embeddings"
    with pytest.raises(SystemExit, match=message):
        common.load_tokenizer(str(tmp_path))


def test_rows_beyond_the_context_are_refused(tmp_path):
    model, tokenizer = saved_neox(tmp_path)
    context = model.config.max_position_embeddings
    tokenizer = common.load_tokenizer(str(tmp_path))
    assert tokenizer.model_max_length == context
    core = tokenizer.backend_tokenizer
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    row = {"prompt": "1 " * context, "chosen": "2"}
    with pytest.raises(SystemExit, match=f"reads {context} tokens, but a row has up to"):
        common.tokenize_pairs([row], tokenizer, 2 * context, 2 * context - 10)
