"""Score a finished run with lm-eval: the base with its adapter, sharded by DeepSpeed ZeRO-3; train nothing.

Leaves eval/<task>+<task>.json in the run folder. Without --tasks, the tasks of the run's recipe.

worked examples:
  eight GPUs
      deepspeed --num_gpus 8 launch/evaluate.py --run runs/llama2_13b_alpaca --tasks arc_easy,hellaswag
  two ranks on the CPU, 100 documents a task
      DS_ACCELERATOR=cpu deepspeed --num_gpus 2 launch/evaluate.py --run runs/quickstart --limit 100
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from speft_ds.entry import start

if __name__ == "__main__":
    start("evaluate", __doc__)
