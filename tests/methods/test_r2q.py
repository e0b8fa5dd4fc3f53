"""r2q against its paper: the token MDP, the loss as a sum over tokens, beams, credit, errors."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch

from claims.r2q import aligned, auc
from lab import Lab, Settings
from methods import dpo, r2q
from methods.r2q import (
    Config,
    beam_rewards,
    beam_search,
    loss,
    proxy_tune,
    run,
    sft_loss,
    show_credit,
    token_rewards,
)
from nanomodel import GPT, GPTConfig
from tests import builders
from tests.builders import ragged
from toy import arithmetic
from toy.exact import Table
from toy.tokens import soft_optimum

HALF = math.log(0.5)
# prefixes of two tokens of {0, 1}: the empty one, "0", "1"; the second 1 of "11" has reward 1
HAND = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 1.0]], dtype=torch.float64)


def random_tree(vocab=3, length=3, seed=0):
    """(table of pi_ref, token rewards (prefixes, vocab))."""
    rng = torch.Generator().manual_seed(seed)
    table = Table(vocab, length).double()
    with torch.no_grad():
        table.logits.normal_(0.0, 1.0, generator=rng)
    return table, torch.randn(table.logits.shape[1:], generator=rng, dtype=torch.float64)


def along(values, y):
    """Look up `values` (prefixes, vocab) at every token of the responses y (n, T) -> (n, T)."""
    prefix, out = torch.zeros(len(y), dtype=torch.long), []
    for token in y.unbind(1):
        out.append(values[prefix, token])
        prefix = prefix * values.shape[1] + 1 + token
    return torch.stack(out, 1)


@pytest.mark.paper
def test_the_soft_values_are_those_of_the_hand_case():
    q, value, a = soft_optimum(HAND, torch.full_like(HAND, HALF), 1.0)
    assert value.tolist() == pytest.approx([0.357374, 0.0, 0.620115], abs=1e-6)
    assert a.flatten().tolist() == pytest.approx(
        [-0.357374, 0.262740, 0.0, 0.0, -0.620115, 0.379885], abs=1e-6
    )
    assert [q[2, 1].item(), q[2, 0].item(), q[0, 1].item()] == pytest.approx(
        [0.306853, -0.693147, -0.073033], abs=1e-6
    )
    pi = (q - value[:, None]).exp()
    assert pi[0, 1].item() == pytest.approx(0.650245, abs=1e-6) and pi[
        2, 1
    ].item() == pytest.approx(0.731059, abs=1e-6)
    assert (pi[0, 1] * pi[2, 1]).item() == pytest.approx(0.475367, abs=1e-6)
    assert (a[0, 1] + a[2, 1]).item() == pytest.approx(
        0.642626, abs=1e-6
    )  # the first token has an advantage, although its reward r is 0
    assert (a[0, 1] + a[2, 1]).item() == pytest.approx(1 - value[0].item(), abs=1e-12)


@pytest.mark.paper
def test_shaping_changes_the_value_and_not_the_policy():
    phi = torch.tensor([0.3, -0.5, 0.8], dtype=torch.float64)
    after = torch.cat([phi[1:], torch.zeros(4, dtype=torch.float64)]).view(3, 2)
    q, value, _ = soft_optimum(HAND + after - phi[:, None], torch.full_like(HAND, HALF), 1.0)
    assert value[0].item() == pytest.approx(0.057374, abs=1e-6)
    pi = (q - value[:, None]).exp()
    assert [pi[0, 1].item(), pi[2, 1].item()] == pytest.approx([0.650245, 0.731059], abs=1e-6)


@pytest.mark.paper
@pytest.mark.parametrize("vocab, length", [(3, 3), (2, 1), (4, 2)])
def test_a_random_tree(vocab, length):
    table, r = random_tree(vocab, length)
    log_ref, beta, y = table.logits[0].detach().log_softmax(-1), 0.5, table.sequences()
    q, value, a = soft_optimum(r, log_ref, beta)
    after = torch.cat([value[1:], value.new_zeros(r.numel() + 1 - len(value))]).view_as(r)
    assert (a - (r + after - value[:, None])).abs().max() < 1e-12  # eq. 10
    log_pi = (q - value[:, None]) / beta
    torch.testing.assert_close(
        log_pi.logsumexp(1), torch.zeros(len(r)).double(), rtol=0, atol=1e-12
    )
    total, gains = along(r, y).sum(1), along(a, y).sum(1)
    log_p, log_q = along(log_pi, y).sum(1), along(log_ref, y).sum(1)
    torch.testing.assert_close(log_p, (log_q + total / beta).log_softmax(0), rtol=0, atol=1e-12)
    torch.testing.assert_close(
        total, value[0] + gains, rtol=0, atol=1e-12
    )  # the sum telescopes, so V(s_0) cancels in a pair
    torch.testing.assert_close(
        torch.sigmoid(total[0] - total[1]), torch.sigmoid(gains[0] - gains[1]), rtol=0, atol=1e-12
    )


@pytest.mark.paper
def test_any_logits_are_the_q_of_a_reward():
    table, _ = random_tree(seed=1)
    policy, _ = random_tree(seed=2)
    log_ref, beta = table.logits[0].detach().log_softmax(-1), 0.7
    for shift in (
        0.0,
        torch.randn(13, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64),
    ):
        q = beta * policy.logits[0].detach() + shift
        value = beta * (q / beta).logsumexp(1)
        after = torch.cat([value[1:], value.new_zeros(27)]).view(13, 3)
        r = q - beta * log_ref - after  # Lemma 1
        again, back, _ = soft_optimum(r, log_ref, beta)
        torch.testing.assert_close(
            (again - back[:, None]) / beta,
            policy.logits[0].detach().log_softmax(-1),
            rtol=0,
            atol=1e-12,
        )
        torch.testing.assert_close(again, q, rtol=0, atol=1e-12)


def test_small_beta_does_not_overflow_and_zero_is_refused():
    table, r = random_tree()
    q, value, a = soft_optimum(50 * r, table.logits[0].detach().log_softmax(-1), 1e-3)
    assert all(x.isfinite().all() for x in (q, value, a))
    for beta in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="beta"):
            soft_optimum(r, r, beta)
        with pytest.raises(ValueError, match="beta"):
            Config(beta)


@pytest.mark.paper
def test_the_mean_reward_of_the_reference_falls():
    pi_ref, pi = (
        torch.tensor(p, dtype=torch.float64).log() for p in ([0.5, 0.3, 0.2], [0.7, 0.2, 0.1])
    )
    mean = (pi_ref.exp() * token_rewards(pi, pi_ref, Config(0.1))).sum().item()
    assert mean == pytest.approx(-0.009203, abs=1e-6)
    assert mean == pytest.approx(-0.1 * (pi_ref.exp() * (pi_ref - pi)).sum().item(), abs=1e-12)


@pytest.mark.paper
def test_loss_and_gradient_are_those_of_dpo():
    logps, ref_logps, batch = ragged()
    for beta in (0.1, 1.3):
        ours, metrics = loss(logps, ref_logps, batch, Config(beta))
        theirs, _ = dpo.loss(logps, ref_logps, batch, dpo.Config(beta))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
        (a,), (b,) = (
            torch.autograd.grad(x.sum(), logps, retain_graph=True) for x in (ours, theirs)
        )
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
        sums = beta * (logps - ref_logps).sum(-1).detach().mean(0)
        assert [
            metrics["chosen_reward"].item(),
            metrics["rejected_reward"].item(),
        ] == pytest.approx(sums.tolist(), abs=1e-12)
    assert torch.autograd.gradcheck(lambda x: loss(x, ref_logps, batch, Config(0.4))[0], logps)


@pytest.mark.paper
def test_every_token_of_a_side_has_the_same_gradient():
    logps, ref_logps, batch = ragged(seed=1)
    losses, _ = loss(logps, ref_logps, batch, Config(0.3))
    (grad,) = torch.autograd.grad(losses.sum(), logps)
    slope = 0.3 * (1 - (-losses).exp()).detach()  # beta sigmoid(-h)
    torch.testing.assert_close(
        grad, torch.stack([-slope, slope], 1)[..., None].expand_as(grad), rtol=0, atol=1e-12
    )


@pytest.mark.paper
def test_a_mean_over_tokens_would_not_telescope():
    table, r = random_tree()
    _, value, a = soft_optimum(r, table.logits[0].detach().log_softmax(-1), 0.5)
    y = table.sequences()
    gains, total = along(a, y), along(r, y).sum(1)
    assert ((total[:, None] - total) - (gains.sum(1)[:, None] - gains.sum(1))).abs().max() < 1e-12
    assert (
        (total - value[0]) - gains[:, :-1].sum(1)
    ).abs().max() > 0.1  # without the last token: not R - V(s_0)


def test_huge_margins_stay_finite_in_every_dtype():
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        for margin in (1e4, -1e4):
            logps = torch.tensor([[[margin], [0.0]]], dtype=dtype, requires_grad=True)
            losses, _ = loss(
                logps,
                torch.zeros_like(logps),
                SimpleNamespace(mask=torch.ones(1, 2, 1, dtype=torch.bool)),
                Config(1.0),
            )
            assert losses.isfinite().all() and losses.dtype == torch.promote_types(
                dtype, torch.float32
            )
            assert torch.autograd.grad(losses.sum(), logps)[0].isfinite().all()


def test_what_is_no_pair_is_refused():
    logps, ref_logps, batch = ragged()
    with pytest.raises(ValueError, match="pairs"):
        loss(logps[:, :1], ref_logps[:, :1], batch, Config())
    batch.mask = batch.mask.clone()
    batch.mask[0, 1] = False
    with pytest.raises(ValueError, match="no scored token"):
        loss(logps, ref_logps, batch, Config())


@pytest.mark.parametrize(
    "fields", [dict(reference="new"), dict(sft_steps=5), dict(reference="chosen", sft_steps=0)]
)
def test_fields_that_do_nothing_are_refused(fields):
    with pytest.raises(ValueError, match=list(fields)[-1]):
        Config(**fields)
    assert Config(reference="chosen").sft_steps == 100


def test_sft_looks_at_the_chosen_response_alone():
    logps, ref_logps, batch = ragged()
    (grad,) = torch.autograd.grad(sft_loss(logps, ref_logps, batch, None)[0].sum(), logps)
    assert (grad[:, 1] == 0).all()
    torch.testing.assert_close(
        grad[:, 0],
        (-1.0 / batch.mask[:, 0].sum(-1).double())[:, None].expand(5, 7),
        rtol=0,
        atol=1e-12,
    )


@pytest.mark.paper
def test_proxy_tuning_gives_the_proxy_back():
    table, _ = random_tree()
    reference, policy = (
        x.logits[0].detach().log_softmax(-1) for x in (table, random_tree(seed=5)[0])
    )
    torch.testing.assert_close(proxy_tune(reference, policy, reference), policy, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        proxy_tune(reference, policy, reference, 0.0), reference, rtol=0, atol=1e-12
    )
    steered = proxy_tune(torch.zeros(1, 3), policy[:1], reference[:1], 2.0).exp()
    expected = (policy[:1] - reference[:1]).mul(2).exp()
    torch.testing.assert_close(
        steered, (expected / expected.sum()), rtol=0, atol=1e-6, check_dtype=False
    )


@pytest.mark.paper
def test_a_full_beam_finds_the_likeliest_response():
    for seed in range(3):
        table, r = random_tree(seed=seed)
        y, log_p = table.sequences(), table.log_probs()[0].detach()
        ids, score = beam_search(table, 0, 9, 3)
        assert ids == y[log_p.argmax()].tolist() and score == pytest.approx(
            log_p.max().item(), abs=1e-12
        )
        assert score >= beam_search(table, 0, 1, 3)[1]
        total = along(r, y).sum(1)
        best = Table(3, 3).set_log_probs(log_p + total / 0.5)
        assert (
            beam_search(best, 0, 9, 3)[0] == y[(total + 0.5 * log_p).argmax()].tolist()
        )  # argmax of R + beta log pi_ref
    with pytest.raises(ValueError, match="width"):
        beam_search(table, 0, 0, 3)


def test_greedy_takes_the_best_token_each_time():
    table, _ = random_tree(seed=4)
    ids, prefix = [], 0
    for _ in range(3):
        ids.append(table.logits[0, prefix].argmax().item())
        prefix = prefix * 3 + 1 + ids[-1]
    assert beam_search(table, 0, 1, 3)[0] == ids


def test_beams_of_a_language_model_end():
    world = arithmetic.World()
    torch.manual_seed(0)
    shape = dict(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = GPT(
        GPTConfig(vocab_size=world.tokenizer.vocab_size, max_position_embeddings=24, **shape),
        world.tokenizer,
    )
    with torch.no_grad():
        model.embed_tokens.weight *= 20
    greedy = model.sample(["1+2="], 1, torch.Generator(), 8, temperature=0)[0][0]
    end = greedy[4]  # a token that greedy writes, declared the end
    assert beam_search(model, "1+2=", 1, 8, end)[0] == greedy[: greedy.index(end)]
    assert beam_search(model, "1+2=", 1, 8)[0] == greedy
    wide, narrow = (beam_search(model, "1+2=", width, 8, end) for width in (6, 1))
    assert wide[1] >= narrow[1] and end not in wide[0]
    written = torch.tensor([greedy[:3]])
    whole = model.next_logps("1+2=" + world.tokenizer.decode(greedy[:3]), written[:, :0])
    assert torch.equal(model.next_logps("1+2=", written), whole)
    assert model.next_logps("1+2=", written).argmax().item() == greedy[3]
    assert model.next_logps(world.tokenizer.encode("1+2="), written).shape == (
        1,
        world.tokenizer.vocab_size,
    )


def test_the_token_rewards_of_a_response_as_text():
    world = arithmetic.World()
    ids = world.tokenizer.encode("7+8+0=15,4+5+1=11,3+0+1=04:415")
    title, rewards, errors = show_credit(world, "347+58=", ids, [0.25] * len(ids)).splitlines()
    assert "347+58=" in title and rewards.split()[0] == "7[+0.25]" and len(rewards.split()) > 20
    assert errors.split() == ["wrong", "steps:", "2"]
    ids = world.tokenizer.encode("1+2=3:3")
    assert show_credit(world, "1+2=", ids, [0.0] * len(ids)).splitlines()[2].endswith("none")
    plain = SimpleNamespace(tokenizer=world.tokenizer, verify_steps=None)
    assert len(show_credit(plain, "347+58=", ids, [0.0] * len(ids)).splitlines()) == 2


def test_control_characters_of_a_response_are_not_printed():
    world = arithmetic.World()
    ids = world.tokenizer.encode("1\x1b[2J\r\n3")
    plain = SimpleNamespace(tokenizer=world.tokenizer, verify_steps=None)
    text = show_credit(plain, "say\x1b[2J\n", ids, [0.0] * len(ids))
    assert "\x1b" not in text and "\r" not in text and len(text.splitlines()) == 2


def test_auc_is_the_share_of_ordered_pairs():
    marked = torch.tensor([True, True, False, False])
    assert (
        auc(torch.tensor([3.0, 2.0, 1.0, 0.0]), marked) == 1.0
        and auc(torch.tensor([0.0, 1.0, 2.0, 3.0]), marked) == 0.0
    )
    assert (
        auc(torch.zeros(4), marked) == 0.5
        and auc(torch.tensor([2.0, 0.0, 1.0, -1.0]), marked) == 0.75
    )


@pytest.mark.slow
def test_a_run_learns_which_token_is_to_blame():
    here = Lab(Settings(world="tokens", seed=100, steps=60, prompts=1500), quiet=True)
    data = here.preferences(here.base(), k=2)
    policy, reference = aligned(here, data, Config(0.5))
    y = here.world.reference.sequences()
    error = here.world.along(here.world.token_reward, y) < 0
    a = here.world.along(
        0.5 * (policy.logits.log_softmax(-1) - reference.logits.log_softmax(-1))[0].detach(), y
    )
    assert auc(-a, error) > 0.9 and abs(auc(-a.roll(1, 1), error) - 0.5) < 0.35
    p, q = (m.log_probs()[0].detach() for m in (policy, reference))
    assert (q.exp() * (a.sum(1) + 0.5 * (q - p))).sum().abs() < 1e-5  # eq. 16
    assert set(beam_rewards(here, policy, [0], (1, 3))) == {1, 3}


@pytest.mark.slow
def test_the_reference_and_the_fit_change_the_run():
    settings = Settings(world="tokens", steps=5, prompts=100)
    ends = [
        run(Lab(settings, quiet=True), cfg).log_probs()
        for cfg in (Config(), Config(0.7), Config(reference="chosen"))
    ]
    ends.append(run(Lab(settings, quiet=True), Config(reference="chosen", sft_steps=3)).log_probs())
    assert all((a - b).abs().max() > 1e-6 for i, a in enumerate(ends) for b in ends[:i])


@pytest.mark.slow
def test_a_run_prints_what_it_is_about(capsys):
    small = Settings(
        world="reviews", steps=1, prompts=8, base_steps=3, max_response=6, eval_size=2, batch_size=2
    )
    run(Lab(small), Config())
    out = capsys.readouterr().out
    assert (
        "token rewards of a rejected response to" in out
        and "true reward of beam search: width 1" in out
    )


@pytest.mark.slow
def test_the_rewards_that_a_run_prints_are_beta_times_the_log_ratio(monkeypatch):
    """Those of the trained policy against the model before it, for the last rejected response."""
    aligned, shown = [], []
    align = Lab.align

    def noted(lab, policy, data, *rest, **how):
        before = copy.deepcopy(policy)
        aligned.append((lab, before, align(lab, policy, data, *rest, **how), data[-1]))
        return aligned[-1][2]

    monkeypatch.setattr(Lab, "align", noted)
    monkeypatch.setattr(
        r2q, "show_credit", lambda world, prompt, ids, values: shown.append((ids, values)) or ""
    )
    settings = Settings(
        world="reviews", steps=2, prompts=8, base_steps=3, max_response=6, batch_size=2, lr=0.01
    )
    run(Lab(settings), Config(0.2))
    ((here, before, after, row),) = aligned
    ((ids, values),) = shown
    lone = here.rows([dict(prompt=row["prompt"], responses=[ids], ends=row["ends"][1:])])
    ours, theirs = (here.logps(model, lone)[0][0] for model in (after, before))
    assert ids == row["responses"][1] and max(map(abs, values)) > 1e-3
    assert values == pytest.approx([0.2 * (a - b) for a, b in zip(ours, theirs)], abs=1e-5)


# ---- the mutants of the loss: every one makes a difference on these inputs


CASES = [dict(beta=0.3), dict(beta=1.7)]
INPUTS = builders.pairs
SURVIVORS = {}
