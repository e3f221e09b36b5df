"""The demo, made small: three runs, one report, and a folder that it may not overwrite."""

from __future__ import annotations

import json

import pytest

from tests.launch.commands import one_line_of, reelscale, succeeded


@pytest.mark.timeout(400)
def test_the_demo_runs_from_nothing_to_a_report(tmp_path):
    done = succeeded(reelscale("demo", tmp_path / "demo", "--num-clips", 150, "--epochs", 1, timeout=380))
    assert "minutes; open" in done.stdout
    rows = [line for line in done.stdout.splitlines() if line.startswith(("motion_tsn ", "motion_tsm "))]
    assert len(rows) == 3, done.stdout
    page = (tmp_path / "demo" / "report.html").read_text()
    for name in ("tsn_1_process", "tsm_1_process", "tsm_2_processes"):
        assert name in page
        config = json.loads((tmp_path / "demo" / "runs" / name / "config.json").read_text())
        assert config["world"]["world_size"] == (2 if name == "tsm_2_processes" else 1)
    assert all(len(line) <= 80 for line in done.stdout.splitlines() if "open" not in line)


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert "thesis.tex" in one_line_of(reelscale("demo", tmp_path))
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
