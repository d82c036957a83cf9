"""The launched scripts, from the command line to a job: all is checked before torch is imported."""

import argparse
import importlib
import os
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from functools import partial
from pathlib import Path
from typing import IO, NoReturn

import yaml

from speft_ds import env
from speft_ds.comm import signals, watchdog
from speft_ds.config import limited_yaml
from speft_ds.config.deepspeed_config import read_ds_config
from speft_ds.config.eval_config import EvalConfig
from speft_ds.config.load_recipe import as_override, load_recipe, recipe_of
from speft_ds.config.recipe import Job, Recipe, resolve
from speft_ds.config.values import BASE_FORMATS
from speft_ds.env import rank, threads_per_rank, world_size
from speft_ds.errors import UserError, did_you_mean
from speft_ds.evaluation.eval_jobs import LowBits
from speft_ds.io import read_json
from speft_ds.jobs.preflight import check_inputs, resolve_offline
from speft_ds.terminal import init_output
from speft_ds.training.checkpoint import resume
from speft_ds.training.checkpoint.resume import IF_ANY, NEWEST, Start
from speft_ds.training.run_dir import RECIPE, check_output_dir, wait_for_lock
from speft_ds.untrusted import printable

EXIT_USER_ERROR = 2
USAGE = {
    "train": "--recipe RECIPE",
    "score": "--recipe RECIPE",
    "evaluate": "--run RUN | --model PATH --tasks A,B",
}
DS_CONFIG = "zero3_cpu"  # to score with, on GPUs, too: the others differ in the reduction of gradients
# A finished run is scored without the mask that it started from, and without choosing another: its adapter
# says which entries changed. What may be forgotten was measured by the run itself.
NOT_SCORED_BY = (
    "mask.load=null",
    "mask.salience=gradient",
    "mask.start=zero",
    "mask.targets=null",
    "mask.layers=null",
    "eval.forgetting_text=null",
)
RANK_0_S = 3  # that the other ranks wait, so that rank 0 has said what is wrong when they exit
RESUME_HELP = (
    "continue the run in the run folder from its newest complete checkpoint; with a PATH, from that "
    f"checkpoint or run folder; `{IF_ANY}`: only if there is a run, else start one"
)
RESUME_WITH_HELP = "a harmless change of the recipe to continue with; an error lists what needs it"
TEXT_HELP = (
    "a text, or .jsonl rows with `text`, to measure the perplexity of; of its beginning: "
    f"eval.forgetting_bytes={EvalConfig.model_fields['forgetting_bytes'].default}"
)
WEIGHTS_HELP = f"score the weights of the decoder's linears as in {', '.join(BASE_FORMATS)}, simulated"
ACTIVATIONS_HELP = "the same of the linears' inputs"
MORE_HELP = """\
where to look things up:
  speft ls                  the recipes
  speft schema mask         the keys of a section, or without it all: types, defaults, meaning
  speft show quickstart     a recipe with every value, and where each comes from

exit codes:
  0    done
  1    it failed inside: the traceback says where
  2    something that you can fix: the message says what, where, and what to type
  85   training was stopped by SIGTERM, SIGINT (Ctrl-C) or SIGUSR1, with a checkpoint: --resume continues
  130  Ctrl-C a second time: left at once
"""


def start(job: Job, manual: str) -> NoReturn:
    """Run the job on this rank, and exit; `manual` is what --help says of it."""
    env.init_env()
    init_output()
    if job == "train":
        signals.watch_signals()  # before anything that takes long
    code = main(job, parse_arguments(job, manual))
    sys.stdout.flush()
    # No interpreter shutdown: a rank that failed must not wait in a collective's destructor for the others.
    os._exit(code) if code else sys.exit(0)


def main(job: Job, arguments: argparse.Namespace) -> int:
    """Check, then run; returns the exit code."""
    recipe = None
    try:
        with redirect_stdout(None) if arguments.checked else nullcontext():
            recipe, start = checked_start(job, arguments, world_size())
        if start.state == "finished":
            env.log_rank0(finished_note(start))
            return 0
        use_all_cores()
        if rank() != 0 or not sys.stderr.isatty():
            # The libraries' progress bars are noise elsewhere.
            os.environ.update(TQDM_DISABLE="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1")
        evaluated = (start.source, low_bits_of(arguments)) if job == "evaluate" else ()
        more = {"train": (start,), "score": (), "evaluate": evaluated}[job]
        importlib.import_module(f"speft_ds.jobs.{job}").run(recipe, *more)
        return 0
    except signals.Stopped as reason:
        if rank() == 0:
            hint = resume.resume_hint(Path(recipe.output_dir))
            print(f"stopped: {reason}\n{hint}", file=sys.stderr, flush=True)
        watchdog.close()
        return signals.EXIT_STOPPED
    except KeyboardInterrupt:
        return signals.EXIT_CTRL_C
    except Exception as error:
        is_bug = not isinstance(error, UserError)
        message = f"rank {rank()} failed:\n{traceback.format_exc()}" if is_bug else str(error)
        if job == "train" and recipe is not None and (is_bug or error.can_go_on):
            folder = Path(recipe.output_dir)
            if resume.last_complete(folder) is not None:
                message += f"\n{resume.resume_hint(folder)}"
        return fail(message, 1 if is_bug else EXIT_USER_ERROR)


def fail(message: str, code: int) -> int:
    """Print the message once, on the rank that failed first; returns the exit code.

    Before there is a watchdog, rank 0 prints at once, and the others only if rank 0 does not end the job with
    a message of its own.
    """
    if watchdog.fail(message):
        return code
    deadline = time.monotonic() + (RANK_0_S if rank() != 0 else 0)
    while time.monotonic() < deadline:
        if signals.stop_reason():  # the launcher ends this rank: rank 0 has printed its message and left
            return code
        time.sleep(0.1)
    print(printable(message), file=sys.stderr, flush=True)
    return code


def finished_note(start: Start) -> str:
    return f"the run in {start.source} is finished: there is nothing to resume"


def checked_start(job: Job, arguments: argparse.Namespace, world_size: int) -> tuple[Recipe, Start]:
    """The recipe of a job and where it starts (to evaluate: the adapter), both checked. Raises UserError."""
    if job == "evaluate":
        recipe, adapter = recipe_to_evaluate(arguments)
        if low_bits_of(arguments).weights and recipe.model.base_format:
            what = f"the weights are stored in {recipe.model.base_format}, which --weights would round again"
            raise UserError(what, "--weights", "leave it out")
        check_files(job, recipe, world_size)
        return recipe, Start(source=adapter)
    if job == "score" or arguments.resume is None:
        recipe = checked_recipe(job, arguments.recipe, arguments.overrides, world_size)
        check_output_dir(recipe)
        return recipe, Start()
    asked = resume.Resume(arguments.resume, tuple(arguments.resume_with))
    if arguments.recipe is None:
        recipe = resume.recipe_to_resume(asked, arguments.overrides)
    else:
        recipe = load_recipe(arguments.recipe, [*arguments.overrides, *asked.allowed])
    recipe = resume.fit_micro_batch(recipe, world_size)
    wait_for_lock(Path(recipe.output_dir))  # a run that is just ending writes its last checkpoint
    start = resume.find_start(recipe, asked)
    if start.state == "new":
        check_output_dir(recipe)
    if start.state != "finished":
        check_files(job, recipe, world_size)
    return recipe, start


def checked_recipe(job: Job, name_or_path: str, overrides: list[str], world_size: int) -> Recipe:
    """The recipe of a job, its files checked as far as the job reads them. Raises UserError."""
    recipe = resolve(load_recipe(name_or_path, overrides), job=job, world_size=world_size)
    check_files(job, recipe, world_size)
    return recipe


def check_files(job: Job, recipe: Recipe, world_size: int) -> None:
    """Check the files of a recipe as far as the job reads them. Raises UserError."""
    note = resolve_offline(recipe)  # before the checks, which may import the hub's libraries
    if note and rank() == 0:
        print(note, flush=True)
    check_inputs(recipe, job, world_size)


def recipe_to_evaluate(arguments: argparse.Namespace) -> tuple[Recipe, Path | None]:
    """The recipe of a run or of a model, with the tasks to score; and the adapter. Raises UserError."""
    overrides = [*arguments.asked, *arguments.overrides]
    if arguments.run:
        folder = Path(arguments.run)
        adapter = folder / "adapter"
        if not adapter.is_dir():
            raise UserError(f"{folder} has no adapter", "--run", "name the folder of a finished run")
        own = [as_override("output_dir", str(folder)), *_not_scored_by(folder / RECIPE)]
        recipe = load_recipe(str(folder / RECIPE), [*own, *overrides], name=folder.name)
        if read_ds_config(recipe)[1] and "deepspeed.config" not in _keys(overrides):
            env.log_rank0(f"note: {recipe.deepspeed.config} is of no use any more: scored with {DS_CONFIG}")
            more = [*own, f"deepspeed.config={DS_CONFIG}", *overrides]
            recipe = load_recipe(str(folder / RECIPE), more, name=folder.name)
    else:
        adapter = Path(arguments.adapter) if arguments.adapter else None
        own = [as_override("model.name_or_path", arguments.model), f"deepspeed.config={DS_CONFIG}"]
        if adapter is not None:
            own += _base_of(adapter)
        recipe = recipe_of(f"evaluate-{Path(arguments.model).name}", [*own, *overrides])
    if not recipe.eval.tasks and recipe.eval.forgetting_text is None:
        fix = "--tasks arc_easy,hellaswag (`lm-eval ls tasks` lists them), or --text FILE"
        raise UserError("no tasks to score", "--tasks", fix)
    return recipe, adapter


def low_bits_of(arguments: argparse.Namespace) -> LowBits:
    """The formats to score in. Raises UserError."""
    asked = {"weights": arguments.weights, "activations": arguments.activations}
    for what, name in asked.items():
        if name is not None and name not in BASE_FORMATS:
            raise UserError(f"{name!r:.50} is no format", f"--{what}", did_you_mean(name, BASE_FORMATS))
    return LowBits(**asked)


def _keys(overrides: list[str]) -> set[str]:
    return {text.partition("=")[0] for text in overrides}


def _not_scored_by(file: Path) -> list[str]:
    """What is set aside of a finished run's recipe; one of a method without a mask has no such section."""
    try:
        values = limited_yaml.load(limited_yaml.read_text(file))
    except (OSError, ValueError, yaml.YAMLError):
        values = None  # which loading it will say
    has_mask = isinstance(values, dict) and "mask" in values
    return [text for text in NOT_SCORED_BY if has_mask or not text.startswith("mask.")]


def _base_of(adapter: Path) -> list[str]:
    """Overrides by which a base is loaded as the adapter was trained on it."""
    try:
        facts = read_json(adapter / "adapter.json")
        values = {"model.dtype": facts["dtype"], "model.base_format": facts.get("base_format")}
        values["model.add_tokens"] = facts.get("new_tokens")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"not a readable adapter: {error}", str(adapter)) from error
    return [as_override(key, value) for key, value in values.items() if value is not None]


def use_all_cores() -> None:
    """Share a CPU machine's cores among its ranks: more threads than cores run several times slower."""
    local_ranks = int(os.environ.get("LOCAL_SIZE", 1))  # set by `init_env` for every launcher
    os.environ.setdefault("OMP_NUM_THREADS", str(threads_per_rank(os.environ, local_ranks)))


# The command line


class _Parser(argparse.ArgumentParser):
    """Every rank has the same command line, so only rank 0 prints help and usage errors."""

    def _print_message(self, message: str, file: IO[str] | None = None) -> None:
        if rank() == 0:
            super()._print_message(message, file)

    def exit(self, status: int = 0, message: str | None = None) -> None:
        if status and rank() != 0:
            time.sleep(RANK_0_S)
        super().exit(status, message)


def parse_arguments(job: Job, manual: str = "", words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line of a rank (None: of this process); `manual` is what --help says of the job."""
    parser = _Parser(
        usage=f"deepspeed [launcher options] launch/%(prog)s {USAGE[job]} [KEY=VALUE ...]",
        description=manual,
        epilog=MORE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if job == "evaluate":
        _add_evaluate(parser)
    else:  # `--resume runs/NAME` names a recipe, too
        what = "a name (`speft ls`) or the path of a YAML file"
        parser.add_argument("--recipe", required=job == "score", help=what)
    if job == "train":
        _add_resume(parser)
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the launcher adds it
    # Who started the ranks has made the checks, and has told what they note.
    parser.add_argument("--checked", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="recipe keys to change")
    arguments = parser.parse_intermixed_args(with_resume(sys.argv[1:] if words is None else words))
    if job == "evaluate" and arguments.adapter and arguments.model is None:
        parser.error("--adapter goes with --model; a run has its own")
    if job == "train" and arguments.resume is None:
        if arguments.recipe is None:
            parser.error("the following arguments are required: --recipe")
        if arguments.resume_with:
            parser.error("--resume-with goes with --resume")
    return arguments


def with_resume(words: Sequence[str]) -> list[str]:
    """The words of a command line, a --resume without a path (a KEY=VALUE is none) made one of the newest."""
    following = [*words, "-"][1:]
    return [
        f"--resume={NEWEST}"
        if word == "--resume" and (after[:1] == "-" or ("=" in after and not os.path.exists(after)))
        else word
        for word, after in zip(words, following, strict=True)
    ]


def _add_resume(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--resume",
        metavar="PATH",
        help=RESUME_HELP,
    )
    parser.add_argument(
        "--resume-with",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help=RESUME_WITH_HELP,
    )


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", metavar="RUN", help="the folder of a finished run: its base and its adapter")
    what.add_argument("--model", metavar="PATH", help="a model folder or hub id, with --adapter or as it is")
    parser.add_argument("--adapter", metavar="PATH", help="an adapter of that model")
    asked = partial(parser.add_argument, dest="asked", action="append", default=[])  # as overrides
    asked(
        "--tasks", type="eval.tasks=[{}]".format, metavar="A,B", help="lm-eval tasks; default: the recipe's"
    )
    asked("--num-fewshot", type="eval.num_fewshot={}".format, metavar="N", help="examples in each prompt")
    asked(
        "--limit",
        type="eval.limit={}".format,
        metavar="N",
        help="documents per task, or below 1 the share of them",
    )
    asked("--text", type=partial(as_override, "eval.forgetting_text"), metavar="FILE", help=TEXT_HELP)
    parser.add_argument("--weights", metavar="FORMAT", help=WEIGHTS_HELP)
    parser.add_argument("--activations", metavar="FORMAT", help=ACTIVATIONS_HELP)
