"""What one rank writes to a checkpoint, and how any number of ranks reads it back.

Everything is in global coordinates: the name of a weight and flat indices into it. A rank that reads takes
the entries of its own shards out of all the parts, whatever number of ranks wrote them.

part_00000.safetensors    `<table>.index` and `<table>.<column>`, flat over the table's weights; a table of
                          complete shards has no index;
                          `shared.<name>`: this rank's share of a tensor that all ranks held;
                          `own.<name>`: of this rank alone
                          metadata: `tables` (JSON): table -> weight -> number of entries
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from speft_ds.comm import collectives
from speft_ds.errors import UserError, shell
from speft_ds.io import parse_json, sha256_of, write_safetensors
from speft_ds.sparse.layout import EntryTable, ShardTable, index_dtype
from speft_ds.sparse.mask import INDEX_DTYPES, Mask
from speft_ds.training.checkpoint.folder import Checkpoint, part_name

SHARD_TABLES = ("whole", "closed")
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")  # by safetensors' names


@dataclass
class Snapshot:
    """All that the next step depends on, of this rank, between two steps.

    Attributes:
        tables: by name; each rank has its own entries.
        shared: flat tensors that every rank holds alike; each writes its share.
        own: tensors of this rank, of use to the same rank of as many ranks.
        facts: small, the same on every rank, as JSON holds it.
        whole: by name, of `SHARD_TABLES`; each rank has its own shards.
    """

    tables: dict[str, EntryTable]
    shared: dict[str, Tensor]
    own: dict[str, Tensor]
    facts: dict
    whole: dict[str, ShardTable] = field(default_factory=dict)

    def tensors(self, rank: int, world_size: int) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Copies on the CPU of what this rank writes, and the metadata of the file."""
        found = {f"own.{name}": tensor for name, tensor in self.own.items()}
        for name, tensor in self.shared.items():
            found[f"shared.{name}"] = tensor.tensor_split(world_size)[rank]
        counts = {}
        for name, table in self.tables.items():
            index = [*table.index.values()]
            found[f"{name}.index"] = torch.cat(index) if index else torch.empty(0, dtype=torch.int32)
            found |= {f"{name}.{key}": values for key, values in table.columns.items()}
            counts[name] = {weight: index.numel() for weight, index in table.index.items()}
        for name, table in self.whole.items():
            found |= {f"{name}.{key}": values for key, values in table.columns.items()}
            counts[name] = table.counts
        copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in found.items()}
        return copies, {"tables": json.dumps(counts)}


def write_part(
    folder: Path, rank: int, tensors: dict[str, Tensor], metadata: dict[str, str]
) -> dict[str, str | int]:
    """Write a rank's part, flushed and read back; returns its line of the manifest. Raises OSError."""
    path = folder / part_name(rank)
    write_safetensors(path, tensors, metadata)
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}


def header_problem(path: Path) -> str | None:
    """What the header of a part has that none of ours has, if anything. Reads no tensor."""
    try:
        with safe_open(path, framework="pt") as file:
            header = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - not iterable
            tables = parse_json((file.metadata() or {})["tables"])
            shapes = {key: view.get_shape() for key, view in header.items()}
            if odd := [key for key, view in header.items() if view.get_dtype() not in DTYPES]:
                raise ValueError(f"{odd[0]!r} is {header[odd[0]].get_dtype()}")
            if odd := [key for key in shapes if key.startswith("shared.") and len(shapes[key]) != 1]:
                raise ValueError(f"{odd[0]!r} is not flat")
            for table, counts in tables.items():
                if not all(type(count) is int and count >= 0 for count in counts.values()):
                    raise ValueError(f"{table!r} has no counts of entries")
                if table not in SHARD_TABLES and header[f"{table}.index"].get_dtype() not in INDEX_DTYPES:
                    raise ValueError(f"the indices of {table!r} are none")
                length = [sum(counts.values())]
                if odd := [key for key in shapes if key.startswith(f"{table}.") and shapes[key] != length]:
                    raise ValueError(f"{odd[0]!r} has the shape {shapes[odd[0]]}, not {length}")
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        return f"it is damaged: {path.name}: {error!s:.200}"
    return None


class Parts:
    """A checkpoint's parts, to read from; all ranks may.

    Hashes and headers were looked at (see `verify` and `header_problem`); indices are checked here.
    """

    def __init__(self, checkpoint: Checkpoint):
        self.facts = checkpoint.manifest["state"]
        self.paths = [checkpoint.path / part["file"] for part in checkpoint.manifest["parts"]]

    def has(self, table: str) -> bool:
        with safe_open(self.paths[0], framework="pt") as file:
            return table in parse_json(file.metadata()["tables"])

    def index(self, table: str) -> dict[str, Tensor]:
        """Weight -> all its sorted global indices, of all ranks."""
        pieces: dict[str, list[Tensor]] = {}
        for file, counts in self._files(table):
            flat = file.get_tensor(f"{table}.index")
            for name, piece in zip(counts, flat.split([*counts.values()]), strict=True):
                pieces.setdefault(name, []).append(piece)
        return {name: torch.cat(found) for name, found in pieces.items()}

    def table(self, table: str, spans: dict[str, tuple[int, int]]) -> EntryTable:
        """The entries within this rank's spans, weight -> [start, stop), and nothing of the others."""
        pieces: dict[str, dict[str, list[Tensor]]] = {}  # column, or `index` -> weight -> of each part
        nothing: dict[str, Tensor] = {}  # column -> none of it, which is all there is of a mask of no weight
        for file, counts in self._files(table):
            views = {name: file.get_slice(f"{table}.{name}") for name in _names_below(file, table)}
            if pieces and pieces.keys() != views.keys():
                raise self._damaged(f"its parts have other columns of {table}")
            nothing = {column: view[:0] for column, view in views.items()}
            pieces = pieces or {column: {weight: [] for weight in spans} for column in views}
            first = 0
            for name, count in counts.items():
                if name not in spans:
                    raise self._damaged(f"{table} has entries of {name}, which is no weight of this run")
                index = views["index"][first : first + count].to(torch.int64)
                edges = torch.tensor(spans[name], dtype=torch.int64)
                start, stop = torch.searchsorted(index, edges).tolist()
                for column, view in views.items():
                    pieces[column][name].append(view[first + start : first + stop])
                first += count
        index = pieces.pop("index", {})
        columns = {
            key: torch.cat([nothing[key], *(p for found in by.values() for p in found)])
            for key, by in pieces.items()
        }
        index = {
            name: self._checked(name, torch.cat(found), spans[name]) for name, found in index.items() if found
        }
        return EntryTable(index, columns)

    def shards(self, table: str, spans: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
        """Column -> what is within this rank's spans, weight -> [start, stop), laid end to end."""
        if set(self.weights(table)) != set(spans):
            raise self._damaged(f"{table} is of other weights than this run's")
        if not spans:
            return {}
        pieces: dict[str, dict[str, list[Tensor]]] = {}  # column -> weight -> of each part
        seen = dict.fromkeys(spans, 0)  # elements of a weight in the parts before
        for file, counts in self._files(table):
            first = 0
            for name, count in counts.items():
                start, stop = (min(max(edge - seen[name], 0), count) for edge in spans[name])
                for column in _names_below(file, table):
                    view = file.get_slice(f"{table}.{column}")
                    by_weight = pieces.setdefault(column, {weight: [] for weight in spans})
                    by_weight[name].append(view[first + start : first + stop])
                first += count
                seen[name] += count
        columns = {key: torch.cat([p for found in by.values() for p in found]) for key, by in pieces.items()}
        length = sum(stop - start for start, stop in spans.values())
        if odd := [key for key, column in columns.items() if column.numel() != length]:
            raise self._damaged(f"{table}.{odd[0]} has {columns[odd[0]].numel()} elements, not {length}")
        return columns

    def weights(self, table: str) -> list[str]:
        """The weights that a table is of; none where it is not there."""
        with safe_open(self.paths[0], framework="pt") as file:
            return list(parse_json(file.metadata()["tables"]).get(table, {}))

    def mask(self, table: str, shape: dict[str, tuple[int, int]]) -> Mask:
        """The mask whose entries a table has, weight -> (out, in). Raises UserError: it is another mask's."""
        index = self.index(table)
        if missing := shape.keys() - index.keys():
            raise self._damaged(f"it has no entries of {sorted(missing)[0]}: another mask's")
        for name, (rows, columns) in shape.items():
            self._checked(name, index[name], (0, rows * columns))
        device = collectives.device()
        return Mask({n: index[n].to(device, index_dtype(shape[n][0] * shape[n][1])) for n in shape}, shape)

    def shared(self, name: str) -> Tensor:
        """A tensor that all ranks held."""
        pieces = []
        for path in self.paths:
            with safe_open(path, framework="pt") as file:
                pieces.append(file.get_tensor(f"shared.{name}"))
        return torch.cat(pieces)

    def own(self, rank: int) -> dict[str, Tensor]:
        """What this rank wrote for itself."""
        with safe_open(self.paths[rank], framework="pt") as file:
            return {name: file.get_tensor(f"own.{name}") for name in _names_below(file, "own")}

    @contextmanager
    def refusing(self, *also: type[Exception]) -> Iterator[None]:
        """What is missing, or of another kind than expected, in the block is damage of the checkpoint."""
        try:
            yield
        except (OSError, SafetensorError, LookupError, TypeError, ValueError, AttributeError, *also) as error:
            raise self._damaged(f"{type(error).__name__}: {error}") from error

    def _checked(self, name: str, index: Tensor, span: tuple[int, int]) -> Tensor:
        """[n] indices, which increase strictly within [start, stop)."""
        start, stop = span
        is_within = not index.numel() or (int(index[0]) >= start and int(index[-1]) < stop)
        if not is_within or not (index[1:] > index[:-1]).all():
            raise self._damaged(f"the indices of {name} do not fit it")
        return index

    def _damaged(self, what: str) -> UserError:
        folder = self.paths[0].parent
        fix = f"go on from an older checkpoint: {shell('ls', folder.parent)}"
        return UserError(f"the checkpoint is damaged: {what}", str(folder), fix, can_go_on=False)

    def _files(self, table: str) -> Iterator[tuple[safe_open, dict[str, int]]]:
        """Every part, and how many entries of each weight its table has."""
        for path in self.paths:
            with safe_open(path, framework="pt") as file:
                yield file, parse_json(file.metadata()["tables"])[table]


def _names_below(file: safe_open, prefix: str) -> list[str]:
    """`<name>` of the file's tensors `<prefix>.<name>`."""
    names = [key.partition(".") for key in file.keys()]  # noqa: SIM118 - not iterable
    return [name for first, _, name in names if first == prefix]
