"""SFT, DPO, Cal-DPO and DPO^gamma from one start, judged by the true reward of the tiny world.

    python studies/compare_preferences.py        seven minutes of one core

Three seeds; a number in the table is their mean ± standard deviation. Finished runs are kept.
Writes results/compare/: the runs, table.md, and figures/rewards.png, which shows what Figs. 1 and 3
of Cal-DPO (https://arxiv.org/abs/2412.14516) show: the log-ratios of chosen and rejected responses.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "methods")]


@dataclass
class Args:
    seeds: tuple[int, ...] = (0, 1, 2)  # of training and sampling; a run of each method for each
    samples: int = 4  # responses per test prompt, at temperature 1
    prompts: int = 0  # only this many test prompts, the first ones; 0: all
    max_steps: int = 0  # optimiser steps of each run; 0: one pass over the training pairs
    out: str = "results/compare"  # folder of the runs, the table and the figure


if __name__ == "__main__":  # before torch is imported, so that --help answers at once
    args = tyro.cli(Args, description=__doc__)

import numpy as np
import torch

# isort: off
import sft  # the methods that are compared
import dpo
import cal_dpo
import dpo_gamma
from generate import respond, sampler  # and the one that samples from them
from common import response_logps  # log-probabilities
from common import pack_pairs, tokenize_pairs  # tokenization
from common import load_pairs, read_rows  # data
from common import load_model, load_tokenizer  # models
from common import tiny_reward  # the tiny world
from common import save_figure  # processes

# isort: on

METHODS = [
    "DPO, beta 0.1",
    "Cal-DPO, beta 0.1",
    "Cal-DPO, beta 0.001",
    "DPO^0, beta 0.1",
    "DPO^2, beta 0.1",
]
COLUMNS = [
    "true reward",
    "win rate over SFT",
    "chosen log-ratio",
    "rejected log-ratio",
    "ranking accuracy",
    "KL",
]


@dataclass
class Outcome:
    """What one run of one method came to."""

    numbers: list  # one for each of COLUMNS
    steps: list  # of the evaluations
    chosen: list  # mean log pi/pi_ref of held-out chosen responses, nats, at each of them
    rejected: list  # the same of rejected ones


def train(name, **options):
    """Train "SFT" or one of METHODS, at its default rate."""
    if name == "SFT":
        sft.main(sft.Args(**options))
    elif name == "DPO, beta 0.1":
        dpo.main(dpo.Args(beta=0.1, **options))
    elif name == "Cal-DPO, beta 0.1":
        cal_dpo.main(cal_dpo.Args(beta=0.1, **options))
    elif name == "Cal-DPO, beta 0.001":
        cal_dpo.main(cal_dpo.Args(beta=0.001, **options))
    elif name == "DPO^0, beta 0.1":
        dpo_gamma.main(dpo_gamma.Args(beta=0.1, gamma=(0.0,), **options))
    elif name == "DPO^2, beta 0.1":
        dpo_gamma.main(dpo_gamma.Args(beta=0.1, gamma=(2.0,), **options))
    else:
        raise ValueError(f"unknown method {name!r}")


def train_once(folder, name, **options):
    """Train unless the run in the folder is finished."""
    if not (folder / "model").is_dir():
        train(name, out=str(folder), overwrite=True, **options)


def sample(folder, rows, copies, seed):
    """Responses of a model, `copies` to each prompt: rows with their token ids and true reward."""
    model = load_model(str(folder))
    tokenizer = load_tokenizer(str(folder))

    # A response depends on its own row of uniforms only, not on the batch it is drawn in.
    generator = torch.Generator().manual_seed(seed)
    uniforms = torch.rand(len(rows) * copies, 64, generator=generator)
    repeated = []
    for row in rows:
        repeated += [row] * copies

    # In batches, each response with its true reward.
    found = []
    for i in range(0, len(repeated), 128):
        batch = repeated[i : i + 128]
        prompts = [row["prompt_ids"] for row in batch]
        vocabulary = len(tokenizer)
        draws = uniforms[i : i + 128]
        responses = respond(model, prompts, draws, sampler(), [tokenizer.eos_token_id], vocabulary)
        for row, response in zip(batch, responses):
            text = tokenizer.decode(response, skip_special_tokens=True)
            reward = tiny_reward(row["prompt"], text)
            found.append(dict(row, responses=[response], reward=reward))
    return found


@torch.no_grad()
def score(folder, rows):
    """log pi(response|prompt) of each row's one response, under the model in the folder.  (N,)"""
    model = load_model(str(folder))
    logps = torch.zeros(len(rows))
    for batch in pack_pairs(rows, 8192):
        logps[batch["index"]] = response_logps(model, batch)[0]
    return logps


def rewards_of(rows):
    """The true rewards of sampled rows.  (N,)"""
    return np.array([row["reward"] for row in rows])


def log_ratios(held_out, side):
    """Mean log pi/pi_ref of a side's responses at each evaluation; the first one is of pi_ref."""
    logps = [record[f"eval_logps/{side}"] for record in held_out]
    return [x - logps[0] for x in logps]


def judge(folder, start, rows, base_rewards, copies, seed):
    """Sample from a trained policy, and compare it with its start.  Returns an Outcome."""
    held_out = [r for r in read_rows(folder / "metrics.jsonl") if "eval_loss" in r]
    chosen = log_ratios(held_out, "chosen")
    rejected = log_ratios(held_out, "rejected")

    # The same uniforms as the start's, so that the comparison is paired; a tie is half a win.
    drawn = sample(folder, rows, copies, seed)
    rewards = rewards_of(drawn)
    win_rate = (rewards > base_rewards).mean() + (rewards == base_rewards).mean() / 2
    kl = (score(folder, drawn) - score(start, drawn)).mean().item()

    # What the table and the figure show.
    accuracy = held_out[-1]["eval_ranking_accuracy"]
    numbers = [rewards.mean(), win_rate, chosen[-1], rejected[-1], accuracy, kl]
    steps = [record["step"] for record in held_out]
    return Outcome(numbers, steps, chosen, rejected)


def run_seed(args, seed):
    """Train and judge everything with one seed: {name: Outcome}, SFT first."""
    # The start of all methods, and the true reward of its responses to the test prompts.
    start = Path(args.out, f"sft-{seed}")
    train_once(start, "SFT", seed=seed, max_steps=args.max_steps)
    test = load_pairs("tiny", "test")
    rows = tokenize_pairs(test, load_tokenizer(str(start)))[: args.prompts or None]
    for row in rows:
        row["prompt"] = test[row["row"]]["prompt"]
    base_rewards = rewards_of(sample(start, rows, args.samples, seed))

    # The methods, each from that start.
    outcomes = {"SFT (the start)": None}  # so that its row of the table is the first
    for name in METHODS:
        folder = Path(args.out, f"{name.replace(', beta ', '-')}-{seed}")
        train_once(folder, name, model=str(start), seed=seed, max_steps=args.max_steps)
        outcomes[name] = judge(folder, start, rows, base_rewards, args.samples, seed)

    # All methods start from the same policy, whose ranking accuracy is that of their step 0.
    first = read_rows(folder / "metrics.jsonl")[0]
    numbers = [base_rewards.mean(), 0.5, 0.0, 0.0, first["eval_ranking_accuracy"], 0.0]
    outcomes["SFT (the start)"] = Outcome(numbers, [], [], [])
    return outcomes


def table(args, outcomes):
    """The lines of table.md.  outcomes: a dictionary of run_seed for each seed."""
    # A row for each method: mean ± standard deviation over the seeds.
    lines = [" | ".join(["| method", *COLUMNS]) + " |"]
    lines.append("| --- " * (len(COLUMNS) + 1) + "|")
    risen = []
    for name in outcomes[0]:
        numbers = np.array([of_seed[name].numbers for of_seed in outcomes])
        cells = [name]
        for mean, sd in zip(numbers.mean(0), numbers.std(0)):
            cells.append(f"{mean:.3f} ± {sd:.3f}")
        lines.append(f"| {' | '.join(cells)} |")
        if numbers.mean(0)[COLUMNS.index("chosen log-ratio")] > 0:  # a claim of the Cal-DPO paper
            risen.append(name)

    # And what the rows are.
    lines.append("")
    lines.append(
        f"Tiny world, {args.samples} responses a prompt, KL and log-ratios to SFT in nats, mean ± "
        f"sd over seeds {args.seeds}; the chosen log-ratio ends above 0 under "
        f"{', '.join(risen) or 'no method'}."
    )
    return lines


def plot(args, outcomes):
    """figures/rewards.png: log-ratios of chosen and rejected responses, a line for each seed."""
    from matplotlib.figure import Figure

    figure = Figure((13, 4), layout="constrained")
    caption = "Tiny world, not the papers' setting; held-out chosen (blue), rejected (orange)"
    figure.suptitle(f"{caption}; a line a seed", size=9)
    for axis, name in zip(figure.subplots(1, 3, sharey=True), METHODS):
        for of_seed in outcomes:
            outcome = of_seed[name]
            axis.plot(outcome.steps, outcome.chosen, "C0.-")
            axis.plot(outcome.steps, outcome.rejected, "C1.-")
        axis.set_title(name)
        axis.set_xlabel("optimiser step")
        axis.set_ylabel("log pi/pi_ref (nats)")
    save_figure(figure, Path(args.out, "figures", "rewards.png"))


def main(args):
    outcomes = []
    for seed in args.seeds:
        outcomes.append(run_seed(args, seed))
    lines = table(args, outcomes)
    print("\n".join(lines))
    Path(args.out, "table.md").write_text("\n".join(lines) + "\n")
    plot(args, outcomes)


if __name__ == "__main__":
    main(args)
