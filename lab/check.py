"""The contract of a loss, checked in the first step of every run.

A violation is a UserError of one line that says what to change.
"""

import torch

from data import UserError

TAKEN = ("stage", "step", "loss", "grad_norm", "lr")  # what the loop calls its own numbers
PAIR = "end `loss` with `return losses, metrics` (metrics may be {})"


def unpack(returned):
    """Check that a loss returned (losses, metrics) -> that pair. UserError: it did not."""
    if not isinstance(returned, tuple) or len(returned) != 2:
        what = type(returned).__name__
        what = f"{len(returned)} values" if isinstance(returned, tuple) else f"one {what}"
        raise UserError(f"the loss returns {what}, not losses and metrics: {PAIR}")
    return returned


def trainable(losses, metrics, *arguments):
    """Check what a loss of `lab.fit` returned in its first step. UserError: it cannot be trained.

    losses: of any shape, with a gradient. metrics: {name: detached number}.
    """
    if not isinstance(losses, torch.Tensor):
        raise UserError(f"the losses are a {type(losses).__name__}, not a tensor: {PAIR}")
    check_metrics(metrics)
    if not losses.requires_grad:
        raise UserError("the loss has no gradient: it must read the model, and must not detach it")


def first_step(losses, metrics, logps, ref_logps, batch, cfg):
    """Check what a loss returned for its arguments. UserError: it breaks the contract.

    losses must be (B,), finite, with a gradient in logps (B, K, T); metrics must be {name: detached
    number}. The check waits for the device, so it is called once, in the first step, before
    `backward`.
    """
    wanted = (len(batch.mask),)
    if not isinstance(losses, torch.Tensor):
        raise UserError(f"the losses are a {type(losses).__name__}, not a tensor: {PAIR}")
    if losses.shape != wanted:
        raise UserError(shape_line(tuple(losses.shape), tuple(batch.mask.shape)))
    check_metrics(metrics)
    bad = int((~losses.isfinite()).sum())
    if bad:
        raise UserError(
            f"{bad} of {len(losses)} losses are NaN or infinite in the first step, before any "
            "weight has changed: look for the logarithm of a number that is not positive, "
            "a division by zero or an overflow in `loss`"
        )
    slope = None
    if losses.requires_grad:
        slope = torch.autograd.grad(losses.mean(), logps, retain_graph=True, allow_unused=True)[0]
    if slope is None:
        raise UserError(
            "the loss has no gradient in the policy: it must read `logps`, and must not detach it"
        )
    if not slope.isfinite().all():
        raise UserError(
            "the gradient of the loss is NaN or infinite in the first step, although the losses "
            "are finite: look for a square root or a logarithm at 0, or torch.where over an "
            "infinite branch"
        )


def shape_line(shape, rows):
    """The message for losses of a wrong shape, which says what to change; rows: (B, K, T)."""
    B, K, T = rows
    line = f"the losses have shape {shape}, expected ({B},), one loss per row: "
    if shape == ():
        return line + "leave out the last .mean() or .sum(), since the loop averages over the rows"
    if shape == (B, T):
        return line + "sum (or average) over the tokens before the loss, with .sum(-1)"
    if shape == (B, K):
        return line + "combine the K responses of a row, with .sum(1) or .mean(1)"
    if shape == (B, K, T):
        return line + "sum over the tokens with .sum(-1) and combine the K responses of a row"
    return line + "reduce every dimension but the first"


def check_metrics(metrics):
    """Check that metrics is {name: a number or a detached tensor of one number}; else UserError."""
    if not isinstance(metrics, dict):
        raise UserError(f"the metrics are a {type(metrics).__name__}, not a dict: {PAIR}")
    for name, value in metrics.items():
        if name in TAKEN:
            raise UserError(f"the metric {name!r} has the name of a number of the loop: rename it")
        if not isinstance(value, torch.Tensor):
            if not isinstance(value, (int, float)):
                raise UserError(f"the metric {name!r} is a {type(value).__name__}, not a number")
        elif value.requires_grad:
            raise UserError(f"the metric {name!r} has a gradient: add .detach() to it")
        elif value.numel() != 1:
            shape = tuple(value.shape)
            raise UserError(f"the metric {name!r} has shape {shape}: add .mean() to it")
