"""A Horovod script under mpirun, whose ranks come to their ends at different times: no hang, no word on stderr."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, time, torch
import dist_train.horovod as hvd
hvd.init()
gathered = hvd.allgather(torch.tensor([[hvd.rank(), hvd.local_rank(), hvd.cross_rank()]]))
unfinished = hvd.allreduce_async(torch.ones(1), name=f"only on {hvd.rank()}")
if hvd.rank() == 1:
    time.sleep(0.3)
print(json.dumps(gathered.tolist()) + "\\n", end="", flush=True)
"""


def test_a_script_under_mpirun_finds_its_world_and_ends_quietly(tmp_path):
    mpirun = Path(sys.executable).with_name("mpirun")
    if not mpirun.exists():
        pytest.skip("no mpirun beside this Python: install the extra 'dev' (openmpi)")
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    command = [mpirun, "--oversubscribe", "--allow-run-as-root", "-n", "2", sys.executable, script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines == [[[0, 0, 0], [1, 1, 0]]] * 2
