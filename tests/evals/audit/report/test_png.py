import numpy as np
import pytest

from hf_transfer_ext.evals.audit.report import png
from hf_transfer_ext.evals.audit.report.drawings import (
    COLORS,
    Label,
    Rect,
    distribution_drawing,
    drawings_of,
    fitted,
    legend,
    recovery_drawing,
    text_width,
)
from hf_transfer_ext.evals.audit.verdict import Verdict
from hf_transfer_ext.measurement import Measurement

VERDICTS = [
    Verdict("role_play" + "_and_more" * 12, 1.0, (0.25, 1.0), 0.5, 0.9, 0.1),
    Verdict("relearn_few", 0.5, (0.25, 0.75), 0.5, 0.9, 0.1, access="fine-tuning"),
    Verdict("min_k", 0.0, None, 0.5, 0.9, 0.5, access="membership"),
]
MODELS = ["original", "a model with a very long name, longer than the plot is wide, and some more", "$\\alpha$ & <b>"]


def probabilities(forget, retain):
    named = (("forget", forget), ("retain", retain))
    return [Measurement(f"{split} answer_probability", value, "p", True, 5) for split, value in named]


def all_drawings():
    measurements = {name: probabilities(0.9 - 0.1 * i, 0.9) for i, name in enumerate(MODELS)} | {"other": []}
    ratios = {name: [1e-9, 0.5, np.nan, 1e9] for name in MODELS} | {"none": []}
    return drawings_of(VERDICTS, measurements, ratios, {name: [0.5, 0.9, 0.7] for name in MODELS})


def test_each_drawing_is_a_picture_and_what_has_nothing_to_draw_is_left_out(tmp_path):
    found = png.save_pngs(tmp_path, all_drawings())
    names = ["recovery.png", "membership.png", "trade_off.png", "truth_ratios.png", "probes.png"]
    assert [path.name for path in found] == names
    assert all(path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for path in found)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert drawings_of([], {}, {"none": []}, {}) == {}


def box(label):
    """(left, top, right, bottom) of a text."""
    wide, high = text_width(label.text), 10
    if label.vertical:
        return label.x - high / 2, label.y - wide / 2, label.x + high / 2, label.y + wide / 2
    left = {"start": label.x, "middle": label.x - wide / 2, "end": label.x - wide}[label.anchor]
    return left, label.y - high, left + wide, label.y


@pytest.mark.parametrize("name", ["recovery", "membership", "trade_off", "truth_ratios", "probes"])
def test_no_text_overprints_another_or_leaves_its_drawing(name):
    drawing = all_drawings()[name]
    boxes = [(shape.text, box(shape)) for shape in drawing.shapes if isinstance(shape, Label)]
    for i, (text, (left, top, right, bottom)) in enumerate(boxes):
        assert 0 <= left and right <= drawing.width and 0 <= top and bottom <= drawing.height, text
        for other, (left2, top2, right2, bottom2) in boxes[:i]:
            assert right <= left2 or right2 <= left or bottom <= top2 or bottom2 <= top, (text, other)
    assert all(shape.role in COLORS for shape in drawing.shapes)


def test_a_bar_is_as_long_as_its_share():
    bars = [shape for shape in recovery_drawing(VERDICTS).shapes if isinstance(shape, Rect) and shape.height == 13]
    assert bars[1].width == pytest.approx(0.5 * bars[0].width) and bars[2].width == 1.0
    assert recovery_drawing([Verdict("a", None, None, None, None, None)]) is None


def test_a_legend_takes_as_many_lines_as_it_needs():
    assert legend({"a": "bar"}, 0, 0, 300)[1] == 20 and legend(dict.fromkeys(MODELS, "bar"), 0, 0, 300)[1] > 20
    assert fitted("abc", 100) == "abc" and fitted("a" * 99, 100).endswith("…")
    assert distribution_drawing({"a": [float("nan")]}) is None


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(png, "HAS_MATPLOTLIB", False)
    with pytest.raises(ImportError, match="pip install"):
        png.save_pngs(tmp_path, all_drawings())
