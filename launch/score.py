"""Score the weights of a recipe's model and select a mask, on DeepSpeed ZeRO-3; train nothing.

Leaves mask.safetensors, mask.png and score.json in the run folder; mask.load=FOLDER trains with that mask.
`speft score` starts this script for you.

worked examples:
  one GPU
      deepspeed --num_gpus 1 launch/score.py --recipe quickstart
  eight GPUs (without --num_gpus: every GPU of the machine), results in a folder of your choice
      deepspeed --num_gpus 8 launch/score.py --recipe llama2_13b_alpaca output_dir=runs/mask
  two nodes with the same paths; each line of hosts.txt is like: node1 slots=8
      deepspeed --hostfile hosts.txt launch/score.py --recipe llama2_70b_alpaca
  two ranks on the CPU
      DS_ACCELERATOR=cpu deepspeed --num_gpus 2 launch/score.py --recipe quickstart
  any key of the recipe changed, as often as you like; lists and text as in YAML
      deepspeed launch/score.py --recipe quickstart mask.salience=snip 'mask.layers=[0, 9]'
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from speft_ds.cli.launch import start

if __name__ == "__main__":
    start("score", __doc__)
