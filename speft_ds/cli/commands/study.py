"""`speft study`: a recipe and axes, run one after another, and what they come to. Imports no torch."""

import os
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from speft_ds.cli.commands.submit import call_sbatch, check_options
from speft_ds.cli.launch import check_files
from speft_ds.cli.options import Ranks
from speft_ds.cli.start_ranks import visible_gpus
from speft_ds.comm.signals import EXIT_STOPPED
from speft_ds.config.load_recipe import ROOT
from speft_ds.env import threads_per_rank
from speft_ds.errors import UserError, gather
from speft_ds.study.execute import Execution, write_array
from speft_ds.study.results import open_study, write_study
from speft_ds.study.runs import Grid, StudyRun
from speft_ds.study.study_config import load_study
from speft_ds.training.checkpoint.resume import fit_micro_batch
from speft_ds.training.run_dir import Lock


def study(
    file: Annotated[Path, typer.Argument(metavar="STUDY", help="the path of a study's YAML file")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="keys of the recipe to change in every run"),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="of the study; default: runs/<its file's name>")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="runs at a time, which share the cores or GPUs")] = 1,
    ranks: Ranks = None,
    slurm: Annotated[
        bool, typer.Option("--slurm", help="submit the runs that are needed now as a SLURM array")
    ] = False,
    sbatch: Annotated[
        list[str] | None,
        typer.Option(metavar="OPTION", help="with --slurm: an option of sbatch; repeatable"),
    ] = None,
    table_only: Annotated[
        bool, typer.Option("--table-only", help="start nothing: table and page of the finished runs")
    ] = False,
) -> None:
    """Run a recipe with every combination of what a study varies, and compare the runs.

    Learning rates are tried until the best is not at the edge. Ctrl-C stops the runs with a checkpoint; the
    same command goes on. Finished runs are not repeated, and one that fails does not stop the others.
    """
    if sbatch and not slurm:
        raise UserError("--sbatch goes with --slurm", "command line", "leave it out, or --slurm")
    if slurm and (ranks or table_only):
        fix = "--sbatch=--ntasks-per-node=N says how many ranks, and --table-only goes alone"
        raise UserError("--slurm goes without --ranks and --table-only", "command line", fix)
    check_options(sbatch or [])
    config = load_study(file, overrides or [])
    folder = output or Path("runs") / config.name
    grid = Grid(config)
    first = grid.first_runs()
    results = open_study(folder, config, first)
    if not table_only:  # what failed may have been fixed
        results = {key: result for key, result in results.items() if result.state == "finished"}
    execution = Execution(grid, folder, results)
    execution.collect()

    def save() -> None:
        write_study(folder, config, first, execution.results.values())

    if not table_only and (needed := execution.needed()):
        slots, count = _slots(jobs, ranks)
        gather([partial(_check, run, count) for run in needed], f"study {config.name}")
        if slurm:
            save()  # the folder is a study's from here on, whatever sbatch says
            _submit(execution, sbatch or [])
        else:
            lock = Lock(folder)  # noqa: F841 - held until the end
            save()
            execution.make(slots, count, save)
    save()
    from speft_ds.study.page import publish  # late: it draws

    publish(execution)
    if any(result.state == "failed" for result in execution.results.values()):
        raise typer.Exit(1)
    is_stopped = not slurm and not table_only and (execution.left or execution.needed())
    raise typer.Exit(EXIT_STOPPED if is_stopped else 0)


def _submit(execution: Execution, options: list[str]) -> None:
    """The runs that are needed now as a SLURM array. Raises UserError."""
    file, number = write_array(execution)
    os.environ["SPEFT_ROOT"] = str(ROOT)
    script = ROOT / "launch" / "slurm" / "array.sbatch"
    job = call_sbatch(script, f"--array=1-{number}", *options, words=[str(file)])
    print(f"job {job}: {number} run(s), the lines of {file}; once they have ended, the same command goes on")


def _slots(jobs: int, ranks: int | None) -> tuple[list[dict[str, str]], int]:
    """The variables of each run that is made at a time with others, its share of this machine; its ranks.

    Raises:
        UserError: there are fewer GPUs.
    """
    gpus = visible_gpus()
    if not gpus:
        count = ranks or 1
        return [{"OMP_NUM_THREADS": str(threads_per_rank(os.environ, jobs * count))}] * jobs, count
    each = ranks or max(1, len(gpus) // jobs)
    if each * jobs > len(gpus):
        what = f"{jobs} run(s) at a time, of {each} rank(s), need more than {len(gpus)} GPU(s)"
        raise UserError(what, "--jobs", f"--jobs {max(1, len(gpus) // each)}")
    shares = [gpus[first : first + each] for first in range(0, jobs * each, each)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(map(str, share))} for share in shares], each


def _check(run: StudyRun, world_size: int) -> None:
    """Check the files of a run. Raises UserError."""
    with redirect_stdout(None):  # its notes: the run says them itself
        check_files("train", fit_micro_batch(run.recipe, world_size), world_size)
