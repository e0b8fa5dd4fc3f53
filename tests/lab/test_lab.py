"""The Lab: random numbers, stages, races, and what its verbs refuse."""

import pytest
import torch

from data import StopTraining, UserError
from lab import Lab, Settings, evaluate, store
from methods import dpo
from toy import bandit, trie

TINY = dict(world="reviews", base_steps=4, prompts=16, steps=4, batch_size=8, eval_size=8)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Lab, "memory", {})


def tiny(out=None, **changes):
    return Lab(Settings(**(TINY | {"max_response": 6} | changes)), out, quiet=True)


def table(**changes):
    return Lab(Settings(**(dict(world="bandit", prompts=16, steps=4) | changes)), quiet=True)


def numbers(rng):
    return torch.rand(3, generator=rng).tolist()


# ---------------------------------------------------------------- random numbers


def test_a_generator_depends_on_the_seed_the_name_and_the_key_alone():
    lab, other = (
        table(),
        table(seed=1),
    )
    first = numbers(lab.rng("labels"))
    lab.base()
    lab.preferences(lab.base(), k=2)
    assert numbers(lab.rng("labels")) == first
    others = [lab.rng("labels", 1), lab.rng("order"), other.rng("labels"), lab.rng("labels", "1")]
    assert all(numbers(rng) != first for rng in others)


@pytest.mark.slow
def test_the_base_model_depends_on_base_seed_alone_and_leaves_the_global_generator_as_it_was():
    torch.manual_seed(5)
    expected = torch.rand(1).item()
    torch.manual_seed(5)
    base = tiny().base()
    assert torch.rand(1).item() == expected
    again, other = tiny(seed=3).base(), tiny(base_seed=1).base()
    weight = base.embed_tokens.weight
    assert torch.equal(again.embed_tokens.weight, weight)
    assert not torch.equal(other.embed_tokens.weight, weight)


@pytest.mark.slow
def test_an_added_diagnostic_changes_no_later_sample(tmp_path):
    def run(lab, curious):
        policy = lab.base()
        data = lab.preferences(policy, k=2)
        if curious:
            lab.sample(policy, lab.world.prompts(3, lab.rng("asked")), 2)
            lab.logps(policy, data)
            lab.evaluate(policy)
        return lab.align(policy, data, dpo.loss, dpo.Config())

    weights = [run(tiny(), curious).state_dict() for curious in (False, True)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.slow
def test_a_key_asks_for_other_prompts_and_samples():
    lab = tiny()
    base = lab.base()
    one, same, other = (lab.preferences(base, k=2, key=key) for key in ((), (), (1,)))
    assert [r["responses"] for r in one] == [r["responses"] for r in same]
    assert [r["responses"] for r in one] != [r["responses"] for r in other]


# ---------------------------------------------------------------- races


@pytest.mark.slow
def test_every_arm_of_a_race_sees_the_same_rows_order_and_noise():
    lab = Lab(Settings(), quiet=True, seeds=2)
    seen = {"a": [], "b": []}

    def watched(name):
        def loss(logps, ref_logps, batch, cfg):
            seen[name].append(batch.tokens.clone())
            return dpo.loss(logps, ref_logps, batch, cfg)

        return loss

    arms = {name: (watched(name), dpo.Config()) for name in seen}
    arms["own"] = lambda lab: lab.align(lab.base(), lab.pairs(lab.base()), dpo.loss, dpo.Config())
    curves = lab.race(arms, end=lambda lab, policy: {"extra": 1.0}, max_response=6, **TINY)
    assert all(torch.equal(x, y) for x, y in zip(seen["a"], seen["b"], strict=True))
    for look in [look for curve in curves["own"] for look in curve]:
        assert look.pop("samples") > 0  # the arm asks for the rows itself, so they count as its own
    assert curves["a"] == curves["b"] == curves["own"] and len(curves["a"]) == 2
    assert curves["a"][0] != curves["a"][1]  # the second seed
    assert curves["a"][0][-1]["extra"] == 1.0 and "extra" not in curves["a"][0][0]
    assert curves["a"][0][0]["kl"] == 0


@pytest.mark.slow
def test_the_arms_of_a_race_share_the_first_look_which_has_the_spread_of_the_reward(monkeypatch):
    calls, kl = [], evaluate.sequence_kl  # which is measured once for new samples

    def counting(lab, policy, reference, rows):
        calls.append((lab.settings.base_seed, len(rows)))
        return kl(lab, policy, reference, rows)

    monkeypatch.setattr(evaluate, "sequence_kl", counting)
    lab = Lab(Settings(seed=7), quiet=True, seeds=2)
    arms = {f"beta {beta}": (dpo.loss, dpo.Config(beta=beta)) for beta in (0.1, 1.0)}
    curves = lab.race(arms, max_response=6, eval_every=2, **TINY)
    # the first look, and two looks at each arm, on all prompts
    assert calls == [(7, 8)] * 5 + [(8, 8)] * 5
    first, other = (curves[name][0][0] for name in arms)
    assert first == other and first["reward_sd"] > 0
    assert curves["beta 0.1"][1][0]["reward"] != first["reward"]  # another base model


def test_the_world_of_a_race_may_depend_on_the_seed():
    lab, seen = Lab(Settings(seed=7), quiet=True, seeds=2), []

    def arm(lab):
        seen.append(lab.world)
        rows = lab.rows([dict(prompt=0, responses=[[0] * 4, [1] * 4], scores=[1.0, 0.0])])
        return lab.align(lab.base(), rows, dpo.loss, dpo.Config(), steps=1)

    lab.race({"dpo": arm}, world=trie.World, prompts=8)
    first, other = (world.fatal for world in seen)
    assert torch.equal(first, trie.World(7).fatal) and not torch.equal(first, other)


def test_the_spread_of_the_reward_is_exact_in_a_table():
    lab = table()
    base, r = lab.base(), lab.world.rewards()
    p = base.probs()
    mean = (p * r).sum()
    assert evaluate.reward_sd(lab)["reward_sd"] == pytest.approx(
        (p * (r - mean).square()).sum().sqrt().item()
    )


@pytest.mark.slow
def test_a_race_goes_on_where_it_was_interrupted(tmp_path):
    def race(out, fail):
        lab = Lab(Settings(), str(out), quiet=True)
        calls = []

        def loss(logps, ref_logps, batch, cfg):
            calls.append(1)
            if len(calls) == fail:
                raise KeyboardInterrupt
            return dpo.loss(logps, ref_logps, batch, cfg)

        arms = {"a": (dpo.loss, dpo.Config()), "b": (loss, dpo.Config())}
        return lab.race(arms, max_response=6, **TINY)

    whole = race(tmp_path / "whole", 0)
    with pytest.raises(KeyboardInterrupt):
        race(tmp_path / "cut", 3)
    assert race(tmp_path / "cut", 0) == whole


def test_worlds_given_as_objects_are_kept_apart():
    lab = Lab(Settings(world="bandit", prompts=64, steps=3), quiet=True)
    small, large = bandit.World(vocab=2, length=1), bandit.World(vocab=5, length=1)
    rows = [lab.at(world=world) for world in (small, large)]
    found = [here.preferences(here.base(), k=2) for here in rows]
    tokens = [
        {y for row in rows for response in row["responses"] for y in response} for rows in found
    ]
    assert tokens[0] <= {0, 1} and max(tokens[1]) > 1


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, 2.0),
        (dict(flip=0.3, label_temperature=0.5), 2.0),
        (dict(world="game", flip=0.1), 2.0),
        (dict(world="game", label_temperature=0), 4 / 3),  # equal responses in one pair of three
    ],
)
def test_pairs_are_labelled_with_the_probability_that_prefers_returns(settings, expected):
    lab = table(prompts=4000, **settings)
    rows = lab.preferences(lab.base(), k=2)
    first, second = zip(*(row["responses"] for row in rows))
    p = lab.prefers([row["prompt"] for row in rows], first, second)
    assert p.shape == (4000,) and p.dtype == torch.float64
    other = lab.prefers([row["prompt"] for row in rows], second, first)
    torch.testing.assert_close(p + other, torch.ones_like(p))
    # a row has its order with probability p, so E[1 / p] is 2, and 1 where p is 0 or 1
    assert (1 / p).mean().item() == pytest.approx(expected, abs=0.15)


def test_rows_of_ones_own_are_labelled_as_preferences_are():
    world = bandit.World(3, 1, rewards=torch.tensor([0.0, 1.0, 3.0]))
    lab = Lab(Settings(world="bandit", label_temperature=0), quiet=True, world=world)
    rows = [dict(prompt=0, responses=[[0], [2]], scores=[9, 9], path=["to 0", "to 2"], step=4)]
    (row,) = lab.label(rows)
    assert row["responses"] == [[2], [0]] and row["reward"] == [3, 0] and row["scores"] == [1, 0]
    assert row["path"] == ["to 2", "to 0"] and row["step"] == 4
    (row,) = lab.label([dict(prompt=0, responses=[[1], [0], [2]])])
    assert row["scores"] == [1, 0, 3]
    noisy = Lab(Settings(world="bandit"), quiet=True, world=world)
    many = rows * 200
    with noisy.in_round(3):
        first = noisy.label(many)
    again = noisy.label(many, key=[3])
    assert first == again != noisy.label(many)  # the labels depend on the round


def test_preferences_have_the_noise_of_the_run():
    world = bandit.World(3, 1, rewards=torch.tensor([0.0, 1.0, 3.0]))
    one, two = [[0], [2]], [[1], [1]]

    def asked(**noise):
        settings = Settings(world="bandit", **noise)
        return Lab(settings, quiet=True, world=world).prefers([0, 0], one, two)

    plain = torch.sigmoid(torch.tensor([-1.0, 2.0], dtype=torch.float64))
    torch.testing.assert_close(asked(), plain)
    torch.testing.assert_close(asked(flip=0.2), 0.2 + 0.6 * plain)
    torch.testing.assert_close(asked(label_temperature=2.0), torch.sigmoid(torch.logit(plain) / 2))
    assert asked(label_temperature=0, flip=0.25).tolist() == [0.25, 0.75]
    assert Lab(Settings(world="game"), quiet=True).prefers([0, 0, 0], [[0], [1], [2]], [[1]] * 3)[
        0
    ] == pytest.approx(0.9)


def test_longer_responses_are_preferred_under_a_length_bias():
    lab = tiny(length_bias=0.5)
    a, b = " good", " good good good"
    prompts, texts = ["review of the camera :"], [lab.tokens(x) for x in (a, b)]
    reward = lab.world.reward(prompts * 2, [a, b])
    expected = torch.sigmoid(reward[:1] - reward[1:] - 0.5 * 2)
    torch.testing.assert_close(lab.prefers(prompts, [a], [b]), expected)
    torch.testing.assert_close(lab.prefers(prompts, texts[:1], texts[1:]), expected)


def test_a_verifier_has_no_noise_but_flips():
    lab = Lab(Settings(world="arithmetic", flip=0.1), quiet=True)
    right, wrong = "3+4+0=07:7", "3+4+0=08:8"
    asked = lab.prefers(["3+4="] * 3, [right, wrong, right], [wrong, right, right])
    assert asked.tolist() == pytest.approx([0.9, 0.1, 0.5])


@pytest.mark.slow
def test_samples_end_at_max_tokens():
    lab = tiny()
    base, prompts = lab.base(), lab.world.prompts(8, lab.rng("asked"))
    rows = lab.sample(base, prompts, 4, max_tokens=2)
    assert max(len(ids) for row in rows for ids in row["responses"]) == 2
    longest = max(len(ids) for row in lab.sample(base, prompts, 4) for ids in row["responses"])
    assert longest == 6


@pytest.mark.slow
def test_no_rows_are_refused_before_anything_is_trained():
    lab = tiny()
    with pytest.raises(UserError, match="there are no rows to align on"):
        lab.align(lab.base(), [], dpo.loss, dpo.Config())
    with pytest.raises(UserError, match="no rows to align on in round 0"):
        lab.align(lab.base(), lambda policy, round: [], dpo.loss, dpo.Config(), every=2)


def test_a_reference_or_a_schedule_that_means_nothing_is_refused():
    lab = table()
    policy = lab.base()
    with pytest.raises(UserError, match="reference 'strat'"):
        lab.align(policy, [1], dpo.loss, dpo.Config(), reference="strat")
    for how in (dict(reference="average"), dict(decay=0.5), dict(reference=None, decay=0.5)):
        with pytest.raises(UserError, match="needs decay=, and no other reference reads it"):
            lab.align(policy, [1], dpo.loss, dpo.Config(), **how)
    for decay in (-0.1, 1.0):
        with pytest.raises(UserError, match="below 1"):
            lab.align(policy, [1], dpo.loss, dpo.Config(), reference="average", decay=decay)
    with pytest.raises(UserError, match="every="):
        lab.align(policy, lambda policy, round: [], dpo.loss, dpo.Config())


@pytest.mark.parametrize("decay", [0.7, 0.0])
def test_a_reference_can_be_the_moving_average_of_the_policy(decay):
    """Each step meets the average of the weights before it, whose decay is that of the call."""
    lab = Lab(Settings(world="bandit", steps=6, prompts=64, batch_size=8), quiet=True)
    weights, met = [], []

    def loss(logps, ref_logps, batch, cfg):
        weights.append(policy.logits.detach().clone())
        met.append(ref_logps)
        return dpo.loss(logps, ref_logps, batch, cfg)

    policy = lab.base()
    data = lab.preferences(policy, k=2)
    batches = []
    prepare = lambda policy, batch: batches.append(batch) or batch  # noqa: E731
    how = dict(reference="average", decay=decay, prepare=prepare)
    lab.align(policy, data, loss, dpo.Config(), **how)
    average, other = weights[0].clone(), lab.base()
    for weight, batch, ref_logps in zip(weights, batches, met, strict=True):
        average = decay * average + (1 - decay) * weight
        with torch.no_grad():
            other.logits.copy_(average)
            torch.testing.assert_close(other.logps(batch), ref_logps)
    assert decay == 0 or (weights[-1] - average).abs().max() > 1e-3


def test_every_round_takes_the_next_rows_of_a_file(tmp_path):
    rows = [f'{{"prompt": "p{i}", "chosen": "a", "rejected": "b"}}' for i in range(20)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows))
    settings = Settings(data=str(tmp_path / "pairs.jsonl"), base_steps=0, prompts=1000)
    lab = Lab(settings, quiet=True)
    lab.base()
    count, parts = len(lab.world.train), []
    for round in range(3):
        with lab.in_round(round):
            parts += [lab.text(row["prompt"]) for row in lab.preferences(None, k=2, n=count - 3)]
    whole = [lab.text(row["prompt"]) for row in lab.preferences(None, k=2)]
    assert len(whole) == count and parts == (3 * whole)[: len(parts)]


def test_an_alignment_in_rounds_is_one_alignment_after_the_other():
    """Each round has its own rows, its share of the steps, and the policy before as reference."""

    def parts(lab):
        return [lab.preferences(lab.base(), k=2, n=8, key=(i,)) for i in range(3)]

    def table():
        return Lab(Settings(world="bandit", steps=7, batch_size=4, eval_every=1), quiet=True)

    lab, met = table(), []
    rows, policy = parts(lab), lab.base()
    data = lambda policy, i: met.append(policy.logits.detach().clone()) or rows[i]  # noqa: E731
    together = lab.align_in_rounds(policy, data, dpo.loss, dpo.Config(), 3)
    lab = table()
    rows, policy = parts(lab), lab.base()
    for i, steps in enumerate((2, 3, 2)):
        assert torch.equal(policy.logits, met[i])
        policy = lab.align(policy, rows[i], dpo.loss, dpo.Config(), steps=steps)
    assert torch.equal(policy.logits, together.logits)
    assert [look["step"] for look in together.curve] == list(range(8))
    assert together.curve[-1]["reward"] == policy.curve[-1]["reward"]


def test_the_rows_of_a_round_are_its_own():
    lab, drawn = Lab(Settings(world="bandit", steps=3, batch_size=4), quiet=True), []

    def data(policy, i):
        drawn.append(lab.preferences(policy, k=2, n=8))
        return drawn[-1]

    lab.align_in_rounds(lab.base(), data, dpo.loss, dpo.Config(), 3)
    assert drawn[0] != drawn[1] != drawn[2]


def test_rounds_end_where_there_is_nothing_to_learn():
    lab = Lab(Settings(world="bandit", steps=6, batch_size=4), quiet=True)
    policy = lab.base()
    rows = lab.preferences(policy, k=2, n=8)

    def data(policy, i):
        if i == 1:
            raise StopTraining("all are right")
        return rows

    with pytest.raises(UserError, match="rounds = 0"):
        lab.align_in_rounds(policy, data, dpo.loss, dpo.Config(), 0)
    policy = lab.align_in_rounds(policy, data, dpo.loss, dpo.Config(), 2)
    assert lab.stopped == "stopped after step 3: all are right"
    assert policy.curve[-1]["step"] == 3
