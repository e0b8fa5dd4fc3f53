"""docs/data.md: its example rows are read as the page says."""

import re
from pathlib import Path

import pytest

from data import DataError
from toy.files import read_preferences

TEXT = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
ROWS = re.search(r"```json\n(.*?)```", TEXT, re.S)[1].splitlines()


@pytest.mark.parametrize("n, responses", [(0, 2), (1, 2), (2, 3), (3, 1)])
def test_every_format_of_the_document_is_read(tmp_path, n, responses):
    path = tmp_path / "pairs.jsonl"
    path.write_text(ROWS[n] + "\n", encoding="utf-8")
    (row,), counts = read_preferences(path)
    assert len(row["responses"]) == responses and not counts and len(ROWS) == 4


def test_the_line_of_the_document_is_what_a_refusal_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    damaged = ROWS[0].replace(" 5", "")
    Path("pairs.jsonl").write_text(f"{ROWS[0]}\n{damaged}\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_preferences("pairs.jsonl")
    assert f"\n    {caught.value}\n" in TEXT
