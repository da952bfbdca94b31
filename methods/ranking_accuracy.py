"""Ranking accuracy, idealised ranking accuracy, and what a DPO loss can and cannot say about a ranking.

Chen, Malladi, Zhang, Chen, Zhang, Ranganath, Cho 2024, https://arxiv.org/abs/2405.19534

    R  = 1[ pi(y_w|x) >= pi(y_l|x) ], and R~ with pi~(y|x) = pi(y|x)^(1/|y|) for pi              Eq. 1, 15
    n > 2 responses: 1[ the ranking by likelihood is the human ranking ]                         Eq. 11, 12
    log pi*(y_w|x)/pi*(y_l|x) = log pi_ref(y_w|x)/pi_ref(y_l|x) + logit(alpha) / beta            Eq. 2
    R* = 1[ pi*(y_w|x) > pi*(y_l|x) ], alpha being the share of raters who prefer y_w            Eq. 3
    R = 1  <=>  L_DPO <= log(1 + exp(-beta c)), with c = log pi_ref(y_l|x)/pi_ref(y_w|x)         Theorem 4.1

    python methods/ranking_accuracy.py          tiny world: its model, and the runs on it that are in results/
    torchrun --standalone --nproc-per-node 4 methods/ranking_accuracy.py fig1 --model MODEL results/dpo-hh

Presets, with the paper's 1000 items: fig1, fig1-train (data that has no test split), table1 (votes).
Data: pairs, with "votes" (two counts) or "p_chosen" if alpha is known; "responses" with "scores" or "ranks";
rows of UltraFeedback, StackExchange, SHP, Alpaca Farm cross-annotations.
One pass writes a line per response to records-*.jsonl; all numbers are arithmetic on these lines: the tables,
figures/ranking.png (Fig. 1 and Table 1) and flips.png (Fig. 2 from the run's metrics.jsonl, Fig. 3).
The released code (angie-chen55/pref-learning-ranking-acc) differs as the --legacy flags say; they restore it.
"""

import hashlib
import json
import math
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Literal

import tyro


@dataclass
class Args:
    beta: float = 0.1  # KL constraint of the policies (IPO's tau), unless their run folder says; App. D.1
    gamma: float = 1.0  # weight of the reference in their loss, Eq. 4, unless their run folder says; 1 is DPO
    betas: tuple[float, ...] = (0.01, 0.1, 1.0, 5.0, 10.0)  # of the idealised accuracy; App. C.4
    gammas: tuple[float, ...] = (0.0, 0.5, 1.5, 2.0)  # of R*(beta, gamma), beside 1; from the paper's sweep
    proportion: float = 0.75  # alpha of pairs with neither p_chosen nor votes; released code
    smoothing: float = 0.0  # added to both counts of votes; 0.5: alpha = (k + 1/2) / (n + 1)
    epsilon: float = 0.001  # alpha is kept in [epsilon, 1 - epsilon]; App. C.4

    model: tuple[str, ...] = ()  # run or model folders, hub ids; empty: tiny and the runs on it in results/
    ref_model: str = ""  # the reference of all of them; empty: the first
    data: tuple[str, ...] = ("tiny",)  # tiny, hh, tldr, se, ..., files, folders or hub ids
    split: Literal["train", "test"] = "test"  # of pairs in a file: all if test*, else the last 5 %
    sample: int = 0  # items, drawn as in the released code; 0: all
    lists: bool = False  # where a row has a pair and a list of responses, take the list
    max_length: int = 0  # tokens of prompt and response, cut at the end; 0: the model's context
    separator: str = "auto"  # between prompt and response; auto: a space unless there is white space already
    no_bos: bool = False  # leave out the beginning-of-sequence token
    append_eos: bool = False  # score the end of the response too, as DPO training does
    chat_template: bool = False  # wrap text prompts in the tokenizer's chat template
    legacy_window: bool = False  # score the first |y| tokens of x + y: left padding shifted the prompt's mask
    legacy_quotient: bool = False  # R*: the ratio of log-likelihoods in place of that of likelihoods, Eq. 2
    legacy_epsilon: bool = False  # epsilon for a zero denominator only: alpha = 0 is then right at every beta
    legacy_dead_zone: bool = False  # R*: ratios within 5 % of 1 are ties
    legacy_votes: bool = False  # draw --sample before rows are grouped to items: single votes of Alpaca Farm
    tokens_per_microbatch: int = 8192  # memory knob: packed tokens per forward pass and process
    dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16: near ties are scored again in float32
    seed: int = 0  # of the bootstrap
    out: str = ""  # run folder; empty: results/ranking_accuracy
    resume: bool = False  # continue the run in the run folder; what has its records is not scored again
    overwrite: bool = False  # replace it; records that still apply are kept


PAPER = dict(model=("EleutherAI/pythia-2.8b",), sample=1000, separator=" ")  # App. C.2; released code
PRESETS = {
    "tiny": Args(append_eos=True),
    "fig1": Args(data=("hh", "stanfordnlp/SHP", "se"), **PAPER),  # all of HH, as in the released code
    "fig1-train": Args(data=("openbmb/UltraFeedback", "Dahoas/synthetic-instruct-gptj-pairwise"),
                       split="train", **PAPER),
    "table1": Args(data=("alpaca_farm_human_crossannotations.json",), **PAPER)}  # of tatsu-lab/alpaca_eval

if __name__ == "__main__":  # before torch is imported, so that --help answers at once
    preset = sys.argv.pop(1) if sys.argv[1:] and not sys.argv[1].startswith("-") else "tiny"
    if preset not in PRESETS:
        raise SystemExit(f"no preset {preset!r}: choose one of {', '.join(PRESETS)}")
    args = tyro.cli(Args, default=PRESETS[preset], description=__doc__)

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoConfig

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py: beside this file or one up
from common import (hub_rows, load_model, load_pairs, load_tokenizer, model_folder, on_rank0, pack_pairs,
                    progress, read_rows, report, require, row_texts, setup, start_run, token_logps, words)


def ranking_accuracy(chosen_logps, rejected_logps):
    """R of Eq. 1, 1 or 0 for each pair, or R~ of Eq. 15 of log-probs per token.  (B,), (B,) -> (B,)"""
    return 1.0 * (chosen_logps >= rejected_logps)


def idealized_log_ratio(ref_log_ratio, alpha, beta, gamma=1.0, epsilon=1e-3, legacy_epsilon=False):
    """Eq. 2: log pi*(y_w|x)/pi*(y_l|x) at the optimum of RLHF or, with soft labels alpha, DPO^gamma.  -> (B,)

    ref_log_ratio (B,): log pi_ref(y_w|x)/pi_ref(y_l|x); alpha (B,): share of raters who prefer y_w.
    """
    ref_log_ratio, alpha = (torch.as_tensor(x, dtype=torch.float64) for x in (ref_log_ratio, alpha))
    log_odds = torch.logit(alpha.clamp(epsilon, 1 - epsilon))
    if legacy_epsilon:
        log_odds = torch.log(alpha / torch.where(alpha < 1, 1 - alpha, epsilon))
    return gamma * ref_log_ratio + log_odds / beta


def idealized_ranking_accuracy(ref_log_ratio, alpha, beta, gamma=1.0, epsilon=1e-3, legacy_epsilon=False,
                               legacy_dead_zone=False):
    """R* of Eq. 3: 1 where the optimum is strictly on the majority's side (alpha < 1/2: y_l).  (B,)"""
    human, log_ratio = (idealized_log_ratio(*x, epsilon, legacy_epsilon) for x in (
        (0.0, alpha, 1.0, 1.0), (ref_log_ratio, alpha, beta, gamma)))
    if legacy_dead_zone:
        side, human_side = (1.0 * (x.exp() >= 1.05) - 1.0 * (x.exp() <= 0.95) for x in (log_ratio, human))
        return (side == human_side).double()
    return (torch.where(human >= 0, log_ratio, -log_ratio) > 0).double()


def loss_threshold(c, beta, gamma=1.0):
    """Theorem 4.1: the DPO^gamma loss up to which R = 1; c = log pi_ref(y_l|x)/pi_ref(y_w|x).  -> (B,)"""
    return -torch.nn.functional.logsigmoid(beta * gamma * torch.as_tensor(c, dtype=torch.float64))


def ipo_threshold(ref_log_ratio, tau):
    """Prop. A.7: an IPO loss of at most this guarantees R = 1; -inf where loss 0 means R = 0.  -> (B,)"""
    optimum = torch.as_tensor(ref_log_ratio, dtype=torch.float64) + 1 / (2 * tau)  # the log-ratio at loss 0
    return torch.where(optimum >= 0, optimum**2, -math.inf)


FLIPS = "kept", "lost", "fixed", "missed"  # right or wrong under the reference, then under the policy


def competition_ranks(scores):
    """1 = best; equals share the smallest rank: 3, 3, 1 -> 1, 1, 3.  n numbers or tuples -> list of n"""
    return [1 + sum(other > score for other in scores) for score in scores]


def rank_correlations(x, y):
    """Pearson's r, Spearman's rho, Kendall's tau-b of two lists of numbers; None if one is constant."""
    signs = [np.sign(np.subtract.outer(v, v)) for v in (x, y)]  # row sums: centred ranks, ties averaged
    if not all(sign.any() for sign in signs):
        return None
    vectors = (x - np.mean(x), y - np.mean(y)), [sign.sum(1) for sign in signs], signs
    return [float((a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum())) for a, b in vectors]


def bootstrap_interval(values, items, seed, resamples=1000):
    """95 % percentile interval of the mean of values (B,), drawing whole items (B,) again.  -> [low, high]"""
    item, rng = np.unique(items, return_inverse=True)[1], np.random.default_rng(seed)
    sums = np.stack([np.bincount(item, values), np.bincount(item)])
    draws = (sums[:, rng.integers(0, sums.shape[1], sums.shape[1])].sum(1) for _ in range(resamples))
    return np.quantile([total / count for total, count in draws], [0.025, 0.975]).tolist()


def calibration(alpha, p, bins=10, quantiles=False):
    """Distances of probabilities p from shares alpha, (B,) each; the first three of any positive numbers.

    -> mean (p - alpha)^2, mean |log p - log alpha|, |difference of means|, expected calibration error
    """
    alpha, p = (np.maximum(np.asarray(x, float), 1e-300) for x in (alpha, p))
    edges = np.linspace(0, 1, bins + 1) if not quantiles else np.quantile(p, np.linspace(0, 1, bins + 1))
    gaps = np.bincount(np.searchsorted(edges[1:-1], p), p - alpha)  # sum in each bin
    return [float(x) for x in (np.mean((p - alpha) ** 2), np.mean(abs(np.log(p / alpha))),
                               abs(np.mean(p) - np.mean(alpha)), abs(gaps).sum() / len(p))]


def load_items(name, args):
    """Data -> [{"prompt", "responses": n, "ranks": n, 1 = best, "share": of votes for the first or None}]."""
    def draw(rows):  # the same ones as in the released code
        index = np.random.default_rng(0).choice(len(rows), min(args.sample, len(rows)), replace=False)
        return [rows[i] for i in index] if 0 < args.sample < len(rows) else rows
    hub = name == "se" or "/" in name and not Path(name).exists()
    rows = hub_rows(name, args.split) if hub else read_rows(Path(name)) if Path(name).is_file() else []
    if not rows or {"completions", "answers", "preference", "human_ref_A"}.isdisjoint(rows[0]):
        rows = load_pairs(name, args.split, pairs=False)
    kept, dropped = [], Counter()
    try:
        for prompt, responses, scores, votes in judged(draw(rows) if args.legacy_votes else rows, args.lists):
            k, scores = args.smoothing * (votes == "counts"), np.array(scores, float)  # shares: alpha itself
            reason = ("fewer than two" if len(responses) < 2 else "a score is missing"
                      if len(scores) != len(responses) or not np.isfinite(scores).all() else
                      "no votes, or below 0" if votes and (scores.min() < 0 or not scores.any()) else
                      "empty response" if not all(words(response).strip() for response in responses) else "")
            dropped.update([reason] if reason else [])
            kept += [] if reason else [dict(
                prompt=prompt, responses=responses, ranks=competition_ranks(scores.tolist()),
                share=(scores[0] + k) / (sum(scores) + 2 * k) if votes else None)]
    except (KeyError, TypeError, ValueError) as error:
        raise SystemExit(f"{name}: a row is not what its columns promise ({error!r}); see --help") from None
    report(f"{name}: items", len(kept), dropped)
    return kept if args.legacy_votes else draw(kept)


def judged(rows, lists):
    """(prompt, responses, scores (more is better), "counts" or "shares" if of votes) of rows of any kind."""
    polls, posts = defaultdict(lambda: [0, 0]), defaultdict(dict)
    for row in rows:
        if "preference" in row:  # Alpaca Farm: a row is a vote, 1 or 2
            polls[row["instruction"], row["output_1"], row["output_2"]][[1, 2].index(row["preference"])] += 1
        elif "human_ref_A" in row:  # SHP: a row is two answers to a post; of equal scores the later is better
            posts[row["post_id"], row["history"]].update({
                row["human_ref_" + k]: (row["score_" + k], row["created_at_utc_" + k]) for k in "AB"})
        elif "completions" in row or "answers" in row:  # UltraFeedback, StackExchange
            found = row.get("completions", row.get("answers"))
            scores = [one.get("overall_score", one.get("pm_score")) for one in found]
            texts = [one.get("response", one.get("text")) for one in found]
            yield row.get("instruction", row.get("question")), texts, scores, None
        elif "rejected" not in row or lists and "responses" in row:
            scores = row.get("scores") or row.get("rewards") or [-rank for rank in row.get("ranks") or ()]
            yield row["prompt"], row["responses"], scores, None
        else:
            p, votes = row.get("p_chosen"), row.get("votes")
            scores, kind = (votes or (1, 0), votes and "counts") if p is None else ((p, 1 - p), "shares")
            yield row["prompt"], [row["chosen"], row["rejected"]], [*scores], kind
    yield from ((prompt, pair, votes, "counts") for (prompt, *pair), votes in polls.items())
    yield from ((prompt, [*found], [*found.values()], None) for (_, prompt), found in posts.items())


def encode(tokenizer, item, args, limit):
    """An item -> a packed row for each distinct token prompt (rarely a second), or the reason to drop it."""
    chat = args.chat_template and isinstance(item["prompt"], str)
    prompt, rows = [dict(role="user", content=item["prompt"])] if chat else item["prompt"], {}
    texts = row_texts(tokenizer, {"prompt": prompt, "responses": item["responses"]})
    if isinstance(texts, str):
        return texts
    bos = [] if args.no_bos or tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    for j, response in enumerate(texts[1:]):
        spaced = isinstance(prompt, list) or texts[0][-1:].isspace() or response[0].isspace()
        whole = texts[0] + (args.separator if args.separator != "auto" else "" if spaced else " ") + response
        tokens = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        ids, n = bos + tokens["input_ids"], len(bos)  # a token that straddles the boundary is the response's
        n += sum(end <= len(texts[0]) for _, end in tokens["offset_mapping"])
        if not 0 < n < min(limit, len(ids)):
            return "empty prompt" if n == 0 else "empty response" if n < limit else "prompt fills the context"
        cut, ids = len(ids) > limit, (ids + [tokenizer.eos_token_id] * args.append_eos)[:limit]
        if args.legacy_window:
            n, ids = 1, ids[:len(bos) + len(ids) - n]
        row = rows.setdefault(tuple(ids[:n]), dict(prompt_ids=ids[:n], responses=[], at=[]))
        row["responses"].append(ids[n:])
        row["at"].append((j, cut))
    return list(rows.values())


def score(name, items, out, args):
    """All responses under model `name` -> {item: [record of each response]}; none depends on its batch.

    The file of records is named after all they depend on: a killed run goes on, a new analysis has no pass.
    """
    world, source, model, dropped = dist.get_world_size(), model_folder(name), None, Counter()
    require((source / "config.json").is_file(), f"{source}: no config.json, so not a model (or an adapter)")
    files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(source.iterdir())]
    key = json.dumps([args.max_length, args.separator, args.no_bos, args.append_eos, args.chat_template,
                      args.legacy_window, args.dtype, items, files])
    path = out / f"records-{hashlib.sha256(key.encode()).hexdigest()[:16]}.jsonl"
    done, tokenizer = on_rank0(lambda: read_records(path), f"{path} damaged, delete it"), load_tokenizer(name)
    limit = args.max_length or getattr(AutoConfig.from_pretrained(source), "max_position_embeddings", 1024)
    for start in progress(range(0, len(items), 512)):
        rows, mine, parts = [], {}, [None] * world
        for i, item in enumerate(items[start:start + 512], start):
            missing = any((i, j) not in done for j in range(len(item["responses"])))
            found = encode(tokenizer, item, args, limit) if missing else []
            rows += [dict(row, item=i) for row in found if isinstance(row, dict)]
            dropped.update([found] if isinstance(found, str) else [])
        model = model or rows and load_model(name, args.dtype)
        rows += rows[:1] * (world - len(rows))  # every process needs one
        for batch in pack_pairs(rows, args.tokens_per_microbatch, dist.get_rank(), world) if rows else ():
            logps, owner = token_logps(model, batch).double(), batch["owner"].to(model.device)
            sums = logps.new_zeros(batch["responses"]).index_add(0, owner, logps)
            at = [(row, j, cut) for row in batch["rows"] for j, cut in row["at"]]
            for (row, j, cut), logp, n in zip(at, sums.tolist(), batch["counts"].tolist()):
                mine[row["item"], j] = dict(item=row["item"], response=j, logp=logp, tokens=n,
                                            prompt_tokens=len(row["prompt_ids"]), cut=cut)
        dist.all_gather_object(parts, mine)
        done |= (new := {at: record for part in parts for at, record in part.items() if at not in done})
        text = "".join(json.dumps(new[at]) + "\n" for at in sorted(new))
        on_rank0(lambda text=text: open(path, "a").write(text), f"{path}: cannot be written")
    dropped["log-prob is not finite"] = len({i for i, j in done if not math.isfinite(done[i, j]["logp"])})
    found = {i: [done.get((i, j)) for j in range(len(item["responses"]))] for i, item in enumerate(items)}
    found = {i: all_n for i, all_n in found.items() if all(r and math.isfinite(r["logp"]) for r in all_n)}
    cut = sum(record["cut"] for all_n in found.values() for record in all_n)
    report(f"{name}: items scored", len(found), +dropped, f"; responses cut {cut}")
    if args.dtype == "bfloat16" and (near := [i for i, records in found.items() if near_tie(records)]):
        exact = score(name, [items[i] for i in near], out, replace(args, dtype="float32"))
        found |= {near[k]: records for k, records in exact.items()}
    return found


def near_tie(records):
    """Whether bfloat16 (whose rounding moves a text's mean by 0.005 nats) may have decided its ranking."""
    pairs = [*combinations([(r["logp"], r["tokens"]) for r in records], 2)]
    return any(abs(a / n - b / m) < 0.01 or abs(a - b) < 0.01 * max(n, m) for (a, n), (b, m) in pairs)


def read_records(path):
    """The records of a file by (item, response), a line torn by a kill is cut off."""
    lines = path.read_bytes().splitlines(True) if path.exists() else []
    if lines and not lines[-1].endswith(b"\n"):
        path.write_bytes(b"".join(lines := lines[:-1]))
    done = {(record["item"], record["response"]): record for record in map(json.loads, reversed(lines))}
    if len(done) < len(lines):
        print(f"{path}: {len(lines) - len(done)} duplicate records are ignored")
    return done


def measure(items, records, args):
    """All numbers of a model; item, alpha, delta = log pi(y_w|x)/pi(y_l|x) are of the pairs without a tie."""
    rows = [(i, items[i]["share"], r_b - r_a, a["logp"], b["logp"], a["tokens"], b["tokens"])
            for i, found in sorted(records.items())
            for (r_a, a), (r_b, b) in combinations(zip(items[i]["ranks"], found), 2)]
    item, share, better, *rest = np.array(rows, float).reshape(-1, 7).T  # no share is nan
    alpha = np.where(np.isnan(share), 0.5 + np.sign(better) * (args.proportion - 0.5), share)
    logps, tokens, strict, side = np.array(rest[:2]), np.array(rest[2:]), alpha != 0.5, np.sign(alpha - 0.5)
    require(strict.any(), f"{len(rows)} pairs, every pair is a tie: there is nothing to rank")
    lists = [(items[i]["ranks"], *np.array([(r["logp"], r["tokens"]) for r in found]).T)
             for i, found in records.items() if len(found) > 2]
    out = dict(items=len(records), pairs=int(strict.sum()), ties=int((~strict).sum()), lists=len(lists),
               item=item[strict], alpha=0.5 + abs(alpha[strict] - 0.5), chance=0.5,
               label=np.where(np.isnan(share), 1, 0.5 + abs(alpha - 0.5))[strict],
               shorter=(side * (tokens[0] - tokens[1]) < 0)[strict].mean())
    for form, scores in ("R", logps), ("R~", logps / tokens):
        delta = side * (scores[0] - scores[1])  # y_w, the majority's choice (Def. 2.1), over y_l
        right = ranking_accuracy(delta, 0)[strict]
        out[form], out[form + " interval"] = right.mean(), bootstrap_interval(right, item[strict], args.seed)
        out[form + " delta"], out[form + " model ties"] = delta[strict], int((delta == 0)[strict].sum())
        near = abs(np.subtract(*(scores if form == "R" else np.exp(scores)))) < 0.01  # all pi(y|x) are near
        out[form + " Eq. 14"] = np.where(strict, delta > 0, near).mean()
        ratio = np.log(logps[0] / logps[1]) if args.legacy_quotient and form == "R" else side * delta
        legacy = args.epsilon, args.legacy_epsilon, args.legacy_dead_zone
        out[form + "*"] = [[idealized_ranking_accuracy(ratio[strict], alpha[strict], beta, gamma, *legacy)
                            .mean().item() for beta in args.betas] for gamma in (1.0, *args.gammas)]
        if lists:  # of n > 2; for pairs every correlation is 2 R - 1
            own = [competition_ranks(logp / (n if form == "R~" else 1)) for _, logp, n in lists]
            exact = np.array([1.0 * (ranks == model) for (ranks, *_), model in zip(lists, own)])  # Eq. 11, 12
            out[form + " exact"] = exact.mean()
            out[form + " exact interval"] = bootstrap_interval(exact, range(len(exact)), args.seed)
            rho = [r for (ranks, *_), model in zip(lists, own) if (r := rank_correlations(ranks, model))]
            out[form + " correlations"] = np.mean(rho or [[0] * 3], 0).tolist()
            out["chance exact"] = np.mean([(len({*r}) == len(r)) / math.factorial(len(r)) for r, *_ in lists])
            out["shorter exact"] = np.mean([competition_ranks(-n) == ranks for ranks, _, n in lists])
    return out


def named(line):
    """Data and model of a line, at most the last two parts of their paths."""
    return ": ".join("/".join(Path(line[name]).parts[-2:])[-24:] for name in ("data", "model"))


def show(lines, args):
    """Print the tables of one data set, in percent, and what Theorem 4.1 says before any training."""
    (line, *_), beta, gamma, reach = lines, args.beta, args.gamma, -math.log(math.expm1(0.01)) / args.beta
    limit, c, order = reach / gamma if gamma else math.inf, line["c"], np.argsort(line["c"])
    print(f"\n{line['data']}: {line['items']} items, {line['pairs']} pairs and {line['ties']} ties\n"
          f"reference right (c <= 0): {np.mean(c <= 0):.1%}, surely at a loss below log 2 (Prop. 2.6)\n"
          f"beta = {beta}, gamma = {gamma}: {np.mean(c > limit):.1%} need a loss below 0.01 to flip (c > "
          f"{limit:.1f}), none with gamma <= {reach / max(c.max(), 1e-9):.3g}\nIPO, tau = beta: for "
          f"{(ipo_threshold(-c, beta) < 0).double().mean():.1%} even loss 0 is a wrong ranking (Prop. A.7)")
    for title, k in ("hardest", order[:-4:-1]), ("easiest", order[:3]), ("to flip", order[c[order] > 0][:3]):
        found = zip(line["item"][k], c[k], loss_threshold(c[k], beta, gamma))
        print(f"{title:8}" + ", ".join(f"item {i:.0f} (c {x:.1f}, loss <= {y:.3g})" for i, x, y in found))
    for form in "R*", "R~*":
        print(f"\n{form}, gamma down, beta across:" +
              "".join(f"{x:>8}" for x in (*args.betas, "min", "median", "max")))
        for gamma, v in zip((1.0, *args.gammas), line[form]):
            print(f"{gamma:28}" + "".join(f"{100 * x:8.1f}" for x in (*v, min(v), np.median(v), max(v))))
    head = "R low high R~ low high chance short. R*own MSE ECE lost fixed /wrong Eq.14 R~".split()
    print("\n" + " " * 50 + "".join(f"{h:>7}" for h in head) + "   (exact: then r, rho, tau of R and R~)")
    for line in lines:
        for kind in [kind for kind in ("", " exact") if "R" + kind in line]:
            row = [x for f in ("R" + kind, "R~" + kind) for x in (line[f], *line[f + " interval"])]
            row += [line["chance" + kind], line["shorter" + kind]] + ([
                *line["R correlations"], *line["R~ correlations"]] if kind else [
                line["R* own"], *line["calibration"][::3], *line["flips"][1:3],
                line["flips"][2] / max(sum(line["flips"][2:]), 1e-9), line["R Eq. 14"], line["R~ Eq. 14"]])
            print(f"{named(line) + kind:50}" + "".join(f"{100 * x:7.1f}" for x in row))


def plot(out):
    """From metrics.jsonl: ranking.png (Fig. 1 over Table 1) and, of each policy, flips.png (Fig. 2 and 3)."""
    from matplotlib.figure import Figure
    rows = [json.loads(line) for line in open(out / "metrics.jsonl")]
    where = "tiny world, not the paper's" if {row["data"] for row in rows} == {"tiny"} else "see config.json"
    dots = Figure(figsize=(10, 2.5 + len(rows) / 2), layout="constrained").subplots()
    for y, row in enumerate(rows):
        for form, color, dy in ("R", "C0", -0.12), ("R~", "C1", 0.12):
            (low, high), value, ideal = row[form + " interval"], row[form], row[form + "*"][0]
            dots.plot([min(ideal), np.median(ideal), max(ideal)], [y + dy] * 3, "|-", color=color, alpha=0.5,
                      label=f"{form}*: min, median, max over beta" * (y == 0))
            dots.errorbar(value, y + dy, xerr=[[value - low], [high - value]], fmt="o", color=color,
                          label=f"{form}, 95 % interval" * (y == 0))
        dots.plot(row["R* own"], y - 0.12, "D", color="C0", mfc="w", label="R* at its own beta" * (y == 0))
        dots.plot(row["shorter"], y, "kx", label="shorter wins" * (y == 0))
    dots.axvline(0.5, color="k", lw=0.5)
    dots.set(xlabel="share of pairs ranked right", yticks=range(len(rows)), ylim=(len(rows) - 0.5, -0.5),
             yticklabels=[named(row) for row in rows],
             title=f"Ranking accuracy as in Fig. 1, idealised as in Table 1: {where}")
    dots.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    dots.figure.savefig(out / "figures" / "ranking.png", dpi=110)
    if not (policies := [row for row in rows if row["model"] != row["reference"]]):
        return
    figure = Figure(figsize=(3.3 * len(policies), 6.5), layout="constrained")
    axes = figure.subplots(2, len(policies), squeeze=False)
    for (top, bottom), row in zip(axes.T, policies):
        steps, *shares = zip(*row["curve"])
        top.stackplot(steps, shares, labels=FLIPS, colors=["C2", "C1", "C0", "C3"], alpha=0.7)
        top.set(title=named(row), ylabel="share of pairs", ylim=(0, 1), xlabel="optimiser step")
        if len(steps) == 2:
            top.set(xticks=steps, xticklabels=["before", "after"], xlabel="training")
        c, delta = np.array(row["c"]), np.array(row["R delta"])
        loss = loss_threshold(delta + row["gamma"] * c, row["beta"]).numpy()
        for right, color, label in (delta >= 0, "C0", "ranked right"), (delta < 0, "C3", "ranked wrong"):
            bottom.scatter(c[right], loss[right], 8, color, label=label, alpha=0.6)
        c.sort()
        bottom.plot(c, loss_threshold(c, row["beta"], row["gamma"]), "k--", label="Theorem 4.1")
        bottom.set(xlabel="c = log pi_ref(y_l)/pi_ref(y_w), nats", ylabel="loss, nats", yscale="log")
    for axis in axes[:, 0]:
        axis.legend(fontsize=8, loc="lower left")
    figure.suptitle(f"As Fig. 2 (held-out pairs)\nand Fig. 3 (scored pairs)\n({where})", fontsize=9)
    figure.savefig(out / "figures" / "flips.png", dpi=110)


def main(args):
    require(args.betas and all(beta > 0 for beta in (args.beta, *args.betas)), "--beta, --betas: above 0")
    require(0 < args.epsilon < 0.5 < args.proportion < 1, "--epsilon: in (0, 0.5); --proportion: in (0.5, 1)")
    require(args.sample >= 0 and args.smoothing >= 0, "--sample, --smoothing: not below 0")
    setup(args.seed)
    out, lines = start_run(args, "ranking_accuracy"), []
    (out / "figures").mkdir(exist_ok=True)
    runs = [str(model.parent) for name in ("sft", "dpo", "cal_dpo", "dpo_gamma")
            for model in sorted(Path("results", name).glob("**/model"))
            if json.loads((model.parent / "config.json").read_text()).get("data") == "tiny"]
    models = [*filter(None, [args.ref_model]), *(args.model or ("tiny", *runs))]
    flags = {name: json.loads(f.read_text()) for name in models if (f := Path(name, "config.json")).is_file()}
    for data in args.data:
        items = load_items(data, args)
        scored = {name: score(name, items, out, args) for name in models}
        shared = sorted(set.intersection(*map(set, scored.values())))  # all models on the same items
        if dist.get_rank() > 0:
            continue
        new = [measure(items, {i: scored[name][i] for i in shared}, args) for name in scored]
        c, alpha, ideal = -new[0]["R delta"], new[0]["alpha"], {form: new[0][form] for form in ("R*", "R~*")}
        for name, line in zip(scored, new):
            beta, gamma = (flags.get(name, {}).get(k, getattr(args, k)) for k in ("beta", "gamma"))
            ideal["R* own"] = idealized_ranking_accuracy(-c, alpha, beta, gamma).mean().item()
            p = torch.sigmoid(torch.as_tensor(beta * (line["R delta"] + gamma * c)))  # BT: y_w beats y_l
            p, label = (np.concatenate([x, 1 - x]) for x in (p, line["label"]))  # as either of two responses
            four = [np.mean(((c <= 0) == a) & ((line["R delta"] >= 0) == b)) for a in (1, 0) for b in (1, 0)]
            run = Path(name, "metrics.jsonl")
            steps = [json.loads(x) for x in open(run)] if run.is_file() else []
            curve = [[x["step"], *(x["eval_" + k] for k in FLIPS)] for x in steps if "eval_kept" in x]
            line.update(ideal, data=data, model=name, reference=models[0], beta=beta, gamma=gamma, c=c,
                        flips=four, calibration=calibration(label, p),
                        curve=curve or [[0, np.mean(c <= 0), 0, 0, np.mean(c > 0)], [1, *four]])
        show(new, args)
        lines += new
    if lines:
        (out / "metrics.jsonl").write_text("".join(json.dumps(x, default=list) + "\n" for x in lines))
        plot(out)
    return lines


if __name__ == "__main__":
    main(args)
