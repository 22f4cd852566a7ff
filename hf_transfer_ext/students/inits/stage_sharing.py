"""SWS: one layer per stage of the teacher, repeated inside its stage to any depth."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_transfer_ext.students.layers import depths, layer_stack, layer_tensors, mark_auxiliary, with_layers
from hf_transfer_ext.students.shape import StudentShape

#: How one layer is chosen or computed from a stage of the teacher.
REPRESENTATIVES = ("first", "middle", "last", "mean")


def stage_sharing(
    teacher: PreTrainedModel,
    shape: StudentShape,
    *,
    stages: Sequence[int] | None = None,
    repeats: Sequence[int] | None = None,
    representative: str = "middle",
) -> PreTrainedModel:
    """A student of any depth: each stage of the teacher provides one layer, which the student repeats.

    When to use it: for students of several depths from one teacher, whose layers differ too much for a line; it
    starts without training, and better with a trained learngene.

    Args:
        teacher: A model, or a trained `stage_shared_model` (where each stage already is one layer).
        shape: The shape of the student: at least one layer per stage, everything else as in the teacher.
        stages: Number of teacher layers in each stage, starting at the input, as in 3-3-4-3-3 for 16 layers;
            by default `default_stages`.
        repeats: How often the student repeats each stage's layer. By default as even as possible with the longer
            stages first: 12 layers from 5 stages are 3-3-2-2-2, as in the authors' runs.
        representative: The layer that represents a stage: the "first", "middle" or "last" of its layers, or their
            "mean". Averaging layers of a trained transformer works poorly, so use "mean" only for layers that were
            trained to be alike.

    Returns:
        A new model of the teacher's class with independent layers, which shares no memory with the teacher.

    Source: SWS, Xia et al. 2024, https://arxiv.org/abs/2404.16897. The paper trains the stages' layers by distillation
    (`stage_shared_model` here); taking them from a teacher's stages is our own addition.
    """
    depth, theirs = depths(teacher, shape, "stage_sharing")
    stages = _checked_stages(stages, theirs)
    repeats = even_split(depth, len(stages)) if repeats is None else list(repeats)
    if len(repeats) != len(stages) or sum(repeats) != depth or min(repeats) < 1:
        raise ValueError(
            f"{len(stages)} stages need {len(stages)} repeats of at least 1 that sum to the student's depth "
            f"of {depth}, got {list(repeats)}."
        )
    genes = stage_layers(teacher, stages, representative)
    layers, sources, start = [], [], 0
    for gene, size, repeat in zip(genes, stages, repeats, strict=True):
        layers += [gene] * repeat
        sources += [start + i * size // repeat for i in range(repeat)]
        start += size
    return with_layers(teacher, layers, sources)


def stage_shared_model(
    teacher: PreTrainedModel, *, stages: Sequence[int] | None = None, representative: str = "middle"
) -> PreTrainedModel:
    """The model that SWS trains: as deep as the teacher, with one set of parameters for all layers of a stage.

    Train it by distillation like any model, then expand it with `stage_sharing(auxiliary, StudentShape(depth=...),
    stages=...)`. Its parameters are shared in memory in a way that its config does not state: a trainer saves what is
    expanded from it (`students/auxiliary.py`).
    """
    depth, _ = depths(teacher, StudentShape(), "stage_shared_model")
    stages = _checked_stages(stages, depth)
    model = stage_sharing(
        teacher, StudentShape(depth=depth), stages=stages, repeats=stages, representative=representative
    )
    layers = layer_stack(model)[1]
    start = 0
    for size in stages:
        for layer in layers[start + 1 : start + size]:
            for name, parameter in list(layers[start].named_parameters()):
                path, _, leaf = name.rpartition(".")
                setattr(layer.get_submodule(path), leaf, parameter)
        start += size
    return mark_auxiliary(model)


def stage_layers(teacher: PreTrainedModel, stages: Sequence[int], representative: str) -> list[dict[str, Tensor]]:
    """One layer per stage; the mean is computed in float64."""
    if representative not in REPRESENTATIVES:
        raise ValueError(f"`representative` must be one of {', '.join(REPRESENTATIVES)}, got {representative!r}.")
    layers = layer_tensors(teacher)
    genes, start = [], 0
    for size in stages:
        stage = layers[start : start + size]
        start += size
        if representative == "mean":
            genes.append({name: _mean([layer[name] for layer in stage]) for name in stage[0]})
        else:
            genes.append(stage[{"first": 0, "middle": size // 2, "last": size - 1}[representative]])
    return genes


def default_stages(depth: int, count: int = 5) -> list[int]:
    """Split a depth into `count` stages as evenly as possible, longer ones in the middle: 16 is 3-3-4-3-3.

    A teacher with fewer layers than stages has one layer per stage.
    """
    count = min(count, depth)
    outwards = sorted(range(count), key=lambda stage: (abs(2 * stage - (count - 1)), stage))
    longer = set(outwards[: depth % count])
    return [depth // count + (stage in longer) for stage in range(count)]


def even_split(total: int, count: int) -> list[int]:
    """Split `total` into `count` parts that differ by at most 1, larger ones first: (12, 5) is 3-3-2-2-2."""
    return [total // count + (part < total % count) for part in range(count)]


def _mean(tensors: list[Tensor]) -> Tensor:
    if not tensors[0].is_floating_point() or len(tensors) == 1:
        return tensors[0]
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for tensor in tensors:
        total += tensor.double()
    return (total / len(tensors)).to(tensors[0].dtype)


def _checked_stages(stages: Sequence[int] | None, depth: int) -> list[int]:
    stages = default_stages(depth) if stages is None else list(stages)
    if not stages or min(stages) < 1 or sum(stages) != depth:
        raise ValueError(
            f"`stages` must be integers of at least 1 that sum to the teacher's {depth} layers, got {stages}."
        )
    return stages
