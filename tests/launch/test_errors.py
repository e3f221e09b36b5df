"""What a rank leaves for the process that supervises it."""

from __future__ import annotations

from launch.errors import Failure, read_failures, write_failure


def test_failures_are_read_whole_and_the_earliest_first(tmp_path):
    late, early = (Failure(exit_code=2, message="no", rank=rank, seconds=at) for rank, at in ((0, 5.0), (1, 4.0)))
    assert write_failure(tmp_path, late)
    assert write_failure(tmp_path, early)
    (tmp_path / "rank_00002.partial").write_text('{"exit_co')  # of a rank that was killed while it wrote
    assert read_failures(tmp_path) == [early, late]


def test_a_rank_learns_that_it_cannot_leave_its_failure(tmp_path):
    assert not write_failure(tmp_path / "gone", Failure(exit_code=1, message="no"))
