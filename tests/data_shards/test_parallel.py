"""The map over worker processes: in order, errors as they are, a dead worker is an error and not a hang."""

from __future__ import annotations

import os
from itertools import islice

import pytest

from data_shards.parallel import num_usable_cpus, ordered_map


def square(number: int) -> int:
    return number * number


def fail_at_seven(number: int) -> int:
    if number == 7:
        raise ValueError("seven is bad")
    return number


def die_at_seven(number: int) -> int:
    if number == 7:
        os._exit(9)
    return number


@pytest.mark.parametrize(("workers", "chunk"), [(1, 1), (2, 1), (2, 4), (3, 100)])
def test_results_come_in_the_order_of_the_tasks(workers: int, chunk: int):
    calls: list[tuple[int, int]] = []
    results = ordered_map(square, range(20), workers=workers, chunk=chunk, progress=lambda *call: calls.append(call))
    assert list(results) == [number * number for number in range(20)]
    assert calls == [(done, 20) for done in range(1, 21)]


def test_no_task_is_no_result():
    assert list(ordered_map(square, [], workers=2)) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_the_function_comes_through(workers: int):
    with pytest.raises(ValueError, match="seven is bad"):
        list(ordered_map(fail_at_seven, range(20), workers=workers))


def test_a_worker_that_dies_is_an_error_that_says_how_far_it_came():
    with pytest.raises(RuntimeError, match=r"a worker process died after \d+ of 20 items .* fewer workers"):
        list(ordered_map(die_at_seven, range(20), workers=2))


def test_a_caller_that_stops_early_leaves_no_process():
    results = ordered_map(square, range(10_000), workers=2)
    assert list(islice(results, 3)) == [0, 1, 4]
    results.close()  # the suite's guard fails where a thread of the pool is left


def test_usable_processors_are_those_of_this_process():
    assert num_usable_cpus() == len(os.sched_getaffinity(0)) >= 1
