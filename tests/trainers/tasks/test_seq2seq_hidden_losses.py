"""Losses between the layers of encoder-decoders: of the decoders, of the encoders, and of both."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from trainers.tasks.test_seq2seq import ROWS, t5, trainer_of
from trainers.tasks.tiny_encoders import config, tokenizer_of
from trainers.test_distillation import config as lm_config
from transformers import BartConfig, BartForConditionalGeneration

PAIRS = [(0, 1), (1, 3)]  # "uniform" of 2 and 4 layers
BOTH = ["hidden_mse", {"name": "hidden_mse", "side": "encoder", "weight": 0.5}]


def bart(seed, layers=2, width=16):
    """Hidden states of BART are those behind each layer, the last one included."""
    torch.manual_seed(seed)
    sizes = {f"{side}_layers": layers for side in ("encoder", "decoder")}
    sizes |= {f"{side}_attention_heads": 2 for side in ("encoder", "decoder")}
    sizes |= {f"{side}_ffn_dim": 32 for side in ("encoder", "decoder")}
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1, "decoder_start_token_id": 1}
    return BartForConditionalGeneration(
        BartConfig(
            **sizes, **ids, d_model=width, dropout=0.0, init_std=0.5, vocab_size=len(tokenizer_of("unigram")),
            max_position_embeddings=64, forced_eos_token_id=None,
        )
    ).eval()  # fmt: skip


def run_in_float64(model, row):
    """Hidden states and attentions of both sides for one text without padding, by the model itself."""
    double = copy.deepcopy(model).double()
    double.set_attn_implementation("eager")
    tokenizer = tokenizer_of("unigram")
    labels = torch.tensor([tokenizer(text_target=row["target"])["input_ids"]])
    with torch.no_grad():
        found = double(
            input_ids=torch.tensor([tokenizer(row["source"])["input_ids"]]), labels=labels,
            output_hidden_states=True, output_attentions=True,
        )  # fmt: skip
    return found, double, labels.shape[1]


def of_states(own, other, projection=None):
    """`hidden_mse`, as a mean over the tokens of a text."""
    own = own if projection is None else own @ projection.T
    return ((own - other).square().sum(-1) / other.square().sum(-1)).mean()


def expected(student, teacher, entry, projections):
    """`hidden_mse` of one side as a mean over the target tokens of all texts."""
    total, count = 0.0, 0
    for row in (dict(zip(ROWS, values, strict=True)) for values in zip(*ROWS.values(), strict=True)):
        (own, _, items), (other, _, _) = (run_in_float64(model, row) for model in (student, teacher))
        side = f"{entry.get('side', 'decoder')}_hidden_states"
        values = [
            of_states(getattr(own, side)[i + 1][0], getattr(other, side)[j + 1][0], projections.get((i, j)))
            for i, j in PAIRS
        ]
        total, count = total + items * torch.stack(values).mean().item(), count + items
    return total / count


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("entry", [{}, {"side": "decoder"}, {"side": "encoder"}], ids=["none", "decoder", "encoder"])
@pytest.mark.parametrize("width", [16, 24])
def test_a_side_is_compared_by_the_models_own_hidden_states(tmp_path, entry, width, checkpointing):
    student, teacher = bart(1), bart(2, 4, width)
    trainer = trainer_of(
        tmp_path, student, teacher, hidden_loss=[{"name": "hidden_mse", **entry}], kd_weight=0.0,
        gradient_checkpointing=checkpointing,
    )  # fmt: skip
    (loss,) = trainer.task.between.losses
    assert loss.pairs == PAIRS and bool(len(loss.projections)) is (width == 24)
    projections = {
        (i, j): loss.projections[f"student_{i}_teacher_{j}"].detach().double() for i, j in PAIRS if width == 24
    }
    batch = trainer.data_collator(list(trainer.train_dataset))
    found = trainer.compute_loss(trainer.model.train(), batch)
    assert found.item() == pytest.approx(expected(student, teacher, entry, projections), rel=1e-5)
    found.backward()
    learns = {name.split(".")[1] for name, p in student.named_parameters() if p.grad is not None and p.grad.any()}
    assert ("encoder" in learns) and ("decoder" in learns) is (entry.get("side") != "encoder")


def test_checkpointed_encoders_and_split_batches_learn_the_same(tmp_path):
    ends = []
    for checkpointing, size, steps in ((False, 3, 1), (True, 3, 1), (False, 1, 3)):
        trainer = trainer_of(
            tmp_path, bart(1), bart(2, 4), hidden_loss=BOTH, gradient_checkpointing=checkpointing, max_steps=1,
            per_device_train_batch_size=size, gradient_accumulation_steps=steps,
        )  # fmt: skip
        trainer.train()
        ends.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    assert (ends[0] - bart_weights(bart(1))).abs().max() > 1e-3
    assert max((ends[0] - other).abs().max() for other in ends[1:]) < 1e-5


def bart_weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_a_list_holds_a_loss_for_each_side_and_logs_both(tmp_path):
    student, teacher = bart(1), bart(2, 4)
    trainer = trainer_of(tmp_path, student, teacher, hidden_loss=BOTH, kd_weight=0.0, learning_rate=1e-12)
    trainer.train()
    line = trainer.state.log_history[0]
    decoder, encoder = (expected(student, teacher, one, {}) for one in ({}, {"side": "encoder"}))
    assert line["hidden_mse"] == pytest.approx(decoder, rel=1e-4)
    assert line["hidden_mse_encoder"] == pytest.approx(encoder, rel=1e-4)
    assert line["hidden"] == pytest.approx(decoder + 0.5 * encoder, rel=1e-4) == pytest.approx(line["loss"], rel=1e-4)
    assert "hidden_mse, hidden_mse_encoder" in trainer.plan()
    assert trainer.evaluate(trainer.train_dataset)["eval_hidden_mse_encoder"] == pytest.approx(encoder, rel=1e-4)


def kl(p, q):
    return (p * (p.clamp(min=1e-300).log() - q.clamp(min=1e-300).log())).sum(-1)


def relations(values):
    """Of the values of each head, `(heads, length, width)`."""
    return (values @ values.transpose(1, 2) / values.shape[-1] ** 0.5).softmax(-1)


def values_of(double, output, layer):
    if hasattr(double, "model"):
        attention, states = double.model.encoder.layers[layer].self_attn, output.encoder_hidden_states[layer][0]
        return attention.v_proj(states).unflatten(-1, (2, -1)).transpose(0, 1)
    block = double.encoder.block[layer].layer[0]
    states = block.layer_norm(output.encoder_hidden_states[layer][0])
    return block.SelfAttention.v(states).unflatten(-1, (2, -1)).transpose(0, 1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [t5, bart])
def test_the_attention_of_encoders_is_the_models_own_with_its_biases(tmp_path, make, attention):
    """`minilm`; T5 adds a bias for the distance of two tokens to its scores."""
    more = {"num_layers": 4} if make is t5 else {"layers": 4}
    student, teacher = make(1), make(2, **more)
    if make is t5:
        for model in (student, teacher):
            torch.nn.init.normal_(model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight)
    for model in (student, teacher):
        model.set_attn_implementation(attention)
    losses = [{"name": "minilm", "side": "encoder", "weight": 1, "options": {"relative": False}}]
    trainer = trainer_of(tmp_path, student, teacher, hidden_loss=losses, kd_weight=0.0)
    batch = trainer.data_collator(list(trainer.train_dataset))
    found = trainer.compute_loss(trainer.model, batch).item()
    total, count = 0.0, 0
    for row in (dict(zip(ROWS, values, strict=True)) for values in zip(*ROWS.values(), strict=True)):
        (own, ours, items), (other, theirs, _) = (run_in_float64(model, row) for model in (student, teacher))
        for i, j in PAIRS:
            attended = kl(other.encoder_attentions[j][0], own.encoder_attentions[i][0])
            related = kl(relations(values_of(theirs, other, j)), relations(values_of(ours, own, i)))
            total += items * (attended + related).mean().item() / len(PAIRS)
        count += items
    assert found == pytest.approx(total / count, rel=1e-4)


def test_adapters_learn_from_the_layers_of_the_encoder(tmp_path):
    ends = []
    for adapter_teaches in (False, True):
        torch.manual_seed(0)
        student = get_peft_model(t5(1), LoraConfig(r=2, target_modules=["q", "v"], init_lora_weights=False))
        before = {name: p.detach().clone() for name, p in student.named_parameters() if "encoder" in name}
        more = {"teacher_adapter": "base"} if adapter_teaches else {}
        trainer = trainer_of(
            tmp_path, student, None if adapter_teaches else t5(1), kd_weight=0.0, max_steps=1,
            hidden_loss=[{"name": "hidden_mse", "side": "encoder"}], learning_rate=0.01, **more,
        )  # fmt: skip
        trainer.train()
        after = dict(trainer.model.named_parameters())
        moved = {name for name, value in before.items() if not torch.equal(after[name].detach(), value)}
        assert moved and all("lora" in name for name in moved)
        ends.append(torch.cat([after[name].detach().flatten() for name in sorted(moved)]))
    assert (ends[0] - ends[1]).abs().max() < 1e-6


@pytest.mark.parametrize(
    "losses, message",
    [
        ([{"name": "minilm"}], "has two attentions, to the target and to the source"),
        ([{"name": "minilm", "side": "decoder"}], "has two attentions, to the target and to the source"),
        ([{"name": "dual_head", "side": "encoder"}], "the head reads the decoder, and not the encoder"),
        ([{"name": "feature_norm_direction", "side": "encoder"}], "the head reads the decoder"),
        ([{"name": "talking_models", "side": "encoder"}], "models talk through the layers of decoders"),
        ([{"name": "hidden_mse", "side": "encoders"}], "Unknown side 'encoders'. Did you mean 'encoder'"),
        ([{"name": "hidden_mse", "side": 3}], "Unknown side '?3"),
        (["hidden_mse", {"name": "hidden_mse", "side": "decoder"}], "names a loss twice: hidden_mse, hidden_mse"),
        ([{"name": "hidden_mse", "side": "encoder"}] * 2, "names a loss twice: hidden_mse_encoder"),
    ],
)
def test_what_a_side_cannot_read_is_refused(tmp_path, losses, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, "seq2seq", hidden_loss=losses)


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_models_with_one_stack_of_layers_have_no_sides(tmp_path, side):
    losses = [{"name": "hidden_mse", "side": side}]
    for task in ("sequence_classification", "masked_lm", "vision_language"):
        with pytest.raises(ValueError, match=f"the models of the task {task} are not encoder-decoders"):
            config(tmp_path, task, hidden_loss=losses)
    with pytest.raises(ValueError, match="the models of the task causal_lm are not encoder-decoders"):
        lm_config(tmp_path, hidden_loss=losses)
