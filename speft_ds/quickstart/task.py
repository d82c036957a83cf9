"""The quickstart's lm-eval task: exact match of the generated record on the held-out messages."""

import json
from pathlib import Path

from speft_ds.quickstart.files import write_text

TASK_NAME = "quickstart_json"

# Only a test split: lm-eval loads every split that a task names when it builds the task.
TEMPLATE = """\
task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {heldout}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{response}}}}"
num_fewshot: 0
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


def write_task(folder: Path, heldout: Path, max_gen_toks: int = 56) -> Path:
    """Write `quickstart_json.yaml` for the rows in `heldout` (a jsonl file) into `folder`; return its path.

    Pass `folder` to lm-eval as `include_path`. The longest response takes fewer than `max_gen_toks` tokens.
    """
    path = Path(folder) / f"{TASK_NAME}.yaml"
    # a JSON string is a YAML string, whatever characters the path holds
    absolute = json.dumps(str(Path(heldout).resolve()))
    write_text(path, TEMPLATE.format(task=TASK_NAME, heldout=absolute, max_gen_toks=max_gen_toks))
    return path
