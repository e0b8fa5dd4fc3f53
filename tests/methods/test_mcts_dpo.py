"""MCTS-DPO: the card's numbers of the search, the pairs of a tree, smoothing, and runs."""

import math

import pytest
import torch

from claims import mcts_dpo as claims
from data import UserError, collate
from lab import Lab, Settings
from methods import dpo, mcts_dpo
from methods.mcts_dpo import (
    Config,
    Node,
    backup,
    loss,
    printed,
    rollout,
    rows_of,
    run,
    select,
    siblings,
    tree_search,
    trees,
)
from tests import builders


def with_doubt(item, doubt):
    rows = item[0].shape[0]
    return builders.changed(item, doubt=torch.as_tensor(doubt, dtype=torch.float64).expand(rows))


def child(parent, **about):
    node = Node(parent.ids + [len(parent.children)], parent, **about)
    parent.children.append(node)
    return node


# ---- the loss


@pytest.mark.paper
@pytest.mark.parametrize(
    "doubt, value, slope",
    [(0.0, 0.598139, -0.450166), (0.25, 0.648139, -0.200166), (0.5, 0.698139, 0.0498340)],
)
def test_losses_and_slopes_of_the_card(doubt, value, slope):
    item = with_doubt(builders.one_pair(2.0, 0.0), doubt)
    losses, gradient = builders.value_and_gradient(loss, *item, Config())
    assert losses.item() == pytest.approx(value, abs=1e-6)
    assert gradient.flatten().tolist() == pytest.approx([0.1 * slope, -0.1 * slope], abs=1e-7)


@pytest.mark.paper
def test_the_margin_of_a_smoothed_label_is_finite():
    best = math.log(0.75 / 0.25) / 0.1
    assert best == pytest.approx(10.9861, abs=1e-4)
    item = with_doubt(builders.one_pair(best, 0.0), 0.25)
    _, gradient = builders.value_and_gradient(loss, *item, Config())
    assert gradient.abs().max() < 1e-9


@pytest.mark.paper
def test_without_doubt_it_is_dpo():
    item = builders.ragged()
    ours = builders.value_and_gradient(loss, *with_doubt(item, 0.0), Config(0.3))
    plain = builders.value_and_gradient(dpo.loss, *item, dpo.Config(0.3))
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-15)


# ---- the search


@pytest.mark.paper
def test_the_rule_picks_the_unvisited_child_of_the_card():
    root = Node([], N=9)
    for Q, p, N in ((0.2, 0.5, 3), (0.1, 0.3, 0), (0.3, 0.2, 5)):
        child(root, Q=Q, prior=p, N=N)
    scores = [c.Q + math.sqrt(9) * c.prior / (1 + c.N) for c in root.children]
    assert scores == pytest.approx([0.575, 1.0, 0.4])
    assert select(root, 1.0) is root.children[1]
    assert select(root, 0.0) is root.children[2]
    root.N = 0  # the prior counts at a fresh node, too
    for c in root.children:
        c.Q = c.N = 0
    assert select(root, 1.0) is root.children[0]


@pytest.mark.paper
def test_values_are_backed_up_with_the_visits_as_weights():
    root = Node([], N=3)
    a, b = child(root, R=0.6, N=2, Q=0.0), child(root, R=0.4, N=0, Q=0.4)
    right = child(a, R=1.7, N=1, ended=True, Q=1.1)
    child(a, R=-0.6, ended=True, Q=-1.2)
    backup([root, a, right])
    assert right.Q == pytest.approx(1.1) and right.N == 2
    assert a.Q == pytest.approx(0.6 + 1.1) and a.N == 3
    assert root.Q == pytest.approx(1.7) and root.N == 4 and b.Q == 0.4


@pytest.mark.paper
def test_rewards_of_steps_telescope_along_a_path():
    rng = torch.Generator().manual_seed(0)
    root = node = Node([])
    path = [root]
    for _ in range(5):
        node = child(node, R=torch.rand((), generator=rng).item())
        path.append(node)
    backup(path)
    for parent, node in zip(path, path[1:]):
        assert node.Q == pytest.approx(path[-1].R - parent.R)
    assert root.Q == pytest.approx(path[-1].R)


def grown(width=2, depth=3):
    """A grow function of complete trees: a path of zeros is right, everything else is wrong."""
    calls = []

    def grow(nodes, places):
        calls.append(len(nodes))
        for node in nodes:
            assert not node.children and not node.ended
            for _ in range(width):
                new = child(node, prior=1 / width, ended=len(node.ids) + 1 == depth)
                right = not any(new.ids)
                new.R = (1.0 if right else 0.0) + (2.0 * right - 1.0) * new.ended
                new.Q = new.R - node.R

    return grow, calls


def test_every_simulation_ends_and_all_roots_grow_in_one_batch():
    grow, calls = grown()
    roots = [Node([]) for _ in range(3)]
    tree_search(roots, grow, Config(simulations=6))
    assert [root.N for root in roots] == [6, 6, 6]
    assert calls[:3] == [3, 3, 3]
    for root in roots:
        node = root
        while node.children:
            assert sum(c.N for c in node.children) == node.N
            node = max(node.children, key=lambda n: n.N)
        assert node.ids == [0, 0, 0]


@pytest.mark.paper
def test_pairs_are_siblings_on_the_most_visited_path():
    root = Node([], N=40)
    a = child(root, Q=0.2, N=10)
    b = child(root, Q=0.9, N=30)
    child(a, Q=5.0, N=9)
    c, d, e = (child(b, Q=Q, N=N) for Q, N in ((0.1, 10), (0.4, 10), (0.3, 9)))
    found = siblings(root, True)
    assert found == [(b, a, 0.25), (d, c, 0.5)]
    assert [doubt for *_, doubt in siblings(root, False)] == [0.0, 0.0]
    d.Q = c.Q = e.Q = 0.1  # equal values are no pair
    assert siblings(root, True) == [(b, a, 0.25)]
    assert siblings(Node([]), True) == []


@pytest.mark.paper
def test_the_path_of_the_pairs_goes_on_at_the_most_visited_child_and_not_at_the_best():
    root = Node([], N=9)
    a, b = child(root, Q=0.2, N=8), child(root, Q=0.9, N=1)
    better, worse = child(a, Q=0.7, N=4), child(a, Q=0.1, N=4)
    child(b, Q=9.0, N=1), child(b, Q=8.0)
    assert siblings(root, True) == [(b, a, 0.5), (better, worse, 0.5)]


@pytest.mark.paper
@pytest.mark.parametrize(
    "better, worse, doubt", [(30, 10, 0.25), (10, 10, 0.5), (20, 0, 0.0), (5, 15, 0.5)]
)
def test_the_smoothing_is_the_share_of_visits_and_at_most_a_half(better, worse, doubt):
    root = Node([])
    child(root, Q=1.0, N=better), child(root, Q=0.0, N=worse)
    assert siblings(root, True)[0][2] == doubt


def test_without_visits_there_is_no_doubt():
    root = Node([])
    child(root, Q=1.0), child(root, Q=0.0)
    assert siblings(root, True)[0][2] == 0.0


# ---- steps and rows


def written(monkeypatch, *texts):
    """A Lab on sums whose policy writes these (text, ends with end-of-text) at every node."""
    lab = Lab(Settings(world="arithmetic", base_steps=0), quiet=True)

    def sample(policy, prompts, k, rng=None, max_tokens=None):
        ids, ends = [lab.tokens(text) for text, _ in texts], [end for _, end in texts]
        return [dict(prompt=x, responses=ids, ends=ends) for x in prompts]

    monkeypatch.setattr(lab, "sample", sample)
    return lab


def test_equal_steps_are_one_child_whose_prior_is_their_share(monkeypatch):
    samples = ("7+8=15,4", False), ("7+8=15,3", True), ("405", True), ("7+8=15,", True)
    lab = written(monkeypatch, *samples)
    (found,) = mcts_dpo.steps_of(lab, None, ["47+58="], [Node([])], Config(), None)
    steps = [(lab.text(step), ended, prior) for step, ended, prior in found]
    # what was sampled behind the step is cut, and so is its end-of-text
    assert steps == [("7+8=15,", False, 0.5), ("405", True, 0.25), ("7+8=15,", True, 0.25)]


def test_a_path_ends_at_the_longest_response_or_where_the_context_is_full(monkeypatch):
    lab = written(monkeypatch, ("1,", False), ("2,", False))
    lab.base()
    prompt, cfg = "47+58=", Config(simulations=2, breadth=2)

    def longest():
        (node,) = trees(lab, None, [prompt], (0,), cfg)
        while node.children:
            node = max(node.children, key=lambda child: child.N)
        assert node.ended and not node.eot
        return len(node.ids)

    lab.max_response = 6
    assert longest() == 6
    lab.max_response = 100
    lab.context = len(lab.tokens(prompt)) + 5  # one place is left for end-of-text
    assert longest() == 4


def test_without_a_judge_a_beginning_is_worth_a_half_and_an_end_its_verdict(monkeypatch):
    lab = Lab(Settings(world="arithmetic", base_steps=0), quiet=True)
    lab.world.judge = None
    ends = ["7+8+0=15,4+5+1=10,3+0+1=04:405", "7+8+0=15,4+5+1=10,3+0+1=04:415"]
    nodes = [Node(lab.tokens("7+8"))] + [Node(lab.tokens(text), ended=True) for text in ends]
    for cfg in (Config(), Config(value="constant")):
        assert mcts_dpo.values(lab, None, ["347+58="] * 3, nodes, cfg, None) == [0.5, 1.5, -0.5]


def test_a_constant_value_does_not_ask_the_judge(monkeypatch):
    lab = trie()
    monkeypatch.setattr(lab.world, "judge", None)
    silent = run(lab, Config())
    constant = run(trie(), Config(value="constant"))
    assert torch.equal(constant.logits, silent.logits)
    assert not torch.equal(constant.logits, run(trie(), Config()).logits)


@pytest.mark.paper
def test_the_policys_own_value_is_its_mean_probability_per_token_plus_the_verdict():
    lab = Lab(Settings(world="arithmetic", base_steps=0, batch_size=2), quiet=True)
    policy, prompt = lab.base(), "347+58="
    texts = ["7+8+0=15,", "7+8", "7+8+0=15,4+5+1=10,3+0+1=04:405", "7+8+0=15,4+5+1=10,3+0+1=04:415"]
    nodes = [Node(lab.tokens(text)) for text in texts]
    nodes[2].ended = nodes[2].eot = nodes[3].ended = True
    found = mcts_dpo.values(lab, policy, [prompt] * 4, nodes, Config(value="own"), None)
    for value, node, verdict in zip(found, nodes, (0, 0, 1, -1)):
        row = dict(prompt=prompt, responses=[node.ids], ends=[node.eot])
        batch = lab.collate(lab.rows([row]))
        logps = policy.logps(batch)[batch.mask]
        assert len(logps) == len(node.ids) + node.eot
        assert value - verdict == pytest.approx(logps.mean().exp().item(), rel=1e-4)
        assert 0 < value - verdict < 1


def test_in_a_table_the_own_value_ranks_siblings_as_the_prior_does():
    lab = trie()
    policy, cfg = lab.base(), Config(value="own")
    with torch.no_grad():
        policy.logits.normal_(generator=torch.Generator().manual_seed(0))
    roots = trees(lab, policy, [3, 5], (0,), cfg)
    for node in [child for root in roots for child in [root, *root.children] if child.children]:
        values = [c.R - (2 * (c.R > 0) - 1) * c.ended for c in node.children]
        priors = [c.prior for c in node.children]
        assert sorted(range(4), key=values.__getitem__) == sorted(range(4), key=priors.__getitem__)
    for root in roots:
        for c in root.children:
            assert c.R == pytest.approx(c.prior, rel=1e-5)  # one token


def test_the_base_model_searches_as_many_questions_as_all_rounds_have(monkeypatch):
    counts = []

    def noted(lab, policy, round, n, cfg):
        counts.append(n)
        return []

    monkeypatch.setattr(mcts_dpo, "rollout", noted)
    with pytest.raises(UserError):
        run(trie(steps=12, prompts=5), Config(online=False, every=4))
    assert counts == [15]


def test_the_judge_of_sums_looks_at_the_steps_so_far():
    world = Lab(Settings(world="arithmetic", base_steps=0), quiet=True).world
    texts = ["7+8+0=15,", "7+8+0=14,", "7+8+0=15", "", "7+8+0=15,4+5+1=10,3+0+1=04:"]
    done = ["7+8+0=15,4+5+1=10,3+0+1=04:405", "7+8+0=15,4+5+1=10,3+0+1=04:415"]
    n, total = 400, 0
    rng = torch.Generator().manual_seed(0)
    for _ in range(n):
        ended = [False] * 5 + [True] * 2
        total = total + world.judge(["347+58="] * 7, texts + done, ended, rng)
    means = (total / n).tolist()
    high, low = 0.67, 0.33
    assert means == pytest.approx([high, low, high, high, high, 1 + high, low - 1], abs=0.06)


def trie(**settings):
    settings = dict(steps=8, prompts=20, lr=0.5, batch_size=64) | settings
    return Lab(Settings(world="trie", **settings), quiet=True)


def test_trees_of_a_table_have_all_symbols_and_pairs_have_one_parent():
    lab = trie()
    policy, cfg = lab.base(), Config()
    roots = trees(lab, policy, [3, 5], (0,), cfg)
    for prompt, root in zip([3, 5], roots):
        assert root.N == 8 and len(root.children) == 4
        assert all(c.prior == pytest.approx(0.25) for c in root.children)
        for row in rows_of(lab, prompt, root, cfg):
            better, worse = row["responses"]
            assert row["prompt"] == prompt and better[:-1] == worse[:-1] and better != worse
            assert 0.0 <= row["doubt"] <= 0.5
        text = printed(lab, root)
        assert text[0].startswith("(the question)  N 8") and len(text) > 9
    again = trees(lab, policy, [3, 5], (0,), cfg)
    assert printed(lab, again[0]) == printed(lab, roots[0])
    assert printed(lab, trees(lab, policy, [3, 5], (1,), cfg)[0]) != printed(lab, roots[0])


@pytest.mark.paper
def test_the_steps_before_a_pair_do_not_change_the_loss():
    lab = trie()
    policy = lab.base()
    (root,) = trees(lab, policy, [3], (0,), Config())
    row = rows_of(lab, 3, root, Config())[-1]
    logps, ref_logps = torch.randn(2, 1, 2, 4, dtype=torch.float64)
    batch = collate([row])
    logps, ref_logps = (x * batch.mask for x in (logps, ref_logps))
    value = loss(logps, ref_logps, batch, Config())[0]
    logps[:, :, 0] += 1.7  # the first token is the same one in both responses
    torch.testing.assert_close(value, loss(logps, ref_logps, batch, Config())[0])


def test_rows_of_text_have_the_steps_before_in_the_prompt():
    lab = Lab(Settings(world="arithmetic", base_steps=0, max_response=12), quiet=True)
    policy, cfg = lab.base(), Config(simulations=3, tokens=4)
    rows = rollout(lab, policy, 0, 4, cfg)
    assert all(len(step) <= 4 for row in rows for step in row["responses"])
    assert all(isinstance(row["prompt"], list) and row["doubt"] <= 0.5 for row in rows)
    assert lab.samples > 0
    batch = lab.collate(lab.rows(rows))
    assert batch.doubt.shape == (len(rows),) and batch.mask.any(-1).all()


# ---- runs


def test_a_search_by_step_learns_a_trie_and_solved_questions_give_no_pair():
    lab = trie()
    policy = run(lab, Config())
    assert policy.curve[-1]["reward"] > 4 * policy.curve[0]["reward"]
    assert policy.curve[-1]["samples"] == lab.samples > 0
    solved = lab.base()
    solved.set_log_probs(lab.world.truth.log())
    assert rollout(lab, solved, 0, 20, Config(level="instance")) == []


@pytest.mark.parametrize("level", ["step", "instance"])
def test_a_search_is_printed_and_drawn_where_there_is_one(tmp_path, capsys, level):
    settings = Settings(world="trie", steps=1, prompts=4)
    run(Lab(settings, str(tmp_path)), Config(level=level))
    searched = level == "step"
    assert ("(the question)  N 8" in capsys.readouterr().out) == searched
    assert (tmp_path / "tree.png").exists() == searched


@pytest.mark.parametrize("level", ["step", "instance"])
def test_a_training_whose_questions_are_all_solved_ends_early_with_its_policy(monkeypatch, level):
    plain = mcts_dpo.rollout

    def solved_later(lab, policy, round, n, cfg):
        return [] if round else plain(lab, policy, round, n, cfg)

    monkeypatch.setattr(mcts_dpo, "rollout", solved_later)
    lab = trie()
    policy = run(lab, Config(level=level))
    assert policy.curve[-1]["step"] == 4 and "step 4: round 2 gave no pairs" in lab.stopped
    assert policy.curve[-1]["reward"] > policy.curve[0]["reward"]


@pytest.mark.parametrize("online", [True, False])
def test_a_training_without_any_pair_is_refused(monkeypatch, online):
    monkeypatch.setattr(mcts_dpo, "rollout", lambda *about: [])
    with pytest.raises(UserError, match="first questions gave no pairs"):
        run(trie(), Config(online=online))


def test_the_claims_compare_arms_at_the_tokens_that_both_have_sampled():
    curves = {
        "step": [[dict(reward=0.1), dict(reward=0.5, samples=100)]],
        "instance": [
            [dict(reward=0.1), dict(reward=0.2, samples=200), dict(reward=1.0, samples=400)]
        ],
    }
    found = claims.at_tokens(curves, ["step", "instance"])
    assert found["step"] == [0.5] and found["instance"] == pytest.approx([0.15])
    series = claims.ends("trie", curves)
    assert series["trie, step"] == [0.5] and series["trie, instance, tokens"] == [400]
    assert [line.split()[-2:] for line in claims.costs(series)[1:]] == [
        ["0.500", "100"],
        ["1.000", "400"],
    ]


@pytest.mark.parametrize(
    "settings, fields, word",
    [
        (dict(flip=0.1), {}, "--flip does nothing with level = step"),
        (dict(k=3), {}, "--k does nothing with level = step"),
        ({}, dict(breadth=3), "--breadth does nothing in a table"),
        ({}, dict(tokens=3), "--tokens does nothing in a table"),
    ],
)
def test_settings_without_effect_are_refused(settings, fields, word):
    with pytest.raises(UserError, match=word):
        run(trie(**settings), Config(**fields))


@pytest.mark.parametrize("fields", [dict(level="instance"), dict(online=False)])
def test_the_other_levels_learn_too(fields):
    policy = run(trie(**dict(k=8) if "level" in fields else {}), Config(**fields))
    assert policy.curve[-1]["reward"] > 1.5 * policy.curve[0]["reward"]


@pytest.mark.parametrize(
    "fields, word",
    [
        (dict(simulations=0), "simulations"),
        (dict(breadth=1), "breadth"),
        (dict(level="instance", breadth=3), "breadth = 3 does nothing"),
        (dict(level="instance", value="own"), "value = own does nothing"),
        (dict(value="model"), "value = model"),
        (dict(every=0), "every"),
        (dict(level="token"), "level = token"),
    ],
)
def test_wrong_fields_are_refused(fields, word):
    with pytest.raises(UserError, match=word):
        Config(**fields)


# ---- the mutants of the loss


def inputs():
    """Pairs with doubts between 0 and 1/2."""
    out = []
    for item in builders.pairs():
        rows, place = item[0].shape[0], item[0].device
        doubt = torch.linspace(0, 0.5, rows, dtype=torch.float64)
        out.append(builders.changed(item, doubt=doubt.to(place)))
    return out


CASES = [dict(), dict(beta=0.7, simulations=3), dict(level="instance", beta=1.5)]
INPUTS = inputs
SURVIVORS = {}
