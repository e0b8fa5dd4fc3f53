"""r2q - From r to Q*: Your Language Model is Secretly a Q-Function (2024), arXiv:2404.12358

DPO is derived for whole responses. In the token-level MDP, a state s is the prompt with the tokens
so far and an action a is the next token. There DPO is inverse Q-learning: the logits are Q* up to a
constant of the state, and beta times a token's log-ratio is its advantage:

    Q(s,a) = r(s,a) + beta log pi_ref(a|s) + V(s')                                          (eq. 7)
    A(s,a) = beta log pi(a|s) / pi_ref(a|s) = r(s,a) + V(s') - V(s)                        (eq. 10)
    loss = -log sigmoid(sum_t A(y_w,t) - sum_t A(y_l,t))                                    (eq. 9)

A shows where a response goes wrong, and beam search over log-probs follows the policy's own value
function. Over samples of the reference, sum_t A has mean -beta KL(pi_ref || pi) (eq. 16), so after
SFT on chosen responses their reward falls.

Differences from the paper
1. Proxy tuning follows eq. 14, since eq. 15 omits the reference.
2. Beam scores are not divided by length.
3. Truncated responses are treated as ended.

    python train.py --method r2q                        wrong steps get low token rewards
    python train.py --method r2q --reference chosen     first SFT on the chosen responses
"""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from data import Paper, UserError, check_fields, fill_variant, pair, printable, upcast

PAPER = Paper(
    "pairs",
    worlds=("text", "table"),
    ignores=("k",),
    defaults=dict(world="arithmetic", steps=60, lr=5e-5),
)
REFERENCES = dict(base={}, chosen=dict(sft_steps=100))


@dataclass(frozen=True)
class Config:
    beta: float = 0.1  # strength of the pull to the reference; 0.1 in the paper (app. G)
    reference: str = "base"  # base, or chosen: the base model after SFT on the chosen responses
    sft_steps: int | None = None  # steps of SFT for reference = chosen

    def __post_init__(self):
        fill_variant(self, REFERENCES, "reference")
        check_fields(self, beta="(0, inf)", sft_steps="[1, inf)")


def token_rewards(logps, ref_logps, cfg):
    """A (eq. 10) of every token, in the shape of the log-probs and in float32 or better."""
    logps, ref_logps = upcast(logps, ref_logps)
    return cfg.beta * (logps - ref_logps)


def loss(logps, ref_logps, batch, cfg):
    """logps, ref_logps (B, 2, T), chosen first, 0 outside batch.mask -> losses (B,), metrics."""
    logps, ref_logps = pair(logps, ref_logps, batch)
    advantage = token_rewards(logps, ref_logps, cfg)  # (B, 2, T)
    # the SUM over tokens telescopes to R - V(s_0), and V(s_0) cancels between two responses
    chosen, rejected = advantage.sum(-1).unbind(1)  # (B,)
    losses = -F.logsigmoid(chosen - rejected)  # eq. 9
    chosen, rejected = chosen.detach().mean(), rejected.detach().mean()
    return losses, {"chosen_reward": chosen, "rejected_reward": rejected}


def sft_loss(logps, ref_logps, batch, cfg):
    """SFT on the chosen response: its mean negative log-prob per token -> losses (B,), {}."""
    return -logps[:, 0].sum(-1) / batch.mask[:, 0].sum(-1), {}


def proxy_tune(base, policy, reference, power=1.0):
    """Log-probs (..., V) of pi_base (pi / pi_ref)^power, normalized (eq. 14)."""
    return (base + power * (policy - reference)).log_softmax(-1)


@torch.no_grad()
def beam_search(model, prompt, width, length, end=None):
    """Beam search for the largest SUM of log-probs (eq. 13) -> (token ids, that sum).

    width 1 is greedy search. A beam that ended with the token `end` keeps its sum and competes
    with the others. UserError: width < 1.
    """
    if width < 1:
        raise UserError(f"width = {width} must be at least 1")
    written = torch.zeros(1, 0, dtype=torch.long)
    score, done = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.bool)
    for _ in range(length):
        logps = model.next_logps(prompt, written)  # (n, V)
        if end is not None:  # a finished beam repeats `end` with log-prob 0
            logps[done] = torch.where(torch.arange(logps.shape[1]) == end, 0.0, -torch.inf).double()
        total = (score[:, None] + logps).flatten()
        score, place = total.topk(min(width, len(total)))
        parent, token = place // logps.shape[1], place % logps.shape[1]
        written = torch.cat([written[parent], token[:, None]], 1)
        done = token == (-1 if end is None else end)
        if done[0]:  # sums never rise, so no other beam can overtake a finished best beam
            break
    ids = written[0].tolist()
    return (ids[: ids.index(end)] if end in ids else ids), score[0].item()


def beam_rewards(lab, model, prompts, widths=(1, 5)):
    """{width: mean true reward of the responses that beam search finds}."""
    table, rewards = lab.world.kind == "table", {}
    length, end = (model.length, None) if table else (lab.max_response, model.tokenizer.eot)
    for width in widths:
        found = [beam_search(model, prompt, width, length, end)[0] for prompt in prompts]
        rows = [dict(prompt=p, responses=[ids]) for p, ids in zip(prompts, found)]
        rewards[width] = sum(truth[0] for truth in lab.truth(rows)) / len(rows)
    return rewards


def show_credit(world, prompt, response, values):
    """A response (token ids) as text with the reward of each token and the steps that are wrong."""
    pieces = [printable(world.tokenizer.decode([i])) for i in response]
    lines = [f"token rewards of a rejected response to {printable(prompt)}"]
    lines.append(" ".join(f"{piece}[{value:+.2f}]" for piece, value in zip(pieces, values)))
    if world.verify_steps is not None:
        marks = world.verify_steps(prompt, response)
        wrong = [str(n) for n, right in enumerate(marks, 1) if not right]
        lines.append(f"wrong steps: {', '.join(wrong) or 'none'}")
    return "\n    ".join(lines)


def run(lab, cfg):
    """DPO on pairs from the base model (or --data), after SFT if reference = chosen.

    Prints the token rewards of a rejected response and the true reward of beam search.
    """
    policy = lab.base()
    data = lab.preferences(policy, k=2)
    if cfg.reference == "chosen":
        policy = lab.align(policy, data, sft_loss, cfg, reference=None, steps=cfg.sft_steps)
    reference = copy.deepcopy(policy).eval()
    policy = lab.align(policy, data, loss, cfg)
    if lab.quiet or lab.world.reward is None:
        return policy
    if lab.world.kind == "text":
        row = {name: data[-1][name][1:] for name in ("responses", "ends")}
        row["prompt"] = data[-1]["prompt"]
        logps, ref_logps = (torch.tensor(lab.logps(m, [row])[0][0]) for m in (policy, reference))
        values = token_rewards(logps, ref_logps, cfg).tolist()
        print(show_credit(lab.world, lab.text(row["prompt"]), row["responses"][0], values))
    rewards = beam_rewards(lab, policy, lab.world.prompts(32, lab.rng("beams")))
    found = ", ".join(f"width {width} {reward:.3f}" for width, reward in rewards.items())
    print(f"true reward of beam search: {found}")
    return policy
