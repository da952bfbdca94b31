"""Responses to test prompts from any model, and how often a judge prefers them to others.

Win rates as in DPO (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, Sec. 6 and App. C.2) and Cal-DPO
(Xiao et al. 2024, https://arxiv.org/abs/2412.14516), against the chosen responses or another model's:

    win rate = (wins + ties / 2) / comparisons, with a 95 % Wilson interval that counts prompts

    python methods/generate.py                              tiny world, judged by its known reward
    python methods/generate.py --model results/dpo --against results/generate/responses.jsonl --out results/2
    python methods/generate.py hh --model results/dpo-hh --judge results/dpl-train
    python methods/generate.py --responses results/generate-hh/responses.jsonl --judge-command "python ask.py"

A judge command reads questions, lines of JSON {"prompt", "a", "b"}, and prints A, B or tie for each.  Each is
asked in both orders (in the papers in one, at random); a response wins if the two answers together favour it,
so a preference for a place makes a tie.  Presets: tiny (default) | hh, as released | tldr, as in EXO.
The released code of Cal-DPO has no judge.  It decodes greedily (its paper: temperature 1), strips responses,
leaves out the last partial batch; here they keep their first space, as in the data, and none is left out.
"""

import json
import math
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro


@dataclass
class Args:
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # keep the k likeliest tokens; 0: all
    top_p: float = 1.0  # keep the smallest set of tokens with this probability; 1: all
    min_p: float = 0.0  # keep tokens with this share of the likeliest one's probability; 0: all
    max_new_tokens: int = 100  # responses end at the end-of-text token or here
    samples: int = 1  # responses per prompt
    prompts: int = 0  # how many, the first of the test split; 0: all
    judge: str = "tiny"  # tiny (the known reward), a reward model's folder or hub id, or none
    judge_command: str = ""  # a shell command, instead of --judge
    against: str = "chosen"  # the data's chosen responses, or the responses.jsonl of another run
    responses: str = ""  # a responses.jsonl to judge, instead of generating one

    model: str = "tiny"  # tiny, a local or run folder, or a hub id
    data: str = "tiny"  # whose test prompts: tiny, hh, tldr, tldr-sft, a file, a folder or a hub id
    max_prompt_length: int = 512  # tokens to which longer prompts are cut
    batch_size: int = 64  # responses sampled side by side, on each process
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the models
    seed: int = 0
    out: str = "results/generate"  # run folder
    resume: bool = False  # continue a killed run: finished batches are kept
    overwrite: bool = False  # delete the run that is in the run folder


PRESETS = {
    "tiny": Args(max_new_tokens=64),
    "hh": Args(data="hh", temperature=0.0, max_prompt_length=1948, judge="none", dtype="bfloat16",
               out="results/generate-hh"),  # as released: greedy, 100 new tokens after the whole prompt
    "tldr": Args(data="tldr-sft", temperature=0.8, max_new_tokens=75, max_prompt_length=575, samples=4,
                 prompts=512, seed=42, judge="none", dtype="bfloat16", out="results/generate-tldr"),
}  # tldr: EXO, https://arxiv.org/abs/2402.00856, 650 tokens in all

if __name__ == "__main__":  # before torch is imported, so that --help answers at once
    preset = sys.argv.pop(1) if sys.argv[1:] and not sys.argv[1].startswith("-") else "tiny"
    if preset not in PRESETS:
        raise SystemExit(f"no preset {preset!r}: choose one of {', '.join(PRESETS)}")
    args = tyro.cli(Args, default=PRESETS[preset], description=__doc__)

import numpy as np
import torch
import torch.distributed as dist
import transformers

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py: beside this file or one up
from common import (decode_step, load_model, load_pairs, load_tokenizer, model_folder, on_rank0, prefill,
                    progress, read_rows, reorder, require, row_texts, sample_tokens, setting, setup,
                    start_run, stay_in_place, stop_requested, tiny_reward, tokenize_pairs, words, write)


def sampler(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The library's filters, in its order, as a function of (n, V) logits; temperature 0 is greedy."""
    used = {"Temperature": (temperature, 1), "TopK": (top_k, 0), "TopP": (top_p, 1), "MinP": (min_p, 0)}
    used = used if temperature else {"TopK": (1, 0)}
    try:
        chain = [getattr(transformers, f"{k}LogitsWarper")(x) for k, (x, off) in used.items() if x != off]
    except ValueError as error:
        raise SystemExit(f"--temperature, --top-k, --top-p or --min-p: {error}") from None
    return lambda logits: transformers.LogitsProcessorList(chain)(None, logits)


def respond(model, prompts, uniforms, adapt, eos_id, vocabulary):
    """N id lists, uniforms (N, T) -> N lists of up to T ids, the last one eos_id if it was drawn.

    Drawn from softmax(adapt(logits)); a response depends on its own prompt and uniforms only."""
    responses = [[] for _ in prompts]
    rows = torch.arange(len(prompts), device=model.device)  # the response that each slot works on
    cache, _, logits = prefill(model, prompts, uniforms.shape[1])
    for t in range(uniforms.shape[1]):
        tokens, _ = sample_tokens(adapt(logits[:, :vocabulary].float()), uniforms[rows, t])
        for row, token in zip(rows.tolist(), tokens.tolist()):
            responses[row].append(token)
        slots = stay_in_place((tokens != eos_id).nonzero()[:, 0])  # finished responses leave the batch
        if t + 1 == uniforms.shape[1] or len(slots) == 0:
            return responses
        reorder(cache, slots)
        rows = rows[slots]
        _, logits = decode_step(model, cache, tokens[slots])


def write_rows(path, rows):
    write(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def generate(args, adapt, out):
    """Write out/responses.jsonl; until it is complete, every finished batch is a file in out/parts."""
    model, tokenizer = load_model(args.model, args.dtype), load_tokenizer(args.model)
    known = model.get_input_embeddings().num_embeddings
    require(len(tokenizer) <= known, f"{args.model}: a tokenizer of {len(tokenizer)} tokens with a model of "
            f"{known}, so they do not belong together; put the tokenizer of the model's training there")
    rows = load_pairs(args.data, "test", pairs=False)[:args.prompts or None]
    texts = [{"prompt": row["prompt"], "cue": row.get("cue"), "responses": ["."]} for row in rows]
    limits = args.max_prompt_length + 2, args.max_prompt_length  # two for the stand-in of a response
    encoded = tokenize_pairs(texts, tokenizer, *limits, what="prompts")
    encoded.sort(key=lambda e: -len(e["prompt_ids"]))  # alike lengths side by side, the most memory first
    context = getattr(model.config, "max_position_embeddings", math.inf)
    longest = len(encoded[0]["prompt_ids"]) + args.max_new_tokens
    require(longest <= context, f"{args.model} reads {context} tokens, not {longest}: "
            "lower --max-prompt-length")
    items = [(e["row"], k, e["prompt_ids"]) for e in encoded for k in range(args.samples)]
    batches = [items[i:i + args.batch_size] for i in range(0, len(items), args.batch_size)]
    rank, world, parts = dist.get_rank(), dist.get_world_size(), out / "parts"
    on_rank0(lambda: parts.mkdir(exist_ok=True), parts)
    for first in progress(range(0, len(batches), world)):
        if stop_requested():
            raise SystemExit(143)  # SIGTERM or Ctrl-C: --resume continues
        path = parts / f"{first + rank:06d}.jsonl"
        for batch in [] if path.exists() else batches[first + rank:][:1]:
            u = [np.random.default_rng([args.seed, i, k]).random(args.max_new_tokens) for i, k, _ in batch]
            u = torch.tensor(np.stack(u) * (args.temperature > 0), device=model.device)  # greedy: the first
            ids, end = [prompt for _, _, prompt in batch], tokenizer.eos_token_id
            found = respond(model, ids, u, adapt, end, len(tokenizer))
            texts = tokenizer.batch_decode(found, skip_special_tokens=True)
            write_rows(path, [{"prompt": rows[i]["prompt"], "response": text, "chosen": rows[i].get("chosen"),
                               "row": i, "sample": k, "tokens": len(y), "ended": y[-1] == end}
                              for (i, k, _), text, y in zip(batch, texts, found)])
    dist.barrier()

    def join():
        found = [row for path in parts.glob("*.jsonl") for row in read_rows(path)]
        write_rows(out / "responses.jsonl", sorted(found, key=lambda row: (row["row"], row["sample"])))
        shutil.rmtree(parts)

    on_rank0(join, f"{out}/responses.jsonl is not written")


def scores(args, questions):
    """(prompt, response, other) each -> the response's reward: the known one, a classifier's output, dpl.py's
    mean utility; or the answer of --judge-command: 1 better than the other, 0 tie, -1 worse."""
    if args.judge_command:
        return on_rank0(lambda: ask(args.judge_command, questions), "--judge-command")
    if args.judge == "tiny":
        return [tiny_reward(words(prompt), response) for prompt, response, _ in questions]
    folder, rows = model_folder(args.judge), [{"prompt": p, "responses": [r or " "]} for p, r, _ in questions]
    config = json.loads((folder / "config.json").read_text())
    if "dpl" in config:
        from dpl import encode, load_reward_model, raw_outputs, utility  # dpl.py, beside this file
        model, tokenizer, meta = load_reward_model(args.judge, args.dtype)
        encoded = encode(rows, tokenizer, 2**30)
        require(len(encoded) == len(rows), f"{folder}: cannot read {len(rows) - len(encoded)} of the texts")
        return [utility(outputs, meta["type"]).item() for outputs in raw_outputs(model, encoded, 8192)]
    classifier = any("SequenceClassification" in name for name in config.get("architectures", []))
    require(classifier and len(config.get("id2label", "01")) == 1,
            f"{folder}: not a reward model: it needs a sequence classification head with one output")
    tokenizer = load_tokenizer(folder)
    tokenizer.model_input_names, tokenizer.padding_side = ["input_ids", "attention_mask"], "right"
    texts = [row_texts(tokenizer, row) for row in rows]
    require(all(isinstance(text, list) for text in texts), f"{folder}: a text contains its end-of-text token")
    pipe = transformers.pipeline("text-classification", str(folder), tokenizer=tokenizer, dtype=args.dtype,
                                 device="cuda" if torch.cuda.is_available() else "cpu")
    pipe.model.config.pad_token_id = tokenizer.pad_token_id
    found = pipe(["".join(text) for text in texts], batch_size=args.batch_size, function_to_apply="none")
    return [one["score"] for one in found]


def ask(command, questions):
    """The answers of a shell command to (prompt, a, b) questions: 1 for A, 0 for tie, -1 for B."""
    lines = [json.dumps(dict(zip(("prompt", "a", "b"), question))) + "\n" for question in questions]
    done = subprocess.run(command, shell=True, input="".join(lines), capture_output=True, text=True)
    said = done.stderr.strip()[-90:]
    require(done.returncode == 0, f"--judge-command: exit code {done.returncode} {said!r}; try it by hand")
    answers = [line.strip().lower() for line in done.stdout.splitlines()]
    wrong = [f"line {i} is {x!r}; " for i, x in enumerate(answers, 1) if x not in ("a", "b", "tie")]
    require(len(answers) == len(lines) and not wrong, f"--judge-command: {len(answers)} lines for "
            f"{len(lines)} questions; {''.join(wrong[:1])}it must print A, B or tie for each, no more")
    return [("b", "tie", "a").index(answer) - 1 for answer in answers]


def read_responses(path):
    rows = read_rows(Path(path))
    bad = [i for i, row in enumerate(rows, 1) if not row.get("prompt") or row.get("response") is None]
    why = f"row {bad[0]} has no prompt or no response" if bad else "has no rows"
    require(rows and not bad, f"{path}: {why}; generate it again")
    return rows


def compare(args, rows):
    """Add to each row the other response, the judge's scores, and the outcome: 1 win, 0 tie, -1 loss."""
    chosen = args.against == "chosen"
    others = rows if chosen else read_responses(args.against)
    prompts, own = [row["prompt"] for row in rows], [row["response"] for row in rows]
    require(prompts == [row["prompt"] for row in others], f"{args.against}: other prompts or another order; "
            "generate both files with the same --data, --prompts and --samples")
    others = [words(row.get("chosen")) if chosen else row["response"] for row in others]
    require(all(others) or not chosen, "a row has no chosen response: --against another responses.jsonl")
    found = scores(args, [*zip(prompts, own, others), *zip(prompts, others, own)])
    found = [*zip(others, found[:len(rows)], found[len(rows):])]
    won = [0 if text == other else (a > b) - (a < b) for text, (other, a, b) in zip(own, found)]
    return [row | {"other": other, "score": a, "other_score": b, "outcome": outcome}
            for row, (other, a, b), outcome in zip(rows, found, won)]


def wilson(k, n, z=1.959964):
    """95 % interval of a rate, k of n having been seen; ties make k a fraction."""
    centre, half = k + z * z / 2, z * math.sqrt(k * (n - k) / n + z * z / 4)
    return (centre - half) / (n + z * z), (centre + half) / (n + z * z)


def summarise(rows):
    """Compared rows -> wins, ties, losses; the win rate and its interval low .. high; mean scores."""
    outcome, n = [row["outcome"] for row in rows], len({row.get("row", i) for i, row in enumerate(rows)})
    summary = {"wins": outcome.count(1), "ties": outcome.count(0), "losses": outcome.count(-1), "prompts": n}
    rate = summary["win_rate"] = (summary["wins"] + summary["ties"] / 2) / len(rows)
    summary["low"], summary["high"] = wilson(rate * n, n)
    for name in ("score", "other_score"):
        summary[name] = sum(row[name] for row in rows) / len(rows)
    return summary


def main(args):
    require(min(args.max_new_tokens, args.samples, args.max_prompt_length) > 0 and args.prompts >= 0,
            "--max-new-tokens, --samples and --max-prompt-length: at least 1; --prompts: at least 0")
    adapt = sampler(args.temperature, args.top_k, args.top_p, args.min_p)
    setup(args.seed)
    rows, out = read_responses(args.responses) if args.responses else [], start_run(args, "generate")
    path = out / "responses.jsonl"
    if args.overwrite and not rows:
        on_rank0(lambda: (path.unlink(missing_ok=True), shutil.rmtree(out / "parts", True)), out)
    if not rows and not path.exists():
        generate(args, adapt, out)
    rows = rows or read_responses(path)
    if args.judge == "none" and not args.judge_command:
        return {}
    rows = compare(args, rows)
    summary, title = summarise(rows), f"{args.responses or args.model} against {args.against}"
    title += f", judge {args.judge_command or args.judge}"
    if dist.get_rank() == 0:
        write_rows(out / "judged.jsonl", rows)
        print(f"\n{title}, {len(rows)} comparisons")
        print(*(f"{name:12}{value:10.4g}" for name, value in summary.items()), sep="\n")
        from matplotlib.figure import Figure
        axis = (figure := Figure((6, 3.8), layout="constrained")).subplots()
        values = [[row[key] for row in rows] for key in ("score", "other_score")]
        axis.hist(values, bins=20, label=["own", "other"])
        axis.set(xlabel="the judge's score", ylabel="responses",
                 title="win rate {win_rate:.3f} [{low:.3f}, {high:.3f}]".format(**summary))
        axis.legend()
        figure.suptitle(f"{title}\n{setting(args)}", fontsize=8)
        (out / "figures").mkdir(exist_ok=True)
        figure.savefig(out / "figures" / "scores.png", dpi=120)
    return summary


if __name__ == "__main__":
    main(args)
