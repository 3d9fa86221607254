"""Saving a converted model, and running a saved one on arrays and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from numbasparse.cli.models import (
    captured_or_said,
    check_out,
    convert_model,
    example_input,
    load_model,
    parse_shape,
    time_models,
)
from numbasparse.files import write_whole
from numbasparse.nn import SparseConv2d, conversion_report, load, save
from numbasparse.nn.saved import choose_kernels

_PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
_SHOWN = 5


def convert_file(
    model: str, out: Path, shape: str, tuned: Path | None, weights: Path | None, quantized: Path | None
) -> None:
    """Convert a model and write it into one file."""
    check_out(out)
    module = load_model(model, weights)
    converted = convert_model(module, example_input(shape, module), tuned, quantized)
    save(converted, out)
    print_layers(converted)
    print(f"wrote {out}: {out.stat().st_size / 1e6:.2f} MB")


def run_file(
    model: Path, given: str, tuned: Path | None, output: Path | None, repeat: int, threads: int | None
) -> None:
    """Run a saved model; print its layers, what came out, and the median time."""
    import autotune

    if output is not None:
        check_out(output)
    if threads is not None:
        torch.set_num_threads(threads)
    choices = None if tuned is None else autotune.load(tuned)
    loaded = load(model)
    x = read_input(given, gray=_channels(loaded) == 1)
    with torch.inference_mode():
        try:
            y = loaded(x)
        except Exception as error:  # whatever torch's operators raise for a wrong shape
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"the model does not run on the input {tuple(x.shape)}: {first}") from error
        if choices is not None:
            choose_kernels(loaded, choices, x)
            y = loaded(x)
        program = captured_or_said(loaded, x)
        run, how = (loaded, "") if program is None else (program, " of the captured model")
        seconds = time_models({"": lambda: run(x)}, 0.0, least=repeat)[""]
    print_layers(loaded)
    outputs = [t for t in torch.utils._pytree.tree_leaves(y) if isinstance(t, Tensor)]
    for number, tensor in enumerate(outputs):
        print(describe(tensor, number, len(outputs)))
    print(f"median of {repeat} calls{how}: {1e3 * seconds:.3f} milliseconds, {torch.get_num_threads()} threads")
    if output is not None:
        write_output(output, outputs)


def _channels(model: nn.Module) -> int | None:
    """Channels that the first convolution of a model takes; None without one."""
    convolutions = (m for m in model.modules() if isinstance(m, (nn.Conv2d, SparseConv2d)))
    first = next(convolutions, None)
    return None if first is None else first.in_channels


def print_layers(model: nn.Module) -> None:
    """A table of what became of each convolution and linear layer, and why."""
    from rich.console import Console
    from rich.table import Table

    table = Table("layer", "runs", "zeros", "why")
    for record in conversion_report(model):
        zeros = "" if np.isnan(record.sparsity) else f"{record.sparsity:.1%}"
        table.add_row(record.name, record.decision, zeros, record.reason)
    Console().print(table)


def describe(tensor: Tensor, number: int, count: int) -> str:
    """Shape of an output, and for a few scores an image the indices of the largest."""
    name = "output" if count == 1 else f"output {number}"
    text = f"{name}: {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
    if tensor.dim() != 2 or not tensor.shape[1] > 1 or not len(tensor):
        return text
    best = tensor[:_SHOWN].topk(min(_SHOWN, tensor.shape[1])).indices.tolist()
    rows = [f"  image {i}: largest at {', '.join(map(str, row))}" for i, row in enumerate(best)]
    return "\n".join([text, *rows, *(["  ..."] if len(tensor) > _SHOWN else [])])


def write_output(path: Path, outputs: list[Tensor]) -> None:
    """Write one output as .npy, or several as .npz (``output_0`` and on)."""
    import io

    buffer = io.BytesIO()
    arrays = [t.float().cpu().numpy() if t.dtype == torch.bfloat16 else t.cpu().numpy() for t in outputs]
    if len(arrays) == 1:
        np.save(buffer, arrays[0])
    else:
        named: dict[str, Any] = {f"output_{i}": array for i, array in enumerate(arrays)}
        np.savez(buffer, **named)
    write_whole(path, buffer.getvalue())
    print(f"wrote {path}")


# ---- inputs -------------------------------------------------------------------------------------------------


def read_input(given: str, gray: bool = False) -> Tensor:
    """An array (.npy), a picture, a folder of pictures of one size, or random numbers of a shape, float32.

    Pictures are RGB, or of one channel if ``gray``, with values of 0 to 1.

    Raises
    ------
    ValueError, OSError
        If it is nothing of the kind; the text says what was expected.
    """
    path = Path(given)
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in _PICTURES)
        if not files:
            raise ValueError(f"there are no pictures ({', '.join(_PICTURES)}) in {path}")
        return _stacked(files, gray)
    if path.suffix.lower() in _PICTURES:
        return _stacked([path], gray)
    if path.suffix == ".npy":
        return _array(path)
    try:
        sizes = parse_shape(given)
    except ValueError:
        kinds = (
            f"an array (.npy), a picture ({', '.join(_PICTURES)}), a folder of pictures, or a shape like 1,3,224,224"
        )
        raise ValueError(f"expected the input as {kinds}, got {given!r}") from None
    return torch.rand(sizes, generator=torch.Generator().manual_seed(0))


def _array(path: Path) -> Tensor:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is no array of NumPy: {error}") from error
    if array.dtype.kind not in "fiu" or array.ndim == 0:
        raise ValueError(f"expected an array of numbers in {path}, got {array.dtype} of shape {array.shape}")
    return torch.from_numpy(np.ascontiguousarray(array, np.float32))


def _stacked(files: list[Path], gray: bool) -> Tensor:
    """Pictures as one float32 tensor (N, 3, H, W), or (N, 1, H, W), of 0 to 1."""
    from PIL import Image, UnidentifiedImageError

    pictures = []
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"there is no file {file}")
        try:
            with Image.open(file) as image:
                pixels = np.asarray(image.convert("L" if gray else "RGB"), np.float32) / 255
        except UnidentifiedImageError as error:
            raise ValueError(f"{file} is no picture that Pillow reads") from error
        pictures.append(pixels.reshape(*pixels.shape[:2], -1))  # gray ones come without a dimension for channels
        if pictures[-1].shape != pictures[0].shape:
            raise ValueError(
                f"pictures of one call must have one size: {files[0].name} is {pictures[0].shape[:2]}, "
                f"{file.name} {pictures[-1].shape[:2]} (height, width)"
            )
    return torch.from_numpy(np.stack(pictures).transpose(0, 3, 1, 2).copy())
