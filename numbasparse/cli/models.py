"""Models by name: factories, exported programs, their weights, and their times."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from numbasparse.files import write_whole
from numbasparse.nn.exported import module_of


def load_object(name: str) -> Any:
    """The object that ``"module:name"`` or ``"file.py:name"`` names.

    Raises
    ------
    ValueError
        If the text is not of that form, or the module has no such name.
    """
    source, _, attribute = name.rpartition(":")
    if not source or not attribute.isidentifier():
        raise ValueError(f"expected 'module:name' or 'file.py:name', got {name!r}")
    module = _module_from_file(Path(source)) if source.endswith(".py") else _module_by_name(source)
    if not hasattr(module, attribute):
        raise ValueError(f"{source} has no {attribute!r}")
    return getattr(module, attribute)


def _module_by_name(name: str) -> Any:
    # As with "python -m": modules beside the caller are found.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return importlib.import_module(name)


def _module_from_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module


def load_model(name: str, weights: Path | None = None, trainable: bool = False) -> nn.Module:
    """A model by its name on the command line, in eval mode unless ``trainable``.

    Raises
    ------
    ValueError, TypeError, OSError
        If there is no such model or the weights do not fit; the text says which and why.
    """
    if name.endswith(".pt2"):
        if not Path(name).is_file():
            raise FileNotFoundError(f"there is no file {name}")
        model: Any = module_of(_load_program(name))
    else:
        factory = load_object(name)
        model = factory() if callable(factory) and not isinstance(factory, nn.Module) else factory
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name} must give a torch.nn.Module, it gave {type(model).__name__}")
    if weights is not None:
        load_state(model, weights)
    return model if trainable else model.eval()


def _load_program(name: str) -> torch.export.ExportedProgram:
    log = logging.getLogger("torch.export")  # prints the traceback of what it then raises
    silent, log.disabled = log.disabled, True
    try:
        return torch.export.load(name)
    except Exception as error:  # torch raises many kinds for a file that is no exported program
        raise ValueError(f"{name} is no exported program of torch: {error}") from error
    finally:
        log.disabled = silent


def load_state(model: nn.Module, path: Path) -> None:
    """Load a safetensors file into a model; the names must be the model's."""
    from safetensors.torch import load_file

    try:
        state = load_file(path)
        model.load_state_dict(state)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}") from None
    except Exception as error:
        raise ValueError(f"{path} does not hold weights of this model: {error}") from error


def save_state(model: nn.Module, path: Path) -> None:
    """Write the state_dict as safetensors, beside and then renamed."""
    from safetensors.torch import save

    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    write_whole(path, save(state))


def check_out(path: Path) -> None:
    """Raise OSError where a file could not be written: before the work, not after it."""
    folder = path.resolve().parent
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder")
    if not folder.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {folder}")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"cannot write {path}: {folder} is not writable")


def check_device(name: str) -> None:
    """Raise ValueError unless torch can use the device here."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without that kind
        raise ValueError(f"device {name!r} cannot be used: {error}") from error


def parse_shape(shape: str) -> list[int]:
    """The sizes in a text like ``"1,3,224,224"``; ValueError if it is no shape."""
    try:
        sizes = [int(part) for part in shape.split(",")]
    except ValueError:
        sizes = []
    if len(sizes) < 2 or min(sizes) < 1:
        raise ValueError(f"expected the input's shape as positive numbers like '1,3,224,224', got {shape!r}")
    return sizes


def example_input(shape: str, model: nn.Module) -> torch.Tensor:
    """A random tensor of a shape written as ``"1,3,224,224"``, on which the model runs.

    Raises
    ------
    ValueError
        If it is no shape, or the model raises at such an input.
    """
    sizes = parse_shape(shape)
    try:
        x = torch.randn(sizes, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            model(x)
    except Exception as error:  # whatever the model's own code raises
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"the model does not run on an input of shape {shape}: {reason}") from error
    return x


def time_models(models: dict[str, Callable[[], Any]], seconds: float, least: int = 3) -> dict[str, float]:
    """Median seconds of each, called in turns for ``seconds`` and ``least`` times, after two calls that are not timed.

    A call ends when what it started on a GPU has ended.
    """
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    times: dict[str, list[float]] = {name: [] for name in models}
    for call in models.values():
        call()
        call()
    wait()
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(next(iter(times.values()))) < least:
        for name, call in models.items():
            begin = time.perf_counter()
            call()
            wait()
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in times.items()}


def dense_rivals(model: nn.Module, x: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """The dense model as torch runs it: NCHW and channels-last."""
    import copy

    last = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x_last = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
    return {"dense, NCHW": lambda: model(x), "dense, channels-last": lambda: last(x_last)}


def convert_model(model: nn.Module, x: torch.Tensor, tuned: Path | None, quantized: Path | None) -> nn.Module:
    """The model converted by a tuned file, or by the stated defaults, with the codes of a file where there is one."""
    import autotune
    from numbasparse.nn import convert
    from numbasparse.weight import load_weights

    weights = None if quantized is None else load_weights(quantized)
    return convert(model, None if tuned is None else autotune.load(tuned), x, quantized=weights)


def captured_or_said(model: nn.Module, x: torch.Tensor) -> Callable[[torch.Tensor], Any] | None:
    """The model captured; None, and a line that says why, if it cannot be."""
    from numbasparse.nn import capture

    try:
        return capture(model, x)
    except (ValueError, RuntimeError) as error:
        print(f"not captured: {error}")
        return None


def bench_model(
    model: nn.Module,
    x: torch.Tensor,
    tuned: Path | None,
    seconds: float,
    threads: int | None,
    quantized: Path | None = None,
) -> None:
    """Print the times of the dense model in both layouts and of the converted one, on the device of both.

    On the CPU of the captured one too; a graph of a GPU would have to be compared with graphs of the dense ones.
    """
    from rich.console import Console
    from rich.table import Table

    if threads is not None:
        torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = True  # dense at its best
    if x.is_cuda:
        torch.cuda.set_device(x.device)
    converted = convert_model(model, x, tuned, quantized)
    dense = dense_rivals(model, x)
    ours: dict[str, Callable[[], Any]] = {"numbasparse": lambda: converted(x)}
    program = None if x.is_cuda else captured_or_said(converted, x)
    if program is not None:
        ours["numbasparse, captured"] = lambda: program(x)
    with torch.inference_mode():
        times = time_models(dense | ours, seconds)
    best = min(times[name] for name in dense)
    table = Table("model", "milliseconds", "best dense / this")
    for name, t in times.items():
        table.add_row(name, f"{t * 1e3:.3f}", f"{best / t:.2f}")
    Console().print(table)
