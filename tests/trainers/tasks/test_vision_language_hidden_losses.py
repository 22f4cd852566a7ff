"""Losses between the layers of vision-language models, at the tokens that both models read."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trainers.tasks.test_seq2seq_hidden_losses import bart, kl
from trainers.tasks.test_vision_language import CHAT, ROWS, trainer_of
from trainers.tasks.tiny_encoders import config
from trainers.tasks.tiny_vision import (
    CHAT_TEMPLATE,
    IMAGE,
    SPECIALS,
    drawn,
    idefics,
    idefics_processor,
    llava,
    llava_processor,
    vision_tokenizer,
)

from hf_transfer_ext.losses.hidden import HIDDEN_LOSSES
from hf_transfer_ext.models.layer_views import layers_of, layers_viewed
from hf_transfer_ext.trainers.hidden_loss import _require_states
from hf_transfer_ext.trainers.image_rows import Row, shared_places

LAYERS = [(0, 1), (1, 3)]  # "uniform" of 2 and 4 layers
PAIRS = {
    "one processor": lambda **more: (llava(1), llava_processor(), llava(2, layers=4, **more), llava_processor()),
    "larger images": lambda **more: (llava(1), llava_processor(), llava(2, 48, layers=4, **more), llava_processor(48)),
    "another family": lambda **more: (
        idefics(1), idefics_processor(), llava(2, layers=4, **more), llava_processor(),
    ),
}  # fmt: skip
#: Tokens that one family has around an image, and the other has not.
AROUND = vision_tokenizer().convert_tokens_to_ids([SPECIALS[2], SPECIALS[3]])
IMAGES = vision_tokenizer().convert_tokens_to_ids(IMAGE)


class Seen:
    """What a model computes for a row, in float64, by its own outputs."""

    def __init__(self, model, processor, row):
        model = copy.deepcopy(model).double()
        model.set_attn_implementation("eager")
        text = f"<s>user:{IMAGE}{row['prompt']}</s><s>assistant:"
        read = processor(text=[text], images=[[row["image"]]], return_tensors="pt", add_special_tokens=False)
        read = {name: value.double() if value.is_floating_point() else value for name, value in read.items()}
        answer = vision_tokenizer()(f"{row['completion']}</s>", return_tensors="pt", add_special_tokens=False)
        start = read["input_ids"].shape[1]
        read["input_ids"] = torch.cat([read["input_ids"], answer["input_ids"]], 1)
        read["attention_mask"] = torch.ones_like(read["input_ids"])
        with torch.no_grad():
            output = model(**read, output_hidden_states=True, output_attentions=True)
        self.ids, self.answer = read["input_ids"][0], answer["input_ids"][0]
        self.states = [one[0] for one in output.hidden_states]
        self.attentions = [one[0] for one in output.attentions]
        self.predicting = torch.arange(start - 1, len(self.ids) - 1)
        self.layers, self.head = layers_of(model), model.lm_head.weight.detach()

    def values(self, layer):
        """`(heads, length, width)`, a copy for each head that reads them."""
        own = self.layers[layer]
        found = own.self_attn.v_proj(own.input_layernorm(self.states[layer])).detach()
        return found.unflatten(-1, (2, -1)).transpose(0, 1).repeat_interleave(2, 0)


def shared(own, other):
    """Places of the tokens of both: all, or those that are neither of an image nor around it."""
    if torch.equal(own.ids, other.ids):
        return [torch.arange(len(own.ids))] * 2
    left_out = torch.tensor([IMAGES, *AROUND])
    places = [(~torch.isin(one.ids, left_out)).nonzero()[:, 0] for one in (own, other)]
    assert torch.equal(own.ids[places[0]], other.ids[places[1]])
    return places


def of_states(own, other, at, projections):
    values = []
    for i, j in LAYERS:
        if (i, j) == LAYERS[-1]:  # the last hidden state of a model is behind its norm
            continue
        s, t = own.states[i + 1][at[0]], other.states[j + 1][at[1]]
        s = s if projections is None else s @ projections[i, j].T
        values.append((s - t).square().sum(-1) / t.square().sum(-1))
    return torch.stack(values).mean(0).mean()


def of_attention(own, other, at, projections):
    """`minilm`: attention to the shared tokens alone, and the relations of their values."""
    values = []
    for i, j in LAYERS:
        (q, r), (p, s) = (_attended(one, layer, places) for one, layer, places in ((own, i, at[0]), (other, j, at[1])))
        values.append((kl(p, q) + kl(s, r)).mean(0))
    return torch.stack(values).mean(0).mean()


def _attended(one, layer, places):
    attended = one.attentions[layer][:, places][:, :, places]
    values = one.values(layer)[:, places]
    scores = values @ values.transpose(1, 2) / values.shape[-1] ** 0.5
    later = torch.ones(len(places), len(places), dtype=torch.bool).triu(1)
    return attended / attended.sum(-1, keepdim=True), scores.masked_fill(later, -torch.inf).softmax(-1)


def of_graph(own, other, at, projections):
    loss, mask = HIDDEN_LOSSES["token_relationship_graph"], torch.ones(1, len(at[0]), dtype=torch.bool)
    s, t = own.states[1][at[0]][None].float(), other.states[2][at[1]][None].float()
    return loss(s, t, mask)[0].mean()


def of_features(own, other, at, projections):
    s, t = own.states[-1][own.predicting], other.states[-1][other.predicting]
    unit = torch.nn.functional.normalize(other.head[own.answer], dim=-1)
    return (1 - (s * unit).sum(-1) / torch.maximum(s.norm(dim=-1), t.norm(dim=-1))).mean()


def of_logits(own, other, at, projections):
    s, t = own.states[-1][own.predicting] @ own.head.T, other.states[-1][other.predicting] @ other.head.T
    return HIDDEN_LOSSES["dual_head"](s.float(), t.float()).mean()


FORMULAS = {
    "hidden_mse": (of_states, {"layer_map": [[0, 1]]}),
    "minilm": (of_attention, {"hidden_weight": 1.0, "hidden_options": {"relative": False}}),
    "token_relationship_graph": (of_graph, {"layer_map": [[0, 1]]}),
    "feature_norm_direction": (of_features, {}),
    "dual_head": (of_logits, {}),
}
CASES = [(name, pair, 32) for name in ("hidden_mse", "minilm") for pair in PAIRS]
CASES += [(name, "larger images", 32) for name in list(FORMULAS)[2:]] + [("hidden_mse", "another family", 48)]


@pytest.mark.parametrize("name, pair, hidden", CASES)
def test_the_layers_are_compared_at_the_tokens_that_both_models_read(tmp_path, name, pair, hidden):
    models = PAIRS[pair](hidden=hidden)
    formula, options = FORMULAS[name]
    trainer = trainer_of(tmp_path, models, hidden_loss=name, kd_weight=0.0, gradient_checkpointing=True, **options)
    (loss,) = trainer.task.between.losses
    projections = None
    if hidden != 32:
        projections = {(0, 1): loss.projections["student_0_teacher_1"].detach().double()}
    total, count = 0.0, 0
    for row in Dataset.from_dict(ROWS):
        own, other = Seen(*models[:2], row), Seen(*models[2:], row)
        total += len(own.answer) * formula(own, other, shared(own, other), projections).item()
        count += len(own.answer)
    batch = trainer.data_collator(list(trainer.train_dataset))
    found = trainer.compute_loss(trainer.model.train(), batch)
    assert found.item() == pytest.approx(total / count, rel=1e-4)
    found.backward()
    learned = {n for n, p in trainer.model.named_parameters() if p.grad is not None and p.grad.any()}
    assert any("layers.0" in n for n in learned) and any("vision" in n for n in learned)
    assert (IMAGES in batch["input_ids"]) and trainer.task.reads_apart is (pair != "one processor")


def test_what_is_left_out_is_told_once(tmp_path, caplog):
    trainer = trainer_of(tmp_path, PAIRS["larger images"](), hidden_loss="hidden_mse", max_steps=2)
    with caplog.at_level("WARNING"):
        trainer.train()
    (line,) = [one.message for one in caplog.records if "leaves out" in one.message]
    assert line.startswith("`hidden_loss` leaves out what only one of the models reads.")
    batch = trainer.data_collator(list(trainer.train_dataset))
    tokens = [int(batch[f"{side}attention_mask"].sum()) for side in ("", "teacher_")]
    assert f"64 of {tokens[0]} tokens of the student (64 of them of images)" in line
    assert f"144 of {tokens[1]} tokens of the teacher (144 of them of images)" in line
    caplog.clear()
    with caplog.at_level("WARNING"):
        trainer_of(tmp_path, PAIRS["one processor"](), hidden_loss="hidden_mse").train()
    assert not [one for one in caplog.records if "leaves out" in one.message]


def test_a_step_does_not_depend_on_its_split_nor_on_checkpointing_and_an_adapter_learns(tmp_path):
    ends = []
    for size, steps, checkpointing in ((4, 1, False), (1, 4, True)):
        torch.manual_seed(0)
        lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        trainer = trainer_of(
            tmp_path, PAIRS["another family"](), per_device_train_batch_size=size, gradient_accumulation_steps=steps,
            max_steps=1, gradient_checkpointing=checkpointing, max_grad_norm=0.0, peft_config=lora,
            hidden_loss=["hidden_mse", {"name": "attention_relation", "options": {"heads": 2}}, "dual_head"],
        )  # fmt: skip
        before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        trainer.train()
        moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
        assert moved and all("text_model" in n and "lora" in n for n in moved)
        ends.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad]))
    assert (ends[0] - ends[1]).abs().max() < 1e-5


def test_an_adapter_of_the_student_teaches(tmp_path):
    torch.manual_seed(0)
    from peft import get_peft_model

    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    student = get_peft_model(llava(1), lora)
    models = (student, llava_processor(), None, None)
    trainer = trainer_of(tmp_path, models, teacher_adapter="base", hidden_loss="hidden_mse", kd_weight=0.0)
    before = trainer.evaluate(trainer.train_dataset)["eval_hidden"]
    trainer.train()
    assert 0 < trainer.evaluate(trainer.train_dataset)["eval_hidden"] < before


def test_conversations_with_other_templates_share_their_texts_and_answers(tmp_path):
    other = llava_processor()
    other.chat_template = "Look. " + CHAT_TEMPLATE.replace("role'] }}:", "role'] }} says:").replace("nt:", "nt says:")
    rows = Dataset.from_list([{"messages": CHAT, "images": [drawn("red", "circle")]}] * 2)
    models = (llava(1), llava_processor(), llava(2, layers=4), other)
    trainer = trainer_of(tmp_path, models, rows, hidden_loss="hidden_mse", kd_weight=0.0)
    batch = trainer.data_collator(list(trainer.train_dataset))
    tokens = trainer.task.compared_tokens(batch)
    texts = [
        vision_tokenizer().decode(batch[name][0][mask[0]])
        for name, mask in (("input_ids", tokens.compared), ("teacher_input_ids", tokens.of_teacher.compared))
    ]
    assert texts[0] == texts[1] == vision_tokenizer().decode(batch["input_ids"][0])  # the student's row is all shared
    assert IMAGE * 16 in texts[0] and int(tokens.compared.sum()) == int(tokens.of_teacher.compared.sum())
    assert trainer.compute_loss(trainer.model, batch).item() > 0


def row_of(text, *answers):
    """A row of letters: `.` is a token of an image, and what stands in `answers` is learned."""
    learned = [False] * len(text)
    for answer in answers:
        start = text.index(answer)
        learned[start : start + len(answer)] = [True] * len(answer)
    return Row([ord(letter) for letter in text], learned)


@pytest.mark.parametrize(
    "own, other, answers, wanted",
    [
        ("u..xA", "u..xA", "A", ("u..xA", "u..xA")),
        ("u..xA", "u....xA", "A", ("uxA", "uxA")),
        ("u..xA", "w(..)xyA", "A", ("..xA", "..xA")),
        ("u..x...A", "u..x..A", "A", ("u..xA", "u..xA")),  # of two images, the first is as many tokens
        ("u..xA", "u..s..xA", "A", ("uxA", "uxA")),  # in as many parts, or not at all
        ("u..xA", "ux..A", "A", ("u..A", "u..A")),  # what stands behind an image in one model alone is left out
        ("uxxA", "xxuA", "A", ("xxA", "xxA")),
        ("..xABuvC", "...wABvuvC", "ABC", ("ABuvC", "ABuvC")),
        ("..ABuvC", "...ABC", "ABC", ("ABC", "ABC")),
    ],
)
def test_shared_tokens_are_matched_in_order(own, other, answers, wanted):
    rows = [row_of(text, *answers) for text in (own, other)]
    places = shared_places(*rows, frozenset({ord(".")}))
    assert tuple("".join(text[i] for i in at) for text, at in zip((own, other), places, strict=True)) == wanted
    assert all(at == sorted(set(at)) for at in places)


def test_what_cannot_be_compared_is_refused(tmp_path):
    with pytest.raises(ValueError, match="an image may be other tokens for it"):
        config(tmp_path, "vision_language", hidden_loss="talking_models", layer_map=[[0, 0]])
    heads = PAIRS["one processor"](num_attention_heads=8)
    with pytest.raises(ValueError, match="the student has 4 heads and the teacher 8"):
        trainer_of(tmp_path, heads, hidden_loss="minilm").train()
    model, ids = bart(1), torch.tensor([[3, 4, 5]])
    with layers_viewed(model, [0], attention=[0]) as found, torch.no_grad():  # its second attention is to a source
        model(input_ids=torch.tensor([[3, 4, 5, 6, 7]]), decoder_input_ids=ids)
    with pytest.raises(ValueError, match="3 tokens attend to 5 others, such as parts of an image"):
        _require_states(found[0], model, torch.ones_like(ids, dtype=torch.bool))
