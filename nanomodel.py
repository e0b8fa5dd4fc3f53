"""The models: GPT (the Llama family's shape), UNet; scoring and sampling for both.

Every model offers `logps(batch)` -> log-probabilities (B, K, T) and `sample(prompts, k, rng)`. B prompts, K responses, T response tokens,
N packed rows of S tokens, G branches a row, V vocabulary, H heads.
"""

import json
import math
import os
from dataclasses import asdict, dataclass, fields

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from data import Tokenizer, UserError, error_line
from diffusion import alpha_bar, ddim_step, mixture, q_sample, spread, to_eps, to_sigma

# ---------------------------------------------------------------- folders


def read_checkpoint(folder):
    """(config dict, {name: tensor}) of a checkpoint folder or Hub name; safetensors only, sharded or not."""
    folder = str(folder)
    if not os.path.isdir(folder):
        if os.path.exists(folder) or folder.count("/") != 1 or folder.startswith((".", "/")):
            raise UserError(f"{folder} is no checkpoint folder")
        from huggingface_hub import snapshot_download

        try:
            folder = snapshot_download(
                folder, allow_patterns=["*.json", "*.safetensors", "*.jinja"]
            )
        except Exception as error:  # the hub client raises many kinds
            raise UserError(
                f"{folder} is neither a folder nor a Hub name that can be fetched: {str(error).splitlines()[0]}"
            ) from None
    try:
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
            config = json.load(file)
    except FileNotFoundError:
        raise UserError(f"{folder} is no checkpoint: it has no config.json") from None
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{folder}/config.json cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{folder}/config.json is no JSON object")
    index = os.path.join(folder, "model.safetensors.index.json")
    names = ["model.safetensors"]
    if os.path.exists(index):
        try:
            with open(index, encoding="utf-8") as file:
                names = sorted(
                    {os.path.basename(name) for name in json.load(file)["weight_map"].values()}
                )
        except (ValueError, KeyError, TypeError, AttributeError, OSError):
            raise UserError(f"{index} is no readable index of weights") from None
    from lab.store import load_tensors

    weights = {}
    for name in names:
        if not os.path.exists(os.path.join(folder, name)):
            raise UserError(
                f"{folder} is no checkpoint: it has no {name} (only safetensors are read)"
            )
        weights |= load_tensors(os.path.join(folder, name))
    return folder, config, weights


def load_weights(model, weights, where):
    """Copy {name: tensor} into `model`; ValueError naming the first weight that is missing, unknown or of another shape."""
    own = model.state_dict()
    for name, tensor in own.items():
        if name not in weights:
            raise UserError(f"{where}: weight {name} is missing")
        if weights[name].shape != tensor.shape:
            raise UserError(
                f"{where}: weight {name} has shape {tuple(weights[name].shape)}, the config asks for {tuple(tensor.shape)}"
            )
    for name in weights:
        if name not in own and not name.endswith("rotary_emb.inv_freq"):
            raise UserError(f"{where}: weight {name} has no place in this model")
    model.load_state_dict({k: weights[k] for k in own})


# ---------------------------------------------------------------- GPT


@dataclass
class GPTConfig:
    """Shape of a GPT; the names are those of a Hugging Face Llama config.json, so that loading is a loop over equal names."""

    vocab_size: int = 512
    hidden_size: int = 64
    intermediate_size: int = 192  # SwiGLU: about 8/3 of hidden_size
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 2  # grouped-query attention when fewer than the heads
    head_dim: int = 0  # 0: hidden_size / num_attention_heads
    max_position_embeddings: int = 256  # the context: longest prompt + response
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = True

    def __post_init__(self):
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_attention_heads {self.num_attention_heads} is no multiple of num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim {self.head_dim} must be even for rotary positions")


class RMSNorm(nn.Module):
    """x / rms(x), times a learned gain."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


def rotary(position, dim, theta, dtype):
    """cos and sin (..., dim) of the rotary angles at integer positions (...)."""
    frequency = theta ** (
        -torch.arange(0, dim, 2, device=position.device, dtype=torch.float32) / dim
    )
    angle = position[..., None].float() * frequency
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x, cos, sin):
    """Rotate the two halves of the last axis of x by the angles (Llama's layout)."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin


def visible(branch, sees):
    """(N, S, S) bool: the one attention rule, causal and sees[branch of the query, branch of the key]."""
    n = torch.arange(len(branch), device=branch.device)[:, None, None]
    causal = torch.ones(
        branch.shape[1], branch.shape[1], dtype=torch.bool, device=branch.device
    ).tril()
    return causal & sees[n, branch[:, :, None], branch[:, None, :]]


def blocks(mask, size=128):
    """The rule for long rows on a CPU, in blocks of queries: list of (the keys that some query of the block sees, (N, 1, size, keys) bool).
    With 8 responses in a row, three of four pairs of positions do not see each other."""
    parts = [(part.flatten(0, 1).any(0).nonzero()[:, 0], part) for part in mask.split(size, 1)]
    return [(keys, part[:, None, :, keys]) for keys, part in parts]


def flex_mask(branch, sees):
    """The same rule as a FlexAttention block mask (CUDA: blocks that nobody sees are never computed)."""
    from torch.nn.attention.flex_attention import create_block_mask

    def rule(n, h, q, k):
        return (q >= k) & sees[n, branch[n, q], branch[n, k]]

    return create_block_mask(
        rule, len(branch), None, branch.shape[1], branch.shape[1], device=branch.device
    )


def attention(q, k, v, mask):
    """Scaled dot-product attention, q (N, H, S, D), k and v with fewer heads; mask a boolean (N, S, S), `blocks` of it or a FlexAttention
    block mask."""
    if not isinstance(mask, (torch.Tensor, list)):
        from torch.nn.attention.flex_attention import flex_attention

        if q.is_cuda:
            flex_attention = _compiled(flex_attention)
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
    repeat = q.shape[1] // k.shape[1]
    if repeat > 1:  # the fused CPU kernel wants equal heads
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    if isinstance(mask, torch.Tensor):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])
    some = [
        (part, k.index_select(2, keys), v.index_select(2, keys), seen)
        for part, (keys, seen) in zip(q.split(mask[0][1].shape[2], 2), mask)
    ]
    return torch.cat([F.scaled_dot_product_attention(*each) for each in some], 2)


_COMPILED = {}


def _compiled(function):
    if function not in _COMPILED:
        _COMPILED[function] = torch.compile(function)
    return _COMPILED[function]


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, c):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (
            c.num_attention_heads,
            c.num_key_value_heads,
            c.head_dim,
        )
        self.q_proj = nn.Linear(c.hidden_size, self.heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, self.kv_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, self.kv_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * c.head_dim, c.hidden_size, bias=False)

    def project(self, x, cos, sin):
        """q (N, H, S, D), k and v (N, Hkv, S, D), rotated."""
        n, s, _ = x.shape
        q = self.q_proj(x).view(n, s, self.heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(n, s, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(n, s, self.kv_heads, self.head_dim).transpose(1, 2)
        q, k = (
            rotate(x, cos[:, None], sin[:, None]).to(v.dtype) for x in (q, k)
        )  # under autocast the angles stay in float32
        return q, k, v

    def forward(self, x, cos, sin, mask, keep=None, rows=None):
        q, k, v = self.project(x, cos, sin)
        if keep is not None:  # the prompt's keys and values, for sampling
            keep.append((k, v))
        out = attention(q, k, v, mask).transpose(1, 2).flatten(2)
        return self.o_proj(out if rows is None else out.flatten(0, 1)[rows])

    def step(self, x, cos, sin, prompt_kv, seen, own_kv, length):
        """One new token for each of K samples: x (B, K, hidden). The prompt's keys (B, Hkv, P, D), visible where `seen` (B, P), are shared
        by the K samples; `own_kv` (B, K, Hkv, T, D) holds what they wrote themselves, `length` tokens before this one."""
        b, n, _ = x.shape
        q, k, v = self.project(x, cos, sin)  # the K samples take the place of the sequence
        (prompt_k, prompt_v), (own_k, own_v) = prompt_kv, own_kv
        own_k[:, :, :, length] = k.transpose(1, 2)
        own_v[:, :, :, length] = v.transpose(1, 2)
        own_k, own_v = own_k[:, :, :, : length + 1], own_v[:, :, :, : length + 1]
        q = q.view(b, self.kv_heads, -1, n, self.head_dim) / math.sqrt(
            self.head_dim
        )  # (B, Hkv, R, K, D)
        to_prompt = torch.einsum("bgrnd,bgpd->bgrnp", q, prompt_k).masked_fill(
            ~seen[:, None, None, None], -torch.inf
        )
        to_own = torch.einsum("bgrnd,bngtd->bgrnt", q, own_k)
        weight = torch.cat([to_prompt, to_own], -1).softmax(-1)
        on_prompt, on_own = weight.split([prompt_k.shape[2], length + 1], -1)
        out = torch.einsum("bgrnp,bgpd->bngrd", on_prompt, prompt_v) + torch.einsum(
            "bgrnt,bngtd->bngrd", on_own, own_v
        )
        return self.o_proj(out.reshape(b, n, -1))


class MLP(nn.Module):
    """SwiGLU."""

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
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, attend, rows=None):
        """x (N, S, hidden) -> the same, or (len(rows), hidden): only some positions of the flattened N*S go on behind the attention."""
        out = attend(self.self_attn, self.input_layernorm(x))
        x = (x if rows is None else x.flatten(0, 1)[rows]) + out
        return x + self.mlp(self.post_attention_layernorm(x))


@dataclass
class Cache:
    """Static key-value cache of a sampling call: the prompts' keys and values once, and room for K samples of each."""

    prompt: list  # a layer: (k, v), each (B, Hkv, P, D)
    own: list  # a layer: (k, v), each (B, K, Hkv, T, D)
    seen: torch.Tensor  # (B, P) bool: False on padding
    start: torch.Tensor  # (B,) position of the first sampled token
    length: int = 0  # sampled tokens so far


class GPT(nn.Module):
    """Decoder-only transformer: RMSNorm, RoPE, SwiGLU, grouped-query attention, tied embeddings."""

    chunk = (
        2**27
    )  # logits held at once (elements) before the vocabulary matrix is applied in pieces

    def __init__(self, config, tokenizer=None):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )
        for name, p in self.named_parameters():
            if p.dim() == 2:  # GPT-2's: N(0, 0.02), residual projections scaled down with depth
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(
                    p, 0.0, 0.02 / math.sqrt(2 * config.num_hidden_layers) if residual else 0.02
                )

    @property
    def device(self):
        return self.embed_tokens.weight.device

    def unembed(self, h):
        """Logits (..., V) of hidden states (..., hidden)."""
        return F.linear(
            h, self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        )

    def hidden(self, batch, layers=None, rows=None):
        """Hidden states of a packed batch: (N, S, hidden) after the last norm, (len(rows), hidden) at the positions `rows` of the flattened
        N*S, or a list of them after each layer named in `layers` (0 = the embeddings, i = after layer i, before the last norm)."""
        x = self.embed_tokens(batch.tokens)
        cos, sin = rotary(batch.position, self.config.head_dim, self.config.rope_theta, x.dtype)
        long = x.is_cuda and batch.tokens.shape[1] >= 512
        mask = (flex_mask if long else visible)(batch.branch, batch.sees)
        if not x.is_cuda and x.shape[1] > 192:
            mask = blocks(mask)
        states = [x] if layers is not None else None
        for i, layer in enumerate(self.layers):
            some = (
                rows if i + 1 == len(self.layers) else None
            )  # behind the last attention nobody asks for the others
            x = layer(x, lambda attn, y: attn(y, cos, sin, mask, rows=some), some)
            if layers is not None:
                states.append(x)
        return self.norm(x) if layers is None else [states[i] for i in layers]

    def logits(self, batch):
        """(B, K, T, V): the whole vocabulary at the rows that predict a response token."""
        return self.unembed(
            self.hidden(batch, rows=batch.source.flatten()).view(*batch.source.shape, -1)
        )

    def logps(self, batch):
        """(B, K, T) log-probabilities of the response tokens in float32 or better, 0 outside batch.mask."""
        mask, cuda = (
            batch.mask,
            batch.mask.is_cuda,
        )  # on CUDA a fixed shape is worth more than the padded rows it costs
        source, target = (
            (batch.source.flatten(), batch.target.flatten())
            if cuda
            else (batch.source[mask], batch.target[mask])
        )
        rows = self.hidden(batch, rows=source)
        pieces = max(1, -(-len(rows) * self.config.vocab_size // self.chunk))
        size = -(-len(rows) // pieces) or 1
        out = []
        for part, goal in zip(rows.split(size), target.split(size)):
            if pieces > 1 and torch.is_grad_enabled():
                out.append(checkpoint(self._token_logps, part, goal, use_reentrant=False))
            else:
                out.append(self._token_logps(part, goal))
        flat = torch.cat(out)
        if cuda:
            return flat.view(mask.shape) * mask
        return flat.new_zeros(mask.shape).masked_scatter(mask, flat)

    def _token_logps(self, rows, target):
        logits = self.unembed(rows)
        with torch.autocast(logits.device.type, enabled=False):
            return -F.cross_entropy(
                logits.to(torch.promote_types(logits.dtype, torch.float32)),
                target,
                reduction="none",
            )

    # -- sampling

    @torch.no_grad()
    def prefill(self, prompts, k, max_tokens):
        """Read n prompts (lists of token ids) once -> Cache for k samples of each, and the logits (n, V) of the first token."""
        size, length = max(map(len, prompts)), torch.tensor([len(p) for p in prompts])
        tokens = torch.tensor([p + [0] * (size - len(p)) for p in prompts], device=self.device)
        seen = (torch.arange(size) < length[:, None]).to(self.device)
        x, position = (
            self.embed_tokens(tokens),
            torch.arange(size, device=self.device).expand(len(prompts), -1),
        )
        cos, sin = rotary(position, self.config.head_dim, self.config.rope_theta, x.dtype)
        mask = (
            torch.ones(size, size, dtype=torch.bool, device=self.device)
            .tril()
            .expand(len(prompts), -1, -1)
        )
        prompt = []
        for layer in self.layers:
            x = layer(x, lambda attn, y: attn(y, cos, sin, mask, prompt))
        last = self.norm(x)[torch.arange(len(prompts)), length - 1]
        shape = (len(prompts), k, self.config.num_key_value_heads, max_tokens, self.config.head_dim)
        own = [(x.new_zeros(shape), x.new_zeros(shape)) for _ in self.layers]
        return Cache(prompt, own, seen, length.to(self.device)), self.unembed(last)

    @torch.no_grad()
    def decode(self, cache, tokens):
        """Append one token to each sample: tokens (B, K) -> logits (B, K, V) of the next; the cache is updated in place."""
        x = self.embed_tokens(tokens)
        position = (cache.start + cache.length)[:, None].expand(tokens.shape)
        cos, sin = rotary(position, self.config.head_dim, self.config.rope_theta, x.dtype)
        for layer, prompt, own in zip(self.layers, cache.prompt, cache.own):
            x = layer(
                x, lambda attn, y: attn.step(y, cos, sin, prompt, cache.seen, own, cache.length)
            )
        cache.length += 1
        return self.unembed(self.norm(x))

    @torch.no_grad()
    def sample(self, prompts, k, rng, max_tokens=64, temperature=1.0):
        """n prompts (text or token ids) -> n lists of k responses (token ids). A response that ended carries the end token as its last id;
        one without it was cut at `max_tokens` or at the end of the context. temperature 0 is greedy. Draws from the torch.Generator
        `rng` alone. ValueError: a prompt as long as the context."""
        eot, context = self.tokenizer.eot, self.config.max_position_embeddings
        # something has to predict the first token (as in `data.encode`)
        prompts = [
            (self.tokenizer.encode(p) if isinstance(p, str) else list(p)) or [eot] for p in prompts
        ]
        rooms = [context - len(p) for p in prompts]
        if min(rooms) < 1:
            raise UserError(
                f"a prompt of {context - min(rooms)} tokens leaves no room in a context of {context}"
            )
        max_tokens = min(max_tokens, max(rooms))
        cache, logits = self.prefill(prompts, k, max_tokens)
        logits, chosen = logits[:, None].expand(-1, k, -1), []
        done = torch.zeros(len(prompts), k, dtype=torch.bool, device=self.device)
        for step in range(max_tokens):
            if temperature == 0:
                token = logits.argmax(-1)
            else:
                # one uniform number a sample against the cumulated probabilities: a third of multinomial's time at these sizes
                total = (logits.float() / temperature).softmax(-1).cumsum(-1)  # (n, k, V)
                draw = (
                    torch.rand(len(prompts), k, 1, generator=rng, device=rng.device).to(
                        total.device
                    )
                    * total[..., -1:]
                )
                token = torch.searchsorted(total, draw, right=True)[..., 0].clamp(
                    max=total.shape[-1] - 1
                )
            chosen.append(token)
            done |= token == eot
            if step + 1 == max_tokens or ((step % 8 == 7 or not done.is_cuda) and bool(done.all())):
                break
            logits = self.decode(cache, token)
        out = torch.stack(chosen, -1).tolist()
        return [
            [(ids[: ids.index(eot) + 1] if eot in ids else ids)[:room] for ids in group]
            for group, room in zip(out, rooms)
        ]

    # -- folders

    def save_pretrained(self, folder):
        """Write config.json, model.safetensors and the tokenizer in Hugging Face's layout, each file in one step."""
        from lab.store import save_tensors, write_text

        config = asdict(self.config) | {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "torch_dtype": "float32",
        }
        if self.tokenizer is not None:
            config |= {
                "eos_token_id": self.tokenizer.eot,
                "pad_token_id": self.tokenizer.pad,
                "bos_token_id": None,
            }
            self.tokenizer.save(folder)
        weights = {
            k if k.startswith("lm_head") else "model." + k: v for k, v in self.state_dict().items()
        }
        save_tensors(os.path.join(folder, "model.safetensors"), weights)
        write_text(os.path.join(folder, "config.json"), json.dumps(config, indent=1))

    @classmethod
    def from_pretrained(cls, folder):
        """Load a Llama-family checkpoint from a folder or Hub name in float32. ValueError in one line: none there, or another family."""
        folder, config, weights = read_checkpoint(folder)
        if config.get("model_type") != "llama":
            raise UserError(
                f"{folder}: model_type {config.get('model_type')!r} is not of the Llama family"
            )
        scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
        if (
            not isinstance(scaling, dict)
            or scaling.get("rope_type", scaling.get("type", "default")) != "default"
        ):
            raise UserError(f"{folder}: rotary scaling {scaling} is not supported")
        if (
            config.get("attention_bias")
            or config.get("mlp_bias")
            or config.get("hidden_act", "silu") != "silu"
        ):
            raise UserError(f"{folder}: biases or activations other than Llama's are not supported")
        config = {k: v for k, v in config.items() if v is not None}
        # what a Llama config.json leaves out
        config = (
            dict(
                rms_norm_eps=1e-6,
                max_position_embeddings=2048,
                rope_theta=10000.0,
                tie_word_embeddings=False,
            )
            | scaling
            | config
        )
        config.setdefault("num_key_value_heads", config.get("num_attention_heads"))
        try:
            missing = {
                "vocab_size",
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
            } - set(config)
            if missing:
                raise KeyError(f"no {', '.join(sorted(missing))}")
            config = GPTConfig(
                **{f.name: config[f.name] for f in fields(GPTConfig) if f.name in config}
            )
            model = cls(config)
        except (TypeError, KeyError, ZeroDivisionError, ValueError, RuntimeError) as error:
            raise UserError(
                f"{folder}/config.json does not describe a Llama model: {error_line(error)}"
            ) from None
        model.tokenizer = Tokenizer.load(folder)
        if model.tokenizer.vocab_size > config.vocab_size:
            raise UserError(
                f"{folder}: the tokenizer has {model.tokenizer.vocab_size} tokens, the model {config.vocab_size}"
            )
        weights = {k.removeprefix("model."): v.float() for k, v in weights.items()}
        if config.tie_word_embeddings:
            weights.pop("lm_head.weight", None)
        load_weights(model, weights, folder)
        return model


# ---------------------------------------------------------------- denoisers


class Denoiser(nn.Module):
    """What every image model shares. A subclass defines forward(x, noise_level, label): x (n, *shape) of about unit variance,
    noise_level (n,) = ln(sigma) / 4, label (n,) class; it returns a tensor like x, read as `prediction` (see `mixture`)."""

    def __init__(self, shape, classes, prediction="eps", sd=1.0, schedule="linear"):
        super().__init__()
        self.shape, self.classes, self.prediction, self.sd = tuple(shape), classes, prediction, sd
        self.register_buffer("alpha_bar", alpha_bar(schedule).float(), persistent=False)
        mixture(prediction, self.alpha_bar)  # refuses an unknown one

    @property
    def device(self):
        return self.alpha_bar.device

    def eps(self, x, t, label):
        """Predicted noise in x (n, *shape) at steps t (n,) or (1,), like x."""
        level = self.alpha_bar[t].expand(len(x))
        a, sigma = spread(level, x), to_sigma(level)
        scale = (
            (1 + sigma**2) / (sigma**2 + self.sd**2)
        ).sqrt()  # EDM's c_in x_edm, which for sd = 1 is x_t itself
        with torch.autocast(
            x.device.type, enabled=False
        ):  # methods take differences of nearly equal errors
            output = self(x if self.sd == 1 else x * spread(scale, x), sigma.log() / 4, label)
        return (
            output
            if self.prediction == "eps"
            else to_eps(self.prediction, output, x, a, sd=self.sd)
        )

    def prepare(self, batch, rng, times=None, shared=True):
        """Draws batch.t (B,) and batch.noise (B, 1, *shape), or (B, K, *shape) if not shared; -> batch. All models score the
        same draw, and the responses of a row share it: their difference is then not noise. times(n, rng) -> (n,): uniform."""
        B, K = batch.images.shape[:2]
        t = times(B, rng) if times else torch.randint(len(self.alpha_bar), (B,), generator=rng)
        noise = torch.randn(
            B, 1 if shared else K, *self.shape, generator=rng, dtype=batch.images.dtype
        )
        batch.t, batch.noise = t.to(batch.images.device), noise.to(batch.images.device)
        return batch

    def logps(self, batch, weight=None):
        """(B, K, 1): minus the squared noise error SUMMED over the image, times weight(t) (B,); 0 outside batch.mask.

        The bound's surrogate for log p(image | class) at the one draw (t, noise) of `prepare`. With no factor 1/2, beta b here
        is Diffusion-DPO's 2 D b on means: Stable Diffusion's 5000 is 0.15."""
        K = batch.images.shape[1]
        x = q_sample(
            batch.images, batch.noise, spread(self.alpha_bar[batch.t], batch.images)
        )  # (B, K, *shape)
        eps = self.eps(
            x.flatten(0, 1), batch.t.repeat_interleave(K), batch.label.repeat_interleave(K)
        ).view_as(x)
        error = (eps - batch.noise).square().flatten(2).sum(2, keepdim=True)  # (B, K, 1)
        return -(error if weight is None else error * spread(weight(batch.t), error)) * batch.mask

    def times(self, steps, last=None):
        """A rising grid (steps, 1) that ends at the last noise step; last (n,): (steps, n), each column ends at its own."""
        last = torch.tensor([len(self.alpha_bar) - 1], device=self.device) if last is None else last
        return (
            torch.arange(1, steps + 1, device=last.device)[:, None] * (last + 1) // steps - 1
        ).clamp(min=0)

    @torch.no_grad()
    def sample(self, prompts, k, rng, steps=25, eta=0.0):
        """k images for each of n class labels, (n, k, *shape), by DDIM (eta = 1: ancestral). ValueError: an unknown class."""
        labels = torch.as_tensor(prompts, dtype=torch.long).reshape(-1)
        if len(labels) and not 0 <= labels.min() <= labels.max() < self.classes:
            raise UserError(
                f"prompts = {labels.unique().tolist()}: expected classes 0 to {self.classes - 1}"
            )
        device, images = self.device, []
        times = self.times(steps)
        levels = torch.cat(
            [torch.ones(1, 1, device=device), self.alpha_bar[times]]
        )  # below the first step stands the image
        for label in labels.repeat_interleave(k).split(512):
            shape = len(label), *self.shape
            x = torch.randn(shape, generator=rng, dtype=levels.dtype).to(device)
            for i in range(steps, 0, -1):
                z = (
                    torch.randn(shape, generator=rng, dtype=levels.dtype).to(device)
                    if eta
                    else None
                )
                eps = self.eps(x, times[i - 1], label.to(device))
                x = ddim_step(x, eps, spread(levels[i], x), spread(levels[i - 1], x), eta, z)
            images.append(x)
        return torch.cat(images).view(len(labels), k, *self.shape)

    @torch.no_grad()
    def invert(self, x, times, label, rounds=1, average=False):
        """DDIM inversion: images x (n, *shape) -> x_t at the last row of `times` (m, n) or (m, 1), through all its rows.

        Each step asks for the noise at its destination's t. rounds > 1 asks again at the provisional result: the mean of two
        rounds is ReNoise (SmPO), many rounds without the mean the exact inverse of `sample` on the same grid."""
        levels = self.alpha_bar[times]
        for t, a, b in zip(times, torch.cat([torch.ones_like(levels[:1]), levels[:-1]]), levels):
            a, b = spread(a, x), spread(b, x)
            eps = self.eps(x, t, label)
            for i in range(1, rounds):
                again = self.eps(ddim_step(x, eps, a, b), t, label)
                eps = eps + (again - eps) / (i + 1) if average else again
            x = ddim_step(x, eps, a, b)
        return x


class NoiseEmbedding(nn.Module):
    """noise_level (n,) and class (n,) -> (n, width)."""

    def __init__(self, classes, width, frequencies=8):
        super().__init__()
        # noise levels span about -1.2 to 1.3: from half a period over that range to a few dozen
        self.register_buffer(
            "frequency", 2.0 ** torch.linspace(0, 5, frequencies), persistent=False
        )
        self.label = nn.Embedding(classes, width)
        self.up, self.down = nn.Linear(2 * frequencies, width), nn.Linear(width, width)

    def forward(self, noise_level, label):
        angle = noise_level[:, None] * self.frequency  # (n, frequencies)
        return self.down(
            F.silu(self.up(torch.cat([angle.sin(), angle.cos()], 1)) + self.label(label))
        )


class ConvBlock(nn.Module):
    """Residual block; noise level and class enter as a scale and a shift of each channel."""

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


@dataclass
class UNetConfig:
    channels: int = 1
    size: tuple = (8, 8)  # height and width
    classes: int = 10
    width: int = 32  # channels at full resolution, twice as many at half
    prediction: str = "v_vp"
    schedule: str = "linear"
    sd: float = 1.0

    def __post_init__(self):
        self.size = (self.size, self.size) if isinstance(self.size, int) else tuple(self.size)
        if len(self.size) != 2 or any(side < 2 or side % 2 for side in self.size):
            raise UserError(
                f"size = {self.size}: expected an even height and width, two resolutions need to halve them"
            )
        if self.width < 8 or self.width % 8:
            raise UserError(f"width = {self.width}: expected a multiple of 8")


class UNet(Denoiser):
    """Class-conditional U-Net of two resolutions, 0.2M parameters at width 32."""

    def __init__(self, config):
        super().__init__(
            (config.channels, *config.size),
            config.classes,
            config.prediction,
            config.sd,
            config.schedule,
        )
        self.config, width, wide = config, config.width, 2 * config.width
        self.condition = NoiseEmbedding(config.classes, wide)
        self.input = nn.Conv2d(config.channels, width, 3, padding=1)
        self.encoder = ConvBlock(width, width, wide)
        self.middle = nn.ModuleList([ConvBlock(width, wide, wide), ConvBlock(wide, wide, wide)])
        self.decoder = ConvBlock(wide + width, width, wide)
        self.norm, self.output = (
            nn.GroupNorm(8, width),
            nn.Conv2d(width, config.channels, 3, padding=1),
        )
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, x, noise_level, label):
        condition = F.silu(self.condition(noise_level, label))
        full = self.encoder(self.input(x), condition)  # (n, width, H, W)
        half = F.avg_pool2d(full, 2)
        for block in self.middle:
            half = block(half, condition)  # (n, 2 width, H/2, W/2)
        full = torch.cat([full, F.interpolate(half, scale_factor=2.0)], 1)
        return self.output(F.silu(self.norm(self.decoder(full, condition))))

    def save_pretrained(self, folder):
        """Write config.json and model.safetensors, each file in one step."""
        from lab.store import save_tensors, write_text

        save_tensors(os.path.join(folder, "model.safetensors"), self.state_dict())
        write_text(
            os.path.join(folder, "config.json"),
            json.dumps({"model_type": "unet"} | asdict(self.config), indent=1),
        )

    @classmethod
    def from_pretrained(cls, folder):
        """Load what save_pretrained wrote. ValueError in one line when the folder is no checkpoint, or that of another model."""
        folder, config, weights = read_checkpoint(folder)
        if not isinstance(config, dict) or config.get("model_type") != "unet":
            raise UserError(f"{folder}/config.json does not describe a UNet")
        try:
            model = cls(UNetConfig(**{f.name: config[f.name] for f in fields(UNetConfig)}))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{folder}/config.json does not describe a UNet: {error}") from None
        load_weights(model, weights, folder)
        return model
