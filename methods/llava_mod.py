"""LLAVA_MOD - LLaVA-MoD: Making LLaVA Tiny via MoE Knowledge Distillation (2024), arXiv:2408.15881

A small student learns from a large teacher in three stages. First it mimics the teacher's
distribution over the vocabulary (D2D). Then every second feed-forward layer is copied into experts
with a router, and it mimics again (D2S). Finally it learns from preferences with the teacher as the
reference: it must raise good answers above the teacher's own probability, so it can hallucinate
less than its teacher.

    mimic: mean_t KL(pi_T | pi_S)                D2S: + next-token loss + aux times `balance`
    r = log pi_S(y|x) / pi_T(y|x)                chosen r_w, rejected r_l
    dpo:      loss = -log sigmoid(beta (r_w - r_l))
    kto_pair: loss = 1 - mean of sigmoid(beta (r_w - z_l)) and sigmoid(beta (z_w - r_l)),
              z = max(0, batch mean of r), detached

Differences from the paper
1. Pictures are patches in the prompt, without a projector or its stage.
2. Routing has no noise or token limit; all experts compute every token, unused ones at weight 0.
3. The sparse student is not saved as a checkpoint.

    python train.py --method llava_mod                      fewer hallucinations than the teacher
    python train.py --method llava_mod --anchor student     the student itself as reference
"""

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from data import Paper, UserError, check_fields, fill_variant, pair, upcast
from nanomodel import GPT, GPTConfig

PAPER = Paper(
    "beyond",
    worlds=("text",),
    ignores=("k", "lora"),
    defaults=dict(world="captions"),
)
MIXTURE = dict(experts=4, top=2, aux=0.01)  # read if the student becomes sparse
VARIANTS = dict(dpo=MIXTURE, kto_pair=MIXTURE)


@dataclass(frozen=True)
class Config:
    variant: str = "dpo"  # dpo or kto_pair, which the released code uses
    beta: float = 0.5  # strength of the pull to the reference (the released code: 0.1)
    anchor: str = "teacher"  # the reference of the last stage: teacher or student
    experts: int | None = None  # sparse > 0: experts of a sparse layer
    top: int | None = None  # sparse > 0: experts that are used for a token
    # sparse > 0: weight of the balance between experts, once for both responses of a pair
    aux: float | None = None
    width: int = 64  # hidden size of the student
    dense: int = 700  # steps of dense distillation (D2D)
    sparse: int = 300  # steps of sparse distillation (D2S); 0 leaves the student dense

    def __post_init__(self):
        if self.sparse:
            fill_variant(self, VARIANTS)
        elif any(getattr(self, name) is not None for name in MIXTURE):
            raise UserError("experts, top and aux do nothing with sparse = 0: there are no experts")
        check_fields(self, variant=("dpo", "kto_pair"), beta="(0, inf)", top="[1, inf)")
        check_fields(self, anchor=("teacher", "student"), experts="[2, inf)", aux="[0, inf)")
        check_fields(self, width="[8, inf)", dense="[0, inf)", sparse="[0, inf)")
        if self.width % 2:
            raise UserError(f"--width {self.width}: expected an even number")
        if self.sparse:
            check_top(self.top, self.experts)


def check_top(top, experts):
    """UserError: more experts are to be used than there are."""
    if top > experts:
        raise UserError(f"--top {top} exceeds --experts {experts}")


def loss(logps, ref_logps, batch, cfg):
    """logps, ref_logps (B, 2, T), chosen first, 0 outside batch.mask -> losses (B,), metrics."""
    logps, ref_logps = pair(logps, ref_logps, batch)
    chosen, rejected = (logps - ref_logps).sum(-1).unbind(1)  # (B,) log-ratios: SUM over tokens
    if cfg.variant == "dpo":
        losses = -F.logsigmoid(cfg.beta * (chosen - rejected))
    else:
        z_chosen, z_rejected = (r.detach().mean().clamp(min=0) for r in (chosen, rejected))
        up = 1 - torch.sigmoid(cfg.beta * (chosen - z_rejected))
        down = 1 - torch.sigmoid(cfg.beta * (z_chosen - rejected))
        losses = (up + down) / 2
    # the student surpasses its reference where the first is above 0 and the second below
    return losses, {"r_chosen": chosen.detach().mean(), "r_rejected": rejected.detach().mean()}


def mimic(teacher, student, mask):
    """Mean over tokens of KL(teacher | student); logits (B, K, T, V), mask (B, K, T).

    UserError: the vocabularies differ, or nothing is scored.
    """
    if teacher.shape[-1] != student.shape[-1]:
        raise UserError(f"vocabularies of {teacher.shape[-1]} and {student.shape[-1]} tokens")
    if not mask.any():
        raise UserError("there is no response token to mimic")
    wide = torch.promote_types(student.dtype, torch.float32)
    target, found = (x[mask].to(wide).log_softmax(-1) for x in (teacher, student))
    p = target.exp()
    return (p * (target - found).masked_fill(p == 0, 0.0)).sum(-1).mean()


def route(logits, top):
    """Router logits (n, E) -> weights (n, E), 0 but for the `top` largest, and probabilities."""
    g = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
    best, index = g.topk(top)
    weights = torch.zeros_like(g).scatter(1, index, best / best.sum(-1, keepdim=True))
    return weights, g


def balance(g):
    """E sum_e mean(g_e) mean(1[e is first]): 1 if all experts are used alike, E if one is."""
    first = F.one_hot(g.argmax(-1), g.shape[-1]).to(g.dtype)
    return g.shape[-1] * (g.mean(0) * first.mean(0)).sum()


class Also(torch.autograd.Function):
    """x unchanged; in the backward pass the value is minimized, too, as if the loss had it."""

    @staticmethod
    def forward(ctx, x, value):
        ctx.kind = value.dtype, value.device
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        kind, device = ctx.kind
        return gradient, torch.ones((), dtype=kind, device=device)


class Mixture(nn.Module):
    """Copies of a feed-forward layer as experts, with a router: it equals the layer at first."""

    def __init__(self, layer, width, experts, top, aux):
        super().__init__()
        check_top(top, experts)
        self.experts = nn.ModuleList(copy.deepcopy(layer) for _ in range(experts))
        self.router = nn.Linear(width, experts, bias=False)
        self.top, self.aux, self.balance = top, aux, None

    def forward(self, x):
        """x (..., width) -> (..., width)."""
        flat = x.flatten(0, -2)
        with torch.autocast(x.device.type, enabled=False):  # else near ties choose other experts
            weights, g = route(F.linear(upcast(flat), upcast(self.router.weight)), self.top)
        value = balance(g)
        self.balance = value.detach()
        parts = [w[:, None].to(x.dtype) * e(flat) for w, e in zip(weights.T, self.experts)]
        out = sum(parts)
        if self.training and torch.is_grad_enabled():
            out = Also.apply(out, self.aux * value)
        return out.view(x.shape)


def upcycle(student, cfg):
    """Every second layer of a GPT becomes sparse; only feed-forward layers and routers train on."""
    for layer in student.layers[::2]:
        mixture = Mixture(layer.mlp, student.config.hidden_size, cfg.experts, cfg.top, cfg.aux)
        layer.mlp = mixture.to(student.embed_tokens.weight.device)
    student.requires_grad_(False)
    for layer in student.layers:
        layer.mlp.requires_grad_(True)
    student.save_pretrained = None  # a Llama checkpoint has no experts
    return student


def distill(lab, student, teacher, steps, sparse=False, title="distillation"):
    """Train a student to mimic a teacher on the world's demonstrations, in place.

    sparse: add the next-token loss, as in D2S.
    """
    n = min(16384, 64 * lab.few(steps))
    rows = lab.world.demonstrations(n, lab.rng("demonstrations"))
    batches = lab.batches(lab.rows(rows), 64)

    def objective(model, batch):
        with torch.no_grad():
            target = teacher.logits(batch)
        logits, nll = model.logits(batch), 0.0
        kl = mimic(target, logits, batch.mask)
        if sparse:  # from the same logits: each pass through the experts adds their balance
            logps = upcast(logits).log_softmax(-1).gather(-1, batch.target[..., None])[..., 0]
            nll = -(logps * batch.mask).sum() / batch.mask.sum()
        return kl + nll, {"KL": kl.detach()}

    how = dict(steps=steps, lr=2e-3 if sparse else 5e-3, decay=True, title=title)
    return lab.fit(student, batches, objective, **how)


def fresh(lab, teacher, width):
    """A student with random weights: the teacher's shape at another width.

    It has as many heads as the teacher, or fewer, where each has an even share of the width."""
    c = teacher.config
    heads = next(h for h in range(c.num_attention_heads, 0, -1) if width % (2 * h) == 0)
    config = GPTConfig(
        vocab_size=c.vocab_size,
        hidden_size=width,
        intermediate_size=width * c.intermediate_size // c.hidden_size,
        num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=math.gcd(heads, c.num_key_value_heads),
        max_position_embeddings=c.max_position_embeddings,
    )
    with torch.random.fork_rng(devices=[]):  # nn.init draws from the global generator
        torch.manual_seed(int(torch.randint(2**62, (), generator=lab.rng("student"))))
        return GPT(config, teacher.tokenizer).to(lab.device)


def run(lab, cfg):
    teacher = lab.base().requires_grad_(False)
    student = distill(lab, fresh(lab, teacher, cfg.width), teacher, cfg.dense, title="D2D")
    if cfg.sparse:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**62, (), generator=lab.rng("routers"))))
            student = upcycle(student, cfg)
        student = distill(lab, student, teacher, cfg.sparse, sparse=True, title="D2S")
    data = lab.preferences(teacher, k=2)
    reference = teacher if cfg.anchor == "teacher" else "start"
    return lab.align(student, data, loss, cfg, reference=reference)
