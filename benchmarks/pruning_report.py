"""Tables and the plot of ``benchmarks/results/pruning.json``.

python benchmarks/pruning_report.py [--results FILE] [--plot PNG]
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]

FORMS = [("codebook", 8), ("codebook", 4), ("codebook", 3), ("linear", 8), ("linear", 4), ("linear", 3)]
NETWORKS = {"resnet18": "ResNet-18, half width", "vgg16": "VGG-16, half width"}


def spread(values: Iterable[float]) -> str:
    """Mean, sample standard deviation and number of accuracies, in percent."""
    percents = [100.0 * value for value in values]
    if not percents:
        return ""
    mean = f"{statistics.mean(percents):.2f}"
    return f"{mean} ± {statistics.stdev(percents):.2f} ({len(percents)})" if len(percents) > 1 else f"{mean} (1)"


def chosen(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """Return the rows that have these values."""
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def trainings(rows: list[Row], group: str) -> list[int]:
    """Epochs of a group's longest trainings of each sparsity; shorter ones are there for the table of methods."""
    most: dict[float, int] = {}
    for row in chosen(rows, group=group):
        if row["sparsity"]:
            most[row["sparsity"]] = max(most.get(row["sparsity"], 0), row["epochs"])
    return sorted(set(most.values()))


def widest(rows: list[Row], group: str) -> list[Row]:
    """Return the rows of a group's trainings of most sparsities, of as many the longest ones."""
    of_epochs = [chosen(rows, group=group, epochs=epochs) for epochs in trainings(rows, group)]
    return max(of_epochs, key=lambda own: (len({row["sparsity"] for row in own}), own[0]["epochs"]))


def accuracies(rows: Iterable[Row], **wanted: Any) -> list[float]:
    return [row["accuracy"] for row in chosen(rows, **wanted)]


def table(head: list[str], body: Iterable[list[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *body)]


GROUPS = {
    "core": "Pruned from the start",
    "distilled": "From a dense checkpoint of half of the epochs, which teaches the pruned networks",
    "committee": "The same, taught by the dense checkpoints of three seeds together",
    "faculty": "The same, taught by the dense checkpoints of three seeds of both networks together",
}


def of_group(rows: list[Row], group: str, network: str, epochs: int) -> list[Row]:
    """Return the rows of a group; dense networks without a teacher are the same in all but `core` for equal epochs."""
    mine = chosen(rows, group=group, network=network, epochs=epochs)
    if not mine or group == "core":
        return mine
    own = {row["seed"] for row in chosen(mine, sparsity=0.0)}
    for other in GROUPS.keys() - {"core", group}:
        dense = chosen(rows, group=other, network=network, sparsity=0.0, epochs=epochs)
        same = [row for row in dense if row.get("distilled") is False or row.get("fine_epochs")]
        mine += [row for row in same if row["seed"] not in own]
    return mine


def networks(rows: list[Row]) -> list[str]:
    """Accuracy of dense and pruned networks, as trained, trained longer, and quantized."""
    head = ["sparsity", "as trained", "longer", *(f"{kind} {bits} bit" for kind, bits in FORMS)]
    lines: list[str] = []
    for group, what in GROUPS.items():
        for epochs, network in itertools.product(trainings(rows, group), NETWORKS):
            body = by_form(of_group(rows, group, network, epochs))
            if body:
                lines += ["", f"{NETWORKS[network]}. {what}, {epochs} epochs in all:", "", *table(head, body)]
    return lines


def by_form(mine: list[Row]) -> list[list[str]]:
    """A line for each sparsity."""
    taught = [row for row in mine if row.get("distilled") and not row["sparsity"]]
    rest = [row for row in mine if row not in taught and "one-shot" not in row["method"]]
    body = []
    for sparsity in sorted({row["sparsity"] for row in rest}):
        here = chosen(rest, sparsity=sparsity)
        cells = [accuracies(here, method="gradual" if sparsity else "dense"), accuracies(here, method="longer")]
        cells += [accuracies(here, quantization=kind, bits=bits) for kind, bits in FORMS]
        body.append([f"{sparsity:.0%}" if sparsity else "dense", *map(spread, cells)])
    if taught:
        body.append(["dense, taught too", spread(row["accuracy"] for row in taught), *[""] * (len(FORMS) + 1)])
    return body


AIMS = ((0.9, 0.0), (0.95, 0.0), (0.98, 0.5))
"""Sparsity, and the points that its mean with a 4-bit codebook may lie below dense at the same total of epochs."""


def aims(rows: list[Row]) -> list[str]:
    """Say of each aim whether it was reached."""
    lines = []
    for group in GROUPS:
        for epochs, network in itertools.product(trainings(rows, group), NETWORKS):
            mine = of_group(rows, group, network, epochs)
            dense = accuracies(mine, sparsity=0.0, method="longer")
            for sparsity, allowed in AIMS:
                values = accuracies(mine, sparsity=sparsity, quantization="codebook", bits=4)
                if not dense or not values:
                    continue
                points = 100.0 * (statistics.mean(values) - statistics.mean(dense))
                word = "reached" if points >= -allowed else "NOT reached"
                lines.append(
                    f"- {group}, {epochs} epochs, {NETWORKS[network]}, {sparsity:.0%} with a 4-bit codebook: "
                    f"{points:+.2f} points to dense ({len(values)} and {len(dense)} seeds; "
                    f"aim: at most {allowed} below): {word}"
                )
    return lines


def method_name(row: Row) -> str:
    """How a row's network was pruned."""
    name = f"{row['method']}, {row['scope']}, V = {row['vector']}"
    return f"{name}, two of four" if row.get("two_of_four") else name


def by_sparsity(rows: list[Row], name: Callable[[Row], str], key: str = "accuracy") -> list[str]:
    """A row for each name, a column for each sparsity."""
    sparsities = sorted({row["sparsity"] for row in rows})
    names = dict.fromkeys(name(row) for row in rows)
    body = [
        [who, *(spread(row[key] for row in rows if name(row) == who and row["sparsity"] == s) for s in sparsities)]
        for who in names
    ]
    return table(["", *(f"{s:.0%}" for s in sparsities)], body)


def methods(rows: list[Row]) -> list[str]:
    """Pruning methods with the same total of epochs, and at once without retraining."""
    trained = chosen(rows, group="methods")
    epochs = sorted({row["epochs"] for row in trained})
    at_once = [row for row in rows if row["method"].endswith("one-shot") and row["group"] in ("core", "one-shot")]
    shipped = accuracies(chosen(rows, group="one-shot", method="dense, as shipped"))
    lines: list[str] = []
    if trained:
        lines += ["", f"Methods, ResNet-18, {' and '.join(map(str, epochs))} epochs in all:", ""]
        lines += by_sparsity(trained, method_name)
    if at_once:
        before = f" (dense: {100 * shipped[0]:.2f})" if shipped else ""
        lines += ["", f"At once, no retraining, the quickstart's network{before}; batch norm measured anew:", ""]
        lines += by_sparsity(at_once, lambda row: f"{row['method']}, {row['scope']}")
        lines += ["", "The same with batch norm as it was:", ""]
        lines += by_sparsity(at_once, lambda row: f"{row['method']}, {row['scope']}", "accuracy_as_pruned")
    return lines


def two_of_four(rows: list[Row]) -> list[str]:
    """What it costs a pruned network to have at most two of four neighbouring channels."""
    own = chosen(rows, group="two of four")
    if not own:
        return []
    names = {False: "as it was", True: "two of four"}
    body = [[name, spread(accuracies(own, two_of_four=flag))] for flag, name in names.items()]
    epochs = own[0]["fine_epochs"]
    title = f"The quickstart's pruned network, {epochs} epoch{'s' * (epochs > 1)} more, the same images for both:"
    return ["", title, "", *table(["", "accuracy"], body)]


def realesrgan(rows: list[Row]) -> list[str]:
    """PSNR to the dense network's output on held-out pictures."""
    mine = [row for row in rows if "psnr" in row]
    body = [[f"{r['sparsity']:.0%}", r["method"], f"{r['psnr']:.2f}", f"{min(r['each']):.2f}"] for r in mine]
    return ["", *table(["sparsity", "method", "PSNR to dense, dB", "worst picture"], body)] if body else []


def search(rows: list[Row]) -> list[str]:
    """Where the search ended."""
    lines = []
    for row in chosen(rows, method="search"):
        how = f"{row['rounds']} rounds of {row['retrain_steps']} steps" + ("" if row["finished"] else ", cut off")
        lines.append(
            f"- search: {row['reached']:.2%} sparse after {how}; accuracy on the deciding images "
            f"{row['deciding_baseline']:.2%} -> {row['deciding']:.2%}, on the others "
            f"{row['baseline']:.2%} -> {row['accuracy']:.2%}"
        )
    return lines


def plot(rows: list[Row], path: Path, group: str = "core") -> None:
    """Draw mean and spread of a group's accuracy against sparsity, for each form of the weights, into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    forms = [("float", {"method": "longer"})]
    forms += [(f"{kind} {bits} bit", {"quantization": kind, "bits": bits}) for kind, bits in FORMS]
    shown = [n for n in NETWORKS if chosen(rows, group=group, network=n)]
    figure, axes = plt.subplots(1, len(shown), figsize=(5.5 * len(shown), 4), layout="constrained", squeeze=False)
    colors = plt.get_cmap("tab10").colors  # type: ignore[attr-defined]
    for axis, network in zip(axes[0], shown, strict=True):
        mine = chosen(rows, group=group, network=network)
        sparsities = sorted({row["sparsity"] for row in chosen(mine, method="longer")})
        for number, (label, wanted) in enumerate(forms):
            found = [[100.0 * x for x in accuracies(mine, sparsity=s, **wanted)] for s in sparsities]
            if not any(found):
                continue
            places = [p + 0.08 * (number - 3) for p, values in enumerate(found) if values]
            means = [statistics.mean(values) for values in found if values]
            errors = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in found if values]
            style = "--" if label.startswith("linear") else "-"
            axis.errorbar(places, means, errors, label=label, color=colors[number], linestyle=style, marker="o", ms=4)
        axis.set_xticks(range(len(sparsities)), [f"{s:.0%}" if s else "dense" for s in sparsities])
        axis.set_title(NETWORKS[network])
        axis.set_xlabel("sparsity")
        axis.set_ylabel("test accuracy, % (mean, standard deviation)")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(fontsize=8, frameon=False)
    beside = path.with_name(path.name + ".tmp")
    try:
        figure.savefig(beside, dpi=130, format="png")
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    finally:
        plt.close(figure)


def where(run: Row) -> str:
    """Return what a run was made with."""
    return f"{', '.join(run['gpus']) or run['processor']}, torch {run['versions']['torch']}, {run['date'][:10]}"


def report(content: Row) -> list[str]:
    """All tables of a results file."""
    rows = [row for row in content["rows"] if row.get("group") != "calibrate" and row.get("method") != "search step"]
    fashion = [row for row in rows if "group" in row and row.get("judged_by") == "test"]
    lines = ["Runs: " + "; ".join(dict.fromkeys(map(where, content["runs"])))]
    rest = [*two_of_four(fashion), *realesrgan(rows), "", *search(rows)]
    return [*lines, *networks(fashion), "", *aims(fashion), *methods(fashion), *rest]


def calibration(content: Row) -> list[str]:
    """What ``calibrate`` and ``taught`` found, on held-back training images."""
    rows = chosen(content["rows"], group="calibrate")
    body = [[r["job"], f"{r['accuracy']:.2%}", f"{r['reached']:.2%}", f"{r['seconds']:.0f}"] for r in rows]
    lines = table(["", "accuracy", "sparsity", "seconds"], body) if rows else []
    taught = chosen(content["rows"], group="taught", method="gradual")
    names = dict.fromkeys(taught_by(row) for row in taught)
    body = [[name, spread(row["accuracy"] for row in taught if taught_by(row) == name)] for name in names]
    return lines + (["", *table(["ways to teach, ResNet-18 at 95 %", "accuracy"], body), ""] if taught else [])


def taught_by(row: Row) -> str:
    """Return the name of a variant of ``taught``, without its seed."""
    return str(row["job"].removeprefix("taught ").split(", seed")[0])


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description="Tables and plot of the pruning benchmark.")
    parser.add_argument("--results", type=Path, default=RESULTS / "pruning.json")
    parser.add_argument("--plot", type=Path, help="write the plot here")
    parser.add_argument("--group", choices=GROUPS, default="core", help="what to plot")
    args = parser.parse_args()
    content = json.loads(args.results.read_text())
    print("\n".join([*calibration(content), *report(content)]))
    if args.plot:
        plot(widest(content["rows"], args.group), args.plot, args.group)


if __name__ == "__main__":
    main()
