"""A monitor that fails in the middle of a run: a note, once, and training goes on."""

import json

import pytest

from speft_ds.training import metrics
from speft_ds.training.metrics import MetricsLog, Monitor
from unit.written import load

pytestmark = pytest.mark.usefixtures("own_folder")
VALUES = {
    "step": 1,
    "loss": 2.5,
    "grad_norm": 1.0,
    "lr": 1e-3,
    "num_skipped": 0,
    "peak_memory_gib": 0.1,
    "tokens_per_s": 9.0,
    "step_ms": 3.0,
}


class Broken:
    """DeepSpeed's monitor on a full disk, or with W&B's network gone; `calls`: how often it was asked."""

    wandb_monitor = None

    def __init__(self, works_for):
        self.works_for, self.calls = works_for, 0
        self.tb_monitor = self  # whose summary_writer does not close either

    def write_events(self, events):
        self.calls += 1
        if self.calls > self.works_for:
            raise OSError(28, "No space left on device")

    @property
    def summary_writer(self):
        self.calls += 1
        raise RuntimeError("the network is gone \x1b[2J")


@pytest.mark.parametrize("works_for", [0, 2, 5])
def test_training_goes_on_without_it(tmp_path, monkeypatch, capsys, works_for):
    broken = Broken(works_for)
    monkeypatch.setattr(metrics, "_start", lambda *_: broken)
    monitor = Monitor(load(tmp_path, "", "train.monitor=csv"), tmp_path)
    log = MetricsLog(tmp_path / "metrics.jsonl", 5, monitor=monitor)
    for step in range(1, 6):
        log.log(VALUES | {"step": step})
    log.close()
    monitor.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5]
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert len(said) == 1 and "\x1b" not in said[0]
    assert broken.calls == works_for + 1  # and is not asked again
