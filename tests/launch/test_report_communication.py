"""Communication in the terminal and on the page: buckets, who came late and why, and the interface's own count."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from dist_train.ledger.summary import check_closed, read_ledger
from launch.monitors import ConsoleMonitor, _flatten
from launch.report import write_report
from launch.report.communication import (
    collective_rows,
    communication_markup,
    interface_sentence,
    lateness,
    straggler_sentence,
)
from launch.report.terminal import ledger_view
from tests.launch.synthetic_run import SyntheticRun, make_run


def _attempt(folder: Path, **options):
    return read_ledger(make_run(folder / "run", SyntheticRun(num_steps=80, evaluations=2, **options))).last


def _terminal(folder: Path) -> str:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(ledger_view(read_ledger(folder / "run")))
    return console.export_text()


def test_a_row_for_each_bucket_with_bandwidths_by_nccl_tests(tmp_path):
    rows = collective_rows(_attempt(tmp_path, world_size=4, straggler=2))
    assert [row.name for row in rows] == [f"classify bucket {number}" for number in range(4)]
    for row in rows:
        assert (row.count, row.num_ranks) == (80, 4)
        assert row.payload == pytest.approx(44_726_568 / 4, rel=1e-6)
        assert row.wire_seconds == pytest.approx(0.012 / 4)
        assert row.spread_seconds == pytest.approx(0.08)
        assert row.algorithm_bandwidth == pytest.approx(44_726_568 / 0.012, rel=1e-6)
        assert row.bus_bandwidth == pytest.approx(1.5 * row.algorithm_bandwidth)
    assert rows[0].hidden_share == pytest.approx(0.8 * 0.003 / (0.003 + 0.75 * 0.08))
    assert rows[3].hidden_share == 0.0


def test_the_late_rank_is_first_in_the_terminal_and_named_with_its_cause(tmp_path):
    attempt = _attempt(tmp_path, world_size=4, straggler=2)
    late = lateness(attempt)
    assert [one.late_seconds > 0 for one in late] == [False, False, True, False]
    assert late[2].last_share == 1.0
    text = _terminal(tmp_path)
    assert "Latest to arrive, behind the first: rank 2 by 80 ms (last 100.0%)" in text
    assert "Rank 2 (n1) holds the others up" in text
    assert "its loader needs" in text
    assert "classify bucket 3" in text
    assert max(len(line) for line in text.splitlines()) <= 80


def test_an_even_run_names_nobody(tmp_path):
    assert straggler_sentence(_attempt(tmp_path, world_size=4)) == "No rank holds the others up."


@pytest.mark.parametrize("world_size", [2, 16])
def test_the_ledgers_bytes_stand_beside_the_interfaces_of_the_first_host(tmp_path, world_size):
    said = interface_sentence(_attempt(tmp_path, world_size=world_size))
    assert said.startswith(f"By the ledger {min(world_size, 8)} ranks of n1 sent ")
    assert "its interface eth0 counted" in said


def test_the_page_has_a_table_and_three_pictures_of_communication(tmp_path):
    markup = communication_markup(_attempt(tmp_path, world_size=16, straggler=9))
    assert markup.count("<svg") == 3
    for title in ("Time of a collective", "Bus bandwidth", "Lateness of each rank"):
        assert f"<h4>{title}</h4>" in markup
    assert "Rank 9 (n2) holds the others up" in markup
    page = write_report([tmp_path / "run"], tmp_path / "report.html").read_text()
    assert "<h2>Communication</h2>" in page


def test_a_world_of_one_has_no_such_section_and_an_older_ledger_neither(tmp_path):
    attempt = _attempt(tmp_path, world_size=1)
    assert communication_markup(attempt) == ""
    assert straggler_sentence(attempt) == ""
    assert "Collectives" not in _terminal(tmp_path)
    older = make_run(tmp_path / "older", SyntheticRun(num_steps=20, world_size=2))
    for path in (older / "ledger").iterdir():
        lines = [line for line in path.read_text().splitlines() if json.loads(line)["kind"] in ("start", "span", "end")]
        path.write_text("\n".join(lines) + "\n")
    assert communication_markup(read_ledger(older).last) == ""


def test_many_buckets_are_cut_to_the_largest_and_that_is_said(tmp_path):
    markup = communication_markup(_attempt(tmp_path, num_buckets=40))
    assert "16 smallest are left out" in markup
    assert "and 28 smaller ones" in _terminal(tmp_path)


def test_lines_of_communication_leave_the_rows_adding_up(tmp_path):
    _attempt(tmp_path, world_size=2)
    assert check_closed(read_ledger(tmp_path / "run"), 0.02).closed


def test_a_damaged_collectives_line_names_file_and_line(tmp_path):
    run = make_run(tmp_path / "run", SyntheticRun(num_steps=20, evaluations=0))
    path = run / "ledger/rank_00000.jsonl"
    lines = path.read_text().splitlines()
    index = next(number for number, line in enumerate(lines) if '"collectives"' in line)
    lines[index] = '{"kind": "collectives", "of": {}}'
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=rf"line {index + 1}: .*no field 'wire_seconds'"):
        read_ledger(run)


def test_metrics_of_communication_have_flat_names_for_wandb():
    straggler = {"rank": 1, "cause": "loader", "share": 0.2}
    flat = _flatten({"step": 1, "comm": {"busbw_gbit": 9.0, "hidden_share": 0.8}, "straggler": straggler})
    assert {"comm/busbw_gbit", "comm/hidden_share", "straggler/rank", "straggler/cause"} <= set(flat)


class _Beside:
    """What stands beside the progress bar."""

    said = ""

    def annotate(self, text: str) -> None:
        self.said = text


def test_the_console_names_the_slow_rank_while_there_is_one():
    beside = _Beside()
    monitor = ConsoleMonitor(beside)
    metrics = {"loss": 1.0, "clips_per_second": 50.0}
    monitor.log({**metrics, "straggler": {"rank": 3, "cause": "loader", "share": 0.2}})
    assert beside.said == "loss 1.000  clips/s 50  slow rank 3 (loader)"
    monitor.log({**metrics, "straggler": {"rank": -1, "cause": "none", "share": 0.0}})
    assert beside.said == "loss 1.000  clips/s 50"
