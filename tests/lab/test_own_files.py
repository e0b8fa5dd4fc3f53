"""A user's own files: a method, its claims, a world, and a draft that cannot be read yet."""

import json
import os
import shutil
import subprocess
import sys

import pytest

import train
from data import UserError
from lab import Lab, flags, settings, store
from tests.lab.commands import Killed, refused

pytestmark = pytest.mark.usefixtures("own_folder", "forget")

TEMPLATE = os.path.join(store.HERE, "methods", "_template.py")
WORLD = '''"""Coins: a response is heads or tails."""

import torch

from toy import exact


class World(exact.World):
    name = "coins"
    align = dict(prompts=64, steps=8, lr=0.1, batch_size=16)

    def __init__(self):
        super().__init__(2, 1, rewards=torch.tensor([0.0, BEST]))
'''
CLAIMS = '''"""Does it raise the reward?"""

import my_method

from lab.claims import claim


def measure(lab):
    arms = {"ours": (my_method.loss, my_method.Config())}
    curves = lab.race(arms, world="bandit", steps=8)["ours"]
    return {"ours": curves, "base": [curve[0] for curve in curves]}


CLAIMS = [claim("In the bandit, the reward rises", "reward", "ours", ">", "base")]
'''


def own_method(folder, **changes):
    """A copy of the template as my_method.py, with parts replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(TEMPLATE, encoding="utf-8") as file:
        text = file.read()
    for old, new in changes.items():
        old = {
            "losses": "F.relu(cfg.delta - z)",
            "end": "return lab.align(policy, data, loss, cfg)",
        }[old]
        assert old in text
        text = text.replace(old, new)
    (folder / "my_method.py").write_text(text)
    return str(folder / "my_method.py")


def own_world(folder, best="1.0"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "my_world.py").write_text(WORLD.replace("BEST", best))
    return str(folder / "my_world.py")


TINY = ["--world", "bandit", "--steps", "4", "--prompts", "32", "--batch_size", "8"]


def test_the_template_runs_and_keeps_the_contract(capsys):
    about = flags.declared(TEMPLATE)
    assert not about.problem and all(flag.text for flag in about.flags.values())
    assert train.main(["--method", TEMPLATE, *TINY, "--delta", "2"]) == 0
    assert train.main(["--check", TEMPLATE]) == 0
    page = capsys.readouterr().out
    assert "WRONG" not in page and "look" not in page
    assert "_template" not in settings.methods()


@pytest.mark.slow
def test_a_method_of_one_s_own_runs_sweeps_resumes_and_is_checked(tmp_path, monkeypatch, capsys):
    path = own_method(tmp_path / "mine")
    os.chdir(tmp_path / "mine")
    assert train.main(["--method", "my_method.py", *TINY, "--delta", "2", "--out", "one"]) == 0
    summary = json.loads((tmp_path / "mine" / "one" / "summary.json").read_text())
    assert summary["method"] == "my_method"
    argv = ["--method", f"dpo,{path}", *TINY, "--my_method.beta", "0.1,0.5", "--out"]
    assert train.main([*argv, "sweep"]) == 0
    rows = json.loads((tmp_path / "mine" / "sweep" / "sweep.json").read_text())
    assert len(rows) == 3
    assert train.main(["--method", path, "--help"]) == 0
    assert "--delta" in capsys.readouterr().out
    refused(capsys, ["--method", path, "--delta", "-1"], "delta")
    refused(capsys, ["--method", path, "--k", "4"], "--k does nothing under my_method")
    refused(capsys, ["--method", "my_metho.py"], "there is no such file")
    refused(capsys, ["--method", f"{path},{path}"], "names my_method twice")
    assert train.main(["--method", "./my_method", *TINY, "--out", "again"]) == 0


def test_a_run_of_one_s_own_method_resumes_unless_the_file_has_changed(
    tmp_path, monkeypatch, capsys
):
    path = own_method(tmp_path / "mine")
    os.chdir(tmp_path / "mine")
    module = flags.load_method(path)
    loss, calls = module.loss, []

    def dying(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise Killed
        return loss(*arguments)

    monkeypatch.setattr(module, "loss", dying)
    monkeypatch.setattr(Lab, "checkpoint_every", 0.0)
    with pytest.raises(Killed):
        train.main(["--method", "my_method.py", *TINY, "--out", str(tmp_path / "run")])
    monkeypatch.setattr(module, "loss", loss)
    os.chdir(tmp_path)
    shutil.copytree("run", "copy")
    assert train.main(["--resume", "run"]) == 0
    with open(path, "a") as file:
        file.write("\n# another line\n")
    refused(capsys, ["--resume", "copy"], "my_method.py has changed")


@pytest.mark.slow
def test_a_world_of_one_s_own(tmp_path, capsys):
    path = own_world(tmp_path / "mine")
    os.chdir(tmp_path / "mine")
    assert train.main(["--method", "dpo", "--world", "my_world.py", "--out", "a"]) == 0
    first = json.loads((tmp_path / "mine" / "a" / "summary.json").read_text())
    assert first["world"] == "coins" and first["after"]["reward"] > first["before"]["reward"]
    refused(capsys, ["--method", "disco", "--world", path], "disco needs a world of text")
    refused(capsys, ["--method", "dpo", "--world", path, "--eval_size", "8"], "--eval_size")
    refused(capsys, ["--method", "dpo", "--world", "nowhere/w.py"], "there is no such file")
    own_method(tmp_path / "mine")
    refused(capsys, ["--method", "dpo", "--world", "my_method.py"], "has no class World")


def test_the_cache_knows_the_source_of_a_world(tmp_path):
    """Two worlds with one name and key differ in their reward, so they must not share a cache."""
    rewards = []
    for folder, best in (("a", "1.0"), ("b", "-1.0")):
        path = own_world(tmp_path / folder, best)
        out = tmp_path / f"run-{folder}"
        assert train.main(["--method", "dpo", "--world", path, "--out", str(out)]) == 0
        rewards.append(json.loads((out / "summary.json").read_text())["after"]["reward"])
    assert rewards[0] > 0 > rewards[1]


@pytest.mark.slow
def test_claims_stand_beside_a_method_of_one_s_own(tmp_path, capsys):
    path = own_method(tmp_path / "mine")
    refused(capsys, ["--method", path, "--claim"], "my_method has no claims", "my_method_claims.py")
    (tmp_path / "mine" / "my_method_claims.py").write_text(CLAIMS)
    assert train.main(["--method", path, "--claim", "--seeds", "3", "--out", "claims"]) == 0
    kept = json.loads((tmp_path / "claims" / "my_method.json").read_text())
    assert kept["reported"]["claims"][0]["difference"] > 0 and kept["paper"] == "my_method"
    assert kept["exact checks"] is None


@pytest.mark.parametrize(
    "losses, words",
    [
        ("F.relu(cfg.delta - z).mean()", ["shape ()", ".mean()"]),
        ("F.relu(cfg.delta - logps.sum(1))", ["expected (8,)", ".sum(-1)"]),
        ("F.relu(cfg.delta - z).detach()", ["no gradient in the policy"]),
        ("(z - 1).log()", ["8 of 8 losses are NaN", "logarithm"]),
    ],
)
def test_a_wrong_loss_is_one_line(tmp_path, capsys, losses, words):
    path = own_method(tmp_path, losses=losses)
    refused_last(capsys, ["--method", path, *TINY], words)
    assert train.main(["--check", path]) == 1
    page = capsys.readouterr().out
    assert "WRONG" in page and words[-1] in page


def test_a_forgotten_metrics_dict_is_one_line(tmp_path, capsys):
    path = own_method(tmp_path, losses="F.relu(cfg.delta - z)\n    return losses")
    refused_last(capsys, ["--method", path, *TINY], ["return losses, metrics"])


@pytest.mark.slow
def test_what_run_returns_is_checked(tmp_path, capsys):
    path = own_method(tmp_path, end="return [1, 2]")
    refused_last(capsys, ["--method", path, *TINY], ["run of my_method returns a list"])
    path = own_method(tmp_path / "table", end='return {"distance": 0.5}')
    assert train.main(["--method", path, "--world", "bandit", "--out", "run"]) == 0
    assert "distance" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["after"] == {"distance": 0.5}
    path = own_method(tmp_path / "none", end="return None")
    assert train.main(["--method", path, "--world", "bandit"]) == 0


@pytest.mark.parametrize(
    "losses, line",
    [
        ("F.relu(cfg.delta + z)", "raising the chosen log-prob raises your loss: a sign?"),
        (
            "F.relu(cfg.delta - z / batch.mask.sum((1, 2)))",
            "depend on the length of a response: a mean?",
        ),
        (
            "F.relu(cfg.delta - logps.sum(-1)[:, 0] + logps.sum(-1)[:, 1])",
            "constant in ref_logps",
        ),
        ("-z.sigmoid().log()", "the loss is finite at log-ratios of 10,000: "),
    ],
)
def test_a_check_asks_about_slips(tmp_path, capsys, losses, line):
    train.main(["--check", own_method(tmp_path, losses=losses)])
    assert line in capsys.readouterr().out


def test_a_file_that_cannot_be_imported_is_one_line(tmp_path, capsys):
    (tmp_path / "a_draft.py").write_text('"""A draft."""\n\nx = (1,\n')
    refused(capsys, ["--method", "a_draft.py"], "a_draft.py cannot be read: line 3")
    path = own_method(tmp_path, losses="F.relu(cfg.delta - z)")
    with open(path, "a") as file:
        file.write("\nmissing_name\n")
    refused(capsys, ["--method", path], "my_method.py cannot be read: line", "missing_name")
    (tmp_path / "json.py").write_text("")
    refused(capsys, ["--world", "json.py", "--method", "dpo"], "a module json exists already")


@pytest.mark.slow
def test_a_draft_in_methods_breaks_only_itself(tmp_path):
    """In a copy of the project, from another folder."""
    for name in ("lab", "methods", "toy", "claims"):
        shutil.copytree(
            os.path.join(store.HERE, name),
            tmp_path / "copy" / name,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    for name in os.listdir(store.HERE):
        if name.endswith(".py"):
            shutil.copy(os.path.join(store.HERE, name), tmp_path / "copy" / name)
    (tmp_path / "copy" / "methods" / "a_draft.py").write_text('"""A draft."""\n\nx = (1,\n')
    (tmp_path / "copy" / "methods" / "b_draft.py").write_text('"""Another."""\n')

    def call(*argv):
        command = [sys.executable, str(tmp_path / "copy" / "train.py"), *argv]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
        return done.returncode, done.stdout, done.stderr

    code, listed, _ = call("--list")
    assert code == 0 and "cannot be read: line 3" in listed
    assert "cannot be read: it has no Config" in listed and "rdpo" in listed
    code, _, error = call("--method", "a_draft")
    assert code == 2 and "line 3" in error and error.count("\n") == 1
    assert call("--method", "dpo", "--world", "bandit", "--steps", "2", "--out", "run")[0] == 0
    code, _, error = call("--method", "dpo", "--epsilon", "0.1")
    assert code == 2 and "is a flag of" in error


def refused_last(capsys, argv, words):
    """The last line on stderr of a command that is refused after its header was printed."""
    capsys.readouterr()
    assert train.main(argv) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    for word in words:
        assert word in error, error


def test_a_field_named_like_a_run_setting_and_an_unknown_kind_of_world_are_refused(
    tmp_path, capsys
):
    path = own_method(tmp_path)
    text = (tmp_path / "my_method.py").read_text()
    (tmp_path / "my_method.py").write_text(text.replace("delta", "lr"))
    refused(capsys, ["--method", path, *TINY], "field lr, which is the name of a run setting")
    text = text.replace('worlds=("text", "images", "table")', 'worlds=("txt",)')
    assert '"txt"' in text
    (tmp_path / "my_method.py").write_text(text)
    refused(capsys, ["--method", path, *TINY], "worlds of txt; there are text, images, table")


def test_a_forgotten_return_is_noticed(tmp_path, capsys):
    path = own_method(tmp_path, end="lab.align(policy, data, loss, cfg)")
    assert train.main(["--check", path]) == 0
    assert "look  run returns None" in " ".join(capsys.readouterr().out.split("  "))
    assert train.main(["--method", path, *TINY, "--out", "run"]) == 0
    assert "is a `return` missing?" in capsys.readouterr().out


WRITING = '''"""Two letters: the more a, the better."""

import data
from nanomodel import GPT, GPTConfig
from toy import world


class World(world.World):
    name, kind, max_response = "letters", "text", 4
    pretrain = dict(steps=2, batch_size=4, lr=1e-3, demonstrations=8)
    align = dict(prompts=16, steps=2, lr=1e-3, batch_size=4)

    def __init__(self):
        self.tokenizer = data.Tokenizer.toy(["a", "b"])

    def model(self):
        size = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1)
        heads = dict(num_attention_heads=1, num_key_value_heads=1)
        size |= dict(vocab_size=self.tokenizer.vocab_size, max_position_embeddings=16)
        return GPT(GPTConfig(**size, **heads), self.tokenizer)

    def prompts(self, n, rng):
        return ["a"] * n

    def demonstrations(self, n, rng):
        return [dict(prompt="a", responses=["ab"], scores=[1.0])] * n

    def reward(self, prompts, responses):
        import torch

        return REWARD
'''


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        ("torch.full((len(prompts),), float('nan'))", "the reward of letters is NaN or infinite"),
        ("torch.zeros(3)", "the reward of letters has shape (3,) for"),
        ("torch.zeros(len(responses), 1)", "1) for"),
        ("torch.zeros(())", "the reward of letters has shape () for"),
        ("[0.0] * len(prompts)", "letters.py: TypeError: reward returned a list, expected"),
        ("torch.zeros(lenght(prompts))", "letters.py, line 31: NameError: name 'lenght'"),
    ],
)
def test_a_reward_that_is_no_reward_is_named(reward, words, tmp_path, capsys):
    (tmp_path / "letters.py").write_text(WRITING.replace("REWARD", reward))
    refused(capsys, ["--method", "dpo", "--world", str(tmp_path / "letters.py")], words)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('return ["a"] * n', "return []", ["letters.py: prompts(16, rng) returned none"]),
        ('return ["a"] * n', "return self.list", ["letters.py, line 23: AttributeError", "'list'"]),
        (
            'return ["a"] * n',
            "return ('a' for _ in range(n))",
            ["returned a generator, not a list"],
        ),
        ("return GPT(GPTConfig", "GPT(GPTConfig", ["letters.py: model() returned a NoneType"]),
        (", lr=1e-3, demonstrations=8", "", ["letters.py: pretrain lacks lr"]),
        ("vocab_size=self.tokenizer.vocab_size", "vocab_size=4", ["has vocab_size 4", "tokens"]),
        ('"text", 4', '"text", 16', ["max_response is 16", "context", "is 16"]),
        ('"text", 4', '"text", None', ["world of text needs a max_response"]),
        ("self.tokenizer = ", "x = ", ["letters.py, line 19: AttributeError"]),
        (
            "    def prompts(",
            "    def parts(self, prompt, response):\n"
            "        return {'length': len(response)}\n\n"
            "    def prompts(",
            ["letters.py: a part of the reward must not be named length"],
        ),
        (
            'kind, max_response = "letters", "text"',
            'kind, max_response = "letters", "txt"',
            ["txt"],
        ),
    ],
)
def test_a_world_that_does_not_fit_itself_is_one_line(
    tmp_path, capsys, monkeypatch, old, new, words
):
    monkeypatch.setattr(Lab, "pretrain", None)  # before anything is trained
    text = WRITING.replace("REWARD", "torch.tensor([float(r.count('a')) for r in responses])")
    assert old in text
    (tmp_path / "letters.py").write_text(text.replace(old, new))
    refused(capsys, ["--method", "dpo", "--world", str(tmp_path / "letters.py")], *words)


def test_what_no_run_reads_of_a_world_may_be_missing(tmp_path):
    """An array of prompts; and of pretrain, what --base_steps replaces."""
    text = WRITING.replace("REWARD", "torch.tensor([float(r.count('a')) for r in responses])")
    text = text.replace('return ["a"] * n', 'return __import__("numpy").array(["a"] * n)')
    text = text.replace("pretrain = dict(steps=2, ", "pretrain = dict(")
    (tmp_path / "array_a.py").write_text(text)
    argv = ["--method", "dpo", "--world", str(tmp_path / "array_a.py"), "--eval_size", "4"]
    for steps in ("0", "3"):
        out = str(tmp_path / f"out{steps}")
        assert train.main([*argv, "--base_steps", steps, "--out", out]) == 0


def test_fewer_prompts_than_asked_for_are_said(tmp_path, capsys):
    text = WRITING.replace("REWARD", "torch.tensor([float(r.count('a')) for r in responses])")
    (tmp_path / "few_a.py").write_text(text.replace("* n\n", "* min(n, 10)\n", 1))
    argv = ["--method", "dpo", "--world", str(tmp_path / "few_a.py"), "--eval_size", "16"]
    assert train.main([*argv, "--out", "run"]) == 0
    out, error = capsys.readouterr()
    assert "letters has 10 prompts, 16 were asked for\n" in error
    assert "16 pairs" not in out
    assert train.main([*argv, "--prompts", "10", "--out", "again"]) == 0
    assert "asked for" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(end="return lab.algin(policy, data, loss, cfg)"), ["AttributeError", "algin"]),
        (dict(end="return lab.align(policy, dta, loss, cfg)"), ["NameError", "dta"]),
        (dict(end="return lab.align(policy, data, loss, cfg).x"), ["AttributeError", "'x'"]),
        (dict(losses="F.relu(cfg.delta - z) + batch.nothing"), ["AttributeError", "nothing"]),
    ],
)
def test_a_slip_is_one_line_of_the_check(tmp_path, capsys, changes, words):
    path = own_method(tmp_path, **changes)
    assert train.main(["--check", path]) == 1
    wrong = [line for line in capsys.readouterr().out.splitlines() if "WRONG" in line]
    assert len(wrong) == 1 and all(word in wrong[0] for word in [f"{path}, line ", *words])


def test_a_world_with_few_prompts_and_no_demonstrations_runs(tmp_path, capsys):
    text = WRITING.replace("REWARD", "torch.tensor([float(r.count('a')) for r in responses])")
    text = text.replace(
        "    pretrain = dict(steps=2, batch_size=4, lr=1e-3, demonstrations=8)\n", ""
    )
    head, tail = text.split("    def demonstrations")
    text = head + "    def reward" + tail.split("    def reward")[1]
    text = text.replace('return ["a"] * n', 'return ["a"] * min(n, 10)')
    (tmp_path / "few.py").write_text(text.replace("letters", "few"))
    argv = ["--method", "dpo", "--world", str(tmp_path / "few.py"), "--eval_size", "16"]
    assert train.main([*argv, "--out", "run"]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert summary["before"]["win_rate"] == first["win_rate"] == 0.5
    assert "best of 16" in capsys.readouterr().out


def broken_config(folder, old, new):
    """A copy of the template whose Config has a fault."""
    path = own_method(folder)
    text = (folder / "my_method.py").read_text()
    assert text.count(old) == 1
    (folder / "my_method.py").write_text(text.replace(old, new))
    return path


BETA = "    beta: float = 0.1  # strength of the pull to the reference\n"


@pytest.mark.parametrize("action", [["--method"], ["--check"], ["--beta", "1", "--method"]])
@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('check_fields(self, beta="(0, inf)"', 'chek_fields(self, beta="(0, inf)"', ["NameError"]),
        ("self, beta=", "self, bta=", ["'bta'"]),
        ("beta: float = 0.1  #", "beta: float  #", ["the field beta of Config needs a default"]),
        (BETA, "    beta = 0.1\n", ["beta has no type", "write beta: TYPE = 0.1"]),
        ("beta: float = 0.1", "beta: list = None", ["beta has the type list, expected int"]),
        ("@dataclass(frozen=True)\n", "", ["write @dataclass(frozen=True) above Config"]),
    ],
    ids=["a typo", "an unknown field", "no default", "no type", "a list", "no dataclass"],
)
def test_a_fault_in_a_config_is_one_line(tmp_path, capsys, action, old, new, words):
    path = broken_config(tmp_path, old, new)
    refused(capsys, [*action, path], path, "line ", *words)


@pytest.mark.parametrize("line", ["import nonexist_mod", "1/0", "raise SystemExit(3)", "exit()"])
def test_a_method_that_cannot_be_imported_is_left_out_of_all(tmp_path, capsys, monkeypatch, line):
    path = own_method(tmp_path)
    with open(path, "a") as file:
        file.write(f"\n{line}\n")
    reason = f"my_method{{}} cannot be read: line {len(open(path).readlines())}: "
    refused(capsys, ["--method", path], reason.format(".py"))
    refused(capsys, ["--check", path], reason.format(".py"))
    both = [flags.declared("dpo"), flags.declared(path)]
    monkeypatch.setattr(flags, "catalogue", lambda: both)
    given, chosen = flags.read_flags(["--method", "all", *TINY])
    assert [run.method for run in flags.combinations(given, chosen)] == ["dpo"]
    error = capsys.readouterr().err
    assert error.startswith("left out: " + reason.format("")) and error.count("\n") == 1


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("check_fields(self,", "chek_fields(self,", ["my_method, line ", "NameError"]),
        ("beta: float = 0.1", "beta: float", ["my_method cannot be read: line ", "a default"]),
    ],
)
def test_a_method_whose_config_fails_is_left_out_of_all(
    tmp_path, capsys, monkeypatch, old, new, words
):
    both = [flags.declared("dpo"), flags.declared(broken_config(tmp_path, old, new))]
    monkeypatch.setattr(flags, "catalogue", lambda: both)
    given, chosen = flags.read_flags(["--method", "all", *TINY])
    assert [run.method for run in flags.combinations(given, chosen)] == ["dpo"]
    error = capsys.readouterr().err
    assert error.startswith("left out: " + words[0]) and words[1] in error
    assert error.count("\n") == 1
    given, chosen = flags.read_flags(["--method", "all", "--beta", "-1"])
    with pytest.raises(UserError, match="beta = -1.0: expected"):
        flags.combinations(given, chosen)


def test_a_method_whose_run_fails_at_once_is_left_out_of_all(tmp_path, capsys, monkeypatch):
    path = broken_config(tmp_path, "policy = lab.base()", "policy = 1 / 0")
    both = [flags.declared("dpo"), flags.declared(path)]
    monkeypatch.setattr(flags, "catalogue", lambda: both)
    given, chosen = flags.read_flags(["--method", "all", *TINY])
    runs = flags.fitting(flags.combinations(given, chosen), given)
    assert [run.method for run in runs] == ["dpo"]
    assert "left out: my_method: " in capsys.readouterr().err


def test_the_help_of_a_method_that_cannot_be_imported_is_shown(tmp_path, capsys):
    path = own_method(tmp_path)
    with open(path, "a") as file:
        file.write("\nfill_variant(None, TABLE)\n1 / 0\n")
    assert train.main(["--method", path, "--help"]) == 0
    assert "Flags of my_method" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (BETA, BETA + "    judge: int = 2  # a judge\n", "judge, which is the name of an action"),
        (
            BETA,
            BETA + "    T: int = 2  # a number\n",
            "field T, but flags are in lower case",
        ),
        ('ignores=("k",)', 'ignores="flip"', "must be a tuple: ('flip',)"),
        ('    "pairs",\n', '    "pairs",\n    needs="pairz",\n', "its PAPER needs pairz"),
    ],
)
def test_a_slip_in_what_a_method_declares_is_one_line(tmp_path, capsys, old, new, words):
    path = broken_config(tmp_path, old, new)
    refused(capsys, ["--method", path, *TINY], path, words)


def test_an_unknown_family_is_refused(tmp_path, capsys):
    path = broken_config(tmp_path, '    "pairs",\n', '    "pear",\n')
    refused(capsys, ["--method", path, *TINY], path, "has the family pear; there are pairs, lists")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("World(exact.World)", "World", ["World must be a subclass of toy.world.World"]),
        ("__init__(self)", "__init__(self, size)", ["TypeError", "'size'"]),
        ("torch.tensor([0.0, 1.0])", "1 / 0", ["line 13: ZeroDivisionError"]),
        (
            "    def __init__",
            "    kind = 'texts'\n\n    def __init__",
            ["kind is 'texts', expected"],
        ),
        (
            "    def __init__",
            "    def rewards(self):\n        return 1 / 0\n\n    def __init__",
            ["line 13: ZeroDivisionError"],
        ),
        (
            "dict(prompts=64, steps=8, lr=0.1, batch_size=16)",
            "{}",
            ["align lacks steps, batch_size, lr, prompts", "--steps, --batch_size, --lr"],
        ),
        (
            "dict(prompts=64, steps=8, lr=0.1, batch_size=16)",
            "None",
            ["align is None, expected a dict"],
        ),
        (
            "    def __init__",
            "    def reward(self, prompts, responses):\n"
            "        return [0.0] * len(prompts)\n\n    def __init__",
            ["reward returned a list, expected a tensor"],
        ),
        (
            "    def __init__",
            "    def reward(self, prompts, responses):\n"
            "        return torch.zeros(lenght(prompts))\n\n    def __init__",
            ["line 13: NameError", "lenght"],
        ),
    ],
    ids=[
        "no subclass",
        "arguments",
        "init",
        "kind",
        "rewards",
        "align",
        "no align",
        "a list",
        "a typo",
    ],
)
def test_a_fault_in_a_world_is_one_line(tmp_path, capsys, old, new, words):
    path = own_world(tmp_path)
    text = (tmp_path / "my_world.py").read_text()
    assert text.count(old) == 1
    (tmp_path / "my_world.py").write_text(text.replace(old, new))
    refused(capsys, ["--method", "dpo", "--world", path], path, *words)
