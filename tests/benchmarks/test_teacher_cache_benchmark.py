import json

import pytest

from benchmarks import teacher_cache


@pytest.mark.slow
def test_the_table_shows_what_was_measured(tmp_path):
    content = teacher_cache.main(
        ["--out", str(tmp_path / "t"), "--k", "8", "--tokens", "4", "--vocab", "300", "--rounds", "1", "--steps", "2",
         "--length", "8"]
    )  # fmt: skip
    text = (tmp_path / "t.md").read_text()
    assert json.loads((tmp_path / "t.json").read_text()) == content
    assert len(content["errors"]) == 3 and "| samples | 0 | 8 |" in text and "| cached teacher |" in text
    errors = {row["kind"]: row for row in content["errors"]}
    assert errors["samples"]["error of the mean of 40"] < errors["samples"]["error of one draw"]
