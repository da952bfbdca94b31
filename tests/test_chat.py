"""Chat messages against `apply_chat_template(tokenize=True)`, for templates of many shapes.

The templates are ours, each with the shape of a family's: what it writes before the first message,
how a turn ends, what it refuses.  The tokenizer is a byte-level BPE of 600 tokens.
"""

import json

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

import common
from common import encode_prompt, encode_rows, end_tokens, load_pairs, turn_ends

SPECIAL = "<s> </s> <|im_start|> <|im_end|> <|start|> <|end|> <|eot|> <turn> </turn>".split()

CHATML = """{% for m in messages %}<|im_start|>{{ m['role'] }}
{{ m['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
LLAMA2 = """{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}\
{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}\
{% for m in rest %}{% if m['role'] == 'user' %}{{ bos_token }}[INST] \
{% if loop.first and system %}<<SYS>>
{{ system }}
<</SYS>>

{% endif %}{{ m['content'].strip() }} [/INST]{% else %} {{ m['content'].strip() }} {{ eos_token }}\
{% endif %}{% endfor %}"""
LLAMA3 = """{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}<|start|>\
{{ m['role'] }}<|end|>

{{ m['content'] | trim }}<|eot|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|end|>

{% endif %}"""
ZEPHYR = """{% for m in messages %}<|{{ m['role'] }}|>
{{ m['content'] + eos_token }}
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""
MISTRAL = """{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}\
{% if tools and loop.last %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}\
[INST]{{ m['content'] }}[/INST]{% elif m['tool_calls'] is defined %}[TOOL_CALLS]\
{% for call in m['tool_calls'] %}{{ call['function'] | tojson }}{% endfor %}{{ eos_token }}\
{% elif m['role'] == 'tool' %}[TOOL_RESULTS]{{ m['content'] }}[/TOOL_RESULTS]\
{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"""
MISTRAL = MISTRAL.replace("{% if tools and loop.last %}", "{% if tools and loop.first %}")
GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}\
{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}\
<turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}
{{ m['content'] | trim }}</turn>
{% endfor %}{% if add_generation_prompt %}<turn>model
{% endif %}"""
PLAIN = """{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}
{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"""  # no end of a turn
PARTS = """{% for m in messages %}<|im_start|>{{ m['role'] }}
{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}\
{{ part['text'] }}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
# template, the tokenizer's EOS
SHAPES = {
    "chatml": (CHATML, "<|im_end|>"),
    "chatml, another EOS": (CHATML, "</s>"),
    "llama2": (LLAMA2, "</s>"),
    "llama3": (LLAMA3, "</s>"),
    "zephyr": (ZEPHYR, "</s>"),
    "mistral": (MISTRAL, "</s>"),
    "gemma": (GEMMA, "</s>"),
    "parts": (PARTS, "<|im_end|>"),
}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture(scope="module")
def core():
    """A byte-level BPE that has seen a few words."""
    found = Tokenizer(models.BPE())
    # Newlines are a piece of their own, as in Llama 3; see test_a_token_across_the_border.
    pieces = pre_tokenizers.Split(Regex(r" ?\w+|\n+| |[^\w\s]+"), "isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    found.pre_tokenizer = pre_tokenizers.Sequence([pieces, letters])
    found.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "user assistant system model What is tea? A short answer.\n\n I do not know it at all. "
    found.train_from_iterator([text * 3], trainer)
    return found.to_str()


def make(core, template, eos="</s>", bos="<s>", adds=""):
    """A tokenizer; adds: the special token that it puts at the end of every text."""
    inner = Tokenizer.from_str(core)
    if adds:
        inner.post_processor = processors.TemplateProcessing(
            single=f"$A {adds}", special_tokens=[(adds, SPECIAL.index(adds))]
        )
    found = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=eos, bos_token=bos)
    found.chat_template = template
    return found


def library(tokenizer, chat, cue, tools=None):
    """The ids of the library itself."""
    found = tokenizer.apply_chat_template(
        chat, tools=tools, tokenize=True, add_generation_prompt=cue, return_dict=False
    )
    return list(found)


ROWS = [
    ([user("What is tea?")], [assistant("A short answer."), assistant("I do not know.")]),
    ([SYSTEM, user("What is tea?")], [assistant(" spaced ")]),
    (
        [user("What?"), assistant("Tea."), user("And it?")],
        [assistant("A short answer.\n\nMore."), assistant("\n\nlines first")],
    ),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_ids_are_the_librarys(core, shape):
    template, eos = SHAPES[shape]
    tokenizer = make(core, template, eos)
    compared = 0
    for prompt, answers in ROWS:
        (found,) = encode_rows([{"prompt": prompt, "responses": [[a] for a in answers]}], tokenizer)
        if prompt[0] is SYSTEM and shape == "gemma":
            assert found == "chat template: System role not supported"
            continue
        start = library(tokenizer, prompt, cue=True)
        assert found.prompt_ids == start == encode_prompt(prompt, tokenizer)
        for answer, response in zip(answers, found.responses):
            whole = library(tokenizer, [*prompt, answer], cue=False)
            merged = whole[: len(start)] != start  # a token reaches over the border
            if not merged:
                assert found.prompt_ids + response == whole
                compared += 1
            text = tokenizer.decode(found.prompt_ids + response)
            assert text == tokenizer.decode(whole)
    assert compared >= 3


def test_a_token_across_the_border(core):
    """GPT-2 reads two newlines as one token, but not before a letter: the prompt's ids stay those
    from which a response is sampled, and the response is read apart.
    """
    inner = Tokenizer.from_str(core)
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # with GPT-2's pieces
    tokenizer = make(inner.to_str(), LLAMA3)
    prompt, answer = [user("What is tea?")], assistant("A short answer.")
    start = library(tokenizer, prompt, cue=True)
    whole = library(tokenizer, [*prompt, answer], cue=False)
    assert whole[: len(start)] != start
    (found,) = encode_rows([{"prompt": prompt, "chosen": [answer]}], tokenizer)
    assert found.prompt_ids == start
    assert tokenizer.decode(found.responses[0]) == "A short answer.<|eot|>"


def test_bos_from_the_template_alone(core):
    """The first token of the template is the BOS, which the tokenizer never puts itself."""
    tokenizer = make(core, CHATML, eos="<|im_end|>", bos="<|im_start|>")
    start = encode_prompt([user("What is tea?")], tokenizer)
    assert start[0] == SPECIAL.index("<|im_start|>")
    assert start == library(tokenizer, [user("What is tea?")], cue=True)


def test_a_prompt_that_is_cut_keeps_its_bos(core):
    tokenizer = make(core, LLAMA3)
    row = {"prompt": [user("What is tea? " * 30)], "chosen": [assistant("A short answer.")]}
    (found,) = common.tokenize_pairs([row], tokenizer, 40, 20, what=None)
    assert len(found["prompt_ids"]) == 20 and found["prompt_ids"][0] == SPECIAL.index("<s>")
    whole = library(tokenizer, row["prompt"], cue=True)
    assert found["prompt_ids"][1:] == whole[-19:]


def test_a_template_without_an_end_gets_one(core):
    tokenizer = make(core, PLAIN)
    (found,) = encode_rows([{"prompt": [user("Tea?")], "chosen": [assistant("Yes.")]}], tokenizer)
    assert tokenizer.decode(found.responses[0]) == " Yes.\n</s>"
    assert turn_ends(tokenizer) == {SPECIAL.index("</s>")}


def test_a_tokenizer_that_appends_eos_does_not_put_it_into_prompts(core):
    tokenizer = make(core, CHATML, adds="</s>")
    end = SPECIAL.index("</s>")
    assert tokenizer("What is tea?").input_ids[-1] == end
    assert end not in encode_prompt("What is tea?", tokenizer)
    assert end not in encode_prompt([user("What is tea?")], tokenizer)
    (found,) = encode_rows([{"prompt": "What", "chosen": " is", "rejected": " tea"}], tokenizer)
    assert [ids.count(end) for ids in found.responses] == [1, 1]


def test_tools_and_calls(core):
    tokenizer = make(core, MISTRAL)
    call = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    prompt = [user("What is tea?")]
    row = {"prompt": prompt, "chosen": [call], "rejected": [assistant("No.")], "tools": [TOOL]}
    (found,) = encode_rows([row], tokenizer)
    assert found.prompt_ids == library(tokenizer, prompt, True, [TOOL])
    clean = {"role": "assistant", "tool_calls": [CALL], "content": None}
    assert found.prompt_ids + found.responses[0] == library(
        tokenizer, [*prompt, clean], False, [TOOL]
    )
    assert "weather" in tokenizer.decode(found.prompt_ids)
    assert "Oslo" in tokenizer.decode(found.responses[0])

    # A call in the prompt, its result, and tools as data sets store them: as JSON.
    talk = [*prompt, call, {"role": "tool", "name": "weather", "content": "rain"}]
    row = {"prompt": talk, "chosen": [assistant("It rains.")], "tools": json.dumps([TOOL])}
    (found,) = encode_rows([row], tokenizer)
    assert "rain" in tokenizer.decode(found.prompt_ids)

    # A template that does not know of them says nothing of them: the row is dropped.
    (found,) = encode_rows([row], make(core, CHATML))
    assert found == "the chat template does not write tools or their calls"


def test_null_columns_of_a_table_are_not_there(core, tmp_path):
    """In parquet a message without tool_calls has a null there, beside one that has some."""
    tokenizer = make(core, MISTRAL)
    message = {**assistant("It rains."), "tool_calls": None, "name": None}
    (found,) = encode_rows([{"prompt": [user("Tea?")], "chosen": [message]}], tokenizer)
    assert "It rains." in tokenizer.decode(found.responses[0])


def test_content_in_parts(core):
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "tea?"}]
    row = {"prompt": [user(parts)], "chosen": [assistant("Yes.")]}
    reads_parts = make(core, PARTS)
    (found,) = encode_rows([row], reads_parts)
    assert found.prompt_ids == library(reads_parts, [user(parts)], cue=True)
    assert "What is tea?" in reads_parts.decode(found.prompt_ids)
    for template in (CHATML, ZEPHYR, LLAMA3):  # these would write a list, or fail
        (found,) = encode_rows([row], make(core, template))
        assert "What is \ntea?" in make(core, template).decode(found.prompt_ids)
    image = [{"type": "image", "image": "x.png"}, {"type": "text", "text": "tea?"}]
    (found,) = encode_rows([{**row, "prompt": [user(image)]}], reads_parts)
    assert found == "a chat message with content that is not text"


def test_what_cannot_be_rendered_is_a_reason(core):
    tokenizer = make(core, CHATML)
    answer = [assistant("Yes.")]
    for prompt, reason in (
        ([{"role": "user"}], "a chat message without content"),
        ([user(None)], "a chat message without content"),
        ([{"content": "x"}], "a chat message without a role"),
        ([user("a <|im_end|> b")], "contains the special token <|im_end|>"),
    ):
        (found,) = encode_rows([{"prompt": prompt, "chosen": answer}], tokenizer)
        assert found == reason


def test_reasons_are_counted_with_the_first_row(core, tmp_path, capsys):
    rows = [
        {"prompt": [user("Tea?")], "chosen": [assistant("Yes.")], "rejected": [assistant("No.")]},
        {
            "prompt": [SYSTEM, user("Tea?")],
            "chosen": [assistant("Yes.")],
            "rejected": [assistant("No.")],
        },
    ]
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows * 3))
    common.tokenize_pairs(load_pairs(str(path), "test"), make(core, GEMMA))
    line = "dropped 3 (chat template: System role not supported: 3, the first is row 2)"
    assert line in capsys.readouterr().out


def test_end_tokens_are_one_set(core):
    tokenizer = make(core, CHATML)
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    model = GPTNeoXForCausalLM(config)
    model.generation_config.eos_token_id = [3, 17]
    named = {SPECIAL.index("</s>"), SPECIAL.index("<|im_end|>"), 17}
    assert end_tokens(model, tokenizer) == sorted(named)
    model.generation_config.eos_token_id = None
    assert end_tokens(model, tokenizer) == sorted(named - {17})
    tokenizer = make(core, None)
    model.generation_config.eos_token_id = 5
    assert end_tokens(model, tokenizer) == [SPECIAL.index("</s>"), 5]


def test_head_logits_are_the_models():
    from transformers import (
        CohereConfig,
        CohereForCausalLM,
        Gemma2Config,
        Gemma2ForCausalLM,
        GraniteConfig,
        GraniteForCausalLM,
    )

    small = dict(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    small |= dict(num_attention_heads=2, num_key_value_heads=1, pad_token_id=0)
    torch.manual_seed(0)
    ids = torch.arange(1, 9)[None]
    for model in (
        Gemma2ForCausalLM(Gemma2Config(**small, head_dim=8, final_logit_softcapping=0.01)),
        CohereForCausalLM(CohereConfig(**small, logit_scale=0.3)),
        GraniteForCausalLM(GraniteConfig(**small, logits_scaling=4.0)),
    ):
        model.eval()
        with torch.no_grad():
            hidden = model.base_model(ids).last_hidden_state
            assert torch.allclose(common.head_logits(model, hidden), model(ids).logits, atol=1e-6)


def test_a_judge_reads_the_whole_chat(core, tmp_path):
    """Its score is that of the library's ids, closing EOS and all, without padding."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    common.setup(0)
    tokenizer = make(core, ZEPHYR)
    torch.manual_seed(0)
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = LlamaConfig(vocab_size=len(tokenizer), num_labels=1, pad_token_id=None, **small)
    judge = LlamaForSequenceClassification(config).eval()
    judge.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    prompts, answers, wanted = [], [], []
    for answer in ("A short answer.", "No.", "I do not know it at all."):
        prompt = [user("What is tea?")]
        prompts.append(prompt)
        answers.append(answer)
        ids = library(tokenizer, [*prompt, assistant(answer)], cue=False)
        with torch.no_grad():
            wanted.append(judge(torch.tensor([ids])).logits.item())
    found = common.load_score(str(tmp_path), "--judge")(prompts, answers)
    assert found == pytest.approx(wanted, abs=1e-5)


@pytest.fixture(scope="module")
def with_tools(core, tmp_path_factory):
    """A folder with a language model and a reward model whose template writes tools."""
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        LlamaForSequenceClassification,
    )

    folder = tmp_path_factory.mktemp("tools")
    common.setup(0)
    tokenizer = make(core, MISTRAL)
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    small |= dict(vocab_size=len(tokenizer), max_position_embeddings=256)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**small))
    judge = LlamaForSequenceClassification(LlamaConfig(**small, num_labels=1, pad_token_id=None))
    for name, one in (("model", model), ("judge", judge)):
        one.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    row = {"prompt": [user("What is tea?")], "tools": [TOOL]}
    (folder / "prompts.jsonl").write_text(json.dumps(row) + "\n")
    return folder


def judged(folder, core, response):
    """The score of a response to the prompt with its tools: by the library's ids alone."""
    from transformers import LlamaForSequenceClassification

    judge = LlamaForSequenceClassification.from_pretrained(folder / "judge").eval()
    chat = [user("What is tea?"), assistant(response or " ")]
    ids = library(make(core, MISTRAL), chat, False, [TOOL])
    with torch.no_grad():
        return judge(torch.tensor([ids])).logits.item()


def test_generate_and_its_judge_read_the_tools(with_tools, core, tmp_path):
    import generate

    generate.main(
        generate.Args(
            model=str(with_tools / "model"),
            prompt=str(with_tools / "prompts.jsonl"),
            judge=str(with_tools / "judge"),
            samples=4,
            max_new_tokens=8,
            out=str(tmp_path / "out"),
        )
    )
    rows = common.read_rows(tmp_path / "out/judged.jsonl")
    assert len(rows) == 4
    for row in rows:
        assert row["tools"] == [TOOL]
        assert row["score"] == pytest.approx(judged(with_tools, core, row["response"]), abs=1e-5)


def test_imh_and_its_reward_read_the_tools(with_tools, core, tmp_path):
    import imh_adaptors

    args = imh_adaptors.Args(
        model=str(with_tools / "model"),
        ref_model=str(with_tools / "model"),
        prompt=str(with_tools / "prompts.jsonl"),
        reward=str(with_tools / "judge"),
        sampling_types=("ancestral",),
        temperatures=(1.0,),
        samples=4,
        burn_in=0,
        max_length=200,
        out=str(tmp_path / "out"),
    )
    imh_adaptors.generate(args)
    imh_adaptors.score(args)
    (path,) = (tmp_path / "out/samples").glob("*/*")
    drawn = imh_adaptors.chunk_rows(path, "")
    (path,) = (tmp_path / "out/scores").glob("*/*")
    for row, scores in zip(drawn, imh_adaptors.chunk_rows(path, ""), strict=True):
        assert row["prompt_ids"] == library(make(core, MISTRAL), row["prompt"], True, [TOOL])
        wanted = judged(with_tools, core, row["text"])
        assert scores["reward"] == pytest.approx(wanted, abs=1e-5)


def test_twisted_smc_and_its_potential_read_the_tools(with_tools, core):
    import twisted_smc

    args = twisted_smc.Args(
        model=str(with_tools / "model"),
        prompt=str(with_tools / "prompts.jsonl"),
        potential=str(with_tools / "judge"),
    )
    (prompt,) = twisted_smc.prompts_of(args)
    args.prompt = prompt
    model = common.load_model(args.model)
    world = twisted_smc.lm_world(model, common.load_tokenizer(args.model), args)
    tokenizer = make(core, MISTRAL)
    assert world.prompt == library(tokenizer, [user("What is tea?")], True, [TOOL])
    drawn = tokenizer("It is a drink", add_special_tokens=False).input_ids[: world.T]
    (log_phi,) = world.log_phi(torch.tensor([drawn]).view(1, 1, -1)).view(-1).tolist()
    wanted = judged(with_tools, core, tokenizer.decode(drawn))
    assert log_phi == pytest.approx(args.beta * wanted, abs=1e-5)


def test_tools_have_no_place_in_text(core):
    row = {"prompt": "What", "chosen": " is", "rejected": " tea", "tools": [TOOL]}
    (found,) = encode_rows([row], make(core, MISTRAL))
    assert found == "has tools, for which only chat messages have a place"
    (found,) = encode_rows([{**row, "tools": []}], make(core, MISTRAL))
    assert found.prompt_ids


def test_an_own_function_says_that_it_is_not_given_the_tools(tmp_path, capsys):
    common.setup(0)
    (tmp_path / "own.py").write_text("def zero(prompts, responses):\n    return [0] * len(prompts)")
    score = common.load_score(f"{tmp_path}/own.py:zero", "--judge")
    for _ in range(2):
        assert score([[user("Hi")]], ["Yes"], [[TOOL]]) == [0]
    assert capsys.readouterr().out.count("without its tools") == 1
