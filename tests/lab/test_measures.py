"""What is measured in a step and in an evaluation, against computations by hand."""

from types import SimpleNamespace

import pytest
import torch

import methods.dpo
from data import Batch, collate
from lab import Lab, Settings, align, evaluate

pytestmark = pytest.mark.usefixtures("own_folder")


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_kl_is_that_of_the_sampled_distributions(temperature):
    """The mean over samples of the KL per token equals that of the log-ratio, with less noise."""
    lab = Lab(
        Settings(world="reviews", base_steps=30, temperature=temperature, max_response=6),
        quiet=True,
    )
    policy = lab.base()
    torch.manual_seed(0)
    with torch.no_grad():
        for p in policy.parameters():
            p += p.std() * torch.randn_like(p)
    rows = lab.encode(lab.sample(policy, lab.world.prompts(500, lab.rng("prompts")), 4))
    kl, ratio = evaluate.sequence_kl(lab, policy, lab.reference, rows), []
    for start in range(0, 500, 50):
        batch = collate(rows[start : start + 50], lab.world.tokenizer)
        with torch.no_grad():
            p, q = (
                (m.logits(batch) / temperature).log_softmax(-1).gather(-1, batch.target[..., None])
                for m in (policy, lab.reference)
            )
        ratio += ((p - q)[..., 0] * batch.mask).sum(-1).flatten().tolist()
    ratio, kl = torch.tensor(ratio), torch.tensor(kl)
    error = (ratio - kl).std() / len(kl) ** 0.5
    assert (
        kl.mean() > 10 * error and abs(ratio.mean() - kl.mean()) < 4 * error and (kl >= -1e-6).all()
    )


def test_the_log_compares_paths_of_a_tree_items_of_a_chain_and_members_of_a_list():
    """Row 0 is a tree of the paths 0 -> 1 and 0 -> 2 -> 3, row 1 a chain, row 2 a list.

    The last response of the list is absent.
    """
    parents = torch.tensor([[-1, 0, 0, 2], [-1, 0, 1, 2], [-1, -1, -1, -1]])
    scores = torch.tensor([[9.0, 0.0, 9.0, 1.0], [3.0, 0.0, 1.0, 2.0], [1.0, 0.0, 2.0, 0.0]])
    mask = torch.ones(3, 4, 2, dtype=torch.bool)
    mask[2, 3] = False
    logps = (
        torch.tensor(
            [[-1.0, -2.0, -3.0, -4.0], [-5.0, -6.0, -7.0, -8.0], [-1.0, -2.0, -4.0, -9.0]]
        )[..., None].expand(3, 4, 2)
        / 2
    )
    ref_logps = (
        torch.tensor(
            [[-7.0, -2.5, -1.0, -1.0], [-5.0, -5.0, -5.0, -5.0], [-1.0, -5.0, -4.5, -5.0]]
        )[..., None].expand(3, 4, 2)
        / 2
    )
    assert evaluate.paths(logps.sum(-1), parents).tolist()[0] == [-1.0, -3.0, -4.0, -8.0]
    found = evaluate.common_metrics(logps, ref_logps, Batch(mask, scores, parents=parents))
    margins = [
        (-8.0 + 9.0) - (-3.0 + 9.5),
        0.0 - (-1.0),
        0.5 - 3.0,
    ]  # -5.5: the common step 0 cancels
    assert found["margin"].item() == pytest.approx(sum(margins) / 3) and found[
        "accuracy"
    ].item() == pytest.approx(1 / 3)
    assert found["chosen_logp"].item() == pytest.approx((-8.0 - 5.0 - 4.0) / 3)
    assert found["rejected_logp"].item() == pytest.approx((-3.0 - 6.0 - 2.0) / 3)


@pytest.mark.parametrize(
    "parents, logps, responses",
    [
        ([-1, 0, 0, 2], [-1.0, -2.0, -3.0, -4.0], {1: -3.0, 3: -8.0}),
        ([-1, 0, 1, 2], [-5.0, -6.0, -7.0, -8.0], {0: -5.0, 1: -6.0, 2: -7.0, 3: -8.0}),
        (None, [-1.0, -2.0, -4.0, -9.0], {0: -1.0, 1: -2.0, 2: -4.0, 3: -9.0}),
    ],
)
def test_held_out_rows_compare_paths_of_a_tree_items_of_a_chain_and_members_of_a_list(
    parents, logps, responses
):
    """Each response in turn has the best score; a step of a tree, which is none, has a better one.

    The reference gives 0 to all, so the log-ratios are the log-probs.
    """
    for best, total in responses.items():
        scores = [float(k == best) if k in responses else 9.0 for k in range(4)]
        row = dict(prompt=[0], responses=[[1, 1]] * 4, scores=scores, parents=parents)
        lab = SimpleNamespace(
            world=SimpleNamespace(reward=None, held_out=[row]),
            eval_size=1,
            reference=None,
            encode=list,
            score_rows=lambda policy, rows: [[[x / 2, x / 2] for x in logps]],
            cached_logps=lambda model, rows: [[[0.0, 0.0]] * 4],
        )
        found = evaluate.pair_stats(lab, None)
        others = [value for k, value in responses.items() if k != best]
        assert found["chosen_logp"] == total and found["rejected_logp"] == others[0]
        assert found["accuracy"] == sum(total > value for value in others) / len(others)


@pytest.mark.slow
def test_reference_logps_of_fixed_rows_are_the_frozen_model_s(tmp_path):
    lab = Lab(
        Settings(
            world="reviews",
            base_steps=3,
            steps=4,
            batch_size=4,
            prompts=8,
            eval_size=4,
            max_response=6,
        ),
        quiet=True,
    )
    policy = lab.base()
    rows, start, seen = lab.preferences(policy, k=2), align.frozen(policy), []

    def loss(logps, ref_logps, batch, cfg):
        seen.append((start.logps(batch) - ref_logps).abs().max().item())
        return methods.dpo.loss(logps, ref_logps, batch, cfg)

    lab.align(policy, rows, loss, methods.dpo.Config())
    assert len(seen) == 4 and max(seen) < 1e-5
    with torch.no_grad():
        batch = collate(rows[:4], lab.world.tokenizer)
        assert (
            policy.logps(batch) - start.logps(batch)
        ).abs().max() > 1e-4  # the policy moved, the reference did not


def test_a_run_on_images_keeps_a_few_of_them_at_looks_during_training(tmp_path):
    from lab import Lab, Settings, report, store
    from lab.evaluate import keep_pictures

    lab = Lab(Settings(world="glyphs", base_steps=0), str(tmp_path), quiet=True)
    policy = lab.base()
    keep_pictures(lab, policy, 0)
    assert not report.write_progress(str(tmp_path)) and not (tmp_path / "training.png").exists()
    for step in (20, 100):
        torch.nn.init.normal_(policy.output.weight, std=0.1 + step)
        keep_pictures(lab, policy, step)
    kept = [store.load_value(str(tmp_path / f"stages/pictures-{n:09d}")) for n in (0, 20, 100)]
    assert [value["images"].shape for value in kept] == [(12, 1, 8, 8)] * 3
    assert not torch.equal(kept[1]["images"], kept[2]["images"])
    report.write_progress(str(tmp_path))
    image = (tmp_path / "training.png").read_bytes()
    assert image[:4] == b"\x89PNG" and int.from_bytes(image[16:20]) >= 440  # the label's width


@pytest.mark.parametrize("steps, every, seen", [(20, 1, 5), (4, 1, 5), (80, 20, 5), (2, 1, 3)])
def test_a_short_run_has_pictures_of_more_of_its_looks(monkeypatch, steps, every, seen):
    from lab import Lab, Settings, evaluate

    about = dict(world="glyphs", base_steps=0, eval_size=4, steps=steps, eval_every=every)
    lab, kept = Lab(Settings(**about), quiet=True), []
    policy = lab.base()
    monkeypatch.setattr(evaluate, "keep_pictures", lambda lab, policy, step: kept.append(step))
    monkeypatch.setattr(evaluate, "of_samples", lambda *args: {})
    monkeypatch.setattr(type(lab.world), "look", lambda *args: {})
    for step in range(0, steps + 1, every):
        lab.glance(policy, step, step in (0, steps))
    assert len(kept) == seen and {0, steps} <= set(kept)
