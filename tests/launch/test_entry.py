"""The entry: help, version, and packages that are not ours."""

from __future__ import annotations

import subprocess
import sys

import pytest

from launch import __version__
from launch.cli import COMMANDS, run_command
from tests.launch.commands import environment


def test_help_lists_every_command_within_80_columns(capsys):
    assert run_command(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in COMMANDS)
    assert max(len(line) for line in text.splitlines()) <= 80


def test_version(capsys):
    assert run_command(["--version"]) == 0
    assert capsys.readouterr().out == f"reelscale {__version__}\n"


@pytest.mark.parametrize("name", ["models", "dist_train", "data_shards"])
def test_a_folder_that_shadows_one_of_our_packages_is_named(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("")
    done = subprocess.run(
        [sys.executable, "-P", "-c", "from launch.entry import main; main()", "--help"],
        env={**environment(), "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert f"package '{name}'" in done.stderr
    assert str(tmp_path / name) in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
