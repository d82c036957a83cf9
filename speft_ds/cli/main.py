"""The `speft` command: its commands, their arguments, their help. Imports no torch."""

import logging
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from speft_ds import __version__
from speft_ds.cli.commands import adapters
from speft_ds.cli.commands.jobs import evaluate, quickstart, score, train
from speft_ds.cli.commands.new_recipe import new
from speft_ds.cli.commands.recipes import cp, ls, show
from speft_ds.cli.commands.schema_reference import schema
from speft_ds.cli.commands.study import study
from speft_ds.cli.commands.submit import submit
from speft_ds.cli.commands.tune import tune
from speft_ds.cli.commands.validate import validate
from speft_ds.cli.launch import EXIT_USER_ERROR, with_resume
from speft_ds.cli.options import Overrides, RecipeName, examples
from speft_ds.config.load_recipe import load_recipe
from speft_ds.errors import UserError, of_a_path
from speft_ds.terminal import init_output

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # a failure inside is for a bug report: a plain traceback
    help="Sparse fine-tuning of language models on DeepSpeed ZeRO-3. On a cluster, "
    "`deepspeed launch/train.py --recipe RECIPE` starts what `speft train RECIPE` does.",
    epilog="Tab completion: speft --install-completion",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"speft_ds {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="print the version, and stop"),
    ] = False,
) -> None:
    pass


def command(*lines: str):
    """Register a function as the command of its name, whose help ends with these examples."""
    return app.command(epilog=examples(*lines))


command(
    "speft train quickstart",
    "speft train quickstart train.steps=40 output_dir=runs/mine --ranks 2",
    "speft train llama2_70b_alpaca --hostfile hosts.txt",
    "speft train --resume runs/mine",
)(train)
command(
    "speft evaluate runs/quickstart --tasks arc_easy,hellaswag",
    "speft evaluate runs/quickstart --limit 100 --num-fewshot 4",
    "speft evaluate --model ./Llama-2-13b-hf --tasks mmlu eval.data_dir=./hub",
)(evaluate)
command("speft score quickstart", "speft score quickstart mask.salience=snip mask.density=0.01 --ranks 2")(
    score
)
command(
    "speft tune quickstart --lr",
    "speft tune quickstart --lr optimizer.lr=10 train.steps=100 --ranks 2",
    "speft tune quickstart --search eval.validation=rows.jsonl --over optimizer.lr=1e-4..1e-2 --trials 12",
)(tune)
command("speft quickstart", "speft quickstart train.steps=20 --ranks 2")(quickstart)
command("speft ls", "COLUMNS=200 speft ls")(ls)
command("speft show quickstart", "speft show quickstart optimizer.lr=5e-4 --plain")(show)
command("speft cp quickstart mine.yaml", "speft cp smollm2_135m_static mine.yaml --force")(cp)
command(
    "speft new my_recipe.yaml --data faq.csv --model ./SmolLM2-135M-Instruct",
    "speft new my_recipe.yaml --data rows.jsonl --model owner/name --prompt title --response body",
)(new)
command("speft schema mask.schedule", "speft schema mask", "speft schema --json > recipe.json")(schema)
command("speft validate quickstart", "speft validate quickstart mask.density=0.01 --ranks 2 --all")(validate)


@command(
    "speft plan quickstart --world 2 --rows 1000",
    "speft plan llama2_13b_alpaca --world 8 --gpu-gib 40 --details",
)
def plan(
    recipe: RecipeName,
    overrides: Overrides = None,
    world: Annotated[int, typer.Option(min=1, help="number of ranks, over all nodes")] = ...,
    gpu_gib: Annotated[
        float | None, typer.Option(min=0.1, help="memory of a GPU in GiB; default: 80")
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="rows of training data; default: counted, where they are cached")
    ] = None,
    device: Annotated[
        Literal["cuda", "cpu"],
        typer.Option(help="of the ranks; with cpu, --gpu-gib is the memory per rank; default: what is free"),
    ] = "cuda",
    details: Annotated[bool, typer.Option("--details", help="show the arithmetic of each number")] = False,
) -> None:
    """Say whether a run fits and what to change if not, before anything is loaded; memory, traffic, steps.

    Needs the model's configuration, not its weights, and no GPU.
    """
    loaded = load_recipe(recipe, overrides or [])  # a typo should not wait for torch
    from speft_ds.tools.plan.make_plan import make_plan
    from speft_ds.tools.plan.print_plan import print_plan

    print_plan(make_plan(loaded, world, gpu_gib=gpu_gib, num_rows=rows, device=device), details)


@command(
    "speft data quickstart",
    "speft data quickstart data.max_length=128 --output rows.png",
    "speft data quickstart --left-out",
)
def data(
    recipe: RecipeName,
    overrides: Overrides = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="the picture; default: runs/<recipe>-data.png"),
    ] = None,
    left_out: Annotated[
        bool, typer.Option("--left-out", help="list the rows that are left out, by file and line, and why")
    ] = False,
) -> None:
    """Show what the rows of a recipe look like to the model: samples, lengths, what is left out.

    Tokenises the rows if that was not done before, and draws a histogram of their lengths.
    """
    from speft_ds.cli.commands.show_data import show_data  # late: it may import transformers

    show_data(load_recipe(recipe, overrides or []), output, left_out)


@command("speft doctor", "DS_ACCELERATOR=cpu speft doctor", "speft doctor --kernels")
def doctor(
    kernels: Annotated[
        bool, typer.Option("--kernels", help="print what the sparse backends cost here, measured once")
    ] = False,
    remeasure: Annotated[bool, typer.Option("--remeasure", help="with --kernels: measure anew")] = False,
) -> None:
    """Check this machine: versions, GPUs, compiler, memory, the model hub, communication between ranks.

    Each problem comes with its fix; exits with 1 if there is one.
    """
    if remeasure and not kernels:
        fix = "speft doctor --kernels --remeasure"
        raise UserError("--remeasure is for the kernels", "command line", fix)
    if kernels:
        from speft_ds.tools.kernel_table import print_kernels  # late: it imports torch

        return print_kernels(remeasure)
    from speft_ds.tools.doctor import examine, exit_code, print_report

    checks = examine()
    print_report(checks)
    raise typer.Exit(exit_code(checks))


command(
    "speft submit llama2_13b_alpaca --nodes 2 --gpus-per-node 8 --time 12:00:00 --evaluate",
    "speft submit quickstart --nodes 2 --partition cpu --dry-run",
    'speft submit quickstart train.steps=40 --gpus-per-node 1 --sbatch "--constraint=a100"',
)(submit)
command(
    "speft study studies/smoke.yaml --jobs 2",
    "speft study mine.yaml train.steps=20 --output runs/quick",
    "speft study mine.yaml --slurm --sbatch=--gpus-per-node=1",
)(study)


@command(
    "speft compare-masks runs/a runs/b",
    "speft compare-masks runs/a/mask.safetensors runs/b/adapter --output compare.png",
)
def compare_masks(
    paths: Annotated[
        list[Path], typer.Argument(metavar="MASK", help="two or more: files or folders of masks or adapters")
    ],
    output: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="a picture of the table; default: none")
    ] = None,
) -> None:
    """Print how much masks overlap: entries that two share over entries that either has (Jaccard)."""
    if len(paths) < 2:
        fix = f"name another: speft compare-masks {paths[0]} runs/other/mask.safetensors"
        raise UserError("one mask has nothing to be compared with", "command line", fix)
    from speft_ds.cli.commands.compare_masks import compare  # late, because it imports torch

    compare(paths, output)


@command("speft report runs/quickstart", "speft report runs/a runs/b --output runs/a-and-b")
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN", help="run folders, one or more")],
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="where to; default: the run's own, or runs/report-A-vs-B for several"
        ),
    ] = None,
) -> None:
    """Write the report of a run, or of several side by side: report.html, report.md and pictures.

    Scores with errors and baselines, curves, the mask, time, memory and sizes, and how to do it again.
    Runs that differ in their seed alone are combined.
    """
    from speft_ds.report.compare import without_duplicates, write_comparison  # late, because it draws
    from speft_ds.report.page import write_report

    folders = without_duplicates(folders)
    several = len(folders) > 1
    for path in write_comparison(folders, output) if several else write_report(folders[0], output):
        print(path)


@command("speft runs", "speft runs runs/sweep /scratch/runs")
def runs(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(metavar="FOLDER", help="folders of runs; default: runs", show_default=False),
    ] = None,
) -> None:
    """List runs, the last one first: recipe, model, how far each is, scores before and after."""
    from speft_ds.cli.commands.list_runs import print_runs  # late: it reads their scores

    print_runs(folders or [Path("runs")])


app.add_typer(adapters.app)


def main() -> None:
    """Run the command line; a UserError is shown without a traceback, and exits with 2."""
    init_output()
    # DeepSpeed warns, on stdout, of a machine without a GPU, which a run says of itself.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno > logging.WARNING)
    try:
        app(with_resume(sys.argv[1:]), prog_name="speft")
    except (UserError, OSError) as error:
        print(error if isinstance(error, UserError) else of_a_path(error), file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)


if __name__ == "__main__":
    main()
