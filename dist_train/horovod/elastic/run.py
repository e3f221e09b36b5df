"""`hvd.elastic.run`: calls a training function again each time the set of ranks has changed."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from dist_train.horovod.basics import init, leave_world, local_size, owns_world, shutdown, size
from dist_train.horovod.elastic import rendezvous
from dist_train.horovod.elastic.state import State
from dist_train.horovod.exceptions import HorovodInternalError, HostsUpdatedInterrupt
from dist_train.horovod.functions import allgather_object

logger = logging.getLogger(__name__)

ATTEMPTS = 5


def run(func: Callable[..., Any]) -> Callable[..., Any]:
    """Makes `func(state, ...)` go on when ranks die or join. Use as a decorator.

    The state is synchronised, then `func` is called; what it returns is returned. On HorovodInternalError the state is
    restored, on HostsUpdatedInterrupt it is kept; then a new world forms and all starts over. Other errors pass.

    No collective may come before it: a worker that joins later would be alone with it.

    Raises:
        NoWorldError: no world of at least HOROVOD_ELASTIC_MIN_NP ranks formed in HOROVOD_ELASTIC_TIMEOUT seconds.
    """

    @functools.wraps(func)
    def wrapper(state: State, *args: Any, **kwargs: Any) -> Any:
        if owns_world():
            rendezvous.open_door(local_size() == size(), lambda me: allgather_object(me, name="elastic.doors"))
        try:
            return _run(func, state, args, kwargs)
        finally:
            rendezvous.close_door()  # nobody need wait for this process any more

    return wrapper


def _run(func: Callable[..., Any], state: State, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    needs_sync = True
    while True:
        try:
            if needs_sync:
                state.sync()
            return func(state, *args, **kwargs)
        except HorovodInternalError as error:
            logger.warning("a collective failed, going back to the last commit: %s", error)
            state.restore()
            needs_sync = True
        except HostsUpdatedInterrupt as interrupt:
            needs_sync = not interrupt.skip_sync
        _form_new_world()
        state.on_reset()


def _form_new_world() -> None:
    """Ends this world and starts the next one; once more where a rank dies meanwhile.

    Where the program made the default process group itself, there is no other: Horovod starts anew on that one.
    """
    if not owns_world():
        shutdown()
        init()
        return
    for attempts_left in reversed(range(ATTEMPTS)):
        leave_world()
        if dist.is_initialized():  # left in place, for an exchange still waits on it: it will end by its time-out
            dist.destroy_process_group()
        try:
            init()
            return
        except rendezvous.NoWorldError:
            raise
        except RuntimeError as error:
            if not attempts_left:
                raise
            logger.warning("the new world broke while it formed, trying again: %s", error)
