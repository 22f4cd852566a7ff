import numpy as np
import pytest

from hf_transfer_ext.evals.audit.report import plots
from hf_transfer_ext.evals.audit.run import Audit, Verdict
from hf_transfer_ext.measurement import Measurement


def measured(forget, retain):
    named = (("forget", forget), ("retain", retain))
    return [Measurement(f"{split} answer_probability", value, "p", True, 5) for split, value in named]


def test_each_plot_is_a_picture_and_what_has_nothing_to_draw_is_left_out(tmp_path):
    verdicts = [
        Verdict("role_play", 0.5, (0.25, 0.75), 0.5, 0.9, 0.1),
        Verdict("min_k", 0.0, None, 0.5, 0.9, 0.5, access="membership"),
    ]
    audit = Audit(verdicts, {}, probes={"unlearned": [0.5, 0.9]})
    before = {"original": measured(0.9, 0.9), "unlearned": measured(0.1, 0.8), "other": []}
    ratios = {"original": [0.1, 0.5, np.nan], "none": []}
    found = plots.save_plots(tmp_path, audit, before, ratios)
    assert [path.name for path in found] == ["recovery.png", "trade_off.png", "truth_ratios.png", "probes.png"]
    assert all(path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for path in found)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in found)
    assert plots.save_plots(tmp_path / "empty", Audit([], {}), {}, {"none": []}) == []


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "HAS_PLOTS", False)
    with pytest.raises(ImportError, match="pip install"):
        plots.save_plots(tmp_path, Audit([], {}), {}, {})
