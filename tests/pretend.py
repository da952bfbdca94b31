"""A GPU that is none: `python tests/pretend.py FILE ARGUMENTS` runs a file as on a GPU.

Its tensors are computed on the CPU, and held to the rules of CUDA:

- tensors of the CPU do not mix with its own, but for single numbers, copies and indices;
- a generator of the CPU draws nothing there, and NumPy reads nothing from there;
- a captured graph has the operations, the memory and Python's numbers of its capture, in which
  nothing runs: a replay runs them, whatever Python has done since;
- what makes the program wait for the GPU is noted in `waits`, and refused within a capture.

So the branches for a GPU run to their ends where there is none, and give the numbers of the CPU.
Not shown are kernels and their roundings, streams, memory, compiled layers, and NCCL.
"""

import contextlib
import functools
import importlib.machinery
import math
import os
import runpy
import sys
import time
import types
from pathlib import Path

import loops
import torch
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

CPU = torch.device("cpu")
OWN = "pretend:0"  # the same device, by the name that torch knows
aten = torch.ops.aten

# ---- what waits, and what is captured

waits = []  # names of the operations that have waited for the GPU
refusing = False  # torch.cuda.set_sync_debug_mode("error")
capturing = None  # the Graph that is being captured

WAITING = {
    "_local_scalar_dense",
    "_unique2",
    "bincount",
    "equal",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}


def wait(name):
    """Note an operation that waits for the GPU.  RuntimeError where none may."""
    if capturing is not None:
        raise RuntimeError(f"{name} waits for the GPU, within a capture")
    if refusing:
        raise RuntimeError(f"{name} waits for the GPU")
    waits.append(name)


class Graph:
    """torch.cuda.CUDAGraph: the operations of a capture, each with the memory of its results."""

    def __init__(self):
        self.launched = []
        self.before = []  # tensors that were written during the capture, and what was in them
        self.fresh = []  # tensors that the capture made

    def note(self, function, args, kwargs, out):
        self.launched.append((function, args, kwargs, out))
        given = {storage_of(x) for x in tensors_in((args, kwargs))}
        for tensor in tensors_in(out):
            if storage_of(tensor) not in given and tensor.is_floating_point():
                self.fresh.append(tensor)

    def end(self):
        """Undo what the capture did: on a GPU it runs nothing."""
        for tensor, content in reversed(self.before):
            tensor.copy_(content)
        for tensor in self.fresh:
            tensor.fill_(float("nan"))
        self.before = []
        self.fresh = []

    def replay(self):
        with torch.no_grad():
            for function, args, kwargs, out in self.launched:
                again = function(*args, **kwargs)
                for old, new in zip(tensors_in(out), tensors_in(again)):
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)


@contextlib.contextmanager
def capture(graph, **options):
    """torch.cuda.graph"""
    global capturing
    capturing = graph
    try:
        yield
    finally:
        capturing = None
        graph.end()


# ---- tensors of the GPU


def gpu():
    """The device of this process: under torchrun each has its own."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


class Pretended(torch.Tensor):
    """A tensor that says it is on the GPU; held: the tensor of the CPU that has its numbers."""

    @staticmethod
    def __new__(cls, held):
        sizes = dict(strides=held.stride(), storage_offset=held.storage_offset())
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, dtype=held.dtype, device=OWN, **sizes
        )
        made.held = held
        return made

    device = property(lambda self: gpu())  # for Python; torch itself knows it by its own name
    is_cuda = property(lambda self: True)

    @property
    def data(self):
        return Pretended(self.held.detach())

    @data.setter
    def data(self, new):
        torch.Tensor.data.__set__(self, new)
        self.held = new.held

    def data_ptr(self):
        return self.held.data_ptr()

    def untyped_storage(self):
        return self.held.untyped_storage()

    def tolist(self):
        wait("tolist")
        return self.held.tolist()

    def __repr__(self):
        return f"Pretended({self.held})"

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            made = Pretended(self.held.detach().clone())
            if isinstance(self, torch.nn.Parameter):
                made = torch.nn.Parameter(made, self.requires_grad)
            memo[id(self)] = made
        return memo[id(self)]

    def __reduce_ex__(self, protocol):
        return self.held.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return launch(function, args, kwargs or {})


def is_there(x):
    return isinstance(x, Pretended)


def mapped(function, nested):
    """The function of what lists, tuples and dictionaries hold."""
    if isinstance(nested, (list, tuple)):
        return type(nested)([mapped(function, x) for x in nested])
    if isinstance(nested, dict):
        return {name: mapped(function, x) for name, x in nested.items()}
    return function(nested)


def tensors_in(nested):
    found = []

    def collect(x):
        if isinstance(x, torch.Tensor):
            found.append(x)

    mapped(collect, nested)
    return found


def storage_of(tensor):
    return tensor.untyped_storage().data_ptr()


def names_gpu(device):
    return device is not None and torch.device(device).type in ("cuda", "pretend")


INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")


def check(function, args, kwargs, tensors, there):
    """RuntimeError for what CUDA refuses; notes what waits.

    tensors: those of the arguments.  there: is the result on the GPU?
    """
    name = function.__name__.split(".")[0]
    if kwargs.get("generator") is not None:
        raise RuntimeError(f"{function}: a generator of the CPU draws nothing on the GPU")
    if name in WAITING or (name == "repeat_interleave" and kwargs.get("output_size") is None):
        wait(name)

    # A copy: the program goes on only where its memory is pinned, which non_blocking stands for.
    if name in ("copy_", "_to_copy"):
        crosses = not there or not all(is_there(x) for x in tensors)
        if crosses and (capturing is not None or not kwargs.get("non_blocking")):
            wait(name)
        return

    # Indices may lie on the CPU; those of bools are counted first.
    indices = []
    if name in INDEXING and is_there(args[0]):
        indices = [x for x in args[1] if x is not None]
        if any(x.dtype in (torch.bool, torch.uint8) or not is_there(x) for x in indices):
            wait(f"{name} by bools, or from the CPU")
    for x in tensors:
        index = any(x is one for one in indices)
        if not is_there(x) and x.dim() > 0 and not index:
            sizes = [(tuple(x.shape), "there" if is_there(x) else "here") for x in tensors]
            raise RuntimeError(f"{function}: tensors of two devices: {sizes}")
    if name.endswith("_") and not is_there(tensors[0]):
        raise RuntimeError(f"{function}: a result of the GPU into a tensor of the CPU")


def of_the_cpu(x):
    """An argument as the CPU gets it."""
    if is_there(x):
        return x.held
    if isinstance(x, torch.device) and names_gpu(x):
        return CPU
    return x


def launch(function, args, kwargs):
    """Run an operation that has to do with the GPU -> its result."""
    tensors = tensors_in((args, kwargs))
    there = any(is_there(x) for x in tensors)
    if kwargs.get("device") is not None:
        there = names_gpu(kwargs["device"])
    if function is aten.copy_.default:
        there = is_there(args[0])
    if function is aten._fused_sdp_choice.default:
        return 0  # plain operations: a CPU has no other of CUDA's kernels
    check(function, args, kwargs, tensors, there)

    # The same with tensors of the CPU.
    held_args = mapped(of_the_cpu, args)
    held_kwargs = mapped(of_the_cpu, kwargs)
    if capturing is not None:
        save_what_is_written(function, held_args, held_kwargs)
    out = function(*held_args, **held_kwargs)
    if capturing is not None:
        capturing.note(function, held_args, held_kwargs, out)
    if not there:
        return out

    # What was written in place is the same tensor again.
    same = {id(x.held): x for x in tensors if is_there(x)}

    def wrapped(x):
        if not isinstance(x, torch.Tensor):
            return x
        return same[id(x)] if id(x) in same else Pretended(x)

    return mapped(wrapped, out)


def save_what_is_written(function, args, kwargs):
    """For Graph.end."""
    schema = getattr(function, "_schema", None)
    if schema is None:
        return
    for number, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[number] if number < len(args) else kwargs.get(argument.name)
            for tensor in tensors_in(value):
                capturing.before.append((tensor, tensor.clone()))


class Rules(TorchDispatchMode):
    """Operations that have to do with the GPU go through `launch`."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if names_gpu(kwargs.get("device")) or any(is_there(x) for x in tensors_in((args, kwargs))):
            return launch(function, args, kwargs)
        return function(*args, **kwargs)


# ---- kernels: in their place plain loops


class Varlen(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, queries, keys, sizes, options):
        lengths = (queries.held, keys.held, *sizes)
        with torch.enable_grad(), _disable_current_modes():
            ctx.given = [x.held.detach().requires_grad_() for x in (q, k, v)]
            ctx.out = loops.varlen_reference(*ctx.given, *lengths, **options)
        return Pretended(ctx.out.detach())

    @staticmethod
    def backward(ctx, gradient):
        with _disable_current_modes():
            found = torch.autograd.grad(ctx.out, ctx.given, gradient.held)
        return *(Pretended(x) for x in found), None, None, None, None


@functools.wraps(loops.varlen_reference)
def varlen_attn(q, k, v, queries, keys, *sizes, **options):
    return Varlen.apply(q, k, v, queries, keys, sizes, options)


class Kernel:
    """The decoding kernel of common.py, as triton.jit gives it: kernel[grid](arguments)."""

    def __init__(self, function):
        assert function.__name__ == "attend_kernel"

    def __getitem__(self, grid):
        return self.run

    def run(self, q, keys, values, table, used, out, scale, *sizes, **options):
        inner = [x.held for x in (q, keys, values, table, used, out)]
        if capturing is not None:
            capturing.before.append((out.held, out.held.clone()))
            capturing.note(self.fill, (*inner, scale), {}, None)
        self.fill(*inner, scale)

    @staticmethod
    def fill(q, keys, values, table, used, out, scale):
        scale = scale * math.log(2)  # the kernel's is for powers of two
        with _disable_current_modes():
            out.copy_(loops.attend_reference(q, keys, values, table, used, scale))


def stand_in_for_triton():
    triton = types.ModuleType("triton")
    triton.__spec__ = importlib.machinery.ModuleSpec("triton", None)
    triton.language = types.ModuleType("triton.language")
    triton.jit = Kernel
    triton.cdiv = lambda a, b: -(-a // b)
    triton.next_power_of_2 = lambda n: 1 << (n - 1).bit_length()
    sys.modules["triton"] = triton
    sys.modules["triton.language"] = triton.language


# ---- torch.cuda


class Stream:
    def __init__(self, *device, **options):
        pass

    def wait_stream(self, *other):
        pass

    wait_event = record_event = wait_stream

    def synchronize(self):
        wait("synchronize")


STREAM = Stream()


class Event:
    """The clock of the CPU, on which everything runs."""

    def __init__(self, **options):
        self.at = None

    def record(self, *stream):
        self.at = time.perf_counter()

    def synchronize(self):
        wait("synchronize")

    def elapsed_time(self, end):
        return 1000 * (end.at - self.at)


def refuse_waits(mode):
    global refusing
    refusing = mode in ("error", 2)


def nothing(*args, **kwargs):
    pass


def properties(*device):
    return types.SimpleNamespace(name="no GPU", total_memory=2**36, major=9, minor=0)


def is_available():
    return os.environ.get("CUDA_VISIBLE_DEVICES") != ""


def device_count():
    """PRETEND_GPU says how many."""
    return int(os.environ.get("PRETEND_GPU", "1")) if is_available() else 0


STAND_INS = dict(
    _lazy_init=nothing,
    is_available=is_available,
    device_count=device_count,
    current_device=lambda: gpu().index,
    is_initialized=lambda: True,
    is_current_stream_capturing=lambda: capturing is not None,
    set_device=nothing,
    device=lambda *device: contextlib.nullcontext(),
    get_device_name=lambda *device: "no GPU",
    get_device_capability=lambda *device: (9, 0),
    get_device_properties=properties,
    is_bf16_supported=lambda **options: True,
    get_amp_supported_dtype=lambda: [torch.bfloat16, torch.float16],
    get_rng_state=lambda *device: torch.zeros(16, dtype=torch.uint8),
    set_rng_state=nothing,
    synchronize=lambda *device: wait("synchronize"),
    set_sync_debug_mode=refuse_waits,
    get_sync_debug_mode=lambda: 2 * refusing,
    Stream=Stream,
    Event=Event,
    current_stream=lambda *device: STREAM,
    stream=lambda stream: contextlib.nullcontext(),
    CUDAGraph=Graph,
    graph=capture,
    empty_cache=nothing,
    reset_peak_memory_stats=nothing,
    max_memory_allocated=lambda *device: 0,
    max_memory_reserved=lambda *device: 0,
    memory_allocated=lambda *device: 0,
    set_per_process_memory_fraction=nothing,
)


def move_where_rules_see_it():
    """Functions that would look for a card before `Rules` is asked name the device by OWN."""
    _device_constructors()  # `with torch.device(...)` looks them up once: before they are replaced
    plain_to = torch.Tensor.to
    plain_tensor = torch.tensor

    def to(tensor, *args, **kwargs):
        args = [OWN if isinstance(x, (str, torch.device)) and names_gpu(x) else x for x in args]
        if names_gpu(kwargs.get("device")):
            kwargs["device"] = OWN
        return plain_to(tensor, *args, **kwargs)

    def tensor(data, device=None, **how):
        made = plain_tensor(data, **how)
        return made if device is None else made.to(device)

    torch.tensor = tensor
    torch.Tensor.to = to
    torch.Tensor.cuda = lambda tensor, *device, **how: to(tensor, OWN, **how)
    torch.Tensor.pin_memory = torch.Tensor.clone
    torch._C._set_only_lift_cpu_tensors(True)
    torch.__future__.set_swap_module_params_on_conversion(True)  # so that ties survive


def install():
    """From here on, this process has a GPU: to be called before common.py is imported."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    import torch._dynamo  # before what it looks at is replaced
    import torch.nn.attention.varlen

    for name, value in STAND_INS.items():
        setattr(torch.cuda, name, value)
    _setup_privateuseone_for_python_backend("pretend", torch.cuda)  # a device that autograd knows
    torch.autograd.set_multithreading_enabled(False)  # backward in the program's own thread
    move_where_rules_see_it()

    # gloo for NCCL, and loops for kernels.
    start = torch.distributed.init_process_group
    torch.distributed.init_process_group = lambda backend=None, **how: start("gloo", **how)
    torch.nn.attention.varlen.varlen_attn = varlen_attn
    stand_in_for_triton()
    Rules().__enter__()


def main():
    """Run the file, or "-m" and the module, that the command names."""
    root = Path(__file__).resolve().parents[1]
    sys.path[:0] = [str(root), str(root / "methods")]
    os.environ.setdefault("PRETEND_GPU", "1")  # for processes that forks.py starts, too
    install()
    del sys.argv[0]
    if sys.argv[0] == "-m":
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    import pretend  # this file, by the name that tests have for it

    pretend.main()
