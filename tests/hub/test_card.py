import json
import re

import pytest
import yaml
from hub_server import check_card, front_matter
from huggingface_hub import ModelCard
from tiny import tiny_llama

from hf_transfer_ext.hub import privacy
from hf_transfer_ext.hub.card import END, base_models, eval_results_yaml, model_card
from hf_transfer_ext.hub.finish import finish_run
from hf_transfer_ext.hub.lineage_tree import lineage_tree, tree_text
from hf_transfer_ext.hub.publish import save_result
from hf_transfer_ext.hub.record import RunInput, RunRecord, describe_input, read_record
from hf_transfer_ext.hub.report import report_card
from hf_transfer_ext.hub.servable import Server
from hf_transfer_ext.measurement import Measurement

TOKEN = "hf_" + "aB3" * 12
MIT = {"license": "mit"}


def record(*inputs, job="distillation", **fields):
    return RunRecord(**{"job": job, "recipe": "recipes/distill.py", "inputs": list(inputs), **fields})


def on_hub(name, role="model", **fields):
    return RunInput(name, role, True, "c" * 40, {"model.safetensors": "d" * 64}, **fields)


def perplexity(value, **fields):
    return Measurement(**{
        "name": "perplexity", "value": value, "unit": "perplexity", "higher_is_better": False, "examples": 1200,
        "dataset": "held-out texts", **fields,
    })  # fmt: skip


def table_row(card, start):
    return next(line for line in str(card).splitlines() if line.startswith(f"| `{start}`"))


def test_the_front_matter_holds_what_the_hub_asks_for():
    made = model_card(
        record(
            on_hub("org/teacher", "teacher", license=MIT),
            on_hub("org/student", "student", license=MIT),
            on_hub("org/data", "dataset"),
            metrics=[perplexity(12.5, interval=(12.0, 13.0), dataset="org/data, test")],
            compared={"before": [perplexity(20.0, dataset="org/data, test")]},
        ),
        title="A student",
    )
    assert check_card(str(made)) == ([], [])
    data = front_matter(str(made))
    assert data["base_model"] == "org/student" and data["base_model_relation"] == "finetune"
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "text-generation"
    assert data["license"] == "mit" and data["datasets"] == ["org/data"]
    assert data["tags"] == ["hf_transfer_ext", "distillation"]
    result = data["model-index"][0]["results"][0]
    assert data["model-index"][0]["name"] == "A student" and result["dataset"]["type"] == "org/data"
    assert result["metrics"][0]["type"] == "perplexity" and result["metrics"][0]["value"] == 12.5
    again = ModelCard(str(made))
    assert again.data.eval_results[0].metric_value == 12.5 and yaml.safe_load(again.data.to_yaml()) == data


@pytest.mark.parametrize(
    ("made", "bases", "relation", "library"),
    [
        (model_card(record(on_hub("a/t", "teacher"))), "a/t", "finetune", "transformers"),
        (model_card(record(on_hub("a/m"), job="unlearning")), "a/m", "finetune", "transformers"),
        (model_card(record(on_hub("a/m"), job="unlearning"), adapter=True), "a/m", "adapter", "peft"),
        (
            model_card(record(on_hub("a/ft"), on_hub("a/base", "base"), job="extraction"), adapter=True),
            "a/base",
            "adapter",
            "peft",
        ),
        (
            model_card(record(on_hub("a/base", "base"), on_hub("a/x"), on_hub("a/y"), on_hub("a/x"), job="merging")),
            ["a/base", "a/x", "a/y"],
            "merge",
            "transformers",
        ),
        (
            model_card(record(on_hub("a/m"), job="something new"), relation="quantized"),
            "a/m",
            "quantized",
            "transformers",
        ),
    ],
    ids=["distillation", "unlearning", "unlearning-adapter", "extraction", "merging", "other"],
)
def test_bases_and_their_relation(made, bases, relation, library):
    data = front_matter(str(made))
    assert (data["base_model"], data["base_model_relation"], data["library_name"]) == (bases, relation, library)
    assert check_card(str(made)) == ([], [])
    with pytest.raises(ValueError, match="relation"):
        model_card(record(), relation="cousin")


def test_a_lora_of_a_merge_tells_its_base_from_its_other_parents():
    merged = record(on_hub("a/base", "base"), on_hub("a/x"), on_hub("a/y"), job="merging")
    data = front_matter(str(model_card(merged, adapter=True)))
    assert (data["base_model"], data["base_model_relation"]) == ("a/base", "adapter")
    assert data["tags"] == ["hf_transfer_ext", "merging", "merge", "lora"]
    card = str(model_card(merged, adapter=True))
    assert "It also carries what was learned by `a/x`, `a/y`." in card and 'from_pretrained("a/base")' in card
    assert front_matter(str(model_card(merged)))["tags"] == ["hf_transfer_ext", "merging", "merge"]
    assert "It also carries" not in str(model_card(merged))


def test_results_on_data_of_the_hub_stand_in_the_hubs_present_form():
    from huggingface_hub import parse_eval_result_entries

    found = [
        perplexity(12.5, interval=(12.0, 13.0), dataset="org/data, test"),
        perplexity(3.0, dataset="my rows"),
        perplexity(float("nan"), dataset="org/data, test"),
    ]
    text = eval_results_yaml(record(on_hub("org/data", "dataset"), metrics=found))
    (entry,) = parse_eval_result_entries(yaml.safe_load(text))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("org/data", "perplexity", 12.5)
    assert entry.dataset_revision == "c" * 40 and entry.date
    assert entry.notes == "perplexity, lower is better, 1200 examples, 95 % interval [12, 13]"
    assert eval_results_yaml(record(metrics=found)) == ""


def test_a_local_base_is_not_named_as_a_repository():
    grandparent = record(on_hub("a/m", "student"))
    local = RunInput("student", "model", record=grandparent)
    assert base_models(record(local, job="unlearning")) == ["a/m"]
    # An adapter fits the local folder alone, so the repository behind it must not be offered in its place.
    data = front_matter(str(model_card(record(local, job="unlearning"), adapter=True)))
    assert "base_model" not in data and "base_model_relation" not in data
    assert "base_model" not in front_matter(str(model_card(record(RunInput("x", "teacher")))))


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ([on_hub("a/x", license=MIT), on_hub("a/y", license=MIT)], MIT),
        ([on_hub("a/x", license=MIT), on_hub("a/y", license={"license": "apache-2.0"})], {}),
        ([on_hub("a/x", license=MIT), on_hub("a/y")], {}),
        ([on_hub("a/x", license=MIT), on_hub("a/y", model_type="gemma3_text")], {"license": "gemma"}),
        ([on_hub("a/x", model_type="gemma4_text")], {}),
        ([on_hub("a/x", model_type="gemma4_text", license={"license": "apache-2.0"})], {"license": "apache-2.0"}),
        ([RunInput("x", "model", record=record(on_hub("a/x", license=MIT)))], MIT),
        ([RunInput("x", "model", record=record(on_hub("g", "teacher", model_type="gemma2")))], {"license": "gemma"}),
        (
            [on_hub("a/x", license={"license": "other", "license_name": "own", "license_link": "LICENSE"})],
            {"license": "other", "license_name": "own", "license_link": "LICENSE"},
        ),
        ([on_hub("a/x", license=MIT), on_hub("a/data", "dataset")], MIT),
    ],
)
def test_a_license_is_taken_over_and_never_invented(inputs, expected):
    made = str(model_card(record(*inputs, job="merging")))
    data = front_matter(made)
    assert {k: v for k, v in data.items() if k.startswith("license")} == expected
    assert ("Gemma Terms of Use" in made) == (expected.get("license") == "gemma")
    assert ("No license is stated" in made) == (expected == {})


def test_the_table_shows_each_measurement_with_unit_direction_count_and_interval():
    made = model_card(
        record(
            metrics=[
                perplexity(12.34567, interval=(12.0, 13.0)),
                Measurement("accuracy", 0.5, "share", True, 40, None, "capitals"),
                Measurement("kl", float("inf"), "nats per token", False, 9, None, "held-out texts"),
            ],
            compared={"before": [perplexity(20.0)], "teacher": [perplexity(10.0, examples=1000)]},
        )
    )
    assert table_row(made, "perplexity") == (
        "| `perplexity` | perplexity | lower | held-out texts | 1,200 / 1,000 | 20 | 10 | 12.35 \\[12, 13\\] |"
    )
    assert table_row(made, "accuracy") == "| `accuracy` | share | higher | capitals | 40 |  |  | 0.5 |"
    assert table_row(made, "kl").endswith("| inf |")
    metrics = [m["type"] for r in front_matter(str(made))["model-index"][0]["results"] for m in r["metrics"]]
    assert metrics == ["perplexity", "accuracy"]  # what is no number is told to readers and not to the index


def test_without_measurements_the_card_says_so():
    made = str(model_card(record(on_hub("a/m"), job="unlearning", not_measured=["Grammar."])))
    assert "None were made in this run." in made and "model-index" not in made
    assert "- Grammar." in made and "forgotten knowledge returns" in made
    told = str(model_card(record(job="unlearning", metrics=[perplexity(1.0, name="relearned_share")])))
    assert "forgotten knowledge returns" not in told


def test_text_from_models_and_data_cannot_act():
    bad = "x | y\n## Heading <script>alert(1)</script> ![i](http://evil/x.png) [l](http://evil) `c` @someone"
    made = str(
        model_card(
            record(
                RunInput(bad, "model", license={"license": bad}),
                metrics=[perplexity(1.0, name=bad, unit=bad, dataset=bad)],
                compared={bad: [perplexity(1.0)]},
                not_measured=[bad],
                config={"prompt": "```\n</details>" + bad},
                recipe=bad,
                seed=1,
            ),
            title=bad,
        )
    )
    body = made.split("\n---\n", 1)[1]
    before_settings, settings = body.split("All settings:")
    assert "\n## Heading" not in before_settings
    for line in before_settings.splitlines():
        outside_code = re.sub(r"\\.", "", "".join(line.split("`")[::2]))
        assert "<script" not in outside_code and "](http" not in outside_code and "@someone" not in outside_code
        if line.startswith("|"):
            cells = line.replace("\\|", "").count("|") - 1
            assert cells in (5, 7, 2)  # inputs, measurements, stages
    assert settings.strip().startswith("````json") and settings.removesuffix(f"{END}\n").rstrip().endswith("````")
    assert check_card(made)[0] == []


def test_no_folder_and_no_token_reaches_a_card(tmp_path):
    made = str(
        model_card(
            record(
                RunInput("student", "model"),
                config={"hub_token": TOKEN, "note": f"{TOKEN} in {tmp_path}/x", "out": str(tmp_path / "out")},
                recipe=f"{tmp_path}/recipes/distill.py",
                metrics=[perplexity(1.0, dataset=f"{tmp_path}/data.jsonl")],
                compared={str(tmp_path / "before"): [perplexity(1.0)]},
                not_measured=[f"Whatever is in {tmp_path}/other."],
            ),
            title=f"Made in {tmp_path}",
        )
    )
    assert TOKEN not in made and str(tmp_path) not in made and str(tmp_path.parent) not in made


def test_earlier_steps_are_told_oldest_first():
    first = record(on_hub("a/t", "teacher"))
    second = record(RunInput("student", "model", record=first), job="extraction")
    made = str(model_card(record(RunInput("adapter", "model", record=second), job="merging")))
    assert made.index("1. distillation by") < made.index("2. extraction by") < made.index("## Run")


def test_each_kind_says_what_it_cannot_do():
    def card_of(job, **fields):
        adapter = fields.pop("adapter", False)
        return str(model_card(record(on_hub("a/m"), on_hub("a/b", "base"), job=job, **fields), adapter=adapter))

    assert "imitates its teacher" in card_of("distillation")
    assert "On this one, only what the table shows" in card_of("transfer", adapter=True)
    assert "Merging trains nothing" in card_of("merging")
    mixture = card_of("merging", recipe="hf-transfer-ext moe")
    assert (
        "experts of one mixture" in mixture and "# Mixture of m" in mixture and "moe" in front_matter(mixture)["tags"]
    )
    assert front_matter(mixture)["base_model_relation"] == "merge" and "Merging trains" not in mixture
    assert "No audit was made" in card_of("unlearning")
    assert "leaves out 25.00% of the energy" in card_of(
        "resizing", metrics=[Measurement("change left out at rank 2", 0.25, "share of its energy", False, 3)]
    )
    assert "ran in the process" in card_of("distillation", config={"trust_remote_code": True})
    assert "ran in the process" not in card_of("distillation", config={"trust_remote_code": False})


def test_audits_are_told_in_plain_words():
    def worst(value, *others):
        found = [Measurement("recovered at worst", value, "share", False, 9, (value - 0.1, value + 0.1))]
        return [*found, *(Measurement(f"recovered by {name}", v, "share", False, 9) for name, v in others)]

    failed = str(model_card(record(on_hub("a/m"), job="unlearning", metrics=worst(0.6, ("relearn", 0.6), ("x", 0.0)))))
    assert "**The audit failed**: the strongest attack got back 60% (95 % interval 50% to 70%)" in failed
    assert "Attacks that worked: relearn (60%)." in failed and "No audit was made" not in failed
    assert "The audit passed: no attack got back more than 4%" in str(
        model_card(record(on_hub("a/m"), job="unlearning", metrics=worst(0.04)))
    )
    report = report_card(record(on_hub("a/m", "unlearned"), job="audit", compared={"unlearned": worst(0.6)}))
    assert "The audit failed" in report and front_matter(report)["tags"] == ["hf_transfer_ext", "audit"]


@pytest.mark.parametrize(
    ("license", "words"),
    [
        ({"license": "cc-by-nc-4.0"}, "**No commercial use**: the license of `a/x` (cc-by-nc-4.0)"),
        ({"license": "other", "license_name": "x-non-commercial"}, "**No commercial use**"),
        ({"license": "llama3.1"}, 'begins with "Llama"'),
        ({"license": "other", "license_name": "llama-4"}, "**Built with Llama**"),
    ],
)
def test_conflicts_of_licenses_are_named_through_all_generations(license, words):
    parent = on_hub("a/x", "teacher", license=license)
    student = RunInput("student", "model", record=record(parent))
    made = str(model_card(record(student, on_hub("a/y", license=MIT), job="merging")))
    assert words in made and check_card(made) == ([], [])
    assert words not in str(model_card(record(on_hub("a/y", license=MIT))))
    assert "Built with Llama" not in str(model_card(record(on_hub("a/y", license=MIT, model_type="llama"))))


def test_a_gated_parent_is_named(hub, tmp_path):
    hub.seed("tester/gated", {"model.safetensors": "w", "config.json": "{}"})
    hub.repos[("models", "tester/gated")].gated = "manual"
    item = describe_input("tester/gated")
    assert item.gated
    made = record(item)
    assert RunRecord.from_dict(made.to_dict()).inputs[0].gated
    assert "**Gated parent**: the Hub hands out `tester/gated` only to those" in str(model_card(made))


def test_servers_and_plots_are_shown():
    servers = [
        Server("peft", True),
        Server("vllm", True, [], ["--max-lora-rank 64"]),
        Server("llama.cpp", False, ["No."]),
    ]
    made = str(model_card(record(on_hub("a/b", "base")), adapter=True, servers=servers, plots=["a b.png"]))
    assert (
        "- vllm: loads it. Start it with `--max-lora-rank 64`." in made
        and "- llama.cpp: does not load it. No." in made
    )
    assert "![a b](a%20b.png)" in made


KINDS = ["distillation", "unlearning", "merging", "moe", "extraction", "resizing", "conversion", "transfer",
         "fine-tuning", "audit", "evaluation", "quickstart"]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_private_reaches_card_record_lineage_or_log(kind, tmp_path, monkeypatch, caplog, capsys):
    """Planted in every field: a token, a user, a host, an absolute path and relative ones."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hidden-folder" / "deep").mkdir(parents=True)
    monkeypatch.setattr(privacy, "_own_host", lambda: "planted-host")
    planted = [
        f"{TOKEN} and /home/planted-user/hidden-folder/a", "hidden-folder/deep", "../hidden-folder/b",
        f"{tmp_path}/hidden-folder/c", "planted-user@planted-host:/srv/hidden-folder/d", "./hidden-folder/deep",
        "runs/Nov28_12-00-00_planted-host", "~planted-user/hidden-folder/e", "http://planted-host:80/x",
        "C:\\Users\\planted-user\\hidden-folder\\f",
    ]  # fmt: skip
    metrics = [perplexity(1.0, dataset=text) for text in planted]
    made = record(
        RunInput("input", "model", license={"license": planted[0]}),
        job="merging" if kind == "moe" else kind,
        recipe=f"hf-transfer-ext {kind}",
        config={"own": planted, "hub_token": TOKEN, "nested": {text: text for text in planted}},
        defaults={"logging_dir": planted[6], "more": planted},
        command=["run", "--token", TOKEN, *planted],
        call={"config": {"models": planted}},
        metrics=metrics,
        compared={text: metrics for text in planted},
        not_measured=planted,
    )
    finish_run(tmp_path / "out", made, plot=None, quiet=True)
    if kind not in ("audit", "evaluation", "quickstart"):
        tiny_llama().save_pretrained(tmp_path / "model")
        save_result(tmp_path / "model", record=made)
        made = read_record(tmp_path / "model")
    texts = [path.read_text() for path in tmp_path.glob("*/*") if path.suffix in (".md", ".json", ".txt")]
    node = lineage_tree(tmp_path / "out")
    texts += [tree_text(node), json.dumps(node.to_dict()), caplog.text, capsys.readouterr().out]
    assert len(texts) > 5 and any("planted" not in text and "input" in text for text in texts)
    for text in texts:
        for word in (TOKEN, "planted-user", "planted-host", "hidden-folder", str(tmp_path)):
            assert word not in text, (word, text[max(0, text.find(word) - 60) : text.find(word) + 60])


def test_a_result_of_a_merge_names_the_licenses_that_disagree():
    parents = [RunInput(f"org/{name}", "model", True, "c" * 40, license={"license": name}) for name in ("mit", "gpl")]
    merged = record(*parents, job="merging")
    made = str(model_card(record(RunInput("merged", "model", record=merged), job="export"), gguf="model-f16.gguf"))
    assert "`org/mit`: mit, `org/gpl`: gpl" in made and "`merged`" not in made.split("## Load it")[0]
    assert 'gguf_file="model-f16.gguf"' in made and "library_name: gguf" in made


def test_reports_say_what_they_cannot_tell():
    assert "No attack could be judged" in report_card(record(job="audit"))
    assert "an audit finds what its attacks find" in report_card(record(job="audit")).lower()
    assert "The numbers hold for these data" in report_card(record(job="evaluation"))
    assert "pull_cache(" in report_card(record(job="caching"))
    lost = Measurement("change left out at rank 4", 0.25, "share of its energy", False, 14)
    made = str(model_card(record(job="extraction", metrics=[lost], device={"precision": None, "device": "cpu"})))
    assert "It leaves out 25.00% of the energy" in made and "precision" not in made
