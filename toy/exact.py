"""What is computed exactly in a table: the policy that minimizes an expected loss."""

import torch

from data import collate


def population(world, pairs, loss, cfg):
    """The Table that minimizes the mean of weight * loss over weighted pairs, in float64.

    world: a table (toy/bandit.py); its reference is the reference of the loss and the start.
    pairs: rows with a column `weight`, as `World.pairs_all` gives them. loss(logps, ref_logps,
    batch, cfg) -> losses, metrics, as in methods/. The optimizer is L-BFGS.
    """
    policy, batch = world.model().double(), collate(pairs)
    ref_logps, weight = policy.logps(batch).detach(), batch.weight.double()
    optimizer = torch.optim.LBFGS(
        policy.parameters(),
        max_iter=500,
        tolerance_grad=1e-12,
        tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        losses, _ = loss(policy.logps(batch), ref_logps, batch, cfg)
        value = (weight * losses).mean()
        value.backward()
        return value

    optimizer.step(closure)
    return policy
