"""Processes for tests, forked from a server that has imported the package: a start takes no ten seconds."""

import contextlib
import multiprocessing
from multiprocessing import forkserver
from pathlib import Path


def server():
    """The context of such processes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preloaded"])
    with contextlib.chdir(Path(__file__).parent):  # where the server finds the module
        forkserver.ensure_running()
    return context
