"""Options of generation: every name and value is obeyed or refused before a model is loaded."""

import pytest
from trainers.test_distillation import config
from trainers.test_rollouts import WRITES
from transformers import GenerationConfig

from hf_transfer_ext.trainers.generation_options import OBEYED, checked_options, distorting, effective

SAMPLED = {"on_policy": "sampled_reverse_kl", "max_new_tokens": 6}


@pytest.mark.parametrize("options, message", [
    ({"topp": 0.9}, "Unknown option of generation in `generation_options` 'topp'. Did you mean 'top_p'"),
    ({"top_p": 7}, r"`top_p` of `generation_options` has to be in \(0, 1\], got 7"),
    ({"top_p": "0.9"}, "In `generation_options`: `top_p` has to be a finite number, got str '0.9'"),
    ({"top_k": -3}, "`top_k` of `generation_options` has to be >= 0, got -3"),
    ({"top_k": 2.5}, "`top_k` has to be a whole number, got float 2.5"),
    ({"min_p": 1.5}, r"`min_p` of `generation_options` has to be in \[0, 1\]"),
    ({"repetition_penalty": 0}, "`repetition_penalty` of `generation_options` has to be > 0, got 0"),
    ({"typical_p": 0.0}, r"`typical_p` of `generation_options` has to be in \(0, 1\]"),
    ({"eta_cutoff": 1.0}, r"`eta_cutoff` of `generation_options` has to be in \[0, 1\)"),
    ({"min_new_tokens": 9}, r"`min_new_tokens` of `generation_options` is 9, more than `max_new_tokens` \(6\)"),
    ({"min_new_tokens": 2, "stop_strings": "x"}, "only stop tokens are held back until"),
    ({"suppress_tokens": [-1]}, r"`suppress_tokens` of `generation_options` has to be a list of token ids \(>= 0\)"),
    ({"bad_words_ids": [5]}, "has to be a list of lists of token ids"),
    ({"bad_words_ids": [[5], []]}, "has to be a list of lists of token ids"),
    ({"eos_token_id": []}, "`eos_token_id` of `generation_options` has to be a list of token ids"),
    ({"eos_token_id": "</s>"}, "`eos_token_id` of `generation_options` has to be a list of token ids"),
    ({"stop_strings": ["a", ""]}, "`stop_strings` of `generation_options` has to be a text or a list of them"),
    ({"cache_implementation": "fast"}, "Invalid `cache_implementation` .fast."),
    ({"use_cache": "yes"}, "`use_cache` of `generation_options` has to be a bool, got 'yes'"),
    ({"max_time": 2.0}, "texts would depend on the speed of the machine"),
    ({"temperature": 2.0}, "set `sampling_temperature`"),
    ({"guidance_scale": 2.0}, "'guidance_scale', which texts written in training do not take"),
])  # fmt: skip
def test_what_cannot_be_obeyed_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **WRITES, generation_options=options)


def test_every_option_is_one_of_transformers():
    assert set(OBEYED) <= set(vars(GenerationConfig()))


NEUTRAL = {"top_p": 1.0, "top_k": 0, "repetition_penalty": 1, "typical_p": 1.0, "min_p": None, "suppress_tokens": []}


@pytest.mark.parametrize("settings", [WRITES, SAMPLED, {**WRITES, "rollout_engine": "vllm"}])
def test_values_that_change_nothing_are_taken_by_every_method(tmp_path, settings, monkeypatch):
    monkeypatch.setattr("hf_transfer_ext.trainers.vllm_writer.require_vllm", lambda: None)
    found = config(tmp_path, **settings, generation_options=NEUTRAL).generation_options
    assert found.keys() == NEUTRAL.keys() - {"min_p"} and effective(found) == {}


CHANGING = [{"top_p": 0.9}, {"repetition_penalty": 1.1}, {"top_h": 1.0}, {"min_new_tokens": 2},
            {"bad_words_ids": [[5]]}, {"begin_suppress_tokens": [5]}]  # fmt: skip


@pytest.mark.parametrize("options", CHANGING)
def test_values_that_change_the_distribution_are_not(tmp_path, options):
    assert distorting(checked_options(options, 6)) == list(options)
    with pytest.raises(ValueError, match=f"has {next(iter(options))!r}, but sampled_reverse_kl needs the probability"):
        config(tmp_path, **SAMPLED, generation_options=options)


def test_values_have_the_types_of_generate():
    found = checked_options({"repetition_penalty": 2, "eos_token_id": 5, "stop_strings": "a", "top_k": 4.0}, 6)
    assert found == {"repetition_penalty": 2.0, "eos_token_id": [5], "stop_strings": ["a"], "top_k": 4}
    assert type(found["repetition_penalty"]) is float and type(found["top_k"]) is int
    assert distorting({"eos_token_id": [5], "stop_strings": ["a"], "use_cache": True}) == []
