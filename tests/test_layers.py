"""The doors between the packages stay shut: who may import whom, and who may ask for a rank."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

MAY_IMPORT = {
    "launch": {"launch", "dist_train", "data_shards", "models"},
    "dist_train": {"dist_train"},
    "data_shards": {"data_shards"},
    "models": {"models"},
}
FILES = [path for package in MAY_IMPORT for path in sorted((REPOSITORY / package).rglob("*.py"))]


def _imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the package's name"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _shown(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def test_there_are_files_to_check():
    assert len(FILES) > 40


@pytest.mark.parametrize("path", FILES, ids=_shown)
def test_a_package_imports_only_what_it_may(path):
    package = path.relative_to(REPOSITORY).parts[0]
    ours = {name.split(".")[0] for name in _imports(path)} & MAY_IMPORT.keys()
    assert ours <= MAY_IMPORT[package], f"{_shown(path)} imports {sorted(ours - MAY_IMPORT[package])}"


@pytest.mark.parametrize("path", [p for p in FILES if "dist_train" not in p.parts], ids=_shown)
def test_only_the_engine_touches_torch_distributed(path):
    assert not {name for name in _imports(path) if name.startswith("torch.distributed")}


@pytest.mark.parametrize("path", FILES, ids=_shown)
def test_a_rank_is_read_from_the_environment_in_one_place(path):
    words = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
    launchers = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK"}
    # The other two set them for their children.
    if _shown(path) not in {"dist_train/placement.py", "launch/local.py", "dist_train/horovod/elastic/__main__.py"}:
        assert not words & launchers
    source = path.read_text()
    assert "dist.get_rank(" not in source
    assert "dist.get_world_size(" not in source
