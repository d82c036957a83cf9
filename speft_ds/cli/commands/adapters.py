"""The commands about adapters, from `speft merge` to `speft push`: arguments and help. Imports no torch."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from speft_ds.cli.options import examples
from speft_ds.env import log_rank0
from speft_ds.errors import UserError

app = typer.Typer()

AdapterPath = Annotated[Path, typer.Argument(metavar="ADAPTER", help="its folder, or the folder of its run")]
NewFolder = Annotated[Path, typer.Argument(metavar="OUTPUT", help="the new folder")]
BaseModel = Annotated[
    str | None,
    typer.Option(help="the pretrained model, a folder or a hub name; default: the adapter's"),
]


def command(*lines: str):
    """Register a function as the command of its name, with examples in its help."""
    return app.command(rich_help_panel="Adapters", epilog=examples(*lines))


@command("speft merge runs/quickstart merged", "speft merge runs/quickstart half --alpha 0.5 --dtype float16")
def merge(
    adapter: AdapterPath,
    output: NewFolder,
    base: BaseModel = None,
    alpha: Annotated[float, typer.Option(help="how far to go from the base (0) to the trained (1)")] = 1.0,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="of the new checkpoint; default: the one of the run"),
    ] = None,
    max_shard_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="of a file, like 5GB; default: files as the base has")
    ] = None,
    onto: Annotated[
        Literal["trained", "original"],
        typer.Option(help="of a base in few bits: as it was trained, or as the checkpoint has it"),
    ] = "trained",
) -> None:
    """Write adapter and base as an ordinary checkpoint, which any tool loads.

    A weight at a time, on the CPU; what is written is read back and compared.
    """
    from speft_ds.adapter.merge import merge  # late, as below: these import torch
    from speft_ds.evaluation.scores import card_scores

    merged = merge(base, adapter, output, alpha, dtype, max_shard_size, card_scores(adapter), onto)
    if merged.note:
        log_rank0(f"note: the complete base was loaded: {merged.note}")
    typer.echo(f"{merged.num_changed:,} entries, {merged.num_bytes / 2**30:.2f} GiB, read back and compared")
    typer.echo(f"  {output}")


@command(
    "speft export runs/quickstart for_peft",
    "speft export runs/quickstart/adapter for_peft --format peft --base base_model",
)
def export(
    adapter: AdapterPath,
    output: NewFolder,
    kind: Annotated[Literal["peft"], typer.Option("--format", help="whose: PEFT's, from 0.21 on")] = "peft",
    base: BaseModel = None,
) -> None:
    """Write an adapter in another library's format: PeftModel.from_pretrained(model, OUTPUT) loads it."""
    from speft_ds.adapter.export import export_peft
    from speft_ds.cli.commands.adapter_output import print_export

    print_export(export_peft(adapter, output, base), output)


@command("speft compose runs/a runs/b both", "speft compose runs/a runs/b both --weights 1.0,0.5")
def compose(
    adapters: Annotated[
        list[Path], typer.Argument(metavar="ADAPTER", help="two or more: adapters, or folders of runs")
    ],
    output: NewFolder,
    weights: Annotated[
        str | None, typer.Option(help="a factor for each adapter, with commas: 1.0,0.5; default: 1")
    ] = None,
) -> None:
    """Add up adapters of one base: all entries that any has, weighted sums of their deltas.

    Says how many entries collide, and how many of these pull in opposite directions.
    """
    try:
        factors = None if weights is None else [float(part) for part in weights.replace(",", " ").split()]
    except ValueError as error:
        raise UserError(f"--weights is {weights}", "--weights", "numbers: --weights 1.0,0.5") from error
    from speft_ds.adapter.compose import compose

    met = compose(adapters, output, factors)
    shared = f"{met.num_shared:,} entries in two or more, {met.num_opposite:,} with opposite signs"
    typer.echo(f"{met.num_entries:,} entries\ncollisions: {shared}\n  {output}")


@command(
    "speft compress runs/a small --method dare --keep 0.1 --seed 0",
    "speft compress runs/a small --method ternary --keep 0.2 --dtype bf16",
    "speft compress runs/a/adapter small --dtype bf16",
)
def compress(
    adapter: AdapterPath,
    output: NewFolder,
    method: Annotated[
        Literal["dare", "ternary", "topk"] | None,
        typer.Option(help="dare: drop at random, rescale; topk: the largest; ternary: their signs, scaled"),
    ] = None,
    keep: Annotated[float, typer.Option(help="fraction of the entries to keep")] = 1.0,
    seed: Annotated[int, typer.Option(help="of dare")] = 0,
    scale: Annotated[float, typer.Option(help="of ternary: the number, in standard deviations")] = 1.0,
    dtype: Annotated[
        Literal["float32", "bfloat16", "bf16"] | None,
        typer.Option(help="of the deltas in the file; default: as they are"),
    ] = None,
) -> None:
    """Make an adapter smaller: fewer entries, simpler deltas, shorter numbers. Says by how much."""
    from speft_ds.adapter.compress import compress
    from speft_ds.adapter.format import DTYPES
    from speft_ds.cli.commands.adapter_output import print_sizes

    stored = DTYPES.get("bfloat16" if dtype == "bf16" else dtype)
    print_sizes(adapter, compress(adapter, output, method, keep, seed, scale, stored), output)


@command("speft diff runs/a runs/b", "speft diff runs/a")
def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="an adapter, or the folder of a run")],
    b: Annotated[Path | None, typer.Argument(metavar="B", help="another; default: the base")] = None,
) -> None:
    """Say how two adapters of one base differ: entries that only one has, deltas that differ, norms."""
    from speft_ds.cli.commands.adapter_output import print_diff

    print_diff(a, b)


@command(
    "speft graft base_model tuned_model grafted --density 0.005",
    'speft graft base_model tuned_model grafted --num-entries 100000 --target q_proj --target "*.mlp.*"',
)
def graft(
    base: Annotated[str, typer.Argument(metavar="BASE", help="the pretrained model: a folder or a hub name")],
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="the same model, fine-tuned by any means")],
    output: NewFolder,
    density: Annotated[float | None, typer.Option(help="fraction of the targeted weights to keep")] = None,
    num_entries: Annotated[int | None, typer.Option(min=1, help="instead: how many of them")] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="as in mask.targets; repeatable; default: all of the layers"),
    ] = None,
) -> None:
    """Make an adapter out of a fine-tuned model and its base: the largest differences of its weights.

    Says what else differs (norms, embeddings), which an adapter does not hold.
    """
    from speft_ds.adapter.graft import graft
    from speft_ds.cli.commands.adapter_output import print_graft

    print_graft(graft(base, tuned, output, density, num_entries, target), output)


@command("speft inspect runs/a", "speft inspect runs/a --against runs/b --output entries.png")
def inspect(
    adapter: AdapterPath,
    against: Annotated[
        Path | None, typer.Option(metavar="ADAPTER", help="another one of its base: how far they overlap")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="a heat map of where entries lie; default: none")
    ] = None,
) -> None:
    """Show what an adapter is like: entries and norms by layer and module, the largest changes, its size."""
    from speft_ds.cli.commands.adapter_output import print_inspection

    print_inspection(adapter, against, output)


@command("speft push runs/a me/my-adapter --private", "speft push runs/a me/my-adapter --dry-run")
def push(
    adapter: AdapterPath,
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="owner/name on the model hub")],
    private: Annotated[bool, typer.Option("--private", help="nobody else sees a new repository")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list the files, upload nothing")] = False,
) -> None:
    """Upload an adapter and its card to the model hub: the files of its folder, nothing else."""
    from speft_ds.adapter.format import open_adapter
    from speft_ds.adapter.push import files_to_push, notes, push

    opened = open_adapter(adapter, reads_low_rank=True)
    chosen, left_out = files_to_push(opened.folder)
    lines = [f"  {path.relative_to(opened.folder)}  {path.stat().st_size:,} bytes" for path in chosen]
    lines += [f"not uploaded: {path.name}" for path in left_out]
    log_rank0("\n".join([*lines, *notes(opened)]))
    typer.echo("nothing was uploaded (--dry-run)" if dry_run else push(adapter, repo_id, private))
