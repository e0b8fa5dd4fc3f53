"""Fixtures of the tests that run whole commands."""

import pytest

from lab import Lab, store


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """An empty cache and an empty current folder."""
    monkeypatch.setattr(store, "CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Lab, "memory", {})
    monkeypatch.chdir(tmp_path)
