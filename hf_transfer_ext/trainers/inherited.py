"""Every setting that the configurations inherit from transformers and TRL: obeyed, refused, or without meaning.

Tests compare the tables with the fields of the installed `SFTConfig` (of `DistillationConfig`) and `TrainingArguments`
(of `UnlearningConfig`), so that a new field cannot slip by.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from accelerate.utils import DistributedType

#: Read by the code of transformers and TRL that runs here unchanged, or by the trainer itself.
OBEYED = frozenset(
    # model and adapter
    "model_init_kwargs trust_remote_code router_aux_loss_coef chat_template_path neftune_noise_alpha "
    "use_liger_kernel liger_kernel_config "
    # data
    "dataset_text_field dataset_kwargs dataset_num_proc eos_token pad_token max_length truncation_mode "
    "shuffle_dataset packing packing_strategy padding_free pad_to_multiple_of eval_packing completion_only_loss "
    "assistant_only_loss remove_unused_columns train_sampling_strategy length_column_name "
    "accelerator_config dataloader_drop_last dataloader_num_workers dataloader_pin_memory "
    "dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order "
    # steps
    "per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs "
    "warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon optim_target_modules "
    "gradient_accumulation_steps average_tokens_across_devices max_grad_norm auto_find_batch_size "
    "resume_from_checkpoint ignore_data_skip restore_callback_states_from_checkpoint full_determinism seed data_seed "
    # precision, memory, devices
    "bf16 fp16 bf16_full_eval fp16_full_eval tf32 activation_checkpointing activation_checkpointing_kwargs "
    "gradient_checkpointing gradient_checkpointing_kwargs activation_offloading torch_compile torch_compile_backend "
    "torch_compile_mode torch_empty_cache_steps use_cpu parallelism_config ddp_find_unused_parameters "
    "ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout fsdp fsdp_config deepspeed "
    # evaluation
    "eval_strategy eval_steps eval_delay per_device_eval_batch_size prediction_loss_only eval_on_start "
    "eval_do_concat_batches eval_use_gather_object eval_accumulation_steps include_for_metrics batch_eval_metrics "
    "load_best_model_at_end metric_for_best_model greater_is_better "
    # logs
    "logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter "
    "include_num_input_tokens_seen log_level log_level_replica disable_tqdm report_to run_name project "
    "trackio_space_id trackio_bucket_id trackio_static_space_id debug skip_memory_metrics "
    # checkpoints and the Hub
    "output_dir save_only_model save_strategy save_steps save_on_each_node save_total_limit enable_jit_checkpoint "
    "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision".split()
)

#: Read by nobody here: setting -> who reads it elsewhere.
WITHOUT_MEANING = {
    "do_train": "A flag for scripts of their own; no trainer reads it.",
    "do_eval": "A flag for scripts of their own; evaluation follows `eval_strategy`.",
    "do_predict": "A flag for scripts of their own; no trainer reads it.",
    "local_rank": "The launcher states the rank in the environment.",
}

#: Setting -> (which values are taken, why all others are refused and what to do instead).
REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "label_smoothing_factor": (
        lambda value: not value,
        "cross entropy is not smoothed here: the teacher's distribution takes that part. Leave it at 0.",
    ),
    "loss_type": (
        lambda value: value == "nll",
        "that loss of SFTTrainer is not used here. Choose a divergence with `loss`, and the share of plain cross "
        "entropy with `ce_weight`.",
    ),
    "use_cache": (
        lambda value: not value,
        "training passes read each sequence once, without a cache of keys and values. Leave it at False.",
    ),
    "label_names": (
        lambda value: value in (None, ["labels"]),
        "the labels are those of the collator, `labels`. Rename the column, or give a `data_collator`.",
    ),
}

#: The same for `UnlearningConfig`, whose samples are pairs of a forget and a retain answer.
REFUSED_BY_UNLEARNING: dict[str, tuple[Callable[[Any], bool], str]] = {
    "label_smoothing_factor": (lambda value: not value, "no unlearning loss smooths its labels. Leave it at 0."),
    "use_cache": REFUSED["use_cache"],
    "label_names": REFUSED["label_names"],
    "remove_unused_columns": (lambda value: not value, "forget/retain samples are nested. Leave it at False."),
    "train_sampling_strategy": (
        lambda value: value not in ("group_by_length", "batch_rebalance"),
        "each sample is a pair of a forget and a retain answer whose lengths have nothing in common, and the pairing "
        "changes with the epoch. Leave it at 'random' (`group_by_length` at False).",
    ),
    "include_num_input_tokens_seen": (
        lambda value: value in (False, None, "no"),
        "the tokens of pairs are not counted: each loss is averaged over a count of its own. Leave it at 'no'.",
    ),
    "include_for_metrics": (lambda value: not value, "evaluation in training keeps losses alone. Leave it empty."),
    "batch_eval_metrics": (lambda value: not value, "evaluation in training keeps losses alone. Leave it at False."),
}
#: What an unlearning run has nothing to apply to, beside `WITHOUT_MEANING`.
WITHOUT_MEANING_IN_UNLEARNING = {
    "length_column_name": "Lengths are read to group samples by them, which is refused.",
    **dict.fromkeys(
        ("prediction_loss_only", "eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps"),
        "Evaluation in training keeps losses and no predictions.",
    ),
}


#: Setting -> why it needs an accelerator (a GPU, an XPU, ...), and what to do instead.
NEEDS_ACCELERATOR = {
    "use_liger_kernel": "Liger's kernels are written in Triton. The fused loss of this package needs none of them.",
    "activation_offloading": "activations are offloaded from a GPU to the CPU. `gradient_checkpointing` saves memory "
    "anywhere.",
}


def refuse_without_effect(
    args: Any, refused: Mapping[str, tuple[Callable[[Any], bool], str]] = MappingProxyType(REFUSED)
) -> None:
    """Refuse an inherited setting that would have no effect.

    Raises:
        ValueError: A setting of `refused` has another value, a setting needs an accelerator and there is none, or
            sequences are split across devices.
    """
    for name, (is_taken, why) in refused.items():
        value = getattr(args, name, None)
        if not is_taken(value):
            raise ValueError(f"`{name}` is {value!r}, but {why}")
    is_cpu = args.use_cpu or not torch.accelerator.is_available()
    for name, why in NEEDS_ACCELERATOR.items():
        if is_cpu and getattr(args, name, False):
            raise ValueError(f"`{name}` is True, but this training runs on the CPU: {why} Set it to False.")
    refuse_split_sequences(getattr(args, "parallelism_config", None))


def refuse_split_sequences(parallelism: Any) -> None:
    """Refuse context and sequence parallelism: the next token may lie on another device, and both models read all.

    Args:
        parallelism: A `ParallelismConfig` of accelerate, or None.

    Raises:
        ValueError: It splits sequences across devices.
    """
    for kind in ("cp", "sp"):
        if getattr(parallelism, f"{kind}_enabled", False):
            raise ValueError(
                f"`parallelism_config` splits sequences across devices (`{kind}_size` > 1), but the losses here read "
                f"whole sequences. Set `{kind}_size=1`, and shorten `max_length` or shard the weights "
                "(FSDP, DeepSpeed) to save memory."
            )


def refuse_compiled_shares(args: Any, accelerator: Any) -> None:
    """Refuse compiled graphs where a wrapper of several processes has to see the head's weights at work.

    A loss that takes the head's place runs after the compiled graph, and reads these weights there.

    Raises:
        ValueError: `torch_compile` on several processes that shard the weights, or look for unused parameters (DDP).
    """
    if not args.torch_compile or accelerator.num_processes == 1 or not getattr(args, "fused", True):
        return
    kind = accelerator.distributed_type
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED) or args.ddp_find_unused_parameters is not False:
        fused = ", or `fused` to False" if hasattr(args, "fused") else ""
        raise ValueError(
            f"`torch_compile` is True on {accelerator.num_processes} processes ({kind.value}), and the loss reads the "
            "head's weights after the compiled graph, where neither shards are whole nor DDP's search for unused "
            "parameters sees them. Set `ddp_find_unused_parameters` to False where the weights are whole on each "
            f"process (DDP){fused}, or leave `torch_compile` off."
        )
