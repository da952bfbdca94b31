"""DPO^gamma: Direct Preference Optimization with the reference to the power gamma.

Chen, Malladi, Zhang, Chen, Zhang, Ranganath, Cho 2024, https://arxiv.org/abs/2405.19534

The loss (Eq. 4); gamma = 1 is DPO, and gamma = 0 forgets the reference:

    L = -log sigmoid( beta [ log pi(y_w|x)/pi(y_l|x) - gamma log pi_ref(y_w|x)/pi_ref(y_l|x) ] )

    python methods/dpo_gamma.py                             tiny world, gamma 0, 1, 2, three minutes
    python methods/dpo_gamma.py --gamma 0 0.25 0.5 0.75 1   a sweep: one cached reference serves all
    torchrun --standalone --nproc-per-node 4 methods/dpo_gamma.py hh --model results/sft-hh

Presets: tiny (default) | hh: nine gammas, Pythia-2.8B on Anthropic HH, after an SFT.

A pair is ranked right if pi(y_w|x) > pi(y_l|x). That is so if and only if its loss is below
-log sigmoid(beta gamma c), where c = log pi_ref(y_l|x)/pi_ref(y_w|x). Theorem 4.1 has gamma = 1;
the step to any gamma is the same. The more the reference prefers the wrong response, the smaller
the loss must become.

Every evaluation logs, of held-out pairs, the ranking accuracy and the four shares of Fig. 2: pairs
that the reference ranks right and the policy right (kept) or wrong (lost), and pairs that the
reference ranks wrong and the policy right (fixed) or wrong (missed). It also logs the squared
distance of the weights from their start, for Fig. 4. --resume goes on with a whole sweep, and
studies/dpo_gamma_figures.py draws Fig. 3 and Fig. 4 of it.

Differs from the paper: a tie counts half here; its ranking accuracy has >=.
Differs from the released code: there this gamma is called --alpha, --gamma is unused, the default
loss is DPO, the learning rate decays, and the norm of the weights is logged, not of their change.
"""

import math
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro


@dataclass
class Args:
    beta: float = 0.1  # strength of the KL constraint, Def. 2.2; 0.1 fits Fig. 3
    gamma: tuple[float, ...] = (0.0, 1.0, 2.0)  # weight of the reference, Eq. 4; a run for each

    model: str = "tiny"  # initial policy: tiny, a local or run folder, or a hub id
    ref_model: str = ""  # frozen reference; empty: the initial policy
    data: str = "tiny"  # tiny, hh, tldr, shp, se, ultrafeedback, a file, a folder or a hub id
    # Held-out pairs: a file, a folder or a hub id; empty: the test split of --data, which is the
    # last 5 % of a file alone, or the last 10 of fewer than 200 rows.
    test_data: str = ""
    max_length: int = 512  # tokens of prompt and response together
    max_prompt_length: int = 256  # tokens a prompt is cut to if the row exceeds max_length

    lr: float = 5e-5  # of RMSprop, after warm-up
    batch_size: int | None = None  # pairs per optimiser step of all processes; None: 32, or fewer
    epochs: int = 1  # passes over the training pairs
    max_steps: int = 0  # optimiser steps; 0: as many as the epochs hold
    warmup_steps: int | None = None  # of linear warm-up, then lr is constant; None: 10 at most
    max_grad_norm: float = 10.0  # longer gradients are cut to this norm
    tokens_per_microbatch: int = 8192  # memory knob: packed tokens per forward pass and process
    gradient_checkpointing: bool = False  # recompute in backward: less memory, a third more time
    reshard_after_forward: bool = True  # several GPUs; no: gathered once, 2 bytes a weight more
    compile: bool = True  # decoder layers, on a GPU, in bfloat16, in runs of 300 steps and more
    dtype: Literal["float32", "bfloat16"] = "float32"  # of compute; weights and sums are float32
    seed: int = 0  # of the order of the data

    eval_every: int = 320  # training pairs between evaluations, rounded down to whole steps
    eval_pairs: int = 256  # held-out pairs, the same at every evaluation
    save_every: int = 0  # training pairs between checkpoints; 0: none
    out: str = "results/dpo_gamma"  # run folder
    resume: bool = False  # continue the run in the run folder from its newest good checkpoint
    overwrite: bool = False  # delete the run that is in the run folder
    plan: bool = False  # print what the run needs of memory, and leave; needs no weights, no GPU


PYTHIA = Args(  # App. D.1 and the released README
    model="EleutherAI/pythia-2.8b",  # give the SFT run: --model results/sft-hh
    lr=5e-7,  # the least of the four searched; the paper does not say which won
    batch_size=64,  # fits the 12,500 steps of Fig. 2
    epochs=5,
    warmup_steps=150,
    max_grad_norm=1.0,
    dtype="bfloat16",
    max_length=512,
    max_prompt_length=256,
    tokens_per_microbatch=16384,
    eval_every=32000,
    eval_pairs=1000,
    save_every=160000,
)
NINE_GAMMAS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)  # Fig. 4
PRESETS = {
    "tiny": Args(),
    "hh": replace(PYTHIA, data="hh", gamma=NINE_GAMMAS, out="results/dpo_gamma-hh"),
}

if __name__ == "__main__":  # before torch is imported, so that --help answers at once
    preset = "tiny"
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        preset = sys.argv.pop(1)
    if preset not in PRESETS:
        raise SystemExit(f"no preset {preset!r}: choose one of {', '.join(PRESETS)}")
    args = tyro.cli(Args, default=PRESETS[preset], description=__doc__)

import torch
import torch.distributed as dist
import torch.nn.functional as F

# common.py is beside this file, or one folder up.
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
# isort: off
from common import pair_metrics, reference_logps, response_logps  # log-probabilities
from common import pack_pairs, tokenize_pairs  # tokenization
from common import batch_order, load_split, plan_steps, subset  # data
from common import CUDA, clip_gradients, compile_layers, load_model, load_tokenizer  # models
from common import plan_memory, save_model  # models
from common import check_ranges, log, merge, progress, setup  # processes
from common import speed, start_run, to_device  # processes
from common import require  # a condition, else a line and exit code 1
from common import load_checkpoint, save_checkpoint, stop_requested, stop_unless_finite  # processes
from common import plot_curves, print_evaluations, say_claim, setting, share_shown  # processes
# isort: on


def dpo_gamma_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, gamma):
    """The loss of each pair, Eq. 4.  Four (B,) summed log-probs -> (B,) losses."""
    chosen_reward = beta * (chosen_logps - gamma * ref_chosen_logps)  # reference pi_ref^gamma
    rejected_reward = beta * (rejected_logps - gamma * ref_rejected_logps)
    margin = chosen_reward - rejected_reward  # beta log Z(x) cancels
    return -F.logsigmoid(margin)  # Eq. 4


def load_rows(args, split, tokenizer):
    """The pairs of the split "train" or "test" as token ids."""
    pairs = load_split(args.data, args.test_data, split)
    return tokenize_pairs(pairs, tokenizer, args.max_length, args.max_prompt_length)


def score_reference(args, tokenizer, rows):
    """The reference's log-probs of chosen and rejected, (N, 2); computed once, cached on disk."""
    name = args.ref_model or args.model
    return reference_logps(name, tokenizer, rows, args.dtype, args.tokens_per_microbatch)


def pair_losses(model, batch, reference, args):
    """The losses of a micro-batch, with gradient, and what is logged of each of its pairs.

    reference: (N, 2) log-probs of the N rows that were packed; batch["index"] says which B of them
    this batch holds.  Returns (B,) losses and a dictionary of (B,) tensors.
    """
    # The responses of a batch are chosen, rejected, chosen, rejected, ...
    policy = response_logps(model, batch)[0].view(-1, 2)
    chosen_logps, rejected_logps = policy.unbind(1)
    reference = to_device(reference[batch["index"]], policy.device)
    ref_chosen_logps, ref_rejected_logps = reference.unbind(1)

    # The loss, and the metrics that all preference methods have.
    logps = (chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    losses = dpo_gamma_loss(*logps, args.beta, args.gamma[0])  # a run has one, see runs_of_sweep
    metrics = {"loss": losses.detach()}
    metrics.update(pair_metrics(*logps, args.beta))  # rewards as in DPO, whatever gamma is
    metrics["c"] = ref_rejected_logps - ref_chosen_logps  # of Theorem 4.1
    return losses, metrics


@torch.no_grad()
def evaluate(model, rows, reference, args):
    """What is logged of this process's share of the held-out pairs: a dictionary of tensors."""
    metrics = []
    for batch in pack_pairs(rows, args.tokens_per_microbatch):
        _, pairs = pair_losses(model, batch, reference, args)
        metrics.append(pairs)
    return merge(metrics, prefix="eval_")


def copy_weights(model):
    """The weights as they are now: a list of tensors, sharded as the model is."""
    return [weight.detach().clone() for weight in model.parameters()]


@torch.no_grad()
def squared_distance(model, weights):
    """The squared distance of the model's weights from these, which are in the same order."""
    distance = sum((new - old).square().sum() for new, old in zip(model.parameters(), weights))
    # Of several processes each has a part of the sum.
    return distance.full_tensor() if hasattr(distance, "full_tensor") else distance


PANELS = [  # of the figure: title, unit, metrics
    (
        "implicit rewards: does chosen end above rejected?",
        "beta log pi/pi_ref, nats",
        ["rewards/chosen", "rewards/rejected"],
    ),
    (
        "how often is chosen ahead of rejected?",
        "share of pairs",
        ["rewards/accuracies", "ranking_accuracy"],
    ),
    ("loss: does the held-out loss fall too?", "nats per pair", ["loss"]),
    ("ranking of the reference, and now", "share of pairs", ["kept", "lost", "fixed", "missed"]),
]
REFERENCES = [  # lines across the figure: number of the panel, value, what it is
    (1, 0.5, "chance"),
    (2, math.log(2), "log 2: no preference learned"),
]


def claim(record, n, data):
    """What the paper says, and what the last record of n held-out pairs shows -> two lines"""
    paper = "of the pairs that the reference ranks wrong, training turns few around (Fig. 2)"
    missed, fixed = record["eval_missed"] * n, record["eval_fixed"] * n
    return paper, share_shown(
        "most of the held-out pairs that the reference ranks wrong stay wrong",
        data,
        missed,
        round(missed + fixed),
    )


def finish(model, tokenizer, record, n, args, out):
    """The figure, table, claim and model of a run whose last record is of n held-out pairs.

    Returns the records of its metrics.jsonl.
    """
    paper, shown = claim(record, n, args.data)
    caption = (
        f"{shown}\nDPO^{args.gamma[0]:g} (Chen et al. 2024), beta {args.beta}: {setting(args)}"
    )
    history = plot_curves(out, PANELS, caption, REFERENCES)
    print_evaluations(history)
    say_claim(paper, shown, out)
    save_model(model, tokenizer, out / "model")
    return history


RANGES = {"gamma": (-1e9, 1e9)}  # of this method's own options: least and largest value


def check(args):
    """Refuse what no run could use, before anything is loaded."""
    check_ranges(args, RANGES)
    names = {f"{gamma:g}" for gamma in args.gamma}
    require(len(names) == len(args.gamma), "--gamma: two of them are the same; each has a folder")


def train_one(args):
    """One run: args.gamma holds one number.  Returns the records of its metrics.jsonl."""
    setup(args.seed)

    # Data: token ids of the pairs that the optimiser steps will use, and of the held-out pairs.
    tokenizer = load_tokenizer(args.model)
    train = load_rows(args, "train", tokenizer)
    test = load_rows(args, "test", tokenizer)
    args, steps = plan_steps(args, len(train), len(test))
    train = subset(train, steps * args.batch_size, args.seed)
    test = subset(test, args.eval_pairs, seed=0)
    plan_memory(args, train, steps, state=2)  # of RMSprop, and the first weights

    # The run folder: one that holds a run, or a flag out of range, ends the program here.
    out = start_run(args, "dpo_gamma")

    # Reference: it never changes, and neither do its log-probs.
    ref_train = score_reference(args, tokenizer, train)
    ref_test = score_reference(args, tokenizer, test)

    # Model: the policy, its optimiser, and where a resumed run goes on.
    model = load_model(args.model, args.dtype, train=True, reshard=args.reshard_after_forward)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    first_weights = copy_weights(model)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=args.lr, foreach=CUDA)
    start = 0
    clipped = 0  # steps whose gradient was clipped so far
    if args.resume:
        start, state = load_checkpoint(out, model, optimizer)
        clipped = state.get("clipped", 0)
    eval_steps = max(1, args.eval_every // args.batch_size)
    save_steps = max(1, args.save_every // args.batch_size)
    compile_layers(model, args.compile, steps - start)

    for step in progress(range(start, steps)):
        # Evaluate: before the first step, and whenever it is due.
        if step % eval_steps == 0:
            log(
                out,
                step,
                **evaluate(model, test, ref_test, args),
                eval_distance=squared_distance(model, first_weights),
            )

        # Step: the gradients of the micro-batches add up to that of the mean over all pairs.
        started = time.time()
        index = batch_order(len(train), args.batch_size, step, args.seed)
        rows = [train[i] for i in index]
        reference = ref_train[index]  # (len(rows), 2)
        metrics = []
        for batch in pack_pairs(rows, args.tokens_per_microbatch):
            losses, pairs = pair_losses(model, batch, reference, args)
            # FSDP takes the mean over the processes; the loss is the mean over all their pairs.
            (losses.sum() * dist.get_world_size() / len(rows)).backward()
            metrics.append(pairs)
        grad_norm = clip_gradients(model, args.max_grad_norm)
        clipped += (grad_norm > args.max_grad_norm).double()

        # The learning rate warms up linearly, then it is constant.
        optimizer.param_groups[0]["lr"] = args.lr * min(1, (step + 1) / (args.warmup_steps + 1))
        optimizer.step()
        optimizer.zero_grad()

        # Log: means over all processes, of values from before the update.
        status = {"grad_norm": grad_norm, "clipped_steps": clipped / (step + 1)}
        status["lr"] = optimizer.param_groups[0]["lr"]
        last = log(out, step, **merge(metrics), **status, **speed(rows, started))
        stop_unless_finite(last["grad_norm"], step, rows, out)

        # Save: a checkpoint when it is due, and when the run is asked to stop.
        stop = stop_requested()
        if stop or (args.save_every > 0 and (step + 1) % save_steps == 0):
            save_checkpoint(out, step + 1, model, optimizer, clipped=float(clipped))
        if stop:
            raise SystemExit(143)  # after SIGTERM or Ctrl-C; --resume continues

    # After the last step: figure, table, claim, and the model, which marks the run as finished.
    last = log(
        out,
        steps,
        **evaluate(model, test, ref_test, args),
        eval_distance=squared_distance(model, first_weights),
    )
    return finish(model, tokenizer, last, len(test), args, out)


def runs_of_sweep(args):
    """The options of a run for each gamma.  A resumed sweep leaves out what is finished."""
    runs = []
    for gamma in args.gamma:
        folder = Path(args.out)
        if len(args.gamma) > 1:
            folder = folder / f"gamma-{gamma:g}"
        run = replace(args, gamma=(gamma,), out=str(folder))

        # Of a sweep that was stopped, finished runs are skipped and those not begun start afresh.
        # Two cases are left to start_run, which has a line for each: a first run that never began,
        # and a sweep that is all finished, of which the last run is kept.
        finished = args.resume and (folder / "model").is_dir()
        if gamma != args.gamma[0]:
            run.resume = args.resume and (folder / "config.json").is_file()
        if not finished or gamma == args.gamma[-1]:
            runs.append(run)
    return runs


def main(args):
    check(args)
    records = []
    for run in runs_of_sweep(args):
        records += train_one(run)
    return records


if __name__ == "__main__":
    main(args)
