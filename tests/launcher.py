"""A process that has imported every method and forks a child for each run.

Importing torch takes seconds, a run on a small model less than one: so hundreds of runs can be
killed, stopped and starved in the time of a few starts.  A child is a process of its own, and dies
as one.  The faults are injected where the run opens, makes, renames or removes a file in a watched
folder (Python's audit events): at the n-th of these it is killed, gets a signal, or finds the disk
full.

    launcher = Launcher()
    run = launcher.start("dpo", options, watch=[out], kill_at=17)
    run.wait() -> Ended(code, out, err, events)
"""

import contextlib
import dataclasses
import fcntl
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import traceback
import warnings
from pathlib import Path

from forks import plain_picture

ROOT = Path(__file__).resolve().parents[1]
MODULES = (
    "sft",
    "dpo",
    "cal_dpo",
    "dpo_gamma",
    "dpl",
    "generate",
    "ranking_accuracy",
    "twisted_smc",
    "imh_adaptors",
)
EVENTS = (
    "open",
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.truncate",
    "shutil.rmtree",
)


# ---- the side of the tests


@dataclasses.dataclass
class Ended:
    """How a run has ended."""

    code: int  # exit code; below 0: the signal that ended it
    out: str
    err: str
    events: list  # of files in the watched folders, by name

    def line(self):
        """What it complained of, which must be one line, without a traceback."""
        lines = self.err.strip().splitlines()
        assert len(lines) == 1 and "Traceback" not in self.err, self.err[-2000:]
        assert len(lines[0]) <= 200, lines[0]
        return lines[0]


class Run:
    """A run that has been started."""

    def __init__(self, launcher, pid):
        self.launcher = launcher
        self.pid = pid

    def wait(self):
        """Wait for its end -> Ended"""
        return Ended(**self.launcher.ask(wait=self.pid))

    def send(self, number):
        """Send it a signal, unless it has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)


class Launcher:
    """The process with the imported methods."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
                "TOKENIZERS_PARALLELISM": "false",
            },
        )

    def ask(self, **request):
        """Send a request -> the answer."""
        self.process.stdin.write(json.dumps(request, default=str) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, command, options, **faults):
        """Start a run -> Run

        command: a method's module, or "module function", called with options as its Args; faults:
        see `Faults`, and `before`, a text of Python that is run first.
        """
        answer = self.ask(command=command, options=options, **faults)
        return Run(self, answer["pid"])

    def run(self, command, options, **faults):
        """A run from start to end -> Ended"""
        return self.start(command, options, **faults).wait()

    def close(self):
        self.process.stdin.close()
        self.process.wait(30)


# ---- the side of the launcher


class Faults:
    """What happens to a run at the events of its files.

    watch: folders.  kill_at: the number of the event before which it is killed.  signal_at: (event,
    signal).  full_at: (text, n, folder): at the n-th event whose file has the text in its name the
    disk is full: the file system of the folder, or, where folder is "", every file's size is
    limited to 0.
    """

    def __init__(self, watch=(), kill_at=0, signal_at=(), full_at=()):
        self.watch = [os.path.abspath(folder) for folder in watch]
        self.kill_at = kill_at
        self.signal_at = signal_at
        self.full_at = full_at
        self.full_seen = 0
        self.events = []
        self.inside = False  # what is done here is no event

    def look(self, event, values):
        """The audit hook."""
        if event not in EVENTS or self.inside or not values:
            return
        name = values[0]
        if isinstance(name, bytes):
            name = name.decode()
        if not isinstance(name, str | os.PathLike):
            return
        name = os.path.abspath(name)
        if not any(name.startswith(folder) for folder in self.watch):
            return
        self.inside = True
        try:
            self.happen(event, name)
        finally:
            self.inside = False

    def happen(self, event, name):
        """One event of a watched file."""
        self.events.append(f"{event} {name}")
        number = len(self.events)
        if number == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.signal_at and number == self.signal_at[0]:
            os.kill(os.getpid(), self.signal_at[1])
        if self.full_at and self.full_at[0] in name:
            self.full_seen += 1
            if self.full_seen == self.full_at[1]:
                fill(self.full_at[2])


def fill(folder):
    """Leave no room in the file system of the folder; where it is "", none for any file."""
    if folder == "":
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
        return
    with open(Path(folder, "filler"), "ab", buffering=0) as file:
        for size in (2**16, 2**12, 1):
            with contextlib.suppress(OSError):
                while file.write(b"x" * size) == size:
                    pass


def options_of(module, options):
    """The options as the method's Args; of dpl.py, whichever class has them."""
    kinds = [module.Args]
    for name in ("SyntheticArgs", "ScoreArgs", "SummarizeArgs"):
        if hasattr(module, name):
            kinds.append(getattr(module, name))
    options = {key: tuple(v) if isinstance(v, list) else v for key, v in options.items()}
    for kind in kinds:
        if set(options) <= {field.name for field in dataclasses.fields(kind)}:
            return kind(**options)
    raise TypeError(f"no class has all of {sorted(options)}")


def child(command, options, before="", cache="", **faults):
    """The run itself -> its exit code"""
    import common

    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if cache:
        common.CACHE = Path(cache)
    name, _, function = command.partition(" ")
    module = importlib.import_module(name)
    args = options_of(module, options)
    exec(before, {"common": common, "module": module})
    watched = Faults(**faults)
    sys.addaudithook(watched.look)
    code = 0
    try:
        if function:
            module.main(args, function)
        else:
            module.main(args)
    except SystemExit as error:
        code = error.code or 0
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
        code = 1
    watched.inside = True
    common.leave()
    print("\nEVENTS", json.dumps(watched.events))
    return code


def read_all(descriptor):
    """All that comes through a pipe until its other end is closed."""
    with os.fdopen(descriptor, "rb") as file:
        return file.read().decode(errors="replace")


def start(request):
    """Fork a child -> its process id, and the ends of its pipes."""
    out_read, out_write = os.pipe()
    err_read, err_write = os.pipe()
    for pipe in (out_write, err_write):
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, 2**20)
    pid = os.fork()
    if pid:
        os.close(out_write)
        os.close(err_write)
        return pid, out_read, err_read
    code = 1
    try:
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.dup2(out_write, 1)
        os.dup2(err_write, 2)
        sys.stdout = os.fdopen(1, "w")
        sys.stderr = os.fdopen(2, "w", buffering=1)
        code = child(**request)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def warm_up():
    """Do once what is slow only the first time.  No gradient, since its threads survive no fork."""
    import tempfile

    import torch
    import torch.distributed.checkpoint as dcp
    from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=16)
        GPTNeoXForCausalLM(GPTNeoXConfig(**sizes)).save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder)
        model(torch.tensor([[1, 2]]))
        warnings.simplefilter("ignore")
        dcp.save({"x": torch.zeros(2)}, checkpoint_id=Path(folder, "step"), no_dist=True)
        with contextlib.suppress(Exception):
            AutoTokenizer.from_pretrained(folder)  # there is none: it is about what is imported


def serve():
    """Answer requests until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing but answers goes to the tests
    sys.path[:0] = [str(ROOT), str(ROOT / "methods")]
    for name in MODULES:
        importlib.import_module(name)
    from matplotlib.figure import Figure

    Figure.savefig = plain_picture
    warm_up()
    running = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            pid = request["wait"]
            out_read, err_read = running.pop(pid)
            out = read_all(out_read)
            err = read_all(err_read)
            _, status = os.waitpid(pid, 0)
            out, _, events = out.partition("\nEVENTS ")
            found = {"code": os.waitstatus_to_exitcode(status), "out": out, "err": err}
            found["events"] = json.loads(events or "[]")
            print(json.dumps(found), file=answers, flush=True)
        else:
            pid, out_read, err_read = start(request)
            running[pid] = (out_read, err_read)
            print(json.dumps({"pid": pid}), file=answers, flush=True)


if __name__ == "__main__":
    serve()
