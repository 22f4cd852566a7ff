"""What every student initialization owes: the same class, no shared memory, a checkpoint of the same model."""

import pytest
import torch
from tiny_families import FAMILIES, logits_of, tiny_model
from transformers import AutoModelForCausalLM, BartConfig, BartForConditionalGeneration
from vision_families import CONFIGS, vision_language

from hf_transfer_ext.students import STUDENT_INITS
from hf_transfer_ext.students.layers import keep_layers, layer_stack, rebuilt
from hf_transfer_ext.students.shape import StudentShape

IDS = torch.arange(24).reshape(2, 12)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stack_is_found(family):
    name, layers = layer_stack(tiny_model(family, depth=3))
    assert (name, len(layers)) == ("transformer.h" if family == "gpt2" else "model.layers", 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_kept_layer_is_the_teachers(family):
    teacher = tiny_model(family)
    student = keep_layers(teacher, [2, 0])
    ours, theirs = layer_stack(student)[1], layer_stack(teacher)[1]
    for new, old in ((0, 2), (1, 0)):
        for name, tensor in ours[new].state_dict().items():
            assert torch.equal(tensor, theirs[old].state_dict()[name])
    if family == "gemma3":
        assert teacher.config.layer_types[2] != teacher.config.layer_types[0]
        assert student.config.layer_types == [teacher.config.layer_types[2], teacher.config.layer_types[0]]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("init", STUDENT_INITS)
def test_a_student_is_a_whole_model_of_its_own(family, init, tmp_path):
    teacher = tiny_model(family, depth=6)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    student = STUDENT_INITS[init](teacher, StudentShape(depth=5))
    assert type(student) is type(teacher)
    assert student.config.num_hidden_layers == len(layer_stack(student)[1]) == 5
    assert student.config.hidden_size == teacher.config.hidden_size
    embedding, head = student.get_input_embeddings().weight, student.get_output_embeddings().weight
    assert (embedding is head) == bool(teacher.config.tie_word_embeddings)

    theirs = {tensor.data_ptr() for tensor in teacher.state_dict().values()}
    assert not theirs & {tensor.data_ptr() for tensor in student.state_dict().values()}
    layers = layer_stack(student)[1]
    pointers = [parameter.data_ptr() for layer in layers for parameter in layer.parameters()]
    assert len(set(pointers)) == len(pointers)
    with torch.no_grad():
        for parameter in student.parameters():
            assert parameter.requires_grad
            parameter.add_(0.01)
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())

    student.save_pretrained(tmp_path)
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path), IDS), logits_of(student, IDS))
    generated = student.generate(IDS, max_new_tokens=4, do_sample=False)
    without_cache = student.generate(IDS, max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(generated, without_cache)


@pytest.mark.parametrize("init", STUDENT_INITS)
def test_dtype_mode_and_generation_config_are_the_teachers(init):
    teacher = tiny_model("llama", depth=5).to(torch.bfloat16).train()
    teacher.generation_config.max_new_tokens = 7
    student = STUDENT_INITS[init](teacher, StudentShape(depth=5))
    assert {parameter.dtype for parameter in student.parameters()} == {torch.bfloat16}
    assert student.training
    assert student.generation_config.max_new_tokens == 7
    assert student.generation_config is not teacher.generation_config


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_teacher_moved_to_another_dtype_is_copied_exactly(family, dtype):
    teacher = tiny_model(family).to(dtype)
    assert torch.equal(logits_of(keep_layers(teacher, range(4)), IDS), logits_of(teacher, IDS))


@pytest.mark.parametrize("init", STUDENT_INITS)
def test_bad_teachers_and_depths(init):
    with pytest.raises(ValueError, match="`depth` of a student must be at least 1, got 0"):
        STUDENT_INITS[init](tiny_model("llama", depth=2), StudentShape(depth=0))
    adapted = tiny_model("llama", depth=2)
    from peft import LoraConfig

    adapted.add_adapter(LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="merge_and_unload"):
        STUDENT_INITS[init](adapted, StudentShape(depth=1))


def test_an_unknown_layer_is_refused():
    with pytest.raises(ValueError, match=r"layers 0 to 3, got \[0, 4\]"):
        keep_layers(tiny_model("llama"), [0, 4])


@pytest.mark.parametrize("family", CONFIGS)
def test_the_stack_of_a_vision_language_model_is_that_of_its_language_model(family):
    teacher = vision_language(family)
    name, layers = layer_stack(teacher)
    assert name == ("model.text_model.layers" if family in ("Idefics3", "SmolVLM") else "model.language_model.layers")
    ids = torch.arange(20, 30)[None]
    whole, cut = keep_layers(teacher, range(len(layers))), keep_layers(teacher, [0, 1, 3])
    with torch.no_grad():
        assert torch.equal(whole(input_ids=ids).logits, teacher(input_ids=ids).logits)
        assert not torch.equal(cut(input_ids=ids).logits, teacher(input_ids=ids).logits)
    own, theirs = cut.state_dict(), teacher.state_dict()
    for key in (key for key in own if key.startswith(f"{name}.2.")):
        assert torch.equal(own[key], theirs[key.replace(f"{name}.2.", f"{name}.3.")])
    assert all(torch.equal(own[key], theirs[key]) for key in own if "vision" in key or "visual" in key)
    if family == "Mllama":
        assert cut.config.get_text_config().cross_attention_layers == [1, 2]


def test_an_encoder_decoder_is_refused():
    config = BartConfig(
        d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=32,
    )  # fmt: skip
    with pytest.raises(ValueError, match="one stack of 2 layers, but BartForConditionalGeneration has 2"):
        layer_stack(BartForConditionalGeneration(config))


def test_tensors_that_do_not_fit_are_named():
    teacher = tiny_model("llama", depth=1)
    tensors = dict(teacher.state_dict())
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 3)
    with pytest.raises(ValueError, match=r"mlp\.up_proj\.weight"):
        rebuilt(teacher, teacher.config, tensors)


@pytest.mark.parametrize("init", STUDENT_INITS)
def test_a_shape_that_an_initialization_cannot_make_is_refused(init):
    teacher = tiny_model("llama", depth=6)
    own = StudentShape.of(teacher)
    for field in ("width", "heads", "vocabulary"):
        with pytest.raises(ValueError, match=rf"{init} can only change the .*, but `{field}`"):
            STUDENT_INITS[init](teacher, StudentShape(**{"depth": 5, field: 1}))
    student = STUDENT_INITS[init](teacher, StudentShape(5, own.width, own.heads, own.vocabulary))
    assert StudentShape.of(student) == StudentShape(5, own.width, own.heads, own.vocabulary)
