import torch
from datasets import Dataset
from peft import PeftModel
from tiny import byte_tokenizer, tiny_llama

from hf_transfer_ext import DistillationConfig
from hf_transfer_ext.trainers.taught import lora_on, taught, teaching_arguments

ROWS = [{"question": f"Q{i}?", "answer": f"yes {i}"} for i in range(4)]


def learning(folder, **more):
    quiet = {"use_cpu": True, "disable_tqdm": True, "logging_strategy": "no"}
    return teaching_arguments(folder, epochs=2, learning_rate=1e-2, seed=0, **quiet, **more)


def test_a_lora_is_trained_and_merged_and_leaves_no_scratch(tmp_path):
    before = tiny_llama(1).state_dict()
    model = taught(tiny_llama(1), byte_tokenizer(), ROWS, learning(tmp_path / "scratch"))
    assert not isinstance(model, PeftModel) and not (tmp_path / "scratch").exists()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and all("_proj" in name for name in changed)


def test_all_weights_are_trained_without_a_rank(tmp_path):
    before = tiny_llama(1).state_dict()
    model = taught(tiny_llama(1), byte_tokenizer(), ROWS, learning(tmp_path / "scratch"), lora_rank=None)
    assert not torch.equal(model.state_dict()["model.embed_tokens.weight"], before["model.embed_tokens.weight"])


def test_a_finished_result_is_loaded_and_not_trained_again(tmp_path):
    data = Dataset.from_list([{"text": f"number {i}"} for i in range(4)])
    args = DistillationConfig(
        str(tmp_path / "out"), use_cpu=True, bf16=False, report_to="none", max_length=32, disable_tqdm=True
    )
    folder = tmp_path / "teacher"
    first = taught(tiny_llama(1), byte_tokenizer(), data, args, folder=folder, max_steps=2, learning_rate=1e-2)
    assert (folder / "tokenizer_config.json").exists() and not (tmp_path / "teacher.checkpoints").exists()
    assert args.max_steps == -1 and args.output_dir == str(tmp_path / "out")  # the caller's configuration stays
    again = taught(tiny_llama(1), byte_tokenizer(), data, args, folder=folder, max_steps=2, learning_rate=1e-2)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in first.state_dict().items())


def test_the_scratch_of_somebody_else_stays(tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch" / "mine.txt").write_text("x")
    taught(tiny_llama(1), byte_tokenizer(), ROWS, learning(tmp_path / "scratch"))
    assert (tmp_path / "scratch" / "mine.txt").exists()
    assert set(lora_on(tiny_llama(), 4).peft_config) == {"default"}
