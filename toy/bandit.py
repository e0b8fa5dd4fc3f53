"""A bandit of 27 responses: the smallest world with the structure of a language model.

    prompt 0    response [0, 2, 0]    reward 1.4

There is one prompt. A response is three tokens of {0, 1, 2}, and its reward is

    r(y) = 0.8 (number of 0s - number of 2s) + 0.6 [y_1 = y_3]

so it depends on the whole response, which a policy writes token by token. The reference is a tree
of softmaxes whose logits are drawn from N(0, 0.7^2). Reward, KL and the optimum of an objective are
sums over the 27 responses (toy/exact.py), so a theorem can be checked up to rounding errors. The
reward cannot be gamed; a policy can only move too far from the reference.
"""

from toy import exact


class World(exact.World):
    """The bandit of this file. The arguments are those of `exact.World` and may define any table.

    Without `rewards`, r(y) is as above; the last symbol takes the place of 2, and the last token
    that of y_3.
    """

    name = "bandit"
    align = dict(prompts=8192, steps=200, lr=0.05, batch_size=512)

    def __init__(self, vocab=3, length=3, prompts=1, *, rewards=None, **kwargs):
        def default(y):
            extremes = (y == 0).sum(1) - (y == vocab - 1).sum(1)
            return 0.8 * extremes + 0.6 * (y[:, 0] == y[:, -1])

        rewards = default if rewards is None else rewards
        super().__init__(vocab, length, prompts, rewards=rewards, **kwargs)
