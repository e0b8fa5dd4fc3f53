"""SPINAL: planted spectra, distances of beliefs, and layers that are frozen as exact controls."""

import math

import pytest
import torch

from data import UserError
from lab import Lab, Settings
from methods import dpo, spinal
from methods.spinal import (
    Config,
    coherence,
    evaluate,
    layers,
    loss,
    measure,
    path,
    probes,
    run,
    shares,
    spectrum,
    terminal,
)
from tests import builders
from tests.test_gpt import make

SMALL = dict(world="deep", base_steps=0, steps=2, prompts=8, batch_size=4, eval_size=16)


def small(**changes):
    return Lab(Settings(**SMALL | changes), quiet=True)


@pytest.mark.paper
def test_the_loss_is_that_of_dpo():
    item = builders.ragged()
    ours = builders.value_and_gradient(loss, *item, Config(0.3))
    plain = builders.value_and_gradient(dpo.loss, *item, dpo.Config(0.3))
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-15)


# ---- the instrument


def planted(a, n=256, d=64):
    """States (n, d) whose centred singular values are k^-a, and a random rotation of them."""
    rng = torch.Generator().manual_seed(0)
    left = torch.randn(n, d, generator=rng, dtype=torch.float64)
    left = torch.linalg.qr(left - left.mean(0))[0]
    left = torch.linalg.qr(left - left.mean(0))[0]
    right = torch.linalg.qr(torch.randn(d, d, generator=rng, dtype=torch.float64))[0]
    sigma = torch.arange(1, d + 1, dtype=torch.float64) ** -a
    return left * sigma @ right.T, right


@pytest.mark.paper
@pytest.mark.parametrize("a", [0.5, 1.0, 2.0])
def test_the_exponent_of_a_planted_spectrum_is_found(a):
    H, rotation = planted(a)
    for states in (H, 7 * H, H @ rotation, H + 3.0):
        alpha, fit = spectrum(states)
        assert alpha == pytest.approx(a, abs=1e-9) and fit == pytest.approx(1.0)


@pytest.mark.paper
def test_the_tail_is_from_a_tenth_to_eight_tenths_of_the_rank():
    H, _ = planted(1.0)
    u, sigma, v = torch.linalg.svd(H, full_matrices=False)
    outside = sigma.clone()
    outside[:5], outside[51:] = 9.0, 1e-4  # k = 1 to 5 and k > 51 are outside of 6 to 51
    assert spectrum(u * outside @ v)[0] == pytest.approx(1.0, abs=1e-9)
    inside = sigma.clone()
    inside[50] /= 2
    assert spectrum(u * inside @ v)[0] > 1.0005
    cut = sigma.clone()
    cut[32:] = 0.0  # rank 32: the tail is 3 to 25
    cut[:2] = 9.0
    assert spectrum(u * cut @ v)[0] == pytest.approx(1.0, abs=1e-6)


def test_a_spectrum_that_is_too_short_has_no_exponent():
    with pytest.raises(UserError, match="7 states: at least 8"):
        spectrum(torch.randn(7, 20))
    assert all(math.isnan(x) for x in spectrum(torch.randn(50, 5)))


@pytest.mark.paper
def test_paths_are_distances_on_the_simplex():
    def logs(*p):
        return torch.tensor([p], dtype=torch.float64).log()

    p, q = logs(0.7, 0.2, 0.1), logs(0.1, 0.2, 0.7)
    assert path(p, q).item() == pytest.approx(1.507434, abs=1e-6) == path(q, p).item()
    assert path(p, p).item() == 0.0
    assert path(logs(1, 0), logs(0, 1)).item() == pytest.approx(math.pi)
    uniform = logs(0.25, 0.25, 0.25, 0.25)
    assert path(uniform, logs(1, 0, 0, 0)).item() == pytest.approx(2.094395, abs=1e-6)
    other = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    near = (other + 1e-4 * torch.randn(3, 40)).log_softmax(-1)
    assert (path(other, near) < 1e-3).all()
    a, b = (torch.randn(5, 9).double().log_softmax(-1) for _ in range(2))
    expected = 2 * ((a + b) / 2).logsumexp(-1).exp().acos()
    torch.testing.assert_close(path(a, b), expected)


def test_a_straight_trajectory_is_coherent():
    line = torch.arange(5.0)[:, None] * torch.tensor([0.1, 2.0, -1.0])
    assert coherence(line) == pytest.approx(1.0)
    bent = torch.tensor([[0.0, 0, 0], [1, 0, 0], [2, 3, 4], [3, 6, 8]])
    assert coherence(bent) == pytest.approx(1 / (1 + 2.5))


# ---- layers of a model


@pytest.mark.slow
def test_states_are_those_of_the_last_prompt_token_through_the_lens_of_the_base():
    lab = small()
    base, other = lab.base(), lab.base()
    with torch.no_grad():
        other.norm.weight.mul_(3.0)
        other.layers[2].mlp.down_proj.weight.mul_(4.0)
    rows, _ = probes(lab)
    alpha, fit, steps = layers(lab, other, rows)
    assert alpha.shape == fit.shape == steps.shape == (6,)
    before = None
    for i in range(7):
        beliefs = []
        for row in rows:
            h = []
            ids = lab.tokens(row["prompt"])
            batch = lab.collate(lab.rows([dict(prompt=ids, responses=[[]], ends=[True])]))
            h = other.hidden(batch, layers=[i])[0][0, len(ids) - 1]
            beliefs.append(base.unembed(base.norm(h)).double().log_softmax(-1))
        beliefs = torch.stack(beliefs)
        if before is not None:
            assert steps[i - 1].item() == pytest.approx(
                path(before, beliefs).mean().item(), abs=1e-5
            )
        before = beliefs


@pytest.mark.slow
@pytest.mark.paper
@pytest.mark.parametrize("train", ["last", "first"])
def test_frozen_layers_do_not_change_but_those_behind_trained_ones_do(train):
    lab = small(lr=0.01)
    policy = run(lab, Config(train=train))
    assert all(p.requires_grad for p in policy.parameters())
    rows, _ = probes(lab)
    ours, base = (layers(lab, m, rows) for m in (policy, lab.reference))
    for mine, known in ((ours[0], base[0]), (ours[2], base[2])):
        same = (mine == known).tolist()
        assert same == [train == "last"] * 4 + [False] * 2
    changed = [
        not torch.equal(a, b) for a, b in zip(policy.parameters(), lab.reference.parameters())
    ]
    inside = [n.startswith(("layers.4", "layers.5")) for n, _ in policy.named_parameters()]
    if train == "first":
        inside = [n.startswith(("layers.0", "layers.1")) for n, _ in policy.named_parameters()]
    assert changed == inside


@pytest.mark.slow
@pytest.mark.paper
def test_the_base_against_itself_has_no_change():
    lab = small()
    base = lab.base()
    found = measure(lab, base)
    assert found["aligned"] == found["moved"] == 0.0
    assert sum(found[f"share_{i}"] for i in range(1, 7)) == pytest.approx(1.0)
    assert found["terminal_share"] == pytest.approx(found["share_5"] + found["share_6"])
    assert found == measure(lab, base)


def test_the_terms_compare_the_last_third_of_the_layers_with_the_others(monkeypatch):
    """Six layers: the last two are terminal, and the trajectory there has three points."""
    base = torch.tensor(
        [[2.0, 2, 2, 2, 2, 2], [1.0, 1, 1, 1, 1, 1], [0.4, 0.4, 0.4, 0.4, 0.4, 0.4]]
    )
    after = base + torch.tensor(
        [[0.1, 0.2, 0.3, 0.4, 0.5, 0.9], [0.0] * 6, [0.3, -0.1, 0.1, 0.1, -0.2, -0.1]]
    )
    share = torch.tensor([0.3, 0.2, 0.1, 0.1, 0.1, 0.2])
    lab = small()
    policy = lab.base()
    planted = {id(policy): after.double(), id(lab.reference): base.double()}
    monkeypatch.setattr(spinal, "probes", lambda lab: ([], []))
    monkeypatch.setattr(spinal, "layers", lambda lab, model, rows: tuple(planted[id(model)]))
    monkeypatch.setattr(spinal, "shares", lambda lab, model, rows: share.double())
    found = measure(lab, policy)
    expected = dict(alpha_early=0.25, alpha_terminal=0.7, path_early=0.1, path_terminal=-0.15)
    expected |= dict(aligned=0.85, moved=0.9, terminal_share=0.3, least_fit=1.0)
    # layers 4 to 6 in units of the base: alpha 1.2, 1.25, 1.45 and path 1.25, 0.5, 0.75
    bend = math.hypot(0.2 - 0.05, 0.25 + 0.75)
    expected |= dict(coherence=1 / (1 + bend), alpha_6=2.9, path_1=0.7, share_2=0.2)
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-6)


@pytest.mark.slow
def test_shares_are_norms_of_the_gradient_of_each_layer():
    lab = small()
    base = lab.base()
    _, pairs = probes(lab)
    share = shares(lab, base, pairs)
    assert all(p.grad is None for p in base.parameters())
    batch = lab.collate(pairs)
    loss(base.logps(batch), lab.reference.logps(batch), batch, Config())[0].mean().backward()
    norms = [
        math.sqrt(sum(p.grad.square().sum().item() for p in layer.parameters()))
        for layer in base.layers
    ]
    assert share.tolist() == pytest.approx([n / sum(norms) for n in norms], rel=1e-4)


def test_the_terminal_layers_are_a_third_and_at_least_two():
    for count, expected in ((3, 2), (6, 2), (8, 3), (30, 10)):
        assert terminal(make(num_hidden_layers=count)) == expected
    with pytest.raises(UserError, match="2 layers"):
        terminal(make())
    with pytest.raises(UserError, match="2 layers"):  # before a base model is trained
        run(Lab(Settings(world="reviews"), quiet=True), Config())


@pytest.mark.slow
@pytest.mark.usefixtures("own_folder")
def test_a_finished_run_of_any_method_is_measured(tmp_path, capsys):
    import train

    argv = "--world deep --base_steps 2 --eval_size 16 --max_response 8".split()
    more = "--steps 2 --prompts 8 --batch_size 4".split()
    assert train.main(["--method", "rdpo", *argv, *more, "--out", "run"]) == 0
    argv = "--method spinal --world deep --eval_size 16 --max_response 8".split()
    assert train.main([*argv, "--init", "run", "--out", "look"]) == 0
    assert "alpha_6" in capsys.readouterr().out
    assert train.main([*argv, "--init", "run", "--train", "last", "--out", "no"]) == 2


@pytest.mark.parametrize("fields, word", [(dict(train="middle"), "train"), (dict(beta=0), "beta")])
def test_wrong_fields_are_refused(fields, word):
    with pytest.raises(UserError, match=word):
        Config(**fields)


def test_an_evaluation_has_the_measurements_beside_those_of_the_lab():
    lab = small(max_response=4)
    found = evaluate(lab, lab.base())
    assert {"reward", "alpha_1", "path_6", "terminal_share"} <= set(found)


def test_lists_of_a_file_are_measured_by_their_best_and_worst_response():
    lab = small(max_response=4)
    base, rows = lab.base(), lab.world.demonstrations(70, lab.rng("rows"))
    texts = [row["responses"][0] for row in rows]
    lab.world.held_out = [
        dict(prompt=row["prompt"], responses=[a, b, c], scores=[0.0, 2.0, 1.0])
        for row, a, b, c in zip(rows, texts, texts[1:], texts[2:])
    ]
    _, pairs = probes(lab)
    assert len(pairs) == 64
    assert [lab.text(y) for y in pairs[3]["responses"]] == [texts[4], texts[3]]
    assert shares(lab, base, pairs).sum() == pytest.approx(1.0)
    lab.world.held_out = [dict(prompt="a", responses=["b"], scores=[1.0])]
    with pytest.raises(UserError, match="holds out no pair"):
        probes(lab)


CASES = [dict(), dict(beta=0.7)]
INPUTS = builders.pairs
SURVIVORS = {}
