"""Ranking accuracy: how often is the response that people prefer the likelier one of a model?

Chen, Malladi, Zhang, Chen, Zhang, Ranganath, Cho 2024, https://arxiv.org/abs/2405.19534

    R  = 1[ pi(y_w|x) >= pi(y_l|x) ]                                                  Eq. 1
    R~ : the same of pi(y|x)^(1/|y|), the likelihood per token                        Eq. 15
    n > 2 responses: 1[ the ranking by likelihood is the human ranking ]              Eq. 11, 12
    log pi*(y_w|x)/pi*(y_l|x) = log pi_ref(y_w|x)/pi_ref(y_l|x) + logit(alpha)/beta   Eq. 2
    R* = 1[ pi*(y_w|x) > pi*(y_l|x) ], alpha: the share of raters who prefer y_w      Eq. 3
    R = 1  <=>  L_DPO <= log(1 + exp(-beta c)), c = log pi_ref(y_l|x)/pi_ref(y_w|x)   Theorem 4.1

    python methods/ranking_accuracy.py     tiny world: its model, and the runs on it in results/
    torchrun --standalone --nproc-per-node 4 methods/ranking_accuracy.py fig1 --model MODEL

Presets, with the paper's 1000 items: fig1, fig1-train (data without a test split), table1 (votes).
Data: pairs, with "votes" (two counts) or "p_chosen" if alpha is known; "responses" with "scores" or
"ranks"; rows of UltraFeedback, StackExchange, SHP, Alpaca Farm cross-annotations.

One pass writes a line for each response to records-*.jsonl; all numbers are arithmetic on these
lines: the tables, figures/ranking.png (Fig. 1 and Table 1), figures/flips.png (Fig. 2 and Fig. 3).

Differs from the released code (angie-chen55/pref-learning-ranking-acc), whose forms are in
tests/released.py: R* is the ratio of likelihoods, not of log-likelihoods; alpha is kept away from 0
as well as from 1; ratios near 1 are no ties; the prompt's tokens are never scored.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro


@dataclass
class Args:
    beta: float = 0.1  # KL constraint of the policies, unless their run folder says; App. D.1
    gamma: float = 1.0  # weight of the reference in their loss, Eq. 4, unless their run folder says
    betas: tuple[float, ...] = (0.01, 0.1, 1.0, 5.0, 10.0)  # of the idealised accuracy; App. C.4
    gammas: tuple[float, ...] = (0.0, 0.5, 1.5, 2.0)  # of R*(beta, gamma), beside 1; from the sweep
    proportion: float = 0.75  # alpha of pairs with neither p_chosen nor votes; released code
    epsilon: float = 0.001  # alpha is kept in [epsilon, 1 - epsilon]; App. C.4

    model: tuple[str, ...] = ()  # run or model folders, hub ids; empty: tiny, its runs in results/
    ref_model: str = ""  # the reference of all of them; empty: the first
    data: tuple[str, ...] = ("tiny",)  # tiny, hh, tldr, se, ..., files, folders or hub ids
    # The split of the data. Of a file alone "test" is all if it is named test*, else its end, as in
    # training.
    split: Literal["train", "test", "all"] = "test"
    sample: int = 0  # items, drawn as in the released code; 0: all
    lists: bool = False  # where a row has a pair and a list of responses, take the list
    max_length: int = 0  # tokens of prompt and response, cut at the end; 0: the model's context
    # Which text is scored: that of training here (prompt and response tokenised apart, the end of
    # the response scored too), or, as released, one text with a space between them and no end.
    text: Literal["training", "released"] = "training"
    tokens_per_microbatch: int = 8192  # memory knob: packed tokens per forward pass and process
    dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16: near ties again in float32
    seed: int = 0  # of the bootstrap
    out: str = ""  # run folder; empty: results/ranking_accuracy
    resume: bool = False  # continue the run in the run folder; what is scored stays scored
    overwrite: bool = False  # replace it; records that still apply are kept


PAPER = dict(model=("EleutherAI/pythia-2.8b",), sample=1000, text="released")  # App. C.2
TRAIN_ONLY = ("openbmb/UltraFeedback", "Dahoas/synthetic-instruct-gptj-pairwise")
PRESETS = {
    "tiny": Args(),
    "fig1": Args(
        data=("hh", "stanfordnlp/SHP", "se"), **PAPER
    ),  # fig1: all of HH, as in the released code
    "fig1-train": Args(data=TRAIN_ONLY, split="train", **PAPER),
    "table1": Args(
        data=("alpaca_farm_human_crossannotations.json",), split="all", **PAPER
    ),  # table1: a file of alpaca_eval
}

if __name__ == "__main__":  # before torch is imported, so that --help answers at once
    preset = "tiny"
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        preset = sys.argv.pop(1)
    if preset not in PRESETS:
        raise SystemExit(f"no preset {preset!r}: choose one of {', '.join(PRESETS)}")
    args = tyro.cli(Args, default=PRESETS[preset], description=__doc__)

import dataclasses
import functools
import hashlib
import json
import math
from collections import defaultdict
from itertools import combinations

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py: here or one up
# isort: off
from common import token_logps  # log-probabilities
from common import encode_rows, pack_pairs, show_example  # tokenization
from common import Unusable, as_dialogue, load_judged, report, without_tags  # data
from common import is_empty, is_number, number, require_text, words  # data
from common import load_model, load_tokenizer, model_folder  # models
from common import append_line, check_ranges, checksum, leave_if_stopped, on_rank0  # processes
from common import progress, require, save_figure, setup, start_run  # processes
from common import stop_requested, write  # processes
from common import say_claim, verdict, wilson  # how a run ends
# isort: on

# ---- the paper: accuracies, ideals, thresholds


def ranking_accuracy(chosen_logps, rejected_logps):
    """R of Eq. 1 for each pair; of log-probs per token, R~ of Eq. 15.  (B,), (B,) -> (B,)

    Eq. 1 counts a tie as right.  In an accuracy, the mean over pairs, it counts half: a model that
    gives everything the same probability ranks nothing.  See `ties_half`.
    """
    return 1.0 * (chosen_logps >= rejected_logps)


def ties_half(delta):
    """What each pair adds to an accuracy: R of Eq. 1, and 1/2 for a tie.

    delta (B,): log-prob of y_w less that of y_l -> (B,)
    """
    return (ranking_accuracy(delta, 0) + (delta > 0)) / 2


def idealized_log_ratio(ref_log_ratio, alpha, beta, gamma=1.0, epsilon=1e-3):
    """Eq. 2: log pi*(y_w|x)/pi*(y_l|x) at the optimum of RLHF.  -> (B,)

    ref_log_ratio (B,): log pi_ref(y_w|x)/pi_ref(y_l|x); alpha (B,): share of raters who prefer y_w.
    gamma other than 1: at the optimum of DPO^gamma with soft labels alpha.
    """
    ref_log_ratio = torch.as_tensor(ref_log_ratio, dtype=torch.float64)
    alpha = torch.as_tensor(alpha, dtype=torch.float64)
    log_odds = torch.logit(alpha.clamp(epsilon, 1 - epsilon))
    return gamma * ref_log_ratio + log_odds / beta


def idealized_ranking_accuracy(ref_log_ratio, alpha, beta, gamma=1.0, epsilon=1e-3):
    """R* of Eq. 3: 1 where the optimum is strictly on the majority's side.  -> (B,)

    Where alpha < 1/2 the majority's side is y_l.
    """
    log_ratio = idealized_log_ratio(ref_log_ratio, alpha, beta, gamma, epsilon)
    alpha = torch.as_tensor(alpha, dtype=torch.float64)
    towards_majority = torch.where(alpha >= 0.5, log_ratio, -log_ratio)
    return (towards_majority > 0).double()


def dpo_gamma_loss(delta, c, beta, gamma=1.0):
    """Eq. 4: the loss of pairs with log pi(y_w|x)/pi(y_l|x) = delta (B,).  -> (B,)

    c (B,): log pi_ref(y_l|x)/pi_ref(y_w|x), how wrong the reference is.  gamma = 1 is DPO.
    """
    c = torch.as_tensor(c, dtype=torch.float64)
    delta = torch.as_tensor(delta, dtype=torch.float64)
    return -F.logsigmoid(beta * (delta + gamma * c))


def loss_threshold(c, beta, gamma=1.0):
    """Theorem 4.1: R = 1 up to the loss of a pair at the border, delta = 0.  -> (B,)"""
    return dpo_gamma_loss(0.0, c, beta, gamma)


def ipo_threshold(ref_log_ratio, tau):
    """Prop. A.7: an IPO loss of at most this guarantees R = 1.  -> (B,)

    -inf where even loss 0 means R = 0.
    """
    ref_log_ratio = torch.as_tensor(ref_log_ratio, dtype=torch.float64)
    optimum = ref_log_ratio + 1 / (2 * tau)  # the policy's log-ratio at loss 0
    return torch.where(optimum >= 0, optimum**2, -math.inf)


def competition_ranks(scores):
    """1 = best; equals share the smallest rank: 3, 3, 1 -> 1, 1, 3.  n numbers or tuples -> list"""
    ranks = []
    for score in scores:
        better = sum(other > score for other in scores)
        ranks.append(1 + better)
    return ranks


def correlation(a, b):
    """Sum of a b over the root of the sums of a^2 and b^2, of arrays that are centred."""
    return float((a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum()))


def rank_correlations(x, y):
    """Pearson's r, Spearman's rho, Kendall's tau-b of two lists; None if one is constant."""
    # Signs of all differences.  A row sum is 2 rank - n - 1, ties averaged, so the correlation of
    # row sums is Spearman's, and that of the signs themselves Kendall's.
    signs_x = np.sign(np.subtract.outer(x, x))
    signs_y = np.sign(np.subtract.outer(y, y))
    if not signs_x.any() or not signs_y.any():
        return None
    pearson = correlation(x - np.mean(x), y - np.mean(y))
    spearman = correlation(signs_x.sum(1), signs_y.sum(1))
    kendall = correlation(signs_x, signs_y)
    return [pearson, spearman, kendall]


def bootstrap_interval(values, items, seed, resamples=1000):
    """95 % percentile interval of the mean of values (B,) -> [low, high]

    Whole items (B,) are drawn again, since the pairs of an item are not independent.
    """
    rng = np.random.default_rng(seed)
    _, item = np.unique(items, return_inverse=True)
    sums = np.bincount(item, values)
    counts = np.bincount(item)
    n = len(sums)
    means = []
    for _ in range(resamples):
        leave_if_stopped()
        drawn = rng.integers(0, n, n)
        means.append(sums[drawn].sum() / counts[drawn].sum())
    return np.quantile(means, [0.025, 0.975]).tolist()


def wilson_over_items(values, items):
    """Wilson's 95 % interval of the mean of values (B,), each from 0 to 1 -> [low, high]

    It counts items (B,), not pairs: the pairs of an item are not independent.
    """
    n = len(np.unique(items))
    return list(wilson(float(np.mean(values)) * n, n))


def claim(gaps, where):
    """What the paper says of R and R*, and what this run shows -> two lines

    gaps: {name of a model: (R* less R, low, high)}, means over pairs with their 95 % intervals.
    The claim is one of all models, so the number is that of the smallest.
    """
    paper = "fine-tuned models rank far fewer pairs right than the optimum of their own loss would "
    paper += "(Table 1: 19 to 59 points fewer)"
    name = None
    for other, gap in gaps.items():
        if name is None or gap[1] < gaps[name][1]:
            name = other
    value, low, high = gaps[name]
    shown = f"{verdict(low, high)}: {where} R is below R*, of each of {len(gaps)} models"
    if len(gaps) > 1:
        shown += f", R* - R being least for {name}"
    else:
        shown = f"{verdict(low, high)}: {where} R of {name} is below R*, by R* - R"
    return paper, f"{shown} ({value:.3f} [{low:.3f}, {high:.3f}])"


# ---- items: responses to a prompt, and what people said of them


@dataclass
class Item:
    """What is scored together."""

    prompt: str | list  # text or chat messages
    responses: list  # n of them
    ranks: list  # n numbers, 1 = best; equals share the smallest
    share: float | None  # of raters, for the first of two; None: not known
    tools: list | str | None = None  # that a chat may call


def load_items(name, args):
    """Data -> list of Item, --sample of them.

    Of plain pairs these are the ones that the released code draws.  Of votes and of SHP it draws
    rows before they are grouped, here whole items are drawn.
    """
    # What is usable becomes an Item; what is not is counted.
    kept, dropped = [], defaultdict(list)
    for place, one in enumerate(load_judged(name, args.split, args.lists), 1):
        try:
            kept.append(usable_item(one, args.text))
        except Unusable as reason:
            dropped[str(reason)].append(place)
    report(f"{name}: items", len(kept), dropped)

    # Whole items are drawn, so that an item keeps all its votes.
    items = kept
    if 0 < args.sample < len(kept):
        drawn = np.random.default_rng(0).choice(len(kept), args.sample, replace=False)
        items = [kept[i] for i in drawn]
    ranked = any(len(set(item.ranks)) > 1 for item in items)
    require(ranked, f"{name}: every pair is a tie: there is nothing to rank; give other --data")
    return items


def usable_item(one, text):
    """Judged -> Item, its texts as training has them or as they are.  Raises Unusable."""
    if isinstance(one, Unusable):
        raise one
    scores = np.array([number(score) for score in one.scores])  # "10" is the number 10
    if len(one.responses) < 2:
        raise Unusable("fewer than two")
    if len(scores) != len(one.responses):
        raise Unusable("a score is missing")
    if one.kind != "scores" and (scores.min() < 0 or not scores.any()):
        raise Unusable("no votes, or below 0")
    for part in [one.prompt, *one.responses]:
        require_text(part)
    if any(map(is_empty, one.responses)):
        raise Unusable("empty response")

    # Training reads a question and its answers as a dialogue of one turn.
    prompt = one.prompt
    responses = one.responses
    if one.is_html and text == "training":
        prompt = without_tags(prompt)
        responses = [without_tags(response) for response in responses]
    if one.is_question and text == "training":
        responses = [as_dialogue(prompt, response)[1] for response in responses]
        prompt, _ = as_dialogue(prompt, "")
    share = None
    if one.kind != "scores":
        share = float(scores[0] / scores.sum())
    return Item(prompt, responses, competition_ranks(scores.tolist()), share, one.tools)


# ---- scoring


@dataclass
class Record:
    """The log-prob of one response, a line of records-*.jsonl."""

    item: int  # its number
    response: int  # its number in the item
    logp: float  # log pi(y|x) in nats, summed over its tokens
    tokens: int  # |y|, its end included if that was scored
    prompt_tokens: int
    cut: bool  # to the context


def encode(tokenizer, items, args, limit):
    """Items -> for each its rows for pack_pairs, or a text: why it is dropped."""
    rows = []
    for item in items:
        rows.append({"prompt": item.prompt, "responses": item.responses, "tools": item.tools})
    found = []
    for item, encoded in zip(items, encode_rows(rows, tokenizer)):
        if isinstance(encoded, str):
            found.append(encoded)
            continue
        wholes = []
        if args.text == "released" and isinstance(item.prompt, str):
            wholes = released_ids(tokenizer, item)
        else:
            n = len(encoded.prompt_ids)
            for response in encoded.responses:
                wholes.append(Whole(encoded.prompt_ids + response, n, end=1))
        found.append(rows_within(wholes, limit))
    return found


@dataclass
class Whole:
    """The token ids of a prompt and one response."""

    ids: list
    prompt_tokens: int  # how many of them are the prompt's
    end: int  # how many at the end are no text


def released_ids(tokenizer, item):
    """Prompt, a space and response tokenised as one text -> a Whole for each response.

    A token that straddles the border belongs to the response.
    """
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    wholes = []
    for response in item.responses:
        text = item.prompt + " " + response
        tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        n = len(bos) + sum(end <= len(item.prompt) for _, end in tokens["offset_mapping"])
        wholes.append(Whole(bos + tokens["input_ids"], n, end=0))
    return wholes


def rows_within(wholes, limit):
    """Rows for pack_pairs of at most `limit` tokens; or a text: why the item is dropped.

    One row, unless the prompt's last letters merge with some responses.
    """
    rows = {}
    for j, whole in enumerate(wholes):
        n = whole.prompt_tokens
        if n == 0:
            return "empty prompt"
        if n >= limit:
            return "prompt fills the context"
        if n >= len(whole.ids):
            return "empty response"

        # What is too long loses its end (`cut`: text is lost, not only the EOS); responses to the
        # same prompt ids share a row.
        cut = len(whole.ids) - whole.end > limit
        ids = whole.ids[:limit]
        key = tuple(ids[:n])
        if key not in rows:
            rows[key] = {"prompt_ids": ids[:n], "responses": [], "at": []}
        rows[key]["responses"].append(ids[n:])
        rows[key]["at"].append((j, cut))
    return list(rows.values())


def check_model(name, args):
    """SystemExit: no model and tokenizer of this name, or a run folder with damaged files."""
    folder = model_folder(name)
    problem = f"{folder}: no config.json, so not a model (or an adapter); give another --model"
    require((folder / "config.json").is_file(), problem)
    load_tokenizer(name)
    loss_of(name, args)
    read_evaluations(name)


def records_path(name, items, out, args):
    """The file of records, named after all that they depend on.

    So a killed run goes on where it was, and another beta or figure needs no model.
    """
    folder = model_folder(name)

    # The model by its files, the texts as they are; who prefers what does not matter.
    files = []
    for file in sorted(folder.iterdir()):
        files.append((file.name, file.stat().st_size, file.stat().st_mtime_ns))
    settings = [args.max_length, args.text, args.dtype]
    texts = [(item.prompt, item.responses, item.tools) for item in items]
    key = hashlib.sha256(json.dumps([settings, texts, files]).encode())
    return out / f"records-{key.hexdigest()[:16]}.jsonl"


def read_records(path, items):
    """The records of a file by (item, response); a line torn by a kill is cut off.

    SystemExit: a line that is no record of one of these items.
    """
    if not path.exists():
        return {}
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines = lines[:-1]
        write(path, b"".join(lines))
    records = {}
    for place, line in enumerate(lines, 1):
        values = json_object(line)
        crc = values.pop("crc", None) if values else None
        why = why_no_record(values, items)
        if not why and crc not in (None, checksum(values)):
            why = "not as it was written"
        require(not why, f"{path}:{place}: damaged, delete it: {why}")
        record = Record(**values)
        records[record.item, record.response] = record
    return records


def json_object(text):
    """The object that a text is in JSON; None if it is none."""
    try:
        found = json.loads(text)
    except ValueError:  # not JSON, or not UTF-8
        return None
    return found if isinstance(found, dict) else None


def why_no_record(values, items):
    """What is wrong with an object as a record of these items, or "" if nothing is."""
    if values is None:
        return "not a JSON object"
    names = [field.name for field in dataclasses.fields(Record)]
    if set(values) != set(names):
        return "its names are not those of a record"

    # The numbers of an item and a response that are there.
    if not is_count(values["item"]) or values["item"] >= len(items):
        return f"there is no item {values['item']!r:.20}"
    responses = items[values["item"]].responses
    if not is_count(values["response"]) or values["response"] >= len(responses):
        return f"its item has no response {values['response']!r:.20}"

    # What was measured of it.
    if not is_number(values["logp"]):
        return f"logp {values['logp']!r:.20} is not a finite number"
    for name in ("tokens", "prompt_tokens"):
        if not is_count(values[name]) or values[name] == 0:
            return f"{name} {values[name]!r:.20} is not a number of tokens"
    if not isinstance(values["cut"], bool):
        return f"cut {values['cut']!r:.20} is neither true nor false"
    return ""


def is_count(value):
    """Whether a value of JSON is a whole number, 0 or more."""
    return isinstance(value, int) and is_number(value) and value >= 0


def append_records(path, records):
    """A line for each record, after those that are there; none if its log-prob is not finite."""
    lines = []
    for record in records:
        if math.isfinite(record.logp):
            values = dataclasses.asdict(record)
            lines.append(json.dumps({**values, "crc": checksum(values)}))
    if lines:
        append_line(path, "\n".join(lines))


LESS_MEMORY = "for less memory lower --tokens-per-microbatch"


def score(name, items, out, args):
    """All responses under model `name` -> {item: its Records}; none depends on its batch.

    Items that cannot be scored are counted and left out.  SystemExit(143) after a signal: what is
    scored is kept.
    """
    path = records_path(name, items, out, args)
    done = on_rank0(
        functools.partial(read_records, path, items), f"{path}: cannot be read, delete it"
    )
    tokenizer = load_tokenizer(name)
    limit = args.max_length
    if limit == 0 or limit > tokenizer.model_max_length:
        limit = tokenizer.model_max_length
    model, dropped = None, defaultdict(list)

    # Blocks of items, so that a killed run loses one block at most.
    for start in progress(range(0, len(items), 512)):
        # What of this block has no record yet?
        missing = []
        for i in range(start, min(start + 512, len(items))):
            if not all((i, j) in done for j in range(len(items[i].responses))):
                missing.append(i)
        rows = []
        encoded = encode(tokenizer, [items[i] for i in missing], args, limit)
        for i, found in zip(missing, encoded):
            if isinstance(found, str):
                dropped[found].append(i + 1)
                continue
            for row in found:
                rows.append({**row, "item": i})
        if not rows:
            continue
        show_example(tokenizer, rows[0]["prompt_ids"], rows[0]["responses"][0])
        if model is None:
            model = load_model(name, args.dtype)

        # Every process scores its share; rank 0 writes what is new.
        new, failure = score_rows(model, rows, args)
        new = {at: record for at, record in new.items() if at not in done}
        done.update(new)
        in_order = [new[at] for at in sorted(new)]
        write_block = functools.partial(append_records, path, in_order)
        on_rank0(write_block, f"{path}: cannot be written")
        if stop_requested():
            raise SystemExit(143)  # after SIGTERM or Ctrl-C; --resume continues
        # What is scored is kept.
        require(not failure, f"{name[-60:]}: {failure}; --resume goes on; {LESS_MEMORY}")

    # In bfloat16 the responses that are nearly tied are scored again, exactly.
    scored = complete_items(name, items, done, dropped)
    if args.dtype == "bfloat16":
        near = [i for i, records in scored.items() if near_tie(records)]
        if near:
            in_float32 = dataclasses.replace(args, dtype="float32")
            exact = score(name, [items[i] for i in near], out, in_float32)
            for k, records in exact.items():
                scored[near[k]] = records
    return scored


def score_rows(model, rows, args):
    """Packed rows, each process its share -> {(item, response): Record} of all of them, failure

    After a signal: of the micro-batches up to here, of which every process has equally many.  If
    one of them fails: of all that were scored, and failure says why; else it is "".
    """
    world = dist.get_world_size()
    while len(rows) < world:
        rows = rows + rows[:1]  # every process needs one

    # This process's micro-batches.  After a failure it only keeps the others company.
    mine = {}
    failure = ""
    for batch in pack_pairs(rows, args.tokens_per_microbatch, dist.get_rank(), world):
        if not failure:
            try:
                mine.update(score_batch(model, batch))
            except Exception as error:  # out of memory, most likely
                failure = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:50]}"
        if stop_requested():
            break

    # Every process gets the records of all.
    parts = [None] * world
    dist.all_gather_object(parts, (mine, failure))
    scored = {}
    for part, why in parts:
        scored.update(part)
        failure = failure or why
    return scored, failure


def score_batch(model, batch):
    """The summed log-probs of a packed batch's responses -> {(item, response): Record}"""
    logps = token_logps(model, batch).double()
    owner = batch["owner"].to(logps.device)
    sums = logps.new_zeros(batch["responses"]).index_add(0, owner, logps).tolist()
    counts = batch["counts"].tolist()
    found = {}
    r = 0  # of the batch's responses
    for row in batch["rows"]:
        prompt_tokens = len(row["prompt_ids"])
        for j, cut in row["at"]:
            found[row["item"], j] = Record(row["item"], j, sums[r], counts[r], prompt_tokens, cut)
            r += 1
    return found


def complete_items(name, items, done, dropped):
    """{item: its Records} of the items whose responses all have a finite log-prob; one line."""
    # An item counts as a whole or not at all.
    scored = {}
    for i, item in enumerate(items):
        records = [done.get((i, j)) for j in range(len(item.responses))]
        if None in records:
            continue
        if not all(math.isfinite(record.logp) for record in records):
            dropped["log-prob is not finite"].append(i + 1)
            continue
        scored[i] = records
    cut = 0
    for records in scored.values():
        cut += sum(record.cut for record in records)
    report(f"{name}: items scored", len(scored), dropped, f"; responses cut {cut}")
    return scored


def near_tie(records):
    """Whether bfloat16, whose rounding moves a text's mean by .005 nats, may decide a ranking."""
    for a, b in combinations(records, 2):
        if abs(a.logp / a.tokens - b.logp / b.tokens) < 0.01:
            return True
        if abs(a.logp - b.logp) < 0.01 * max(a.tokens, b.tokens):
            return True
    return False


# ---- measuring


@dataclass
class Pairs:
    """All pairs of all items, B of them; a is the earlier of the two responses, b the later."""

    item: np.ndarray  # (B,) its number
    alpha: np.ndarray  # (B,) share of raters who prefer a; 1/2: a tie
    logps: np.ndarray  # (2, B) of a and b
    tokens: np.ndarray  # (2, B)
    responses: np.ndarray  # (2, B) the numbers of a and b in their item


@dataclass
class Accuracy:
    """How one form of likelihood ranks: log pi(y|x) for R, log pi(y|x) / |y| for R~."""

    accuracy: float  # Eq. 1 or 15, mean over the pairs without a human tie; `ties_half`
    interval: list  # 95 %, Wilson's, which counts items
    delta: np.ndarray  # (pairs,) of y_w less that of y_l
    ties: int  # pairs with delta 0
    with_ties: float  # Eq. 14: of all pairs; on a human tie, right if the model's two are near
    exact: float | None = None  # Eq. 11, 12: share of lists of n > 2 in the human order
    exact_interval: list | None = None
    correlations: list | None = None  # of ranks in those lists: Pearson, Spearman, Kendall


@dataclass
class Measured:
    """All numbers of a model on its own."""

    items: int
    pairs: int  # without human ties
    ties: int  # human ones
    lists: int  # items of more than two responses
    item: np.ndarray  # (pairs,) number of the item
    alpha: np.ndarray  # (pairs,) share of the raters on the majority's side
    shorter: float  # accuracy of "the shorter one wins"
    R: Accuracy  # raw
    R_tilde: Accuracy  # per token
    chance_exact: float | None = None  # of a random order of the lists
    shorter_exact: float | None = None
    responses: np.ndarray | None = None  # (2, pairs) the numbers of y_w and y_l in their item


def all_pairs(items, records, proportion):
    """Pairs of scored items.  Where no share is known, alpha is `proportion` for the better one."""
    item = []
    alpha = []
    logps = []
    tokens = []
    responses = []
    for i, found in sorted(records.items()):
        leave_if_stopped()
        for j, k in combinations(range(len(found)), 2):
            a = found[j]
            b = found[k]
            rank_a = items[i].ranks[j]
            rank_b = items[i].ranks[k]
            # alpha, the share of raters who prefer a; where it is not known, by the ranks.
            if items[i].share is not None:
                share = items[i].share
            elif rank_a < rank_b:
                share = proportion
            elif rank_a > rank_b:
                share = 1 - proportion
            else:
                share = 0.5
            item.append(i)
            alpha.append(share)
            logps.append((a.logp, b.logp))
            tokens.append((a.tokens, b.tokens))
            responses.append((j, k))

    # Of no pairs at all the arrays still have two rows.
    logps = np.array(logps, float).reshape(-1, 2).T
    tokens = np.array(tokens, float).reshape(-1, 2).T
    responses = np.array(responses, int).reshape(-1, 2).T
    return Pairs(np.array(item, int), np.array(alpha, float), logps, tokens, responses)


def measure(items, records, args):
    """All numbers of a model, from {item: its Records}.  SystemExit: nothing but ties."""
    pairs = all_pairs(items, records, args.proportion)
    strict = pairs.alpha != 0.5
    require(strict.any(), f"{len(pairs.item)} pairs, every pair is a tie: there is nothing to rank")

    # y_w is the majority's choice (Def. 2.1): a where side is 1, b where it is -1.
    side = np.sign(pairs.alpha - 0.5)
    majority = 0.5 + abs(pairs.alpha - 0.5)
    excess = side * (pairs.tokens[0] - pairs.tokens[1])  # tokens of y_w beyond those of y_l

    # R from log-likelihoods, R~ from log-likelihoods per token.
    raw = measure_form(pairs, side, pairs.logps, nearness=pairs.logps)
    per_token = pairs.logps / pairs.tokens
    normalised = measure_form(pairs, side, per_token, nearness=np.exp(per_token))

    # Lists of more than two responses have a ranking as a whole.
    lists = [(items[i].ranks, found) for i, found in records.items() if len(found) > 2]
    shorter_wins = ties_half(-excess)[strict].mean()
    n = int(strict.sum())
    measured = Measured(
        items=len(records),
        pairs=n,
        ties=len(strict) - n,
        lists=len(lists),
        item=pairs.item[strict],
        alpha=majority[strict],
        shorter=float(shorter_wins),
        R=raw,
        R_tilde=normalised,
    )
    y_w_first = np.where(side > 0, pairs.responses, pairs.responses[::-1])
    measured.responses = y_w_first[:, strict]
    if lists:
        measure_lists(measured, lists)
    return measured


def measure_form(pairs, side, scores, nearness):
    """Accuracy of scores (2, B).

    nearness (2, B): what Eq. 14 compares with a tolerance of 0.01.  That is meant for likelihoods
    per token; raw likelihoods are all within 0.01 of 0, so of these the logarithms are compared.
    """
    # Log-ratios of the majority's choice to the other.
    strict = side != 0
    delta = side * (scores[0] - scores[1])
    right = ties_half(delta)[strict]
    near = abs(nearness[0] - nearness[1]) < 0.01
    ties = (delta == 0)[strict]
    all_right = np.where(strict, delta > 0, near)  # Eq. 14
    return Accuracy(
        accuracy=float(right.mean()),
        interval=wilson_over_items(right, pairs.item[strict]),
        delta=delta[strict],
        ties=int(ties.sum()),
        with_ties=float(all_right.mean()),
    )


def measure_lists(measured, lists):
    """Fill in what is only known of lists of n > 2; for pairs every correlation is 2 R - 1."""
    raw = []
    normalised = []
    chances = []
    shorter = []

    # The ranking of each list by raw and by normalised likelihood, by length, and by chance.
    for ranks, found in lists:
        leave_if_stopped()
        raw.append(competition_ranks([r.logp for r in found]))
        normalised.append(competition_ranks([r.logp / r.tokens for r in found]))
        shorter.append(competition_ranks([-r.tokens for r in found]) == ranks)
        if len(set(ranks)) == len(ranks):
            chances.append(1 / math.factorial(len(ranks)))  # a random strict order
        else:
            chances.append(0.0)  # it never has a tie

    # How often is it the human ranking, and how close is it?
    for form, own in ((measured.R, raw), (measured.R_tilde, normalised)):
        same, correlations = [], []
        for (ranks, _), model_ranks in zip(lists, own):
            leave_if_stopped()
            same.append(1.0 * (ranks == model_ranks))  # Eq. 11, 12
            found = rank_correlations(ranks, model_ranks)
            if found is not None:
                correlations.append(found)
        form.exact = float(np.mean(same))
        form.exact_interval = list(wilson(sum(same), len(same)))
        if correlations:  # of lists that have an order at all
            form.correlations = np.mean(correlations, axis=0).tolist()
    measured.chance_exact = float(np.mean(chances))
    measured.shorter_exact = float(np.mean(shorter))


@dataclass
class Line:
    """A model on one data set beside the reference; a line of metrics.jsonl."""

    data: str
    model: str
    reference: str
    beta: float  # of the model's loss
    gamma: float
    measured: Measured
    c: np.ndarray  # (pairs,) log pi_ref(y_l|x)/pi_ref(y_w|x)
    ideal: list  # R* of the reference: rows gamma = 1 and --gammas, columns --betas
    ideal_tilde: list  # R~*
    ideal_own: float  # R* at the model's own beta and gamma
    flips: list  # shares of the pairs: kept, lost, fixed, missed
    curve: list  # of Fig. 2: [step, kept, lost, fixed, missed], ...
    gap: list = dataclasses.field(default_factory=list)  # R* at its own beta less R, low, high
    preferences: bool = True  # is it trained on preferences, as neither the reference nor SFT is?


FLIPS = "kept", "lost", "fixed", "missed"  # right or wrong under the reference, then the policy


def run_flags(name):
    """The flags of a run folder of this repository; {} for any other model.

    A run folder holds its model in model/, and beside it its flags.  The config.json of a model
    folder is the library's, which may have a beta that is no loss's.
    SystemExit: a config.json that is damaged.
    """
    path = Path(name, "config.json")
    if not Path(name, "model").is_dir() or not path.is_file():
        return {}
    flags = json_object(path.read_bytes())
    require(flags is not None, f"{path}: not a JSON object; restore it, or give {name}/model")
    if "model_type" in flags:
        return {}
    return flags


def loss_of(name, args):
    """beta and gamma of a model's loss: those of its run folder, if it says, else the options'."""
    flags = run_flags(name)
    beta = flags.get("beta", args.beta)
    gamma = flags.get("gamma", args.gamma)
    if isinstance(gamma, list) and len(gamma) == 1:
        gamma = gamma[0]  # dpo_gamma.py has a run for each of its gammas
    for option, value in (("beta", beta), ("gamma", gamma)):
        least, largest = RANGES[option]
        problem = f"{name}/config.json: {option} {value!r:.20}: no number from {least:g} to "
        problem += f"{largest:g}; correct it, or give {name}/model and --{option}"
        require(is_number(value) and least <= value <= largest, problem)
    return beta, gamma


def read_evaluations(name):
    """Evaluations in metrics.jsonl of a run folder: [step, kept, lost, fixed, missed], ...

    Lines without shares are of training steps, or of another method.  A last line that was torn by
    a kill is no line.  SystemExit: another damaged line, or a share that is no number.
    """
    path = Path(name, "metrics.jsonl")
    found = []
    if not path.is_file():
        return found
    for place, text in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not text.endswith(b"\n"):
            break
        line = json_object(text)
        remedy = "restore it, or give the model folder inside"
        require(line is not None, f"{path}:{place}: not a JSON object; {remedy}")
        if "eval_kept" not in line:
            continue
        values = [line.get("step")]
        for flip in FLIPS:
            values.append(line.get("eval_" + flip))
        numbers = all(is_number(value) for value in values)
        names = f"step, eval_{', eval_'.join(FLIPS)}"
        require(numbers, f"{path}:{place}: {names} must be numbers; {remedy}")
        found.append(values)
    return found


def ideal_table(ref_log_ratio, alpha, args):
    """Mean R* of the reference: rows gamma = 1 and --gammas, columns --betas."""
    table = []
    for gamma in (1.0, *args.gammas):
        row = []
        for beta in args.betas:
            right = idealized_ranking_accuracy(ref_log_ratio, alpha, beta, gamma, args.epsilon)
            row.append(right.mean().item())
        table.append(row)
    return table


def flips(c, delta):
    """Shares of the pairs kept, lost, fixed and missed by a policy.  (B,), (B,) -> 4 numbers"""
    # Right under the reference before, right under the policy after?
    before = c <= 0
    after = delta >= 0
    kept = np.mean(before & after)
    lost = np.mean(before & ~after)
    fixed = np.mean(~before & after)
    missed = np.mean(~before & ~after)
    return [float(kept), float(lost), float(fixed), float(missed)]


def training_curve(name, c, last):
    """Fig. 2: shares over the evaluations of the run folder `name`; else before and after."""
    # The evaluations of a training run of this repository.
    curve = read_evaluations(name)
    if curve:
        return curve

    # No evaluations: the reference, of which nothing is lost or fixed yet, then the policy.
    right = float(np.mean(c <= 0))
    return [[0, right, 0.0, 0.0, 1 - right], [1, *last]]


def beside_reference(data, scored, items, args):
    """{model: {item: Records}}, the reference first -> a Line for each, on the items of all."""
    # Models are compared on the items that all of them could score.
    shared = set(range(len(items)))
    for records in scored.values():
        shared &= set(records)

    # The first is the reference: c and the ideals are its own.
    name_of_reference = next(iter(scored))
    of_reference = {i: scored[name_of_reference][i] for i in sorted(shared)}
    reference = measure(items, of_reference, args)
    c = -reference.R.delta
    ideal = ideal_table(reference.R.delta, reference.alpha, args)
    ideal_tilde = ideal_table(reference.R_tilde.delta, reference.alpha, args)

    lines = []
    for name, records in scored.items():
        measured = measure(items, {i: records[i] for i in sorted(shared)}, args)
        # The best that this model's loss allows, and which pairs it changed.
        beta, gamma = loss_of(name, args)
        own = idealized_ranking_accuracy(-c, reference.alpha, beta, gamma, args.epsilon)
        shares = flips(c, measured.R.delta)
        line = Line(
            data=data,
            model=name,
            reference=name_of_reference,
            beta=beta,
            gamma=gamma,
            measured=measured,
            c=c,
            ideal=ideal,
            ideal_tilde=ideal_tilde,
            ideal_own=own.mean().item(),
            flips=shares,
            curve=training_curve(name, c, shares),
        )
        line.gap = gap_of(own.numpy(), measured, args.seed)
        is_sft = run_flags(name).get("method") == "sft"
        line.preferences = name != name_of_reference and not is_sft
        lines.append(line)
    return lines


def gap_of(ideal, measured, seed):
    """R* (pairs,) less R, mean over the pairs, and its 95 % interval -> [gap, low, high]"""
    short = ideal - ties_half(measured.R.delta)
    return [float(short.mean()), *bootstrap_interval(short, measured.item, seed)]


# ---- tables and figures


def short_name(line):
    """Data and model of a line, at most the last two parts of their paths."""
    names = []
    for name in (line.data, line.model):
        names.append("/".join(Path(name).parts[-2:])[-24:])
    return ": ".join(names)


def show_theorem(line, args):
    """What Theorem 4.1 says of the reference before any training."""
    # How far from flipping are the pairs, and which ones?
    measured = line.measured
    c = line.c

    # Theorem 4.1 solved for c: at a loss of 0.01 a pair is right only if gamma c <= reach.
    reach = -math.log(math.expm1(0.01)) / args.beta
    limit = reach / args.gamma if args.gamma else math.inf
    stuck = (ipo_threshold(-c, args.beta) < 0).double().mean()
    gamma_enough = reach / max(c.max(), 1e-9)
    print(f"\n{line.data}: {measured.items} items, {measured.pairs} pairs and {measured.ties} ties")
    right = f"{np.mean(c <= 0):.1%}"
    # Prop. 2.6 says 0.6; where c <= 0 the bound of Theorem 4.1 is at least log 2 = 0.693, so that
    # log 2 is the largest constant for which the proposition holds.
    print(f"reference right (c <= 0): {right}, surely at a loss below log 2 (Prop. 2.6: 0.6)")
    print(
        f"beta = {args.beta}, gamma = {args.gamma}: {np.mean(c > limit):.1%} need a loss below "
        f"0.01 to flip (c > {limit:.1f}), none with gamma <= {gamma_enough:.3g}"
    )
    print(f"IPO, tau = beta: for {stuck:.1%} even loss 0 is a wrong ranking (Prop. A.7)")


def cut(text, width):
    """A text on one line of so many characters, with an ellipsis for what is left out at its end"""
    line = " ".join(text.split())
    if len(line) > width:
        line = line[: width - 3] + "..."
    return line


def show_texts(lines, items, args):
    """The pairs of Tables 7 to 9: the hardest, the easiest, and those that are easiest to flip.

    By c of the reference: the most wrong, the most right, the wrong ones closest to 0; of the last,
    whether training flipped them.
    """
    line = lines[0]
    order = np.argsort(line.c)
    wrong = order[line.c[order] > 0]
    policies = [other for other in lines if other.preferences]
    groups = {"hardest": order[::-1][:2], "easiest": order[:2], "to flip": wrong[:2]}
    print("\nTables 7 to 9: pairs by c, how wrong the reference is (nats)")
    for title, chosen in groups.items():
        for i in chosen:
            # c, the loss that flips it, and how many models did.
            threshold = loss_threshold(line.c[i], args.beta, args.gamma).item()
            head = f"{title:8} c {line.c[i]:.1f}, right at a loss <= {threshold:.3g}"
            if policies:
                right = sum(policy.measured.R.delta[i] >= 0 for policy in policies)
                head += f", right in {right} of {len(policies)} trained models"
            item = items[line.measured.item[i]]
            better, worse = line.measured.responses[:, i]
            print(f"{head}: {cut(words(item.prompt), 70)}")
            print(f"    preferred: {cut(words(item.responses[better]), 100)}")
            print(f"    rejected:  {cut(words(item.responses[worse]), 100)}")


def show_ideal(line, args):
    """R* and R~* in percent, as Table 1."""
    # One column for each beta, then what Table 1 prints of them.
    head = ""
    for x in (*args.betas, "min", "median", "max"):
        head += f"{x:>8}"
    for name, table in (("R*", line.ideal), ("R~*", line.ideal_tilde)):
        print(f"\n{name}, gamma down, beta across:{head}")
        for gamma, values in zip((1.0, *args.gammas), table):
            print(
                f"{gamma:28}" + percent([*values, min(values), np.median(values), max(values)], 8)
            )


def percent(values, width=7):
    """Shares as percent, in columns."""
    return "".join(f"{100 * value:{width}.1f}" for value in values)


def show_models(lines):
    """A row for each model, in percent; a second one for its lists of more than two responses."""
    head = "R low high R~ low high chance short. R*own lost fixed /wrong Eq.14 R~".split()
    titles = "".join(f"{title:>7}" for title in head)
    print("\n" + " " * 50 + titles + "   (exact: then r, rho, tau of R and R~)")
    for line in lines:
        measured = line.measured
        R = measured.R
        R_tilde = measured.R_tilde

        # All pairs: accuracies, baselines, and what training did to the reference's ranking.
        row = [R.accuracy, *R.interval, R_tilde.accuracy, *R_tilde.interval, 0.5, measured.shorter]
        _, lost, fixed, missed = line.flips
        of_wrong = fixed / max(fixed + missed, 1e-9)
        row += [line.ideal_own, lost, fixed, of_wrong, R.with_ties, R_tilde.with_ties]
        print(f"{short_name(line):50}" + percent(row))

        # Lists: the whole ranking right, and correlations of ranks.
        if measured.lists:
            row = [R.exact, *R.exact_interval, R_tilde.exact, *R_tilde.exact_interval]
            row += [measured.chance_exact, measured.shorter_exact]
            row += [*(R.correlations or []), *(R_tilde.correlations or [])]
            print(f"{short_name(line) + ' exact':50}" + percent(row))


def write_lines(path, lines):
    """metrics.jsonl: a JSON object for each line of the table, arrays as lists."""
    text = ""
    for line in lines:
        text += json.dumps(dataclasses.asdict(line), default=np.ndarray.tolist) + "\n"
    write(path, text.encode())


def where(lines):
    """What a caption must say of where the numbers come from."""
    if {line.data for line in lines} == {"tiny"}:
        return "tiny world, not the paper's"
    return "see config.json"


def plot_ranking(out, lines):
    """figures/ranking.png: Fig. 1 over Table 1, a row for each data set and model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 2.5 + len(lines) / 2), layout="constrained")
    axis = figure.subplots()

    # Two dots a row: what the model does, and bars: what a perfect optimum would do.
    for y, line in enumerate(lines):
        forms = (
            ("R", "C0", y - 0.12, line.measured.R, line.ideal[0]),
            ("R~", "C1", y + 0.12, line.measured.R_tilde, line.ideal_tilde[0]),
        )

        # R and R~ with their intervals, on a bar that shows what the ideal ones could be.
        for name, color, at, form, ideal in forms:
            bar = f"{name}*: min, median, max over --betas"
            low, high = form.interval
            # At 0 and 1 rounding could make an end of the interval negative.
            error = [[max(0, form.accuracy - low)], [max(0, high - form.accuracy)]]
            ends = [min(ideal), np.median(ideal), max(ideal)]
            axis.plot(ends, [at] * 3, "|-", color=color, alpha=0.5, label=bar)
            meaning = "likelihood" if name == "R" else "likelihood per token"
            point = f"{name}, by {meaning}, 95 % interval"
            axis.errorbar(form.accuracy, at, xerr=error, fmt="o", color=color, label=point)

        # The ideal of the policy's own loss, and the baseline that reads lengths only.
        own = "R* at the beta of its own loss"
        axis.plot(line.ideal_own, y - 0.12, "D", color="C0", mfc="w", label=own)
        axis.plot(line.measured.shorter, y, "kx", label="if the shorter one were better")
    axis.axvline(0.5, color="k", lw=0.5, label="chance")
    axis.set(xlabel="share of pairs ranked right; a tie counts half", ylim=(len(lines) - 0.5, -0.5))
    axis.set(yticks=range(len(lines)), yticklabels=[short_name(line) for line in lines])
    axis.set_title(f"{ranking_title(lines)}\nAs Fig. 1 and Table 1: {where(lines)}", fontsize=10)

    # Every row has the same labels: one of each is enough.
    handles, labels = axis.get_legend_handles_labels()
    once = dict(zip(labels, handles))
    axis.legend(once.values(), once.keys(), fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    save_figure(figure, out / "figures" / "ranking.png", dpi=110)


def ranking_title(lines):
    """What the dots and the diamonds of the figure show."""
    R = [line.measured.R.accuracy for line in lines]
    own = [line.ideal_own for line in lines]
    title = f"R of the models (dots) is {min(R):.2f} to {max(R):.2f}; at the optimum of their own "
    return title + f"loss (diamonds) it would be {min(own):.2f} to {max(own):.2f}"


def plot_flips(out, lines):
    """figures/flips.png: of each policy Fig. 2 (shares over training), Fig. 3 (loss and c)."""
    from matplotlib.figure import Figure

    policies = [line for line in lines if line.model != line.reference]
    if not policies:
        return
    figure = Figure(figsize=(3.3 * len(policies) + 1.5, 6.8), layout="constrained")
    axes = figure.subplots(2, len(policies), squeeze=False, sharey="row")
    for column, line in enumerate(policies):
        plot_curve(axes[0, column], line)
        plot_losses(axes[1, column], line)
        axes[1, column].sharex(axes[1, 0])
    for axis in axes[:, -1]:
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    caption = "Does training put right what the reference ranks wrong?  Above: held-out pairs, as "
    caption += f"Fig. 2; below: scored pairs, as Fig. 3 ({where(lines)})"
    figure.suptitle(caption, fontsize=9)
    save_figure(figure, out / "figures" / "flips.png", dpi=110)


def plot_curve(axis, line):
    """Fig. 2: shares of the pairs kept, lost, fixed and missed over training."""
    curve = np.array(line.curve)
    steps = curve[:, 0]
    colors = ["C2", "C1", "C0", "C3"]
    labels = []
    meanings = ("right, still right", "right, now wrong", "wrong, now right", "wrong, still wrong")
    for flip, meaning in zip(FLIPS, meanings):
        labels.append(f"{flip}: {meaning}")  # under the reference, then the policy
    axis.stackplot(steps, curve[:, 1:].T, labels=labels, colors=colors, alpha=0.7)

    # How many of the pairs that the reference ranks wrong are right in the end?
    *_, fixed, missed = curve[-1]
    of_wrong = fixed / max(fixed + missed, 1e-9)
    title = f"{short_name(line)}\nfixed: {of_wrong:.0%} of those that were wrong"
    axis.set_title(title, fontsize=9)
    axis.set(ylabel="share of pairs", ylim=(0, 1), xlabel="optimiser step")
    if len(steps) == 2:
        axis.set(xticks=steps, xticklabels=["before", "after"], xlabel="training")


def plot_losses(axis, line):
    """Fig. 3: the loss of each pair against c, below its threshold exactly where R = 1."""
    # The loss of DPO^gamma from the policy's own log-ratio and the reference's.
    c = line.c
    delta = line.measured.R.delta
    loss = dpo_gamma_loss(delta, c, line.beta, line.gamma).numpy()
    for right, color, label in (
        (delta >= 0, "C0", "ranked right by the policy"),
        (delta < 0, "C3", "ranked wrong"),
    ):
        axis.scatter(c[right], loss[right], 8, color, label=label, alpha=0.6)
    grid = np.sort(c)
    threshold = loss_threshold(grid, line.beta, line.gamma)
    axis.plot(grid, threshold, "k--", label="Theorem 4.1: right up to here")
    axis.axvline(0, color="0.6", lw=0.8, label="c = 0: the reference is even")
    axis.set(xlabel="c = log pi_ref(y_l)/pi_ref(y_w), nats", yscale="log")
    axis.set_ylabel(f"loss at beta {line.beta:g}, gamma {line.gamma:g}, nats")


RANGES = {  # option: its least and largest value
    "beta": (1e-9, 1e9),
    "gamma": (0, 1e9),
    "betas": (1e-9, 1e9),
    "gammas": (0, 1e9),
    "proportion": (0.500001, 0.999999),  # a majority, and not all
    "epsilon": (1e-9, 0.499999),
    "sample": (0, 10**9),
}


def check(args):
    """Refuse a number that is out of its range, and an option that says nothing."""
    check_ranges(args, RANGES)
    require(args.data, "--data: name one data set at least")


def tiny_runs():
    """The finished runs on the tiny world in results/, in the order in which they are trained."""
    # dpo_gamma has a run for each gamma below its folder.
    found = []
    for method in ("sft", "dpo", "cal_dpo", "dpo_gamma"):
        for model in sorted(Path("results", method).glob("**/model")):
            if run_flags(model.parent).get("data") == "tiny":
                found.append(str(model.parent))
    return found


def compare(data, scored, items, args):
    """Measure all models on one data set, and print the tables -> a Line for each model"""
    lines = beside_reference(data, scored, items, args)
    show_theorem(lines[0], args)
    show_texts(lines, items, args)
    show_ideal(lines[0], args)
    show_models(lines)
    return lines


def claim_of(lines):
    """The two lines of `claim`: of the models trained on preferences, or else of the references."""
    chosen = [line for line in lines if line.preferences]
    if not chosen:
        chosen = [line for line in lines if line.model == line.reference]
    gaps = {short_name(line): line.gap for line in chosen}
    data = sorted({line.data for line in lines})
    where = f"on {', '.join(data)}"
    if data == ["tiny"]:
        where = "in the tiny world"
    return claim(gaps, where)


def write_results(out, lines):
    """metrics.jsonl and the figures."""
    write_lines(out / "metrics.jsonl", lines)
    plot_ranking(out, lines)
    plot_flips(out, lines)


def main(args):
    check(args)
    setup(args.seed)

    # Data and models: what cannot be used is refused here, before there is a run folder.
    models = list(args.model) or ["tiny", *tiny_runs()]
    if args.ref_model:
        models.insert(0, args.ref_model)
    for name in models:
        check_model(name, args)
    items = {data: load_items(data, args) for data in args.data}
    out = start_run(args, "ranking_accuracy")

    # Data sets one after the other; a line for each model on each of them.
    lines = []
    for data in args.data:
        # One pass over the responses for each model.
        scored = {name: score(name, items[data], out, args) for name in models}

        # Then arithmetic, by rank 0 while the others wait.
        measure_all = functools.partial(compare, data, scored, items[data], args)
        lines += on_rank0(measure_all, f"{data}: cannot be measured")

        # The table and the figures of the data sets up to here.
        on_rank0(functools.partial(write_results, out, lines), f"{out}: cannot be written")
    say_claim(*claim_of(lines), out)
    return lines


if __name__ == "__main__":
    main(args)
