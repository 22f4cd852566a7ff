"""Find the layer stack of any decoder, and build a new model of the same class with another stack."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from hf_transfer_ext.students.shape import StudentShape, require_only

#: The tensors of one layer by their names inside the layer ("self_attn.q_proj.weight").
LayerTensors = Mapping[str, Tensor]


#: Fields of a config that list some of its layers by their numbers.
LISTS_OF_LAYERS = ("cross_attention_layers", "mlp_only_layers")


def layer_stack(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Name and modules of the layer stack of a model (`model.layers`, `transformer.h`, ...).

    Of a vision-language model, that of its language model, however many layers its vision tower has.

    Raises:
        ValueError: The model has no such stack, or several (an encoder and a decoder).
    """
    count = model.config.get_text_config().num_hidden_layers
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    found = [(name, module) for name, module in lists if len(module) == count]
    # A layer may have as many experts as the model has layers: only outermost lists are layer stacks.
    found = [(name, module) for name, module in found if not any(name.startswith(f"{outer}.") for outer, _ in lists)]
    if len(found) > 1 and not model.config.is_encoder_decoder:  # a vision tower may have as many layers
        inside = _name_of_decoder(model)
        found = [(name, module) for name, module in found if name.startswith(inside)]
    if len(found) != 1:
        raise ValueError(
            f"A student with another depth needs a teacher with one stack of {count} layers, but "
            f"{type(model).__name__} has {len(found)} ({', '.join(name for name, _ in found) or 'none'}). "
            "Encoder-decoder models are not supported yet."
        )
    return found[0]


def _name_of_decoder(model: PreTrainedModel) -> str:
    """What the names of all modules inside the part that reads text begin with; "" where that is the whole model."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    name = next((name for name, module in model.named_modules() if module is decoder), "")
    return f"{name}." if name else ""


def layer_tensors(model: PreTrainedModel) -> list[dict[str, Tensor]]:
    """Parameters and buffers of every layer, not copied."""
    _, layers = layer_stack(model)
    return [dict(layer.state_dict()) for layer in layers]


def with_layers(teacher: PreTrainedModel, layers: Sequence[LayerTensors], sources: Sequence[int]) -> PreTrainedModel:
    """A new model of the teacher's class with these layers; embeddings, final norm and head come from the teacher.

    Args:
        layers: The tensors of each new layer, starting at the input.
        sources: For each new layer, the teacher's layer whose *kind* it has, if the config lists one per layer
            (`layer_types`: sliding or full attention).
    """
    prefix, _ = layer_stack(teacher)
    tensors = {name: tensor for name, tensor in teacher.state_dict().items() if not name.startswith(f"{prefix}.")}
    for i, layer in enumerate(layers):
        tensors |= {f"{prefix}.{i}.{name}": tensor for name, tensor in layer.items()}
    return rebuilt(teacher, config_of_depth(teacher.config, sources), tensors)


def keep_layers(teacher: PreTrainedModel, sources: Sequence[int]) -> PreTrainedModel:
    """A new model with only these layers of the teacher, in this order; layers may repeat."""
    layers = layer_tensors(teacher)
    wrong = [source for source in sources if not 0 <= source < len(layers)]
    if wrong or not sources:
        raise ValueError(f"The teacher has the layers 0 to {len(layers) - 1}, got {list(sources)}.")
    return with_layers(teacher, [layers[source] for source in sources], sources)


def config_of_depth(config: PretrainedConfig, sources: Sequence[int]) -> PretrainedConfig:
    """A copy of the config for a stack of `len(sources)` layers; lists with one entry per layer are cut as well."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    depth = text.num_hidden_layers
    for name in LISTS_OF_LAYERS:
        listed = getattr(text, name, None)
        if listed:
            setattr(text, name, [place for place, source in enumerate(sources) if source in listed])
    for name, value in list(vars(text).items()):
        if name in LISTS_OF_LAYERS:
            continue
        # `layer_types`, `no_rope_layers`, `layers_block_type`: lists of ids may have the same length by chance.
        if "layer" in name and isinstance(value, (list, tuple)) and len(value) == depth:
            setattr(text, name, [value[source] for source in sources])
    text.num_hidden_layers = len(sources)
    return config


def rebuilt(teacher: PreTrainedModel, config: PretrainedConfig, tensors: Mapping[str, Tensor]) -> PreTrainedModel:
    """A new model of the teacher's class from a changed config and a full state dict; it shares no memory.

    Dtype, device, training mode and generation config are the teacher's; tied embeddings are tied again.

    Raises:
        ValueError: The tensors do not fit the model that the config describes.
    """
    with no_init_weights():
        student = type(teacher)._from_config(config, dtype=teacher.dtype)
    student.tie_weights()
    try:
        student.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise ValueError(
            f"The tensors of {teacher.config.name_or_path or type(teacher).__name__!r} do not fit a "
            f"{type(teacher).__name__} of the new shape; its layers may differ from each other. {error}"
        ) from error
    # Buffers that are not in the state dict (rotary frequencies, embedding scale) may carry the rounding of the
    # teacher's dtype, or of a dtype it had before: only copies reproduce the teacher's logits exactly. Buffers inside
    # numbered layers stay as initialized, because layer 1 of the student need not be layer 1 of the teacher.
    fresh = dict(student.named_buffers())
    for name, buffer in teacher.named_buffers():
        path, _, leaf = name.rpartition(".")
        if name in fresh and name not in tensors and not any(part.isdigit() for part in path.split(".")):
            student.get_submodule(path)._buffers[leaf] = buffer.detach().clone()
    if hasattr(teacher, "generation_config"):  # a classifier has none
        student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.to(teacher.device).train(teacher.training)


def depths(
    teacher: PreTrainedModel, shape: StudentShape, init: str, *, at_most_teacher: bool = False
) -> tuple[int, int]:
    """(the student's depth, the teacher's), after refusing a teacher or shape that `init` does not support."""
    refuse_wrapped(teacher)
    theirs = len(layer_stack(teacher)[1])
    advice = "Leave it out; use `students.vocabulary.trim_vocabulary` for a smaller vocabulary."
    depth = require_only(shape, teacher, "depth", init, advice).depth or theirs
    if at_most_teacher and depth > theirs:
        raise ValueError(
            f"`depth` must be between 1 and {theirs}, the depth of the teacher, got {depth}: {init} removes "
            "layers. Use linear_expansion or stage_sharing for deeper students."
        )
    return depth, theirs


def mark_auxiliary(model: PreTrainedModel) -> PreTrainedModel:
    """Mark a model whose layers share parameters, which `save_pretrained` cannot save as they are."""
    model.__dict__["has_shared_layers"] = True
    return model


def is_auxiliary(model: object) -> bool:
    """Whether layers of this model share parameters (`mark_auxiliary`)."""
    return getattr(model, "has_shared_layers", False) is True


def refuse_wrapped(teacher: PreTrainedModel) -> None:
    """Students need plain weights: merge adapters and dequantize quantized weights first."""
    if hasattr(teacher, "peft_config"):
        raise ValueError(
            "The teacher has an adapter, which a student cannot inherit. Merge it first: model.merge_and_unload()."
        )
    if getattr(teacher, "is_quantized", False):
        raise ValueError(
            "The teacher is quantized. Load it in float32 or bfloat16 to initialize a student from its weights."
        )
