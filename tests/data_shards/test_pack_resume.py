"""Packing that is killed, refused or interrupted goes on where it was, to the bytes of an undisturbed run."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from data_shards.errors import PackError
from data_shards.manifest import open_manifest
from data_shards.motion import MotionConfig, encode_h264, render_clip
from data_shards.pack import PackConfig, PackProgress, pack
from tests.data_shards.files import digest, put

CLIP = MotionConfig(size=32, num_frames=8)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Ten videos of two classes, and one file that is none."""
    folder = tmp_path_factory.mktemp("resume") / "source"
    for number in range(10):
        video = encode_h264(render_clip(CLIP, index=number, label="left", scene=number))
        put(folder / f"class{number % 2}" / f"v{number}.mp4", video)
    put(folder / "class0" / "bad.mp4", b"no video")
    return folder


@pytest.fixture(scope="module")
def undisturbed(source: Path) -> dict[str, str]:
    """The files of the packed set."""
    destination = source.parent / "undisturbed"
    pack(config_of(source, destination))
    return digest(destination)


def config_of(source: Path, destination: Path) -> PackConfig:
    return PackConfig(source=source, destination=destination, workers=1, max_shard_samples=3, on_bad="skip")


def die_at(call: int, config: PackConfig) -> bool:
    """Pack in a child that ends, as if killed, at the `call`-th touch of the disk; False where it was done before."""
    child = os.fork()
    if child == 0:
        try:
            left = call

            def count(event: str, _: object) -> None:
                nonlocal left
                if event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree") or event == "open":
                    left -= 1
                    if left < 0:
                        os._exit(9)

            sys.addaudithook(count)
            pack(config)
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9), "the child failed otherwise"
    return code == 9


def every_death(source: Path, folder: Path, undisturbed: dict[str, str], calls: Sequence[int]) -> int:
    """Kill a run at each of `calls`, go on, and compare; returns how many runs were killed."""
    for died, call in enumerate(calls):
        destination = folder / f"packed{call}"
        if not die_at(call, config_of(source, destination)):
            return died
        published = destination.exists()
        if published:
            with pytest.raises(ValueError, match="exists and is not empty"):
                pack(config_of(source, destination))
        else:
            pack(config_of(source, destination))
        assert digest(destination) == undisturbed
        assert {path.name for path in folder.iterdir()} <= {f"packed{number}" for number in calls}
    return len(calls)


def test_a_kill_at_a_moment_is_made_good_by_the_next_run(source: Path, undisturbed: dict[str, str], tmp_path: Path):
    assert every_death(source, tmp_path, undisturbed, [*range(10), *range(10, 400, 29)]) > 12


@pytest.mark.thorough
def test_a_kill_at_any_moment_is_made_good_by_the_next_run(source: Path, undisturbed: dict[str, str], tmp_path: Path):
    assert 50 < every_death(source, tmp_path, undisturbed, range(1000)) < 1000


KILLED = """
import os, signal, sys
from pathlib import Path
from data_shards.pack import PackConfig, pack

def kill(at):
    if at.done == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    config = PackConfig(source=Path(sys.argv[1]), destination=Path(sys.argv[2]), workers=2, max_shard_samples=3,
                        on_bad="skip")
    pack(config, progress=kill)
"""


def test_kill_9_with_workers_keeps_the_finished_shards(source: Path, undisturbed: dict[str, str], tmp_path: Path):
    script, destination = tmp_path / "killed.py", tmp_path / "packed"
    script.write_text(KILLED)
    done = subprocess.run([sys.executable, "-P", script, source, destination, "8"], capture_output=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not destination.exists()
    records = {path.stem for path in (tmp_path / "packed.partial").rglob("*.json")}
    tars = (tmp_path / "packed.partial").rglob("*.tar")
    kept = {path: path.stat().st_ino for path in tars if path.stem.replace("shard", path.parent.name) in records}
    assert kept
    first: list[PackProgress] = []
    pack(config_of(source, destination), progress=first.append)
    assert first[0].earlier > 0
    for path, inode in kept.items():
        same = destination / path.parent.name / path.name
        assert same.stat().st_ino == inode, "a finished shard was written again"
    assert digest(destination) == undisturbed
    assert not (tmp_path / "packed.partial").exists()


def stop_at(done: int, error: BaseException) -> Callable[[PackProgress], None]:
    def stop(at: PackProgress) -> None:
        if at.done == done:
            raise error

    return stop


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_keeps_the_finished_shards_and_no_half_of_one(
    source: Path, undisturbed: dict[str, str], tmp_path: Path, workers: int
):
    config = replace(config_of(source, tmp_path / "packed"), workers=workers)
    with pytest.raises(KeyboardInterrupt):
        pack(config, progress=stop_at(7, KeyboardInterrupt()))
    assert not list(tmp_path.rglob("*.tar.partial"))
    assert not (tmp_path / "packed").exists()
    pack(config)
    assert digest(tmp_path / "packed") == undisturbed


def test_an_error_of_the_disk_says_how_far_it_is_and_how_to_go_on(source: Path, tmp_path: Path):
    config = config_of(source, tmp_path / "packed")
    with pytest.raises(
        OSError, match=r"Input/output error: \d of 4 shards of .*packed are finished and kept in"
    ) as caught:
        pack(config, progress=stop_at(7, OSError(errno.EIO, os.strerror(errno.EIO))))
    assert caught.value.errno == errno.EIO
    assert "run the same command again to go on" in str(caught.value)


def test_an_error_of_the_disk_names_the_file_that_was_read(source: Path, tmp_path: Path, monkeypatch):
    read_bytes = Path.read_bytes

    def read(path: Path) -> bytes:
        if path.name == "v3.mp4":
            raise OSError(errno.EIO, os.strerror(errno.EIO))  # as a read does: without the name
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", read)
    with pytest.raises(OSError, match=r"Input/output error \(.*/class1/v3.mp4\): \d of 4 shards") as caught:
        pack(config_of(source, tmp_path / "packed"))
    assert caught.value.errno == errno.EIO


def test_a_split_whose_videos_have_become_bad_is_not_there(source: Path, tmp_path: Path, monkeypatch):
    for path in sorted((source / "class0").glob("v*.mp4")):
        put(tmp_path / "source" / "train" / "a" / path.name, path.read_bytes())
        put(tmp_path / "source" / "val" / "a" / path.name, path.read_bytes())
    config = config_of(tmp_path / "source", tmp_path / "packed")
    with monkeypatch.context() as patch:

        def stop(_: object) -> None:
            raise KeyboardInterrupt

        patch.setattr("data_shards.packing.journal.Journal.publish", stop)
        with pytest.raises(KeyboardInterrupt):
            pack(config)
    for path in (tmp_path / "source" / "val" / "a").iterdir():
        path.write_bytes(b"no video any more")
    assert pack(config).splits.keys() == {"train"}
    assert not (tmp_path / "packed" / "val").exists()


def test_an_error_without_a_number_keeps_its_words(source: Path, tmp_path: Path):
    with pytest.raises(OSError, match="the network is gone: 0 of 4 shards"):
        pack(config_of(source, tmp_path / "packed"), progress=stop_at(1, OSError("the network is gone")))


def test_what_cannot_be_tidied_up_does_not_fail_a_finished_set(
    source: Path, undisturbed: dict[str, str], tmp_path: Path, monkeypatch
):
    remove = os.rmdir

    def rmdir(path: str | Path, **options: object) -> None:
        if Path(path).name == "records":
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))
        remove(path, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "rmdir", rmdir)
    pack(config_of(source, tmp_path / "packed"))
    assert digest(tmp_path / "packed") == undisturbed


def began(source: Path, tmp_path: Path) -> PackConfig:
    """A configuration whose packing has been interrupted."""
    config = config_of(source, tmp_path / "packed")
    with pytest.raises(KeyboardInterrupt):
        pack(config, progress=stop_at(9, KeyboardInterrupt()))
    return config


def test_other_settings_are_refused_with_both_values(source: Path, tmp_path: Path):
    config = began(source, tmp_path)
    before = digest(tmp_path)
    with pytest.raises(
        ValueError, match=r"was begun with other settings \(max_shard_samples 3, now 4; seed 0, now 1\)"
    ):
        pack(replace(config, max_shard_samples=4, seed=1))
    assert digest(tmp_path) == before


def test_another_list_of_samples_is_refused(source: Path, tmp_path: Path):
    config = began(source, tmp_path)
    (tmp_path / "other").mkdir()
    for folder in source.iterdir():
        (tmp_path / "other" / folder.name).symlink_to(folder)
    pack(replace(config, source=tmp_path / "other", destination=tmp_path / "same names"))
    (tmp_path / "other" / "class1").unlink()
    with pytest.raises(
        ValueError, match="was begun from another list of files, labels or splits; give the same source"
    ):
        pack(replace(config, source=tmp_path / "other"))


def test_workers_and_on_bad_may_change(source: Path, undisturbed: dict[str, str], tmp_path: Path):
    config = config_of(source, tmp_path / "packed")
    with pytest.raises(PackError, match="1 of 11 videos cannot be packed"):
        pack(replace(config, on_bad="raise", workers=2))
    first: list[PackProgress] = []
    pack(config, progress=first.append)
    assert first[0].earlier == 11, "all others were packed already"
    assert digest(tmp_path / "packed") == undisturbed
    assert {path.name for path in tmp_path.iterdir()} == {"packed"}


def test_a_repaired_or_changed_video_is_packed_anew(source: Path, tmp_path: Path):
    own = tmp_path / "source"
    for path in source.rglob("*.mp4"):
        put(own / path.relative_to(source), path.read_bytes())
    good = (own / "class0" / "v2.mp4").read_bytes()
    put(own / "class0" / "zeros.mp4", bytes(len(good)))
    config = replace(config_of(own, tmp_path / "packed"), on_bad="raise")
    with pytest.raises(PackError, match="2 of 12 videos cannot be packed"):
        pack(config)
    longer = encode_h264(render_clip(replace(CLIP, num_frames=12), index=1, label="left", scene=3))
    put(own / "class0" / "zeros.mp4", good)  # of the same size
    put(own / "class0" / "bad.mp4", longer)
    put(own / "class1" / "v1.mp4", longer)
    result = pack(config)
    assert not result.rejected
    frames = {}
    for split in result.splits:
        manifest = open_manifest(tmp_path / "packed" / split)
        frames |= {manifest.key(i): int(manifest.samples["num_frames"][i]) for i in range(len(manifest))}
    assert {key for key, count in frames.items() if count == 12} == {"class0/bad", "class1/v1"}
    assert len(frames) == 12


def test_a_finished_shard_that_was_cut_is_written_again(source: Path, undisturbed: dict[str, str], tmp_path: Path):
    config = began(source, tmp_path)
    tar = tmp_path / "packed.partial" / "packed" / "train" / "shard-000000.tar"
    os.truncate(tar, 1000)
    pack(config)
    assert digest(tmp_path / "packed") == undisturbed


def test_a_folder_of_something_else_is_refused(source: Path, tmp_path: Path):
    put(tmp_path / "packed.partial" / "mine.txt", b"mine")
    with pytest.raises(ValueError, match=r"packed\.partial exists and was not begun by reelscale pack; move it away"):
        pack(config_of(source, tmp_path / "packed"))
    assert digest(tmp_path).keys() == {"packed.partial/mine.txt"}


def test_two_runs_of_one_set_do_not_meet(source: Path, tmp_path: Path):
    config = config_of(source, tmp_path / "packed")

    def meet(_: PackProgress) -> None:
        with pytest.raises(RuntimeError, match=r"another process is writing .*packed"):
            pack(config)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(config, progress=meet)


def test_two_runs_of_one_set_do_not_meet_on_nfs(source: Path, tmp_path: Path, monkeypatch):
    lock = fcntl.flock

    def lock_as_nfs(descriptor: int, how: int) -> None:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))  # flock(2): it must be open for writing
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", lock_as_nfs)
    test_two_runs_of_one_set_do_not_meet(source, tmp_path)


def test_a_source_that_cannot_be_read_leaves_nothing(tmp_path: Path):
    with pytest.raises(PackError, match="does not exist"):
        pack(config_of(tmp_path / "nowhere", tmp_path / "packed"))
    assert list(tmp_path.iterdir()) == []
