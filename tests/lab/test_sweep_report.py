"""The table and the picture of a sweep: what a researcher reads first, in a width that fits."""

import math

from matplotlib.figure import Figure

from lab import report

NAMES = ["sentiment", "broken", "length", "kl", "reward", "win_rate", "diversity", "accuracy"]


def after(reward):
    found = dict.fromkeys(NAMES, 0.5) | {"reward": reward, "reward_interval": [reward - 0.1] * 2}
    return found | {"reward_interval": [reward - 0.1, reward + 0.1]}


def results(values=(0.01, 0.1, 1.0), methods=("dpo", "ipo")):
    return [
        ({"method": method, "beta": value, "seed": 0}, after(i + value))
        for i, method in enumerate(methods)
        for value in values
    ]


def test_the_table_of_a_sweep_fits_and_has_the_key_columns_first():
    text = report.sweep_table(results(), ["method", "beta"], width=70)
    head, *rows, note = text.splitlines()
    assert (
        head.split()
        == ["method", "beta", "seeds", "reward", "accuracy", "win_rate", "kl", "length"][
            : len(head.split())
        ]
    )
    assert len(head.split()) >= 5 and max(map(len, [head, *rows])) <= 70
    assert note.startswith("not shown (see sweep.json): ") and "diversity" in note
    shown = head.split()[3:] + note.partition(": ")[2].split(", ")
    assert sorted(shown) == sorted(NAMES)
    wide = report.sweep_table(results(), ["method", "beta"], width=500)
    assert "not shown" not in wide and rows[0].split()[1] == "0.01"


def drawn(monkeypatch, found, varied):
    """The axes that `sweep_plot` draws."""
    kept = []

    def keep(path, draw, size):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(path, format="png")
        kept.append(figure)

    monkeypatch.setattr(report, "figure", keep)
    assert report.sweep_plot("/dev/null", found, varied)
    return kept[0]


def test_an_axis_over_a_factor_of_ten_is_logarithmic(monkeypatch):
    figure = drawn(monkeypatch, results(), ["method", "beta"])
    (ax,) = figure.axes
    assert ax.get_xscale() == "log" and ax.get_xlabel() == "beta"
    assert [text.get_text() for text in ax.get_xticklabels()] == ["0.01", "0.1", "1"]
    figure = drawn(monkeypatch, results((0.1, 0.2, 0.3)), ["method", "beta"])
    assert figure.axes[0].get_xscale() == "linear"
    figure = drawn(monkeypatch, results((0.0, 0.2, 30.0)), ["method", "beta"])
    assert figure.axes[0].get_xscale() == "linear"


def test_error_bars_stand_apart_and_stay_near_their_setting(monkeypatch):
    (ax,) = drawn(monkeypatch, results(), ["method", "beta"]).axes
    lines = [box.lines[0].get_xdata() for box in ax.containers]
    for one, two, at in zip(*lines, (0.01, 0.1, 1.0)):
        assert one < at < two and abs(math.log(one / two)) < 0.5 * math.log(10)


def test_names_stand_in_the_legend(monkeypatch):
    found = [
        ({"method": "dpo", "beta": beta, "variant": name, "seed": 0}, after(beta))
        for beta in (0.1, 0.2)
        for name in ("a", "b")
    ]
    figure = drawn(monkeypatch, found, ["variant", "beta"])
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["variant a", "variant b"]
    figure = drawn(monkeypatch, found, ["variant"])  # against the KL
    assert [text.get_text() for text in figure.legends[0].get_texts()] == texts
    many = [({"variant": f"v{i}", "seed": 0}, after(i)) for i in range(36)]
    figure = drawn(monkeypatch, many, ["variant"])
    looks = {
        (box.lines[0].get_color(), box.lines[0].get_marker()) for box in figure.axes[0].containers
    }
    assert len(looks) == 36 and not figure.axes[0].texts


def test_a_model_without_a_kl_is_left_out_of_a_picture_against_the_kl(monkeypatch):
    found = [({"method": name, "seed": 0}, after(i)) for i, name in enumerate("abc")]
    del found[0][1]["kl"]
    (ax,) = drawn(monkeypatch, found, ["method"]).axes
    assert [len(box.lines[0].get_xdata()) for box in ax.containers] == [0, 1, 1]
    assert ax.get_xlabel() == "KL from the base model (nats)"
    for _, values in found:
        values.pop("kl", None)
    assert not report.sweep_plot("/dev/null", found, ["method"])
