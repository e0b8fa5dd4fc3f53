"""Claims: how entries are read, how they are judged, and what is written."""

import json
import math
from types import SimpleNamespace

import pytest

from data import UserError
from lab import Lab, Settings, claims
from lab.claims import at_kl, claim, judge


def curve(*points):
    return [{"step": i, "kl": kl, "reward": reward} for i, (kl, reward) in enumerate(points)]


def one(relation=">", ours=(1.0, 2.0), baseline=(0.0, 0.5), **options):
    (row,) = judge(
        [claim("a sentence", None, "ours", relation, "baseline", **options)],
        {"ours": list(ours), "baseline": list(baseline)},
    )
    return row


def test_a_claim_holds_when_every_seed_agrees_and_the_mean_exceeds_the_margin():
    assert one()["holds"] and one()["difference"] == pytest.approx(1.25)
    assert not one(margin=1.3)["holds"]
    assert not one(ours=(3.0, 0.4))["holds"]  # the second seed disagrees
    assert one("<", ours=(0.0, 0.5), baseline=(1.0, 2.0))["holds"]
    assert not one("<")["holds"]


def test_from_five_seeds_on_the_interval_decides():
    zero = (0.0,) * 5
    assert one(ours=(1.0, 1.0, 1.0, 1.0, -0.1), baseline=zero)["holds"]
    assert not one(ours=(5.0, 0.1, 0.1, 0.1, -0.1), baseline=zero)["holds"]
    low, high = one(ours=(1.0, 2.0, 3.0), baseline=(0.0,) * 3)["interval"]
    assert (low, high) == pytest.approx((2 - 2.484138, 2 + 2.484138), abs=1e-5)  # t = 4.3027
    assert math.isnan(one(ours=(1.0,), baseline=(0.0,))["interval"][0])


def test_entries_are_numbers_dicts_or_curves_and_a_baseline_may_be_a_number():
    series = {
        "dict": [{"ndcg": 0.5}, {"ndcg": 0.7}],
        "curve": [curve((0, 0), (1, 3))],
        "exact": 2.0,
    }
    stated = [
        claim("a", "ndcg", "dict", ">", 0.4),
        claim("b", "reward", "curve", ">", "exact"),
        claim("c", None, "exact", "<", 3),
    ]
    rows = judge(stated, series)
    assert [row["ours"] for row in rows] == [[0.5, 0.7], [3.0], [2.0]]
    assert rows[0]["baseline"] == [0.4, 0.4] and all(row["holds"] for row in rows)


def test_a_curve_is_read_where_it_first_reaches_a_kl():
    assert at_kl(curve((0, 0.0), (1, 2.0), (3, 4.0)), "reward", 2.0) == pytest.approx(3.0)
    assert at_kl(curve((0, 0.0), (2, 2.0), (1, 9.0), (2, 8.0)), "reward", 1.5) == pytest.approx(1.5)
    with pytest.raises(UserError, match="never reaches a KL of 4 nats"):
        at_kl(curve((0, 0.0), (3, 4.0)), "reward", 4.0)


def test_a_shared_kl_is_the_largest_that_all_curves_reach():
    series = {"a": [curve((0, 0), (2, 2)), curve((0, 0), (4, 4))], "b": [curve((0, 0), (8, 4))] * 2}
    (row,) = judge([claim("s", "reward", "a", ">", "b", at_kl="shared")], series)
    assert row["at_kl"] == 2 and row["ours"] == [2.0, 2.0] and row["baseline"] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (dict(relation=">="), "relation"),
        (dict(kind="headline"), "kind"),
        (dict(ours="nobody"), "no series 'nobody'"),
        (dict(baseline="short"), "entries"),
    ],
)
def test_a_claim_that_cannot_be_judged_is_refused(change, match):
    fields = dict(text="t", metric=None, ours="a", relation=">", baseline="b") | change
    with pytest.raises(UserError, match=match):
        judge([claim(**fields)], {"a": [1.0, 2.0, 3.0], "b": [0.0] * 3, "short": [1.0, 2.0]})


def test_a_run_writes_values_tables_and_the_pages_of_the_paper(tmp_path, capsys):
    paper = SimpleNamespace(
        measure=lambda lab: {"ours": [1.0 + seed for seed in lab.seeds], "known": 0.5},
        CLAIMS=[claim("Ours is above | a constant.", None, "ours", ">", "known", kind="primary")],
        report=lambda lab, series: {"page.txt": f"seen: {series['known']}"},
    )
    lab = Lab(Settings(world="bandit"), str(tmp_path), quiet=True, seeds=2)
    (row,) = claims.run("dpo", paper, lab, "a command")
    assert row["holds"] and row["ours"] == [1.0, 2.0] and row["paper"] == "dpo"
    kept = json.loads((tmp_path / "claim.json").read_text())
    assert kept["series"]["ours"] == [1.0, 2.0] and kept["claims"][0]["text"] == row["text"]
    assert (tmp_path / "page.txt").read_text() == "seen: 0.5\n"
    page = (tmp_path / "claim.md").read_text()
    assert "Ours is above / a constant." in page and "a command" in page and "holds" in page
    assert "seen: 0.5" in capsys.readouterr().out
    assert judge(paper.CLAIMS, kept["series"])[0]["holds"]  # judged again without a run
