"""What forked processes find done: imports, and what libraries make once per process."""

import io

import pytest  # noqa: F401 - every child imports it as its parent's main module
import transformers.models.auto.tokenization_auto
import transformers.models.llama.modeling_llama
import transformers.tokenization_utils_tokenizers  # noqa: F401
from matplotlib.figure import Figure
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import speft_ds.cli.main
import speft_ds.evaluation.runner
import speft_ds.jobs.evaluate
import speft_ds.jobs.score
import speft_ds.jobs.train
import speft_ds.report  # noqa: F401

get_checkpoint_conversion_mapping("llama")  # compiles 1,200 regular expressions
figure = Figure()
figure.subplots().set_title("fonts")
figure.savefig(io.BytesIO(), format="svg")
