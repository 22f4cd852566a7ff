"""Losses between layers as they are named in a configuration: one name, a list, what is refused."""

import json

import pytest
from trainers.test_distillation import config

from hf_transfer_ext.trainers.named_hidden_losses import NamedHiddenLoss, named_hidden_losses


def named(folder, **options):
    return named_hidden_losses(config(folder, **options))


def test_one_name_takes_the_settings_beside_it(tmp_path):
    assert named(tmp_path) == []
    found = named(
        tmp_path, hidden_loss="token_relationship_graph", hidden_options={"neighbors": 3}, layer_map=[[0, -1]],
        hidden_embeddings=True,
    )  # fmt: skip
    assert found == [NamedHiddenLoss("token_relationship_graph", 1.0, [[0, -1]], True, {"neighbors": 3})]


def test_entries_of_a_list_have_their_own_settings_and_the_others_of_all(tmp_path):
    entries = [
        "hidden_mse",
        {"name": "hidden_cosine", "weight": 2, "embeddings": False, "layer_map": "last"},
        {"name": "attention_relation", "options": {"heads": 2}},
        {"name": "dual_head", "weight": 0.1, "options": {"temperature": 1}},
    ]
    wanted = [
        NamedHiddenLoss("hidden_mse", 1.0, "skip", True),
        NamedHiddenLoss("hidden_cosine", 2, "last", False),
        NamedHiddenLoss("attention_relation", 0.1, "skip", False, {"heads": 2}),
        NamedHiddenLoss("dual_head", 0.1, "uniform", False, {"temperature": 1}),
    ]
    options = {"layer_map": "skip", "hidden_embeddings": True}
    assert named(tmp_path, hidden_loss=entries, **options) == wanted
    assert named(tmp_path, hidden_loss=json.dumps(entries), **options) == wanted  # as on a command line
    assert named(tmp_path, hidden_loss="hidden_mse", layer_map="[[0, 1]]")[0].layer_map == [[0, 1]]


@pytest.mark.parametrize(
    "options, of_all, of_each",
    [
        ({"hidden_loss": "hidden_mse"}, 1.0, [1.0]),
        ({"hidden_loss": "minilm"}, 0.1, [1.0]),
        ({"hidden_loss": "minilm", "hidden_weight": 1.0}, 1.0, [1.0]),
        ({"hidden_loss": ["minilm", "hidden_mse", {"name": "attention_relation", "weight": 2}]}, 1.0, [0.1, 1.0, 2]),
        ({"hidden_loss": ["minilm"], "hidden_weight": 0.5}, 0.5, [0.1]),
        ({"hidden_loss": '["minilm"]'}, 1.0, [0.1]),
        ({}, 1.0, []),
    ],
)
def test_a_loss_has_its_own_weight_where_none_is_named(tmp_path, options, of_all, of_each):
    args = config(tmp_path, **options)
    assert args.hidden_weight == of_all and [one.weight for one in named_hidden_losses(args)] == of_each
    again = config(tmp_path, **{**options, "hidden_weight": args.hidden_weight})  # as a recipe writes it
    assert again.hidden_weight == of_all and named_hidden_losses(again) == named_hidden_losses(args)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"hidden_loss": []}, "has to be a name, or a list of names"),
        ({"hidden_loss": {"name": "hidden_mse"}}, "has to be a name, or a list of names"),
        ({"hidden_loss": "[hidden_mse]"}, "has to be valid JSON"),
        ({"hidden_loss": [{"weight": 1}]}, "Entry 0 of `hidden_loss` has to be a name or a mapping with `name`"),
        ({"hidden_loss": ["hiden_mse"]}, "Did you mean 'hidden_mse'"),
        ({"hidden_loss": ["hidden_mse", {"name": "minilm", "wieght": 1}]}, "Entry 1 .*Did you mean 'weight'"),
        ({"hidden_loss": [{"name": "minilm", "weight": 0}]}, "`weight` has to be a number > 0, got 0"),
        ({"hidden_loss": [{"name": "minilm", "weight": float("inf")}]}, "`weight` has to be a number > 0"),
        ({"hidden_loss": [{"name": "minilm", "weight": "1"}]}, "`weight` has to be a number > 0, got '1'"),
        ({"hidden_loss": ["hidden_mse", "hidden_mse"]}, "names a loss twice: hidden_mse, hidden_mse"),
        ({"hidden_loss": ["hidden_mse"], "hidden_options": {"relative": False}}, "Put them into its entries"),
        ({"hidden_loss": [{"name": "hidden_mse", "options": {"heads": 2}}]}, "Unknown option of hidden_mse 'heads'"),
        ({"hidden_loss": [{"name": "hidden_cosine", "options": {"a": 2}}]}, r"\(it has none\)"),
        ({"hidden_loss": [{"name": "hidden_mse", "options": 3}]}, "`options` has to be a mapping, got 3"),
        ({"hidden_loss": [{"name": "hidden_mse", "layer_map": [0, 1]}]}, "a name or pairs of layers"),
        ({"hidden_loss": [{"name": "hidden_mse", "embeddings": 1}]}, "`embeddings` has to be true or false, got 1"),
        ({"hidden_loss": [{"name": "minilm", "embeddings": True}]}, "minilm reads attention, which embeddings do not"),
        ({"hidden_loss": [{"name": "dual_head", "layer_map": "last"}]}, "compares what the heads read, and no layers"),
        ({"hidden_loss": ["minilm", "attention_mse"], "hidden_embeddings": True}, "add a loss that reads hidden st"),
        ({"hidden_loss": "talking_models", "hidden_embeddings": True}, "talking_models cuts both models at one layer"),
        (
            {"hidden_loss": [{"name": "minilm", "layer_map": "last"}], "layer_map": "skip"},
            "each entry of `hidden_loss` has its own",
        ),
        ({"hidden_loss": "hidden_mse", "layer_map": []}, "a name or pairs of layers"),
        ({"hidden_loss": "hidden_mse", "layer_map": {0: 1}}, "a name or pairs of layers"),
        ({"hidden_loss": "hidden_mse", "layer_map": [[0, "1"]]}, "has to name layers by their numbers"),
        ({"hidden_loss": "hidden_mse", "hidden_weight": float("inf")}, "`hidden_weight` has to be a finite number"),
        (
            {"hidden_loss": "attention_relation", "hidden_options": {"heads": "8"}},
            "`heads` has to be a whole number, got str",
        ),
        (
            {"hidden_loss": "hidden_mse", "hidden_options": {"relative": 1}},
            "`relative` of hidden_mse has to be of type bool",
        ),
    ],
)
def test_bad_settings_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)
