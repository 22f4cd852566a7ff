import json

import pytest
import torch
from evals.shared_data import data_folder
from peft import LoraConfig, get_peft_model
from tiny import byte_tokenizer, tiny_llama

from hf_transfer_ext.evals.suites.conceptvectors import conceptvectors, load_conceptvectors, value_vector
from hf_transfer_ext.evals.text.rouge import rouge_l

ROWS = [
    {
        "Concept": name, "Layer": layer, "Dim": 3, "QA": [f" What is {name}?\n", f"Who knows {name}?"],
        "text_completion": [{"First_half": f"{name} is", "Second_half": "a thing"}],
        "unrelated_QA": ["What is the sea?"], "wikipedia_content": "",
    }
    for layer, name in enumerate(("Harry", "Poland"))
]  # fmt: skip
SETS = {"concepts": ROWS}


def test_the_model_beside_itself_is_unchanged():
    model, tokenizer = tiny_llama(), byte_tokenizer()
    before = conceptvectors(model, tokenizer, SETS, resamples=0)
    assert [m.name for m in before.measurements] == [
        "questions fluency_entropy", "unrelated fluency_entropy", "completions fluency_entropy"
    ]  # fmt: skip
    after = conceptvectors(model, tokenizer, SETS, before=before, top=20, resamples=0)
    assert after["concept_jaccard"].value == 1.0 and after["concept_l2"].value == 0.0
    assert after["concept_cosine"].value == pytest.approx(1.0)
    for title in ("questions", "unrelated", "completions"):
        assert after[f"{title} rouge"].value == 1.0
    assert after["unrelated rouge"].higher_is_better and not after["questions rouge"].higher_is_better


def test_a_changed_vector_is_measured_by_its_definition():
    model, tokenizer = tiny_llama(), byte_tokenizer()
    before = conceptvectors(model, tokenizer, SETS, resamples=0)
    changed = tiny_llama()
    torch.manual_seed(1)
    with torch.no_grad():
        changed.model.layers[1].mlp.down_proj.weight[:, 3] += torch.randn(32)
    after = conceptvectors(changed, tokenizer, SETS, before=before, top=20, resamples=0)
    old, new = (m.model.layers[1].mlp.down_proj.weight[:, 3].detach().double() for m in (model, changed))
    unembedding = model.lm_head.weight.detach().double()
    a, b = (set((unembedding @ v).argsort(descending=True)[:20].tolist()) for v in (old, new))
    assert after["concept_jaccard"].value == pytest.approx((len(a & b) / len(a | b) + 1.0) / 2)
    assert after["concept_l2"].value == pytest.approx(float((old - new).norm()) / 2, rel=1e-5)
    cosine = float(old @ new / old.norm() / new.norm())
    assert after["concept_cosine"].value == pytest.approx((cosine + 1.0) / 2, rel=1e-5)
    pairs = zip(before.sets["questions"].scored, after.sets["questions"].scored, strict=True)
    rouges = [rouge_l(x.generation, y.generation, stemmed=False)[2] for x, y in pairs]
    assert after["questions rouge"].value == pytest.approx(sum(rouges) / 4)


def test_an_adapter_of_the_down_projection_counts_while_it_is_active():
    base = tiny_llama()
    plain = value_vector(base, 1, 3)
    assert torch.equal(plain, base.model.layers[1].mlp.down_proj.weight[:, 3])
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False))
    added = model.base_model.model.model.layers[1].mlp.down_proj.get_delta_weight("default")[:, 3]
    torch.testing.assert_close(value_vector(model, 1, 3), plain + added)
    with model.disable_adapter():
        assert torch.equal(value_vector(model, 1, 3), plain)
    tokenizer = byte_tokenizer()
    before = conceptvectors(model, tokenizer, SETS, adapter="base", resamples=0)
    after = conceptvectors(model, tokenizer, SETS, before=before, top=20, resamples=0)
    assert after["concept_l2"].value > 0.01


@pytest.mark.parametrize("place", ["", "ConceptVectors_data/"])
def test_the_file_is_found_in_a_folder_and_on_the_hub(hub, tmp_path, place):
    (tmp_path / place).mkdir(exist_ok=True)
    (tmp_path / f"{place}mine.json").write_text(json.dumps(ROWS))
    hub.seed("tester/concepts", {f"{place}mine.json": json.dumps(ROWS)}, repo_type="dataset")
    assert load_conceptvectors(tmp_path, "mine") == SETS == load_conceptvectors("tester/concepts", "mine")
    with pytest.raises(FileNotFoundError, match=r"no other\.json"):
        load_conceptvectors(tmp_path, "other")


def test_what_does_not_fit_is_named(tmp_path):
    model, tokenizer = tiny_llama(), byte_tokenizer()
    with pytest.raises(ValueError, match="needs the set 'concepts'"):
        conceptvectors(model, tokenizer, {})
    for bad, message in (
        ({"Layer": 7}, r"example 1 \('Poland'\): there is no MLP down projection in layer 7; this model has 2"),
        ({"Dim": 64}, r"example 1 \('Poland'\): the down projection of layer 1 has 64 columns, so there"),
        ({"QA": []}, "example 1 has an empty 'QA'"),
        ({"Concept": "Harry"}, "concepts must differ"),
    ):
        with pytest.raises(ValueError, match=message):
            conceptvectors(model, tokenizer, {"concepts": [ROWS[0], {**ROWS[1], **bad}]})
    before = conceptvectors(model, tokenizer, SETS, limit=1, resamples=0)
    with pytest.raises(ValueError, match="measured on 1 concepts and this model on 2"):
        conceptvectors(model, tokenizer, SETS, before=before)
    wide = conceptvectors(tiny_llama(hidden_size=64), tokenizer, SETS, resamples=0)
    with pytest.raises(ValueError, match="has 64 entries before and 32 after"):
        conceptvectors(model, tokenizer, SETS, before=wide)
    (tmp_path / "bad.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="must be a list of concepts"):
        load_conceptvectors(tmp_path, "bad")


def test_the_public_concepts_are_read_as_published():
    rows = load_conceptvectors(data_folder("conceptvectors"), "llama2-7b_concepts_dev")["concepts"]
    assert len(rows) == 10 and all(len(row["QA"]) == 10 for row in rows)
