"""Speed: a training step and sampling, timed beside a peer in the same call.

    python bench.py                    3.4M parameters, prompt 128, response 64, pairs, against plain padded rows
    python bench.py --k 8              8 responses a prompt
    python bench.py --against trl      TRL's DPOTrainer (pip install trl transformers)
    python bench.py --layers 2 --dim 96 --heads 4 --vocab 400 --prompt 6 --response 28 --batch_size 32

A step: collate, log-probs, loss (methods/dpo.py; for K > 2 the softmax cross-entropy of the first of K), backward, clipping, AdamW. The
GPT and its tokens are random, the reference is another random GPT whose log-probs were cached. The peer has the same weights, rows, loss
and optimizer.

    rows    what one writes first: each response in a right-padded row behind its own copy of the prompt, causal, logits everywhere
    trl     DPOTrainer.training_step on a LlamaForCausalLM, precomputed reference log-probs, no gradient checkpointing

Both take the same few steps in float32 first, and their losses must agree; then they take turns (A B A B ...), and the times are medians.
Peak memory is measured on a step of its own, not compiled: what it holds at most, weights and optimizer state included, by the
allocator's count (CUDA: max_memory_allocated) or the profiler's list of allocations (CPU: asked for, touched or not). tokens_s counts a
prompt once for its K responses. MFU is the arithmetic that a step needs over the card's peak. The uncached sampler reads prompt and
response again for each token and draws it in the same way.
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
from lab.settings import pick_device, unknown
from methods import dpo
from nanomodel import GPT, GPTConfig, rotary

# TFLOP/s in bfloat16 and float32 (data sheets, without sparsity); the first name that fits
PEAK = {
    "H100 PCIe": (756, 51),
    "H100": (989, 67),
    "H200": (989, 67),
    "A100": (312, 19.5),
    "L40S": (362, 92),
    "L4": (121, 30),
}


@dataclass
class Settings:
    """What is timed."""

    layers: int = 3  # of the GPT
    dim: int = 256  # hidden size; SwiGLU is 8/3 of it
    heads: int = 4  # query heads
    kv_heads: int | None = None  # key and value heads; default: as many as heads
    vocab: int = 4096  # tokens; the last two are the end and the padding
    prompt: int = 128  # tokens of a prompt
    response: int = 64  # tokens of a response, the end among them
    k: int = 2  # responses a prompt
    batch_size: int = 4  # prompts a step
    steps: int = 10  # timed steps; the samplers run at most 3 times
    against: str = "rows"  # rows, trl, none
    device: str = "auto"  # cpu, cuda, mps; auto takes CUDA where there is one
    dtype: str = "auto"  # float32 or bfloat16 (autocast); auto: bfloat16 on CUDA
    compile: str = "auto"  # on, off; auto: on CUDA only. As in train.py; a peer is never compiled
    json: bool = False  # print one JSON line last

    def __post_init__(self):
        for name in (
            "layers",
            "dim",
            "heads",
            "kv_heads",
            "vocab",
            "prompt",
            "response",
            "k",
            "batch_size",
            "steps",
        ):
            low = dict(vocab=4, k=2).get(name, 1)
            if getattr(self, name) is not None and getattr(self, name) < low:
                raise UserError(f"--{name} {getattr(self, name)} must be at least {low}")
        for name, allowed in dict(
            against="rows trl none", dtype="auto float32 bfloat16", compile="auto on off"
        ).items():
            if getattr(self, name) not in allowed.split():
                raise UserError(
                    f"--{name} {getattr(self, name)} must be one of {', '.join(allowed.split())}"
                )
        if self.dim % (2 * self.heads):
            raise UserError(f"--dim {self.dim} must be a multiple of twice --heads {self.heads}")
        if self.heads % (self.kv_heads or 1):
            raise UserError(f"--kv_heads {self.kv_heads} must divide --heads {self.heads}")
        if self.against == "trl" and self.k != 2:
            raise UserError(f"--against trl compares pairs, not --k {self.k}")


def own_flags():
    """{flag: its annotation, default and explanation}, from the source of Settings."""
    with open(__file__, encoding="utf-8") as file:
        return fields_of(file.read(), "Settings")


def read_flags(argv):
    """Settings of a command line, None for --help. UserError naming the flag, and for an unknown one the nearest that exists."""
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
    """What all contenders share: rows, loss, device, precision, clock."""

    def __init__(self, s):
        self.settings, self.device = s, pick_device(s.device)
        self.cuda = self.device.type == "cuda"
        self.bf16 = s.dtype == "bfloat16" or (s.dtype == "auto" and self.cuda)
        self.compiled = s.compile == "on" or (s.compile == "auto" and self.cuda)
        self.exact = True  # float32 as long as losses are compared
        self.loss, self.cfg = dpo.loss if s.k == 2 else listwise, dpo.Config()
        self.tokenizer = SimpleNamespace(eot=s.vocab - 2, pad=s.vocab - 1)
        rng, scores = random.Random(0), [1.0] + [0.0] * (s.k - 1)
        draw = lambda n: rng.choices(range(s.vocab - 2), k=n)  # noqa: E731
        rows = [
            {"prompt": draw(s.prompt), "responses": [draw(s.response - 1) for _ in range(s.k)]}
            for _ in range(4 * s.batch_size)
        ]
        rows = [row | {"scores": scores} for row in rows]
        self.rows = fit_context(rows, self.tokenizer, s.prompt + s.response)[0]
        torch.manual_seed(0)

    def gpt(self):
        s = self.settings
        shape = (s.vocab, s.dim, -(-s.dim // 3) * 8, s.layers, s.heads, s.kv_heads or s.heads)
        return GPT(GPTConfig(*shape, max_position_embeddings=s.prompt + s.response)).to(self.device)

    def pick(self, rows, i):
        """The rows of step i: four batches, in a circle."""
        size = self.settings.batch_size
        return rows[i % 4 * size : (i % 4 + 1) * size]

    @torch.no_grad()
    def known(self, score):
        """score(rows of a batch) -> a value for each row, for all rows: the reference's cache."""
        return [value for i in range(4) for value in score(self.pick(self.rows, i)).tolist()]

    def autocast(self):
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.bf16 and not self.exact
        )

    def now(self):
        """Seconds, once the device has done what it was given."""
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()
        return time.perf_counter()

    def seconds(self, function, *args):
        start = self.now()
        function(*args)
        return self.now() - start


# ---------------------------------------------------------------- the contenders


class Contender:
    """A model with its AdamW; score(i) -> loss of batch i, its gradients left behind; step(i) is a whole training step."""

    def __init__(self, name, model, score):
        self.name, self.model, self.score = name, model, score
        fused = next(model.parameters()).device.type != "mps"
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=1e-4, weight_decay=0.0, betas=(0.9, 0.95), fused=fused
        )

    def step(self, i):
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.score(i)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss


def backward(losses):
    losses.mean().backward()
    return losses.detach().mean()


def listwise(logps, ref_logps, batch, cfg):
    """-log softmax(beta * log-ratios) of the first response, DPO's loss when K = 2; shapes as in methods/dpo.py."""
    return -(cfg.beta * (logps - ref_logps).sum(-1)).log_softmax(-1)[:, 0], {}


def ours(bench, model, reference):
    """nanopref: a prompt once for its responses, only response rows before the vocabulary matrix, log-probs per token."""
    known = bench.known(
        lambda rows: reference.logps(collate(rows, bench.tokenizer).to(bench.device))
    )
    rows = [row | {"ref_logps": x} for row, x in zip(bench.rows, known)]
    plain = compiled = lambda model, batch: model.logps(batch), bench.loss
    if bench.compiled:
        compiled = [
            torch.compile(f, mode="reduce-overhead" if bench.cuda else "default", dynamic=False)
            for f in plain
        ]

    def score(i):
        if bench.compiled and bench.cuda:
            torch.compiler.cudagraph_mark_step_begin()
        logps_of, loss = compiled if bench.compiled else plain
        batch = collate(bench.pick(rows, i), bench.tokenizer, fixed=bench.compiled).to(bench.device)
        ref_logps = batch.columns.pop("ref_logps")
        ref_logps = F.pad(ref_logps, (0, batch.mask.shape[2] - ref_logps.shape[2]))
        with bench.autocast():
            logps = logps_of(model, batch)
        return backward(loss(logps, ref_logps, batch, bench.cfg)[0])

    return Contender("nanopref", model, score)


def plain_hidden(model, tokens):
    """Hidden states (N, S, hidden) of token rows (N, S), causal, by the model's own layers."""
    x, position = (
        model.embed_tokens(tokens),
        torch.arange(tokens.shape[1], device=tokens.device)[None],
    )
    cos, sin = rotary(position, model.config.head_dim, model.config.rope_theta, x.dtype)

    def attend(attn, y):
        q, k, v = attn.project(y, cos, sin)
        k, v = (
            x.repeat_interleave(q.shape[1] // k.shape[1], 1) if q.shape[1] > k.shape[1] else x
            for x in (k, v)
        )
        return attn.o_proj(
            F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        )

    for layer in model.layers:
        x = layer(x, attend)
    return model.norm(x)


def rows_logps(bench, model, rows):
    """(B, K): a response's summed log-prob, from one right-padded row a response."""
    paths = [
        torch.tensor(row["prompt"] + response + [bench.tokenizer.eot])
        for row in rows
        for response in row["responses"]
    ]
    tokens = torch.nn.utils.rnn.pad_sequence(paths, True, bench.tokenizer.pad)
    place = torch.arange(1, tokens.shape[1])
    start = torch.tensor([[len(row["prompt"])] for row in rows for _ in row["responses"]])
    mask = ((place >= start) & (place < torch.tensor([[len(path)] for path in paths]))).to(
        bench.device
    )  # (B*K, S-1)
    tokens = tokens.to(bench.device)
    logits = model.unembed(plain_hidden(model, tokens[:, :-1])).float()  # (B*K, S-1, V)
    logps = -F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(
        mask.shape
    )
    return (logps * mask).sum(-1).view(len(rows), -1)


def plain_rows(bench, model, reference):
    """The ordinary loop: a padded row a response, the whole vocabulary at every position."""
    known = bench.known(lambda rows: rows_logps(bench, reference, rows))

    def score(i):
        ref_logps = torch.tensor(bench.pick(known, i), device=bench.device)
        with bench.autocast():
            logps = rows_logps(bench, model, bench.pick(bench.rows, i))
        sums = SimpleNamespace(mask=torch.ones_like(logps, dtype=torch.bool)[..., None])
        return backward(bench.loss(logps[..., None], ref_logps[..., None], sums, bench.cfg)[0])

    return Contender("rows", model, score)


def trl(bench, model, reference):
    """TRL's trainer. It wants text: a token is written as its number, so that its tokenizer gives our tokens back."""
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
    texts = datasets.Dataset.from_list(
        [dict(zip(("prompt", "chosen", "rejected"), row)) for row in texts]
    )
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"):
        llamas = []
        for gpt in (model, reference):
            gpt.save_pretrained(folder)
            llamas.append(
                transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            )
        options = dict(
            beta=bench.cfg.beta,
            precompute_ref_log_probs=True,
            gradient_checkpointing=False,
            max_length=None,
        )
        options |= dict(
            per_device_train_batch_size=bench.settings.batch_size,
            use_cpu=bench.device.type == "cpu",
            bf16=False,
        )
        config = DPOConfig(folder, report_to="none", disable_tqdm=True, **options)
        trainer = DPOTrainer(
            llamas[0], llamas[1], config, train_dataset=texts, processing_class=tokenizer
        )
        examples = list(trainer.train_dataset)
    trainer.current_gradient_accumulation_steps, compute_loss = 1, trainer.compute_loss

    def autocast_loss(*args, **kwargs):
        with bench.autocast():
            return compute_loss(*args, **kwargs)

    trainer.compute_loss = autocast_loss
    return Contender(
        "trl",
        trainer.model,
        lambda i: trainer.training_step(
            trainer.model, trainer.data_collator(bench.pick(examples, i))
        ),
    )


# ---------------------------------------------------------------- measuring


def first_losses(contenders, steps=3):
    """The first losses of each contender in float32 -> list of lists; RuntimeError unless they agree to 1e-3."""
    losses = [[float(contender.step(i)) for i in range(steps)] for contender in contenders]
    for contender, values in zip(contenders, losses):
        if any(not abs(a - b) <= 1e-3 * abs(a) for a, b in zip(losses[0], values)):
            raise RuntimeError(
                f"first losses differ: {contenders[0].name} {losses[0]}, {contender.name} {values}"
            )
    return losses


def memory(bench, contender):
    """Bytes that a step holds at most, with weights and optimizer state; None where nobody counts (mps)."""
    compiled, bench.compiled = bench.compiled, False  # CUDA graphs keep a pool of their own
    contender.optimizer.zero_grad(set_to_none=True)
    state = [value for values in contender.optimizer.state.values() for value in values.values()]
    kept, peak = (
        sum(x.numel() * x.element_size() for x in [*contender.model.parameters(), *state]),
        None,
    )
    if bench.cuda:
        contender.step(0)  # what an operator keeps from its first call is not the step's
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
        events = sorted(
            (e for e in profile.kineto_results.events() if e.name() == "[memory]"),
            key=lambda e: e.start_ns(),
        )
        peak = max(itertools.accumulate(e.nbytes() for e in events))
    bench.compiled = compiled
    return peak and kept + peak


def flops(s, model):
    """Floating-point operations that a step needs: 6 for each weight a token meets, and 12 a head dimension for each pair of positions."""
    matrices = sum(p.numel() for p in model.layers.parameters() if p.dim() == 2)
    fed = s.prompt + s.k * (s.response - 1)  # a response's last token predicts nothing
    pairs = s.prompt * (s.prompt + 1) / 2 + s.k * (s.response - 1) * (s.prompt + s.response / 2)
    return s.batch_size * (
        6 * (matrices * fed + s.vocab * s.dim * s.k * s.response) + 12 * s.layers * s.dim * pairs
    )


@contextlib.contextmanager
def quiet_stderr():
    """Some builds' profiler writes to the file descriptor itself."""
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
    """n prompts of one length -> (n * k, max_tokens) tokens; prompt and response are read again for each of them."""
    tokens = torch.tensor(prompts, device=model.device).repeat_interleave(k, 0)
    for _ in range(max_tokens):
        total = model.unembed(plain_hidden(model, tokens)[:, -1]).float().softmax(-1).cumsum(-1)
        draw = torch.rand(len(total), 1, generator=rng, device=total.device) * total[:, -1:]
        tokens = torch.cat(
            [tokens, torch.searchsorted(total, draw, right=True).clamp(max=total.shape[1] - 1)], 1
        )
    return tokens[:, len(prompts[0]) :]


@torch.no_grad()
def check_sampling(model, prompts, max_tokens):
    """RuntimeError unless greedy sampling with the cache takes, everywhere, the most likely token of the uncached model."""
    answers = torch.tensor(
        model.sample(prompts, 1, None, max_tokens, temperature=0), device=model.device
    )[:, 0]
    tokens = torch.cat([torch.tensor(prompts, device=model.device), answers[:, :-1]], 1)
    logits = model.unembed(plain_hidden(model, tokens)[:, -max_tokens:])
    short = logits.max(-1).values - logits.gather(-1, answers[..., None])[..., 0]
    if not short.max() <= 1e-3:
        raise RuntimeError(f"cached sampling took a token {short.max():.3g} below the best")


def sampling(bench, model):
    """Times of k responses to each prompt of a batch, with the cache and without, in turns."""
    s, prompts = bench.settings, [row["prompt"] for row in bench.pick(bench.rows, 0)]
    model.tokenizer = SimpleNamespace(eot=-1)  # never drawn: all responses take their full length
    check_sampling(model, prompts, s.response)
    rng = torch.Generator(bench.device).manual_seed(0)
    both = [
        lambda: model.sample(prompts, s.k, rng, s.response),
        lambda: sample_uncached(model, prompts, s.k, rng, s.response),
    ]
    with bench.autocast():
        runs = [[bench.seconds(sample) for sample in both] for _ in range(1 + min(s.steps, 3))]
    cached, uncached = map(statistics.median, zip(*runs[1:]))  # the first warms up
    tokens = s.batch_size * s.k * s.response
    return dict(
        sample_s=cached,
        sample_uncached_s=uncached,
        sample_tokens_s=tokens / cached,
        sample_speedup=uncached / cached,
    )


def run(s):
    """Measure -> dict of the settings and the numbers, flat, as --json prints it."""
    bench = Bench(s)
    model, reference = bench.gpt(), bench.gpt()
    makers = {"rows": [ours, plain_rows], "trl": [ours, trl], "none": [ours]}[s.against]
    contenders = [make(bench, copy.deepcopy(model), reference) for make in makers]
    losses, bench.exact = first_losses(contenders), False
    times = [
        [bench.seconds(contender.step, i) for contender in contenders] for i in range(3 + s.steps)
    ]
    out = asdict(s) | dict(
        params=report.count(model),
        device=str(bench.device),
        dtype="bfloat16" if bench.bf16 else "float32",
    )
    out |= dict(
        compile="on" if bench.compiled else "off",
        threads=torch.get_num_threads(),
        torch=torch.__version__,
    )
    out |= dict(card=torch.cuda.get_device_name() if bench.cuda else None, first_loss=losses[0][0])
    for contender, seconds, prefix in zip(
        contenders, zip(*times[3:]), ("", "against_")
    ):  # the first three warm up
        seconds, held = statistics.median(seconds), memory(bench, contender)
        tokens = s.batch_size * (s.prompt + s.k * s.response)
        out |= {
            prefix + "step_s": seconds,
            prefix + "tokens_s": tokens / seconds,
            prefix + "peak_mb": held and held / 1e6,
        }
    peak = next(
        (numbers[not bench.bf16] for card, numbers in PEAK.items() if card in (out["card"] or "")),
        None,
    )
    out["mfu"] = peak and flops(s, model) / out["step_s"] / peak / 1e12
    if s.against != "none":
        out["speedup"] = out["against_step_s"] / out["step_s"]
    return out | sampling(bench, model)


def text(out):
    """What a person reads."""

    def line(name, prefix):
        held, mfu = out[prefix + "peak_mb"], None if prefix else out["mfu"]
        cells = [
            f"{out[prefix + 'step_s']:.4f}",
            f"{out[prefix + 'tokens_s']:.0f}",
            f"{held:.0f} MB" if held else "-",
        ]
        return [name, *cells, f"{mfu:.1%}" if mfu else "-"]

    where = f"{out['card'] or out['device']}, {out['dtype']}, compile {out['compile']}, {out['threads']} threads, torch {out['torch']}"
    shape = f"{out['layers']} layers of {out['dim']}, vocabulary {out['vocab']}, {out['params'] / 1e6:.2f}M parameters"
    data = f"{out['batch_size']} prompts of {out['prompt']} tokens, {out['k']} responses of {out['response']}; medians of {out['steps']} steps"
    rows = [line("nanopref", "")] + ([line(out["against"], "against_")] if "speedup" in out else [])
    parts = [
        f"{shape}; {where}",
        data,
        "",
        report.table(rows, ["", "step_s", "tokens_s", "peak memory", "MFU"]),
    ]
    if "speedup" in out:
        parts.append(
            f"{out['speedup']:.2f} times the speed of {out['against']}, the first losses agree ({out['first_loss']:.6f})"
        )
    sampled = f"{out['sample_s']:.3f} s ({out['sample_tokens_s']:.0f} tokens_s), uncached {out['sample_uncached_s']:.3f} s"
    return "\n".join([*parts, f"sampling: cached {sampled}: {out['sample_speedup']:.1f} times"])


def main(argv):
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
    """`main` with a user's mistake as one line on stderr -> exit status (0, 2 bad input)."""
    try:
        main(argv)
    except (ValueError, OSError, RuntimeError) as error:
        full = isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)
        if not full and not isinstance(error, (UserError, OSError)):
            raise
        print(
            "bench.py: "
            + ("these shapes do not fit into the memory" if full else " ".join(str(error).split())),
            file=sys.stderr,
        )
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(cli(sys.argv[1:]))
