"""The elastic form of mnist.py: it goes on when ranks die, and with those that join.

    python -m dist_train.horovod.elastic -np 3 --min-np 2 --restarts 1 examples/horovod/mnist_elastic.py

As a Horovod 0.28 program but for the import of hvd. `--die RANK:BATCH` makes a rank kill itself, to see what happens.
"""

import argparse
import os
import signal

import torch
import torch.nn.functional as F
from mnist import Net, draw
from torch import optim
from torch.utils.data import DataLoader

import dist_train.horovod as hvd

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--batch-size", type=int, default=32)
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--samples", type=int, default=1920)
parser.add_argument("--lr", type=float, default=0.01)
parser.add_argument("--commit-every", type=int, default=5, help="batches between commits")
parser.add_argument("--die", help="RANK:BATCH at which the first worker of that rank kills itself, in the first world")
args = parser.parse_args()

hvd.init()
torch.manual_seed(42)
torch.set_num_threads(1)

dataset = draw(args.samples, 1)
sampler = hvd.elastic.ElasticSampler(dataset)
loader = DataLoader(dataset, batch_size=args.batch_size, sampler=sampler)
model = Net()
optimizer = optim.SGD(model.parameters(), lr=args.lr * hvd.size(), momentum=0.5)
optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())


@hvd.elastic.run
def train(state):
    """Trains from where `state` stands; called again when the world has changed."""
    print(f"rank {hvd.rank()} of {hvd.size()}: epoch {state.epoch}, {sampler.processed_num} done", flush=True)
    while state.epoch < args.epochs:
        loss = torch.zeros(())  # where a failure came after the last batch of an epoch
        for batch, (data, target) in enumerate(loader):
            if args.die == f"{hvd.rank()}:{batch}" and state.worlds == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            state.optimizer.zero_grad()
            loss = F.nll_loss(state.model(data), target)
            loss.backward()
            state.optimizer.step()
            state.sampler.record_batch(batch, args.batch_size)
            if (batch + 1) % args.commit_every == 0:
                state.commit()
        mean = hvd.allreduce(loss.detach(), name="loss").item()
        if hvd.rank() == 0:
            print(f"epoch {state.epoch} ranks {hvd.size()} last loss {mean:.4f}", flush=True)
        state.epoch += 1
        state.sampler.set_epoch(state.epoch)
        state.commit()


def on_reset():
    """Fits the learning rate to the new world."""
    state.worlds += 1
    for group in optimizer.param_groups:
        group["lr"] = args.lr * hvd.size()


state = hvd.elastic.TorchState(model, optimizer, sampler=sampler, epoch=0, worlds=0)
state.register_reset_callbacks([on_reset])
train(state)
