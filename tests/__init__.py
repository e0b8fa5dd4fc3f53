"""Tests. Shared inputs are in tests/builders.py, fixtures in tests/conftest.py."""
