"""`DistributedOptimizer`: a torch optimizer whose `step()` uses gradients (or, for Adasum, updates) of all ranks.

The object made is of a new subclass of the wrapped optimizer's class, so `isinstance`, learning-rate schedulers and
`torch.amp.GradScaler` see what they know. It shares the wrapped optimizer's parameter groups, state and step hooks.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from dist_train.horovod.adasum_optimizer import AdasumOptimizer
from dist_train.horovod.compression import Compression, Compressor
from dist_train.horovod.gradient_optimizer import GradientOptimizer
from dist_train.horovod.mpi_ops import Adasum, Average, ProcessSet, global_process_set, size
from dist_train.horovod.wrapped_optimizer import WrappedOptimizer

NamedParameters = Iterable[tuple[str, Tensor]]


def DistributedOptimizer(
    optimizer: torch.optim.Optimizer,
    named_parameters: NamedParameters | None = None,
    compression: type[Compressor] = Compression.none,
    backward_passes_per_step: int = 1,
    op: int = Average,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: int | Sequence[Sequence[Tensor]] | None = None,
    sparse_as_dense: bool = False,
    process_set: ProcessSet = global_process_set,
) -> Any:
    """`optimizer`, with its gradients combined over ranks.

    Args:
        optimizer: what computes the updates.
        named_parameters: `model.named_parameters()`; the names by which ranks match gradients. By default parameters
            are named by their place in the parameter groups.
        compression: what gradients travel as.
        backward_passes_per_step: how many backward passes are added up on this rank before gradients are exchanged.
        op: Average, Sum or Adasum. Adasum combines the ranks' updates instead of their gradients.
        gradient_predivide_factor: f; with Average, gradients are divided by f before the sum and by size/f after.
        num_groups: deprecated name of an integer `groups`.
        groups: gradients to exchange together: a number of groups, or lists of parameters (the rest go alone).
        sparse_as_dense: exchange sparse gradients as dense tensors instead of gathering their entries.
        process_set: the ranks that exchange gradients; on others this is `optimizer` with nothing added.

    Raises:
        ValueError: an argument is out of range, names are not unique, or a parameter has none.
        NotImplementedError: Adasum on a process set that is not the global one.
    """
    if gradient_predivide_factor != 1.0 and op != Average:
        raise ValueError("gradient_predivide_factor not supported with op != Average")
    if num_groups != 0:
        warnings.warn("Parameter `num_groups` has been replaced by `groups`", DeprecationWarning, stacklevel=2)
        groups = num_groups if groups is None else groups
    if backward_passes_per_step <= 0:
        raise ValueError(f"backward_passes_per_step must be > 0, got {backward_passes_per_step}")
    combines_updates = op == Adasum and size() > 1
    if combines_updates and process_set is not global_process_set:
        raise NotImplementedError("Adasum does not support non-global process sets")
    kind: type[WrappedOptimizer] = AdasumOptimizer if combines_updates else GradientOptimizer
    wrapped = type(optimizer)
    made: Any = object.__new__(type(wrapped.__name__, (kind, wrapped), {"__module__": __name__}))
    # A learning-rate scheduler made before may have put a `step` of the wrapped optimizer into its dictionary.
    made.__dict__.update({key: value for key, value in vars(optimizer).items() if key != "step"})
    made._wrapped = optimizer
    made._parameter_names = _names(optimizer, named_parameters)
    made._compression = compression
    made._process_set = process_set
    made._op = op
    made._predivide_factor = gradient_predivide_factor
    made._sparse_as_dense = sparse_as_dense
    made.backward_passes_per_step = backward_passes_per_step
    made.attach(groups)
    return made


def _names(optimizer: torch.optim.Optimizer, named: NamedParameters | None) -> dict[Tensor, str]:
    """The name of each parameter. Raises ValueError where names are not unique or missing."""
    if named is None:
        return {
            parameter: f"allreduce.noname.{i}.{j}"
            for i, group in enumerate(optimizer.param_groups)
            for j, parameter in enumerate(group["params"])
        }
    pairs = list(named)
    if any(not isinstance(pair, tuple) for pair in pairs):
        raise ValueError("named_parameters should be a sequence of tuples (name, parameter): model.named_parameters()")
    names = [name for name, _ in pairs]
    repeated = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if repeated:
        raise ValueError(f"Parameter names in named_parameters must be unique. Found duplicates: {', '.join(repeated)}")
    known = {parameter: name for name, parameter in pairs}
    for i, group in enumerate(optimizer.param_groups):
        for j, parameter in enumerate(group["params"]):
            if parameter not in known:
                raise ValueError(
                    "named_parameters was specified, but one or more model parameters were not named: parameter "
                    f"{j} of parameter group {i}, shape {tuple(parameter.shape)}"
                )
    return known
