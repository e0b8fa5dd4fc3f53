"""The idea of this project, cell by cell, in a notebook, an editor that knows `# %%`, or a script.

python docs/tour.py
"""

# %% One pair of responses. A loss sees only a model's log-probs.
import os
import sys
from types import SimpleNamespace

import torch

# a notebook has no __file__; it starts in docs/, or in the folder above, which it finds anyway
here = os.path.dirname(os.path.abspath(globals().get("__file__", "tour.py")))
sys.path.insert(0, os.path.join(here, ".."))

from methods import dpo

# log-probs (B, K, T) of one pair with three tokens per response, the chosen response first
ref_logps = torch.tensor([[[-1.0, -2.0, -1.5], [-0.5, -1.0, -2.5]]])
logps = ref_logps.clone().requires_grad_()
batch = SimpleNamespace(mask=torch.ones(1, 2, 3, dtype=torch.bool))

# %% At the reference the margin is 0 and the loss is ln 2. All tokens have gradients of one size.
losses, metrics = dpo.loss(logps, ref_logps, batch, dpo.Config(beta=0.1))
(slope,) = torch.autograd.grad(losses.sum(), logps)
print(f"loss {losses.item():.4f}, which is ln 2")
for i, name in enumerate(["chosen", "rejected"]):
    print(f"gradient of the {name} tokens:", " ".join(f"{x:+.3f}" for x in slope[0, i]))

# %% One step of DPO: the chosen response becomes more likely, and the rejected one less.
after = logps.detach() - 1.0 * slope
ratio = (after - ref_logps).sum(-1)[0]  # log-ratios of chosen and rejected: SUM over tokens
print(f"log-ratios after one step: chosen {ratio[0]:+.3f}, rejected {ratio[1]:+.3f}")


# %% The line that you change: as in IPO, the margin should be 1 instead of as large as possible.
def loss(logps, ref_logps, batch, cfg):
    """logps, ref_logps (B, 2, T), chosen first -> losses (B,), metrics."""
    chosen, rejected = (logps - ref_logps).sum(-1).unbind(1)
    z = cfg.beta * (chosen - rejected)
    return (z - 1.0).square(), {}


# %% A run of DPO from Python, in a table, where the true reward is exact.
from lab import Lab, Settings

lab = Lab(Settings(world="bandit", steps=200, prompts=512), quiet=True)
policy = dpo.run(lab, dpo.Config())
print("true reward by step:", " ".join(f"{look['reward']:.2f}" for look in policy.curve[::5]))

# %% The Lab trains with both losses on the same pairs.
curves = lab.race({"dpo": (dpo.loss, dpo.Config()), "changed": (loss, dpo.Config())})
for name, (curve,) in curves.items():
    start, end = curve[0], curve[-1]
    print(f"{name}: true reward {start['reward']:.2f} -> {end['reward']:.2f}, KL {end['kl']:.2f}")

# %% Plot the true reward against the KL that it costs.
from matplotlib.figure import Figure

figure = Figure(figsize=(5, 3.5), layout="constrained")
axes = figure.subplots()
for name, (curve,) in curves.items():
    axes.plot([look["kl"] for look in curve], [look["reward"] for look in curve], "o-", label=name)
axes.set(xlabel="KL from the base model (nats)", ylabel="true reward")
axes.legend()
figure.savefig("tour.png", dpi=110)
print("tour.png: the true reward against the KL")
