"""Train a recipe: `deepspeed launch/train.py --recipe NAME_OR_PATH [key.sub=value ...]`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from speft_ds.entry import start

if __name__ == "__main__":
    start("train", "Sparse fine-tuning on DeepSpeed ZeRO-3.")
