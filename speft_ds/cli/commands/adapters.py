"""The commands about adapters, from `speft merge` to `speft push`: arguments and help. Imports no torch."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from speft_ds.cli.options import examples
from speft_ds.errors import UserError

app = typer.Typer()

PANEL = "Adapters"
Adapter = Annotated[
    Path, typer.Argument(metavar="ADAPTER", help="an adapter's folder, or the folder of its run")
]
Output = Annotated[Path, typer.Argument(metavar="OUTPUT", help="the new folder")]
Base = Annotated[
    str | None,
    typer.Option(help="the pretrained model: a folder or a hub name; default: what the adapter says"),
]


@app.command(
    "merge",
    rich_help_panel=PANEL,
    epilog=examples(
        "speft merge runs/quickstart merged", "speft merge runs/quickstart half --alpha 0.5 --dtype float16"
    ),
)
def merge(
    adapter: Adapter,
    output: Output,
    base: Base = None,
    alpha: Annotated[
        float, typer.Option(help="how far to go from the base (0) to what was trained (1)")
    ] = 1.0,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="of the new checkpoint; default: the one of the run"),
    ] = None,
    max_shard_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="of a file, like 5GB; default: files as the base has")
    ] = None,
) -> None:
    """Write adapter and base as an ordinary checkpoint, which any tool loads.

    A weight at a time, on the CPU; what is written is read back and compared.
    """
    from speft_ds.adapter.derive import adapter_folder
    from speft_ds.adapter.merge import merge as write  # late, as below: these import torch

    merged = write(base, adapter_folder(adapter), output, alpha, dtype, max_shard_size)
    if merged.note:
        typer.echo(f"note: the base was loaded whole: {merged.note}")
    typer.echo(f"{merged.num_changed:,} entries, {merged.num_bytes / 2**30:.2f} GiB, read back and compared")
    typer.echo(f"  {output}")


@app.command(
    "export",
    rich_help_panel=PANEL,
    epilog=examples(
        "speft export runs/quickstart for_peft",
        "speft export runs/quickstart/adapter for_peft --format peft --base base_model",
    ),
)
def export(
    adapter: Adapter,
    output: Output,
    kind: Annotated[Literal["peft"], typer.Option("--format", help="whose: PEFT's, from 0.21 on")] = "peft",
    base: Base = None,
) -> None:
    """Write an adapter in another library's format: PeftModel.from_pretrained(model, OUTPUT) loads it."""
    from speft_ds.adapter.derive import adapter_folder
    from speft_ds.adapter.export_peft import export_peft
    from speft_ds.cli.commands.adapter_output import export_lines

    exported = export_peft(adapter_folder(adapter), output, base)
    typer.echo("\n".join([*export_lines(exported), f"  {output}"]))


@app.command(
    "compose",
    rich_help_panel=PANEL,
    epilog=examples("speft compose runs/a runs/b both", "speft compose runs/a runs/b both --weights 1.0,0.5"),
)
def compose(
    adapters: Annotated[
        list[Path], typer.Argument(metavar="ADAPTER", help="two or more: adapters, or folders of runs")
    ],
    output: Output,
    weights: Annotated[
        str | None,
        typer.Option(help="a factor for each adapter, with commas: 1.0,0.5; default: 1"),
    ] = None,
) -> None:
    """Add up adapters of one base: all entries that any has, weighted sums of their deltas.

    Says how many entries collide, and how many of these pull in opposite directions.
    """
    numbers = _numbers(weights)
    from speft_ds.adapter.compose import compose as write

    met = write(adapters, output, numbers)
    typer.echo(f"{met.num_entries:,} entries")
    collisions = f"{met.num_shared:,} entries in two or more, {met.num_opposite:,} with opposite signs"
    typer.echo(f"collisions: {collisions}")
    typer.echo(f"  {output}")


def _numbers(text: str | None) -> list[float] | None:
    """`1.0,0.5` -> its numbers. Raises UserError."""
    try:
        return None if text is None else [float(part) for part in text.replace(",", " ").split()]
    except ValueError as error:
        fix = "numbers with commas: --weights 1.0,0.5"
        raise UserError(f"--weights is {text}", "--weights", fix) from error


@app.command(
    "compress",
    rich_help_panel=PANEL,
    epilog=examples(
        "speft compress runs/a small --method dare --keep 0.1 --seed 0",
        "speft compress runs/a small --method ternary --keep 0.2 --dtype bf16",
        "speft compress runs/a/adapter small --dtype bf16",
    ),
)
def compress(
    adapter: Adapter,
    output: Output,
    method: Annotated[
        Literal["dare", "ternary", "topk"] | None,
        typer.Option(
            help="dare: drop at random, rescale; topk: the largest; ternary: their signs, times one number"
        ),
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
    import torch

    from speft_ds.adapter.compress import compress as write
    from speft_ds.cli.commands.adapter_output import compress_lines

    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16, None: None}
    sizes = write(adapter, output, method, keep, seed, scale, kinds[dtype])
    typer.echo("\n".join([*compress_lines(sizes), f"  {output}"]))


@app.command("diff", rich_help_panel=PANEL, epilog=examples("speft diff runs/a runs/b", "speft diff runs/a"))
def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="an adapter, or the folder of a run")],
    b: Annotated[
        Path | None, typer.Argument(metavar="B", help="another; default: the base, unchanged")
    ] = None,
) -> None:
    """Say what sets two adapters of one base apart: entries that only one has, deltas that differ, norms."""
    from speft_ds.cli.commands.adapter_output import print_diff

    print_diff(a, b)


@app.command(
    "graft",
    rich_help_panel=PANEL,
    epilog=examples(
        "speft graft base_model tuned_model grafted --density 0.005",
        'speft graft base_model tuned_model grafted --num-entries 100000 --target q_proj --target "*.mlp.*"',
    ),
)
def graft(
    base: Annotated[str, typer.Argument(metavar="BASE", help="the pretrained model: a folder or a hub name")],
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="the same model, fine-tuned by any means")],
    output: Output,
    density: Annotated[float | None, typer.Option(help="fraction of the targeted weights to keep")] = None,
    num_entries: Annotated[int | None, typer.Option(min=1, help="instead: how many of them")] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN", help="linears, as by mask.targets; repeatable; default: all of the layers"
        ),
    ] = None,
) -> None:
    """Make an adapter out of a fine-tuned model and its base: the largest differences of its weights.

    Says what else differs (norms, embeddings), which an adapter does not hold.
    """
    from speft_ds.adapter.graft import graft as write
    from speft_ds.cli.commands.adapter_output import graft_lines

    grafted = write(base, tuned, output, density, num_entries, target)
    typer.echo("\n".join([*graft_lines(grafted), f"  {output}"]))


@app.command(
    "inspect",
    rich_help_panel=PANEL,
    epilog=examples("speft inspect runs/a", "speft inspect runs/a --against runs/b --output entries.png"),
)
def inspect(
    adapter: Adapter,
    against: Annotated[
        Path | None,
        typer.Option(metavar="ADAPTER", help="another one of the same base: how far they overlap"),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="a heat map of where entries lie; default: none")
    ] = None,
) -> None:
    """Show what an adapter is like: entries and norms by layer and module, the largest changes, its size."""
    from speft_ds.cli.commands.adapter_output import print_inspection

    print_inspection(adapter, against, output)


@app.command(
    "push",
    rich_help_panel=PANEL,
    epilog=examples("speft push runs/a me/my-adapter --private", "speft push runs/a me/my-adapter --dry-run"),
)
def push(
    adapter: Adapter,
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="owner/name on the model hub")],
    private: Annotated[bool, typer.Option("--private", help="nobody else sees a new repository")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list the files, upload nothing")] = False,
) -> None:
    """Upload an adapter and its card to the model hub: the files of its folder, nothing else."""
    from speft_ds.adapter.derive import open_adapter
    from speft_ds.adapter.push import files_to_push, notes
    from speft_ds.adapter.push import push as upload

    opened = open_adapter(adapter)
    chosen, left_out = files_to_push(opened.folder)
    for path in chosen:
        typer.echo(f"  {path.name}  {path.stat().st_size:,} bytes")
    for line in [*(f"not uploaded: {path.name}" for path in left_out), *notes(opened)]:
        typer.echo(line)
    typer.echo("nothing was uploaded (--dry-run)" if dry_run else upload(adapter, repo_id, private))
