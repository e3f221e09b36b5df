"""A job whose ranks do not all start ends in bounded time, in an error that names those that are missing."""

from __future__ import annotations

import resource
import socket
import threading
from dataclasses import replace

import pytest
import torch.distributed as dist

from dist_train.arrival import allow_connections, wait_for_all
from dist_train.diagnosis import CollectiveError, CollectiveTimeout, PeerLost
from dist_train.placement import Placement
from dist_train.rendezvous import make_world, process_group


def _arrive(ranks: list[int], world_size: int) -> dict[int, Exception | None]:
    """What `wait_for_all` does on each of `ranks`, threads with a connection of their own."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ended: dict[int, Exception | None] = {}

    def arrive(rank: int, own: dist.Store) -> None:
        try:
            wait_for_all(own, rank=rank, world_size=world_size, timeout_seconds=0.5)
            ended[rank] = None
        except CollectiveError as error:
            ended[rank] = error

    threads = [threading.Thread(target=arrive, args=(rank, store.clone())) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ended


def test_ranks_that_have_all_come_go_on():
    assert _arrive([0, 1, 2], 3) == {0: None, 1: None, 2: None}


def test_ranks_that_do_not_come_are_named_alike_on_all_that_did():
    ended = _arrive([0, 2], 5)
    assert {type(error) for error in ended.values()} == {CollectiveTimeout}
    (said,) = {str(error) for error in ended.values()}
    assert said.startswith("ranks 1, 3, 4 of 5 did not start within 0.5 s; the others came from ")
    assert socket.gethostname() in said
    assert all(error is not None and error.on_every_rank for error in ended.values())


def test_when_the_rank_that_keeps_the_store_goes_the_others_say_so():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = dist.TCPStore("127.0.0.1", store.port, is_master=False, wait_for_workers=False)
    timer = threading.Timer(0.2, lambda: kept.clear())
    kept = [store]
    del store
    timer.start()
    with pytest.raises(PeerLost, match="rank 1: rank 0 went away while the ranks were starting"):
        wait_for_all(client, rank=1, world_size=2, timeout_seconds=20)
    timer.join()


def test_rank_0_may_keep_a_connection_of_every_rank():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, before[1]))
        allow_connections(2)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (1032, before[1])
        allow_connections(10**9)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == before[1]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def _placement(rank: int, port: int | None) -> Placement:
    address = None if port is None else "127.0.0.1"
    return Placement(
        launcher="torchrun",
        rank=rank,
        world_size=2,
        local_rank=rank,
        local_world_size=2,
        master_address=address,
        master_port=port,
        job_key=f"test_arrival {port}",
    )


@pytest.fixture
def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("told", [True, False], ids=["the launcher tells the address", "a file tells the port"])
def test_without_rank_0_the_others_end_and_say_where_they_looked(monkeypatch, tmp_path, free_port, told):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    placement = _placement(1, free_port if told else None)
    wanted = f"did not find rank 0 at 127.0.0.1:{free_port}" if told else "rank 0 did not start within 1 s"
    with (
        pytest.raises(CollectiveTimeout, match=wanted) as caught,
        process_group(make_world(placement, "cpu"), placement, start_seconds=1.0),
    ):
        pass
    assert not caught.value.on_every_rank  # rank 0 cannot speak for it


def test_rank_0_uses_a_store_that_is_there_and_takes_no_rank_of_an_earlier_attempt_for_one_of_its_own(
    monkeypatch, capfd
):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store.set("all arrived", "")
    dist.PrefixStore("torchrun-7.0.2", store).set("all arrived", "")
    placement = replace(_placement(0, store.port), store_is_there=True, job_key="torchrun-7.1.2")
    with (
        pytest.raises(CollectiveTimeout, match="rank 1 of 2 did not start within 1 s"),
        process_group(make_world(placement, "cpu"), placement, start_seconds=1.0),
    ):
        pass
    assert dist.PrefixStore("torchrun-7.1.2", store).check(["arrived/0"])
    assert "failed to bind" not in capfd.readouterr().err


def test_rank_0_alone_ends_and_names_the_missing(monkeypatch, free_port):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    placement = _placement(0, free_port)
    with (
        pytest.raises(CollectiveTimeout, match="rank 1 of 2 did not start within 1 s"),
        process_group(make_world(placement, "cpu"), placement, start_seconds=1.0),
    ):
        pass
