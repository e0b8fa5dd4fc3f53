"""Damaged files in the folders of runs and of results: one line that names the file, nothing lost.

What a folder holds is compared before and after.
"""

import json
import shutil

import pytest

import methods.dpo
import train
from lab import Lab, compare, results, store
from lab.claims import claim
from tests.lab.commands import Killed, killed_at, refused
from tests.lab.test_claim_command import PRIMARY, numbers, there
from tests.lab.test_folder import files

pytestmark = pytest.mark.usefixtures("own_folder")

SIZE = ["--method", "dpo", "--world", "bandit", "--steps", "4"]
DAMAGED = {
    "cut off": lambda text: text[: len(text) // 2],
    "not UTF-8": lambda text: text[:9] + b"\xff" + text[9:],
    "a list": lambda text: b"[]",
    "deep nesting": lambda text: b"[" * 100000,
    "text for numbers": lambda text: text.replace(b'"kl":', b'"kl": "\x1b[31m", "x":'),
    "a large number": lambda text: text.replace(b'"kl":', b'"kl": 1' + b"0" * 400 + b', "x":'),
    "no object": lambda text: text.replace(b'"after": {', b'"after": 3, "x": {'),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a finished run in it, made once."""
    place = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "CACHE", str(place / "cache"))
        patch.setattr(compare, "picture", lambda *about: False)
        assert train.main([*SIZE, "--out", str(place / "run")]) == 0
    return place / "run"


@pytest.fixture
def run(tmp_path, finished):
    """A finished run in the folder `run`."""
    return shutil.copytree(finished, tmp_path / "run")


def damage(path, kind):
    data = path.read_bytes()
    path.write_bytes(DAMAGED[kind](data))
    assert path.read_bytes() != data


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_summary_is_named_by_whatever_reads_it(kind, run, capsys):
    damage(run / "summary.json", kind)
    before = files()
    refused(capsys, ["--resume", "run"], "run/summary.json is damaged")
    refused(capsys, ["--compare", "run", "--out", "beside"], "run/summary.json is damaged")
    assert files() == before


@pytest.mark.parametrize(
    "line",
    [b"{", b"[]", b"3", b"\xff", b"[" * 100000, b'{"stage": 1}', b'{"stage": "1", "step": 2}']
    + [
        b'{"stage": 2, "step": 1, "loss": {}}',
        b'{"stage": 2, "step": 1, "kl": 1' + b"0" * 400 + b"}",
    ],
)
def test_a_damaged_line_of_metrics_is_named(line, run, capsys):
    path = run / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], line, *lines[1:]]))
    before = files()
    refused(capsys, ["--compare", "run", "--out", "beside"], "run/metrics.jsonl:2 is damaged")
    assert files() == before


@pytest.mark.slow
def test_metrics_that_were_damaged_between_a_kill_and_resume_are_refused(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(Lab, "checkpoint_every", 0.0)
    for out, call in (("late", 3), ("early", 1)):  # behind the first checkpoint, and before it
        with monkeypatch.context() as patch, pytest.raises(Killed):
            killed_at(patch, call)
            train.main([*SIZE, "--out", out])
        path = tmp_path / out / "metrics.jsonl"
        whole = path.read_bytes()
        path.write_bytes(whole[:5] if out == "late" else b"{}\n" + whole)
        before = files(out)
        refused(capsys, ["--resume", out], f"{out}/metrics.jsonl", "is damaged")
        assert files(out) == {name: before[name] for name in before if name != ".lock"}
        path.write_bytes(whole)
        assert train.main(["--resume", out]) == 0


@pytest.mark.slow
def test_a_sweep_is_written_where_an_evaluation_was_not_a_number(tmp_path, capsys, monkeypatch):
    evaluate = Lab.evaluate

    def odd(lab, model):
        return evaluate(lab, model) | {"entropy": float("nan")}

    monkeypatch.setattr(methods.dpo, "evaluate", odd, raising=False)
    assert train.main([*SIZE, "--beta", "0.1,0.3", "--out", "sweep"]) == 0
    rows = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [row["entropy"] for row in rows] == [None, None]
    assert "nan" in capsys.readouterr().out


@pytest.mark.parametrize("change", [dict(seed="x"), dict(seed=[1]), dict(seed=True)])
def test_a_run_without_a_seed_is_not_compared(change, run, capsys):
    made = json.loads((run / "run.json").read_text())
    made["settings"] |= change
    (run / "run.json").write_text(json.dumps(made))
    refused(capsys, ["--compare", "run", "--out", "beside"], "run is not a run that has ended")


@pytest.mark.parametrize("flags", [3, [], {}, {"lr": "3"}, {"method": ["dpo"]}, {"data": None}])
def test_shards_whose_flags_are_damaged_are_not_merged(flags, tmp_path, capsys):
    (tmp_path / "shard").mkdir()
    (tmp_path / "shard" / "run.json").write_text(json.dumps({"flags": flags}))
    refused(capsys, ["--merge", "shard", "--out", "new"], "shard has no readable run.json")
    assert files("shard") == {"run.json": json.dumps({"flags": flags}).encode()}


@pytest.fixture
def judged(tmp_path, monkeypatch):
    """Results of two papers in the folder `results`."""
    stated = [claim("a", None, "ours", ">", "zero", margin=0.5, **PRIMARY)]
    there(monkeypatch, dpo=(numbers([1.0, 1.1]), stated), rdpo=(numbers([1.0, 1.1]), stated))
    argv = ["--method", "dpo,rdpo", "--claim", "--seeds", "2", "--out", "results"]
    assert train.main(argv) == 0
    return tmp_path / "results"


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[:-9],
        lambda text: "[]",
        lambda text: "[" * 100000,
        lambda text: text.replace('"paper"', '"article"'),
        lambda text: text.replace('"paper":', '"paper": 3, "p":'),
        lambda text: text.replace('"family":', '"family": 3, "f":'),
        lambda text: text.replace('"reported"', '"report"'),
        lambda text: text.replace('"seconds":', '"seconds": "long", "s":'),
        lambda text: text.replace('"series": {', '"series": 3, "s": {'),
        lambda text: text.replace('"ours": [1.0', '"ours": [[]'),
    ],
)
def test_damaged_results_are_named_and_nothing_is_written_or_measured_over_them(
    change, judged, capsys, monkeypatch
):
    path = judged / "rdpo.json"  # behind dpo, which would be written first
    path.write_text(change(path.read_text()))
    before = files("results")
    refused(capsys, ["--judge", "results"], "results/rdpo.json is damaged")
    assert files("results") == before
    monkeypatch.setattr(results, "measured", None)  # it would be a traceback
    again = ["--method", "rdpo", "--claim", "--seeds", "2", "--out", "results"]
    refused(capsys, again, "results/rdpo.json")
    assert files("results") == before


@pytest.mark.slow
def test_results_that_do_not_name_their_run_are_not_measured_over(judged, capsys, monkeypatch):
    path = judged / "rdpo.json"
    path.write_text(path.read_text().replace('"run":', '"r":'))
    before = files("results")
    monkeypatch.setattr(results, "measured", None)  # it would be a traceback
    again = ["--method", "rdpo", "--claim", "--seeds", "2", "--out", "results", "--overwrite"]
    refused(capsys, again, "results/rdpo.json is damaged, or of other claims: no run")
    assert files("results").keys() - before.keys() <= {"run.json"}


@pytest.mark.slow
@pytest.mark.parametrize("change", [('"claims"', '"claim"'), ('"verdict"', '"word"')])
def test_verdicts_that_lack_something_are_made_anew_by_judge_alone(
    change, judged, capsys, monkeypatch
):
    path = judged / "rdpo.json"
    whole = path.read_text()
    path.write_text(whole.replace(*change))
    before = files("results")
    monkeypatch.setattr(results, "measured", None)  # it would be a traceback
    again = ["--method", "rdpo", "--claim", "--seeds", "2", "--out", "results"]
    refused(capsys, again, "results/rdpo.json is damaged, or of other claims: no page")
    refused(capsys, ["--method", "dpo", "--judge", "results"], "results/rdpo.json is damaged")
    assert files("results") == before
    assert train.main(["--judge", "results"]) == 0
    found, old = json.loads(path.read_text()), json.loads(whole)
    assert found["reported"]["claims"] == old["reported"]["claims"]


@pytest.mark.slow
@pytest.mark.parametrize("text", ["{", "[]", '{"paper": 3}', "\x00"])
def test_a_json_file_of_another_origin_is_left_alone(text, judged, capsys):
    (judged / "notes.json").write_text(text)
    assert train.main(["--judge", "results"]) == 0
    assert (judged / "notes.json").read_text() == text
    assert "notes" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_file_that_is_damaged_while_papers_are_measured_loses_no_other_paper(
    tmp_path, capsys, monkeypatch
):
    stated = [claim("a", None, "ours", ">", "zero", margin=0.5, **PRIMARY)]
    first, last = numbers([1.0, 1.1]), numbers([1.0, 1.1])
    there(monkeypatch, dpo=(first, stated), rdpo=(last, stated))
    measured = results.measured

    def damaging(name, *about, **more):
        if name == "rdpo":
            (tmp_path / "results" / "dpo.json").write_text("{")
        return measured(name, *about, **more)

    monkeypatch.setattr(results, "measured", damaging)
    argv = ["--method", "dpo,rdpo", "--claim", "--seeds", "2", "--out", "results"]
    refused_late = train.main(argv)
    assert refused_late == 2 and "results/dpo.json is damaged" in capsys.readouterr().err
    found = json.loads((tmp_path / "results" / "rdpo.json").read_text())
    assert found["reported"]["claims"][0]["verdict"] == "supported"
