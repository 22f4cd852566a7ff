"""Jobs that train or score, on tiny models, for the faults of `benchmarks.faults`: each resumes when it runs again."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_transfer_ext.adapters.transfer.by_training import transfer_by_training
from hf_transfer_ext.adapters.transfer.trans_lora import TransLoraSettings
from hf_transfer_ext.adapters.transfer.travel import SEEDS_FILE
from hf_transfer_ext.recipes import audit, distill, evaluate, unlearn
from hf_transfer_ext.recipes.cache_teacher import cache_for_distillation
from hf_transfer_ext.teachers import cache

#: Folder of the language models, inside that of all models.
FOLDER = "language"
#: Teacher and student; the student drops out, so that a resumed run shows whether random states are restored.
DROPOUT = {"teacher": 0.0, "student": 0.1}
#: Hidden sizes; the narrow student needs a projection between its vectors and those of the teacher.
WIDTHS = {"teacher": 32, "student": 32, "narrow": 16}
TRAINING = [
    "--max_steps", "8", "--save_steps", "2", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps",
    "2", "--learning_rate", "1e-2", "--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true",
    "--resume_from_checkpoint", "true",
]  # fmt: skip


def make_language_models(models_folder: Path) -> None:
    """Teacher, students, an adapter with seeds, texts, and questions with answers, in `FOLDER`."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    folder = models_folder / FOLDER
    tokenizer = bytes_as_tokens()
    for seed, (name, width) in enumerate(WIDTHS.items()):
        torch.manual_seed(seed)
        dropout = DROPOUT.get(name, 0.1)
        config = LlamaConfig(
            vocab_size=258, hidden_size=width, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512, attention_dropout=dropout, initializer_range=0.2,
            bos_token_id=256, eos_token_id=257, pad_token_id=257,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    torch.manual_seed(2)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    base = LlamaForCausalLM.from_pretrained(folder / "teacher")
    get_peft_model(base, lora).save_pretrained(folder / "adapter")
    seeds = {"seeds": ["Is it red?", "Is it old?", "Is it far?"], "task_name": "task", "separation": None}
    (folder / "adapter" / SEEDS_FILE).write_text(json.dumps(seeds))
    rows = {"texts": [{"text": f"number {i} is followed by {i + 1}"} for i in range(24)]}
    rows["labelled"] = [{"text": f"number {i}", "label": ("even", "odd")[i % 2]} for i in range(24)]
    rows["pairs"] = [{"text": f"number {i}", "other_text": f"nummer {i}"} for i in range(24)]
    for name, words in (("forget", "abcdefgh"), ("retain", "ijklmnop")):
        rows[name] = [{"question": f"What is {word}?", "answer": f"{word} is {name}"} for word in words]
    for name, content in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))


def bytes_as_tokens() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate([*alphabet, "<s>", "</s>"])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def _paths(models_folder: Path, **names: str) -> list[str]:
    """`--name FOLDER/value` of each."""
    return [word for name, value in names.items() for word in (f"--{name}", str(models_folder / FOLDER / value))]


def run_distill(models_folder: Path, out: Path, overwrite: bool) -> object:
    paths = _paths(models_folder, teacher="teacher", student="student", dataset="texts.jsonl")
    words = ["--test_split", "train[:4]", "--max_length", "64", "--bf16", "false", "--gradient_checkpointing", "false"]
    return distill.main([*paths, *words, *TRAINING, "--output_dir", str(out), "--overwrite", str(overwrite)])


def run_classifier(models_folder: Path, out: Path, overwrite: bool) -> object:
    """All stages: the teacher's new output layer is trained first, and a twin without a teacher last."""
    words = ["--task", "sequence_classification", "--teach_steps", "4", "--compare_with_ce", "true"]
    words += ["--ce_weight", "0.5"]
    return _run_task(models_folder, out, overwrite, words, student="student", dataset="labelled.jsonl")


def run_embedder(models_folder: Path, out: Path, overwrite: bool) -> object:
    """A projection is trained along, which checkpoints hold and the result does not."""
    words = ["--task", "sentence_embedding", "--loss", "squared_error", "--ce_weight", "1"]
    return _run_task(models_folder, out, overwrite, words, student="narrow", dataset="pairs.jsonl")


def _run_task(models_folder: Path, out: Path, overwrite: bool, words: list[str], **names: str) -> object:
    words = [*_paths(models_folder, teacher="teacher", **names), *words, "--test_split", "train[:4]"]
    words += ["--bf16", "false", "--gradient_checkpointing", "false"]
    return distill.main([*words, *TRAINING, "--output_dir", str(out), "--overwrite", str(overwrite)])


def run_unlearn(models_folder: Path, out: Path, overwrite: bool) -> object:
    paths = _paths(models_folder, model_name_or_path="student", forget_data="forget.jsonl", retain_data="retain.jsonl")
    return unlearn.main(
        [*paths, "--lora_rank", "4", *TRAINING, "--output_dir", str(out), "--overwrite", str(overwrite)]
    )


def run_cache_teacher(models_folder: Path, out: Path, overwrite: bool) -> object:
    cache.FLUSH_SECONDS = cache.STALE_SECONDS = 0.0  # a file for each text, and no other process that writes
    teacher, texts = (str(models_folder / FOLDER / name) for name in ("teacher", "texts.jsonl"))
    return cache_for_distillation(teacher, texts, str(out), batch_size=1, top=4, samples=2)


def run_transfer(models_folder: Path, out: Path, overwrite: bool) -> object:
    settings = TransLoraSettings(
        rows=8, shown=2, input_tokens=12, answer_tokens=8, rank=2, epochs=4.0, learning_rate=1e-2, batch_size=4,
        attempts_per_row=200,
    )  # fmt: skip
    adapter, source, target = (models_folder / FOLDER / name for name in ("adapter", "teacher", "student"))
    return transfer_by_training(
        adapter, target, out, source_base=source, settings=settings, discriminator="none", overwrite=overwrite
    )


def run_evaluate(models_folder: Path, out: Path, overwrite: bool) -> object:
    words = ["--models", *(str(models_folder / FOLDER / name) for name in DROPOUT), "--batch_size", "2"]
    words += ["--metrics", "perplexity", "exact_memorization", "rouge_l_recall", "--max_new_tokens", "8"]
    words += [*_paths(models_folder, data="forget.jsonl"), "--cache", f"{out}.scores"]
    return evaluate.main([*words, "--output_dir", str(out)])


def run_audit(models_folder: Path, out: Path, overwrite: bool) -> object:
    paths = _paths(
        models_folder, unlearned="student", original="teacher", retrain_from="student", forget_data="forget.jsonl",
        retain_data="retain.jsonl",
    )  # fmt: skip
    words = ["--attacks", "plain_question", "plain_generation", "role_play", "relearn_few", "--membership", "[]"]
    words += ["--max_new_tokens", "4", "--retrain_epochs", "2", "--batch_size", "4"]
    return audit.main([*paths, *words, "--output_dir", str(out)])
