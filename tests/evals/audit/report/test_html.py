import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml

from hf_transfer_ext.evals.audit.report.html import audit_report, save_audit
from hf_transfer_ext.evals.audit.run import Audit
from hf_transfer_ext.evals.audit.subject import AuditData
from hf_transfer_ext.evals.audit.verdict import Verdict
from hf_transfer_ext.measurement import Measurement

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"' &"


class Elements(HTMLParser):
    """Every element with its attributes; unclosed ones would show as a wrong nesting."""

    VOID = ("meta", "input", "br", "wbr", "line", "rect", "circle", "polyline")

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
        Verdict("relearn_few", 0.62, (0.4, 0.8), 0.55, 0.9, 0.1, access="fine-tuning"),
        Verdict(f"min_k {HOSTILE}", 0.3, None, 0.6, 0.9, 0.5, access="membership"),
        Verdict("adapter_removal", None, None, None, None, None, f"no adapter {HOSTILE}"),
    ]
    auc = Measurement("membership_auc(min_k)", 0.4, "area", False, 20, (0.3, 0.5))
    distance = Measurement("weight_distance", 0.01, "share of the original's norm", False, 99)
    probes = {"unlearned": [0.5, 0.7, 0.9], HOSTILE: [0.5, 0.5, 0.5]}
    audit = Audit(verdicts, {}, {"unlearned": [auc], HOSTILE: [auc]}, probes, [distance])
    before = [Measurement(f"{s} answer_probability", v, "p", True, 5) for s, v in (("forget", 0.9), ("retain", 0.8))]
    settings = {
        "measurements": {"before": before, HOSTILE: before},
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
    assert sum(tag == "svg" for tag, _ in parsed.found) == 5
    assert "who can train the model further: <b>62%</b>" in text and "who can only tell" in text
    assert 'id="search"' in text and "prefers-color-scheme: dark" in text and "width=device-width" in text


def test_without_examples_plots_or_judged_attacks_it_still_stands(tmp_path):
    audit = Audit([Verdict("in_context", None, None, 0.5, 0.9, None, "pass a retrained one")], {})
    text = audit_report(tmp_path / "small.html", audit).read_text()
    assert "No attack could be judged" in text and "pass a retrained one" in text


def saved(folder):
    verdicts = [
        Verdict("role_play", 0.5, (0.25, 0.75), 0.5, 0.9, 0.1),
        Verdict("in_context", None, None, None, None, None, "no"),
    ]
    audit = Audit(verdicts, {"role_play": np.array([0.25, np.nan])})
    rows = [{"question": "Who?", "answer": HOSTILE}, {"question": "What?", "answer": "that"}]
    written = {"unlearned": [HOSTILE, "<iframe src=javascript:alert(3)>"]}
    ratios = {"unlearned": [0.5, float("nan")]}
    save_audit(folder, audit, AuditData(rows), truth_ratios=ratios, generations=written)
    return folder


def test_everything_of_an_audit_is_saved_beside_the_report(tmp_path):
    folder = saved(tmp_path / "audit")
    summary = json.loads((folder / "audit.json").read_text())
    assert [v["recovered"] for v in summary["verdicts"]] == [0.5, None]
    assert summary["truth_ratios"] == {"unlearned": [0.5, None]}
    rows = [json.loads(line) for line in (folder / "examples.jsonl").read_text().splitlines()]
    assert rows[0]["unlearned writes"] == HOSTILE and [row["role_play"] for row in rows] == [0.25, None]
    (index,) = yaml.safe_load((folder / "model_index.yaml").read_text())["model-index"]
    told = {row["metrics"][0]["type"]: row["metrics"][0] for row in index["results"]}
    assert set(told) == {"recovered at worst", "recovered by role_play"}
    assert told["recovered at worst"]["value"] == 0.5 and told["recovered at worst"]["args"]["interval_95"] == [
        0.25,
        0.75,
    ]
    parsed = Elements()
    parsed.feed((folder / "report.html").read_text())
    assert parsed.open == [] and not [tag for tag, _ in parsed.found if tag in ("iframe", "img")]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_a_browser_runs_nothing_that_a_model_wrote(tmp_path):
    write = "<img src=x onerror=\"document.body.id='ran'\"><script>document.body.id='ran'</script>"
    audit = Audit([Verdict(write, 0.5, None, 0.5, 0.9, None, write)], {"role_play": np.array([0.5])})
    rows = [{"question": write, "answer": write}]
    save_audit(tmp_path, audit, AuditData(rows), generations={write: [write]})
    page = (tmp_path / "report.html").read_text()
    # The policy holds where an escape is missing, too.
    (tmp_path / "unescaped.html").write_text(page.replace("<h2>Examples</h2>", write))
    for name in ("report.html", "unescaped.html"):
        told = subprocess.run(
            ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", f"file://{tmp_path}/{name}"],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert "Recovery by attack" in told.stdout and '<body id="ran"' not in told.stdout


def test_it_names_the_model_and_explains_each_attack(tmp_path):
    about = {"model": "me/forgot", "method": HOSTILE, "date": "2026-01-02"}
    verdict = Verdict("plain_question", 0.5, None, 0.5, 0.9, 0.1, explanation="It asks.", floor_from="holdout")
    text = audit_report(tmp_path / "report.html", Audit([verdict], {}), about=about).read_text()
    for shown in ("<dt>model</dt><dd>me/forgot</dd>", "2026-01-02", "torch ", "It asks.", "holdout"):
        assert shown in text
    assert HOSTILE not in text


@pytest.mark.parametrize(
    "verdicts, kind, words",
    [
        ([("a", 0.05, (0.0, 0.08), "prompts")], "clean", "<b>5%</b>"),
        ([("a", 0.05, (0.0, 0.3), "prompts")], "", "do not rule out 30%"),
        ([("a", 0.05, (0.0, 0.08), "prompts"), ("b", 0.9, None, "membership")], "", "can still be told from unseen"),
        ([("a", 0.4, (0.0, 0.5), "prompts")], "leaks", "<b>40%</b>"),
        ([("a", 0.05, (0.0, 0.08), "prompts"), ("b", None, None, "weights")], "clean", "1 of 2 attacks could not"),
    ],
)
def test_the_headline_does_not_contradict_the_bars(tmp_path, verdicts, kind, words):
    audit = Audit([Verdict(name, *share, None, None, None, access=access) for name, *share, access in verdicts], {})
    text = audit_report(tmp_path / "report.html", audit).read_text()
    assert f'<div class="verdict {kind}">' in text and words in text


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_nothing_is_cut_off_on_a_phone(tmp_path):
    text, _ = report(tmp_path)
    probe = "<script>document.body.dataset.wide = document.documentElement.scrollWidth</script>"
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text).replace("</body>", probe + "</body>")
    (tmp_path / "wide.html").write_text(page)
    shown = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--window-size=390,3000", "--dump-dom",
         f"file://{tmp_path}/wide.html"], capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert int(re.search(r'data-wide="(\d+)"', shown.stdout)[1]) <= 500 and "overflow-x" not in text
