"""Start files as if they were typed, without the seconds that importing torch takes each time.

    server = Server()
    server.start(["methods/dpo.py", "--beta", "1"], processes=2).wait() -> CompletedProcess

A process imports what all methods import, and nothing of this repository; it forks a child for each
start, in which the file is run as __main__.  A child is a process of its own: it has its own flags,
signals and memory, and ends as one.  Two and more processes are started as torchrun does it: with
its variables, and when one of them fails the others are told to leave.  Figures are made but not
drawn, unless the variable PICTURES is there.
"""

import atexit
import contextlib
import gc
import inspect
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


# ---- the side of the tests


class Started:
    """A start, with what subprocess.Popen has: pid, poll, wait, send_signal, kill."""

    def __init__(self, server, argv, folder, answer):
        self.server = server
        self.args = argv
        self.folder = Path(folder)
        self.pid = answer["pid"]
        self.returncode = None

    def poll(self):
        """The exit code, None while it runs; below 0: the signal that ended it."""
        if self.returncode is None:
            self.returncode = self.server.ask(poll=self.pid)["code"]
        return self.returncode

    def output(self, name):
        """What it has printed so far, to "out" or "err"."""
        return (self.folder / name).read_text(errors="replace")

    def wait_for(self, text, timeout=300):
        """Wait until it has printed a text, or has ended."""
        end = time.monotonic() + timeout
        while text not in self.output("out") and self.poll() is None:
            if time.monotonic() > end:
                self.kill()
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.01)

    def wait(self, timeout=300):
        """Wait for its end -> subprocess.CompletedProcess.  Raises TimeoutExpired and kills it."""
        end = time.monotonic() + timeout
        pause = 0.005
        while self.poll() is None:
            if time.monotonic() > end:
                self.kill()
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(pause)
            pause = min(0.05, 1.5 * pause)
        printed = self.output("out"), self.output("err")
        return subprocess.CompletedProcess(self.args, self.returncode, *printed)

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        """Kill it, and all processes that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


class Server:
    """The process with the imported libraries."""

    def __init__(self):
        self.folder = tempfile.TemporaryDirectory()
        self.starts = 0
        fixed = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__, self.folder.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **fixed},
        )

    def ask(self, **request):
        """Send a request -> the answer."""
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, argv, processes=0, cwd=ROOT, **environment):
        """Start a file, or "-c" and a program, with its arguments -> Started

        processes: how many, as torchrun starts them; 0: one, as python does.
        """
        self.starts += 1
        folder = Path(self.folder.name, str(self.starts))
        folder.mkdir()
        for name in ("out", "err"):
            (folder / name).touch()
        argv = [str(one) for one in argv]
        environment = {**os.environ, **environment}
        request = {"argv": argv, "processes": processes, "cwd": str(cwd)}
        answer = self.ask(**request, folder=str(folder), environment=environment)
        return Started(self, argv, folder, answer)

    def close(self):
        self.process.stdin.close()
        self.process.wait(30)
        self.folder.cleanup()


# ---- the side of the server


def plain_picture(figure, file, dpi=None):
    """In place of Figure.savefig, which takes longer than a run: the points of its lines."""
    found = []
    for axis in figure.axes:
        for line in axis.lines:
            found.append([line.get_label(), line.get_xydata().tolist()])
    file.write(json.dumps(found).encode())


def exit_code(run):
    """Run, and end as the interpreter does, with what is registered for the end -> exit code

    But for taking down all modules, which takes seconds.
    """
    code = 0
    try:
        run()
    except SystemExit as end:
        code = end.code or 0
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except KeyboardInterrupt:
        traceback.print_exc()
        code = 130
    except BaseException:
        sys.excepthook(*sys.exc_info())  # a run has its own
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def run_file(argv, cwd):
    """Run a file, or "-c" and a program, as python does."""
    os.chdir(cwd)
    if argv[0] == "-c":
        sys.argv = ["-c", *argv[2:]]
        sys.path[0] = ""
        names = {"__name__": "__main__", "__builtins__": __builtins__}
        exec(compile(argv[1], "<string>", "exec"), names)
        return
    sys.argv = list(argv)
    sys.path[0] = str(Path(argv[0]).resolve().parent)
    runpy.run_path(argv[0], run_name="__main__")


def free_port():
    """A port of this machine that nothing listens to."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def run_several(processes, run):
    """Run in several processes, and end, as torchrun does: with exit code 0 or 1."""
    # Its variables, by which torch.distributed finds the others.
    shared = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_PORT": free_port()}
    shared |= {"MASTER_ADDR": "127.0.0.1", "GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "tests"}
    children = []
    for rank in range(processes):
        pid = os.fork()
        if pid == 0:
            for name, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items():
                os.environ[name] = str(value)
            os._exit(exit_code(run))
        children.append(pid)

    # A signal goes on to all of them.
    def pass_on(number, frame):
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    signal.signal(signal.SIGTERM, pass_on)
    signal.signal(signal.SIGINT, pass_on)

    # When one of them fails, the others are told to leave, and half a minute later they must.
    code = 0
    while children:
        pid, status = os.wait()
        children.remove(pid)
        ended = os.waitstatus_to_exitcode(status)
        if ended != 0:
            print(f"one of {processes} processes: exit code {ended}", file=sys.stderr)
        if ended != 0 and code == 0:
            code = 1
            pass_on(signal.SIGTERM, None)
            signal.signal(signal.SIGALRM, lambda *_: pass_on(signal.SIGKILL, None))
            signal.alarm(30)
    os._exit(code)


def become(request):
    """What a forked child does: take on the start's place, variables and files, and run it."""
    os.setpgid(0, 0)
    folder = Path(request["folder"])
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    for number, name in ((1, "out"), (2, "err")):
        opened = os.open(folder / name, os.O_WRONLY | os.O_APPEND)
        os.dup2(opened, number)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.path[1:1] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if "PICTURES" not in os.environ:
        sys.modules["matplotlib.figure"].Figure.savefig = plain_picture

    def run():
        return run_file(request["argv"], request["cwd"])

    if request["processes"]:
        run_several(request["processes"], run)
    os._exit(exit_code(run))


def import_all():
    """What the methods import, and the modules that they import late."""
    import importlib

    names = """numpy pandas pyarrow.parquet tyro tyro._backends._argparse_formatter typeguard
        matplotlib.figure matplotlib.backends.backend_agg PIL.PngImagePlugin PIL.JpegImagePlugin
        torch torch.distributed torch.distributed.fsdp torch.distributed.checkpoint.state_dict
        torch._dynamo torch.nn.utils.rnn datasets filelock safetensors.torch scipy.stats
        transformers transformers.generation.utils transformers.integrations.tensor_parallel
        transformers.models.auto.modeling_auto transformers.models.auto.tokenization_auto
        transformers.models.gpt_neox.modeling_gpt_neox transformers.models.llama.modeling_llama
        transformers.tokenization_utils_tokenizers tyro._backends._tyro_backend
        encodings.latin_1 encodings.utf_8_sig"""
    for name in names.split():
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def serve():
    """Answer requests until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing but answers goes to the tests
    gc.disable()
    import_all()
    if "PRETEND_GPU" in os.environ:
        import pretend

        pretend.install()
    # Where operators are registered torch asks for the caller's module, and inspect then looks at
    # the files of all modules, once.
    inspect.getmodule(inspect.currentframe(), "no file")
    # What a child imports of this repository is compiled once for all of them.
    sys.dont_write_bytecode = False
    sys.pycache_prefix = sys.argv[1]
    gc.freeze()  # a child need not look at these objects, nor copy their pages
    gc.enable()
    codes = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" not in request:
            pid = os.fork()
            if pid == 0:
                become(request)
            print(json.dumps({"pid": pid}), file=answers, flush=True)
            continue
        pid = request["poll"]
        if pid not in codes:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                codes[pid] = os.waitstatus_to_exitcode(status)
        print(json.dumps({"code": codes.get(pid)}), file=answers, flush=True)


if __name__ == "__main__":
    serve()
