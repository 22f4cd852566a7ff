"""Move a LoRA to another base model: `accelerate launch recipes/transfer_lora.py --config FILE.yaml`.

Checks what both bases have in common, transfers by the method that this allows, and compares the result with its
controls: the target base alone, a copy, random factors, training on the true data. With `teach_epochs` it trains the
source adapter first. `recipes/configs/transfer/demo.yaml` is a configuration for two CPU cores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hf_transfer_ext.adapters.transfer.command import run_transfer
from hf_transfer_ext.adapters.transfer.trainer import TransferConfig, TransferTrainer, teach_source
from hf_transfer_ext.data.fictitious_people import sorted_statements
from hf_transfer_ext.data.question_answer import QuestionAnswerFormat
from hf_transfer_ext.files import refuse_existing_output
from hf_transfer_ext.recipe import parse_recipe, setting
from hf_transfer_ext.recipes.publishing import PublishArguments
from hf_transfer_ext.recipes.run import model_path, run_recipe
from hf_transfer_ext.settings import REQUIRED


@dataclass
class TransferArguments(PublishArguments):
    """Which adapter, to which base, and the data to measure it on. How it is moved is set by `TransferConfig`."""

    adapter: str = setting(REQUIRED, "source", "Folder or Hub id of the source adapter.")
    target_base: str = setting(REQUIRED, "target", "Folder, Hub id, or demo (Gemma 3 270M).")
    source_base: str | None = setting(None, "source", "Its base, or demo (Gemma 3 270M); none: as its config says.")
    teach_epochs: float = setting(0.0, "source", "> 0: train the adapter on `train_data` first, into its folder.")
    teach_learning_rate: float = setting(1e-3, "source", "Peak learning rate of that.")
    people: int = setting(0, "data", "> 0: train and test data are statements about so many made-up people.")
    kinds: int = setting(6, "data", "Kinds of these statements, to be told apart.")
    train_data: str | None = setting(None, "data", "The adapter's own training data, where it is at hand.")
    test_data: str | None = setting(None, "data", "Test data to compare on: file, folder or Hub id.")
    columns: dict[str, str] = setting({}, "data", "Name in the schema -> your column: {question: q, answer: a}.")
    template: str = setting("auto", "data", "auto, chat or plain.")
    texts: str | None = setting(None, "data", "Texts that both models read, for closed forms that need activations.")


#: Groups of the settings of `TransferConfig`.
GROUPS = {
    "method": ["method", "method_options", "max_rank", "learn", "start", "discriminator"],
    "training": ["target_modules", "rank", "epochs", "learning_rate", "batch_size", "seed", "bf16"],
}


def main(argv: list[str] | None = None) -> TransferTrainer:
    job, args = parse_recipe(TransferArguments, TransferConfig, argv=argv, groups=GROUPS)
    publication = job.publication()
    refuse_existing_output(args.output_dir, overwrite=args.overwrite, inputs=(job.adapter,))
    train: Any = job.train_data
    test: Any = job.test_data
    if job.people > 0:
        if train or test:
            raise ValueError("`people` makes training and test data: leave `train_data` and `test_data` out.")
        train, test = sorted_statements(job.people, facts=job.kinds, seed=args.seed)
    source = None if job.source_base is None else model_path(job.source_base)
    trainer = TransferTrainer(
        job.adapter,
        model_path(job.target_base),
        args,
        source_base=source,
        train_dataset=train,
        eval_dataset=test,
        texts=job.texts,
        template=QuestionAnswerFormat(template=job.template),
        columns=job.columns,
    )
    if job.teach_epochs > 0:
        if source is None or trainer.train_rows is None:
            raise ValueError("Teaching the source adapter needs `source_base` and `train_data`: give both.")
        how: Any = {"epochs": job.teach_epochs, "learning_rate": job.teach_learning_rate, "template": trainer.template}
        teach_source(job.adapter, source, trainer.train_rows, args, **how)
    run_transfer(trainer)
    publication.publish(args.output_dir)
    return trainer


if __name__ == "__main__":
    run_recipe("transfer_lora", main)
