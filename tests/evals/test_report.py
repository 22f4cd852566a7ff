import re
from html.parser import HTMLParser

import numpy as np

from hf_transfer_ext.evals.audit.audit import Audit, Verdict
from hf_transfer_ext.evals.measurement import Measurement
from hf_transfer_ext.evals.report import audit_report

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"' &"


class Elements(HTMLParser):
    """Every element with its attributes; unclosed ones would show as a wrong nesting."""

    VOID = ("meta", "input", "br", "line", "rect", "circle", "polyline")

    def __init__(self):
        super().__init__()
        self.found, self.open, self.data = [], [], []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.data.append(data)


def report(tmp_path, **changes):
    verdicts = [
        Verdict("relearn_few", 0.62, (0.4, 0.8), 0.55, 0.9, 0.1),
        Verdict("adapter_removal", None, None, None, None, None, f"no adapter {HOSTILE}"),
    ]
    audit = Audit(verdicts, {}, [Measurement("membership_auc(min_k)", 0.4, "area", False, 20, (0.3, 0.5))])
    before = [Measurement(f"{s} answer_probability", v, "p", True, 5) for s, v in (("forget", 0.9), ("retain", 0.8))]
    settings = {
        "measured": {"before": before, HOSTILE: before},
        "truth_ratios": {"before": [0.5, 0.7, 0.2], "after": np.array([1.0, 0.0, 3.0])},
        "examples": [{"question": HOSTILE, "generation": None, "relearn_few": 0.25}],
        "title": HOSTILE,
        **changes,
    }
    text = audit_report(tmp_path / "report.html", audit, **settings).read_text()
    parsed = Elements()
    parsed.feed(text)
    return text, parsed


def test_text_of_models_and_data_is_shown_and_never_run(tmp_path):
    _, parsed = report(tmp_path)
    scripts = [tag for tag, _ in parsed.found if tag == "script"]
    assert len(scripts) == 1 and not [1 for tag, attrs in parsed.found if tag == "img" or "onerror" in attrs]
    assert parsed.open == [] and any("alert(1)" in piece for piece in parsed.data)
    # Even if an escape were forgotten: only the script whose digest the policy names may run.
    policy = next(a["content"] for tag, a in parsed.found if tag == "meta" and "Content-Security-Policy" in a.values())
    assert re.search(r"default-src 'none'.*script-src 'sha256-[\w+/]{43}='", policy)


def test_it_loads_nothing(tmp_path):
    _, parsed = report(tmp_path)
    assert not [1 for _, attrs in parsed.found if "src" in attrs or "href" in attrs]


def test_it_says_the_worst_first_and_shows_all(tmp_path):
    text, parsed = report(tmp_path)
    assert "<b>62%</b>" in text and "95 % interval 40% to 80%" in text
    assert sum(tag == "svg" for tag, _ in parsed.found) == 3
    assert 'id="search"' in text and "prefers-color-scheme: dark" in text and "width=device-width" in text


def test_without_examples_plots_or_judged_attacks_it_still_stands(tmp_path):
    audit = Audit([Verdict("in_context", None, None, 0.5, 0.9, None, "give a retrained one")], {}, [])
    text = audit_report(tmp_path / "small.html", audit).read_text()
    assert "No attack could be judged" in text and "give a retrained one" in text
