"""What the GPU of pretend.py refuses and notes; test_pretend.py runs these tests on it."""

import copy
import os

import pytest
import torch

if "PRETEND_GPU" not in os.environ:
    pytest.skip("test_pretend.py runs it", allow_module_level=True)

import pretend

here = torch.ones(3)
there = torch.ones(3, device="cuda")

REFUSED = {  # an expression, and words of the error
    "there + here": "tensors of two devices",
    "torch.where(there > 0, there, here)": "tensors of two devices",
    "here.add_(there)": "tensors of two devices",
    "torch.tensor(0.0).add_(there.sum())": "into a tensor of the CPU",
    "here[:2].index_put_((torch.tensor([0]),), there[:1])": "tensors of two devices",
    "torch.rand(3, generator=torch.Generator(), device='cuda')": "a generator of the CPU",
    "there.uniform_(generator=torch.Generator())": "a generator of the CPU",
    "torch.nn.functional.linear(there, torch.ones(2, 3))": "tensors of two devices",
}


@pytest.mark.parametrize("expression", REFUSED)
def test_refused(expression):
    with pytest.raises(RuntimeError, match=REFUSED[expression]):
        eval(expression)


def test_numpy_reads_nothing_there():
    with pytest.raises((TypeError, RuntimeError)):
        there.numpy()


def test_allowed():
    """Numbers, copies, and indices of the CPU."""
    assert (there * torch.tensor(2.0)).tolist() == [2, 2, 2]
    assert there.clone().copy_(here + 1).tolist() == [2, 2, 2]
    assert there[torch.tensor([0, 2])].device.type == "cuda"
    assert (there.cpu() + here).tolist() == [2, 2, 2]


WAITS = ("there.tolist()", "there.sum().item()", "bool(there[0] > 0)", "there.nonzero()")
WAITS += ("there[there > 0]", "there.cpu()", "here.to('cuda')", "there[torch.tensor([0])]")
WAITS += ("torch.cuda.synchronize()", "torch.tensor([1.0], device='cuda')")
GOES_ON = ("there + 1", "there[1:]", "torch.zeros(2, device='cuda')", "there.cumsum(0)")
GOES_ON += ("here.pin_memory().to('cuda', non_blocking=True)", "there[there.argsort()]")


@pytest.mark.parametrize("expression", WAITS + GOES_ON)
def test_waits(expression):
    before = len(pretend.waits)
    eval(expression)
    assert (len(pretend.waits) > before) == (expression in WAITS)
    torch.cuda.set_sync_debug_mode("error")
    try:
        if expression in WAITS:
            with pytest.raises(RuntimeError, match="waits for the GPU"):
                eval(expression)
        else:
            eval(expression)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(step):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = step()
    return graph, made


def test_a_graph_runs_what_was_captured():
    """Not within the capture; with Python's numbers of the capture, in the same memory."""
    number = 2
    given = torch.zeros(3, device="cuda")
    total = torch.zeros(3, device="cuda")

    def step():
        total.add_(1)
        return number * given + torch.arange(3, device="cuda")

    graph, made = captured(step)
    assert total.tolist() == [0, 0, 0] and made.isnan().all()
    number = 5
    given.fill_(10)
    graph.replay()
    graph.replay()
    assert total.tolist() == [2, 2, 2] and made.tolist() == [20, 21, 22]


@pytest.mark.parametrize("step", [lambda: there.sum().item(), lambda: here.to("cuda")])
def test_what_waits_cannot_be_captured(step):
    with pytest.raises(RuntimeError, match="within a capture"):
        captured(step)


def test_modules_move_with_their_ties():
    embedding = torch.nn.Embedding(5, 3)
    head = torch.nn.Linear(3, 5, bias=False)
    head.weight = embedding.weight
    model = torch.nn.ModuleList([embedding, head]).to("cuda")
    again = copy.deepcopy(model)
    for module in (model, again):
        assert module[0].weight is module[1].weight and module[0].weight.is_cuda
        assert isinstance(module[0].weight, torch.nn.Parameter)


def test_gradients_are_those_of_the_cpu():
    torch.manual_seed(0)
    on_cpu = torch.nn.Linear(3, 2)
    on_gpu = copy.deepcopy(on_cpu).cuda()
    on_cpu(here).pow(2).sum().backward()
    on_gpu(there).pow(2).sum().backward()
    assert torch.equal(on_gpu.weight.grad.cpu(), on_cpu.weight.grad)
