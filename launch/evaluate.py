"""Score a finished run, or any model, with lm-eval on all ranks; train nothing.

Writes eval/<model>-<tasks>.json into the run folder (of a model: runs/evaluate-<model>), and every document
into a folder next to it. Without --tasks, it scores the tasks of the run's recipe. The scores of the run from
before and after training are printed beside the new ones.

worked examples:
  eight GPUs
      deepspeed --num_gpus 8 launch/evaluate.py --run runs/llama2_13b_alpaca --tasks arc_easy,hellaswag
  two ranks on the CPU, 100 documents per task, 4 examples in each prompt
      export DS_ACCELERATOR=cpu
      deepspeed --num_gpus 2 launch/evaluate.py --run runs/quickstart --limit 100 --num-fewshot 4
  a base without any training; stock tasks whose data sets lie in a folder, without a network
      deepspeed --num_gpus 8 launch/evaluate.py --model ./Llama-2-13b-hf --tasks mmlu eval.data_dir=./hub
  a run as if it computed in few bits, simulated: the weights of its linears, and their inputs
      deepspeed --num_gpus 8 launch/evaluate.py --run runs/llama2_13b_alpaca --weights bfp6 --activations bfp8
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from speft_ds.cli.launch import start

if __name__ == "__main__":
    start("evaluate", __doc__)
