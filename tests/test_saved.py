"""Converted models in a file: the same results, and a clear error for any other file."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data"))

import autotune
from numbasparse import Choice
from numbasparse.cli import main
from numbasparse.cli.run import read_input
from numbasparse.kernels import kernels_for
from numbasparse.nn import SparseConv2d, conversion_report, convert, load, save
from numbasparse.nn.exported import module_of
from numbasparse.quantization import CodebookQuantization, quantize_


class Net(nn.Module):
    """Shared modules, a parameter of its own, optional arguments, several outputs, slices."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.norm, self.pool, self.leaky = nn.BatchNorm2d(16), nn.MaxPool2d(2), nn.LeakyReLU(0.1)
        self.factor = nn.Parameter(torch.randn(16, 1, 1))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor, scale: Tensor | None = None, twice: bool = False) -> dict[str, Any]:
        y = self.leaky(self.first(x)) * self.factor
        if scale is not None:
            y = y * scale
        y = F.relu(self.norm(self.again(y)) + y)
        y = self.again(self.pool(y))
        return {"classes": self.head(y.mean((2, 3))), "maps": [y[:, :4, 1:-1], torch.cat([x, x], dim=1)]}


def pruned(model: nn.Module) -> nn.Module:
    """In eval mode, with 90 % zeros in every convolution."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight *= torch.rand_like(module.weight) > 0.9
    return model.eval()


def converted(shape: tuple[int, ...] = (2, 3, 8, 8)) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(shape)
    return convert(pruned(Net()), None, x), x


def same(a: Any, b: Any) -> bool:
    from torch.utils._pytree import tree_flatten

    (values, tree), (others, other_tree) = tree_flatten(a), tree_flatten(b)
    return tree == other_tree and all(torch.equal(v, o) for v, o in zip(values, others, strict=True))


def test_the_same_to_the_bit(tmp_path: Path) -> None:
    model, x = converted()
    save(model, tmp_path / "model.safetensors")
    loaded = load(tmp_path / "model.safetensors")
    assert not loaded.training
    with torch.inference_mode():
        assert same(loaded(x), model(x))
        other = torch.randn(1, 3, 12, 10)
        assert same(loaded(other), model(other))
    assert str(conversion_report(loaded)) == str(conversion_report(model))
    sparse = [m for m in loaded.modules() if isinstance(m, SparseConv2d)]
    assert len(sparse) == 2, "one of them is called twice"
    assert not any(isinstance(m, nn.Conv2d) for m in loaded.modules())
    # A loaded model is a converted one: it can be saved again, to the same bytes but for safetensors' order.
    save(loaded, tmp_path / "again.safetensors")
    with torch.inference_mode():
        assert same(load(tmp_path / "again.safetensors")(x), model(x))


@pytest.mark.parametrize("name", ["resnet18", "rrdb", "fashion"])
def test_models(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    if name == "resnet18":
        from models import resnet18

        model, x = resnet18(), torch.randn(1, 3, 32, 32)
    elif name == "rrdb":
        from realesrgan import RRDBNet

        model, x = RRDBNet(), torch.randn(1, 3, 8, 8)
    else:
        from fashion import fashion_resnet

        model, x = fashion_resnet(), torch.randn(2, 1, 28, 28)
    model = convert(pruned(model), None, x)
    save(model, tmp_path / "model.safetensors")
    with torch.inference_mode():
        assert same(load(tmp_path / "model.safetensors")(x), model(x))


def test_quantized_weights_stay_codes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = pruned(nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3))), torch.randn(1, 3, 9, 9)
    report = quantize_(model, CodebookQuantization(4))
    quantized = convert(model, None, x, quantized=report.weights)
    save(quantized, tmp_path / "codes.safetensors")
    loaded = load(tmp_path / "codes.safetensors")
    with torch.inference_mode():
        assert torch.equal(loaded(x), quantized(x))
    assert loaded.get_submodule("2").values.dtype == torch.uint8
    save(convert(model, None, x), tmp_path / "floats.safetensors")
    assert (tmp_path / "codes.safetensors").stat().st_size < (tmp_path / "floats.safetensors").stat().st_size


def test_exported_programs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    x = torch.randn(1, 3, 9, 9)
    model = convert(module_of(torch.export.export(pruned(net), (x,))), None, x)
    save(model, tmp_path / "model.safetensors")
    with torch.inference_mode():
        assert same(load(tmp_path / "model.safetensors")(x), model(x))


def test_a_tuned_file_chooses_again(tmp_path: Path) -> None:
    model, x = converted()
    save(model, tmp_path / "model.safetensors")

    simple = Choice(next(k.name for k in kernels_for("cpu") if not k.is_dense))

    class Tuned:
        def choice_by_name(self, name: str) -> Choice | None:
            return simple if name == "first" else None

    loaded: Any = load(tmp_path / "model.safetensors", Tuned())
    assert loaded.first.choice == simple
    with torch.inference_mode():
        assert torch.allclose(loaded(x)["classes"], model(x)["classes"], atol=1e-5)
    with pytest.raises(TypeError, match="choice_by_name"):
        load(tmp_path / "model.safetensors", "tuned.json")


def test_a_real_tuned_file_chooses_as_it_does_for_convert(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = pruned(Net()), torch.randn(2, 3, 8, 8)
    model = convert(net, None, x)
    save(model, tmp_path / "model.safetensors")
    autotune.tune(net, x, trials=2).save(tmp_path / "tuned.json")
    tuned = autotune.load(tmp_path / "tuned.json")
    with pytest.raises(ValueError, match="give load an example_input"):
        load(tmp_path / "model.safetensors", tuned)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a dense kernel may be the faster one on layers of this size
        loaded: Any = load(tmp_path / "model.safetensors", tuned, x)
        expected = convert(net, tuned, x)
    by_name = {record.name: record for record in conversion_report(loaded)}
    for record in conversion_report(expected)[:2]:
        assert record.reason.startswith("tuned: ")
        assert by_name[record.name].reason.startswith(record.reason)
        if record.decision == "sparse":
            assert by_name[record.name].kernel == record.kernel
            assert loaded.get_submodule(record.name).choice == expected.get_submodule(record.name).choice
    with torch.inference_mode():
        assert torch.allclose(loaded(x)["classes"], model(x)["classes"], atol=1e-5)


def test_dense_choices_for_sparse_layers_are_told(tmp_path: Path) -> None:
    model, x = converted()
    save(model, tmp_path / "model.safetensors")

    class Dense:
        def choice(self, spec: Any, weight: Any, name: str) -> Choice | None:
            return Choice("dense") if name == "first" else None

    with pytest.warns(UserWarning, match="that stay so: first"):
        loaded = load(tmp_path / "model.safetensors", Dense(), x)
    assert conversion_report(loaded)[0].reason == "tuned: dense, but the file holds it sparse"
    assert conversion_report(loaded)[1] == conversion_report(model)[1]
    with torch.inference_mode():
        assert same(loaded(x), model(x))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.sum() > 0 else self.conv(-x)


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(self.conv(x)).real


class Named(nn.Module):
    def __init__(self, *names: str) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({name: nn.Conv2d(3, 3, 3) for name in names})

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts.values():
            x = part(x)
        return x


class Several(Named):
    def forward(self, *xs: Tensor) -> Tensor:
        return self.parts["a"](torch.cat(xs))


class Shaped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y.view(x.shape[0], y.shape[1], -1)


class Two(nn.Module):
    """Two inputs, two outputs, one weight in two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.heads = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.Linear(8, 2)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.a(x) - self.b(z), self.heads(self.b(x).mean((2, 3)))


def test_inputs_names_and_layouts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path, x = tmp_path / "model.safetensors", torch.randn(2, 3, 9, 9)
    for net, arguments in ((Two(), (x, x + 1)), (Shaped(), (x,)), (Named("conv-1", "3x3", "a b", "über"), (x,))):
        model = convert(pruned(net), None, arguments)
        next(m for m in model.modules() if isinstance(m, SparseConv2d)).out_layout = "CHWN"
        save(model, path)
        loaded = load(path)
        assert next(m for m in loaded.modules() if isinstance(m, SparseConv2d)).out_layout == "CHWN"
        with torch.inference_mode():
            assert same(loaded(*arguments), model(*arguments))


def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path) -> None:
    x = torch.randn(1, 3, 9, 9)
    for net, words in ((Named("in"), "parts.in"), (Named('a"'), "parts.a"), (Several("a"), r"\*xs")):
        with pytest.raises(ValueError, match=rf"cannot be saved: unknown target .*{words}.*torch\.export"):
            save(convert(pruned(net), None, x), tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    path, x = tmp_path / "model.safetensors", torch.randn(1, 3, 8, 8)
    with pytest.raises(ValueError, match=r"was not made by numbasparse\.nn\.convert"):
        save(Net(), path)
    with pytest.warns(UserWarning, match="cannot trace"):
        branching = convert(pruned(Branching()), None, x)
    with pytest.raises(ValueError, match=r"cannot trace Branching.*torch\.export\.save"):
        save(branching, path)
    with pytest.raises(ValueError, match=r"Unknown cannot be saved: node 'fft_fft' calls .*torch\.export\.save"):
        save(convert(pruned(Unknown()), None, x), path)
    hooked, _ = converted()
    hooked.get_submodule("first").register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="module 'first' has forward hooks"):
        save(hooked, path)
    assert list(tmp_path.iterdir()) == []


def changed(path: Path, out: Path, change: Any) -> Path:
    """Write a file again with another header."""
    blob = path.read_bytes()
    end = 8 + int.from_bytes(blob[:8], "little")
    header = json.loads(json.loads(blob[8:end])["__metadata__"]["numbasparse"])
    tensors = safetensors.torch.load(blob)
    change(header, tensors)
    out.write_bytes(safetensors.torch.save(tensors, {"numbasparse": json.dumps(header)}))
    return out


def node_of(header: Any, op: str) -> Any:
    return next(node for node in header["graph"] if node["op"] == op)


NO_GROUPS = {"kind": "GroupNorm", "arguments": {"num_groups": 0, "num_channels": 8, "eps": 1e-5, "affine": False}}


SECRET = {
    "op": "call_function",
    "name": "d",
    "target": "getattr",
    "args": [{"node": "x"}, "__class__"],
    "kwargs": {},
}


def an_input(**more: Any) -> Any:
    return {"op": "placeholder", "name": "more", "target": "more", "args": [], "kwargs": {}} | more


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda h, t: h.update(version=2), "its version is 2"),
        (lambda h, t: h.update(format="weights"), "its format is 'weights'"),
        (lambda h, t: h.update(more=1), "unknown field"),
        (lambda h, t: node_of(h, "call_function").update(target="os.system"), "unknown function 'os.system'"),
        (lambda h, t: node_of(h, "call_method").update(target="__reduce__"), "unknown target '__reduce__'"),
        (lambda h, t: node_of(h, "call_module").update(target="norm; print()"), "unknown target"),
        (lambda h, t: node_of(h, "placeholder").update(target="x, y=print()"), "unknown target"),
        (lambda h, t: node_of(h, "call_module").update(kwargs={"a=print()": 1}), "an argument named"),
        (lambda h, t: node_of(h, "call_module").update(name="import"), "a node 'import'"),
        (lambda h, t: node_of(h, "output").update(args=[{"node": "nobody"}]), "used before it is computed"),
        (lambda h, t: h["graph"].pop(), "without an output"),
        (lambda h, t: h["modules"]["head"].update(kind="Module"), "unknown kind of module 'Module'"),
        (lambda h, t: h["modules"]["head"]["arguments"].update(in_features=10**12), "size mismatch"),
        (lambda h, t: h["modules"]["head"]["arguments"].pop("bias"), "needs the arguments"),
        (lambda h, t: h["modules"]["first"]["arguments"].update(activation="print"), "module 'first'"),
        (lambda h, t: t.pop("head.weight"), "expected the tensors"),
        (lambda h, t: t.update(stranger=torch.zeros(1)), "of no use: stranger"),
        (lambda h, t: t["first.indices"].add_(30000), "module 'first'"),
        (lambda h, t: t.update({"first.indices": t["first.indices"].long() + 2**32}), "must be uint16 or int32"),
        (lambda h, t: t.update({"first.indices": t["first.indices"] + 0.5}), "must be uint16 or int32"),
        (lambda h, t: t.update({"first.bias": torch.zeros(16, dtype=torch.int64)}), "of a floating-point type"),
        (lambda h, t: node_of(h, "placeholder").update(target="self"), "none is 'self'"),
        (lambda h, t: h["graph"].insert(1, {**node_of(h, "placeholder"), "name": "x_1"}), "names of their own"),
        (lambda h, t: h["graph"].insert(0, an_input(args=[None])), "those that have one last"),
        (lambda h, t: h["graph"].insert(1, an_input(args=[1, 2])), "at most a default"),
        (lambda h, t: h["graph"].insert(3, an_input()), "an input after other nodes"),
        (lambda h, t: h["graph"].append({**h["graph"][-1], "name": "end"}), "with others: 2 in all"),
        (lambda h, t: h["graph"].insert(1, SECRET), "another attribute than shape or ndim"),
        (lambda h, t: h["graph"][-1].update(args=[]), "output must be one value"),
        (lambda h, t: h["modules"]["first"]["arguments"].update(choice={"kernel": "cpu_direct"}), "a choice has"),
        (lambda h, t: h["modules"].update(pool=NO_GROUPS), "module 'pool': integer modulo by zero"),
        (lambda h, t: h["report"][0].update(decision=["sparse"]), "Expected `str`"),
        (lambda h, t: h["report"][0].update(sparsity="much"), "Expected `float`"),
        (lambda h, t: h["report"][0].update(more=1), "a record of a layer has the entries"),
        (lambda h, t: h["report"][0].pop("reason"), "a record of a layer has the entries"),
    ],
)
def test_wrong_files(change: Any, words: str, tmp_path: Path) -> None:
    model, _ = converted()
    save(model, tmp_path / "model.safetensors")

    def apply(header: Any, tensors: Any) -> None:
        tensors["first.indices"] = tensors["first.indices"].to(torch.int32)
        change(header, tensors)

    wrong = changed(tmp_path / "model.safetensors", tmp_path / "wrong.safetensors", apply)
    with pytest.raises(ValueError, match=r"cannot read '.*wrong\.safetensors' as a saved model") as caught:
        load(wrong)
    assert words in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none")
    (tmp_path / "other").write_bytes(safetensors.torch.save({"a": torch.zeros(1)}))
    with pytest.raises(ValueError, match="written by another program"):
        load(tmp_path / "other")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("saved") / "model.safetensors"
    save(converted()[0], path)
    return path.read_bytes()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_bytes_are_a_model_or_refused(data: st.DataObject, whole: bytes, tmp_path_factory: Any) -> None:
    blob = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    blob = blob[: data.draw(st.integers(0, len(blob)) | st.just(len(blob)))]
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(bytes(blob))
    text = "as a saved model"
    try:
        load(path)
    except ValueError as error:
        text = str(error)
    assert "as a saved model" in text


# ---- the commands -------------------------------------------------------------------------------------------

FACTORY = """
import torch
from torch import nn
def net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    with torch.no_grad():
        model[0].weight *= torch.rand_like(model[0].weight) > 0.9
    return model.eval()
"""


def saved_by_command(folder: Path) -> Path:
    (folder / "net.py").write_text(FACTORY)
    out = folder / "model.safetensors"
    done = CliRunner().invoke(main, ["convert", f"{folder}/net.py:net", str(out), "--input", "1,3,9,9"])
    assert done.exit_code == 0, done.output
    assert "sparse" in done.output
    return out


def test_convert_and_run(tmp_path: Path) -> None:
    out, x = saved_by_command(tmp_path), np.random.default_rng(0).random((2, 3, 9, 9), np.float32)
    np.save(tmp_path / "x.npy", x)
    arguments = ["run", str(out), "--input", str(tmp_path / "x.npy"), "--output", str(tmp_path / "y.npy")]
    done = CliRunner().invoke(main, [*arguments, "--repeat", "3"])
    assert done.exit_code == 0, done.output
    assert "(2, 4)" in done.output
    assert "milliseconds" in done.output
    with torch.inference_mode():
        expected = load(out)(torch.from_numpy(x)).numpy()
    assert np.array_equal(np.load(tmp_path / "y.npy"), expected)
    assert CliRunner().invoke(main, ["run", str(out), "--input", "1,3,9,9"]).exit_code == 0


def test_run_with_a_tuned_file(tmp_path: Path) -> None:
    out = saved_by_command(tmp_path)
    tuned = str(tmp_path / "tuned.json")
    shape = ["--input", "1,3,9,9"]
    done = CliRunner().invoke(main, ["tune", f"{tmp_path}/net.py:net", *shape, "--trials", "2", "--out", tuned])
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(main, ["run", str(out), *shape, "--tuned", tuned])
    assert done.exit_code == 0, done.output
    assert "tuned:" in done.output


def test_a_model_of_one_channel_takes_gray_pictures(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    save(convert(pruned(nn.Sequential(nn.Conv2d(1, 8, 3)))), tmp_path / "model.safetensors")
    image.new("RGB", (12, 10)).save(tmp_path / "a.png")
    done = CliRunner().invoke(main, ["run", str(tmp_path / "model.safetensors"), "--input", str(tmp_path / "a.png")])
    assert done.exit_code == 0, done.output
    assert "(1, 8, 8, 10)" in done.output


def test_run_on_pictures(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    out = saved_by_command(tmp_path)
    (tmp_path / "pictures").mkdir()
    for name in ("a.png", "b.png"):
        image.new("RGB", (12, 10), (255, 0, 51)).save(tmp_path / "pictures" / name)
    read = read_input(str(tmp_path / "pictures" / "a.png"))
    assert read.shape == (1, 3, 10, 12)
    assert torch.allclose(read[0, :, 0, 0], torch.tensor([1.0, 0.0, 0.2]))
    assert read_input(str(tmp_path / "pictures"), gray=True).shape == (2, 1, 10, 12)
    done = CliRunner().invoke(main, ["run", str(out), "--input", str(tmp_path / "pictures")])
    assert done.exit_code == 0, done.output
    assert "(2, 4)" in done.output


@pytest.mark.parametrize(
    ("given_input", "words"),
    [
        ("nothing.npy", "there is no file"),
        ("1,x", "expected the input as an array (.npy)"),
        ("1,7,9,9", "does not run on the input"),
        ("empty", "no pictures"),
    ],
)
def test_wrong_inputs_of_run(given_input: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    out = saved_by_command(tmp_path)
    name = str(tmp_path / given_input) if given_input in ("nothing.npy", "empty") else given_input
    done = CliRunner().invoke(main, ["run", str(out), "--input", name])
    assert done.exit_code == 1
    assert words in done.output
