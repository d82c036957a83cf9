"""What was trained, what it weighs, on what it ran and how to do it again, as sections of a report."""

from __future__ import annotations

import shlex

import yaml

from speft_ds.config.mask_config import MASK_FILE
from speft_ds.errors import UserError
from speft_ds.report.document import Block, Code, Folded, Picture, Section, Table, Text
from speft_ds.report.pictures import heat_map
from speft_ds.report.run import ADAPTER, Run, is_number, look_up, size_of
from speft_ds.report.training_sections import starts_block
from speft_ds.training.run_dir import RECIPE

MOST_CHANGES = 12


def mask_section(run: Run) -> Section:
    """What was trained, and where in the model it lies."""
    mask = run.fact("mask", dict)
    blocks: list[Block] = []
    if mask is None:
        blocks.append(Text("run.json says nothing of the mask: it is written at the end of a run."))
    else:
        blocks.append(Table(("mask", ""), _mask_rows(run, mask)))
        blocks += _changes(mask)
    blocks += _map(run)
    return Section("What was trained", blocks)


def _mask_rows(run: Run, mask: dict) -> list[tuple[str, str]]:
    rows = []
    trained, targets = mask.get("num_trainable"), mask.get("num_target_elements")
    if is_number(trained) and is_number(targets) and targets:
        rows.append(("trained entries", f"{trained:,} of {targets:,} ({trained / targets:.4%})"))
    keys = (
        "salience",
        "granularity",
        "budget",
        "schedule",
        "layer_gate",
        "loaded_from",
        "calibration_samples",
    )
    rows += [(key.replace("_", " "), str(mask[key])) for key in keys if mask.get(key) is not None]
    if head := run.fact("head", int):
        rows.append(("head, trained whole", f"{head:,} weights"))
    if shares := mask.get("entries_by_rank"):
        rows.append(("entries by rank", str(shares)))
    rows.append(("sha256", str(mask.get("sha256", "unknown"))[:16]))
    return rows


def _changes(mask: dict) -> list[Block]:
    """How the mask changed during training."""
    changes = [change for change in look_up(mask, "changes", list) or [] if isinstance(change, dict)]
    if not changes:
        return []
    keys = [key for key in changes[-1] if key != "sha256" and is_number(changes[-1][key])]
    rows = [tuple(_cell(change.get(key)) for key in keys) for change in changes]
    table = Table([key.replace("_", " ") for key in keys], rows[-MOST_CHANGES:])
    title = f"the mask changed {len(changes)} times" + (
        f"; the last {MOST_CHANGES}" if len(changes) > MOST_CHANGES else ""
    )
    return [Folded(title, [table])]


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _map(run: Run) -> list[Block]:
    """The heat map of the adapter's entries, or of the mask that was only selected."""
    try:
        if (run.folder / ADAPTER).is_dir():
            mask, what = _adapter_mask(run), "entries that the adapter holds"
        elif (run.folder / MASK_FILE).is_file():
            from speft_ds.sparse.mask import read_mask  # late: it imports torch

            mask, what = read_mask(run.folder / MASK_FILE)[0], "entries of the selected mask"
        else:
            return [Text("There is no adapter and no mask in the folder, so no map of them.")]
    except UserError as error:
        return [Text(f"No map of the mask: {error.what}.")]
    if not mask.shape:
        return [Text("The adapter holds no entry, so there is no map of them.")]
    picture = Picture("mask.png", heat_map(mask, f"{run.name}: {what}"), f"{what}, by layer and module")
    how = f"How: {what}, over the elements of the weights that have any, by decoder layer and module."
    return [picture, Text(how, is_small=True)]


def _adapter_mask(run: Run):
    """The adapter's mask, as far as a picture needs it: how many entries each weight has."""
    import torch

    from speft_ds.adapter.format import Adapter
    from speft_ds.sparse.mask import Mask

    adapter = Adapter.open(run.folder / ADAPTER)
    # Tensors of the right length without contents: no index has to be read and decoded.
    index = {
        name: torch.empty(adapter.count(name), dtype=torch.int64, device="meta") for name in adapter.names
    }
    return Mask(index, {name: tuple(adapter.shape[name]) for name in adapter.names})


def sizes_section(run: Run) -> Section:
    rows = []
    if run.adapter_bytes:
        entries = run.adapter.get("num_entries") or run.fact("mask.num_trainable", int)
        each = f", {run.adapter_bytes / entries:.2f} bytes an entry" if is_number(entries) and entries else ""
        rows.append(("adapter", f"{in_bytes(run.adapter_bytes)}{each}"))
    else:
        rows.append(("adapter", "there is none"))
    for checkpoint in run.checkpoints:
        size = in_bytes(size_of(checkpoint.path))
        rows.append((checkpoint.path.name, size if checkpoint.problem is None else f"{size}, does not count"))
    if not run.checkpoints:
        rows.append(("checkpoints", "none kept"))
    rows.append(("metrics.jsonl", f"{len(run.lines):,} lines"))
    return Section("Sizes", [Table(("file", ""), rows)])


def memory_section(run: Run) -> list[Section]:
    """What a rank held while it trained, and what it sent in a step; nothing for runs that did not count."""
    memory, sent = run.account.get("memory"), run.account.get("sent")
    if not memory:
        return []
    rows = [(kind, in_bytes(size)) for kind, size in memory.items() if size]
    blocks: list[Block] = [Table(("held by a rank", ""), [*rows, ("peak", in_bytes(sum(memory.values())))])]
    if sent and any(sent.values()):
        rows = [(kind, in_bytes(size)) for kind, size in sent.items()]
        blocks.append(Table(("sent by a rank in a step", ""), rows))
    how = (
        "How: of the rank that held most while training. Buffers are counted as they were allocated, "
        "weights as they were gathered in the last step; what is left of the peak is activations and all "
        "else. A rank sends as on a ring."
    )
    return [Section("Memory and traffic", [*blocks, Text(how, is_small=True)])]


def in_bytes(number: float) -> str:
    """`4.1 MiB`."""
    for unit in ("bytes", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} bytes" if unit == "bytes" else f"{number:.2f} {unit}"
        number /= 1024
    return f"{number:.2f} GiB"


def machine_section(run: Run) -> Section:
    """Versions and machine, and how often the run was started."""
    rows = [(name, str(value)) for name, value in (run.fact("versions", dict) or {}).items()]
    blocks: list[Block] = []
    machine = {"ranks": run.fact("world_size"), **(run.fact("machine", dict) or {})}
    machine["sparse gradient by"] = ", ".join(map(str, run.fact("sparse_backends", list) or []))
    machine["base"] = run.fact("base.name_or_path") or run.setting("model.name_or_path")
    machine["fingerprint of the base"] = (run.fact("base.fingerprint", str) or "")[:16]
    shown = [
        (name.replace("_", " "), str(value)) for name, value in machine.items() if value not in (None, "")
    ]
    blocks += [Table(("machine", ""), shown)] if shown else []
    blocks += [Table(("version", ""), rows)] if rows else [Text("run.json has no versions.")]
    starts = starts_block(run)
    return Section("Machine and versions", [*blocks, *([starts] if starts else [])])


def reproduce_section(run: Run) -> Section:
    """The commands, and the recipe with every default filled in."""
    ranks, folder = run.fact("world_size", int) or 1, run.folder.as_posix()
    on_cpu = "DS_ACCELERATOR=cpu " if run.fact("machine.device") == "cpu" else ""
    start = f"{on_cpu}deepspeed --num_gpus {ranks}"
    recipe, again = shlex.quote(f"{folder}/{RECIPE}"), shlex.quote(f"output_dir={folder}-again")
    commands = [
        f"{start} launch/train.py --recipe {recipe} {again}",
        f"{start} launch/evaluate.py --run {shlex.quote(folder)}",
        f"speft report {shlex.quote(folder)}",
    ]
    blocks: list[Block] = [Code("\n".join(commands))]
    seed = run.setting("seed")
    how = f"The recipe has every value of this run: seed {seed}, on {ranks} rank(s), with the versions above."
    blocks.append(Text(how, is_small=True))
    if run.recipe:
        text = yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True)
        blocks.append(Folded("the recipe with every default filled in", [Code(text, "yaml")]))
    return Section("How to do it again", blocks)
