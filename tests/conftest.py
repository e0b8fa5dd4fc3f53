"""Fixtures of the tests that run whole commands, and the options of tests/fuzz.py."""

import os
import sys

if "PYTEST_XDIST_WORKER" in os.environ:  # one thread a process: two of each fight for two cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported, by children too

import pytest

from lab import Lab, compare, render, settings, store

draw_curves = compare.picture


def pytest_configure(config):
    """Tests run on the CPU, unless --device says otherwise; the commands they start do so, too."""
    os.environ["NANOPREF_DEVICE"] = config.getoption("--device")


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """An empty cache and an empty current folder; curves.png, which is slow, is not drawn."""
    monkeypatch.setattr(store, "CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Lab, "memory", {})
    monkeypatch.setattr(compare, "picture", lambda *about: False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def forget():
    """Files of other tests are not known by their names."""
    before = list(sys.path)
    yield
    sys.path[:] = before
    for name in list(settings.loaded):
        del sys.modules[name], settings.loaded[name]


@pytest.fixture
def pictures(own_folder, monkeypatch):
    """Draw curves.png after all."""
    monkeypatch.setattr(compare, "picture", draw_curves)


@pytest.fixture
def impatient(tmp_path, monkeypatch):
    """A renderer of chat templates that may use a quarter of a second and 200 MB."""
    text = open(render.__file__, encoding="utf-8").read()
    text = text.replace("SECONDS = 5.0", "SECONDS = 0.25").replace("MEMORY = 512", "MEMORY = 200")
    (tmp_path / "render.py").write_text(text)
    monkeypatch.setattr(render, "__file__", str(tmp_path / "render.py"))


def pytest_addoption(parser):
    """The device of all tests, and how much tests/fuzz.py tries."""
    about = "device of what does not name one: cpu or cuda"
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help=about)
    group = parser.getgroup("fuzz", "random and hostile input (pytest -m fuzz tests/fuzz.py)")
    group.addoption("--fuzz-seed", type=int, default=0, help="seed of the first case of each kind")
    group.addoption("--fuzz-cases", type=int, default=300, help="number of cases, of all kinds")
