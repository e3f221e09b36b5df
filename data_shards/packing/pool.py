"""Writes shards in worker processes, and goes on when a video takes its process down.

Decoders are C: a file can end the process that opens it, or the system can, for its memory. The shard is then written
again; a sample during which that has happened twice is left out, with the reason.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection, wait

from data_shards.packing.records import ShardRecord
from data_shards.packing.worker import ShardJob, write_shard
from data_shards.parallel import num_usable_cpus, start_worker

Tell = Callable[[int, int], None]
"""Called as tell(samples, bytes) for what was done since the last call; negative where it is lost and done again."""

_DEATHS_OF_A_SAMPLE = 2
_DEATHS_OF_A_SHARD = 20  # more than that is the machine, not its videos
_SECONDS_TO_END = 5.0
_LONGEST_WAIT = 60.0  # seconds; the system's own limit is a few weeks


def write_shards(
    jobs: Iterator[ShardJob], *, workers: int, tell: Tell, max_sample_seconds: float = 3600.0
) -> Generator[ShardRecord, None, None]:
    """Write the shards; their records come as they are finished.

    `workers` = 0 takes a process for each usable processor; 1 works in this process, which a video can then take down.
    A process that works on one sample for more than `max_sample_seconds` is ended, and counts as having died.

    Leaving the iterator early, by an error or Ctrl-C, ends the processes at once: shards that they were writing are
    not there.

    Raises:
        OSError: as `write_shard` does.
        RuntimeError: processes keep dying.
    """
    if workers == 1:
        for job in jobs:
            yield write_shard(job, lambda num_bytes: tell(1, num_bytes))
        return
    workers = workers or num_usable_cpus()
    pool: list[_Worker] = []
    try:
        for job in jobs:
            if len(pool) < workers:
                pool.append(_Worker())
                pool[-1].start(job)
                continue
            worker, record = _next_finished(pool, tell, max_sample_seconds)
            worker.start(job)
            yield record
        while any(worker.job is not None for worker in pool):
            yield _next_finished(pool, tell, max_sample_seconds)[1]
    finally:
        for worker in pool:
            worker.end()


def _next_finished(pool: list[_Worker], tell: Tell, max_sample_seconds: float) -> tuple[_Worker, ShardRecord]:
    """Wait until a worker has finished its shard."""
    while True:
        busy = {worker.connection: worker for worker in pool if worker.job is not None}
        first_deadline = min(worker.last_heard for worker in busy.values()) + max_sample_seconds
        heard = wait(list(busy), timeout=min(max(0.0, first_deadline - time.monotonic()), _LONGEST_WAIT))
        for worker in busy.values():
            if not heard and time.monotonic() - worker.last_heard >= max_sample_seconds:
                worker.give_up(max_sample_seconds)
        for connection in heard:
            worker = busy[connection]  # type: ignore[index]
            message = worker.receive()
            if isinstance(message, BaseException):
                raise message
            if isinstance(message, ShardRecord):
                worker.job = None
                return worker, message
            if message is None:
                tell(-worker.samples_done, -worker.bytes_done)
                worker.start_again()
            else:
                worker.samples_done += 1
                worker.bytes_done += message
                tell(1, message)


class _Worker:
    """A process that writes one shard after the other, as its parent sees it."""

    def __init__(self) -> None:
        self.job: ShardJob | None = None
        self.last_heard = time.monotonic()
        self._gave_up = ""
        self.samples_done = self.bytes_done = 0
        self._deaths: Counter[int] = Counter()
        self._launch()

    def _launch(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["data_shards.packing.worker"])  # imported once, not by each process
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def start(self, job: ShardJob) -> None:
        """Give it a shard."""
        self.job, self.samples_done, self.bytes_done, self._deaths = job, 0, 0, Counter()
        self._send()

    def receive(self) -> int | ShardRecord | BaseException | None:
        """The bytes of one more sample, the record of the shard, an error; None where the process has died."""
        self.last_heard = time.monotonic()
        try:
            message: int | ShardRecord | BaseException = self.connection.recv()
        except (EOFError, OSError):  # OSError: within a message; errors of the disk come as messages
            return None
        return message

    def start_again(self) -> None:
        """Write the shard again in a new process, without a sample that has ended two."""
        assert self.job is not None
        self._process.join()
        place, samples = self.samples_done, self.job.shard.samples
        self._deaths[place] += 1
        how = self._gave_up or _how_it_ended(self._process.exitcode or 0)
        self._gave_up = ""
        if self._deaths.total() > _DEATHS_OF_A_SHARD or place >= len(samples):
            at = samples[place].sample.content.where if place < len(samples) else self.job.tar
            raise RuntimeError(
                f"packing processes keep ending ({how}), the last at {at}: too little memory? "
                "run the same command again with fewer --workers, what is finished is kept"
            )
        if self._deaths[place] >= _DEATHS_OF_A_SAMPLE:
            reason = f"ended the process that read it {self._deaths[place]} times ({how})"
            self.job = replace(self.job, crashed={**self.job.crashed, place: reason})
        self.connection.close()
        self._launch()
        self.samples_done = self.bytes_done = 0
        self._send()

    def give_up(self, seconds: float) -> None:
        """End a process that does not answer; `receive` then finds it dead."""
        self._gave_up = f"no end after {seconds:.0f} s"
        self.last_heard = time.monotonic()  # a kill takes as long as a disk that hangs
        self._process.kill()

    def _send(self) -> None:
        self.last_heard = time.monotonic()
        with suppress(BrokenPipeError, ConnectionResetError):  # it has died just now: `receive` finds that out
            self.connection.send(self.job)

    def end(self) -> None:
        """End the process; a shard that it is writing stays unfinished."""
        self._process.terminate()
        self._process.join(_SECONDS_TO_END)
        self.connection.close()
        if self._process.is_alive():
            self._process.kill()  # it waits for a disk; a kill is delivered when that answers
        else:
            self._process.close()


def _how_it_ended(exit_code: int) -> str:
    if exit_code < 0:
        name = signal.Signals(-exit_code).name
        return f"{name}, perhaps for its memory" if name == "SIGKILL" else name
    return f"exit code {exit_code}"


def _work(connection: Connection) -> None:
    """The life of a worker process."""
    start_worker()
    while True:
        job: ShardJob = connection.recv()
        try:
            connection.send(write_shard(job, connection.send))
        except Exception as error:
            error.add_note(traceback.format_exc())
            connection.send(error)
