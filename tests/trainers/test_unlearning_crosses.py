"""Every method with every retain loss, on adapters, whole models and four bits: it trains, or says why it does not."""

import copy
import re

import pytest
import torch
from evals.audit.planted_people import taught
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama
from trainers.test_quantized import in_four_bits, wide_llama
from trainers.test_unlearning import FORGET, RETAIN, lora, reinforced, trainer

from hf_transfer_ext.losses.unlearning import RETAIN_LOSSES
from hf_transfer_ext.losses.unlearning.methods import METHODS

#: The reasons for which a cross is refused.
REASONS = re.compile(
    "needs a retain loss; `retain_loss` is 'none'"
    "|No autoencoder was fitted to the retain set. Choose a method that does so"
    r"|the method has to compute before the first step .* Choose a method that does"
    "|are too large to keep. Train an adapter .*, or give `reference_model`"
    "|reads a model that was trained further on the forget set: load such an adapter"
    "|it is quantized already"
    "|'prune_first' sets the smallest trained weights to 0, and a trained matrix holds zeros alone"
)


def knows(model):
    """The model after it was taught both sets, so that no loss is at rest."""
    return taught(model, FORGET + RETAIN, steps=40)


@pytest.fixture(scope="module")
def taught_llama():
    return knows(tiny_llama())


def moved(tmp_path, model, given=None, **options):
    """The largest change of a trained weight in two steps; None where the trainer gives a known reason for none."""
    try:
        made = trainer(tmp_path, model, given=given, hidden_layer=1, max_new_tokens=3, max_steps=2, **options)
        start = {name: p.detach().clone() for name, p in made.model.named_parameters() if p.requires_grad}
        made.train()
    except ValueError as error:
        assert REASONS.search(str(error)), error
        return None
    return max(float((p.detach() - start[n]).abs().max()) for n, p in made.model.named_parameters() if p.requires_grad)


def adapted(method, base):
    """An adapter on a copy of the model, with the further one that `whp` reads; and the settings for it."""
    model = lora(copy.deepcopy(base))
    if method != "whp":
        return model, {}
    return reinforced(model), {"reinforced_adapter": "more"}


@pytest.mark.parametrize("retain", [*RETAIN_LOSSES, "none"])
def test_a_retain_loss_reaches_the_adapter_or_is_refused(tmp_path, taught_llama, retain):
    model = lora(copy.deepcopy(taught_llama))  # B is not 0, so that it is not at rest
    settings = {"method": "npo", "retain_loss": retain, "gamma": 0.0 if retain != "none" else 1.0, "alpha": 1.0}
    given = {"alternatives": ["kk"]} if retain == "retain_ap" else {}  # at rest against longer ones
    found = moved(tmp_path, model, given, **settings)
    assert found is None if retain in ("retain_laf", "retain_dmm") else found > 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_an_adapter_with_each_retain_loss_or_is_refused(tmp_path, taught_llama, method):
    refused = set()
    for retain in (*RETAIN_LOSSES, "none"):
        model, settings = adapted(method, taught_llama)
        found = moved(tmp_path, model, method=method, retain_loss=retain, **settings)
        assert found is None or found > 1e-7, retain
        refused |= {retain} if found is None else set()
    own = METHODS[method].retain or "none"
    assert own not in refused
    assert refused <= {"retain_laf", "retain_dmm", *(["none"] if METHODS[method].requires_retain else [])}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_whole_weights_or_is_refused(tmp_path, taught_llama, method):
    alone = moved(tmp_path, copy.deepcopy(taught_llama), method=method)
    given = {"reference_model": copy.deepcopy(taught_llama)}
    beside = moved(tmp_path, copy.deepcopy(taught_llama), given, method=method)
    assert alone is None or alone > 1e-7
    assert (beside is None) == (method == "whp") and (beside is None or beside > 1e-7)


@pytest.fixture(scope="module")
def four_bits(tmp_path_factory):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return in_four_bits(knows(wide_llama(0)), tmp_path_factory.mktemp("four_bits"))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_an_adapter_on_four_bits_or_is_refused(tmp_path, four_bits, method):
    base, config = copy.deepcopy(four_bits), LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    if method == "whp":
        found = moved(tmp_path, reinforced(get_peft_model(base, config)), method=method, reinforced_adapter="more")
    else:
        found = moved(tmp_path, base, {"peft_config": config}, method=method)
    assert (found is None) == (method in ("qaf", "prune_first")) and (found is None or found > 1e-7)
    assert base.model.layers[0].self_attn.q_proj.base_layer.weight.dtype == torch.uint8
