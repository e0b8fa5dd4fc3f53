"""The Lab: all that a method needs besides its mathematics. Base model, sampling, labels, alignment, the training loop, evaluation."""

import contextlib
import copy
import dataclasses
import json
import math
import os
import signal
import sys
import time

import torch

import data as data_module
import nanomodel
from data import Claim, UserError, collate, fit_context, label
from lab import report, store
from lab.hub import load_pretrained
from lab.settings import make_world, pick_device, refuse_idle
from lab.store import digest, load_value, remove_value, save_value, source, write_text

# ---------------------------------------------------------------- the Lab


class Stop(Exception):
    """Ends a run early on purpose (--show)."""


class Lab:
    """Everything a method needs besides its mathematics. Each call of a verb is a numbered stage, kept in `<out>/stages`."""

    checkpoint_every = (
        5.0  # seconds between two checkpoints, at least (and twenty times what the last one took)
    )
    memory = {}  # what `cached` holds, for all Labs of this process

    def __init__(self, settings, out=None, quiet=False, show=False, seeds=1):
        self.settings, self.out, self.quiet, self.show = settings, out, quiet, show
        self.seeds = list(range(settings.seed, settings.seed + seeds))
        self.device = pick_device(settings.device)
        self.bf16 = settings.dtype == "bfloat16" or (
            settings.dtype == "auto" and self.device.type == "cuda"
        )
        self.compiled = settings.compile == "on" or (
            settings.compile == "auto" and self.device.type == "cuda"
        )
        self.start = load_pretrained(settings.init).to(self.device) if settings.init else None
        self.world = make_world(settings, self.start)
        refuse_idle(settings, self.world, self.start)
        own = self.world.align
        for name in (
            "steps",
            "batch_size",
            "lr",
            "prompts",
            "k",
            "max_response",
            "eval_every",
            "base_steps",
        ):
            default = {
                "k": 4,
                "eval_every": None,
                "max_response": self.world.max_response,
            }.get(name)
            value = getattr(settings, name)
            setattr(self, name, own.get(name, default) if value is None else value)
        self.stage_number, self.depth, self.draws, self.fits, self.children = 0, 0, {}, 0, {}
        self.seconds, self.curve, self.reference, self.context, self.started = (
            {},
            [],
            None,
            None,
            time.time(),
        )

    # -- stages and randomness

    def _stage(self, name, function, keep=True):
        """The value of `function()`; inside a run it is kept on disk, and read back when the run is resumed."""
        if self.depth:  # a verb inside a verb belongs to it
            return function()
        self.stage_number += 1
        self.draws, self.fits = {}, 0
        path = (
            keep
            and self.out
            and os.path.join(self.out, "stages", f"{self.stage_number:03d}-{name}")
        )
        kept = load_value(path) if path else None
        if kept is None:
            start, self.depth = time.time(), 1
            try:
                value = function()
            finally:
                self.depth = 0
            kept = {"seconds": time.time() - start, "value": value}
            if path:
                save_value(path, kept)
        self.seconds[name] = self.seconds.get(name, 0.0) + kept["seconds"]
        return kept["value"]

    def stage(self, name, function):
        """A paper's own loop, resumable as a whole: `function()` -> numbers, texts, tensors, lists and dicts of them."""
        return self._stage(name, function)

    def rng(self, name):
        """A fresh torch.Generator; its stream depends on the seed, the stage, the name, and how often the name was asked for there."""
        count = self.draws[name] = self.draws.get(name, 0) + 1
        return self._generator(self.settings.seed, self.stage_number, name, count)

    def _generator(self, *key):
        return torch.Generator().manual_seed(int(digest(*key)[:15], 16))

    def cached(self, key, function):
        """`function()`, or what it gave before under the same key, in this process or in the cache folder."""
        key = digest(key, torch.__version__, torch.get_num_threads(), str(self.device), self.bf16)
        if key not in Lab.memory:
            path = os.path.join(store.CACHE, key)
            value = load_value(path)
            if value is None:
                value = function()
                save_value(path, value)
            Lab.memory[key] = value
        return Lab.memory[key]

    def at(self, **changes):
        """A Lab with other settings and a folder of its own inside this one; what is cached is shared."""
        settings = dataclasses.replace(self.settings, **changes)
        name = "-".join(f"{k}{v}" for k, v in changes.items()).replace(os.sep, "_") or "run"
        count = self.children[name] = self.children.get(name, 0) + 1
        out = self.out and os.path.join(self.out, name + (f"-{count}" if count > 1 else ""))
        return Lab(settings, out, quiet=self.quiet, show=self.show)

    # -- models

    def base(self, stage="sft"):
        """The world's model before alignment: --init, or trained on demonstrations (cached by the hash of all that made it). stage "raw" is
        the model with random weights. Every call gives a fresh copy."""
        settings, world = self.settings, self.world
        if settings.init:
            self.context = getattr(self.start.config, "max_position_embeddings", None)
            model = copy.deepcopy(self.start)
            code = source(nanomodel, data_module, sys.modules[type(world).__module__])
            model.fingerprint = digest(
                "init", os.path.abspath(settings.init), self._init_stamp(), code
            )
            return self._as_reference(model)
        torch.manual_seed(settings.base_seed)
        model = world.model().to(self.device)
        self.context = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        if world.pretrain is None or stage == "raw" or settings.base_steps == 0:
            model.fingerprint = digest(
                "raw",
                settings.base_seed,
                world_key(world),
                *source(nanomodel, data_module, sys.modules[type(world).__module__]),
            )
            return self._as_reference(model)
        recipe = world.pretrain | (
            {} if settings.base_steps is None else {"steps": settings.base_steps}
        )
        key = digest(
            "base",
            recipe,
            settings.base_seed,
            world_key(world),
            *source(nanomodel, data_module, sys.modules[type(world).__module__]),
        )

        def train():
            rows = world.demonstrations(
                recipe.get("demonstrations", recipe["steps"] * recipe["batch_size"]),
                self._generator("demonstrations", settings.base_seed),
            )
            rows = self._adopt(rows)
            dims = rows[0]["responses"][0].numel() if world.kind == "images" else 1

            def loss(model, batch):
                nll = -model.logps(batch)
                return nll.sum((1, 2)) * (len(nll) / batch.mask.sum()) / dims, {}

            def batches(step):
                batch = self._collate(
                    [
                        rows[i % len(rows)]
                        for i in range(
                            step * recipe["batch_size"], (step + 1) * recipe["batch_size"]
                        )
                    ]
                )
                return (
                    model.prepare(batch, self._generator("base", settings.base_seed, step))
                    if world.kind == "images"
                    else batch
                )

            return self._fit(
                model,
                batches,
                loss,
                recipe["steps"],
                lr=recipe["lr"],
                warmup=20,
                clip=1.0,
                decay=True,
                title="base model",
                record=False,
            )[0]

        def weights():
            return self.cached(key, train)

        model.load_state_dict(self._stage("base", weights, keep=False))
        model.fingerprint = key
        return self._as_reference(model)

    def _init_stamp(self):
        folder = self.settings.init
        return (
            sorted((n, os.path.getmtime(os.path.join(folder, n))) for n in os.listdir(folder))
            if os.path.isdir(folder)
            else ""
        )

    def _as_reference(self, model):
        if self.reference is None:
            self.reference = frozen(model)
        return model

    # -- data

    def _adopt(self, rows):
        """Rows made ready for this world's model: text laid out as prompt trees that fit the context."""
        if self.world.kind != "text":
            return rows
        if self.context is None:
            raise UserError("the context is that of the model: call lab.base() first")
        rows, cut = fit_context(rows, self.world.tokenizer, self.context, self.settings.truncate)
        if cut and not self.quiet:
            print(f"{cut} of {len(rows)} rows were cut to the context of {self.context} tokens")
        return rows

    def _collate(self, rows):
        tokenizer = self.world.tokenizer if self.world.kind == "text" else None
        return collate(rows, tokenizer, fixed=self.compiled).to(self.device)

    def sample(self, policy, prompts, k, rng=None):
        """K samples a prompt from the policy -> rows without scores (token ids and `ends`, images, or entries of a table)."""
        rng, rows, chunk = rng or self.rng("sample"), [], max(1, 1024 // k)
        kind, options = self.world.kind, {}
        if kind == "text":
            if (
                self.device.type != "cpu"
            ):  # draws where the logits are, so that no token makes the device wait
                rng = torch.Generator(self.device).manual_seed(rng.initial_seed())
            options = dict(max_tokens=self.max_response, temperature=self.settings.temperature)
            if self.settings.truncate:  # as `fit_context` does with rows
                room = max(self.context // 2, self.context - self.max_response)
                prompts = [
                    (self.world.tokenizer.encode(p) if isinstance(p, str) else p)[-room:]
                    for p in prompts
                ]
        for start in range(0, len(prompts), chunk):
            part = prompts[start : start + chunk]
            with self._autocast():
                groups = policy.sample(part, k, rng, **options)
            for prompt, group in zip(part, groups):
                row = {"prompt": prompt, "responses": group if kind != "images" else group.cpu()}
                if kind == "text":
                    eot = self.world.tokenizer.eot
                    row["ends"] = [ids[-1] == eot for ids in group]
                    row["responses"] = [
                        ids[:-1] if end else ids for ids, end in zip(group, row["ends"])
                    ]
                rows.append(row)
        return rows

    def truth(self, rows):
        """The true reward of every response -> list of lists; ValueError in a world without one."""
        if self.world.reward is None:
            raise UserError(
                f"{self.world.name} has no true reward, so responses of a model cannot be labelled there"
            )
        prompts = [row["prompt"] for row in rows for _ in range(len(row["responses"]))]
        if self.world.kind == "images":
            responses = torch.cat([row["responses"] for row in rows])
        else:
            responses = [self.text(r) for row in rows for r in row["responses"]]
            prompts = [self.text(p) if self.world.kind == "text" else p for p in prompts]
        flat, out = iter(self.world.reward(prompts, responses).tolist()), []
        for row in rows:
            out.append([next(flat) for _ in range(len(row["responses"]))])
        return out

    def text(self, response):
        """A response or prompt as text (text worlds); what it is already, otherwise."""
        return (
            self.world.tokenizer.decode(response)
            if self.world.kind == "text" and not isinstance(response, str)
            else response
        )

    def preferences(self, policy, k=None, n=None, ties=False):
        """Rows with labels: k samples (default --k) a prompt from the policy for n prompts (default --prompts), scored and labelled by
        the world; with --data, the file's training rows (k = 2: the best and the worst response of each). Pairs: the preferred one first,
        and those that a verifier scores alike only with `ties`."""
        s = self.settings
        if s.data and self.world.kind == "text":
            rows = self.world.given(k)[: n or self.prompts]
            return self._adopt(rows)
        k, n = k or self.k, n or self.prompts
        fingerprint = getattr(policy, "fingerprint", None)
        labels = (s.temperature, s.label_temperature, s.flip, s.length_bias, self.max_response)
        nth = self.draws_of_base(fingerprint)

        def draw():
            world = self.world
            prompts = world.prompts(
                n, self._generator(s.seed, "prompts", nth) if fingerprint else self.rng("prompts")
            )
            rows = self.sample(policy, prompts, k)
            rows = [row | {"reward": r} for row, r in zip(rows, self.truth(rows))]
            prefers = None
            if world.prefers is not None and k == 2:
                a, b = ([self.text(row["responses"][i]) for row in rows] for i in (0, 1))
                prefers = world.prefers(prompts, a, b).tolist()
            lengths = [[len(r) for r in row["responses"]] for row in rows]
            noise = (s.label_temperature, s.flip, s.length_bias, world.verifier)
            rows = label(rows, self.rng("labels"), *noise, prefers, lengths)
            return [row for row in rows if ties or k > 2 or row["scores"][0] != row["scores"][1]]

        def rows():
            if not fingerprint:
                return draw()
            return self.cached(
                [
                    "preferences",
                    fingerprint,
                    world_key(self.world),
                    k,
                    n,
                    ties,
                    s.seed,
                    nth,
                    labels,
                    *source(data_module),
                ],
                self._isolated(draw, nth),
            )

        kept = self._stage("preferences", rows)
        same = (
            sum(len(set(map(str, row["responses"]))) == 1 for row in kept)
            if self.world.kind == "text"
            else 0
        )
        if not self.quiet and not self.depth:
            if len(kept) < n:
                print(f"{n - len(kept)} of {n} pairs had equal scores and were left out")
            if same:
                print(
                    f"{same} of {len(kept)} rows hold the same response {k} times: they teach nothing"
                )
        if not kept:
            raise UserError(
                f"none of {n} prompts gave a pair of different scores in {self.world.name}; more --prompts may"
            )
        return self._adopt(kept)

    def draws_of_base(self, fingerprint):
        """How often preferences were drawn from this very model before: the n-th draw gives the same rows in every run of the same seed."""
        counts = self.__dict__.setdefault("_draws_of_base", {})
        counts[fingerprint] = counts.get(fingerprint, 0) + 1
        return counts[fingerprint]

    def _isolated(self, function, *key):
        """`function` with random streams that depend on the seed and `key` alone, not on the stage: its result may be shared."""

        def call():
            number, draws = self.stage_number, self.draws
            self.stage_number, self.draws = list(key), {}
            try:
                return function()
            finally:
                self.stage_number, self.draws = number, draws

        return call

    def rows(self, dicts):
        """Rows made by the method itself, without the labeller."""
        return self._adopt([{"scores": [0.0] * len(row["responses"])} | row for row in dicts])

    def logps(self, model, rows):
        """Score rows once, without gradient -> a column: for each row K lists of T log-probs."""
        return self._stage("logps", lambda: self._logps(model, self._adopt(rows)))

    @torch.no_grad()
    def _logps(self, model, rows):
        out, size = [], self.batch_size
        for start in range(0, len(rows), size):
            batch = self._collate(rows[start : start + size])
            with self._autocast():
                logps = model.logps(batch)
            count = batch.mask.sum(-1).tolist()
            for row, values, lengths in zip(rows[start : start + size], logps.tolist(), count):
                out.append([values[i][: lengths[i]] for i in range(len(row["responses"]))])
        return out

    # -- training

    def _autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def align(
        self,
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
    ):
        """Train the policy in place on preferences and return it.

        data: rows, or a function (policy, round) -> rows called every `every` steps (one optimizer through all rounds).
        loss(logps, ref_logps, batch, cfg) -> losses (B,), metrics. reference: "start" (a frozen copy of the policy at this call), "round"
        (at each call of data), a model, a function (policy, step) -> model, or None (none is made or run; ref_logps is None).
        prepare(policy, batch) -> batch draws what two scores must share; score(model, batch) -> logps, by default model.logps(batch).
        watch(policy, step) -> {name: value}, every `eval_every` steps; by default the true reward and the KL. `lab.curve` keeps it."""
        steps = self.steps if steps is None else steps
        if isinstance(reference, str) and reference not in ("start", "round"):
            raise UserError(
                f'reference {reference!r} must be "start", "round", a model, a function or None'
            )
        fixed = not callable(data)
        if not fixed and not every:
            raise UserError("data is a function: align needs every=, the steps between two calls")
        start = frozen(policy) if reference == "start" else reference
        cacheable = (
            self.world.kind == "text"
            and prepare is None
            and score is None
            and not (callable(reference) and not isinstance(reference, torch.nn.Module))
        )
        if (
            prepare is None and self.world.kind == "images"
        ):  # one draw of t and noise for all K responses
            seed, stage = self.settings.seed, self.stage_number + 1

            def prepare(policy, batch):
                return policy.prepare(batch, self._generator(seed, "noise", stage, now["step"]))

        score = score or (lambda model, batch: model.logps(batch))
        score_policy, score_loss = (
            (self._compile(score), self._compile(loss)) if self.compiled else (score, loss)
        )
        now = dict(
            rows=None,
            order=None,
            round=-1,
            step=0,
            reference=start if isinstance(start, torch.nn.Module) else None,
        )

        def begin(round, rows):
            order = torch.randperm(
                len(rows), generator=self._generator(self.settings.seed, "order", len(rows), round)
            ).tolist()
            now.update(rows=rows, order=order, round=round)
            if reference is not None and cacheable:
                share = steps if fixed else every
                visited = order[: share * self.batch_size]
                column = self._reference_logps(now["reference"], [rows[i] for i in visited])
                now["rows"] = rows = list(rows)
                for i, values in zip(visited, column):
                    rows[i] = rows[i] | {"ref_logps": values}

        def batches(step):
            round, within = (0, step) if fixed else divmod(step, every)
            now["step"] = step
            if round != now["round"]:
                if reference == "round":
                    now["reference"] = frozen(policy)
                begin(round, data if fixed else self._adopt(data(policy, round)))
            n = len(now["rows"])
            rows = [
                now["rows"][now["order"][i % n]]
                for i in range(within * self.batch_size, (within + 1) * self.batch_size)
            ]
            batch = self._collate(rows)
            if prepare is not None:
                with torch.no_grad():
                    batch = prepare(policy, batch)
            if self.show:
                report.show(self, rows[0], batch)
                raise Stop
            ref_logps = batch.columns.pop("ref_logps", None)
            if ref_logps is None and reference is not None:
                moving = callable(reference) and not isinstance(reference, torch.nn.Module)
                model = reference(policy, step) if moving else now["reference"]
                with torch.no_grad(), self._autocast():
                    ref_logps = score(model, batch)
            if (
                ref_logps is not None
                and ref_logps.shape != batch.mask.shape
                and ref_logps.dim() == 3
            ):
                ref_logps = torch.nn.functional.pad(
                    ref_logps, (0, batch.mask.shape[2] - ref_logps.shape[2])
                )
            batch.columns["_ref"] = ref_logps
            return batch

        def step_loss(model, batch):
            ref_logps = batch.columns.pop("_ref")
            with self._autocast():
                logps = score_policy(model, batch)
            with torch.autocast(self.device.type, enabled=False):
                losses, metrics = score_loss(logps, ref_logps, batch, cfg)
            return losses, report.common_metrics(logps.detach(), ref_logps, batch) | metrics

        def save():
            kept = (
                None
                if fixed
                else [
                    {k: v for k, v in row.items() if k not in ("tree", "ref_logps")}
                    for row in now["rows"] or []
                ]
            )
            state = (
                now["reference"].state_dict()
                if reference == "round" and now["reference"] is not None
                else None
            )
            return {"round": now["round"], "rows": kept, "reference": state}

        def load(state):
            if state["reference"] is not None:
                now["reference"] = frozen(policy)
                now["reference"].load_state_dict(state["reference"])
            if not fixed and state["round"] >= 0:
                begin(state["round"], self._adopt(state["rows"]))

        watch = watch or (lambda policy, step: report.glance(self, policy))

        def train():
            weights, curve = self._fit(
                policy,
                batches,
                step_loss,
                steps,
                optimizer=optimizer,
                watch=watch,
                state=(save, load),
                title="alignment",
            )
            return {"weights": weights, "curve": curve}

        value = self._stage("align", train)
        policy.load_state_dict(value["weights"])
        policy.fingerprint, self.curve = None, value["curve"]
        return policy

    def _reference_logps(self, model, rows):
        fingerprint = getattr(model, "fingerprint", None)
        if not fingerprint:
            return self._logps(model, rows)
        content = [[*row["tree"][:3], row["tree"][3].tolist(), *row["tree"][4:]] for row in rows]
        return self.cached(
            ["logps", fingerprint, content, self.batch_size], lambda: self._logps(model, rows)
        )

    def _compile(self, function):
        cuda = self.device.type == "cuda"
        return torch.compile(function, mode="reduce-overhead" if cuda else "default", dynamic=False)

    def fit(
        self, model, batches, loss, steps=None, lr=None, optimizer=None, watch=None, decay=False
    ):
        """The training loop itself, for any nn.Module, which it trains in place and returns. batches: a function step -> batch, or a
        sequence, gone through in a circle; loss(model, batch) -> losses, {name: detached tensor}; optimizer(params) -> torch Optimizer;
        watch(model, step) -> {name: value} every `eval_every` steps. Linear warm-up, then constant, or a cosine to 10 % with `decay`."""
        get = batches if callable(batches) else lambda step: batches[step % len(batches)]
        steps = self.steps if steps is None else steps

        def train():
            weights, curve = self._fit(
                model, get, loss, steps, lr=lr, optimizer=optimizer, watch=watch, decay=decay
            )
            return {"weights": weights, "curve": curve}

        value = self._stage("fit", train)
        model.load_state_dict(value["weights"])
        model.fingerprint, self.curve = None, value["curve"]
        return model

    def _fit(
        self,
        model,
        batches,
        loss,
        steps,
        optimizer=None,
        watch=None,
        decay=False,
        state=None,
        title="training",
        record=True,
        **how,
    ):
        """The loop -> (weights, curve). A checkpoint every few seconds; Ctrl-C ends after the step at hand, with one."""
        how = {"lr": self.lr, "warmup": self.settings.warmup, "clip": self.settings.clip} | {
            k: v for k, v in how.items() if v is not None
        }
        lr, warmup = how["lr"], min(how["warmup"], max(1, steps // 5))
        params = [p for p in model.parameters() if p.requires_grad]
        optimizer = (optimizer or self._adamw(lr))(params)
        peaks = [group["lr"] for group in optimizer.param_groups]
        self.fits += 1  # a stage may train several models one after the other
        path = self.out and os.path.join(
            self.out, "stages", f"{self.stage_number:03d}-checkpoint-{self.fits}"
        )
        log = self.out and record and os.path.join(self.out, "metrics.jsonl")
        first, curve, pending = 0, [], []
        kept = load_value(path) if path else None
        if (
            log and os.path.exists(log) and not kept and self.fits == 1
        ):  # what an earlier try wrote before its first checkpoint
            with open(log, encoding="utf-8") as file:
                lines = [
                    line
                    for line in file
                    if line.endswith("\n") and json.loads(line)["stage"] < self.stage_number
                ]
            write_text(log, "".join(lines))
        if kept:
            first, curve, self.draws = kept["step"], kept["curve"], kept["draws"]
            if state:
                state[1](kept["state"])
            model.load_state_dict(kept["model"])
            load_optimizer(optimizer, kept["optimizer"])
            if log and os.path.exists(log):
                with open(log, "r+b") as file:
                    file.truncate(kept["log"])
        bar, saved, cost = report.Progress(title, steps, first, self.quiet), time.time(), 0.0
        look = self.eval_every or max(1, steps // 5)

        def checkpoint():
            nonlocal saved, cost
            start = time.time()
            value = dict(
                step=step,
                curve=curve,
                draws=self.draws,
                model=model.state_dict(),
                optimizer=optimizer.state_dict(),
            )
            value |= dict(
                state=state[0]() if state else None,
                log=os.path.getsize(log) if log and os.path.exists(log) else 0,
            )
            save_value(path, value)
            saved, cost = time.time(), time.time() - start

        def flush():
            """Read the metrics of the last steps (the only synchronisation), stop at a NaN, write them down."""
            lines, wrong = [], None
            for at, values in pending:
                values = {k: float(v) for k, v in values.items()}
                for name, value in values.items():
                    if not math.isfinite(value) and not wrong:
                        wrong = (
                            f"{title}: {name} became {value} at step {at}; a lower --lr may help"
                        )
                if wrong:
                    break
                lines.append(json.dumps({"stage": self.stage_number, "step": at} | values))
                bar.show(at, values)
            pending.clear()
            if log and lines:
                os.makedirs(os.path.dirname(log), exist_ok=True)
                with open(log, "a", encoding="utf-8") as file:
                    file.write("\n".join(lines) + "\n")
            if wrong:
                good = path and load_value(path)
                raise Diverged(
                    wrong
                    + (
                        f". The checkpoint of step {good['step']} is kept in {self.out}"
                        if good
                        else ""
                    )
                )

        def look_at(step):
            model.eval()
            values = {"step": step} | watch(model, step)
            model.train(training)
            curve.append(values)

        training = model.training
        model.fingerprint = None
        with interruptible() as interrupted:
            step = first
            if watch and step == 0:
                look_at(0)
            while step < steps:
                for group, peak in zip(optimizer.param_groups, peaks):
                    cosine = (
                        0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / steps)) if decay else 1.0
                    )
                    group["lr"] = peak * min(1.0, (step + 1) / max(1, warmup)) * cosine
                if self.compiled and self.device.type == "cuda":
                    torch.compiler.cudagraph_mark_step_begin()
                batch = batches(step)
                losses, metrics = loss(model, batch)
                value = losses.mean()
                optimizer.zero_grad(set_to_none=True)
                value.backward()
                norms = [
                    torch.nn.utils.clip_grad_norm_(group["params"], how["clip"])
                    for group in optimizer.param_groups
                ]
                optimizer.step()
                step += 1
                pending.append(
                    (
                        step,
                        {
                            "loss": value.detach(),
                            "grad_norm": torch.stack(norms).max(),
                            "lr": group["lr"],
                        }
                        | metrics,
                    )
                )
                if watch and (step % look == 0 or step == steps):
                    flush()
                    look_at(step)
                if step % 10 == 0 or step == steps or interrupted:
                    flush()
                if path and (
                    interrupted
                    or (
                        step < steps
                        and time.time() - saved >= max(self.checkpoint_every, 20 * cost)
                    )
                ):
                    flush()
                    checkpoint()
                if interrupted:
                    raise KeyboardInterrupt
        bar.close()
        if path:
            remove_value(path)
        return {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}, curve

    def _adamw(self, lr):
        return lambda params: torch.optim.AdamW(
            params, lr=lr, weight_decay=0.0, betas=(0.9, 0.95), fused=self.device.type != "mps"
        )

    # -- what came out

    def evaluate(self, policy):
        """The same look at every model: true reward, win rate over the base model, KL, length, diversity, accuracy on held-out pairs with
        clean labels, log-probs of chosen and rejected; as far as the world has them."""
        return self._stage(
            "evaluate", self._isolated(lambda: report.evaluate(self, policy), "evaluation")
        )

    def compare(
        self, name, metric, ours, baseline, at_kl=None, margin=0.0, expected=True, smaller=False
    ):
        """A Claim: `metric` of ours against the baseline, one entry a seed: numbers, dicts with that metric, or (with `at_kl`) curves, read
        off at one KL (a number, or "shared": the largest that all of them reach). smaller: less is better."""
        if at_kl == "shared":
            at_kl = min(max(point["kl"] for point in curve) for curve in [*ours, *baseline])

        def read(entry):
            if at_kl is not None:
                return report.at_kl(entry, metric, at_kl)
            return entry[metric] if isinstance(entry, dict) else float(entry)

        sign = -1.0 if smaller else 1.0
        ours, baseline = ([sign * read(entry) for entry in side] for side in (ours, baseline))
        text = name if at_kl is None else f"{name} (at KL {at_kl:.2f})"
        return Claim(text, f"-{metric}" if smaller else metric, ours, baseline, margin, expected)

    def exact(self, name, value, target, tol, expected=True):
        """A Claim that a computed value equals a known one within `tol` (the baseline is the error allowed, ours the error made)."""
        return Claim(
            f"{name}: {value:.6g}, to be {target:.6g}",
            "-error",
            [-abs(value - target)],
            [-tol],
            0.0,
            expected,
        )


class Diverged(UserError):
    """A NaN or an infinity in a step."""


@contextlib.contextmanager
def interruptible():
    """A list that becomes true at the first Ctrl-C; the second one interrupts at once."""
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


def world_key(world):
    """What makes a world apart from its source, for cache keys."""
    return world.key()


def frozen(model):
    """A copy that is never trained."""
    return copy.deepcopy(model).requires_grad_(False).eval()


def load_optimizer(optimizer, state):
    """Load an optimizer state that went through JSON, where the keys of dicts are texts."""
    state["state"] = {int(k): v for k, v in state["state"].items()}
    optimizer.load_state_dict(state)
