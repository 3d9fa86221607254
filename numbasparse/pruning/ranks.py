"""Ranks: the few things that data-parallel training needs from a process group; no-ops without one."""

from __future__ import annotations

import os

import torch
from torch import Tensor, distributed, nn

from numbasparse.pruning.layers import MASK


def active() -> bool:
    """Return whether a process group of more than one rank is at work."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def check_started() -> None:
    """Raise ``RuntimeError`` if ``torchrun`` started several processes and no process group was made."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1 and not active():
        raise RuntimeError(
            f"WORLD_SIZE is {size}, but there is no process group: call torch.distributed.init_process_group() first, "
            "or each process would train a model of its own"
        )


def rank() -> int:
    """Return this process's rank, 0 without a group."""
    return distributed.get_rank() if active() else 0


def size() -> int:
    """Return the number of ranks, 1 without a group."""
    return distributed.get_world_size() if active() else 1


def parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """Wrap a model for data-parallel training; its weights become those of rank 0."""
    if not active():
        return model
    # Masks are made equal when they change; in the buffers that are sent with every step they would cost time.
    masks = [name for name, buffer in model.named_buffers() if name.endswith(MASK) and buffer.dtype == torch.bool]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, masks)
    return nn.parallel.DistributedDataParallel(model, [device] if device.type == "cuda" else None)


def broadcast(value: Tensor) -> None:
    """Give every rank the values of rank 0, in place, for any dtype and memory format."""
    if active():
        whole = value.contiguous().view(torch.uint8) if value.dtype == torch.bool else value.contiguous()
        distributed.broadcast(whole, 0)
        value.copy_(whole.view(value.dtype))


def add(value: Tensor) -> Tensor:
    """Return the sum over ranks."""
    if active():
        distributed.all_reduce(value)
    return value


def gather(value: bytes) -> list[bytes]:
    """Return every rank's bytes, in the order of ranks."""
    if not active():
        return [value]
    parts: list[bytes] = [b""] * size()
    distributed.all_gather_object(parts, value)
    return parts


def wait() -> None:
    """Wait for all ranks."""
    if active():
        distributed.barrier()
