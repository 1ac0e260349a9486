"""One run on many processes of accelerate: which rows each has, and one model that all hold or each holds a part of.

Process p of P has the rows p, p + P, ... of the global batch, so the data of a step do not depend on P. Gradients are
averaged by DistributedDataParallel; or, if `accelerate launch` was told to use FSDP, weights, gradients and moments are
cut along their first axis and each process keeps one part, by torch's fully_shard, layer by layer.
"""

import os
from collections.abc import Callable
from typing import cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from statemix.model import TokenModel

FSDP_VARIABLE = "ACCELERATE_USE_FSDP"  # set to "true" by `accelerate launch --use_fsdp`

Optimizer = torch.optim.Optimizer


def make_accelerator(mixed_precision: str) -> Accelerator:
    """Accelerate for this process, on a GPU if there is one. Raises ValueError if it cannot have this precision."""
    gpu = torch.cuda.is_available()
    if mixed_precision == "fp16" and not gpu:
        raise ValueError("train: `mixed_precision` must be 'no' or 'bf16' without a GPU, got 'fp16'.")
    if mixed_precision == "fp16" and _wants_fsdp():
        raise ValueError("train: `mixed_precision` must be 'no' or 'bf16' under FSDP, got 'fp16'.")
    AcceleratorState._reset_state()  # or the precision of an earlier run of this process would stay
    # accelerate has FSDP on GPUs alone, so `prepare` below applies it, and is not to meet one applied already
    wanted = os.environ.pop(FSDP_VARIABLE, None)
    try:
        return Accelerator(mixed_precision=mixed_precision, cpu=not gpu)
    finally:
        if wanted is not None:
            os.environ[FSDP_VARIABLE] = wanted


def prepare(
    accelerator: Accelerator, model: TokenModel, make_optimizer: Callable[[TokenModel], Optimizer]
) -> tuple[torch.nn.Module, Optimizer]:
    """The model as all processes train it, and the optimizer of its parameters."""
    if not _wants_fsdp() or accelerator.num_processes == 1:
        wrapped, optimizer = accelerator.prepare(model, make_optimizer(model))
        return wrapped, optimizer
    if any(group["orthogonal"] for group in make_optimizer(model).param_groups):
        raise ValueError("train: `optimizer.muon_lr` must be None under FSDP: Muon needs whole matrices.")
    model.to(accelerator.device)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    wrapped = accelerator.prepare_model(model, evaluation_mode=True)  # for its autocast: it is not to wrap it in DDP
    return wrapped, accelerator.prepare_optimizer(make_optimizer(model))


def whole_model(accelerator: Accelerator, wrapped: torch.nn.Module) -> TokenModel:
    """The model with all its weights, to be saved; every process must call it, but only the main one has them."""
    model = cast(TokenModel, accelerator.unwrap_model(wrapped))
    if not isinstance(model, FSDPModule):
        return model
    weights = {name: whole(weight) for name, weight in model.state_dict().items()}
    kind = next(kind for kind in type(model).mro() if not issubclass(kind, FSDPModule))  # FSDP made a class of it
    with torch.device("meta"):
        copy = cast(TokenModel, kind(**model.config))
    if accelerator.is_main_process:
        copy.load_state_dict(weights, assign=True)
    return copy


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which each process has a part, put together; every process must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_like(tensor: Tensor, other: Tensor) -> Tensor:
    """The part of a tensor that this process has of another one of its shape; all of it unless that is cut."""
    if not isinstance(other, DTensor):
        return tensor
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements, src_data_rank=None)


def own_rows(accelerator: Accelerator, rows: Tensor) -> Tensor:
    """This process's rows of a global batch, on its device."""
    return rows[accelerator.process_index :: accelerator.num_processes].to(accelerator.device)


def all_rows(accelerator: Accelerator, rows: Tensor) -> Tensor:
    """The rows of all processes in the order of the global batch; every process must call it."""
    processes = accelerator.num_processes
    if processes == 1:
        return rows
    gathered: Tensor = accelerator.gather(rows.contiguous())  # process by process
    return gathered.unflatten(0, (processes, -1)).transpose(0, 1).flatten(0, 1)


def _wants_fsdp() -> bool:
    return os.environ.get(FSDP_VARIABLE, "false").lower() == "true"
