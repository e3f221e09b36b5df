"""The coordinator's decisions, as functions: no process, no socket, no clock."""

from __future__ import annotations

import pytest

from dist_train.horovod.engine.fusion import fuse
from dist_train.horovod.engine.known import KnownRequests
from dist_train.horovod.engine.matching import mismatch, span
from dist_train.horovod.engine.messages import Request, Response
from dist_train.horovod.engine.negotiation import Negotiation
from dist_train.horovod.settings import Settings, read_settings


def allreduce(name: str, shape: tuple[int, ...] = (2,), *, process_set: int = 0, op: int = 1) -> Request:
    return Request("allreduce", name, process_set, ("float32",), (shape,), op)


def negotiation(size: int, *, fusion_threshold_bytes: int = 0) -> Negotiation:
    return Negotiation(size, fusion_threshold_bytes=fusion_threshold_bytes, cache_capacity=8)


def names(responses: list[Response]) -> list[list[str]]:
    return [[request.name for request in response.requests] for response in responses]


def test_ready_is_what_all_ranks_have_asked_for_in_the_order_of_completion():
    state = negotiation(3)
    for rank, order in enumerate(("abc", "cab", "bca")):
        for name in order[:2]:
            state.add(rank, allreduce(name), 0.0)
    assert state.decide() == []
    state.add(1, allreduce("b"), 0.0)
    state.add(2, allreduce("a"), 0.0)
    assert names(state.decide()) == [["b"], ["a"]]
    assert state.waiting
    state.add(0, allreduce("c"), 0.0)
    assert names(state.decide()) == [["c"]]
    assert not state.waiting


def test_a_barrier_is_passed_after_what_was_asked_for_before_it():
    state = negotiation(2)
    barrier = Request("barrier", "noname.0")
    state.add(0, allreduce("a"), 0.0)
    state.decide()
    for rank, request in ((0, barrier), (1, allreduce("a")), (1, barrier)):
        state.add(rank, request, 0.0)
    assert names(state.decide()) == [["a"], ["noname.0"]]


def learned(state: Negotiation, *requests: Request, size: int) -> KnownRequests:
    """What the ranks have learnt once they have made these requests together."""
    table = KnownRequests(8)
    for request in requests:
        for rank in range(size):
            state.add(rank, request, 0.0)
    for response in state.decide():
        table.decode(state.encode(response))
    return table


def test_known_requests_are_ready_when_all_ranks_have_announced_their_bits():
    state = negotiation(2)
    a, b = allreduce("a"), allreduce("b")
    table = learned(state, a, b, size=2)
    state.add_known(0, 0, table.bit(a) | table.bit(b), 1.0)
    assert state.decide() == []
    state.add_known(1, 0, table.bit(b), 1.0)
    assert names(state.decide()) == [["b"]]
    state.add_known(1, 0, table.bit(a), 1.0)
    assert names(state.decide()) == [["a"]]
    assert not state.waiting


@pytest.mark.parametrize("known_first", [True, False])
def test_a_known_request_and_a_new_one_of_the_same_name_are_compared(known_first):
    state = negotiation(2)
    table = learned(state, allreduce("a"), size=2)
    if known_first:
        state.add_known(0, 0, table.bit(allreduce("a")), 1.0)
    state.add(1, allreduce("a", (3,)), 1.0)
    if not known_first:
        state.add_known(0, 0, table.bit(allreduce("a")), 1.0)
    (response,) = state.decide()
    assert response.kind == "error"
    assert response.error == "Mismatched tensor shapes in allreduce 'a': rank 0 sent [2]; rank 1 sent [3]."
    for rank in (0, 1):  # and the name is free again
        state.add_known(rank, 0, table.bit(allreduce("a")), 2.0)
    assert names(state.decide()) == [["a"]]


def test_unnamed_requests_and_those_beyond_the_capacity_are_not_learnt():
    state = Negotiation(1, fusion_threshold_bytes=0, cache_capacity=1)
    table = KnownRequests(1)
    for request in (allreduce("noname.1"), allreduce("a"), allreduce("b")):
        state.add(0, request, 0.0)
    for response in state.decide():
        table.decode(state.encode(response))
    assert [table.bit(allreduce(name)) for name in ("noname.1", "a", "b")] == [0, 1, 0]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"dtypes": ("int32",)}, "data types in allreduce 'a': ranks 0, 2 sent float32; rank 1 sent int32."),
        ({"shapes": ((2, 1),)}, "tensor shapes in allreduce 'a': ranks 0, 2 sent [2]; rank 1 sent [2, 1]."),
        ({"op": 0}, "reduce ops in allreduce 'a': ranks 0, 2 sent Sum; rank 1 sent Average."),
        (
            {"prescale": 2.0},
            "prescale and postscale factors in allreduce 'a': ranks 0, 2 sent (1, 1); rank 1 sent (2, 1).",
        ),
        ({"device": "cuda"}, "devices in allreduce 'a': ranks 0, 2 sent cpu; rank 1 sent cuda."),
    ],
)  # fmt: skip
def test_a_mismatch_names_what_differs_and_who_differs(change, words):
    request = allreduce("a")
    assert mismatch({0: request, 1: request._replace(**change), 2: request}) == f"Mismatched {words}"


def test_root_ranks_and_trailing_dimensions_must_agree_and_first_dimensions_need_not():
    gather = Request("allgather", "g", dtypes=("int64",), shapes=((2, 3),))
    assert mismatch({0: gather, 1: gather._replace(shapes=((5, 3),))}) == ""
    assert "rank 0 sent [*, 3]; rank 1 sent [*, 4]" in mismatch({0: gather, 1: gather._replace(shapes=((2, 4),))})
    assert "without dimensions" in mismatch({0: gather._replace(shapes=((),)), 1: gather._replace(shapes=((),))})
    root = Request("broadcast", "b", dtypes=("int64",), shapes=((2,),), root=0)
    assert "root ranks" in mismatch({0: root, 1: root._replace(root=1)})
    assert "rank 1: no such root" in mismatch({0: root, 1: root._replace(problem="no such root")})


def test_an_allgather_tells_every_first_dimension():
    state = negotiation(2)
    state.add(1, Request("allgather", "g", dtypes=("int64", "int8"), shapes=((5, 3), (0,))), 0.0)
    state.add(0, Request("allgather", "g", dtypes=("int64", "int8"), shapes=((2, 3), (7,))), 0.0)
    assert state.decide()[0].first_dims == ((2, 5), (7, 0))


def test_joined_ranks_are_not_waited_for_in_an_allreduce_and_the_last_to_join_is_told():
    state = negotiation(3)
    table = learned(state, allreduce("known"), size=3)
    state.join(1)
    for rank in (0, 2):
        state.add(rank, allreduce("a"), 0.0)
        state.add_known(rank, 0, table.bit(allreduce("known")), 0.0)
        state.add(rank, Request("broadcast", "b", dtypes=("int8",), shapes=((1,),), root=0), 0.0)
    kinds = {response.requests[0].name: response for response in state.decide()}
    assert kinds["a"].kind == kinds["known"].kind == "allreduce"
    assert kinds["b"].error == "broadcast 'b' cannot be done while rank 1 has joined: only allreduce can."
    state.join(2)
    assert state.decide() == []
    state.join(0)
    (response,) = state.decide()
    assert (response.kind, response.value) == ("join", 0)
    state.join(0)  # a new round
    assert state.decide() == []


def test_process_sets_wait_for_their_members_only():
    state = negotiation(3)
    for rank in range(3):
        state.add(rank, Request("add_process_set", "s", shapes=((0, 2),)), 0.0)
    (response,) = state.decide()
    assert response.value == 1
    state.add(2, allreduce("a", process_set=1), 0.0)
    assert state.decide() == []
    state.add(0, allreduce("a", process_set=1), 0.0)
    (response,) = state.decide()
    assert (response.kind, response.process_set, state.members(1)) == ("allreduce", 1, (0, 2))
    for rank in range(3):
        state.add(rank, Request("add_process_set", "s", shapes=((0, 2),)), 0.0)
    assert state.decide()[0].value == -1  # there is one
    for rank in range(3):
        state.add(rank, Request("remove_process_set", "s", root=1), 0.0)
    assert state.decide()[0].value == 1
    assert state.members(1) == ()


def test_a_rank_that_leaves_fails_what_needs_it_and_nothing_else():
    state = negotiation(3)
    for rank in range(3):
        state.add(rank, Request("add_process_set", "s", shapes=((0, 1),)), 0.0)
    state.decide()
    table = learned(state, allreduce("known"), size=3)
    state.add(0, allreduce("a"), 0.0)
    state.add_known(1, 0, table.bit(allreduce("known")), 0.0)
    state.leave(2, "has shut down")
    assert [response.error for response in state.decide()] == ["Horovod has been shut down: rank 2 has shut down."] * 2
    state.join(0)
    assert state.decide()[0].kind == "error"
    for rank in (0, 1):
        state.add(rank, allreduce("b", process_set=1), 0.0)
    assert state.decide()[0].kind == "allreduce"


def test_what_waits_for_too_long_is_told_once_with_the_missing_ranks():
    state = negotiation(4)
    table = learned(state, allreduce("known"), size=4)
    state.add_known(1, 0, table.bit(allreduce("known")), 10.0)
    state.add(0, allreduce("a"), 11.0)
    assert state.overdue(12.0, 5.0, once=True) == {}
    assert state.overdue(15.5, 5.0, once=True) == {"allreduce.known": [0, 2, 3]}
    assert state.overdue(17.0, 5.0, once=True) == {"allreduce.a": [1, 2, 3]}
    assert state.overdue(17.0, 5.0) == {"allreduce.known": [0, 2, 3], "allreduce.a": [1, 2, 3]}
    for rank in (0, 2, 3):  # late, but complete
        state.add_known(rank, 0, table.bit(allreduce("known")), 18.0)
    assert names(state.decide()) == [["known"]]


def test_different_collectives_under_one_name_are_an_error_after_a_while():
    state = negotiation(2)
    state.add(0, allreduce("a"), 0.0)
    state.add(1, Request("broadcast", "a", dtypes=("int8",), shapes=((1,),), root=0), 0.0)
    assert state.disagreements(1.0) == []
    (response,) = state.disagreements(6.0)
    assert response.error == (
        "Mismatched operations under the name 'a': rank 0 asked for allreduce; rank 1 asked for broadcast."
    )
    assert not state.waiting


def test_fusion_joins_what_differs_in_name_and_shape_alone_up_to_the_threshold():
    requests = [allreduce(name, (10,)) for name in "abc"] + [allreduce("d", (10,), op=0), allreduce("e", (10,))]
    responses = [Response("allreduce", 0, (request,)) for request in requests]
    responses.insert(1, Response("barrier", 0, (Request("barrier", "x"),)))
    assert names(fuse(responses, 10**9)) == [["a", "b", "c", "e"], ["x"], ["d"]]
    assert names(fuse(responses, 80)) == [["a", "b"], ["x"], ["c", "e"], ["d"]]
    assert len(fuse(responses, 0)) == len(responses)
    scaled = Response("allreduce", 0, (allreduce("f", (10,))._replace(prescale=2.0),))
    assert names(fuse([responses[0], scaled], 10**9)) == [["a"], ["f"]]


def test_ranks_are_written_as_spans():
    assert [span(ranks) for ranks in ([3], [0, 1], [0, 1, 2, 7])] == ["rank 3", "ranks 0, 1", "ranks 0-2, 7"]


def test_settings_are_horovods_variables():
    environ = {"HOROVOD_FUSION_THRESHOLD": "0", "HOROVOD_CYCLE_TIME": "3.5", "HOROVOD_TIMELINE": "DYNAMIC"}
    assert read_settings(environ) == Settings(fusion_threshold_bytes=0, cycle_seconds=0.0035)
    assert read_settings({"HOROVOD_STALL_CHECK_DISABLE": "1"}).stall_warning_seconds == 0
    with pytest.raises(ValueError, match="HOROVOD_CYCLE_TIME='fast' is not a number of 0 or more"):
        read_settings({"HOROVOD_CYCLE_TIME": "fast"})
