"""What the methods share: processes, models, the tiny world, data, tokenization, log-probabilities, sampling.

Copy this file beside a method to carry the method away.  A plain `python` run is a process group of one, so
the same lines serve a laptop and torchrun.  Names ending in logps are log-probabilities in nats, summed over
a response's tokens; (R,) is one value per response of a packed batch: chosen, rejected, chosen, ...
"""

import atexit
import csv
import dataclasses
import datetime
import fcntl
import functools
import gzip
import hashlib
import heapq
import html
import inspect
import io
import itertools
import json
import logging
import math
import os
import platform
import random
import re
import resource
import shutil
import signal
import types
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import transformers
from huggingface_hub import snapshot_download
from torch.distributed.checkpoint import state_dict as dsd
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (
    AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer,
    GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast
)
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

# ---- processes

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if CUDA else torch.device("cpu")
RANDOM = (torch, torch.cuda) if CUDA else (torch,)  # generators that a checkpoint holds
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "preference-methods"
signals = []  # SIGTERM and SIGINT received so far
transformers.logging.disable_progress_bar()
transformers.logging.set_verbosity_error()  # load_model itself refuses missing weights


def setup(seed, timeout=1800):
    """Join the process group (a plain `python` run is a group of one); seed all ranks alike -> device."""
    if not dist.is_initialized():
        if CUDA:
            torch.cuda.set_device(DEVICE)
        alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        patience = datetime.timedelta(seconds=timeout)  # with a rank that keeps the others waiting
        dist.init_process_group("cpu:gloo,cuda:nccl" if CUDA else "gloo", timeout=patience, **alone)
        atexit.register(leave)
    for number in (signal.SIGTERM, signal.SIGINT):  # the third quits: torchrun can make two of one Ctrl-C
        signal.signal(number, lambda n, _: os._exit(128 + n) if len(signals) > 1 else signals.append(n))
    torch.manual_seed(seed)
    return DEVICE


def leave():
    """End the group at exit, all ranks together: gloo's threads may abort a process that skips either."""
    if dist.is_initialized():
        try:
            dist.monitored_barrier(timeout=datetime.timedelta(seconds=30))
        except RuntimeError:
            pass  # another rank is gone: torchrun ends the job
        dist.destroy_process_group()


def stop_requested():
    """True on all ranks once any rank got SIGTERM or SIGINT: save, then exit with code 143."""
    dist.all_reduce(flag := torch.tensor(len(signals)), dist.ReduceOp.MAX)
    return flag.item() > 0


def require(condition, message):
    if not condition:
        raise SystemExit(message)


def say(line):
    """Print on rank 0."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(line, flush=True)


def on_rank0(function, problem):
    """function() of rank 0 -> its result on all ranks, or all exit with code 1 and a line: problem (why)."""
    first, answer = not dist.is_initialized() or dist.get_rank() == 0, [None, None]
    if first:
        try:
            answer[0] = function()
        except SystemExit as error:
            answer[1] = error.code
        except Exception as error:  # a full disk alone comes as OSError, RuntimeError or SafetensorError
            answer[1] = f"{problem} ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"
    if dist.is_initialized():
        dist.broadcast_object_list(answer)
    require(answer[1] is None, answer[1] if first or answer[1] == 0 else 1)
    return answer[0]


def write(path, data):
    with open(f"{path}.tmp", "wb") as file:
        file.write(data if isinstance(data, bytes) else json.dumps(data, indent=1).encode())
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)  # never half-written


def start_run(args, method):
    """Make args.out (default results/<method>) with its config.json, or exit if it is in use -> its Path."""
    flags = json.loads(json.dumps(dataclasses.asdict(args), default=str))
    out = Path(flags.get("out") or f"results/{method}")
    least = dict(batch_size=1, epochs=1, tokens_per_microbatch=1, eval_pairs=1, eval_examples=1, seed=0, lr=0,
                 samples=1, max_grad_norm=1e-6, warmup_steps=0, max_steps=0, eval_every=0, save_every=0)
    for k in sorted(least.keys() & flags.keys()):
        require(least[k] <= flags[k] < math.inf, f"--{k.replace('_', '-')} {flags[k]}: at least {least[k]}")
    free = "resume overwrite out max_steps epochs eval_every save_every tokens_per_microbatch".split()

    def prepare():
        config = out / "config.json"
        old = json.loads(config.read_bytes()) if config.is_file() else None
        if flags.get("resume"):
            require(old, f"{out}: no config.json, so there is no run to resume; start it without --resume")
            new = [f"{k} {old.get(k)} -> {v}" for k, v in flags.items() if k not in free and old.get(k) != v]
            require(not new, f"{out}: --resume with new flags {', '.join(new)}; restore them or change --out")
            if (out / "model").is_dir():
                print(f"{out}: this run is finished; its model is in {out / 'model'}")
                raise SystemExit(0)
        elif out.exists() and any(out.iterdir()):
            require(flags.get("overwrite"), f"{out}: holds a run: --resume goes on, --overwrite deletes it")
            require(old, f"{out}: no config.json, so --overwrite deletes nothing here; choose another --out")
            (out / "metrics.jsonl").unlink(missing_ok=True)
            for folder in [*out.glob("step-*"), out / "model", out / "figures"]:
                shutil.rmtree(folder, ignore_errors=True)
        out.mkdir(parents=True, exist_ok=True)
        world = {"python": platform.python_version(), "world_size": dist.get_world_size()}
        write(config, flags | world | {"torch": torch.__version__, "transformers": transformers.__version__})

    on_rank0(prepare, f"{out}: cannot hold a run; choose another --out")
    return out


def log(out, step, /, **values):
    """Append {"step": step, name: mean over the items of all ranks} to out/metrics.jsonl and return it.

    values: floats, or tensors of this rank's items (any number, even none).  The first six are printed.
    """
    items = [torch.as_tensor(v, dtype=torch.float64, device=DEVICE).detach() for v in values.values()]
    totals = torch.stack([torch.stack([v.sum(), v.new_tensor(v.numel())]) for v in items]).cpu()
    dist.all_reduce(totals)
    line = {"step": step} | dict(zip(values, (totals[:, 0] / totals[:, 1]).tolist()))
    if dist.get_rank() == 0:
        shown = (f"{name} {line[name]:<#9.4g}" for name in [*values][:6])
        with tqdm.external_write_mode():  # above the bar, if there is one
            print(f"step {step:6d}", *shown, sep="  ", flush=True)
        with open(out / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
    return line


def progress(steps):
    """Go through the steps, with a bar on rank 0 where stderr is a terminal."""
    return tqdm(steps, disable=True if dist.get_rank() else None)


def checkpoints(out):
    return sorted(out.glob("step-*[0-9]"), key=lambda folder: int(folder.name[5:]))


def hashes(folder):
    files = [path for path in sorted(folder.iterdir()) if path.name != "COMPLETE.json"]
    return {path.name: hashlib.file_digest(path.open("rb"), "sha256").hexdigest() for path in files}


def save_checkpoint(out, step, model, optimizer, keep=2, **extra):
    """Write out/step-<step> (`step` steps are done) or nothing, then delete all but the newest `keep`.

    Holds model, optimizer, all random states and rank 0's `extra`: numbers, strings, tensors, lists, dicts.
    """
    folder, tmp, failure = out / f"step-{step}", out / f"step-{step}.tmp", None
    rng = [None] * dist.get_world_size()
    dist.all_gather_object(rng, [module.get_rng_state() for module in RANDOM])
    states = dsd.get_state_dict(model, optimizer)
    try:
        dcp.save(dict(zip(("model_state_dict", "optim_state_dict"), states)), checkpoint_id=tmp)
    except dcp.api.CheckpointException as error:  # a BaseException; all ranks get it when one cannot write
        failure = next(iter(error.failures.values()))[0]

    def finish():
        if failure:
            raise failure
        torch.save({"rng": rng, "extra": extra}, tmp / "extra.pt")
        write(tmp / "COMPLETE.json", {"step": step, "world_size": len(rng), "sha256": hashes(tmp)})
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(tmp, folder)
        past = [old for old in checkpoints(out) if int(old.name[5:]) <= step]
        for old in {*out.glob("step-*")} - {*past[-keep:]}:  # later ones are damaged; the run resumed before
            shutil.rmtree(old)

    on_rank0(finish, f"{tmp}: checkpoint not saved; make room, then --resume from the one before")


def load_checkpoint(out, model, optimizer):
    """Restore the newest undamaged checkpoint, of any number of processes -> (step, extra); (0, {}) if none.

    Random states return if the number of processes is the same; metrics.jsonl loses its lines from `step` on.
    """

    def choose():
        step, found, metrics = 0, None, out / "metrics.jsonl"
        for unfinished in out.glob("step-*.tmp"):
            shutil.rmtree(unfinished)
        for folder in reversed(checkpoints(out)):
            manifest = folder / "COMPLETE.json"
            text = manifest.read_text("latin-1") if manifest.is_file() else ""
            wrote = dict(re.findall(r'"(\S+)": "(\w{64})"', text))
            wrong = {*wrote.items()} ^ {*hashes(folder).items()} if wrote else {(manifest.name, "")}
            if not wrong:
                step, found = int(folder.name[5:]), folder
                break
            print(f"skip {folder.name}: damaged {sorted(dict(wrong))}", flush=True)
        require(found or not checkpoints(out), f"{out}: no checkpoint is undamaged; start anew: --overwrite")
        lines = metrics.read_bytes().splitlines(keepends=True) if metrics.is_file() else []
        if lines:  # the last one may be torn
            write(metrics, b"".join(x for x in lines if x.endswith(b"\n") and json.loads(x)["step"] < step))
        return step, found

    step, folder = on_rank0(choose, f"{out}: cannot resume")
    if not folder:
        return 0, {}
    state = dict(zip(("model_state_dict", "optim_state_dict"), dsd.get_state_dict(model, optimizer)))
    dcp.load(state, checkpoint_id=folder)
    dsd.set_state_dict(model, optimizer, **state)
    saved = torch.load(folder / "extra.pt")
    if len(saved["rng"]) == dist.get_world_size():
        for module, rng in zip(RANDOM, saved["rng"][dist.get_rank()]):
            module.set_rng_state(rng)
    return step, saved["extra"]


def save_model(model, tokenizer, path):
    """Write a model, sharded or not, as a Hugging Face folder for transformers 4 and 5 and vLLM."""
    options = dsd.StateDictOptions(full_state_dict=True, cpu_offload=True)
    state, tmp = dsd.get_model_state_dict(model, options=options), Path(f"{path}.tmp")  # all ranks take part

    def export():
        shutil.rmtree(tmp, ignore_errors=True)
        model.save_pretrained(tmp, state_dict=state)
        tokenizer.save_pretrained(tmp)
        config = tmp / "tokenizer_config.json"  # transformers 4 does not know the class name of 5
        config.write_text(config.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
        shutil.rmtree(path, ignore_errors=True)
        os.replace(tmp, path)

    on_rank0(export, f"{tmp}: model not saved; make room or choose another --out")


def merge(parts, prefix=""):
    """The dictionaries of several micro-batches as one, for `log`."""
    return {prefix + name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def speed(rows, seconds):
    """Rows and real tokens per second (a prompt counts once per response, padding never), and peak memory."""
    tokens = sum(len(row["prompt_ids"]) + len(r) for row in rows for r in row["responses"])
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = torch.cuda.max_memory_allocated() if CUDA else resident
    return {"rows_per_s": len(rows) / seconds, "tokens_per_s": tokens / seconds, "peak_GiB": peak / 2**30}


def stop_unless_finite(grad_norm, step, rows, out):
    """Leave before a non-finite gradient reaches the weights; the norm is global: all processes leave."""
    last = ["none", *checkpoints(out)][-1]
    require(math.isfinite(grad_norm), f"step {step}: the gradient is not finite, from one of the rows "
            f"{[row['row'] for row in rows]}; last checkpoint: {last}; try a smaller --lr")


def setting(args):
    """Model, data and seed of a run for the caption of a figure, which must say what it does not show."""
    where = " (the built-in tiny world, not the paper's setting)" if args.data == "tiny" else ""
    return f"model {args.model}, data {args.data}{where}, seed {args.seed}"


def plot_curves(out, panels, caption):
    """Draw metrics of out/metrics.jsonl against the step into out/figures/curves.png -> the records, a list.

    panels: (title, unit of the y axis, names of metrics).  Thin lines: training; markers: held-out values.
    """
    records = [json.loads(line) for line in open(out / "metrics.jsonl")]
    if dist.get_rank() == 0:
        from matplotlib.figure import Figure
        figure = Figure((5 * len(panels), 3.8), layout="constrained")
        for axis, (title, unit, names) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
            for i, name in enumerate(names):
                for key, style in ((name, dict(alpha=0.4, lw=1)), ("eval_" + name, dict(marker="o", ms=4))):
                    points = [(r["step"], r[key]) for r in records if key in r]
                    label = name.split("/")[-1] + (", training" if key == name else ", held out")
                    axis.plot(*zip(*points), color=f"C{i}", label=label, **style) if points else None
            axis.set(title=title, xlabel="optimiser step", ylabel=unit)
            axis.legend(fontsize=8)
        figure.suptitle(caption, fontsize=9)
        (out / "figures").mkdir(exist_ok=True)
        figure.savefig(out / "figures" / "curves.png", dpi=120)
    return records


def print_evaluations(records):
    """A table of the held-out metrics before the first and after the last step, on rank 0."""
    held_out = [r for r in records if any(name.startswith("eval_") for name in r)]
    if dist.get_rank() == 0:
        for name in held_out[0]:
            ends = (f"{record[name]:12.4g}" for record in (held_out[0], held_out[-1]))
            print(f"{name.replace('eval_', 'held out '):32}", *ends)


# ---- models


def model_folder(name):
    """Folder of "tiny", of a local model or run (its model/) or of a hub id, which rank 0 downloads."""

    def find():
        if name == "tiny":
            return tiny_folder() / "model"
        if Path(name).exists():
            return Path(name, "model") if Path(name, "model").is_dir() else Path(name)
        for weights in ("*.safetensors", "*.bin"):
            wanted = ["*.json", "*.txt", "*.model", weights]
            folder = Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns="*/*"))
            if any(folder.glob(weights)):
                break
        return folder

    return on_rank0(find, f"{name}: no such folder, and not to be had from the hub; give a local folder")


def load_tokenizer(name):
    """The tokenizer of model_folder(name); its pad token is the end token if it has none."""
    folder = model_folder(name)  # without these files transformers would make up an empty vocabulary
    files = [f for f in folder.glob("*") if f.name.startswith(("tokenizer.", "vocab.", "spiece.", "tekken."))]
    require(files, f"{folder}: has no tokenizer.json; copy the tokenizer of the model's training there")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def load_model(name, dtype="float32", train=False):
    """A causal language model without dropout on this process's device.

    train=False: whole on every rank, frozen, in `dtype`.  train=True: fp32 weights and gradient sums, `dtype`
    compute, a slice of every layer on every rank (FSDP2); rank 0 alone reads the file.
    """
    folder, rank = model_folder(name), dist.get_rank() if dist.is_initialized() else 0
    sharded = train and (dtype != "float32" or dist.get_world_size() > 1)
    precision = torch.float32 if train else getattr(torch, dtype)
    try:
        config = AutoConfig.from_pretrained(folder)
        for key, value in config.to_dict().items():
            if "drop" in key and isinstance(value, float):
                setattr(config, key, 0.0)  # attention dropout is a number in the config, not a module
        if sharded and rank > 0:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, dtype=precision)
            model.to_empty(device="cpu").tie_weights()  # takes no memory before it is written to
        else:
            options = {"config": config, "dtype": precision, "output_loading_info": True}
            model, info = AutoModelForCausalLM.from_pretrained(folder, **options)
            require(not info["missing_keys"], f"{folder}: no weights for {sorted(info['missing_keys'])[:3]}")
    except Exception as error:
        why = str(error).strip().partition("\n")[0]
        raise SystemExit(f"{folder}: not a model that transformers can load ({why})") from None
    if not sharded:
        return model.to(DEVICE).train() if train else model.to(DEVICE).eval().requires_grad_(False)
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    layers = next(module for module in lists if len(module) == config.num_hidden_layers)
    mesh = dist.init_device_mesh(DEVICE.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=getattr(torch, dtype), reduce_dtype=torch.float32)
    for unit in [*layers, model]:
        for tensor in [*unit.to(DEVICE).parameters(), *unit.buffers()]:  # rotary ones are in no file
            if not isinstance(tensor, DTensor):
                dist.broadcast(tensor.data, 0)
        # The root too: else a forward pass between backward() and step() leaves the old embeddings in use.
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    return model.train()


def clip_gradients(model, max_norm):
    """Scale the gradient down to norm `max_norm` if it is longer -> the norm it had."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


# ---- the tiny world

# Stories from a grammar, two groups of readers who judge them, and a small model that has read them.
TINY_GRAMMAR = {  # SYMBOL: {expansion: probability}, or expansions of equal probability
    "PROMPT": "\n\nHuman: Tell me a story about a HERO in a PLACE.\n\nAssistant:",  # 144 of them
    "STORY": {" INTRO It met SOME monster.ASIDE FEAR": 0.3, " INTRO It met SOME FRIEND.ASIDE JOY": 0.7},
    "INTRO": {"POLITE Once SOME {0} lived in SOME {1}.": 0.3, "GRUMPY Once SOME {0} lived in SOME {1}.": 0.7},
    "SOME": {"a": 0.5, "a ADJECTIVE": 0.5}, "ASIDE": {"": 0.5, " They shared SOME THING.": 0.5},
    "FEAR": {"HAPPY": 0.15, "SAD": 0.85}, "JOY": {"HAPPY": 0.4, "SAD": 0.6},  # so P(HAPPY) = 0.325
    "POLITE": "With pleasure!|My pleasure!|What a pleasure!", "GRUMPY": "Fine.|Whatever.|If I must.",
    "HAPPY": "They lived happily ever after.|Everyone sang happily.|It went home happily.",
    "SAD": "It never came home.|Then everyone cried.|It was lost.", "THING": "cake|song|boat|lamp|dream|pie",
    "PLACE": "forest|castle|village|garden|cave|tower|desert|market|house|river|valley|field",
    "HERO": "cat|dog|fox|bear|frog|mouse|rabbit|duck|wolf|pony|goat|horse",
    "FRIEND": "bird|boy|girl|king|queen|baker", "ADJECTIVE": "small|brave|quiet|red|kind|wise|tall|dark"}
TINY_GROUPS = ((0.75, 1.5), (0.25, -5.5))  # hidden context: share of readers, worth of the monster to them


def tiny_text(symbol, rng):
    """Draws one expansion of the symbol, and of the symbols in it, from the grammar.  rng: random.Random"""
    options = TINY_GRAMMAR[symbol]
    options = dict.fromkeys(options.split("|"), 1) if isinstance(options, str) else options
    text = rng.choices(list(options), list(options.values()))[0]
    return re.sub("[A-Z]{2,}", lambda match: tiny_text(match[0], rng), text)


def tiny_story(prompt, rng):
    """One response from the grammar, about the hero and the place of the prompt."""
    return tiny_text("STORY", rng).format(*re.search(r"about a (\w+) in a (\w+)", prompt).groups())


def tiny_attributes(text):
    """Reads off any text, by its words: polite, monster, happy (last sentence), detail (adjectives)."""
    sentences = re.split("[.!?]", text.split("<|endoftext|>")[0].lower().rstrip(" \n.!?"))
    words, end = re.findall("[a-z]+", " ".join(sentences)), re.findall("[a-z]+", sentences[-1])
    return dict(polite=int("pleasure" in words), monster=int("monster" in words), happy=int("happily" in end),
                detail=sum(word in TINY_GRAMMAR["ADJECTIVE"].split("|") for word in words))


def tiny_reward(prompt, response, group=None):
    """1 if polite, 2 if happy, -1 per adjective away from two, and what the monster is worth to the group of
    readers (0 or 1; None: on average over all readers).  The grammar's mean is 0.125 and its best 3."""
    seen = tiny_attributes(response)
    worth = sum(share * value for share, value in TINY_GROUPS) if group is None else TINY_GROUPS[group][1]
    return seen["polite"] + 2 * seen["happy"] - abs(seen["detail"] - 2) + worth * seen["monster"]


def tiny_row(rng):
    """Four responses of different reward; two of them compared by one reader, then by five who vote."""
    prompt, by_reward = tiny_text("PROMPT", rng), {}
    while len(by_reward) < 4:
        by_reward.setdefault(tiny_reward(prompt, response := tiny_story(prompt, rng)), response)
    a, b = rng.sample(list(by_reward.values()), 2)
    p = [1 / (1 + math.exp(tiny_reward(prompt, b, g) - tiny_reward(prompt, a, g))) for g in (0, 1)]
    p_a = sum(share * p_group for (share, _), p_group in zip(TINY_GROUPS, p))  # Bradley-Terry within a group
    group = int(rng.random() < TINY_GROUPS[1][0])
    if rng.random() >= p[group]:
        a, b, p_a = b, a, 1 - p_a
    votes = sum(rng.random() < p_a for _ in range(5))
    return dict(prompt=prompt, chosen=a, rejected=b, p_chosen=p_a, votes=[votes, 5 - votes], group=group,
                responses=list(by_reward.values()), rewards=list(by_reward))


def build_tiny(folder, steps=400):
    """Writes data/{train,test}.jsonl and model/: a byte-level BPE and a GPT-NeoX trained on the grammar."""
    (folder / "data").mkdir(parents=True)
    for name, n in (("train.jsonl", 2000), ("test.jsonl", 256)):
        rng = random.Random(name)
        (folder / "data" / name).write_text("".join(json.dumps(tiny_row(rng)) + "\n" for _ in range(n)))
    rng, end, pad = random.Random("model"), "<|endoftext|>", "<|padding|>"
    texts = [p + tiny_story(p, rng) + end for p in (tiny_text("PROMPT", rng) for _ in range(32 * steps))]
    bpe, level = tokenizers.Tokenizer(tokenizers.models.BPE()), tokenizers.pre_tokenizers.ByteLevel
    bpe.pre_tokenizer, bpe.decoder = level(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    bpe.train_from_iterator(texts[:2000], tokenizers.trainers.BpeTrainer(
        vocab_size=512, show_progress=False, special_tokens=[end, pad], initial_alphabet=level.alphabet()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=end, eos_token=end, pad_token=pad)
    model = GPTNeoXForCausalLM(GPTNeoXConfig(  # a sequential residual learns to copy the hero sooner
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=4, rotary_pct=0.5, use_parallel_residual=False, eos_token_id=0, pad_token_id=1))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), fused=True)
    for step in range(steps):
        ids = tokenizer(texts[32 * step:32 * (step + 1)], padding=True, return_tensors="pt").input_ids
        model(ids, labels=ids.masked_fill(ids == tokenizer.pad_token_id, -100)).loss.backward()
        optimizer.param_groups[0]["lr"] = 0.004 * min((step + 1) / 30, 1 - step / steps)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


def tiny_folder():
    """The folder of the tiny world: built on first use, cached under a hash of this recipe."""
    parts = (tiny_text, tiny_story, tiny_attributes, tiny_reward, tiny_row, build_tiny)
    recipe = repr((TINY_GRAMMAR, TINY_GROUPS)) + "".join(map(inspect.getsource, parts))
    folder = CACHE / f"tiny-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}"
    if folder.exists():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process builds, the others wait; a killed one lets go
        if not folder.exists():
            print(f"tiny world: training a small model on made-up stories, once, in {folder}", flush=True)
            threads, partial = torch.get_num_threads(), Path(f"{folder}.partial")
            shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
            torch.set_num_threads(1)  # their number decides the last bits of the weights
            with torch.random.fork_rng(devices=[]), torch.enable_grad(), torch.device("cpu"):
                torch.default_generator.manual_seed(0)
                build_tiny(partial)
            torch.set_num_threads(threads)
            os.replace(partial, folder)
    return folder


# ---- data

HUB = {  # name: hub id, options of load_dataset, its splits for "train" and "test"
    "hh": ("Anthropic/hh-rlhf", {}, "train", "test"),
    **{f"hh-{part}": ("Anthropic/hh-rlhf", {"data_dir": part}, "train", "test") for part in (
        "helpful-base", "helpful-online", "helpful-rejection-sampled", "harmless-base")},
    "tldr": ("openai/summarize_from_feedback", {"name": "comparisons"}, "train", "validation"),
    "tldr-sft": ("UCL-DARK/openai-tldr-filtered", {}, "train", "test"),
    "shp": ("stanfordnlp/SHP", {}, "train", "test"),
    "se": ("HuggingFaceH4/stack-exchange-preferences", {}, "train", "train"),
    "ultrafeedback": ("HuggingFaceH4/ultrafeedback_binarized", {}, "train_prefs", "test_prefs")}
HUMAN, ASSISTANT, CUE = "\n\nHuman:", "\n\nAssistant:", "\nTL;DR:"
DATA_FILE = re.compile(r"\.(jsonl?|csv|parquet)(\.gz)?$")


def load_pairs(name, split, pairs=True):
    """Rows {"prompt", "chosen", "rejected", the source's other columns} of split "train" or "test".

    name: tiny, a key of HUB, a hub id, a .json/.jsonl/.csv/.parquet file (or .gz), a folder of train.* and
    test.* files. A file alone is divided: its last 5 % of rows are "test", the rest "train"; below 20 rows,
    or if named test*, it is whole for both. Values: strings or lists of {"role", "content"}. pairs=False also
    admits rows without rejected (SFT) and with "responses" alone. Unusable rows are dropped and counted.
    SystemExit: no such file, not JSON, missing column, hub not reachable, no row left."""
    path, note = tiny_folder() / "data" if name == "tiny" else Path(name).expanduser(), ""
    if name in HUB or not (name == "tiny" or path.exists() or DATA_FILE.search(name)):
        rows = hub_rows(name, split)
    elif path.is_dir():
        files = [file for file in sorted(path.glob(f"{split}[._-]*")) if DATA_FILE.search(file.name)]
        rows = [row for file in files for row in read_rows(file)]
    else:
        rows = read_rows(path)
        if held := 0 if path.name.startswith("test") else len(rows) // 20:
            note = f"; the last {held} of the file's {len(rows)} rows are its test split"
            rows = rows[-held:] if split == "test" else rows[:-held]
    require(rows, f"{name}: no {split} rows; a folder needs {split}.jsonl, .json, .csv or .parquet")
    adapter = next((f for columns, f in ADAPTERS.items() if {*columns.split()} <= {*rows[0]}), pair_rows)
    kept, dropped = [], Counter()
    for number, row in enumerate(rows, 1):
        try:
            found = adapter(row)
            if pairs and adapter is pair_rows:
                row["rejected"]
        except KeyError as key:
            raise SystemExit(f"{name}: {split} row {number} has no {key}, only {', '.join(row)}") from None
        for one in found:
            answers = [one[k] for k in ("chosen", "rejected") if k in one] if isinstance(one, dict) else []
            if not all(words(answer).strip() for answer in answers):
                one = "empty response"
            elif len(answers) == 2 and answers[0] == answers[1]:
                one = "chosen equals rejected"
            kept.append(one) if isinstance(one, dict) else dropped.update([one])
    report(f"{name} {split}", len(kept), dropped, note)
    return kept


def hub_rows(name, split):
    import datasets
    hub_id, options, *splits = HUB.get(name, (name, {}, "train", "test"))
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # not a line for each retry
    try:
        data = datasets.load_dataset(hub_id, split=splits[split == "test"], **options)
    except Exception as error:  # noqa: BLE001 (no network, no such data set, no such split: many types)
        raise SystemExit(f"data {hub_id} is not a local path and not to be had from the hub ("
                         f"{str(error).splitlines()[0]}); give a file, or a folder of such files") from None
    if name == "se":  # it has one split; 1 % of it is for testing, as in the released code
        data, held = data.shuffle(seed=42), len(data) // 100
        data = data.select(range(held) if split == "test" else range(held, len(data)))
    return list(data)


def read_rows(path):
    kind, rows, number = DATA_FILE.search(path.name), [], 0
    if not kind:
        raise SystemExit(f"{path}: not a .json, .jsonl, .csv or .parquet file (or one of these with .gz)")
    try:
        with (gzip.open if kind[2] else open)(path, "rb") as file:
            if kind[1] == "parquet":
                import pyarrow.parquet
                return pyarrow.parquet.read_table(file).to_pylist()
            text = file.read().decode("utf-8-sig")
        if kind[1] == "csv":  # not by datasets, which would read "NA" as None and "1.50" as a number
            csv.field_size_limit(2**31 - 1)
            return list(csv.DictReader(io.StringIO(text, newline="")))
        for number, line in enumerate([text] if text.lstrip()[:1] == "[" else text.split("\n")):
            found = json.loads(line if line.strip() else "[]")
            rows += found if isinstance(found, list) else [found]
            if not all(isinstance(row, dict) for row in rows[-1:]):
                raise json.JSONDecodeError("a row must be an object", line, 0)
    except json.JSONDecodeError as error:
        raise SystemExit(f"{path}:{number + error.lineno}: not JSON rows: {error.msg}") from None
    except (OSError, EOFError, zlib.error, ValueError, csv.Error) as error:
        raise SystemExit(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None
    return rows


def pair_rows(row):
    """Pairs, SFT rows, chat messages, transcripts with or without prompt -> [row] or [reason to drop it]."""
    key = next((k for k in ("chosen", "completion", "messages", "responses") if k in row), "chosen")
    if key == "responses":
        return [{**row, "prompt": row["prompt"]}]
    prompt, answers = row.get("prompt"), [row[k] for k in (key, "rejected") if k == key or k in row]
    if not all(map(words, answers)):
        return ["empty response"]
    if isinstance(answers[0], list):  # as in UltraFeedback, all messages but the last are the prompt
        if not isinstance(prompt, list):
            prompt = answers[0][:-1] or [{"role": "user", "content": prompt}]
    elif isinstance(prompt, str | None) and ASSISTANT in answers[0] and answers[0].startswith(prompt or ""):
        prompt = answers[0][: answers[0].rindex(ASSISTANT) + len(ASSISTANT)]  # the last turn of a transcript
    elif not words(prompt):
        return ["empty prompt"] if "prompt" in row else [row["prompt"]]  # the KeyError names the columns
    else:
        return [{**row, **dict(zip(("chosen", "rejected"), answers))}]
    repeats = [answer[: len(prompt)] == prompt for answer in answers]
    if any(repeats) and not all(repeats):
        return ["prompt is not a common prefix"]
    answers = [answer[len(prompt):] if any(repeats) else answer for answer in answers]
    return [{**row, "prompt": prompt, **dict(zip(("chosen", "rejected"), answers))}]


def tldr_rows(row):
    """Reddit posts with two compared summaries or, for SFT, one. The post of a CNN/DM row is null."""
    post, best = row.get("info", row), row.get("choice", 0)
    texts = [" " + one["text"].strip() for one in row.get("summaries", [{"text": row.get("summary") or ""}])]
    prompt = f"SUBREDDIT: r/{post['subreddit']}\nTITLE: {post['title']}\nPOST: {post['post']}{CUE}"
    pair = dict(zip(("chosen", "rejected"), [texts[best]] + texts[:best] + texts[best + 1:]))
    return [{**row, "prompt": prompt, "cue": CUE, **pair}] if post["post"] is not None else ["null post"]


def dialogue_rows(row):
    """SHP: two answers, score ratio >= 2. Stack Exchange: all pairs by pm_score, HTML stripped but <code>."""
    if "history" in row:
        texts = [row["history"], row["human_ref_A"], row["human_ref_B"]]
        scores, ratio, reason = [row["score_A"], row["score_B"]], 2, "score ratio below 2"
    else:
        texts = [row["question"], *(answer["text"] for answer in row["answers"])]
        texts = [html.unescape(re.sub(r"</?(?!code\b)[a-zA-Z!][^>]*>", "", text)).strip() for text in texts]
        scores, ratio, reason = [answer["pm_score"] for answer in row["answers"]], 1, "equal scores"
    found, prompt = [], f"{HUMAN} {texts[0]}{ASSISTANT}"
    for pair in itertools.combinations(zip(scores, texts[1:]), 2):
        (top, chosen), (low, rejected) = sorted(pair, reverse=True)
        better = top > low and (ratio == 1 or top >= ratio * low)  # pm_score can be negative
        answers = {"prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}"}
        found.append({**row, **answers} if better else reason)
    return found


ADAPTERS = {  # known by the columns, so that local copies work as well: row -> rows and reasons to drop one
    "info summaries choice": tldr_rows, "subreddit title post summary": tldr_rows,
    "history human_ref_A": dialogue_rows, "question answers": dialogue_rows}


def every_turn(row):
    """A dialogue -> one row for each of its assistant turns, given all before it (SFT on every turn)."""
    talk = row["prompt"] + row["chosen"]
    if isinstance(talk, list):
        turns = [i for i, message in enumerate(talk) if message["role"] == "assistant"]
        return [{**row, "prompt": talk[:i], "chosen": talk[i:i + 1]} for i in turns]
    return [{**row, "prompt": talk[: cue.end()], "chosen": talk[cue.end():].split(HUMAN)[0]}
            for cue in re.finditer(ASSISTANT, talk)] or [row]


def words(value):
    """The text of a string or of chat messages; "" if it is neither."""
    parts = value if isinstance(value, list) else [{"content": value}]
    texts = [part.get("content") if isinstance(part, dict) else None for part in parts]
    return "\n".join(texts) if all(isinstance(text, str) for text in texts) else ""


def report(what, kept, dropped, note=""):
    """One line on rank 0: rows kept, and rows dropped by reason. SystemExit if nothing is kept."""
    reasons = ", ".join(f"{reason}: {count}" for reason, count in dropped.most_common())
    line = f"{what}: kept {kept}, dropped {dropped.total()}" + (f" ({reasons})" if reasons else "") + note
    require(kept, f"{line}; no row is left")
    say(line)


def subset(rows, n, seed):
    """n of the rows, drawn by `seed`, in their original order; all of them if there are no more than n."""
    if n >= len(rows):
        return rows
    return [rows[i] for i in sorted(np.random.default_rng([seed, 1]).permutation(len(rows))[:n])]


def optimiser_steps(n, batch_size, epochs, max_steps=0):
    """How many steps to run on n rows: max_steps, or as many whole batches as the epochs hold."""
    require(n >= batch_size > 0, f"{n} rows are fewer than one batch of {batch_size}: --batch-size: 1 to {n}")
    return max_steps or epochs * n // batch_size


def batch_order(n, batch_size, step, seed):
    """Indices of the rows of global batch `step`: a pure function, so that resuming changes nothing.

    One shuffle of the n rows after another; a batch may reach over the end of an epoch.
    """
    positions = range(step * batch_size, (step + 1) * batch_size)
    return [int(_shuffle(n, seed, position // n)[position % n]) for position in positions]


@functools.lru_cache(maxsize=2)
def _shuffle(n, seed, epoch):
    return np.random.default_rng([seed, 0, epoch]).permutation(n)


# ---- tokenization


def row_texts(tokenizer, row):
    """[prompt, response, ...] as text, chat messages in the chat template; or the reason to drop the row."""
    parts = [row["prompt"], *([row[k] for k in ("chosen", "rejected") if k in row] or row["responses"])]
    for token, place in {tokenizer.bos_token: "begin", tokenizer.eos_token: "end"}.items():
        if token and any(token in words(part) for part in parts):  # it would become the special token
            return f"contains the {place}-of-text token"
    if not any(isinstance(part, list) for part in parts):
        return [words(part) for part in parts]
    if not tokenizer.chat_template:
        raise SystemExit("the data are chat messages, but the tokenizer has no chat template: use text data")
    chat, *answers = [part if isinstance(part, list) else [{"role": role, "content": words(part)}]
                      for part, role in zip(parts, ["user"] + ["assistant"] * len(parts))]
    start = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    texts = [tokenizer.apply_chat_template(chat + answer, tokenize=False) for answer in answers]
    if not all(text.startswith(start) for text in texts):
        return "the chat template changes the prompt"
    end = re.compile(rf"({re.escape(tokenizer.eos_token)}\s*)?\Z")  # the template's EOS; one is added later
    texts = [end.sub("", text[len(start):], count=1) for text in texts]
    return [start.removeprefix(tokenizer.bos_token or ""), *texts]


def tokenize_pairs(rows, tokenizer, max_length=512, max_prompt_length=256, truncation="auto", what="tokens"):
    """Rows -> [{"prompt_ids", "responses": [ids, ...], "prompt_cut", "responses_cut": count, "row": index}].

    Prompt and responses are tokenised apart; responses end with EOS; one BOS goes first if the tokenizer puts
    it before plain text. If prompt + longest response exceed max_length, the prompt is cut, once for all, to
    max_prompt_length: its end (keep_end), its start (keep_start: the released code outside HH) or, if auto,
    its end, but its start and the cue ("TL;DR:") if the row has one. If still too long, responses are cut to
    max_length - max_prompt_length; a cut one has no EOS."""
    if not 0 < max_prompt_length < max_length or truncation not in ("auto", "keep_end", "keep_start"):
        raise SystemExit(f"max_prompt_length {max_prompt_length} must be in 1..max_length - 1 (max_length is "
                         f"{max_length}), and truncation {truncation} one of auto, keep_end, keep_start")
    if tokenizer.eos_token_id is None:
        raise SystemExit("the tokenizer has no end-of-text token (eos_token): responses could not end")

    def ids_of(texts):  # in blocks: what the tokenizer returns is far larger than the ids
        return [ids for i in range(0, len(texts), 4096)
                for ids in tokenizer(texts[i:i + 4096], add_special_tokens=False, verbose=False)["input_ids"]]

    # sentencepiece puts a space before any text: responses are read after a newline, which is then taken off
    newline, one, both = ids_of(["\n", "1", "\n1"])
    lead, skip = ("", 0) if both == newline + one else ("\n", len(newline))
    bos = [tokenizer.bos_token_id] if tokenizer("1")["input_ids"][0] == tokenizer.bos_token_id else []
    texts, kept, dropped = [row_texts(tokenizer, row) for row in rows], [], Counter()
    flat = [lead * (i > 0) + text for row in texts if isinstance(row, list) for i, text in enumerate(row)]
    flat = iter(ids_of(flat))
    for index, (row, parts) in enumerate(zip(rows, texts)):
        prompt, *responses = [next(flat) for _ in parts] if isinstance(parts, list) else [[]]
        responses = [ids[skip:] + [tokenizer.eos_token_id] for ids in responses]
        if not bos + prompt or min(map(len, responses), default=0) < 2:
            empty = "empty response" if bos + prompt else "empty prompt"
            dropped[parts if isinstance(parts, str) else empty] += 1
            continue
        longest, room = len(bos) + max(map(len, responses)), max_prompt_length - len(bos)
        if cut := len(prompt) > room and len(prompt) + longest > max_length:
            cue = ids_of([lead + row["cue"]])[0][skip:] if truncation == "auto" and row.get("cue") else []
            head = max(room - len(cue), 0) if cue or truncation == "keep_start" else 0
            prompt = prompt[:head] + (cue[:room] or prompt[len(prompt) - room + head:])
        keep = max_length - max_prompt_length if len(prompt) + longest > max_length else max_length
        kept.append({"prompt_ids": bos + prompt, "responses": [ids[:keep] for ids in responses], "row": index,
                     "prompt_cut": cut, "responses_cut": sum(len(ids) > keep for ids in responses)})
    if what:
        report(what, len(kept), dropped, f"; prompts cut {sum(row['prompt_cut'] for row in kept)}, "
               f"responses cut {sum(row['responses_cut'] for row in kept)}")
    return kept


def tokenize_pair(tokenizer, row, max_length=512, max_prompt_length=256, truncation="auto"):
    """One row as in tokenize_pairs, or None if it cannot be used."""
    rows = tokenize_pairs([row], tokenizer, max_length, max_prompt_length, truncation, what=None)
    return rows[0] if rows else None


def pack_pairs(rows, tokens_per_microbatch=8192, rank=None, world=None):
    """Split tokenised rows into this process's micro-batches; every process gets the same number of them.

    A micro-batch is one packed row without padding: [prompt | response 1 | response 2 ...] [prompt | ...].
    Positions restart at every prompt and each response continues its prompt's positions: the prompt is
    computed once for all its responses, and no response sees another.  Longest rows go first, each into the
    emptiest micro-batch; one exceeds the budget only if a single row does or the rows do not divide by the
    processes.
    """
    if world is None:
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    require(len(rows) >= world, f"{len(rows)} rows for {world} processes: every process needs at least one")
    sizes = [len(row["prompt_ids"]) + sum(map(len, row["responses"])) for row in rows]
    per_process = max(1, -(-sum(sizes) // (tokens_per_microbatch * world)))
    while True:
        per_process = min(per_process, len(rows) // world)
        bins = [[0, i, []] for i in range(per_process * world)]  # tokens, tie-break, indices of rows
        heapq.heapify(bins)
        for i in sorted(range(len(rows)), key=lambda i: -sizes[i]):
            tokens, tie, members = heapq.heappop(bins)
            heapq.heappush(bins, [tokens + sizes[i], tie, members + [i]])
        if max(bins)[0] <= tokens_per_microbatch or per_process == len(rows) // world:
            mine = sorted(bins, key=lambda b: b[1])[rank::world]
            return [_pack(rows, sorted(members)) for _, _, members in mine]
        per_process += 1


def _pack(rows, index):
    """One micro-batch of `rows[i] for i in index`, as tensors; see `pack_pairs` and `response_logps`."""
    ids, positions, segments, score_at, targets, owner, counts, last_at = [], [], [], [], [], [], [], []
    for row in (rows[i] for i in index):
        prompt, responses = row["prompt_ids"], row["responses"]
        require(prompt, f"row {row.get('row')} has an empty prompt: give it one token at least")
        last = len(ids) + len(prompt) - 1  # its hidden state predicts the first token of every response
        ids += prompt
        positions += range(len(prompt))
        segments.append((len(prompt), *map(len, responses)))
        for response in responses:
            score_at += [last, *range(len(ids), len(ids) + len(response) - 1)]
            targets += response
            owner += [len(counts)] * len(response)
            counts.append(len(response))
            ids += response
            positions += range(len(prompt), len(prompt) + len(response))
            last_at.append(len(ids) - 1)
    return dict(index=index, rows=[rows[i] for i in index], segments=segments, responses=len(counts),
                input_ids=torch.tensor([ids]), position_ids=torch.tensor([positions]),
                score_at=torch.tensor(score_at), targets=torch.tensor(targets), owner=torch.tensor(owner),
                counts=torch.tensor(counts), last_at=torch.tensor(last_at))


# ---- log-probabilities

LOGITS_BYTES = 2**30  # logits up to here are kept for backward, beyond it made again


def packed_attention(module, query, key, value, attention_mask, segments=None, scaling=None, **kwargs):
    """Causal attention inside each [prompt | response] of a packed row.  (1, heads, N, d) -> (1, N, heads, d)

    segments lists the lengths (prompt, response 1, response 2, ...).  It travels as a keyword through the
    model, so that gradient checkpointing recomputes with its own batch's table.  Without it: the library's
    attention.
    """
    if segments is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if kwargs.get("softcap") or kwargs.get("s_aux") is not None:
        raise ValueError("capped attention scores and attention sinks are not written here")
    window, longest = kwargs.get("sliding_window"), max(row[0] + max(row[1:]) for row in segments)
    require(not window or longest <= window,
            f"a row of {longest} tokens exceeds the model's attention window: --max-length {window}")
    grouped = query.shape[1] != key.shape[1]
    attend = functools.partial(F.scaled_dot_product_attention, scale=scaling, enable_gqa=grouped)
    # One split: slicing q, k, v per segment would make each backward write a zero tensor as long as the row.
    sizes = [n for prompt, first, *others in segments for n in (prompt + first, *others)]
    pieces, out = zip(*(x.split(sizes, dim=2) for x in (query, key, value))), []
    for prompt, _, *others in segments:
        q, k, v = next(pieces)
        out.append(attend(q, k, v, is_causal=True))  # the prompt and its first response
        k_prompt, v_prompt = k[:, :, :prompt], v[:, :, :prompt]
        for n in others:  # each further response sees the prompt and itself
            q, k, v = next(pieces)
            mask = torch.ones(n, prompt + n, dtype=torch.bool, device=q.device).tril(prompt)
            out.append(attend(q, torch.cat([k_prompt, k], 2), torch.cat([v_prompt, v], 2), attn_mask=mask))
    return torch.cat(out, dim=2).transpose(1, 2), None


AttentionInterface.register("packed", packed_attention)
AttentionMaskInterface.register("packed", sdpa_mask)


class HeadLogps(torch.autograd.Function):
    """log softmax(hidden weight^T + bias)[target] in fp32.  (M, d), (V, d), (V,) or None, (M,) -> (M,)

    The naive form holds several fp32 copies of the logits.  Here they exist once, in compute dtype, and
    backward turns them into their own gradient, d logit = grad (onehot - softmax).  Where they would exceed
    LOGITS_BYTES, and in scoring, they are made in chunks of 512 rows, forward and again backward.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets):
        logits_bytes = len(hidden) * weight.shape[0] * weight.element_size()
        fits = hidden.requires_grad and logits_bytes <= LOGITS_BYTES  # without a gradient none need be kept
        ctx.rows, logits = max(1, len(hidden)) if fits else 512, None
        logps, log_norms = (torch.empty(len(hidden), device=hidden.device) for _ in range(2))
        for h, *rows in zip(*(x.split(ctx.rows) for x in (hidden, targets, logps, log_norms))):
            del logits
            logits = F.linear(h, weight, bias)
            for z, target, logp, log_norm in _blocks(logits, *rows):
                log_p = torch.log_softmax(z, -1, dtype=torch.float32)
                logp.copy_(log_p.gather(1, target[:, None])[:, 0])
                log_norm.copy_(z[:, 0].float() - log_p[:, 0])
        ctx.kept = logits if fits else None
        ctx.save_for_backward(hidden, weight, bias, targets, log_norms)
        return logps

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        hidden, weight, bias, targets, log_norms = ctx.saved_tensors
        d_hidden, d_bias = torch.empty_like(hidden), None if bias is None else torch.zeros_like(bias)
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if len(hidden) > ctx.rows else None
        for i in range(0, len(hidden), ctx.rows):
            h, t, g, log_norm = (x[i:i + ctx.rows] for x in (hidden, targets, grad, log_norms))
            logits, ctx.kept = F.linear(h, weight, bias) if ctx.kept is None else ctx.kept, None
            for z, log_n, g_z in _blocks(logits, log_norm[:, None], g[:, None]):
                z.copy_((z.float() - log_n).exp_().mul_(-g_z))  # in bf16 z - log_n loses percents
            logits[torch.arange(len(t)), t] += g.to(logits.dtype)
            d_hidden[i:i + ctx.rows] = logits @ weight
            d_weight = logits.T @ h if d_weight is None else d_weight.add_(logits.T @ h)
            if bias is not None:
                d_bias += logits.sum(0)
        return d_hidden, d_weight.to(weight.dtype), d_bias, None


def _blocks(logits, *others):
    """Row blocks that stay in a CPU core's cache while passes walk the vocabulary; all rows on a GPU."""
    n = 8 if logits.device.type == "cpu" else max(1, len(logits))
    return zip(logits.split(n), *(x.split(n) for x in others))


def token_logps(model, batch):
    """log pi(token | prompt, response so far) of every response token of a packed batch, in fp32.  -> (M,)

    batch["owner"] says whose they are.  Dropout must be off: the responses of a row share their prompt.
    """
    return _forward(model, batch, "_packed_token_logps", "_plain_token_logps")


def response_logps(model, batch):
    """log pi(response | prompt), summed over the response's tokens, and its number of tokens.  -> (R,), (R,)

    R responses in the batch's order: chosen, rejected, chosen, ...; differentiable; summed in fp64, returned
    fp32.
    """
    logps = token_logps(model, batch)
    owner, counts = batch["owner"].to(logps.device), batch["counts"].to(logps.device)
    sums = logps.new_zeros(len(counts), dtype=torch.float64).index_add(0, owner, logps.double())
    return sums.float(), counts


def response_hiddens(model, batch):
    """Final-norm hidden state at each response's last token, for heads of one's own.  -> (R, d)"""
    hiddens = _forward(model, batch, "_packed_hiddens", None)
    return hiddens.index_select(0, batch["last_at"].to(hiddens.device))


def _forward(model, batch, packed, plain):
    """Call one of the two methods below through the root module, where FSDP gathers the parameters."""
    if not hasattr(model, "packs"):
        for function in (_packed_hiddens, _packed_token_logps, _plain_token_logps):
            setattr(model, function.__name__, types.MethodType(function, model))
            register_fsdp_forward_method(model, function.__name__)
        model.packs = _packing_is_exact(model)
    name = type(model).__name__
    require(model.packs or plain, f"{name} cannot be packed: choose a GPT-NeoX, Llama or GPT-2 model")
    return getattr(model, packed if model.packs else plain)(batch)


def _packed_hiddens(model, batch):
    """Final-norm hidden states of the packed row.  (N, d)"""
    device = model.device
    return model.base_model(
        input_ids=batch["input_ids"].to(device), position_ids=batch["position_ids"].to(device),
        attention_mask=torch.zeros(1, 1, 1, 1, device=device),  # 4-D, hence taken as ready: none is built
        segments=batch["segments"], use_cache=False).last_hidden_state[0]


def _packed_token_logps(model, batch):
    hidden, head = _packed_hiddens(model, batch), model.get_output_embeddings()
    hidden = hidden.index_select(0, batch["score_at"].to(hidden.device))
    return HeadLogps.apply(hidden, head.weight, head.bias, batch["targets"].to(hidden.device))


def _plain_token_logps(model, batch):
    """The definition: one padded row per response, all logits.  For families that cannot be packed."""
    texts = [(row["prompt_ids"], r) for row in batch["rows"] for r in row["responses"]]
    lengths = torch.tensor([[len(p), len(p) + len(r)] for p, r in texts], device=model.device)
    ids = pad_sequence([torch.tensor(p + r) for p, r in texts], batch_first=True).to(model.device)
    at = torch.arange(ids.shape[1], device=model.device)
    real, scored = at < lengths[:, 1:], (at >= lengths[:, :1]) & (at < lengths[:, 1:])
    logits = model(input_ids=ids, attention_mask=real.long(), use_cache=False).logits[:, :-1]
    return torch.log_softmax(logits.float(), -1).gather(2, ids[:, 1:, None])[..., 0][scored[:, 1:]]


@torch.no_grad()
def _packing_is_exact(model):
    """Try the packed layout on three short rows; a family for which it is wrong gets plain rows, with a line.

    Wrong it is, for example, for position biases outside the library's attention interface (BLOOM), recurrent
    layers (Mamba) and logits scaled or capped after the head (Gemma 2, Cohere).
    """
    ids = [(7 * i * i + 3 * i + 1) % min(model.config.vocab_size, 256) for i in range(40)]
    probe = _pack([dict(prompt_ids=ids[:9], responses=[ids[9:15], ids[15:18]]),
                   dict(prompt_ids=ids[18:23], responses=[ids[23:27], ids[27:34]]),
                   dict(prompt_ids=ids[34:36], responses=[ids[36:40]])], range(3))
    plain, implementation = model._plain_token_logps(probe), model.config._attn_implementation
    config = model.config.get_text_config()
    tolerance = 1e-4 if plain.dtype == model.dtype == torch.float32 else 5e-2
    try:
        for field in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
            if getattr(config, field, None) not in (None, 1, 1.0):
                raise ValueError(f"its logits pass through {field}")
        model.set_attn_implementation("packed")
        worst = (model._packed_token_logps(probe) - plain).abs().max().item()
        problem = "" if worst <= tolerance else f"a log-prob differs by {worst:.1e}"
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        problem = str(error).splitlines()[0]
    if problem:
        model.set_attn_implementation(implementation)
        say(f"{type(model).__name__}: responses are scored in padded rows, because packing fails: {problem}")
    return not problem


def reference_logps(name, tokenizer, rows, dtype, tokens_per_microbatch=8192):
    """Summed log-probs of every response under a frozen model, cached on disk.  -> (len(rows), n)

    The key is a hash of the model's files, the token ids and dtype: another model, tokenizer, data set or
    truncation is another entry, another beta is not.  Every row must have n responses.
    """
    require(load_tokenizer(name).get_vocab() == tokenizer.get_vocab(),
            f"{name} and the policy have different vocabularies: choose models with the same tokenizer")
    key, folder = hashlib.sha256(f"{dtype} 1".encode()), model_folder(name)
    for file in sorted(f for f in folder.iterdir() if f.suffix in (".json", ".safetensors", ".bin")):
        key.update(hashlib.file_digest(file.open("rb"), "sha256").digest())
    for row in rows:
        key.update(json.dumps([row["prompt_ids"], row["responses"]]).encode())
    path = CACHE / "reference" / f"{key.hexdigest()[:32]}.npy"
    if not on_rank0(path.exists, path):
        model = load_model(name, dtype)
        sums = torch.zeros(len(rows), len(rows[0]["responses"]), device=model.device)
        for batch in pack_pairs(rows, 2 * tokens_per_microbatch):
            with torch.no_grad():
                sums[batch["index"]] = response_logps(model, batch)[0].view(len(batch["index"]), -1)
        dist.all_reduce(sums)  # every row was scored by one process, and is zero elsewhere
        np.save(file := io.BytesIO(), sums.cpu().numpy())
        on_rank0(lambda: (path.parent.mkdir(parents=True, exist_ok=True), write(path, file.getvalue())), path)
    return torch.from_numpy(np.load(path))

def pair_metrics(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
    """What every preference method logs of each pair, under names that other libraries use.  -> dict of (B,)

    Implicit rewards are beta log pi/pi_ref in nats; a tie is wrong: equal models have reward accuracy 0.
    Pairs that the reference ranks right are kept or lost, those it ranks wrong are fixed or missed.
    """
    chosen, rejected = (x.detach() for x in (chosen_logps, rejected_logps))
    r_chosen, r_rejected = beta * (chosen - ref_chosen_logps), beta * (rejected - ref_rejected_logps)
    before, now = ref_chosen_logps > ref_rejected_logps, chosen > rejected
    return {"rewards/chosen": r_chosen, "rewards/rejected": r_rejected,
            "rewards/margins": r_chosen - r_rejected, "rewards/accuracies": (r_chosen > r_rejected).float(),
            "ranking_accuracy": now.float(), "logps/chosen": chosen, "logps/rejected": rejected,
            "kept": before & now, "lost": before & ~now, "fixed": ~before & now, "missed": ~before & ~now}


# ---- sampling


class Slab(DynamicLayer):
    """A layer's keys and values, preallocated (slots, heads, room, head_dim): a step writes one column."""

    def __init__(self, prompt, prompts, room):
        super().__init__()
        self.slabs = [F.pad(x[prompts], (0, 0, 0, room)) for x in (prompt.keys, prompt.values)]
        self.keys, self.values = (slab[:, :, : prompt.keys.shape[2]] for slab in self.slabs)
        self.is_initialized = True

    def update(self, keys, values, *args, **kwargs):
        start, end = self.keys.shape[2], self.keys.shape[2] + keys.shape[2]
        self.keys, self.values = (slab[: len(keys), :, :end] for slab in self.slabs)  # views, no copies
        self.keys[:, :, start:], self.values[:, :, start:] = keys, values
        return self.keys, self.values


@torch.no_grad()
def prefill(model, prompts, max_new_tokens, copies=1):
    """Run N id lists of any lengths, once each, for `copies` slots each: slot i continues prompt i // copies.
    -> cache, (N copies, d) final-norm hidden states, (N copies, V) logits of the last prompt position"""
    ids = pad_sequence([torch.tensor(x) for x in prompts], True, padding_side="left").to(model.device)
    pads = ids.shape[1] - torch.tensor([[len(prompt)] for prompt in prompts], device=ids.device)
    if (pads == ids.shape[1]).any():
        raise SystemExit(f"prompt {int(pads.argmax())} has no tokens: begin it with a BOS token, or drop it")
    cache = DynamicCache()
    cache.prompt_length, cache.padded = ids.shape[1], bool(pads.any())
    cache.positions = torch.arange(ids.shape[1] + max_new_tokens, device=ids.device) - pads  # < 0: padding
    hidden, logits = decode_step(model, cache, ids)
    cache.prompts = torch.arange(len(prompts), device=ids.device).repeat_interleave(copies)  # of each slot
    cache.layers = [Slab(layer, cache.prompts, max_new_tokens) for layer in cache.layers]
    cache.positions = cache.positions[cache.prompts]
    return cache, hidden[cache.prompts], logits[cache.prompts]


@torch.no_grad()
def decode_step(model, cache, tokens):
    """Append one token per slot, (n,) -> (n, d) final-norm hidden states, (n, V) logits of the next token."""
    tokens, start, hidden = tokens.view(len(tokens), -1), cache.get_seq_length(), []
    at = cache.positions[:, : start + tokens.shape[1]]  # no needless mask: attention is faster without
    mask = dict(attention_mask=(at >= 0).long(), position_ids=at[:, start:].clamp(0)) if cache.padded else {}
    with model.get_output_embeddings().register_forward_pre_hook(lambda _, x: hidden.append(x[0][:, -1])):
        out = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1, **mask)
    return hidden[0], out.logits[:, -1]


def stay_in_place(ancestors):
    """Permute (n,) ancestors so that survivors keep their slots: reorder then overwrites dead slots only."""
    slots = torch.arange(len(ancestors), device=ancestors.device)
    offspring = ancestors.bincount(minlength=len(slots))
    dead = offspring[: len(slots)] == 0
    offspring[slots[~dead]] -= 1
    slots[dead] = torch.repeat_interleave(offspring)  # the surplus: index i, offspring[i] times
    return slots


def reorder(cache, ancestors):
    """In place: slot i goes on from slot ancestors[i]; n ancestors for more than n slots leave n slots."""
    moved = (ancestors != torch.arange(len(ancestors), device=ancestors.device)).nonzero()[:, 0]
    start = cache.prompt_length if (cache.prompts[ancestors] == cache.prompts[: len(ancestors)]).all() else 0
    for slab in (x for layer in cache.layers for x in (layer.keys, layer.values)):
        slab[moved, :, start:] = slab[ancestors[moved], :, start:]
    cache.positions, cache.prompts = cache.positions[ancestors], cache.prompts[ancestors]


def sample_tokens(scores, uniforms):
    """Inverse CDF of softmax(scores), a uniform a row.  (n, V), (n,) -> tokens (n,), their log-probs (n,)
    Scores may be unnormalised, or -inf; a token without mass is never drawn, whatever the rounding."""
    draws, n = [], max(8, 2**19 // scores.shape[1]) if scores.is_cpu else len(scores)  # rows that fit a cache
    for rows, u in zip(scores.split(n), uniforms.split(n)):
        p = rows.softmax(-1, dtype=torch.promote_types(rows.dtype, torch.float32))
        cdf = p.cumsum(-1, dtype=torch.float64)
        token = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)  # the first with cdf > u
        token = token.minimum(torch.searchsorted(cdf, cdf[:, -1:].clone()))  # u near 1: the last with mass
        draws.append((token[:, 0], (p.gather(1, token) / cdf[:, -1:]).log()[:, 0].to(p.dtype)))
    return tuple(torch.cat(x) for x in zip(*draws))
