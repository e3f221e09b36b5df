"""`reelscale inspect`: a terminal of 80 columns, and a page that a real browser shows whole."""

from __future__ import annotations

import html
import re
from pathlib import Path

import pytest

from launch.cli import run_command
from tests.data_shards.packed import damage, make_split
from tests.data_shards.test_inspection import VIDEOS, described
from tests.launch.test_report_browser import BROWSER, FRAME, open_page


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A set of two splits, one sample of which is damaged."""
    folder = tmp_path_factory.mktemp("inspected")
    described(make_split(folder / "train", VIDEOS))
    other = {f"w{key}": video[:-1] + b"x" for key, video in VIDEOS.items()}
    damage(described(make_split(folder / "val", other, split="val")), 1)
    return folder


@pytest.fixture(scope="module")
def page(root: Path) -> Path:
    assert run_command(["inspect", str(root)]) == 0
    return root / "inspect.html"


def test_the_terminal_shows_it_in_80_columns(root: Path, tmp_path: Path, capsys):
    assert run_command(["inspect", str(root), "--output", str(tmp_path / "page.html")]) == 0
    out = capsys.readouterr().out
    for words in (
        "train",
        "val",
        "class0",
        "duration in s",
        "length in frames",
        "64x48 (12)",
        "2 fps for every sample",
    ):
        assert words in out
    assert max(map(len, out.splitlines()[:-1])) <= 80
    assert (tmp_path / "page.html").is_file()


def test_without_clips_no_page_is_written(root: Path, tmp_path: Path, capsys):
    assert run_command(["inspect", str(root), "--clips", "0", "--output", str(tmp_path / "page.html")]) == 0
    assert not (tmp_path / "page.html").exists()
    assert "contact sheet" not in capsys.readouterr().out


def test_many_classes_are_cut_to_the_largest_and_smallest(tmp_path: Path, capsys):
    videos = {f"v{number}": b"x" * (10 + number) for number in range(300)}
    make_split(tmp_path / "train", videos, labels=[min(number, 99) for number in range(300)])
    assert run_command(["inspect", str(tmp_path), "--clips", "0"]) == 0
    assert "12 largest and smallest of 100 classes" in capsys.readouterr().out


def test_the_page_holds_its_pictures_and_says_what_could_not_be_read(page: Path):
    markup = page.read_text(encoding="utf-8")
    assert markup.count("data:image/jpeg") == 11
    assert markup.count('<p class="problem">') == 1
    assert "shard-000000.tar:wv1: " in markup
    assert "http" not in re.sub(r"http-equiv", "", markup)


def test_a_name_of_a_class_cannot_break_the_page(tmp_path: Path):
    manifest = make_split(tmp_path / "train", {"v": VIDEOS["v0"]}, labels=[0])
    path = manifest.root / "manifest.json"
    path.write_text(path.read_text().replace("class0", "<script>alert(1)</script>"))
    assert run_command(["inspect", str(tmp_path)]) == 0
    assert "<script>" not in (tmp_path / "inspect.html").read_text()


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on this machine")
@pytest.mark.parametrize("width", [390, pytest.param(1200, marks=pytest.mark.thorough)])
def test_a_browser_shows_the_page_without_scrolling_sideways(page: Path, tmp_path: Path, width: int):
    unguarded = re.sub(r"<meta http-equiv[^>]*>", "", page.read_text(encoding="utf-8"))
    framed = tmp_path / "framed.html"
    framed.write_text(FRAME.format(width=width, page=html.escape(unguarded)), encoding="utf-8")
    dom, _ = open_page(framed, tmp_path / "profile")
    found = re.search(r"<title>probe (\d+) (\d+) (\d+) (\d+) (\d+) ", dom)
    assert found is not None
    inner, scroll, images, broken, wide = map(int, found.groups())
    assert inner == width
    assert scroll <= inner
    assert (images, broken, wide) == (11, 0, 0)
