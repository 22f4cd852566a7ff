"""Which servers load an adapter folder as it is, by the rules that they check on loading."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_transfer_ext.reading import field_of, read_json
from hf_transfer_ext.weights.checkpoints import Checkpoint
from hf_transfer_ext.weights.lora import CONVERTIBLE, PREFIX, lora_scale, read_lora
from hf_transfer_ext.weights.repository import local_folder, no_adapter

#: Values that vLLM takes for `--max-lora-rank`; its default is 16.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
VLLM_DEFAULT_RANK = 16
#: Modules that vLLM adapts in most decoders. Embeddings and the head are adapted in some of its models only.
VLLM_MODULES = (
    "q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "out_proj", "gate_proj", "up_proj", "down_proj",
    "gate_up_proj", "c_attn", "c_proj", "c_fc", "fc1", "fc2", "dense", "dense_h_to_4h", "dense_4h_to_h",
    "query_key_value",
)  # fmt: skip

#: What llama.cpp needs of an adapter that it can apply.
AS_GGUF = "Write it as a GGUF file first: `hf-transfer-ext convert ADAPTER OUT --to gguf`."


@dataclass(frozen=True)
class Server:
    """Whether one server loads an adapter.

    Args:
        loads: Whether it does.
        reasons: What it refuses, and what to do; where it loads the adapter, what has to be done before.
        options: Options that the server has to be started with.
    """

    name: str
    loads: bool
    reasons: list[str] = field(default_factory=list)
    options: list[str] = field(default_factory=list)

    def sentence(self) -> str:
        """For a card or a terminal."""
        if not self.loads:
            return f"{self.name} does not load it. {' '.join(self.reasons)}"
        started = f", started with {' '.join(self.options)}" if self.options else ""
        return " ".join([f"{self.name} loads it{started}.", *self.reasons])


def serving(folder: str | Path) -> list[str]:
    """Which servers load an adapter folder, one sentence for each."""
    return [server.sentence() for server in servable_by(folder)]


def servable_by(folder: str | Path) -> list[Server]:
    """Check an adapter folder by the rules of PEFT, vLLM and llama.cpp.

    The servers themselves are not run. For vLLM the rules are those of its `PEFTHelper` and `LoRAModel`: a rank of at
    most 512, no DoRA, no biases, no `modules_to_save`, linear modules that it adapts; and, what it does not check, one
    scale for all modules, since it applies `lora_alpha / r` everywhere and reads no `alpha_pattern`. For llama.cpp
    (after `convert_to_gguf`): a change of linear modules and nothing else.

    Args:
        folder: Folder or Hub id of the adapter.

    Returns:
        One entry each for "peft", "vllm" and "llama.cpp".

    Raises:
        FileNotFoundError: There is no adapter.
        ValueError: Its files cannot be read.

    Source: vLLM, `vllm/lora/peft_helper.py`, `vllm/lora/lora_model.py` and `vllm/config/lora.py`,
    https://github.com/vllm-project/vllm
    """
    path = local_folder(folder)
    if not (path / "adapter_config.json").is_file():
        raise no_adapter(folder)
    config = read_json(path / "adapter_config.json")
    stored = (path / "adapter_model.safetensors").is_file()
    peft = Server("peft", stored, [] if stored else ["It has no adapter_model.safetensors; pickles are not loaded."])
    shared = [] if stored else list(peft.reasons)
    if config.get("peft_type", "LORA") != "LORA":
        shared.append(f"It is of type {config['peft_type']}, not LORA. Convert it (`convert_to_lora`).")
        return [peft, *(Server(name, False, shared) for name in ("vllm", "llama.cpp"))]
    where = f"adapter_config.json of {str(folder)!r}"
    if config.get("use_dora"):
        shared.append("It uses DoRA. Convert it (`convert_to_lora` with a rank).")
    if config.get("lora_bias") or field_of(config, "bias", str, where=where, default="none") != "none":
        shared.append("It changes biases. Merge it into its base.")
    whole = field_of(config, "modules_to_save", list, where=where, default=[])
    if whole:
        shared.append(f"It stores whole modules ({', '.join(map(str, whole))}). Extract it without `modules_to_save`.")
    for option in ("target_parameters", "alora_invocation_tokens", "use_qalora"):
        if config.get(option):
            shared.append(f"It uses `{option}`. Merge it into its base.")
    if not stored or any("target_parameters" in one or "alora" in one or "qalora" in one for one in shared):
        return [peft, Server("vllm", False, shared), Server("llama.cpp", False, shared)]
    found = read_lora(path, allow=CONVERTIBLE)
    try:
        others = _unexpected(found.checkpoint, {*found.modules})
        embedded = sorted(module for module in found.modules if module.endswith(("embed_tokens", "wte", "lm_head")))
        vllm, llama = [*shared, *others], [*shared, *others]
        if embedded:
            vllm.append(
                f"It changes {embedded[0]!r}, which vLLM adapts in some models only. Train linear layers alone."
            )
        if any(not module.endswith("lm_head") for module in embedded):
            llama.append(f"It changes {embedded[0]!r}; llama.cpp adapts matrix products only.")
        unknown = sorted(m for m in found.modules if m.rpartition(".")[2] not in VLLM_MODULES and m not in embedded)
        if unknown:
            vllm.append(f"It changes {unknown[0]!r}, which is not among the linear modules that vLLM adapts.")
        ranks = {module: factors.left.shape[1] for module, factors in found.modules.items()}
        vllm += _scales(config, ranks)
        rank = max([*ranks.values(), field_of(config, "r", int, where=where, default=8)])
        if rank > VLLM_RANKS[-1]:
            vllm.append(f"Its rank is {rank}, and vLLM takes at most {VLLM_RANKS[-1]}. Resize it (`resize_lora`).")
    finally:
        found.checkpoint.close()
    enough = next((one for one in VLLM_RANKS if one >= rank), VLLM_RANKS[-1])
    options = ["--enable-lora"] + ([f"--max-lora-rank {enough}"] if enough > VLLM_DEFAULT_RANK else [])
    return [
        peft,
        Server("vllm", not vllm, vllm, [] if vllm else options),
        Server("llama.cpp", not llama, llama or [AS_GGUF], [] if llama else ["--lora FILE.gguf"]),
    ]


def _unexpected(checkpoint: Checkpoint, modules: set[str]) -> list[str]:
    """Tensors that are not factors of a module."""
    others = [
        name
        for name in checkpoint.entries
        # PEFT stores the base's embeddings beside factors that change them.
        if re.split(r"\.lora_|\.base_layer\.", name.removeprefix(PREFIX))[0] not in modules
        and ".modules_to_save." not in name
    ]
    return [f"It holds {others[0]!r} beside the factors of linear modules."] if others else []


def _scales(config: dict[str, Any], ranks: dict[str, int]) -> list[str]:
    """vLLM multiplies every module's product by the scale of the config's own rank and alpha."""
    usual = lora_scale("", {**config, "alpha_pattern": {}}, int(config.get("r", 8)))
    for module, rank in ranks.items():
        own = lora_scale(module, config, rank)
        if abs(own - usual) > 1e-6 * abs(usual):
            return [
                f"vLLM would scale {module!r} by {usual:.6g} instead of {own:.6g}, without an error: it reads one "
                "rank and one alpha for all modules. Convert it (`convert_to_lora`): the scales go into the factors."
            ]
    return []
