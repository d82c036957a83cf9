"""Whole runs on data of every shape: the real command on real ranks."""

import csv
import gzip
import json
import re

import pytest
from live import finishes, is_refused
from tiny import recipe_values

from distributed.test_classification import make_rows


@pytest.fixture
def values(tiny, tmp_path):
    train = {"steps": 3, "global_batch": 4, "micro_batch": 1}
    mask = {"calibration_samples": 8}
    made = recipe_values(tiny, mask=mask, train=train, output_dir=str(tmp_path / "run"))
    return {**made, "data": {"max_length": 256}}


def test_a_packed_mixture(values, start, tiny, tmp_path):
    tasks = [{"instruction": "add", "input": f"{i} and 1" * (i % 2), "output": str(i)} for i in range(20)]
    with gzip.open(tmp_path / "tasks.csv.gz", "wt", newline="") as file:
        writer = csv.DictWriter(file, list(tasks[0]))
        writer.writeheader()
        writer.writerows(tasks)
    chats = [
        {
            "messages": [
                {"role": role, "content": f"{role} {i}"} for role in ("user", "assistant") * (1 + i % 2)
            ]
        }
        for i in range(10)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    mixture = [
        {"path": str(tiny["data"]), "weight": 2},
        {"path": str(tmp_path / "tasks.csv.gz"), "weight": 1, "format": "alpaca", "chat_template": False},
        {"path": str(tmp_path / "chats.jsonl"), "weight": 1, "format": "messages"},
    ]
    values["data"] |= {"mixture": mixture, "packing": True, "long_rows": "truncate_prompt", "turns": "each"}
    runs = []
    for ranks in (1, 2):
        folder = tmp_path / f"run{ranks}"
        finishes(start(f"output_dir={folder}", num_ranks=ranks))
        runs.append([json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()])
    for one, two in zip(*runs, strict=True):
        assert one["num_tokens"] == two["num_tokens"]
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-6)
    assert len({step["num_tokens"] for step in runs[0]}) > 1


def test_a_classifier_is_scored_and_trained_with_that_mask(values, start, tmp_path):
    values["model"]["task"] = "sequence_classification"
    path = str(make_rows(tmp_path))
    values["data"] |= {"path": path, "format": "classification", "columns": {"text": "sentence"}}
    finishes(start(f"output_dir={tmp_path / 'mask'}", job="score"))
    printed = finishes(start(f"mask.load={tmp_path / 'mask'}"))
    assert re.search(r"trained whole\W+70\W+weights", printed)
    facts = json.loads((tmp_path / "run" / "adapter" / "adapter.json").read_text())
    assert (facts["task"], facts["classes"]) == ("sequence_classification", ["0", "1"])
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= step["accuracy"] <= 1 and step["accuracy"] * 4 % 1 == 0 for step in steps)


def test_a_base_in_few_bits_is_scored_and_trained_with_that_mask(values, start, tiny, tmp_path):
    values["model"]["base_format"] = "nf4"
    values["data"]["path"] = str(tiny["data"])
    finishes(start(f"output_dir={tmp_path / 'mask'}", job="score"))
    finishes(start(f"mask.load={tmp_path / 'mask'}"))
    scored = json.loads((tmp_path / "mask" / "score.json").read_text())
    facts = json.loads((tmp_path / "run" / "adapter" / "adapter.json").read_text())
    shared = ("base_format", "quantised", "fingerprint")
    assert [facts[key] for key in shared] == [scored[key] for key in shared]
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["mask"]["sha256"] == scored["mask"]["sha256"]


def test_a_row_without_a_response_is_named(values, start, tmp_path):
    rows = [{"prompt": "a", "response": "b"}] * 20 + [{"prompt": "a", "response": ""}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values["data"]["path"] = str(path)
    run = start()
    is_refused(run)
    assert run.text().count("has an empty 'response'") == 1 and f"{path}:21" in run.text(), run.text()
    assert not (tmp_path / "run").exists()
