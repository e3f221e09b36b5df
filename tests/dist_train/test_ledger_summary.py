"""The ledger's files read back: arithmetic, attempts, torn and damaged lines, bounded memory, closure."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dist_train.ledger.rows import RANK_ROWS
from dist_train.ledger.summary import LedgerError, check_closed, read_ledger, read_rank_file


def start(rank: int = 0, attempt: int = 0, world_size: int = 1) -> dict:
    return {"kind": "start", "attempt": attempt, "rank": rank, "world_size": world_size, "host": "n1"}


def span(name: str, step: int, end: float, seconds: dict, **more: object) -> dict:
    wall = sum(seconds.values())
    place = {"step": step, "clips_seen": 32 * step, "end_seconds": end, "wall_seconds": wall}
    return {"kind": "span", "name": name, **place, "seconds": seconds, **more}


def end(wall: float) -> dict:
    return {"kind": "end", "wall_seconds": wall, "exit": "ok"}


def write(run_dir: Path, rank: int, *lines: dict | str) -> Path:
    path = run_dir / "ledger" / f"rank_{rank:05d}.jsonl"
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def two_steps(rank: int = 0, attempt: int = 0, world_size: int = 1, first: int = 1) -> list[dict]:
    workers = {"wall": 2.0, "read": 0.2, "decode": 1.0, "augment": 0.3, "idle": 0.5}
    workers |= {"frames_decoded": 100, "frames_used": 64, "skipped": 1}
    workers |= {
        "read_disk_seconds": 0.05,
        "read_remote_seconds": 0.15,
        "read_disk_bytes": 400,
        "read_remote_bytes": 600,
    }
    moved = {"read": 1000, "wire": 50}
    return [
        start(rank, attempt, world_size),
        span("startup", 0, 1.0, {"startup": 0.9, "remainder": 0.1}),
        span("step", first, 3.0, {"forward": 1.5, "wait_for_peer": 0.5}, bytes=moved, workers=workers),
        span("step", first + 1, 4.0, {"forward": 0.75, "remainder": 0.25}, bytes=moved, workers=workers),
        end(4.0),
    ]


def test_totals_of_a_rank_are_the_sums_of_its_lines(tmp_path: Path) -> None:
    write(tmp_path, 0, *two_steps())
    (rank,) = read_ledger(tmp_path).last.ranks
    assert rank.seconds["forward"] == 2.25
    assert rank.seconds["remainder"] == pytest.approx(0.35)
    assert rank.step_row_seconds["remainder"] == 0.25
    assert rank.remainder_share == pytest.approx(0.35 / 4)
    assert rank.busy_seconds == 2.5
    assert rank.num_bytes == {"read": 2000, "decode": 0, "host_to_device": 0, "wire": 100}
    assert rank.span_seconds == {"startup": 1.0, "step": 3.0}
    assert (rank.exit, rank.wall_seconds, rank.num_steps) == ("ok", 4.0, 2)
    assert rank.workers is not None
    assert (rank.workers.wall_seconds, rank.workers.frames_decoded, rank.workers.skipped) == (4.0, 200, 2)
    assert sum(rank.workers.seconds.values()) == pytest.approx(rank.workers.wall_seconds)
    assert rank.workers.tier_bytes == {"disk": 800, "remote": 1200}
    assert rank.workers.tier_seconds == {"disk": 0.1, "remote": 0.3}


def test_series_has_a_point_for_each_step_with_rows_that_add_up(tmp_path: Path) -> None:
    write(tmp_path, 0, *two_steps())
    steps = read_ledger(tmp_path).last.ranks[0].steps
    assert steps.step.tolist() == [1, 2]
    assert steps.clips_seen.tolist() == [32, 64]
    assert steps.seconds.shape == (2, len(RANK_ROWS))
    np.testing.assert_allclose(steps.seconds.sum(axis=1), steps.wall_seconds)
    assert steps.num_bytes[:, 0].tolist() == [1000.0, 1000.0]
    assert steps.clips_per_step == 32


def test_throughput_counts_clips_of_all_ranks_over_the_slowest_ranks_steps(tmp_path: Path) -> None:
    for rank in range(2):
        write(tmp_path, rank, *two_steps(rank, world_size=2))
    assert read_ledger(tmp_path).last.clips_per_second == pytest.approx(64 / 3)


def test_batch_is_read_off_a_resumed_attempts_first_and_only_step(tmp_path: Path) -> None:
    write(tmp_path, 0, start(attempt=1), span("step", 50, 1.0, {"forward": 1.0}))
    assert read_ledger(tmp_path).last.ranks[0].steps.clips_per_step == 32


@pytest.mark.parametrize("tail", ['{"kind":"span","na', '{"kind":"span","name":"step"}'[:-2], "\0\0\0\0"])
def test_half_a_line_at_the_end_is_what_a_kill_leaves(tmp_path: Path, tail: str) -> None:
    path = write(tmp_path, 0, *two_steps()[:-1])
    path.write_text(path.read_text() + tail)
    (rank,) = read_ledger(tmp_path).last.ranks
    assert (rank.exit, rank.wall_seconds, rank.num_steps) == ("killed", 4.0, 2)


@pytest.mark.parametrize("separator", ["\n", ""])
def test_resumed_run_goes_on_after_half_a_line(tmp_path: Path, separator: str) -> None:
    first, second = two_steps()[:-1], two_steps(attempt=1, first=3)
    path = write(tmp_path, 0, *first)
    tail = '{"kind": "span", "name": "st' + separator
    path.write_text(path.read_text() + tail + "".join(json.dumps(line) + "\n" for line in second))
    summary = read_ledger(tmp_path)
    assert [attempt.attempt for attempt in summary.attempts] == [0, 1]
    assert [attempt.ranks[0].exit for attempt in summary.attempts] == ["killed", "ok"]
    assert summary.last.ranks[0].steps.step.tolist() == [3, 4]
    assert summary.wall_seconds == 8.0
    assert summary.seconds["forward"] == 4.5
    assert summary.num_bytes["read"] == 4000


def test_ranks_of_an_earlier_larger_world_stay_with_their_attempt(tmp_path: Path) -> None:
    for rank in range(4):
        write(tmp_path, rank, *two_steps(rank, world_size=4)[:-1])
    again = two_steps(0, attempt=1, world_size=1, first=3)
    with (tmp_path / "ledger/rank_00000.jsonl").open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in again))
    summary = read_ledger(tmp_path)
    assert [len(attempt.ranks) for attempt in summary.attempts] == [4, 1]
    assert summary.last.missing_ranks == ()


def test_a_rank_without_a_file_is_named(tmp_path: Path) -> None:
    for rank in (0, 2):
        write(tmp_path, rank, *two_steps(rank, world_size=4))
    assert read_ledger(tmp_path).last.missing_ranks == (1, 3)


def test_last_is_the_latest_attempt_that_made_a_step(tmp_path: Path) -> None:
    write(tmp_path, 0, *two_steps(), start(attempt=1))
    summary = read_ledger(tmp_path)
    assert len(summary.attempts) == 2
    assert summary.last.attempt == 0


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"kind":"span","name', "damaged"),
        ("[1, 2]", "damaged"),
        ('{"kind":"span","name":"step","step":1}', "no field 'wall_seconds'"),
        ('{"no_kind":1}', "no field 'kind'"),
        (json.dumps(span("step", 1, 1.0, {"forwards": 1.0})), "unknown row 'forwards'"),
        (json.dumps(span("step", 1, 1.0, {"forward": float("nan")})), "not a finite number"),
        (json.dumps({"kind": "other"}), "kind 'other'"),
    ],
)
def test_damaged_middle_line_is_an_error_that_names_file_and_line(tmp_path: Path, line: str, said: str) -> None:
    lines = two_steps()
    path = write(tmp_path, 0, *lines[:3], line, *lines[3:])
    with pytest.raises(LedgerError) as error:
        read_ledger(tmp_path)
    assert f"{path}, line 4: " in str(error.value)
    assert said in str(error.value)
    assert isinstance(error.value, ValueError)


def test_spans_before_any_start_are_an_error(tmp_path: Path) -> None:
    path = write(tmp_path, 0, *two_steps()[1:])
    with pytest.raises(LedgerError, match=r"line 1: .*before any start"):
        read_rank_file(path)


def test_folder_without_a_ledger_is_an_error_that_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match=r"expected ledger/rank_00000\.jsonl"):
        read_ledger(tmp_path)


@pytest.mark.parametrize("num_steps", [1, 7, 8, 9, 64, 1000])
def test_thinned_series_is_bounded_and_adds_up_to_the_same(tmp_path: Path, num_steps: int) -> None:
    random = np.random.default_rng(0)
    lines = [start()]
    for step in range(1, num_steps + 1):
        seconds = {"forward": random.random(), "wire": random.random()}
        lines.append(span("step", step, float(step), seconds, bytes={"read": step}))
    write(tmp_path, 0, *lines)
    whole = read_ledger(tmp_path).last.ranks[0]
    thinned = read_ledger(tmp_path, max_points=4).last.ranks[0]
    assert len(thinned.steps) <= 8
    assert len(thinned.steps) >= min(4, num_steps)
    assert thinned.steps.num_steps.sum() == num_steps
    assert len(set(thinned.steps.num_steps[:-1].tolist())) <= 1
    assert thinned.steps.step[-1] == num_steps
    assert thinned.seconds == whole.seconds
    np.testing.assert_allclose(thinned.steps.seconds.sum(axis=0), whole.steps.seconds.sum(axis=0), rtol=1e-5)
    np.testing.assert_allclose(thinned.steps.num_bytes.sum(axis=0), whole.steps.num_bytes.sum(axis=0))
    np.testing.assert_allclose(thinned.steps.wall_seconds.sum(), whole.steps.wall_seconds.sum())
    assert thinned.steps.clips_per_step == pytest.approx(32)


def test_points_below_one_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, 0, *two_steps())
    with pytest.raises(ValueError, match="max_points is 0"):
        read_rank_file(path, max_points=0)


def test_steady_rows_leave_out_the_cold_first_step(tmp_path: Path) -> None:
    lines = [span("step", step, float(step), {"loader_wait": 9.0 if step == 1 else 0.5}) for step in range(1, 12)]
    write(tmp_path, 0, start(), *lines)
    rank = read_ledger(tmp_path).last.ranks[0]
    assert rank.step_row_seconds["loader_wait"] == 14.0
    assert rank.steady_row_seconds["loader_wait"] == pytest.approx(5.0)
    assert read_ledger(tmp_path).last.clips_per_second == pytest.approx(10 * 32 / 5.0)


def test_ledger_closes_when_named_rows_add_up(tmp_path: Path) -> None:
    write(tmp_path, 0, start(), span("step", 1, 10.0, {"forward": 9.9, "remainder": 0.1}), end(10.0))
    check = check_closed(read_ledger(tmp_path), 0.02)
    assert check.closed
    assert check.describe().startswith("every rank's ledger adds up within 2.0%")


@pytest.mark.parametrize(
    ("seconds", "wall", "gap", "remainder"),
    [
        ({"forward": 9.0, "remainder": 1.0}, 10.0, 0.0, 1.0),  # all is there, a tenth of it unnamed
        ({"forward": 9.0}, 10.0, 1.0, 0.0),  # a second is missing from the file
        ({"forward": 11.0}, 10.0, -1.0, 0.0),  # a second is counted twice
        ({"forward": 10.0, "remainder": 1.0}, 10.0, -1.0, 1.0),  # twice, and the remainder must not hide it
    ],
)
def test_ledger_does_not_close_on_missing_doubled_or_unnamed_time(
    tmp_path: Path, seconds: dict, wall: float, gap: float, remainder: float
) -> None:
    write(tmp_path, 0, start(), span("step", 1, wall, seconds), end(wall))
    write(tmp_path, 1, start(rank=1), span("step", 1, 10.0, {"forward": 10.0}), end(10.0))
    check = check_closed(read_ledger(tmp_path), 0.02)
    assert [rank.closed for rank in check.ranks] == [False, True]
    assert not check.closed
    assert check.ranks[0].gap_seconds == pytest.approx(gap)
    assert check.ranks[0].remainder_seconds == pytest.approx(remainder)
    assert check.describe().startswith("1 of 2 rank ledgers do not add up")


def test_span_whose_rows_differ_from_its_wall_time_is_found(tmp_path: Path) -> None:
    off = {**span("step", 2, 3.0, {"forward": 1.0}), "wall_seconds": 1.25}
    write(tmp_path, 0, start(), span("step", 1, 1.0, {"forward": 1.0}), off, end(2.25))
    gap, line = read_ledger(tmp_path).last.ranks[0].worst_span_gap
    assert (gap, line) == (0.25, 3)
