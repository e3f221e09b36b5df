"""The certificate counts what was trained on, across ranks, attempts and world sizes."""

from __future__ import annotations

import numpy as np
import pytest

from dist_train.journal import Journal, certify, certify_stream


def _journal(run_dir, *, rank=0, attempt=0, start=0, steps=()):
    journal = Journal(run_dir, rank=rank, attempt=attempt, start=start)
    for number, (positions, samples) in enumerate(steps):
        journal.add(step=number, positions=positions, samples=samples)
    journal.close()


def _counts(run_dir, **extent):
    return [(epoch.num_seen, epoch.num_dropped, epoch.num_repeated) for epoch in certify(run_dir, **extent)]


def test_each_sample_once_over_two_ranks_is_exact(tmp_path):
    _journal(tmp_path, rank=0, steps=[([0, 1], [3, 0]), ([4, 5], [2, 1])])
    _journal(tmp_path, rank=1, steps=[([2, 3], [1, 2]), ([6, 7], [0, 3])])
    assert _counts(tmp_path, num_samples=4, num_epochs=2) == [(4, 0, 0), (4, 0, 0)]


def test_a_sample_dropped_and_another_repeated_are_counted(tmp_path):
    _journal(tmp_path, steps=[([0, 1, 2, 3], [0, 1, 1, 3])])
    (epoch,) = certify(tmp_path, num_samples=4, num_epochs=1)
    assert (epoch.num_seen, epoch.num_dropped, epoch.num_repeated, epoch.exact) == (4, 1, 1, False)


def test_work_lost_by_a_kill_does_not_count(tmp_path):
    _journal(tmp_path, attempt=0, steps=[([0, 1], [0, 1]), ([2], [2])])
    _journal(tmp_path, attempt=1, start=2, steps=[([2, 3], [2, 3])])
    assert _counts(tmp_path, num_samples=4, num_epochs=1) == [(4, 0, 0)]


def test_an_attempt_on_fewer_ranks_overrules_files_that_it_never_touched(tmp_path):
    _journal(tmp_path, rank=0, attempt=0, steps=[([0], [0]), ([2], [2])])
    _journal(tmp_path, rank=1, attempt=0, steps=[([1], [1]), ([3], [3])])
    _journal(tmp_path, rank=0, attempt=1, start=2, steps=[([2, 3], [2, 3])])
    assert _counts(tmp_path, num_samples=4, num_epochs=1) == [(4, 0, 0)]


def test_a_line_that_a_kill_cut_short_is_passed_over(tmp_path):
    _journal(tmp_path, steps=[([0, 1], [0, 1])])
    path = tmp_path / "journal" / "rank_00000.jsonl"
    path.write_text(path.read_text() + '{"step":1,"positions":[2')
    _journal(tmp_path, attempt=1, start=2, steps=[([2, 3], [2, 3])])
    assert _counts(tmp_path, num_samples=4, num_epochs=1) == [(4, 0, 0)]


def test_a_journal_of_another_set_says_so(tmp_path):
    _journal(tmp_path, steps=[([0, 1], [0, 4])])
    with pytest.raises(ValueError, match=r"rank_00000.jsonl names sample 4, the training split has 4: .* another set"):
        certify(tmp_path, num_samples=4, num_epochs=1)
    with pytest.raises(ValueError, match="another set"):
        certify_stream(tmp_path, num_samples=4, num_positions=2, order=lambda positions: positions)


def test_a_folder_without_journal_says_so(tmp_path):
    with pytest.raises(ValueError, match="has no journal"):
        certify(tmp_path, num_samples=4, num_epochs=1)


ORDER = np.array([3, 0, 3, 1, -1, 2, 0, 3])  # a stream that visits sample 3 more often, with one empty place


def _compare(run_dir, num_positions=8):
    found = certify_stream(
        run_dir, num_samples=4, num_positions=num_positions, order=lambda positions: ORDER[positions]
    )
    return found.num_positions, found.num_dropped, found.num_repeated, found.num_others, found.exact


def test_a_stream_is_exact_when_the_sample_of_each_position_was_seen_once(tmp_path):
    _journal(tmp_path, rank=0, steps=[([0, 1], [3, 0]), ([5], [2])])
    _journal(tmp_path, rank=1, steps=[([2, 3], [3, 1]), ([6, 7], [0, 3])])
    assert _compare(tmp_path) == (7, 0, 0, 0, True)
    assert _compare(tmp_path, num_positions=3) == (3, 0, 0, 0, True)
    found = certify_stream(tmp_path, num_samples=4, num_positions=8, order=lambda positions: ORDER[positions])
    assert found.visits.tolist() == [2, 1, 1, 3]


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([([0, 1, 2, 3, 5, 6], [3, 0, 3, 1, 2, 0])], (7, 1, 0, 0, False)),
        ([([0, 1, 2, 3, 5, 6, 7], [3, 0, 1, 1, 2, 0, 3])], (7, 0, 0, 1, False)),
        ([([0, 1, 2, 3, 4, 5, 6, 7], [3, 0, 3, 1, 1, 2, 0, 3])], (7, 0, 0, 1, False)),
        ([([0, 1, 2, 3, 5, 6, 7], [3, 0, 3, 1, 2, 0, 3]), ([0, 7], [3, 3])], (7, 0, 2, 0, False)),
    ],
    ids=["dropped", "another sample", "where nothing is", "repeated"],
)
def test_a_stream_that_is_not_exact_is_counted(tmp_path, monkeypatch, steps, expected):
    _journal(tmp_path, steps=steps)
    assert _compare(tmp_path) == expected
    monkeypatch.setattr("dist_train.journal._CHUNK", 2)  # a line at a time, as in a long run
    assert _compare(tmp_path) == expected


def test_a_stream_leaves_out_what_a_later_attempt_has_redone(tmp_path):
    _journal(tmp_path, attempt=0, steps=[([0, 1], [3, 0]), ([2, 3], [3, 1])])
    _journal(tmp_path, attempt=1, start=2, steps=[([2, 3], [3, 1])])
    assert _compare(tmp_path, num_positions=4) == (4, 0, 0, 0, True)
