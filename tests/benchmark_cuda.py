"""The rows of the benchmark that need a card: `python tests/benchmark.py --device cuda`.

    python tests/benchmark.py --device cuda                       all rows at 410m, 1.4b and 2.8b
    python tests/benchmark.py --device cuda --shapes 410m dpo_step score
    python tests/benchmark.py --device cuda --peer trl dpo_step   beside TRL, where it is installed

Pythia shapes with random weights, bf16 compute, 64 pairs a step with the lengths of HH.  Both sides
take turns on the same card; the first round (which compiles, captures and plans) is dropped.  The
useful FLOPs are those of the floor: each token once, a prompt once for its responses, the output
matrix for response tokens alone; MFU is their share of the peak of a bf16 matrix product of size
8,192 that is measured in the same run.  With the shape "mini" all of it runs in seconds, without a
card too (--device cpu), which tests it and measures nothing.
"""

import argparse
import gc
import importlib.util
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import dpo
import torch
import transformers
import twisted_smc
from benchmark import (
    SHAPES,
    CachedScores,
    V,
    half_even,
    hh_pairs,
    naive_logps,
    pythia_config,
    short_prompts,
)
from generate import respond, sampler
from transformers import GPTNeoXForCausalLM, PreTrainedTokenizerFast

import common
from common import clip_gradients, compile_layers, load_model, pack_pairs, response_logps

SHAPES.update({"410m": (1024, 24, 16), "1.4b": (2048, 24, 16), "2.8b": (2560, 32, 32)})
SHAPES["mini"] = (16, 2, 2)
BETA = 0.1


@dataclass
class Setting:
    """Where, and how much."""

    device: torch.device
    rounds: int
    pairs: int  # of an optimiser step
    tokens: int  # packed tokens a pass, as --tokens-per-microbatch
    padded: int  # pairs a pass of the naive form
    particles: int  # K of the SMC row
    T: int
    prompts: int  # of the generation row
    new: int  # tokens drawn after each of them
    peak: float  # FLOPs a second of the matrix product
    folder: Path  # of the models


# ---- measuring


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(function, device):
    """Wall time of a call, with all that it has started on the device."""
    synchronise(device)
    start = time.perf_counter()
    function()
    synchronise(device)
    return time.perf_counter() - start


def alternate(systems, rounds, device):
    """{name: function of the round} -> {name: seconds of each round but the first}"""
    found = {name: [] for name in systems}
    for i in range(rounds + 1):
        for name, function in systems.items():
            seconds = seconds_of(lambda function=function, i=i: function(i), device)
            if i > 0:
                found[name].append(seconds)
    return found


def median_ratio(slow, fast):
    """The median of the rounds' ratios, with their range, as text."""
    ratios = sorted(a / b for a, b in zip(slow, fast))
    return f"{statistics.median(ratios):.2f}x [{ratios[0]:.2f} .. {ratios[-1]:.2f}]"


def peak_memory(function, device):
    """GiB allocated at the peak of a call, all that was there before included; nan on a CPU."""
    if device.type != "cuda":
        function()
        return float("nan")
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    function()
    synchronise(device)
    return torch.cuda.max_memory_allocated(device) / 2**30


def matmul_peak(device, size, rounds=10):
    """FLOPs a second of a bf16 matrix product."""
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    seconds = [seconds_of(lambda: a @ a, device) for _ in range(rounds)]
    return 2 * size**3 / min(seconds)


def useful_flops(shape, rows):
    """FLOPs of one forward pass over rows of prompt and responses, at the floor."""
    width, layers, _ = SHAPES[shape]
    tokens = 0
    scored = 0
    attended = 0  # pairs of query and key
    for row in rows:
        p = len(row["prompt_ids"])
        tokens += p
        attended += p * (p + 1) // 2
        for response in row["responses"]:
            r = len(response)
            tokens += r
            scored += r
            attended += r * p + r * (r + 1) // 2
    body = 24 * layers * width**2 * tokens
    attention = 4 * layers * width * attended
    head = 2 * width * V * scored
    return body + attention + head


# ---- models


def compute_dtype(setting):
    """bf16 on a card; a CPU may have none."""
    return "bfloat16" if setting.device.type == "cuda" else "float32"


def saved_model(setting, shape, seed=0):
    """The folder of a model of that shape, written once: random weights in bf16.

    Its tokenizer knows "a", token 1, and the end of text, token 0.  seed 1 is the reference.
    """
    folder = setting.folder / f"{shape}-{seed}"
    if folder.exists():
        return str(folder)
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(seed)
    with setting.device:  # billions of random numbers take minutes on a CPU
        model = GPTNeoXForCausalLM(pythia_config(shape)).to(torch.bfloat16)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>").save_pretrained(folder)
    return str(folder)


def naive_model(setting, shape, dtype, seed=0):
    """The library's model on the device."""
    load = GPTNeoXForCausalLM.from_pretrained
    return load(saved_model(setting, shape, seed), dtype=dtype).to(setting.device)


# ---- a DPO step


def our_dpo_step(model, optimizer, rows, reference, tokens):
    """As in methods/dpo.py, with its reference from the cache -> loss"""
    total = 0.0
    for batch in pack_pairs(rows, tokens):
        logps = response_logps(model, batch)[0].view(-1, 2)
        chosen = common.to_device(reference[batch["index"]], logps.device)
        losses = dpo.dpo_loss(*logps.unbind(1), *chosen.unbind(1), BETA)
        (losses.sum() / len(rows)).backward()
        total += losses.detach().sum()
    clip_gradients(model, 10.0)
    optimizer.step()
    optimizer.zero_grad()
    return (total / len(rows)).item()


def naive_dpo_step(model, ref_model, optimizer, rows, size):
    """Padded rows, all logits, a live reference, `size` pairs a pass -> loss"""
    total = 0.0
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        device = model.device.type
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            with torch.no_grad():
                reference = naive_logps(ref_model, part).view(-1, 2)
            policy = naive_logps(model, part).view(-1, 2)
            losses = dpo.dpo_loss(*policy.unbind(1), *reference.unbind(1), BETA)
        (losses.sum() / len(rows)).backward()
        total += losses.detach().sum()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
    optimizer.step()
    optimizer.zero_grad()
    return (total / len(rows)).item()


@torch.no_grad()
def pair_logps(setting, shape, batches, seed):
    """(N, 2) log-probs for each batch of N rows, as the reference pass caches them."""
    model = load_model(saved_model(setting, shape, seed), compute_dtype(setting))
    found = []
    for rows in batches:
        logps = torch.zeros(len(rows), 2)
        for batch in pack_pairs(rows, setting.tokens):
            logps[batch["index"]] = response_logps(model, batch)[0].view(-1, 2).float().cpu()
        found.append(logps)
    return found


@dataclass
class Side:
    """What one side's steps took."""

    seconds: list  # of each round but the first
    losses: list  # of every round
    memory: float  # GiB at the peak of a step


def our_side(setting, shape, batches):
    """The steps of these files."""
    references = pair_logps(setting, shape, batches, seed=1)
    model = load_model(saved_model(setting, shape), compute_dtype(setting), train=True)
    compile_layers(model, True, steps=10**6)  # as a long run does
    optimizer = torch.optim.RMSprop(model.parameters(), lr=0.0)
    losses = []

    def step(i):
        loss = our_dpo_step(model, optimizer, batches[i], references[i], setting.tokens)
        losses.append(loss)

    # A layer is compiled for the first batch, and once more where sizes turn out to differ.
    step(0)
    step(1)
    losses.clear()
    seconds = alternate({"ours": step}, setting.rounds, setting.device)["ours"]
    return Side(seconds, losses, peak_memory(lambda: step(0), setting.device))


def naive_side(setting, shape, batches):
    """The steps of the definition: fp32 weights under autocast, and a second model."""
    model = naive_model(setting, shape, torch.float32).train()
    ref_model = naive_model(setting, shape, getattr(torch, compute_dtype(setting)), seed=1)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=0.0)
    losses = []

    def step(i):
        loss = naive_dpo_step(model, ref_model, optimizer, batches[i], setting.padded)
        losses.append(loss)

    seconds = alternate({"naive": step}, setting.rounds, setting.device)["naive"]
    return Side(seconds, losses, peak_memory(lambda: step(0), setting.device))


def dpo_step(setting, shape, peer=""):
    """Pairs a second, MFU and memory; one side after the other, as each fills the card."""
    # The rates are 0, so that the weights stay, and so do the losses.
    batches = [hh_pairs(setting.pairs, seed) for seed in range(setting.rounds + 1)]
    ours = our_side(setting, shape, batches)
    gc.collect()
    naive = naive_side(setting, shape, batches)
    gc.collect()

    # The table's row.
    flops = 3 * statistics.mean(useful_flops(shape, rows) for rows in batches[1:])
    own = statistics.median(ours.seconds)
    print(
        f"dpo_step   {shape}, {setting.pairs} pairs: ours {setting.pairs / own:.1f} pairs/s, "
        f"MFU {flops / own / setting.peak:.0%}, {ours.memory:.1f} GiB; naive "
        f"{setting.pairs / statistics.median(naive.seconds):.1f} pairs/s, "
        f"{naive.memory:.1f} GiB: {median_ratio(naive.seconds, ours.seconds)}; "
        f"losses differ by {difference(ours.losses, naive.losses):.0e}",
        flush=True,
    )
    if peer == "trl":
        trl_step(setting, shape, batches[0], own)


def difference(a, b):
    """The largest difference of two lists of losses."""
    return max(abs(x - y) for x, y in zip(a, b))


# ---- TRL, at its best settings


def trl_step(setting, shape, rows, own):
    """DPOTrainer: reference log-probs computed beforehand, rows by length, the best micro-batch."""
    if importlib.util.find_spec("trl") is None:
        print("dpo_step   TRL is not installed: no row of it", flush=True)
        return
    import datasets
    import trl

    # Rows of the same lengths as text, the longest first; and as ids, for our loss of them.
    by_length = sorted(rows, key=lambda row: -sum(map(len, row["responses"])))
    columns = {"prompt": [], "chosen": [], "rejected": []}
    as_ids = []
    for row in by_length:
        prompt = ["a"] * len(row["prompt_ids"])
        answers = [["a"] * (len(ids) - 1) for ids in row["responses"]]  # then the end of text
        columns["prompt"].append(" ".join(prompt))
        for side, answer in zip(("chosen", "rejected"), answers):
            columns[side].append(" " + " ".join(answer))
        responses = [[1] * len(answer) + [0] for answer in answers]
        as_ids.append(dict(prompt_ids=[1] * len(prompt), responses=responses))
    data = datasets.Dataset.from_dict(columns)
    policy = pair_logps(setting, shape, [as_ids], seed=0)[0]
    reference = pair_logps(setting, shape, [as_ids], seed=1)[0]
    our_loss = dpo.dpo_loss(*policy.unbind(1), *reference.unbind(1), BETA).mean().item()

    # Its best micro-batch.
    best = None
    for size in (setting.pairs // 8, setting.pairs // 4, setting.pairs // 2):
        if size == 0:
            continue
        model = naive_model(setting, shape, torch.float32)
        config = trl.DPOConfig(
            output_dir=str(setting.folder / "trl"),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=setting.pairs // size,
            bf16=setting.device.type == "cuda",
            use_cpu=setting.device.type == "cpu",
            precompute_ref_log_probs=True,
            beta=BETA,
            learning_rate=0.0,
            optim="adamw_torch_fused" if setting.device.type == "cuda" else "adamw_torch",
            gradient_checkpointing=False,
            max_length=512,
            max_steps=setting.rounds + 1,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        tokenizer = common.load_tokenizer(saved_model(setting, shape))
        clock = Clock(setting.device)
        trainer = trl.DPOTrainer(
            model=model,
            ref_model=naive_model(setting, shape, torch.float32, seed=1),
            args=config,
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[clock],
        )
        # In the order of the rows, which are sorted by length.
        trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(data)
        memory = peak_memory(trainer.train, setting.device)
        seconds = statistics.median(clock.seconds[1:] or clock.seconds)
        first = next(line["loss"] for line in trainer.state.log_history if "loss" in line)
        if best is None or seconds < best[0]:
            best = (seconds, size, memory, first)
        del model, trainer
        gc.collect()
    seconds, size, memory, first = best
    print(
        f"dpo_step   {shape}: TRL {trl.__version__} {setting.pairs / seconds:.1f} pairs/s with "
        f"micro-batch {size}, {memory:.1f} GiB: ours is {seconds / own:.2f}x as fast; "
        f"its first loss {float(first):.4f}, ours {our_loss:.4f}",
        flush=True,
    )


class Clock(transformers.TrainerCallback):
    """The seconds of each optimiser step of a trainer."""

    def __init__(self, device):
        self.device = device
        self.seconds = []

    def on_step_begin(self, *_, **__):
        synchronise(self.device)
        self.start = time.perf_counter()

    def on_step_end(self, *_, **__):
        synchronise(self.device)
        self.seconds.append(time.perf_counter() - self.start)


# ---- scoring, twisted SMC, generation


def score(setting, shape, peer=""):
    """The log-probs of responses without gradients."""
    rows = hh_pairs(4 * setting.pairs, 0)
    model = load_model(saved_model(setting, shape), compute_dtype(setting))

    @torch.no_grad()
    def ours(_):
        for batch in pack_pairs(rows, 2 * setting.tokens):
            response_logps(model, batch)

    @torch.no_grad()
    def naive(_):
        for start in range(0, len(rows), setting.padded):
            naive_logps(model, rows[start : start + setting.padded])

    found = alternate({"ours": ours, "naive": naive}, setting.rounds, setting.device)
    own = statistics.median(found["ours"])
    print(
        f"score      {shape}: {2 * len(rows) / own:.0f} responses/s, MFU "
        f"{useful_flops(shape, rows) / own / setting.peak:.0%}; against naive "
        f"{median_ratio(found['naive'], found['ours'])}",
        flush=True,
    )


def smc(setting, shape, peer=""):
    """Milliseconds a step with a linear twist, resampled at every step."""
    model = load_model(saved_model(setting, shape), compute_dtype(setting))
    width, _, _ = SHAPES[shape]
    weight = torch.randn(V, width, generator=torch.Generator().manual_seed(0))
    twist = (0.002 * weight).to(setting.device, model.dtype)
    prompt = list(range(3, 13))
    K, T = setting.particles, setting.T

    @torch.no_grad()
    def ours(i):
        torch.manual_seed(i)
        scores = CachedScores(model, twist, prompt, T, K)
        return twisted_smc.smc(scores, half_even, T, K, tau=1.0).log_Z

    found = alternate({"ours": ours}, setting.rounds, setting.device)["ours"]
    print(
        f"smc        {shape}, K {K}, T {T}: {1000 * statistics.median(found) / T:.2f} ms a step",
        flush=True,
    )


def generate(setting, shape, peer=""):
    """Tokens a second, plain and with top-p .9, against the library's batch."""
    model = load_model(saved_model(setting, shape), compute_dtype(setting))
    prompts = short_prompts(setting.prompts)
    n, new = len(prompts), setting.new
    ids = torch.tensor(prompts, device=setting.device)
    never = V + 1  # an end token that is never drawn, so that every row has its full length

    for name, top_p in (("plain", 1.0), ("top-p .9", 0.9)):
        how = sampler(top_p=top_p)

        def ours(i, how=how):
            generator = torch.Generator().manual_seed(i)
            uniforms = torch.rand(n, new, generator=generator, dtype=torch.float64)
            respond(model, prompts, uniforms.to(setting.device), how, [-1], V)

        def library(i, top_p=top_p):
            torch.manual_seed(i)
            settings = dict(do_sample=True, top_k=0, top_p=top_p, max_new_tokens=new)
            settings |= dict(pad_token_id=0, eos_token_id=never)
            model.generate(ids, attention_mask=torch.ones_like(ids), **settings)

        systems = {"ours": ours, "library": library}
        found = alternate(systems, setting.rounds, setting.device)
        print(
            f"generate   {shape}, {n} x {new} tokens, {name}: ours "
            f"{n * new / statistics.median(found['ours']):.0f} tokens/s, the library "
            f"{n * new / statistics.median(found['library']):.0f}: "
            f"{median_ratio(found['library'], found['ours'])}",
            flush=True,
        )


ROWS = {"dpo_step": dpo_step, "score": score, "smc": smc, "generate": generate}


def main(words):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", help=f"some of {', '.join(ROWS)}")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--shapes", nargs="+", default=("410m", "1.4b", "2.8b"), choices=SHAPES)
    parser.add_argument("--peer", default="", choices=("", "trl"))
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args(words)
    unknown = set(args.rows) - set(ROWS)
    common.require(not unknown, f"no row {' '.join(unknown)}: choose from {', '.join(ROWS)}")
    has_card = torch.cuda.is_available()
    common.require(has_card or args.device == "cpu", "--device cuda: no card is seen here")

    device = common.setup(0)
    sizes = dict(pairs=64, tokens=16384, padded=8, particles=1000, T=100, prompts=256, new=128)
    largest = 8192
    if list(args.shapes) == ["mini"]:
        sizes = dict(pairs=2, tokens=400, padded=1, particles=4, T=3, prompts=3, new=4)
        largest = 64
    name = "a CPU: nothing is measured"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    peak = matmul_peak(device, largest)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    today = time.strftime("%Y-%m-%d")
    print(f"{name}, {versions}, {today}; bf16 matrix product {peak / 1e12:.0f} TFLOP/s", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(device, args.rounds, **sizes, peak=peak, folder=Path(folder))
        for shape in args.shapes:
            for row in args.rows or ROWS:
                ROWS[row](setting, shape, args.peer)
                gc.collect()
