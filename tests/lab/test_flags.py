"""Flags: how they are read, what --help and --list say, and what is refused."""

import dataclasses
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest

import train
from data import UserError, check_fields, fill_variant
from lab import Settings, flags, results, store
from lab.settings import methods, worlds
from methods.dpo import PAPER, Config
from tests.lab.commands import (
    refused,
)

pytestmark = pytest.mark.usefixtures("own_folder")


@pytest.mark.slow
@pytest.mark.usefixtures("forget")
def test_every_printed_command_is_one_that_is_understood(tmp_path, monkeypatch):
    """The commands are in the README and in docstrings; two spaces separate an explanation."""
    shutil.copy(f"{store.HERE}/methods/_template.py", tmp_path / "my_method.py")  # as README has it
    monkeypatch.chdir(tmp_path)
    files = ["README.md", "train.py", *(f"methods/{name}.py" for name in methods())]
    texts = [open(os.path.join(store.HERE, name), encoding="utf-8").read() for name in files]
    found = {
        line.strip()
        for text in texts
        for line in re.findall(r"python train\.py (--[^`\n{]*?)(?:  |`|\n)", text)
    }
    assert len(found) > 25
    for line in sorted(found):
        given, chosen = flags.read_flags(shlex.split(line))
        assert given and flags.combinations(given, chosen), line


def runs(*argv):
    return flags.combinations(*flags.read_flags(list(argv)))


def test_defaults_of_a_method_apply_only_when_it_runs_alone():
    assert runs("--method", "rdpo")[0].settings.flip == 0.3
    assert {run.settings.flip for run in runs("--method", "dpo,rdpo")} == {0.0}
    assert runs("--method", "rdpo", "--flip", "0.1")[0].settings.flip == 0.1


def test_the_first_run_of_a_method_has_settings_of_its_own(capsys):
    (run,) = runs("--method", "dpo")
    assert run.settings.prompts == PAPER.demo["prompts"] and run.cfg.beta == PAPER.demo["beta"]
    (run,) = runs("--method", "dpo", "--beta", "0.3", "--prompts", "7")
    assert (run.settings.prompts, run.cfg.beta) == (7, 0.3)
    assert run.settings.label_temperature == PAPER.demo["label_temperature"]
    for argv in (["--method", "dpo", "--world", "reviews"], ["--method", "dpo,rdpo"]):
        assert {run.settings.prompts for run in runs(*argv)} == {None}
        assert {run.cfg.beta for run in runs(*argv)} == {Config().beta}
    assert train.main(["--method", "dpo", "--help"]) == 0
    assert f"--beta {PAPER.demo['beta']}" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("method", ["did", "ld_dpo"])
def test_a_default_that_does_nothing_in_another_world_is_none(capsys, method):
    (run,) = runs("--method", method, "--world", "arithmetic")
    assert run.settings.label_temperature == Settings.label_temperature
    assert run.settings.length_bias == Settings.length_bias
    assert runs("--method", method)[0].settings != Settings(world="reviews")
    refused(capsys, ["--method", "ld_dpo", "--world", "bandit"], "needs a world of text")
    refused(
        capsys,
        ["--method", "did", "--world", "arithmetic", "--label_temperature", "0.5"],
        "would do nothing",
    )


def test_a_sweep_over_temperatures_is_no_question(capsys):
    given = dict(method="dpo", temperature="0.5,1")
    both = runs("--method", "dpo", "--temperature", "0.5,1")
    flags.refuse_idle_actions(given, both)
    assert [run.settings.temperature for run in both] == [0.5, 1.0]
    refused(capsys, ["--prompt", "hi", "--temperature", "0.5,1"], "--prompt", "one value")


@pytest.mark.slow
def test_list_and_help_name_every_method_flag_and_world(capsys):
    assert train.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert train.main(["--help"]) == 0
    helped = capsys.readouterr().out
    for name in methods() + worlds():
        assert name in listed
    for name, verdict in results.verdicts(results.OWN).items():
        (row,) = [line for line in listed.splitlines() if line.startswith(f"{name} ")]
        assert f" {verdict} " in row
    for name, flag in flags.settings_flags().items():
        assert f"--{name} " in helped and flag.text, f"{name} has no explanation"
        assert hasattr(Settings(), name)
    for about in flags.catalogue():
        assert "arXiv:" in about.title and not about.problem
        assert train.main(["--method", about.name, "--help"]) == 0
        page = capsys.readouterr().out
        assert about.doc.splitlines()[0] in page
        for field, flag in about.flags.items():
            assert f"--{field} " in page and flag.text, f"{about.name}.{field} has no explanation"
            assert field not in {*flags.settings_flags(), *flags.ACTIONS}


def test_help_has_the_defaults_that_a_variant_fills_in(capsys):
    names = "survey,grpo,fdpo,adpo,urflex,kdiff,llava_mod"
    assert train.main(["--method", names, "--help"]) == 0
    page = " ".join(capsys.readouterr().out.split())
    for text in (
        "a key of VARIANTS, which also has the defaults of the other fields [dpo]",
        "gate [dr_dpo 1.0, disco_pop 0.05, else 0.1]",  # tau of survey
        "chi_po: R_max [beta_dpo 0.0, alpha_dpo 0.6, simpo 0.5, chi_po 1.0, slic 3.0]",
        "[the other side's mean log-ratio, at least 0] Kinds of world",  # z0 is computed
        "order of the alpha-divergence; 0 is rkl, 1 is fkl [0.5]",
        "1 + epsilon_high [0.28]",
        "for anchor = ema [0.99]",
        "flex: their learning rate [5e-05]",
        "it needs a larger one than the network [0.05]",
        "experts of a sparse layer [4]",
    ):
        assert text in page, text
    assert "None" not in page


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--method", "dqo"], ["unknown method 'dqo'", "dpo"]),
        (["--method", "dpo", "--world", "review"], ["unknown world 'review'", "reviews"]),
        (["--method", "dpo", "--bta", "1"], ["unknown flag '--bta'", "--beta"]),
        (["--method", "dpo", "beta"], ["'beta'"]),
        (["--method", "dpo", "--beta"], ["--beta needs a value"]),
        (["--method", "dpo", "--beta", "0"], ["beta"]),
        (["--method", "dpo", "--beta", "-1"], ["beta"]),
        (["--method", "dpo", "--beta", "much"], ["--beta much", "number"]),
        (["--method", "dpo", "--beta", "nan"], ["--beta nan"]),
        (["--method", "dpo", "--beta", "inf"], ["beta"]),
        (["--method", "dpo", "--steps", "1.5"], ["--steps 1.5", "whole number"]),
        (["--method", "dpo", "--steps", "-1"], ["--steps"]),
        (["--method", "dpo", "--batch_size", "0"], ["--batch_size"]),
        (["--method", "dpo", "--lr", "0"], ["--lr"]),
        (["--method", "dpo", "--flip", "1.5"], ["--flip"]),
        (["--method", "dpo", "--k", "1"], ["--k"]),
        (["--method", "dpo", "--dtype", "int8"], ["--dtype"]),
        (["--method", "dpo", "--seeds", "0"], ["--seeds"]),
        (["--method", "dpo", "--seed", "1", "--seed", "2"], ["twice"]),
        (["--method", "dpo", "--epsilon", "0.1"], ["--epsilon", "rdpo"]),
        (["--method", "disco", "--world", "digits"], ["disco", "digits"]),
        (["--method", "dpo", "--init", "nowhere"], ["nowhere", "not a checkpoint"]),
        (["--method", "dpo", "--device", "cuda:7"], ["--device cuda:7"]),
        (["--method", "dpo", "--data", "nothing.jsonl"], ["nothing.jsonl"]),
        (
            ["--method", "dpo", "--world", "digits", "--temperature", "0.5", "--base_steps", "0"],
            ["--temperature"],
        ),
        (["--method", "dpo", "--claim", "--lr", "0.1"], ["--claim"]),
        (["--method", "dpo", "--seed", "0,0"], ["--seed", "twice"]),
        (["--method", "dpo,dpo"], ["dpo,dpo", "twice"]),
        (["--method", "dpo", "--out", "/dev/null/run"], ["--out /dev/null/run"]),
        (["--method", "irpo", "--flip", "0.1"], ["--flip", "ranking"]),
        (["--method", "irpo", "--k", "30"], ["k=30", "20"]),
        (["--method", "disco", "--length_bias", "1"], ["--length_bias", "arithmetic"]),
        (["--method", "ddo", "--flip", "0.1"], ["--flip", "ddo"]),
        (["--resume", "nowhere"], ["nowhere"]),
        (["--seed", "1"], ["--method"]),
        (["--method", "dpo", "--clip", "0"], ["--clip 0.0", "inf switches it off"]),
        (["--list", "--steps", "3"], ["--steps does nothing together with --list"]),
        (["--list", "--method", "dpo"], ["--method does nothing together with --list"]),
        (["--help", "--steps", "3"], ["--steps does nothing together with --help"]),
        (["--method", "dpo", "--help", "--beta", "2"], ["--beta does nothing together with"]),
        (["--help", "--list"], ["does nothing together"]),
        (["--list", "--resume", "x"], ["--resume does nothing together with --list"]),
    ],
)
def test_a_bad_flag_is_refused_in_one_line(tmp_path, capsys, argv, words):
    refused(capsys, argv, *words)
    assert not list(tmp_path.glob("out/*/metrics.jsonl"))


@pytest.mark.slow
def test_clipping_can_be_switched_off(capsys):
    argv = ["--method", "dpo", "--world", "bandit", "--steps", "2", "--clip", "inf"]
    assert train.main([*argv, "--out", "run"]) == 0
    assert train.main(["--help"]) == 0
    assert "inf: no clipping" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("pairs.jsonl", "dpo-pairs"),
        ("pairs.jsonl.gz", "dpo-pairs"),
        ("a.b.json", "dpo-a.b"),
        ("x.CSV", "dpo-x"),
        ("x.parquet", "dpo-x"),
        ("images.npz", "dpo-images"),
        ("owner/name", "dpo-name"),
    ],
)
def test_a_default_folder_is_named_without_the_ending_of_a_file(name, label):
    assert flags.label(runs("--method", "dpo", "--data", name), {}) == label
    (run,) = runs("--method", "dpo", "--world", "mine/my_world.py")
    assert flags.label([run], {}) == "dpo-my_world"


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("module", ["torch", "numpy", "lab"])
def test_ctrl_c_while_the_libraries_are_imported_is_one_line(tmp_path, module):
    train = os.path.join(store.HERE, "train.py")
    command = [sys.executable, "-X", "importtime", train, "--list"]  # says when a module is there
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    for line in process.stderr:
        if line.split()[-1].startswith(module.encode()):
            break
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read().decode().splitlines()
    process.wait()
    said = [line for line in rest if not line.startswith("import time:")]
    assert said == ["stopped"] and process.returncode == 130, said


@pytest.mark.slow
def test_no_traceback_from_the_shell(tmp_path):
    command = [sys.executable, os.path.join(store.HERE, "train.py"), "--method", "dpp"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (
        done.returncode == 2
        and done.stderr.count("\n") == 1
        and "dpo" in done.stderr
        and not done.stdout
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "line, words",
    [
        ("--method dpo --world bandit --dtype bfloat16", ["--dtype", "bandit"]),
        ("--method dpo --world bandit --eval_size 8", ["--eval_size", "bandit"]),
        ("--method dpo --world bandit --base_seed 3", ["--base_seed", "bandit"]),
        ("--method dpo --world bandit --steps 20 --warmup 5", ["--warmup 5", "4 of 20"]),
        *((f"--method dpo --{name}=", [f"--{name} needs a value"]) for name in flags.TEXTS),
        ("--method dpo --show --out x", ["--out", "--show"]),
        ("--method dpo --show --overwrite", ["--overwrite", "--show"]),
        ("--method dpo --show --seeds 2", ["--seeds", "--show"]),
        ("--method dpo --show --claim", ["--show", "--claim"]),
        ("--method dpo --show --beta 0.1,0.2", ["--show", "one value"]),
        ("--method dpo --show --seed 1,2", ["--show", "one value"]),
        ("--prompt hi --base_seed 1,2", ["--prompt", "one value"]),
        ("--prompt hi --seed 3", ["--seed", "--prompt", "--temperature 1"]),
        ("--prompt hi --seed 3 --temperature 0", ["--seed", "--prompt"]),
        ("--prompt hi --world digits", ["--prompt", "digits", "images"]),
        ("--method dpo --claim --dtype float32,bfloat16", ["--claim", "one value", "--dtype"]),
        ("--method dpo --prompts 99999999999999999999", ["--prompts", "at most"]),
        ("--method adpo --k 99999999999", ["--k", "at most"]),
        ("--method dpo --device meta", ["--device meta"]),
        ("--method dpo --device cpu,X", ["--device x"]),
    ],
)
def test_what_does_nothing_or_is_out_of_range_is_refused(tmp_path, capsys, line, words):
    refused(capsys, line.split(), *words)
    assert set(os.listdir(tmp_path)) <= {"cache"}


def test_a_switch_that_may_be_none_needs_no_value():
    given, _ = flags.read_flags(["--method", "urflex", "--both_right", "--critic", "flex"])
    assert given["both_right"] == "true" and given["critic"] == "flex"


def test_all_methods_are_asked_for_in_any_case():
    names = [about.name for about in flags.chosen_methods(["--method", "ALL"])]
    assert names == [about.name for about in flags.chosen_methods(["--method=all"])]
    assert {"dpo", "survey", "wide_deep"} <= set(names)


def test_a_flag_may_follow_another_one(capsys):
    argv = ["--method", "rdpo", "--flip", "0.1,0.2", "--epsilon", "=flip"]
    both = runs(*argv)
    assert [(r.settings.flip, r.cfg.epsilon) for r in both] == [(0.1, 0.1), (0.2, 0.2)]
    assert [r.varied for r in both] == [{"flip": 0.1}, {"flip": 0.2}]
    (run,) = runs("--method", "rdpo", "--epsilon==flip")
    assert run.cfg.epsilon == run.settings.flip == 0.3  # the default of the method
    (run,) = runs("--method", "dpo", "--base_seed", "=seed", "--seed", "4")
    assert run.settings.base_seed == 4
    for value, words in (
        ("=flop", "--flop is no flag of this run"),
        ("=", "-- is no flag of this run"),
        ("=label_temperature", "epsilon"),
    ):
        refused(capsys, [*argv[:-1], value], words)
    refused(capsys, ["--method", "dpo", "--seed", "=base_seed", "--base_seed", "=seed"], "itself")
    refused(capsys, ["--method", "dpo", "--steps", "=lr", "--lr", "0.5"], "--steps 0.5", "whole")
    refused(capsys, ["--prompt", "hi", "--temperature", "=seed"], "needs --method")
    refused(capsys, ["--method", "dpo", "--k", "=seed"], "--k")


def test_devices_and_their_like_are_named_in_any_case():
    names = dict(device="CPU", dtype="Float32", compile="ON", capture="Off", optimizer="DCT_AdamW")
    found = Settings(**names)
    assert {name: getattr(found, name) for name in names} == {
        name: value.lower() for name, value in names.items()
    }
    argv = ["--world", "bandit", "--steps", "2", "--device", "CPU", "--capture", "Off"]
    assert train.main(["--method", "dpo", *argv]) == 0
    assert Settings(optimizer="./My_Optimizer.py").optimizer == "./My_Optimizer.py"


def test_names_of_a_method_s_choices_are_understood_in_any_case(capsys):
    both = runs("--method", "survey", "--variant", "IPO,kto", "--world", "bandit")
    assert [run.cfg.variant for run in both] == ["ipo", "kto"]
    (run,) = runs("--method", "adpo", "--target", "Hard", "--smoothing", "0.1", "--reduce", "MEAN")
    assert (run.cfg.target, run.cfg.smoothing, run.cfg.reduce) == ("hard", 0.1, "mean")
    refused(
        capsys, ["--method", "survey", "--variant", "IPOO"], "variant = IPOO", "expected one of"
    )
    refused(capsys, ["--method", "survey", "--variant", "IPO", "--beta", "-1"], "beta = -1.0")
    for twice in (["--variant", "IPO,ipo"], ["--variant", "ipo", "--optimizer", "AdamW,adamw"]):
        refused(capsys, ["--method", "survey", *twice], "two runs are the same")


def test_choices_keep_the_spelling_of_their_file_and_free_text_its_own():
    @dataclasses.dataclass(frozen=True)
    class Choices:
        mode: str = "Hard"
        kind: str = "up"
        name: str = "Bob"
        both: bool = True

        def __post_init__(self):
            check_fields(self, mode=("Hard", "Soft"), both=(True, False))
            fill_variant(self, dict(up={}, down={}), "kind")

    cfg = Choices(mode="SOFT", kind="Down", name="Eve", both=False)
    assert (cfg.mode, cfg.kind, cfg.name, cfg.both) == ("Soft", "down", "Eve", False)
    assert Choices(mode="hard").mode == "Hard"
    with pytest.raises(UserError, match="mode = Harder: expected one of Hard, Soft"):
        Choices(mode="Harder")
    with pytest.raises(UserError, match="both = True: expected one of True, False"):
        Choices(both="True")
