"""A checkpoint is whole or not there, and the newest whole one is found."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch

from dist_train.checkpoint import (
    CheckpointError,
    _CheckedFile,
    latest_name,
    load_latest,
    read_checkpoint,
    save_checkpoint,
)
from dist_train.collectives import Collectives
from dist_train.world import World

ALONE = Collectives(World())


def _save(run_dir, step, *, keep=2, size=1000):
    return save_checkpoint(
        run_dir,
        step=step,
        clips_seen=step * 8,
        state={"modules": {"classify": {"weight": torch.full((size,), float(step))}}, "note": "text"},
        meta={"world_size": 1},
        collectives=ALONE,
        keep=keep,
    )


def test_what_was_saved_is_loaded_with_its_position(tmp_path):
    _save(tmp_path, 3)
    found = load_latest(tmp_path, collectives=ALONE)
    assert (found.step, found.clips_seen, found.meta["world_size"]) == (3, 24, 1)
    assert torch.equal(found.state["modules"]["classify"]["weight"], torch.full((1000,), 3.0))


def test_no_checkpoint_is_none(tmp_path):
    assert load_latest(tmp_path, collectives=ALONE) is None
    assert latest_name(tmp_path) is None


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 4):
        _save(tmp_path, step, keep=2)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["latest", "step_00000003", "step_00000004"]
    assert latest_name(tmp_path) == "step_00000004"


@pytest.mark.parametrize("damage", ["flip a byte", "cut", "no meta", "no state"])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_used(tmp_path, caplog, damage):
    _save(tmp_path, 1)
    path = _save(tmp_path, 2)
    state = path / "state.pt"
    if damage == "flip a byte":
        content = bytearray(state.read_bytes())
        content[len(content) // 2] ^= 1
        state.write_bytes(content)
    elif damage == "cut":
        os.truncate(state, state.stat().st_size - 100)
    else:
        (path / ("meta.json" if damage == "no meta" else "state.pt")).unlink()
    assert load_latest(tmp_path, collectives=ALONE).step == 1
    assert "step_00000002 is damaged" in caplog.text
    _save(tmp_path, 2)  # the resumed run comes to the same step and replaces it
    assert load_latest(tmp_path, collectives=ALONE).step == 2


def test_a_damaged_one_ahead_never_costs_the_newest_whole_one(tmp_path):
    """Resumed from before a damaged checkpoint, the run saves at a lower step than the damaged one claims."""
    _save(tmp_path, 20)
    (_save(tmp_path, 30) / "state.pt").unlink()
    (tmp_path / "checkpoints" / ".step_00000025.partial").mkdir()
    _save(tmp_path, 24, keep=1)
    assert load_latest(tmp_path, collectives=ALONE).step == 24
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["latest", "step_00000024"]


class _Stingy:
    """A file that takes at most 1,000 bytes at a time, as a raw file may."""

    def __init__(self, file):
        self._file = file

    def write(self, data):
        return self._file.write(data[:1000])


def test_a_file_that_takes_less_than_it_is_given_gets_every_byte(tmp_path):
    content = bytes(range(256)) * 50
    with (tmp_path / "file").open("wb") as file:
        checked = _CheckedFile(_Stingy(file))
        assert checked.write(content) == len(content)
    assert (tmp_path / "file").read_bytes() == content
    assert (checked.num_bytes, checked.crc32) == (len(content), zlib.crc32(content))


def test_all_damaged_is_an_error_not_a_fresh_start(tmp_path):
    (_save(tmp_path, 1) / "state.pt").unlink()
    with pytest.raises(CheckpointError, match="all 1 are damaged"):
        load_latest(tmp_path, collectives=ALONE)


def test_pickled_classes_are_refused(tmp_path):
    path = _save(tmp_path, 1)
    torch.save({"modules": Path("x")}, path / "state.pt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        read_checkpoint(path)


def test_a_full_disk_is_one_clear_error_and_the_earlier_checkpoint_stays(tmp_path):
    """On a real file system of 1 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    try:
        _save(disk, 1)
        with pytest.raises(CheckpointError, match=r"No space left on device \(step_00000001 is whole\).*--resume"):
            _save(disk, 2, size=1_000_000)
        assert load_latest(disk, collectives=ALONE).step == 1
        assert sorted(p.name for p in (disk / "checkpoints").iterdir()) == ["latest", "step_00000001"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


_SAVE_FOREVER = """
import sys, torch
from pathlib import Path
from dist_train.checkpoint import save_checkpoint
from dist_train.collectives import Collectives
from dist_train.world import World
for step in range(1, 100000):
    state = {"weight": torch.full((20000,), float(step))}
    save_checkpoint(Path(sys.argv[1]), step=step, clips_seen=step, state=state, meta={},
    collectives=Collectives(World()),
                    keep=2)
    if step == 1:
        print("saved", flush=True)
"""


def test_killed_while_saving_there_is_always_a_whole_checkpoint(tmp_path):
    for number in range(5):
        process = subprocess.Popen(
            [sys.executable, "-c", _SAVE_FOREVER, str(tmp_path / str(number))], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "saved\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.05 + 0.037 * number)
        process.kill()
        process.wait()
        process.stdout.close()
        found = load_latest(tmp_path / str(number), collectives=ALONE)
        assert torch.equal(found.state["weight"], torch.full((20000,), float(found.step)))
