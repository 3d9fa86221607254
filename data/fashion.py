"""The quickstart's model and images: a small ResNet on Fashion-MNIST, dense and pruned to 90 %.

``make_fashion.py`` beside this file makes the files read here. Fashion-MNIST: Xiao, Rasul and Vollgraf, 2017,
arXiv 1708.07747 (MIT license).
"""

from __future__ import annotations

import gzip
import math
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save as to_bytes
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
FILES = {"dense": "fashion_dense.safetensors", "pruned": "fashion_pruned.safetensors"}
IMAGES_FILE = "fashion_test2000.safetensors"
CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")

MEAN, STD = 0.2860, 0.3530
"""Of the 60,000 training images, pixels in [0, 1]."""

Array = npt.NDArray[Any]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut (He et al. 2015, arXiv 1512.03385).

    Plain modules only, so that torch.fx can trace it and every layer can be found and replaced by name.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu2(y + self.shortcut(x))


class FashionResNet(nn.Module):
    """ResNet for 1x28x28 images: 15 convolutions, 0.70 million parameters.

    Input float32 (N, 1, 28, 28) from ``normalize``; output logits float32 (N, 10). A stem of 32 channels, then
    stages of two blocks with 32 channels at 28x28, 64 at 14x14 and 128 at 7x7.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.stage1 = nn.Sequential(BasicBlock(32, 32, 1), BasicBlock(32, 32, 1))
        self.stage2 = nn.Sequential(BasicBlock(32, 64, 2), BasicBlock(64, 64, 1))
        self.stage3 = nn.Sequential(BasicBlock(64, 128, 2), BasicBlock(128, 128, 1))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten(1)
        self.linear = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage3(self.stage2(self.stage1(self.stem(x))))
        return self.linear(self.flatten(self.pool(x)))


def fashion_resnet() -> FashionResNet:
    """Return an untrained model in eval mode (``torch.manual_seed`` decides its weights)."""
    model = FashionResNet()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model.eval()


def load_model(name: str, folder: str | os.PathLike[str] = HERE) -> FashionResNet:
    """Load the trained model.

    Parameters
    ----------
    name : {"dense", "pruned"}
        Which of the two.
    folder : path, optional
        Where the files are; beside this module if not given.

    Returns
    -------
    FashionResNet
        In eval mode, on the CPU.

    Raises
    ------
    ValueError
        If the name is not known, or the file is damaged or of another model.
    FileNotFoundError
        If the file is missing.
    """
    if name not in FILES:
        raise ValueError(f"model name must be one of {', '.join(map(repr, FILES))}, got {name!r}")
    path = Path(folder) / FILES[name]
    state = {key: torch.from_numpy(np.array(value)) for key, value in unpack_state(_read(path), path).items()}
    model = FashionResNet()
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path} does not hold the weights of a FashionResNet: {error}") from error
    return model.eval()


def load_images(folder: str | os.PathLike[str] = HERE) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Load the first 2,000 test images.

    Returns
    -------
    images : ndarray
        uint8 (2000, 28, 28), 0 is background.
    labels : ndarray
        int64 (2000,), indices into ``CLASSES``.

    Raises
    ------
    FileNotFoundError
        If the file is missing.
    ValueError
        If it is damaged or holds something else.
    """
    path = Path(folder) / IMAGES_FILE
    arrays = _read(path)
    if set(arrays) != {"images", "labels"}:
        raise ValueError(f"{path} must hold 'images' and 'labels', got {sorted(arrays)}")
    images, labels = arrays["images"], arrays["labels"]
    check_set(images, labels, str(path))
    return images, labels.astype(np.int64)


def normalize(images: Array) -> npt.NDArray[np.float32]:
    """Turn images into the model's input.

    Parameters
    ----------
    images : ndarray
        uint8 (N, 28, 28).

    Returns
    -------
    ndarray
        float32 (N, 1, 28, 28), mean 0 and standard deviation 1 over the training set.

    Raises
    ------
    ValueError
        If dtype or shape are wrong.
    """
    if images.dtype != np.uint8 or images.ndim != 3 or images.shape[1:] != (28, 28):
        raise ValueError(f"images must be uint8 of shape (N, 28, 28), got {images.dtype} of shape {images.shape}")
    scaled = images[:, None].astype(np.float32)
    scaled *= np.float32(1.0 / (255.0 * STD))
    scaled -= np.float32(MEAN / STD)
    return scaled


def check_set(images: Array, labels: Array, where: str) -> None:
    """Raise ``ValueError`` unless images and labels are a Fashion-MNIST set."""
    if images.dtype != np.uint8 or images.ndim != 3 or images.shape[1:] != (28, 28):
        raise ValueError(f"{where}: images must be uint8 (N, 28, 28), got {images.dtype} {images.shape}")
    if labels.dtype != np.uint8 or labels.shape != images.shape[:1]:
        raise ValueError(f"{where}: labels must be uint8 ({len(images)},), got {labels.dtype} {labels.shape}")
    if labels.size and labels.max() >= len(CLASSES):
        raise ValueError(f"{where}: labels must be less than {len(CLASSES)}, got {labels.max()}")


def read_idx(path: str | os.PathLike[str]) -> npt.NDArray[np.uint8]:
    """Read a gzipped idx file of bytes, the format of MNIST and its relatives.

    Layout: two zero bytes, the type (8: uint8), the number of dimensions d, then d big-endian uint32 sizes,
    then the values in C order.

    Parameters
    ----------
    path : path
        A ``.gz`` file.

    Returns
    -------
    ndarray
        uint8, of the shape in the file's header.

    Raises
    ------
    FileNotFoundError
        If the file is missing.
    ValueError
        If it is not gzip, not idx of uint8, or shorter or longer than its header says.
    """
    path = Path(path)
    try:
        with gzip.open(path) as file:
            raw = file.read()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: give the folder with the four Fashion-MNIST files") from None
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file ({error}): get it again") from error
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08" or len(raw) < 4 + 4 * raw[3]:
        raise ValueError(f"{path} is not an idx file of uint8: expected magic 000008, got {raw[:4].hex()}")
    start = 4 + 4 * raw[3]
    shape = tuple(int(size) for size in np.frombuffer(raw[4:start], dtype=">u4"))
    if len(raw) - start != math.prod(shape):
        raise ValueError(
            f"{path} must hold {math.prod(shape)} bytes for shape {shape}, got {len(raw) - start}: get it again"
        )
    return np.frombuffer(raw, dtype=np.uint8, offset=start).reshape(shape).copy()


def pack_state(state: Mapping[str, Tensor]) -> dict[str, Array]:
    """Turn a ``state_dict`` into arrays for a file, sparse where that is smaller.

    A tensor ``key`` with few non-zeros becomes ``key.values`` (its dtype), ``key.indices`` (int32, ascending
    positions in the flat tensor) and ``key.shape`` (int64); ``unpack_state`` gives back every bit, apart from
    the sign of a zero.
    """
    arrays: dict[str, Array] = {}
    for key, tensor in state.items():
        dense = np.ascontiguousarray(tensor.detach().cpu().numpy()) if tensor.ndim else tensor.cpu().numpy()
        (indices,) = np.nonzero(dense.ravel())
        if len(indices) * (4 + dense.itemsize) + 8 * dense.ndim < dense.nbytes and dense.ndim > 1:
            arrays[f"{key}.values"] = dense.ravel()[indices]
            arrays[f"{key}.indices"] = indices.astype(np.int32)
            arrays[f"{key}.shape"] = np.array(dense.shape, dtype=np.int64)
        else:
            arrays[key] = dense
    return arrays


def unpack_state(arrays: Mapping[str, Array], path: Path) -> dict[str, Array]:
    """Undo ``pack_state``; ``path`` is named in errors."""
    state: dict[str, Array] = {}
    for key, array in arrays.items():
        base, _, part = key.rpartition(".")
        if part == "values":
            state[base] = _unpack(array, arrays.get(f"{base}.indices"), arrays.get(f"{base}.shape"), f"{path}: {base}")
        elif part not in ("indices", "shape"):
            state[key] = array
    return state


def _unpack(values: Array, indices: Array | None, shape: Array | None, where: str) -> Array:
    if indices is None or shape is None:
        raise ValueError(f"{where} has values but no indices or shape: the file is damaged")
    size = math.prod(int(n) for n in shape)
    ascending = indices.ndim == 1 and bool(np.all(indices[1:] > indices[:-1]))
    if not ascending or indices.shape != values.shape or (indices.size and not 0 <= indices[0] <= indices[-1] < size):
        raise ValueError(
            f"{where} must have one ascending index below {size} per value, got {indices.shape} indices for "
            f"{values.shape} values: the file is damaged"
        )
    dense = np.zeros(size, dtype=values.dtype)
    dense[indices] = values
    return dense.reshape(tuple(int(n) for n in shape))


def write_arrays(arrays: Mapping[str, Array], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file beside its place, then rename it: a reader never sees half a file."""
    beside = path.with_name(path.name + ".part")
    # Not save_file, which makes files that only their owner can read.
    beside.write_bytes(to_bytes(dict(arrays), metadata=dict(metadata or {})))
    os.replace(beside, path)


def _read(path: Path) -> dict[str, Array]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: make it with `python data/make_fashion.py`")
    try:
        return load_arrays(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}): make or get it again") from error
