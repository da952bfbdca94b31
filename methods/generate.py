"""Responses to test prompts from any model, and how often a judge prefers them to others.

Win rates as in DPO (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, Sec. 6, App. C.2) and
Cal-DPO (Xiao et al. 2024, https://arxiv.org/abs/2412.14516).  The responses are compared with the
chosen responses of the data, or with the responses of another model:

    win rate = (wins + ties / 2) / comparisons, with a 95 % Wilson interval that counts prompts

    python methods/generate.py                          tiny world, judged by its known reward
    python methods/generate.py hh --model results/dpo-hh --judge results/dpl-train
    python methods/generate.py --model results/dpo --against FILE --out results/2
    python methods/generate.py --responses FILE --judge-command "python ask.py"
    python methods/generate.py --model M --data prompts.txt --judge own.py:short

FILE is the responses.jsonl of another run, which holds its samples; every run writes one.
Presets: tiny (default) | hh: as released with Cal-DPO | tldr: as in EXO (arxiv.org/abs/2402.00856).

A judge command reads questions, one line of JSON {"prompt", "a", "b"} for each, and prints A, B or
tie for each.  Every question is asked in both orders (the papers ask in one order, chosen at
random).  A response wins if the two answers together favour it.  A judge that always prefers the
first of two responses makes nothing but ties.

The released code of Cal-DPO has no judge.  It decodes greedily (its paper: temperature 1), strips
the responses and leaves out the last partial batch.  Here responses keep their first space, as in
the data, and no batch is left out.
"""

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import tyro


@dataclass
class Args:
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # keep the k likeliest tokens; 0: all
    top_p: float = 1.0  # keep the smallest set of tokens with this probability; 1: all
    min_p: float = 0.0  # keep tokens with this share of the likeliest one's probability; 0: all
    max_new_tokens: int = 100  # responses end at the end-of-text token or here
    samples: int = 1  # responses per prompt
    prompts: int = 0  # only this many, the first of the test split; 0: all
    # The judge: tiny (for prompts of the tiny world alone), none, FILE.py:FUNCTION (yours:
    # function(prompts, responses) -> a number for each), or a reward model's folder or hub id
    judge: str = "tiny"
    judge_command: str = ""  # a shell command, instead of --judge
    against: str = "chosen"  # the data's chosen responses, or the responses.jsonl of another run
    responses: str = ""  # a responses.jsonl to judge, instead of generating one

    model: str = "tiny"  # tiny, a local or run folder, or a hub id
    # The test prompts of: tiny, hh, tldr, tldr-sft, a file, a folder or a hub id. A file of prompts
    # alone (.txt: one a line; or rows with only prompt, text or chat messages) is taken whole
    data: str = "tiny"
    # one prompt instead of --data: text as it stands, without a chat template, unless it is JSON:
    # a list of messages, '[{"role": "user", "content": "Hi"}]', or {"prompt": list, "tools": []}
    prompt: str = ""
    max_prompt_length: int = 512  # tokens to which longer prompts are cut
    batch_size: int = 64  # responses sampled side by side, on each process
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the models
    seed: int = 0  # of every random draw
    out: str = "results/generate"  # run folder
    resume: bool = False  # continue a killed run: finished batches are kept
    overwrite: bool = False  # delete the run that is in the run folder


PRESETS = {
    "tiny": Args(max_new_tokens=64),
    "hh": Args(  # as released: greedy, 100 new tokens after the whole prompt
        data="hh",
        temperature=0.0,
        max_prompt_length=1948,  # the context of 2048 tokens without the 100 new ones
        judge="none",
        dtype="bfloat16",
        out="results/generate-hh",
    ),
    "tldr": Args(  # EXO: 650 tokens in all
        data="tldr-sft",
        temperature=0.8,
        max_new_tokens=75,
        max_prompt_length=575,
        samples=4,
        prompts=512,
        seed=42,
        judge="none",
        dtype="bfloat16",
        out="results/generate-tldr",
    ),
}

# --help ends its text with this.
EXAMPLE = """
Your own judge is a function in a file.  Without chosen responses its mean score is printed.

    # own.py: the shorter a response, the better
    def short(prompts, responses):
        scores = []
        for prompt, response in zip(prompts, responses):
            scores.append(-len(response))
        return scores
"""

if __name__ == "__main__":  # before torch is imported, so that --help answers at once
    preset = "tiny"
    if sys.argv[1:] and not sys.argv[1].startswith("-"):
        preset = sys.argv.pop(1)
    if preset not in PRESETS:
        raise SystemExit(f"no preset {preset!r}: choose one of {', '.join(PRESETS)}")
    args = tyro.cli(Args, default=PRESETS[preset], description=__doc__ + EXAMPLE)

import numpy as np
import torch
import torch.distributed as dist
from matplotlib.figure import Figure

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py: here or one up
# isort: off
from common import decode_step, prefill, reorder, stay_in_place  # sampling
from common import above_cutoff, cheapest, fewest_with_mass, sample_kept, tempered  # sampling
from common import end_tokens, tokenize_pairs  # tokenization
from common import Unusable, require_context, show_example  # tokenization
from common import load_prompts, read_rows, require_text, show_samples  # data
from common import words  # the plain text of a string or of chat messages
from common import load_model, load_tokenizer, load_score, OwnScore  # models, and what rates
from common import are_tiny_prompts, tiny_reward  # the tiny world
from common import DEVICE, check_ranges, progress, require, say, setting, setup  # processes
from common import memory, require_free  # processes
from common import say_claim, share_shown, wilson  # how a run ends
from common import save_figure, signals, start_run, stop_requested, write  # processes
from common import on_rank0  # calls a function once; where it fails, all processes end with a line
# isort: on


# The win rate.


@dataclass
class WinRate:
    """What a judge said of all comparisons."""

    wins: int
    ties: int
    losses: int
    prompts: int  # different prompts; responses to the same prompt are no independent evidence
    win_rate: float  # (wins + ties / 2) / comparisons
    low: float  # of the 95 % interval of the win rate
    high: float
    score: float  # the judge's mean score of the responses
    other_score: float  # and of those they are compared with


def summarise(rows):
    """Compared rows, with their outcome 1 (win), 0 (tie) or -1 (loss) and two scores -> WinRate"""
    outcomes = [row["outcome"] for row in rows]

    # A tie is half a win.
    wins = outcomes.count(1)
    ties = outcomes.count(0)
    win_rate = (wins + ties / 2) / len(rows)

    # Samples of one prompt resemble each other, so the interval counts prompts, not samples.  "row"
    # tells the prompts apart; in a file without it, each response counts as a prompt of its own.
    prompts = len({row.get("row", i) for i, row in enumerate(rows)})
    low, high = wilson(win_rate * prompts, prompts)

    # What the judge gave, on average; the unit is the judge's own.
    score = sum(row["score"] for row in rows) / len(rows)
    other_score = sum(row["other_score"] for row in rows) / len(rows)

    return WinRate(
        wins=wins,
        ties=ties,
        losses=outcomes.count(-1),
        prompts=prompts,
        win_rate=win_rate,
        low=low,
        high=high,
        score=score,
        other_score=other_score,
    )


# Sampling.


@dataclass
class Sampler:
    """How tokens are drawn: from the filtered softmax(logits / temperature)."""

    temperature: float
    filters: dict  # name: value, in the library's order


def sampler(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The Sampler of these options, without what changes nothing.  Temperature 0 is greedy."""
    if temperature == 0:
        return Sampler(1.0, {"top_k": 1})
    filters = {}
    if top_k != 0:
        filters["top_k"] = top_k
    if top_p != 1:
        filters["top_p"] = top_p
    if min_p != 0:
        filters["min_p"] = min_p
    return Sampler(temperature, filters)


def kept_set(log_pi, p, name, x):
    """The tokens that one filter keeps.

    Log-probs and probabilities (n, V) -> (n, V), 1.0 for the tokens that are kept, else 0.0
    """
    if name == "top_k":
        return cheapest(-log_pi, x)
    if name == "top_p":
        return fewest_with_mass(-log_pi, p, x)
    if name == "min_p":
        return above_cutoff(log_pi, math.log(x) + log_pi.amax(-1, keepdim=True))
    raise ValueError(f"unknown filter {name!r}")


def respond(model, prompts, uniforms, how, ends, vocabulary):
    """One response to each prompt, drawn as a Sampler says.

    N lists of ids and (N, T) uniforms in [0, 1) -> N lists of up to T ids; one of `ends`, the ids
    that end a response, is the last of its list.  A response depends on its own prompt and uniforms
    only.  Logits beyond the first `vocabulary` ones belong to no token.
    """
    # One pass over the prompts fills the cache; from then on each token costs one step.
    responses = [[] for _ in prompts]
    last = uniforms.shape[1] - 1
    rows = torch.arange(len(prompts), device=model.device)  # rows[i]: whose response slot i holds
    ends = torch.tensor(ends, device=model.device)
    cache, _, logits = prefill(model, prompts, uniforms.shape[1])
    for t in range(uniforms.shape[1]):
        scores = tempered(logits[:, :vocabulary].float(), how.temperature)
        tokens, _, _ = sample_kept(scores, uniforms[rows, t], how.filters, kept_set)
        for row, token in zip(rows.tolist(), tokens.tolist()):
            responses[row].append(token)

        # Finished responses leave the batch.  The others move up into slots 0, 1, ..., in an order
        # that leaves as many as possible where they are: new slot i goes on from old slot slots[i].
        unfinished = torch.isin(tokens, ends, invert=True).nonzero()[:, 0]
        slots = stay_in_place(unfinished)
        if t == last or len(slots) == 0:
            break
        reorder(cache, slots)
        rows = rows[slots]
        _, logits = decode_step(model, cache, tokens[slots])
    return responses


# Data and files.


@dataclass(order=True)
class Item:
    """One response that is to be drawn; Items are ordered as the responses are in the file."""

    row: int  # the prompt's index in the data
    sample: int  # which of the prompt's responses it is
    prompt_ids: list  # token ids


@dataclass
class Work:
    """All that it takes to draw the responses."""

    tokenizer: object
    model: object
    rows: list  # of the data, with the prompts
    batches: list  # lists of Items


def until_stopped(things):
    """Go through things, the same number on all processes; leave after SIGTERM or Ctrl-C."""
    for thing in progress(things):
        if stop_requested():
            raise SystemExit(143)  # what is saved stays: --resume continues
        yield thing


def write_rows(path, rows):
    """Write dictionaries as lines of JSON, whole or not at all."""
    lines = [json.dumps(row) + "\n" for row in rows]
    write(path, "".join(lines).encode())


def why_wrong(row):
    """The reason why a dictionary is no row of a responses.jsonl, or "" if it is one."""
    # A response may be empty: a model may end at once.
    if not row.get("prompt") or row.get("response") is None:
        return "has no prompt or no response"

    # Texts, or chat messages.  A file from elsewhere may lack the others.
    texts = [row["prompt"], row["response"]]
    if row.get("chosen") is not None:
        texts.append(row["chosen"])
    try:
        for text in texts:
            require_text(text)
    except Unusable as reason:
        return str(reason)
    if not isinstance(row.get("row", 0), int | float | str):
        return "its row, which tells prompts apart, is no number or text"
    return ""


def read_responses(path):
    """The rows of a responses.jsonl.  SystemExit: none, or one that is not as it should be."""
    rows = read_rows(Path(path))
    require(rows, f"{path}: has no rows; generate it again")
    for number, row in enumerate(rows, 1):
        why = why_wrong(row)
        require(not why, f"{path}: row {number}: {why}; generate it again")
    return rows


def load_items(args, rows, tokenizer):
    """An Item for every response to the rows' prompts, the longest prompts first.

    SystemExit: the model's context holds less than the longest prompt and its response.
    """
    # Tokenised by the rules of training, where every row has a response: "." stands in for it.  The
    # cue is the end of a prompt that must not be cut off ("TL;DR:").
    prompts = []
    for row in rows:
        stand_in = {"cue": row.get("cue"), "tools": row.get("tools"), "responses": ["."]}
        prompts.append({"prompt": row["prompt"], **stand_in})
    encoded = tokenize_pairs(
        prompts,
        tokenizer,
        max_length=args.max_prompt_length + 2,  # and the stand-in: ".", end of text
        max_prompt_length=args.max_prompt_length,
        what="prompts",
        example=False,  # it would show the stand-in
    )
    require_context(tokenizer, encoded, args.max_new_tokens - 2, "--max-prompt-length")

    # Alike lengths side by side waste no padding; the batch that needs the most memory comes first.
    encoded.sort(key=prompt_length, reverse=True)

    items = []
    for row in encoded:
        for sample in range(args.samples):
            items.append(Item(row["row"], sample, row["prompt_ids"]))
    return items


ROW_BYTES = 1000  # what a response takes in memory, with its prompt and the chosen one, at least


def check_sizes(args, prompts, vocabulary):
    """Exit with one line if what is drawn, or a batch's logits, would not fit the memory.

    prompts, vocabulary: how many there are.  The sizes are the least that is needed.
    """
    # The file is put together in the memory of the machine.
    responses = prompts * args.samples
    size = ROW_BYTES * responses
    room = memory()
    problem = f"--samples {args.samples} for {prompts} prompts take {size} bytes of {room}"
    require(size <= room, f"{problem}; lower --samples or --prompts")

    # A batch: uniforms in float64 for all tokens, and the logits of a step in float32.
    batch = min(args.batch_size, responses)
    size = batch * (8 * args.max_new_tokens + 4 * vocabulary)
    room = memory(DEVICE)
    problem = f"--batch-size {batch}, --max-new-tokens {args.max_new_tokens} take {size} bytes"
    require(size <= room, f"{problem} of {room}; lower them")


def prompt_length(row):
    """The number of a tokenised row's prompt tokens."""
    return len(row["prompt_ids"])


# Generation.


def draw_batch(args, batch, rows, how, model, tokenizer):
    """The responses to a list of Items, as dictionaries that go to a file."""
    # The uniforms of a response depend on the seed, its prompt and its number, not on the batch.
    uniforms = []
    for item in batch:
        stream = np.random.default_rng([args.seed, item.row, item.sample])
        uniforms.append(stream.random(args.max_new_tokens))
    u = torch.tensor(np.stack(uniforms), device=model.device)

    # The responses, with what a judge and a reader need to know of them.
    prompts = [item.prompt_ids for item in batch]
    ends = end_tokens(model, tokenizer)
    found = respond(model, prompts, u, how, ends, len(tokenizer))
    show_example(tokenizer, prompts[0], found[0])
    texts = tokenizer.batch_decode(found, skip_special_tokens=True)
    responses = []
    for item, text, ids in zip(batch, texts, found):
        response = {
            "prompt": rows[item.row]["prompt"],
            "response": text,
            "chosen": rows[item.row].get("chosen"),
            "row": item.row,
            "sample": item.sample,
            "tokens": len(ids),
            "ended": ids[-1] in ends,
        }
        if rows[item.row].get("tools"):  # that the chat may call: a judge reads them, too
            response["tools"] = rows[item.row]["tools"]
        responses.append(response)
    return responses


def read_prompts(args):
    """The rows to answer: of --prompt, or of --data."""
    rows = load_prompts(args.data, args.prompt)
    if args.prompts:
        rows = rows[: args.prompts]
    return rows


def prepare(args, rows):
    """Load all that it takes to draw the responses to the rows' prompts -> Work."""
    tokenizer = load_tokenizer(args.model)
    check_sizes(args, len(rows), len(tokenizer))

    # The responses, in batches.
    items = load_items(args, rows, tokenizer)
    batches = []
    for start in range(0, len(items), args.batch_size):
        batches.append(items[start : start + args.batch_size])
    model = load_model(args.model, args.dtype)
    return Work(tokenizer, model, rows, batches)


def expected_rows(work):
    """The prompt and the chosen response of every response to be drawn, in the file's order."""
    items = []
    for batch in work.batches:
        items += batch
    found = []
    for item in sorted(items):
        row = work.rows[item.row]
        found.append({"prompt": row["prompt"], "chosen": row.get("chosen")})
    return found


def part_path(out, number):
    """The file of a batch's responses."""
    return out / "parts" / f"{number:06d}.jsonl"


def write_part(path, rows):
    """A batch's responses as lines of JSON, and a last line with their hash."""
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    seal = {"sha256": hashlib.sha256(lines).hexdigest()}
    write(path, lines + json.dumps(seal).encode() + b"\n")


TOKEN_BYTES = 10**4  # what a token takes in a file, at most


def read_part(args, work, out, number):
    """The responses to batch `number`, from its file.

    Raises Unusable if it is not whole, or of another batch: a kill or a full disk may leave a file
    of any size and content.
    """
    path = part_path(out, number)
    batch = work.batches[number]
    known = []
    for item in batch:
        row = work.rows[item.row]
        known.append([item.row, item.sample, row["prompt"], row.get("chosen")])
    try:
        # Too large to be read?
        most = len(json.dumps(known)) + TOKEN_BYTES * len(batch) * (args.max_new_tokens + 1)
        size = path.stat().st_size
        if size > most:
            raise Unusable(f"has {size} bytes, too many for {len(batch)} responses")
        *found, seal = read_rows(path)
        body = path.read_bytes().rstrip().rpartition(b"\n")[0] + b"\n"
    except (OSError, RecursionError, ValueError, SystemExit):
        raise Unusable("cannot be read as rows") from None

    # The rows that were written, one for each Item, in this order.
    if seal.get("sha256") != hashlib.sha256(body).hexdigest():
        raise Unusable("is not as it was written")
    if len(found) != len(batch):
        raise Unusable(f"has {len(found)} rows, not {len(batch)}")
    for place, (row, wanted) in enumerate(zip(found, known), 1):
        why = why_wrong(row)
        if why:
            raise Unusable(f"row {place}: {why}")
        if [row.get("row"), row.get("sample"), row["prompt"], row.get("chosen")] != wanted:
            raise Unusable(f"row {place} answers another prompt")
    return found


def is_drawn(args, work, out, number):
    """Are the responses to batch `number` there, from a run that was killed?"""
    path = part_path(out, number)
    if not path.exists():
        return False
    try:
        read_part(args, work, out, number)
    except Unusable as reason:
        print(f"{path}: {reason}; it is drawn again", flush=True)
        return False
    return True


def generate(args, work, out):
    """Write out/responses.jsonl.  Until it is complete, a finished batch is a file in out/parts."""
    how = sampler(args.temperature, args.top_k, args.top_p, args.min_p)
    parts = out / "parts"
    on_rank0(partial(parts.mkdir, exist_ok=True), f"{parts}: cannot be made")

    # The processes take turns: of `world` batches in a row each draws one, unless its file is
    # there from a run that was killed.
    batches = work.batches
    world = dist.get_world_size()
    for first in until_stopped(range(0, len(batches), world)):
        number = first + dist.get_rank()
        if number >= len(batches) or is_drawn(args, work, out, number):
            continue
        found = draw_batch(args, batches[number], work.rows, how, work.model, work.tokenizer)
        write_part(part_path(out, number), found)
    dist.barrier()

    on_rank0(partial(join, args, work, out), f"{out}/responses.jsonl is not written")


def row_and_sample(row):
    """Where a response belongs in the file."""
    return row["row"], row["sample"]


def join(args, work, out):
    """Make out/responses.jsonl of the files in out/parts, in the order of the data."""
    found = []
    for number in range(len(work.batches)):
        try:
            found += read_part(args, work, out, number)
        except Unusable as reason:
            problem = f"{part_path(out, number)}: {reason}; --resume draws it again"
            raise SystemExit(problem) from None
    write_rows(out / "responses.jsonl", sorted(found, key=row_and_sample))
    shutil.rmtree(out / "parts")


WRITTEN = ("responses.jsonl", "judged.jsonl", "parts")  # beside what all methods write


# Judging.


class Question(NamedTuple):
    """What a judge is asked."""

    prompt: str | list  # text, or chat messages
    response: str
    other: str  # that it is compared with; "" for a judge that scores
    tools: list | str | None = None  # that a chat may call


def scores(args, questions):
    """The judge's score of each response.  A list of (prompt, response, other) -> list of numbers.

    Rewards look at the prompt and the response alone: the known reward, a classifier's output, the
    mean utility of dpl.py.  --judge-command is asked about both responses.  Its score is 1 if the
    response is better than the other, 0 for a tie, -1 if it is worse.
    """
    if args.judge_command:
        remedy = "correct it; the responses are kept, and --resume judges them"
        if args.responses:
            remedy = "correct it, or try it by hand"
        asked = partial(ask, args.judge_command, questions, remedy)
        return on_rank0(asked, "--judge-command")
    if args.judge == "tiny":
        found = []
        for question in questions:
            found.append(tiny_reward(words(question.prompt), words(question.response)))
        return found

    # Your own function is called by the first process alone; a reward model is loaded by all.
    score = load_score(args.judge, "--judge", args.dtype)
    if isinstance(score, OwnScore):
        return on_rank0(partial(own_scores, args, score, questions), f"--judge {args.judge}")
    return shared_scores(args, score, questions)


def rate(score, questions):
    """A judge's scores of Questions, which do not look at the other response."""
    prompts = [question.prompt for question in questions]
    responses = [question.response for question in questions]
    tools = [question.tools for question in questions]
    return score(prompts, responses, tools)


def own_scores(args, score, questions):
    """What your own function gives; it is asked about --batch-size responses at a time."""
    found = []
    for start in range(0, len(questions), args.batch_size):
        if signals:
            raise SystemExit(143)
        found += rate(score, questions[start : start + args.batch_size])
    return found


def shared_scores(args, score, questions):
    """What a reward model gives.  The processes take turns, --batch-size responses each."""
    # Each process fills in its own scores and leaves the others at 0.
    found = torch.zeros(len(questions), dtype=torch.float64)
    n = args.batch_size
    for first in until_stopped(range(0, len(questions), n * dist.get_world_size())):
        start = first + n * dist.get_rank()
        own = rate(score, questions[start : start + n])
        found[start : start + len(own)] = torch.tensor(own, dtype=torch.float64)
    dist.all_reduce(found)
    return found.tolist()


def check_judge(args, rows):
    """Load --judge once, so that what is wrong with it ends the program before sampling."""
    if args.judge_command:
        # Only whether a shell can read it: a judge may cost money.
        read = subprocess.run(["sh", "-n", "-c", args.judge_command], capture_output=True)
        said = repr(read.stderr.decode(errors="replace").strip()[-60:])[-60:]
        require(read.returncode == 0, f"--judge-command: no shell command: {said}; correct it")
        return
    if args.judge == "tiny":
        return
    score = load_score(args.judge, "--judge", args.dtype)
    if isinstance(score, OwnScore):  # tried on two responses
        tried = [Question(rows[0]["prompt"], "Yes.", ""), Question(rows[-1]["prompt"], "", "")]
        on_rank0(partial(rate, score, tried), f"--judge {args.judge}")


def fitting(args, rows):
    """The options without a judge where it cannot judge these rows, with a line that says so."""
    if not is_judged(args):
        return args
    compared = args.against != "chosen" or any(row.get("chosen") for row in rows)
    problem = ""
    if args.judge_command and not compared:
        problem = "--judge-command compares, but there are no chosen responses; give --against"
    elif not args.judge_command and args.judge == "tiny":
        if not are_tiny_prompts([row["prompt"] for row in rows]):
            problem = "--judge tiny knows the tiny world's prompts alone; give --judge FILE.py:"
            problem += "FUNCTION, or a reward model's folder, or none"
    if not problem:
        return args

    # Who has named what to judge or to compare with wants a judge.
    if args.against != "chosen":
        read_responses(args.against)  # what is wrong with it comes first
    require(args.against == "chosen" and not args.responses, problem)
    say(f"not judged: {problem}")
    return replace(args, judge="none", judge_command="")


POINTS = {"a": 1, "tie": 0, "b": -1}  # what an answer gives to response a


def stop_command(process):
    """End a command and whatever it has started, politely at first."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(2)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            pass  # it has ended; or it will have to


def run_command(command, text, most):
    """Run a shell command that reads a text -> exit code, what it printed, what it complained of.

    SystemExit: after SIGTERM or Ctrl-C, or if it prints more than `most` bytes; it is ended then.
    """
    # Files, not pipes: neither side waits for the other to read.
    options = {"shell": True, "start_new_session": True}
    with (
        tempfile.TemporaryFile() as asked,
        tempfile.TemporaryFile() as printed,
        tempfile.TemporaryFile() as complained,
    ):
        asked.write(text.encode())
        asked.seek(0)
        streams = {"stdin": asked, "stdout": printed, "stderr": complained}
        process = subprocess.Popen(command, **streams, **options)

        # The first process waits for it alone, so it looks at its own signals.
        try:
            while process.poll() is None:
                if signals:
                    raise SystemExit(143)
                size = os.fstat(printed.fileno()).st_size
                problem = f"--judge-command: prints {size} bytes and more"
                require(size <= most, f"{problem}; it must print A, B or tie for each question")
                try:
                    process.wait(0.1)
                except subprocess.TimeoutExpired:
                    pass
        finally:
            if process.poll() is None:
                stop_command(process)

        # What it printed, as far as it may, since a fast one has ended before the first look; and
        # the end of its complaint.
        printed.seek(0)
        complained.seek(max(0, complained.seek(0, os.SEEK_END) - 1000))
        answers = printed.read(most + 1).decode(errors="replace")
        complaint = complained.read().decode(errors="replace")
        return process.returncode, answers, complaint


def ask(command, questions, remedy):
    """The answers of a shell command to Questions: 1 for A, 0 for tie, -1 for B.

    SystemExit: it fails, or prints anything but one answer a question; remedy ends the line.
    """
    # The command is run once: all questions go in, all answers come out.
    lines = []
    for question in questions:
        asked = {"prompt": question.prompt, "a": question.response, "b": question.other}
        if question.tools:
            asked["tools"] = question.tools
        lines.append(json.dumps(asked) + "\n")
    most = 10**6 + 100 * len(lines)
    code, printed, complaint = run_command(command, "".join(lines), most)
    said = repr(complaint.strip()[-60:])[-60:]
    problem = f"--judge-command: exit code {code} {said}"
    require(code == 0, f"{problem}; {remedy}")

    # Every answer must be one of three words, and there must be as many as questions.
    answers = [line.strip().lower() for line in printed.splitlines()]
    wrong = ""
    for number, answer in enumerate(answers, 1):
        if answer not in POINTS:
            wrong = f"line {number} is {answer[:20]!r}; "
            break
    problem = f"--judge-command: {len(answers)} lines for {len(lines)} questions; {wrong}"
    problem += f"it must print A, B or tie for each; {remedy}"
    require(len(answers) == len(lines) and not wrong, problem)
    return [POINTS[answer] for answer in answers]


def other_responses(args, rows):
    """What the responses are compared with: the chosen ones, or those of the file --against.

    None: they are not judged, or there are prompts only, so that there is nothing to compare with.
    """
    if not is_judged(args):
        return None
    if args.against == "chosen" and not any(row.get("chosen") for row in rows):
        return None
    if args.against == "chosen":
        others = []
        for number, row in enumerate(rows, 1):
            others.append(words(row.get("chosen")))
            problem = f"row {number} has no chosen response: --against another responses.jsonl"
            require(others[-1], problem)
        return others
    other_rows = read_responses(args.against)
    same = [row["prompt"] for row in rows] == [row["prompt"] for row in other_rows]
    problem = f"{args.against}: other prompts or another order; "
    problem += "generate both files with the same --data, --prompts and --samples"
    require(same, problem)
    return [row["response"] for row in other_rows]


def judge(args, rows, others):
    """The rows with what the judge says of them: compared with others, or by their scores alone."""
    if others is not None:
        return compare(args, rows, others)
    questions = []
    for row in rows:
        questions.append(Question(row["prompt"], row["response"], "", row.get("tools")))
    judged = []
    for row, score in zip(rows, scores(args, questions)):
        judged.append({**row, "score": score})
    return judged


def compare(args, rows, others):
    """The rows with the other response, both scores, and the outcome: 1 win, 0 tie, -1 loss."""
    # Both orders: first the response before the other, then the other before the response.
    questions = []
    for row, other in zip(rows, others):
        questions.append(Question(row["prompt"], row["response"], other, row.get("tools")))
    for row, other in zip(rows, others):
        questions.append(Question(row["prompt"], other, row["response"], row.get("tools")))
    found = scores(args, questions)
    own_scores = found[: len(rows)]
    other_scores = found[len(rows) :]

    # The higher score wins.  The scores of a judge command are its answers in the two orders, each
    # for the response that stood first, so that equal answers make a tie.  The same text twice is a
    # tie, whatever the judge says.
    compared = []
    for row, other, score, other_score in zip(rows, others, own_scores, other_scores):
        if row["response"] == other or score == other_score:
            outcome = 0
        elif score > other_score:
            outcome = 1
        else:
            outcome = -1
        verdict = {"other": other, "score": score, "other_score": other_score, "outcome": outcome}
        compared.append(row | verdict)
    return compared


# Table and figure.


def print_table(summary, title, comparisons):
    """The win rate, its interval and the counts, one a line."""
    print(f"\n{title}, {comparisons} comparisons")
    for name, value in asdict(summary).items():
        print(f"{name:12}{value:10.4g}")


def claim(summary, args):
    """What the paper says, and what the comparisons of this run show -> two lines"""
    paper = "answers of a model trained on preferences win over the data's own (DPO, Sec. 6)"
    model = args.model if not args.responses else "the file"
    other = "the data's chosen ones" if args.against == "chosen" else args.against
    sentence = f"responses of {model} win over {other}"
    hits = summary.win_rate * summary.prompts
    return paper, share_shown(sentence, args.responses or args.data, hits, summary.prompts)


def draw_scores(rows, summary, caption, path):
    """A histogram of the judge's scores, of the responses and of those they are compared with."""
    figure = Figure((8, 4.2), layout="constrained")
    axis = figure.subplots()
    own = [row["score"] for row in rows]
    other = [row["other_score"] for row in rows]
    axis.hist([own, other], bins=20, label=["of the model", "of those it is compared with"])
    axis.set_title(f"win rate {summary.win_rate:.3f} [{summary.low:.3f}, {summary.high:.3f}]")
    for scores, color in ((own, "C0"), (other, "C1")):
        mean = sum(scores) / len(scores)
        axis.axvline(mean, color=color, ls="--", label=f"mean {mean:.3g}")
    axis.set_xlabel("the judge's score, the higher the better")
    axis.set_ylabel("responses")
    axis.legend()
    figure.suptitle(caption, fontsize=8)
    save_figure(figure, path)


# The run.

RANGES = {  # option: its least and largest value
    "temperature": (0, 10**6),
    "top_k": (0, 10**9),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "max_new_tokens": (1, 10**6),
    "prompts": (0, 10**9),
}


def check(args):
    """Refuse numbers out of their range before anything is loaded."""
    check_ranges(args, RANGES)
    problem = f"--temperature {args.temperature}: 0, which is greedy, or at least 1e-6"
    require(args.temperature == 0 or args.temperature >= 1e-6, problem)


def is_judged(args):
    """Is there to be a win rate?"""
    return args.judge_command != "" or args.judge != "none"


def judge_file(args):
    """The rows of --responses -> judged rows, or None without a judge.

    They are judged before the run folder is made: a fault in them or in the judge leaves nothing.
    """
    rows = read_responses(args.responses)
    args = fitting(args, rows)
    found = None
    if is_judged(args):
        found = judge(args, rows, other_responses(args, rows))
    start_run(args, "generate")
    return found


def draw(args, prompts, out):
    """Draw the responses -> the others that they are compared with, or None if there are none.

    Whatever can be refused is refused before the run folder is made.  The judge is tried before the
    model is loaded, so that only one of them is in memory.  The others are read before sampling,
    since --overwrite may delete the file that they are in.
    """
    if is_judged(args):
        check_judge(args, prompts)
    work = prepare(args, prompts)
    others = other_responses(args, expected_rows(work))

    # The run folder.
    start_run(args, "generate", WRITTEN)
    generate(args, work, out)
    return others


def draw_and_judge(args, out):
    """Draw the responses, unless an earlier run has -> judged rows, or None without a judge."""
    path = out / "responses.jsonl"
    if args.resume and not args.overwrite and path.exists():
        start_run(args, "generate")
        rows = read_responses(path)
        args = fitting(args, rows)
        others = other_responses(args, rows)
    else:
        prompts = read_prompts(args)
        args = fitting(args, prompts)
        others = draw(args, prompts, out)
        rows = read_responses(path)
    show_samples(path, rows)
    if not is_judged(args):
        return None
    return judge(args, rows, others)


def write_scores(args, rows, out):
    """judged.jsonl and the mean score, where there is nothing to compare with."""
    write_rows(out / "judged.jsonl", rows)
    values = [row["score"] for row in rows]
    mean = sum(values) / len(values)
    print(f"no chosen responses, so no win rate; {args.judge}: mean score {mean:.4g}")
    print(f"lowest {min(values):.4g}, highest {max(values):.4g}, all in {out / 'judged.jsonl'}")


def write_results(args, rows, summary, out):
    """judged.jsonl, the table and the figure."""
    title = f"{args.responses or args.model} against {args.against}"
    title += f", judge {args.judge_command or args.judge}"
    write_rows(out / "judged.jsonl", rows)
    print_table(summary, title, comparisons=len(rows))
    caption = title
    if not args.responses:  # those of a file were made by a model and data that we do not know
        caption = f"{title}\n{setting(args)}"
    paper, shown = claim(summary, args)
    draw_scores(rows, summary, f"{shown}\n{caption}", out / "figures" / "scores.png")
    say_claim(paper, shown, out)


def main(args):
    check(args)
    setup(args.seed)

    # A folder that cannot hold this run is refused before anything is drawn or judged.
    out = Path(args.out or "results/generate")
    problem = f"{out}: cannot hold a run; choose another --out"
    on_rank0(partial(require_free, args, out), problem)

    # Responses, from a file or drawn, judged in both orders.
    if args.responses:
        rows = judge_file(args)
    else:
        rows = draw_and_judge(args, out)
    if rows is None:
        return None
    if "outcome" not in rows[0]:
        on_rank0(partial(write_scores, args, rows, out), f"{out}: cannot be written")
        return None

    # Counted.
    summary = summarise(rows)
    on_rank0(partial(write_results, args, rows, summary, out), f"{out}: cannot be written")
    return summary


if __name__ == "__main__":
    main(args)
