"""Calls of functions, written to JSON and safetensors, and what they return.

The grader sends calls to the process that runs a submission, and gets tensors back; both sides read
and write them here. Nothing is unpickled. This file imports nothing else of the project, since it
is also used where the submission's own copy of the project is on the path.
"""

import dataclasses
import json
from types import SimpleNamespace

import torch
from safetensors.torch import load_file, save_file


class NotPlain(TypeError):
    """A value that cannot be written as JSON and tensors."""


# ---------------------------------------------------------------- values


def pack(value, tensors):
    """A value as JSON. Its tensors are added to the dict `tensors`. NotPlain: it has other parts.

    A Config, which is a dataclass, is written as its fields; a model, whose class CLASS has a
    CLASSConfig, as the fields of its config and its weights.
    """
    if isinstance(value, torch.Tensor):
        name = f"t{len(tensors)}"
        tensors[name] = value.detach().clone().contiguous()
        return {"tensor": name, "gradient": value.requires_grad}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"plain": value}
    if isinstance(value, SimpleNamespace):
        return {"namespace": {key: pack(part, tensors) for key, part in vars(value).items()}}
    if dataclasses.is_dataclass(value) and type(value).__name__ == "Config":
        return {"config": {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}}
    if isinstance(value, torch.nn.Module):
        weights = {key: pack(x, tensors) for key, x in value.named_parameters()}
        config = dataclasses.asdict(value.config)
        return {"model": type(value).__name__, "config": config, "weights": weights}
    if isinstance(value, (tuple, list)):
        return {type(value).__name__: [pack(part, tensors) for part in value]}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: pack(part, tensors) for key, part in value.items()}}
    raise NotPlain(f"a {type(value).__name__} cannot be sent to another process")


def unpack(form, tensors, names):
    """The value of `pack`; leaf tensors that had a gradient have one.

    names: {name: class}, the names of the module whose Config and models these are.
    """
    (kind, content), *rest = form.items()
    if kind == "tensor":
        return tensors[content].clone().requires_grad_(form["gradient"])
    if kind == "plain":
        return content
    if kind == "config":
        return names["Config"](**content)
    if kind == "model":
        weights = {key: unpack(part, tensors, names) for key, part in form["weights"].items()}
        model = names[content](names[content + "Config"](**form["config"]))
        model.to(next(iter(weights.values())).dtype).load_state_dict(weights)
        return model
    if kind == "namespace":
        parts = {key: unpack(part, tensors, names) for key, part in content.items()}
        return SimpleNamespace(**parts)
    if kind == "dict":
        return {key: unpack(part, tensors, names) for key, part in content.items()}
    made = [unpack(part, tensors, names) for part in content]
    return tuple(made) if kind == "tuple" else made


def write(folder, name, calls):
    """Write calls [(function, arguments)] to NAME.json and NAME.safetensors in a folder."""
    tensors, forms = {}, []
    for function, arguments in calls:
        forms.append({"function": function, "arguments": pack(tuple(arguments), tensors)})
    (folder / f"{name}.json").write_text(json.dumps(forms))
    save_file(tensors, folder / f"{name}.safetensors")


def read(folder, name):
    """What `write` wrote -> ([{function, arguments}], {name: tensor})."""
    forms = json.loads((folder / f"{name}.json").read_text())
    return forms, load_file(folder / f"{name}.safetensors")


# ---------------------------------------------------------------- one call


def leaves(value):
    """The tensors of a value that require a gradient."""
    if isinstance(value, torch.Tensor):
        return [value] if value.requires_grad else []
    if isinstance(value, torch.nn.Module):
        value = [x for x in value.parameters() if x.requires_grad]
    if isinstance(value, SimpleNamespace):
        value = vars(value)
    if isinstance(value, dict):
        value = list(value.values())
    parts = value if isinstance(value, (tuple, list)) else ()
    return [leaf for part in parts for leaf in leaves(part)]


def flat(value):
    """The tensors in what a function returned, in order; numbers and bools become tensors."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (bool, int, float)):
        return [torch.tensor(value, dtype=None if isinstance(value, int) else torch.float64)]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return [x for part in value for x in flat(part)]
    return []


def equal(a, b):
    """Whether two tensors are the same, where NaN equals NaN."""
    return torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def result(function, arguments, loss=False):
    """Call a function -> {"value0": ..., "gradient0": ..., "touched": bool tensor}.

    Values are the tensors that it returns; of a loss the losses alone, whether or not it returns
    metrics beside them. Gradients are those of the sum of its values with a graph, in the arguments
    that require one; a missing gradient is 0. touched: whether the call changed an argument.
    """
    tensors = {}
    before = pack(tuple(arguments), tensors)
    returned = function(*arguments)
    if loss and isinstance(returned, tuple):
        returned = returned[0]
    values = flat(returned)
    if not values:
        raise TypeError(f"it returns a {type(returned).__name__}, which holds no number")
    inputs = leaves(tuple(arguments))
    graphs = [x.sum() for x in values if x.requires_grad]
    slopes = [None] * len(inputs)
    if graphs and inputs:
        slopes = torch.autograd.grad(sum(graphs), inputs, allow_unused=True)
    out = {f"value{i}": x.detach() for i, x in enumerate(values)}
    for i, (slope, x) in enumerate(zip(slopes, inputs)):
        out[f"gradient{i}"] = torch.zeros_like(x) if slope is None else slope.detach()
    after = {}
    same = pack(tuple(arguments), after) == before
    same = same and all(equal(x, after[name]) for name, x in tensors.items())
    return out | {"touched": torch.tensor(not same)}
