"""What a trainer saves and publishes itself: a model with our card and record, and no pickle of its settings."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers.trainer_utils import HubStrategy

from hf_transfer_ext.hub.access import require_write_access
from hf_transfer_ext.hub.card import CARD_FILE, model_card
from hf_transfer_ext.hub.inputs import described_or_named
from hf_transfer_ext.hub.publish import earlier_card, push, save_result
from hf_transfer_ext.hub.record import RunInput, RunRecord, Stage, device_summary
from hf_transfer_ext.recipe import inherited_defaults, settings_of
from hf_transfer_ext.students.auxiliary import expanded, load_shared, save_shared
from hf_transfer_ext.students.layers import is_auxiliary
from hf_transfer_ext.trainers.logs import curve_notes, drawn

#: The Trainer's pickle of its settings, which may hold an access token.
SETTINGS_PICKLE = "training_args.bin"


class SavesResults:
    """Mixin for `Trainer` subclasses: `save_model` leaves a result, `push_to_hub` publishes one.

    A subclass states its job first in `_tag_names`. Recipes save and publish through `finish_run` instead, with what
    they measured.
    """

    _tag_names: Any = ("training",)
    args: Any
    model: Any
    accelerator: Any
    processing_class: Any
    state: Any
    is_world_process_zero: Any
    _inputs: list[tuple[RunInput, str]] | None = None

    @property
    def job(self) -> str:
        """What the record and the card say was done."""
        return str(self._tag_names[0])

    def model_inputs(self) -> dict[str, Any]:
        """Role -> model, path or Hub id of the models that this training started from."""
        return {"model": self.model}

    def record(self) -> RunRecord:
        """The record of this training so far: settings, models and data that it read, versions, device."""
        record = RunRecord(
            self.job,
            type(self).__name__,
            settings_of(self.args),
            defaults=inherited_defaults(self.args),
            seed=self.args.seed,
            device=device_summary(self.model, precision="bfloat16" if self.args.bf16 else None),
        )
        if self._inputs is None:
            self._inputs = [_input(role, model) for role, model in self.model_inputs().items()]
            self._inputs.append((_dataset(getattr(self, "train_dataset", None)), ""))
        for described, problem in self._inputs:
            record.inputs.append(described)
            record.not_measured += [problem] if problem else []
        runtimes = [line["train_runtime"] for line in self.state.log_history if "train_runtime" in line]
        record.stages = [Stage("train", round(seconds, 3)) for seconds in runtimes]
        record.not_measured.append("The trainer saved this model; what it logged is not part of the record.")
        return record

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save model and tokenizer with card and record; every process calls it. With `push_to_hub`, publish them."""
        if not _internal_call:
            ask_for_whole_weights(self)
        super().save_model(output_dir, _internal_call=True)  # type: ignore[misc]
        folder = Path(output_dir or self.args.output_dir)
        auxiliary = self._auxiliary()
        if _internal_call:  # a checkpoint
            if auxiliary is not None and self.args.should_save:
                save_shared(auxiliary, folder)
            return
        self._complete(folder)
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _complete(self, folder: Path, **card: Any) -> None:
        """Add card and record to the saved model on the main process, and remove the pickle of the settings."""
        if self.is_world_process_zero():
            (folder / SETTINGS_PICKLE).unlink(missing_ok=True)
            record = card.pop("record", None) or self.record()
            with TemporaryDirectory() as scratch:
                record.notes |= curve_notes(self.state.log_history)
                plot = drawn(self.state.log_history, scratch)
                save_result(folder, record=record, overwrite=True, extra_files=plot, **card)
        self.accelerator.wait_for_everyone()

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Refuse a repository that may not be written to, before the training; one that does not exist is created."""
        self.hub_model_id = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        self.push_in_progress = None
        require_write_access(
            self.hub_model_id,
            private=self.args.hub_private_repo if private is None else private,
            revision=self.args.hub_revision,
            token=token or self.args.hub_token,
        )

    def create_model_card(self, model_name: str | None = None, tags: Any = (), **_: Any) -> None:
        """Write the card of this training so far to the output folder, in place of the card of transformers or TRL."""
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            adapter, extra = hasattr(self.model, "peft_config"), [tags] if isinstance(tags, str) else list(tags or ())
            earlier = earlier_card(folder)
            card = model_card(self.record(), title=model_name, adapter=adapter, tags=extra, earlier=earlier)
            (folder / CARD_FILE).write_text(str(card), encoding="utf-8")

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        *,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: Any = (),
    ) -> str | None:
        """Save the model with card and record to the output folder and publish these files alone (`hub.publish.push`).

        Every process calls it. The repository is `hub_model_id`, or the name of the output folder.

        Args:
            model_name: Title of the card.
            dataset_name: Hub id of the training data, for the card.
            tags: Further tags of the card.

        Returns:
            The address of the commit; None on all processes but the first.

        Raises:
            ValueError: `blocking=False`.
        """
        if not blocking:
            raise ValueError("`blocking=False` is not supported: the push is one commit, whose end is waited for.")
        folder = Path(self.args.output_dir)
        ask_for_whole_weights(self)
        super().save_model(str(folder), _internal_call=True)  # type: ignore[misc]
        card: dict[str, Any] = {"title": model_name, "tags": [tags] if isinstance(tags, str) else list(tags or ())}
        if self.is_world_process_zero():
            card["record"] = record = self.record()
            if dataset_name is not None:
                record.inputs = [item for item in record.inputs if item.role != "dataset"]
                record.inputs.append(described_or_named(dataset_name, None, "dataset")[0])
        self._complete(folder, **card)
        if not self.is_world_process_zero():
            return None
        return push(
            folder,
            self.args.hub_model_id or folder.absolute().name,
            private=self.args.hub_private_repo if private is None else private,
            revision=revision or self.args.hub_revision,
            token=token or self.args.hub_token,
            commit_message=commit_message,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Publish the model at a checkpoint (`hub_strategy="every_save"`); optimizer states are not published."""
        if self.args.hub_strategy != HubStrategy.END:
            self.push_to_hub(commit_message=f"Training in progress, step {self.state.global_step}")

    # ---- Models with shared layers ----

    def _auxiliary(self) -> Any:
        model = self.accelerator.unwrap_model(self.model)
        return model if is_auxiliary(model) else None

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """As in `Trainer`; of a model with shared layers, what is expanded from it."""
        auxiliary, trained = self._auxiliary(), self.model
        if auxiliary is None:
            return super()._save(output_dir, state_dict)  # type: ignore[misc]
        self.model = expanded(auxiliary)
        try:
            return super()._save(output_dir)  # type: ignore[misc]
        finally:
            self.model = trained

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        auxiliary = self._auxiliary()
        if auxiliary is None:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        load_shared(auxiliary, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        auxiliary = self._auxiliary()
        if auxiliary is None:
            return super()._load_best_model()  # type: ignore[misc]
        load_shared(auxiliary, self.state.best_model_checkpoint)


def ask_for_whole_weights(trainer: Any) -> None:
    """Make a sharded trainer save full weights.

    By default FSDP silently writes nothing, and ZeRO-3 a checkpoint that only DeepSpeed reads.
    """
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    if trainer.is_deepspeed_enabled:  # DeepSpeed has no public setter; it reads this when it saves
        trainer.deepspeed._config.zero_config.gather_16bit_weights_on_model_save = True


def refuse_published_states(args: Any) -> None:
    """Refuse strategies that publish checkpoints with optimizer states, which are pickles.

    Raises:
        ValueError: `push_to_hub` with such a `hub_strategy`.
    """
    if args.push_to_hub and args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        raise ValueError(
            f"`hub_strategy` is {args.hub_strategy.value!r}, but checkpoints with optimizer states are pickles and "
            "are not published. Choose 'every_save' (the model at each checkpoint) or 'end'."
        )


def _input(role: str, model: Any) -> tuple[RunInput, str]:
    """A model of a training by its path, Hub id, or, where it was made in memory, its class."""
    name = model if isinstance(model, (str, Path)) else getattr(getattr(model, "config", None), "name_or_path", "")
    if not name:
        return RunInput(f"{type(model).__name__} made in memory", role), ""
    return described_or_named(name, getattr(getattr(model, "config", None), "_commit_hash", None), role)


def _dataset(dataset: Any) -> RunInput:
    """The training data as far as the trainer knows them: name and number of rows."""
    info = getattr(dataset, "info", None)
    name = getattr(info, "dataset_name", None) or "rows given to the trainer"
    count = f", {len(dataset)} rows" if hasattr(dataset, "__len__") else ""
    return RunInput(f"{name}{count}", "dataset")
