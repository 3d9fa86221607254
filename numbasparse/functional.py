"""`conv2d`: the convolution as a function of arrays or tensors."""

from __future__ import annotations

import sys
import threading
import weakref
from collections import OrderedDict
from typing import Any, Literal

import numpy as np

from numbasparse.plans import Choice, ConfigLike, Plan, device_and_dtype, is_tensor, plan
from numbasparse.runtime import cpu
from numbasparse.runtime.layouts import Layout
from numbasparse.spec import ConvSpec
from numbasparse.weight import SparseWeight

_PLANS_PER_WEIGHT = 64
_CONVERTED_WEIGHTS = 64


_NO_PLANS: dict[Any, Any] = {}


class _Kept:
    """A plan, the config that it was asked for, and whether it was used since it was last looked at for removal."""

    __slots__ = ("config", "plan", "used")

    def __init__(self, plan: Plan, config: Any) -> None:
        self.plan, self.config, self.used = plan, config, True


class _PlanCache:
    """Plans by weight and call; a weight's plans go when the weight goes.

    A plan is kept with the config that it was asked for: a chooser's identity is part of the key, and an object
    that is alive is not mistaken for a later one at its address.  Of too many plans the oldest one goes that was not
    used for a whole round: a call only marks its plan, where an exact order of use would cost another look-up.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_weight: weakref.WeakKeyDictionary[SparseWeight, dict[Any, _Kept]] = weakref.WeakKeyDictionary()

    def get(self, weight: SparseWeight, key: Any) -> Plan | None:
        with self._lock:
            # A key that has no hash must be found out here, whatever is known of the weight.
            kept = self._by_weight.get(weight, _NO_PLANS).get(key)
            if kept is None:
                return None
            kept.used = True
            return kept.plan

    def put(self, weight: SparseWeight, key: Any, made: Plan, config: Any) -> None:
        with self._lock:
            plans = self._by_weight.setdefault(weight, {})
            plans[key] = _Kept(made, config)
            while len(plans) > _PLANS_PER_WEIGHT:
                oldest = next(iter(plans))
                kept = plans.pop(oldest)
                if kept.used:
                    kept.used = False
                    plans[oldest] = kept

    def clear(self) -> None:
        with self._lock:
            self._by_weight.clear()


_plans = _PlanCache()
_converted: OrderedDict[str, SparseWeight] = OrderedDict()
_converted_lock = threading.Lock()


def clear_cache() -> None:
    """Forget every plan and converted weight that `conv2d` keeps."""
    _plans.clear()
    with _converted_lock:
        _converted.clear()


def conv2d(
    x: Any,
    weight: Any,
    bias: Any = None,
    stride: int | tuple[int, int] = 1,
    padding: Any = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
    config: ConfigLike = None,
    out: Any = None,
    kernel_shape: tuple[int, int, int] | None = None,
    residual: Any = None,
    out_layout: Layout | Literal["native"] | None = None,
) -> Any:
    """Sparse 2-D convolution, like ``torch.nn.functional.conv2d``.

    Parameters
    ----------
    x : NumPy array, torch tensor, or GPU array with ``__dlpack__`` or ``__cuda_array_interface__``, (N, C, H, W)
        float32, or float64, float16, bfloat16 (torch), which are computed in float32 and rounded back.  A CUDA
        tensor, or an array of CuPy for example, is convolved on its GPU; there float16 and bfloat16 are read and
        written as they are, and sums are in float32.
    weight : SparseWeight, SciPy sparse matrix, or dense array or tensor (K, C/groups, R, S)
        A `SparseWeight` is packed once; the other two are converted and recognised by content at every call,
        which costs time in proportion to their size.
    bias : array or tensor, (K,), optional
    stride, dilation : int or pair
    padding : int, pair, ``((top, bottom), (left, right))``, ``"same"`` or ``"valid"``
    groups : int
    activation : None, "relu", "relu6", "silu" or "leaky_relu(SLOPE)"
        Applied to the output within the kernel.
    config
        Which kernel to run: see `numbasparse.plans.ConfigLike`.  None takes the stated default; a tuned model
        takes what was measured best for this shape and sparsity.
    out : like ``x``, (N, K, OH, OW), optional
        C-contiguous on the CPU; must not share memory with ``x`` or ``residual``.
    kernel_shape : (C/groups, R, S)
        Needed, and allowed, only where ``weight`` is a SciPy matrix of shape (K, C/groups*R*S).
    residual : like ``x``, (N, K, OH, OW), optional
        Added before the activation.
    out_layout : "NCHW", "NHWC", "CHWN" or "native", optional
        On a GPU: layout of the result in memory; None is that of ``x``, "native" what the kernel writes without a
        conversion.

    Returns
    -------
    array or tensor, (N, K, OH, OW)
        Of the kind and dtype of ``x``.

    Raises
    ------
    ValueError, TypeError
        For inputs that do not fit; the text says what was expected, what came, and what to do.
    numbasparse.runtime.cuda.CudaError
        If ``x`` is on a GPU that cannot be used.

    Notes
    -----
    Threads: those of ``torch.get_num_threads()`` for tensors, else `numbasparse.set_num_threads`.  Plans are
    cached per weight: repeated calls neither pack nor compile.  Products with zero weights are not formed, so
    an infinity or NaN in ``x`` reaches only outputs whose non-zero weights touch it.
    """
    sparse = weight if type(weight) is SparseWeight else _convert(weight, kernel_shape, groups)
    if sparse is weight and kernel_shape is not None and tuple(kernel_shape) != sparse.kernel_shape:
        raise ValueError(f"kernel_shape {kernel_shape} differs from the SparseWeight's {sparse.kernel_shape}: omit it")
    tensor = is_tensor(x)
    if not tensor and not isinstance(x, np.ndarray):
        options = {"activation": activation, "config": config, "out_layout": out_layout}
        arguments = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        return _conv2d_array(x, sparse, bias, out, residual, **arguments, **options)
    device, dtype = ("cpu", "float32") if not tensor or x.is_cpu else device_and_dtype(x)
    threads = sys.modules["torch"].get_num_threads() if tensor else cpu.get_num_threads()
    shape = x.shape
    key: tuple[Any, ...] = (
        shape,
        stride,
        padding,
        dilation,
        groups,
        activation,
        _config_key(config),
        threads,
        device,
        dtype,
    )
    try:
        found = _plans.get(sparse, key)
    except TypeError:  # lists, for example: ConvSpec reads them, or says what is wrong with them
        key = (shape, repr(key[1:]))
        found = _plans.get(sparse, key)
    if found is None:
        spec = ConvSpec.create(tuple(shape), sparse.shape, stride, padding, dilation, groups, dtype)
        count = min(threads, cpu.MAX_THREADS)
        found = plan(spec, sparse, device=device, config=config, activation=activation, threads=count)
        _plans.put(sparse, key, found, config)
    return found(x, bias, out, residual, out_layout)


def _conv2d_array(x: Any, weight: SparseWeight, bias: Any, out: Any, residual: Any, **options: Any) -> Any:
    """The convolution of another library's array, by way of tensors on the same memory."""
    if not hasattr(x, "__dlpack__") and not hasattr(x, "__cuda_array_interface__"):
        raise TypeError(f"x must be a NumPy array, a torch tensor or an array with __dlpack__, got {type(x).__name__}")
    from numbasparse.cuda_plans import from_array

    tensor, back = from_array(x)
    bias, target, residual = (None if t is None else from_array(t)[0] for t in (bias, out, residual))
    y = conv2d(tensor, weight, bias, out=target, residual=residual, **options)
    return back(y) if out is None else out


def _config_key(config: ConfigLike) -> Any:
    if config is None or isinstance(config, str):
        return config
    if type(config) is Choice:
        return config.key
    if hasattr(config, "kernel") and hasattr(config, "config"):
        return Choice(config.kernel, config.config).key
    if hasattr(config, "choice"):
        return id(config)
    return repr(config)


def _convert(weight: Any, kernel_shape: tuple[int, int, int] | None, groups: int) -> SparseWeight:
    """A SparseWeight with the content of ``weight``: the same object for the same content."""
    import scipy.sparse

    if scipy.sparse.issparse(weight):
        if kernel_shape is None:
            raise ValueError(
                f"weight is a SciPy matrix of shape {weight.shape}: give kernel_shape=(C/groups, R, S) as well"
            )
        made = SparseWeight.from_scipy(weight, kernel_shape, groups)
    elif kernel_shape is not None:
        raise ValueError(f"kernel_shape goes with a SciPy matrix, weight is {type(weight).__name__}: omit it")
    elif isinstance(weight, np.ndarray) or is_tensor(weight):
        made = SparseWeight.from_dense(weight, groups)
    else:
        raise TypeError(
            "weight must be a SparseWeight, a SciPy sparse matrix, or a dense array or tensor, "
            f"got {type(weight).__name__}"
        )
    with _converted_lock:
        kept = _converted.setdefault(made.fingerprint, made)
        _converted.move_to_end(made.fingerprint)
        while len(_converted) > _CONVERTED_WEIGHTS:
            _converted.popitem(last=False)
    return kept
