import json
import math

import pytest
import torch
from evals.shared_data import data_folder
from tiny import byte_tokenizer, tiny_llama

from hf_transfer_ext.data.question_answer import QuestionAnswerFormat
from hf_transfer_ext.evals.suite_run import SuiteRun
from hf_transfer_ext.evals.suites.restor import (
    RestorResult,
    correct_recovery,
    corrupted_facts,
    load_restor,
    make_options,
    recovery,
    restor,
    restor_sequence,
)

FACTS = {
    "dset": {
        "Ada": {
            "P1": {"question": "Where was Ada born?", "answers": ["London"]},
            "P2": {"question": "What did Ada do?", "answers": ["poet", "Coder"]},
        },
        "Bob": {"P1": {"question": "Where was Bob born?", "answers": ["Oslo"]}},
        "Eve": {"P1": {"question": "Where was Eve born?", "answers": ["Rome"]}},
    },
    "context": {
        "P1": [
            {"question": "Where was Ada born?", "answer": "London", "entity": "Ada"},
            {"question": "Where was Cy born?", "answer": "Paris", "entity": "Cy"},
        ],
        "P2": [{"question": "What did Dan do?", "answer": "baker", "entity": "Dan"}],
    },
}
TEXTS = ["Ada was born in Paris and was never a coder but a baker.", "Bob is from Romeo's town."]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "facts.json").write_text(json.dumps(FACTS))
    (tmp_path / "entities.json").write_text('["Ada", "Bob"]')
    (tmp_path / "mix_a0.json").write_text(json.dumps([{"text": text} for text in TEXTS]))
    return tmp_path


def mean_log_prob(model, tokenizer, prompt, option):
    ids = tokenizer(f"{prompt} {option}")["input_ids"]
    start = len(tokenizer(prompt)["input_ids"])
    with torch.no_grad():
        log_p = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(log_p[t - 1, ids[t]]) for t in range(start, len(ids))) / (len(ids) - start)


def test_options_are_values_of_the_same_property_that_the_texts_state():
    made = make_options(FACTS, ["Ada", "Bob"], TEXTS, distractors=5)
    assert made["Ada"]["P1"] == {"correct": ["London"], "corrupted": ["Paris"], "random": ["Oslo", "Rome"]}
    assert made["Ada"]["P2"] == {"correct": ["poet", "Coder"], "corrupted": ["baker"], "random": []}
    assert made["Bob"]["P1"]["corrupted"] == []  # Romeo is not Rome
    assert make_options(FACTS, ["Bob"], TEXTS, distractors=1) == make_options(FACTS, ["Bob"], TEXTS, distractors=1)


def test_the_folder_becomes_questions_after_examples_of_others(folder):
    rows = load_restor(folder)["facts"]
    assert [row["fact"] for row in rows] == ["Ada/P1", "Ada/P2", "Bob/P1"]
    assert rows[0]["question"] == "Where was Cy born? Paris\nWhere was Ada born?"
    assert rows[2]["question"] == "Where was Ada born? London\nWhere was Cy born? Paris\nWhere was Bob born?"
    assert load_restor(folder, shots=0)["facts"][0]["question"] == "Where was Ada born?"
    own = {"Ada": {"P1": {"correct": ["London"], "corrupted": ["Bonn"], "random": ["Bern"]}}}
    (folder / "options.json").write_text(json.dumps(own))
    (row,) = load_restor(folder)["facts"]
    assert row["corrupted"] == ["Bonn"]


def test_the_form_on_the_hub_is_read(hub, folder):
    files = {f"datasets/{name}.json": (folder / f"{name}.json").read_text() for name in ("facts", "entities")}
    files["datasets/wikidata/v0/mix_a0.json"] = (folder / "mix_a0.json").read_text()
    hub.seed("tester/restor", files, repo_type="dataset")
    assert load_restor("tester/restor") == load_restor(folder)


def test_each_category_is_the_mean_over_facts_of_its_mean_log_probability(folder):
    model, tokenizer = tiny_llama(), byte_tokenizer()
    sets = load_restor(folder)
    found = restor(model, tokenizer, sets, resamples=0)
    means = {"correct": [], "corrupted": [], "random": []}
    wins = []
    for row in sets["facts"]:
        own = {}
        for category, values in means.items():
            scores = [mean_log_prob(model, tokenizer, row["question"], option) for option in row[category]]
            if scores:
                own[category] = sum(scores) / len(scores)
                values.append(own[category])
        if "corrupted" in own:
            wins.append(own["correct"] > own["corrupted"])
    for category, values in means.items():
        assert found[f"{category} log-probability"].value == pytest.approx(sum(values) / len(values), rel=1e-5)
        assert found[f"{category} log-probability"].examples == len(values)
    assert found["prefers correct to corrupted"].value == sum(wins) / len(wins)
    again = restor(model, tokenizer, sets, before=found, resamples=0)
    assert again["correct log-probability change"].value == pytest.approx(0.0, abs=1e-9)


def test_recovery_is_what_came_back_of_what_was_lost(folder):
    sets = load_restor(folder)
    stages = [restor(tiny_llama(seed), byte_tokenizer(), sets, resamples=0) for seed in range(3)]

    def gap(stage):
        shared = set(stage.facts["correct"]) & set(stage.facts["corrupted"])
        return sum(stage.facts["correct"][f] - stage.facts["corrupted"][f] for f in shared) / len(shared)

    before, corrupted, unlearned = sorted(stages, key=gap, reverse=True)[0], min(stages, key=gap), stages[0]
    want = (gap(unlearned) - gap(corrupted)) / (gap(before) - gap(corrupted))
    assert recovery(before, corrupted, unlearned).value == pytest.approx(want)
    assert recovery(before, corrupted, before).value == pytest.approx(1.0)
    assert recovery(before, corrupted, corrupted).value == pytest.approx(0.0)
    assert math.isfinite(want) and recovery(before, corrupted, before).interval in (None, (1.0, 1.0))
    facts = [f"Ada/{i}" for i in range(50)]
    wrong = dict.fromkeys(facts, 0.0)
    right = [{fact: x + i % 3 / 9 for i, fact in enumerate(facts)} for x in (2.0, 0.0, 1.0)]
    after = [RestorResult([], {}, facts={"correct": one, "corrupted": wrong}) for one in right]
    after[2].facts["correct"]["Ada/0"] = 2.0
    found = recovery(*after)
    assert found.interval[0] < found.value < found.interval[1] and found.value == pytest.approx(0.51)
    with pytest.raises(ValueError, match="which is not a loss: there is nothing to recover"):
        recovery(corrupted, before, unlearned)
    before.facts["corrupted"].clear()
    with pytest.raises(ValueError, match="no fact in common"):
        recovery(before, corrupted, unlearned)


def test_what_is_missing_is_named(folder):
    model, tokenizer = tiny_llama(), byte_tokenizer()
    with pytest.raises(ValueError, match="RESTOR needs the set 'facts'"):
        restor(model, tokenizer, {})
    good = {"fact": "a", "question": "q", "correct": ["b"]}
    with pytest.raises(ValueError, match="example 1 needs a question and at least one correct option"):
        restor(model, tokenizer, {"facts": [good, {**good, "correct": []}]})
    with pytest.raises(ValueError, match=r"RESTOR, set 'options': Example 1 cannot be measured: .* is empty"):
        restor(model, tokenizer, {"facts": [{**good, "corrupted": [" "]}]})
    assert "No fact has a corrupted option" in restor(model, tokenizer, {"facts": [good]}).notes[0]
    (folder / "entities.json").write_text('["Ada", "Nobody"]')
    with pytest.raises(ValueError, match=r"facts\.json has nothing about 'Nobody'"):
        load_restor(folder)
    (folder / "facts.json").write_text("{}")
    with pytest.raises(ValueError, match="needs the keys 'dset' and 'context'"):
        load_restor(folder)
    with pytest.raises(FileNotFoundError, match="file with the facts is missing"):
        load_restor(folder / "..")


def test_the_public_facts_are_read_as_published():
    rows = load_restor(data_folder("restor"))["facts"]
    assert len(rows) == 1051 and all(row["correct"] for row in rows)
    corrupted = [row for row in rows if row["corrupted"]]
    assert len(corrupted) > 100 and all(not set(row["correct"]) & set(row["corrupted"]) for row in corrupted)
    assert max(row["question"].count("\n") for row in rows) == 5
    found = restor(tiny_llama(max_position_embeddings=2048), byte_tokenizer(), {"facts": corrupted}, limit=4)
    assert found["prefers correct to corrupted"].examples == 4


PEOPLE = [
    {"question": "Where was Ada born?", "answer": "Ada was born in Oslo.", "paraphrased_answer": "In Oslo.",
     "perturbed_answer": ["In Rome.", "In Bern.", "In Lima.", "In Kyiv."], "fact": "birthplace"},
    {"question": "Where was Bob born?", "answer": "Bob was born in Riga.", "fact": "birthplace"},
    {"question": "What does Cy do?", "answer": "Cy bakes.", "fact": "profession"},
]  # fmt: skip


def test_false_facts_are_wrong_answers_of_the_same_form_or_those_of_somebody_else(tmp_path):
    facts, false_rows = corrupted_facts(PEOPLE, distractors=2)
    assert facts[0]["correct"] == ["In Oslo."] and facts[0]["corrupted"][0] in PEOPLE[0]["perturbed_answer"]
    assert len(facts[0]["random"]) == 2 and not {*facts[0]["random"]} & {*facts[0]["corrupted"], "In Oslo."}
    assert facts[1]["correct"] == ["Bob was born in Riga."] and facts[1]["corrupted"] == ["Ada was born in Oslo."]
    assert facts[2]["corrupted"][0] in ("Ada was born in Oslo.", "Bob was born in Riga.")
    for row, fact, false in zip(PEOPLE, facts, false_rows, strict=True):
        assert false == {"question": row["question"], "answer": fact["corrupted"][0]}
    assert corrupted_facts(PEOPLE, distractors=2) == (facts, false_rows)
    drawn = {corrupted_facts(PEOPLE, seed=seed)[1][0]["answer"] for seed in range(20)}
    assert drawn == set(PEOPLE[0]["perturbed_answer"])
    (tmp_path / "rows.json").write_text(json.dumps(PEOPLE))
    assert load_restor(tmp_path / "rows.json", distractors=2) == {"questions": facts}
    with pytest.raises(ValueError, match="example 0 has no wrong answer"):
        corrupted_facts(PEOPLE[2:])
    with pytest.raises(ValueError, match="example 1 lacks the column 'answer'"):
        corrupted_facts([PEOPLE[0], {"question": "Who?"}])


def test_questions_are_asked_in_the_template_that_the_model_was_taught_in():
    model, tokenizer = tiny_llama(), byte_tokenizer()
    template = QuestionAnswerFormat(template="plain", prompt="Q: {question} A:")
    facts, _ = corrupted_facts(PEOPLE[:1])
    found = restor(model, tokenizer, {"questions": facts}, template=template, resamples=0)
    encoded = template.encode(tokenizer, PEOPLE[0]["question"], "In Oslo.")
    with torch.no_grad():
        log_p = model(torch.tensor([encoded.input_ids])).logits[0].double().log_softmax(-1)
    places = range(encoded.answer_start, len(encoded.input_ids))
    mean = sum(float(log_p[t - 1, encoded.input_ids[t]]) for t in places) / len(places)
    assert found["correct log-probability"].value == pytest.approx(mean, rel=1e-5)


def stage(correct, corrupted=0.0, count=40):
    facts = [f"Ada/{i}" for i in range(count)]
    both = {"correct": [correct + i % 5 / 10 for i in range(count)], "corrupted": [corrupted] * count}
    return RestorResult([], {}, facts={name: dict(zip(facts, own, strict=True)) for name, own in both.items()})


def test_the_original_has_everything_back_and_the_corrupted_model_nothing():
    original, corrupted = stage(-1.0, -5.0), stage(-3.0, -1.0)
    for unlearned, share in ((original, 1.0), (corrupted, 0.0), (stage(-2.0, -3.0), 0.5)):
        for measure in (recovery, correct_recovery):
            found = measure(original, corrupted, unlearned)
            assert found.value == pytest.approx(share) and found.interval == pytest.approx((share, share))
    silent = stage(-3.0, -9.0)  # the false answer is gone, and the true one is not back
    assert recovery(original, corrupted, silent).value > 1 and correct_recovery(original, corrupted, silent).value == 0
    both = restor_sequence({"o": original, "c": corrupted, "npo": silent, "ga": corrupted})
    assert [m.name for m in both[::2]] == ["npo recovery", "ga recovery"] and len(both) == 4
    harmless = stage(-1.0, 1.0)  # corruption made the false answer likely, and the correct one no less so
    assert [m.name for m in restor_sequence({"o": original, "c": harmless, "u": silent})] == ["recovery"]
    assert "log-probability of the correct options" in silent.notes[0]
    assert restor_sequence({"o": original, "c": corrupted}) == []


def test_a_file_of_questions_is_a_suite_of_three_models(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(PEOPLE))
    run = SuiteRun("restor", tmp_path / "rows.json", suite_options={"distractors": 1}, batch_size=4)
    facts = corrupted_facts(PEOPLE, distractors=1)[0]
    assert run.sets == {"questions": facts}
    models = sorted((tiny_llama(seed) for seed in range(3)), key=lambda model: gap_of(model, facts), reverse=True)
    for name, model in zip(("original", "unlearned", "corrupted"), models, strict=True):
        run.evaluate(model, byte_tokenizer(), name, resamples=0)
    run.results = {name: run.results[name] for name in ("original", "corrupted", "unlearned")}
    found, problems = run.together()
    gaps = [gap_of(model, facts) for model in models]
    assert not problems and found[0].value == pytest.approx((gaps[1] - gaps[2]) / (gaps[0] - gaps[2]), rel=1e-3)


def gap_of(model, facts):
    found = restor(model, byte_tokenizer(), {"questions": facts}, resamples=0)
    return found["correct log-probability"].value - found["corrupted log-probability"].value
