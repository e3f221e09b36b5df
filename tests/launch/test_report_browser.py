"""A real browser opens the report: nothing is refused, nothing sticks out of the page, on a desktop and on a phone."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from launch.report import write_report
from tests.launch.synthetic_run import SyntheticRun, make_run, textured_clip

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# A headless window is never narrower than 500 pixels, a frame is: the page is looked at inside one.
FRAME = """<!doctype html><title>not loaded</title>
<iframe id="frame" style="border:0;width:{width}px;height:900px" srcdoc="{page}"></iframe>
<script>addEventListener("load", () => {{
  const inside = document.getElementById("frame").contentWindow, page = inside.document;
  const broken = [...page.images].filter(image => !image.naturalWidth).length;
  const wide = [...page.querySelectorAll("main *")].filter(element => !element.closest(".scroll, svg") &&
    element.getBoundingClientRect().right > inside.innerWidth + 1).length;
  const background = inside.getComputedStyle(page.body).backgroundColor;
  const found = [inside.innerWidth, page.documentElement.scrollWidth, page.images.length, broken, wide, background];
  document.title = "probe " + found.join(" ");
}});</script>"""


def open_page(page: Path, profile: Path, *, dark: bool = False) -> tuple[str, str]:
    """The page's DOM after loading and the browser's log."""
    assert BROWSER is not None
    done = subprocess.run(
        [
            BROWSER,
            *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
            *("--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--v=0"),
            f"--user-data-dir={profile}",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            "--window-size=1300,1000",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout, done.stderr


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on this machine")
@pytest.mark.parametrize("width", [390, 1200])
def test_report_fits_the_screen_and_shows_its_pictures(tmp_path: Path, width: int) -> None:
    run = make_run(tmp_path / "run", SyntheticRun(num_steps=60, world_size=16, straggler=3))
    page = write_report([run], tmp_path / "report.html", clip_images=textured_clip)
    markup = page.read_text(encoding="utf-8")
    framed = tmp_path / "framed.html"
    unguarded = re.sub(r"<meta http-equiv[^>]*>", "", markup)
    framed.write_text(FRAME.format(width=width, page=html.escape(unguarded)), encoding="utf-8")
    colors = []
    for dark in (False, True):
        dom, _ = open_page(framed, tmp_path / f"profile{dark}", dark=dark)
        found = re.search(r"<title>probe (\d+) (\d+) (\d+) (\d+) (\d+) ([^<]*)</title>", dom)
        assert found is not None
        inner, scroll, images, broken, wide = (int(value) for value in found.groups()[:5])
        assert inner == width
        assert scroll <= inner, "the page scrolls sideways"
        assert (images, broken, wide) == (24, 0, 0)
        colors.append(found.group(6))
    assert colors == ["rgb(255, 255, 255)", "rgb(20, 23, 28)"]


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on this machine")
def test_report_asks_for_nothing_that_its_own_policy_forbids(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", SyntheticRun(num_steps=60))
    page = write_report([run], tmp_path / "report.html", clip_images=textured_clip)
    _, log = open_page(page, tmp_path / "profile")
    complaints = [line for line in log.splitlines() if "CONSOLE" in line or "Refused to" in line]
    assert complaints == []
