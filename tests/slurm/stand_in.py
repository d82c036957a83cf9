"""Stands in for a script of launch/ in a job: says what it was given, and ends as a run would.

STAND_IN says how: `exit N`; `wait`: for a signal, then with 85, once restarted with 0; `slow`: as a Python
that takes long to come up, then with 0.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from speft_ds.env import init_env

RANK = int(os.environ["SLURM_PROCID"])
KEYS = (
    "SLURM_LOCALID",
    "SLURM_JOB_NODELIST",
    "CUDA_VISIBLE_DEVICES",
    "MASTER_ADDR",
    "MASTER_PORT",
    "STAND_IN",
)


def say(**facts):
    print(json.dumps({"rank": RANK, **facts}), flush=True)


def wait_for_signal():
    received = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, _: received.append(number))
    say(ready=os.environ.get("SLURM_RESTART_COUNT", "0"))
    while not received:
        time.sleep(0.02)
    time.sleep(0.2 + 0.5 * RANK)  # the first to leave must not drag the others along
    os._exit(85)


init_env()
how, _, code = os.environ["STAND_IN"].partition(" ")
say(argv=sys.argv[1:], **{key: os.environ.get(key) for key in KEYS})
if how == "exit":
    os._exit(int(code))
if how == "wait" and "SLURM_RESTART_COUNT" not in os.environ:
    wait_for_signal()
if how == "slow":
    say(ready="0")
    time.sleep(1.5)
