"""Images of data sets: PIL images, bytes, or paths that stay within the folder of the data."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
from datasets import Image as ImageFeature
from huggingface_hub import constants

from hf_transfer_ext.files import path_inside
from hf_transfer_ext.reading import one_line


def undecoded(dataset: Any) -> Any:
    """A data set whose columns of images give `{"bytes", "path"}` instead of opening any path that a file names."""
    features = getattr(dataset, "features", None) or {}
    for column, feature in features.items():
        raw = _undecoded(feature)
        if raw != feature:
            dataset = dataset.cast_column(column, raw)
    return dataset


def _undecoded(feature: Any) -> Any:
    """A type of `datasets` with every image in it left as it is stored."""
    if isinstance(feature, ImageFeature):
        return ImageFeature(decode=False)
    if isinstance(feature, dict):
        return {name: _undecoded(inner) for name, inner in feature.items()}
    if isinstance(feature, list):
        return [_undecoded(inner) for inner in feature]
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        return type(feature)(_undecoded(feature.feature))
    return feature


def open_image(image: Any, folder: str | Path | None = None) -> Any:
    """An image of a row as an upright RGB image of PIL.

    Args:
        image: A PIL image, `{"bytes", "path"}` as `datasets` stores it, or a path.
        folder: Folder of the data, which paths are relative to.

    Raises:
        ValueError: It is none of these, cannot be read as an image, or its path leads out of the folder.
    """
    from PIL import Image, ImageOps

    found = image
    if isinstance(image, Mapping):
        stored = image.get("bytes")
        found = BytesIO(stored) if stored is not None else _stored_path(image.get("path"), folder)
    elif isinstance(image, (str, Path)):
        found = _path_of(str(image), folder)
    elif not isinstance(image, Image.Image):
        raise ValueError(
            f"An image has to be a PIL image, a path, or a mapping with `bytes` or `path`; got {type(image).__name__}."
        )
    try:
        opened = found if isinstance(found, Image.Image) else Image.open(found)
        return ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        shown = found if isinstance(found, Path) else type(image).__name__
        raise ValueError(f"The image {str(shown)!r} cannot be read: {one_line(error)}") from error


def _path_of(path: str, folder: str | Path | None) -> Path:
    if "://" in path:
        raise ValueError(f"The image {path!r} is an address, and nothing is fetched. Download it beside the data.")
    if folder is None:
        raise ValueError(
            f"The image {path!r} is a path. Say which folder such paths are relative to: `image_folder` in "
            "`task_options`."
        )
    return path_inside(folder, path)


def _stored_path(path: str | None, folder: str | Path | None) -> Path:
    """The path of a column of images, which `datasets` makes absolute: in the folder of the data, or in its cache."""
    if path is None:
        raise ValueError("An image has neither `bytes` nor `path`.")
    if not Path(path).is_absolute():
        return _path_of(path, folder)
    config = datasets.config
    caches = (constants.HF_HUB_CACHE, config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH)
    roots = [Path(root).resolve() for root in (folder, *caches) if root is not None]
    if not any(Path(path).resolve().is_relative_to(root) for root in roots):
        raise ValueError(
            f"The image {path!r} is neither in the folder of the data ({str(folder)!r}) nor in the cache of "
            "downloads; refused. Set `image_folder` in `task_options`, or store the images in the data set itself."
        )
    return Path(path)
