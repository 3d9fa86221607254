"""The command line: what it prints and writes, and that a wrong input costs one clear line."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("optuna")
pytest.importorskip("matplotlib")

from click.testing import CliRunner, Result  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import autotune  # noqa: E402
from numbasparse.cli import main  # noqa: E402
from numbasparse.cli.models import load_model  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*treespec:FutureWarning"),  # torch's own, when it copies a graph
    pytest.mark.filterwarnings("ignore:the machine was busy"),
]

FACTORY = """
import torch
from torch import nn


def make(zeros=0.8):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, bias=False),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )
    with torch.no_grad():
        for layer in (model[0], model[3]):
            layer.weight.mul_(torch.rand_like(layer.weight) >= zeros)
    return model


def dense():
    return make(0.0)


instance = make()
number = 3


def text():
    return "no model"


def broken():
    raise RuntimeError("the factory's own\\nfault")


def stopped():
    raise KeyboardInterrupt


def needs(argument):
    return make()


def no_convolution():
    return nn.Linear(8, 4)


batches = [(torch.randn(4, 3, 10, 10), torch.arange(4)) for _ in range(3)]


def make_batches():
    return batches


def stream():
    yield from batches
"""

SHAPE = ("--input", "2,3,10,10")
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working folder with factories in ``nets.py``; modules, paths and threads are put back."""
    (tmp_path / "nets.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(sys, "path", list(sys.path))
    threads = torch.get_num_threads()
    sys.modules.pop("nets", None)
    yield tmp_path
    sys.modules.pop("nets", None)
    torch.set_num_threads(threads)


def run(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def good(*arguments: str | Path) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def bad(*arguments: str | Path) -> str:
    """Run a command that must fail; returns the one line that says why."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert re.match(r"error: \S", lines[0])
    return lines[0].removeprefix("error: ")


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.suffix != ".pyc" and p.is_file()
    }


@pytest.fixture(scope="session")
def tuned_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A tuned file of the factory's model."""
    home = tmp_path_factory.mktemp("tuned")
    (home / "tuned_nets.py").write_text(FACTORY)
    path = sys.path[:]
    try:
        tuned = autotune.tune(
            load_model(f"{home / 'tuned_nets.py'}:make"), torch.randn(2, 3, 10, 10), trials=2, progress=False
        )
    finally:
        sys.path[:] = path
    tuned.save(home / "tuned.json")
    return (home / "tuned.json").read_bytes()


@pytest.fixture(scope="session")
def program_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The factory's model as an exported program."""
    home = tmp_path_factory.mktemp("program")
    space: dict[str, Any] = {}
    exec(FACTORY, space)
    torch.export.save(torch.export.export(space["make"]().eval(), (torch.randn(2, 3, 10, 10),)), home / "net.pt2")
    return home / "net.pt2"


# ---- help ---------------------------------------------------------------------------------------------------


def test_help() -> None:
    text = good("--help")
    for command in ("quickstart", "tune", "bench", "report", "prune"):
        assert command in text
        own = good(command, "-h")
        assert own.startswith("Usage:")
        assert "Options:" in own
    for command in ("tune", "bench", "prune"):
        assert '"file.py:factory"' in good(command, "--help")
    assert re.search(r"\d+\.\d+", good("--version"))


def test_usage_errors_are_clicks() -> None:
    for arguments in (["tune"], ["bench", "nets.py:make"], ["nonsense"], ["prune", "nets.py:make"]):
        result = run(*arguments)
        assert result.exit_code == 2
        assert "Usage:" in result.stderr


def test_help_loads_no_torch(run_python: Callable[..., str]) -> None:
    code = "import sys; from numbasparse.cli import main; print('torch' in sys.modules, 'optuna' in sys.modules)"
    assert run_python(code) == "False False"


# ---- tune ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nets.py:make", "nets:make", "nets:instance"])
def test_tune(folder: Path, name: str) -> None:
    output = good("tune", name, *SHAPE, "--trials", "2", "--threads", "1", "--out", "mine.json")
    assert "geometric mean" in output
    assert re.search(r"2x3x10x10 -> 8, 3x3 .*\d%", output)
    assert output.rstrip().endswith("wrote mine.json")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # threads of this process
        tuned = autotune.load("mine.json")
    assert [layer.names for layer in tuned.layers] == [["0"], ["3"]]
    assert tuned.device.threads == 1
    assert {layer.spec["n"] for layer in tuned.layers} == {2}


def test_tune_an_exported_program(folder: Path, program_file: Path) -> None:
    assert "geometric mean" in good("tune", program_file, *SHAPE, "--trials", "2")
    assert [layer.names for layer in autotune.load("tuned.json").layers] == [["conv2d_0"], ["conv2d_1"]]
    assert "numbasparse" in good("bench", program_file, *SHAPE, "--tuned", "tuned.json", "--seconds", "0.1")


def test_tune_resumes(folder: Path) -> None:
    arguments = ("tune", "nets.py:make", *SHAPE, "--trials", "2", "--storage", "journal")
    good(*arguments)
    lines = len(Path("journal").read_bytes().splitlines())
    good(*arguments)
    assert len(Path("journal").read_bytes().splitlines()) < 1.5 * lines


def test_tune_with_weights(folder: Path) -> None:
    model = load_model("nets.py:make")
    with torch.no_grad():
        model[3].weight.fill_(1.0).view(-1)[:288] = 0.0
    save_file(model.state_dict(), "w.safetensors")
    good("tune", "nets.py:make", *SHAPE, "--trials", "2", "--weights", "w.safetensors")
    assert autotune.load("tuned.json").layers[1].sparsity == 0.5


# ---- bench, report ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_tuned", [False, True])
def test_bench(folder: Path, tuned_file: bytes, with_tuned: bool) -> None:
    Path("t.json").write_bytes(tuned_file)
    options = ("--tuned", "t.json") if with_tuned else ("--threads", "1")
    output = good("bench", "nets.py:make", *SHAPE, "--seconds", "0.1", *options)
    names = ["dense, NCHW", "dense, channels-last", "numbasparse", "numbasparse, captured"]
    times = re.findall(rf"({'|'.join(reversed(names))})\W+(\d+\.\d{{3}})\W+(\d+\.\d\d)", output)
    assert [name for name, *_ in times] == names
    assert all(float(ms) > 0 for _, ms, _ in times)
    assert max(float(ratio) for name, _, ratio in times if name.startswith("dense")) == 1.0


def test_report(folder: Path, tuned_file: bytes) -> None:
    Path("t.json").write_bytes(tuned_file)
    output = good("report", "t.json")
    assert "geometric mean" in output
    assert contents(folder).keys() == {"nets.py", "t.json"}
    output = good("report", "t.json", "--plot", "t.png")
    assert "wrote t.png" in output
    assert Path("t.png").read_bytes().startswith(PNG)
    assert contents(folder).keys() == {"nets.py", "t.json", "t.png"}


def test_report_without_dense_times(folder: Path, tuned_file: bytes) -> None:
    file = json.loads(tuned_file)
    for layer in file["layers"]:
        layer["dense_us"] = layer["dense_choice_us"] = layer["ratio"] = None
    Path("t.json").write_text(json.dumps(file))
    good("report", "t.json", "--plot", "t.png")
    assert Path("t.png").read_bytes().startswith(PNG)


# ---- prune --------------------------------------------------------------------------------------------------


def zeros(state: dict[str, Any], *keys: str) -> float:
    values = torch.cat([state[key].flatten() for key in keys])
    return float((values == 0).double().mean())


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_prune_at_once(folder: Path, scope: str) -> None:
    output = good("prune", "nets.py:dense", "--sparsity", "0.75", "--scope", scope, "--out", "p.safetensors")
    assert "75.00%" in output
    assert "wrote p.safetensors" in output
    state = load_file("p.safetensors")
    assert state.keys() == load_model("nets.py:dense").state_dict().keys()
    (pruned,) = (key for key in ("0.weight", "3.weight") if zeros(state, key) > 0)
    assert pruned == "3.weight", "the first layer, with 3 channels, is kept"
    assert zeros(state, pruned) == 0.75
    again = load_model("nets.py:dense", Path("p.safetensors"))
    for key, tensor in again.state_dict().items():
        assert torch.equal(tensor, state[key])
    original = load_model("nets.py:dense").state_dict()
    assert torch.equal(original["0.weight"], state["0.weight"])
    kept = state["3.weight"] != 0
    assert torch.equal(original["3.weight"][kept], state["3.weight"][kept])


def test_prune_makes_a_file_for_everyone(folder: Path) -> None:
    good("prune", "nets.py:dense", "--sparsity", "0.5")
    usual = stat.S_IMODE(os.stat("nets.py").st_mode)
    assert stat.S_IMODE(os.stat("pruned.safetensors").st_mode) == usual
    assert contents(folder).keys() == {"nets.py", "pruned.safetensors"}


def test_prune_an_exported_program(folder: Path, program_file: Path) -> None:
    good("prune", program_file, "--sparsity", "0.95")
    state = load_file("pruned.safetensors")
    assert zeros(state, "conv2d_1.weight") == pytest.approx(0.95, abs=0.002)
    good("bench", program_file, *SHAPE, "--weights", "pruned.safetensors", "--seconds", "0.1")


@pytest.mark.parametrize("batches", ["nets.py:batches", "nets:make_batches"])
def test_prune_gradually(folder: Path, batches: str) -> None:
    output = good("prune", "nets.py:dense", "--sparsity", "0.75", "--train", batches, "--epochs", "2")
    assert "75.00%" in output
    state = load_file("pruned.safetensors")
    original = load_model("nets.py:dense").state_dict()
    assert state.keys() == original.keys()
    assert zeros(state, "3.weight") == 0.75
    assert not torch.equal(state["0.weight"], original["0.weight"]), "it was trained"
    load_model("nets.py:dense", Path("pruned.safetensors"))


# ---- quickstart ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_quickstart(folder: Path) -> None:
    output = good("quickstart", "--images", "32", "--batch", "4", "--trials", "1", "--out", folder / "out")
    shares = {name: float(share) for name, share in re.findall(r"accuracy (.*?): (\d+\.\d+)%", output)}
    assert shares.keys() == {"dense", "pruned, torch", "pruned, numbasparse"}
    assert shares["pruned, torch"] == shares["pruned, numbasparse"]
    assert min(shares.values()) > 75
    assert re.search(r"whole model: \d+\.\d\d times the best dense speed", output)
    assert len(autotune.load(folder / "out" / "tuned.json").layers) > 5
    assert (folder / "out" / "layers.png").read_bytes().startswith(PNG)
    assert sorted(p.name for p in (folder / "out").iterdir()) == [
        "layers.png",
        "model.safetensors",
        "quickstart.json",
        "tuned.json",
    ]


def test_quickstart_into_a_file(folder: Path) -> None:
    assert "nets.py" in bad("quickstart", "--out", "nets.py", "--images", "4")


# ---- wrong inputs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nets", "expected 'module:name' or 'file.py:name', got 'nets'"),
        ("nets.py", "'module:name'"),
        ("", "'module:name'"),
        (":make", "'module:name'"),
        ("nets:", "'module:name'"),
        ("nets:make()", "'module:name'"),
        ("nets:absent", "nets has no 'absent'"),
        ("nets.py:absent", "nets.py has no 'absent'"),
        ("no_such_module:make", "no_such_module"),
        ("absent.py:make", "there is no file absent.py"),
        ("absent.pt2", "there is no file absent.pt2"),
        ("nets.py:number", "must give a torch.nn.Module, it gave int"),
        ("nets.py:text", "must give a torch.nn.Module, it gave str"),
        ("nets.py:broken", "the factory's own fault"),
        ("nets.py:needs", "argument"),
    ],
)
def test_wrong_models(folder: Path, name: str, words: str) -> None:
    for command in (("tune", name, *SHAPE), ("bench", name, *SHAPE), ("prune", name, "--sparsity", "0.5")):
        assert words in bad(*command)
    assert contents(folder).keys() == {"nets.py"}


def test_models_without_convolutions(folder: Path) -> None:
    shape = ("--input", "2,8")
    assert "no Conv2d" in bad("tune", "nets.py:no_convolution", *shape)
    assert "a linear layer at density 100.0%" in bad("bench", "nets.py:no_convolution", *shape)
    assert "density" in bad("bench", "nets.py:dense", *SHAPE)


def test_interrupted(folder: Path) -> None:
    result = run("tune", "nets.py:stopped", *SHAPE)
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")


@pytest.mark.parametrize(
    "shape",
    ["", "3", "a,b", "2,,10,10", "2,3,10,ten", "2,3,10.5,10", "0,3,10,10", "-1,3,10,10", "2x3x10x10"],
)
def test_no_shapes(folder: Path, shape: str) -> None:
    for command in ("tune", "bench"):
        assert f"positive numbers like '1,3,224,224', got {shape!r}" in bad(command, "nets.py:make", f"--input={shape}")
    assert contents(folder).keys() == {"nets.py"}


@pytest.mark.parametrize(
    "shape", ["2,4,10,10", "2,3", "2,3,10,10,10", "99999999999999999999,3,10,10", "4000000,4000000,4000,4000"]
)
def test_wrong_shapes(folder: Path, shape: str) -> None:
    for command in ("tune", "bench"):
        line = bad(command, "nets.py:make", f"--input={shape}")
        assert line.startswith(f"the model does not run on an input of shape {shape}: ")
        assert len(line) < 400
    assert contents(folder).keys() == {"nets.py"}


def test_a_shape_that_a_program_was_not_exported_for(folder: Path, program_file: Path) -> None:
    for command in ("tune", "bench"):
        assert "does not run on an input of shape 3,3,10,10" in bad(command, program_file, "--input", "3,3,10,10")


def test_corrupt_programs(folder: Path, program_file: Path) -> None:
    whole = program_file.read_bytes()
    with zipfile.ZipFile("other.pt2", "w") as other:
        other.writestr("readme.txt", "no program")
    wrong = {"empty": b"", "text": b"hello", "cut": whole[: len(whole) // 2], "other": Path("other.pt2").read_bytes()}
    middle = whole.index(b"graph_module")
    wrong["changed"] = whole[:middle] + b"hraph_module" + whole[middle + 12 :]
    for name, blob in wrong.items():
        Path(f"{name}.pt2").write_bytes(blob)
        assert f"{name}.pt2 is no exported program" in bad("bench", f"{name}.pt2", *SHAPE)
    Path("folder.pt2").mkdir()
    assert "there is no file folder.pt2" in bad("bench", "folder.pt2", *SHAPE)


def edited(blob: bytes, change: Callable[[dict[str, Any]], Any]) -> bytes:
    file = json.loads(blob)
    change(file)
    return json.dumps(file).encode()


def test_wrong_tuned_files(folder: Path, tuned_file: bytes) -> None:
    wrong = {
        "empty": (b"", "truncated or corrupt"),
        "cut": (tuned_file[:-100], "truncated or corrupt"),
        "bytes": (b"\xff\x00\x80", "truncated or corrupt"),
        "list": (b"[]", "array"),
        "foreign": (b'{"format": "other", "version": 1}', "its format is 'other'"),
        "newer": (edited(tuned_file, lambda f: f.update(version=2)), "version is 2"),
        "gpu": (edited(tuned_file, lambda f: f["device"].update(kind="gpu")), "kind 'gpu'"),
        "lanes": (edited(tuned_file, lambda f: f["device"].update(lanes=3)), "3 float32 lanes"),
        "field": (edited(tuned_file, lambda f: f.pop("layers")), "layers"),
        "kernel": (edited(tuned_file, lambda f: f["layers"][0]["choice"].update(kernel="magic")), "'magic' is unknown"),
        "spec": (edited(tuned_file, lambda f: f["layers"][1]["spec"].update(n=0)), "layers[1]"),
    }
    for name, (blob, words) in wrong.items():
        Path(f"{name}.json").write_bytes(blob)
        commands = [("report", f"{name}.json"), ("bench", "nets.py:make", *SHAPE, "--tuned", f"{name}.json")]
        if name == "lanes":
            good(*commands.pop(0))  # a file of another processor can be looked at
        for command in commands:
            line = bad(*command)
            assert f"{name}.json" in line
            assert words in line
    assert "bad.png" not in contents(folder)
    assert "absent.json" in bad("report", "absent.json")
    assert "absent.json" in bad("bench", "nets.py:make", *SHAPE, "--tuned", "absent.json")
    bad("report", ".")


def test_wrong_weights(folder: Path) -> None:
    state = load_model("nets.py:make").state_dict()
    good_file = folder / "good.safetensors"
    save_file(state, good_file)
    save_file({k: v for k, v in state.items() if k != "3.weight"}, "missing.safetensors")
    save_file({**state, "more": torch.ones(1)}, "more.safetensors")
    save_file({**state, "3.weight": torch.ones(8, 8, 1, 1)}, "shape.safetensors")
    Path("cut.safetensors").write_bytes(good_file.read_bytes()[:-50])
    Path("text.safetensors").write_text("hello")
    Path("empty.safetensors").write_bytes(b"")
    expected = {"missing": "3.weight", "more": "more", "shape": "3.weight", "cut": "", "text": "", "empty": ""}
    for name, words in expected.items():
        for command in (("bench", "nets.py:make", *SHAPE), ("prune", "nets.py:make", "--sparsity", "0.9")):
            line = bad(*command, "--weights", f"{name}.safetensors")
            assert line.startswith(f"{name}.safetensors does not hold weights of this model")
            assert words in line
    assert "there is no file no.safetensors" in bad("bench", "nets.py:make", *SHAPE, "--weights", "no.safetensors")
    assert "pruned.safetensors" not in contents(folder)


@pytest.mark.parametrize("sparsity", ["1", "1.5", "-0.1", "90", "nan", "inf", "0.9999"])
def test_wrong_sparsities(folder: Path, sparsity: str) -> None:
    for more in ((), ("--train", "nets.py:batches")):
        assert "sparsity" in bad("prune", "nets.py:dense", f"--sparsity={sparsity}", *more)
    assert contents(folder).keys() == {"nets.py"}


def test_wrong_devices(folder: Path) -> None:
    assert "device must be 'cpu', 'cuda' or a certain GPU" in bad("tune", "nets.py:make", *SHAPE, "--device", "tpu")
    prune = ("prune", "nets.py:dense", "--sparsity", "0.5")
    for more in ((), ("--train", "nets.py:batches")):
        assert "device 'nonsense' cannot be used" in bad(*prune, *more, "--device", "nonsense")
        if not torch.cuda.is_available():
            assert "device 'cuda' cannot be used" in bad(*prune, *more, "--device", "cuda")
    assert contents(folder).keys() == {"nets.py"}


def test_wrong_training(folder: Path) -> None:
    prune = ("prune", "nets.py:dense", "--sparsity", "0.5", "--train")
    assert "nets.py has no 'absent'" in bad(*prune, "nets.py:absent")
    assert "must have a length" in bad(*prune, "nets.py:stream")
    assert "must have a length" in bad(*prune, "nets.py:number")
    assert "lr" in bad(*prune, "nets.py:batches", "--lr", "-1")
    (folder / "none.py").write_text("batches = []")
    assert "no batches" in bad(*prune, "none.py:batches")
    assert contents(folder).keys() == {"nets.py", "none.py"}


def test_wrong_timeouts_and_journals(folder: Path) -> None:
    for timeout in ("0", "-1", "nan"):
        assert "timeout" in bad("tune", "nets.py:make", *SHAPE, "--timeout", timeout)
    Path("journal").write_text("dear diary\n")
    assert "journal" in bad("tune", "nets.py:make", *SHAPE, "--storage", "journal")
    assert Path("journal").read_text() == "dear diary\n"


@pytest.mark.parametrize("out", ["absent/file", "nets.py/file", "existing"])
def test_unwritable_outputs(folder: Path, tuned_file: bytes, out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("t.json").write_bytes(tuned_file)
    Path("existing").mkdir()
    before = contents(folder)

    def too_late(*_: Any, **__: Any) -> None:
        raise AssertionError("the work was begun")

    monkeypatch.setattr(autotune.model, "tune_layers", too_late)  # type: ignore[attr-defined]
    for command in (
        ("tune", "nets.py:make", *SHAPE, "--out", out),
        ("prune", "nets.py:dense", "--sparsity", "0.5", "--out", out),
        ("report", "t.json", "--plot", out),
    ):
        assert f"cannot write {out}" in bad(*command)
    assert contents(folder) == before
    assert list(Path("existing").iterdir()) == []


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_folders_without_permission(folder: Path) -> None:
    Path("locked").mkdir(mode=0o500)
    assert "cannot write" in bad("prune", "nets.py:dense", "--sparsity", "0.5", "--out", "locked/p.safetensors")


def test_a_failing_write_leaves_what_was_there(
    folder: Path, tuned_file: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("t.json", "p.safetensors", "p.png"):
        Path(name).write_bytes(tuned_file)
    before = contents(folder)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    monkeypatch.setattr(Path, "replace", full)
    for command in (
        ("tune", "nets.py:make", *SHAPE, "--trials", "1", "--out", "t.json"),
        ("prune", "nets.py:dense", "--sparsity", "0.5", "--out", "p.safetensors"),
        ("report", "t.json", "--plot", "p.png"),
    ):
        result = run(*command)
        assert result.exit_code == 1
        assert "No space left" in result.stderr
        assert contents(folder) == before


@pytest.mark.parametrize("arguments", [("report", "absent.json"), ("bench", "text.pt2", *SHAPE)])
def test_as_a_program(folder: Path, arguments: tuple[str, ...]) -> None:
    """Exit status and streams of a process of its own: here torch would log a traceback for a corrupt file."""
    Path("text.pt2").write_text("hello")
    command = [sys.executable, "-c", "from numbasparse.cli import main; main()", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
