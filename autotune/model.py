"""Tuning a torch model: its convolutions and sparse linear layers become problems by running it once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from autotune.space import LayerProblem, dtype_on
from autotune.study import DEFAULT_TRIALS, Storage, tune_layers
from autotune.tuned import TunedModel
from numbasparse.plans import LINEAR_DENSE_ABOVE, parse_device
from numbasparse.spec import ConvSpec, linear_image_shape
from numbasparse.weight import SparseWeight, as_convolution

if TYPE_CHECKING:
    import torch


def tune(
    model: torch.nn.Module,
    example_input: Any,
    *,
    device: str = "cpu",
    trials: int = DEFAULT_TRIALS,
    timeout: float | None = None,
    storage: Storage | None = None,
    threads: int | None = None,
    progress: bool = True,
    worker: tuple[int, int] = (0, 1),
) -> TunedModel:
    """Choose a kernel and a config for every convolution of a model, by measurement.

    The model runs once, in eval mode, to see the shapes; a layer that meets several shapes becomes several
    problems. Linear layers of which at most `numbasparse.plans.LINEAR_DENSE_ABOVE` is not zero are tuned as
    pointwise convolutions. Layers that do not run, other linear layers and convolutions with a padding mode other
    than zeros are left out: they stay dense. The other arguments are those of `tune_layers`.

    Parameters
    ----------
    model : torch.nn.Module
        Not changed.
    example_input : torch.Tensor, or a tuple or list of arguments
        Where the model is, CPU or GPU, whatever device is tuned for; its batch size is the one that is tuned for. On
        a GPU the dtype that reaches a layer is its problem's too: give a half-precision model and input for float16.

    Raises
    ------
    TypeError
        If `model` is no module or `example_input` no tensor or tuple with one.
    ValueError
        If no convolution of the model can be tuned; and as for `tune_layers`.
    """
    problems = problems_of(model, example_input, device=device)
    return tune_layers(
        problems,
        device=device,
        trials=trials,
        timeout=timeout,
        storage=storage,
        threads=threads,
        progress=progress,
        worker=worker,
    )


def problems_of(model: torch.nn.Module, example_input: Any, *, device: str = "cpu") -> list[LayerProblem]:
    """The problems of a model's layers, in the order in which they run; see `tune`."""
    import torch

    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    kind, _ = parse_device(device)
    arguments = _arguments(example_input)
    found = {name: module for name, module in model.named_modules() if _is_tuned(module)}
    if not found:
        raise ValueError("the model has no Conv2d layers (padding_mode 'zeros') and no sparse Linear layers to tune")
    calls: dict[tuple[str, tuple[int, ...], str], None] = {}
    hooks = _hooks(found, lambda name, shape, dtype: calls.setdefault((name, shape, dtype_on(kind, dtype))))
    with hooks, _eval_mode(model), torch.inference_mode():
        model(*arguments)
    if not calls:
        raise ValueError("none of the model's layers to tune ran on the example input")
    weights = {name: _sparse_weight(found[name]) for name in dict.fromkeys(name for name, _, _ in calls)}
    return [_problem(name, found[name], weights[name], shape, dtype) for name, shape, dtype in calls]


def _arguments(example_input: Any) -> tuple[Any, ...]:
    import torch

    arguments = tuple(example_input) if isinstance(example_input, (tuple, list)) else (example_input,)
    if not any(isinstance(argument, torch.Tensor) for argument in arguments):
        raise TypeError(
            "example_input must be a torch tensor (N, C, H, W), or a tuple or list of the model's arguments with at "
            f"least one tensor, got {type(example_input).__name__}"
        )
    return arguments


def _is_tuned(module: Any) -> bool:
    """Conv2d, and modules that have its attributes and a sparse weight; padding by zeros only; sparse Linear."""
    import torch

    if isinstance(module, torch.nn.Linear):
        weight = module.weight.detach()
        return float((weight != 0).float().mean()) <= LINEAR_DENSE_ABOVE
    if isinstance(module, torch.nn.Conv2d):
        return module.padding_mode == "zeros"
    geometry = all(hasattr(module, name) for name in ("stride", "padding", "dilation", "groups"))
    return geometry and _held_sparse_weight(module) is not None


def _held_sparse_weight(module: Any) -> SparseWeight | None:
    """The sparse weight of a `numbasparse.nn.SparseConv2d` or a module like it, else None."""
    matrix = getattr(module, "weight_matrix", None)
    weight = matrix() if callable(matrix) else None
    return weight if isinstance(weight, SparseWeight) else None


def _sparse_weight(module: Any) -> SparseWeight:
    held = _held_sparse_weight(module)
    if held is not None:
        return held
    return SparseWeight.from_dense(as_convolution(module.weight), getattr(module, "groups", 1))


def _takes_vectors(module: Any) -> bool:
    """Whether a layer is a linear one, or the sparse form of one."""
    import torch

    return isinstance(module, torch.nn.Linear) or getattr(module, "takes_vectors", False)


def _problem(name: str, module: Any, weight: SparseWeight, shape: tuple[int, ...], dtype: str) -> LayerProblem:
    if _takes_vectors(module):
        spec = ConvSpec.create(shape, weight.shape, dtype=dtype, name=name)
    else:
        padding = module.padding
        if not isinstance(padding, str) and len(padding) == 4:
            padding = (padding[:2], padding[2:])
        geometry = (module.stride, padding, module.dilation, module.groups, dtype)
        spec = ConvSpec.create(shape, weight.shape, *geometry, name=name)
    bias = getattr(module, "bias", None)
    array = None if bias is None else bias.detach().float().cpu().numpy()
    return LayerProblem(name, spec, weight, array, getattr(module, "activation", None))


@contextmanager
def _hooks(modules: dict[str, Any], note: Callable[[str, tuple[int, ...], str], Any]) -> Iterator[None]:
    """Have the modules tell shape and dtype of their inputs; an image without a batch counts as a batch of one."""

    def watch(name: str) -> Callable[..., None]:
        def hook(module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            x = arguments[0] if arguments else next(iter(keywords.values()))
            shape = tuple(x.shape)
            if _takes_vectors(module):
                shape = linear_image_shape(shape)
            elif len(shape) == 3:
                shape = (1, *shape)
            note(name, shape, str(x.dtype).removeprefix("torch."))

        return hook

    handles = [m.register_forward_pre_hook(watch(name), with_kwargs=True) for name, m in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode; afterwards every module is in the mode that it was in."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
