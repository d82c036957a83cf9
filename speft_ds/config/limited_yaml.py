"""YAML of recipes, run folders and tasks, within limits: bytes, depth, and size with every alias expanded."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import yaml
from yaml import events

from speft_ds.io import read_bytes

MAX_BYTES = 2**18
MAX_DEPTH = 50
MAX_NODES = 20_000  # keys, values, lists and mappings, those of an alias as often as it is used
MAX_NUMBER = 100  # characters of a number
TEXT = "tag:yaml.org,2002:str"
_START, _END = events.CollectionStartEvent, events.CollectionEndEvent


class Loader(yaml.SafeLoader):
    """YAML without dates: a run folder called 2026-01-31 is a text."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_number(self, node: yaml.Node) -> int | float:
        """A number; Python takes time and memory for one of many digits."""
        if len(node.value) > MAX_NUMBER:
            what = f"a number of more than {MAX_NUMBER} characters"
            raise yaml.constructor.ConstructorError(None, None, what, node.start_mark)
        is_int = node.tag.endswith(":int")
        return self.construct_yaml_int(node) if is_int else self.construct_yaml_float(node)


for _kind in ("int", "float"):
    Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", Loader.construct_number)


def read_yaml(path: Path) -> Any:
    """The document in a YAML file. Raises as `read_text` and `load`."""
    return load(read_text(path))


def read_text(path: Path) -> str:
    """The text of a YAML file.

    Raises:
        OSError: as `io.read_bytes`; it is larger than MAX_BYTES.
        ValueError: it is not UTF-8.
    """
    return read_bytes(path, MAX_BYTES).decode("utf-8")


def load(text: str) -> Any:
    """The document in a text, of plain values only.

    Raises:
        yaml.YAMLError: it is no YAML, or not within the limits; with `problem_mark` where the place is known.
        ValueError: a value in it cannot be read.
    """
    return load_with_nodes(text)[1]


def load_with_nodes(text: str) -> tuple[yaml.Node | None, Any]:
    """The document in a text, first as nodes with their lines; raises as `load`."""
    check_limits(text)
    loader = Loader(text)
    root = loader.get_single_node()
    return root, None if root is None else loader.construct_document(root)


@dataclass
class _Collection:
    """A list or mapping on its way through the parser: nodes so far, and how deep they go."""

    anchor: str | None
    num_nodes: int = 1
    depth: int = 1


def check_limits(text: str, tags: Collection[str] = (), loader: type = yaml.SafeLoader) -> None:
    """Refuse, before anything is built of it, what is too deep or too large, and unknown tags.

    Args:
        tags: those that are known, besides `!!str`.
        loader: parses the text.
    Raises:
        yaml.YAMLError: also where the text is no YAML.
    """
    found: dict[str, tuple[int, int]] = {}  # anchor -> nodes and depth of what it stands for
    open_ones = [_Collection(None)]
    for event in yaml.parse(text, loader):
        tag = getattr(event, "tag", None)
        if tag not in (None, "!", TEXT, *tags):
            raise _refused(f"the tag {tag!r:.50} is not known here", event)
        if isinstance(event, _START):
            open_ones.append(_Collection(event.anchor))
            # Until it ends, an alias to it would be a part of itself.
            found.pop(event.anchor, None)
        elif isinstance(event, _END):
            done = open_ones.pop()
            found[done.anchor] = done.num_nodes, done.depth
            _add(open_ones, done.num_nodes, done.depth, event)
        elif isinstance(event, events.ScalarEvent):
            if event.value.encode(errors="replace").decode() != event.value:
                raise _refused("a text that is not Unicode", event)
            found[event.anchor] = 1, 0
            _add(open_ones, 1, 0, event)
        elif isinstance(event, events.AliasEvent):
            if event.anchor not in found:
                raise _refused(
                    f"the alias *{event.anchor!s:.50} stands for nothing, or for a part of itself", event
                )
            _add(open_ones, *found[event.anchor], event)
        if len(open_ones) > MAX_DEPTH:
            raise _refused(f"it is nested more than {MAX_DEPTH} deep", event)


def _add(open_ones: list[_Collection], num_nodes: int, depth: int, event: yaml.Event) -> None:
    """Count a node that is complete in the collection around it."""
    around = open_ones[-1]
    around.num_nodes += num_nodes
    around.depth = max(around.depth, depth + 1)
    if len(open_ones) + depth > MAX_DEPTH:
        raise _refused(f"with its aliases it is nested more than {MAX_DEPTH} deep", event)
    if sum(each.num_nodes for each in open_ones) > MAX_NODES:
        raise _refused(f"with its aliases it has more than {MAX_NODES:,} values", event)


def _refused(problem: str, event: yaml.Event) -> yaml.YAMLError:
    return yaml.composer.ComposerError(None, None, problem, event.start_mark)
