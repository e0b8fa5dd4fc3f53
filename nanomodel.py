"""The models: GPT (an architecture of the Llama family), LoRA, Denoiser and UNet.

Every model has `logps(batch)` -> log-probs (B, K, T) and `sample(prompts, k, rng)`.
Shapes: B prompts, K responses, T response tokens; N packed rows of S tokens with G branches each;
V vocabulary, H heads of D dimensions; images (C, H, W).
"""

import copy
import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from data import UserError, check_fields
from diffusion import (
    PREDICTIONS,
    SCHEDULES,
    alpha_bar,
    ddim_logprob,
    ddim_step,
    mixture,
    q_sample,
    spread,
    to_eps,
    to_sigma,
)

LARGEST = "[1, 2147483647]"  # the interval of the sizes in a config
VARLEN = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)  # there is varlen_attn

# ---------------------------------------------------------------- GPT


@dataclass
class GPTConfig:
    """The sizes of a GPT, named as in the config.json of a Hugging Face Llama."""

    vocab_size: int = 512
    hidden_size: int = 64
    intermediate_size: int = 192  # hidden layer of SwiGLU, usually about 8/3 of hidden_size
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 2  # fewer than num_attention_heads: grouped-query attention
    head_dim: int = 0  # 0 means hidden_size / num_attention_heads
    max_position_embeddings: int = 256  # the context, in tokens of prompt and response
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = True

    def __post_init__(self):
        check_fields(
            self,
            vocab_size=LARGEST,
            hidden_size=LARGEST,
            intermediate_size=LARGEST,
            num_hidden_layers=LARGEST,
            num_attention_heads=LARGEST,
            num_key_value_heads=LARGEST,
            head_dim="[0, 2147483647]",
            max_position_embeddings=LARGEST,
            rms_norm_eps="[0, 1]",
            rope_theta="(0, 1e12]",
            tie_word_embeddings=(True, False),
        )
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2 or not self.head_dim:
            raise UserError(f"head_dim {self.head_dim} must be even for rotary positions")


def rotary(position, dim, theta, dtype):
    """cos and sin (..., dim) of the rotary angles at integer positions (...)."""
    index = torch.arange(0, dim, 2, device=position.device, dtype=torch.float32)
    angle = position[..., None].float() * theta ** (-index / dim)  # (..., dim / 2)
    angle = torch.cat([angle, angle], dim=-1)  # (..., dim)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def visible(branch, sees):
    """The attention mask (N, S, S) bool: causal and sees[branch of the query, branch of the key].

    branch: (N, S) int. sees: (N, G, G) bool.
    """
    n = torch.arange(len(branch), device=branch.device)[:, None, None]
    size = branch.shape[1]
    causal = torch.ones(size, size, dtype=torch.bool, device=branch.device).tril()
    return causal & sees[n, branch[:, :, None], branch[:, None, :]]


def blocks(mask, size=128):
    """Split an attention mask into blocks of `size` queries, for long rows on a CPU.

    mask: (N, S, S) bool. Returns one (keys, part) per block: the indices of the keys that some
    query of the block attends to, and their mask (N, 1, size, keys). Other keys are not computed:
    with 8 responses in a row, three quarters of all query-key pairs are masked.
    """
    parts = [(part.flatten(0, 1).any(0).nonzero()[:, 0], part) for part in mask.split(size, 1)]
    return [(keys, part[:, None, :, keys]) for keys, part in parts]


class Runs(NamedTuple):
    """Packed rows as runs of queries and of keys, one of each per branch, for flash attention."""

    index: torch.Tensor  # (N L,) places of the keys of all runs in the flattened N*S
    queries: torch.Tensor  # (N G + 1,) int32, where the runs of queries begin in N*S
    keys: torch.Tensor  # (N G + 1,) int32, where the runs of keys begin in `index`


def runs(branch, sees, total):
    """The Runs of a batch, on its device and without waiting for it.

    branch: (N, S) int, which grows along a row. sees: (N, G, G) bool. total: L, at least the number
    of keys of all branches of a row together; the branch of the padding gets what is left of it.
    """
    (n, s), groups = branch.shape, sees.shape[1]
    queries = F.one_hot(branch, groups).sum(1)  # (N, G)
    end = queries.cumsum(1)  # (N, G) the place after the last token of a branch
    seen = sees.gather(2, branch[:, None].expand(n, groups, s))  # (N, G, S)
    seen = seen & (torch.arange(s, device=branch.device) < end[..., None])
    # the kernel leaves the gradient of keys unset where a run has no queries
    seen = seen & (queries > 0)[..., None]
    # the places that are seen come first, in the order of the branches
    order = (~seen).flatten(1).byte().argsort(stable=True)[:, :total]  # (N, L)
    index = order % s + torch.arange(n, device=branch.device)[:, None] * s
    keys = seen.sum(2)[:, :-1]
    keys = torch.cat([keys, total - keys.sum(1, keepdim=True)], 1)  # (N, G)
    starts = [F.pad(x.flatten().cumsum(0), (1, 0)).int() for x in (queries, keys)]
    return Runs(index.flatten(), *starts)


def flash(head_dim):
    """Whether attention can run on PyTorch's flash kernel for runs of several lengths.

    It needs PyTorch 2.11, autocast to half precision on CUDA, and heads of a size that it knows.
    """
    known = VARLEN and head_dim % 8 == 0 and head_dim <= 256
    half = torch.get_autocast_dtype("cuda") in (torch.bfloat16, torch.float16)
    return known and half and torch.is_autocast_enabled("cuda")


def flash_attention(q, k, v, where):
    """Attention of runs: the last query of a run sees all its keys, the one before all but one.

    q, k, v: (N, H, S, D) in half precision. where: Runs. Returns (N, H, S, D).
    """
    from torch.nn.attention.varlen import varlen_attn  # takes a second to import

    n, _, s, _ = q.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (N S, H, D)
    k, v = k[where.index], v[where.index]  # (N L, H, D)
    most = len(where.index) // n  # keys of a run
    out = varlen_attn(q, k, v, where.queries, where.keys, s, most, window_size=(-1, 0))
    return out.unflatten(0, (n, s)).transpose(1, 2)


def attention(q, k, v, mask):
    """Scaled dot-product attention: (N, H, S, D).

    q: (N, H, S, D). k, v: (N, Hkv, S, D), where Hkv divides H. mask: (N, S, S) bool, its `blocks`,
    or Runs.
    """
    repeat = q.shape[1] // k.shape[1]
    if repeat > 1:  # the fused CPU kernel needs as many key heads as query heads
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    if isinstance(mask, Runs):
        return flash_attention(q, k, v, mask)
    if isinstance(mask, torch.Tensor):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])
    size = mask[0][1].shape[2]
    out = [
        F.scaled_dot_product_attention(part, k.index_select(2, keys), v.index_select(2, keys), seen)
        for part, (keys, seen) in zip(q.split(size, 2), mask)
    ]
    return torch.cat(out, 2)


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, c):
        super().__init__()
        self.heads, self.kv_heads = c.num_attention_heads, c.num_key_value_heads
        self.head_dim = c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, self.heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, self.kv_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, self.kv_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * c.head_dim, c.hidden_size, bias=False)

    def project(self, x, cos, sin):
        """Rotated queries (N, H, S, D), rotated keys (N, Hkv, S, D) and values (N, Hkv, S, D).

        x: (N, S, hidden). cos, sin: (N, S, D).
        """
        n, s, _ = x.shape
        q = self.q_proj(x).view(n, s, self.heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(n, s, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(n, s, self.kv_heads, self.head_dim).transpose(1, 2)
        cos, sin = cos[:, None], sin[:, None]  # (N, 1, S, D)
        turned = []
        for part in (q, k):  # the two halves of each head are rotated by the angles, as in Llama
            left, right = part.chunk(2, dim=-1)
            part = part * cos + torch.cat([-right, left], dim=-1) * sin
            # under autocast the angles stay in float32, so it is cast back to the dtype of v
            turned.append(part.to(v.dtype))
        return *turned, v

    def forward(self, x, cos, sin, mask, keep=None, rows=None):
        """Attention over x (N, S, hidden) -> (N, S, hidden), or (len(rows), hidden).

        rows: indices into the flattened N*S; only these positions are returned. keep: a list to
        which (k, v) is appended.
        """
        q, k, v = self.project(x, cos, sin)
        if keep is not None:
            keep.append((k, v))
        out = attention(q, k, v, mask).transpose(1, 2).flatten(2)  # (N, S, H D)
        return self.o_proj(out if rows is None else out.flatten(0, 1)[rows])

    def step(self, x, cos, sin, prompt_kv, seen, own_kv, length):
        """Attention of one new token in each of K samples of B prompts: x (B, K, hidden) -> same.

        prompt_kv: keys and values (B, Hkv, P, D) of the prompts, shared by all samples of a prompt.
        seen: (B, P) bool, False on padding. own_kv: keys and values (B, K, Hkv, T, D) of the
        samples, which hold `length` tokens so far; those of the new token are written into them.
        length: a number, or a tensor (1,) for a step that is captured in a CUDA graph.
        """
        b, n, _ = x.shape
        q, k, v = self.project(x, cos, sin)  # the K samples take the place of the sequence
        (prompt_k, prompt_v), (own_k, own_v) = prompt_kv, own_kv
        later = None
        if isinstance(length, torch.Tensor):  # shapes stay fixed: later places are masked instead
            for own, new in ((own_k, k), (own_v, v)):
                own.index_copy_(3, length, new.transpose(1, 2)[:, :, :, None].to(own.dtype))
            later = torch.arange(own_k.shape[3], device=length.device) > length  # (T,)
        else:
            own_k[:, :, :, length] = k.transpose(1, 2)
            own_v[:, :, :, length] = v.transpose(1, 2)
            own_k, own_v = own_k[:, :, :, : length + 1], own_v[:, :, :, : length + 1]
        # R query heads share one key-value head
        q = q.view(b, self.kv_heads, -1, n, self.head_dim) / math.sqrt(self.head_dim)
        to_prompt = torch.einsum("bgrnd,bgpd->bgrnp", q, prompt_k)  # (B, Hkv, R, K, P)
        to_prompt = to_prompt.masked_fill(~seen[:, None, None, None], -torch.inf)
        to_own = torch.einsum("bgrnd,bngtd->bgrnt", q, own_k)  # (B, Hkv, R, K, length + 1)
        if later is not None:
            to_own = to_own.masked_fill(later, -torch.inf)  # (B, Hkv, R, K, T)
        weight = torch.cat([to_prompt, to_own], -1).softmax(-1)
        on_prompt, on_own = weight.split([prompt_k.shape[2], own_k.shape[3]], -1)
        out = torch.einsum("bgrnp,bgpd->bngrd", on_prompt, prompt_v)  # (B, K, Hkv, R, D)
        out = out + torch.einsum("bgrnt,bngtd->bngrd", on_own, own_v)
        return self.o_proj(out.reshape(b, n, -1))


class MLP(nn.Module):
    """The feed-forward layer, SwiGLU: (..., hidden) -> (..., hidden)."""

    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, c):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, attend, rows=None):
        """x (N, S, hidden) -> (N, S, hidden), or (len(rows), hidden).

        attend(self_attn, x) runs the attention. rows: indices into the flattened N*S; only these
        positions are computed after the attention, which then returns (len(rows), hidden).
        """
        out = attend(self.self_attn, self.input_layernorm(x))
        x = (x if rows is None else x.flatten(0, 1)[rows]) + out
        return x + self.mlp(self.post_attention_layernorm(x))


@dataclass
class Cache:
    """Key-value cache of one sampling call: each prompt once, and space for its K samples."""

    prompt: list  # per layer (k, v), each (B, Hkv, P, D)
    own: list  # per layer (k, v), each (B, K, Hkv, T, D)
    seen: torch.Tensor  # (B, P) bool, False on padding
    start: torch.Tensor  # (B,) position of the first sampled token
    length: int | torch.Tensor = 0  # sampled tokens so far; a tensor (1,) in a captured step


class GPT(nn.Module):
    """Decoder-only transformer: RMSNorm, RoPE, SwiGLU, grouped-query attention."""

    chunk = 2**27  # logits that `logps` holds at once on a CPU; more are computed in pieces

    def __init__(self, config, tokenizer=None):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.stored_as = self.special_ids = None  # of the checkpoint that it came from (lab/hub.py)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # GPT-2's initialization: N(0, 0.02), residual projections scaled down with depth
        for name, p in self.named_parameters():
            if p.dim() == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                depth = 2 * config.num_hidden_layers if residual else 1
                nn.init.normal_(p, 0.0, 0.02 / math.sqrt(depth))

    @property
    def device(self):
        return self.embed_tokens.weight.device

    def unembed(self, h):
        """Logits (..., V) of hidden states (..., hidden)."""
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        return F.linear(h, head.weight)

    def hidden(self, batch, layers=None, rows=None):
        """Hidden states of a packed batch, after the last norm: (N, S, hidden).

        rows: indices (R,) into the flattened N*S; the result is (R, hidden), at these positions
        only. layers: a list of layer numbers; the result is then a list of (N, S, hidden), one per
        number. 0 stands for the embeddings and i for the output of layer i, before the last norm.
        """
        x = self.embed_tokens(batch.tokens)  # (N, S, hidden)
        cos, sin = rotary(batch.position, self.config.head_dim, self.config.rope_theta, x.dtype)
        if x.is_cuda and batch.keys and flash(self.config.head_dim):
            mask = runs(batch.branch, batch.sees, batch.keys)
        else:
            mask = visible(batch.branch, batch.sees)  # (N, S, S)
            # no blocks in compiled code: their shapes depend on the data and force a recompilation
            if not x.is_cuda and x.shape[1] > 192 and not torch.compiler.is_compiling():
                mask = blocks(mask)
        states = [x] if layers is not None else None
        for i, layer in enumerate(self.layers):
            # after the last layer's attention, only the chosen rows are needed
            some = rows if i + 1 == len(self.layers) else None
            x = layer(x, lambda attn, y: attn(y, cos, sin, mask, rows=some), some)
            if layers is not None:
                states.append(x)
        return self.norm(x) if layers is None else [states[i] for i in layers]

    def logits(self, batch):
        """Logits (B, K, T, V) over the vocabulary for every response token.

        Entries outside batch.mask are arbitrary.
        """
        h = self.hidden(batch, rows=batch.source.flatten())  # (B K T, hidden)
        return self.unembed(h.view(*batch.source.shape, -1))

    def logps(self, batch):
        """Log-probs (B, K, T) of the response tokens, in nats, 0 outside batch.mask.

        They are in float32 or better, under autocast too.
        """
        mask, source, target = batch.mask, batch.source, batch.target
        # on a GPU and in compiled code, padding is computed as well so that shapes stay fixed
        padded = mask.device.type != "cpu" or torch.compiler.is_compiling()
        source, target = (x.flatten() if padded else x[mask] for x in (source, target))  # (R,)
        rows = self.hidden(batch, rows=source)  # (R, hidden)
        most = self.chunk
        if self.device.type == "cuda":
            # as many as fill an eighth of the memory, where a logit takes 12 bytes: in half
            # precision, in float32 and as a gradient
            memory = torch.cuda.get_device_properties(self.device).total_memory
            most = max(most, memory // 96)
        pieces = max(1, -(-len(rows) * self.config.vocab_size // most))
        size = -(-len(rows) // pieces) or 1
        out = []
        for part, goal in zip(rows.split(size), target.split(size)):
            if pieces > 1 and torch.is_grad_enabled():
                # no random numbers are drawn, and saving their state would wait for the device
                kwargs = dict(use_reentrant=False, preserve_rng_state=False)
                out.append(checkpoint(self._token_logps, part, goal, **kwargs))
            else:
                out.append(self._token_logps(part, goal))
        flat = torch.cat(out)  # (R,)
        if padded:
            return flat.view(mask.shape) * mask
        return flat.new_zeros(mask.shape).masked_scatter(mask, flat)

    def _token_logps(self, rows, target):
        """Log-probs (R,) of the tokens `target` (R,) from the hidden states `rows` (R, hidden)."""
        logits = self.unembed(rows)
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            return -F.cross_entropy(logits, target, reduction="none")

    # -- sampling

    @torch.no_grad()
    def prefill(self, prompts, k, max_tokens):
        """Run the model over the prompts (B lists of token ids) -> (Cache, logits (B, V)).

        The Cache has space for k samples of max_tokens tokens each. The logits are those of the
        first sampled token.
        """
        device, size = self.device, max(map(len, prompts))
        length = torch.tensor([len(p) for p in prompts], device=device)
        tokens = torch.tensor([p + [0] * (size - len(p)) for p in prompts], device=device)  # (B, P)
        seen = torch.arange(size, device=device) < length[:, None]
        x = self.embed_tokens(tokens)
        position = torch.arange(size, device=device).expand(len(prompts), -1)
        cos, sin = rotary(position, self.config.head_dim, self.config.rope_theta, x.dtype)
        mask = torch.ones(size, size, dtype=torch.bool, device=device).tril()
        mask, prompt = mask.expand(len(prompts), -1, -1), []
        for layer in self.layers:
            x = layer(x, lambda attn, y: attn(y, cos, sin, mask, prompt))
        last = self.norm(x)[torch.arange(len(prompts), device=device), length - 1]  # (B, hidden)
        shape = (len(prompts), k, self.config.num_key_value_heads, max_tokens, self.config.head_dim)
        own = [(x.new_zeros(shape), x.new_zeros(shape)) for _ in self.layers]
        return Cache(prompt, own, seen, length), self.unembed(last)

    @torch.no_grad()
    def next_logps(self, prompt, written):
        """Log-probs (n, V), float64, of the next token after each of n beginnings (n, t).

        prompt: text or token ids.
        """
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        _, logits = self.prefill([ids + tokens for tokens in written.tolist()], 1, 1)
        return logits.cpu().double().log_softmax(-1)

    @torch.no_grad()
    def decode(self, cache, tokens):
        """Append one token to each sample: tokens (B, K) -> logits (B, K, V) of the next token.

        The cache is updated in place.
        """
        x = self.embed_tokens(tokens)
        position = (cache.start + cache.length)[:, None].expand(tokens.shape)
        cos, sin = rotary(position, self.config.head_dim, self.config.rope_theta, x.dtype)
        for layer, prompt, own in zip(self.layers, cache.prompt, cache.own):
            where = (cos, sin, prompt, cache.seen, own, cache.length)
            x = layer(x, lambda attn, y: attn.step(y, *where))
        cache.length += 1
        return self.unembed(self.norm(x))

    @torch.no_grad()
    def sample(self, prompts, k, rng, max_tokens=64, temperature=1.0, capture=None):
        """k responses for each of B prompts: B lists of k lists of token ids.

        prompts: texts or lists of token ids. A finished response ends with end-of-text; a response
        without it was cut at `max_tokens` or at the end of the context. temperature 0 is greedy.
        All random numbers come from the torch.Generator `rng`. capture(function) -> the function,
        captured in a CUDA graph (lab/graph.py), which then computes the steps after the first.
        UserError: a prompt fills the whole context.
        """
        eot, context = self.tokenizer.eot, self.config.max_position_embeddings
        ids = [self.tokenizer.encode(p) if isinstance(p, str) else list(p) for p in prompts]
        prompts = [p or [eot] for p in ids]  # an empty prompt cannot predict the first token
        rooms = [context - len(p) for p in prompts]
        if min(rooms) < 1:
            raise UserError(
                f"a prompt of {context - min(rooms)} tokens leaves no room "
                f"in a context of {context}"
            )
        max_tokens = min(max_tokens, max(rooms))
        cache, logits = self.prefill(prompts, k, max_tokens)
        if capture:
            cache.length = torch.zeros(1, dtype=torch.int64, device=self.device)
            decode = capture(functools.partial(self.decode, cache))
        logits = logits[:, None].expand(-1, k, -1)  # (B, K, V)
        out = torch.full((len(prompts), k, max_tokens), eot, device=self.device)
        done = torch.zeros(len(prompts), k, dtype=torch.bool, device=self.device)
        live = torch.arange(len(prompts), device=self.device)  # the prompts still in the cache
        for step in range(max_tokens):
            if temperature == 0:
                token = logits.argmax(-1)
            else:
                # inverse transform sampling, which is faster than multinomial at these sizes
                total = (logits.float() / temperature).softmax(-1).cumsum(-1)  # (B, K, V)
                draw = torch.rand(len(prompts), k, 1, generator=rng, device=rng.device)
                draw = draw.to(total.device)[live] * total[..., -1:]
                token = torch.searchsorted(total, draw, right=True)[..., 0]  # (B, K)
                token = token.clamp(max=total.shape[-1] - 1)
            out[live, :, step] = token
            done |= token == eot
            if step + 1 == max_tokens:
                break
            # on a GPU reading `done` waits for the device, so it is read every eighth token
            if step % 8 == 7 or done.device.type == "cpu":
                going = (~done.all(1)).nonzero()[:, 0]
                if not len(going):
                    break
                few = len(going) < 0.8 * len(live)
                if few and done.device.type == "cpu" and not capture:  # drop prompts that are done
                    cache.prompt = [(k[going], v[going]) for k, v in cache.prompt]
                    cache.own = [(k[going], v[going]) for k, v in cache.own]
                    cache.seen, cache.start = cache.seen[going], cache.start[going]
                    live, done, token = live[going], done[going], token[going]
            logits = decode(token) if capture else self.decode(cache, token)
        return [
            [(ids[: ids.index(eot) + 1] if eot in ids else ids)[:room] for ids in group]
            for group, room in zip(out.tolist(), rooms)
        ]

    # -- folders (lab/hub.py)

    @classmethod
    def from_pretrained(cls, folder):
        """A GPT in float32 from a checkpoint of the Llama family.

        folder: a folder or a Hub name. UserError: it is not such a checkpoint, or it uses a feature
        that this GPT does not have.
        """
        from lab.hub import load_gpt

        return load_gpt(folder)

    def save_pretrained(self, folder):
        """Write config.json, model.safetensors and the tokenizer in Hugging Face's layout.

        The updates of LoRA are merged into the weights.
        """
        from lab.hub import save_gpt

        save_gpt(LoRA.merged(self) if LoRA.frozen(self) else self, folder)


# ---------------------------------------------------------------- LoRA


class LoRA(nn.Module):
    """A frozen Linear plus a trained update of low rank, W x + 2 B A x (Hu et al. 2021).

    A (rank, in) starts as N(0, 1 / in) and B (out, rank) as 0, so a model is unchanged at first.
    The factor 2 is alpha / rank of the usual alpha = 2 rank. Only A and B are trained: gradients
    and the state of an optimizer take little memory. UserError: the rank is not below both sides.
    """

    scale = 2.0

    def __init__(self, linear, rank, rng=None):
        super().__init__()
        side = linear.weight.shape
        if not 1 <= rank <= min(side):
            raise UserError(f"rank {rank} of LoRA: expected 1 to {min(side)} for this model")
        self.linear = linear.requires_grad_(False)
        a = torch.randn(rank, side[1], generator=rng) / math.sqrt(side[1])
        self.A = nn.Parameter(a.to(linear.weight))
        self.B = nn.Parameter(linear.weight.new_zeros(side[0], rank))

    def forward(self, x):
        return self.linear(x) + self.scale * F.linear(F.linear(x, self.A), self.B)

    def delta(self):
        """The update of the weight, (out, in)."""
        return self.scale * self.B @ self.A

    @classmethod
    def adapt(cls, model, rank, rng=None):
        """Freeze a GPT and give every Linear of its layers an update of this rank -> the model.

        rng: the torch.Generator (CPU) of A.
        """
        model.requires_grad_(False)
        for module in [m for m in model.layers.modules() if not isinstance(m, LoRA)]:
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(module, name, cls(child, rank, rng))
        return model

    @classmethod
    def of(cls, model):
        """The adapters of a model by name, {name: LoRA}; {} if it has none."""
        return {name: m for name, m in model.named_modules() if isinstance(m, cls)}

    @classmethod
    def frozen(cls, model):
        """The weights of a model that stay as they are, by name; {} if it has no adapters.

        A weight that several parts of the model share has a name for each of them."""
        if not any(isinstance(module, cls) for module in model.modules()):
            return {}
        named = model.named_parameters(remove_duplicate=False)
        return {name: p for name, p in named if not name.endswith((".A", ".B"))}

    @classmethod
    def copied(cls, model):
        """A copy of a model; with adapters it shares the frozen weights, which are large."""
        return copy.deepcopy(model, {id(p): p for p in cls.frozen(model).values()})

    @classmethod
    @torch.no_grad()
    def merged(cls, model):
        """A copy of a GPT in which plain Linears hold the sums W + 2 B A; others are shared."""
        out = copy.deepcopy(model, {id(p): p for p in model.parameters()})
        for name, adapter in cls.of(model).items():
            place, _, last = name.rpartition(".")
            linear = copy.deepcopy(adapter.linear)
            linear.weight += adapter.delta()
            setattr(out.get_submodule(place), last, linear)
        return out


# ---------------------------------------------------------------- denoisers


class Denoiser(nn.Module):
    """The base class of all image models: noise prediction, log-probs and sampling.

    A subclass defines forward(x, noise_level, label) -> (n, *shape), with x (n, *shape) of about
    unit variance, noise_level (n,) = ln(sigma) / 4 and the classes label (n,). `prediction` says
    what the output means (see `diffusion.mixture`). sd: standard deviation of the data. error:
    whose error `logps` weights equally at all noise levels, that of the noise ("eps") or that of
    the network's own output ("output"). `free`: the label `classes` stands for no label, which
    guidance needs. UserError: an unknown prediction or schedule.
    """

    k = 0.5  # of the prediction "u" = k x0 - (1 - k) eps; a subclass may learn it

    def __init__(
        self, shape, classes, prediction="eps", sd=1.0, schedule="linear", error="eps", free=False
    ):
        super().__init__()
        self.shape, self.classes, self.prediction, self.sd = tuple(shape), classes, prediction, sd
        self.error, self.free = error, free
        self.register_buffer("alpha_bar", alpha_bar(schedule).float(), persistent=False)
        mixture(prediction, self.alpha_bar)  # refuses an unknown prediction

    @property
    def device(self):
        return self.alpha_bar.device

    def eps(self, x, t, label, guidance=1.0):
        """The predicted noise (n, *shape) in x (n, *shape) at steps t (n,) or (1,); label (n,).

        With guidance g (Ho & Salimans 2022) it is e0 + g (e - e0), where e0 is predicted without a
        label. UserError: guidance needs a model that was trained with dropped labels.
        """
        if guidance != 1:
            if not self.free:
                raise UserError(
                    f"guidance = {guidance}: this model was not trained with dropped labels"
                )
            nothing = self.eps(x, t, torch.full_like(label, self.classes))
            return nothing + guidance * (self.eps(x, t, label) - nothing)
        level = self.alpha_bar[t].expand(len(x))
        a, sigma = spread(level, x), to_sigma(level)
        # scale * x_t is EDM's input c_in x; for sd = 1 it is x_t itself
        scale = ((1 + sigma**2) / (sigma**2 + self.sd**2)).sqrt()
        # no bfloat16 here, since methods take differences of nearly equal errors
        with torch.autocast(x.device.type, enabled=False):
            output = self(x if self.sd == 1 else x * spread(scale, x), sigma.log() / 4, label)
        if self.prediction == "eps":
            return output
        return to_eps(self.prediction, output, x, a, k=self.k, sd=self.sd)

    def prepare(self, batch, rng, times=None, shared=True):
        """Draw batch.t (B,) and batch.noise, and return the batch.

        noise: (B, 1, *shape), or (B, K, *shape) if not shared. Policy and reference score the same
        draw, and by default the K responses of a row share it, which lowers the variance of their
        difference. times(n, rng) -> (n,) draws the steps, by default uniformly.
        """
        B, K = batch.images.shape[:2]
        t = times(B, rng) if times else torch.randint(len(self.alpha_bar), (B,), generator=rng)
        shape = B, 1 if shared else K, *self.shape
        noise = torch.randn(shape, generator=rng, dtype=batch.images.dtype)
        batch.t, batch.noise = t.to(batch.images.device), noise.to(batch.images.device)
        return batch

    def logps(self, batch, weight=None):
        """Minus the squared noise error, summed over the image: (B, K, 1), 0 outside batch.mask.

        weight(t) -> (B,) multiplies it. By default it is 1, or, for error = "output", it makes the
        sum the squared error of the network's output. It replaces log p(image | class) by a
        one-sample estimate of the variational bound, at the draw (t, noise) of `prepare`. It has no
        factor 1/2, so beta here is Diffusion-DPO's beta on means (Wallace et al. 2023) divided by
        twice the number of dimensions.
        """
        if weight is None and self.error == "output":
            weight = self.output_weight
        K = batch.images.shape[1]
        a = spread(self.alpha_bar[batch.t], batch.images)
        x = q_sample(batch.images, batch.noise, a)  # (B, K, *shape)
        t, label = batch.t.repeat_interleave(K), batch.label.repeat_interleave(K)  # (B K,)
        eps = self.eps(x.flatten(0, 1), t, label).view_as(x)
        error = (eps - batch.noise).square().flatten(2).sum(2, keepdim=True)  # (B, K, 1)
        return -(error if weight is None else error * spread(weight(batch.t), error)) * batch.mask

    def output_weight(self, t):
        """The squared error of the output, in units of that of the noise, at steps t (B,): (B,).

        It is at most 100, as it would grow without bound towards pure noise.
        """
        a = self.alpha_bar[t]
        c, d = mixture(self.prediction, a, k=self.k, sd=self.sd)
        return ((d * a.sqrt() - c * (1 - a).sqrt()) ** 2 / a).clamp(max=100.0)

    def times(self, steps, last=None):
        """An increasing grid of noise steps (steps, 1) that ends at the last step of the schedule.

        With last (n,) the grid is (steps, n), and column i ends at step last[i].
        """
        if last is None:
            last = torch.full((1,), len(self.alpha_bar) - 1, device=self.device)
        part = torch.arange(1, steps + 1, device=last.device)[:, None]
        return (part * (last + 1) // steps - 1).clamp(min=0)

    def labels(self, prompts):
        """Class labels (n,) int64 on this device. UserError: an unknown class."""
        labels = torch.as_tensor(prompts, dtype=torch.long).reshape(-1)
        if len(labels) and not 0 <= labels.min() <= labels.max() < self.classes:
            raise UserError(
                f"prompts = {labels.unique().tolist()}: expected classes 0 to {self.classes - 1}"
            )
        return labels.to(self.device)

    def grid(self, steps):
        """The noise levels of a sampler: times (steps, 1) and alpha_bar (steps + 1, 1).

        alpha_bar[i] belongs to times[i - 1], and alpha_bar[0] = 1 to the image itself.
        """
        times = self.times(steps)
        return times, torch.cat([torch.ones_like(self.alpha_bar[:1])[None], self.alpha_bar[times]])

    def draw(self, shape, rng):
        """Standard normal noise from the torch.Generator `rng`, on this device."""
        noise = torch.randn(shape, generator=rng, dtype=self.alpha_bar.dtype, device=rng.device)
        return noise.to(self.device)

    @torch.no_grad()
    def states(self, x, label, rng, steps, eta, guidance=1.0):
        """Yield the states (n, *shape) of DDIM's sampler, from the noise x to the images."""
        times, levels = self.grid(steps)
        yield x
        for i in range(steps, 0, -1):
            z = self.draw(x.shape, rng) if eta else None
            a, b = spread(levels[i], x), spread(levels[i - 1], x)
            eps = self.eps(x, times[i - 1], label, guidance)
            x = ddim_step(x, eps, a, b, eta, z)
            yield x

    def sample(self, prompts, k, rng, steps=25, eta=0.0, guidance=1.0):
        """k images for each of n class labels: (n, k, *shape), by DDIM.

        eta = 1 is ancestral sampling. guidance: as in `eps`. All random numbers come from the
        torch.Generator `rng`. UserError: an unknown class.
        """
        labels, images = self.labels(prompts), []
        for label in labels.repeat_interleave(k).split(512):
            x = self.draw((len(label), *self.shape), rng)
            for state in self.states(x, label, rng, steps, eta, guidance):
                last = state
            images.append(last)
        return torch.cat(images).view(len(labels), k, *self.shape)

    def walk(self, prompts, k, rng, steps=10, eta=1.0, shared=True):
        """The whole paths of a random sampler: (steps + 1, n, k, *shape), from noise to images.

        shared: the k paths of a prompt begin with the same noise; their steps differ.
        """
        labels = self.labels(prompts)
        noise = self.draw((len(labels), 1 if shared else k, *self.shape), rng)
        noise = noise.expand(-1, k, *self.shape).flatten(0, 1)  # (n k, *shape)
        states = list(self.states(noise, labels.repeat_interleave(k), rng, steps, eta))
        return torch.stack(states).view(steps + 1, len(labels), k, *self.shape)

    def transition_logps(self, x, after, step, label, steps, eta):
        """log p(after | x) of one step of `walk`, averaged over the dimensions of an image: (B, K).

        x, after: (B, K, *shape), consecutive states. step (B,): the place of x in the walk, 0 for
        noise, up to steps - 2, since the last step of a walk is deterministic. label: (B,).
        Gradients pass through the mean of the step. UserError: eta is 0.
        """
        times, levels = self.grid(steps)
        place = (steps - step).repeat_interleave(x.shape[1])  # (B K,) in levels
        images, label = x.flatten(0, 1), label.repeat_interleave(x.shape[1])
        a, b = spread(levels[place, 0], images), spread(levels[place - 1, 0], images)
        eps = self.eps(images, times[place - 1, 0], label)
        logp = ddim_logprob(after.flatten(0, 1), images, eps, a, b, eta)
        return logp.view(x.shape[:2]) / images[0].numel()

    @torch.no_grad()
    def path_kl(self, other, prompts, rng, steps=10):
        """KL of this model's ancestral sampler from another's, in nats: (n,), one path per prompt.

        It is the sum over the steps of |mean - other mean|^2 / (2 variance) along sampled paths,
        and depends on the number of steps. The last step, which is deterministic, is left out, so
        it bounds the KL of the noisy images before that step, not of the images. Both models need
        the same noise schedule.
        """
        label, (times, levels) = self.labels(prompts), self.grid(steps)
        noise, total = self.draw((len(label), *self.shape), rng), 0.0
        for place, x in zip(range(steps, 1, -1), self.states(noise, label, rng, steps, 1.0)):
            a, b = spread(levels[place], x), spread(levels[place - 1], x)
            noises = (model.eps(x, times[place - 1], label) for model in (self, other))
            (mean, std), (other_mean, _) = (ddim_step(x, eps, a, b, 1.0) for eps in noises)
            total = total + ((mean - other_mean) / std).square().flatten(1).sum(1) / 2
        return total

    @torch.no_grad()
    def inversion(self, x, times, label, rounds, average):
        """Yield the states (n, *shape) of DDIM inversion of the images x, one per row of times."""
        levels = self.alpha_bar[times]
        for t, a, b in zip(times, torch.cat([torch.ones_like(levels[:1]), levels[:-1]]), levels):
            a, b = spread(a, x), spread(b, x)
            eps = self.eps(x, t, label)
            for i in range(1, rounds):
                again = self.eps(ddim_step(x, eps, a, b), t, label)
                eps = eps + (again - eps) / (i + 1) if average else again
            x = ddim_step(x, eps, a, b)
            yield x

    def invert(self, x, times, label, rounds=1, average=False):
        """DDIM inversion: the noisy images x_t (n, *shape) from which DDIM samples the images x.

        times: (m, n) or (m, 1), from the first noise step to the last. Each step evaluates the
        noise prediction at the t of its destination. With rounds > 1 the prediction is evaluated
        again at the provisional result. The average of two rounds is ReNoise (used in SmPO); many
        rounds without averaging converge to the exact inverse of `sample` on the same grid.
        """
        for state in self.inversion(x, times, label, rounds, average):
            last = state
        return last

    def latents(self, images, times, label, rounds=1, average=False):
        """The inversions of images (B, K, *shape) to all steps of a grid: (B, K, m, *shape).

        times: (m, 1). label: (B,). rounds, average: as in `invert`.
        """
        flat, label = images.flatten(0, 1), label.repeat_interleave(images.shape[1])
        states = list(self.inversion(flat, times, label, rounds, average))
        return torch.stack(states, 1).view(*images.shape[:2], *times.shape[:1], *self.shape)


class Words(nn.Module):
    """Embeddings (n, words, width) of the words of prompts, which are numbers (n,).

    table: the numbers of the words of each prompt, lists of equal length.
    """

    def __init__(self, table, width):
        super().__init__()
        self.register_buffer("table", torch.tensor(table), persistent=False)
        self.embedding = nn.Embedding(int(self.table.max()) + 1, width)

    def forward(self, label):
        return self.embedding(self.table[label])


class NoiseEmbedding(nn.Module):
    """An embedding (n, width) of the noise level (n,) and of a label (n, width)."""

    def __init__(self, label, width, frequencies=8):
        super().__init__()
        # noise levels lie between about -1.2 and 1.3, which is less than half a period of the
        # lowest frequency and about a dozen periods of the highest
        frequency = 2.0 ** torch.linspace(0, 5, frequencies)
        self.register_buffer("frequency", frequency, persistent=False)
        self.label = label  # the module that embeds labels; its weights are saved under this name
        self.up, self.down = nn.Linear(2 * frequencies, width), nn.Linear(width, width)

    def forward(self, noise_level, label):
        angle = noise_level[:, None] * self.frequency  # (n, frequencies)
        waves = torch.cat([angle.sin(), angle.cos()], 1)  # (n, 2 frequencies)
        return self.down(F.silu(self.up(waves) + label))


class ConvBlock(nn.Module):
    """Residual block; noise level and class set a scale and a shift of each channel (FiLM)."""

    def __init__(self, inputs, outputs, width):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.film = nn.Linear(width, 2 * outputs)
        self.norm2, self.conv2 = nn.GroupNorm(8, outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x, condition):
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.film(condition)[:, :, None, None].chunk(2, 1)  # (n, outputs, 1, 1)
        return self.skip(x) + self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))


class CrossAttention(nn.Module):
    """Every place of a map (n, width, H, W) reads the words (n, words, width) of its prompt."""

    def __init__(self, width, heads=4):
        super().__init__()
        self.heads, self.norm = heads, nn.GroupNorm(8, width)
        self.query, self.output = nn.Linear(width, width), nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, x, words):
        def split(tokens):  # (n, tokens, width) -> (n, heads, tokens, width / heads)
            return tokens.unflatten(2, (self.heads, -1)).transpose(1, 2)

        places = self.norm(x).flatten(2).transpose(1, 2)  # (n, H W, width)
        key, value = map(split, self.key_value(words).chunk(2, 2))
        read = F.scaled_dot_product_attention(split(self.query(places)), key, value)
        return x + self.output(read.transpose(1, 2).flatten(2)).transpose(1, 2).view_as(x)


@dataclass
class UNetConfig:
    """The sizes of a UNet, and what its output means (see `Denoiser`)."""

    channels: int = 1
    size: tuple = (8, 8)  # height and width; one number stands for both
    classes: int = 10
    width: int = 32  # channels at full resolution; half resolution has twice as many
    prediction: str = "v_vp"  # what the output means; see diffusion.mixture
    schedule: str = "linear"  # noise schedule; see diffusion.alpha_bar
    sd: float = 1.0  # standard deviation of the data
    error: str = "eps"  # whose error counts equally at all noise levels: eps, or output
    patch: int = 1  # the network sees squares of this side as one pixel with more channels
    words: list | None = None  # the numbers of the words of each prompt; None: prompts are classes
    place: bool = False  # add a learned map, from which the network knows where it is
    free: bool = False  # one more label, which stands for no label and has the last row of words

    def __post_init__(self):
        check_fields(
            self,
            error=("eps", "output"),
            patch="[1, 64]",
            place=(False, True),
            free=(False, True),
            channels=LARGEST,
            classes=LARGEST,
            width=LARGEST,
            sd="[1e-6, 1e6]",
            prediction=PREDICTIONS,
            schedule=SCHEDULES,
        )
        sides = self.size if isinstance(self.size, (list, tuple)) else (self.size, self.size)
        even = [type(n) is int and 2 <= n <= 4096 and n % 2 == 0 for n in sides]
        if len(sides) != 2 or not all(even):
            raise UserError(
                f"size = {self.size}: expected an even height and width of 2 to 4096, "
                "since the second resolution is half as large"
            )
        if any(n % (2 * self.patch) for n in sides):
            raise UserError(f"size = {self.size}: expected multiples of twice patch = {self.patch}")
        if self.width % 8:
            raise UserError(f"width = {self.width}: expected a multiple of 8")
        self.size = tuple(sides)
        if self.words is not None:
            check_words(self.words, self.classes + self.free)


def check_words(table, rows):
    """UserError: this is not a table of word numbers of so many rows of equal length."""
    whole = isinstance(table, list) and all(isinstance(row, list) and row for row in table)
    fits = whole and len(table) == rows and len({len(row) for row in table}) == 1
    if not fits or not all(type(n) is int and 0 <= n < 2**16 for row in table for n in row):
        raise UserError(
            f"words: expected {rows} lists of equal length, one per label, of whole numbers from "
            f"0 to {2**16 - 1}"
        )


class UNet(Denoiser):
    """Conditional U-Net of two resolutions, 0.2M parameters at width 32.

    Classes and the words of prompts, summed, enter by FiLM. With words there is also an attention
    to each of them at the lower resolution.
    """

    def __init__(self, config):
        super().__init__(
            (config.channels, *config.size),
            config.classes,
            config.prediction,
            config.sd,
            config.schedule,
            config.error,
            config.free,
        )
        self.config, width, wide = config, config.width, 2 * config.width
        labels, channels = config.classes + config.free, config.channels * config.patch**2
        if config.words is None:
            label = nn.Embedding(labels, wide)
        else:
            label = Words(config.words, wide)
        self.condition = NoiseEmbedding(label, wide)
        self.input = nn.Conv2d(channels, width, 3, padding=1)
        if config.place:
            height, across = (side // config.patch for side in config.size)
            self.place = nn.Parameter(0.02 * torch.randn(1, width, height, across))
        self.encoder = ConvBlock(width, width, wide)
        self.middle = nn.ModuleList([ConvBlock(width, wide, wide), ConvBlock(wide, wide, wide)])
        if config.words is not None:
            self.attention = nn.ModuleList([CrossAttention(wide) for _ in self.middle])
        self.decoder = ConvBlock(wide + width, width, wide)
        self.norm = nn.GroupNorm(8, width)
        self.output = nn.Conv2d(width, channels, 3, padding=1)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, x, noise_level, label):
        config, told = self.config, self.condition.label(label)  # (n, 2 width), or of each word
        whole = told if config.words is None else told.sum(1)
        condition = F.silu(self.condition(noise_level, whole))
        full = self.input(F.pixel_unshuffle(x, config.patch))  # (n, width, H / patch, W / patch)
        full = self.encoder(full + self.place if config.place else full, condition)
        half = F.avg_pool2d(full, 2)
        for i, block in enumerate(self.middle):
            half = block(half, condition)  # (n, 2 width, H / (2 patch), W / (2 patch))
            if config.words is not None:
                half = self.attention[i](half, told)
        full = torch.cat([full, F.interpolate(half, scale_factor=2.0)], 1)
        output = self.output(F.silu(self.norm(self.decoder(full, condition))))
        return F.pixel_shuffle(output, config.patch)

    # -- folders (lab/hub.py)

    @classmethod
    def from_pretrained(cls, folder):
        """A UNet from a folder that `save_pretrained` wrote. UserError: it is not such a folder."""
        from lab.hub import load_unet

        return load_unet(folder)

    def save_pretrained(self, folder):
        """Write config.json and model.safetensors."""
        from lab.hub import save_unet

        save_unet(self, folder)
