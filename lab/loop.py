"""The training loop: schedule, batch, loss, backward, clip, step, log, evaluate, checkpoint."""

import contextlib
import functools
import json
import math
import os
import signal
import time

import torch

from data import StopTraining, UserError
from lab.check import trainable, unpack
from lab.folder import read_metrics
from lab.graph import Captured, capturable, packed, unpacked
from lab.report import Progress
from lab.store import load_value, remove_value, save_value, write_text
from nanomodel import LoRA


class Diverged(UserError):
    """A loss or a metric became NaN or infinite."""


def fit(
    lab,
    model,
    batches,
    loss,
    steps=None,
    lr=None,
    warmup=None,
    clip=None,
    optimizer=None,
    watch=None,
    decay=False,
    state=None,
    title="training",
    record=True,
    capture=False,
    ema=0.0,
    forward=None,
    check=trainable,
    common=None,
):
    """Train any nn.Module in place and return it.

    batches: a function step -> batch, or a sequence that is taken in cyclic order. The function may
        raise `data.StopTraining`, which ends the training early.
    loss(model, batch) -> losses of any shape, whose mean is minimized, and {name: detached tensor}.
        With `forward` it has other arguments.
    optimizer(params) -> a torch Optimizer, by default that of --optimizer with learning rate `lr`.
    warmup, decay: the learning rate rises linearly over `warmup` steps, at most a fifth of all, and
        then is constant, as in `lab.align`, or with `decay` follows a cosine down to 10 %.
    watch(model, step) -> {name: number}, called at step 0, every `lab.eval_every` steps and at the
        end. Its results become `model.curve`.
    state: (save, load), two functions for what a checkpoint must hold besides the model.
    record: write the metrics of every step to metrics.jsonl.
    capture: `forward` and `loss` depend on nothing but the model and the batch, so where the Lab
        captures steps in CUDA graphs (lab/graph.py), these may be captured.
    ema: decay of an exponential moving average of the weights, which `watch` sees and which the
        model has at the end; 0 is none. At a step it is at most (1 + step) / (10 + step), so that
        the first weights are soon forgotten.
    forward(model, batch) -> the arguments of `loss`, by default (model, batch).
    check(losses, metrics, *arguments) is called once, with what `loss` returns in the first step.
    common(*arguments) -> further metrics.
    UserError: there are no batches, or the loss returns something else.
    Diverged: a loss or a metric is not finite; the last good checkpoint is kept.
    """
    if not callable(batches) and not len(batches):
        raise UserError("there are no batches to train on")
    get = batches if callable(batches) else lambda step: batches[step % len(batches)]
    steps = lab.few(lab.steps if steps is None else steps)
    warmup = min(lab.settings.warmup if warmup is None else warmup, max(1, steps // 5))
    clip = lab.settings.clip if clip is None else clip
    every = lab.eval_every or max(1, steps // 20)
    with lab.verb("fit") as stage:
        if stage.done:
            return restore(model, stage.value)
        params = [p for p in model.parameters() if p.requires_grad]
        lr = lab.lr if lr is None else lr
        make = lab.optimizer and functools.partial(lab.optimizer, lr=lr)
        optimizer = (optimizer or make or adamw(lab, lr))(params)
        peaks = [float(group["lr"]) for group in optimizer.param_groups]
        training, model.fingerprint = model.training, None
        log = Log(lab, title, steps, record)
        average = Average(model, ema) if ema else None
        if average:
            state = average.kept_with(state)
        step, curve = log.resume(model, optimizer, state)
        if log.ended:
            model.curve = curve
            return model
        checks = [check]
        parts = forward, loss, checks, common
        take_step = functools.partial(one_step, model, optimizer, clip, *parts)
        if capture and lab.captured and capturable(optimizer, lab.device):
            take_step = in_graphs(lab, take_step)

        with interruptible() as interrupted:
            while True:
                # evaluate
                seen = curve and curve[-1]["step"] == step
                if watch and not seen and (step % every == 0 or step == steps):
                    log.write()
                    model.eval()
                    drawn = lab.samples
                    if average:
                        average.swap()
                    found = watch(model, step)
                    if average:
                        average.swap()
                    lab.samples = drawn  # no method learns from the samples of a look
                    curve.append({"step": step} | found | ({"samples": drawn} if drawn else {}))
                    model.train(training)
                    log.append([curve[-1]])
                if step == steps:
                    break

                # learning rate
                share = min(1.0, (step + 1) / max(1, warmup))
                if decay:
                    share *= 0.1 + 0.45 * (1 + math.cos(math.pi * step / steps))
                for group, peak in zip(optimizer.param_groups, peaks):
                    if isinstance(group["lr"], torch.Tensor):  # a captured step reads it there
                        group["lr"].fill_(peak * share)
                    else:
                        group["lr"] = peak * share

                # one step
                try:
                    batch = get(step)
                except StopTraining as reason:
                    lab.stopped = f"stopped after step {step}: {reason}"
                    steps = step  # the training ends here: one more look, then the loop is left
                    continue
                metrics = take_step(batch)
                if average:
                    average.add(step)
                step += 1

                # log, checkpoint
                own = {name: metrics.pop(name) for name in ("loss", "grad_norm")}
                log.pending.append((step, own | {"lr": peaks[0] * share} | metrics))
                if step % 10 == 0 or step == steps or interrupted:
                    log.write()
                if log.fall and step % 10 == 0 and not interrupted:
                    if log.fall.happened():
                        lab.stopped = log.give_back(model, step)
                        average = None  # the weights that were given back stay
                        break
                    log.keep(model, step, steps)
                if interrupted or (step < steps and time.time() >= log.due):
                    log.checkpoint(step, curve, model, optimizer, state)
                if interrupted:
                    raise KeyboardInterrupt
            if interrupted and step == steps:  # in the last evaluation
                log.checkpoint(step, curve, model, optimizer, state)
                raise KeyboardInterrupt
        if average:
            average.swap()
        optimizer.zero_grad(set_to_none=True)  # the gradients may lie in the memory of a graph
        model.curve = curve
        log.close(step, model, optimizer, state, inner=stage.path is None)
        if stage.path:
            stage.value = kept(model)
    return model


def one_step(model, optimizer, clip, forward, loss, checks, common, batch):
    """Loss, backward, clipping and the optimizer's step -> the metrics as tensors.

    It does not wait for the device, and it may be captured in a CUDA graph. checks: a list with the
    check of the first losses. It is taken out of the list, so that it runs once.
    """
    # before the forward pass, so that old gradients take no memory beside its activations
    optimizer.zero_grad(set_to_none=True)
    arguments = forward(model, batch) if forward else (model, batch)
    losses, metrics = unpack(loss(*arguments))
    if checks:
        checks.pop()(losses, metrics, *arguments)
    shared = common(*arguments) if common else {}
    value = losses.mean()
    value.backward()
    norms = [
        torch.nn.utils.clip_grad_norm_(group["params"], clip) for group in optimizer.param_groups
    ]
    optimizer.step()
    own = {"loss": value.detach(), "grad_norm": torch.stack(norms).max()}
    return own | shared | metrics


def in_graphs(lab, take_step):
    """The step of a batch as a replay of a CUDA graph; its metrics are written to one vector."""
    captured = Captured(lambda batch: packed(take_step(batch)), lab.device, lab.say)
    return lambda batch: unpacked(*captured(batch))


def adamw(lab, lr):
    """The default optimizer, AdamW without weight decay -> a function of the parameters."""
    options = dict(lr=lr, weight_decay=0.0, betas=(0.9, 0.95), fused=lab.device.type != "mps")
    return functools.partial(torch.optim.AdamW, **options)


class Average:
    """An exponential moving average of the weights of a model."""

    def __init__(self, model, decay):
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.decay = decay
        self.values = [p.detach().clone() for p in self.params]

    @torch.no_grad()
    def add(self, step):
        """Move the average towards the weights after the step number `step`, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for value, param in zip(self.values, self.params):
            value.lerp_(param, 1 - decay)

    @torch.no_grad()
    def swap(self):
        """Exchange the weights of the model and their average."""
        for value, param in zip(self.values, self.params):
            weight = param.clone()
            param.copy_(value)
            value.copy_(weight)

    def kept_with(self, state):
        """The functions (save, load) of a checkpoint that holds the average, too."""
        save, load = state or (lambda: None, lambda _: None)

        def load_both(found):
            load(found["state"])
            for value, old in zip(self.values, found["average"]):
                value.copy_(old)

        return lambda: {"state": save(), "average": self.values}, load_both


class Fall:
    """Whether a policy unlearns the chosen responses themselves while its loss is nearly 0.

    Preferences constrain differences of log-probs alone, so few pairs are fitted perfectly by a
    policy to which chosen and rejected responses are both improbable, and which writes noise. It
    compares the means of the first SPAN steps and of the last SPAN steps."""

    SPAN, NATS, SHARE = 10, 20.0, 0.25  # a fall by NATS nats and a SHARE of the first log-prob

    def __init__(self):
        self.seen = []  # (log-prob of the chosen responses, loss) of each step

    def add(self, values):
        """Note the metrics of a step."""
        if "chosen_logp" in values:
            self.seen.append((values["chosen_logp"], values["loss"]))
            del self.seen[self.SPAN : -self.SPAN]

    def means(self):
        """Chosen log-prob and loss of the first and of the last steps: (2,), (2,)."""
        first, last = self.seen[: self.SPAN], self.seen[self.SPAN :]
        return [[sum(column) / len(part) for column in zip(*part)] for part in (first, last)]

    def fallen(self, share=1.0):
        """Whether the chosen log-prob has fallen by more than this share of the allowed fall."""
        if len(self.seen) < 2 * self.SPAN:
            return False
        (before, _), (now, _) = self.means()
        return before - now > share * (self.NATS + self.SHARE * abs(before))

    def happened(self):
        """Whether it has fallen and the loss is less than a tenth of what it was."""
        if not self.fallen():
            return False
        (_, before), (_, now) = self.means()
        return abs(now) < 0.1 * abs(before)


class Log:
    """Metrics on the terminal and in metrics.jsonl, and the checkpoints of one call of `fit`."""

    def __init__(self, lab, title, steps, record):
        stage = lab.current
        stage.fits += 1  # a stage may train several models, one after the other
        self.title, self.number, self.stage, self.lab = title, stage.number, stage, lab
        self.folder, self.ended = lab.out, False
        self.path = stage.path and f"{stage.path}-checkpoint-{stage.fits}"
        self.file = os.path.join(lab.out, "metrics.jsonl") if lab.out and record else None
        self.bar = Progress(title, steps, quiet=lab.quiet)
        self.pending = []  # (step, metrics) as tensors, so that no step waits for the device
        # only with pairs of a file: elsewhere the true reward shows the fall
        watched = record and self.path and lab.world.given is not None
        watched = watched and lab.world.kind == "text"  # an image's score is mostly its noise
        self.fall = Fall() if watched else None
        # when the next checkpoint is written
        self.due = time.time() + lab.checkpoint_every if self.path else math.inf

    def resume(self, model, optimizer, state):
        """Load the checkpoint of an interrupted run, or start at step 0 -> (step, curve)."""
        size = self.length()
        found = load_value(self.path) if self.path else None
        if found and "ended" not in found:
            raise UserError(
                f"{self.path}.json was written by an earlier version of nanopref, and only that "
                "version can resume it"
            )
        if found and size < found["log"]:
            if self.stage.log is None:
                raise UserError(f"{self.file} is damaged: it is shorter than the checkpoint says")
            found = None  # out of date, since the training before this one was repeated
        if found is None:
            if size:
                self.forget()
            return 0, []
        self.lab.samples = found["samples"]
        if state:
            state[1](found["state"])
        load_weights(model, found["model"])
        if found["ended"]:
            self.ended, self.lab.stopped = True, found["stopped"] or self.lab.stopped
            if self.file:
                self.stage.log = found["log"]
            return found["step"], found["curve"]
        load_optimizer(optimizer, found["optimizer"])
        if size:
            os.truncate(self.file, found["log"])
            if self.fall:
                for line in self.lines():
                    if "loss" in line:
                        self.fall.add(line)
        self.bar.first = found["step"]
        return found["step"], found["curve"]

    def length(self):
        """The size of metrics.jsonl in bytes; 0 where this training does not write it."""
        return os.path.getsize(self.file) if self.file and os.path.exists(self.file) else 0

    def forget(self):
        """Cut from metrics.jsonl what an interrupted run wrote before its first checkpoint."""
        if self.stage.log is None:
            lines = read_metrics(self.file)
            lines = [line for line, values in lines if values["stage"] < self.number]
            write_text(self.file, b"".join(lines).decode())
        else:
            os.truncate(self.file, self.stage.log)

    def lines(self):
        """The lines of metrics.jsonl that this training has written, as dicts."""
        end = 0
        for line, values in read_metrics(self.file):
            if values["stage"] == self.number and end >= (self.stage.log or 0):
                yield values
            end += len(line)

    def write(self):
        """Write the pending metrics to metrics.jsonl; an ordinary step waits for the device here.

        Diverged: one of them is not finite.
        """
        tensors = [x for _, each in self.pending for x in each.values() if torch.is_tensor(x)]
        numbers = map(float, tensors)
        if {x.device.type for x in tensors} == {"cuda"}:  # all of them at once
            vector = torch.stack([x.detach().reshape(()).double() for x in tensors])
            numbers = iter(vector.tolist())
        lines, wrong = [], None
        for step, metrics in self.pending:
            values = {}
            for name, x in metrics.items():
                values[name] = next(numbers) if torch.is_tensor(x) else float(x)
            bad = [name for name, value in values.items() if not math.isfinite(value)]
            if bad:
                wrong = f"{self.title}: {bad[0]} became {values[bad[0]]} in step {step}; "
                wrong += (
                    "no weight had been changed yet, so look at the loss and at the data"
                    if step == 1 and bad[0] != "grad_norm"
                    else "a lower --lr may help"
                )
                break
            lines.append({"step": step} | values)
            self.bar.show(step, values)
        self.pending.clear()
        self.append(lines)
        for line in lines if self.fall else ():
            self.fall.add(line)
        if wrong:
            good = load_value(self.path) if self.path else None
            if good:
                wrong += f". The checkpoint of step {good['step']} is kept in {self.folder}"
            raise Diverged(wrong)

    def keep(self, model, step, steps):
        """Keep the weights while all is well, at most a hundred times in a training."""
        if step % max(10, steps // 1000 * 10) == 0 and not self.fall.fallen(0.5):
            save_value(f"{self.path}-good", {"step": step, "model": weights(model)})

    def give_back(self, model, step):
        """Give the model its last good weights -> what happened, for the report."""
        self.write()
        (before, _), (now, loss) = self.fall.means()
        good = load_value(f"{self.path}-good")
        if good:
            load_weights(model, good["model"])
        kept = f"the weights of step {good['step']} are kept" if good else "no weights were kept"
        return (
            f"stopped in step {step}: the loss is {loss:.2g}, but the log-prob of the chosen "
            f"responses has fallen from {before:.0f} to {now:.0f} nats: the policy unlearns them "
            f"together with the rejected ones; {kept}. Fewer --steps, a smaller --lr or more pairs "
            "may help"
        )

    def append(self, lines):
        """Add lines, dicts of numbers, to metrics.jsonl: of training steps and of what was seen."""
        if self.file and lines:
            os.makedirs(os.path.dirname(self.file), exist_ok=True)
            with open(self.file, "a", encoding="utf-8") as file:
                for line in lines:
                    file.write(json.dumps({"stage": self.number} | line) + "\n")

    def checkpoint(self, step, curve, model, optimizer, state, ended=False):
        """Write everything that `resume` needs; a kill meanwhile leaves the checkpoint before."""
        if not self.path:
            return
        self.write()
        start = time.time()
        value = dict(step=step, curve=curve, state=state[0]() if state else None)
        value |= dict(model=weights(model), samples=self.lab.samples, log=self.length())
        value |= dict(ended=ended, stopped=self.lab.stopped)
        save_value(self.path, value | ({} if ended else {"optimizer": optimizer.state_dict()}))
        cost = time.time() - start  # writing takes 5 % of the time at most
        self.due = time.time() + max(self.lab.checkpoint_every, 20 * cost)

    def close(self, step, model, optimizer, state, inner):
        """Write the last checkpoint, or remove it if the stage is this training and no more."""
        self.bar.close()
        if self.file:
            self.stage.log = self.length()
        if not self.path:
            return
        if inner:  # the stage may go on
            self.checkpoint(step, model.curve, model, optimizer, state, ended=True)
        else:
            remove_value(self.path)
        remove_value(f"{self.path}-good")


def weights(model):
    """The state of a model; with LoRA, without the weights that are never trained."""
    frozen = LoRA.frozen(model)
    return {name: value for name, value in model.state_dict().items() if name not in frozen}


def load_weights(model, state):
    """Load what `weights` returned."""
    model.load_state_dict(model.state_dict() | state)


def kept(model):
    """The weights and the curve of a trained model, as a finished stage stores them."""
    state = {name: value.detach().cpu().clone() for name, value in weights(model).items()}
    return {"weights": state, "curve": model.curve}


def restore(model, value):
    """Give a model the weights and the curve of a finished training."""
    load_weights(model, value["weights"])
    model.fingerprint, model.curve = None, value["curve"]
    return model


def load_optimizer(optimizer, state):
    """Load an optimizer state from a checkpoint, in which all keys of dicts are strings.

    torch casts every tensor but `step` to the dtype of its parameter, which breaks optimizers that
    keep indices or bytes. So the tensors are put back with the dtypes that they were saved with.
    """
    state = state | {"state": {int(k): v for k, v in state["state"].items()}}
    for ours, group in zip(optimizer.param_groups, state["param_groups"]):
        group["lr"] = ours["lr"]  # the loop sets it in every step
    optimizer.load_state_dict(state)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for i, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor) and name != "step":
                optimizer.state[params[i]][name] = value.to(params[i].device)


@contextlib.contextmanager
def interruptible():
    """Yield a list that becomes non-empty at the first Ctrl-C; a second one interrupts at once."""
    hit = []

    def note(number, frame):
        if hit:
            raise KeyboardInterrupt
        hit.append(number)

    try:
        old = signal.signal(signal.SIGINT, note)
    except ValueError:  # not the main thread
        yield hit
        return
    try:
        yield hit
    finally:
        signal.signal(signal.SIGINT, old)
