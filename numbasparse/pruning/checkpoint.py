"""Checkpoints: nested Python values with tensors as one safetensors file, without pickle.

Tensors are the file's tensors; the rest is JSON in its metadata, exact for floats, with the difference between lists
and tuples and keys of any plain type kept.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from numbasparse.files import write_whole

_KEY = "numbasparse.checkpoint"
_VERSION = 1
_PLAIN = (bool, int, float, str, type(None))


def to_bytes(tree: Any) -> bytes:
    """Return a tree of dicts, lists, tuples, tensors and plain values as the bytes of a safetensors file.

    Raises
    ------
    TypeError
        If the tree holds anything else.
    """
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    packed = _pack(tree, tensors, "")
    return save(tensors, {_KEY: json.dumps({"version": _VERSION, "tree": packed})})


def from_bytes(blob: bytes, where: str = "the checkpoint") -> Any:
    """Return the tree that `to_bytes` packed, its tensors on the CPU.

    Raises
    ------
    ValueError
        If these are not the bytes of a whole checkpoint.
    """
    from safetensors.torch import load

    try:
        tensors = load(blob)
        length = int.from_bytes(blob[:8], "little")
        head = json.loads(json.loads(blob[8 : 8 + length])["__metadata__"][_KEY])
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{where} is not a checkpoint of this package, or is damaged: {error}") from None
    if head["version"] != _VERSION:
        raise ValueError(f"{where} has version {head['version']}, but this package reads version {_VERSION}")
    return _unpack(head["tree"], tensors)


def save_checkpoint(path: str | os.PathLike[str], tree: Any) -> None:
    """Write a tree; on any failure the file that was there is left.

    Raises
    ------
    OSError
        If it cannot be written.
    TypeError
        As `to_bytes`.
    """
    write_whole(path, to_bytes(tree))


def load_checkpoint(path: str | os.PathLike[str]) -> Any:
    """Read what `save_checkpoint` wrote.

    Raises
    ------
    OSError, ValueError
        If it cannot be read or is not a checkpoint.
    """
    return from_bytes(Path(path).read_bytes(), str(path))


def _pack(value: Any, tensors: dict[str, Tensor], where: str) -> Any:
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Tensor):
        key = str(len(tensors))
        # A copy: the format refuses tensors that share memory or are strided.
        tensors[key] = value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        return {"tensor": key, "channels_last": _is_channels_last(value)}
    if isinstance(value, dict):
        return {"dict": [[_plain_key(k, where), _pack(v, tensors, f"{where}.{k}")] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_pack(v, tensors, f"{where}[{i}]") for i, v in enumerate(value)]}
    raise TypeError(
        f"a checkpoint holds tensors, plain values, dicts, lists and tuples, but {where.lstrip('.')!r} is a "
        f"{type(value).__name__}"
    )


def _plain_key(key: Any, where: str) -> Any:
    if not isinstance(key, _PLAIN):
        raise TypeError(f"keys in a checkpoint must be plain values, got {type(key).__name__} in {where.lstrip('.')!r}")
    return key


def _is_channels_last(value: Tensor) -> bool:
    return value.ndim == 4 and value.is_contiguous(memory_format=torch.channels_last) and not value.is_contiguous()


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        tensor = tensors[value["tensor"]]
        return tensor.contiguous(memory_format=torch.channels_last) if value["channels_last"] else tensor
    if "dict" in value:
        return {k: _unpack(v, tensors) for k, v in value["dict"]}
    if "tuple" in value:
        return tuple(_unpack(v, tensors) for v in value["tuple"])
    return [_unpack(v, tensors) for v in value["list"]]
