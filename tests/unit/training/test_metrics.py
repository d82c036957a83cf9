"""What a run's console says while it trains."""

import pytest

from speft_ds.training import metrics

LINE = {
    "loss": 1.0,
    "grad_norm": 1.0,
    "lr": 1e-3,
    "num_skipped": 0,
    "peak_memory_gib": 1.0,
    "tokens_per_s": 9.0,
}


@pytest.mark.parametrize(
    ("then_s", "said"),
    [(0.0, "1 min 38 s of training"), (None, "then scoring"), (62.0, "2 min 40 s left")],
)
def test_after_the_second_step_a_run_says_how_long_it_will_take(tmp_path, capsys, then_s, said):
    log = metrics.MetricsLog(tmp_path / "metrics.jsonl", num_steps=102, done=2, then_s=then_s)
    for step, step_ms in ((3, 90_000.0), (4, 1000.0), (5, 1000.0)):
        log.log({"step": step, "step_ms": step_ms, **LINE})
    log.close()
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("about ")]
    assert len(told) == 1 and said in told[0]


def test_a_short_run_says_nothing_of_it():
    assert metrics.time_left(5.0, 5.0) == "" and metrics.time_left(5.0, None) == ""
