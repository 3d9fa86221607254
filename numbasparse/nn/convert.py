"""`convert`: a pruned model with sparse convolutions where they were chosen."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils._pytree import tree_leaves

from numbasparse.kernels import CudaKernel, kernel
from numbasparse.nn import layout_choice
from numbasparse.nn.concatenation import share_concatenations
from numbasparse.nn.enlarging import enlarge_in_kept_memory
from numbasparse.nn.epilogue import Fused, activation_of, calls_of, fuse_epilogues
from numbasparse.nn.fused import FusedConv2d, empty_like, worth_fusing
from numbasparse.nn.linear import SparseLinear
from numbasparse.nn.module import SparseConv2d
from numbasparse.nn.native import Tracer, keep_native
from numbasparse.nn.pooling import SeparableMaxPool2d
from numbasparse.plans import LINEAR_DENSE_ABOVE, Choice, default_choice
from numbasparse.runtime import cpu
from numbasparse.runtime.layouts import Layout, layout_of
from numbasparse.spec import DTYPES, ConvSpec, linear_image_shape
from numbasparse.weight import SparseWeight, as_convolution

REPORT = "_numbasparse_conversion"
"""Attribute of a converted model that holds its records."""

_STAND_IN_SIZE = 32

_LARGE_LINEAR = 1 << 20
"""Weights from which on a linear layer is limited by memory: below, a call costs as much as what it saves."""


@dataclass(frozen=True)
class ConvertedLayer:
    """What became of one convolution or linear layer.

    Attributes
    ----------
    name
        Qualified name in the model.
    decision
        "sparse" or "dense".
    reason
        Why, in words.
    sparsity
        Fraction of zero weights; NaN where the weight was not looked at.
    kernel
        Kernel that was chosen for a sparse layer; None leaves it to the stated default at each input shape.
    batch_norm, activation
        Names of the modules that were folded into the convolution, or None. They are ``nn.Identity`` now, but for an
        activation that several layers share, or that is a function: there the calls are gone.
    residual
        Whether the convolution adds another tensor before its activation.
    scale
        Number by which the convolution's result was multiplied, now a part of its weight and bias; None without.
    """

    name: str
    decision: Literal["sparse", "dense"]
    reason: str
    sparsity: float
    kernel: str | None = None
    batch_norm: str | None = None
    activation: str | None = None
    residual: bool = False
    scale: float | None = None


@dataclass(frozen=True)
class _Chain:
    """Modules, by name, that follow one another and see nothing but each other's output."""

    conv: str
    batch_norm: str | None
    activation: str | None


@dataclass(frozen=True)
class _Decision:
    sparse: bool
    reason: str
    sparsity: float = float("nan")
    choice: Choice | None = None
    gives: Layout | None = None
    measured: layout_choice.Layer | None = None


def convert(
    model: nn.Module,
    tuned: Any = None,
    example_input: Any = None,
    *,
    fuse: bool = True,
    quantized: Mapping[str, SparseWeight] | None = None,
) -> nn.Module:
    """Replace convolutions and linear layers by sparse ones where that was chosen.

    Parameters
    ----------
    model : nn.Module
        On the CPU or a GPU, for which the stated defaults differ; left as it is.
    tuned : optional
        What chooses: an object with ``choice(spec, weight, name)``, which returns a `numbasparse.Choice` or None
        (a tuned file, for example), or one with ``choice_by_name(name)``, which needs no ``example_input``. A
        layer without a choice, and every layer if None, gets the stated default: sparse unless more than
        `numbasparse.plans.dense_above` of the weights are non-zero. A linear layer is sparse if at most
        `numbasparse.plans.LINEAR_DENSE_ABOVE` of its weights are not zero and it was tuned so, or is a large one on
        the CPU.
    example_input : Tensor, tuple of arguments, or dict of keyword arguments, optional
        The model is run on it once to learn the input shape of every layer.
    fuse : bool
        Fold an ``nn.BatchNorm2d`` that follows a convolution into its weights, and compute a following
        ``nn.ReLU``, ``nn.ReLU6``, ``nn.SiLU`` or ``nn.LeakyReLU`` in the sparse convolution. The modules so folded
        become ``nn.Identity``. With an ``example_input``, so do activations that layers share or that are functions
        (``F.relu``), and before them a sum with another tensor or a product with a number, as at the end of a residual
        block: a module whose ``forward`` has such calls becomes an ``fx.GraphModule`` with the same children, if it
        takes one argument and torch.fx can trace it. The rewritten model must give what it gave before on the
        example. On a GPU, dense convolutions of 16-bit values in channels-last become `FusedConv2d`, which do the same
        for ReLU. An ``nn.MaxPool2d`` becomes a `SeparableMaxPool2d`, which gives the same in less time on a CPU.
    quantized : mapping of str to SparseWeight, optional
        Quantized weights of layers by name: the ``weights`` of what ``numbasparse.quantization`` reported when it
        quantized the model, or a file of them. Sparse layers then keep codes; a batch normalization is folded into
        the factors of the output channels.

    Returns
    -------
    nn.Module
        A copy in eval mode, of the same class and with the same names: the ``state_dict`` of modules that were
        not replaced has the same keys. `conversion_report` tells what became of each layer.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind.
    ValueError
        If there is no ``nn.Conv2d`` or ``nn.Linear``, or without ``tuned`` none sparse enough; if a chosen layer cannot
        be sparse (NaN in the weight); if ``tuned`` needs an ``example_input``; if a quantized weight is not the one
        of the layer of that name.

    Warns
    -----
    UserWarning
        If a rewritten ``forward`` gave something else on the example, and was put back. If torch.fx cannot trace
        the model: then only direct neighbours in an ``nn.Sequential`` are folded. If
        ``tuned`` chose no sparse kernel at all.

    Notes
    -----
    Where a layer meets an input shape or device that its config cannot run, the stated default is used.
    The converted model is for inference: sparse weights have no gradient (inputs and biases do). Call it under
    ``torch.inference_mode()``, which is also fastest. Between sparse layers whose GPU kernels write CHWN, tensors keep
    that layout where torch.fx can see that nothing but elementwise operations and max pooling is between; a tuned file
    of a GPU then chooses for all layers together (`numbasparse.nn.layout_choice`). Everything else runs in the layout
    of the example, or in channels-last if by the measured times of a tuned file that takes less time: then the model
    may be given images in NCHW all the same, and a result of four dimensions may be channels-last.
    """
    _check_arguments(model, tuned)
    converted = _copy(model).eval()
    layers = {name: m for name, m in converted.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    if not layers:
        raise ValueError(f"nothing to convert: {type(model).__name__} has no nn.Conv2d and no nn.Linear")
    kept = {name: reason for name in layers if (reason := _reason_kept(converted, name)) is not None}
    weights = _checked_weights(converted, quantized or {})
    chains: dict[str, _Chain] = {}
    if fuse:
        found = _find_chains(converted)
        kept.update({name: reason for name, reason in found.kept.items() if name in layers})
        chains = {chain.conv: chain for chain in found.chains if chain.conv not in kept}
        converted = _separate_pools(_fold_batch_norms(converted, chains, weights))
    decisions = _decide(converted, list(layers), kept, weights, tuned, example_input)
    plain, together = _decide_together(converted, decisions, example_input)
    decisions |= together
    _check_decisions(decisions, tuned)
    records = []
    for name, decision in decisions.items():
        chain = chains.get(name, _Chain(name, None, None))
        fuses = fuse and name not in kept and worth_fusing(converted.get_submodule(name), plain)
        converted, record = _apply(converted, name, decision, chain, weights.get(name), fuses)
        records.append(record)
    if fuse and example_input is not None:
        converted, fused = _fuse_epilogues(converted, example_input)
        records = [_with_epilogue(record, fused.get(record.name)) for record in records]
    keep_native(converted, {name: d.gives for name, d in decisions.items() if d.sparse and d.gives}, plain, _trace)
    setattr(converted, REPORT, tuple(records))
    return converted


def conversion_report(model: nn.Module) -> tuple[ConvertedLayer, ...]:
    """Return what `convert` did to each convolution and linear layer, in the order of ``named_modules``.

    Raises
    ------
    ValueError
        If the model does not come from `convert`.
    """
    report = getattr(model, REPORT, None)
    if report is None:
        raise ValueError(f"{type(model).__name__} was not made by numbasparse.nn.convert: pass what it returned")
    return report


def _check_arguments(model: nn.Module, tuned: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if tuned is not None and not (hasattr(tuned, "choice") or hasattr(tuned, "choice_by_name")):
        raise TypeError(
            f"tuned must have choice(spec, weight, name) or choice_by_name(name), got {type(tuned).__name__}: "
            f"load the tuned file first"
        )


def _checked_weights(model: nn.Module, quantized: Mapping[str, SparseWeight]) -> dict[str, SparseWeight]:
    """The quantized weights of convolutions, each of which must be the layer's own."""
    modules = dict(model.named_modules())
    weights = {}
    for name, weight in quantized.items():
        if name not in modules or not isinstance(weight, SparseWeight):
            raise ValueError(
                f"quantized must map the model's layers to SparseWeight, got {name!r}: {type(weight).__name__}"
            )
        layer = modules[name]
        if not isinstance(layer, (nn.Conv2d, nn.Linear)):
            continue
        own = as_convolution(layer.weight.detach().cpu())
        if own.shape != weight.shape or not torch.equal(own, torch.from_numpy(weight.to_dense())):
            raise ValueError(
                f"the quantized weight of layer {name!r} differs from the layer's: quantize the model itself "
                "(quantize_, or Quantizer.finish), and convert it unchanged"
            )
        weights[name] = weight
    return weights


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except RuntimeError as error:
        raise ValueError(
            f"the model cannot be copied ({error}); if it was pruned with torch.nn.utils.prune, call "
            f"torch.nn.utils.prune.remove on each layer first"
        ) from error


def _has_hooks(module: nn.Module) -> bool:
    """Whether somebody watches or changes what goes in or out of a module: then it must stay."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _reason_kept(model: nn.Module, name: str) -> str | None:
    """Reason why a layer must stay what it is, whatever its sparsity."""
    layer = model.get_submodule(name)
    plain = nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Linear
    own_code = any(getattr(type(layer), m, None) is not getattr(plain, m, None) for m in ("forward", "_conv_forward"))
    if own_code or isinstance(layer, nn.modules.lazy.LazyModuleMixin):
        return f"{type(layer).__name__} is not a plain nn.{plain.__name__}"
    if _has_hooks(layer):
        return "it has forward hooks"
    if isinstance(layer, nn.Conv2d):
        return None if layer.padding_mode == "zeros" else f"padding_mode {layer.padding_mode!r}"
    # The modules of torch that attend read the weights of their linear layers.
    owner = model.get_submodule(name.rpartition(".")[0])
    torchs = type(owner).__module__.startswith("torch.nn.") and owner is not layer
    if torchs and not isinstance(owner, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return f"{type(owner).__name__} may read its parameters directly"
    return None


# ---- what follows what --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    """The chains of a model, and the modules that something else than a call needs, with the reason."""

    chains: list[_Chain]
    kept: dict[str, str]


def _find_chains(model: nn.Module) -> _Found:
    try:
        graphs = _trace(model)
    except Exception as error:  # whatever the model's own code raises when it meets a proxy
        warnings.warn(
            f"torch.fx cannot trace {type(model).__name__} ({type(error).__name__}: {_first_line(error)}); "
            f"BatchNorm and activations are folded only into the convolution directly before them in an nn.Sequential",
            stacklevel=3,
        )
        return _Found(list(_sequential_chains(model)), {})
    first, *others = (list(_graph_chains(graph, model)) for graph in graphs)
    chains = [chain for chain in first if all(chain in other for other in others)]
    return _Found(chains, {name: reason for graph in graphs for name, reason in _needed_otherwise(graph).items()})


def _trace(model: nn.Module) -> list[fx.Graph]:
    """The model's graph with all arguments given and, if some are optional, also with those left out.

    To a trace an optional argument is never None: it sees only the branches for when it is given.
    """
    # Tracing runs the model's own Python, which may keep what passes by: let it do so on a copy of the modules
    # that shares their tensors.
    shadow = copy.deepcopy(model, {id(t): t for t in [*model.parameters(), *model.buffers()]})
    parameters = inspect.signature(shadow.forward).parameters.values()
    left_out = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    graphs = [Tracer().trace(shadow)]
    if left_out:
        graphs.append(Tracer().trace(shadow, concrete_args=left_out))
    return graphs


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def _needed_otherwise(graph: fx.Graph) -> dict[str, str]:
    """Modules whose parameters the model reads itself, as ``self.conv.weight``."""
    owners = (str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr")
    return {owner: "the model reads its parameters directly" for owner in owners if owner}


def _graph_chains(graph: fx.Graph, model: nn.Module) -> Iterator[_Chain]:
    modules = dict(model.named_modules(remove_duplicate=False))
    calls = Counter(id(modules[str(node.target)]) for node in graph.nodes if node.op == "call_module")

    def called_once(node: fx.Node) -> nn.Module | None:
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        return module if module is not None and calls[id(module)] == 1 else None

    for node in graph.nodes:
        if isinstance(called_once(node), (nn.Conv2d, nn.Linear)):
            followers: list[tuple[str, nn.Module]] = []
            last = node
            while len(followers) < 2 and len(last.users) == 1:
                (last,) = last.users
                follower = called_once(last)
                # Only x of f(x): a module that takes more is none of those that are folded.
                if follower is None or len(last.all_input_nodes) != 1 or last.kwargs:
                    break
                followers.append((str(last.target), follower))
            yield _chain(str(node.target), modules[str(node.target)], followers)


def _sequential_chains(model: nn.Module) -> Iterator[_Chain]:
    instances = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    for parent_name, parent in model.named_modules():
        if type(parent) is not nn.Sequential:
            continue
        children = [(_join(parent_name, key), child) for key, child in parent.named_children()]
        if len(children) != len(parent):
            continue  # a child that occurs twice is listed once
        for index, (name, child) in enumerate(children):
            if isinstance(child, (nn.Conv2d, nn.Linear)) and instances[id(child)] == 1:
                after = children[index + 1 : index + 3]
                yield _chain(name, child, list(takewhile(lambda item: instances[id(item[1])] == 1, after)))


def _chain(name: str, conv: nn.Module, followers: list[tuple[str, nn.Module]]) -> _Chain:
    """The part of what follows a convolution that can be folded into it."""
    batch_norm = activation = None
    rest = list(followers)
    if rest and _is_foldable(conv, rest[0][1]):
        batch_norm = rest.pop(0)[0]
    if rest and activation_of(rest[0][1]) is not None and not _has_hooks(rest[0][1]):
        activation = rest[0][0]
    return _Chain(name, batch_norm, activation)


def _is_foldable(conv: nn.Module, module: nn.Module) -> bool:
    # Without running statistics it uses those of the batch, in eval mode too.
    return (
        type(module) is nn.BatchNorm2d
        and module.running_mean is not None
        and module.num_features == getattr(conv, "out_channels", None)
        and not _has_hooks(module)
    )


def _join(parent: str, key: str) -> str:
    return f"{parent}.{key}" if parent else key


# ---- folding and replacing ----------------------------------------------------------------------------------


def _replace(root: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Put a module in the place of another, under all its names; returns the root, which may be the new one."""
    old = root.get_submodule(name)
    if old is root:
        return module
    for other, present in list(root.named_modules(remove_duplicate=False)):
        if present is old:
            parent, _, key = other.rpartition(".")
            root.get_submodule(parent)._modules[key] = module
    return root


def _fold_batch_norms(model: nn.Module, chains: Mapping[str, _Chain], weights: dict[str, SparseWeight]) -> nn.Module:
    """Fold into the convolutions, and into their quantized ``weights``."""
    for chain in chains.values():
        if chain.batch_norm is None:
            continue
        conv, batch_norm = model.get_submodule(chain.conv), model.get_submodule(chain.batch_norm)
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(batch_norm, nn.BatchNorm2d)
        if chain.conv in weights:
            weights[chain.conv] = weights[chain.conv].scaled(_factors(batch_norm))
        model = _replace(model, chain.conv, fuse_conv_bn_eval(_plain(conv), batch_norm))
        model = _replace(model, chain.batch_norm, nn.Identity().eval())
    return model


def _factors(batch_norm: nn.BatchNorm2d) -> np.ndarray:
    """What a batch normalization multiplies each channel by, float64 (K,)."""
    assert batch_norm.running_var is not None
    factors = torch.rsqrt(batch_norm.running_var.detach().double().cpu() + batch_norm.eps)
    if batch_norm.weight is not None:
        factors = factors * batch_norm.weight.detach().double().cpu()
    return factors.numpy()


def _plain(conv: nn.Conv2d) -> nn.Conv2d:
    """The convolution without parametrizations, masks and the like, sharing nothing with them but the weight."""
    made = empty_like(conv, nn.Conv2d)
    made.weight = nn.Parameter(conv.weight.detach(), requires_grad=conv.weight.requires_grad)
    if conv.bias is not None:
        made.bias = nn.Parameter(conv.bias.detach(), requires_grad=conv.bias.requires_grad)
    return made.eval()


def _apply(
    model: nn.Module, name: str, decision: _Decision, chain: _Chain, weight: SparseWeight | None, fuses: bool
) -> tuple[nn.Module, ConvertedLayer]:
    """Put the layer's new module in its place; ``fuses``: a dense one computes what follows it, as far as it can."""
    record = ConvertedLayer(name, "dense", decision.reason, decision.sparsity, batch_norm=chain.batch_norm)
    layer = model.get_submodule(name)
    activation = None if chain.activation is None else activation_of(model.get_submodule(chain.activation))
    if decision.sparse:
        make: Any = SparseConv2d.from_conv if isinstance(layer, nn.Conv2d) else SparseLinear.from_linear
        made = make(layer, weight=weight, choice=decision.choice, activation=activation)
        chosen = None if decision.choice is None else decision.choice.kernel
        record = replace(record, decision="sparse", kernel=chosen)
    elif fuses:
        assert isinstance(layer, nn.Conv2d)
        activation = "relu" if activation == "relu" else None
        made = FusedConv2d.of(layer, activation or "none")
    else:
        return model, record
    model = _replace(model, name, made.eval())
    if activation is None or chain.activation is None:
        return model, record
    model = _replace(model, chain.activation, nn.Identity().eval())
    return model, replace(record, activation=chain.activation)


def _separate_pools(model: nn.Module) -> nn.Module:
    for name, module in list(model.named_modules()):
        if type(module) is nn.MaxPool2d and not _has_hooks(module):
            model = _replace(model, name, SeparableMaxPool2d.of(module))
    return model


def _fuse_epilogues(model: nn.Module, example_input: Any) -> tuple[nn.Module, dict[str, Fused]]:
    """`fuse_epilogues`, unless it changes what the model gives on the example."""
    try:
        graphs = _trace(model)
    except Exception:
        return model, {}  # `convert` has warned
    once = set.intersection(*({name for name, count in calls_of(graph).items() if count == 1} for graph in graphs))
    rewritten, fused = fuse_epilogues(model, once, _rewrite_memory)
    if rewritten is model:
        return model, {}
    with torch.no_grad():
        before, after = (_tensors(_call(m, example_input)) for m in (model, rewritten))
    if not _close(before, after):
        warnings.warn(
            "sums and activations stay outside of the convolutions: the model with them inside gave another result "
            "on example_input",
            stacklevel=3,
        )
        return model, {}
    return rewritten, fused


def _rewrite_memory(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> bool:
    """What of a graph can do with less new memory."""
    shared, kept = share_concatenations(graph, modules), enlarge_in_kept_memory(graph, modules)
    return shared or kept


def _tensors(result: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


def _close(before: list[Tensor], after: list[Tensor]) -> bool:
    """Whether results agree up to what their type's rounding makes of a deep model."""
    return len(before) == len(after) and all(_alike(a, b) for a, b in zip(before, after, strict=True))


def _alike(before: Tensor, after: Tensor) -> bool:
    """By the Euclidean norm of the difference; a sum that is left out changes a result by about as much as it has."""
    if before.shape != after.shape:
        return False
    finite, allowed = before.isfinite(), _ROUNDING.get(before.dtype, 1e-3)
    if not torch.equal(finite, after.isfinite()):
        return False
    wide = torch.promote_types(before.dtype, torch.float64)
    expected = before[finite].to(wide)
    return bool((after[finite].to(wide) - expected).norm() <= allowed * expected.norm())


_ROUNDING = {torch.float16: 0.05, torch.bfloat16: 0.3}
"""Of types: what one rounding (a 2048th, a 256th) may become over some fifty layers that add to each other; else less
than a thousandth.
"""


def _with_epilogue(record: ConvertedLayer, fused: Fused | None) -> ConvertedLayer:
    if fused is None:
        return record
    return replace(record, activation=fused.activation, residual=fused.residual, scale=fused.scale)


# ---- deciding -----------------------------------------------------------------------------------------------


def _decide(
    model: nn.Module,
    names: list[str],
    kept: Mapping[str, str],
    weights: Mapping[str, SparseWeight],
    tuned: Any,
    example_input: Any,
) -> dict[str, _Decision]:
    by_name = getattr(tuned, "choice_by_name", None) if example_input is None else None
    if tuned is not None and example_input is None and by_name is None:
        raise ValueError(
            f"{type(tuned).__name__} chooses by the shape of each layer's input: give convert an example_input"
        )
    seen = None if example_input is None else input_shapes(model, names, example_input)
    decisions = {}
    for name in names:
        if name in kept:
            decisions[name] = _Decision(False, kept[name])
        elif seen is not None and name not in seen:
            decisions[name] = _Decision(False, "example_input does not reach it")
        else:
            known = None if seen is None else seen[name]
            decisions[name] = _decide_layer(model, name, weights.get(name), known, tuned, by_name)
    return decisions


def _decide_layer(
    model: nn.Module,
    name: str,
    weight: SparseWeight | None,
    seen: tuple[tuple[int, ...], str] | None,
    tuned: Any,
    by_name: Any,
) -> _Decision:
    layer = model.get_submodule(name)
    assert isinstance(layer, (nn.Conv2d, nn.Linear))
    try:
        if weight is None:
            weight = SparseWeight.from_dense(as_convolution(layer.weight), getattr(layer, "groups", 1))
    except (TypeError, ValueError) as error:
        raise type(error)(f"{error} (layer {name!r})") from None
    spec = _spec(layer, weight, seen, name)
    if isinstance(layer, nn.Linear) and weight.density > LINEAR_DENSE_ABOVE:
        return _Decision(False, f"a linear layer at density {weight.density:.1%}", weight.sparsity)
    choice = None
    if tuned is not None:
        choice = by_name(name) if by_name is not None else tuned.choice(spec, weight, name)
    if choice is not None:
        dense = kernel(choice.kernel).is_dense
        made = _Decision(not dense, f"tuned: {choice.kernel}", weight.sparsity, None if dense else choice)
        if isinstance(layer, nn.Linear):
            return made
        return replace(made, gives=_gives(choice, spec), measured=_measured(tuned, spec, weight, name))
    if isinstance(layer, nn.Linear) and (layer.weight.is_cuda or layer.weight.numel() < _LARGE_LINEAR):
        what = "linear layer on a GPU" if layer.weight.is_cuda else f"linear layer of {layer.weight.numel()} weights"
        return _Decision(False, f"default: dense for a {what}", weight.sparsity)
    usual = _usual(spec, weight, layer.weight.device)
    origin = "default" if tuned is None else "default, as nothing is tuned for it"
    reason = f"{origin}: {usual.kernel} at density {weight.density:.1%}"
    return _Decision(not kernel(usual.kernel).is_dense, reason, weight.sparsity, gives=_gives(usual, spec))


def _measured(tuned: Any, spec: ConvSpec, weight: SparseWeight, name: str) -> layout_choice.Layer | None:
    """What a tuned file has measured of a layer on a GPU."""
    found = tuned.measured(spec, weight, name) if hasattr(tuned, "measured") else []
    return layout_choice.Layer(spec, found) if found else None


def _decide_together(
    model: nn.Module, decisions: Mapping[str, _Decision], example_input: Any
) -> tuple[Layout, dict[str, _Decision]]:
    """The layout of a model on a GPU, and new decisions for layers that are better off with that of their neighbours.

    The model's own weights get the layout too, so that its dense layers have it.
    """
    given = _plain_layout(example_input)
    layers = {name: d.measured for name, d in decisions.items() if d.measured is not None}
    if not layers:
        return given, {}
    try:
        graphs = _trace(model)
    except Exception:
        return given, {}  # `convert` has warned; each layer keeps what is best for it alone
    if len(graphs) != 1:
        return given, {}  # with optional arguments there is more than one order of things
    arguments = graphs[0], dict(model.named_modules()), layers
    together = layout_choice.choose_together(*arguments, given)
    if together.plain != given and not _runs_in_channels_last(model, example_input):
        together = layout_choice.least_time(*arguments, given)
    made = {}
    for name, choice in together.choices.items():
        dense = kernel(choice.kernel).is_dense
        made[name] = replace(
            decisions[name],
            sparse=not dense,
            reason=f"tuned, with its neighbours: {choice.kernel}",
            choice=None if dense else choice,
            gives=_gives(choice, layers[name].spec),
        )
    return together.plain, made


def _runs_in_channels_last(model: nn.Module, example_input: Any) -> bool:
    """Bring the weights to channels-last, unless the model's own code cannot work with such tensors (``view``)."""
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    try:
        with torch.no_grad():
            _call(model, example_input)
    except RuntimeError:
        model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        return False
    return True


def _plain_layout(example_input: Any) -> Layout:
    """Layout of what a model is given: NHWC for channels-last images, else NCHW."""
    images = [t for t in tree_leaves(example_input) if isinstance(t, Tensor) and t.dim() == 4]
    found = [layout_of(t) for t in images]
    return "NHWC" if found and all(layout == "NHWC" for layout in found) else "NCHW"


def _usual(spec: ConvSpec, weight: SparseWeight, device: torch.device) -> Choice:
    if device.type != "cuda":
        return default_choice(spec, weight, min(torch.get_num_threads(), cpu.MAX_THREADS))
    with torch.cuda.device(device):
        return default_choice(spec, weight, 1, "cuda")


def _gives(choice: Choice, spec: ConvSpec) -> Layout | None:
    """The layout that a choice for GPUs writes; None for the CPU, or where the config is left to each shape."""
    chosen = kernel(choice.kernel)
    return chosen.layouts(spec, choice.config)[1] if choice.config and isinstance(chosen, CudaKernel) else None


def _spec(
    conv: nn.Conv2d | nn.Linear, weight: SparseWeight, seen: tuple[tuple[int, ...], str] | None, name: str
) -> ConvSpec:
    """The layer's problem; without an example, on an image of a usual size, or one vector."""
    if isinstance(conv, nn.Linear):
        shape, dtype = seen or ((conv.in_features,), "float32")
        return ConvSpec.create(linear_image_shape(shape), weight.shape, dtype=dtype, name=name)
    if seen is None:
        sizes = (max(_STAND_IN_SIZE, d * (k - 1) + 1) for k, d in zip(conv.kernel_size, conv.dilation, strict=True))
        seen = ((1, conv.in_channels, *sizes), "float32")
    shape, dtype = seen
    return ConvSpec.create(shape, weight.shape, conv.stride, conv.padding, conv.dilation, conv.groups, dtype, name=name)


def input_shapes(model: nn.Module, names: list[str], example_input: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of each named layer's first input, of a convolution with N, by running the model once."""
    seen: dict[str, tuple[tuple[int, ...], str]] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["input"]
            dtype = str(x.dtype).removeprefix("torch.")
            takes_images = isinstance(module, nn.Conv2d) or not getattr(module, "takes_vectors", True)
            shape = (1, *x.shape) if takes_images and x.dim() == 3 else tuple(x.shape)
            seen.setdefault(name, (shape, dtype if dtype in DTYPES else "float32"))

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(watch(name), with_kwargs=True) for name in names]
    try:
        with torch.no_grad():
            _call(model, example_input)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _call(model: nn.Module, example_input: Any) -> Any:
    if isinstance(example_input, Tensor):
        return model(example_input)
    if isinstance(example_input, tuple):
        return model(*example_input)
    if isinstance(example_input, Mapping):
        return model(**example_input)
    raise TypeError(
        f"example_input must be a tensor, a tuple of arguments or a dict of keyword arguments, got "
        f"{type(example_input).__name__}"
    )


def _check_decisions(decisions: Mapping[str, _Decision], tuned: Any) -> None:
    if any(decision.sparse for decision in decisions.values()):
        return
    reasons = "; ".join(f"{name or 'the model'}: {decision.reason}" for name, decision in decisions.items())
    if tuned is not None:
        warnings.warn(f"every layer stays dense ({reasons})", stacklevel=3)
        return
    raise ValueError(
        f"nothing to convert: no layer is sparse enough to be run so by default ({reasons}); prune the model "
        f"first (numbasparse.pruning), or give a tuned file"
    )
