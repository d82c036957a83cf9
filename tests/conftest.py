import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

# What tests tokenise is theirs; ranks and launched runs inherit the folder.
os.environ["SPEFT_DS_CACHE"] = tempfile.mkdtemp(prefix="speft_ds_cache_")
atexit.register(shutil.rmtree, os.environ["SPEFT_DS_CACHE"], ignore_errors=True)

# Which kernels a run takes must not depend on how busy this machine is; test_kernel_costs.py measures.
os.environ["SPEFT_DS_KERNELS"] = "rules"

# DeepSpeed's op is compiled for this tree alone: no other run takes turns with it, and what a killed test
# run left behind is known to be of no use.
os.environ["TORCH_EXTENSIONS_DIR"] = str(ROOT / ".torch_extensions")
for lock in (ROOT / ".torch_extensions").glob("*/lock"):
    lock.unlink()

# `make test` runs two at a time, and ranks beside them: more threads than cores are several times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# As in an activated environment. Ranks and launched runs compile DeepSpeed's op with one ninja: two ninjas
# of different versions would each compile it anew, half a minute whenever they take turns.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])

from ranks import Accelerator, Ranks  # noqa: E402

_GROUPS: dict[int, Ranks] = {}


@pytest.fixture(scope="session")
def ranks():
    """`ranks(world_size)`: a group of ranks, started when first asked for and kept for the session.

    Each has a GPU where there are any; a test that asks for more ranks than GPUs is skipped.
    """
    accelerator = Accelerator.find()

    def group(world_size: int) -> Ranks:
        if why_not := accelerator.why_not(world_size):
            pytest.skip(why_not)
        return _GROUPS.setdefault(world_size, Ranks(world_size, accelerator))

    group.why_not = accelerator.why_not
    yield group
    for started in _GROUPS.values():
        started.stop()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Checkpoints, rows and lm-eval tasks for tests: paths by name."""
    import tiny

    folder = tmp_path_factory.mktemp("tiny")
    rows = tiny.make_data(folder)
    return {
        "untied": tiny.make_model(folder / "untied"),
        "tied": tiny.make_model(folder / "tied", tied=True, seed=1),
        "bias": tiny.make_model(folder / "bias", seed=2, attention_bias=True),
        "pruned": tiny.make_model(folder / "pruned", pruned=True),
        "heads": tiny.make_model(
            folder / "heads", hidden_size=36, num_attention_heads=6, num_key_value_heads=3, head_dim=4
        ),
        "data": rows,
        "tasks": tiny.make_task(folder, rows),
        "folder": folder,
    }
