"""Bad inputs: found before torch is imported, each with where it is and a fix.

Run as a script, this file writes the problems that are found as JSON.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

GOOD_ROW = '{"prompt": "a", "response": "b"}\n'
MODEL = "model:\n  name_or_path: ./model\n"
GOOD = MODEL + "data:\n  path: rows.jsonl\n"
MIXTURE = MODEL + "data:\n  mixture:\n    - path: rows.jsonl\n"
CLASSIFIER = MODEL + "  task: sequence_classification\ndata:\n  path: labels.csv\n  format: classification\n"

# What is written below GOOD, so from line 5 on -> the problem's line and key, and a part of its fix.
APPENDED = {
    "seed: '3'": ("5 (seed)", "seed=0"),
    "seed: true": ("5 (seed)", ""),
    "seed: 1.0": ("5 (seed)", ""),
    "mask:\n  desnity: 0.1": ("6 (mask.desnity)", "did you mean mask.density?"),
    "density: 0.1": ("5 (density)", "mask.density"),
    "mask: {lr: 1}": ("5 (mask.lr)", "optimizer.lr"),
    "optimiser: {lr: 1}": ("5 (optimiser)", "did you mean optimizer?"),
    "trainer:\n  steps: 5": ("5 (trainer)", "train"),
    "mask: {chat_template: true}": ("5 (mask.chat_template)", "data.chat_template or eval.chat_template"),
    "mask: {zzz: 1}": ("5 (mask.zzz)", "mask.salience, mask.density"),
    "train: {per_device_train_batch_size: 4}": ("5 (train.per_device_train_batch_size)", "train.micro_batch"),
    "mask:\n  extends: quickstart": ("6 (mask.extends)", "mask.salience"),
    "name: x": ("5 (name)", "rename"),
    "7: x": ("5 (7)", "model, data"),
    "mask: 3": ("5 (mask)", "mask.salience"),
    "  columns: prompt": ("5 (data.columns)", "data.columns.instruction"),
    "data: {path: b}": ("5 (data)", "mine.yaml:3 (data)"),
    "seed: 1\nseed: 2": ("6 (seed)", "mine.yaml:5 (seed)"),
    "mask:\n  budget: global\n  budget: global": ("7 (mask.budget)", "mine.yaml:6"),
    "mask: [": ("5", "indent"),
    "\tmask: 1": ("5", "indent"),
    "eval: {limit: *nowhere}": ("5", "quote"),
    "output_dir: !!python/name:os.system": ("5", "quote"),
    "? [a]\n: x": ("5", "quote"),
    "mask: {salience: gradiant}": ("5 (mask.salience)", "did you mean gradient?"),
    "mask: {budget: 7}": ("5 (mask.budget)", "global, per_layer"),
    "mask: {density: 0}": ("5 (mask.density)", "mask.density=0.005"),
    "mask: {density: '0.1'}": ("5 (mask.density)", "without quotes"),
    "mask: {density: 0.1, num_trainable: 5}": ("5 (mask.num_trainable)", "keep one"),
    "mask: {density: null}": ("(mask.num_trainable)", "mask.density"),
    "mask: {score_device: gpu}": ("5 (mask.score_device)", "device, host"),
    "mask: {schedule: drop_grow, drop_anneal: cos}": ("5 (mask.drop_anneal)", "cosine"),
    "mask: {layers: 3}": ("5 (mask.layers)", "[first, last]"),
    "mask:\n  layers: [4, 1]": ("6 (mask.layers)", "mask.layers=[1,4]"),
    "train: {steps: 1, epochs: 1}": ("5 (train.steps)", "keep one"),
    "train: {epochs: null}": ("(train.steps)", "train.epochs"),
    "train: {stash: bfp3}": ("5 (train.stash)", "bfp4"),
    "train:\n  stash: true": ("6 (train.stash)", "dynamic"),
    "train: {global_batch: 6}": ("(train.micro_batch)", "1, 2, 3, 6"),
    "train: {micro_batch: 0}": ("5 (train.micro_batch)", "train.micro_batch=4"),
    "train: {checkpoint_every: 0}": ("5 (train.checkpoint_every)", "15 minutes"),
    "train: {checkpoint_every: 2 hours}": ("5 (train.checkpoint_every)", "15 minutes"),
    "train: {keep_best: true}": ("5 (train.keep_best)", "eval.validation="),
    "train: {steps: 5, profile: [3, 6]}": ("5 (train.profile)", "train.profile=[3,5]"),
    "train: {steps: 5}\noptimizer:\n  warmup_steps: 6": ("7 (optimizer.warmup_steps)", "train.steps=6"),
    "train: {global_batch: 6, micro_batch: 3}": ("5 (train.global_batch)", "train.global_batch=12"),
    "optimizer: {betas: [0.9]}": ("5 (optimizer.betas)", "[0.9, 0.999]"),
    "optimizer: {lr: fast}": ("5 (optimizer.lr)", "optimizer.lr=0.001"),
    "optimizer: {name: adam}": ("5 (optimizer.name)", "adamw"),
    "eval: {manual_fewshot: [4]}": ("5 (eval.manual_fewshot)", "eval.tasks="),
    "eval: {validation: nowhere.jsonl}": ("5 (eval.validation)", "eval.validation="),
    "  mixture:\n    - path: rows.jsonl": ("5 (data.mixture)", "keep one"),
    "  select: longest": ("(data.select_rows)", "data.select=all"),
    "  select: ifd\n  select_rows: 10": ("(data.scorer)", "data.select=all"),
    "  select: ifd\n  select_rows: 1\n  scorer: ./small": ("7 (data.scorer)", "data.scorer=/the/right/path"),
    "  format: sharegpt": ("5 (data.format)", "messages"),
    "  columns: {instruction: question}": ("5 (data.columns.instruction)", "prompt, response"),
    "  columns: {question: q}": ("5 (data.columns.question)", "data.columns.prompt"),
    "  prompt_column: question": ("5 (data.prompt_column)", "data.columns.prompt"),
    "  template: 'Q: {prompt'": ("5 (data.template)", "{{"),
    "  template: 'Q: {prompt:>10}'": ("5 (data.template)", "{question}"),
    "  template: 'Q: {question}'": ("rows.jsonl:1", "prompt, response"),
    "  format: alpaca\n  template_no_input: 'x'": ("6 (data.template_no_input)", "data.template"),
    "  format: classification\n  labels: [no, yes]": ("6 (data.labels)", '["no", "yes"]'),
    "  format: messages\n  chat_template: false": ("6 (data.chat_template)", "data.chat_template=true"),
    "  format: classification\n  labels: [a]": ("6 (data.labels)", ""),
}
# Key -> what its section holds, in line 5 below GOOD; the fix says what the key is for.
REFUSED = {
    "mask.density": ["density: 5", "density: .nan", "density: true"],
    "mask.num_trainable": ["num_trainable: 0"],
    "mask.targets": ["targets: q_proj", "targets: []", "targets: [a, 1]"],
    "mask.block_size": ["granularity: block, block_size: 1"],
    "mask.lift_rank": ["salience: lift, lift_rank: 0"],
    "mask.calibration_seed": ["calibration_seed: -1"],
    "mask.calibration_path": ["calibration_path: 3"],
    "mask.load": ["load: ''"],
    "mask.update_every": ["schedule: periodic, update_every: 0"],
    "mask.drop_rate": ["schedule: drop_grow, drop_rate: 1"],
    "mask.growth_steps": ["schedule: drop_grow, growth_steps: 0"],
    "mask.topk_fraction": ["schedule: grad_topk, topk_fraction: 1.5"],
    "mask.gate_every": ["layer_gate: half, gate_every: 0"],
    "mask.gate_layers": ["layer_gate: sampled, gate_layers: 0"],
    "mask.layers": ["layers: [3]", "layers: [0, 1, 2]", "layers: [-1, 2]", "layers: [0, 1.5]"],
    "train.steps": ["steps: ten", "steps: 1.5", "steps: 1e3"],
    "train.timeout_minutes": ["timeout_minutes: 0"],
    "train.profile": ["profile: [3, 2]", "profile: [1]", "profile: [0, 2]"],
    "optimizer.betas": ["betas: [0.9, 1]"],
    "optimizer.lr": ["lr: -1e-3", "lr: .inf", "lr: null"],
    "optimizer.momentum": ["name: sgd, momentum: 1.0", "name: sgd, momentum: -0.1"],
}
# A file of its own -> the same.
COMPLETE = {
    "": ("mine.yaml", "speft cp"),
    "- model\n- data\n": ("mine.yaml", "speft cp"),
    "seed: \x01": ("mine.yaml", "quote"),
    "seed: 1\n---\nseed: 2\n": ("2", "quote"),
    "seed: 1": ("mine.yaml (model.name_or_path)", "model.name_or_path="),
    MODEL: ("data.path (default)", "data.path="),
    MODEL + "data:\n  mixture:\n    - weight: 2\n": ("4 (data.mixture)", "data.mixture"),
    MIXTURE + "      weight: 2\n    - path: rows.jsonl\n": ("4 (data.mixture)", "every source"),
    MIXTURE + "      wieght: 2\n": ("6 (data.mixture[0].wieght)", ""),
    MIXTURE + "    - path: none.jsonl\n": ("6 (data.mixture[1].path)", "data.path="),
    MIXTURE + "      split: test\n": ("6 (data.mixture[0].split)", "remove"),
    MIXTURE + "    - path: rows.jsonl\n  split: test\n": ("7 (data.split)", "data.split=train"),
    MODEL + "  task: sequence_classification\ndata: {path: rows.jsonl}\n": (
        "(data.format)",
        "data.format=classification",
    ),
    MODEL + "  dtype: auto\ndata: {path: rows.jsonl}\nmask: {salience: grasp}\n": (
        "5 (mask.salience)",
        "model.dtype=float32",
    ),
    CLASSIFIER + "eval:\n  tasks: [arc_easy]\n": ("8 (eval.tasks)", "eval.tasks=[]"),
    CLASSIFIER + "  packing: true\n": ("7 (data.packing)", "data.packing=false"),
    CLASSIFIER + "  long_rows: truncate_response\n": ("7 (data.long_rows)", "truncate_prompt"),
    CLASSIFIER + "  select: longest\n  select_rows: 2\n": ("7 (data.select)", "data.select=random"),
    "extends: quickstrat\n": ("1 (extends)", "quickstart"),
    "extends: ./none.yaml\n": ("1 (extends)", "folder"),
    "extends: ./mine.yaml\n": ("1 (extends)", "remove"),
}
# A word of the command line -> the same; the place is that word, where none is said.
OVERRIDES = {
    "mask.desnity=1": (None, "mask.density?"),
    "foo.density=1": (None, "mask.density?"),
    "foo.bar=1": (None, "extends, model, data, method, mask"),
    "seed.x=1": (None, ""),
    "name=x": (None, "rename"),
    "extends=quickstart": (None, "speft cp"),
    "mask={density: 1}": (None, "mask.salience"),
    "optimizer.learning_rate=1e-3": (None, "optimizer.lr?"),
    "--resume": (None, "optimizer.lr="),
    "=3": (None, "model, data"),
    "mask.density=2": (None, "mask.density="),
    "mask.targets=*_proj": (None, """mask.targets='"*_proj"'"""),
    "mask.targets=[q_proj": (None, "quote"),
    "model.name_or_path=": (None, ""),
    "train.steps='80'": (None, "without quotes"),
    "model.name_or_path=./nowhere": (None, "model.name_or_path=/the/right/path"),
    "model.name_or_path=nowhere": (None, "owner/name"),
    "model.name_or_path=./config_only": (None, "model.name_or_path="),
    "model.name_or_path=./no_config": (None, "model.name_or_path="),
    "model.name_or_path=./half": (None, "model.name_or_path="),
    "model.name_or_path=./damaged": ("damaged/config.json", "copy it again"),
    "model.name_or_path=meta-llama/Llama-2-13b-hf": (None, "hf download meta-llama/Llama-2-13b-hf"),
    "data.path=tatsu-lab/alpaca": (None, "hf download --repo-type dataset tatsu-lab/alpaca"),
    "data.path=null": (None, "data.path=/the/right/path"),
    "data.path=none.jsonl": (None, "data.path=/the/right/path"),
    "data.path=rows.txt": (None, "convert"),
    "data.path=empty.json": (None, "data.path="),
    "data.path=broken.jsonl": ("broken.jsonl:2", ""),
    "data.path=lines.json": ("lines.json", ".jsonl"),
    "data.path=lists.jsonl": ("lists.jsonl:1", ""),
    "data.path=questions.jsonl": ("questions.jsonl:1", "data.columns.prompt=promt"),
    "data.path=latin.jsonl": ("latin.jsonl:1", "UTF-8"),
    "data.path=folder": (None, "data.path="),
    "data.path=none*.jsonl": (None, "*"),
    "data.path=rows.*": (None, "convert"),
    "data.path=kinds": (None, "data.path='kinds/*"),
    "data.path=twice.csv": ("twice.csv:1", "rename"),
    "data.path=wide.csv": ("wide.csv:1", "UTF-8"),
    "data.split=test": (None, "data.split=train"),
    "data.subset=main": (None, "data.subset=null"),
    "data.revision=main": (None, "data.revision=null"),
    "data.labels=[a, b]": (None, "data.format=classification"),
    "data.select_rows=10": (None, "data.select=longest"),
    "mask.load=runs/none": (None, "speft score"),
    "mask.load=rows.jsonl": (None, "speft score"),
    "mask.calibration_path=none.jsonl": (None, "mask.calibration_path=/the/right/path"),
    "mask.calibration_path=questions.jsonl": ("questions.jsonl:1", "promt, response"),
    "eval.include_path=none": (None, "eval.include_path="),
    "eval.forgetting_text=none": (None, "eval.forgetting_text="),
    "deepspeed.config=zero3_bf61": (None, "zero3_bf16"),
    "deepspeed.config=nowhere.json": (None, "zero3_bf16"),
    "deepspeed.config=./stage2.json": ("stage2.json (zero_optimization)", '"stage": 3'),
    "data.max_length=4096": (None, "data.max_length=2048"),
}
CASES = {
    **{text: (GOOD + text, [], *expected) for text, expected in APPENDED.items()},
    **{
        f"{key}: {text}": (f"{GOOD}{key.partition('.')[0]}: {{{text}}}", [], f"5 ({key})", "")
        for key, texts in REFUSED.items()
        for text in texts
    },
    **{text: (text, [], *expected) for text, expected in COMPLETE.items()},
    **{word: (GOOD, [word], place or word, fix) for word, (place, fix) in OVERRIDES.items()},
}


def write_files(folder: Path) -> None:
    """What the recipes name."""
    texts = {
        "rows.jsonl": GOOD_ROW * 4,
        "rows.txt": GOOD_ROW,
        "empty.json": "[]",
        "broken.jsonl": GOOD_ROW + '{"prompt": "a", \n',
        "lines.json": GOOD_ROW * 2,
        "lists.jsonl": "[1, 2]\n",
        "questions.jsonl": '{"promt": "a", "response": "b"}\n',
        "kinds/a.jsonl": GOOD_ROW,
        "kinds/b.csv": "prompt,response\na,b\n",
        "twice.csv": "prompt,response,response\na,b,c\n",
        "wide.csv": "p\0r\0",
        "labels.csv": "text,label\ngood,1\nbad,0\n",
        "stage2.json": '{"zero_optimization": {"stage": 2}}',
        "model/config.json": '{"max_position_embeddings": 2048}',
        "model/model.safetensors": "",
        "config_only/config.json": "{}",
        "damaged/config.json": "{",
        "damaged/model.safetensors": "",
        "no_config/model.safetensors": "",
        "half/config.json": "{}",
        "half/model.safetensors.index.json": '{"weight_map": {"a": "model-2-of-2.safetensors"}}',
    }
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "latin.jsonl").write_bytes('{"prompt": "é"}'.encode("latin-1"))
    (folder / "folder").mkdir()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Problems by case, from one process without a network, and whether that imported torch."""
    folder = tmp_path_factory.mktemp("bad")
    write_files(folder)
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "PYTHONPATH": str(ROOT)}
    env.pop("HF_HUB_CACHE", None)
    command = [sys.executable, __file__]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_bad_inputs_are_found_before_torch_is_imported(run):
    assert not run["torch"] and len(run["found"]) == len(CASES)


@pytest.mark.parametrize("case", CASES)
def test_a_problem_says_what_where_and_what_to_do(run, case):
    _, _, place, part_of_fix = CASES[case]
    ((what, where, fix), *more) = run["found"][case]
    assert not more and where.endswith(place) and part_of_fix in fix and fix
    assert what and "pydantic" not in what


def main() -> None:
    from speft_ds.cli.launch import checked_recipe
    from speft_ds.errors import RecipeError

    found = {}
    for name, (text, overrides, *_) in CASES.items():
        Path("mine.yaml").write_text(text, encoding="utf-8")
        try:
            checked_recipe("train", "mine.yaml", overrides, 4)
            found[name] = []
        except RecipeError as error:
            found[name] = [(problem.what, problem.where, problem.fix) for problem in error.problems]
    json.dump({"found": found, "torch": "torch" in sys.modules}, sys.stdout)


if __name__ == "__main__":
    main()
