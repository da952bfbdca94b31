"""Fig. 3 and Fig. 4 of Chen et al. 2024 (https://arxiv.org/abs/2405.19534), of a DPO^gamma sweep.

    python methods/dpo_gamma.py
    python studies/dpo_gamma_figures.py                  half a minute, reads results/dpo_gamma

Writes figures/ranking.png into the sweep's folder. A panel for each gamma shows the loss of each
held-out pair against c = log pi_ref(y_l|x)/pi_ref(y_w|x), and the line of Theorem 4.1, below which
a pair is ranked right. The last panel shows the ranking accuracy of every evaluation against the
squared distance of the weights from their start.
"""

import json
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "methods")]


@dataclass
class Args:
    sweep: str = "results/dpo_gamma"  # --out of dpo_gamma.py: the folder of one run, or of several


if __name__ == "__main__":  # before torch is imported, so that --help answers at once
    args = tyro.cli(Args, description=__doc__)

import dpo_gamma

# isort: off
from ranking_accuracy import loss_threshold  # Theorem 4.1
from common import subset, read_rows  # data
from common import load_model, load_tokenizer  # models
from common import require, save_figure, say, setting, setup  # processes
# isort: on


def finished_runs(sweep):
    """The folders of the sweep's runs that have a model, by gamma."""
    folders = []
    for config in [sweep / "config.json", *sweep.glob("gamma-*/config.json")]:
        if (config.parent / "model").is_dir():
            folders.append(config.parent)
    require(folders, f"{sweep}: no finished run of methods/dpo_gamma.py; give its --out")
    return sorted(folders, key=gamma_of)


def gamma_of(folder):
    """The gamma of the run in a folder."""
    return read_options(folder).gamma[0]


def read_options(folder):
    """The options of the run in a folder, as dpo_gamma.Args, whatever folder they name."""
    # config.json has further entries: versions, and the number of processes.
    config = json.loads((folder / "config.json").read_text())
    options = {}
    for field in fields(dpo_gamma.Args):
        options[field.name] = config[field.name]
    options["gamma"] = tuple(config["gamma"])
    options["out"] = str(folder)
    return dpo_gamma.Args(**options)


def score_pairs(options):
    """What dpo_gamma.py logs of each held-out pair, under the run's policy: tensors by name."""
    tokenizer = load_tokenizer(options.model)
    rows = dpo_gamma.load_rows(options, "test", tokenizer)
    rows = subset(rows, options.eval_pairs, seed=0)
    reference = dpo_gamma.score_reference(options, tokenizer, rows)
    model = load_model(options.out, options.dtype)
    return dpo_gamma.evaluate(model, rows, reference, options)


def plot_threshold(axis, pairs, options):
    """Fig. 3: the loss of each pair against c."""
    # A point for each pair.
    c = pairs["eval_c"].cpu()
    loss = pairs["eval_loss"].cpu()
    right = pairs["eval_ranking_accuracy"].cpu()
    for label, color, group in (("right", "C0", right > 0.5), ("wrong", "C3", right <= 0.5)):
        axis.scatter(c[group], loss[group], s=9, color=color, label=f"ranked {label}")

    # The line of Theorem 4.1: the loss at which a pair's two responses are equally likely.
    c = c.sort().values
    threshold = loss_threshold(c, options.beta, options.gamma[0])
    axis.plot(c, threshold, "k--", label="Theorem 4.1: right below it")
    below = (loss <= loss_threshold(pairs["eval_c"].cpu(), options.beta, options.gamma[0])).float()
    agree = ((below == right).float().mean()).item()
    axis.set_title(f"gamma {options.gamma[0]:g}: {agree:.0%} of pairs as the theorem says", size=9)
    axis.set_xlabel("c = log pi_ref(y_l)/pi_ref(y_w), nats")
    axis.set_ylabel("loss, nats")


def plot_distance(axis, folders):
    """Fig. 4: ranking accuracy against the squared distance, a line for each gamma."""
    for folder in folders:
        held_out = [r for r in read_rows(folder / "metrics.jsonl") if "eval_loss" in r]
        distance = [record["eval_distance"] for record in held_out]
        accuracy = [record["eval_ranking_accuracy"] for record in held_out]
        axis.plot(distance, accuracy, "o-", label=f"gamma {gamma_of(folder):g}")
    axis.set_title("does more training rank more pairs right?", size=9)
    axis.set_ylim(0, 1)
    axis.axhline(0.5, color="0.4", ls="--", lw=1, label="chance")
    axis.set_xlabel("squared distance of the weights from their start")
    axis.set_ylabel("ranking accuracy")
    axis.legend()


def main(args):
    from matplotlib.figure import Figure

    # A panel for each gamma (Fig. 3), and one for all (Fig. 4).
    setup(seed=0)  # the reference's log-probs are scored anew if they are not cached
    sweep = Path(args.sweep)
    folders = finished_runs(sweep)
    figure = Figure((4 * len(folders) + 4, 4), layout="constrained")
    axes = figure.subplots(1, len(folders) + 1)
    for axis, folder in zip(axes, folders):
        options = read_options(folder)
        plot_threshold(axis, score_pairs(options), options)
    plot_distance(axes[-1], folders)
    axes[0].legend(fontsize=8, loc="upper right")

    # The caption names the setting, which all runs of a sweep share.
    options = read_options(folders[0])
    title = "DPO^gamma, as Fig. 3 and 4 of Chen et al."
    figure.suptitle(f"{title}, beta {options.beta}, {setting(options)}", size=9)
    save_figure(figure, sweep / "figures" / "ranking.png")
    say(f"figure: {sweep / 'figures' / 'ranking.png'}")


if __name__ == "__main__":
    main(args)
