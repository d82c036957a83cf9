"""Train a recipe: choose a small part of a model's weights, train them on DeepSpeed ZeRO-3, save an adapter.

worked examples:
  one GPU
      deepspeed --num_gpus 1 launch/train.py --recipe quickstart
  eight GPUs (without --num_gpus: every GPU of the machine), results in a folder of your choice
      deepspeed --num_gpus 8 launch/train.py --recipe llama2_13b_alpaca output_dir=runs/mine
  two GPUs of your choice; with --num_gpus the launcher takes the first ones, whatever is visible
      CUDA_VISIBLE_DEVICES=2,3 deepspeed launch/train.py --recipe quickstart
  two nodes with the same paths; each line of hosts.txt is like: node1 slots=8
      deepspeed --hostfile hosts.txt launch/train.py --recipe llama2_70b_alpaca
  two ranks on the CPU
      DS_ACCELERATOR=cpu deepspeed --num_gpus 2 launch/train.py --recipe quickstart
  any key of the recipe changed, as often as you like; lists and text as in YAML
      deepspeed launch/train.py --recipe quickstart mask.density=0.01 'mask.layers=[0, 9]' train.steps=40
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from speft_ds.cli.launch import start

if __name__ == "__main__":
    start("train", __doc__)
