"""The world of six tokens: the reward of every token, and a policy that generalizes."""

from types import SimpleNamespace

import pytest
import torch

from toy import tokens


def test_rewards_of_tokens_add_up_to_the_reward_of_a_response_and_the_policy_starts_uniform():
    world = tokens.World()
    y = world.reference.sequences()
    assert world.token_reward.shape == (1365, 4) and len(y) == 4096
    total = [
        0.5 * ids.count(1) - 2.0 * sum(pair == (0, 3) for pair in zip(ids, ids[1:]))
        for ids in y.tolist()
    ]
    assert world.truth[0].tolist() == pytest.approx(total)
    assert world.reward([0], [[0, 3, 1, 1, 0, 3]]).item() == pytest.approx(-3.0)
    policy = world.model()
    torch.testing.assert_close(policy.log_probs(), world.reference.log_probs())
    batch = SimpleNamespace(
        label=torch.zeros(1, dtype=torch.long),
        target=y[None, :5],
        mask=torch.ones(1, 5, 6, dtype=torch.bool),
    )
    with torch.no_grad():
        policy.net[2].weight.normal_()
    torch.testing.assert_close(
        policy.logps(batch).sum(-1).double(), policy.log_probs()[:, :5], rtol=0, atol=1e-5
    )
    log_pi = policy.logits[0].log_softmax(-1)
    torch.testing.assert_close(world.along(log_pi, y[:5]), policy.logps(batch)[0])
