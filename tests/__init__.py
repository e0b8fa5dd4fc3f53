"""Tests; shared inputs stand in tests/builders.py, fixtures in tests/conftest.py."""
