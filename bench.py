"""Speed: a training step and sampling, timed beside a peer in the same call.

    python bench.py                                                    3.4M parameters, prompt 128, response 64, pairs, against plain padded rows
    python bench.py --k 8                                              8 responses a prompt
    python bench.py --against trl                                      TRL's DPOTrainer (pip install trl transformers)
    python bench.py --layers 2 --dim 96 --vocab 400 --prompt 6 --response 28 --batch_size 32     a toy world's shape

A step: collate, log-probs, loss (methods/dpo.py; for K > 2 the softmax cross-entropy of the first of K), backward, clipping, AdamW. The GPT and
its tokens are random, the reference is another random GPT whose log-probs were cached. The peer gets the same weights, rows, loss and optimizer.

    rows    what one writes first: each response a right-padded row behind its own copy of the prompt, causal attention, logits everywhere
    trl     DPOTrainer.training_step on a LlamaForCausalLM, precomputed reference log-probs, no gradient checkpointing, TRL's own collator

Both take the same few steps in float32 first, and their losses must agree; then they take turns (A B A B ...), and the times are medians.
Peak memory is what one step holds at most, weights and optimizer state included: the allocator's count (CUDA), or the sum over the profiler's
allocations (CPU). Tokens a second count a prompt once for its K responses. MFU is the arithmetic a step needs over the card's peak (dense, of
the dtype). The uncached sampler reads prompt and response again for each token and draws it in the same way; both are timed without compile.
"""

import contextlib
import copy
import json
import os
import random
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, fields
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import report
from data import collate, fit_context
from lab import pick_device, unknown
from methods import dpo
from nanomodel import GPT, GPTConfig, rotary
from train import convert, explanations, one_line

PEAK = {  # TFLOP/s: bfloat16, float32 (data sheets, dense)
    "H100 PCIe": (756, 51), "H100": (989, 67), "H200": (989, 67), "A100": (312, 19.5), "L40S": (362, 91.6), "L4": (121, 30.3), "4090": (165, 82.6),
}  # fmt: skip


@dataclass
class Settings:
    """What is timed."""

    layers: int = 4  # of the GPT
    dim: int = 256  # hidden size; SwiGLU is 8/3 of it
    heads: int = 4  # query heads
    kv_heads: int | None = None  # key and value heads; default: as many as heads
    vocab: int = 1024  # tokens, the last two are the end and the padding
    prompt: int = 128  # tokens of a prompt
    response: int = 64  # tokens of a response, the end token is one of them
    k: int = 2  # responses a prompt
    batch_size: int = 4  # prompts a step
    steps: int = 10  # timed steps of each contender; the uncached sampler runs at most 3 times
    against: str = "rows"  # rows, trl, none
    device: str = "auto"  # cpu, cuda, mps; auto takes CUDA where there is one
    dtype: str = "auto"  # float32 or bfloat16 (autocast); auto: bfloat16 on CUDA
    compile: str = "auto"  # torch.compile of our step, as train.py does: on, off; auto: on CUDA only. Peers are not compiled
    seed: int = 0  # weights and tokens
    json: bool = False  # print one JSON line last

    def __post_init__(self):
        for name, low in dict(layers=1, dim=2, heads=1, kv_heads=1, vocab=4, prompt=1, response=1, k=2, batch_size=1, steps=1, seed=0).items():
            if getattr(self, name) is not None and getattr(self, name) < low:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least {low}")
        for name, allowed in dict(against=("rows", "trl", "none"), dtype=("auto", "float32", "bfloat16"), compile=("auto", "on", "off")).items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"--{name} {getattr(self, name)} must be one of {', '.join(allowed)}")
        if self.dim % (2 * self.heads):
            raise ValueError(f"--dim {self.dim} must be a multiple of twice --heads {self.heads}")
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"--kv_heads {self.kv_heads} must divide --heads {self.heads}")
        if self.against == "trl" and self.k != 2:
            raise ValueError(f"--against trl compares pairs, --k {self.k} are none")


def read_flags(argv):
    """Settings of a command line, or None when help is asked for. ValueError naming the flag (and the nearest one that exists)."""
    own, given = explanations(Settings), {}
    words = iter(argv)
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            raise ValueError(f"unexpected {word!r}: flags begin with --")
        if name == "help":
            return None
        if name not in own:
            raise ValueError(unknown("flag", "--" + name, sorted("--" + n for n in [*own, "help"])))
        if name in given:
            raise ValueError(f"--{name} is given twice")
        if not equals:
            value = "true" if name == "json" else next(words, "--")
            if value.startswith("--"):
                raise ValueError(f"--{name} needs a value")
        given[name] = convert(name, value, own[name][0])
    return Settings(**given)


# ---------------------------------------------------------------- the contenders


def listwise(logps, ref_logps, batch, cfg):
    """-log softmax(beta * log-ratios) of the first response: DPO's loss when K = 2. Shapes as in methods/dpo.py."""
    return -(cfg.beta * (logps - ref_logps).sum(-1)).log_softmax(-1)[:, 0], {}


class Contender:
    """A model, its AdamW, and score(step) -> loss, with gradients left behind; `step` is one training step -> loss (detached)."""

    def __init__(self, name, model, score):
        self.name, self.model, self.score, self.seconds = name, model, score, []
        device = next(model.parameters()).device.type
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, betas=(0.9, 0.95), fused=device != "mps")

    def step(self, i):
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.score(i)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss


def backward(losses):
    loss = losses.mean()
    loss.backward()
    return loss.detach()


def ours(bench, model, reference):
    """nanopref: packed prompt trees, response rows before the vocabulary, log-probs per token."""
    rows = [dict(row) for row in bench.rows]
    with torch.no_grad():
        for row in rows:
            row["ref_logps"] = reference.logps(collate([row], bench.tokenizer).to(bench.device))[0].tolist()
    score = lambda model, batch: model.logps(batch)  # noqa: E731
    loss, compiled = bench.loss, bench.compiled
    if compiled:
        mode = "reduce-overhead" if bench.device.type == "cuda" else "default"
        score, loss = (torch.compile(f, mode=mode, dynamic=False) for f in (score, loss))

    def step(i):
        if compiled and bench.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        batch = collate(bench.pick(rows, i), bench.tokenizer, fixed=compiled).to(bench.device)
        ref_logps = batch.columns.pop("ref_logps")
        ref_logps = F.pad(ref_logps, (0, batch.mask.shape[2] - ref_logps.shape[2]))
        with bench.autocast():
            logps = score(model, batch)
        return backward(loss(logps, ref_logps, batch, bench.cfg)[0])

    return Contender("nanopref", model, step)


def plain_hidden(model, tokens):
    """Hidden states (N, S, hidden) of rows of tokens (N, S), causal, by the model's own layers."""
    x, position = model.embed_tokens(tokens), torch.arange(tokens.shape[1], device=tokens.device)[None]
    cos, sin = rotary(position, model.config.head_dim, model.config.rope_theta, x.dtype)

    def attend(attn, y):
        q, k, v = attn.project(y, cos, sin)
        repeat = q.shape[1] // k.shape[1]
        if repeat > 1:
            k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        return attn.o_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))

    for layer in model.layers:
        x = layer(x, attend)
    return model.norm(x)


def rows_logps(bench, model, rows):
    """(B, K): a response's summed log-prob, from one right-padded row a response."""
    paths = [row["prompt"] + response + [bench.tokenizer.eot] for row in rows for response in row["responses"]]
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(p) for p in paths], True, bench.tokenizer.pad)
    start = torch.tensor([len(row["prompt"]) for row in rows]).repeat_interleave(bench.settings.k)[:, None]
    place, end = torch.arange(1, tokens.shape[1])[None], torch.tensor([len(p) for p in paths])[:, None]
    tokens, mask = tokens.to(bench.device), ((place >= start) & (place < end)).to(bench.device)
    logits = model.unembed(plain_hidden(model, tokens[:, :-1])).float()  # (B*K, S-1, V)
    logps = -F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(mask.shape)
    return (logps * mask).sum(-1).view(len(rows), -1)


def plain(bench, model, reference):
    """The ordinary loop: a padded row a response, the whole vocabulary at every position, log-probs summed at once."""
    rows = [dict(row) for row in bench.rows]
    with torch.no_grad():
        for row in rows:
            row["ref"] = rows_logps(bench, reference, [row])[0].tolist()

    def step(i):
        batch = bench.pick(rows, i)
        ref_logps = torch.tensor([row["ref"] for row in batch], device=bench.device)
        with bench.autocast():
            logps = rows_logps(bench, model, batch)
        sums = SimpleNamespace(mask=torch.ones_like(logps, dtype=torch.bool)[..., None])
        return backward(bench.loss(logps[..., None], ref_logps[..., None], sums, bench.cfg)[0])

    return Contender("rows", model, step)


def trl(bench, model, reference):
    """TRL's DPOTrainer on transformers' Llama. Its texts are token numbers, so that its tokenizer gives back our tokens."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    try:
        import datasets
        import tokenizers
        import transformers
        from trl import DPOConfig, DPOTrainer
    except ImportError as error:
        raise ValueError(f"--against trl needs the package {error.name}: pip install trl transformers") from None
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    names = [f"t{i}" for i in range(bench.settings.vocab - 2)] + ["<end>", "<pad>"]
    engine = tokenizers.Tokenizer(tokenizers.models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<pad>"))
    engine.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=engine, eos_token="<end>", pad_token="<pad>")
    text = lambda ids: "".join(" " + names[i] for i in ids)  # noqa: E731
    texts = [dict(zip(("prompt", "chosen", "rejected"), map(text, (row["prompt"], *row["responses"])))) for row in bench.rows]
    with tempfile.TemporaryDirectory() as folder:
        llamas = []
        for name, gpt in (("policy", model), ("reference", reference)):
            gpt.save_pretrained(os.path.join(folder, name))
            llamas.append(transformers.AutoModelForCausalLM.from_pretrained(os.path.join(folder, name), dtype=torch.float32))
        config = DPOConfig(
            output_dir=folder, beta=bench.cfg.beta, precompute_ref_log_probs=True, gradient_checkpointing=False, bf16=False, max_length=None,
            per_device_train_batch_size=bench.settings.batch_size, use_cpu=bench.device.type == "cpu", report_to="none", disable_tqdm=True,
        )  # fmt: skip
        trainer = DPOTrainer(llamas[0], llamas[1], config, train_dataset=datasets.Dataset.from_list(texts), processing_class=tokenizer)
        examples = list(trainer.train_dataset)
    for row, example in zip(bench.rows, examples):
        responses = [response + [bench.tokenizer.eot] for response in row["responses"]]
        if [example["prompt_ids"], example["chosen_ids"], example["rejected_ids"]] != [row["prompt"], *responses]:
            raise RuntimeError("TRL's tokens are not ours")
    trainer.current_gradient_accumulation_steps, compute = 1, trainer.compute_loss

    def compute_loss(*args, **kwargs):
        with bench.autocast():
            return compute(*args, **kwargs)

    trainer.compute_loss = compute_loss
    return Contender("trl", trainer.model, lambda i: trainer.training_step(trainer.model, trainer.data_collator(bench.pick(examples, i))))


# ---------------------------------------------------------------- sampling


@torch.no_grad()
def sample_uncached(model, prompts, k, rng, max_tokens):
    """n prompts of one length -> (n * k, max_tokens) sampled tokens; prompt and response are read again for each of them."""
    tokens = torch.tensor(prompts, device=model.device).repeat_interleave(k, 0)
    for _ in range(max_tokens):
        logits = model.unembed(plain_hidden(model, tokens)[:, -1])
        total = logits.float().softmax(-1).cumsum(-1)
        draw = torch.rand(len(total), 1, generator=rng, device=total.device) * total[:, -1:]
        tokens = torch.cat([tokens, torch.searchsorted(total, draw, right=True).clamp(max=total.shape[1] - 1)], 1)
    return tokens[:, len(prompts[0]) :]


@torch.no_grad()
def check_sampling(model, prompts, max_tokens):
    """RuntimeError unless greedy sampling with the cache takes the most likely token of the uncached model everywhere."""
    answers = [group[0] for group in model.sample(prompts, 1, None, max_tokens, temperature=0)]
    tokens = torch.tensor([p + a for p, a in zip(prompts, answers)], device=model.device)
    logits = model.unembed(plain_hidden(model, tokens[:, :-1])[:, -max_tokens:])
    short = logits.max(-1).values - logits.gather(-1, tokens[:, -max_tokens:, None])[..., 0]
    if short.max() > 1e-3:
        raise RuntimeError(f"cached sampling took a token {short.max():.3g} nats below the best")


# ---------------------------------------------------------------- measuring


class Bench:
    """The setting that all contenders share: rows, loss, device, precision."""

    def __init__(self, s):
        self.settings, self.device = s, pick_device(s.device)
        self.bf16 = s.dtype == "bfloat16" or (s.dtype == "auto" and self.device.type == "cuda")
        self.compiled = s.compile == "on" or (s.compile == "auto" and self.device.type == "cuda")
        self.exact = True  # float32 while losses are compared
        self.loss, self.cfg = dpo.loss if s.k == 2 else listwise, dpo.Config()
        self.tokenizer = SimpleNamespace(eot=s.vocab - 2, pad=s.vocab - 1)
        rng = random.Random(s.seed)
        draw = lambda n: rng.choices(range(s.vocab - 2), k=n)  # noqa: E731
        rows = [{"prompt": draw(s.prompt), "responses": [draw(s.response - 1) for _ in range(s.k)]} for _ in range(4 * s.batch_size)]
        rows = [row | {"scores": [1.0] + [0.0] * (s.k - 1)} for row in rows]
        self.rows = fit_context(rows, self.tokenizer, s.prompt + s.response)[0]
        torch.manual_seed(s.seed)

    def gpt(self):
        s = self.settings
        config = GPTConfig(s.vocab, s.dim, -(-s.dim // 3) * 8, s.layers, s.heads, s.kv_heads or s.heads, max_position_embeddings=s.prompt + s.response)
        return GPT(config).to(self.device)

    def pick(self, rows, i):
        """The rows of step i, in a circle."""
        size = self.settings.batch_size
        return [rows[j % len(rows)] for j in range(i * size, (i + 1) * size)]

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16 and not self.exact)

    def now(self):
        """Seconds, once the device has done what it was given."""
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()
        return time.perf_counter()

    def timed(self, function):
        start = self.now()
        function()
        return self.now() - start

    def memory(self, contender, i):
        """Bytes that one step holds at most, with weights and optimizer state; None where nobody counts."""
        contender.optimizer.zero_grad(set_to_none=True)
        state = [v for values in contender.optimizer.state.values() for v in values.values()]
        kept = sum(x.numel() * x.element_size() for x in [*contender.model.parameters(), *state])
        if self.device.type == "cuda":
            self.now()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            contender.step(i)
            self.now()
            return kept + torch.cuda.max_memory_allocated() - before
        if self.device.type != "cpu":
            return None
        with quiet_stderr(), torch.autograd.profiler.profile(profile_memory=True) as profile:
            contender.step(i)
        held = peak = 0
        for event in sorted((e for e in profile.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
        return kept + peak

    def flops(self, model):
        """Floating-point operations that a step needs: 6 for each weight a token meets, 12 * dim for each pair of positions a layer."""
        s, c = self.settings, model.config
        matrices = sum(p.numel() for layer in model.layers for p in layer.parameters() if p.dim() == 2)
        fed = s.prompt + s.k * (s.response - 1)  # the last token of a response predicts nothing
        pairs = s.prompt * (s.prompt + 1) / 2 + s.k * (s.response - 1) * (s.prompt + s.response / 2)
        vocabulary = s.k * s.response * c.vocab_size * c.hidden_size
        return s.batch_size * (6 * (matrices * fed + vocabulary) + 12 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * pairs)


@contextlib.contextmanager
def quiet_stderr():
    """The profiler of some builds writes to the file itself."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def first_losses(contenders, steps=3):
    """The first losses of each contender, float32 -> list of lists; RuntimeError unless they agree to 1e-3."""
    losses = [[float(contender.step(i)) for i in range(steps)] for contender in contenders]
    for contender, values in zip(contenders, losses):
        if any(not abs(a - b) <= 1e-3 * abs(a) for a, b in zip(losses[0], values)):
            raise RuntimeError(f"first losses differ: {contenders[0].name} {losses[0]}, {contender.name} {values}")
    return losses


def run(s):
    """Measure -> dict of the settings and the numbers, flat, as --json prints it."""
    bench = Bench(s)
    model, reference = bench.gpt(), bench.gpt()
    contenders = [ours(bench, copy.deepcopy(model), reference)]
    if s.against != "none":
        contenders.append({"rows": plain, "trl": trl}[s.against](bench, copy.deepcopy(model), reference))
    losses, bench.exact = first_losses(contenders), False
    for i in range(3):  # warm-up, in the precision that is timed
        for contender in contenders:
            contender.step(i)
    for i in range(s.steps):
        for contender in contenders:
            contender.seconds.append(bench.timed(lambda: contender.step(i)))
    out = asdict(s) | dict(params=report.count(model), device=str(bench.device), dtype="bfloat16" if bench.bf16 else "float32")
    out |= dict(compile="on" if bench.compiled else "off", threads=torch.get_num_threads(), torch=torch.__version__, first_loss=losses[0][0])
    if bench.device.type == "cuda":
        out["card"] = torch.cuda.get_device_name()
    tokens = s.batch_size * (s.prompt + s.k * s.response)
    for contender, prefix in zip(contenders, ("", "against_")):
        seconds, memory = statistics.median(contender.seconds), bench.memory(contender, s.steps)
        out |= {f"{prefix}step_s": seconds, f"{prefix}tokens_s": tokens / seconds, f"{prefix}peak_mb": memory and memory / 1e6}
    if s.against != "none":
        out["speedup"] = out["against_step_s"] / out["step_s"]
    peak = next((numbers[not bench.bf16] * 1e12 for card, numbers in PEAK.items() if card in out.get("card", "")), None)
    out["mfu"] = peak and bench.flops(model) / out["step_s"] / peak

    model.tokenizer = SimpleNamespace(eot=-1)  # never drawn: all responses take their full length
    prompts = [row["prompt"] for row in bench.rows[: s.batch_size]]
    check_sampling(model, prompts, s.response)
    rng = torch.Generator(bench.device).manual_seed(s.seed)
    samplers = [lambda: model.sample(prompts, s.k, rng, s.response), lambda: sample_uncached(model, prompts, s.k, rng, s.response)]
    with bench.autocast():
        for sampler in samplers:
            sampler()
        cached, uncached = zip(*([bench.timed(sampler) for sampler in samplers] for _ in range(min(s.steps, 3))))
    out |= dict(sample_s=statistics.median(cached), sample_uncached_s=statistics.median(uncached))
    out |= dict(sample_tokens_s=s.batch_size * s.k * s.response / out["sample_s"], sample_speedup=out["sample_uncached_s"] / out["sample_s"])
    return out


def text(out):
    """What a person reads."""
    compiled = {"on": ", compiled", "off": ""}[out["compile"]]
    where = f"{out.get('card', out['device'])}, {out['dtype']}{compiled}, {out['threads']} threads, torch {out['torch']}"
    rows = []
    for name, prefix in (("nanopref", ""), (out["against"], "against_"))[: 1 + (out["against"] != "none")]:
        memory, mfu = out[f"{prefix}peak_mb"], None if prefix else out["mfu"]
        rows.append([
            name, f"{out[prefix + 'step_s']:.4f} s", f"{out[prefix + 'tokens_s']:.0f}", f"{memory:.0f} MB" if memory else "-", f"{mfu:.1%}" if mfu else "-",
        ])  # fmt: skip
    lines = [
        f"GPT of {out['params'] / 1e6:.2f}M parameters: {out['layers']} layers of {out['dim']}, vocabulary {out['vocab']}; {where}",
        f"{out['batch_size']} prompts of {out['prompt']} tokens, {out['k']} responses of {out['response']} each; medians of {out['steps']} steps\n",
        report.table(rows, ["", "step_s", "tokens_s", "peak memory", "MFU"]),
    ]
    if "speedup" in out:
        lines.append(f"first losses agree ({out['first_loss']:.6f}); {out['speedup']:.2f} times the speed of {out['against']}")
    sampling = "sampling: cached {sample_s:.3f} s ({sample_tokens_s:.0f} tokens_s), uncached {sample_uncached_s:.3f} s: {sample_speedup:.1f} times"
    return "\n".join([*lines, "\n" + sampling.format(**out)])


def main(argv):
    s = read_flags(argv)
    if s is None:
        print(__doc__.strip() + "\n")
        for name, (_, default, what) in explanations(Settings).items():
            print(f"  --{name:<12} {what} [{default}]")
        return
    out = run(s)
    print(text(out))
    if s.json:
        print(json.dumps(out))


def cli(argv):
    """`main` with a user's mistake as one line on stderr -> exit status (0, 2 bad input)."""
    try:
        main(argv)
    except (ValueError, OSError) as error:
        if not one_line(error):
            raise
        print("bench.py: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(cli(sys.argv[1:]))
