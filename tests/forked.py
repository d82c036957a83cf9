"""Processes for tests, forked from a server that has imported the package: a start takes no ten seconds."""

import multiprocessing

PRELOAD = [
    "pytest",
    "speft_ds.jobs.train",
    "speft_ds.report",
    "matplotlib.backends.backend_agg",
    "matplotlib.backends.backend_svg",
    "matplotlib.figure",
    "speft_ds.evaluation.runner",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.tokenization_auto",
    "transformers.tokenization_utils_tokenizers",
    "torch.distributed.tensor",
]


def server():
    """The context of such processes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context
