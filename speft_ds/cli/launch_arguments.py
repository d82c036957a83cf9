"""The command lines of the launched scripts. Imports no torch."""

from __future__ import annotations

import argparse
import os
import sys
import time
from functools import partial
from typing import IO

from speft_ds.config.recipe import Job
from speft_ds.env import rank
from speft_ds.training.checkpoint.resume import IF_ANY, NEWEST

RANK_0_S = 3  # that the other ranks wait, so that rank 0 has said what is wrong when they exit
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


class _Parser(argparse.ArgumentParser):
    """Every rank has the same command line, so only rank 0 prints help and usage errors."""

    def _print_message(self, message: str, file: IO[str] | None = None) -> None:
        if rank() == 0:
            super()._print_message(message, file)

    def exit(self, status: int = 0, message: str | None = None) -> None:
        if status and rank() != 0:
            time.sleep(RANK_0_S)
        super().exit(status, message)


def parse_arguments(job: Job, manual: str) -> argparse.Namespace:
    """The command line of this rank; `manual` is what --help says of the job."""
    usage, add_arguments = JOBS[job]
    parser = _Parser(
        usage=f"deepspeed [launcher options] launch/%(prog)s {usage} [KEY=VALUE ...]",
        description=manual,
        epilog=MORE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_arguments(parser)
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the launcher adds it
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="recipe keys to change")
    arguments = parser.parse_intermixed_args(_words())
    if job == "evaluate" and arguments.adapter and arguments.model is None:
        parser.error("--adapter goes with --model; a run has its own")
    if job == "train" and arguments.resume is None:
        if arguments.recipe is None:
            parser.error("the following arguments are required: --recipe")
        if arguments.resume_with:
            parser.error("--resume-with goes with --resume")
    return arguments


def _words() -> list[str]:
    """The words of the command line; a KEY=VALUE after `--resume` is not its path."""
    words = sys.argv[1:]
    for number, word in enumerate(words[1:], 1):
        if words[number - 1] == "--resume" and "=" in word and not os.path.exists(word):
            words[number - 1] = f"--resume={NEWEST}"
    return words


def _add_recipe(parser: argparse.ArgumentParser, required: bool = True) -> None:
    parser.add_argument("--recipe", required=required, help="a name (`speft ls`) or the path of a YAML file")


def _add_train(parser: argparse.ArgumentParser) -> None:
    _add_recipe(parser, required=False)  # `--resume runs/NAME` names one, too
    parser.add_argument(
        "--resume",
        nargs="?",
        const=NEWEST,
        metavar="PATH",
        help="continue the run in the run folder from its newest complete checkpoint, or from the "
        f"checkpoint or run folder of this path; `{IF_ANY}`: only if there is a run, else start one",
    )
    parser.add_argument(
        "--resume-with",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a harmless change of the recipe to continue with; an error lists what needs it",
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
    asked("--limit", type="eval.limit={}".format, metavar="N", help="documents per task")


# What each job needs, for its usage; and what adds its arguments.
JOBS = {
    "train": ("--recipe RECIPE", _add_train),
    "score": ("--recipe RECIPE", _add_recipe),
    "evaluate": ("--run RUN | --model PATH --tasks A,B", _add_evaluate),
}
