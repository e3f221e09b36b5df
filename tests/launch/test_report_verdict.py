"""The verdict names what holds a run back, and the terminal shows the ledger in 80 columns."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from dist_train.ledger.summary import LedgerSummary, read_ledger
from launch.report import ledger_view
from launch.report.verdict import judge
from tests.launch.synthetic_run import SyntheticRun, make_run


def summary_of(folder: Path, *rows_of_ranks: dict[str, float], num_steps: int = 1, attempt: int = 0) -> LedgerSummary:
    """A ledger whose ranks spend these seconds in each step."""
    (folder / "ledger").mkdir(parents=True)
    for rank, seconds in enumerate(rows_of_ranks):
        wall = sum(seconds.values())
        lines = [{"kind": "start", "attempt": attempt, "rank": rank, "world_size": len(rows_of_ranks)}]
        for step in range(1, num_steps + 1):
            place = {"step": step, "clips_seen": 8 * step, "end_seconds": wall * step, "wall_seconds": wall}
            lines.append({"kind": "span", "name": "step", **place, "seconds": seconds})
        lines.append({"kind": "end", "wall_seconds": wall * num_steps, "exit": "ok"})
        path = folder / "ledger" / f"rank_{rank:05d}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_ledger(folder)


def printed(summary: LedgerSummary, width: int = 80) -> list[str]:
    console = Console(width=width, file=io.StringIO(), force_terminal=False, legacy_windows=False)
    console.print(ledger_view(summary))
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("rows", "bottleneck", "share", "words"),
    [
        ([{"forward": 0.9, "loader_wait": 0.1}], "compute", 0.9, "Compute holds the run back: 90.0%"),
        (
            [{"forward": 0.7, "loader_wait": 0.3}],
            "input",
            0.3,
            "I/O holds the run back: 30.0% of step time, all of it lo",
        ),
        ([{"forward": 0.5, "decode": 0.3, "read": 0.2}], "input", 0.5, "decode alone 30.0%"),
        ([{"backward": 0.5, "wire": 0.5}] * 2, "communication", 0.5, "Communication holds the run back: 50.0%"),
        ([{"forward": 0.5, "checkpoint": 0.5}], "bookkeeping", 0.5, "Bookkeeping holds the run back"),
        ([{"forward": 0.5, "remainder": 0.5}], "bookkeeping", 0.5, "all of it remainder"),
        ([{"forward": 0.7, "wait_for_peer": 0.3}] * 2, "uneven ranks", 0.3, "wait for each other in turn, 30.0%"),
    ],
)
def test_verdict_names_what_costs_most(
    tmp_path: Path, rows: list[dict[str, float]], bottleneck: str, share: float, words: str
) -> None:
    verdict = judge(summary_of(tmp_path, *rows).last)
    assert verdict.bottleneck == bottleneck
    assert verdict.share == pytest.approx(share)
    assert words in verdict.sentence
    assert "\n" not in verdict.sentence


@pytest.mark.parametrize(("row", "label"), [("loader_wait", "loader wait"), ("forward", "forward"), ("wire", "wire")])
def test_straggler_is_named_with_its_cause(tmp_path: Path, row: str, label: str) -> None:
    usual = {"forward": 0.5, "loader_wait": 0.1, "wire": 0.1, "wait_for_peer": 0.3}
    slow = {**usual, "wait_for_peer": 0.0, row: usual[row] + 0.3}
    verdict = judge(summary_of(tmp_path, usual, usual, slow, usual).last)
    assert (verdict.bottleneck, verdict.rank) == ("straggler", 2)
    assert verdict.share == pytest.approx(0.3)
    assert f"for rank 2, which needs 300 ms more a step for {label}" in verdict.sentence


def test_small_waits_do_not_make_a_straggler(tmp_path: Path) -> None:
    verdict = judge(summary_of(tmp_path, {"forward": 0.9, "wait_for_peer": 0.1}, {"forward": 1.0}).last)
    assert verdict.bottleneck == "compute"


def test_cold_first_step_does_not_decide(tmp_path: Path) -> None:
    summary = summary_of(tmp_path / "a", {"forward": 1.0}, num_steps=20)
    path = tmp_path / "a" / "ledger" / "rank_00000.jsonl"
    path.write_text(path.read_text().replace('{"forward": 1.0}', '{"loader_wait": 30.0}', 1))
    assert judge(summary.last).bottleneck == "compute"
    assert judge(read_ledger(tmp_path / "a").last).bottleneck == "compute"


def test_run_without_a_step_has_nothing_to_judge(tmp_path: Path) -> None:
    assert judge(summary_of(tmp_path, {"forward": 1.0}, num_steps=0).last).bottleneck == "nothing"


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 16])
def test_terminal_table_fits_80_columns_and_cuts_nothing(tmp_path: Path, world_size: int) -> None:
    lines = printed(read_ledger(make_run(tmp_path / "run", SyntheticRun(world_size=world_size, num_steps=30))))
    assert max(len(line.rstrip()) for line in lines) <= 80
    assert not any("…" in line for line in lines)
    text = "\n".join(lines)
    for words in ("remainder", "wall time", "loader wait", "Loader workers", "frames decoded", "Compute holds the run"):
        assert words in text
    assert "add up to the wall time on every rank" in text


@pytest.mark.parametrize("world_size", [3, 512])
def test_terminal_table_fits_for_hours_and_hundreds_of_ranks(tmp_path: Path, world_size: int) -> None:
    seconds = {"forward": 30_000.5, "wire": 6_000.25, "wait_for_peer": 60_000.0, "loader_wait": 3.0, "remainder": 0.1}
    slow = {**seconds, "wait_for_peer": 0.0, "loader_wait": 60_003.0}
    rows = [seconds] * (world_size - 1) + [slow]
    lines = printed(summary_of(tmp_path, *rows))
    assert max(len(line.rstrip()) for line in lines) <= 80
    assert not any("…" in line for line in lines)
    assert f"rank {world_size - 1}" in "\n".join(lines)
    assert "A straggler holds the run back" in "\n".join(lines)


def test_terminal_prints_the_remainder_and_says_when_the_ledger_does_not_close(tmp_path: Path) -> None:
    text = "\n".join(printed(summary_of(tmp_path, {"forward": 0.9, "remainder": 0.1})))
    assert "Remainder at most 10.0% (rank 0): 1 of 1 rank above 2%: the ledger does not close." in " ".join(
        text.split()
    )


def test_terminal_shares_of_a_rank_add_up_to_its_wall_time(tmp_path: Path) -> None:
    lines = printed(summary_of(tmp_path, {"forward": 0.5, "wire": 0.3, "remainder": 0.0, "logging": 0.2}))
    shares = [float(line.split()[-1].rstrip("%")) for line in lines if line.startswith(" ■") and line.endswith("%")]
    shares = shares or [float(part.rstrip("%")) for line in lines for part in line.split() if part.endswith("0%")][:3]
    assert sum(shares) == pytest.approx(100.0)


def test_terminal_says_what_was_read_from_which_tier_of_storage(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", SyntheticRun(world_size=1, num_steps=2))
    path = run / "ledger" / "rank_00000.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        if line.get("name") == "step":
            line["workers"] |= {"read_cache_bytes": 1e6, "read_cache_seconds": 0.02, "read_remote_bytes": 2e6}
            line["workers"]["read_remote_seconds"] = 0.5
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = "\n".join(printed(read_ledger(run)))
    assert "Read 2.00 MB from cache in 40 ms, 4.00 MB from remote in 1.00 s" in text


def test_terminal_names_the_attempt_it_shows(tmp_path: Path) -> None:
    summary = read_ledger(make_run(tmp_path / "run", SyntheticRun(attempts=2, num_steps=20)))
    assert "10 steps, attempt 1" in printed(summary)[0]
