"""Every command in README.md and CONTRIBUTING.md runs, in the order in which a reader meets them."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.launch.commands import environment

BIN = Path(sys.executable).parent
SMALL = {
    "make-data": ["--num-clips", "120", "--size", "32"],
    "train": [
        "--data.clip.crop-size=32",
        "--data.clip.short-side=32",
        "--data.clip.num-segments=4",
        "--training.batch-clips=12",
        "--training.epochs=1",
        "--monitor.wandb=off",
    ],
}


def _commands(name: str) -> list[str]:
    text = (REPOSITORY / name).read_text(encoding="utf-8")
    blocks = re.findall(r"```console\n(.*?)```", text, flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def _made_small(command: str) -> str:
    """The command with flags that make it a matter of seconds; the words of the reader's command all stay."""
    for name, flags in SMALL.items():
        if re.search(rf"reelscale {name} ", command):
            return f"{command} {shlex.join(flags)}"
    return command


@pytest.mark.timeout(600)
def test_the_readme_can_be_followed_from_top_to_bottom(tmp_path):
    commands = _commands("README.md")
    assert len(commands) >= 12
    env = {
        **environment(),
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    }
    shutil.copy(REPOSITORY / "tests" / "launch" / "users_code.py", tmp_path)
    for command in commands:
        if command.startswith("make "):
            subprocess.run(["make", "-n", *command.split()[1:]], cwd=REPOSITORY, check=True, capture_output=True)
            continue
        if command.startswith("reelscale pack my_videos"):
            _class_folders(tmp_path / "motion_clips", tmp_path / "my_videos")
        done = subprocess.run(
            _made_small(command),
            shell=True,
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


def _class_folders(clips: Path, folder: Path) -> None:
    """What a reader has: videos in one folder a class."""
    for path in clips.rglob("*.mp4"):
        label = path.name.split("_")[0]
        (folder / label).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / label)


def test_the_readme_shows_the_users_code_that_is_tested():
    code = (REPOSITORY / "tests" / "launch" / "users_code.py").read_text(encoding="utf-8")
    shown = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert shown, "README.md shows no code"
    assert shown[0].strip() == code[code.index("from dataclasses") :].strip()


def test_contributing_names_tests_that_exist():
    text = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    commands = re.findall(r"`\.venv/bin/python -m (pytest [^`]*)`", text)
    assert len(commands) >= 3
    for command in commands:
        _, path, *options = command.split()
        assert (REPOSITORY / path).exists(), command
        if options:
            assert options[0] == "-k"
            names = [file.name for file in (REPOSITORY / path).rglob("test_*.py")]
            assert any(options[1] in name for name in names), command
    for command in _commands("CONTRIBUTING.md"):
        subprocess.run(["make", "-n", *command.split()[1:]], cwd=REPOSITORY, check=True, capture_output=True)


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "docs/limits.md"])
def test_every_file_that_a_page_names_exists(name):
    text = (REPOSITORY / name).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    paths = re.findall(r"`((?:launch|dist_train|data_shards|models|tests|docs)/[\w/.]*)`", text)
    for path in [*links, *paths]:
        assert (REPOSITORY / Path(name).parent / path).exists() or (REPOSITORY / path).exists(), path
