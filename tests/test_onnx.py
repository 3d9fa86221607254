"""ONNX in and out: every operator against onnxruntime, errors that name everything, sparse initializers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from click.testing import CliRunner, Result  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from torch import nn  # noqa: E402

from numbasparse.cli import main  # noqa: E402
from numbasparse.onnx_io import (  # noqa: E402
    OnnxRuntimeModel,
    UnsupportedOnnxError,
    export_program,
    import_onnx,
    load_onnx,
    save_onnx_sparse,
)
from numbasparse.onnx_io.operators import OPERATORS  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*treespec:FutureWarning"),  # torch's own, when it copies a graph
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

IMAGE = (2, 4, 9, 10)


def weights(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def node(kind: str, inputs: str = "x", outputs: str = "y", **attributes: Any) -> Any:
    return helper.make_node(kind, inputs.split(","), outputs.split(","), name=f"the_{kind}_{outputs}", **attributes)


def proto(
    nodes: list[Any],
    constants: dict[str, np.ndarray] | None = None,
    shape: tuple[Any, ...] = IMAGE,
    opset: int = 18,
    outputs: str = "y",
) -> Any:
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs.split(",")],
        [numpy_helper.from_array(a, n) for n, a in (constants or {}).items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    return onnx.shape_inference.infer_shapes(made, data_prop=True)  # outputs must have a shape


def save(tmp_path: Path, *args: Any, **options: Any) -> Path:
    path = tmp_path / "net.onnx"
    onnx.save(proto(*args, **options), path)
    return path


def assert_same(path: Path, shape: tuple[int, ...], module: Any = None) -> Any:
    """The imported module's outputs are onnxruntime's to 1e-4."""
    module = load_onnx(path, shape) if module is None else module
    x = torch.from_numpy(3 * np.random.default_rng(1).standard_normal(shape).astype(np.float32))
    with torch.inference_mode():
        actual, expected = module(x), OnnxRuntimeModel(path)(x)
    actual, expected = (v if isinstance(v, tuple) else (v,) for v in (actual, expected))
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        np.testing.assert_allclose(a.numpy(), e.numpy(), rtol=1e-4, atol=1e-4)
    return module


W, B = weights(6, 4, 3, 3), weights(6)
NORM = {"s": abs(weights(4)) + 0.5, "b": weights(4), "m": weights(4) / 2, "v": abs(weights(4)) + 0.5}

# name -> (nodes, constants, options of proto)
CASES: dict[str, tuple[list[Any], dict[str, np.ndarray], dict[str, Any]]] = {
    "conv": ([node("Conv", "x,w,b", pads=[1, 1, 1, 1])], {"w": W, "b": B}, {}),
    "conv, strided and dilated": ([node("Conv", "x,w", strides=[2, 1], dilations=[2, 3])], {"w": W}, {}),
    "conv, groups": ([node("Conv", "x,w,b", group=2)], {"w": weights(6, 2, 3, 3), "b": B}, {}),
    "conv, depthwise": ([node("Conv", "x,w", group=4, auto_pad="VALID")], {"w": weights(8, 1, 3, 3)}, {}),
    "conv, uneven pads": ([node("Conv", "x,w", pads=[0, 1, 2, 0], strides=[2, 2])], {"w": W}, {}),
    "conv, same upper": ([node("Conv", "x,w", auto_pad="SAME_UPPER", strides=[2, 2])], {"w": W}, {}),
    "conv, same lower": ([node("Conv", "x,w", auto_pad="SAME_LOWER")], {"w": weights(6, 4, 2, 4)}, {}),
    "conv, 1-D": ([node("Conv", "x,w", pads=[1, 1], dilations=[2])], {"w": weights(5, 4, 3)}, {"shape": (2, 4, 9)}),
    "batch norm": ([node("BatchNormalization", "x,s,b,m,v", epsilon=1e-3)], NORM, {}),
    "batch norm, opset 7": ([node("BatchNormalization", "x,s,b,m,v")], NORM, {"opset": 7}),
    "instance norm": ([node("InstanceNormalization", "x,s,b")], {k: NORM[k] for k in "sb"}, {}),
    "relu": ([node("Relu")], {}, {}),
    "leaky relu": ([node("LeakyRelu", alpha=0.2)], {}, {}),
    "relu6": ([node("Clip", "x,lo,hi")], {"lo": np.float32(0)[()] * np.ones(()), "hi": np.array(6.0)}, {}),
    "relu6, opset 7": ([node("Clip", min=0.0, max=6.0)], {}, {"opset": 7}),
    "clip": ([node("Clip", "x,lo,hi")], {"lo": np.array(-1.0), "hi": np.array(0.5)}, {}),
    "clip below": ([node("Clip", "x,lo")], {"lo": np.array(-0.5)}, {}),
    "sigmoid": ([node("Sigmoid")], {}, {}),
    "tanh": ([node("Tanh")], {}, {}),
    "elu": ([node("Elu", alpha=0.7)], {}, {}),
    "softplus": ([node("Softplus")], {}, {}),
    "hard swish": ([node("HardSwish")], {}, {}),
    "hard sigmoid": ([node("HardSigmoid")], {}, {}),
    "mish": ([node("Mish")], {}, {}),
    "gelu": ([node("Gelu")], {}, {"opset": 20}),
    "gelu, tanh": ([node("Gelu", approximate="tanh")], {}, {"opset": 20}),
    "prelu, per channel": ([node("PRelu", "x,w")], {"w": weights(4, 1, 1)}, {}),
    "prelu, one": ([node("PRelu", "x,w")], {"w": weights(1)}, {}),
    "silu": ([node("Sigmoid", "x", "g"), node("Mul", "g,x")], {}, {}),
    "hard swish, taken apart": ([node("HardSigmoid", "x", "g", alpha=1 / 6), node("Mul", "x,g")], {}, {}),
    "arithmetic": (
        [
            node("Abs", "x", "a"),
            node("Sqrt", "a", "q"),
            node("Neg", "q", "n"),
            node("Exp", "n", "e"),
            node("Erf", "e", "f"),
            node("Sub", "one,f", "d"),
            node("Div", "d,c", "z"),
            node("Add", "z,x"),
        ],
        {"one": np.ones(1, np.float32), "c": 2 + abs(weights(4, 1, 1))},
        {},
    ),
    "concat": ([node("Relu", "x", "r"), node("Concat", "x,r,x", axis=1)], {}, {}),
    "concat with a constant": ([node("Concat", "x,c", axis=1)], {"c": weights(2, 1, 9, 10)}, {}),
    "softmax": ([node("Softmax", axis=1)], {}, {}),
    "softmax, opset 11": ([node("Softmax")], {}, {"shape": (2, 5), "opset": 11}),
    "log softmax": ([node("LogSoftmax", axis=-1)], {}, {}),
    "max pool": ([node("MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])], {}, {}),
    "max pool, ceil": ([node("MaxPool", kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1)], {}, {}),
    "max pool, uneven": ([node("MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=[0, 0, 1, 1])], {}, {}),
    "max pool, dilated": ([node("MaxPool", kernel_shape=[2, 3], dilations=[2, 2])], {}, {}),
    "max pool, same": ([node("MaxPool", kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_LOWER")], {}, {}),
    "max pool, 1-D": ([node("MaxPool", kernel_shape=[3])], {}, {"shape": (2, 4, 9)}),
    "average pool": ([node("AveragePool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])], {}, {}),
    "average pool, counting": (
        [node("AveragePool", kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1)],
        {},
        {},
    ),
    "average pool, ceil": ([node("AveragePool", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)], {}, {}),
    "average pool, uneven": ([node("AveragePool", kernel_shape=[3, 3], pads=[0, 1, 2, 0])], {}, {}),
    "average pool, uneven, counting": (
        [node("AveragePool", kernel_shape=[3, 3], pads=[0, 1, 2, 0], count_include_pad=1)],
        {},
        {},
    ),
    "average pool, same": ([node("AveragePool", kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_UPPER")], {}, {}),
    "global average pool": ([node("GlobalAveragePool")], {}, {}),
    "global max pool": ([node("GlobalMaxPool")], {}, {}),
    "reduce mean": ([node("ReduceMean", "x,a", keepdims=0)], {"a": ints(2, 3)}, {}),
    "reduce mean, opset 11": ([node("ReduceMean", axes=[2, 3])], {}, {"opset": 11}),
    "resize, nearest": (
        [node("Resize", "x,,s", coordinate_transformation_mode="asymmetric", nearest_mode="floor")],
        {"s": np.array([1, 1, 2, 1.5], np.float32)},
        {},
    ),
    "resize, nearest, half pixel": ([node("Resize", "x,,s")], {"s": np.array([1, 1, 2, 3], np.float32)}, {}),
    "resize, linear": ([node("Resize", "x,,s", mode="linear")], {"s": np.array([1, 1, 2, 1.7], np.float32)}, {}),
    "resize, linear to sizes": ([node("Resize", "x,,,s", mode="linear")], {"s": ints(2, 4, 13, 7)}, {}),
    "resize, corners": (
        [node("Resize", "x,,s", mode="linear", coordinate_transformation_mode="align_corners")],
        {"s": np.array([1, 1, 2, 2], np.float32)},
        {},
    ),
    "resize, cubic": ([node("Resize", "x,,s", mode="cubic")], {"s": np.array([1, 1, 2, 2], np.float32)}, {}),
    "resize, opset 10": ([node("Resize", "x,s")], {"s": np.array([1, 1, 2, 2], np.float32)}, {"opset": 10}),
    "upsample, opset 9": ([node("Upsample", "x,s")], {"s": np.array([1, 1, 2, 3], np.float32)}, {"opset": 9}),
    "upsample, opset 7": ([node("Upsample", scales=[1.0, 1.0, 2.0, 2.0])], {}, {"opset": 7}),
    "depth to space": ([node("DepthToSpace", blocksize=2)], {}, {"shape": (2, 8, 3, 4)}),
    "depth to space, CRD": ([node("DepthToSpace", blocksize=2, mode="CRD")], {}, {"shape": (2, 8, 3, 4)}),
    "space to depth": ([node("SpaceToDepth", blocksize=2)], {}, {"shape": (2, 3, 4, 6)}),
    "gemm": (
        [node("Gemm", "x,w,b", transB=1, alpha=0.5, beta=2.0)],
        {"w": weights(6, 5), "b": weights(1, 6)},
        {"shape": (2, 5)},
    ),
    "gemm, one bias": ([node("Gemm", "x,w,b")], {"w": weights(5, 6), "b": weights(1)}, {"shape": (2, 5)}),
    "matmul": ([node("MatMul", "x,w")], {"w": weights(10, 6)}, {}),
    "matmul of tensors": ([node("Transpose", "x", "t", perm=[0, 1, 3, 2]), node("MatMul", "x,t")], {}, {}),
    "flatten": ([node("Flatten")], {}, {}),
    "flatten, axis 2": ([node("Flatten", axis=2)], {}, {}),
    "flatten, axis 0": ([node("Flatten", axis=0)], {}, {}),
    "reshape": ([node("Reshape", "x,s")], {"s": ints(0, -1)}, {}),
    "reshape, numbers": ([node("Reshape", "x,s")], {"s": ints(2, 40, 9)}, {}),
    "transpose": ([node("Transpose", perm=[0, 2, 3, 1])], {}, {}),
    "split": ([node("Split", "x,s", "y,z", axis=1)], {"s": ints(1, 3)}, {"outputs": "y,z"}),
    "split, equal": ([node("Split", "x", "y,z", axis=1, num_outputs=2)], {}, {"outputs": "y,z"}),
    "split, opset 11": ([node("Split", "x", "y,z", axis=1, split=[1, 3])], {}, {"outputs": "y,z", "opset": 11}),
    "slice": (
        [node("Slice", "x,a,b,c,d")],
        {"a": ints(1, 0), "b": ints(2**62, -1), "c": ints(1, 3), "d": ints(1, 2)},
        {},
    ),
    "slice, opset 9": ([node("Slice", axes=[1, 2], starts=[1, 0], ends=[3, 5])], {}, {"opset": 9}),
    "gather": ([node("Gather", "x,i", axis=1)], {"i": ints(2, 0, -1)}, {}),
    "gather, one": ([node("Gather", "x,i", axis=1)], {"i": np.array(2, np.int64)}, {}),
    "unsqueeze and squeeze": (
        [node("Unsqueeze", "x,a", "u"), node("Relu", "u", "r"), node("Squeeze", "r,b")],
        {"a": ints(2, 4), "b": ints(4)},
        {},
    ),
    "pad": ([node("Pad", "x,p,v")], {"p": ints(0, 1, 1, 0, 0, 0, 2, 3), "v": np.array(0.5, np.float32)}, {}),
    "pad, axes": ([node("Pad", "x,p,,a")], {"p": ints(1, 2, 3, 0), "a": ints(-2, 3)}, {}),
    "pad, reflect": ([node("Pad", "x,p", mode="reflect")], {"p": ints(0, 0, 1, 2, 0, 0, 2, 0)}, {}),
    "pad, edge, opset 10": ([node("Pad", mode="edge", pads=[0, 0, 1, 2, 0, 0, 2, 0])], {}, {"opset": 10}),
    "identity and dropout": ([node("Identity", "x", "i"), node("Dropout", "i", "d"), node("Relu", "d")], {}, {}),
    "constant": (
        [node("Constant", "", "c", value_float=2.5), node("Mul", "x,c")],
        {},
        {},
    ),
    "cast": ([node("Cast", "x", "h", to=TensorProto.DOUBLE), node("Cast", "h", "y", to=TensorProto.FLOAT)], {}, {}),
    "sizes computed": (
        [
            node("Shape", "x", "s"),
            node("Gather", "s,zero", "n"),
            node("Unsqueeze", "n,axes", "n1"),
            node("Slice", "s,one,two", "c"),
            node("Mul", "c,two", "c2"),
            node("Div", "c2,two", "c3"),
            node("Concat", "n1,c3,minus", "to", axis=0),
            node("Reshape", "x,to"),
        ],
        {"zero": np.array(0, np.int64), "axes": ints(0), "one": ints(1), "two": ints(2), "minus": ints(-1)},
        {},
    ),
    "filled and expanded": (
        [
            node("ConstantOfShape", "k", "f", value=numpy_helper.from_array(np.array([2.0], np.float32))),
            node("Add", "x,f", "a"),
            node("GlobalAveragePool", "a", "g"),
            node("Expand", "g,e"),
        ],
        {"k": ints(1, 4, 1, 1), "e": ints(1, 4, 3, 5)},
        {},
    ),
}


def case_of(name: str) -> tuple[list[Any], dict[str, np.ndarray], dict[str, Any]]:
    nodes, constants, options = CASES[name]
    for n in nodes:  # a node without inputs
        if list(n.input) == [""]:
            del n.input[:]
    floats = {k: a.astype(np.float32) if a.dtype == np.float64 else a for k, a in constants.items()}
    return nodes, floats, options


@pytest.mark.parametrize("name", CASES)
def test_operator_equals_onnxruntime(tmp_path: Path, name: str) -> None:
    nodes, constants, options = case_of(name)
    path = save(tmp_path, nodes, constants, **options)
    assert_same(path, options.get("shape", IMAGE))


def test_every_operator_is_tested() -> None:
    tested = {n.op_type for nodes, _, _ in CASES.values() for n in nodes}
    assert set(OPERATORS) - tested == set()


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_convolutions_of_any_shape(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Kernel, stride, dilation, groups and pads, with auto_pad in all its modes."""
    groups, size = data.draw(st.sampled_from([1, 2, 4])), st.integers(1, 3)
    kernel, stride, dilation = ([data.draw(size), data.draw(size)] for _ in range(3))
    mode = data.draw(st.sampled_from(["NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"]))
    options: dict[str, Any] = {"strides": stride, "dilations": dilation, "group": groups}
    if mode == "NOTSET":
        options["pads"] = data.draw(st.lists(st.integers(0, 2), min_size=4, max_size=4))
    elif mode.startswith("SAME"):
        options |= {"auto_pad": mode, "dilations": [1, 1]}  # onnxruntime has no SAME with dilation
    else:
        options["auto_pad"] = mode
    constants = {"w": weights(4, 4 // groups, *kernel)}
    path = save(tmp_path_factory.mktemp("conv"), [node("Conv", "x,w", **options)], constants)
    assert_same(path, IMAGE)


class Net(nn.Module):
    """A bit of everything that exporters write."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.SiLU()
        self.b = nn.Conv2d(8, 8, 3, padding=1)
        self.down = nn.MaxPool2d(2)
        self.up = nn.Upsample(scale_factor=2, mode="bilinear")
        self.head = nn.Linear(16, 5)
        nn.init.uniform_(self.norm.running_mean)
        nn.init.uniform_(self.norm.running_var, 0.5, 1.5)

    def forward(self, x: Any) -> Any:
        x = self.act(self.norm(self.a(x)))
        y = torch.relu(self.b(x) + x)
        y = torch.cat([self.up(self.down(y)), nn.functional.leaky_relu(x)], 1)
        y = nn.functional.hardswish(y).mean((2, 3)).view(x.size(0), -1)
        return torch.softmax(self.head(y), 1)


def pruned_net(zeros: float = 0.9) -> nn.Module:
    model = Net().eval()
    with torch.no_grad():
        for layer in (model.a, model.b):
            layer.weight.mul_(torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(1)) >= zeros)
    return model


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The net by torch's two exporters (an open batch, a fixed one), and with sparse initializers."""
    folder, x, model = tmp_path_factory.mktemp("nets"), torch.randn(1, 3, 12, 16), pruned_net()
    paths = {name: folder / f"{name}.onnx" for name in ("script", "fixed", "sparse")}
    axes = {"x": {0: "batch", 2: "height", 3: "width"}}
    options: dict[str, Any] = {"dynamo": False, "input_names": ["x"]}
    torch.onnx.export(model, (x,), str(paths["script"]), dynamic_axes=axes, **options)
    torch.onnx.export(model, (x,), str(paths["fixed"]), **options)
    stored = save_onnx_sparse(model, paths["sparse"], x)
    assert sorted(weight.shape for weight in stored) == [(8, 3, 3, 3), (8, 8, 3, 3)]
    return paths


@pytest.mark.parametrize("kind", ["script", "fixed", "sparse"])
def test_exported_nets(exported: dict[str, Path], kind: str) -> None:
    module = load_onnx(exported[kind])
    assert_same(exported[kind], (1, 3, 12, 16), module)
    x, model = torch.randn(3, 3, 12, 16), pruned_net()  # another batch, whatever the file declares
    with torch.no_grad():
        torch.testing.assert_close(module(x), model(x), rtol=1e-4, atol=1e-4)
    kinds = {type(m) for m in module.modules()}
    assert {nn.Conv2d, nn.SiLU, nn.MaxPool2d, nn.Upsample, nn.Linear} <= kinds


def test_open_sizes_stay_open(exported: dict[str, Path]) -> None:
    imported = import_onnx(exported["script"])
    assert imported.input_shape == (None, 3, None, None)
    assert imported.open_axes == (2, 3)
    assert_same(exported["script"], (2, 3, 20, 8), imported.module)
    with pytest.raises(ValueError, match=r"leaves sizes of its input \(\?,3,\?,\?\) open: give them"):
        export_program(imported)
    _, open_axes = export_program(import_onnx(exported["fixed"]))
    assert open_axes == (0,)


def test_open_program(tmp_path: Path) -> None:
    """A net of convolutions alone takes any size as an exported program too."""
    from numbasparse.cli.models import load_model

    path = save(tmp_path, [node("Conv", "x,w", "c"), node("Relu", "c")], {"w": W}, shape=("n", 4, "h", "w"))
    blob, open_axes = export_program(import_onnx(path, IMAGE))
    assert open_axes == (0, 2, 3)
    (tmp_path / "net.pt2").write_bytes(blob)
    assert_same(path, (3, 4, 17, 8), load_model(str(tmp_path / "net.pt2")))


def test_sparse_file(exported: dict[str, Path], tmp_path: Path) -> None:
    """The weights are sparse initializers, valid, read by onnxruntime, and by our importer with every zero."""
    proto = onnx.load(exported["sparse"])
    onnx.checker.check_model(proto)  # with full_check, onnx's type inference refuses any sparse weight of a Conv
    assert len(proto.graph.sparse_initializer) == 2
    for sparse in proto.graph.sparse_initializer:
        assert sparse.indices.data_type == TensorProto.INT64
        assert (np.diff(numpy_helper.to_array(sparse.indices)) > 0).all()
        assert numpy_helper.to_array(sparse.values).all()
    convs = [m for m in load_onnx(exported["sparse"]).modules() if isinstance(m, nn.Conv2d)]
    zeros = [float((conv.weight == 0).float().mean()) for conv in convs]
    assert zeros == [float((m.weight == 0).float().mean()) for m in (pruned_net().a, pruned_net().b)]
    x = torch.randn(2, 3, 12, 16)
    with torch.no_grad():
        torch.testing.assert_close(OnnxRuntimeModel(exported["sparse"])(x), pruned_net()(x), rtol=1e-4, atol=1e-4)


def test_sparse_from_a_file(exported: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    stored = save_onnx_sparse(exported["fixed"], out)
    assert len(stored) == 2
    assert save_onnx_sparse(exported["fixed"], tmp_path / "none.onnx", threshold=1.0) == ()
    assert_same(out, (1, 3, 12, 16))
    again = save_onnx_sparse(out, tmp_path / "again.onnx")  # sparse ones stay as they are
    assert again == ()
    assert_same(tmp_path / "again.onnx", (1, 3, 12, 16))


def test_sparse_coordinates(tmp_path: Path) -> None:
    """Indices of [nnz, rank] instead of linear ones."""
    made = proto([node("Gemm", "x,w")], {"w": np.diag([1.0, 2.0]).astype(np.float32)}, shape=(1, 2))
    del made.graph.initializer[:]
    values = numpy_helper.from_array(np.array([1, 2], np.float32), "w")
    indices = numpy_helper.from_array(np.array([[0, 0], [1, 1]]), "i")
    made.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [2, 2]))
    onnx.save(made, tmp_path / "net.onnx")
    x = torch.tensor([[3.0, 5.0]])
    assert load_onnx(tmp_path / "net.onnx")(x).tolist() == [[3.0, 10.0]]


def test_bad_arguments_of_save(tmp_path: Path) -> None:
    from numbasparse.nn import convert

    model, x, out = pruned_net(), torch.randn(1, 3, 12, 16), tmp_path / "out.onnx"
    with pytest.raises(ValueError, match="threshold must be between 0 and 1, got 90"):
        save_onnx_sparse(model, out, x, threshold=90)
    with pytest.raises(TypeError, match="pass an example input x"):
        save_onnx_sparse(model, out)
    with pytest.raises(ValueError, match="export the pruned model before `convert`"):
        save_onnx_sparse(convert(model, None, x), out, x)
    with pytest.raises(ValueError, match="torch cannot export Net to ONNX"):
        save_onnx_sparse(model, out, torch.randn(1, 4, 12, 16))
    assert not list(tmp_path.iterdir())


def test_all_unsupported_nodes_are_named(tmp_path: Path) -> None:
    nodes = [
        node("Relu", "x", "r"),
        node("LRN", "r", "l", size=3),
        node("Conv", "l,w", "c", pads=[-1, 0, 0, 0]),
        node("TopK", "c,k", "t,i"),
        helper.make_node("Mine", ["t"], ["m"], name="own", domain="my.ops"),
        node("Relu", "m", "y"),
    ]
    made = helper.make_model(
        helper.make_graph(
            nodes,
            "net",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, IMAGE)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, IMAGE)],
            [numpy_helper.from_array(W, "w"), numpy_helper.from_array(ints(1), "k")],
        ),
        opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("my.ops", 1)],
        ir_version=8,
    )
    onnx.save(made, tmp_path / "net.onnx")
    with pytest.raises(UnsupportedOnnxError) as caught:
        load_onnx(tmp_path / "net.onnx")
    text = str(caught.value)
    assert len(caught.value.nodes) == 4
    for part in ("LRN 'the_LRN_l' (node 1)", "pads=[-1, 0, 0, 0]", "TopK", "Mine 'own'", "domain 'my.ops'"):
        assert part in text


@pytest.mark.parametrize(
    ("nodes", "constants", "options", "reason"),
    [
        ([node("MaxPool", "x", "y,i", kernel_shape=[2, 2])], {}, {"outputs": "y"}, "more than one output"),
        ([node("Conv", "x,x")], {}, {"shape": (3, 3, 3, 3)}, "the weight .input 1. is computed"),
        ([node("Resize", "x,,s", mode="linear", antialias=1)], {"s": np.ones(4, np.float32)}, {}, "antialias=1"),
        ([node("Gemm", "x,w", transA=1)], {"w": weights(2, 3)}, {"shape": (2, 5)}, "transA=1"),
        (
            [node("Conv", "x,w", auto_pad="SAME_UPPER", strides=[2, 2])],
            {"w": W},
            {"shape": (1, 4, "h", 9)},
            "open sizes",
        ),
        ([node("Split", "x", "y,z", axis=1, num_outputs=2)], {}, {"shape": (1, "c", 4), "outputs": "y,z"}, "open size"),
    ],
)
def test_unsupported_attributes(tmp_path: Path, nodes: Any, constants: Any, options: Any, reason: str) -> None:
    with pytest.raises(UnsupportedOnnxError, match=reason):
        load_onnx(save(tmp_path, nodes, constants, **options))


def test_same_padding_with_a_given_size(tmp_path: Path) -> None:
    nodes = [node("Conv", "x,w", auto_pad="SAME_UPPER", strides=[2, 2])]
    path = save(tmp_path, nodes, {"w": W}, shape=("n", 4, "h", "w"))
    imported = import_onnx(path, (1, 4, 9, 12))
    assert (imported.input_shape, imported.open_axes) == ((None, 4, 9, 12), ())
    assert_same(path, (2, 4, 9, 12), imported.module)
    with pytest.raises(ValueError, match=r"has shape \(\?, 4, \?, \?\), not \(1, 5, 9, 12\)"):
        import_onnx(path, (1, 5, 9, 12))


def test_broken_files(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_onnx(path)
    for blob in (b"", b"PK\x03\x04 no protobuf", proto([node("Relu")]).SerializeToString()[:40]):
        path.write_bytes(blob)
        with pytest.raises(ValueError, match=r"is no (valid )?ONNX"):
            load_onnx(path)
    save(tmp_path, [node("Relu", "nothing")])
    with pytest.raises(ValueError, match="is no valid ONNX model"):
        load_onnx(path)
    made = proto([node("Relu")])
    for opset in (6, 999):
        made.opset_import[0].version = opset
        onnx.save(made, path)
        with pytest.raises(ValueError, match=f"uses opset {opset}: expected 7 to|is no valid ONNX model"):
            load_onnx(path)


def test_inputs_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    made = proto([node("Relu")])
    made.graph.input.append(helper.make_tensor_value_info("other", TensorProto.FLOAT, [1]))
    onnx.save(made, path)
    with pytest.raises(ValueError, match=r"has 2 inputs \('x', 'other'\)"):
        load_onnx(path)
    made = proto([node("Cast", to=TensorProto.FLOAT)])
    made.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    onnx.save(made, path)
    with pytest.raises(ValueError, match="holds UINT8: expected floating-point"):
        load_onnx(path)


def test_sparse_initializer_that_claims_too_much(tmp_path: Path) -> None:
    made = proto([node("Gemm", "x,w")], {"w": weights(5, 6)}, shape=(2, 5))
    del made.graph.initializer[:]
    values = numpy_helper.from_array(np.ones(1, np.float32), "w")
    sparse = helper.make_sparse_tensor(values, numpy_helper.from_array(ints(0), "i"), [2**20, 2**20])
    made.graph.sparse_initializer.append(sparse)
    onnx.save(made, tmp_path / "net.onnx")
    with pytest.raises(ValueError, match=r"'w' .* expected at most 2147483648 bytes"):
        load_onnx(tmp_path / "net.onnx")


def test_external_data(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    made = proto([node("Conv", "x,w")], {"w": W})
    onnx.save(made, path, save_as_external_data=True, location="net.data", size_threshold=0)
    assert_same(path, IMAGE)
    save_onnx_sparse(path, tmp_path / "whole.onnx", threshold=0.0)
    (tmp_path / "net.data").unlink()
    assert_same(tmp_path / "whole.onnx", IMAGE)  # needs no other file
    with pytest.raises(OSError, match=r"keeps weights in other files, which must lie beside it.*net\.data"):
        load_onnx(path)
    made = onnx.load(path, load_external_data=False)
    (tmp_path / "in").mkdir()
    (tmp_path / "net.data").write_bytes(W.tobytes())
    made.graph.initializer[0].external_data[0].value = "../net.data"
    (tmp_path / "in" / "net.onnx").write_bytes(made.SerializeToString())
    with pytest.raises((ValueError, OSError), match=r"net\.data"):
        load_onnx(tmp_path / "in" / "net.onnx")


def test_fallback_says_so(tmp_path: Path) -> None:
    path = save(tmp_path, [node("LRN", size=3)])
    with pytest.warns(UserWarning, match="NOTHING of it is accelerated: LRN"):
        module = load_onnx(path, fallback=True)
    assert isinstance(module, OnnxRuntimeModel)
    x = torch.randn(IMAGE)
    torch.testing.assert_close(module(x), nn.LocalResponseNorm(3)(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(TypeError, match="has 1 inputs"):
        module(x, x)


def test_imported_net_is_pruned_and_converted(exported: dict[str, Path]) -> None:
    from numbasparse.nn import SparseConv2d, convert
    from numbasparse.pruning import MagnitudePruning, prune_

    module = load_onnx(exported["fixed"])
    prune_(module, MagnitudePruning(sparsity=0.9))
    x = torch.randn(1, 3, 12, 16)
    converted = convert(module, None, x)
    assert any(isinstance(m, SparseConv2d) for m in converted.modules())
    with torch.no_grad():
        torch.testing.assert_close(converted(x), module(x), rtol=1e-4, atol=1e-4)


def cli(*args: Any) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


def test_import_command_and_what_takes_its_file(exported: dict[str, Path], tmp_path: Path) -> None:
    from numbasparse.cli.models import load_model

    out = tmp_path / "net.pt2"
    result = cli("import", exported["script"], out, "--input", "1,3,12,16", "--report")
    assert result.exit_code == 0, result.output
    assert "outputs differ from onnxruntime's by at most" in result.output
    assert "conv2d_0" in result.output
    # Height and width must be even, which torch.export does not leave open.
    assert "for inputs of (?, 3, 12, 16) (?: open)" in result.output
    x = torch.randn(3, 3, 12, 16)
    with torch.no_grad():
        torch.testing.assert_close(load_model(str(out))(x), pruned_net()(x), rtol=1e-4, atol=1e-4)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="torch.fx cannot trace")  # then nothing would be folded
        result = cli("bench", out, "--input", "1,3,12,16", "--seconds", "0.1")
    assert result.exit_code == 0, result.output


def test_export_command(tmp_path: Path, exported: dict[str, Path]) -> None:
    factory = tmp_path / "net_factory.py"
    factory.write_text(
        "from torch import nn\n"
        "def make():\n"
        "    conv = nn.Conv2d(3, 8, 3)\n"
        "    conv.weight.data[1:] = 0\n"
        "    return nn.Sequential(conv, nn.ReLU())\n"
    )
    out = tmp_path / "out.onnx"
    result = cli("export-onnx", f"{factory}:make", out, "--input", "1,3,8,8")
    assert result.exit_code == 0, result.output
    assert "87.5%" in result.output
    assert_same(out, (2, 3, 8, 8))
    result = cli("export-onnx", f"{factory}:make", tmp_path / "no.onnx")
    assert (result.exit_code, "give the input's shape" in result.output) == (1, True)
    result = cli("export-onnx", exported["fixed"], tmp_path / "b.onnx", "--threshold", "1")
    assert (result.exit_code, "none is stored sparse" in result.output) == (0, True)


def test_commands_refuse_in_one_line(tmp_path: Path) -> None:
    path, out = save(tmp_path, [node("LRN", size=3)]), tmp_path / "out.pt2"
    result = cli("import", path, out)
    assert (result.exit_code, len(result.output.splitlines())) == (1, 1)
    assert "LRN 'the_LRN_y'" in result.output
    assert "ends in .pt2" in cli("import", path, tmp_path / "out").output
    result = cli("import", path, out, "--fallback", "--input", ",".join(map(str, IMAGE)))
    assert result.exit_code == 0
    assert "NOTHING is accelerated, and no file was written" in result.output
    assert not out.exists()


def test_import_is_refused_where_outputs_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, out = save(tmp_path, [node("Relu")]), tmp_path / "out.pt2"
    monkeypatch.setitem(OPERATORS, "Relu", OPERATORS["Tanh"])
    result = cli("import", path, out)
    assert (result.exit_code, "nothing was written" in result.output) == (1, True)
    assert not out.exists()
