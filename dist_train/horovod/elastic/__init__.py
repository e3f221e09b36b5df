"""Training that goes on when ranks die or join: `hvd.elastic.run`, states and the sampler.

    state = hvd.elastic.TorchState(model, optimizer, batch=0, epoch=0)

    @hvd.elastic.run
    def train(state):
        ...
        state.commit()

    train(state)

A rank that dies makes its peers' collectives raise HorovodInternalError. `run` then restores the last commit, forms a
smaller world of the survivors in the same processes (`rendezvous`), broadcasts rank 0's state and calls the function
again. A worker that arrives interrupts the others at their next commit, without a restore.
"""

from dist_train.horovod.elastic.run import run
from dist_train.horovod.elastic.sampler import ElasticSampler
from dist_train.horovod.elastic.state import HostUpdateResult, ObjectState, State
from dist_train.horovod.elastic.torch_state import TorchState

__all__ = ["ElasticSampler", "HostUpdateResult", "ObjectState", "State", "TorchState", "run"]
