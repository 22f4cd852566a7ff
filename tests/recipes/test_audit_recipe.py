import json

import pytest
from tiny import byte_tokenizer, tiny_llama

from hf_transfer_ext.recipes import audit


@pytest.fixture
def folders(tmp_path):
    for name, seed in (("original", 0), ("unlearned", 1)):
        tiny_llama(seed).save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
    return tmp_path


def test_made_up_people_are_attacked_and_reported(folders, capsys):
    words = f"--unlearned {folders}/unlearned --original {folders}/original --output_dir {folders}/out"
    words += " --people 3 --forget_people 1 --holdout_people 1 --facts 2 --max_new_tokens 3 --membership loss_attack"
    words += f" --retrain_from {folders}/original --retrain_epochs 1"
    found = audit.main([*words.split(), "--attacks", '["plain_question", {"quantization": {"bits": 8}}]'])
    assert {v.attack for v in found.verdicts} == {"plain_question", "quantization(bits=8)", "loss_attack"}
    assert "recovered" in capsys.readouterr().out
    summary = json.loads((folders / "out" / "audit.json").read_text())
    assert set(summary["membership"]) == set(summary["measured"]) == {"unlearned", "original", "retrained"}
    assert {p.name for p in (folders / "out").iterdir()} >= {"model_index.yaml", "trade_off.png", "truth_ratios.png"}
    page = (folders / "out" / "report.html").read_text()
    assert "quantization(bits=8)" in page and "truth ratio" in page
    rows = [json.loads(line) for line in (folders / "out" / "examples.jsonl").read_text().splitlines()]
    written = {f"{name} writes" for name in ("unlearned", "original", "retrained")}
    assert (
        len(rows) == 2 and set(rows[0]) == {"question", "answer", "plain_question", "quantization(bits=8)"} | written
    )


@pytest.mark.slow
def test_facets_are_asked_and_a_shadow_gives_adversarial_queries_a_floor(folders):
    words = f"--unlearned {folders}/unlearned --original {folders}/original --output_dir {folders}/out"
    words += " --people 3 --forget_people 1 --holdout_people 1 --facts 4 --max_new_tokens 3"
    words += f" --retrain_from {folders}/original --retrain_epochs 1 --shadow retrain --attacks plain_question"
    query = ["--membership", '[{"adversarial_query": {"steps": 1}}]']
    found = audit.main([*words.split(), *query, "--facets", '{"phrasings": 1, "languages": ["de"], "multi_hop": 1}'])
    # 4 questions, each in another phrasing, three in German, one through another fact, and the fact that this needs
    assert len(found.scores["plain_question"]) == 4 + 4 + 3 + 2
    verdict = next(v for v in found.verdicts if v.access == "membership")
    assert verdict.floor_from == "retrained" and "shadow" not in verdict.note
    assert (folders / "out" / "shadow" / "config.json").is_file()
    measured = json.loads((folders / "out" / "audit.json").read_text())["measured"]
    assert set(measured) == {"unlearned", "original", "retrained"}
    with pytest.raises(ValueError, match="`shadow: retrain` fine-tunes the model of `retrain_from`"):
        audit.main([*words.replace(f" --retrain_from {folders}/original", "").split(), *query])


def test_own_data_and_a_typo(folders):
    rows = [{"frage": f"Who {i}?", "antwort": f"me {i}"} for i in range(2)]
    (folders / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = f"--unlearned {folders}/unlearned --original {folders}/original --output_dir {folders}/out"
    words += f" --forget_data {folders}/own.jsonl --attacks"
    columns = ["--columns", '{"question": "frage", "answer": "antwort"}']
    found = audit.main([*words.split(), "role_play", *columns])
    assert found.scores["role_play"].shape == (2,) and found.membership == {}
    with pytest.raises(ValueError, match="Did you mean 'role_play'"):
        audit.main([*words.split(), "role_paly", *columns])


def test_an_audit_that_was_cut_off_goes_on_and_leaves_nothing_beside_its_report(folders, monkeypatch, capsys):
    words = f"--unlearned {folders}/unlearned --original {folders}/original --output_dir {folders}/out --seed 1"
    words += " --people 3 --forget_people 1 --facts 2 --max_new_tokens 3 --membership []"
    words += f" --retrain_from {folders}/original --retrain_epochs 1"
    both = [*words.split(), "--attacks", "[plain_question, role_play]"]
    real = audit.answers_of
    monkeypatch.setattr(audit, "answers_of", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        audit.main(both)
    kept = {path.name.split("-")[0] for path in (folders / "out.audit").iterdir()}
    assert "retrained" in kept and len(kept) == 2
    assert "role_play" in capsys.readouterr().out
    monkeypatch.setattr(audit, "answers_of", real)
    monkeypatch.setattr("hf_transfer_ext.trainers.taught.train_on_answers", None)  # nothing is trained again
    resumed = audit.main(both)
    assert " s  role_play" not in capsys.readouterr().out  # nor attacked
    assert not (folders / "out.audit").exists()
    monkeypatch.undo()
    whole = audit.main([*both[:5], f"{folders}/whole", *both[6:]])
    assert [v.to_dict() for v in resumed.verdicts] == [v.to_dict() for v in whole.verdicts]


def test_a_baseline_is_audited_as_the_original_with_a_prompt(folders, capsys):
    words = f"--unlearned in_context_unlearning --original {folders}/original --output_dir {folders}/out"
    words += " --people 3 --forget_people 1 --facts 2 --max_new_tokens 3 --membership []"
    both = [*words.split(), "--attacks", "[plain_question, prompt_removal]"]
    found = audit.main([*both, "--baseline_options", "{correct: 1}"])
    by_name = {v.attack: v for v in found.verdicts}
    assert by_name["prompt_removal"].unlearned == by_name["prompt_removal"].original
    card = (folders / "out" / "README.md").read_text()
    assert "Nothing was removed" in card and "stand in the card" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="`baseline_options` belong to one of"):
        audit.main([*both[:1], f"{folders}/unlearned", *both[2:], "--baseline_options", "{correct: 1}"])


@pytest.mark.parametrize("name, content", [("own.json", '[{"question": "Who?", "a'), ("own.jsonl", '{"question": "W')])
def test_data_that_cannot_be_read_is_an_error_and_no_audit_without_it(folders, name, content):
    (folders / name).write_text(content)
    words = f"--unlearned {folders}/unlearned --original {folders}/original --output_dir {folders}/out"
    for setting in ("forget_data", "holdout_data"):
        rows = folders / "good.jsonl"
        rows.write_text('{"question": "Who?", "answer": "me"}\n')
        given = {"forget_data": rows, "holdout_data": None, setting: folders / name}
        data = [word for key, value in given.items() if value for word in (f"--{key}", str(value))]
        with pytest.raises(ValueError, match=name):
            audit.main([*words.split(), *data, "--attacks", "[plain_question]"])
    assert not (folders / "out").exists()
