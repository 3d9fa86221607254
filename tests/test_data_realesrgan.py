"""Real-ESRGAN's small network: its definition, and reading ncnn's files."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data"))

import realesrgan

HALF = struct.pack("<I", realesrgan.NCNN_FLOAT16)
FULL = struct.pack("<I", realesrgan.NCNN_FLOAT32)


def network(*layers: str) -> str:
    return "\n".join(["7767517", f"{len(layers)} {len(layers)}", *layers, ""])


def test_reads_half_and_full_weights() -> None:
    # 1 x 1 x 1 x 3: six bytes of float16, padded to eight.
    first = np.array([0.5, -2.0, 3.0], np.float16)
    second = np.array([[0.25, 1e-3], [7.0, -1.0]], np.float32)
    bias = np.array([0.125], np.float32)
    param = network(
        "Input            in    0 1 data",
        "Convolution      one   1 1 data mid 0=1 1=3 11=1 4=1 5=1 6=3 9=2 -23310=1,2.000000e-01",
        "Convolution      two   1 1 mid out 0=2 1=1 6=4",
    )
    blob = HALF + first.tobytes() + b"\0\0" + bias.tobytes() + FULL + second.tobytes()
    one, two = realesrgan.read_ncnn(param, blob)
    assert (one.name, one.weight.shape, two.name, two.weight.shape) == ("one", (1, 1, 1, 3), "two", (2, 2, 1, 1))
    np.testing.assert_array_equal(one.weight.ravel(), first.astype(np.float32))
    np.testing.assert_array_equal(one.bias, bias)
    np.testing.assert_array_equal(two.weight[:, :, 0, 0], second)
    np.testing.assert_array_equal(two.bias, np.zeros(2))
    assert one.weight.dtype == two.weight.dtype == np.float32


CONV = "Convolution      one   1 1 data mid 0=1 1=1 6=2"


@pytest.mark.parametrize(
    ("param", "blob", "words"),
    [
        ("ncnn", b"", r"must begin with 7767517, got 'ncnn'"),
        (network(CONV), b"", r"'one': .bin ends at byte 0, before the tag at 0"),
        (network(CONV), FULL + b"\0" * 4, r"'one' needs bytes 4 to 12 of .bin, but it has 8"),
        (network(CONV), FULL + b"\0" * 12, r"the 1 convolutions use 12 bytes of .bin, but it has 16"),
        (network(CONV), struct.pack("<I", 0x000D4B38) + b"\0" * 8, r"got ncnn's tag 0x000d4b38"),
        (network(CONV.replace("6=2", "6=3").replace("0=1", "0=2")), b"", r"3 weights, which 2 rows of 1x1"),
    ],
)
def test_bad_files(param: str, blob: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        realesrgan.read_ncnn(param, blob)


def fake_layers() -> list[realesrgan.NcnnConv]:
    convolutions = [m for m in realesrgan.RRDBNet().modules() if isinstance(m, nn.Conv2d)]
    return [
        realesrgan.NcnnConv(f"Conv_{i}", np.full(tuple(m.weight.shape), i, np.float32), np.full(len(m.weight), i, "f4"))
        for i, m in enumerate(convolutions)
    ]


def test_layers_get_their_names() -> None:
    model = realesrgan.RRDBNet()
    model.load_state_dict(realesrgan.state_from_ncnn(fake_layers()))
    assert (model.conv_first.weight == 0).all()
    assert (model.body[0].rdb1.conv5.bias == 5).all()
    assert (model.body[5].rdb3.conv5.weight == 90).all()
    assert (model.conv_last.weight == 95).all()


def test_layers_of_another_network() -> None:
    layers = fake_layers()
    with pytest.raises(ValueError, match="expected the 96 convolutions of RRDBNet, got 95"):
        realesrgan.state_from_ncnn(layers[1:])
    layers[3] = layers[2]
    with pytest.raises(ValueError, match=r"'Conv_2' must be body.0.rdb1.conv3"):
        realesrgan.state_from_ncnn(layers)


def test_enlarges_four_times_and_can_be_traced() -> None:
    torch.manual_seed(0)
    model = realesrgan.RRDBNet().eval()
    x = torch.rand(1, 3, 7, 9)
    with torch.inference_mode():
        y = model(x)
        assert y.shape == (1, 3, 28, 36)
        torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), y)


def test_load_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"python data/fetch_realesrgan.py"):
        realesrgan.load_model(tmp_path)
    state = realesrgan.RRDBNet().state_dict()
    save_file({name: tensor.half() for name, tensor in state.items()}, tmp_path / realesrgan.WEIGHTS_FILE)
    loaded = realesrgan.load_model(tmp_path).state_dict()
    assert all(loaded[name].dtype == torch.float32 for name in state)
    assert all(torch.equal(loaded[name], state[name].half().float()) for name in state)
    save_file({"a": torch.zeros(1)}, tmp_path / realesrgan.WEIGHTS_FILE)
    with pytest.raises(ValueError, match="does not hold the weights of an RRDBNet"):
        realesrgan.load_model(tmp_path)
    (tmp_path / realesrgan.WEIGHTS_FILE).write_bytes(b"no")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        realesrgan.load_model(tmp_path)


def test_load_pictures(tmp_path: Path) -> None:
    path = tmp_path / realesrgan.PICTURES_FILE
    pictures = torch.randint(256, (2, 5, 6, 3), dtype=torch.uint8)
    save_file({"train": pictures, "held_out": pictures[:1].clone()}, path)
    train, held_out = realesrgan.load_pictures(tmp_path)
    assert torch.equal(train, pictures)
    assert torch.equal(held_out, pictures[:1])
    save_file({"train": pictures.float(), "held_out": pictures}, path)
    with pytest.raises(
        ValueError, match=r"must hold 'train' as uint8 \(N, H, W, 3\), got torch.float32 \(2, 5, 6, 3\)"
    ):
        realesrgan.load_pictures(tmp_path)
    save_file({"train": pictures}, path)
    with pytest.raises(ValueError, match=r"must hold 'held_out' as uint8 .*, got nothing"):
        realesrgan.load_pictures(tmp_path)
