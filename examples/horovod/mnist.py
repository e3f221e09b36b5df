"""A Horovod program as it was written for `horovod.torch` 0.28; the import of hvd is the only line that was changed.

    mpirun -np 2 python examples/horovod/mnist.py
    torchrun --nproc-per-node 2 examples/horovod/mnist.py
    srun --ntasks 2 python examples/horovod/mnist.py

It learns ten classes of 28x28 pictures that it draws itself (a bright square at one of ten places, in noise).
"""

import argparse

import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import dist_train.horovod as hvd

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--batch-size", type=int, default=32)
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--samples", type=int, default=1920)
parser.add_argument("--lr", type=float, default=0.01)
parser.add_argument("--momentum", type=float, default=0.5)
parser.add_argument("--seed", type=int, default=42)
parser.add_argument("--no-cuda", action="store_true")
parser.add_argument("--fp16-allreduce", action="store_true")
parser.add_argument("--use-adasum", action="store_true")
parser.add_argument("--gradient-predivide-factor", type=float, default=1.0)


class Net(nn.Module):
    """Two convolutions and two linear layers: pictures `[B, 1, 28, 28]` to log-probabilities `[B, 10]`."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, kernel_size=5)
        self.conv2 = nn.Conv2d(8, 16, kernel_size=5)
        self.fc1 = nn.Linear(256, 50)
        self.fc2 = nn.Linear(50, 10)

    def forward(self, x):
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        x = F.relu(self.fc1(x.flatten(1)))
        return F.log_softmax(self.fc2(x), dim=1)


def draw(count, seed):
    """A set of `count` pictures with their labels, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (count,), generator=generator)
    pictures = torch.randn(count, 1, 28, 28, generator=generator) * 0.3
    for picture, label in zip(pictures, labels.tolist(), strict=True):
        row, column = divmod(label, 4)
        picture[0, row * 8 : row * 8 + 6, column * 7 : column * 7 + 6] += 1
    return TensorDataset(pictures, labels)


def metric_average(value, name):
    """The mean of a number over the ranks."""
    return hvd.allreduce(torch.tensor(value), name=name).item()


def main():
    """Trains, and prints loss and accuracy after each epoch."""
    args = parser.parse_args()
    cuda = not args.no_cuda and torch.cuda.is_available()
    hvd.init()
    torch.manual_seed(args.seed)
    if cuda:
        torch.cuda.set_device(hvd.local_rank())
    torch.set_num_threads(1)

    train_dataset, test_dataset = draw(args.samples, 1), draw(args.samples // 4, 2)
    train_sampler = DistributedSampler(train_dataset, num_replicas=hvd.size(), rank=hvd.rank())
    train_loader = DataLoader(train_dataset, batch_size=args.batch_size, sampler=train_sampler)
    test_sampler = DistributedSampler(test_dataset, num_replicas=hvd.size(), rank=hvd.rank())
    test_loader = DataLoader(test_dataset, batch_size=args.batch_size, sampler=test_sampler)

    model = Net()
    lr_scaler = hvd.size() if not args.use_adasum else 1
    if cuda:
        model.cuda()
        if args.use_adasum and hvd.nccl_built():
            lr_scaler = hvd.local_size()
    optimizer = optim.SGD(model.parameters(), lr=args.lr * lr_scaler, momentum=args.momentum)

    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)

    compression = hvd.Compression.fp16 if args.fp16_allreduce else hvd.Compression.none
    optimizer = hvd.DistributedOptimizer(
        optimizer,
        named_parameters=model.named_parameters(),
        compression=compression,
        op=hvd.Adasum if args.use_adasum else hvd.Average,
        gradient_predivide_factor=args.gradient_predivide_factor,
    )

    for epoch in range(1, args.epochs + 1):
        model.train()
        train_sampler.set_epoch(epoch)
        for data, target in train_loader:
            if cuda:
                data, target = data.cuda(), target.cuda()
            optimizer.zero_grad()
            F.nll_loss(model(data), target).backward()
            optimizer.step()

        model.eval()
        loss, right = 0.0, 0.0
        with torch.no_grad():
            for data, target in test_loader:
                if cuda:
                    data, target = data.cuda(), target.cuda()
                output = model(data)
                loss += F.nll_loss(output, target, reduction="sum").item()
                right += (output.argmax(1) == target).sum().item()
        loss = metric_average(loss / len(test_sampler), "avg_loss")
        accuracy = metric_average(right / len(test_sampler), "avg_accuracy")
        if hvd.rank() == 0:
            print(f"epoch {epoch} ranks {hvd.size()} loss {loss:.4f} accuracy {100 * accuracy:.2f}%", flush=True)


if __name__ == "__main__":
    main()
