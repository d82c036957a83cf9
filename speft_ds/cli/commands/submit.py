"""`speft submit`: a run as a SLURM job, and its evaluation as a second one. Imports no torch."""

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from speft_ds.cli.launch import check_files
from speft_ds.config.deepspeed_config import batch_problems
from speft_ds.config.load_recipe import ROOT, load_recipe
from speft_ds.config.recipe import Recipe
from speft_ds.errors import RecipeError, UserError
from speft_ds.training.checkpoint.resume import IF_ANY, Resume, Start, find_start, fit_micro_batch

TRAIN, EVALUATE = "submit.sbatch", "slurm-evaluate.sbatch"  # in the run folder: names that a run leaves alone


@dataclass(frozen=True)
class Resources:
    """What a job asks of the cluster; `options` are sbatch's own."""

    nodes: int
    ranks_per_node: int
    gpus_per_node: int | None = None
    options: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        gpus = [] if self.gpus_per_node is None else [f"--gpus-per-node={self.gpus_per_node}"]
        return [f"--nodes={self.nodes}", f"--ntasks-per-node={self.ranks_per_node}", *gpus, *self.options]

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True)
class Run:
    """What a job trains: the arguments of launch/train.py."""

    recipe: str
    overrides: tuple[str, ...] = ()
    resume_with: tuple[str, ...] = ()

    def words(self) -> list[str]:
        changes = [word for text in self.resume_with for word in ("--resume-with", text)]
        return [self.recipe, *self.overrides, *changes]


def submit(run: Run, resources: Resources, evaluate: bool, dry_run: bool) -> None:
    """Write the job script of a run into its folder, submit it, and say how to watch it.

    Args:
        evaluate: submit a second job, which scores the run once the first has succeeded.
        dry_run: print the scripts; nothing is written or submitted, and the files of the run are not checked.
    Raises:
        UserError: recipe, options or cluster are not right; the message says what is submitted all the same.
    """
    for option in resources.options:
        if not option.startswith("-") or "\n" in option:
            fix = 'like --sbatch "--constraint=a100", once per option'
            raise UserError(f"{option!r} is not an option of sbatch", "command line (--sbatch)", fix)
    recipe = load_recipe(run.recipe, [*run.overrides, *run.resume_with])
    with contextlib.redirect_stdout(sys.stderr):  # its note, since the script may go into a pipe
        recipe = fit_micro_batch(recipe, resources.world_size)
    if problems := batch_problems(recipe, resources.world_size):
        raise RecipeError(problems, f"recipe {recipe.name}")
    if evaluate and not recipe.eval.tasks:
        fix = "name some, eval.tasks=[arc_easy], or leave --evaluate out"
        raise UserError("there is no task to evaluate", recipe.where("eval.tasks"), fix)
    folder = Path(recipe.output_dir).absolute()
    scripts = {TRAIN: job_script(recipe.name, "train", folder, run.words(), resources)}
    if evaluate:
        scripts[EVALUATE] = job_script(f"{recipe.name}-eval", "eval", folder, [str(folder)], resources)
    if dry_run:
        print("\n".join(scripts.values()), end="")
        return
    start = _checked_start(recipe, run, resources)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in scripts.items():
        (folder / name).write_text(text, encoding="utf-8")
    job = _sbatch(folder / TRAIN)
    resumed = f", continuing from {start.checkpoint.path}" if start.checkpoint else ""
    print(f"job {job}: {recipe.name} on {resources.nodes} x {resources.ranks_per_node} ranks{resumed}")
    print(f"  script    {folder / TRAIN}")
    print(f"  log       tail -F {shlex.quote(str(folder / f'slurm-{job}.out'))}")
    print(f"  watch     squeue --job={job}")
    print(
        f"  stop      scancel {job}   (it writes a checkpoint; the same `speft submit` continues from there)"
    )
    if evaluate:
        note = f"job {job}, which trains, is submitted all the same"
        second = _sbatch(folder / EVALUATE, f"--dependency=afterok:{job}", note=note)
        print(f"  evaluate  job {second}, after it")


def _checked_start(recipe: Recipe, run: Run, resources: Resources) -> Start:
    """What the job would find out after its time in the queue. Raises UserError."""
    if shutil.which("sbatch") is None:
        fix = "submit on a login node of the cluster; to see the script: speft submit ... --dry-run"
        raise UserError("there is no sbatch on this machine", "PATH", fix)
    start = find_start(recipe, Resume(IF_ANY, run.resume_with))
    if start.state == "finished":
        fix = f"choose another, output_dir={recipe.output_dir}-2"
        raise UserError(f"the run in {recipe.output_dir} is finished", recipe.where("output_dir"), fix)
    check_files("train", recipe, resources.world_size)
    return start


def job_script(job: str, kind: str, folder: Path, arguments: list[str], resources: Resources) -> str:
    """A batch script: this machine's paths and the resources, around launch/slurm/<kind>.sbatch.

    Args:
        job: the name in the queue.
        kind: train or eval.
        folder: the run folder, where the log goes.
        arguments: of that script.
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
        *(f"#SBATCH {option}" for option in [*map(shlex.quote, named), *own, *resources.lines()]),
        *(f"export {name}={shlex.quote(value)}" for name, value in variables.items()),
        f"exec bash {shlex.join([str(script), *arguments])}",
    ]
    return "\n".join(lines) + "\n"


def _sbatch(script: Path, *options: str, note: str = "nothing is submitted") -> str:
    """Submit a script; returns the job's number. Raises UserError, whose note says what was submitted."""
    command = ["sbatch", "--parsable", *options, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip().removeprefix("sbatch: error: ")
        fix = "change the options; `sinfo` shows the partitions, nodes and time limits"
        raise UserError(f"sbatch refused the job: {reason}; {note}", str(script), fix)
    return done.stdout.strip().partition(";")[0]
