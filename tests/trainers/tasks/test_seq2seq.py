"""Distillation of encoder-decoders: the loss by its definition, inside the decoder's head and on full logits."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from processes import on_two_ranks
from trainers.tasks.tiny_encoders import config, tokenizer_of
from trainers.tasks.token_oracle import expected_loss
from transformers import AutoModelForSeq2SeqLM, BartConfig, BartForConditionalGeneration, T5Config
from transformers import T5ForConditionalGeneration as T5

from hf_transfer_ext import TaskDistillationTrainer
from hf_transfer_ext.measurement.bootstrap import interval_of

ROWS = {"source": ["gold is heavy", "paris", "the rhine"], "target": ["heavy gold", "a city of france", "river"]}


def t5(seed, **more):
    torch.manual_seed(seed)
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "initializer_factor": 3.0}
    tokens = {"vocab_size": len(tokenizer_of("unigram")), "pad_token_id": 0, "decoder_start_token_id": 0}
    return T5(T5Config(**{**shape, **tokens, "dropout_rate": 0.0, "eos_token_id": 1, **more})).eval()


def bart(seed):
    torch.manual_seed(seed)
    size = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "dropout": 0.0, "init_std": 0.5}
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1, "decoder_start_token_id": 1}
    settings = {"vocab_size": len(tokenizer_of("unigram")), "max_position_embeddings": 64, "forced_eos_token_id": None}
    model = BartForConditionalGeneration(BartConfig(**size, **heads, **ids, **settings)).eval()
    model.final_logits_bias.normal_()
    return model


def trainer_of(folder, student, teacher, **options):
    peft = options.pop("peft_config", None)
    args = config(folder, "seq2seq", **options)
    tokenizer = tokenizer_of("unigram")
    return TaskDistillationTrainer(
        student, teacher, args, Dataset.from_dict(ROWS), tokenizer, tokenizer, peft_config=peft
    )


@pytest.mark.parametrize("make, fused", [(t5, True), (t5, False), (bart, True)])
def test_the_loss_is_its_definition_at_each_token_of_the_target(tmp_path, make, fused):
    student, teacher = make(1), make(2)
    trainer = trainer_of(tmp_path, student, teacher, kd_weight=0.7, ce_weight=0.3, fused=fused)
    batch = trainer.data_collator(list(trainer.train_dataset))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "decoder_input_ids")}
    expected = expected_loss(student, teacher, inputs, batch["labels"], kd_weight=0.7, ce_weight=0.3)
    assert trainer.compute_loss(student, batch).item() == pytest.approx(expected, rel=1e-4)
    assert trainer.task._fused is (fused and make is t5)  # a bias behind the head, as BART's, is not described


@pytest.mark.parametrize("adapter", [False, True])
def test_one_step_does_not_depend_on_how_the_batch_was_split(tmp_path, adapter):
    ends = []
    for size, steps in ((3, 1), (1, 3)):
        torch.manual_seed(0)
        lora = LoraConfig(task_type="SEQ_2_SEQ_LM", r=2, target_modules=["q"], init_lora_weights=False)
        trainer = trainer_of(
            tmp_path, t5(1), t5(2), per_device_train_batch_size=size, gradient_accumulation_steps=steps, max_steps=1,
            ce_weight=1.0, gradient_checkpointing=adapter, peft_config=lora if adapter else None,
        )  # fmt: skip
        trainer.train()
        ends.append(torch.cat([p.flatten() for p in trainer.model.parameters() if p.requires_grad]))
    assert (ends[0] - ends[1]).abs().max() < 1e-5


def test_it_is_measured_and_saved_as_what_it_is(tmp_path):
    trainer = trainer_of(tmp_path, t5(1), t5(2), task_options={"prefix": "say: ", "max_target_length": 4})
    assert max(len(ids) for ids in trainer.train_dataset["labels"]) <= 4
    trainer.train()
    found = {m.name: m for m in trainer.measure(Dataset.from_dict(ROWS))}
    assert set(found) == {"nats_per_token", "accuracy", "exact_match", "kl_to_teacher", "teacher_agreement"}
    assert trainer.evaluate(trainer.train_dataset)["eval_kd"] == pytest.approx(found["kl_to_teacher"].value, rel=1e-4)
    trainer.save_model()
    card = (tmp_path / "README.md").read_text()
    assert "text2text-generation" in card and "AutoModelForSeq2SeqLM" in card
    assert isinstance(AutoModelForSeq2SeqLM.from_pretrained(tmp_path), T5)


def test_an_exact_answer_is_what_greedy_decoding_writes(tmp_path):
    model, tokenizer = t5(1), tokenizer_of("unigram")
    trainer = trainer_of(tmp_path, model, t5(2))
    read = tokenizer(ROWS["source"], padding=True, return_tensors="pt")
    written = model.generate(**read, do_sample=False, num_beams=1, max_new_tokens=6)[:, 1:].tolist()
    written = [ids[: ids.index(1) + 1] if 1 in ids else ids for ids in written]
    written[2][-1] += 1 if written[2][-1] < 5 else -1
    rows = [{**tokenizer(source), "labels": ids} for source, ids in zip(ROWS["source"], written, strict=True)]
    found = {m.name: m for m in trainer.task.measure(model, rows)}
    wanted = sum(len(ids) for ids in written)
    assert found["exact_match"].value == pytest.approx(2 / 3) and found["exact_match"].examples == 3
    assert found["accuracy"].value == pytest.approx((wanted - 1) / wanted) and found["accuracy"].examples == wanted


def test_intervals_resample_rows_and_two_processes_measure_what_one_does(tmp_path):
    def measurements():
        trainer = trainer_of(tmp_path, t5(1), t5(2), per_device_eval_batch_size=2)
        return trainer, trainer.measure(Dataset.from_dict(ROWS), dataset="rows")

    trainer, found = measurements()
    sums, counts = [], []
    for row in trainer.train_dataset:
        batch = trainer.data_collator([row])
        with torch.no_grad():
            logits = trainer.model(**trainer.task.inputs(trainer.model, batch)).logits[0]
        sums.append(torch.nn.functional.cross_entropy(logits, batch["labels"][0], reduction="sum").item())
        counts.append(len(row["labels"]))
    expected = interval_of(lambda one, two: one.sum() / two.sum(), [[np.array(sums), np.array(counts)]])
    nats = found[0]
    assert nats.name == "nats_per_token" and nats.interval == pytest.approx(expected, rel=1e-5)
    assert nats.value == pytest.approx(sum(sums) / sum(counts), rel=1e-5)
    assert all(m.interval[0] <= m.value <= m.interval[1] for m in found)
    assert on_two_ranks(lambda _: measurements()[1], tmp_path) == [found, found]


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="starts with the token 0, the teacher's with 1"):
        trainer_of(tmp_path, t5(1), bart(1))
    with pytest.raises(ValueError, match="max_target_length"):
        config(tmp_path, "seq2seq", task_options={"max_target_length": 0})
    with pytest.raises(ValueError, match="Unknown loss of the task seq2seq 'squared_error'"):
        config(tmp_path, "seq2seq", loss="squared_error")
