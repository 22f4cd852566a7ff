"""Numbers of a configuration: every field and option that is annotated as one, with values that are not."""

import dataclasses
import math
import typing

import numpy as np
import pytest
from trainers.test_distillation import config
from trl import SFTConfig

from hf_transfer_ext import DistillationConfig
from hf_transfer_ext.settings import require_numbers

HINTS = typing.get_type_hints(DistillationConfig)
NUMBERS = {
    one.name: set(typing.get_args(HINTS[one.name]) or (HINTS[one.name],))
    for one in dataclasses.fields(DistillationConfig)
    if one.init and {int, float} & set(typing.get_args(HINTS[one.name]) or (HINTS[one.name],))
}
WHOLE = [name for name, kinds in NUMBERS.items() if float not in kinds]


def test_the_fields_are_found():
    assert {"kd_weight", "on_policy_share", "max_new_tokens", "learning_rate", "seed"} <= set(NUMBERS)
    assert {"max_new_tokens", "log_rollouts", "max_steps"} <= set(WHOLE) and "kd_weight" not in WHOLE


#: What transformers and TRL read in a way of their own.
MEANT = (("max_grad_norm", math.inf), ("pad_to_multiple_of", "2"))


@pytest.mark.parametrize(
    "name, value",
    [(n, v) for n in NUMBERS for v in ("2", math.nan, math.inf, True, [1]) if (n, v) not in MEANT],
)
def test_no_field_takes_what_is_not_a_number(tmp_path, name, value):
    needed = "a whole number" if name in WHOLE else "a finite number"
    with pytest.raises(ValueError, match=f"^`{name}` has to be {needed}( or .*)?, got {type(value).__name__} "):
        config(tmp_path, **{name: value})


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_number_is_not_a_fraction(tmp_path, name):
    with pytest.raises(ValueError, match=f"^`{name}` has to be a whole number( or .*)?, got float 8.5"):
        config(tmp_path, **{name: 8.5})


def test_a_whole_number_may_be_written_as_a_float(tmp_path):
    made = config(tmp_path, max_steps=8.0, per_device_train_batch_size=np.int64(2), kd_weight=1, on_policy_share=None)
    assert type(made.max_steps) is int and type(made.per_device_train_batch_size) is int
    assert (made.max_steps, made.per_device_train_batch_size, made.kd_weight) == (8, 2, 1)
    assert config(tmp_path, max_grad_norm=None).max_grad_norm is None
    assert config(tmp_path, max_grad_norm=math.inf).max_grad_norm == math.inf
    given = SFTConfig.pad_to_multiple_of  # "auto" since TRL 1.16
    assert config(tmp_path, pad_to_multiple_of=given).pad_to_multiple_of is None


@pytest.mark.parametrize("settings, message", [
    ({"loss": "generalized_jsd", "loss_options": {"beta": "0.5"}}, "In `loss_options`: `beta` .*, got str '0.5'"),
    ({"loss": "skew_kl", "loss_options": '{"skew": true}'}, "In `loss_options`: `skew` .*, got bool True"),
    ({"hidden_loss": "attention_relation", "hidden_options": {"heads": "8"}}, "In `hidden_options`: `heads` .* whole"),
    ({"teacher_cache": "x", "teacher_cache_options": {"top": "8"}}, "In `teacher_cache_options`: `top` .* or None"),
    ({"teacher_cache": "x", "teacher_cache_options": {"top": 8.5}}, "In `teacher_cache_options`: `top` .* float 8.5"),
    ({"teacher_server": "http://x", "teacher_server_model": "m", "teacher_server_options": {"timeout": "a"}},
     "In `teacher_server_options`: `timeout` .* str 'a'"),
    ({"on_policy": "sampled_reverse_kl", "loss": "reverse_kl", "on_policy_options": {"trust_region": math.inf}},
     "In `on_policy_options`: `trust_region` .* or None, got float inf"),
    ({"on_policy": "distillm", "on_policy_share": 0.5, "on_policy_options": {"capacity": 2.5}},
     "In `on_policy_options`: `capacity` has to be a whole number, got float 2.5"),
])  # fmt: skip
def test_options_are_checked_by_the_annotations_of_their_owner(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **settings)


def test_other_types_of_an_annotation_are_taken():
    def owner(*, steps: int | None = None, weights: float | dict[str, float] | list[float] = 1.0, name: str = ""):
        return steps, weights, name

    for values in ({"steps": None, "weights": [1.0, 2.0]}, {"steps": 3, "weights": {"a": 1.0}}, {"weights": 2}):
        assert require_numbers(values, owner) == values
    assert require_numbers({"name": "a"}, owner) == {}
    with pytest.raises(ValueError, match=r"^`weights` has to be a finite number or dict or list, got str 'a'"):
        require_numbers({"weights": "a"}, owner)


def test_annotations_that_cannot_be_resolved_say_nothing():
    def foreign(*, beta: "Missing" = 1.0, other: float = 2.0):  # noqa: F821
        return beta, other

    assert require_numbers({"beta": "a", "other": 3}, foreign) == {}
