"""SFT, DPO, Cal-DPO and DPO^gamma from one start, three seeds, judged by the tiny world's true reward.

    python tests/compare_preferences.py        seven minutes of one core; finished runs are kept; ± is the sd over seeds

Writes results/compare/: runs, table.md, and figures/rewards.png as Figs. 1 and 3 of Cal-DPO (arXiv 2412.14516).
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("", "methods")]
import cal_dpo
import dpo
import dpo_gamma
import sft
from common import load_model, load_pairs, load_tokenizer, pack_pairs, read_rows, response_logps
from common import tiny_reward, tokenize_pairs
from generate import respond, sampler


@dataclass
class Args:
    seeds: tuple[int, ...] = (0, 1, 2)
    samples: int = 4  # responses per test prompt, at temperature 1
    out: str = "results/compare"


METHODS = {  # name: how to train it from the SFT run
    "DPO, beta 0.1": lambda **a: dpo.main(dpo.Args(**a)),
    "Cal-DPO, beta 0.1": lambda **a: cal_dpo.main(cal_dpo.Args(**a)),
    "Cal-DPO, beta 0.001": lambda **a: cal_dpo.main(cal_dpo.Args(beta=0.001, **a)),
    "DPO^0, beta 0.1": lambda **a: dpo_gamma.main(dpo_gamma.Args(gamma=(0.0,), **a)),
    "DPO^2, beta 0.1": lambda **a: dpo_gamma.main(dpo_gamma.Args(gamma=(2.0,), **a))}
COLUMNS = ("true reward", "win rate over SFT", "chosen log-ratio", "rejected log-ratio", "ranking accuracy", "KL")


def train(folder, main, **options):
    """The run in `folder`, trained now unless it is finished."""
    if not (folder / "model").is_dir():
        main(out=str(folder), overwrite=True, **options)
    return folder


def sample(folder, rows, copies, seed):
    """Responses of a model, `copies` to each prompt, as rows with their token ids and true rewards."""
    model, tokenizer = load_model(str(folder)), load_tokenizer(str(folder))
    uniforms = torch.rand(len(rows) * copies, 64, generator=torch.Generator().manual_seed(seed))
    found, rows = [], [row for row in rows for _ in range(copies)]
    for i in range(0, len(rows), 128):
        prompts = [row["prompt_ids"] for row in rows[i:i + 128]]
        ids = respond(model, prompts, uniforms[i:i + 128], sampler(), tokenizer.eos_token_id, len(tokenizer))
        for row, response in zip(rows[i:], ids):
            text = tokenizer.decode(response, skip_special_tokens=True)
            found.append(dict(row, responses=[response], reward=tiny_reward(row["prompt"], text)))
    return found


def scores(folder, rows):
    """log pi(response|prompt) of each row's response."""
    model, found = load_model(str(folder)), torch.zeros(len(rows))
    for batch in pack_pairs(rows, 8192):
        with torch.no_grad():
            found[batch["index"]] = response_logps(model, batch)[0]
    return found


def plot(args, curves):
    from matplotlib.figure import Figure
    figure = Figure((13, 4), layout="constrained")
    figure.suptitle("Tiny world, not the papers' setting; held-out chosen (blue), rejected (orange); a line a seed", size=9)
    for axis, name in zip(figure.subplots(1, 3, sharey=True), METHODS):
        for steps, chosen, rejected in curves[name]:
            axis.plot(steps, chosen, "C0.-", steps, rejected, "C1.-")
        axis.set(title=name, xlabel="optimiser step", ylabel="log pi/pi_ref (nats)")
    Path(args.out, "figures").mkdir(exist_ok=True)
    figure.savefig(Path(args.out, "figures", "rewards.png"), dpi=120)


def main(args):
    results, curves = {}, {}
    for seed in args.seeds:
        start = train(Path(args.out, f"sft-{seed}"), lambda **a: sft.main(sft.Args(**a)), seed=seed)
        encoded = tokenize_pairs(test := load_pairs("tiny", "test"), load_tokenizer(str(start)))
        rows = [row | {"prompt": test[row["row"]]["prompt"]} for row in encoded]
        base = np.array([row["reward"] for row in sample(start, rows, args.samples, seed)])
        for name, method in METHODS.items():
            folder = Path(args.out, f"{name.replace(', beta ', '-')}-{seed}")
            train(folder, method, model=str(start), seed=seed)
            held_out = [r for r in read_rows(folder / "metrics.jsonl") if "eval_loss" in r]
            chosen, rejected = ([r[f"eval_logps/{side}"] - held_out[0][f"eval_logps/{side}"] for r in held_out]
                                for side in ("chosen", "rejected"))
            curves.setdefault(name, []).append(([r["step"] for r in held_out], chosen, rejected))
            drawn = sample(folder, rows, args.samples, seed)
            rewards = np.array([row["reward"] for row in drawn])
            wins = (rewards > base).mean() + (rewards == base).mean() / 2
            kl = (scores(folder, drawn) - scores(start, drawn)).mean().item()
            results.setdefault("SFT (the start)", []).append(
                [base.mean(), 0.5, 0, 0, held_out[0]["eval_ranking_accuracy"], 0])
            results.setdefault(name, []).append(
                [rewards.mean(), wins, chosen[-1], rejected[-1], held_out[-1]["eval_ranking_accuracy"], kl])
    lines = [("method", *COLUMNS), ("---",) * (len(COLUMNS) + 1)]
    for name, values in results.items():
        lines.append([name, *(f"{m:.3f} ± {s:.3f}" for m, s in zip(np.mean(values, 0), np.std(values, 0)))])
    risen = [name for name, values in results.items() if np.mean(values, 0)[2] > 0]  # a claim of the Cal-DPO paper
    lines = [f"| {' | '.join(line)} |" for line in lines] + [
        "", f"Tiny world, {args.samples} responses a prompt, KL and log-ratios to SFT in nats, mean ± sd over seeds "
        f"{args.seeds}; the chosen log-ratio ends above 0 under {', '.join(risen) or 'no method'}."]
    print("\n".join(lines))
    Path(args.out, "table.md").write_text("\n".join(lines) + "\n")
    plot(args, curves)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
