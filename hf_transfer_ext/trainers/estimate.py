"""Memory and time of a training step on paper: `hf-transfer-ext doctor --plan recipe.yaml --gpus 8x80GB`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from hf_transfer_ext.losses.fused import CHUNK_BYTES, CHUNK_BYTES_GPU
from hf_transfer_ext.models.loading import context_length
from hf_transfer_ext.trainers.tasks import CAUSAL_LM
from hf_transfer_ext.weights.kinds import MODEL_KINDS

#: Bytes of optimizer state per trained parameter, by what the name of the optimizer contains; 8 otherwise (AdamW).
STATE_BYTES = {"8bit": 2, "sgd": 0, "adafactor": 0, "adamw": 8}
#: What a process takes beside its tensors: libraries that training loads, buffers of the allocator.
PROCESS_BYTES = 1.0e8
#: Share of the peak rate of matrix products that a training step reaches, and that peak of a GPU, in operations per
#: second (bfloat16, A100; an H100 does about 2.5 times as many).
EFFICIENCY, GPU_RATE = 0.4, 312e12
#: Times that each number of the activations passes through memory: written and read, read again in the backward pass,
#: and its gradient written and read.
PASSES_OF_ACTIVATIONS = 5
#: Bytes that an update moves for each trained parameter, beside its states, which are read and written: the weight
#: read and written, the gradient read.
UPDATE_BYTES = 12
#: Exponentials of each logit: softmax, entropy and gradient of the student; with a teacher, both models' in the loss.
EXPONENTIALS, EXPONENTIALS_WITH_TEACHER = 3, 5
#: Matrix products in the backward pass of attention, where scores are computed again, for each in the forward pass.
ATTENTION_BACKWARD = 2.5


@dataclass(frozen=True)
class Rates:
    """What a device does in a second.

    Args:
        products: Operations of large matrix products.
        attention: Operations inside attention, forward and backward.
        exponentials: Exponentials of numbers in memory.
        bandwidth: Bytes read or written.
    """

    products: float
    attention: float
    exponentials: float
    bandwidth: float


#: Of an A100: 2 TB/s of memory, of which an exponential reads and writes 8 bytes.
GPU_RATES = Rates(GPU_RATE * EFFICIENCY, GPU_RATE * EFFICIENCY, 2e12 / 8, 2e12)

#: Task -> why its memory is not estimated.
_NOT_ESTIMATED = {
    "vision_language": "how many tokens an image is, and what its vision tower keeps, depend on the data",
    "sentence_embedding": "whether a row is one text or a pair depends on the data",
}
#: Tasks whose activations are counted in a forward pass without memory -> share of the tokens that the head predicts.
_COUNTED = {"sequence_classification": 0.0, "token_classification": 0.0, "masked_lm": 0.15, "seq2seq": 1.0}


@dataclass(frozen=True)
class Shape:
    """Sizes of a model: what memory and time depend on.

    Args:
        kv: Width of all keys of a token (heads of keys times their size).
        inner: Width of the feed-forward layer.
        linear: Inputs and outputs of all linear layers but the head, added up: parameters of a LoRA of rank 1.
        tied: The head is the embedding.
    """

    parameters: int
    hidden: int
    kv: int
    inner: int
    layers: int
    vocabulary: int
    linear: int
    tied: bool = False

    @classmethod
    def of(cls, config: Any, task: str = CAUSAL_LM) -> Shape:
        """The shape of a configuration of transformers, counted on a model without memory."""
        model = without_memory(config, task)
        parameters, head = model.num_parameters(), model.get_output_embeddings()
        linear = sum(
            one.in_features + one.out_features
            for one in model.modules()
            if isinstance(one, nn.Linear) and one is not head
        )
        text = config.get_text_config()
        heads = text.num_attention_heads
        size = getattr(text, "head_dim", None) or text.hidden_size // heads
        kv = (getattr(text, "num_key_value_heads", None) or heads) * size
        inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
        return cls(parameters, text.hidden_size, kv, inner, text.num_hidden_layers, text.vocab_size, linear,
                   bool(getattr(config, "tie_word_embeddings", False)))  # fmt: skip

    @property
    def multiplied(self) -> int:
        """Parameters that each token is multiplied with: all but an embedding that is not the head as well."""
        return self.parameters - (0 if self.tied else self.vocabulary * self.hidden)

    def adapter_parameters(self, rank: int) -> int:
        """Parameters of a LoRA of this rank on all linear layers but the head."""
        return rank * self.linear


@dataclass(frozen=True)
class Step:
    """One micro-batch on one device.

    Args:
        tokens: Of a micro-batch: rows times their length.
        trained: Trained parameters; those of a LoRA where only that is trained, else all of the student.
        precision: Bytes of a number in activations: 4, or 2 for bfloat16.
        weight_bytes: Bytes of a stored weight of the student; 0.5 in 4 bits.
        teacher_bytes: The same of the teacher.
        shards: Devices that share weights, gradients and optimizer state (FSDP2, ZeRO-3); 1 for whole copies.
        length: Tokens of a row, which attention grows with; 0 leaves attention out of the time.
        kept: Bytes that the student keeps for the backward pass in float32, of all tokens, as `kept_bytes` counts
            them; None for a dense decoder, whose formula is known. The time is that of a decoder, too.
        predicted: Tokens that the head gives logits for; None for all.
    """

    student: Shape
    tokens: int
    teacher: Shape | None = None
    trained: int = 0
    precision: float = 4.0
    weight_bytes: float = 4.0
    teacher_bytes: float = 4.0
    optimizer: str = "adamw"
    checkpointing: bool = False
    fused: bool = True
    shards: int = 1
    device: str = "cuda"
    length: int = 0
    kept: float | None = None
    predicted: int | None = None

    def memory(self) -> dict[str, float]:
        """Bytes at the peak, by what they are for. Gradients replace activations during the backward pass."""
        s, trained = self.student, self.trained or self.student.parameters
        state = next((size for name, size in STATE_BYTES.items() if name in self.optimizer), 8)
        gradients, activations = 4.0 * trained / self.shards, self.activations() + self.logits()
        whole = max(one.parameters / one.layers for one in (s, self.teacher or s)) if self.shards > 1 else 0.0
        return {
            "weights": s.parameters * self.weight_bytes / self.shards + (4.0 * self.trained if self.trained else 0.0),
            "optimizer": state * trained / self.shards,
            "teacher": self.teacher.parameters * self.teacher_bytes / self.shards if self.teacher else 0.0,
            "gathered layers": 2 * whole * self.precision,
            "activations": self.activations(),
            "logits": self.logits(),
            "gradients beyond those": max(0.0, gradients - activations),
            "process": PROCESS_BYTES,
        }

    def activations(self) -> float:
        """Bytes that the layers keep for the backward pass: inputs of norms, of products and of attention."""
        s = self.student
        if self.kept is not None:
            kept = self.kept * self.precision / 4
            return 4 * s.hidden * s.layers * self.tokens + kept / s.layers if self.checkpointing else kept
        in_layer = self.precision * (6 * s.hidden + 2 * s.kv + 4 * s.inner) + 4 * 2 * s.hidden
        kept = 4 * s.hidden * s.layers + in_layer if self.checkpointing else in_layer * s.layers
        return self.tokens * kept

    def logits(self) -> float:
        """Bytes of the loss: chunks of logits and the gradient of the head, or whole logits with their gradients."""
        row, tokens = 4.0 * self.student.vocabulary, self.tokens if self.predicted is None else self.predicted
        if not tokens:
            return 0.0
        if not self.fused:
            return tokens * row * (4 if self.teacher else 3)
        chunk = min(tokens * row, CHUNK_BYTES.get(self.device, CHUNK_BYTES_GPU))
        head = 0.0 if self.trained else row * self.student.hidden
        return chunk * (2 if self.teacher else 1) + head

    def operations(self) -> float:
        """Of large matrix products: 6 per trained weight and token, 4 where only a LoRA is trained, 2 of the teacher.

        Embeddings are looked up, not multiplied.
        """
        per_token = (4.0 if self.trained else 6.0) + (2.0 if self.checkpointing else 0.0)
        taught = 2.0 * self.teacher.multiplied if self.teacher else 0.0
        return self.tokens * (per_token * self.student.multiplied + taught)

    def attention_operations(self) -> float:
        """Of scores and weighted values, over half of all pairs of tokens (a token sees the earlier ones)."""
        passes = 1.0 + ATTENTION_BACKWARD + (1.0 if self.checkpointing else 0.0)
        width = passes * self.student.hidden * self.student.layers
        width += self.teacher.hidden * self.teacher.layers if self.teacher else 0.0
        return 2.0 * self.tokens * self.length * width

    def seconds(self, rates: Rates) -> dict[str, float]:
        """Time of a micro-batch and an update, by what it goes into."""
        trained = self.trained or self.student.parameters
        exponentials = EXPONENTIALS_WITH_TEACHER if self.teacher else EXPONENTIALS
        moved = (UPDATE_BYTES + 2 * self.memory()["optimizer"] * self.shards / trained) * trained / self.shards
        in_layers = replace(self, checkpointing=False).activations()
        return {
            "products": self.operations() / rates.products,
            "attention": self.attention_operations() / rates.attention,
            "loss": exponentials * self.tokens * self.student.vocabulary / rates.exponentials,
            "activations": PASSES_OF_ACTIVATIONS * in_layers / rates.bandwidth,
            "update": moved / rates.bandwidth,
        }


def without_memory(config: Any, task: str = CAUSAL_LM) -> Any:
    """A model of this task whose tensors have shapes and no memory."""
    with torch.device("meta"):
        return getattr(transformers, MODEL_KINDS[task].auto_class).from_config(config)


def predicted_tokens(task: str, tokens: int, mask_probability: float | None = None) -> int:
    """Tokens of a batch that the head over the vocabulary gives logits for.

    Args:
        tokens: Of the texts, or of the targets of an encoder-decoder.
        mask_probability: Of masked_lm, in (0, 1]; None for its default.
    """
    return int(tokens * (_COUNTED[task] if mask_probability is None else mask_probability))


def kept_bytes(config: Any, task: str, *, length: int, target_length: int = 0, fused_attention: bool = True) -> float:
    """Bytes that a model keeps for the backward pass of one row in float32: those of a forward pass without memory.

    Args:
        length: Tokens of the row.
        target_length: Tokens that the decoder of an encoder-decoder reads.
        fused_attention: As on a GPU, where attention never keeps its scores; on a CPU it does with dropout, and with
            a bias that is trained (T5).
    """
    model, found = without_memory(config, task).train(), dict[int, Any]()
    weights = {one.untyped_storage()._cdata for one in (*model.parameters(), *model.buffers())}

    def keep(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            found[storage._cdata] = storage  # held, so that no other storage gets its place
        return tensor

    own = nn.functional.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, **how: Any) -> Any:
        bias = how.get("attn_mask")
        if not fused_attention and (how.get("dropout_p") or (bias is not None and bias.requires_grad)):
            return own(query, key, value, **how)
        return _FusedAttention.apply(query, key, value)

    ids = torch.zeros(1, length, dtype=torch.long, device="meta")
    inputs = {"input_ids": ids}
    if target_length:
        inputs["decoder_input_ids"] = torch.zeros(1, target_length, dtype=torch.long, device="meta")
    nn.functional.scaled_dot_product_attention = attention  # type: ignore[assignment]
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model(**inputs)
    finally:
        nn.functional.scaled_dot_product_attention = own  # type: ignore[assignment]
    del output
    return float(sum(storage.nbytes() for storage in found.values()))


class _FusedAttention(torch.autograd.Function):
    """What attention without scores keeps: its inputs, its output, and one number for each query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # type: ignore[override]
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1]))
        return output


def devices_of(text: str) -> tuple[int, float]:
    """`"8x80GB"` -> (8, 80e9).

    Raises:
        ValueError: It is written in another way.
    """
    found = re.fullmatch(r"(\d+)x(\d+(?:\.\d+)?)\s*GB", text.strip(), re.IGNORECASE)
    if found is None or int(found[1]) < 1:
        raise ValueError(f"`gpus` has to be a number of devices and their memory, such as 8x80GB; got {text!r}.")
    return int(found[1]), float(found[2]) * 1e9


def step_of_recipe(content: Mapping[str, Any], *, devices: int, sharded: bool) -> Step:
    """The step that a recipe of distillation or unlearning describes, from its models' configurations alone.

    Args:
        content: Flat settings of the recipe (`recipe.flattened`), and `teacher` and `student`, or
            `model_name_or_path`, as folders or Hub ids.
        devices: Number of GPUs; they share weights where `sharded`.

    Raises:
        ValueError: No model is named, or a student that is yet to be made; several models teach; or the task's memory
            depends on the data.
        OSError: A configuration cannot be found.
    """
    from transformers import AutoConfig

    distills, task = "model_name_or_path" not in content, str(content.get("task") or CAUSAL_LM)
    if task != CAUSAL_LM and task not in _COUNTED:
        reason = _NOT_ESTIMATED.get(task, "its memory is not known")
        raise ValueError(
            f"The task {task!r} cannot be planned: {reason}. `--dry_run true` of the recipe checks everything but the "
            "memory."
        )
    several = [str(entry["model"]) for entry in content.get("teachers") or () if entry.get("model")]
    if several:
        raise ValueError(
            f"A plan counts the memory of one `teacher`, but `teachers` names {len(several)} models "
            f"({', '.join(several)}). `--dry_run true` of the recipe loads them and prints the memory of each."
        )
    name = content.get("student" if distills else "model_name_or_path")
    if not name:
        raise ValueError(
            "A plan needs the shape of what is trained: name a finished `student` (distillation) or "
            "`model_name_or_path` (unlearning)."
        )
    config = AutoConfig.from_pretrained(str(name), trust_remote_code=False)
    student, teacher = Shape.of(config, task), None
    if distills and content.get("teacher") and not content.get("teacher_cache"):
        teacher = Shape.of(AutoConfig.from_pretrained(str(content["teacher"]), trust_remote_code=False), task)
    bf16 = bool(content.get("bf16", True))
    four_bit = bool(content.get("student_four_bit" if distills else "four_bit", False))
    rank = int(content.get("student_lora_rank", 0) if distills else content.get("lora_rank", 16))
    packed = dict(content.get("teacher_model_init_kwargs") or {}).get("quantization_config")
    passes = 1 if distills else 2  # an answer to forget and one to retain
    rows = int(content.get("per_device_train_batch_size", 8)) * passes
    length = int(content.get("max_length") or min(1024, context_length(config) or 1024))
    counted: dict[str, Any] = {}
    if task in _COUNTED:
        options = dict(content.get("task_options") or {})
        answer = int(options.get("max_target_length") or length) if task == "seq2seq" else 0
        counted["kept"] = rows * kept_bytes(config, task, length=length, target_length=answer)
        counted["predicted"] = predicted_tokens(task, rows * (answer or length), options.get("mask_probability"))
    return Step(
        student,
        rows * length,
        teacher,
        trained=student.adapter_parameters(rank),
        precision=2.0 if bf16 else 4.0,
        weight_bytes=0.5 if four_bit else 4.0,
        teacher_bytes=0.5 if packed else 4.0 if content.get("teacher_dtype") == "float32" else 2.0,
        optimizer=str(content.get("optim", "adamw")),
        checkpointing=bool(content.get("gradient_checkpointing", False)),
        fused=bool(content.get("fused", True)),
        shards=devices if sharded else 1,
        length=length,
        **counted,
    )


def plan_lines(step: Step, devices: int, room: float) -> list[str]:
    """What `doctor --plan` prints: memory by part, whether it fits, and the time of a micro-batch."""
    memory = step.memory()
    needed = sum(memory.values())
    shared = f"shared by {step.shards} devices" if step.shards > 1 else "a whole copy on each device"
    lines = [f"{devices} x {room / 1e9:.0f} GB, {shared}; {step.tokens} tokens in a micro-batch of each", ""]
    lines += table_of(memory)
    if step.kept is not None:
        lines += ["", "The time is estimated for language models alone."]
    else:
        seconds = sum(step.seconds(GPU_RATES).values())
        lines += ["", f"about {seconds:.2f} s for a micro-batch at {EFFICIENCY:.0%} of {GPU_RATE / 1e12:.0f} TFLOP/s"]
    if needed > room:
        advice = "Shard it (--sharded), cache the teacher, lower the batch or `max_length`, or train a LoRA."
        lines.append(f"It does NOT fit: {needed / 1e9:.0f} GB of {room / 1e9:.0f}. {advice}")
    else:
        lines.append(f"It fits: {needed / room:.0%} of the memory")
    return lines


def table_of(memory: Mapping[str, float]) -> list[str]:
    """A line for each part, and their sum."""
    lines = [f"  {name:<24} {value / 1e9:8.2f} GB" for name, value in memory.items() if value]
    return [*lines, f"  {'in all':<24} {sum(memory.values()) / 1e9:8.2f} GB"]
