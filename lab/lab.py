"""The Lab: everything that a method needs besides its mathematics."""

import contextlib
import copy
import dataclasses
import os
import sys
import time

import torch

import data as data_module
import diffusion
import nanomodel
from data import UserError, collate, encode, fit_context, label, preference
from lab import align, batches, evaluate, graph, loop, report, store
from lab.align import frozen
from lab.batches import Batches
from lab.folder import read_object
from lab.graph import Captured
from lab.hub import load_pretrained
from lab.settings import (
    Settings,
    loaded,
    make_world,
    pick_compile,
    pick_device,
    pick_optimizer,
    refuse_idle,
    slips,
)
from lab.store import alone, digest, generator, load_value, remove_value, save_value, source
from nanomodel import LoRA

LARGE = 2**25  # parameters of a model with which memory is short
DROPPED = 0.1  # share of the prompts that a base model for guidance is trained without


@dataclasses.dataclass
class Stage:
    """One call of a verb. `value` is kept on disk under `path`, so that a run can be resumed."""

    number: int = 0
    path: str | None = None
    done: bool = False  # the value was read back from an earlier, interrupted run
    value: object = None
    fits: int = 0  # number of trainings inside the stage so far
    log: int | None = None  # metrics.jsonl in bytes after the last of them that wrote it

    def clear(self):
        """Remove the checkpoints of its trainings, since their result is stored."""
        for fit in range(self.fits if self.path else 0):
            remove_value(f"{self.path}-checkpoint-{fit + 1}")


class Lab:
    """Everything that a method needs besides its mathematics.

    settings: the run settings.
    out: the folder of the run; None writes nothing.
    quiet: print nothing. show: print one row instead of training.
    seeds: the number of seeds of a claim, counted from settings.seed. `worlds` are four times as
        many, for exact tables, which cost little.
    smoke: run everything with a few steps and a handful of prompts, to see that it runs.
    world: a World object, which replaces --world. start: the model of --init, if it is loaded.

    Each call of a verb is a numbered stage, stored in `<out>/stages` until the run has ended.
    """

    checkpoint_every = 5.0  # least number of seconds between two checkpoints
    memory = {}  # the values of `cached`, for all Labs of this process

    def __init__(
        self,
        settings,
        out=None,
        quiet=False,
        show=False,
        seeds=1,
        world=None,
        start=None,
        smoke=False,
    ):
        self.settings, self.out, self.quiet, self.show = settings, out, quiet, show
        self.smoke, first = smoke, settings.seed
        self.seeds = list(range(first, first + seeds))
        self.worlds = list(range(first, first + (1 if smoke else 4) * seeds))
        start = load_pretrained(settings.init) if settings.init and start is None else start
        self.world = make_world(settings, start) if world is None else world
        self.device = pick_device(settings.device)
        if self.world.kind in ("table", "vectors"):  # tiny, and made of tensors on the CPU
            self.device = torch.device("cpu")
        self.start = start if start is None else start.to(self.device)
        refuse_idle(settings, self.world, self.start)
        adamw = settings.optimizer == "adamw"
        self.optimizer = None if adamw else pick_optimizer(settings.optimizer)
        on_cuda = self.device.type == "cuda"
        self.bf16 = settings.dtype == "bfloat16" or (settings.dtype == "auto" and on_cuda)
        self.captured = settings.capture == "on" or (settings.capture == "auto" and on_cuda)
        # World objects whose class has no `key` of its own cannot be distinguished in the cache
        self.given, self.cacheable = world, world is None or "key" in vars(type(world))
        chosen = {"k": 4, "max_response": self.world.max_response, "eval_size": 256}
        chosen |= self.world.align
        names = ("steps", "batch_size", "lr", "prompts", "k", "max_response")
        for name in (*names, "eval_every", "eval_size"):
            given = getattr(settings, name)
            setattr(self, name, chosen.get(name) if given is None else given)
        if smoke:
            most = dict(steps=self.few(2**30), batch_size=4, prompts=16, eval_size=4)
            for name, n in most.items():
                if getattr(self, name) is not None:  # a world of vectors has no prompts
                    setattr(self, name, min(getattr(self, name), n))
        self.compiled, self.compile_reason = settings.compile == "on", ""
        if on_cuda and settings.compile == "auto":
            self.compiled, self.compile_reason = pick_compile(settings, self.steps)
        self.current, self.stages, self.children, self.round, self.races = None, 0, {}, None, 0
        self.seen = {}  # what evaluations have read from samples of each model
        self.full_looks = False  # whether looks during training measure all prompts
        self.step = 0  # step of the current alignment, which is the key of what `prepare` draws
        self.seconds, self.reference, self.context, self.started = {}, None, None, time.time()
        self.samples = 0  # sampled tokens (images in an image world), without those of evaluations
        self.stopped = None  # why a training was stopped before its end

    # ---------------------------------------------------------------- stages and random numbers

    @contextlib.contextmanager
    def verb(self, name, keep=True):
        """The Stage of one verb call; a verb that another verb calls belongs to the outer Stage."""
        if self.current is not None:
            inner = Stage(self.current.number)
            yield inner
            return
        self.stages += 1
        path = None
        if keep and self.out:
            path = os.path.join(self.out, "stages", f"{self.stages:03d}-{name}")
        found = load_value(path) if path else None
        stage = Stage(self.stages, path)
        if found is not None:
            stage.done, stage.value = True, found["value"]
        self.current, start, before = stage, time.time(), self.samples
        try:
            yield stage
        finally:
            self.current = None
        if found is None:
            count = self.samples - before
            found = {"seconds": time.time() - start, "value": stage.value, "samples": count}
            found["stopped"] = self.stopped
            if path:
                save_value(path, found)
                stage.clear()
        else:
            self.samples += found.get("samples", 0)
            self.stopped = found.get("stopped") or self.stopped
        self.seconds[name] = self.seconds.get(name, 0.0) + found["seconds"]

    def stage(self, name, function):
        """The value of function(), stored so that a resumed run does not compute it again.

        function() -> numbers, texts, tensors, or lists and dicts of them.
        """
        with self.verb(name) as stage:
            if not stage.done:
                stage.value = function()
        return stage.value

    def rng(self, name, *key):
        """A torch.Generator that depends only on the seed, the name and the key.

        The same name and key always give the same numbers, however many verbs ran before. Pass a
        key, such as the round or the step, to get other numbers.
        """
        return generator(self.settings.seed, name, *key)

    def eval_rng(self, name):
        """A torch.Generator for evaluations, equal for all methods and seeds of one base model."""
        return generator(self.settings.base_seed, name)

    @contextlib.contextmanager
    def in_round(self, round):
        """A context in which samples depend on the round as well."""
        before, self.round = self.round, round
        try:
            yield
        finally:
            self.round = before

    def few(self, n, least=4):
        """n; in a smoke run at most `least`. Numbers of steps and sample sizes go through it."""
        return min(n, least) if self.smoke else n

    def cached(self, key, function):
        """`function()`, or its stored value if it was called under this key before.

        Values are stored in this process and on disk.
        """
        about = [torch.__version__, torch.get_num_threads(), str(self.device), self.bf16]
        about += [self.captured]
        key = digest(key, *about)
        if key not in Lab.memory:
            path = os.path.join(store.CACHE, key)
            value = load_value(path)
            if value is None:
                with alone(path):
                    value = load_value(path)  # another run may have made it meanwhile
                    if value is None:
                        # its trainings are not counted in the present stage, since a resumed run
                        # finds the value in the cache and does not repeat them
                        outer, stage = self.current, Stage()
                        if outer is not None:
                            inside = outer.path and f"{outer.path}-{key[:8]}"
                            self.current = stage = Stage(outer.number, inside, log=outer.log)
                        try:
                            value = function()
                            save_value(path, value)
                            stage.clear()
                        finally:
                            self.current = outer
                            if outer is not None:
                                outer.log = stage.log
            Lab.memory[key] = value
        return Lab.memory[key]

    def at(self, world=None, **settings):
        """A Lab with other settings, which writes into a folder inside this Lab's.

        world: the name of a world, or a World object. The cache is shared.
        """
        given = None if world is None or isinstance(world, str) else world
        about = ({} if world is None else {"world": given.name if given else world}) | settings
        name = "-".join(f"{k}{v}" for k, v in about.items()).replace(os.sep, "_") or "run"
        count = self.children[name] = self.children.get(name, 0) + 1
        return self.child(name + (f"-{count}" if count > 1 else ""), world, settings)

    def child(self, folder, world, settings):
        """A Lab with other settings, which writes into `folder` inside this Lab's folder."""
        named = {"world": world} if isinstance(world, str) else {}
        given = self.given if world is None else None if named else world
        out = self.out and os.path.join(self.out, folder)
        new = dataclasses.replace(self.settings, **settings, **named)
        start = self.start if new.init == self.settings.init else None
        how = dict(quiet=self.quiet, show=self.show, smoke=self.smoke)
        return Lab(new, out, world=given, start=start, **how)

    # ---------------------------------------------------------------- models

    def base(self, stage="sft"):
        """The base model, that is, the world's model before alignment; a new copy at each call.

        It is the model of --init, or it is trained on the world's demonstrations and cached under a
        hash of everything that it depends on. stage="raw" gives random weights. Random numbers
        depend only on --base_seed. With --lora the model has adapters, and they alone are trained.
        """
        settings, world = self.settings, self.world
        if settings.init:
            weights = self.start.parameters() if settings.lora else ()  # shared, as they are frozen
            model = copy.deepcopy(self.start, {id(p): p for p in weights}).requires_grad_(True)
            made = ["init", *folder_stamp(settings.init)]
        else:
            with torch.random.fork_rng(devices=[]):  # nn.init draws from the global generator
                torch.manual_seed(settings.base_seed)
                model = world.model().to(self.device)
            made = ["raw", settings.base_seed]
        self.context = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        trains = (
            world.pretrain and not settings.init and stage != "raw" and settings.base_steps != 0
        )
        if self.show and world.given is not None:
            trains = False  # the rows of a file look the same to any model
        if trains and settings.lora:  # a rank that does not fit is refused before the training
            LoRA.adapt(copy.deepcopy(model), settings.lora)
        if trains:
            steps = self.few(settings.base_steps or world.pretrain["steps"])
            recipe = world.pretrain | {"steps": steps}
            made = ["base", settings.base_seed, recipe]
        fingerprint = None
        if self.cacheable:  # it also depends on the source code of what makes it and samples
            made_by = [sys.modules[c.__module__] for c in type(world).__mro__[:-1]]
            ours = data_module, diffusion, nanomodel, loop, graph, batches, sys.modules[__name__]
            fingerprint = digest(made, world.key(), *source(*ours, *made_by))
        if trains:
            with self.verb("base", keep=False):
                if fingerprint:
                    weights = self.cached(fingerprint, lambda: self.pretrain(model, recipe))
                    model.load_state_dict(weights)
                else:
                    self.pretrain(model, recipe)
        model.fingerprint = fingerprint
        if self.reference is None and settings.init:  # one copy in memory serves for both
            self.reference = self.start.requires_grad_(False).eval()
            self.reference.fingerprint = fingerprint
        elif self.reference is None:
            self.reference = frozen(model)
        if settings.lora:
            LoRA.adapt(model, settings.lora, self.rng("lora"))
        return model

    def as_reference(self, model):
        """A model that is never trained and equals this one: the base model, or a copy."""
        mark = getattr(model, "fingerprint", None)
        if mark and mark == getattr(self.reference, "fingerprint", None):
            return self.reference
        return frozen(model)

    def finished(self):
        """The model of --init, which is the folder of a finished run; nothing is trained.

        `reference` becomes the model that the run began with. UserError: the folder has no
        run.json, or the run used another world or other data.
        """
        folder, model = self.settings.init, self.base()
        path = os.path.join(folder, "run.json")
        if not os.path.exists(path):
            raise UserError(
                f"--init {folder} has no run.json, so its base model is not known; "
                "--steps trains from it"
            )
        origin = ("init", "base_seed", "base_steps", "context", "truncate")
        made = read_object(path).get("settings")
        try:
            made = {name: made[name] for name in (*origin, "world", "data")}
            Settings(**made)
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{path} is damaged: it does not hold the settings of a run") from None
        for name, default in {"world": "reviews", "data": None}.items():
            two = [made[name] or default, getattr(self.settings, name) or default]
            if len({os.path.abspath(x) if x and os.path.exists(x) else x for x in two}) > 1:
                raise UserError(f"{folder} is a run with --{name} {two[0]}, not {two[1]}")
        self.reference = self.at(**{name: made[name] for name in origin}).base()
        self.steps = 0
        if not self.quiet:
            print(f"{folder} is measured; nothing is trained")
        return model

    def pretrain(self, model, recipe):
        """Train a base model by maximum likelihood on the world's demonstrations -> its weights."""
        world, size, seed = self.world, recipe["batch_size"], self.settings.base_seed
        n = recipe.get("demonstrations", recipe["steps"] * size)
        rows = self.encode(world.demonstrations(n, generator("demonstrations", seed)))
        dims = rows[0]["responses"][0].numel() if world.kind == "images" else 1
        batches = Batches(self, rows, size)

        def noisy(step):
            """The images of a step with their noise; without some of their labels for guidance."""
            rng = generator("base", seed, step)
            found = model.prepare(batches(step), rng)
            if world.guided:
                dropped = torch.rand(len(found.label), generator=rng) < DROPPED
                dropped = dropped.to(found.label.device)
                found.label = torch.where(dropped, model.classes, found.label)
            return found

        def loss(model, batch):
            nll = -model.logps(batch)  # (B, 1, T)
            return nll.sum((1, 2)) * (len(nll) / batch.mask.sum()) / dims, {}

        how = dict(lr=recipe["lr"], warmup=20, clip=1.0, decay=True, record=False)
        how |= dict(capture=True, optimizer=loop.adamw(self, recipe["lr"]))
        get = noisy if world.kind == "images" else batches
        loop.fit(self, model, get, loss, recipe["steps"], title="base model", **how)
        return {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}

    # ---------------------------------------------------------------- data

    def encode(self, rows):
        """Rows in the form that `collate` reads: text is laid out as prompt trees.

        UserError: a row is longer than the context and --truncate is not set.
        """
        if self.world.kind != "text":
            return rows
        if self.context is None:
            raise UserError("the context length is the model's: call lab.base() first")
        limit, cut = self.context, self.settings.truncate
        keep = None if self.world.given is None else 2**20  # a large file stays text
        rows, shortened = fit_context(rows, self.world.tokenizer, limit, cut, keep)
        if shortened and not self.quiet:
            print(f"{shortened} of {len(rows)} rows were cut to the context of {limit} tokens")
        return rows

    def collate(self, rows, fixed=False):
        """Rows -> Batch on the device. fixed: as in `data.collate`, for compiled code."""
        tokenizer = self.world.tokenizer if self.world.kind == "text" else None
        return collate(rows, tokenizer, fixed=fixed).to(self.device)

    def batches(self, rows, size=None):
        """A function step -> Batch of `size` rows (default --batch_size), taken in cyclic order."""
        return Batches(self, self.encode(rows), size or self.batch_size)

    def draw(self, name, figure):
        """Write a matplotlib Figure as NAME.png into the folder of the run, if there is one."""
        if self.out:
            report.write_figure(os.path.join(self.out, f"{name}.png"), figure)

    def say(self, line):
        """Print a line about the run, unless it is quiet."""
        if not self.quiet:
            print(line)

    def sample(self, policy, prompts, k, rng=None, max_tokens=None):
        """k samples per prompt -> rows without scores.

        Responses are token ids (with the column `ends`), images (k, C, H, W), or entries of a
        table. rng: a torch.Generator, by default that of the name "sample" and the round.
        max_tokens: where responses of text are cut, by default at --max_response tokens.
        """
        # a large model gets few prompts at once, since its cache of keys is large, too
        most = self.portion(policy, 1024) if report.count(policy) < LARGE else 16
        rng, rows, chunk = rng or self.rng("sample", self.round), [], max(1, most // k)
        kind, options, settings = self.world.kind, {}, self.settings
        if kind == "text":
            if self.device.type != "cpu":  # draw on the logits' device, without a sync per token
                rng = torch.Generator(self.device).manual_seed(rng.initial_seed())
            limit = self.max_response if max_tokens is None else max_tokens
            options = dict(max_tokens=limit, temperature=self.settings.temperature)
            if self.captured:
                options["capture"] = lambda decode: Captured(decode, self.device, self.say)
            if self.settings.truncate:
                room = max(self.context // 2, self.context - limit)
                prompts = [self.tokens(prompt)[-room:] for prompt in prompts]
        elif kind == "images":
            # a model of one's own need not know of guidance
            options = {} if settings.guidance == 1 else dict(guidance=settings.guidance)
        for start in self.pieces("sampling", len(prompts), chunk):
            part = prompts[start : start + chunk]
            with self.autocast():
                groups = policy.sample(part, k, rng, **options)
            if kind == "images":
                self.samples += sum(map(len, groups))
            else:  # tokens; the entries of a table count as tokens
                self.samples += sum(len(ids) for group in groups for ids in group)
            for prompt, group in zip(part, groups):
                row = {"prompt": prompt, "responses": group.cpu() if kind == "images" else group}
                if kind == "text":
                    eot = self.world.tokenizer.eot
                    row["ends"] = [ids[-1] == eot for ids in group]
                    row["responses"] = [ids[:-1] if ids[-1] == eot else ids for ids in group]
                rows.append(row)
        return rows

    def tokens(self, text):
        """Token ids of a text; a list of token ids is returned unchanged."""
        return self.world.tokenizer.encode(text) if isinstance(text, str) else list(text)

    def text(self, response):
        """A response or prompt as text; in worlds that are not of text it is returned unchanged."""
        if self.world.kind != "text" or isinstance(response, str):
            return response
        return self.world.tokenizer.decode(response)

    def truth(self, rows):
        """The true reward of every response -> for each row a list of K numbers.

        UserError: the world has no true reward, or not one finite number for each response, or the
        reward of a user's own file fails; the message has its line.
        """
        world = self.world
        if world.reward is None:
            raise UserError(
                f"{world.name} has no true reward, so responses of a model cannot be labelled there"
            )
        prompts = [self.text(row["prompt"]) for row in rows for _ in row["responses"]]
        if world.kind == "images":
            responses = torch.cat([row["responses"] for row in rows])
        else:
            responses = [self.text(response) for row in rows for response in row["responses"]]
        with slips(loaded.get(type(world).__module__)):
            rewards = world.reward(prompts, responses)
            if not isinstance(rewards, torch.Tensor):
                kind = type(rewards).__name__
                raise TypeError(f"reward returned a {kind}, expected a tensor of n numbers")
        if rewards.shape != (len(prompts),):
            raise UserError(
                f"the reward of {world.name} has shape {tuple(rewards.shape)} for {len(prompts)} "
                f"responses, expected ({len(prompts)},)"
            )
        if not rewards.isfinite().all():
            raise UserError(
                f"the reward of {world.name} is NaN or infinite for a response; it must be finite "
                "for anything that a policy may write"
            )
        flat = iter(rewards.tolist())
        return [[next(flat) for _ in row["responses"]] for row in rows]

    def prefers(self, prompts, a, b):
        """The probability (n,) that an annotator of this run prefers response a to response b.

        prompts, a, b: lists of n prompts and responses, as in `rows`. It is the world's own
        `prefers`, or the sigmoid of the difference of the true rewards, under the label
        temperature, the length bias and the flips of the run: `preferences` labels pairs with this
        probability. A verifier's rewards are compared without noise, but with flips.
        """
        settings, world = self.settings, self.world
        if world.prefers is not None and not world.verifier:
            asked, first, second = ([self.text(x) for x in side] for side in (prompts, a, b))
            z = torch.logit(torch.as_tensor(world.prefers(asked, first, second)).double())
        else:
            pack = torch.stack if world.kind == "images" else list
            rows = [dict(prompt=x, responses=pack(two)) for x, *two in zip(prompts, a, b)]
            first, second = torch.tensor(self.truth(rows), dtype=torch.float64).view(-1, 2).T
            z = first - second
        if settings.length_bias:
            longer = [len(self.tokens(x)) - len(self.tokens(y)) for x, y in zip(a, b)]
            z = z + settings.length_bias * torch.tensor(longer, dtype=torch.float64)
        p = preference(z, 0.0 if world.verifier else settings.label_temperature)
        return settings.flip + (1 - 2 * settings.flip) * p

    def preferences(self, policy, k=None, n=None, ties=False, key=()):
        """Rows with labels: k samples per prompt from the policy, labelled by the world.

        k: responses per prompt (default --k). n: number of prompts (default --prompts).
        ties: keep pairs to which a verifier gives equal scores.
        key: another key gives other prompts and samples. Inside a data function, such as that of
            `align`, the round is added to it.
        Pairs have the chosen response first. With --data the rows are training rows of the file:
        the first n, and in round r the n that follow the first r * n, where the first row follows
        the last. For k = 2, only the best and the worst response of each row are kept. UserError:
        no pair has different scores.
        """
        settings, world = self.settings, self.world
        if world.given is not None:
            rows = world.given(k)
            n = min(n or self.prompts or len(rows), len(rows))
            first = n * (self.round or 0)
            rows = [rows[i % len(rows)] for i in range(first, first + n)]
            odd = [row for row in rows if k == 2 and len(row["responses"]) != 2]
            if odd:
                place = f"{odd[0]['where']}: " if "where" in odd[0] else ""
                raise UserError(f"{place}responses that continue each other are not a pair")
            return self.encode(rows)
        k, n, key = k or self.k, n or self.prompts, [*key, self.round]
        ties = ties or self.smoke  # an untrained model may have no two different scores
        with self.verb("preferences") as stage:
            if not stage.done:
                before = self.samples

                def draw():
                    """New rows, and how many tokens or images were sampled for them."""
                    prompts = world.prompts(n, self.rng("prompts", *key))
                    rows = self.sample(policy, prompts, k, self.rng("responses", *key))
                    rows = self.label(rows, key)
                    if k == 2 and not ties:
                        rows = [row for row in rows if row["scores"][0] != row["scores"][1]]
                    return {"value": rows, "samples": self.samples - before}

                fingerprint = getattr(policy, "fingerprint", None)
                noise = [settings.temperature, settings.label_temperature, settings.flip]
                noise += [settings.guidance]
                noise += [settings.length_bias, self.max_response, settings.seed, *key]
                about = ["preferences", fingerprint, world.key(), k, n, ties, noise]
                found = self.cached(about, draw) if fingerprint else draw()
                stage.value = found["value"]
                self.samples = before + found["samples"]  # also if they were sampled earlier
        rows = stage.value
        if not rows:
            raise UserError(
                f"none of {n} prompts gave a pair with different scores in {world.name}; "
                "more --prompts may help"
            )
        if not self.quiet and self.current is None:
            if len(rows) < n:  # a world may have fewer prompts than it was asked for
                n = len(world.prompts(n, self.rng("prompts", *key)))
            if len(rows) < n:
                print(f"{n - len(rows)} of {n} pairs had equal scores and were left out")
            if world.kind == "text":
                same = sum(len(set(map(str, row["responses"]))) == 1 for row in rows)
                if same:
                    print(f"{same} of {len(rows)} rows hold the same response {k} times")
        return self.encode(rows)

    def label(self, rows, key=None):
        """Rows of one's own with the true `reward` and the labels of an annotator of this run.

        Pairs get the chosen response first, and any column of K values follows their order (see
        `data.label`). key: of the random numbers of the labels, by default the round.
        """
        settings, world = self.settings, self.world
        key = [self.round] if key is None else key
        rows = [row | {"reward": reward} for row, reward in zip(rows, self.truth(rows))]
        prefers = None
        if world.prefers is not None and all(len(row["responses"]) == 2 for row in rows):
            a, b = ([self.text(row["responses"][i]) for row in rows] for i in (0, 1))
            prefers = world.prefers([row["prompt"] for row in rows], a, b).tolist()
        lengths = [[len(response) for response in row["responses"]] for row in rows]
        noise = (settings.label_temperature, settings.flip, settings.length_bias)
        return label(rows, self.rng("labels", *key), *noise, world.verifier, prefers, lengths)

    def pieces(self, title, total, size):
        """0, size, 2 size, ... below total, with a progress line if that takes many seconds."""
        bar = report.Progress(title, total, quiet=self.quiet, patience=5.0)
        for start in range(0, total, size):
            yield start
            bar.show(min(total, start + size), {})
        bar.close()

    def rows(self, dicts):
        """Rows that the method made itself; without `scores` they get zeros."""
        return self.encode([{"scores": [0.0] * len(row["responses"])} | row for row in dicts])

    # ---------------------------------------------------------------- scoring

    def autocast(self):
        """Autocast to bfloat16, if the run uses it."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def portion(self, model, size):
        """How many rows to sample or score at once: `size`, or more of them on a GPU.

        There, a small model takes about as long for many rows as for few.
        """
        small = self.device.type == "cuda" and report.count(model) < LARGE
        return 8 * size if small else size

    def compile(self, function):
        """The compiled function if --compile is on, otherwise the function itself."""
        return torch.compile(function, dynamic=False) if self.compiled else function

    @torch.no_grad()
    def score_rows(self, model, rows):
        """Log-probs of every response: for each row K lists of T numbers."""
        out, size = [], self.portion(model, self.batch_size)
        for start in self.pieces("log-probs", len(rows), size):
            part = rows[start : start + size]
            batch = self.collate(part)
            with self.autocast():
                logps = model.logps(batch)
            lengths = batch.mask.sum(-1).tolist()
            for row, values, ends in zip(part, logps.tolist(), lengths):
                out.append([values[k][: ends[k]] for k in range(len(row["responses"]))])
        return out

    def cached_logps(self, model, rows):
        """`score_rows`, cached if the model has a fingerprint."""
        fingerprint = getattr(model, "fingerprint", None)
        if not fingerprint:
            return self.score_rows(model, rows)
        trees = digest([encode(row, self.world.tokenizer)["tree"].key() for row in rows])
        key = ["logps", fingerprint, trees, self.batch_size]
        return self.cached(key, lambda: self.score_rows(model, rows))

    def logps(self, model, rows):
        """Log-probs of rows as a column, without gradient: for each row K lists of T numbers."""
        return self.stage("logps", lambda: self.score_rows(model, self.encode(rows)))

    # ---------------------------------------------------------------- training and evaluation

    align, align_in_rounds = align.align, align.align_in_rounds
    fit = loop.fit

    def race(self, arms, data=None, watch=None, end=None, **settings):
        """Align several arms on the same rows, labels, order and noise -> {arm: [curve per seed]}.

        arms: {name: arm}. An arm is (loss, cfg), (loss, cfg, options of `align`), or a function
            (lab) -> model for a method with a `run` of its own.
        data(lab, base) -> rows, by default pairs sampled from the base model.
        watch: as in `align`, but every look by default measures all `eval_size` prompts.
        end(lab, policy) -> {name: number}, which is added to the last point of a curve.
        settings: run settings for all arms, and `world` (see `at`), or a function seed -> World.

        Every seed has its own base model, prompts and labels. The first point of every curve has
        `reward_sd`, the base model's standard deviation of the true reward, where there is one.
        """
        curves = {name: [] for name in arms}
        world = settings.pop("world", None)
        self.races += 1
        for seed in self.seeds:
            folder = f"race{self.races}-seed{seed}"
            here = world(seed) if callable(world) else world
            shared = self.child(folder, here, {"base_seed": seed} | settings | {"seed": seed})
            rows, unit = None, None
            for name, arm in arms.items():
                with self.verb("race") as stage:
                    if not stage.done:
                        lab = shared.child(name.replace(os.sep, "_"), None, {})
                        lab.full_looks = True
                        lab.seen = shared.seen  # all arms begin with the same look
                        base = lab.base()
                        if callable(arm):
                            policy = arm(lab)
                        else:
                            if rows is None:
                                rows = (data or Lab.pairs)(shared, shared.base())
                            loss, cfg, options = arm if len(arm) == 3 else (*arm, {})
                            how = {"watch": watch} | options
                            policy = lab.align(base, rows, loss, cfg, **how)
                        last = end(lab, policy) if end else {}
                        if unit is None:
                            unit = evaluate.reward_sd(lab)
                        curve = [*policy.curve[:-1], policy.curve[-1] | last]
                        stage.value = [curve[0] | unit, *curve[1:]]
                curves[name].append(stage.value)
        return curves

    def pairs(self, base):
        """The rows of a race: pairs sampled from the base model."""
        return self.preferences(base, k=2)

    glance = evaluate.glance
    keep_pictures = evaluate.keep_pictures
    evaluate = evaluate.evaluate


def folder_stamp(folder):
    """A value that changes when a checkpoint folder does: path, file names, sizes and times."""
    if not os.path.isdir(folder):
        return [folder]
    names = sorted(os.listdir(folder))
    stats = [os.stat(os.path.join(folder, name)) for name in names]
    about = [(n, s.st_size, s.st_mtime) for n, s in zip(names, stats)]
    return [os.path.abspath(folder), about]
