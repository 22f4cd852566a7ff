"""The grammar of mergekit is read as it is; what it ignores is refused, with advice."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from hf_transfer_ext.merging.planning.config import TokenSource, evaluate, load_config, parse_config
from hf_transfer_ext.weights.reference import ModelReference
from hf_transfer_ext.weights.reference import parse_reference as reference

RECIPES = sorted((Path(__file__).parents[3] / "hf_transfer_ext" / "recipes" / "configs" / "merge").glob("*.yml"))

#: The forms of public configurations, with the methods that they name.
PUBLIC = {
    "linear": """
models:
  - model: psmathur/orca_mini_v3_13b
    parameters: {weight: 1.0}
  - model: WizardLM/WizardLM-13B-V1.2
    parameters: {weight: 0.3}
merge_method: linear
dtype: float16
""",
    "gradient slerp": """
slices:
  - sources:
      - {model: psmathur/orca_mini_v3_13b, layer_range: [0, 40]}
      - {model: garage-bAInd/Platypus2-13B, layer_range: [0, 40]}
merge_method: slerp
base_model: psmathur/orca_mini_v3_13b
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
    - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
    - value: 0.5
dtype: float16
""",
    "ties": """
models:
  - model: psmathur/orca_mini_v3_13b
    parameters: {density: [1, 0.7, 0.1], weight: 1.0}
  - model: WizardLM/WizardMath-13B-V1.0
    parameters:
      density: 0.33
      weight:
        - {filter: mlp, value: 0.5}
        - value: 0
merge_method: ties
base_model: TheBloke/Llama-2-13B-fp16
parameters: {normalize: true, int8_mask: true}
dtype: float16
""",
    "layer stack": """
slices:
  - sources:
    - {model: psmathur/orca_mini_v3_13b, layer_range: [0, 24]}
  - sources:
    - {model: garage-bAInd/Platypus2-13B, layer_range: [20, 40]}
merge_method: passthrough
dtype: float16
""",
    "tokenizer": """
merge_method: task_arithmetic
base_model: mistralai/Mistral-7B-v0.1@main
models:
  - model: mistralai/Mistral-7B-v0.1+someone/lora@abc
    parameters: {weight: 0.5, density: 0.5}
tokenizer:
  source: union
  tokens:
    <|im_start|>: {source: {kind: model_token, model: a/b, token: <|start|>}, force: true}
    <|im_end|>: {source: {kind: zero}}
    <pad>: {source: a/b}
  pad_to_multiple_of: 64
chat_template: auto
""",
    "silenced attention": """
slices:
  - sources:
      - model: a/b
        layer_range: [0, 4]
        parameters:
          scale:
            - {filter: o_proj, value: 0.0}
            - value: 1.0
merge_method: passthrough
""",
}


PUBLIC |= {
    "gradients of density and weight": """
models:
  - model: psmathur/orca_mini_v3_13b
    parameters:
      density: [1, 0.7, 0.1] # from the first layer to the last
      weight: 1.0
  - model: garage-bAInd/Platypus2-13B
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1]
merge_method: ties
base_model: TheBloke/Llama-2-13B-fp16
parameters:
  normalize: true
  rescale: false
  int8_mask: true
  lambda: 1.1
dtype: float16
out_dtype: bfloat16
""",
    "base among the models": """
models:
  - model: a/base
  - model: a/tuned
merge_method: arcee_fusion
base_model: a/base
dtype: bfloat16
""",
    "options of slices and sources": """
slices:
  - sources:
      - {model: a/one, layer_range: [0, 8], parameters: {weight: 0.5}}
      - {model: a/two, layer_range: [4, 12], parameters: {weight: [0, 1]}}
    base_model: a/base
    parameters:
      normalize: true
  - sources:
      - model: {model: {path: a/one, revision: main}, lora: {path: b/lora}}
        layer_range: [8, 12]
        parameters: {weight: 1}
    base_model: a/base
merge_method: task_arithmetic
tokenizer_source: base
chat_template: chatml
""",
    "modules": """
modules:
  text_decoder:
    slices:
      - sources: [{model: a/one, layer_range: [0, 4]}, {model: a/two, layer_range: [0, 4]}]
  vision_tower:
    models: [{model: a/one}, {model: a/two}]
    parameters: {t: 0.1}
merge_method: slerp
base_model: a/one
parameters: {t: [{filter: mlp, value: [0, 1]}, {filter: "*", value: 0.5}]}
""",
    "random masks": """
models:
  - model: a/base
  - model: a/one
    parameters: {density: 0.53, weight: 0.4}
  - model: a/two
    parameters: {density: 0.53, weight: 0.3}
merge_method: dare_ties
base_model: a/base
parameters: {int8_mask: true, rescale: true}
tokenizer: {source: a/one}
seed: 3
""",
    "pruned by rank": """
models:
  - model: a/one
    parameters: {density: 0.5, weight: 0.5, epsilon: 0.1}
merge_method: della
base_model: a/base
parameters: {normalize: true, lambda: 1.0, rescale: true}
""",
    "without parameters": """
models: [{model: a/one}, {model: a/two}, {model: a/three}]
merge_method: model_stock
base_model: a/base
parameters: {filter_wise: false}
""",
    "two with weights": """
models:
  - {model: a/one, parameters: {weight: 0.2}}
  - {model: a/two, parameters: {weight: 0.8}}
merge_method: nuslerp
parameters: {nuslerp_flatten: false, nuslerp_row_wise: true}
dtype: bfloat16
""",
}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_configurations_are_read(name):
    content = yaml.safe_load(PUBLIC[name])
    assert parse_config(content).merge_method == content["merge_method"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_own_configurations_are_read(path):
    assert load_config(path).references


def test_typed_values():
    config = parse_config(yaml.safe_load(PUBLIC["tokenizer"]))
    assert config.base_model == ModelReference("mistralai/Mistral-7B-v0.1", "main")
    source = config.modules[0].slices[0].sources[0]
    assert source.model == ModelReference("mistralai/Mistral-7B-v0.1", None, "someone/lora", "abc")
    assert source.parameters == {"weight": 0.5}  # a density has no effect on task arithmetic
    assert config.tokenizer.source == "union" and config.tokenizer.pad_to_multiple_of == 64
    start = TokenSource(ModelReference("a/b"), token="<|start|>", force=True)
    assert config.tokenizer.tokens["<|im_start|>"] == start
    assert config.tokenizer.tokens["<|im_end|>"].zero
    assert [str(one) for one in config.references] == [
        "mistralai/Mistral-7B-v0.1@main",
        "mistralai/Mistral-7B-v0.1+someone/lora@abc",
        "a/b",
    ]


@pytest.mark.parametrize(
    ("setting", "depth", "value"),
    [
        (0.3, 0.5, 0.3),
        ([0, 1], 0.25, 0.25),
        ([0, 0.5, 0.3, 0.7, 1], 0.125, 0.25),
        ([1, 3], 1.0, 3),
        ([True, False], 0.4, True),
        ([{"filter": "mlp", "value": [0, 1]}, {"value": 7}], 0.5, 0.5),
        ([{"filter": "attn", "value": 1}, {"filter": "*", "value": 2}], 0.5, 2),
        ([{"filter": "attn", "value": 1}], 0.5, None),
    ],
)
def test_settings(setting, depth, value):
    assert evaluate(setting, "model.layers.3.mlp.up_proj.weight", depth) == value


@pytest.mark.parametrize("text", ["a+b+c", "a@b@c", "", "+x", "a+"])
def test_references_that_make_no_sense(text):
    with pytest.raises(ValueError, match="base_model"):
        reference(text, "base_model")


def test_a_folder_may_have_signs_in_its_name(tmp_path):
    folder = tmp_path / "a+b@c"
    folder.mkdir()
    assert reference(str(folder), "model") == ModelReference(str(folder))


MODELS = [{"model": "a/b", "parameters": {"weight": 1}}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"merge_metod": "ties"}, "Did you mean 'merge_method'"),
        ({"merge_method": "tis"}, "Unknown merge method 'tis'. Did you mean 'ties'"),
        ({"parameters": {"densty": 1}}, "Did you mean 'density'"),
        ({"models": [{"model": "a/b", "parameters": {"wieght": 1}}]}, "Did you mean 'weight'"),
        ({"models": [{"model": "a/b", "parameter": {}}]}, "Did you mean 'parameters'"),
        ({"parameters": {"density": 50}}, r"`parameters.density` has to be between 0 and 1, got 50"),
        ({"parameters": {"density": [0.5, 1.5]}}, r"density\[1\]` has to be between 0 and 1"),
        ({"parameters": {"density": [{"filter": "mlp", "value": -1}]}}, "between 0 and 1, got -1"),
        ({"parameters": {"density": [{"filtre": "mlp", "value": 1}]}}, "Did you mean 'filter'"),
        ({"parameters": {"density": [{"filter": "mlp"}]}}, "has no `value`"),
        ({"parameters": {"density": [{"value": 1}, 0.5]}}, "mixes conditions"),
        ({"parameters": {"density": []}}, "empty list"),
        ({"parameters": {"density": "half"}}, "has to be a number"),
        ({"models": [{"model": "a/b", "parameters": {"normalize": True}}]}, "counts for the whole merge"),
        ({"base_model": None}, "needs a `base_model`"),
        ({"slices": [{"sources": [{"model": "a/b", "layer_range": [0, 1]}]}]}, "Exactly one of"),
        ({"models": None}, "Exactly one of"),
        ({"dtype": "bfloat"}, "`dtype` has to be one of"),
        ({"dtype": "int8"}, "`dtype` has to be one of"),
        ({"tokenizer": {"sorce": "union"}}, "Did you mean 'source'"),
        ({"tokenizer": {"pad_to_multiple_of": 0}}, "at least 1"),
        ({"tokenizer": {"tokens": {"a": {"source": {"kind": "one"}}}}}, "Unknown kind 'one'"),
        (
            {"tokenizer": {"tokens": {"a": {"source": {"kind": "model_token", "model": "x"}}}}},
            "exactly one of `token`",
        ),
        ({"tokenizer": {}, "tokenizer_source": "base"}, "give only one"),
        ({"seed": "x"}, "`seed` has to be a whole number"),
    ],
)
def test_refused(changes, message):
    content = {"merge_method": "ties", "base_model": "c/d", "models": MODELS, **changes}
    with pytest.raises(ValueError, match=message):
        parse_config(content)


@pytest.mark.parametrize("layers", [[0], [3, 2], [-1, 2], "0-2", [0.0, 1.0]])
def test_layer_ranges_that_make_no_sense(layers):
    slices = [{"sources": [{"model": "a/b", "layer_range": layers}]}]
    with pytest.raises(ValueError, match="layer_range"):
        parse_config({"merge_method": "passthrough", "slices": slices})


def test_sources_of_different_length():
    sources = [{"model": "a/b", "layer_range": [0, 2]}, {"model": "c/d", "layer_range": [0, 3]}]
    with pytest.raises(ValueError, match="same number of layers"):
        parse_config({"merge_method": "linear", "slices": [{"sources": sources}]})


def test_files_that_are_no_configuration(tmp_path):
    with pytest.raises(FileNotFoundError, match="no merge configuration"):
        load_config(tmp_path / "none.yml")
    (tmp_path / "a.yml").write_text("a: [")
    with pytest.raises(ValueError, match="not valid YAML"):
        load_config(tmp_path / "a.yml")
    (tmp_path / "b.yml").write_text("- a")
    with pytest.raises(ValueError, match="has to be a mapping"):
        load_config(tmp_path / "b.yml")


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-5", 1e-5), ("'0.5'", 0.5), ("' 1 '", None), ("[0, '1e-1', 1]", [0, 0.1, 1]), ("-2E+1", -20), ("true", True)],
)
def test_numbers_as_people_write_them(text, value):
    content = yaml.safe_load(
        f"merge_method: ties\nbase_model: c/d\nmodels: [{{model: a/b}}]\nparameters: {{weight: {text}}}"
    )
    if value is None:
        with pytest.raises(ValueError, match="has to be a number"):
            parse_config(content)
    else:
        assert parse_config(content).parameters == {"weight": value}


@pytest.mark.parametrize("text", [".nan", ".inf", "-.inf", "[1, .nan]", "[{filter: mlp, value: .inf}]", "1e999"])
def test_numbers_that_are_not_finite(text):
    content = yaml.safe_load(f"merge_method: linear\nmodels: [{{model: a/b, parameters: {{weight: {text}}}}}]")
    with pytest.raises(ValueError, match="has to be a finite number"):
        parse_config(content)


def test_anchors_have_keys_of_their_own():
    content = yaml.safe_load("x-p: &p {weight: 0.5}\nmodels: [{model: a/b, parameters: *p}]\nmerge_method: linear")
    assert parse_config(content).modules[0].slices[0].sources[0].parameters == {"weight": 0.5}


def test_filters_are_listed_wherever_they_are():
    option = [{"filter": "mlp", "value": 1}, {"filter": "*", "value": 0}]
    models = [{"model": "a/b", "parameters": {"weight": [{"filter": "attn", "value": 1}]}}]
    config = parse_config(
        {"merge_method": "ties", "base_model": "c", "models": models, "parameters": {"density": option}}
    )
    assert config.filters() == ["mlp", "attn"]
    with pytest.raises(ValueError, match="part of tensor names"):
        parse_config(
            {"merge_method": "linear", "models": models, "parameters": {"weight": [{"filter": 3, "value": 1}]}}
        )
