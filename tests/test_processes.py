"""Processes, checkpoints, models: a fault ends in one line or in the numbers of the undisturbed
run.
"""

import dataclasses
import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import run
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import common

SIZES = dict(
    vocab_size=48, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
)
IDS = torch.randint(0, 48, (8, 12), generator=torch.Generator().manual_seed(1))
INV_FREQ = 10000.0 ** -(torch.arange(0, 8, 2) / 8)  # rotary frequencies of heads of size 8

# A run with all that a resumed one must restore: fresh noise in every loss, optimizer state,
# batches by step.
TRAIN = """
import hashlib, os, random, signal, sys, time
from dataclasses import dataclass
from pathlib import Path
import torch
import torch.distributed as dist
import common

@dataclass
class Args:
    model: str
    out: str
    max_steps: int = 6
    save_every: int = 2
    resume: bool = False
    overwrite: bool = False
    optimizer: str = "AdamW"
    dtype: str = "float32"
    noise: float = 1.0

def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

def main(args):
    common.setup(0)
    out = common.start_run(args, "test")
    model = common.load_model(args.model, args.dtype, train=True)
    optimizer = getattr(torch.optim, args.optimizer)(model.parameters(), lr=1e-3)
    first, extra = common.load_checkpoint(out, model, optimizer)
    assert extra == ({"seen": list(range(first))} if first else {})
    for step in range(first, args.max_steps):
        ids = torch.randint(0, 48, (4, 8), generator=torch.Generator().manual_seed(step))
        ids = ids[dist.get_rank() :: dist.get_world_size()]
        loss = model(input_ids=ids, labels=ids).loss
        (loss * (1 + args.noise * torch.rand(()))).backward()
        common.clip_gradients(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        common.log(out, step, loss=loss)
        if (step + 1) % args.save_every == 0:
            common.save_checkpoint(out, step + 1, model, optimizer, seen=list(range(step + 1)))
    weights = b"".join(full(p.data).numpy().tobytes() for p in model.parameters())
    if dist.get_rank() == 0:
        (out / "final.txt").write_text(hashlib.sha256(weights).hexdigest())

def die_before_renaming_to(name):
    replace = os.replace
    def deadly(source, target):
        if Path(target).name == name:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
    os.replace = deadly
"""

ALONE = """
from train import *
here, model = Path(sys.argv[1]), sys.argv[2]

def start(name, kill="", **flags):  # a process of its own that need not import everything again
    pid = os.fork()
    if pid == 0:
        if kill:
            die_before_renaming_to(kill)
        main(Args(model, str(here / name), **flags))
        os._exit(0)
    return pid

def wait(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

draw, kills = random.Random(0), 0
for optimizer in ("AdamW", "RMSprop"):
    assert wait(start(f"{optimizer}-whole", max_steps=20, optimizer=optimizer)) == 0
    code, metrics = None, here / f"{optimizer}-killed/metrics.jsonl"
    for logged in [draw.randint(3, 6), draw.randint(8, 11), draw.randint(13, 16), None]:
        resume = (here / f"{optimizer}-killed/config.json").exists()
        pid = start(f"{optimizer}-killed", max_steps=20, optimizer=optimizer, resume=resume)
        if logged:  # killed soon after so many lines, wherever that is
            until = time.monotonic() + 60
            while time.monotonic() < until:
                if metrics.exists() and len(metrics.read_bytes().splitlines()) >= logged:
                    break
                time.sleep(0.002)
            time.sleep(draw.uniform(0, 0.02))
            os.kill(pid, signal.SIGKILL)
        code = wait(pid)
        kills += code == -9
    assert code == 0
assert kills >= 4, kills
assert wait(start("lone", max_steps=20, kill="step-6")) == -9
assert (here / "lone/step-6.tmp/COMPLETE.json").exists() and not (here / "lone/step-6").exists()
assert wait(start("lone", max_steps=20, resume=True)) == 0
assert wait(start("moved", max_steps=4, noise=0.0, resume=True)) == 0  # begun by two processes
print("all done")
"""

PAIR_1 = """
from train import *
here, folder = Path(sys.argv[1]), Path(sys.argv[2])
common.setup(0, timeout=120)
rank, ids = dist.get_rank(), torch.load(here / "ids.pt")
assert dist.get_world_size() == 2
torch.use_deterministic_algorithms(True)  # fills memory that nothing was written to with nan
seen = {}
for name in ("neox", "llama"):
    model = common.load_model(folder / name, train=True)
    seen[name, "inv_freq"] = [b.clone() for n, b in model.named_buffers() if n.endswith("inv_freq")]
    seen[name, "logits"] = model(ids).logits.detach()
    model(input_ids=ids[rank::2], labels=ids[rank::2]).loss.backward()
    seen[name, "gradients"] = [full(p.grad) for p in model.parameters()]
    seen[name, "norm"] = common.clip_gradients(model, 1e9).item()
    model = common.load_model(folder / name, "bfloat16", train=True)
    seen[name, "dtypes"] = {p.dtype for p in model.parameters()}
    seen[name, "bf16 logits"] = model(ids).logits.detach()
    common.save_model(model, common.load_tokenizer(folder / "neox"), here / f"export-{name}")
torch.use_deterministic_algorithms(False)
values = {"some/items": torch.arange(3.0)[: 3 * rank], "flag": torch.tensor([True]), "x": rank}
seen["log"] = common.log(here, 7, **values)
torch.save(seen, here / f"seen-{rank}.pt")
if rank == 1:
    os.kill(os.getpid(), signal.SIGTERM)
assert common.stop_requested()
main(Args(str(folder / "neox"), str(here / "whole")))
main(Args(str(folder / "neox"), str(here / "steady"), noise=0.0))
main(Args(str(folder / "neox"), str(here / "moved"), noise=0.0, max_steps=2))
die_before_renaming_to("step-4")
main(Args(str(folder / "neox"), str(here / "torn")))
"""

PAIR_2 = """
from train import *
here, folder = Path(sys.argv[1]), Path(sys.argv[2])
main(Args(str(folder / "neox"), str(here / "torn"), resume=True))
main(Args(str(folder / "neox"), str(here / "moved"), noise=0.0, resume=True))
main(Args(str(folder / "neox"), str(here / "torn")))  # in use
"""


def launch(folder, script, *arguments, processes=0):
    """Run a script -> (exit code, everything printed)."""
    (folder / "train.py").write_text(TRAIN)
    (folder / "script.py").write_text(script)
    paths = os.pathsep.join([str(Path(common.__file__).parent), str(folder)])
    script = folder / "script.py"
    done = run(script, *arguments, processes=processes, check=False, PYTHONPATH=paths)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """neox: saved in bf16 with dropout 0.3; llama: fp32, tied embeddings; a tokenizer beside the
    first.
    """
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    config = GPTNeoXConfig(**SIZES, rotary_pct=1.0, attention_dropout=0.3, hidden_dropout=0.3)
    GPTNeoXForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "neox")
    LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)).save_pretrained(
        folder / "llama"
    )
    words = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1, "b": 2}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>").save_pretrained(
        folder / "neox"
    )
    return folder


@pytest.fixture(autouse=True)
def group():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    common.setup(0)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    common.signals.clear()


@dataclasses.dataclass
class Args:
    out: str
    beta: float = 0.1
    data: str = "tiny"
    max_steps: int = 10
    resume: bool = False
    overwrite: bool = False


def fails(function, *arguments, **keywords):
    """The one line with which a function leaves."""
    with pytest.raises(SystemExit) as stop:
        function(*arguments, **keywords)
    assert isinstance(stop.value.code, str) and "\n" not in stop.value.code
    return stop.value.code


def steps(out):
    return [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def training(folder, steps=1):
    """A model and its optimizer after some steps."""
    model = common.load_model(folder / "neox", train=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def state(model, optimizer):
    moments = [value for entry in optimizer.state.values() for value in entry.values()]
    return [parameter.data.clone() for parameter in model.parameters()] + [
        value.clone() for value in moments
    ]


@pytest.fixture(scope="module")
def story(folder, tmp_path_factory):
    """Two processes start four runs and die in a save; one process does its own and a part; two end
    them.
    """
    here = tmp_path_factory.mktemp("story")
    torch.save(IDS, here / "ids.pt")
    first = launch(here, PAIR_1, here, folder, processes=2)
    assert (here / "torn/step-4.tmp/COMPLETE.json").exists() and not (
        here / "torn/step-4"
    ).exists(), first
    alone = launch(here, ALONE, here, folder / "neox")
    second = launch(here, PAIR_2, here, folder, processes=2)
    return {"here": here, "first": first, "alone": alone, "second": second}


def test_a_dead_rank_ends_the_launch(story):
    code, printed = story["first"]
    assert code == 1 and "exit code -9" in printed, printed


@pytest.mark.parametrize("name", ["neox", "llama"])
def test_two_processes_hold_the_model_of_one(folder, story, name):
    model = common.load_model(folder / name, train=True)
    logits = model(IDS).logits
    model(input_ids=IDS, labels=IDS).loss.backward()
    gradients, norm = (
        [p.grad.clone() for p in model.parameters()],
        common.clip_gradients(model, 1e9).item(),
    )
    exported = AutoModelForCausalLM.from_pretrained(story["here"] / f"export-{name}")
    torch.testing.assert_close(exported(IDS).logits, logits, atol=1e-6, rtol=0)
    assert exported.dtype == torch.float32 and exported.config.architectures == [
        type(model).__name__
    ]
    for rank in (0, 1):
        seen = torch.load(story["here"] / f"seen-{rank}.pt")
        assert len(seen[name, "inv_freq"]) > 0 and seen[name, "dtypes"] == {torch.float32}
        for inv_freq in seen[name, "inv_freq"]:
            torch.testing.assert_close(inv_freq, INV_FREQ, atol=0, rtol=1e-6)
        torch.testing.assert_close(
            seen[name, "logits"], logits, atol=1e-6, rtol=0
        )  # the order of fp32 sums
        torch.testing.assert_close(seen[name, "gradients"], gradients, atol=1e-6, rtol=0)
        assert seen[name, "norm"] == pytest.approx(norm, rel=1e-6)
        error = (seen[name, "bf16 logits"] - logits).abs().max().item()
        assert (
            1e-5 < error < 2e-2 * logits.abs().max()
        )  # bf16 keeps 8 bits: neither exact nor far off


def test_log_weighs_every_item_of_every_rank_alike(story):
    for rank in (0, 1):  # rank 0 has no items, rank 1 has 0, 1, 2
        seen = torch.load(story["here"] / f"seen-{rank}.pt")["log"]
        assert seen == {"step": 7, "some/items": 1.0, "flag": 1.0, "x": 0.5}
    lines = (story["here"] / "metrics.jsonl").read_text()
    assert (
        lines == json.dumps(seen) + "\n"
        and story["first"][1].count("step      7  some/items 1.000") == 1
    )


def test_killed_runs_end_as_the_undisturbed_ones(story):
    """kill -9 at random times, alone; between writing and renaming, with one and two processes."""
    here, (code, printed) = story["here"], story["alone"]
    assert code == 0 and "all done" in printed, printed
    pairs = {f"{name}-killed": f"{name}-whole" for name in ("AdamW", "RMSprop")}
    pairs |= {"lone": "AdamW-whole", "torn": "whole"}
    for killed, whole in pairs.items():
        count = len(losses(here / whole))
        assert count == (6 if killed == "torn" else 20)
        assert (here / whole / "final.txt").read_text() == (here / killed / "final.txt").read_text()
        assert steps(here / killed) == list(range(count)) and losses(here / killed) == losses(
            here / whole
        )
        kept = {
            path.name for path in (here / killed).glob("step-*")
        }  # more, if killed before the last deletion
        assert kept >= {f"step-{count - 2}", f"step-{count}"}


def test_two_processes_then_one_then_two(story):
    moved, steady = losses(story["here"] / "moved"), losses(story["here"] / "steady")
    assert len(moved) == 6 and moved == pytest.approx(steady, rel=1e-6)  # the order of fp32 sums


def test_all_ranks_leave_with_one_line(story):
    code, printed = story["second"]
    assert code == 1 and printed.count("torn: holds a run") == 1, printed


def test_run_folder(tmp_path):
    out = tmp_path / "run"
    assert common.start_run(Args(str(out)), "x") == out
    config = json.loads((out / "config.json").read_text())
    assert (
        config["beta"] == 0.1 and config["world_size"] == 1 and config["torch"] == torch.__version__
    )
    (out / "metrics.jsonl").write_text("")  # it has begun
    line = fails(common.start_run, Args(str(out)), "x")
    assert str(out) in line and "--overwrite" in line and "--resume" in line

    line = fails(
        common.start_run, Args(str(out), beta=0.2, data="hh", max_steps=5, resume=True), "x"
    )
    assert "beta 0.1 -> 0.2" in line and "data tiny -> hh" in line and "max_steps" not in line
    common.start_run(Args(str(out), max_steps=20, resume=True), "x")

    for folder in ("step-2", "model", "figures", "notes"):
        (out / folder).mkdir()
        (out / folder / "file").write_text("")
    (out / "metrics.jsonl").write_text("{}\n")
    common.start_run(Args(str(out), beta=0.2, overwrite=True), "x")
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "notes"]
    assert json.loads((out / "config.json").read_text())["beta"] == 0.2


def test_a_claim_is_three_lines(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text("")
    common.say_claim("it works.", "holds: it works on tiny (0.6 [0.5, 0.7])", tmp_path)
    text = capsys.readouterr().out
    assert text.splitlines() == [
        "paper: it works.",
        "here:  holds: it works on tiny (0.6 [0.5, 0.7])",
        f"files: {tmp_path}/figures, and all else in {tmp_path}",
    ]
    assert (tmp_path / "claim.txt").read_text() == text[: text.index("files: ")]


def test_a_verdict_needs_an_interval_on_one_side():
    assert common.verdict(0.51, 0.7, 0.5) == "holds"
    assert common.verdict(0.3, 0.49, 0.5) == "does not hold"
    assert common.verdict(0.4, 0.6, 0.5) == "too few to tell"
    assert common.verdict(float("nan"), float("nan")) == "too few to tell"


def test_run_folder_of_somebody_else(tmp_path, monkeypatch):
    (tmp_path / "thesis.tex").write_text("")
    assert "config.json" in fails(common.start_run, Args(str(tmp_path), overwrite=True), "x")
    assert "no run to resume" in fails(
        common.start_run, Args(str(tmp_path / "new"), resume=True), "x"
    )
    assert "thesis.tex" in fails(common.start_run, Args(str(tmp_path / "thesis.tex/run")), "x")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    monkeypatch.chdir(tmp_path)
    assert common.start_run(Args(""), "dpo-hh") == Path("results/dpo-hh")


def test_checkpoint_round_trip(folder, tmp_path):
    model, optimizer = training(folder, steps=2)
    common.save_checkpoint(
        tmp_path, 2, model, optimizer, seen=[1, 2], baseline=torch.ones(2), note="x"
    )
    after_saving = torch.rand(3)
    other = training(folder, steps=0)
    step, extra = common.load_checkpoint(tmp_path, *other)
    assert step == 2 and torch.equal(extra.pop("baseline"), torch.ones(2))
    assert extra == {"seen": [1, 2], "note": "x"}
    assert all(map(torch.equal, state(*other), state(model, optimizer)))
    assert len(state(*other)) == 4 * len(
        list(model.parameters())
    )  # weight, two moments and a count of steps
    assert torch.equal(torch.rand(3), after_saving)
    assert common.load_checkpoint(tmp_path / "empty", *other) == (0, {})


def damage_flip(folder):
    path = max(folder.glob("*.distcp"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return path.name


def damage_truncate(folder):
    path = max(folder.glob("*.distcp"))
    path.write_bytes(path.read_bytes()[:-100])
    return path.name


def damage_delete(folder):
    path = max(folder.glob("*.distcp"))
    path.unlink()
    return path.name


def damage_manifest(folder):
    (folder / "COMPLETE.json").unlink()
    return "COMPLETE.json"


@pytest.mark.parametrize("damage", [damage_flip, damage_truncate, damage_delete, damage_manifest])
def test_damaged_checkpoints(folder, tmp_path, capsys, damage):
    lines = [f'{{"step": {i}}}\n' for i in range(5)] + ['{"step": 5, "lo']
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    model, optimizer = training(folder, steps=1)
    good = state(model, optimizer)
    common.save_checkpoint(tmp_path, 2, model, optimizer)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    common.save_checkpoint(tmp_path, 4, model, optimizer)
    name = damage(tmp_path / "step-4")
    other = training(folder, steps=0)
    assert common.load_checkpoint(tmp_path, *other)[0] == 2
    assert f"skip step-4: damaged ['{name}']" in capsys.readouterr().out
    assert all(map(torch.equal, state(*other), good)) and steps(tmp_path) == [0, 1]

    common.save_checkpoint(
        tmp_path, 3, *other
    )  # the damaged later one makes room, not the good earlier one
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-2", "step-3"]
    for folder in tmp_path.glob("step-*"):
        damage(folder)
    assert str(tmp_path) in fails(common.load_checkpoint, tmp_path, *other)
    assert steps(tmp_path) == [0, 1]


def test_newest_checkpoints_are_kept(folder, tmp_path):
    model, optimizer = training(folder)
    for step in (8, 9, 10, 11):
        common.save_checkpoint(tmp_path, step, model, optimizer, keep=3)
    common.save_checkpoint(tmp_path, 11, model, optimizer, keep=3)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-10", "step-11", "step-9"]


@pytest.mark.parametrize("fault", ["disk full", "file in the way"])
def test_checkpoint_cannot_be_written(folder, tmp_path, fault):
    model, optimizer = training(folder)
    common.save_checkpoint(tmp_path, 1, model, optimizer)
    good, limit = state(model, optimizer), resource.getrlimit(resource.RLIMIT_FSIZE)
    if fault == "disk full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
    else:
        (tmp_path / "step-2.tmp").write_text("")
    try:
        line = fails(common.save_checkpoint, tmp_path, 2, model, optimizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert str(tmp_path / "step-2.tmp") in line and "make room" in line
    assert not (tmp_path / "step-2").exists()
    if fault == "file in the way":
        (tmp_path / "step-2.tmp").unlink()
    other = training(folder, steps=0)
    assert common.load_checkpoint(tmp_path, *other)[0] == 1
    assert all(map(torch.equal, state(*other), good)) and not (tmp_path / "step-2.tmp").exists()


def test_export_round_trip(folder, tmp_path):
    model, tokenizer = (
        common.load_model(folder / "llama", train=True),
        common.load_tokenizer(folder / "neox"),
    )
    common.save_model(model, tokenizer, tmp_path / "model")
    torch.nn.init.zeros_(model.model.norm.weight)
    common.save_model(model, tokenizer, tmp_path / "model")  # over the first
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "model")("a b").input_ids
        == tokenizer("a b").input_ids
    )
    assert "TokenizersBackend" not in (tmp_path / "model/tokenizer_config.json").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert torch.equal(common.load_model(tmp_path)(IDS).logits, again(IDS).logits)  # a run folder


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading(folder, dtype, train):
    """A bf16 checkpoint with dropout 0.3."""
    model = common.load_model(folder / "neox", dtype, train=train)
    stored = torch.float32 if train else getattr(torch, dtype)
    assert {(p.dtype, p.requires_grad) for p in model.parameters()} == {(stored, train)}
    assert model.training == train and torch.equal(model(IDS).logits, model(IDS).logits)
    assert model(IDS).logits.dtype == getattr(torch, dtype)
    inv_freqs = [buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq")]
    assert inv_freqs
    for inv_freq in inv_freqs:
        assert inv_freq.dtype == torch.float32
        torch.testing.assert_close(inv_freq, INV_FREQ, atol=0, rtol=1e-6)


def test_models_that_are_none(folder, tmp_path, monkeypatch):
    assert str(tmp_path) in fails(common.load_model, tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    line = fails(common.load_model, "nobody/nothing")
    assert line.startswith("nobody/nothing") and "the hub" in line and "local folder" in line
    assert "tokenizer.json" in fails(common.load_tokenizer, folder / "llama")
    assert common.load_tokenizer(folder / "neox").pad_token == "<eos>"
    shutil.copytree(folder / "llama", tmp_path / "cut")
    weights = tmp_path / "cut/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert str(tmp_path / "cut") in fails(common.load_model, tmp_path / "cut")
    some = load_file(folder / "llama/model.safetensors")
    some.pop("model.layers.1.mlp.up_proj.weight")
    save_file(some, weights, metadata={"format": "pt"})
    assert "model.layers.1.mlp.up_proj.weight" in fails(common.load_model, tmp_path / "cut")


def test_signals():
    assert not common.stop_requested()
    os.kill(os.getpid(), signal.SIGTERM)
    assert common.stop_requested()
    os.kill(os.getpid(), signal.SIGINT)  # does not raise KeyboardInterrupt
    assert common.stop_requested()


def test_seed():
    common.setup(3)
    first = torch.rand(2)
    common.setup(3)
    assert torch.equal(torch.rand(2), first)
