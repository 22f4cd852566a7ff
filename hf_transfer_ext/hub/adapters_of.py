"""`hf-transfer-ext adapters BASE`: the adapters of a base model on the Hub, by the tag that their cards give them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from hf_transfer_ext.hub.lineage_tree import one_line_of
from hf_transfer_ext.reading import one_line
from hf_transfer_ext.settings import Setting, arguments_for
from hf_transfer_ext.weights.repository import connection_error, place_of


@dataclass(frozen=True)
class Adapter:
    """An adapter on the Hub.

    Args:
        repo_id: Its repository.
        tags: All of its tags.
        private, gated: Whether its files need a token, or the acceptance of terms.
        downloads, likes: As the Hub counts them.
        changed: Date of the last commit, ISO 8601; "" if the Hub does not say.
    """

    repo_id: str
    tags: tuple[str, ...]
    private: bool
    gated: bool
    downloads: int
    likes: int
    changed: str


def adapters_of(
    base: str,
    *,
    tags: list[str] | None = None,
    author: str | None = None,
    search: str | None = None,
    limit: int = 100,
    token: str | None = None,
) -> list[Adapter]:
    """List the adapters whose card names a base model, private ones that the token may see included.

    Args:
        base: Hub id of the base model.
        tags: Only adapters that have all of these tags too, such as `hf_transfer_ext`, `unlearning` or `license:mit`.
        author: Only those of this user or organization.
        search: Only those with this in their name.
        limit: At most so many, >= 1.
        token: Access token; None takes the one of `hf auth login` or of HF_TOKEN.

    Raises:
        ValueError: `base` is not a Hub id.
        ConnectionError: The Hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    place = place_of(base)
    if place.path.count("/") > 1 or place.subfolder or place.revision or base.startswith((".", "/", "~")):
        raise ValueError(f"`base` has to be the id of a model on the Hub, such as org/model, got {base!r}.")
    if limit < 1:
        raise ValueError(f"`limit` must be at least 1, got {limit}.")
    wanted = [f"base_model:adapter:{place.path}", *(tags or [])]
    try:
        found = list(HfApi(token=token).list_models(filter=wanted, author=author, search=search, limit=limit))
    except (HfHubHTTPError, connection_error(), OSError) as error:
        raise ConnectionError(f"The adapters of {base!r} cannot be listed: {one_line(error)}") from error
    return [
        Adapter(
            repo_id=info.id,
            tags=tuple(info.tags or ()),
            private=bool(info.private),
            gated=bool(info.gated),
            downloads=info.downloads or 0,
            likes=info.likes or 0,
            changed=info.last_modified.isoformat(timespec="seconds") if info.last_modified else "",
        )
        for info in found
    ]


def listed(adapters: list[Adapter]) -> str:
    """One line for each adapter."""
    if not adapters:
        return "None found."
    width = max(len(one_line_of(one.repo_id)) for one in adapters)
    lines = []
    for one in adapters:
        own = [tag for tag in one.tags if ":" not in tag]
        access = [name for name in ("private", "gated") if getattr(one, name)]
        text = f"{one_line_of(one.repo_id).ljust(width)}  {one.changed[:10]:<10}  {one.downloads:>8} downloads  "
        lines.append(text + one_line_of(", ".join([*access, *own])))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """`hf-transfer-ext adapters BASE`."""
    arguments: dict[str, Any] = arguments_for(
        adapters_of,
        argv,
        program="hf-transfer-ext adapters",
        about="List the adapters of a base model on the Hub.",
        hidden=["token"],
        extra=[Setting("json", bool, False, "Print JSON.")],
    )
    as_json = arguments.pop("json", False)
    found = adapters_of(**arguments)
    print(json.dumps([asdict(one) for one in found], indent=2) if as_json else listed(found))
    return 0
