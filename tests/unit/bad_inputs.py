"""Bad inputs, each with what is wrong. Run as a script, it prints their messages as JSON.

Every one of them has to be found before torch is imported.
"""

import json
import sys
from pathlib import Path

GOOD_ROW = '{"prompt": "a", "response": "b"}\n'
MODEL = "model:\n  name_or_path: ./model\n"
GOOD = MODEL + "data:\n  path: rows.jsonl\n"

# name -> (recipe text, overrides)
RECIPES = {
    "empty recipe": ("", []),
    "a list": ("- model\n", []),
    "not YAML": ("model: {name_or_path: ./model\n", []),
    "tab indentation": ("model:\n\tname_or_path: ./model\n", []),
    "three mistakes": (
        "model:\n  name_or_path: ./model\n  dtype: float8\ndata:\n  path: rows.jsonl\n"
        "mask:\n  densty: 0.01\noptimizer:\n  lr: fast\n",
        [],
    ),
    "no model": ("data:\n  path: rows.jsonl\n", []),
    "no data": (MODEL, []),
    "unknown section": (GOOD + "trainer:\n  steps: 5\n", []),
    "unknown key": (GOOD + "train:\n  stps: 5\n", []),
    "a key of another section": (GOOD + "train:\n  lr: 1e-3\n", []),
    "a dotted key": (GOOD + "mask.density: 0.1\n", []),
    "a section as a value": (GOOD + "mask: 0.1\n", []),
    "columns as a value": (GOOD + "  columns: prompt\n", []),
    "a key twice": (GOOD + "seed: 1\nseed: 2\n", []),
    "a name": (GOOD + "name: mine\n", []),
    "text for a number": (GOOD + "train:\n  steps: ten\n", []),
    "a quoted number": (GOOD + 'train:\n  steps: "10"\n', []),
    "a fraction of a step": (GOOD + "train:\n  steps: 1.5\n", []),
    "a checkpoint every 0 steps": (GOOD + "train:\n  checkpoint_every: 0\n", []),
    "a checkpoint every now and then": (GOOD + "train:\n  checkpoint_every: 2 hours\n", []),
    "the best by nothing": (GOOD + "train:\n  keep_best: true\n", []),
    "no held-out rows": (GOOD + "eval:\n  validation: nowhere.jsonl\n", []),
    "no patience": (GOOD + "train:\n  timeout_minutes: 0\n", []),
    "zero steps": (GOOD + "train:\n  steps: 0\n", []),
    "negative lr": (GOOD + "optimizer:\n  lr: -1e-3\n", []),
    "infinite lr": (GOOD + "optimizer:\n  lr: .inf\n", []),
    "betas of one": (GOOD + "optimizer:\n  betas: [0.9]\n", []),
    "a beta of 1": (GOOD + "optimizer:\n  betas: [0.9, 1.0]\n", []),
    "density 0": (GOOD + "mask:\n  density: 0\n", []),
    "density in percent": (GOOD + "mask:\n  density: 5\n", []),
    "density and count": (GOOD + "mask:\n  density: 0.1\n  num_trainable: 10\n", []),
    "neither density nor count": (GOOD + "mask:\n  density: null\n", []),
    "steps and epochs": (GOOD + "train:\n  steps: 5\n  epochs: 2\n", []),
    "unknown salience": (GOOD + "mask:\n  salience: gradients\n", []),
    "unknown schedule": (GOOD + "mask:\n  schedule: dynamic\n", []),
    "layers the wrong way round": (GOOD + "mask:\n  layers: [5, 2]\n", []),
    "a key without effect": (GOOD + "mask:\n  block_size: 8\n", []),
    "a budget that does not go": (GOOD + "mask:\n  budget: per_row\n  granularity: block\n", []),
    "growth longer than the window": (
        GOOD + "mask:\n  schedule: drop_grow\n  update_every: 3\n  growth_steps: 4\n",
        [],
    ),
    "a mask that would not change": (
        GOOD + "mask:\n  schedule: periodic\n  update_every: 50\ntrain:\n  steps: 20\n",
        [],
    ),
    "grasp in bfloat16": (GOOD + "mask:\n  salience: grasp\n", []),
    "grasp in any dtype": (GOOD + "mask:\n  salience: grasp\n", ["model.dtype=auto"]),
    "more warm-up than steps": (GOOD + "optimizer:\n  warmup_steps: 9\ntrain:\n  steps: 5\n", []),
    "micro-batch": (GOOD + "train:\n  global_batch: 16\n  micro_batch: 3\n", []),
    "ranks": (GOOD + "train:\n  global_batch: 6\n  micro_batch: 3\n", []),
    "path and mixture": (GOOD + "  mixture:\n    - path: rows.jsonl\n", []),
    "a mixture of one weight": (
        MODEL + "data:\n  mixture:\n    - path: rows.jsonl\n      weight: 2\n    - path: rows.jsonl\n",
        [],
    ),
    "a mixture without a path": (MODEL + "data:\n  mixture:\n    - weight: 2\n", []),
    "a mixture's unknown key": (MODEL + "data:\n  mixture:\n    - path: rows.jsonl\n      wieght: 2\n", []),
    "a mixture's missing file": (
        MODEL + "data:\n  mixture:\n    - path: rows.jsonl\n    - path: none.jsonl\n",
        [],
    ),
    "select without a number": (GOOD + "  select: longest\n", []),
    "a number without select": (GOOD + "  select_rows: 10\n", []),
    "ifd without a scorer": (GOOD + "  select: ifd\n  select_rows: 10\n", []),
    "unknown format": (GOOD + "  format: sharegpt\n", []),
    "a column of another format": (GOOD + "  columns: {instruction: question}\n", []),
    "an unknown column role": (GOOD + "  columns: {question: q}\n", []),
    "an old key": (GOOD + "  prompt_column: question\n", []),
    "a broken template": (GOOD + "  template: 'Q: {prompt'\n", []),
    "a template with a format": (GOOD + "  template: 'Q: {prompt:>10}'\n", []),
    "a template of missing columns": (GOOD + "  template: 'Q: {question}'\n", []),
    "half of an alpaca template": (GOOD + "  format: alpaca\n  template_no_input: '{instruction}'\n", []),
    "messages without a chat template": (GOOD + "  format: messages\n  chat_template: false\n", []),
    "labels without classification": (GOOD + "  labels: [a, b]\n", []),
    "one label": (GOOD + "  format: classification\n  labels: [a]\n", []),
    "a classifier of prompts": (
        MODEL + "  task: sequence_classification\ndata:\n  path: rows.jsonl\n",
        [],
    ),
    "a classifier's tasks": (
        MODEL + "  task: sequence_classification\ndata:\n  path: labels.csv\n  format: classification\n"
        "eval:\n  tasks: [arc_easy]\n",
        [],
    ),
    "a packed classifier": (
        MODEL + "  task: sequence_classification\ndata:\n  path: labels.csv\n  format: classification\n"
        "  packing: true\n",
        [],
    ),
    "a missing model folder": (GOOD, ["model.name_or_path=./nowhere"]),
    "a model without weights": (GOOD, ["model.name_or_path=./config_only"]),
    "a model without a shard": (GOOD, ["model.name_or_path=./half"]),
    "a hub model offline": (GOOD, ["model.name_or_path=meta-llama/Llama-2-13b-hf"]),
    "a hub data set offline": (GOOD, ["data.path=tatsu-lab/alpaca"]),
    "a missing data file": (GOOD, ["data.path=none.jsonl"]),
    "an unknown kind of file": (GOOD, ["data.path=rows.txt"]),
    "an empty data file": (GOOD, ["data.path=empty.jsonl"]),
    "broken JSON": (GOOD, ["data.path=broken.jsonl"]),
    "a JSON object": (GOOD, ["data.path=object.json"]),
    "rows that are lists": (GOOD, ["data.path=lists.jsonl"]),
    "rows without the columns": (GOOD, ["data.path=questions.jsonl"]),
    "a csv row too long": (GOOD, ["data.path=long.csv"]),
    "damaged gzip": (GOOD, ["data.path=rows.jsonl.gz"]),
    "damaged parquet": (GOOD, ["data.path=rows.parquet"]),
    "not UTF-8": (GOOD, ["data.path=latin.jsonl"]),
    "an empty folder": (GOOD, ["data.path=folder"]),
    "a mask that is not there": (GOOD, ["mask.load=runs/none"]),
    "a calibration file that is not there": (GOOD, ["mask.calibration_path=none.jsonl"]),
    "a task folder that is not there": (GOOD, ["eval.include_path=none"]),
    "an unknown DeepSpeed config": (GOOD, ["deepspeed.config=zero3_bf61"]),
    "a DeepSpeed config that owns too much": (GOOD, ["deepspeed.config=./owned.json"]),
    "ZeRO stage 2": (GOOD, ["deepspeed.config=./stage2.json"]),
    "an override without a value": (GOOD, ["optimizer.lr"]),
    "an override of a section": (GOOD, ["mask=0.1"]),
    "an override of an unknown key": (GOOD, ["optimizer.learning_rate=1e-3"]),
    "another trainer's key": (GOOD + "train:\n  per_device_train_batch_size: 4\n", []),
    "a recipe that is not there": (None, []),
    "an override that is not YAML": (GOOD, ["mask.targets=[q_proj"]),
    "extends an unknown recipe": ("extends: quickstrat\n", []),
    "extends a missing file": ("extends: ./none.yaml\n", []),
    "extends itself": ("extends: ./mine.yaml\n", []),
}


def write_files(folder: Path) -> None:
    """What the recipes name."""
    texts = {
        "rows.jsonl": GOOD_ROW * 4,
        "rows.txt": GOOD_ROW,
        "empty.jsonl": "\n",
        "broken.jsonl": GOOD_ROW + '{"prompt": "a", \n',
        "object.json": '{"prompt": "a"}',
        "lists.jsonl": "[1, 2]\n",
        "questions.jsonl": '{"promt": "a", "answer": "b"}\n',
        "labels.csv": "text,label\ngood,1\nbad,0\n",
        "long.csv": "prompt,response\na,b,c\n",
        "owned.json": '{"zero_optimization": {"stage": 3}, "train_batch_size": 4, "bf16": {"enabled": true}}',
        "stage2.json": '{"zero_optimization": {"stage": 2}}',
        "model/config.json": "{}",
        "model/model.safetensors": "",
        "config_only/config.json": "{}",
        "half/config.json": "{}",
        "half/model.safetensors.index.json": '{"weight_map": {"a": "model-2-of-2.safetensors"}}',
    }
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "latin.jsonl").write_bytes('{"prompt": "é"}'.encode("latin-1"))
    (folder / "rows.jsonl.gz").write_bytes(b"\x1f\x8b damaged")
    (folder / "rows.parquet").write_bytes(b"PAR1 damaged")
    (folder / "folder").mkdir()


def main() -> None:
    from speft_ds.cli.launch import checked_recipe
    from speft_ds.errors import UserError

    messages = {}
    for name, (text, overrides) in RECIPES.items():
        Path("mine.yaml").unlink(missing_ok=True)
        if text is not None:
            Path("mine.yaml").write_text(text, encoding="utf-8")
        try:
            checked_recipe("train", "mine.yaml", overrides, 4)
            messages[name] = "nothing is wrong"
        except UserError as error:
            messages[name] = str(error)
    json.dump({"messages": messages, "torch": "torch" in sys.modules}, sys.stdout)


if __name__ == "__main__":
    main()
