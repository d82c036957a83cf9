"""`speft submit`: a run as a SLURM job, and its evaluation as a second one. Imports no torch."""

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from speft_ds.cli.launch import check_files
from speft_ds.cli.options import Overrides, RecipeName
from speft_ds.config.deepspeed_config import batch_problems
from speft_ds.config.load_recipe import ROOT, as_override, load_recipe
from speft_ds.config.recipe import Recipe
from speft_ds.errors import RecipeError, UserError, shell
from speft_ds.io import write_text
from speft_ds.training.checkpoint.resume import IF_ANY, Resume, Start, find_start, fit_micro_batch

TRAIN, EVALUATE = "submit.sbatch", "slurm-evaluate.sbatch"  # in the run folder: names that a run leaves alone


def submit(
    recipe: RecipeName,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, help="number of nodes")] = 1,
    gpus_per_node: Annotated[int | None, typer.Option(min=1, help="GPUs per node, one rank per GPU")] = None,
    ranks_per_node: Annotated[
        int | None, typer.Option(min=1, help="ranks on each node; default: one per GPU, or 1")
    ] = None,
    time: Annotated[str | None, typer.Option(help="time limit of a start, like 12:00:00")] = None,
    partition: Annotated[str | None, typer.Option(help="where to run; `sinfo` lists them")] = None,
    account: Annotated[str | None, typer.Option(help="who pays")] = None,
    qos: Annotated[str | None, typer.Option(help="quality of service")] = None,
    sbatch: Annotated[
        list[str] | None, typer.Option(metavar="OPTION", help="any other of sbatch's options; repeatable")
    ] = None,
    resume_with: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="a harmless change of the recipe to go on with; repeatable"),
    ] = None,
    evaluate: Annotated[
        bool, typer.Option("--evaluate", help="a second job scores the finished run on eval.tasks")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the script, submit nothing")] = False,
) -> None:
    """Train as a SLURM job: check the recipe, write the script into the run folder, submit it.

    Preempted, requeued or out of time, the job goes on from its last checkpoint; so does the same command.
    """
    overrides, changes = overrides or [], resume_with or []
    ranks = ranks_per_node or gpus_per_node or 1
    given = {"nodes": nodes, "ntasks-per-node": ranks, "gpus-per-node": gpus_per_node, "time": time}
    given |= {"partition": partition, "account": account, "qos": qos}
    options = [f"--{name}={value}" for name, value in given.items() if value is not None] + (sbatch or [])
    checked = _checked_recipe(recipe, [*overrides, *changes], options, nodes * ranks, evaluate)
    folder = Path(checked.output_dir).absolute()
    words = [recipe, *overrides, *(word for text in changes for word in ("--resume-with", text))]
    scripts = {TRAIN: job_script(checked.name, "train", folder, words, options)}
    if evaluate:
        scripts[EVALUATE] = job_script(f"{checked.name}-eval", "eval", folder, [str(folder)], options)
    if dry_run:
        print("\n".join(scripts.values()), end="")
        return
    start = _checked_start(checked, changes, nodes * ranks)
    for name, text in scripts.items():
        write_text(folder / name, text)
    job = call_sbatch(folder / TRAIN)
    resumed = f", continuing from {start.checkpoint.path}" if start.checkpoint else ""
    print(
        f"job {job}: {checked.name} on {nodes} x {ranks} ranks{resumed}\n"
        f"  script    {folder / TRAIN}\n"
        f"  log       {shell('tail', '-F', folder / f'slurm-{job}.out')}\n"
        f"  watch     squeue --job={job}\n"
        f"  stop      scancel {job}   (it writes a checkpoint; the same `speft submit` continues from there)"
    )
    if evaluate:
        note = f"job {job}, which trains, is submitted all the same"
        second = call_sbatch(folder / EVALUATE, f"--dependency=afterok:{job}", note=note)
        print(f"  evaluate  job {second}, after it")


def _checked_recipe(
    name: str, overrides: list[str], options: list[str], world_size: int, evaluate: bool
) -> Recipe:
    """The recipe, and what is wrong on the command line whatever its files are. Raises UserError."""
    check_options(options)
    recipe = load_recipe(name, overrides)
    with contextlib.redirect_stdout(sys.stderr):  # its note, since the script may go into a pipe
        recipe = fit_micro_batch(recipe, world_size)
    if problems := batch_problems(recipe, world_size):
        raise RecipeError(problems, f"recipe {recipe.name}")
    if evaluate and not recipe.eval.tasks:
        fix = "name some, eval.tasks=[arc_easy], or leave --evaluate out"
        raise UserError("there is no task to evaluate", recipe.where("eval.tasks"), fix)
    return recipe


def check_options(options: list[str]) -> None:
    """Refuse what sbatch would take for its script."""
    for option in options:
        if not option.startswith("-") or "\n" in option:
            fix = 'like --sbatch "--constraint=a100", once per option'
            raise UserError(f"{option!r} is not an option of sbatch", "command line (--sbatch)", fix)


def _checked_start(recipe: Recipe, changes: list[str], world_size: int) -> Start:
    """What the job would find out after its time in the queue. Raises UserError."""
    check_sbatch()
    start = find_start(recipe, Resume(IF_ANY, tuple(changes)))
    if start.state == "finished":
        fix = f"choose another, {shell(as_override('output_dir', f'{recipe.output_dir}-2'))}"
        raise UserError(f"the run in {recipe.output_dir} is finished", recipe.where("output_dir"), fix)
    check_files("train", recipe, world_size)
    return start


def check_sbatch() -> None:
    if shutil.which("sbatch") is None:
        fix = "submit on a login node of the cluster; `speft submit` shows its script with --dry-run"
        raise UserError("there is no sbatch on this machine", "PATH", fix)


def job_script(job: str, kind: str, folder: Path, arguments: list[str], options: list[str]) -> str:
    """A batch script: this machine's paths and sbatch's options, around launch/slurm/<kind>.sbatch.

    `job` is its name in the queue, `folder` the run's, where the log goes.
    """
    script = ROOT / "launch" / "slurm" / f"{kind}.sbatch"
    own = re.findall(r"^#SBATCH (--(?!job-name).*)", script.read_text(encoding="utf-8"), re.MULTILINE)
    log = str(folder / "slurm-%j.out").replace("%", "%%").replace("%%j", "%j")
    named = [f"--job-name={job}", f"--output={log}", f"--chdir={Path.cwd()}"]
    variables = {"SPEFT_ROOT": str(ROOT), "SPEFT_PYTHON": sys.executable}
    if accelerator := os.environ.get("DS_ACCELERATOR"):
        variables["DS_ACCELERATOR"] = accelerator
    lines = [
        "#!/usr/bin/env bash",
        "# Written by `speft submit`; sbatch takes it again.",
        *(f"#SBATCH {option}" for option in [*map(shlex.quote, named), *own, *options]),
        *(f"export {name}={shlex.quote(value)}" for name, value in variables.items()),
        f"exec bash {shlex.join([str(script), *arguments])}",
    ]
    return "\n".join(lines) + "\n"


def call_sbatch(
    script: Path, *options: str, words: Sequence[str] = (), note: str = "nothing is submitted"
) -> str:
    """Submit a script with these words; returns the job's number.

    Raises:
        UserError: there is no sbatch, or it refuses; the note says what was submitted.
    """
    check_sbatch()
    command = ["sbatch", "--parsable", *options, str(script), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip().removeprefix("sbatch: error: ")
        fix = "change the options; `sinfo` shows the partitions, nodes and time limits"
        raise UserError(f"sbatch refused the job: {reason}; {note}", str(script), fix)
    return done.stdout.strip().partition(";")[0]
