"""Store a teacher's outputs on a data set: `hf-transfer-ext cache-teacher TEACHER DATASET FOLDER`.

Several processes share the work: `accelerate launch -m hf_transfer_ext.recipes.cache_teacher TEACHER DATASET FOLDER`.
"""

from __future__ import annotations

from typing import Any

from hf_transfer_ext.data.text import load_text_dataset
from hf_transfer_ext.files import sha256_of
from hf_transfer_ext.hub.command import PUSH_OPTIONS, Publication
from hf_transfer_ext.hub.finish import finish_cache
from hf_transfer_ext.hub.record import RunRecord
from hf_transfer_ext.recipes.caching import cache_likelihoods, refuse_unfit, tokenized_as_in_training
from hf_transfer_ext.recipes.run import load_named, run_recipe
from hf_transfer_ext.settings import arguments_for
from hf_transfer_ext.teachers.cache import CacheSpec, TeacherCache, cache_teacher
from hf_transfer_ext.teachers.server import KEY_VARIABLE, cache_server
from hf_transfer_ext.trainers.several_teachers import server_teacher
from hf_transfer_ext.weights.ranks import is_first_rank

PROGRAM = "hf-transfer-ext cache-teacher"


def cache_for_distillation(
    teacher: str,
    dataset: str,
    folder: str,
    *,
    kind: str | None = None,
    top: int | None = None,
    samples: int | None = None,
    temperature: float = 1.0,
    tau: float = 1.0,
    split: str = "train",
    columns: dict[str, Any] | None = None,
    dataset_config: str | None = None,
    dataset_revision: str | None = None,
    max_length: int | None = 1024,
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = False,
    chat_template_path: str | None = None,
    drop_unlabelled: bool = False,
    revision: str | None = None,
    dtype: str = "auto",
    batch_size: int = 8,
    student: str | None = None,
    server_model: str | None = None,
    server_options: dict[str, Any] | None = None,
    teacher_tokenizer: str | None = None,
) -> TeacherCache:
    """Tokenize a data set as the distillation trainer does, and store the teacher's rows for it.

    Training with `teacher_cache=FOLDER` and the same data, `max_length`, template and masks then needs no teacher.

    Args:
        teacher: Folder, Hub id, or address of an OpenAI-compatible server (http://...).
        dataset: File, folder or Hub id.
        folder: A new folder, or an unfinished cache of the same teacher, which is continued.
        kind: top_and_samples (the default), top, samples, or likelihoods for loss alm; a server: top or likelihoods.
        top: Likeliest tokens; of a server, 20 by default.
        samples: Draws from the others.
        temperature: The distill_temperature of the training.
        tau: Draws have probability proportional to p**tau.
        split: Split of the data set.
        columns: Role -> column of the data set, such as {text: body}.
        dataset_config: Configuration of a Hub data set.
        dataset_revision: Hub revision of the data set.
        max_length: Longest text in tokens; longer ones are cut.
        completion_only_loss: Of the training: whether only completions count; by default where there are any.
        assistant_only_loss: Of the training: whether only the assistant's turns count.
        chat_template_path: Of the training: a .jinja file, or a tokenizer whose template is taken.
        drop_unlabelled: Leave out texts in which nothing counts.
        revision: Hub revision of the teacher.
        dtype: Of the teacher's weights: auto, float32, bfloat16, ...
        batch_size: Texts that the teacher reads at once.
        student: With a server, whose tokenizer it has to have, or with kind likelihoods: its folder or Hub id.
        server_model: With a server: the model's name on it.
        server_options: With a server: {timeout, retries, pause, parallel, check_tokenizer}, as in ServerTeacher.
        teacher_tokenizer: With a server and kind likelihoods: its tokenizer, by default that of server_model.

    Raises:
        ValueError: A setting does not fit the teacher.
    """
    settings = dict(locals())
    is_server = teacher.startswith(("http://", "https://"))
    refuse_unfit(settings, is_server=is_server)
    spec = CacheSpec(**{n: settings[n] for n in CacheSpec.__dataclass_fields__ if settings[n] is not None})
    source: Any = {"columns": columns, "config_name": dataset_config, "revision": dataset_revision, "split": split}
    own: Any = {"revision": revision, "dtype": dtype} if student is None else {}  # of the teacher, not of a student
    model, tokenizer = load_named(student or teacher, **own)
    rows, accelerator = tokenized_as_in_training(model, tokenizer, load_text_dataset(dataset, **source), settings)
    how: Any = {"batch_size": batch_size, "accelerator": accelerator}
    if kind == "likelihoods":
        cache = cache_likelihoods(model, tokenizer, rows, settings, accelerator)
    elif is_server:
        options = {**(server_options or {}), **({"top": top} if top else {})}
        cache = cache_server(server_teacher(teacher, str(server_model), tokenizer, options), rows, folder, **how)
    else:
        cache = cache_teacher(model, rows, folder, tokenizer=tokenizer, spec=spec, revision=revision, **how)
    if accelerator.is_main_process:
        record = RunRecord("caching", PROGRAM, settings, recipe_sha256=sha256_of(__file__))
        finish_cache(cache.folder, record, settings, is_server=is_server)
    return cache


def main(argv: list[str] | None = None) -> int:
    about = f"Store a teacher's outputs, for distillation without it (privately on the Hub). Key: ${KEY_VARIABLE}."
    arguments = arguments_for(cache_for_distillation, argv, program=PROGRAM, about=about, extra=PUSH_OPTIONS)
    publication = Publication.taken_from(arguments, repo_type="dataset")
    cache = cache_for_distillation(**arguments)
    if is_first_rank():
        print(f"{len(cache)} texts in {cache.folder}")
        publication.publish(cache.folder)
    return 0


if __name__ == "__main__":
    run_recipe("cache-teacher", main)
