"""Hosts of network namespaces: processes and ranks run on them, links are shaped, and nothing stays behind."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.cluster.hosts import Hosts, bits_per_second, need_hosts, run_ranks_on_hosts
from tests.ranks import run_ranks


@pytest.fixture(autouse=True)
def hosts_can_be_made():
    need_hosts()


def left_behind(hosts: Hosts) -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if line.startswith(hosts._prefix)]


def running_commands() -> set[bytes]:
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            found.add(path.read_bytes())
    return found


def test_a_host_has_its_name_its_address_its_counters_and_finds_the_others():
    with Hosts(2) as hosts:
        said = hosts[1].run(["sh", "-c", "hostname && cat /sys/class/net/eth0/statistics/tx_bytes && getent hosts h1"])
        assert said.returncode == 0, said.stderr
        name, sent, found = said.stdout.splitlines()
        assert (name, found.split()) == ("h2", ["10.77.0.1", "h1"])
        assert 0 <= int(sent) <= hosts[1].tx_bytes()
    assert socket.gethostname() != "h2"


def test_two_sets_of_hosts_stand_side_by_side_and_leave_nothing_even_after_an_error():
    with Hosts(1) as first:
        try:
            with Hosts(2) as second:
                sleepers = [host.popen(["sleep", "100"]) for host in second]
                stray = second[0].popen(["setsid", "--fork", "sleep", "101"])
                stray.wait()
                deadline = time.monotonic() + 10
                while b"sleep\x00101\x00" not in running_commands():
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
                raise KeyError
        except KeyError:
            pass
        assert [process.returncode for process in sleepers] == [-signal.SIGKILL] * 2
        assert not left_behind(second)
        assert first[0].run(["true"]).returncode == 0
        assert b"sleep\x00101\x00" not in running_commands()
    assert not left_behind(first)


def _make_and_die() -> None:
    Hosts(1).__enter__()
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_maker_left_is_deleted_by_the_next():
    maker = multiprocessing.get_context("fork").Process(target=_make_and_die)
    maker.start()
    maker.join()
    spaces = Path("/run/netns")
    assert list(spaces.glob(f"reelscale-{maker.pid}-*"))
    with Hosts(1):
        assert not list(spaces.glob(f"reelscale-{maker.pid}-*"))


def _all_reduce(world, num_bytes: int, times: int) -> tuple[str, float, list[float]]:
    tensor = torch.full((num_bytes // 4,), float(world.rank))
    dist.all_reduce(tensor)
    result = tensor[:2].tolist()
    begun = time.perf_counter()
    for _ in range(times):
        dist.all_reduce(tensor)
    return socket.gethostname(), time.perf_counter() - begun, result


def test_forked_ranks_all_reduce_across_hosts_and_the_counters_agree_with_a_ring():
    size = 4_000_000
    with Hosts(4) as hosts:
        before = [host.tx_bytes() for host in hosts]
        results = run_ranks(_all_reduce, 4, size, 1, enter=hosts.enter)
        sent = [host.tx_bytes() - start for host, start in zip(hosts, before, strict=True)]
    assert [name for name, _, _ in results] == ["h1", "h2", "h3", "h4"]
    assert all(result == [6.0, 6.0] for _, _, result in results)
    ring = 2 * 2 * 3 / 4 * size  # two all-reduces, each 2 (W - 1) / W times the tensor
    assert all(ring < count < 1.05 * ring for count in sent), [count / ring for count in sent]


def test_a_slower_link_takes_longer():
    size = 1_000_000
    seconds = {}
    with Hosts(2, rate="1gbit") as hosts:
        for rate in ("1gbit", "50mbit"):
            hosts[1].set_rate(rate)  # one slow link slows the ring
            seconds[rate] = max(spent for _, spent, _ in run_ranks(_all_reduce, 2, size, 2, enter=hosts.enter))
    assert seconds["50mbit"] > 2 * size * 8 / bits_per_second("50mbit") * 0.9  # the least the link allows
    assert seconds["50mbit"] > 3 * seconds["1gbit"]


SCRIPT = """
import os, socket, sys
from dist_train.placement import find_placement
from dist_train.rendezvous import make_world, process_group
import torch.distributed as dist
placement = find_placement(os.environ)
world = make_world(placement, "cpu")
with process_group(world, placement):
    names = [None] * world.world_size
    dist.all_gather_object(names, f"{socket.gethostname()}:{world.node_rank}:{world.local_rank}")
    print(*names)
"""


def test_commands_run_as_ranks_find_each_other_as_under_torchrun():
    with Hosts(2) as hosts:
        done = run_ranks_on_hosts(hosts, [sys.executable, "-c", SCRIPT], ranks_per_host=2)
        assert [rank.returncode for rank in done] == [0] * 4, done[0].stderr
        assert {rank.stdout for rank in done} == {"h1:0:0 h1:0:1 h2:1:0 h2:1:1\n"}


def test_ranks_that_hang_are_killed_at_the_timeout():
    with Hosts(2) as hosts:
        done = run_ranks_on_hosts(hosts, ["sh", "-c", "echo here; [ $RANK = 1 ] || sleep 100"], timeout=1)
    assert [(rank.returncode, rank.stdout) for rank in done] == [(-signal.SIGKILL, "here\n"), (0, "here\n")]


def test_a_pulled_cable_cuts_a_host_off_and_the_remote_shell_reaches_it():
    with Hosts(2) as hosts:
        code = "import socket, time; server = socket.create_server(('', 7)); print('up', flush=True); time.sleep(60)"
        server = hosts[0].popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert server.stdout.readline() == "up\n"
        client = [sys.executable, "-c", "import socket; socket.create_connection(('h1', 7), 1)"]
        assert hosts[1].run(client).returncode == 0
        hosts[1].set_link(up=False)
        assert hosts[1].run(client).returncode != 0
        hosts[1].set_link(up=True)
        by_shell = subprocess.run(
            [hosts.remote_shell, "-x", "h2", "hostname; echo", "$HOME"], capture_output=True, text=True, check=True
        )
        assert by_shell.stdout.splitlines() == ["h2", os.environ["HOME"]]
        server.stdout.close()


@pytest.mark.parametrize("rate", ["fast", "0mbit", "1Gbit"])
def test_a_rate_that_is_none_is_refused(rate):
    with pytest.raises(ValueError, match=f"rate is '{rate}'"):
        Hosts(1, rate)
