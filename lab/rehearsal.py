"""A rehearsal of a run, which finds mistakes of the user before anything is trained.

`run` of the method is called with a Lab in which nothing is trained, sampled or written. The
rehearsal ends at the first call that needs a trained model: `lab.base()` in a world that samples
its rows, or `align` with the rows of a file. Rows of a file are encoded and passed to the loss
once, so that a row that the method cannot use is reported with file and line.
"""

import contextlib
import io

import torch

from data import UserError
from lab.align import check_call
from lab.lab import Lab


class Enough(Exception):
    """Ends a rehearsal at the first call that needs a trained model."""


def rehearse(run, world, start):
    """UserError for what the run refuses before anything is trained, and for rows that do not fit.

    world, start: of its settings, as `make_world` and `load_pretrained` made them."""
    lab = Rehearsal(run.settings, quiet=True, world=world, start=start)
    with contextlib.suppress(Enough), contextlib.redirect_stdout(io.StringIO()):
        if world.held_out is not None:
            lab.base()
            lab.encode(world.held_out[: lab.eval_size])
        if world.kind == "text" and world.reward and world.pretrain:
            lab.truth(world.demonstrations(4, lab.rng("rehearsal")))
        with torch.random.fork_rng(devices=[]):  # a method may draw from the global generator
            run.module.run(lab, run.cfg)


class Rehearsal(Lab):
    """A Lab whose verbs end the rehearsal if they need a trained model."""

    def enough(self, *args, **kwargs):
        """Replaces every verb that needs a trained model."""
        raise Enough

    at = evaluate = finished = fit = logps = race = sample = stage = enough

    def base(self, stage="sft"):
        """The untrained model, if there is a file whose rows can be checked with it."""
        if self.world.given is None:
            raise Enough
        return super().base("raw")

    def align(
        self, policy, data, loss, cfg, reference="start", prepare=None, score=None, **options
    ):
        """Check the rows (of the first round) with the loss, at log-probs of 0."""
        check_call(data, reference, options.get("every"))
        rows = data(policy, 0) if callable(data) else data
        if prepare is None and score is None:
            for i in range(0, len(rows), 64):
                self.check_rows(rows[i : i + 64], loss, cfg, reference)
        raise Enough

    def check_rows(self, rows, loss, cfg, reference):
        """Pass rows to the loss. UserError: it refuses one; the message has the row's place."""
        batch = self.collate(rows)
        logps = torch.zeros(batch.mask.shape, device=self.device)
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
