"""What the quickstart needs before it can train: a small real model, a data set and an lm-eval task.

<cache>/SmolLM2-135M-Instruct/                     an ordinary Hugging Face checkpoint, bf16
<cache>/quickstart/train.jsonl, heldout.jsonl      1024 + 128 rows of `prompt`, `response`
<cache>/quickstart/tasks/quickstart_json.yaml      pass the folder to lm-eval as `include_path`
"""

import time
from pathlib import Path

from speft_ds.env import CACHE, expand_path
from speft_ds.quickstart.data import write_data
from speft_ds.quickstart.model import NAME, is_ready, prepare_model
from speft_ds.quickstart.task import write_task


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/speft_ds`, or `~/.cache/speft_ds`."""
    return Path(expand_path(CACHE))


def prepare(cache_dir: Path | None = None) -> Path:
    """Make everything that the quickstart needs and that is not there yet; return the cache folder.

    The first run downloads 93 MB and takes about a minute; later ones take a fraction of a second and import
    no torch. It may be interrupted and started again at any point. Raises UserError as `prepare_model` does.
    """
    cache_dir = Path(cache_dir or default_cache_dir()).expanduser().resolve()
    if is_ready(cache_dir):
        print(f"model  {cache_dir / NAME} (already there)")
    else:
        print(f"model  downloading and converting {NAME}, about a minute ...", flush=True)
        start = time.monotonic()
        path = prepare_model(cache_dir)
        print(f"model  {path} ({time.monotonic() - start:.0f} s)")

    folder = cache_dir / "quickstart"
    train, heldout = write_data(folder)
    print(f"data   {train} and {heldout.name}")
    task = write_task(folder / "tasks", train, heldout)
    print(f"task   {task}")
    return cache_dir
