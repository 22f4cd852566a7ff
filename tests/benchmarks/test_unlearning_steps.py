import json

from benchmarks.unlearning_steps import main


def test_it_times_each_method_beside_a_plain_step(tmp_path, capsys):
    small = "--rounds 1 --batch 2 --length 8 --hidden 64 --layers 1 --vocabulary 300 --methods npo lat".split()
    found = main([*small, "--out", str(tmp_path / "steps")])
    assert list(found) == ["plain", "npo", "lat"] and found["plain"]["ratio"] == 1.0
    assert all(values["cpu_s"] > 0 and values["growth_bytes"] >= 0 for values in found.values())
    assert json.loads((tmp_path / "steps.json").read_text())["steps"] == found
    assert "| npo |" in (tmp_path / "steps.md").read_text() and "| npo |" in capsys.readouterr().out
