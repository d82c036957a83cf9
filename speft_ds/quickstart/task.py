"""The quickstart's lm-eval task: exact match of the generated record on the held-out messages."""

import json
from pathlib import Path

from speft_ds.quickstart.files import write_text

TASK_NAME = "quickstart_json"

TEMPLATE = """\
task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    train: {train}
    test: {heldout}
training_split: train
fewshot_split: train
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{response}}}}"
generation_kwargs:
  until: ["\\n", "<|im_end|>"]
  max_gen_toks: {max_gen_toks}
  do_sample: false
  temperature: 0.0
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1
"""


def write_task(folder: Path, train: Path, heldout: Path, max_gen_toks: int = 56) -> Path:
    """Write `quickstart_json.yaml` for the rows in `heldout` (a jsonl file) into `folder`; return its path.

    Pass `folder` to lm-eval as `include_path`. Few-shot examples come from the rows in `train`. The longest
    response takes fewer than `max_gen_toks` tokens.
    """
    path, rows = Path(folder) / f"{TASK_NAME}.yaml", {"train": train, "heldout": heldout}
    # a JSON string is a YAML string, whatever characters the path holds
    files = {name: json.dumps(str(Path(file).resolve())) for name, file in rows.items()}
    write_text(path, TEMPLATE.format(task=TASK_NAME, **files, max_gen_toks=max_gen_toks))
    return path
