"""The `speft` command: list and show recipes, run the quickstart, score, compare masks. Imports no torch."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from speft_ds.entry import Job, checked_recipe
from speft_ds.errors import UserError
from speft_ds.preflight import check_output_dir
from speft_ds.recipe import RECIPES_DIR, ROOT, list_recipes, load_recipe, resolved_yaml

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Sparse fine-tuning on DeepSpeed ZeRO-3.")
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="recipe keys to change")]
Ranks = Annotated[int | None, typer.Option(min=1, help="default: one a GPU, or 2 on the CPU")]


@app.command("ls")
def ls() -> None:
    """List the recipes."""
    table = Table("recipe", "what it is", "model", "density")
    for name in list_recipes():
        try:
            recipe = load_recipe(name)
        except UserError as error:
            table.add_row(name, f"[red]does not load:[/red] {error.what}", "", "")
            continue
        mask = recipe.mask
        budget = f"{mask.num_trainable:,} weights" if mask.density is None else f"{mask.density:.3%}"
        table.add_row(name, _first_comment(name), Path(recipe.model.name_or_path).name, budget)
    Console().print(table)


@app.command("show")
def show(recipe: str, overrides: Overrides = None) -> None:
    """Print a recipe with every default filled in."""
    typer.echo(resolved_yaml(load_recipe(recipe, overrides or [])), nl=False)


@app.command("quickstart", epilog="Example: speft quickstart train.steps=20")
def quickstart(
    overrides: Overrides = None,
    prepare_only: Annotated[bool, typer.Option("--prepare-only", help="make the inputs, and stop")] = False,
    ranks: Ranks = None,
) -> None:
    """Prepare a small model and data, then train and score it."""
    overrides = overrides or []
    load_recipe("quickstart", overrides)  # a typo should not wait for the model
    from speft_ds.quickstart import prepare  # late, because it may import torch

    prepare()
    if prepare_only:
        return
    num_gpus = count_gpus()
    world_size = ranks or num_gpus or 2
    _launch("train", "quickstart", _fit(overrides, world_size), ranks, num_gpus)


@app.command("score", epilog="Example: speft score quickstart mask.salience=snip mask.density=0.01 --ranks 2")
def score(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="a name in recipes/ or the path of a YAML file")
    ],
    overrides: Overrides = None,
    ranks: Ranks = None,
) -> None:
    """Score the weights and select a mask; train nothing.

    Writes mask.safetensors, mask.png and score.json to the run folder. Train with the mask by
    mask.load=RUN_FOLDER.
    """
    _launch("score", recipe, overrides or [], ranks, count_gpus())


@app.command(
    "compare-masks", epilog="Example: speft compare-masks runs/a/mask.safetensors runs/b --output compare.png"
)
def compare_masks(
    paths: Annotated[
        list[Path], typer.Argument(metavar="MASK", help="two or more: files or folders of masks or adapters")
    ],
    output: Annotated[Path | None, typer.Option(help="a picture of the table, .png")] = None,
) -> None:
    """Print how much masks overlap: entries that two share over entries that either has (Jaccard)."""
    if len(paths) < 2:
        fix = f"name another: speft compare-masks {paths[0]} runs/other/mask.safetensors"
        raise UserError("one mask has nothing to be compared with", "command line", fix)
    from speft_ds.compare import compare  # late, because it imports torch

    compare(paths, output)


def _launch(job: Job, recipe: str, overrides: list[str], ranks: int | None, num_gpus: int) -> NoReturn:
    """Check, start the job under the deepspeed launcher, and exit as it does."""
    world_size = ranks or num_gpus or 2
    check_output_dir(checked_recipe(job, recipe, overrides, world_size))
    # With GPUs and no --ranks, the launcher itself takes every GPU that it may see.
    num_gpus_flag = [] if num_gpus and ranks is None else ["--num_gpus", str(world_size)]
    script = [str(ROOT / "launch" / f"{job}.py"), "--recipe", recipe, *overrides]
    command = [_find_deepspeed(), *num_gpus_flag, *script]
    typer.echo(f"$ {' '.join(command)}")
    code = subprocess.run(command, env=_environment(num_gpus, world_size), check=False).returncode
    raise typer.Exit(code if code >= 0 else 128 - code)  # a signal, as shells report it


def _fit(overrides: list[str], world_size: int) -> list[str]:
    """Overrides for what the user left open: a free run folder, a micro-batch that all ranks can share."""
    recipe = load_recipe("quickstart", overrides)
    given = {text.partition("=")[0] for text in overrides}
    if "output_dir" not in given:
        folder = _free_folder(recipe.output_dir)
        overrides = [f"output_dir={folder}", *overrides]
        if folder != recipe.output_dir:
            typer.echo(f"{recipe.output_dir} is not empty: this run goes to {folder}")
    rows, left_over = divmod(recipe.train.global_batch, world_size)
    micro = math.gcd(recipe.train.micro_batch, rows)
    if "train.micro_batch" not in given and not left_over and micro < recipe.train.micro_batch:
        overrides = [*overrides, f"train.micro_batch={micro}"]
        typer.echo(f"for {world_size} ranks: train.micro_batch={micro}")
    return overrides


def _free_folder(folder: str) -> str:
    candidate, number = Path(folder), 1
    while candidate.exists() and not (candidate.is_dir() and not any(candidate.iterdir())):
        number += 1
        candidate = Path(f"{folder}-{number}")
    return str(candidate)


def count_gpus() -> int:
    """GPUs that nvidia-smi lists and CUDA_VISIBLE_DEVICES leaves; 0 where there is no working nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return 0
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    count = sum(line.startswith("GPU ") for line in listing.stdout.splitlines())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listing.returncode or visible is None:
        return 0 if listing.returncode else count
    return min(count, sum(bool(device.strip()) for device in visible.split(",")))


def _find_deepspeed() -> str:
    beside = Path(sys.executable).parent / "deepspeed"  # a virtual environment that is not activated
    found = str(beside) if beside.is_file() else shutil.which("deepspeed")
    if found is None:
        raise UserError("the deepspeed launcher is not installed", sys.prefix, "pip install deepspeed")
    return found


def _environment(num_gpus: int, world_size: int) -> dict[str, str]:
    env = dict(os.environ)
    # DeepSpeed compiles a small op on its first start and looks for ninja on the PATH.
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)])
    if not num_gpus:
        env["DS_ACCELERATOR"] = "cpu"
        env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // world_size)))
    return env


def _first_comment(name: str) -> str:
    first = (RECIPES_DIR / f"{name}.yaml").read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def main() -> None:
    """Run the command line; a UserError is shown without a traceback, and exits with 2."""
    try:
        app()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
