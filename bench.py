"""Speed: a training step and sampling, timed side by side with a peer in the same call.

    python bench.py                  pairs of 128 + 2 x 64 tokens, 3.4M parameters, padded rows
    python bench.py --k 8            8 responses per prompt
    python bench.py --against trl    TRL's DPOTrainer (pip install trl transformers)
    python bench.py --sampling off   training steps only
    python bench.py --lengths mixed  rows of different lengths, as real ones are
    python bench.py --layers 2 --dim 96 --vocab 400 --prompt 6 --response 28 --batch_size 32

A step consists of collate, log-probs, loss, backward, clipping and AdamW. The loss is that of
methods/dpo.py; for K > 2 it is the softmax cross-entropy of the first of K responses. The GPT and
its tokens are random, and the reference is another random GPT whose log-probs are cached. The peer
has the same weights, rows, loss and optimizer:

    rows    the plain way: every response is a right-padded row of its own, after a copy of
            the prompt, and logits are computed at all positions
    trl     DPOTrainer.training_step on a LlamaForCausalLM, with precomputed reference log-probs
            and without gradient checkpointing; trl_compiled with torch.compile, too

Both first take the same few steps in float32, plainly, and their losses must agree. Then they are
timed in turns (A B A B ...), compiled or captured where that is on, and the medians are printed.
With --capture the rows are collated once, and a step is one CUDA graph; on a CPU the same code runs
without a graph.

Peak memory is measured in one further step that is not compiled. It includes weights and optimizer
state. On CUDA it is max_memory_allocated; on a CPU it is the peak of the profiler's allocations,
which count whether or not they are touched. tokens_s counts a prompt once for its K responses. MFU
is the arithmetic that a step needs, divided by what the card can do at its peak. The uncached
sampler runs the model over prompt and response again for every token.
"""

import contextlib
import copy
import itertools
import json
import os
import random
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from data import UserError, collate, fit_context
from lab import report
from lab.flags import convert, fields_of
from lab.graph import Captured, capturable
from lab.settings import pick_device, unknown
from methods import dpo
from nanomodel import GPT, GPTConfig, rotary

# TFLOP/s in bfloat16 and float32, from data sheets, without sparsity; the first match counts
PEAK = {
    "H100 PCIe": (756, 51),
    "H100": (989, 67),
    "H200": (989, 67),
    "A100": (312, 19.5),
    "L40S": (362, 92),
    "L4": (121, 30),
}

PEERS = ("rows", "trl", "trl_compiled", "none")


@dataclass
class Settings:
    """The flags of the command line: what is timed, and how."""

    layers: int = 3  # layers of the GPT
    dim: int = 256  # hidden size; the hidden layer of SwiGLU is about 8/3 of it
    heads: int = 4  # query heads
    kv_heads: int | None = None  # key and value heads; default: as many as query heads
    vocab: int = 4096  # vocabulary size; the last two tokens are end-of-text and padding
    prompt: int = 128  # tokens of a prompt
    response: int = 64  # tokens of a response, with end-of-text
    lengths: str = "equal"  # equal: --prompt and --response; mixed: a quarter of them up to them
    k: int = 2  # responses per prompt
    batch_size: int = 4  # prompts per step
    steps: int = 10  # timed steps; each sampler runs at most 3 times
    against: str = "rows"  # the peer: rows, trl, trl_compiled or none
    device: str = "auto"  # cpu, cuda or mps; auto takes CUDA where there is one
    dtype: str = "auto"  # float32 or bfloat16 (autocast); auto is bfloat16 on CUDA
    compile: str = "off"  # torch.compile for nanopref: on or off
    capture: str = "auto"  # whole steps as CUDA graphs: on or off; auto is on for CUDA only
    sampling: str = "on"  # time sampling as well: on or off
    json: bool = False  # print one JSON line last

    def __post_init__(self):
        lowest = dict(layers=1, dim=1, heads=1, kv_heads=1, vocab=4, prompt=1, response=1)
        lowest |= dict(k=2, batch_size=1, steps=1)
        for name, low in lowest.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise UserError(f"--{name} {value} must be at least {low}")
        choices = dict(against=PEERS, dtype=("auto", "float32", "bfloat16"))
        choices |= dict(compile=("on", "off"), capture=("auto", "on", "off"))
        choices |= dict(sampling=("on", "off"), lengths=("equal", "mixed"))
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in allowed:
                raise UserError(f"--{name} {value} must be one of {', '.join(allowed)}")
        if self.dim % (2 * self.heads):
            raise UserError(f"--dim {self.dim} must be a multiple of twice --heads {self.heads}")
        if self.heads % (self.kv_heads or 1):
            raise UserError(f"--kv_heads {self.kv_heads} must divide --heads {self.heads}")
        if self.lengths == "mixed" and self.sampling == "on":
            raise UserError("--lengths mixed times training steps only: it needs --sampling off")
        if self.against.startswith("trl") and self.k != 2:
            raise UserError(f"--against {self.against} compares pairs, not --k {self.k}")


def own_flags():
    """{name: Flag} of the fields of Settings, read from the source of this file."""
    with open(__file__, encoding="utf-8") as file:
        return fields_of(file.read(), "Settings")


def read_flags(argv):
    """The Settings of a command line, or None for --help.

    UserError: a flag is unknown, is given twice, has no value or a wrong one. The message names
    the flag, and for an unknown flag the most similar one that exists.
    """
    own, given, words = own_flags(), {}, iter(argv)
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            raise UserError(f"unexpected {word!r}: flags begin with --")
        if name == "help":
            return None
        if name not in own:
            raise UserError(unknown("flag", "--" + name, ["--" + n for n in [*own, "help"]]))
        if name in given:
            raise UserError(f"--{name} is given twice")
        if not equals:
            value = "true" if name == "json" else next(words, "--")
            if value.startswith("--"):
                raise UserError(f"--{name} needs a value")
        given[name] = convert(name, value, own[name].kind)
    return Settings(**given)


class Bench:
    """What all contenders share: rows, loss, device, precision and clock."""

    def __init__(self, s):
        self.settings, self.device = s, pick_device(s.device)
        self.cuda = self.device.type == "cuda"
        self.bf16 = s.dtype == "bfloat16" or (s.dtype == "auto" and self.cuda)
        self.compiled = s.compile == "on"
        self.captured = s.capture == "on" or (s.capture == "auto" and self.cuda)
        self.exact = True  # no autocast while losses are compared
        self.fast = False  # compiled and captured, while steps are timed
        self.loss, self.cfg = dpo.loss if s.k == 2 else listwise, dpo.Config()
        self.tokenizer = SimpleNamespace(eot=s.vocab - 2, pad=s.vocab - 1)
        rng, scores = random.Random(0), [1.0] + [0.0] * (s.k - 1)

        def draw(n, end=0):
            """n random tokens, or fewer with mixed lengths, less `end` for end-of-text."""
            n = rng.randint(-(-n // 4), n) if s.lengths == "mixed" else n
            return rng.choices(range(s.vocab - 2), k=n - end)

        rows = [
            {"prompt": draw(s.prompt), "responses": [draw(s.response, 1) for _ in range(s.k)]}
            for _ in range(4 * s.batch_size)
        ]
        rows = [row | {"scores": scores} for row in rows]
        self.rows = fit_context(rows, self.tokenizer, s.prompt + s.response)[0]
        torch.manual_seed(0)

    def gpt(self):
        """A GPT with random weights on the device."""
        s = self.settings
        shape = (s.vocab, s.dim, -(-s.dim // 3) * 8, s.layers, s.heads, s.kv_heads or s.heads)
        return GPT(GPTConfig(*shape, max_position_embeddings=s.prompt + s.response)).to(self.device)

    def pick(self, rows, i):
        """The rows of step i: four batches in cyclic order."""
        size = self.settings.batch_size
        return rows[i % 4 * size : (i % 4 + 1) * size]

    @torch.no_grad()
    def known(self, score):
        """One value per row, computed batch by batch with score(rows) -> (B, ...).

        This is the cache of the reference's log-probs.
        """
        return [value for i in range(4) for value in score(self.pick(self.rows, i)).tolist()]

    def autocast(self):
        """Autocast to bfloat16, if --dtype asks for it and losses are not being compared."""
        enabled = self.bf16 and not self.exact
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def now(self):
        """The time in seconds, after all queued work of the device has finished."""
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()
        return time.perf_counter()

    def seconds(self, function, *args):
        """The time in seconds of one call, with all the work that it queues."""
        start = self.now()
        function(*args)
        return self.now() - start


# ---------------------------------------------------------------- the contenders


class Contender:
    """A model with its AdamW.

    score(i) -> the loss of batch i, after its gradients were accumulated. step(i) is a whole
    training step.
    """

    def __init__(self, name, model, score):
        self.name, self.model, self.score = name, model, score
        fused = next(model.parameters()).device.type != "mps"
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=1e-4, weight_decay=0.0, betas=(0.9, 0.95), fused=fused
        )

    def step(self, i):
        return self.update(lambda: self.score(i))

    def update(self, score):
        """A step with the loss score()."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = score()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss


def backward(losses):
    """Backpropagate the mean of the losses (B,) -> the mean, detached."""
    losses.mean().backward()
    return losses.detach().mean()


def listwise(logps, ref_logps, batch, cfg):
    """-log softmax over K of beta times the log-ratio, for the first response -> losses (B,), {}.

    It equals DPO's loss when K = 2. Arguments and shapes are those of methods/dpo.py.
    """
    return -(cfg.beta * (logps - ref_logps).sum(-1)).log_softmax(-1)[:, 0], {}


def ours(bench, model, reference):
    """nanopref: a prompt is computed once for all its responses.

    Only the hidden states that predict a response token go through the vocabulary matrix.
    """

    def ref_logps_of(rows):
        return reference.logps(collate(rows, bench.tokenizer).to(bench.device))

    known = bench.known(ref_logps_of)
    rows = [row | {"ref_logps": x} for row, x in zip(bench.rows, known)]
    plain = compiled = lambda model, batch: model.logps(batch), bench.loss
    if bench.compiled:
        compiled = [torch.compile(f, dynamic=False) for f in plain]
    if bench.captured:  # rows are collated once
        whole = collate(rows, bench.tokenizer, fixed=True, packed=False).to(bench.device)

    def item(i):
        """The batch of step i and the reference's log-probs."""
        if bench.fast and bench.captured:
            places = torch.tensor(bench.pick(range(len(rows)), i)).to(bench.device)
            batch = whole.take(places)
        else:
            fixed = bench.fast and bench.compiled
            batch = collate(bench.pick(rows, i), bench.tokenizer, fixed=fixed).to(bench.device)
        ref_logps = batch.columns.pop("ref_logps")
        return batch, F.pad(ref_logps, (0, batch.mask.shape[2] - ref_logps.shape[2]))

    def score(item):
        logps_of, loss = compiled if bench.fast else plain
        batch, ref_logps = item
        with bench.autocast():
            logps = logps_of(model, batch)
        return backward(loss(logps, ref_logps, batch, bench.cfg)[0])

    contender = Contender("nanopref", model, lambda i: score(item(i)))
    if bench.captured and capturable(contender.optimizer, bench.device):
        step = Captured(lambda item: contender.update(lambda: score(item)), bench.device)
        plainly = contender.step
        contender.step = lambda i: step(item(i)) if bench.fast else plainly(i)
    return contender


def plain_hidden(model, tokens):
    """Hidden states (N, S, hidden) of token rows (N, S) by the model's layers, plainly causal."""
    x = model.embed_tokens(tokens)
    position = torch.arange(tokens.shape[1], device=tokens.device)[None]
    cos, sin = rotary(position, model.config.head_dim, model.config.rope_theta, x.dtype)

    def attend(attn, y):
        q, k, v = attn.project(y, cos, sin)
        repeat = q.shape[1] // k.shape[1]
        if repeat > 1:
            k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return attn.o_proj(out.transpose(1, 2).flatten(2))

    for layer in model.layers:
        x = layer(x, attend)
    return model.norm(x)


def rows_logps(bench, model, rows):
    """Summed log-probs (B, K), computed from one right-padded row per response."""
    paths = [
        torch.tensor(row["prompt"] + response + [bench.tokenizer.eot])
        for row in rows
        for response in row["responses"]
    ]
    tokens = torch.nn.utils.rnn.pad_sequence(paths, True, bench.tokenizer.pad)
    place = torch.arange(1, tokens.shape[1])
    start = torch.tensor([[len(row["prompt"])] for row in rows for _ in row["responses"]])
    end = torch.tensor([[len(path)] for path in paths])
    mask = ((place >= start) & (place < end)).to(bench.device)  # (B*K, S-1)
    tokens = tokens.to(bench.device)
    logits = model.unembed(plain_hidden(model, tokens[:, :-1])).float()  # (B*K, S-1, V)
    logits, target = logits.flatten(0, 1), tokens[:, 1:].flatten()
    logps = -F.cross_entropy(logits, target, reduction="none").view(mask.shape)
    return (logps * mask).sum(-1).view(len(rows), -1)


def plain_rows(bench, model, reference):
    """The plain way: one padded row per response, and logits at every position."""
    known = bench.known(lambda rows: rows_logps(bench, reference, rows))

    def score(i):
        ref_logps = torch.tensor(bench.pick(known, i), device=bench.device)
        with bench.autocast():
            logps = rows_logps(bench, model, bench.pick(bench.rows, i))
        sums = SimpleNamespace(mask=torch.ones_like(logps, dtype=torch.bool)[..., None])
        return backward(bench.loss(logps[..., None], ref_logps[..., None], sums, bench.cfg)[0])

    return Contender("rows", model, score)


def trl(bench, model, reference):
    """TRL's DPOTrainer with the same weights, rows and loss.

    It takes text, so each token is written as its number, and a word-level tokenizer reads the same
    tokens back. UserError: the packages trl and transformers are not installed.
    """
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TQDM_DISABLE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    try:
        import datasets
        import tokenizers
        import transformers
        from trl import DPOConfig, DPOTrainer
    except ImportError as error:
        raise UserError(
            f"--against trl needs the package {error.name}: pip install trl transformers"
        ) from None
    transformers.logging.disable_progress_bar()
    names = [str(i) for i in range(bench.settings.vocab - 2)] + ["<end>", "<pad>"]
    engine = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<pad>")
    )
    engine.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=engine, eos_token="<end>", pad_token="<pad>"
    )
    texts = [
        ["".join(" " + names[i] for i in ids) for ids in (row["prompt"], *row["responses"])]
        for row in bench.rows
    ]
    columns = "prompt", "chosen", "rejected"
    texts = datasets.Dataset.from_list([dict(zip(columns, row)) for row in texts])
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"):
        llamas = []
        for gpt in (model, reference):
            gpt.save_pretrained(folder)
            llamas.append(
                transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            )
        config = DPOConfig(
            folder,
            beta=bench.cfg.beta,
            precompute_ref_log_probs=True,
            gradient_checkpointing=False,
            max_length=None,
            per_device_train_batch_size=bench.settings.batch_size,
            use_cpu=bench.device.type == "cpu",
            bf16=False,
            report_to="none",
            disable_tqdm=True,
        )
        trainer = DPOTrainer(
            llamas[0], llamas[1], config, train_dataset=texts, processing_class=tokenizer
        )
        examples = list(trainer.train_dataset)
    trainer.current_gradient_accumulation_steps, compute_loss = 1, trainer.compute_loss

    def autocast_loss(*args, **kwargs):
        with bench.autocast():
            return compute_loss(*args, **kwargs)

    def score(i):
        batch = trainer.data_collator(bench.pick(examples, i))
        return trainer.training_step(trainer.model, batch)

    trainer.compute_loss = autocast_loss
    return Contender("trl", trainer.model, score)


def trl_compiled(bench, model, reference):
    """`trl` with its model compiled by torch.compile, from the first timed step on."""
    contender = trl(bench, model, reference)
    contender.name, plainly, done = "trl_compiled", contender.step, []

    def step(i):
        if bench.fast and not done:
            contender.model.compile()
            done.append(True)
        return plainly(i)

    contender.step = step
    return contender


# ---------------------------------------------------------------- measuring


def first_losses(contenders, steps=3):
    """The first losses of each contender in float32, as a list of lists.

    RuntimeError: they differ by more than a thousandth.
    """
    losses = [[float(contender.step(i)) for i in range(steps)] for contender in contenders]
    for contender, values in zip(contenders, losses):
        if any(not abs(a - b) <= 1e-3 * abs(a) for a, b in zip(losses[0], values)):
            raise RuntimeError(
                f"first losses differ: {contenders[0].name} {losses[0]}, {contender.name} {values}"
            )
    return losses


def memory(bench, contender):
    """Peak memory of a step in bytes, with weights and optimizer state.

    None on devices whose allocations cannot be counted (mps).
    """
    fast, bench.fast = bench.fast, False  # CUDA graphs keep a memory pool of their own
    contender.optimizer.zero_grad(set_to_none=True)
    state = [value for values in contender.optimizer.state.values() for value in values.values()]
    tensors = [*contender.model.parameters(), *state]
    kept, peak = sum(x.numel() * x.element_size() for x in tensors), None
    if bench.cuda:
        contender.step(0)  # operators allocate workspaces in their first call, which do not count
        contender.optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        contender.step(0)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    elif bench.device.type == "cpu":
        with quiet_stderr(), torch.autograd.profiler.profile(profile_memory=True) as profile:
            contender.step(0)
        events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
        events.sort(key=lambda e: e.start_ns())
        peak = max(itertools.accumulate(e.nbytes() for e in events))
    bench.fast = fast
    return peak and kept + peak


def token_count(rows):
    """The number of tokens of rows, in which a prompt counts once for all its responses."""
    return sum(
        len(row["prompt"]) + sum(len(response) + 1 for response in row["responses"]) for row in rows
    )


def flops(s, model, rows):
    """Floating-point operations that a training step on rows needs, forward and backward.

    They are 6 for each weight and token, and in each layer 12 times the hidden size for each pair
    of positions that attend to each other.
    """
    matrices = sum(p.numel() for p in model.layers.parameters() if p.dim() == 2)
    total = 0
    for row in rows:
        p, lengths = len(row["prompt"]), [len(response) + 1 for response in row["responses"]]
        fed = p + sum(n - 1 for n in lengths)  # a response's last token predicts nothing
        pairs = p * (p + 1) / 2 + sum((n - 1) * (p + n / 2) for n in lengths)
        weights = matrices * fed + s.vocab * s.dim * sum(lengths)
        total += 6 * weights + 12 * s.layers * s.dim * pairs
    return total


@contextlib.contextmanager
def quiet_stderr():
    """Silence stderr as a file descriptor, since some builds' profiler writes to it directly."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@torch.no_grad()
def sample_uncached(model, prompts, k, rng, max_tokens):
    """k responses of `max_tokens` tokens for each of n prompts of one length: (n k, max_tokens).

    For every token the model runs over the whole prompt and response again.
    """
    tokens = torch.tensor(prompts, device=model.device).repeat_interleave(k, 0)
    for _ in range(max_tokens):
        total = model.unembed(plain_hidden(model, tokens)[:, -1]).float().softmax(-1).cumsum(-1)
        draw = torch.rand(len(total), 1, generator=rng, device=total.device) * total[:, -1:]
        new = torch.searchsorted(total, draw, right=True).clamp(max=total.shape[1] - 1)
        tokens = torch.cat([tokens, new], 1)
    return tokens[:, len(prompts[0]) :]


@torch.no_grad()
def check_sampling(model, prompts, max_tokens):
    """Compare greedy sampling with the cache to the model without it.

    RuntimeError: a sampled token is not the most likely one of the uncached model.
    """
    greedy = model.sample(prompts, 1, None, max_tokens, temperature=0)
    answers = torch.tensor(greedy, device=model.device)[:, 0]  # (n, max_tokens)
    tokens = torch.cat([torch.tensor(prompts, device=model.device), answers[:, :-1]], 1)
    logits = model.unembed(plain_hidden(model, tokens)[:, -max_tokens:])
    short = logits.max(-1).values - logits.gather(-1, answers[..., None])[..., 0]
    if not short.max() <= 1e-3:
        raise RuntimeError(f"cached sampling took a token {short.max():.3g} below the best")


def sampling(bench, model):
    """Time k responses to each prompt of a batch, with and without the cache in turns -> a dict."""
    s, prompts = bench.settings, [row["prompt"] for row in bench.pick(bench.rows, 0)]
    model.tokenizer = SimpleNamespace(eot=-1)  # never drawn, so all responses have full length
    check_sampling(model, prompts, s.response)
    rng = torch.Generator(bench.device).manual_seed(0)
    both = [
        lambda: model.sample(prompts, s.k, rng, s.response),
        lambda: sample_uncached(model, prompts, s.k, rng, s.response),
    ]
    with bench.autocast():
        runs = [[bench.seconds(sample) for sample in both] for _ in range(1 + min(s.steps, 3))]
    cached, uncached = map(statistics.median, zip(*runs[1:]))  # the first run is a warm-up
    tokens = s.batch_size * s.k * s.response
    return dict(
        sample_s=cached,
        sample_uncached_s=uncached,
        sample_tokens_s=tokens / cached,
        sample_speedup=uncached / cached,
    )


def run(s):
    """Measure everything -> one flat dict of the settings and the numbers, as --json prints it."""
    bench = Bench(s)
    model, reference = bench.gpt(), bench.gpt()
    peers = dict(rows=[plain_rows], trl=[trl], trl_compiled=[trl_compiled], none=[])
    makers = [ours, *peers[s.against]]
    contenders = [make(bench, copy.deepcopy(model), reference) for make in makers]
    losses, bench.exact, bench.fast = first_losses(contenders), False, True
    times = [[bench.seconds(c.step, i) for c in contenders] for i in range(3 + s.steps)]
    times = zip(*times[3:])  # the first three steps are a warm-up
    out = asdict(s) | dict(
        params=report.count(model),
        device=str(bench.device),
        dtype="bfloat16" if bench.bf16 else "float32",
        capture="on" if bench.captured else "off",
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        card=torch.cuda.get_device_name() if bench.cuda else None,
        first_loss=losses[0][0],
    )
    count = token_count(bench.rows) / 4  # rows are four batches
    for contender, seconds, prefix in zip(contenders, times, ("", "against_")):
        seconds, held = statistics.median(seconds), memory(bench, contender)
        out[prefix + "step_s"] = seconds
        out[prefix + "tokens_s"] = count / seconds
        out[prefix + "peak_mb"] = held and held / 1e6
    peaks = [numbers for card, numbers in PEAK.items() if card in (out["card"] or "")]
    peak = peaks[0][0 if bench.bf16 else 1] if peaks else None
    done = flops(s, model, bench.rows) / 4
    out["mfu"] = peak and done / out["step_s"] / peak / 1e12
    if s.against != "none":
        out["speedup"] = out["against_step_s"] / out["step_s"]
    return out | (sampling(bench, model) if s.sampling == "on" else {})


HEADER = """
{layers} layers of {dim}, vocabulary {vocab}, {millions:.2f}M parameters
{where}, {dtype}, CUDA graphs {capture}, compile {compile}, {threads} threads, torch {torch}
{batch_size} prompts of {prompt} tokens, {k} responses of {response}, lengths {lengths}
medians of {steps} steps
"""
SPEEDUP = "{speedup:.2f} times the speed of {against}; the first losses agree ({first_loss:.6f})"
SAMPLING = (
    "sampling: cached {sample_s:.3f} s ({sample_tokens_s:.0f} tokens_s), "
    "uncached {sample_uncached_s:.3f} s: {sample_speedup:.1f} times"
)


def text(out):
    """The numbers of `run` as a page of text."""

    def line(name, prefix):
        held, mfu = out[prefix + "peak_mb"], None if prefix else out["mfu"]
        speed = f"{out[prefix + 'step_s']:.4f}", f"{out[prefix + 'tokens_s']:.0f}"
        return [name, *speed, f"{held:.0f} MB" if held else "-", f"{mfu:.1%}" if mfu else "-"]

    compared = "speedup" in out
    rows = [line("nanopref", "")] + ([line(out["against"], "against_")] if compared else [])
    table = report.table(rows, ["", "step_s", "tokens_s", "peak memory", "MFU"])
    where, millions = out["card"] or out["device"], out["params"] / 1e6
    parts = [HEADER.strip().format(**out, where=where, millions=millions), "", table]
    parts += [SPEEDUP.format(**out)] if compared else []
    parts += [SAMPLING.format(**out)] if "sample_s" in out else []
    return "\n".join(parts)


def main(argv):
    """Carry out one command line. UserError: a flag is wrong."""
    s = read_flags(argv)
    if s is None:
        print(__doc__.strip() + "\n")
        for name, flag in own_flags().items():
            print(f"  --{name:<12} {flag.text} [{flag.default}]")
        return
    out = run(s)
    print(text(out))
    if s.json:
        print(json.dumps(out))


def cli(argv):
    """Run `main` and print a user's mistake as one line on stderr -> exit status 0, or 2 for it."""
    try:
        main(argv)
    except (ValueError, OSError, RuntimeError) as error:
        full = isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)
        if not full and not isinstance(error, (UserError, OSError)):
            raise
        what = "these shapes do not fit into the memory" if full else " ".join(str(error).split())
        print(f"bench.py: {what}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(cli(sys.argv[1:]))
