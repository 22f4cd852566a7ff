"""Texts of the student written by vLLM, whose engine runs in the trainer's own process with the student's weights.

Every process has an engine of its own. All weights are copied into it, adapters merged, before the first text and
after each optimizer step, so that a text is always the current student's.
"""

from __future__ import annotations

import copy
import os
import random
import shutil
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from hf_transfer_ext.models.heads import causal_lm_of
from hf_transfer_ext.trainers.generation_options import effective

#: Options of generation that vLLM has under the names of transformers.
SHARED_OPTIONS = ("top_p", "top_k", "min_p", "repetition_penalty")
#: vLLM raises lower temperatures to this one.
LOWEST_TEMPERATURE = 0.01
#: Arguments of `vllm.LLM` that follow from the training.
OWN_ARGUMENTS = (
    "model", "tokenizer", "skip_tokenizer_init", "load_format", "seed", "tensor_parallel_size",
    "pipeline_parallel_size", "distributed_executor_backend", "logprobs_mode", "quantization", "generation_config",
)  # fmt: skip


def require_vllm() -> None:
    """Refuse a machine without vLLM, which is not imported yet: that takes long and claims the device.

    Raises:
        ImportError: With the setting that needs it.
    """
    is_there = sys.modules["vllm"] is not None if "vllm" in sys.modules else find_spec("vllm") is not None
    if not is_there:
        raise ImportError(
            "`rollout_engine: vllm` needs vLLM, which is not installed. Install it with `pip install vllm`, or leave "
            "`rollout_engine` out."
        )


def imported_vllm() -> Any:
    """vLLM, or an `ImportError` that says which setting needs it."""
    try:
        return import_module("vllm")
    except ImportError as error:
        raise ImportError(
            f"`rollout_engine: vllm` needs vLLM, which cannot be imported ({error}). Install it with `pip install "
            "vllm`, or leave `rollout_engine` out."
        ) from error


class VllmWriter:
    """An engine with the student's weights.

    Args:
        student: The student, unwrapped.
        folder: Where a temporary folder for the engine's configuration is created; it is removed again.
        options: Further arguments of `vllm.LLM` (`gpu_memory_utilization`, `max_model_len`, ...). `dtype` is by
            default that of the training: of its mixed precision, or of the student's weights.

    Raises:
        ImportError: vLLM is not installed.
        ValueError: The student's weights cannot be given to vLLM.
    """

    def __init__(self, student: Any, accelerator: Accelerator, folder: str | Path, options: dict[str, Any]) -> None:
        vllm = imported_vllm()
        _check(student)
        self._parameters: Any = vllm.SamplingParams
        self._loaded: int | None = None
        mixed = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
        dtype = mixed or next(student.parameters()).dtype
        aside = Path(folder) / f".vllm-{accelerator.process_index}"
        aside.mkdir(parents=True, exist_ok=True)
        model = causal_lm_of(student)
        config = copy.deepcopy(model.config)
        config.architectures = [type(model).__name__.removeprefix("FSDP")]  # models that were never saved have none
        config.save_pretrained(aside)
        try:
            with _as_launched(accelerator), _unchanged_draws():
                self.engine: Any = vllm.LLM(
                    model=str(aside), skip_tokenizer_init=True, load_format="dummy", tensor_parallel_size=1,
                    distributed_executor_backend="external_launcher", logprobs_mode="processed_logprobs",
                    seed=accelerator.process_index, generation_config="vllm", **{"dtype": dtype, **options},
                )  # fmt: skip
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def load(self, student: Any, step: int) -> None:
        """Copy the student's weights into the engine, unless those of this step are there already.

        The engine's own `reload_weights` also rebuilds what some devices make of them (the CPU multiplies with packed
        copies), which writing to its parameters does not. It leaves out a head whose weight is the embedding's.
        """
        if self._loaded == step:
            return
        self.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": engine_weights(student)})
        self.engine.apply_model(_prepare_heads)
        self.engine.reset_prefix_cache()
        self._loaded = step

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        stop_ids: Sequence[int],
        max_new_tokens: int,
        temperature: float,
        seeds: Sequence[int],
        log_probs: bool,
        **options: Any,
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """A continuation of each prompt, and the log-probability of each of its tokens, in nats.

        Args:
            stop_ids: Tokens that end a continuation; it includes the one that ended it.
            seeds: Of each prompt's draws.
            log_probs: Whether they are needed; None else.
            options: Some of `SHARED_OPTIONS`.
        """
        context = self.engine.llm_engine.model_config.max_model_len
        longest = max(len(prompt) for prompt in prompts)
        if longest + max_new_tokens > context:  # vLLM would write fewer tokens and say nothing
            raise ValueError(
                f"A prompt has {longest} tokens, which leaves no room for `max_new_tokens` ({max_new_tokens}) within "
                f"the {context} tokens of vLLM's context. Raise `max_model_len` in `rollout_engine_options`, lower "
                "`max_new_tokens`, or leave the row out."
            )
        settings = [  # `ignore_eos`: stop tokens are those given here, not also those of the model's config
            self._parameters(
                n=1, temperature=temperature, max_tokens=max_new_tokens, seed=seed, stop_token_ids=list(stop_ids),
                ignore_eos=True, logprobs=0 if log_probs else None, detokenize=False, **options,
            )
            for seed in seeds
        ]  # fmt: skip
        asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        found = [one.outputs[0] for one in self.engine.generate(asked, settings, use_tqdm=False)]
        texts = [list(one.token_ids) for one in found]
        if not all(texts):
            raise ValueError(
                f"vLLM wrote nothing after prompt {texts.index([])} of a batch, not even an end (finish_reason "
                f"{found[texts.index([])].finish_reason!r}). Check `max_model_len` in `rollout_engine_options`."
            )
        if not log_probs:
            return texts, None
        return texts, [
            [float(row[token].logprob) for token, row in zip(one.token_ids, one.logprobs, strict=True)]
            for one in found
        ]


def _prepare_heads(network: torch.nn.Module) -> None:
    """Rebuild what vLLM makes of the head's weight, which nothing else does where it is the embedding's."""
    for part in network.modules():
        if type(part).__name__ == "ParallelLMHead":
            cast(Any, part).quant_method.process_weights_after_loading(part)


@contextmanager
def _as_launched(accelerator: Accelerator) -> Iterator[None]:
    """Within the block, the variables that a launcher sets are there, as an engine within this process needs them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free_port = probe.getsockname()[1]
    needed = {
        "RANK": accelerator.process_index, "LOCAL_RANK": accelerator.local_process_index,
        "WORLD_SIZE": accelerator.num_processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port,
    }  # fmt: skip
    added = [name for name in needed if name not in os.environ]
    os.environ.update({name: str(needed[name]) for name in added})
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


@contextmanager
def _unchanged_draws() -> Iterator[None]:
    """Within the block the random generators of the process may be seeded; after it they go on as before.

    vLLM seeds all of them when an engine starts, and a resumed run starts its engine at another step.
    """
    state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)


def engine_weights(student: Any) -> Iterator[tuple[str, Tensor]]:
    """The student's weights under the names of its architecture, adapters merged and shards gathered, one at a time.

    An adapted layer gets its own weights back exactly as they were.
    """
    adapted = {name: module for name, module in student.named_modules() if isinstance(module, BaseTunerLayer)}
    inside = tuple(f"{name}." for name in adapted)
    copies = {name: module for name, module in student.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)}
    for name, module in adapted.items():
        base: Any = module.get_base_layer()
        own = {key: value.detach().clone() for key, value in base.named_parameters()}
        module.merge()  # type: ignore[attr-defined]
        merged = {_plain(f"{name}.{key}"): value.detach().clone() for key, value in base.named_parameters()}
        module.unmerge()  # type: ignore[attr-defined]
        with torch.no_grad():
            for key, value in base.named_parameters():
                value.copy_(own[key])
        yield from merged.items()
    for name, value in student.named_parameters():
        if name.startswith(inside) or "original_module" in name:
            continue
        if any(name.startswith(f"{wrapper}.") for wrapper in copies):
            active = f".modules_to_save.{student.active_adapter}"
            if active not in name:
                continue
            name = name.replace(active, "")
        yield _plain(name), value.full_tensor() if isinstance(value, DTensor) else value.detach()


def _plain(name: str) -> str:
    return name.removeprefix("base_model.model.")


def _check(student: Any) -> None:
    if getattr(causal_lm_of(student), "is_quantized", False):
        raise ValueError(
            "The student is quantized, and its weights in bits cannot be given to vLLM. Leave `rollout_engine` out, "
            "or load the student in bfloat16."
        )
    if hasattr(student, "peft_config"):
        without = [name for name, one in student.peft_config.items() if one.is_prompt_learning]
        if without:
            raise ValueError(
                f"Adapter {without[0]!r} is of the kind prompt learning, which cannot be merged into weights for "
                "vLLM. Leave `rollout_engine` out."
            )
        ends = (student.get_input_embeddings(), student.get_output_embeddings())
        adapted = any(isinstance(one, (BaseTunerLayer, AuxiliaryTrainingWrapper)) for one in ends)
        tied = causal_lm_of(student).config.get_text_config().tie_word_embeddings
        if (
            adapted
            and tied
            and not all(getattr(one, "ensure_weight_tying", False) for one in student.peft_config.values())
        ):
            raise ValueError(
                "The student's embedding and output head share one weight, and its adapter changes only one of them, "
                "which vLLM cannot hold. Set `ensure_weight_tying=True` in the adapter's config, leave these layers "
                "out of `target_modules` and `modules_to_save`, or leave `rollout_engine` out."
            )
        if any(isinstance(part, FSDPModule) for part in student.modules()):
            raise ValueError(
                "Adapters cannot be merged for vLLM while FSDP shards the weights. Train them with plain data "
                "parallelism (DDP), or leave `rollout_engine` out."
            )


def check_engine(config: Any, method: Any) -> None:
    """Refuse settings of `rollout_engine` that cannot be followed.

    Raises:
        ValueError: With the setting and what to do.
    """
    if config.rollout_engine not in ("transformers", "vllm"):
        raise ValueError(f"`rollout_engine` has to be transformers or vllm, got {config.rollout_engine!r}.")
    if config.rollout_engine == "transformers":
        if config.rollout_engine_options:
            raise ValueError("`rollout_engine_options` are arguments of vLLM. Set `rollout_engine: vllm`, too.")
        return
    for name in config.rollout_engine_options:
        if name in OWN_ARGUMENTS:
            raise ValueError(f"`rollout_engine_options` has {name!r}, which follows from the training. Leave it out.")
    for name in effective(config.generation_options):
        if name not in ("eos_token_id", *SHARED_OPTIONS):
            raise ValueError(
                f"`generation_options` has {name!r}, which vLLM does not take from here; it takes eos_token_id, "
                f"{', '.join(SHARED_OPTIONS)}. Leave it out, or `rollout_engine`."
            )
    if config.sampling_temperature < LOWEST_TEMPERATURE:
        raise ValueError(
            f"`sampling_temperature` is {config.sampling_temperature:g}, but vLLM samples at {LOWEST_TEMPERATURE:g} "
            "or above. Raise it, or leave `rollout_engine` out."
        )
    if method.teacher_mix > 0:
        raise ValueError(
            f"`rollout_engine` is vllm, but {config.on_policy} draws each token from the teacher's distribution as "
            "well, which an engine that has only the student cannot. Leave `rollout_engine` out."
        )
    require_vllm()
