"""The models of an audit, those that it trains without the forget set, and the folder of what it finished."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator, PartialState

from hf_transfer_ext.evals.audit.subject import AuditData, Subject
from hf_transfer_ext.evals.baselines import BASELINES
from hf_transfer_ext.evals.engine.cache import digest, model_fingerprint
from hf_transfer_ext.hub.finish import finish_run
from hf_transfer_ext.hub.record import RunRecord
from hf_transfer_ext.models.loading import load_model
from hf_transfer_ext.recipes.run import load_named
from hf_transfer_ext.trainers.taught import taught, teaching_arguments


def work_of(out: str | Path) -> Path:
    """The folder beside a report for finished attacks and the retrained model: an audit that was killed reads them."""
    return Path(f"{Path(out)}.audit")


def subjects_of(
    roles: Mapping[str, str | None],
    job: Any,
    record: RunRecord,
    data: AuditData,
    template: Any,
    accelerator: Accelerator,
    tell: Callable[[str], None],
) -> dict[str, Subject]:
    """Role -> the model that plays it, loaded, or trained here where it is the model of `retrain_from`.

    Args:
        roles: Role -> name of a model; None and the names of baselines are left out.
    """
    subjects = {}
    for role, name in roles.items():
        if name is None or name in BASELINES:
            continue
        loaded = load_named(name, record, role, dtype=job.dtype, device=accelerator.device)
        found = Subject(*loaded, template, job.max_new_tokens, job.batch_size, accelerator, job.seed)
        if name == job.retrain_from and role in ("retrained", "shadow"):
            tell(f"training the {role} model without the forget set")
            how: Any = {"epochs": job.retrain_epochs, "learning_rate": job.retrain_learning_rate}
            how |= {"out": Path(job.output_dir), "seed": job.seed + (role == "shadow")}
            found.model = retrained(role, record, *loaded, data.retain, template, **how)
        subjects[role] = found
    return subjects


def retrained(
    role: str,
    record: RunRecord,
    model: Any,
    tokenizer: Any,
    rows: Any,
    template: Any,
    *,
    out: Path,
    epochs: float,
    learning_rate: float,
    seed: int,
) -> Any:
    """`model` fine-tuned on the retain set, saved beside the report: a second audit may name it in this role.

    Args:
        role: retrained or shadow, which is also the name of its folder.
        out: Folder of the report. In `work_of` it, the model is kept under the digest of all that it depends on, and
            loaded from there where an audit goes on.
    """
    how: dict[str, Any] = {"epochs": epochs, "learning_rate": learning_rate, "seed": seed}
    folder = work_of(out) / f"retrained-{digest([model_fingerprint(model), repr(rows), how, repr(template)])[:16]}"
    quiet = {"disable_tqdm": True, "logging_strategy": "no", "use_cpu": model.device.type == "cpu"}
    device = model.device
    if not (folder / "config.json").is_file():
        args = teaching_arguments(folder, **how, **quiet)
        taught(model, tokenizer, rows, args, lora_rank=None, template=template, folder=folder)
    model = load_model(folder, dtype=model.dtype).to(device)  # the same one in the first and in a resumed audit
    if PartialState().is_main_process:
        own = replace(record, job="fine-tuning", inputs=record.inputs[-1:])
        finish_run(out / role, own, model=model, tokenizer=tokenizer, overwrite=True, quiet=True)
    return model.eval()
