"""`verify` finds every kind of damage to a packed set, names its place once, and finds nothing where nothing is."""

from __future__ import annotations

import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from data_shards.clips import ClipConfig, read_clip
from data_shards.errors import DataError
from data_shards.manifest import Manifest, open_manifest, write_manifest
from data_shards.verify import VerifyConfig, VerifyResult, verify
from launch.cli import run_command
from tests.data_shards.packed import damage, make_split
from tests.data_shards.videos import encode

BLOCK = tarfile.BLOCKSIZE
# Where each field of a header begins (POSIX.1-1988, USTAR).
FIELDS = {
    "name": 0, "mode": 100, "uid": 108, "gid": 116, "size": 124, "mtime": 136, "chksum": 148, "typeflag": 156,
    "linkname": 157, "magic": 257, "version": 263, "uname": 265, "gname": 297, "devmajor": 329, "devminor": 337,
    "prefix": 345, "the unused end": 500,
}  # fmt: skip
NUM_SAMPLES, NUM_FRAMES = 6, 5


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """A whole set: six samples in two shards of one split."""
    folder = tmp_path_factory.mktemp("whole")
    videos = {f"a/video{number}": encode(NUM_FRAMES, seed=number) for number in range(NUM_SAMPLES)}
    manifest = make_split(folder / "train", videos, samples_per_shard=3)
    samples = manifest.samples.copy()
    samples["num_frames"] = NUM_FRAMES
    rewrite(manifest, samples=samples)
    return folder


@pytest.fixture
def root(original: Path, tmp_path: Path) -> Path:
    """A copy of it, to damage."""
    shutil.copytree(original, tmp_path / "set")
    return tmp_path / "set"


def rewrite(manifest: Manifest, **changes: object) -> None:
    """Write the manifest again with other classes or samples."""
    values = {"split": manifest.split, "classes": manifest.classes, "shards": manifest.shards}
    write_manifest(manifest.root, **{**values, "samples": manifest.samples, **changes})  # type: ignore[arg-type]


def problems_of(root: Path, **options: object) -> list[str]:
    return look(root, **options)[0]


def look(root: Path, **options: object) -> tuple[list[str], VerifyResult]:
    """The lines found, each with its path relative to the set, and the result."""
    lines: list[str] = []
    result = verify(VerifyConfig(root=root, **{"workers": 1, **options}), found=lines.append)  # type: ignore[arg-type]
    assert result.num_problems == len(lines)
    assert all("\n" not in line for line in lines)
    return [line.replace(f"{root}{os.sep}", "") for line in lines], result


def only_problem(root: Path, **options: object) -> str:
    lines = problems_of(root, **options)
    assert len(lines) == 1, lines
    return lines[0]


def poke(root: Path, offset: int, content: bytes, shard: int = 0) -> None:
    """Put bytes into a shard."""
    with (root / f"train/shard-{shard:06d}.tar").open("r+b") as tar:
        tar.seek(offset)
        tar.write(content)


def byte_at(root: Path, offset: int, shard: int = 0) -> int:
    return (root / f"train/shard-{shard:06d}.tar").read_bytes()[offset]


def members(root: Path, shard: int = 0) -> list[tarfile.TarInfo]:
    with tarfile.open(root / f"train/shard-{shard:06d}.tar") as tar:
        return tar.getmembers()


# -- nothing wrong ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("decode", ["none", "sample", "all"])
def test_a_whole_set_has_no_problem_and_all_of_it_was_read(root: Path, decode: str):
    lines, result = look(root, decode=decode)
    manifest = open_manifest(root / "train")
    assert lines == []
    assert (result.splits, result.num_samples, result.num_shards) == (("train",), NUM_SAMPLES, 2)
    assert result.num_bytes == manifest.samples["size"].sum()
    assert result.num_decoded == {"none": 0, "sample": 2, "all": NUM_SAMPLES}[decode]


def test_a_split_alone_is_verified_too(root: Path):
    assert problems_of(root / "train") == []


def test_progress_ends_at_all_samples_and_bytes(root: Path):
    calls: list[tuple[int, int, int]] = []
    config = VerifyConfig(root=root, workers=1)
    result = verify(config, found=pytest.fail, progress=lambda *call: calls.append(call))
    assert calls[-1] == (NUM_SAMPLES, NUM_SAMPLES, result.num_bytes)
    assert calls == sorted(calls)


@pytest.mark.thorough
def test_several_processes_find_the_same_in_the_same_order(root: Path):
    for sample_id in (1, 4):
        damage(open_manifest(root / "train"), sample_id)
    poke(root, 300, b"x")
    lines = problems_of(root, decode="all")
    assert len(lines) == 3
    assert problems_of(root, decode="all", workers=2) == lines


# -- headers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("member", [0, 3, 4])
def test_a_header_with_one_wrong_byte_is_found_whatever_field_it_is_in(root: Path, field: str, member: int):
    """A video's header and a label's; the loader, which reads by the manifest, gives the right clip all the same."""
    whole, _ = read_clip(open_manifest(root / "train"), 1, clip=ClipConfig(crop_size=32, short_side=32), training=False)
    header = members(root)[member].offset
    poke(root, header + FIELDS[field], bytes([byte_at(root, header + FIELDS[field]) ^ 1]))
    line = only_problem(root)
    assert f"at byte {header} is damaged (" in line
    assert line.startswith("train/shard-000000.tar:" + (f" after 'a/video{member // 3}.mp4'" if member % 3 else ""))
    assert (f":a/video{member // 3}: its header" in line) == (member % 3 == 0)
    manifest = open_manifest(root / "train")
    clip, _ = read_clip(manifest, 1, clip=ClipConfig(crop_size=32, short_side=32), training=False)
    assert torch.equal(clip, whole)


def forged(root: Path, number: int, **changes: object) -> None:
    """Replace a header by one that is in itself right."""
    member = members(root)[number]
    offset = member.offset
    for name, value in changes.items():
        setattr(member, name, value)
    poke(root, offset, member.tobuf(tarfile.USTAR_FORMAT))


FORGERIES: dict[str, tuple[int, dict[str, object], str]] = {
    "another-name": (3, {"name": "a/other.mp4"}, ":a/video1: the member at byte "),
    "another-size": (3, {"size": 700}, ":a/video1: 'a/video1.mp4' has 700 bytes, the manifest says "),
    "beyond-the-end": (3, {"size": 1 << 30}, ":a/video1: its header at byte "),
    "a-folder": (3, {"type": tarfile.DIRTYPE}, ":a/video1: its header at byte "),
    "a-link": (4, {"type": tarfile.SYMTYPE}, ": after 'a/video1.cls', the header at byte "),
    "a-stranger": (4, {"name": "b/video.cls"}, ": the member 'b/video.cls' at byte "),
}


@pytest.mark.parametrize("kind", FORGERIES)
def test_a_header_that_lies_is_found(root: Path, kind: str):
    number, changes, words = FORGERIES[kind]
    forged(root, number, **changes)
    assert problems_of(root)[0].startswith("train/shard-000000.tar" + words)


def test_an_empty_block_in_the_middle_is_found_though_readers_stop_there(root: Path):
    header = members(root)[3].offset
    poke(root, header, bytes(BLOCK))
    with tarfile.open(root / "train/shard-000000.tar") as tar:
        assert len(tar.getmembers()) == 3, "what other readers see"
    assert only_problem(root).startswith(f"train/shard-000000.tar:a/video1: its header at byte {header} is empty")


def test_zeros_from_the_middle_on_lose_every_sample_behind_and_each_is_named(root: Path):
    start = members(root)[3].offset
    path = root / "train/shard-000000.tar"
    poke(root, start, bytes(path.stat().st_size - start))
    lines = problems_of(root)
    for key in ("a/video1", "a/video2"):
        assert any(f":{key}: its header" in line for line in lines)
        assert any(f":{key}: the sample's crc32" in line for line in lines)
    assert not any(":a/video0:" in line for line in lines)


# -- payloads and labels -----------------------------------------------------------------------------------


def test_damaged_pictures_are_found_by_their_checksum(root: Path):
    damage(open_manifest(root / "train"), 4)
    line = only_problem(root, decode="none")
    assert line.startswith("train/shard-000001.tar:a/video4: the sample's crc32 is ")


@pytest.mark.parametrize(
    ("member", "content", "words"),
    [
        (4, b"2", ":a/video1: 'a/video1.cls' says 2, the manifest says label 1"),
        (4, b"x", ":a/video1: 'a/video1.cls' says 'x', the manifest says label 1"),
        (5, b"[", ":a/video1: 'a/video1.json' says "),
    ],
)
def test_a_label_that_is_not_the_manifests_is_found(root: Path, member: int, content: bytes, words: str):
    poke(root, members(root)[member].offset_data, content)
    assert words in only_problem(root)


def test_every_single_byte_of_headers_and_payloads_counts(root: Path):
    """Random bytes of everything that must not change (not the padding, not the free text of descriptions)."""
    whole = (root / "train/shard-000000.tar").read_bytes()
    generator = np.random.default_rng(0)
    spans = [
        (member.offset, BLOCK if member.name.endswith(".json") else BLOCK + member.size) for member in members(root)
    ]
    spans.append((spans[-1][0] + 2 * BLOCK, 2 * BLOCK))  # the two empty blocks of the end
    for _ in range(40):
        start, length = spans[generator.integers(len(spans))]
        place = start + int(generator.integers(length))
        poke(root, place, bytes([whole[place] ^ int(generator.integers(1, 256))]))
        assert problems_of(root, decode="none"), place
        poke(root, place, whole[place : place + 1])
    assert problems_of(root) == []


# -- files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", ["nothing", "one block", "half a header", "half a payload", "all but the end"])
def test_a_cut_tar_is_found_and_so_is_every_sample_that_it_lost(root: Path, kept: str):
    second = members(root, 1)[3]
    sizes = {
        "nothing": 0,
        "one block": BLOCK,
        "half a header": second.offset + 200,
        "half a payload": second.offset_data + second.size // 2,
        "all but the end": members(root, 1)[-1].offset + 2 * BLOCK,
    }
    os.truncate(root / "train/shard-000001.tar", sizes[kept])
    lines = problems_of(root)
    assert lines[0].startswith(f"train/shard-000001.tar: has {sizes[kept]} bytes, the manifest says ")
    lost = {key for key in range(3, 6) if any(f":a/video{key}: the tar ends after" in line for line in lines)}
    assert lost == {"nothing": {3, 4, 5}, "one block": {3, 4, 5}, "all but the end": set()}.get(kept, {4, 5})
    assert not any("shard-000000" in line for line in lines)


def remove_shard(root: Path) -> None:
    (root / "train/shard-000001.tar").unlink()


def add_shard(root: Path) -> None:
    shutil.copy(root / "train/shard-000001.tar", root / "train/shard-000009.tar")


def append(root: Path) -> None:
    manifest = open_manifest(root / "train")
    path = root / "train/shard-000001.tar"
    poke(root, path.stat().st_size - 1, b"x", shard=1)
    assert open_manifest(root / "train").shards == manifest.shards


def remove_manifest(root: Path) -> None:
    shutil.copytree(root / "train", root / "val")
    (root / "val/manifest.json").unlink()


def other_classes(root: Path) -> None:
    shutil.copytree(root / "train", root / "val")
    rewrite(open_manifest(root / "val"), split="val", classes=["x", "y", "z"])


def other_frames(root: Path) -> None:
    manifest = open_manifest(root / "train")
    samples = manifest.samples.copy()
    samples["num_frames"][0] += 1
    rewrite(manifest, samples=samples)


def other_size(root: Path) -> None:
    manifest = open_manifest(root / "train")
    samples = manifest.samples.copy()
    samples["width"][0] += 2
    rewrite(manifest, samples=samples)


def same_key(root: Path) -> None:
    manifest = open_manifest(root / "train")
    samples = manifest.samples.copy()
    samples["key"][1] = samples["key"][0]
    rewrite(manifest, samples=samples)


FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a shard is gone": (remove_shard, "train/shard-000001.tar: cannot be read: No such file"),
    "a shard too many": (add_shard, "train/shard-000009.tar: manifest.json does not name it"),
    "bytes behind the end": (append, "train/shard-000001.tar: there are bytes behind its end"),
    "a split without manifest": (remove_manifest, "val is not a packed split (it has no manifest.json)"),
    "other classes": (other_classes, "val: its classes are not those of"),
    "frames": (other_frames, "train/shard-000000.tar:a/video0: it has 5 frames, the manifest says 6"),
    "picture size": (other_size, "train/shard-000000.tar:a/video0: its pictures are 64x48, the manifest says 66x48"),
    "a key twice": (same_key, "train/shard-000000.tar: the manifest has a key or an offset twice"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_set_that_does_not_fit_together_is_found(root: Path, kind: str):
    change, words = FILES[kind]
    change(root)
    assert any(line.startswith(words) for line in problems_of(root)), problems_of(root)


@pytest.mark.parametrize("name", ["manifest.json", "samples.npy"])
def test_a_damaged_manifest_is_one_problem_and_its_shards_are_not_blamed(root: Path, name: str):
    path = root / "train" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x80
    path.write_bytes(bytes(content))
    assert name in only_problem(root)


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_text("x")])
def test_what_is_no_packed_set_is_refused_in_one_line(tmp_path: Path, make: Callable[[Path], None]):
    make(tmp_path / "other")
    with pytest.raises(DataError, match="other") as caught:
        problems_of(tmp_path / "other")
    assert "\n" not in str(caught.value)


def test_a_wrong_option_is_named():
    with pytest.raises(ValueError, match="decode is 'some' and workers -1"):
        VerifyConfig(root=Path(), decode="some", workers=-1)  # type: ignore[arg-type]


# -- the command ---------------------------------------------------------------------------------------------


def test_the_command_says_one_line_for_a_whole_set(root: Path, capsys):
    assert run_command(["verify", str(root), "--decode", "all", "--workers", "1"]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1
    assert f"{root}: train: 6 samples in 2 shards" in out
    assert "every frame decodes" in out
    assert "error" not in err


def test_the_command_prints_each_problem_and_ends_with_two(root: Path, capsys):
    damage(open_manifest(root / "train"), 4)
    poke(root, 300, b"x")
    assert run_command(["verify", str(root), "--workers", "1"]) == 2
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2
    assert all(line.startswith(str(root / "train")) for line in out.splitlines())
    assert err.splitlines()[-1] == f"reelscale: error: {root}: 2 problems found, each in a line above"
