"""Finished runs beside each other: the picture, the CSV and the table come from their folders."""

import csv
import json
import shutil

import pytest

import train
from lab import compare
from tests.lab.commands import TINY

pytestmark = pytest.mark.usefixtures("own_folder")
DRAW = compare.picture  # the fixture replaces it
BANDIT = ["--world", "bandit", "--steps", "40", "--prompts", "256"]


@pytest.mark.slow
def test_runs_and_sweeps_are_compared_at_matched_kl_over_paired_seeds(capsys, pictures):
    sweep = ["--method", "dpo", "--beta", "0.1,0.3", "--seeds", "2"]
    assert train.main([*sweep, *BANDIT, "--out", "sweep"]) == 0
    assert (
        train.main(["--method", "rdpo", *BANDIT, "--lr", "0.05", "--flip", "0.2", "--out", "one"])
        == 0
    )
    told = capsys.readouterr().out
    with open("sweep/matched.txt", encoding="utf-8") as file:
        ranking = file.read()
    assert ranking in told and ranking.startswith("true reward at a KL of  runs  0.5 nats")
    assert train.main(["--compare", "sweep", "one", "--out", "beside"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[1:4]] == [
        "dpo, flip 0.0, beta 0.1",
        "dpo, flip 0.0, beta 0.3",
        "rdpo, flip 0.2, beta 0.1, epsilon 0.3",
    ]
    assert lines[1].split()[5:7] == ["2", lines[1].split()[6]] and "+-" in lines[2]
    with open("beside/curves.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {(row["run"], row["seed"]) for row in rows} == {
        ("sweep/000-seed0-beta0.1", "0"),
        ("sweep/002-seed1-beta0.1", "1"),
        ("sweep/001-seed0-beta0.3", "0"),
        ("sweep/003-seed1-beta0.3", "1"),
        ("one", "0"),
    }
    with open("one/summary.json", encoding="utf-8") as file:
        summary = json.load(file)
    mine = [row for row in rows if row["run"] == "one"]
    assert [int(row["step"]) for row in mine] == list(range(0, 41, 2))
    for row, side in ((mine[0], "before"), (mine[-1], "after")):
        for name in ("reward", "kl"):
            assert float(row[name]) == summary[side][name]
    with open("beside/curves.png", "rb") as file:
        assert file.read(4) == b"\x89PNG"
    with open("sweep/curves.csv", newline="", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 4 * 21


def test_the_difference_at_matched_kl_is_read_off_the_curves_and_paired_by_seed():
    def record(label, seed, slope):
        looks = [{"step": i, "kl": 0.25 * i, "reward": slope * 0.25 * i} for i in range(9)]
        return compare.Record(label, {"method": label, "seed": seed}, [], looks, {})

    grouped = {
        "a": [record("a", 0, 1.0), record("a", 1, 2.0)],
        "b": [record("b", 1, 2.5), record("b", 0, 1.5)],
        "c": [record("c", 7, 1.0)],
    }
    head, *lines = compare.matched(grouped).splitlines()
    assert head.split("  ")[0] == "true reward at a KL of"
    cells = [[c for c in line.split("  ") if c.strip()] for line in lines]
    assert [c.strip() for c in cells[0]] == ["a", "2", "0.750", "1.500", "3.000", "-", "-"][:6]
    assert cells[1][2].strip() == "1.000" and cells[1][3].strip() == "0.250 +-0.000"
    assert cells[1][4].strip() == "2.000" and cells[1][5].strip() == "0.500 +-0.000"
    assert cells[2][2].strip() == "0.500" and cells[2][3].strip() == "-"  # no seed in common


def test_images_are_compared_at_the_same_frechet_distance_the_best_group_first():
    def record(label, slope, first=0.4):
        looks = [{"step": i, "reward": slope * i, "kl": 9.0 * i} for i in range(9)]
        for look in looks[::2]:  # the distance is measured less often than the reward
            look["frechet_256"] = first * (1 + 0.125 * look["step"])
        return compare.Record(label, {"method": label, "seed": 0}, [], looks, {})

    grouped = {"first": [record("first", 1.0)], "low": [record("low", 0.5)]}
    grouped |= {"high": [record("high", 2.0)]}
    lines = compare.matched(grouped).splitlines()
    assert lines[0].split()[:8] == "true reward at a Frechet distance of runs".split()
    assert lines[0].split()[8:] == ["0.44", "difference", "0.5", *["difference", "0.6"]] + [
        *["difference", "0.8", "difference"]
    ]
    assert lines[1].split() == ["first", "1", "0.800", "2.000", "4.000", "8.000"]
    assert lines[2].split() == ["high", "1", "1.600", "0.800", "4.000", "2.000"] + [
        *["8.000", "4.000", "16.000", "8.000"]
    ]
    assert lines[3].split()[:4] == ["low", "1", "0.400", "-0.400"]
    for group in grouped.values():
        for look in group[0].looks:
            look.pop("frechet_256", None)
            look["kl"] = 0.0  # nobody moves
    assert compare.matched(grouped) == ""


@pytest.mark.slow
def test_what_ran_is_said_in_run_json():
    assert train.main(["--method", "dpo", *BANDIT, "--out", "run"]) == 0
    with open("run/run.json", encoding="utf-8") as file:
        known = json.load(file)
    assert known["method"] == "dpo" and known["config"] == {"beta": 0.1}
    assert known["resolved"]["steps"] == 40 and known["resolved"]["batch_size"] == 512
    assert known["resolved"]["lr"] > 0 and known["resolved"]["world"] == "bandit"
    assert known["date"][:2] == "20" and "commit" in known


def test_the_stages_of_a_method_are_one_training(tmp_path):
    argv = ["--method", "curry_dpo", "--world", "bandit", "--steps", "9", "--prompts", "64"]
    assert train.main([*argv, "--out", "run"]) == 0
    record = compare.read("run")
    assert [line["step"] for line in record.steps] == list(range(1, 10))
    assert [look["step"] for look in record.looks] == list(range(10))
    for look, side in ((record.looks[0], "before"), (record.looks[-1], "after")):
        for name in ("reward", "kl"):
            assert look[name] == record.summary[side][name]


def test_stages_without_looks_are_left_out_and_null_is_absent(tmp_path):
    about = {"settings": {"seed": 0}, "config": {}, "resolved": {}}
    (tmp_path / "run.json").write_text(json.dumps(about))
    (tmp_path / "summary.json").write_text('{"method": "dpo"}')

    def read(lines):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / "metrics.jsonl").write_text(text)
        record = compare.read(str(tmp_path))
        return record.steps, record.looks

    def step(stage, i):
        return {"stage": stage, "step": i, "loss": 1.0}

    def look(stage, i, kl=0.0):
        return {"stage": stage, "step": i, "kl": kl}

    model, policy = [step(2, 1), step(2, 2)], [look(3, 0), step(3, 1), look(3, 1, None)]
    steps, looks = read([*model, *policy])
    assert steps == [step(3, 1)] and looks == [look(3, 0), {"stage": 3, "step": 1}]
    assert read(model) == (model, []) and read([]) == ([], [])


def test_every_run_in_a_folder_is_found_once(tmp_path):
    for place in ("a", "a/inside", "nest/sweep/0", "nest/sweep/1", "nest/one"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "summary.json").write_text("{}")
    assert compare.runs_in("a") == ["a"]
    assert compare.runs_in("nest") == ["nest/one", "nest/sweep/0", "nest/sweep/1"]


@pytest.mark.slow
def test_a_run_that_is_named_twice_counts_once_and_worlds_do_not_mix(capsys, tmp_path):
    assert train.main(["--method", "dpo", *BANDIT, "--out", "a"]) == 0
    (tmp_path / "again").symlink_to(tmp_path / "a")
    records = compare.read_all(["a", "a", "again"])
    assert [record.folder for record in records] == ["again"]
    shutil.copytree("a", "b")
    text = (tmp_path / "b" / "run.json").read_text().replace('"bandit"', '"tree"')
    (tmp_path / "b" / "run.json").write_text(text)
    assert train.main(["--compare", "a", "b", "--out", "beside"]) == 2
    assert "runs of different worlds cannot be compared: bandit, tree" in capsys.readouterr().err


def test_a_name_with_dollar_signs_is_drawn_as_it_stands(monkeypatch, tmp_path):
    from matplotlib.figure import Figure

    seen, save = [], Figure.savefig

    def keep(figure, *place, **how):
        seen.append(figure)
        save(figure, *place, **how)

    monkeypatch.setattr(Figure, "savefig", keep)
    looks = [{"step": i, "kl": float(i), "reward": float(i)} for i in range(3)]
    record = compare.Record(
        "x", {"method": "$x_^$\n", "seed": 0}, [{"step": 1, "loss": 1.0}], looks, {}
    )
    path = tmp_path / "curves.png"
    assert DRAW(str(path), {"$x_^$\n": [record]}, "$a_^$") and path.stat().st_size > 1000
    (figure,) = seen
    (legend,) = [ax.get_legend() for ax in figure.axes if ax.get_legend()]
    assert [text.get_text() for text in legend.get_texts()] == ["\\$x_^\\$\\n"]
    assert figure.get_suptitle() == "\\$a_^\\$"


@pytest.mark.parametrize("words", [["nowhere"], ["file"], ["empty"], ["run", "--steps", "3"], []])
def test_what_is_no_finished_run_is_refused_in_one_line(words, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    assert train.main(["--compare", *words, "--out", "beside"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and (not words or words[0] in error or "--steps" in error)
    assert not (tmp_path / "beside").exists()


@pytest.mark.slow
def test_what_does_not_exist_or_has_not_ended_is_said(capsys, tmp_path):
    assert train.main(["--compare", "nowhere"]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err
    sweep = ["--method", "dpo", "--beta", "0.1,0.2,0.3", *BANDIT, "--out", "sweep"]
    assert train.main(sweep) == 0
    cut = next((tmp_path / "sweep").glob("001*"))
    (cut / "summary.json").unlink()
    (cut / "seed1").mkdir()
    capsys.readouterr()
    assert train.main(["--compare", "sweep", "--out", "beside"]) == 0
    error = capsys.readouterr().err
    assert error == f"skipped: sweep/{cut.name} has not ended\n"
    (cut / "run.json").unlink()
    (cut / "metrics.jsonl").unlink()  # killed before its first step
    (cut / "stages").mkdir()
    assert train.main(["--compare", "sweep", "--out", "again"]) == 0
    assert capsys.readouterr().err == error


@pytest.mark.slow
def test_a_run_without_looks_is_compared_as_far_as_it_goes(capsys, tmp_path):
    for name in ("a", "b"):
        assert train.main(["--method", "dpo", *BANDIT, "--out", name]) == 0
    (tmp_path / "b" / "metrics.jsonl").unlink()
    capsys.readouterr()
    assert train.main(["--compare", "a", "b", "--out", "beside"]) == 0
    assert "written to beside/: curves.csv" in capsys.readouterr().out


@pytest.mark.slow
def test_the_best_of_n_samples_has_more_reward_for_every_n(tmp_path):
    assert train.main(["--method", "dpo", *TINY, "--out", "run"]) == 0
    with open("run/summary.json", encoding="utf-8") as file:
        summary = json.load(file)
    best = summary["best_of"]
    rewards = [summary["before"]["reward"], *(point["reward"] for point in best)]
    assert rewards[1:] == sorted(rewards[1:]) and [p["n"] for p in best] == [2, 4, 8, 16]
    assert best[0]["kl"] == pytest.approx(0.193147, abs=1e-6)  # log 2 - 1/2
    assert all(0.0 <= point["win_rate"] <= 1.0 for point in best)
    shutil.rmtree("run")


def record_of(name, points, seed=0):
    """A Record of a run that had sampled so many tokens at each of its looks."""
    looks = [dict(step=i, reward=r, kl=0.1 * i) for i, (_, r) in enumerate(points)]
    for look, (n, _) in zip(looks, points):
        look |= {"samples": n} if n else {}
    steps = [dict(step=i + 1, loss=1.0) for i in range(3)]
    about = {"method": name, "seed": seed}
    return compare.Record(name, about, steps, looks, {"before": {"reward": points[0][1]}})


def test_online_methods_are_ranked_at_equal_sampled_tokens(tmp_path, pictures):
    slow = [record_of("slow", [(0, 0.1), (400, 0.3), (800, 0.9)], seed) for seed in (0, 1)]
    fast = [record_of("fast", [(0, 0.1), (100, 0.5), (400, 0.7)])]
    before = [record_of("before", [(600, 0.1), (600, 0.2), (600, 0.8)])]
    grouped = {"slow": slow, "before": before, "fast": fast}
    rows = [line.split() for line in compare.at_samples(grouped).splitlines()]
    assert rows[0][-7:] == ["runs", "100", "200", "400", "all", "the", "end"]
    assert rows[1] == ["fast", "1", "0.500", "0.567", "0.700", "400", "0.700"]
    assert rows[2] == ["slow", "2", "0.150", "0.200", "0.300", "800", "0.900"]
    assert rows[3] == ["before", "1", "-", "-", "-", "600", "0.800"]
    assert compare.at_samples({"slow": slow, "before": before}) == ""
    other = {"other": [record_of("other", [(0, 0.1), (900, 0.1)])]}
    rows = [line.split() for line in compare.at_samples(grouped | other).splitlines()]
    assert rows[0][-8:] == ["runs", "100", "200", "400", "800", "all", "the", "end"]
    assert rows[1][:6] == ["fast", "1", "0.500", "0.567", "0.700", "-"]  # it does not reach them
    assert rows[2][:6] == ["slow", "2", "0.150", "0.200", "0.300", "0.900"]
    short = {"short": [record_of("short", [(0, 0.1), (4, 0.1)])]}  # it stopped after a few tokens
    (head, *_) = compare.at_samples(grouped | short).splitlines()
    assert head.split()[-10:-3] == ["1", "2", "4", "32", "64", "128", "256"]
    path = str(tmp_path / "curves.png")
    assert DRAW(path, grouped, "three methods") and (tmp_path / "curves.png").stat().st_size > 9999


def test_many_methods_are_told_apart_and_named_beside_the_panels(monkeypatch):
    from matplotlib.figure import Figure

    seen = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *place, **how: seen.append(figure))
    names = [f"method{i}" for i in range(12)]
    grouped = {name: [record_of(name, [(0, 0.1), (400, 0.3)])] for name in names}
    grouped |= {"silent": [record_of("silent", [(0, 0.1)])]}
    grouped["silent"][0].looks.clear()  # a run without a look has no reward to show
    DRAW("curves.png", grouped, "13 methods")
    (legend,) = seen[0].legends
    assert [text.get_text() for text in legend.get_texts()] == [*names, "silent"]
    assert not any(ax.get_legend() for ax in seen[0].axes)
    lines = seen[0].axes[7].lines
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == len(lines) == 12
    assert {line.get_linestyle() for line in lines} == {"-"}


def test_the_names_of_forty_methods_lie_inside_the_picture(monkeypatch):
    from matplotlib.figure import Figure

    seen = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *place, **how: seen.append(figure))
    names = [f"method{i}" for i in range(40)]
    grouped = {name: [record_of(name, [(0, 0.1), (400, 0.3)])] for name in names}
    DRAW("curves.png", grouped, "40 methods")
    (figure,) = seen
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert legend.get_window_extent().y0 >= 0 and len(legend.get_texts()) == 40


def test_runs_without_a_reward_are_named_beside_their_loss(monkeypatch):
    from matplotlib.figure import Figure

    seen = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *place, **how: seen.append(figure))
    grouped = {name: [record_of(name, [(0, 0.1)])] for name in ("one", "two")}
    for (record,) in grouped.values():
        record.looks.clear()
    DRAW("curves.png", grouped, "a file without a true reward")
    (legend,) = [ax.get_legend() for ax in seen[0].axes if ax.get_legend()]
    assert [text.get_text() for text in legend.get_texts()] == ["one", "two"]


def test_panels_of_what_a_run_does_not_have_are_left_out(monkeypatch):
    from matplotlib.figure import Figure

    seen = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *place, **how: seen.append(figure))
    steps = [{"stage": 1, "step": i, "loss": 1.0, "grad_norm": 1.0, "lr": 0.1} for i in (1, 2, 3)]
    about = {"method": "krr_st", "world": "pixels"}
    DRAW("curves.png", {"krr_st": [compare.Record("one", about, steps, [], {})]}, "krr_st")
    assert [ax.get_title() for ax in seen[0].axes] == ["loss"]
    assert seen[0].get_size_inches()[0] < 6  # and the picture is no larger than its panel needs
    many = {str(i): [compare.Record(str(i), about, steps, [], {})] for i in range(32)}
    DRAW("curves.png", many, "many")
    assert seen[1].get_size_inches().tolist() == [18, 6.5]  # there is room for all names
