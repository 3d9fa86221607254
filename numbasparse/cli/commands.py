"""Commands and their options.  Every command loads what it needs when it runs."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

MODEL_HELP = """MODEL is "module:factory", "file.py:factory" (a function without arguments that returns a module)
or an exported program (.pt2)."""

# What a wrong input raises; anything else is a defect and shows its traceback.
_EXPECTED = (ValueError, TypeError, OSError, ImportError, RuntimeError)


_EXTRAS = dict.fromkeys(("torch", "optuna", "matplotlib", "PIL"), "all") | dict.fromkeys(
    ("onnx", "onnxruntime", "onnxscript"), "onnx,all"
)
"""What to install for a package that is missing."""


def _clear_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    """Print an expected error as one line, and exit with status 1."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            sys.exit(130)
        except BrokenPipeError:  # the reader of a pipe went away: click ends quietly
            raise
        except _EXPECTED as error:
            if isinstance(error, ImportError) and error.name in _EXTRAS:
                extras = _EXTRAS[error.name]
                click.echo(f"error: {error.name} is not installed: pip install 'numbasparse[{extras}]'", err=True)
            else:
                click.echo(f"error: {' '.join(str(error).split()) or type(error).__name__}", err=True)
            sys.exit(1)

    return run


def _threads_option(command: Callable[..., Any]) -> Callable[..., Any]:
    text = "Threads; all cores that the process may use if not given."
    return click.option("--threads", type=click.IntRange(1, 256), default=None, help=text)(command)


def _input_option(command: Callable[..., Any]) -> Callable[..., Any]:
    text = 'Shape of the input, for example "1,3,224,224".'
    return click.option("--input", "shape", required=True, help=text)(command)


def _quantized_option(command: Callable[..., Any]) -> Callable[..., Any]:
    text = "File of `quantize --sparse`: run the codes of those layers."
    return click.option("--quantized", type=click.Path(path_type=Path), help=text)(command)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="numbasparse")
def main() -> None:
    """Make pruned CNNs faster: prune, tune every convolution on this machine, run, export the tuned file."""


@main.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("numbasparse-quickstart"), show_default=True)
@click.option("--batch", type=click.IntRange(1, 256), default=8, show_default=True, help="Images at a time.")
@click.option("--images", type=click.IntRange(1, 2000), default=2000, show_default=True, help="Images to classify.")
@click.option("--trials", type=click.IntRange(1), default=48, show_default=True, help="Configs tried per layer.")
@_threads_option
@_clear_errors
def quickstart(out: Path, batch: int, images: int, trials: int, threads: int | None) -> None:
    """Tune and run a pruned network on real images; write tuned.json and a plot."""
    from numbasparse.cli.quickstart import run

    run(out, batch=batch, images=images, trials=trials, threads=threads)


@main.command(help=f"Choose a kernel and config for every convolution of MODEL, by measurement.\n\n{MODEL_HELP}")
@click.argument("model")
@_input_option
@click.option("--device", default="cpu", show_default=True, help='"cpu", "cuda", or a certain GPU like "cuda:1".')
@click.option("--weights", type=click.Path(path_type=Path), help="safetensors file with the model's state_dict.")
@_quantized_option
@click.option("--trials", type=click.IntRange(1), default=160, show_default=True, help="Configs tried per layer.")
@click.option("--timeout", type=float, default=None, help="Seconds for everything.")
@click.option("--storage", help="Journal file or database URL: makes the run resumable, and lets others join it.")
@click.option(
    "--workers",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="Processes that tune together: one on each GPU; on a CPU on --threads cores each.",
)
@click.option("--out", type=click.Path(path_type=Path), default=Path("tuned.json"), show_default=True)
@_threads_option
@_clear_errors
def tune(
    model: str,
    shape: str,
    device: str,
    weights: Path | None,
    quantized: Path | None,
    trials: int,
    timeout: float | None,
    storage: str | None,
    workers: int,
    out: Path,
    threads: int | None,
) -> None:
    import autotune
    from autotune.workers import own_number
    from numbasparse.cli.models import check_out, convert_model, example_input, load_model
    from numbasparse.cli.tune import tune_together

    check_out(out)
    if workers > 1:
        tune_together(workers, device, threads, storage, out)
        return
    module = load_model(model, weights)
    x = example_input(shape, module)
    tuned = autotune.tune(
        module if quantized is None else convert_model(module, x, None, quantized),
        x,
        device=device,
        trials=trials,
        timeout=timeout,
        storage=storage,
        threads=threads,
        worker=own_number(),
    )
    tuned.save(out)
    click.echo(f"wrote {out}")


@main.command(help=f"Time MODEL dense and converted, in turns.\n\n{MODEL_HELP}")
@click.argument("model")
@_input_option
@click.option("--tuned", type=click.Path(path_type=Path), help="Tuned file; the stated defaults if not given.")
@click.option("--weights", type=click.Path(path_type=Path), help="safetensors file with the model's state_dict.")
@_quantized_option
@click.option("--seconds", type=click.FloatRange(0.1), default=5.0, show_default=True, help="How long to measure.")
@click.option("--device", default="cpu", show_default=True, help='"cpu", "cuda", or a certain GPU like "cuda:1".')
@_threads_option
@_clear_errors
def bench(
    model: str,
    shape: str,
    tuned: Path | None,
    weights: Path | None,
    quantized: Path | None,
    seconds: float,
    device: str,
    threads: int | None,
) -> None:
    from numbasparse.cli.models import bench_model, check_device, example_input, load_model

    check_device(device)
    module = load_model(model, weights)
    x = example_input(shape, module)
    bench_model(module.to(device), x.to(device), tuned, seconds, threads, quantized)


@main.command(help=f"Convert MODEL and save it as OUT (.safetensors), which `run` and nn.load take.\n\n{MODEL_HELP}")
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@_input_option
@click.option("--tuned", type=click.Path(path_type=Path), help="Tuned file; the stated defaults if not given.")
@click.option("--weights", type=click.Path(path_type=Path), help="safetensors file with the model's state_dict.")
@_quantized_option
@_clear_errors
def convert(
    model: str, out: Path, shape: str, tuned: Path | None, weights: Path | None, quantized: Path | None
) -> None:
    from numbasparse.cli.run import convert_file

    convert_file(model, out, shape, tuned, weights, quantized)


@main.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--input",
    "given",
    required=True,
    help="An array (.npy), a picture, a folder of pictures of one size (values of 0 to 1, RGB, or gray for a model of "
    'one channel), or a shape like "1,3,224,224".',
)
@click.option("--tuned", type=click.Path(path_type=Path), help="Tuned file of this machine; else as MODEL was saved.")
@click.option("--output", type=click.Path(path_type=Path), help="Write the result (.npy; .npz of several).")
@click.option("--repeat", type=click.IntRange(1), default=10, show_default=True, help="Calls to time.")
@_threads_option
@_clear_errors
def run(model: Path, given: str, tuned: Path | None, output: Path | None, repeat: int, threads: int | None) -> None:
    """Run a MODEL of `convert`: its layers, what comes out, how long it takes. Needs none of the model's own code."""
    from numbasparse.cli.run import run_file

    run_file(model, given, tuned, output, repeat, threads)


@main.command()
@click.argument("tuned", type=click.Path(path_type=Path))
@click.option("--plot", type=click.Path(path_type=Path), help="Also draw the layers' times into this PNG.")
@click.option("--html", type=click.Path(path_type=Path), help="Write one HTML page that needs no other file.")
@click.option("--png", type=click.Path(path_type=Path), help="Write the page's pictures into this folder.")
@click.option(
    "--results",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Show this file too: results of a layer benchmark, another tuned file, quickstart.json, or points of "
    "accuracy and time. May be given several times.",
)
@click.option("--weights", type=click.Path(path_type=Path), help="File of `quantize --sparse`: show its footprint.")
@click.option("--peak", help='The roof of the roofline: "GFLOP/s,GB/s" of the device, for example "66900,3350".')
@click.option("--measure-peak", is_flag=True, help="Measure the roof on this CPU.")
@_clear_errors
def report(
    tuned: Path,
    plot: Path | None,
    html: Path | None,
    png: Path | None,
    results: tuple[Path, ...],
    weights: Path | None,
    peak: str | None,
    measure_peak: bool,
) -> None:
    """Print the table of a TUNED file, of any device; write its report as a page and as pictures."""
    from numbasparse.cli import report as page

    extras = page.Extras(results, weights, peak, measure_peak)
    page.run(tuned, page.Outputs(plot, html, png), extras)


@main.command(help=f"Prune MODEL: at once by magnitude, with calibration data, or with retraining.\n\n{MODEL_HELP}")
@click.argument("model")
@click.option("--sparsity", type=float, required=True, help="Share of zeros, for example 0.9.")
@click.option(
    "--scope",
    type=click.Choice(["global", "layer", "uniform+", "erk", "lamp"]),
    help="How the weights kept are spread over layers; global, or layer with --calibrate, if not given.",
)
@click.option(
    "--vector",
    type=click.Choice(["1", "2", "4", "8", "16"]),
    default="1",
    show_default=True,
    help="Output channels that share a column's fate.",
)
@click.option(
    "--two-of-four",
    is_flag=True,
    help="At most two of every four neighbouring input channels: fastest on sparse tensor cores.",
)
@click.option(
    "--reorder",
    is_flag=True,
    help="Then order channels so that few neighbouring four hold more than two: the same outputs, faster on those.",
)
@click.option("--weights", type=click.Path(path_type=Path), help="safetensors file with the model's state_dict.")
@click.option(
    "--train",
    help='Retrain on these batches: "module:name" or "file.py:name" of an iterable of (x, y), or of a function '
    "that returns one.",
)
@click.option(
    "--schedule",
    type=click.Choice(["cubic", "acdc"]),
    default="cubic",
    show_default=True,
    help="With --train: sparsity rises over the first half, or compressed and dense phases alternate.",
)
@click.option("--checkpoint", type=click.Path(), help="With --train: file to write, and to resume from after a kill.")
@click.option(
    "--calibrate",
    help="Prune at once by second-order information from these batches (named as for --train), without retraining.",
)
@click.option("--epochs", type=click.IntRange(1), default=10, show_default=True, help="Epochs of retraining.")
@click.option("--lr", type=float, default=0.05, show_default=True, help="Learning rate of retraining.")
@click.option("--device", default="cpu", show_default=True, help="Device of retraining or calibration.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("pruned.safetensors"), show_default=True)
@_clear_errors
def prune(
    model: str,
    sparsity: float,
    scope: str | None,
    vector: str,
    two_of_four: bool,
    reorder: bool,
    weights: Path | None,
    train: str | None,
    schedule: str,
    checkpoint: str | None,
    calibrate: str | None,
    epochs: int,
    lr: float,
    device: str,
    out: Path,
) -> None:
    from numbasparse.cli.models import check_device, check_out, load_model, load_object, save_state
    from numbasparse.cli.prune import (
        Retraining,
        prune_at_once,
        prune_with_calibration,
        prune_with_retraining,
        reorder_and_report,
    )
    from numbasparse.pruning import MagnitudePruning, OBSPruning

    if train is not None and calibrate is not None:
        raise ValueError("--train and --calibrate exclude each other: prune with retraining, or at once with data")
    if checkpoint is not None and train is None:
        raise ValueError("--checkpoint needs --train: pruning at once has nothing to resume")
    if reorder and vector != "1":
        raise ValueError("--reorder and --vector exclude each other: channels of a vector would be neighbours no more")
    check_out(out)
    check_device(device)
    data: Any = {"sparsity": sparsity, "vector": int(vector), "two_of_four": two_of_four}
    data |= {} if scope is None else {"scope": scope}
    module = load_model(model, weights, trainable=train is not None)
    if calibrate is not None:
        prune_with_calibration(module, load_object(calibrate), OBSPruning(**data), device)
    elif train is not None:
        options = Retraining(schedule, epochs, lr, device, checkpoint)
        prune_with_retraining(module, load_object(train), MagnitudePruning(**data), options)
    else:
        prune_at_once(module, MagnitudePruning(**data))
    if reorder:
        reorder_and_report(module)
    save_state(module, out)
    click.echo(f"wrote {out}")


@main.command(help=f"Quantize MODEL's weights, at once or with retraining; zeros stay zero.\n\n{MODEL_HELP}")
@click.argument("model")
@click.option("--bits", type=click.IntRange(2, 8), required=True, help="Bits of a weight.")
@click.option(
    "--levels",
    type=click.Choice(["codebook", "linear"]),
    default="codebook",
    show_default=True,
    help="Values found by k-means, or evenly spaced ones.",
)
@click.option("--group", type=click.IntRange(1), help="Codebook: output channels that share one; all if not given.")
@click.option("--affine", is_flag=True, help="Linear: levels from the least to the greatest weight.")
@click.option("--per-channel", is_flag=True, help="Linear: a scale for each output channel.")
@click.option(
    "--range",
    "range_",
    type=click.Choice(["minmax", "percentile", "mse"]),
    default="minmax",
    show_default=True,
    help="Linear: the range of the levels.",
)
@click.option("--weights", type=click.Path(path_type=Path), help="safetensors file with the model's state_dict.")
@click.option(
    "--train",
    help='Retrain on these batches: "module:name" or "file.py:name" of an iterable of (x, y), or of a function '
    "that returns one.",
)
@click.option("--epochs", type=click.IntRange(1), default=3, show_default=True, help="Epochs of retraining.")
@click.option("--lr", type=float, default=0.005, show_default=True, help="Learning rate of retraining.")
@click.option("--device", default="cpu", show_default=True, help="Device of retraining or calibration.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("quantized.safetensors"), show_default=True)
@click.option(
    "--sparse", type=click.Path(path_type=Path), help="Also write the layers' codes, bit-packed, into this file."
)
@_clear_errors
def quantize(
    model: str,
    bits: int,
    levels: str,
    group: int | None,
    affine: bool,
    per_channel: bool,
    range_: str,
    weights: Path | None,
    train: str | None,
    epochs: int,
    lr: float,
    device: str,
    out: Path,
    sparse: Path | None,
) -> None:
    from numbasparse.cli.models import check_device, check_out, load_model, load_object, save_state
    from numbasparse.cli.quantize import config_of, quantize_at_once, quantize_with_retraining
    from numbasparse.weight import save_weights

    config = config_of(bits, levels, group=group, affine=affine, per_channel=per_channel, range_=range_)
    for path in (out, sparse):
        if path is not None:
            check_out(path)
    check_device(device)
    module = load_model(model, weights, trainable=train is not None)
    if train is None:
        report = quantize_at_once(module, config)
    else:
        batches = load_object(train)
        report = quantize_with_retraining(module, batches, config, epochs=epochs, lr=lr, device=device)
    save_state(module, out)
    click.echo(f"wrote {out}")
    if sparse is not None:
        save_weights(sparse, report.weights)
        click.echo(f"wrote {sparse}")


@main.command("import")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--input", "shape", help='Shape of the input where the file leaves it open, for example "1,3,224,224".')
@click.option("--report", is_flag=True, help="Also print every layer that was made, with its share of zeros.")
@click.option("--fallback", is_flag=True, help="Run a file that cannot be imported once through onnxruntime.")
@_clear_errors
def import_(model: Path, out: Path, shape: str | None, report: bool, fallback: bool) -> None:
    """Import an ONNX file of a convolutional net as an exported program OUT (.pt2), which tune and bench take."""
    from numbasparse.cli.onnx import import_file

    if out.suffix != ".pt2":
        raise ValueError(f"expected a file name that ends in .pt2, got {str(out)!r}")
    import_file(model, out, shape, report, fallback)


@main.command(
    "export-onnx",
    help=f"Write MODEL (or an .onnx file) as ONNX, pruned weights as sparse initializers.\n\n{MODEL_HELP}",
)
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--input", "shape", help='Shape of the input, for example "1,3,224,224"; not for an .onnx file.')
@click.option("--weights", type=click.Path(path_type=Path), help="safetensors file with the model's state_dict.")
@click.option("--threshold", type=click.FloatRange(0, 1), default=0.7, show_default=True, help="Least share of zeros.")
@_clear_errors
def export_onnx(model: str, out: Path, shape: str | None, weights: Path | None, threshold: float) -> None:
    from numbasparse.cli.onnx import export_file

    export_file(model, weights, shape, out, threshold)


@main.command()
@click.argument("picture", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--model", type=click.Choice(["realesrgan"]), default="realesrgan", show_default=True)
@click.option(
    "--weights",
    type=click.Path(path_type=Path),
    help="safetensors file of an RRDBNet's state_dict (6, 23, any number of blocks), dense or pruned; the fetched "
    "one if not given.",
)
@click.option("--dense-weights", type=click.Path(path_type=Path), help="Compare with these; --weights if not given.")
@click.option(
    "--sparsity",
    type=click.FloatRange(0, 1, max_open=True),
    help="Prune to this share of zeros, at once with crops of the picture; 0.9 if not given. Weights that have as "
    "many are run as they are.",
)
@click.option(
    "--steps",
    type=click.IntRange(0),
    default=100,
    show_default=True,
    help="After pruning, learn from the dense network on the picture for so many steps (seconds each): without any "
    "the picture is spoilt at 90 %.",
)
@click.option("--save-pruned", type=click.Path(path_type=Path), help="Write the pruned weights, for --weights or tune.")
@click.option("--tuned", type=click.Path(path_type=Path), help="Tuned file; the stated defaults if not given.")
@click.option("--tile", type=click.IntRange(16, 4096), default=128, show_default=True, help="Size of a tile in pixels.")
@click.option(
    "--overlap",
    type=click.IntRange(0, 4096),
    default=16,
    show_default=True,
    help="Pixels around a tile that are computed too. With all that the network sees (94 with 6 blocks, 349 with 23) "
    "the result is that of the whole picture.",
)
@click.option("--compare", type=click.Path(path_type=Path), help="Write bicubic, dense and sparse side by side (PNG).")
@click.option("--dense/--no-dense", default=True, show_default=True, help="Run the dense network too, in turns.")
@click.option("--device", default="cpu", show_default=True, help='"cpu", "cuda", or a certain GPU like "cuda:1".')
@_threads_option
@_clear_errors
def upscale(picture: Path, out: Path, model: str, **options: Any) -> None:
    """Enlarge PICTURE four times with a pruned network and write OUT (PNG)."""
    from numbasparse.cli.upscale import Options, run

    run(picture, out, Options(**options))
