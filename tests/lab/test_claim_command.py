"""--claim, --judge and --smoke: one paper or many, interrupted or failing, and what is written."""

import json
from types import SimpleNamespace

import pytest
from matplotlib.figure import Figure

import train
from data import UserError
from lab import flags, results
from lab.claims import claim
from lab.store import HERE
from methods import dpo
from tests.lab.commands import Killed, killed_at, refused

pytestmark = pytest.mark.usefixtures("own_folder")
PRIMARY = dict(kind="primary", world="nowhere", matched="nothing")


def there(monkeypatch, **papers):
    """Replace the claims of the papers {name: (measure, CLAIMS)}; no other paper has any."""
    made = {
        name: SimpleNamespace(measure=measure, CLAIMS=stated, __file__=__file__)
        for name, (measure, stated) in papers.items()
    }

    def named(module):
        return made.get(module.__name__.split(".")[-1])

    monkeypatch.setattr(flags, "load_claims", named)
    monkeypatch.setattr(flags, "claims_path", named)
    return made


def content(path):
    return json.loads(path.read_text())


@pytest.mark.slow
def test_a_killed_claim_goes_on(tmp_path, monkeypatch):
    def measure(lab):
        curves = lab.race({"dpo": (dpo.loss, dpo.Config())}, world="bandit", steps=6)
        return {"dpo": curves["dpo"], "base": [curve[0] for curve in curves["dpo"]]}

    there(monkeypatch, dpo=(measure, [claim("a claim", "reward", "dpo", ">", "base")]))
    argv = ["--method", "dpo", "--claim", "--seeds", "3", "--out"]
    codes = [train.main([*argv, "whole"])]
    loss = killed_at(monkeypatch, 9)  # at the second seed
    with pytest.raises(Killed):
        train.main([*argv, "cut"])
    calls = [0]

    def counting(*args):
        calls[0] += 1
        return loss(*args)

    monkeypatch.setattr(dpo, "loss", counting)
    codes.append(train.main(["--resume", "cut"]))
    assert codes[0] == codes[1] and calls[0] == 12  # the first seed was not trained again
    whole, cut = (content(tmp_path / n / "dpo.json")["reported"] for n in ("whole", "cut"))
    ours = cut["claims"][0]["ours"]
    assert ours == whole["claims"][0]["ours"] and len(set(ours)) == 3
    assert cut["seeds"] == [30, 31, 32] and whole["series"] == cut["series"]
    assert sorted(p.name for p in (tmp_path / "cut").iterdir()) == [
        "README.md",
        "dpo.json",
        "dpo.md",
        "run.json",
    ]


@pytest.mark.slow
def test_every_seed_of_a_race_has_its_own_base_model_and_prompts(tmp_path, monkeypatch):
    seen = []

    def measure(lab):
        def end(lab, policy):
            seen.append((lab.settings.seed, lab.settings.base_seed, lab.full_looks))
            return {}

        return {"a": lab.race({"a": (dpo.loss, dpo.Config())}, world="bandit", steps=2, end=end)}

    there(monkeypatch, dpo=(measure, []))
    assert train.main(["--method", "dpo", "--claim", "--seeds", "2"]) == 0
    assert seen == [(30, 30, True), (31, 31, True)]


def numbers(values, **more):
    return lambda lab: {"ours": values, "zero": 0.0, "one": 1.0} | more


def test_the_claims_of_many_methods_go_on_after_a_failure_and_are_resumed(
    tmp_path, monkeypatch, capsys
):
    ran = []

    def paper(name, values):
        def measure(lab):
            ran.append(name)
            if name == "irpo" and len(ran) < 4:
                raise RuntimeError("no luck | at all")
            return numbers(values)(lab)

        return measure, [
            claim("a claim", "reward", "ours", ">", "zero", margin=0.5, **PRIMARY),
            claim("a control", "kl", "zero", ">", "one", kind="control", expect="inconclusive"),
        ]

    there(
        monkeypatch,
        dpo=paper("dpo", [1.0, 1.1, 1.2]),
        irpo=paper("irpo", [1.0, 1.1, 1.0]),
        rdpo=paper("rdpo", [1.0, 1.2, 1.2]),
    )
    argv = ["--method", "dpo,irpo,rdpo,curry_dpo", "--claim", "--seeds", "3"]
    assert train.main([*argv, "--out", "all"]) == 1 and ran == ["dpo", "irpo", "rdpo"]
    printed = capsys.readouterr()
    out = printed.out
    assert "left out: curry_dpo has no claims" in printed.err
    assert "[1/3] dpo: primary claim supported; 2 of 2 verdicts are as expected" in out
    assert "failed, see all/irpo/error.txt: RuntimeError: no luck | at all" in out
    assert "no luck" in (tmp_path / "all" / "irpo" / "error.txt").read_text()
    kept = content(tmp_path / "all" / "dpo.json")
    assert kept["paper"] == "dpo" and kept["family"] == "pairs" and kept["exact checks"] > 5
    block = kept["reported"]
    assert block["command"] == "python train.py --method dpo --claim --seeds 3"
    assert "commit" in block and block["seconds"] >= 0 and block["series"]["zero"] == 0.0
    assert [row["verdict"] for row in block["claims"]] == ["supported", "inconclusive"]
    page = (tmp_path / "all" / "dpo.md").read_text()
    assert "| a claim | primary | reward | 1.100 | > | 0.000 | 1.100 [0.852, 1.348] |" in page
    assert "| a control | control |" in page
    assert train.main(["--resume", "all"]) == 0 and ran == ["dpo", "irpo", "rdpo", "irpo"]
    table = (tmp_path / "all" / "README.md").read_text()
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")][1:]
    assert [row[1] for row in rows] == ["[irpo](irpo.md)", "[dpo](dpo.md)", "[rdpo](rdpo.md)"]
    assert rows[1][2:8] == ["a claim", "nowhere", "1.100 / 0.000", "1.100 [0.852, 1.348]"] + [
        "nothing",
        "supported",
    ]
    assert "Of 3 primary claims, one per method: 3 supported." in table


def test_results_are_added_to_a_folder_and_measured_again_only_on_request(
    tmp_path, monkeypatch, capsys
):
    made = there(
        monkeypatch,
        dpo=(numbers([1.0, 1.1]), [claim("a", None, "ours", ">", "zero", **PRIMARY)]),
        rdpo=(numbers([2.0, 2.1]), [claim("b", None, "ours", ">", "zero", **PRIMARY)]),
    )
    argv = ["--claim", "--seeds", "2", "--out", "results", "--method"]
    assert train.main([*argv, "dpo"]) == 0 and train.main([*argv, "rdpo"]) == 0
    refused(capsys, [*argv, "dpo"], "results/dpo.json", "--overwrite", "--judge results")
    made["dpo"].measure = numbers([3.0, 3.1])
    assert train.main([*argv, "dpo", "--tuning"]) == 0  # apart from the reported seeds
    kept = content(tmp_path / "results" / "dpo.json")
    assert kept["reported"]["claims"][0]["ours"] == [1.0, 1.1]
    assert kept["tuning"]["claims"][0]["ours"] == [3.0, 3.1]
    assert kept["tuning"]["seeds"] == [100, 101]
    assert kept["tuning"]["command"] == "python train.py --method dpo --claim --tuning --seeds 2"
    assert "Tuning seeds 100, 101" in (tmp_path / "results" / "dpo.md").read_text()
    assert train.main([*argv, "dpo", "--overwrite"]) == 0
    kept = content(tmp_path / "results" / "dpo.json")
    assert kept["reported"]["claims"][0]["ours"] == [3.0, 3.1] and "tuning" in kept
    assert "Of 2 primary claims" in (tmp_path / "results" / "README.md").read_text()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("keep")
    refused(capsys, [*argv[:-2], "mine", "--method", "dpo"], "mine is not empty")


def test_a_failure_leaves_the_results_of_other_papers(tmp_path, monkeypatch, capsys):
    def broken(lab):
        raise UserError("the disk is full")

    there(
        monkeypatch,
        dpo=(numbers([1.0, 1.1]), [claim("a", None, "ours", ">", "zero")]),
        rdpo=(broken, []),
    )
    argv = ["--claim", "--seeds", "2", "--out", "results", "--method"]
    assert train.main([*argv, "dpo"]) == 0
    refused(capsys, [*argv, "rdpo"], "the disk is full")
    assert (tmp_path / "results" / "dpo.json").exists()


@pytest.mark.slow
def test_stored_series_are_judged_again_without_measuring(tmp_path, monkeypatch, capsys):
    def stated(margin):
        return [claim("a", None, "ours", ">", "zero", margin=margin, **PRIMARY)]

    made = there(monkeypatch, dpo=(numbers([1.0, 1.1, float("nan")][:2]), stated(0.5)))
    argv = ["--method", "dpo", "--claim", "--seeds", "2", "--out", "results"]
    assert train.main(argv) == 0
    before = content(tmp_path / "results" / "dpo.json")["reported"]
    made["dpo"].CLAIMS = stated(2.0)
    made["dpo"].measure = None
    made["dpo"].__file__ = flags.__file__  # the file of claims has changed
    assert train.main(["--judge", "results"]) == 1
    after = content(tmp_path / "results" / "dpo.json")["reported"]
    assert [b["claims"][0]["verdict"] for b in (before, after)] == ["supported", "no effect"]
    assert after["series"] == before["series"] and after["run"] == before["run"]
    assert "were judged again at" in (tmp_path / "results" / "dpo.md").read_text()
    assert "no effect (expected: supported)" in (tmp_path / "results" / "README.md").read_text()
    made["dpo"].CLAIMS = stated(0.5)
    assert train.main(["--judge", "results", "--method", "dpo"]) == 0
    made["dpo"].CLAIMS = [claim("a", None, "new", ">", "zero", margin=0.5, **PRIMARY)]
    refused(
        capsys, ["--judge", "results"], "dpo.json: there is no series 'new'", "measures it anew"
    )
    refused(capsys, ["--judge", "results", "--method", "rdpo"], "no results to judge")
    refused(capsys, ["--judge", "nowhere"], "no results to judge")
    refused(capsys, ["--judge", "results", "--seeds", "3"], "--seeds does nothing")


def test_a_row_of_the_readme_gets_the_verdict_of_its_paper_and_nothing_else_changes():
    text = (
        "Of 9 primary claims, one per method: 9 supported.\n"
        "| method | paper | what | verdict | code |\n|---|---|---|---|---|\n"
        "| [dpo](methods/dpo.py) | [DPO](x) | a, b | not run | 1,221 |\n"
        "| [irpo](methods/irpo.py) | [IRPO](x) | c | supported | 6,525 |\n"
        "| [sft](methods/sft.py) | [SFT](x) | three cells |\n"
    )
    told = results.with_verdicts(text, {"dpo": "no effect", "sft": "reversed"})
    head, rows = text.split("\n", 1)
    rows = rows.replace("not run", "no effect").replace("supported", "not run")
    assert told == f"Of 2 primary claims, one per method: 1 no effect, 1 reversed.\n{rows}"


def test_the_projects_own_folder_of_results_writes_the_verdicts_into_its_readme(
    tmp_path, monkeypatch
):
    stated = [claim("a", None, "ours", ">", "zero", **PRIMARY)]
    there(monkeypatch, dpo=(numbers([1.0, 1.1]), stated))
    page = tmp_path / "README.md"
    page.write_text("| [dpo](methods/dpo.py) | [DPO](x) | a | not run | 1,221 |\n")
    monkeypatch.setattr(results, "HERE", str(tmp_path))
    monkeypatch.setattr(results, "OWN", str(tmp_path / "results"))
    argv = ["--method", "dpo", "--claim", "--seeds", "2", "--out"]
    assert train.main([*argv, "elsewhere"]) == 0 and "not run" in page.read_text()
    assert train.main([*argv, "results"]) == 0
    assert page.read_text() == "| [dpo](methods/dpo.py) | [DPO](x) | a | supported | 1,221 |\n"


def test_the_readme_has_the_verdicts_of_the_results():
    with open(f"{HERE}/README.md", encoding="utf-8") as file:
        text = file.read()
    assert results.with_verdicts(text, results.verdicts(results.OWN)) == text


def test_reports_are_part_of_the_page(tmp_path, monkeypatch):
    made = there(monkeypatch, dpo=(numbers([1.0, 1.1]), []))
    made["dpo"].report = lambda lab, series: {
        "table.txt": f"seen: {series['ours']} {lab.seeds}",
        "reward, and KL.png": Figure(),
    }
    assert train.main(["--method", "dpo", "--claim", "--seeds", "2", "--out", "run"]) == 0
    page = (tmp_path / "run/dpo.md").read_text()
    assert "## table\n\n```\nseen: [1.0, 1.1] [30, 31]\n```" in page
    assert "![reward, and KL](dpo-reward-and-KL.png)" in page
    assert (tmp_path / "run/dpo-reward-and-KL.png").exists()


def test_claims_have_five_seeds_and_twenty_tables_by_default(tmp_path, monkeypatch, capsys):
    seen = []

    def measure(lab):
        seen.append((lab.seeds, lab.worlds))
        return {}

    there(monkeypatch, dpo=(measure, []))
    argv = ["--method", "dpo", "--claim"]
    assert train.main(argv) == 0 and train.main([*argv, "--tuning"]) == 0
    assert train.main([*argv, "--seed", "3", "--seeds", "1"]) == 0
    assert seen[0] == (list(range(30, 35)), list(range(30, 50)))
    assert seen[1] == (list(range(100, 105)), list(range(100, 120)))
    assert seen[2] == ([3], [3, 4, 5, 6])
    refused(capsys, [*argv, "--seed", "100"], "--tuning")
    refused(capsys, [*argv, "--tuning", "--seed", "3"], "from 100 on")
    refused(capsys, [*argv, "--seed", "3,100"], "--tuning only")
    refused(capsys, ["--method", "dpo", "--tuning"], "--tuning needs --claim")


def test_a_smoke_run_takes_a_few_steps_and_writes_nothing(tmp_path, monkeypatch, capsys):
    seen = []

    def measure(lab):
        def end(lab, policy):
            seen.append((lab.steps, lab.batch_size, lab.prompts, lab.eval_size, lab.few(4000)))
            return {}

        arms = {"dpo": (dpo.loss, dpo.Config(), dict(steps=50))}
        curves = lab.race(arms, world="bandit", steps=60, end=end)["dpo"]
        assert curves[0][-1]["step"] == 4
        return {"ours": curves, "zero": 0.0}

    there(monkeypatch, dpo=(measure, [claim("a", "reward", "ours", "<", "zero", at_kl=4)]))
    assert train.main(["--method", "dpo", "--claim", "--smoke"]) == 0
    assert seen == [(4, 4, 16, 4, 4)] and not (tmp_path / "out").exists()
    assert "dpo: 1 claims in" in capsys.readouterr().out
    refused(capsys, ["--method", "dpo", "--smoke"], "--smoke needs --claim")


def test_a_smoke_run_names_the_papers_that_fail(tmp_path, monkeypatch, capsys):
    def broken(lab):
        raise ValueError("a typo")

    there(monkeypatch, dpo=(broken, []), rdpo=(numbers([1.0]), []))
    assert train.main(["--method", "dpo,rdpo", "--claim", "--smoke"]) == 1
    printed = capsys.readouterr()
    assert "failed: dpo" in printed.out and "rdpo: 0 claims in" in printed.out
    assert "a typo" in printed.err


def test_a_method_without_claims_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(flags, "claims_path", lambda method: None)
    refused(capsys, ["--method", "dpo", "--claim", "--out", "run"], "dpo has no claims")
    assert not (tmp_path / "run").exists()


def test_a_claim_takes_no_hyper_parameters(capsys):
    refused(capsys, ["--method", "dpo", "--claim", "--beta", "1"], "--beta", "--claim sets its own")
    refused(capsys, ["--method", "dpo", "--claim", "--device", "cpu,cpu:0"], "one value")


def test_a_claim_that_cannot_be_judged_is_one_line(tmp_path, capsys, monkeypatch):
    stated = [claim("a", None, "nothing", ">", "zero")]
    there(monkeypatch, dpo=(numbers([1.0]), stated))
    refused(capsys, ["--method", "dpo", "--claim", "--out", "run"], "no series 'nothing'")
    assert not (tmp_path / "run").exists()
