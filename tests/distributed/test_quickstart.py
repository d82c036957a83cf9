"""The quickstart, shortened: the real model, its data and task, through the real command."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from limits import HANG_S
from transformers import AutoModelForCausalLM

import speft_ds
from speft_ds.tools.quickstart import default_cache_dir

SHORT = [
    "model.dtype=float32",
    "train.steps=3",
    "optimizer.warmup_steps=1",
    "train.global_batch=4",
    "train.micro_batch=2",
    "mask.calibration_samples=4",
    "eval.before=false",
    "eval.limit=2",
]


def test_quickstart_trains_the_real_model(tmp_path):
    run = tmp_path / "run"
    command = [str(Path(sys.executable).with_name("speft")), "quickstart", f"output_dir={run}", *SHORT]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=2 * HANG_S, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 3 and losses[2] < losses[0]
    facts = json.loads((run / "run.json").read_text())
    assert facts["mask"]["num_trainable"] == 530_842  # 0.5% of 210 linears, 106,168,320 entries
    assert (run / "adapter" / "adapter.safetensors").stat().st_size < 5.5 * 530_842
    (row,) = json.loads((run / "eval" / "after.json").read_text())["scores"]
    assert (row["task"], row["num_documents"]) == ("quickstart_json", 2)
    assert (run / "report.html").stat().st_size > 50_000
    # The adapter fits the checkpoint that was downloaded, and changes at most the masked entries.
    folder = default_cache_dir() / "SmolLM2-135M-Instruct"
    base, model = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    speft_ds.apply_adapter(model, run / "adapter")
    pairs = zip(model.parameters(), base.parameters(), strict=True)
    changed = sum(int((one != two).sum()) for one, two in pairs)
    assert 0.9 * 530_842 < changed <= 530_842
