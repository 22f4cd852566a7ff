"""Norms of a batch against one backward pass per sequence, in float64."""

import logging

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from tiny import tiny_llama
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from hf_transfer_ext.data.question_answer import EncodedAnswer
from hf_transfer_ext.models import scoring
from hf_transfer_ext.models.sample_gradients import UnknownUse, gradient_norms, matrix_squares

NEEDS = frozenset({"token_log_probs", "gradients"})
SIZES = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "initializer_range": 0.3, "pad_token_id": 0,
}  # fmt: skip
GPT2 = {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 4, "initializer_range": 0.3, "n_positions": 32}
OPT = {"vocab_size": 64, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
       "word_embed_proj_dim": 16, "init_std": 0.3}  # fmt: skip


def made(kind: str, **settings):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).double().eval()


def llama(**settings):
    return tiny_llama(**SIZES, **settings).double() if settings else tiny_llama(**SIZES).double()


def adapted(model, config):
    return get_peft_model(model, config, autocast_adapter_dtype=False).eval()


def lora(model=None, **settings):
    return adapted(model or llama(), LoraConfig(r=3, init_lora_weights=False, **settings))


def frozen_but_biases():
    model = made("gpt2", **GPT2)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    return model


BATCHED = {
    "llama": llama,
    "tied llama": lambda: llama(tie_word_embeddings=True),
    "gpt2": lambda: made("gpt2", **GPT2),
    "biases of gpt2": frozen_but_biases,
    "gemma": lambda: made("gemma", **SIZES),
    "gemma2": lambda: made("gemma2", **SIZES, sliding_window=8),
    "qwen3": lambda: made("qwen3", **SIZES),
    "opt": lambda: made("opt", **OPT),
    "lora": lora,
    "lora beside a trained head": lambda: lora(modules_to_save=["lm_head"]),
    "lora of gpt2": lambda: lora(made("gpt2", **GPT2), target_modules=["c_attn"], fan_in_fan_out=True),
    "ia3": lambda: adapted(llama(), IA3Config(init_ia3_weights=False)),
}
ONE_BY_ONE = {
    "dora": lambda: lora(use_dora=True),
    "mamba": lambda: made("mamba", vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4),
}


def sequences() -> list[EncodedAnswer]:
    """Of several lengths; the shorter ones are padded with token 0, which also occurs within them."""
    draw = np.random.default_rng(0)
    found = [draw.integers(0, 64, size=n).tolist() for n in (12, 9, 9, 5)]
    found[0][2:6] = [7, 7, 0, 7]
    return [EncodedAnswer(ids, start) for ids, start in zip(found, (5, 1, 4, 3), strict=True)]


def norms_one_by_one(model) -> list[float]:
    found = []
    for s in sequences():
        ids = torch.tensor([s.input_ids])
        logits = model(input_ids=ids).logits[0, s.answer_start - 1 : -1]
        loss = functional.cross_entropy(logits, ids[0, s.answer_start :])
        weights = [p for p in model.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        found.append(float(torch.cat([g.flatten() for g in gradients if g is not None]).norm()))
    return found


@pytest.mark.parametrize("kind", BATCHED)
def test_norms_of_a_batch_are_those_of_single_sequences(kind):
    model = BATCHED[kind]()
    batch = scoring.Batch.of(sequences(), 0, "cpu")
    targets = torch.where(batch.rows, batch.input_ids.roll(-1, 1), -100)

    def losses():
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        return functional.cross_entropy(logits.mT, targets, reduction="none").sum(1) / batch.rows.sum(1)

    weights = [p for p in model.parameters() if p.requires_grad]
    expected = norms_one_by_one(model)
    found = gradient_norms(weights, losses, samples=4, length=12)
    assert found.tolist() == pytest.approx(expected, rel=1e-12)
    scorer = scoring.Scorer(model)  # its logits are float32
    assert [s.gradient_norm for s in scorer.score(sequences(), NEEDS)] == pytest.approx(expected, rel=1e-6)
    assert scorer.forwards == 2  # the batch, and the shortest sequence again
    scorer.score(sequences(), NEEDS)
    assert scorer.forwards == 3
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize("kind", ONE_BY_ONE)
def test_a_model_without_rules_gets_one_pass_per_sequence_and_a_warning(kind, caplog):
    model = ONE_BY_ONE[kind]()
    scorer = scoring.Scorer(model)
    with caplog.at_level(logging.WARNING, logger=scoring.__name__):
        found = [scores.gradient_norm for scores in scorer.score(sequences(), NEEDS)]
    assert found == pytest.approx(norms_one_by_one(model), rel=1e-6)  # mamba computes its state in float32
    (said,) = [r.getMessage() for r in caplog.records if "one backward pass per sequence" in r.getMessage()]
    assert "a weight is" in said


def test_a_model_whose_samples_depend_on_each_other_is_detected(caplog):
    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = llama()
            self.config = self.inner.config

        def get_output_embeddings(self):
            return self.inner.lm_head

        def forward(self, input_ids, attention_mask=None, **settings):
            embedded = self.inner.model.embed_tokens(input_ids)
            return self.inner(inputs_embeds=embedded + embedded.mean(0), attention_mask=attention_mask, **settings)

    scorer = scoring.Scorer(Mixing().eval())
    found = [scores.gradient_norm for scores in scorer.score(sequences(), NEEDS)]
    alone = [scorer.score([s], NEEDS)[0].gradient_norm for s in sequences()]
    assert found == pytest.approx(alone, rel=1e-12)
    assert "in a batch, and" in caplog.text


def test_groups_are_bounded_by_tokens_and_logits():
    def groups(*lengths: int) -> list[int]:
        return scoring.gradient_groups([EncodedAnswer(list(range(n)), n - 10) for n in lengths], 1000)

    assert groups(1024, 1024, 1024, 1024, 1024) == [2, 2, 1]
    assert groups(5000, 5000) == [1, 1]
    assert groups(*[20] * 120) == [102, 18]  # 2048 tokens
    assert scoring.gradient_groups([EncodedAnswer(list(range(50)), 1)] * 5, 1 << 17) == [2, 2, 1]  # logits


def loops(dense, rows) -> list[float]:
    found = []
    for i in range(2):
        matrix = torch.zeros(30, 7, dtype=torch.float64)
        for left, right in zip(dense[0][i], dense[1][i], strict=True) if dense else ():
            matrix += torch.outer(left, right)
        for token, added in zip(rows[0][i], rows[1][i], strict=True) if rows else ():
            matrix[token] += added
        found.append(float(matrix.square().sum()))
    return found


@pytest.mark.parametrize("tokens", [2, 3, 40])
@pytest.mark.parametrize("cancels", [False, True])
def test_squares_of_matrices_against_loops(tokens, cancels):
    torch.manual_seed(0)
    left, right = torch.randn(2, tokens, 30).double(), torch.randn(2, tokens, 7).double()
    ids, added = torch.randint(0, 3, (2, 5)), torch.randn(2, 5, 7).double()
    if cancels:
        left[:, 1], right[:, 1] = -left[:, 0], right[:, 0] * (1 + 1e-9)
        left[:, 2:] = 0
        ids[:, :2], added[:, 1], added[:, 2:] = 1, -added[:, 0] * (1 + 1e-9), 0
    for dense, rows in ((left, right), None), (None, (ids, added)), ((left, right), (ids, added)):
        found = matrix_squares(dense, rows)
        assert found.tolist() == pytest.approx(loops(dense, rows), rel=1e-5 if cancels else 1e-12)


def norms_of(forward, *weights):
    return gradient_norms(weights, forward, samples=2, length=3)


def test_uses_without_a_rule_are_refused():
    weight, states = torch.randn(4, 4, requires_grad=True), torch.randn(2, 3, 4)
    vector = torch.randn(4, requires_grad=True)
    with pytest.raises(UnknownUse, match="used by `T`"):
        norms_of(lambda: (states @ weight.T).sum((1, 2)), weight)
    with pytest.raises(UnknownUse, match="used by `matmul`"):
        norms_of(lambda: torch.matmul(states, weight).sum((1, 2)), weight)
    with pytest.raises(UnknownUse, match="states of shape"):
        norms_of(lambda: functional.linear(states[0, :2], weight).sum(1), weight)
    with pytest.raises(UnknownUse, match="applied to 1 features"):
        norms_of(lambda: (states[..., None] * vector).sum((1, 2, 3)), vector)


def test_states_that_change_after_their_use_are_refused():
    weight, states = torch.randn(4, 4, requires_grad=True), torch.randn(2, 3, 4)

    def changed():
        output = functional.linear(states, weight)
        states.mul_(2.0)
        return output.sum((1, 2))

    with pytest.raises(UnknownUse, match="modified in place"):
        norms_of(changed, weight)


def test_flattened_states_are_refused_once_rows_were_gathered():
    weight, states = torch.randn(4, 4, requires_grad=True), torch.randn(6, 4)
    assert norms_of(lambda: functional.linear(states, weight).view(2, -1).sum(1), weight).shape == (2,)
    with pytest.raises(UnknownUse, match="states of shape"):
        norms_of(lambda: functional.linear(states[torch.arange(5, -1, -1)], weight).view(2, -1).sum(1), weight)


def test_a_weight_that_only_an_own_function_uses_is_refused():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, weight):
            return 2 * weight

        @staticmethod
        def backward(ctx, gradient):
            return 2 * gradient

    weight, other = torch.randn(4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    states = torch.randn(2, 3, 4)
    with pytest.raises(UnknownUse, match="not a function of torch"):
        norms_of(lambda: (functional.linear(states, other) * Double.apply(weight)).sum((1, 2)), weight, other)


def test_a_weight_that_the_loss_does_not_use_counts_as_nothing():
    used, unused = torch.randn(4, 4, requires_grad=True), torch.randn(3, requires_grad=True)
    states = torch.randn(2, 3, 4)

    def losses():
        functional.linear(states, used)  # whose output is not part of the loss
        return functional.linear(states, used).sum((1, 2))

    alone = norms_of(lambda: functional.linear(states, used).sum((1, 2)), used)
    assert norms_of(losses, used, unused).tolist() == pytest.approx(alone.tolist())
    assert alone.tolist() == pytest.approx([2.0 * float(s.sum(0).norm()) for s in states], rel=1e-5)
