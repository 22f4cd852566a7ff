"""The mixtures that transformers knows: which dense models they can be made of, and how their tensors are called.

Tensors are named as in published checkpoints (one tensor for each expert), which `from_pretrained` stacks when it
loads them and which other programs read too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hf_transfer_ext.merging.moe.plan import MoeConfig
from hf_transfer_ext.weights.opened import InputModel, is_buffer

#: The matrices of a feed-forward layer, as Llama and its relatives call them; the last one writes its output.
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Architecture:
    """A mixture of experts.

    Args:
        name: As `architecture` in YAML; a beginning is enough.
        model_type: In config.json.
        class_name: Of the language model in transformers.
        sources: Types of the dense models.
        shared: How many shared experts it has.
        layer: Its part of the names, `model.layers.{i}.{layer}.`.
        projections: Its names of PROJECTIONS.
    """

    name: str
    model_type: str
    class_name: str
    sources: tuple[str, ...]
    shared: int
    layer: str
    projections: tuple[str, str, str]

    def gate(self, layer: int) -> str:
        return f"model.layers.{layer}.{self.layer}.gate.weight"

    def shared_gate(self, layer: int) -> str:
        return f"model.layers.{layer}.{self.layer}.shared_expert_gate.weight"

    def expert(self, layer: int, number: int, projection: str) -> str:
        own = self.projections[PROJECTIONS.index(projection)]
        return f"model.layers.{layer}.{self.layer}.experts.{number}.{own}.weight"

    def shared_expert(self, layer: int, projection: str) -> str:
        return f"model.layers.{layer}.{self.layer}.shared_expert.{projection}.weight"


MIXTRAL = Architecture(
    "mixtral", "mixtral", "MixtralForCausalLM", ("llama", "mistral"), 0, "block_sparse_moe", ("w1", "w3", "w2")
)
QWEN2_MOE = Architecture(
    "qwen", "qwen2_moe", "Qwen2MoeForCausalLM", ("qwen2", "llama", "mistral"), 1, "mlp", PROJECTIONS
)
QWEN3_MOE = Architecture("qwen3", "qwen3_moe", "Qwen3MoeForCausalLM", ("qwen3",), 0, "mlp", PROJECTIONS)

ARCHITECTURES = (MIXTRAL, QWEN2_MOE, QWEN3_MOE)


def choose_architecture(config: MoeConfig, models: Sequence[InputModel]) -> Architecture:
    """The first architecture that the models and the shared experts fit.

    Raises:
        ValueError: There is none; what each of them needs is told.
    """
    types = {str(model.reference): str(model.config.get("model_type")) for model in models}
    asked = (config.architecture or "").lower()
    candidates = [one for one in ARCHITECTURES if one.name.startswith(asked) or one.model_type.startswith(asked)]
    kinds = set(types.values())
    for one in candidates:
        if len(kinds) == 1 and kinds <= set(one.sources) and len(config.shared_experts) == one.shared:
            return one
    needs = "; ".join(
        f"{one.name} of {' or '.join(one.sources)} models and {one.shared or 'no'} shared experts"
        for one in candidates or ARCHITECTURES
    )
    told = ", ".join(f"{model} is {kind}" for model, kind in types.items())
    raise ValueError(
        f"No mixture of experts fits {told}, {len(config.shared_experts)} shared experts and architecture "
        f"{config.architecture!r}. All models have to be of one type. Possible are {needs}."
    )


def mixture_config(architecture: Architecture, config: MoeConfig, base: InputModel) -> Any:
    """The config of the mixture: everything of the base that it knows, and the numbers of experts.

    Raises:
        ValueError: transformers does not know the architecture.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    dense = AutoConfig.from_pretrained(str(base.folder), trust_remote_code=False).to_dict()
    if architecture.model_type not in CONFIG_MAPPING:
        raise ValueError(f"This version of transformers does not know {architecture.model_type!r}. Upgrade it.")
    kind: Any = CONFIG_MAPPING[architecture.model_type]
    own = ("model_type", "architectures", "transformers_version", "auto_map")
    kept = {key: value for key, value in dense.items() if key in kind().to_dict() and key not in own}
    count = len(config.experts)
    kept["num_local_experts" if architecture is MIXTRAL else "num_experts"] = count
    kept["num_experts_per_tok"] = config.experts_per_token
    if architecture is not MIXTRAL:
        # Weights of the chosen experts that sum to 1 keep the scale that the dense layers had.
        kept |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}
        kept["moe_intermediate_size"] = dense["intermediate_size"]
    if architecture is QWEN2_MOE:
        kept["shared_expert_intermediate_size"] = dense["intermediate_size"]
        kept["qkv_bias"] = any(name.endswith("q_proj.bias") for name in base.tensors)
    return kind(**kept)


def check_fit(architecture: Architecture, mixture: Any, base: InputModel) -> None:
    """Refuse a base whose tensors outside the feed-forward layers are not those of the mixture.

    Raises:
        ValueError: A tensor that is missing, that the mixture has no place for (a bias), or of another shape.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(mixture, trust_remote_code=False)
    wanted = {name: tuple(one.shape) for name, one in skeleton.state_dict().items() if ".mlp." not in name}
    if base.is_tied:
        wanted.pop("lm_head.weight", None)
    found = {
        name: tensor.shape
        for name, tensor in base.tensors.items()
        if ".mlp." not in name and not is_buffer(name, tensor)
    }
    for name in [*wanted, *found]:
        if wanted.get(name) != found.get(name):
            raise ValueError(
                f"Base model {str(base.reference)!r} does not fit {architecture.model_type}: tensor {name!r} should "
                f"{'have shape ' + str(list(wanted[name])) if name in wanted else 'not be there'}, "
                f"{'has ' + str(list(found[name])) if name in found else 'and is missing'}."
            )
