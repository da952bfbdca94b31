"""SFT, DPO, Cal-DPO and DPO^gamma from one start, judged by the true reward of the tiny world.

    python studies/compare_preferences.py            ten minutes of one core
    python studies/compare_preferences.py --quick    two minutes: one seed, a third of the updates

A number in the table is the mean ± standard deviation of three seeds. Finished runs are kept.
Writes results/compare/ (with --quick results/compare-quick/): the runs, table.md, and in figures/

    rewards.png   as Figs. 1 and 3 of Cal-DPO (https://arxiv.org/abs/2412.14516): log-ratios of
                  chosen and rejected responses over training, every method on the same axis
    training.png  as Figs. 4 and 9 of Chen et al. (https://arxiv.org/abs/2405.19534): win rate over
                  the start beside ranking accuracy, and the true reward, over training
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "methods")]


@dataclass
class Args:
    seeds: tuple[int, ...] = (0, 1, 2)  # of training and sampling; a run of each method for each
    samples: int = 4  # responses per test prompt at the end, at temperature 1
    prompts: int = 0  # only this many test prompts, the first ones; 0: all
    watched: int = 128  # test prompts, one response each, whose rewards are seen over training
    max_steps: int = 0  # optimiser steps of each run; 0: an epoch
    quick: bool = False  # one seed, 20 steps, one response a prompt: two minutes
    out: str = ""  # folder of the runs, the table and the figures; empty: results/compare[-quick]


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
from common import save_figure, say_claim, verdict, wilson, write  # processes

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
    # At each evaluation:
    steps: list
    chosen: list  # mean log pi/pi_ref of held-out chosen responses, nats
    rejected: list  # the same of rejected ones
    accuracy: list  # ranking accuracy of held-out pairs; a tie counts half
    win_rate: list  # over the start, of the watched prompts; a tie is half a win
    reward: list  # mean true reward of the watched prompts' responses


class Watch:
    """A method's evaluate(), which at each evaluation also samples from the policy.

    rewards: for each evaluation the true rewards of the responses, one to each of the rows.
    """

    def __init__(self, evaluate, rows, tokenizer, seed):
        self.evaluate = evaluate
        self.rows = rows
        self.tokenizer = tokenizer
        self.seed = seed
        self.rewards = []

    def __call__(self, model, *arguments):
        found = sample(model, self.tokenizer, self.rows, 1, self.seed)
        self.rewards.append(rewards_of(found).tolist())
        return self.evaluate(model, *arguments)


def module_and_options(name):
    """The module of one of METHODS, and the options that make it that method."""
    if name == "DPO, beta 0.1":
        return dpo, dict(beta=0.1)
    if name == "Cal-DPO, beta 0.1":
        return cal_dpo, dict(beta=0.1)
    if name == "Cal-DPO, beta 0.001":
        return cal_dpo, dict(beta=0.001)
    if name == "DPO^0, beta 0.1":
        return dpo_gamma, dict(beta=0.1, gamma=(0.0,))
    if name == "DPO^2, beta 0.1":
        return dpo_gamma, dict(beta=0.1, gamma=(2.0,))
    raise ValueError(f"unknown method {name!r}")


def train_once(folder, name, rows, **options):
    """Train one of METHODS, unless its run in the folder is finished -> rewards over training"""
    watched = folder / "watched.json"
    if (folder / "model").is_dir() and watched.is_file():
        return json.loads(watched.read_text())

    # The method runs as it does alone, but that its evaluations sample, too.
    module, own = module_and_options(name)
    watch = Watch(module.evaluate, rows, load_tokenizer(options["model"]), options["seed"])
    module.evaluate = watch
    try:
        module.main(module.Args(out=str(folder), overwrite=True, **own, **options))
    finally:
        module.evaluate = watch.evaluate
    write(watched, watch.rewards)
    return watch.rewards


def sample_of(folder, rows, copies, seed):
    """`sample` of the model in a folder."""
    return sample(load_model(str(folder)), load_tokenizer(str(folder)), rows, copies, seed)


@torch.no_grad()
def sample(model, tokenizer, rows, copies, seed):
    """Responses of a model, `copies` to each prompt: rows with their token ids and true reward."""
    # A response depends on its own row of uniforms only, not on the batch it is drawn in.
    generator = torch.Generator().manual_seed(seed)
    uniforms = torch.rand(len(rows) * copies, 64, generator=generator).to(model.device)
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
        logps[batch["index"]] = response_logps(model, batch)[0].cpu()
    return logps


def rewards_of(rows):
    """The true rewards of sampled rows.  (N,)"""
    return np.array([row["reward"] for row in rows])


def log_ratios(held_out, side):
    """Mean log pi/pi_ref of a side's responses at each evaluation; the first one is of pi_ref."""
    logps = [record[f"eval_logps/{side}"] for record in held_out]
    return [x - logps[0] for x in logps]


def win_rates(rewards, base_rewards):
    """Share of responses with a larger true reward than the start's; a tie is half a win.

    (N,) each, or (evaluations, N) and (N,).
    """
    better = np.mean(rewards > base_rewards, axis=-1)
    return better + np.mean(rewards == base_rewards, axis=-1) / 2


def judge(folder, start, rows, base_rewards, watched, args, seed):
    """Sample from a trained policy, and compare it with its start.  Returns an Outcome.

    base_rewards: of the start's responses to the rows.  watched: true rewards over training, of
    which the first are the start's own.
    """
    held_out = [r for r in read_rows(folder / "metrics.jsonl") if "eval_loss" in r]
    chosen = log_ratios(held_out, "chosen")
    rejected = log_ratios(held_out, "rejected")

    # The same uniforms as the start's, so that the comparison is paired.
    drawn = sample_of(folder, rows, args.samples, seed)
    rewards = rewards_of(drawn)
    kl = (score(folder, drawn) - score(start, drawn)).mean().item()
    watched = np.array(watched)

    # What the table and the figures show.
    accuracy = [record["eval_ranking_accuracy"] for record in held_out]
    win_rate = win_rates(rewards, base_rewards)
    numbers = [rewards.mean(), win_rate, chosen[-1], rejected[-1], accuracy[-1], kl]
    return Outcome(
        numbers=numbers,
        steps=[record["step"] for record in held_out],
        chosen=chosen,
        rejected=rejected,
        accuracy=accuracy,
        win_rate=win_rates(watched, watched[0]).tolist(),
        reward=watched.mean(1).tolist(),
    )


def run_seed(args, seed):
    """Train and judge everything with one seed: {name: Outcome}, SFT first."""
    # The start of all methods, and the true reward of its responses to the test prompts.
    start = Path(args.out, f"sft-{seed}")
    if not (start / "model").is_dir():
        options = dict(model="tiny", lr=1e-4, seed=seed, max_steps=args.max_steps)
        sft.main(sft.Args(out=str(start), overwrite=True, **options))
    test = load_pairs("tiny", "test")
    rows = tokenize_pairs(test, load_tokenizer(str(start)))[: args.prompts or None]
    for row in rows:
        row["prompt"] = test[row["row"]]["prompt"]
    base_rewards = rewards_of(sample_of(start, rows, args.samples, seed))

    # The methods, each from that start.
    outcomes = {"SFT (the start)": None}  # so that its row of the table is the first
    for name in METHODS:
        folder = Path(args.out, f"{name.replace(', beta ', '-')}-{seed}")
        options = dict(model=str(start), seed=seed, max_steps=args.max_steps)
        watched = train_once(folder, name, rows[: args.watched], **options)
        outcomes[name] = judge(folder, start, rows, base_rewards, watched, args, seed)

    # All methods start from the same policy, whose numbers are those of any method's step 0.
    first = outcomes[name]
    numbers = [base_rewards.mean(), 0.5, 0.0, 0.0, first.accuracy[0], 0.0]
    outcomes["SFT (the start)"] = Outcome(numbers, [], [], [], [], [], [])
    return outcomes


def setting_of(args):
    """What every caption says."""
    text = "the built-in tiny world, not the papers' setting"
    if args.quick:
        text += "; --quick: one seed, 20 steps"
    return text


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
            cell = f"{mean:.3f}"
            if len(outcomes) > 1:
                cell += f" ± {sd:.3f}"
            cells.append(cell)
        lines.append(f"| {' | '.join(cells)} |")
        if numbers.mean(0)[COLUMNS.index("chosen log-ratio")] > 0:  # a claim of the Cal-DPO paper
            risen.append(name)

    # And what the rows are.
    lines.append("")
    lines.append(
        f"{setting_of(args)}; samples a prompt: {args.samples}; KL and log-ratios to SFT in nats; "
        f"mean ± sd over seeds {args.seeds}; the chosen log-ratio ends above 0 under "
        f"{', '.join(risen) or 'no method'}."
    )
    return lines


def plot_rewards(args, outcomes):
    """figures/rewards.png: log-ratios of chosen and rejected responses, a line for each seed."""
    from matplotlib.figure import Figure

    figure = Figure((3 * len(METHODS) + 1, 4), layout="constrained")
    caption = "Does training raise the chosen responses, or only lower the rejected ones?  Held-out"
    figure.suptitle(f"{caption} pairs, a line a seed; {setting_of(args)}", size=9)
    axes = figure.subplots(1, len(METHODS), sharey=True)
    for axis, name in zip(axes, METHODS):
        ends = []
        for of_seed in outcomes:
            outcome = of_seed[name]
            axis.plot(outcome.steps, outcome.chosen, "C0.-", label="chosen")
            axis.plot(outcome.steps, outcome.rejected, "C1.-", label="rejected")
            ends.append(outcome.chosen[-1])
        axis.axhline(0, color="k", lw=0.8, label="0: as at the start")
        axis.set_title(f"{name}\nchosen ends at {np.mean(ends):+.1f} nats", size=9)
        axis.set_xlabel("optimiser step")
    axes[0].set_ylabel("mean log pi/pi_ref of a response (nats)")
    handles, labels = axes[-1].get_legend_handles_labels()
    entries = dict(zip(labels, handles))
    axes[-1].legend(entries.values(), entries, fontsize=8)
    save_figure(figure, Path(args.out, "figures", "rewards.png"))


def draw_over_training(axis, outcomes, quantity):
    """A quantity of Outcome against the step: mean over seeds, and a band from least to largest."""
    for i, name in enumerate(METHODS):
        values = np.array([getattr(of_seed[name], quantity) for of_seed in outcomes])
        steps = outcomes[0][name].steps
        axis.plot(steps, values.mean(0), ".-", color=f"C{i}", label=name)
        axis.fill_between(steps, values.min(0), values.max(0), color=f"C{i}", alpha=0.15, lw=0)
    axis.set_xlabel("optimiser step")


def plot_training(args, outcomes):
    """figures/training.png: ranking accuracy, win rate and true reward, and the first two together.

    As Figs. 4 and 9 of Chen et al.
    """
    from matplotlib.figure import Figure

    figure = Figure((17, 4.4), layout="constrained")
    axes = figure.subplots(1, 4)
    draw_over_training(axes[0], outcomes, "accuracy")
    draw_over_training(axes[1], outcomes, "win_rate")
    draw_over_training(axes[2], outcomes, "reward")
    axes[0].axhline(0.5, color="k", lw=0.8)
    axes[1].axhline(0.5, color="k", lw=0.8, label="chance, or the start")
    start = np.mean([of_seed[METHODS[0]].reward[0] for of_seed in outcomes])
    axes[2].axhline(start, color="k", lw=0.8)
    axes[0].set_title("ranking accuracy: is chosen likelier than rejected?", size=9)
    axes[0].set_ylabel("share of held-out pairs")
    low, high = wilson(args.watched * len(outcomes) / 2, args.watched * len(outcomes))
    noise = f"95 % interval of a mean ± {(high - low) / 2:.2f}"
    axes[1].set_title(f"win rate: is a sample better than the start's?\n({noise})", size=9)
    axes[1].set_ylabel(f"share of {args.watched} prompts, by true reward")
    axes[2].set_title(f"true reward of the samples (line: {start:.2f}, the start)", size=9)
    axes[2].set_ylabel("mean true reward")

    # One against the other: do they rise together, and how long?
    accuracy = []
    win_rate = []
    for i, name in enumerate(METHODS):
        for of_seed in outcomes:
            outcome = of_seed[name]
            axes[3].plot(outcome.accuracy, outcome.win_rate, ".-", color=f"C{i}", lw=0.8)
            axes[3].plot(outcome.accuracy[-1], outcome.win_rate[-1], "o", color=f"C{i}", ms=7)
            accuracy += outcome.accuracy
            win_rate += outcome.win_rate
    r = correlation(accuracy, win_rate)
    axes[3].set_title(f"one against the other: correlation {r:+.2f}\n(large dots: the end)", size=9)
    axes[3].set_xlabel("ranking accuracy")
    axes[3].set_ylabel("win rate over the start")
    for axis in (axes[0], axes[1]):  # two shares: one axis
        axis.set_ylim(0, 1)
    band = "" if len(outcomes) == 1 else "; bands: least to largest of the seeds"
    figure.suptitle(f"Does a policy that ranks better also write better?  {setting_of(args)}{band}")
    handles, labels = axes[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8)
    save_figure(figure, Path(args.out, "figures", "training.png"))


def claim(accuracy, win_rate):
    """What Chen et al. say of ranking accuracy and win rate, and these runs -> two lines

    accuracy, win_rate: of each run at its end, (runs,) each.  The interval of their correlation is
    Fisher's; it needs four runs, and runs that differ.
    """
    paper = "win rate and ranking accuracy rise together while weights are near the start (Fig. 4)"
    r = correlation(accuracy, win_rate)
    low = high = math.nan
    if len(accuracy) > 3 and abs(r) < 1:
        half = 1.959964 / math.sqrt(len(accuracy) - 3)
        low = math.tanh(math.atanh(r) - half)
        high = math.tanh(math.atanh(r) + half)
    shown = f"{verdict(low, high)}: in the tiny world runs that rank more pairs right at their end "
    shown += f"win more over the start, correlation over {len(accuracy)} runs"
    return paper, f"{shown} ({r:+.2f} [{low:+.2f}, {high:+.2f}])"


def correlation(x, y):
    """Pearson's correlation; nan where one of the two is constant."""
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(np.corrcoef(x, y)[0, 1])


def main(args):
    # --quick is a set of smaller numbers.
    if args.quick:
        args.seeds = args.seeds[:1]
        args.samples = 1
        args.watched = 64
        args.max_steps = 20
    args.out = args.out or ("results/compare-quick" if args.quick else "results/compare")
    outcomes = []
    for seed in args.seeds:
        outcomes.append(run_seed(args, seed))

    # The table, the figures, and how it ends.
    lines = table(args, outcomes)
    print("\n".join(lines))
    write(Path(args.out, "table.md"), ("\n".join(lines) + "\n").encode())
    plot_rewards(args, outcomes)
    plot_training(args, outcomes)
    accuracy = []
    win_rate = []
    for of_seed in outcomes:
        for name in METHODS:
            numbers = of_seed[name].numbers
            accuracy.append(numbers[COLUMNS.index("ranking accuracy")])
            win_rate.append(numbers[COLUMNS.index("win rate over SFT")])
    say_claim(*claim(accuracy, win_rate), Path(args.out))


if __name__ == "__main__":
    main(args)
