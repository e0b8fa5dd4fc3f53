"""Alignment: preferences -> batches -> log-probs -> the method's loss, inside the training loop."""

from dataclasses import astuple

import torch

from data import Sizes, StopTraining, UserError
from lab import evaluate, report
from lab.batches import Batches
from lab.check import first_step
from lab.loop import fit, kept, load_weights, restore, weights
from nanomodel import LoRA


class Stop(Exception):
    """Ends a run early on purpose, after --show has printed a row."""


def align(
    lab,
    policy,
    data,
    loss,
    cfg,
    reference="start",
    prepare=None,
    score=None,
    steps=None,
    every=None,
    optimizer=None,
    watch=None,
    decay=None,
):
    """Train the policy in place on preferences and return it.

    data: rows, or a function (policy, round) -> rows that is called every `every` steps; one
        optimizer serves all rounds.
    loss(logps, ref_logps, batch, cfg) -> losses (B,), metrics.
    reference: "start" (a frozen copy of the policy at this call), "round" (a copy at each call of
        data), "average" (a moving average of the policy's weights), a model, a function
        (policy, step) -> model, or None (ref_logps is None).
    prepare(policy, batch) -> batch draws random numbers that policy and reference must share.
    score(model, batch) -> logps, by default model.logps(batch).
    steps: by default those of the Lab.
    optimizer(params) -> a torch Optimizer, by default that of --optimizer.
    watch(policy, step) -> {name: number}, by default `lab.glance`: the true reward, the KL from the
        base model and what else samples show. Its results become `policy.curve`.
    decay: of the moving average, from 0 to below 1: after each step, the average becomes
        decay * average + (1 - decay) * policy.
    UserError: an argument does not fit, there are no rows, or the loss breaks its contract.
    """
    if optimizer is not None and lab.optimizer is not None:
        raise UserError(
            f"--optimizer {lab.settings.optimizer} would do nothing: this method has its own"
        )
    steps = lab.few(lab.steps if steps is None else steps)
    check_call(data, reference, every, decay)
    with lab.verb("align") as stage:
        if stage.done:
            return restore(policy, stage.value)
        feed = Feed(lab, policy, data, reference, prepare, score, steps, every, decay)
        run_score = lab.compile(feed.score)

        def forward(model, item):
            batch, ref_logps = item
            with lab.autocast():
                logps = run_score(model, batch)
            return logps, ref_logps, batch, cfg

        watch = watch or (
            lambda policy, step: lab.glance(policy, step, lab.full_looks or step in (0, steps))
        )
        how = dict(steps=steps, optimizer=optimizer, watch=watch, state=(feed.save, feed.load))
        how |= dict(title="alignment", ema=lab.settings.ema, forward=forward, check=first_step)
        how |= dict(common=evaluate.common_metrics)
        # a score of the method's own may depend on more than the model and the batch
        fit(lab, policy, feed.batch, lab.compile(loss), capture=score is None, **how)
        if stage.path:
            stage.value = kept(policy)
    return policy


def align_in_rounds(lab, policy, data, loss, cfg, rounds, **how):
    """`align` once in every round, each on rows of its own with a new optimizer -> the policy.

    data(policy, round) -> rows; it may raise `data.StopTraining`, which ends the training.
    rounds: each has an equal share of the steps. how: arguments of `align` other than its steps;
    the reference is by default the policy at the beginning of a round. `policy.curve` has the looks
    of all rounds, with steps that count on from round to round. UserError: rounds < 1.
    """
    if rounds < 1:
        raise UserError(f"rounds = {rounds} must be at least 1")
    curve, ends = [], [round(lab.steps * i / rounds) for i in range(rounds + 1)]
    for i, (first, last) in enumerate(zip(ends, ends[1:])):
        try:
            with lab.in_round(i):
                rows = data(policy, i)
        except StopTraining as reason:
            lab.stopped = f"stopped after step {first}: {reason}"
            break
        policy = lab.align(policy, rows, loss, cfg, steps=last - first, **how)
        curve += [look | {"step": first + look["step"]} for look in policy.curve[bool(curve) :]]
    policy.curve = curve
    return policy


def check_call(data, reference, every, decay):
    """UserError for arguments of `align` that do not fit together."""
    if isinstance(reference, str) and reference not in ("start", "round", "average"):
        raise UserError(
            f'reference {reference!r}: expected "start", "round", "average", a model, '
            "a function or None"
        )
    if (reference == "average") != (decay is not None):
        raise UserError('reference "average" needs decay=, and no other reference reads it')
    if decay is not None and not 0 <= decay < 1:
        raise UserError(f"decay = {decay} must be at least 0 and below 1")
    if callable(data) and not every:
        raise UserError("data is a function: align needs every=, the steps between two calls")
    if not callable(data) and not len(data):
        raise UserError("there are no rows to align on: every row was left out, or none was given")


class Feed:
    """The batches of an alignment, each with its reference log-probs.

    Rows are taken in cyclic order, shuffled once per round in a way that depends only on the seed,
    the round and the number of rows.
    """

    def __init__(self, lab, policy, data, reference, prepare, score, steps, every, decay):
        self.lab, self.policy, self.data, self.every = lab, policy, data, every
        self.fixed = not callable(data)
        self.per_round = steps if self.fixed else every  # optimizer steps on one set of rows
        self.average, self.decay = None, decay
        if reference == "average":
            self.average, reference = frozen(policy), self.averaged
        self.moving = callable(reference) and not isinstance(reference, torch.nn.Module)
        # reference log-probs are cached if the rows are text and every score is that of logps
        self.cached = lab.world.kind == "text" and not (prepare or score or self.moving)
        self.kind = reference
        self.reference = lab.as_reference(policy) if reference == "start" else reference
        self.prepare = prepare or (self.draw_noise if lab.world.kind == "images" else None)
        self.score = score or logps_of
        self.rows, self.batches, self.round = None, None, -1
        self.sizes = None  # Sizes for code that is captured or compiled for each shape

    def draw_noise(self, policy, batch):
        """One draw of t and noise for all K responses of a row."""
        return policy.prepare(batch, self.lab.rng("noise", self.lab.step))

    def begin(self, round, rows):
        """Start a round on a set of rows. UserError: there are none."""
        lab = self.lab
        if not len(rows):
            raise UserError(f"there are no rows to align on in round {round}")
        order = torch.randperm(len(rows), generator=lab.rng("order", len(rows), round)).tolist()
        visited = [rows[i] for i in order[: self.per_round * lab.batch_size]]
        if self.kind is not None and self.cached and not lab.show:
            column = lab.cached_logps(self.reference, visited)
            visited = [row | {"ref_logps": values} for row, values in zip(visited, column)]
        self.batches = Batches(lab, visited, lab.batch_size, self.sizes)
        self.rows, self.round, self.sizes = rows, round, self.batches.sizes

    def batch(self, step):
        """(batch, ref_logps) of one step, with new rows when a round begins."""
        lab = self.lab
        lab.step = step
        round, within = (0, step) if self.fixed else divmod(step, self.every)
        if round != self.round:
            if self.kind == "round":
                self.reference = frozen(self.policy)
            rows = self.data
            if not self.fixed:
                with lab.in_round(round):
                    rows = lab.encode(self.data(self.policy, round))
            self.begin(round, rows)
        batch = self.batches(within)
        if self.prepare:
            with torch.no_grad():
                batch = self.prepare(self.policy, batch)
        if lab.show:
            report.show(lab, self.batches.rows[0], batch)
            raise Stop
        return batch, self.ref_logps(batch)

    @torch.no_grad()
    def averaged(self, policy, step):
        """The moving average, moved towards the weights after the last step; once per step."""
        for weight, param in zip(self.average.parameters(), policy.parameters()):
            if param.requires_grad:
                weight.lerp_(param, 1 - self.decay)
        return self.average

    def ref_logps(self, batch):
        """Log-probs of the reference (B, K, T), cached or computed now; None without one."""
        if self.kind is None:
            return None
        found = batch.columns.pop("ref_logps", None)
        if found is not None:
            return torch.nn.functional.pad(found, (0, batch.mask.shape[2] - found.shape[2]))
        model = self.reference(self.policy, self.lab.step) if self.moving else self.reference
        with torch.no_grad(), self.lab.autocast():
            return self.score(model, batch)

    def save(self):
        """The state of the rows and the reference that a checkpoint must hold."""
        rows, state = None, None
        if not self.fixed:
            rows = [
                {k: v for k, v in row.items() if k not in ("tree", "ref_logps")}
                for row in self.rows or []
            ]
        if self.kind == "round" and isinstance(self.reference, torch.nn.Module):
            state = weights(self.reference)
        if self.average is not None:
            state = weights(self.average)
        least = astuple(self.sizes) if self.sizes else None
        return {"round": self.round, "rows": rows, "reference": state, "sizes": least}

    def load(self, state):
        """Restore what `save` returned."""
        if state["reference"] is not None:
            model = self.average
            if model is None:
                model = self.reference = frozen(self.policy)
            load_weights(model, state["reference"])
        self.sizes = Sizes(*state["sizes"]) if state["sizes"] else None
        if not self.fixed and state["round"] >= 0:
            self.begin(state["round"], self.lab.encode(state["rows"]))


def logps_of(model, batch):
    """The default `score`: log-probs (B, K, T)."""
    return model.logps(batch)


def frozen(model):
    """A copy that is never trained."""
    return LoRA.copied(model).requires_grad_(False).eval()
