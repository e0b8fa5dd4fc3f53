"""Functions that are captured in a CUDA graph, which replays their kernels without Python.

A step of a small model is a few hundred kernels, and Python needs longer to launch them than the
card needs to run them. A graph launches all of them at once. What it replays is fixed: the kernels,
their shapes and the addresses of their tensors. So inputs are copied into tensors that stay, and
outputs are copied out before the next replay.

On a CPU the same code calls the function where a graph would be replayed, so that tests reach
everything but the few lines that only CUDA takes.
"""

import dataclasses

import torch

from data import Batch


def mapped(value, function):
    """The value with function(tensor) in place of every tensor in it.

    value: tensors, numbers, texts, None, Batches, and tuples, lists and dicts of them. TypeError:
    it holds something else.
    """
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, Batch):
        names = [field.name for field in dataclasses.fields(value)]
        return Batch(**{name: mapped(getattr(value, name), function) for name in names})
    if isinstance(value, dict):
        return {name: mapped(item, function) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(mapped(item, function) for item in value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a {type(value).__name__} cannot be an input of a captured function")


def tensors_of(value):
    """All tensors in a value, in a fixed order."""
    found = []
    mapped(value, found.append)
    return found


def signature(item):
    """What must be equal for two inputs to share a graph, as text; None: never capture.

    It has every shape, dtype and device, and every value that is not a tensor. Unknown kinds of
    inputs are not captured.
    """

    def about(x):
        return x.dtype, x.device, tuple(x.shape)

    try:
        return str(mapped(item, about))
    except TypeError:
        return None


class Captured:
    """function(item) -> tensors, captured at the second visit of each shape, and then replayed.

    At the first visit of a shape the function is called, which also warms it up: libraries are
    loaded, code is compiled, the states of an optimizer are made. From then on only its kernels run
    again, so it may depend on nothing but the item and on tensors that keep their addresses (the
    weights, the state of an optimizer), must not wait for the device, and must draw no random
    numbers. If the capture fails, the function is called as it is from then on.

    item: see `mapped`. note(line) reports a failed capture.
    """

    most = 8  # graphs; inputs of further shapes are not captured

    def __init__(self, function, device, note=print):
        self.function, self.note, self.on = function, note, True
        self.graphs = {}  # {signature: None after the first visit, then a Graph}
        self.stream, self.pool = None, None
        if torch.device(device).type == "cuda":
            self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def __call__(self, item):
        key = signature(item) if self.on else None
        if key is None or (key not in self.graphs and len(self.graphs) == self.most):
            return self.call(item)
        if key not in self.graphs:
            self.graphs[key] = None
            return self.call(item)
        if self.graphs[key] is None:
            try:
                self.graphs[key] = Graph(self.function, item, self.stream, self.pool)
            except RuntimeError as error:
                self.on, self.graphs = False, {}
                line = str(error).strip().split("\n")[0]
                self.note(f"a step could not be captured in a CUDA graph and runs without: {line}")
                return self.call(item)
        return self.graphs[key](item)

    def call(self, item):
        """Call the function, on CUDA on the stream that captures, as PyTorch asks for."""
        if self.stream is None:
            return self.function(item)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            out = self.function(item)
        torch.cuda.current_stream().wait_stream(self.stream)
        return out


class Graph:
    """The function at one shape, with the tensors that it reads and those that it writes.

    All graphs of one Captured share a memory pool. That is safe, since one is replayed at a time,
    inputs lie outside the pool, and outputs are copied before the next replay.
    """

    def __init__(self, function, item, stream, pool):
        self.function, self.graph, self.out = function, None, None
        self.item = mapped(item, lambda x: x.detach().clone())
        if stream is not None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, pool=pool, stream=stream):
                self.out = function(self.item)

    def __call__(self, item):
        for ours, new in zip(tensors_of(self.item), tensors_of(item)):
            ours.copy_(new, non_blocking=True)
        if self.graph is not None:
            self.graph.replay()
        else:
            self.write(self.function(self.item))
        return mapped(self.out, torch.clone)

    def write(self, out):
        """On a CPU: write the outputs where those of the last call are, as a replay does."""
        if self.out is None:
            self.out = mapped(out, torch.clone)
        for ours, new in zip(tensors_of(self.out), tensors_of(out)):
            ours.copy_(new)


def capturable(optimizer, device):
    """Whether the step of an optimizer can be captured: only torch's own Adam and AdamW.

    On CUDA they are prepared for it: what changes from step to step must lie in tensors there, the
    learning rate, which `lab.fit` writes, and the number of steps.
    """
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
        return False
    for group in optimizer.param_groups:
        if torch.device(device).type == "cuda":
            rate = float(group["lr"])
            group["capturable"], group["lr"] = True, torch.tensor(rate, device=device)
    return True


def packed(metrics):
    """{name: number or tensor of one number} -> (names, vector) and the plain numbers.

    A vector of float64 holds float32, and whole numbers below 2^53, without rounding.
    """
    kept = {name: value for name, value in metrics.items() if isinstance(value, torch.Tensor)}
    vector = torch.stack([value.detach().reshape(()).double() for value in kept.values()])
    numbers = {name: value for name, value in metrics.items() if name not in kept}
    return list(kept), vector, numbers


def unpacked(names, vector, numbers):
    """The metrics that went into `packed`; tensors are views of the vector."""
    return dict(zip(names, vector.unbind())) | numbers
