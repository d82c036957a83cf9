"""A step of models with experts over transformers' own: forward and activation gradients, frozen weights.

    python benchmarks/experts.py [--quick] [--dtype float32] [--json PATH]

One process, one thread, random weights. `adapted` has every weight adapted and no mask, `masked` a random
mask of `--density` in all of them; both take turns with the untouched model. Ratios of the medians of the
time, and of the time that the processor spent, which a busy machine disturbs less.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from markdown import print_table  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from speft_ds.env import machine_facts  # noqa: E402
from speft_ds.io import write_json  # noqa: E402
from speft_ds.model.targets import find_targets  # noqa: E402
from speft_ds.sparse.kernels.backends import make_backend  # noqa: E402
from speft_ds.sparse.kernels.stacked import make_stacked  # noqa: E402
from speft_ds.sparse.tiles import Tiles  # noqa: E402
from speft_ds.zero.engine import require_grad  # noqa: E402
from speft_ds.zero.shards import stack_size  # noqa: E402

SIZES = {"vocab_size": 1024, "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
FAMILIES = {
    "mixtral": {"intermediate_size": 1024, "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen3_moe": {"moe_intermediate_size": 256, "num_experts": 32, "num_experts_per_tok": 4},
    "gpt_oss": {"intermediate_size": 512, "num_local_experts": 8, "num_experts_per_tok": 2},
    "deepseek_v3": {
        "num_key_value_heads": 8,
        "intermediate_size": 1024,
        "moe_intermediate_size": 256,
        "n_routed_experts": 32,
        "num_experts_per_tok": 4,
        "first_k_dense_replace": 1,
    },
}
COLUMNS = ["family", "step", "ratio", "processor time"]


def make_models(family: str, layers: int, dtype: torch.dtype, density: float) -> dict[str, nn.Module]:
    """The untouched model, one whose weights are adapted, and one that computes a mask's gradient, too."""
    torch.manual_seed(0)
    values = {**SIZES, "head_dim": 64, "num_hidden_layers": layers, "pad_token_id": 0, **FAMILIES[family]}
    config = AutoConfig.for_model(family)
    config = AutoConfig.for_model(family, **{k: v for k, v in values.items() if hasattr(config, k)})
    plain = AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(False)
    models = {"transformers": plain, "adapted": copy.deepcopy(plain), "masked": copy.deepcopy(plain)}
    for name, model in models.items():
        model.get_input_embeddings().register_forward_hook(require_grad)
        for target in {} if name == "transformers" else find_targets(model, None).values():
            target.adapt()
            if name == "masked":
                numel = target.weight.numel()
                index = torch.randperm(numel)[: max(1, int(density * numel))].sort().values.to(torch.int32)
                experts = stack_size(target.weight)
                arguments = ("auto", index, target.shape, Tiles.of("element", 1, target.shape), False)
                made = make_stacked(*arguments, experts) if experts else make_backend(*arguments)
                target.weight_grad_hook = made[1]
    return models


def step(model: nn.Module, ids: torch.Tensor) -> tuple[float, float]:
    """Seconds, and seconds of the processor."""
    began, busy = time.perf_counter(), time.process_time()
    model(input_ids=ids, use_cache=False).logits.sum().backward()
    return time.perf_counter() - began, time.process_time() - busy


def measure(family: str, arguments: argparse.Namespace) -> list[dict]:
    layers, length, rounds = (2, 128, 3) if arguments.quick else (4, 256, arguments.rounds)
    models = make_models(family, layers, getattr(torch, arguments.dtype), arguments.density)
    ids = torch.randint(0, SIZES["vocab_size"], (4, length), generator=torch.Generator().manual_seed(1))
    times = {name: [] for name in models}
    for number in range(rounds + 1):
        for name, model in models.items():
            seconds = step(model, ids)
            if number:  # the first one warms up
                times[name].append(seconds)
    medians = {
        name: [statistics.median(column) for column in zip(*t, strict=True)] for name, t in times.items()
    }
    floor = medians["transformers"]
    return [
        {
            "family": family,
            "step": name,
            "ratio": seconds / floor[0],
            "cpu_ratio": busy / floor[1],
            "seconds": seconds,
        }
        for name, (seconds, busy) in medians.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller models and 3 rounds")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--density", type=float, default=0.005)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, default=ROOT / "runs" / "benchmarks" / "experts.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for family in FAMILIES for row in measure(family, arguments)]
    shown = [[r["family"], r["step"], f"{r['ratio']:.3f}", f"{r['cpu_ratio']:.3f}"] for r in rows]
    print_table(COLUMNS, shown)
    write_json(arguments.json, {"machine": machine_facts(), "rows": rows})


if __name__ == "__main__":
    main()
