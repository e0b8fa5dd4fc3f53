"""Properties of a loss: what holds for any correct formula, each with one sentence for a failure.

A property makes calls out of one item (logps, ref_logps, batch) and judges what the loss returns
for them. It knows no solution: `holding` finds the properties that a given loss has. The tests of
this project, the tests in a handout and the grader use the same list.
"""

import copy
import dataclasses
import math
from collections import namedtuple
from types import SimpleNamespace

import torch

from classroom import calls


class Result(namedtuple("Result", "losses gradient touched")):  # (B,), (B, K, T), bool
    """The first tensor that a call returned, its gradient in the first argument, and a change."""

    @classmethod
    def of(cls, found):
        """The Result of what `calls.result` returned."""
        return cls(found["value0"], found["gradient0"], bool(found["touched"]))


TINY = dict(rtol=1e-9, atol=1e-11)


class Property:
    """A rule that a loss may keep.

    sentence: what a loss that breaks it should do. calls(item, cfg) -> [(item, fields)]: fields are
    those of the Config that the call changes; None: the rule does not concern this item.
    keeps(results, calls) -> bool, with one Result per call.
    """

    def __init__(self, sentence, calls, keeps):
        self.sentence, self.calls, self.keeps = sentence, calls, keeps


# ---------------------------------------------------------------- changes of an item


def mapped(item, change):
    """An item with every tensor x replaced by change(x)."""
    logps, ref_logps, batch = item
    columns = {name: change(value) for name, value in vars(batch).items()}
    ref_logps = None if ref_logps is None else change(ref_logps.detach())
    return change(logps.detach()).requires_grad_(), ref_logps, SimpleNamespace(**columns)


def with_logps(item, logps, ref_logps=None):
    """The same item with other log-probs."""
    _, old, batch = item
    ref_logps = old if ref_logps is None else ref_logps
    return logps.detach().clone().requires_grad_(), ref_logps, batch


def first_tokens(item):
    """(B, K, T) bool: the first scored token of every response."""
    mask = item[2].mask
    return mask & (mask.cumsum(-1) == 1)


def padded(item, left=0, right=0):
    """The item with tokens before and behind that are not scored."""
    shape = item[2].mask.shape

    def wide(x):
        return torch.nn.functional.pad(x, (left, right)) if x.shape == shape else x

    return mapped(item, wide)


def permuted(item, order):
    """The item with its responses in another order."""
    K = item[0].shape[1]
    return mapped(item, lambda x: x[:, order] if x.dim() > 1 and x.shape[1] == K else x)


def split(item, whole):
    """Every token twice: with half its log-prob each, or (whole) with all of it."""
    shape = item[2].mask.shape

    def twice(x):
        if x.shape != shape:
            return x
        x = x.repeat_interleave(2, -1)
        return x / 2 if x.is_floating_point() and not whole else x

    return mapped(item, twice)


def far(item, first, last):
    """The item with log-probs that are lower by up to 10,000 nats."""
    logps, _, batch = item
    away = torch.zeros_like(logps).detach()
    away[:, 0, 0], away[:, -1, 0] = first, last
    return with_logps(item, (logps.detach() + away) * batch.mask)


# ---------------------------------------------------------------- which items a rule concerns


def is_pairs(item):
    return item[0].shape[1] == 2


def no_gradient(results, found):
    return not results[0].gradient.any()


def alone(item, cfg):
    return [(item, {})]


def ratios(item):
    """Whether there is a reference and all of its responses have a scored token."""
    return item[1] is not None and bool(item[2].mask.any(-1).all())


def at_reference(item, cfg):
    return [(with_logps(item, item[1]), {})] if ratios(item) else None


def shifted(item, cfg):
    if not (ratios(item) and is_pairs(item)):
        return None
    return [(item, {}), (with_logps(item, item[0] - 0.7 * first_tokens(item)), {})]


def swapped(item, cfg):
    if not (ratios(item) and is_pairs(item)):
        return None
    logps, ref = item[0].detach(), item[1]
    # a pair whose margin has the other sign: the responses exchange their log-ratios
    change = (logps - ref).sum(-1)
    flipped = ref + (change.flip(1) * 1.0)[..., None] * first_tokens(item)
    at = with_logps(item, ref + change[..., None] * first_tokens(item))
    return [(at, {}), (with_logps(item, flipped), {}), (with_logps(item, ref), {})]


def other_reference(item, cfg):
    if item[1] is None:
        return None
    return [(item, {}), (with_logps(item, item[0], item[1] - 0.3 * first_tokens(item)), {})]


def reference_as_leaf(item, cfg):
    if item[1] is None:
        return None
    logps, ref, batch = item
    return [((logps, ref.detach().clone().requires_grad_(), batch), {})]


def behind(item, cfg):
    return [(item, {}), (padded(item, right=3), {})]


def before(item, cfg):
    return [(item, {}), (padded(item, left=2), {})]


def reversed_rows(item, cfg):
    return [(item, {}), (mapped(item, lambda x: x.flip(0)), {})]


def two_rows(item, cfg):
    if len(item[0]) < 3:
        return None
    return [(item, {}), (mapped(item, lambda x: x[:2]), {})]


def other_order(item, cfg):
    if is_pairs(item):
        return None
    return [(item, {}), (permuted(item, torch.arange(item[0].shape[1]).flip(0)), {})]


def halves(item, cfg):
    return [(item, {}), (split(item, whole=False), {})]


def copies(item, cfg):
    return [(item, {}), (split(item, whole=True), {})]


def far_away(item, cfg):
    places = ((-1e4, 0.0), (0.0, -1e4), (-1e4, -1e4))
    return [(far(item, *place), {}) for place in places]


def flips(item, cfg):
    """The pair, the pair with its labels exchanged, and the pair with clean labels."""
    epsilon = getattr(cfg, "epsilon", None)
    if not (is_pairs(item) and isinstance(epsilon, float) and ratios(item)):
        return None
    other = permuted(item, torch.tensor([1, 0]))
    return [(item, {}), (other, {}), (item, {"epsilon": 0.0})]


# ---------------------------------------------------------------- judgements


def close(a, b):
    same = a.shape == b.shape
    return same and torch.allclose(a.double(), b.double(), equal_nan=True, **TINY)


def same_losses(results, calls):
    return close(results[0].losses, results[1].losses)


def opposite_sides(results, calls):
    at, other, start = (result.losses for result in results)
    apart = ((at - start) * (other - start)).le(1e-12).all()
    return bool(apart) and not close(at, other)


def signs(results, calls):
    gradient, mask = results[0].gradient, calls[0][0][2].mask
    if gradient.shape != mask.shape:
        return False
    total = (gradient * mask).sum(-1)
    return bool((total[:, 0] <= 1e-12).all() and (total[:, 1] >= -1e-12).all() and total.any())


def finite(results, calls):
    return all(r.losses.isfinite().all() and r.gradient.isfinite().all() for r in results)


def averaged(results, calls, epsilon):
    chosen, flipped, clean = (result.losses for result in results)
    return close((1 - epsilon) * chosen + epsilon * flipped, clean)


def prefix(results, calls):
    first, part = results[0].losses, results[1].losses
    return first.dim() == 1 and close(first[: len(part)], part)


def mirrored(results, calls):
    return results[0].losses.dim() == 1 and close(results[0].losses.flip(0), results[1].losses)


PROPERTIES = {
    "one number per row": Property(
        "return one loss per row, (B,), that changes with the policy: the loop averages over rows",
        alone,
        lambda r, c: r[0].losses.shape == c[0][0][0].shape[:1] and bool(r[0].gradient.any()),
    ),
    "ln 2 at the reference": Property(
        "where policy and reference agree, all margins are 0 and the loss is ln 2 = 0.693",
        at_reference,
        lambda r, c: close(r[0].losses, torch.full_like(r[0].losses, 2.0).log()),
    ),
    "difference": Property(
        "adding one number to both log-ratios of a pair changes nothing: only their difference "
        "enters",
        shifted,
        same_losses,
    ),
    "exchange": Property(
        "a pair ranked right has a smaller loss than at the reference, and a pair ranked wrong a "
        "larger one",
        swapped,
        opposite_sides,
    ),
    "signs": Property(
        "a gradient step raises the chosen log-probs and lowers the rejected ones",
        lambda item, cfg: alone(item, cfg) if is_pairs(item) else None,
        signs,
    ),
    "reference": Property(
        "the loss depends on the log-probs of the reference",
        other_reference,
        lambda r, c: not close(r[0].losses, r[1].losses),
    ),
    "constant reference": Property(
        "no gradient flows into the log-probs of the reference",
        reference_as_leaf,
        no_gradient,
    ),
    "sum": Property(
        "log-probs are SUMMED over tokens: a token cut into two of half its log-prob changes "
        "nothing",
        halves,
        same_losses,
    ),
    "mean": Property(
        "log-probs are AVERAGED over tokens: writing every token twice changes nothing",
        copies,
        same_losses,
    ),
    "padding": Property(
        "tokens behind a response that are not in batch.mask have no influence", behind, same_losses
    ),
    "prompt": Property(
        "tokens before a response that are not in batch.mask have no influence", before, same_losses
    ),
    "rows": Property(
        "rows in another order have the same losses in that order", reversed_rows, mirrored
    ),
    "a row alone": Property(
        "the loss of a row does not depend on the other rows of the batch", two_rows, prefix
    ),
    "order of a list": Property(
        "the responses of a list may come in any order", other_order, same_losses
    ),
    "noisy labels": Property(
        "averaged over the flips of its label, the loss of a pair is that of clean labels",
        flips,
        averaged,
    ),
    "finite": Property(
        "losses and gradients are finite at log-ratios of 10,000 nats: use logsigmoid and "
        "logsumexp",
        far_away,
        finite,
    ),
    "arguments": Property(
        "the arguments are left as they were: do not edit tensors in place",
        alone,
        lambda r, c: not r[0].touched,
    ),
    "no state": Property(
        "the same call gives the same loss again",
        lambda item, cfg: [(item, {}), (item, {})],
        same_losses,
    ),
}


# ---------------------------------------------------------------- log-probs of a model


def flat_model(item):
    """(model, batch) with all weights of the model 0, so that its logits are equal."""
    model = copy.deepcopy(item[0])
    for p in model.parameters():
        p.data.zero_()
    return model, item[1]


LOGPS = {
    "outside the mask": Property(
        "log-probs are 0 outside batch.mask",
        alone,
        lambda r, c: not r[0].losses[~c[0][0][1].mask].any(),
    ),
    "at most 0": Property(
        "a log-prob is at most 0, since a probability is at most 1, and below 0 inside batch.mask",
        alone,
        lambda r, c: bool((r[0].losses[c[0][0][1].mask] < 0).all() and (r[0].losses <= 0).all()),
    ),
    "ln V": Property(
        "where all logits are equal, every token of a vocabulary of V has the log-prob -ln V",
        lambda item, cfg: [(flat_model(item), {})],
        lambda r, c: close(
            r[0].losses, -math.log(c[0][0][0].config.vocab_size) * c[0][0][1].mask.double()
        ),
    ),
}
HELPERS = {"GPT.logps": LOGPS}  # the properties of functions other than a loss
RULES = PROPERTIES | LOGPS


def keeps(name, results, calls, cfg):
    """Whether the results of a property's calls keep it."""
    rule = RULES[name]
    if name == "noisy labels":
        return rule.keeps(results, calls, cfg.epsilon)
    return bool(rule.keeps(results, calls))


def observe(module, item, fields, cfg):
    """The Result of the loss of a module for one item, with some fields of the Config changed."""
    logps, ref_logps, batch = item
    leaf = logps.detach().clone().requires_grad_()
    cfg = dataclasses.replace(cfg, **fields) if fields else cfg
    if ref_logps is not None and ref_logps.requires_grad:  # only the gradient in it is asked for
        ref = ref_logps.detach().clone().requires_grad_()
        found = calls.result(module.loss, (logps.detach(), ref, batch, cfg), loss=True)
    else:
        found = calls.result(module.loss, (leaf, ref_logps, batch, cfg), loss=True)
    return Result.of(found)


def holding(module, items, cfg):
    """The names of the properties that the loss of a module has on all items, under a Config."""
    found = []
    for name, rule in PROPERTIES.items():
        made = [found for found in (rule.calls(item, cfg) for item in items) if found]
        try:
            kept = []
            for each in made:
                results = [observe(module, *call, cfg) for call in each]
                kept.append(keeps(name, results, each, cfg))
        except (ValueError, RuntimeError):  # the loss refuses what the property asks
            continue
        if kept and all(kept):
            found.append(name)
    return found
