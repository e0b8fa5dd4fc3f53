"""--jobs, --shard and --merge: one command on several processes or machines."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

import train
from data import UserError
from lab import flags, results, spread, store
from lab.store import write_json
from tests.lab.commands import refused

pytestmark = pytest.mark.usefixtures("own_folder")
SWEEP = ["--method", "dpo", "--world", "bandit", "--steps", "3", "--beta", "0.1,1", "--seeds", "2"]


def table(folder):
    return json.loads((folder / "sweep.json").read_text())


@pytest.fixture
def whole(tmp_path):
    """The sweep in one process."""
    assert train.main([*SWEEP, "--out", "whole"]) == 0
    return table(tmp_path / "whole")


@pytest.mark.slow
def test_shards_that_share_a_folder_end_with_the_table_of_the_whole_sweep(tmp_path, whole, capsys):
    assert train.main([*SWEEP, "--shard", "2/2", "--out", "s"]) == 0
    assert "2 of 4 runs are not done" in capsys.readouterr().out
    assert len(table(tmp_path / "s")) == 2
    assert train.main([*SWEEP, "--shard", "1/2", "--out", "s"]) == 0
    assert "not done" not in capsys.readouterr().out
    assert table(tmp_path / "s") == whole


@pytest.mark.slow
def test_a_shard_that_is_given_again_repeats_nothing(tmp_path):
    argv = [*SWEEP, "--shard", "1/4", "--out", "s"]
    assert train.main(argv) == 0
    (summary,) = (tmp_path / "s").glob("*/summary.json")
    before = summary.stat().st_mtime_ns
    assert train.main(argv) == 0
    assert summary.stat().st_mtime_ns == before


@pytest.mark.slow
def test_resume_of_a_shared_folder_does_what_no_shard_has_done(tmp_path, whole):
    assert train.main([*SWEEP, "--shard", "3/4", "--out", "s"]) == 0
    assert train.main(["--resume", "s"]) == 0
    assert table(tmp_path / "s") == whole


@pytest.mark.slow
def test_merge_joins_the_folders_of_shards(tmp_path, whole, capsys):
    for i in (1, 2):
        assert train.main([*SWEEP, "--shard", f"{i}/2", "--out", f"part{i}"]) == 0
    assert train.main(["--merge", "part1", "part2", "--out", "all"]) == 0
    assert table(tmp_path / "all") == whole
    assert len(table(tmp_path / "part1")) == 2  # what is joined stays as it was
    capsys.readouterr()
    assert train.main(["--merge", "part1"]) == 0  # in place
    assert "2 of 4 runs are not done: seed 0, beta 1.0" in capsys.readouterr().out


@pytest.mark.slow
def test_jobs_make_the_table_of_one_process_and_name_a_run_that_fails(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("NANOPREF_CACHE", str(tmp_path / "cache"))
    argv = ["--method", "dpo", "--world", "bandit", "--steps", "3", "--lr", "0.01,1e300"]
    assert train.main([*argv, "--out", "one"]) == 2
    assert train.main([*argv, "--jobs", "2", "--out", "two"]) == 2
    said = capsys.readouterr()
    assert "1 of 2 runs failed: lr 1e+300: " in said.err and "not done" not in said.out
    assert "[2/2]" in said.err
    assert table(tmp_path / "two") == table(tmp_path / "one") and len(table(tmp_path / "two")) == 1


@pytest.mark.slow
def test_jobs_show_the_traceback_of_a_method_that_fails(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("NANOPREF_CACHE", str(tmp_path / "cache"))
    with open(os.path.join(store.HERE, "methods", "_template.py")) as file:
        text = file.read()
    assert "F.relu(cfg.delta - z)" in text
    text = text.replace("F.relu(cfg.delta - z)", "F.relu(cfg.delta - z) / [1][int(cfg.delta > 2)]")
    (tmp_path / "one_beta.py").write_text(text)
    argv = ["--method", str(tmp_path / "one_beta.py"), "--world", "bandit", "--steps", "2"]
    argv += ["--prompts", "32", "--batch_size", "8", "--delta", "1,2.5,1.5", "--out", "s"]
    assert train.main([*argv, "--jobs", "2"]) == 2
    error = capsys.readouterr().err
    assert error.count("Traceback (most recent call last):") == 1 and "one_beta.py" in error
    last = error.strip().splitlines()[-1]
    assert last.startswith("train.py: 1 of 3 runs failed: delta 2.5: IndexError: list index")
    assert last.count("delta 2.5") == 1 and len(table(tmp_path / "s")) == 2


def test_the_claims_of_several_papers_are_shared_and_joined(tmp_path, monkeypatch, capsys):
    known = []

    def measured(name, module, settings, seeds, out, quiet=False):
        known.append(name)
        about = flags.load_claims(module)
        block = {"command": "", "commit": "", "run": results.run_of(out), "seeds": seeds}
        block |= {"seconds": 1.0, "source": results.stamp(about), "claims": [], "series": {}}
        head = {"paper": name, "title": name, "family": "pairs", "exact checks": 1}
        write_json(f"{out}/{name}.json", head | {"reported": block})
        return []

    monkeypatch.setattr(results, "measured", measured)
    argv = ["--method", "dpo,sft,rdpo", "--claim"]
    assert train.main([*argv, "--out", "c", "--shard", "1/2"]) == 0
    assert known == ["dpo", "rdpo"] and "sft: not done" in capsys.readouterr().out
    assert train.main([*argv, "--out", "c", "--shard", "2/2"]) == 0
    assert known == ["dpo", "rdpo", "sft"] and "not done" not in capsys.readouterr().out
    for i in (1, 2):
        assert train.main([*argv, "--out", f"c{i}", "--shard", f"{i}/2"]) == 0
    judged = []
    monkeypatch.setattr(results, "again", lambda out, chosen: judged.append(out) or 0)
    assert train.main(["--merge", "c1", "c2", "--out", "all"]) == 0
    assert sorted(results.stored("all")) == ["dpo", "rdpo", "sft"] and judged == ["all"]


def test_a_paper_that_fails_in_another_process_is_named_beside_methods_without_claims(
    tmp_path, monkeypatch, capsys
):
    def failing(given, out, names, jobs):
        assert names == ["disco", "irpo"]
        return {1: "no memory"}

    monkeypatch.setattr(spread, "in_processes", failing)
    monkeypatch.setattr(results, "publish", lambda out: None)
    argv = ["--method", "disco,grpo,irpo", "--claim", "--jobs", "2", "--out", "c"]
    train.main(argv)
    said = capsys.readouterr()
    assert "irpo: no memory" in said.err and "left out: grpo has no claims" in said.err
    assert "[2/2] irpo: not done" in said.out


@pytest.mark.slow
@pytest.mark.parametrize(
    "argv, word",
    [
        ([*SWEEP, "--shard", "1/2"], "--shard needs --out"),
        ([*SWEEP, "--shard", "3/2", "--out", "s"], "from 1 to n"),
        ([*SWEEP, "--shard", "0/2", "--out", "s"], "from 1 to n"),
        ([*SWEEP, "--shard", "half", "--out", "s"], "such as 2/4"),
        ([*SWEEP, "--shard", "1/2", "--jobs", "2", "--out", "s"], "exclude each other"),
        ([*SWEEP, "--shard", "1/2", "--out", "s", "--overwrite"], "other shards"),
        ([*SWEEP, "--jobs", "0"], "between 1 and"),
        ([*SWEEP, "--jobs", "two"], "whole number"),
        (["--method", "dpo", "--jobs", "2"], "does nothing with one run"),
        (["--method", "dpo", "--claim", "--jobs", "2"], "claims of one paper"),
        (["--method", "dpo,sft", "--claim", "--smoke", "--jobs", "2"], "together with --smoke"),
        (["--merge", "nowhere"], "nowhere has no readable run.json"),
        (["--merge", "nowhere", "--steps", "3"], "--steps does nothing together with --merge"),
        (["--method", "dpo", "--show", "--jobs", "2"], "--jobs"),
    ],
)
def test_what_cannot_be_shared_is_refused(tmp_path, capsys, argv, word):
    refused(capsys, argv, word)
    assert not (tmp_path / "s").exists()


@pytest.mark.slow
def test_shards_of_another_command_are_refused(tmp_path, capsys):
    assert train.main([*SWEEP, "--shard", "1/4", "--out", "s"]) == 0
    other = [*SWEEP, "--flip", "0.1"]
    refused(capsys, [*other, "--shard", "2/4", "--out", "s"], "of another command")
    assert train.main([*other, "--shard", "2/4", "--out", "t"]) == 0
    refused(capsys, ["--merge", "s", "t"], "differ in --flip")


@pytest.mark.slow
def test_a_run_that_another_shard_is_doing_is_left_to_it(tmp_path, capsys):
    assert train.main([*SWEEP, "--shard", "1/4", "--out", "s"]) == 0
    (place,) = (tmp_path / "s").glob("000-*")
    os.remove(place / "summary.json")
    with store.alone(str(place), wait=False):
        assert train.main([*SWEEP, "--shard", "1/4", "--out", "s"]) == 2
    assert "is being written by another run" in capsys.readouterr().err
    assert place.exists()


def test_a_value_of_the_cache_is_made_by_one_process_at_a_time(tmp_path):
    order, path = [], str(tmp_path / "value")

    def make(name):
        with store.alone(path):
            order.append(name)
            time.sleep(0.3)
            order.append(name)

    threads = [threading.Thread(target=make, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert order in (list("aabb"), list("bbaa")) and not os.path.exists(path + ".lock")


def test_a_value_that_cannot_be_made_leaves_no_lock(tmp_path):
    with pytest.raises(UserError), store.alone(str(tmp_path / "value")):
        raise UserError("no")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM that a process can handle")
@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_no_process_of_jobs_outlives_the_command(tmp_path, number, status):
    # the tasks are stand-ins that write their process id and wait
    (tmp_path / "train.py").write_text(
        "import os, sys, time\n"
        "open(f'{sys.argv[-1][0]}.pid', 'w').write(f'{os.getpid()} ')\n"
        "time.sleep(60)\n"
    )
    command = (
        "import signal, sys\n"
        "from lab import spread\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "spread.HERE, spread.PATIENCE = '.', 1\n"
        "try:\n"
        "    spread.in_processes({}, 'out', ['a', 'b', 'c'], 2)\n"
        "except KeyboardInterrupt:\n"
        "    sys.exit(130)\n"
    )
    environment = os.environ | {"PYTHONPATH": store.HERE}
    process = subprocess.Popen([sys.executable, "-c", command], cwd=tmp_path, env=environment)
    end, numbers = time.time() + 60, []
    while len(numbers) < 2 and time.time() < end:
        time.sleep(0.05)
        texts = [path.read_text() for path in tmp_path.glob("*.pid")]
        numbers = [int(text) for text in texts if text.endswith(" ")]
    process.send_signal(number)
    assert process.wait(30) == status and len(numbers) == 2
    assert len(list(tmp_path.glob("*.pid"))) == 2  # the third task was not begun
    for number in numbers:
        with pytest.raises(ProcessLookupError):
            os.kill(number, 0)


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_after_ctrl_c_processes_have_the_time_to_write_a_checkpoint(tmp_path):
    # Ctrl-C reaches all processes of a terminal; a stand-in needs a second to write
    (tmp_path / "train.py").write_text(
        "import signal, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "open('begun', 'w').close()\n"
        "try:\n"
        "    time.sleep(60)\n"
        "except KeyboardInterrupt:\n"
        "    time.sleep(1)\n"
        "    open('checkpoint', 'w').close()\n"
    )
    command = (
        "import signal\n"
        "from lab import spread\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "spread.HERE = '.'\n"
        "spread.in_processes({}, 'out', ['a'], 2)\n"
    )
    environment = os.environ | {"PYTHONPATH": store.HERE}
    how = dict(cwd=tmp_path, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)
    process = subprocess.Popen([sys.executable, "-c", command], **how)
    end = time.time() + 60
    while not (tmp_path / "begun").exists() and time.time() < end:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    process.wait(30)
    assert (tmp_path / "checkpoint").exists()


def test_shares_are_disjoint_and_cover_all_tasks():
    parts = [list(spread.share(7, f"{i}/3")) for i in (1, 2, 3)]
    assert parts == [[0, 3, 6], [1, 4], [2, 5]] and list(spread.share(3, None)) == [0, 1, 2]
