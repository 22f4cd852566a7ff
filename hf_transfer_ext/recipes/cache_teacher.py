"""Store a teacher's outputs on a data set: `hf-transfer-ext cache-teacher TEACHER DATASET FOLDER`.

Several processes share the work: `accelerate launch -m hf_transfer_ext.recipes.cache_teacher TEACHER DATASET FOLDER`.
"""

from __future__ import annotations

import os
import tempfile
from typing import Any

from hf_transfer_ext.data.text import load_text_dataset
from hf_transfer_ext.files import sha256_of
from hf_transfer_ext.hub.command import PUSH_OPTIONS, Publication
from hf_transfer_ext.hub.finish import finish_cache
from hf_transfer_ext.hub.record import RunRecord
from hf_transfer_ext.recipes.run import load_named, run_recipe
from hf_transfer_ext.settings import arguments_for
from hf_transfer_ext.teachers.cache import CacheSpec, TeacherCache, cache_teacher
from hf_transfer_ext.teachers.server import KEY_VARIABLE, ServerTeacher, cache_server
from hf_transfer_ext.trainers.distillation import DistillationTrainer
from hf_transfer_ext.trainers.distillation_config import DistillationConfig
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
    split: str = "train",
    dataset_config: str | None = None,
    dataset_revision: str | None = None,
    max_length: int | None = 1024,
    revision: str | None = None,
    dtype: str = "auto",
    batch_size: int = 8,
    student: str | None = None,
    server_model: str | None = None,
) -> TeacherCache:
    """Tokenize a data set as the distillation trainer does, and store the teacher's rows for it.

    Training with `teacher_cache=FOLDER` and the same data, `max_length` and masks then needs no teacher.

    Args:
        teacher: Folder, Hub id, or address of an OpenAI-compatible server (http://...).
        dataset: File, folder or Hub id.
        folder: A new folder, or an unfinished cache of the same teacher, which is continued.
        kind: top_and_samples (the default), top or samples; a server can only give top.
        top: Likeliest tokens; of a server, 20 by default.
        samples: Draws from the others.
        temperature: The distill_temperature of the training.
        split: Split of the data set.
        dataset_config: Configuration of a Hub data set.
        dataset_revision: Hub revision of the data set.
        max_length: Longest text in tokens; longer ones are cut.
        revision: Hub revision of the teacher.
        dtype: Of the teacher's weights: auto, float32, bfloat16, ...
        batch_size: Texts that the teacher reads at once.
        student: With a server: folder or Hub id of the student, whose tokenizer the server's has to be.
        server_model: With a server: the model's name on it.

    Raises:
        ValueError: A setting does not fit the teacher.
    """
    is_server = teacher.startswith(("http://", "https://"))
    if [student is not None, server_model is not None] != [is_server, is_server]:
        raise ValueError(
            "A server needs `student` (for its tokenizer) and `server_model`; a teacher from a folder or the Hub "
            f"needs neither. Got teacher {teacher!r}, student {student!r} and server_model {server_model!r}."
        )
    if is_server and (kind not in (None, "top") or samples or temperature != 1 or revision):
        raise ValueError(
            "A server lists its likeliest tokens at temperature 1: `kind` can only be top, `samples` and `revision` "
            f"have to be left out; got {kind!r}, {samples}, temperature {temperature}, revision {revision!r}."
        )
    settings = {name: value for name, value in locals().items() if name != "is_server"}
    chosen = {name: settings[name] for name in ("kind", "top", "samples", "temperature")}
    spec = CacheSpec(**{name: value for name, value in chosen.items() if value is not None})
    data = load_text_dataset(dataset, split=split, config_name=dataset_config, revision=dataset_revision)
    model, tokenizer = load_named(str(student) if is_server else teacher, revision=revision, dtype=dtype)
    with tempfile.TemporaryDirectory() as scratch:
        own: Any = {"output_dir": scratch, "kd_weight": 0.0, "ce_weight": 1.0, "report_to": "none"}
        args = DistillationConfig(max_length=max_length, **own)
        trainer = DistillationTrainer(model, None, args, data, processing_class=tokenizer)
        rows: Any = trainer.train_dataset
        shared = {"batch_size": batch_size, "accelerator": trainer.accelerator}
        if is_server:
            served: Any = {"top": top or 20, "api_key": os.environ.get(KEY_VARIABLE)}
            server = ServerTeacher(teacher, str(server_model), tokenizer, **served)
            cache = cache_server(server, rows, folder, **shared)
        else:
            cache = cache_teacher(model, rows, folder, tokenizer=tokenizer, spec=spec, revision=revision, **shared)
    if trainer.is_world_process_zero():
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
