"""Claims: how entries are read, and how they are judged."""

import math

import pytest

from data import UserError
from lab.claims import at, at_kl, at_or_nan, claim, holm, judge, verdict


def curve(*points, **first):
    looks = [{"step": i, "kl": kl, "reward": reward} for i, (kl, reward) in enumerate(points)]
    return [looks[0] | first, *looks[1:]]


def one(relation=">", ours=(1.0, 2.0, 3.0), baseline=(0.0,) * 3, metric=None, **options):
    (row,) = judge(
        [claim("a sentence", metric, "ours", relation, "baseline", **options)],
        {"ours": list(ours), "baseline": list(baseline)},
    )
    return row


@pytest.mark.parametrize(
    ("interval", "mean", "margin", "word"),
    [
        ((0.1, 0.5), 0.3, 0.2, "supported"),
        ((0.1, 0.5), 0.3, 0.3, "inconclusive"),  # the mean does not exceed the margin
        ((0.1, 0.5), 0.3, 0.0, "supported"),
        ((0.0, 0.6), 0.3, 0.2, "inconclusive"),  # the interval touches 0
        ((-0.6, -0.1), -0.35, 0.2, "reversed"),
        ((-0.6, 0.0), -0.3, 0.2, "inconclusive"),
        ((-0.1, 0.2), 0.05, 0.2, "no effect"),
        ((-0.2, -0.1), -0.15, 0.2, "no effect"),  # below 0, but within the margin
        ((0.1, 0.2), 0.15, 0.2, "no effect"),
        ((-0.3, 0.2), -0.05, 0.2, "inconclusive"),
        ((0.0, 0.0), 0.0, 0.0, "inconclusive"),  # without a margin nothing is shown to be equal
        ((math.nan, math.nan), 1.0, 0.0, "inconclusive"),
    ],
)
def test_the_interval_and_the_margin_decide_between_four_words(interval, mean, margin, word):
    assert verdict(*interval, mean, margin) == word


def test_the_interval_is_paired_over_seeds():
    row = one()
    low, high = row["interval"]
    assert (low, high) == pytest.approx((2 - 2.484138, 2 + 2.484138), abs=1e-5)  # t = 4.3027
    assert row["difference"] == 2 and row["verdict"] == "inconclusive"
    row = one(
        ours=(101.0, 202.0, 303.0), baseline=(100.0, 201.1, 302.0)
    )  # seeds differ, pairs do not
    assert row["difference"] == pytest.approx(2.9 / 3) and row["verdict"] == "supported"
    assert one("<", ours=(0.0, 0.1, 0.0), baseline=(1.0, 1.0, 1.1))["verdict"] == "supported"
    assert one(ours=(0.0, 0.1, 0.0), baseline=(1.0, 1.0, 1.1))["verdict"] == "reversed"
    alone = one(ours=(1.0,), baseline=(0.0,), margin=0.5)
    assert alone["verdict"] == "inconclusive" and math.isnan(alone["interval"][0])


def test_p_is_that_of_a_paired_t_test():
    assert one()["p"] == pytest.approx(0.0741799, abs=1e-6)  # t = 2 sqrt(3), 2 degrees of freedom
    assert one(ours=(1.0,), baseline=(0.0,))["p"] == 1.0
    assert one(ours=(1.0,) * 3)["p"] == 0.0 and one(ours=(0.0,) * 3)["p"] == 1.0


def test_holm_multiplies_by_what_is_left_and_never_falls():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []


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
    assert rows[0]["baseline"] == [0.4, 0.4] and rows[2]["difference"] == 1


def test_a_margin_of_the_reward_is_in_standard_deviations_of_the_base_model():
    ours = [curve((0, 0), (1, 1 + x), reward_sd=s) for x, s in ((0, 3.0), (0.1, 5.0), (0, 4.0))]
    baseline = [curve((0, 0), (1, 0), reward_sd=4.0)] * 3
    row = one(ours=ours, baseline=baseline, metric="reward", margin=0.25)
    assert row["unit"] == 4.0 and row["verdict"] == "supported"  # 1.03 exceeds 0.25 * 4
    assert one(ours=ours, baseline=baseline, metric="reward", margin=0.3)["verdict"] == "no effect"
    row = one(ours=ours, baseline=baseline, metric="kl", margin=0.25)
    assert row["unit"] == 1.0
    dicts = [{"reward": 1.0, "reward_sd": 2.0}] * 3
    assert one(ours=dicts, metric="reward")["unit"] == 2.0
    assert one(ours=[{"reward": 1.0}] * 3, metric="reward")["unit"] == 1.0


def test_a_curve_is_read_where_it_first_reaches_a_kl():
    assert at_kl(curve((0, 0.0), (1, 2.0), (3, 4.0)), "reward", 2.0) == pytest.approx(3.0)
    assert at_kl(curve((0, 0.0), (2, 2.0), (1, 9.0), (2, 8.0)), "reward", 1.5) == pytest.approx(1.5)
    with pytest.raises(UserError, match="never reaches a KL of 4 nats; its largest is 3"):
        at_kl(curve((0, 0.0), (3, 4.0), (2, 4.0)), "reward", 4.0)
    assert at(curve((0, 0.0), (3, 4.0)), "reward", 1.0, "kl") == pytest.approx(0.75)
    assert math.isnan(at_or_nan(curve((0, 0.0), (3, 4.0)), "reward", 5.0, "kl"))


def test_a_metric_where_another_one_is_first_reached():
    curve = [dict(kl=9.0, reward=r, length=n) for r, n in ((0.0, 10.0), (0.2, 20.0), (0.1, 50.0))]
    assert at(curve, "reward", 0.1, "length") == 15.0
    assert at(curve, "reward", 0.2, "length") == 20.0
    assert at([curve[1], curve[1], curve[0]], "reward", 0.2, "length") == 20.0
    with pytest.raises(UserError, match="never reaches a reward of 0.3; its largest is 0.2"):
        at(curve, "reward", 0.3, "length")


def test_a_curve_that_ends_before_its_kl_makes_one_claim_inconclusive():
    series = {"a": [curve((0, 0), (5, 2))] * 2, "b": [curve((0, 0), (5, 1)), curve((0, 0), (3, 1))]}
    rows = judge([claim("s", "reward", "a", ">", "b", at_kl=kl) for kl in (4, 2)], series)
    assert rows[0]["verdict"] == "inconclusive" and math.isnan(rows[0]["difference"])
    assert rows[0]["reason"] == (
        "b, seed number 2 of 2: a curve never reaches a KL of 4 nats; its largest is 3"
    )
    assert rows[1]["reason"] == "" and rows[1]["difference"] > 0


def test_what_json_turned_into_null_is_not_a_number():
    row = one(ours=(1.0, None, 1.0))
    assert row["verdict"] == "inconclusive" and "not a finite number" in row["reason"]
    broken = [*curve((0, 0), (2, 2)), {"kl": None, "reward": None}, {"kl": 4.0, "reward": 3.0}]
    assert at_kl(broken, "reward", 3) == 2.5


def test_a_shared_kl_is_the_largest_that_all_curves_reach():
    series = {"a": [curve((0, 0), (2, 2)), curve((0, 0), (4, 4))], "b": [curve((0, 0), (8, 4))] * 2}
    (row,) = judge([claim("s", "reward", "a", ">", "b", at_kl="shared")], series)
    assert (
        row["kl"] == 2
        and row["at_kl"] == "shared"
        and row["ours"] == [2.0, 2.0]
        and row["baseline"] == [1.0, 1.0]
    )


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (dict(relation=">="), "relation"),
        (dict(kind="headline"), "kind"),
        (dict(at_kl=3), "at_kl 3"),
        (dict(at_kl="equal"), "at_kl 'equal'"),
        (dict(margin=-0.1), "margin"),
        (dict(expect="holds"), "expect 'holds'"),
        (dict(kind="control"), "what it should show"),
        (dict(kind="primary", world="reviews"), "matched="),
        (dict(kind="primary", matched="steps"), "world="),
        (dict(ours="nobody"), "no series 'nobody'"),
        (dict(baseline="short"), "entries"),
    ],
)
def test_a_claim_that_cannot_be_judged_is_refused(change, match):
    fields = dict(text="t", metric=None, ours="a", relation=">", baseline="b") | change
    with pytest.raises(UserError, match=match):
        judge([claim(**fields)], {"a": [1.0, 2.0, 3.0], "b": [0.0] * 3, "short": [1.0, 2.0]})
