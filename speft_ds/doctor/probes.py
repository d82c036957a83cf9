"""What runs in processes of its own, `python -m speft_ds.doctor.probes ...`: it may crash or hang there.

A probe prints each group of facts as a line of JSON as soon as it has it, so that what came before a crash
is known.
"""

from __future__ import annotations

import json
import sys
import warnings
from datetime import timedelta

from speft_ds import hub
from speft_ds.comm import deepspeed_shm
from speft_ds.hub import connection_error

COLLECTIVE_S = 120  # of one collective; the first waits for the other rank's import of torch


def main(arguments: list[str]) -> None:
    """What `ask` and `check_collective` start; not for users."""
    match arguments:
        case ["torch"]:
            _tell_about_torch()
            _tell_about_deepspeed()
        case ["hub"]:
            _tell_about_hub()
        case ["collective", backend, rank, port]:
            _add_as_rank(backend, int(rank), int(port))
        case _:
            sys.exit("usage: speft doctor")


def _tell(**facts: object) -> None:
    print(json.dumps(facts), flush=True)


def _tell_about_torch() -> None:
    import torch

    from speft_ds.dtype import multiplies_bfloat16

    with warnings.catch_warnings(record=True) as caught:  # why CUDA does not start is a warning
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = [torch.cuda.get_device_properties(i) for i in range(count)]
    has_nccl = bool(gpus) and torch.distributed.is_nccl_available()
    _tell(
        torch=torch.__version__,
        cuda=torch.version.cuda,
        cuda_warning=str(caught[-1].message).splitlines()[0] if caught else None,
        gpus=[[gpu.name, gpu.total_memory] for gpu in gpus],
        gpu_bf16=bool(gpus) and torch.cuda.is_bf16_supported(including_emulation=False),
        cpu_bf16=multiplies_bfloat16("cpu"),
        nccl=".".join(map(str, torch.cuda.nccl.version())) if has_nccl else None,
    )
    _tell(gpu_error=_gpu_error(count), extensions=str(deepspeed_shm.extensions_folder()))


def _gpu_error(count: int) -> str | None:
    """Why a GPU cannot add: one too new for this torch, say, or one in another's exclusive use."""
    import torch

    try:
        for i in range(count):
            torch.ones(8, device=f"cuda:{i}").sum().item()
    except Exception as error:
        return f"GPU {i}: {str(error).splitlines()[0]}"
    return None


def _tell_about_deepspeed() -> None:
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.git_version_info import installed_ops

    accelerator = get_accelerator()
    _tell(accelerator=accelerator.device_name(), backend=accelerator.communication_backend_name())
    compatible = bool(
        deepspeed.ops.__compatible_ops__.get(deepspeed_shm.NAME)
    )  # what DeepSpeed itself goes by
    _tell(shm_op_compatible=compatible, shm_op_installed=bool(installed_ops.get(deepspeed_shm.NAME)))


def _tell_about_hub() -> None:
    """What huggingface_hub uses, and whether the hub answers. No token is told."""
    from huggingface_hub import constants, get_token

    _tell(home=constants.HF_HOME)
    if not hub.is_offline_by_choice():
        _tell(unreachable=connection_error(hub.endpoint()))
    _tell(has_token=bool(get_token()))


def _add_as_rank(backend: str, rank: int, port: int) -> None:
    """Join the other rank and add, by the calls that a run makes."""
    import torch
    import torch.distributed as dist

    from speft_ds.comm import collectives

    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    address, limit = f"tcp://127.0.0.1:{port}", timedelta(seconds=COLLECTIVE_S)
    dist.init_process_group(backend, init_method=address, rank=rank, world_size=2, timeout=limit)
    total = collectives.all_reduce(torch.full((8,), rank + 1.0, device=device))
    pieces = torch.arange(16.0, device=device).view(2, 8)
    own = collectives.start_reduce_scatter(pieces + rank)()
    _expect("all_reduce", total.tolist(), [3.0] * 8)
    _expect("reduce_scatter", own.tolist(), (2 * pieces[rank] + 1).tolist())
    dist.destroy_process_group()


def _expect(what: str, found: list[float], wanted: list[float]) -> None:
    if found != wanted:
        raise RuntimeError(f"{what} gave {found} instead of {wanted}")


if __name__ == "__main__":
    main(sys.argv[1:])
