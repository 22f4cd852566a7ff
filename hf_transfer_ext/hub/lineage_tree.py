"""Where a model comes from: its record and those of its parents as a tree, in text, as JSON and as a picture.

Records carry those of their inputs. A parent whose record is not carried is looked up on the Hub by its commit, and
among folders by the digests of its files: a record names no folder of the machine that wrote it.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_transfer_ext.hub.privacy import public_text, public_value
from hf_transfer_ext.hub.record import (
    MAX_GENERATIONS,
    RECORD_FILE,
    RunInput,
    RunRecord,
    describe_input,
    digests_of,
    last_name,
    read_record,
)
from hf_transfer_ext.hub.table import save_figure
from hf_transfer_ext.measurement import Measurement
from hf_transfer_ext.settings import Setting, arguments_for
from hf_transfer_ext.weights.repository import Place, place_of

logger = logging.getLogger(__name__)

#: Limits of a tree, of its picture, and of the folders that are searched for records.
MAX_NODES, MAX_DRAWN, MAX_SEARCHED = 2000, 150, 20_000
#: Metrics that the text and the picture show for each node; JSON holds all of them.
SHOWN_METRICS = 6


@dataclass
class Node:
    """One model, adapter, data set or report.

    Args:
        name: Hub id, or the last component of a local path.
        role: What it is to the run below it ("teacher"); "" for the result whose lineage this is.
        job: What made it ("merging"); None where no record says so.
        recipe: The recipe or command that made it.
        created: When, UTC.
        revision: Commit on the Hub.
        sha256: File -> digest.
        metrics: What was measured of it: in its own run, later, or as an input of the run below it.
        digest: Digest of its record, by which a second mention refers to the first.
        source: How its record was found: "own", "carried by the record below", "the Hub", "a searched folder".
        note: What is missing, in a sentence; "" if nothing is.
        repeated: True where the same record stands in full elsewhere in the tree; `parents` is empty then.
        parents: What it was made from, in the order of the record.
    """

    name: str
    role: str = ""
    job: str | None = None
    recipe: str = ""
    created: str = ""
    revision: str | None = None
    sha256: dict[str, str] = field(default_factory=dict)
    metrics: list[Measurement] = field(default_factory=list)
    digest: str | None = None
    source: str = ""
    note: str = ""
    repeated: bool = False
    parents: list[Node] = field(default_factory=list)

    def __iter__(self) -> Iterator[Node]:
        """This node and all above it, this one first."""
        yield self
        for parent in self.parents:
            yield from parent

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        own = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("metrics", "parents")}
        found = public_value({**own, "metrics": [m.to_dict() for m in self.metrics]})
        return {**found, "parents": [parent.to_dict() for parent in self.parents]}


def lineage_tree(path_or_repo: str | Path, *, revision: str | None = None, search: Sequence[str | Path] = ()) -> Node:
    """The tree of everything that led to a model, adapter or report.

    Args:
        path_or_repo: Folder or Hub id, `repo@revision` and `repo:subfolder` allowed.
        revision: Branch, tag or commit of a repository.
        search: Folders and Hub ids among which parents are looked for whose record is not carried. A folder counts
            only if its files have the digests that the record states.

    Raises:
        FileNotFoundError: There is no such folder or repository.
        ValueError: The record of `path_or_repo` is malformed. (A malformed record of a parent is a note in the tree.)
    """
    builder, is_local = _Builder(search), Path(path_or_repo).exists()
    try:
        record = read_record(path_or_repo, revision=revision)
    except FileNotFoundError:
        node = builder.of_input(describe_input(path_or_repo, revision), None, ())
        node.role = ""
        return node
    place = place_of(path_or_repo, revision)
    name = last_name(path_or_repo) if is_local else str(Place(place.path, None, place.subfolder))
    node = builder.of_record(name, "", record, (), "own")
    if not is_local:
        node.revision = describe_input(path_or_repo, revision).revision
    return node


class _Builder:
    """Builds nodes; each record once, however many ways lead to it."""

    def __init__(self, search: Sequence[str | Path]) -> None:
        self.search, self.index = list(search), None
        self.seen: dict[str, Node] = {}
        self.count = 0
        self.found: dict[int, str] = {}

    index: dict[str, list[tuple[Path | str, RunRecord]]] | None

    def of_record(self, name: str, role: str, record: RunRecord, above: tuple[str, ...], source: str) -> Node:
        digest = record.digest()
        node = Node(name, role, record.job, record.recipe, record.created, sha256=dict(record.result), digest=digest)
        node.metrics, node.source = list(record.metrics), source
        self.count += 1
        if digest in self.seen:
            node.repeated = True
            return node
        self.seen[digest] = node
        if len(above) >= MAX_GENERATIONS:
            node.note = f"Its parents are not shown: the tree goes back more than {MAX_GENERATIONS} generations."
            return node
        for number, item in enumerate(record.inputs):
            if self.count >= MAX_NODES:
                left = len(record.inputs) - number
                node.note = f"{left} of its inputs are not shown: the tree has {MAX_NODES} entries."
                break
            node.parents.append(self.of_input(item, record, (*above, digest)))
        return node

    def of_input(self, item: RunInput, child: RunRecord | None, above: tuple[str, ...]) -> Node:
        found, source, problem = self._record_of(item, above)
        if found is not None:
            node = self.of_record(item.name, item.role, found, above, source)
        else:
            self.count += 1
            node = Node(item.name, item.role, note=problem)
            for base in item.base_model:
                if self.count < MAX_NODES:
                    self.count += 1
                    node.parents.append(Node(base, "base", note="Named by the card alone."))
        node.revision, node.sha256 = item.revision, dict(item.sha256)
        if child is not None:
            node.metrics += _measured_below(item, child, {m.name for m in node.metrics})
        return node

    def _record_of(self, item: RunInput, above: tuple[str, ...]) -> tuple[RunRecord | None, str, str]:
        """(record, where it was found, what is missing). A record that is being built below is not its own parent."""
        local, problem = self._searched(item, above)
        if local is not None:
            return local, "a searched folder", ""
        if item.record is not None:
            return item.record, "carried by the record below", ""
        if item.role == "dataset":
            return None, "", ""
        if item.on_hub:
            try:
                found = read_record(item.name, revision=item.revision)
                if found.digest() not in above:
                    return found, "the Hub", ""
                return None, "", "Its record on the Hub is that of its own descendant."
            except FileNotFoundError:
                return None, "", problem
            except ValueError as error:
                return None, "", f"Its record cannot be read: {error}"
        if not item.sha256:
            return None, "", "No digest of its files is known."
        return None, "", problem or "No record of it is known."

    def _searched(self, item: RunInput, above: tuple[str, ...]) -> tuple[RunRecord | None, str]:
        if not item.sha256 or not self.search:
            return None, ""
        if self.index is None:
            self.index = _records_by_digest(self.search)
        wanted = set(item.sha256.values())
        candidates = self.index.get(next(iter(item.sha256.values())), [])
        problem = ""
        for place, record in candidates:
            if not wanted <= set(record.result.values()):
                continue
            if record.digest() in above:
                problem = "A searched folder holds the same files, but its record is that of a descendant."
                continue
            if isinstance(place, Path) and not wanted <= set(digests_of(place).values()):
                problem = f"The folder {place.name!r} has another content than its record says."
                continue
            return record, ""
        return None, problem or "No searched folder holds its files with a record."


def _records_by_digest(search: Sequence[str | Path]) -> dict[str, list[tuple[Path | str, RunRecord]]]:
    """Digest of a file -> folders and repositories whose record lists it, newest record first."""
    found: dict[str, list[tuple[Path | str, RunRecord]]] = {}
    for place in (one for start in search for one in _places(start)):
        try:
            record = read_record(place)
        except (ValueError, OSError) as error:
            logger.warning("%s It is not searched.", error)
            continue
        for digest in set(record.result.values()):
            found.setdefault(digest, []).append((place, record))
    for records in found.values():
        records.sort(key=lambda one: one[1].created, reverse=True)
    return found


def _places(start: str | Path) -> Iterator[Path | str]:
    """Folders below `start` that hold a record; a Hub id as it is. Links are not followed."""
    if not Path(start).is_dir():
        yield str(start)
        return
    visited = 0
    for folder, below, files in os.walk(start):
        visited += 1
        if visited > MAX_SEARCHED:
            raise ValueError(f"`search` names {str(start)!r}, which has more than {MAX_SEARCHED} folders. Name fewer.")
        below[:] = sorted(name for name in below if not name.startswith("."))
        if RECORD_FILE in files:
            yield Path(folder)


def _measured_below(item: RunInput, child: RunRecord, known: set[str]) -> list[Measurement]:
    """What the run that read an input measured of it: under its role or name, or "before" for its only model."""
    models = [one for one in child.inputs if one.role != "dataset"]
    names = [item.role, item.name, *(["before"] if models == [item] else [])]
    found = next((child.compared[name] for name in names if name in child.compared), [])
    return [m for m in found if m.name not in known]


def tree_text(node: Node) -> str:
    """The tree in lines, the result first and what it was made from below it, with the metrics at each node."""
    return "\n".join(_lines(node, "", ""))


def _lines(node: Node, first: str, rest: str) -> Iterator[str]:
    yield first + _heading(node)
    inner = rest + ("│  " if node.parents else "   ")
    for text in _facts(node):
        yield inner + text
    for number, parent in enumerate(node.parents):
        last = number == len(node.parents) - 1
        yield from _lines(parent, rest + ("└─ " if last else "├─ "), rest + ("   " if last else "│  "))


def _heading(node: Node) -> str:
    role = f"{one_line_of(node.role)}: " if node.role else ""
    revision = f"@{one_line_of(node.revision)[:12]}" if node.revision else ""
    made = f" ({one_line_of(node.job)}, {one_line_of(node.created)[:10]})" if node.job else ""
    return f"{role}{one_line_of(node.name)}{revision}{made}{', shown above' if node.repeated else ''}"


def _facts(node: Node) -> list[str]:
    """The lines under a node's name: its metrics, and what is not known of it."""
    shown = [_metric(m) for m in node.metrics[:SHOWN_METRICS]]
    more = len(node.metrics) - len(shown)
    return [
        *shown,
        *([f"and {more} more metrics"] if more > 0 else []),
        *([one_line_of(node.note)] if node.note else []),
    ]


def _metric(m: Measurement) -> str:
    interval = f" [{m.interval[0]:.4g}, {m.interval[1]:.4g}]" if m.interval else ""
    return f"{one_line_of(m.name)} {m.value:.4g}{interval} {_direction(m)} {one_line_of(m.unit)}"


def _direction(m: Measurement) -> str:
    return "↑" if m.higher_is_better else "↓"


def one_line_of(text: str) -> str:
    """Text of a foreign record for a terminal: no secrets or paths, no control characters, at most 120 characters."""
    line = " ".join(public_text(str(text)[:1000]).split())
    return "".join(c if c.isprintable() else "?" for c in line)[:120]


def draw_tree(node: Node, path: str | Path) -> Path:
    """Write the tree as a picture, `.svg` or `.png`: parents on the left, the result on the right.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: Another ending, or more than MAX_DRAWN nodes.
    """
    path = Path(path)
    if path.suffix.lower() not in (".svg", ".png"):
        raise ValueError(f"A picture is written as .svg or .png, and {path.name!r} is neither.")
    boxes, arrows = _boxes(node)
    if len(boxes) > MAX_DRAWN:
        raise ValueError(f"The tree has {len(boxes)} nodes, and up to {MAX_DRAWN} are drawn. Use --json.")
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("The picture needs matplotlib: pip install 'hf_transfer_ext[demo]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns: dict[int, list[str]] = {}
    for key, (depth, _) in boxes.items():
        columns.setdefault(depth, []).append(key)
    deepest, tallest = max(columns), max(map(len, columns.values()))
    heights = {key: 1 + len(lines) for key, (_, lines) in boxes.items()}
    figure, axis = pyplot.subplots(figsize=(3.4 * (deepest + 1), 0.5 + 0.19 * max(heights.values()) * tallest + 0.5))
    axis.set_xlim(-0.1, deepest + 1)
    axis.set_ylim(0, 1)
    axis.axis("off")
    at = {
        key: (deepest - depth, 1 - (row + 0.5) / len(keys))
        for depth, keys in columns.items()
        for row, key in enumerate(keys)
    }
    for key, (_, lines) in boxes.items():
        axis.text(
            *at[key], "\n".join(lines), fontsize=7, va="center", ha="left", parse_math=False, linespacing=1.4,
            bbox={"boxstyle": "round,pad=0.4", "facecolor": "white", "edgecolor": "#2f6fb2"}, zorder=2,
        )  # fmt: skip
    for child, parent, role in arrows:
        (x, y), (end_x, end_y) = at[parent], at[child]
        axis.annotate(
            "", (end_x - 0.02, end_y), (x + 0.02, y), zorder=1, arrowprops={"arrowstyle": "->", "color": "#5b6675"}
        )
        axis.text(end_x - 0.04, end_y + (y - end_y) * 0.06, role, fontsize=6, ha="right", parse_math=False, zorder=3)
    return save_figure(figure, path)


def _boxes(root: Node) -> tuple[dict[str, tuple[int, list[str]]], list[tuple[str, str, str]]]:
    """(key -> generation and lines of text of each thing once, arrows (child, parent, role)), from the tree."""
    boxes: dict[str, tuple[int, list[str]]] = {}
    arrows: list[tuple[str, str, str]] = []

    def add(node: Node, depth: int) -> str:
        files = json.dumps([node.name, node.revision, sorted(node.sha256.values())])
        key = node.digest or files
        if key not in boxes or not node.repeated:
            lines = [_cut(one_line_of(node.name)), *([one_line_of(node.job or "")] if node.job else [])]
            for m in node.metrics[:SHOWN_METRICS]:
                lines.append(f"{_cut(one_line_of(m.name), 34)} {m.value:.4g} {_direction(m)}")
            boxes[key] = depth, lines
        for parent in node.parents:
            arrow = key, add(parent, depth + 1), one_line_of(parent.role)[:20]
            if arrow not in arrows:
                arrows.append(arrow)
        return key

    add(root, 0)
    for _ in boxes:  # the longest way to the result: each parent stands left of all that was made from it
        for child, parent, _ in arrows:
            boxes[parent] = max(boxes[parent][0], boxes[child][0] + 1), boxes[parent][1]
    return boxes, arrows


def _cut(text: str, length: int = 40) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def lineage(
    path_or_repo: str,
    *,
    revision: str | None = None,
    search: list[str] | None = None,
    picture: str | None = None,
) -> Node:
    """The tree of a model, and a picture of it where one is wanted.

    Args:
        path_or_repo: Folder or Hub id; `repo@revision` and `repo:subfolder` too.
        revision: Branch, tag or commit of a repository.
        search: Folders and Hub ids in which parents are looked for by the digests of their files.
        picture: Also write a picture to this file, .svg or .png.
    """
    node = lineage_tree(path_or_repo, revision=revision, search=search or ())
    if picture is not None:
        draw_tree(node, picture)
    return node


def main(argv: list[str] | None = None) -> int:
    """`hf-transfer-ext lineage PATH_OR_REPO`."""
    arguments = arguments_for(
        lineage,
        argv,
        program="hf-transfer-ext lineage",
        about="Show where a model comes from: its parents and theirs, what made each, and what was measured.",
        extra=[Setting("json", bool, False, "Print JSON with all metrics and digests instead of the tree.")],
    )
    as_json = arguments.pop("json", False)
    node = lineage(**arguments)
    print(json.dumps(node.to_dict(), indent=2) if as_json else tree_text(node))
    return 0
