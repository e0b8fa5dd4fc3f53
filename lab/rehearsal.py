"""A rehearsal of a run, which finds mistakes of the user before anything is trained.

`run` of the method is called with a Lab in which nothing is trained, sampled or written. The
rehearsal ends at the first call that needs a trained model: `lab.base()` in a world that samples
its rows, or a sample of the policy. Rows of a file are encoded and passed to the loss once, in
every round and every call of `align`, so that a row that the method cannot use is reported with
file and line.
"""

import contextlib
import io
import sys
from collections.abc import Sequence

import numpy as np
import torch

from data import UserError, printable
from lab import evaluate
from lab.align import check_call
from lab.lab import Lab
from lab.settings import file_path, slips
from nanomodel import GPT


class Enough(Exception):
    """Ends a rehearsal at the first call that needs a trained model."""


def rehearse(run, world, start):
    """UserError for what the run refuses before anything is trained, and for rows that do not fit.

    world, start: of its settings, as `make_world` and `load_pretrained` made them."""
    path = file_path("world", run.settings.world) if run.settings.world else None
    if path:
        check_recipe(world, run.settings, path)
    lab = Rehearsal(run.settings, quiet=True, world=world, start=start)
    lab.checked = set()  # hashes of the rows that were passed to a loss
    if path:
        check_world(lab, path)
    with contextlib.suppress(Enough), contextlib.redirect_stdout(io.StringIO()):
        if world.held_out is not None:
            lab.base()
            lab.encode(world.held_out[: lab.eval_size])
        if world.kind == "text" and world.reward and world.pretrain:
            with slips(path):
                rows = world.demonstrations(4, lab.rng("rehearsal"))
            lab.truth(rows)
        with torch.random.fork_rng(devices=[]):  # a method may draw from the global generator
            try:
                run.module.run(lab, run.cfg)
            except Enough:
                raise
            except Exception as error:
                # behind an `align` that trained nothing, only faults of rows are meant
                if not lab.aligned or error is lab.fault:
                    raise


def check_recipe(world, settings, path):
    """UserError: a recipe of a user's own world lacks settings that no flag gives either."""
    needed = ["steps", "batch_size", "lr"] + ["prompts"] * (world.kind != "vectors")
    lacking = [n for n in needed if n not in world.align and getattr(settings, n) is None]
    if lacking:
        raise UserError(
            f"{path}: align lacks {', '.join(lacking)}: add them there, or give "
            f"--{', --'.join(lacking)}"
        )
    if world.pretrain and not settings.init and settings.base_steps != 0:
        needed = ["batch_size", "lr"] + ["steps"] * (settings.base_steps is None)
        lacking = [name for name in needed if name not in world.pretrain]
        if lacking:
            raise UserError(f"{path}: pretrain lacks {', '.join(lacking)}")


def check_world(lab, path):
    """UserError: a user's own world, in the file at `path`, does not fit itself or the settings.

    A world with fewer prompts than asked for is used, and that is printed."""
    world = lab.world
    if world.kind == "table":
        with torch.random.fork_rng(devices=[]), slips(path):
            world.rewards()
    if world.kind in ("table", "vectors"):
        return
    with torch.random.fork_rng(devices=[]), slips(path):
        model, prompts = world.model(), world.prompts(lab.prompts, lab.rng("rehearsal"))
    if not isinstance(model, torch.nn.Module):
        raise UserError(f"{path}: model() returned a {type(model).__name__}, not a model")
    if isinstance(prompts, str) or not isinstance(prompts, Sequence | np.ndarray):
        raise UserError(f"{path}: prompts(n, rng) returned a {type(prompts).__name__}, not a list")
    if not len(prompts):
        raise UserError(f"{path}: prompts({lab.prompts}, rng) returned none")
    if len(prompts) < lab.prompts:
        note = f"{world.name} has {len(prompts)} prompts, {lab.prompts} were asked for"
        print(printable(note, None), file=sys.stderr)
    if world.kind != "text" or not isinstance(model, GPT):
        return
    if world.tokenizer is None or not lab.max_response:
        missing = "tokenizer" if world.tokenizer is None else "max_response"
        raise UserError(f"{path}: a world of text needs a {missing}")
    own, tokens = model.config, world.tokenizer.vocab_size
    if own.vocab_size < tokens:
        raise UserError(
            f"{path}: the model has vocab_size {own.vocab_size}, the tokenizer {tokens} tokens"
        )
    if lab.max_response >= own.max_position_embeddings:
        raise UserError(
            f"{path}: max_response is {lab.max_response}, but the context of the model, "
            f"max_position_embeddings, is {own.max_position_embeddings}, prompt included"
        )
    if world.parts:
        with slips(path):
            taken = sorted(evaluate.NAMES & set(world.parts(prompts[0], "")))
        if taken:
            raise UserError(f"{path}: a part of the reward must not be named {taken[0]}")


class Rehearsal(Lab):
    """A Lab whose verbs end the rehearsal if they need a trained model."""

    def enough(self, *args, **kwargs):
        """Replaces every verb that needs a trained model."""
        raise Enough

    aligned, fault = False, None  # whether `align` was called, and the fault that it found

    at = evaluate = finished = fit = logps = race = sample = stage = enough

    def base(self, stage="sft"):
        """The untrained model, if there is a file whose rows can be checked with it."""
        if self.world.given is None:
            raise Enough
        return super().base("raw")

    def align(
        self, policy, data, loss, cfg, reference="start", prepare=None, score=None, **options
    ):
        """Check the rows of all rounds with the loss, at log-probs of 0; nothing is trained.

        A method may call `align` several times, so the rehearsal goes on."""
        try:
            self.check_data(policy, data, loss, cfg, reference, prepare or score, **options)
        except UserError as error:
            self.fault = error
            raise
        self.aligned, policy.curve = True, []
        return policy

    def check_data(
        self,
        policy,
        data,
        loss,
        cfg,
        reference,
        other,
        steps=None,
        every=None,
        decay=None,
        **options,
    ):
        """The checks of `align`; other: whether something else than log-probs of rows is scored."""
        check_call(data, reference, every, decay)
        steps = self.steps if steps is None else steps
        for round in range(-(-steps // every) if callable(data) else 1):
            rows = data
            if callable(data):
                with self.in_round(round):
                    rows = self.encode(data(policy, round))
                if not len(rows):
                    raise UserError(f"there are no rows to align on in round {round}")
            if not other:
                # rounds often have the same rows of a file, or some of them
                keys = [hash((row.get("where"), str(row["responses"]), loss)) for row in rows]
                rows = [r for r, k in zip(rows, keys) if "where" not in r or k not in self.checked]
                self.checked.update(keys)
                for i in range(0, len(rows), 64):
                    self.check_rows(rows[i : i + 64], loss, cfg, reference)

    def check_rows(self, rows, loss, cfg, reference):
        """Pass rows to the loss. UserError: it refuses one; the message has the row's place."""
        batch = self.collate(rows).to("cpu")  # losses read the values of tensors there only
        logps = torch.zeros(batch.mask.shape)
        ref_logps = None if reference is None else logps
        try:
            loss(logps.clone().requires_grad_(), ref_logps, batch, cfg)
        except UserError as error:
            if len(rows) == 1:
                place = f"{rows[0]['where']}: " if "where" in rows[0] else ""
                raise UserError(f"{place}{error}") from None
            for row in rows:
                self.check_rows([row], loss, cfg, reference)
            raise
