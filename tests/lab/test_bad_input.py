"""Bad files and folders: one line, exit status 2, nothing trained, nothing lost."""

import json

import numpy as np
import pytest

import train
from nanomodel import UNet, UNetConfig
from tests.lab.commands import FILE, PAIRS, TINY, refused, rows_file, small

pytestmark = pytest.mark.usefixtures("own_folder")


@pytest.mark.parametrize(
    "text, words",
    [
        (b"", ["empty"]),
        (b"\x00\x01\xff\xfe binary", ["pairs.jsonl:1"]),
        (b'{"prompt": "a", "chosen": "b"', ["pairs.jsonl:1"]),
        (b'{"prompt": "a", "chosen": "b"}\n', ["pairs.jsonl:1", "rejected"]),
        (b'{"prompt": "a", "chosen": "", "rejected": "c"}\n', ["pairs.jsonl:1", "chosen", "empty"]),
        (
            b'{"prompt": "a", "responses": ["b", "c"], "scores": [1, NaN]}\n',
            ["pairs.jsonl:1", "scores"],
        ),
        (b'{"prompt": "a", "responses": ["b", "c"], "scores": [1]}\n', ["pairs.jsonl:1", "scores"]),
    ],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path, capsys, text, words):
    (tmp_path / "pairs.jsonl").write_bytes(text)
    refused(capsys, ["--method", "dpo", "--data", "pairs.jsonl"], *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_files_a_method_cannot_use(tmp_path, capsys):
    path = rows_file(
        tmp_path / "labels.jsonl",
        [{"prompt": f"a {i}", "completion": "b", "label": True} for i in range(8)],
    )
    refused(capsys, ["--method", "dpo", "--data", path], "labels.jsonl", "pairs")
    path = rows_file(tmp_path / "pairs.jsonl", PAIRS)
    refused(capsys, ["--method", "disco", "--data", path], "disco", "verifier", "dpo")
    pairs = rows_file(tmp_path / "pairs.jsonl", PAIRS)
    refused(capsys, ["--method", "did", "--data", pairs], "did needs a world with a reward", "dpo")
    refused(
        capsys, ["--method", "disco", "--data", pairs], "disco needs a world with a verifier", "dpo"
    )


@pytest.mark.slow
def test_a_refused_run_leaves_no_folder(tmp_path, capsys, monkeypatch):
    small(monkeypatch)
    path = rows_file(tmp_path / "long.jsonl", [row | {"chosen": "yes " * 300} for row in PAIRS])
    refused(
        capsys, ["--method", "dpo", "--data", path, "--context", "64", "--out", "run"], "--truncate"
    )
    assert not (tmp_path / "run").exists()
    assert train.main(["--method", "dpo", "--world", "bandit", "--steps", "2", "--out", "run"]) == 0
    before = (
        tmp_path / "run" / "summary.json"
    ).read_bytes()  # a refused run gives back what --overwrite would have emptied
    refused(
        capsys,
        ["--method", "dpo", "--data", path, "--context", "64", "--out", "run", "--overwrite"],
        "--truncate",
    )
    assert (
        train.main(
            [
                "--method",
                "dpo",
                "--beta",
                "0.1,1",
                "--data",
                path,
                "--context",
                "64",
                "--out",
                "run",
                "--overwrite",
            ]
        )
        == 2
    )
    assert (tmp_path / "run" / "summary.json").read_bytes() == before and not list(
        tmp_path.glob("run.*")
    )


def test_a_prompt_longer_than_the_context(tmp_path, capsys, monkeypatch):
    small(monkeypatch)
    path = rows_file(
        tmp_path / "pairs.jsonl", [PAIRS[i] | {"prompt": "long " * 20 + str(i)} for i in range(20)]
    )
    refused(
        capsys, ["--method", "dpo", "--data", path, "--context", "64", *FILE], "64", "--truncate"
    )
    assert (
        train.main(
            [
                "--method",
                "dpo",
                "--data",
                path,
                "--context",
                "64",
                "--truncate",
                *FILE,
                "--out",
                "cut",
            ]
        )
        == 0
    )
    assert "cut to the context" in capsys.readouterr().out


@pytest.mark.slow
def test_out_folders_are_not_overwritten(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    refused(capsys, ["--method", "dpo", "--out", "mine"], "mine", "not empty")
    refused(
        capsys, ["--method", "dpo", "--out", "mine", "--overwrite"], "mine", "not look like a run"
    )
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"
    argv = ["--method", "dpo", "--world", "bandit", "--steps", "2", "--out", "run"]
    assert train.main(argv) == 0
    refused(capsys, argv, "run", "not empty")
    assert train.main([*argv, "--overwrite"]) == 0
    refused(
        capsys, ["--method", "dpo", "--out", str(tmp_path / "mine" / "thesis.txt")], "is a file"
    )


@pytest.mark.slow
def test_weights_that_do_not_fit(tmp_path, capsys):
    assert train.main(["--method", "dpo", *TINY, "--out", "a"]) == 0
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps(config | {"intermediate_size": 8}))
    capsys.readouterr()
    refused(capsys, ["--method", "dpo", "--init", "a"], "shape", "gate_proj")
    (tmp_path / "a" / "model.safetensors").write_bytes(b"not safetensors")
    refused(capsys, ["--method", "dpo", "--init", "a"], "model.safetensors")
    (tmp_path / "a" / "config.json").write_text("{")
    refused(capsys, ["--method", "dpo", "--init", "a"], "config.json")


@pytest.mark.slow
def test_what_a_model_writes_reaches_the_terminal_as_printable_characters(tmp_path, capsys):
    """An untrained model of bytes writes control characters."""
    raw = ["--base_steps", "0", "--max_response", "30"]
    assert train.main(["--prompt", "hi", *raw, "--temperature", "1", "--seed", "1"]) == 0
    asked = capsys.readouterr().out
    argv = ["--method", "dpo", *raw, "--steps", "1", "--prompts", "16"]
    argv += ["--eval_size", "4"]
    assert train.main([*argv, "--out", "run"]) == 0
    for text in (asked, capsys.readouterr().out, (tmp_path / "run" / "samples.txt").read_text()):
        assert all(line.isprintable() for line in text.split("\n")), repr(text)
        assert "\\x" in text


def test_a_model_of_images_is_not_asked_for_text(tmp_path, capsys, monkeypatch):
    small(monkeypatch)
    UNet(UNetConfig(width=8)).save_pretrained(str(tmp_path / "unet"))
    path = rows_file(tmp_path / "pairs.jsonl", PAIRS)
    refused(capsys, ["--prompt", "hi", "--init", "unet"], "--init unet", "UNet", "text")
    refused(capsys, ["--method", "dpo", "--init", "unet"], "--init unet", "UNet", "text")
    refused(capsys, ["--method", "dpo", "--init", "unet", "--data", path], "unet", "UNet", "text")


def test_a_model_of_other_images_or_classes_is_refused(tmp_path, capsys):
    argv = ["--method", "dpo", "--world", "digits", "--init", "unet"]
    for wrong, words in ((dict(size=(4, 4)), "shape (1, 4, 4)"), (dict(classes=5), "5 classes")):
        UNet(UNetConfig(width=8, **wrong)).save_pretrained(str(tmp_path / "unet"))
        refused(capsys, argv, f"--init unet makes images of {words}, digits has ")


def test_a_file_beyond_the_limit_is_read_with_a_larger_one(tmp_path, capsys, monkeypatch):
    small(monkeypatch)
    path = rows_file(tmp_path / "pairs.jsonl", PAIRS)
    argv = ["--method", "dpo", "--data", path, "--show", "--data_limit"]
    refused(capsys, [*argv, "0.00001"], "pairs.jsonl", "--data_limit allows more")
    assert train.main([*argv, "0.001"]) == 0
    noise = np.random.default_rng(0).integers(0, 256, (40, 8, 8)).astype("uint8")
    np.savez(tmp_path / "images.npz", images=noise, labels=np.arange(40) % 2)
    argv[3] = str(tmp_path / "images.npz")
    refused(capsys, [*argv, "0.000001"], "images.npz", "--data_limit allows more")


def test_the_name_of_a_folder_is_not_printed_raw(capsys):
    argv = ["--method", "dpo", "--world", "bandit", "--steps", "2", "--prompts", "64"]
    assert train.main([*argv, "--out", "\x1b[31mred"]) == 0
    out, error = capsys.readouterr()
    assert "\x1b" not in out + error and "written to \\x1b[31mred/: " in out
