"""What layers compute, read without a change: against the model's own hidden states and attention."""

import pytest
import torch
from tiny import tiny_llama
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    DistilBertConfig,
    DistilBertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    ModernBertConfig,
    ModernBertForMaskedLM,
    RobertaConfig,
    RobertaForTokenClassification,
    T5Config,
    T5ForConditionalGeneration,
    T5GemmaConfig,
    T5GemmaForConditionalGeneration,
    XLNetConfig,
    XLNetModel,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from vision_families import CONFIGS, vision_language

from hf_transfer_ext.models.layer_views import EMBEDDINGS, FEATURES, layers_of, layers_viewed, width_of
from hf_transfer_ext.students.layers import layer_stack

IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=3, n_head=2)).eval()


@pytest.mark.parametrize("make", [lambda: tiny_llama(1, num_hidden_layers=3), gpt2], ids=["llama", "gpt2"])
def test_views_are_the_models_own_hidden_states(make):
    model = make()
    with layers_viewed(model, [EMBEDDINGS, 0, 1, FEATURES]) as found:
        output = model(IDS, output_hidden_states=True)
    torch.testing.assert_close(found[EMBEDDINGS].states, output.hidden_states[0])
    torch.testing.assert_close(found[1].states, output.hidden_states[2])
    torch.testing.assert_close(model.lm_head(found[FEATURES].states), output.logits)
    assert set(found) == {EMBEDDINGS, FEATURES, 0, 1} and found[0].query is None
    before = found[0].states
    model(IDS + 1)
    assert found[0].states is before  # nothing is read behind the block


@pytest.mark.parametrize("make", [lambda: tiny_llama(1, num_hidden_layers=3), gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_scores_give_the_models_own_attention(make, attention):
    model = make()
    model.set_attn_implementation("eager")
    attentions = model(IDS, output_attentions=True).attentions
    model.set_attn_implementation(attention)
    logits = model(IDS).logits
    with layers_viewed(model, [1], attention=[1]) as found:
        torch.testing.assert_close(model(IDS).logits, logits)
    later = torch.ones(4, 4, dtype=torch.bool).triu(1)
    own = found[1].scores().masked_fill(later, -torch.inf).softmax(-1)
    torch.testing.assert_close(own, attentions[1])
    assert "eager" not in ALL_ATTENTION_FUNCTIONS and not ALL_ATTENTION_FUNCTIONS._local_mapping


def test_the_attention_functions_are_restored_after_an_error():
    with pytest.raises(RuntimeError), layers_viewed(tiny_llama(1), [0], attention=[0]):
        raise RuntimeError
    assert not ALL_ATTENTION_FUNCTIONS._local_mapping


SIZES = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
    "max_position_embeddings": 32, "initializer_range": 0.5,
}  # fmt: skip
ENCODERS = {
    "bert": lambda: BertForMaskedLM(BertConfig(**SIZES)),
    "bert classifier": lambda: BertForSequenceClassification(BertConfig(**SIZES)),
    "bert alone": lambda: BertModel(BertConfig(**SIZES)),
    "roberta": lambda: RobertaForTokenClassification(RobertaConfig(**SIZES)),
    "distilbert": lambda: DistilBertForMaskedLM(
        DistilBertConfig(vocab_size=50, dim=16, hidden_dim=32, n_layers=3, n_heads=2, initializer_range=0.5)
    ),
    "modernbert": lambda: ModernBertForMaskedLM(
        ModernBertConfig(
            **SIZES, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2, local_attention=64
        )
    ),
}


@pytest.mark.parametrize("family", ENCODERS)
def test_encoders_show_their_hidden_states_and_attention(family):
    torch.manual_seed(0)
    model = ENCODERS[family]().eval()
    model.set_attn_implementation("eager")
    read = {"input_ids": IDS, "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])}
    with layers_viewed(model, [EMBEDDINGS, 0, 1, 2], attention=[1]) as found:
        output = model(**read, output_hidden_states=True, output_attentions=True)
    for layer, view in found.items():
        if family != "modernbert" or layer < 2:  # whose last hidden state is behind a norm
            torch.testing.assert_close(view.states, output.hidden_states[layer + 1])
    scores = found[1].scores().masked_fill(read["attention_mask"][:, None, None] == 0, -torch.inf)
    torch.testing.assert_close(scores.softmax(-1), output.attentions[1])
    assert found[1].causal is False and found[0].query is None


def test_the_layers_of_encoder_decoders_are_those_of_their_decoders_or_encoders():
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=3, num_heads=2)
    )
    sides = {
        f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("attention_heads", 2), ("ffn_dim", 32))
    }
    bart = BartForConditionalGeneration(
        BartConfig(vocab_size=50, d_model=16, encoder_layers=2, decoder_layers=3, **sides)
    )
    assert layers_of(t5) is t5.decoder.block and layers_of(bart) is bart.model.decoder.layers
    assert layers_of(t5, "encoder") is t5.encoder.block and layers_of(bart, "encoder") is bart.model.encoder.layers
    shape = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8,
        "num_key_value_heads": 2, "layer_types": ["full_attention"] * 2,
    }  # fmt: skip
    gemma = T5GemmaForConditionalGeneration(
        T5GemmaConfig(encoder=shape, decoder={**shape, "hidden_size": 24, "num_hidden_layers": 2}, vocab_size=50)
    )
    assert layers_of(gemma, "encoder") is gemma.model.encoder.layers
    for side, width in (("encoder", 16), ("decoder", 24)):
        with layers_viewed(gemma, [0], side=side) as found:
            gemma(input_ids=IDS, decoder_input_ids=IDS)
        assert found[0].states.shape[2] == width == width_of(gemma, side)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no encoder beside a decoder\. Leave `side` out"):
        layers_of(tiny_llama(1), "encoder")


@pytest.mark.parametrize("family", CONFIGS)
def test_the_layers_of_vision_language_models_are_those_of_their_language_models(family):
    model = vision_language(family)
    assert layers_of(model) is layer_stack(model)[1] and width_of(model) == 32


def test_layers_that_cannot_be_compared_are_refused():
    albert = AlbertForMaskedLM(AlbertConfig(**SIZES, embedding_size=8))
    with pytest.raises(ValueError, match=r"AlbertForMaskedLM has 0 lists .* share their weights"):
        layers_of(albert)
    with pytest.raises(ValueError, match="XLNetModel cannot be compared: their states are not ordered by text"):
        layers_of(XLNetModel(XLNetConfig(vocab_size=50, d_model=16, n_layer=2, n_head=2, d_inner=32)))
    deberta = DebertaV2Model(DebertaV2Config(**SIZES))
    with layers_viewed(deberta, [0]) as found:
        deberta(IDS)
    assert found[0].states.shape == (2, 4, 16)
    with pytest.raises(ValueError, match="does not call attention through the interface of transformers"):
        with layers_viewed(deberta, [0], attention=[0]):
            deberta(IDS)
