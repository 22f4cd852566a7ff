"""A live teacher: its rows are its own logits at the chosen tokens, and it is left as it was."""

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny import tiny_llama
from torch import nn

from hf_transfer_ext.losses.rows import HeadRows, LogitRows
from hf_transfer_ext.teachers.live import AdapterTeacher, LiveTeacher, inputs_for, is_offloaded
from hf_transfer_ext.teachers.signal import Teacher

IDS = torch.tensor([[5, 7, 9, 11], [3, 2, 1, 8]])
MASK = torch.tensor([[True, False, True], [False, True, True]])
INPUTS = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "use_cache": False}


def logits_of(rows):
    return rows.finish(rows(slice(None)))


@pytest.mark.parametrize("fused, kind", [(True, HeadRows), (False, LogitRows)])
def test_rows_are_the_models_logits_at_the_chosen_tokens(fused, kind):
    model = tiny_llama(2)
    teacher = LiveTeacher(model, Accelerator(cpu=True), fused=fused)
    signal = teacher.signal(tiny_llama(1), INPUTS, MASK)
    assert isinstance(signal.rows, kind) and signal.mask is None and isinstance(teacher, Teacher)
    torch.testing.assert_close(logits_of(signal.rows), model(**INPUTS).logits[:, :-1][MASK])


def test_virtual_tokens_of_a_prompt_tuned_teacher_are_passed_over():
    torch.manual_seed(1)
    model = get_peft_model(tiny_llama(2), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")).eval()
    for fused in (True, False):
        rows = LiveTeacher(model, Accelerator(cpu=True), fused=fused).signal(tiny_llama(1), INPUTS, MASK).rows
        torch.testing.assert_close(logits_of(rows), model(**INPUTS).logits[:, 3:-1][MASK])


@pytest.mark.parametrize("adapter", ["teacher", "base"])
def test_an_adapter_teaches_on_the_students_base_and_leaves_no_trace(adapter):
    torch.manual_seed(3)
    model = get_peft_model(tiny_llama(1), LoraConfig(r=2, init_lora_weights=False), adapter_name="teacher")
    model.add_adapter("student", LoraConfig(r=2, init_lora_weights=False))
    model.set_adapter("student")
    model.train()
    teacher = AdapterTeacher(model, adapter, Accelerator(cpu=True))
    before = [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]
    rows = teacher.signal(model, INPUTS, MASK).rows
    assert ([p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]) == before
    assert model.active_adapters == ["student"]
    if adapter == "base":
        expected = tiny_llama(1)(**INPUTS).logits
    else:
        model.set_adapter("teacher")
        expected = model.eval()(**INPUTS).logits
    torch.testing.assert_close(logits_of(rows), expected[:, :-1][MASK])


def test_a_teacher_is_called_with_all_that_the_student_reads():
    class Reads(type(tiny_llama())):
        def forward(self, input_ids, attention_mask=None, pictures=None, **kwargs):
            return super().forward(input_ids, attention_mask, **kwargs)

    student, teacher = Reads(tiny_llama().config), tiny_llama()
    assert set(inputs_for(teacher, teacher, INPUTS)) == {"input_ids", "attention_mask"}
    assert set(inputs_for(student, student, {**INPUTS, "pictures": 1})) == {"input_ids", "attention_mask", "pictures"}
    assert "seq_idx" in inputs_for(teacher, student, {**INPUTS, "seq_idx": 1})  # packing: kept for its layers
    with pytest.raises(ValueError, match="reads pictures, which the teacher LlamaForCausalLM does not take"):
        inputs_for(teacher, student, {**INPUTS, "pictures": 1})


def test_offloaded_heads_are_noticed():
    assert not is_offloaded(nn.Linear(2, 2)) and is_offloaded(nn.Linear(2, 2, device="meta"))
