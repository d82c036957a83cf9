"""The model that a benchmark runs on: a folder, or a geometry with random weights. Imports no torch."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from speft_ds.env import cache_folder
from speft_ds.errors import UserError, did_you_mean
from speft_ds.tools.plan.geometry import config_file, list_geometries
from speft_ds.tools.quickstart import NAME, is_ready

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TESTS = Path(__file__).resolve().parent.parent / "tests"
LLAMA = {"model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 4096}
# Llamas of these sizes, one geometry a name; 1B is TinyLlama's.
SIZES = {
    "27M": {"vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8},
    "135M": {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30},
    "400M": {"vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 28},
    "1B": {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22},
}
QUICK_ROUNDS = 3
# (attention heads, of them for keys and values, tied embeddings)
HEADS = {"27M": (8, 4, True), "135M": (9, 3, True), "400M": (16, 16, True), "1B": (32, 4, False)}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """--model, --config and --geometry, of which one may be given."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", help="a model folder; default: the quickstart's SmolLM2-135M")
    which.add_argument("--config", help="a config.json, to be filled with random weights")
    which.add_argument("--geometry", help=f"the same by name: {', '.join(SIZES)}, or one of `speft plan`")


def add_run_arguments(parser: argparse.ArgumentParser, script: str, rounds: int) -> None:
    """What all scripts take that measure steps."""
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rows", type=int, default=4, help="of a micro-batch, one a rank and step")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row, all of them labels")
    parser.add_argument("--rounds", type=int, help=f"default: {rounds}; with --quick {QUICK_ROUNDS}")
    parser.add_argument("--limit-minutes", type=float, default=10, help="a rank silent for so long hangs")
    parser.add_argument("--quick", action="store_true", help="a few minutes on two cores")
    parser.add_argument("--json", type=Path, default=TESTS.parent / "runs" / "benchmarks" / f"{script}.json")


def find_model(arguments: argparse.Namespace, work: Path, default: str | None = None) -> tuple[str, str]:
    """(folder, name) of the model asked for; random weights are written below `work`.

    Args:
        default: the geometry to take where none is asked for; None: the quickstart's model.
    Raises:
        UserError: there is no such model.
    """
    if arguments.model:
        return arguments.model, Path(arguments.model).name
    if name := arguments.config or arguments.geometry or default:
        return random_model(work, name, arguments.dtype)
    if not is_ready(cache_folder()):
        fix = "speft quickstart --prepare-only, or --model FOLDER, or --geometry 135M"
        raise UserError("the quickstart's model is not prepared", str(cache_folder()), fix)
    return str(cache_folder() / NAME), NAME


def config_of(name: str) -> dict:
    """The configuration of a geometry, by its name or in a file. Raises UserError."""
    if name.endswith(".json"):
        return json.loads(Path(name).read_text(encoding="utf-8"))
    if name in SIZES:
        heads, of_keys, tied = HEADS[name]
        own = {"num_attention_heads": heads, "num_key_value_heads": of_keys, "tie_word_embeddings": tied}
        return LLAMA | SIZES[name] | own
    file = config_file(name)
    if file is None:
        known = [*SIZES, *list_geometries()]
        raise UserError(f"there is no geometry {name}", "--geometry", did_you_mean(name, known))
    return json.loads(file.read_text(encoding="utf-8"))


def random_model(work: Path, name: str, dtype: str) -> tuple[str, str]:
    """A checkpoint of random weights below `work`, and what to call it. Raises UserError."""
    values, name = config_of(name), Path(name).stem if name.endswith(".json") else name
    import torch

    sys.path.append(str(TESTS))
    from tiny import make_tokenizer

    on_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    folder = work / name.replace("/", "--")
    build(values, dtype, "cuda" if on_gpu else "cpu").save_pretrained(folder)
    if on_gpu:
        torch.cuda.empty_cache()  # which those who are measured need
    make_tokenizer().save_pretrained(folder)
    return str(folder), name


def build(values: dict, dtype: str, device: str) -> PreTrainedModel:
    """The model of a configuration, with random weights; a GPU draws 7B of them in a second."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        config = AutoConfig.for_model(**values)
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
