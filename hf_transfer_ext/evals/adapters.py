"""Load several adapters on one base model, to evaluate them side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_transfer_ext.models.loading import checked_adapter
from hf_transfer_ext.reading import one_line


def with_adapters(model: Any, folders: Sequence[str | Path]) -> tuple[Any, dict[str, str]]:
    """Load all adapters onto one model; the base model is loaded only once.

    Returns:
        The `PeftModel`, and label -> adapter name for `evaluate(adapter=...)`: "base" first, then each adapter by the
        name of its folder.

    Raises:
        ValueError: Two folders have the same name, or an adapter does not fit the base model.
    """
    from peft import PeftModel

    names = [Path(folder).name.replace(".", "-") for folder in folders]
    if len(set(names)) < len(names) or "base" in names:
        raise ValueError(f"Adapter folders need distinct names, and none may be named 'base'; got {', '.join(names)}.")
    for folder, name in zip(folders, names, strict=True):
        try:
            if hasattr(model, "peft_config"):
                model.load_adapter(str(checked_adapter(folder, model)), adapter_name=name)
            else:
                model = PeftModel.from_pretrained(model, str(checked_adapter(folder, model)), adapter_name=name)
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"Adapter {str(folder)!r} does not fit {model.config.name_or_path!r}: {one_line(error)} "
                "Its adapter_config.json names the base model that it was trained on."
            ) from error
    return model.eval(), {"base": "base", **{name: name for name in names}}
