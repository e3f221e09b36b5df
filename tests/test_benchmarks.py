"""The benchmarks run, on next to no work: their figures mean nothing here, their parts must not rot."""

from __future__ import annotations

import math

import pytest

from benchmarks.engine import SECTIONS, _rows, main
from benchmarks.engine_alone import loop_against_bare
from benchmarks.engine_scale import exchange_of_one_rank
from benchmarks.engine_step import Arm, Work, compare
from benchmarks.pairs import Ratio, Row, table
from tests.ranks import run_ranks


def test_a_ratio_is_of_pairs_and_not_of_sums():
    ratio = Ratio.of([1.0, 200.0, 3.0, 4.0, 5.0], [1.0, 100.0, 2.0, 4.0, 10.0])
    assert (ratio.lower, ratio.median, ratio.upper, ratio.num_pairs) == (1.0, 1.0, 1.5, 5)


def test_a_table_is_aligned_or_markdown():
    rows = [Row(what="a", seen="1.000", goal="below 1"), Row(what="longer", seen="2")]
    assert table(rows, markdown=True).splitlines() == [
        "| what | seen | goal |",
        "|---|---|---|",
        "| a | 1.000 | below 1 |",
        "| longer | 2 |  |",
    ]
    assert [len(line) for line in table(rows, markdown=False).splitlines()] == [22] * 3


ARMS = [
    Arm(name="DDP", warm_up=1),
    Arm(name="allreduce", exchange={"bucket_megabytes": 0.1}, pairs=2, warm_up=2),
    Arm(name="in parts", exchange={}, pairs=2, warm_up=1, micro_batches=2, exchange_each=True),
]


def _compare(world):
    return compare(ARMS, Work(model="tsm_resnet18", width=8, clips=2, size=32, steps=1), world)


def test_arms_are_timed_in_turn_with_ddp_on_every_rank():
    first, second = run_ranks(_compare, 2)
    assert [(one.name, one.against, one.wall.num_pairs) for one in first] == [
        ("allreduce", "DDP", 2),
        ("in parts", "DDP", 2),
    ]
    assert [one.wall for one in first] == [one.wall for one in second]  # the slowest rank's, on every rank
    assert all(0 < one.wall.median < math.inf and 0 < one.cpu.median < math.inf for one in first)
    rows = _rows("here", ARMS, first)
    assert [row.goal for row in rows] == ["below 1", "at most 1.02"]
    assert rows[0].what.endswith("allreduce / DDP")


def test_the_whole_loop_takes_turns_with_a_bare_one():
    ratio, milliseconds = loop_against_bare(pairs=2, clips=2, size=32, width=8)
    assert ratio.num_pairs == 2
    assert 0.1 < ratio.median < 10
    assert milliseconds > 0


def _at_scale(world, exchange):
    return exchange_of_one_rank(world_size=1536, ranks_per_node=6, exchange=exchange, model="tsm_resnet18")


@pytest.mark.parametrize("hierarchical", ["off", "on"])
def test_one_rank_of_1536_plans_and_exchanges(hierarchical):
    (seen,) = run_ranks(_at_scale, 1, {"hierarchical": hierarchical, "bucket_megabytes": 10})
    assert len(seen.buckets_megabytes) < 10  # each has left once
    assert sum(seen.buckets_megabytes) == pytest.approx(seen.gradient_megabytes, rel=1e-4)
    assert seen.buffer_megabytes == pytest.approx(seen.gradient_megabytes, rel=1e-3)
    nodes = 256 if hierarchical == "on" else 1536
    assert seen.node_megabytes == pytest.approx(2 * (nodes - 1) / nodes * seen.gradient_megabytes)
    assert seen.rounds == {"on": 520, "off": 3070}[hierarchical]


def test_the_command_names_its_sections(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["engine", "nothing"])
    with pytest.raises(SystemExit):
        main()
    assert "unknown section 'nothing'" in capsys.readouterr().err
    assert list(SECTIONS) == ["loopback", "links", "alone", "mpi", "scale", "memory"]
