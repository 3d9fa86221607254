"""An imported model as an exported program, which the other commands take."""

from __future__ import annotations

import io
from typing import Any

import torch

from numbasparse.onnx_io.importer import Imported
from numbasparse.onnx_io.quiet import quiet

LEAST_OPEN_SIZE = 8
"""Height and width stay open from here up: torch.export wants every open size to fit the kernels."""

_OPEN_BATCH = 2  # torch.export takes sizes of 0 and 1 for fixed


def example_of(imported: Imported, batch: int) -> torch.Tensor:
    """A random input of a batch.

    Raises
    ------
    ValueError
        If the file leaves a size other than the batch open.
    """
    sizes = imported.input_shape[1:]
    if any(size is None for size in sizes):
        shape = ",".join("?" if size is None else str(size) for size in imported.input_shape)
        raise ValueError(f"the file leaves sizes of its input ({shape}) open: give them, as in --input 1,3,224,224")
    dtype = next((p.dtype for p in imported.module.parameters()), torch.float32)
    return torch.randn((batch, *sizes), generator=torch.Generator().manual_seed(0)).to(dtype)  # type: ignore[arg-type]


def export_program(imported: Imported) -> tuple[bytes, tuple[int, ...]]:
    """Export an imported model.

    Returns
    -------
    program
        The content of a ``.pt2`` file.
    open_axes
        Axes of the input whose sizes it leaves open: those that the file leaves open if torch.export can, or else the
        batch alone, or else none; then the batch is the one that the file declares (1 if it declares none).

    Raises
    ------
    ValueError
        If the model runs on none of these batches, or a size of the input is open and was not given.
    """
    batch = imported.input_shape[0] or 1
    for axes in ((0, *imported.open_axes), (0,)):
        try:
            return _bytes(_export(imported, _OPEN_BATCH, axes)), axes
        except ValueError:  # something in the model needs a certain size
            continue
    return _bytes(_export(imported, batch, ())), ()


def _bytes(program: torch.export.ExportedProgram) -> bytes:
    stream = io.BytesIO()
    torch.export.save(program, stream)
    return stream.getvalue()


def _dim(axis: int, size: int) -> Any:
    return torch.export.Dim(f"size_{axis}", min=min(LEAST_OPEN_SIZE, size) if axis else None)


def _export(imported: Imported, batch: int, open_axes: tuple[int, ...]) -> torch.export.ExportedProgram:
    x = example_of(imported, batch)
    # Named, not AUTO: those would end as conditions in the program, which torch.fx cannot trace afterwards.
    dims: Any = {axis: _dim(axis, x.shape[axis]) for axis in open_axes} or None
    try:
        with torch.no_grad(), quiet("torch.export", "torch._export"):
            imported.module(x)
            return torch.export.export(imported.module, (x,), dynamic_shapes=(dims,) if dims else None)
    except Exception as error:  # torch raises many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"the model does not run on an input of shape {tuple(x.shape)}: {reason}") from error
