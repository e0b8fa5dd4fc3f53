"""Methods that sample, search or train several times: a killed run ends like a whole one."""

import importlib

import pytest
import torch

from lab import Lab, Settings
from tests.lab.commands import Killed, killed_at

SMALL = dict(base_steps=0, eval_size=4, max_response=8, batch_size=4, steps=4)
DRIFT = SMALL | dict(world="drift", prompts=24)
RUNS = {
    "ofs": ("ofs_dpo", DRIFT, dict(every=2)),
    "cofs": ("ofs_dpo", DRIFT, dict(every=2, variant="cofs", memory=4)),
    "search": (
        "mcts_dpo",
        SMALL | dict(world="arithmetic", prompts=3),
        dict(every=2, simulations=2),
    ),
    "trie": ("mcts_dpo", dict(world="trie", steps=6, prompts=8, eval_every=1), dict(every=2)),
    "programs": (
        "dstc",
        SMALL | dict(world="programs", base_steps=40, max_response=14, prompts=40),
        dict(select="passed", rounds=2),
    ),
}


@pytest.mark.slow
@pytest.mark.usefixtures("own_folder")
@pytest.mark.parametrize(
    "name, call", [("ofs", 6), ("cofs", 7), ("search", 4), ("trie", 4), ("programs", 3)]
)
def test_a_killed_run_resumes_to_the_same_numbers(tmp_path, monkeypatch, name, call):
    method, settings, fields = RUNS[name]
    module = importlib.import_module(f"methods.{method}")
    monkeypatch.setattr(Lab, "checkpoint_every", 0.0)

    def ended(folder):
        lab = Lab(Settings(**settings), str(tmp_path / folder), quiet=True)
        return module.run(lab, module.Config(**fields)), lab.samples

    policy, samples = ended("whole")
    plain = killed_at(monkeypatch, call, module)
    with pytest.raises(Killed):
        ended("cut")
    monkeypatch.setattr(module, "loss", plain)
    again, count = ended("cut")
    assert count == samples
    for a, b in zip(policy.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    logs = [(tmp_path / folder / "metrics.jsonl").read_bytes() for folder in ("whole", "cut")]
    assert logs[0] == logs[1] and logs[0]
