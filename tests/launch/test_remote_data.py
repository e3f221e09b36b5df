"""`reelscale train --data.root s3://...`: the same training as from a folder, or one line that says what is wrong."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("s3fs", reason="reading from S3 needs s3fs (pip install 'reelscale[s3]')")
pytest.importorskip("moto.server", reason="the S3 server of this test is moto's (pip install 'moto[server]')")

from tests.data_shards.servers import Fault, FileServer, bucket_of
from tests.launch.commands import QUICK, assert_same_bits, one_line_of, reelscale, succeeded

WORKERS = "--data.loader.num-workers=1"


@pytest.fixture(scope="module")
def bucket(motion_shards) -> Iterator[FileServer]:
    with bucket_of(motion_shards, "motion") as proxy:
        yield proxy


@pytest.fixture
def remote(bucket, small, tmp_path) -> list[str]:
    """The flags of `small`, with the set in the bucket."""
    bucket.requests.clear()
    bucket.fault_of = lambda _path, _number: None
    flags = [flag for flag in small if not flag.startswith("--data.root")]
    return [*flags, "--data.root=s3://bucket/motion", f"--data.storage.cache-folder={tmp_path / 'cache'}"]


def _train(run_dir: Path, *flags: object):
    return reelscale("train", "motion_tsm", *flags, f"--run-dir={run_dir}", *QUICK)


def test_a_run_reads_its_set_from_a_bucket_through_faults(tmp_path, remote, bucket):
    faults = iter([Fault("status", 500), Fault("drop"), Fault("cut")])
    bucket.fault_of = lambda path, _number: next(faults, None) if path.endswith(".tar") else None
    succeeded(_train(tmp_path / "bucket", *remote, WORKERS, "--training.epochs=1"))
    assert next(faults, None) is None


@pytest.mark.thorough
@pytest.mark.parametrize("nproc", [1, 2])
def test_a_run_from_a_bucket_ends_in_the_bits_of_one_from_a_folder(tmp_path, small, remote, bucket, nproc):
    processes = f"--nproc={nproc}"
    succeeded(_train(tmp_path / "folder", *small, processes))
    succeeded(_train(tmp_path / "bucket", *remote, WORKERS, processes))
    first = len(bucket.gets(".tar"))
    succeeded(_train(tmp_path / "again", *remote, WORKERS, processes))
    assert len(bucket.gets(".tar")) == first > 0, "the second run found the set in the cache"
    assert_same_bits(tmp_path / "bucket", tmp_path / "folder")
    assert_same_bits(tmp_path / "again", tmp_path / "folder")


def test_a_bucket_without_a_set_is_refused_in_one_line(tmp_path, remote):
    line = one_line_of(_train(tmp_path / "run", *remote, "--data.root=s3://bucket/nothing"))
    assert "s3://bucket/nothing/train is not a packed split" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.thorough
def test_a_shard_that_the_network_does_not_give_is_named_in_one_line(tmp_path, remote, bucket):
    bucket.fault_of = lambda path, _number: Fault("status", 503) if path.endswith(".tar") else None
    line = one_line_of(_train(tmp_path / "run", *remote, WORKERS, "--data.storage.num-attempts=2"), exit_code=1)
    assert "2 attempts in " in line
    assert re.search(r"s3://bucket/motion/train/shard-00000\d\.tar:\S+$", line)
