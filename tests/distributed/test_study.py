"""A study of real runs, killed and stopped in the middle, and gone on with."""

import json
import os
import signal
import subprocess
import sys
import time
from itertools import product

import pytest
import yaml
from limits import HANG_S
from live import ROOT, metrics, whole_steps
from unit.report.reading import page_of

from speft_ds.training.run_dir import is_locked

STEPS = 600


class Study:
    """The command, started in its own folder."""

    def __init__(self, folder):
        env = os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        words = ["study", "two.yaml", "--output", "out", "--jobs", "2"]
        self.log = folder / f"{time.monotonic_ns()}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "speft_ds.cli.main", *words],
                cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def until(self, is_so, must_run=True):
        deadline = time.monotonic() + HANG_S
        while not is_so():
            is_running = self.process.poll() is None or not must_run
            assert is_running and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)

    def code(self):
        return self.process.wait(HANG_S)


@pytest.fixture
def start(values, tmp_path):
    """start(): the study of a short and a long variant with two seeds each."""
    values["eval"] = {"validation": values["data"]["path"]}
    values.pop("output_dir")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values))
    study = {
        "recipe": "./mine.yaml",
        "variants": {"short": {"train.steps": 2}, "long": {"train.steps": STEPS}},
        "seeds": [1, 2],
        "reference": "short",
    }
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    started = []

    def begin():
        started.append(Study(tmp_path))
        return started[-1]

    yield begin
    for study in started:
        study.process.kill()


def test_killed_stopped_and_gone_on_with(start, tmp_path):
    out = tmp_path / "out"

    def all_facts():
        return {path.parent.name: json.loads(path.read_text()) for path in out.glob("runs/*/run.json")}

    def checkpoints():
        """The last step of each run that is not finished."""
        steps = {
            name: whole_steps(out / "runs" / name)
            for name, each in all_facts().items()
            if not each["finished"]
        }
        return {name: found[0] for name, found in steps.items() if found}

    def is_behind(step):
        """Whether a long run is in the middle, behind this step."""
        lines = [path.read_text().count("\n") for path in out.glob("runs/long-*/metrics.jsonl")]
        return any(step < number < STEPS for number in lines)

    study = start()
    study.until(lambda: is_behind(5))
    study.process.kill()
    study.code()
    # Nobody is left behind: the runs are told, and stop with a checkpoint.
    study.until(lambda: not any(map(is_locked, out.glob("runs/*"))), must_run=False)
    finished = {name: each for name, each in all_facts().items() if each["finished"]}
    first = checkpoints()
    assert finished and first and all(0 < step < STEPS for step in first.values())

    study = start()
    study.until(lambda: is_behind(max(first.values()) + 5))
    study.process.send_signal(signal.SIGTERM)
    assert study.code() == 85, study.log.read_text()
    second = checkpoints()
    assert max(second.values()) > max(first.values())

    study = start()
    assert study.code() == 0, study.log.read_text()
    facts = all_facts()
    assert len(facts) == 4 and all(each["finished"] for each in facts.values())
    assert {name: facts[name] for name in finished} == finished  # not made again
    for name, each in facts.items():
        starts = [begun["step"] for begun in each["starts"]]
        assert set(starts) >= {done[name] for done in (first, second) if name in done}
        number = STEPS if name.startswith("long") else 2
        assert [line["step"] for line in metrics(out / "runs" / name)] == list(range(1, number + 1))

    results = json.loads((out / "study.json").read_text())["results"]
    assert {(each["variant"], each["seed"]) for each in results} == set(product(("long", "short"), (1, 2)))
    for each in results:
        last = metrics(out / "runs" / each["name"])[-1]
        assert each["measures"]["validation_loss"]["value"] == last["validation_loss"]
    page = page_of(out)
    assert [page.row(variant)[1] for variant in ("short", "long")] == ["2 of 2", "2 of 2"]

    again = start()
    assert again.code() == 0 and all_facts() == facts
