"""Write all results as tables into ``benchmarks/tables.md``: ``python benchmarks/tables.py``."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pruning_report
from common import RESULTS, geometric_mean

TABLES = RESULTS.parent / "tables.md"

SPARSITIES = ("80%", "90%", "95%", "98%")


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text())


def layers(name: str) -> list[str]:
    """Ratios to the best stock dense, layer by layer, for each batch."""
    content = load(name)
    rows = content["rows"]
    batches = sorted({row["n"] for row in rows})
    head = " | ".join(f"N={n}: dense µs | {' / '.join(SPARSITIES)} | vs prepacked" for n in batches)
    lines = [describe(content), "", f"| layer | {head} |", "|---" * (1 + 3 * len(batches)) + "|"]
    names = dict.fromkeys(row["layer"].rsplit(" N=", 1)[0] for row in rows)
    for layer in names:
        cells = [layer]
        for n in batches:
            row = next(r for r in rows if r["n"] == n and r["layer"].startswith(f"{layer} N="))
            stock = min(row["dense"]["nchw"]["median_us"], row["dense"]["nhwc"]["median_us"])
            ours = row["ours"]
            cells += [f"{stock:.0f}", ratios(ours, "ratio"), ratios(ours, "ratio_prepacked")]
        lines.append("| " + " | ".join(cells) + " |")
    cells = ["**geometric mean**"]
    for n in batches:
        ours_of_all = [row["ours"] for row in rows if row["n"] == n]
        cells.append("")
        for key in ("ratio", "ratio_prepacked"):
            means = [geometric_mean([ours[s][key] for ours in ours_of_all]) for s in SPARSITIES]
            cells.append("**" + " / ".join(f"{m:.1f}" for m in means) + "**")
    return [*lines, "| " + " | ".join(cells) + " |"]


def ratios(ours: dict[str, Any], key: str) -> str:
    return " / ".join(f"{ours[s][key]:.1f}" for s in SPARSITIES)


def awkward(name: str) -> list[str]:
    content = load(name)
    lines = [describe(content), "", "| convolution | sparsity | dense µs | ours µs | ratio |", "|---|---|---|---|---|"]
    for row in content["rows"]:
        stock = min(row["times"]["nchw"]["median_us"], row["times"]["nhwc"]["median_us"])
        mine = row["times"]["ours"]["median_us"]
        lines.append(f"| {row['layer']} | {row['sparsity']:.0%} | {stock:.0f} | {mine:.0f} | {row['ratio']:.1f} |")
    return lines


def gpu_layers(name: str) -> list[str]:
    """Ratios to the best cuDNN of the same precision, layer by layer, and what else there is to compare with."""
    content = load(name)
    kinds = ("native", "alone")
    head = ["layer", "cuDNN µs", *(f"{kind} {' / '.join(SPARSITIES)}" for kind in kinds)]
    head += ["plain CSR 90%", "cuSPARSE 90%", "cuDNN TF32", "cuDNN float16"]
    versions = content["gpu_versions"]
    gpu = ", ".join(f"{key} {value}" for key, value in versions.items())
    lines = [f"{content['gpu']['name']}; {gpu}; {content['environment']['date'][:10]}", "", f"| {' | '.join(head)} |"]
    lines.append("|---" * len(head) + "|")
    for row in content["rows"]:
        times, ratio = row["times"], row["ratios"]
        best = min(times["cudnn NCHW"]["us"], times["cudnn NHWC"]["us"])
        cells = [row["layer"], f"{best:.0f}"]
        cells += [" / ".join(f"{ratio[f'ours {kind} {s}']:.1f}" for s in SPARSITIES) for kind in kinds]
        cells += [f"{ratio['plain 90%']:.2f}", f"{ratio['cusparse 90%']:.2f}"]
        cells += [f"{max(ratio[f'{p} {layout}'] for layout in ('NCHW', 'NHWC')):.1f}" for p in ("tf32", "float16")]
        lines.append("| " + " | ".join(cells) + " |")
    for case, means in content["geometric_means"].items():
        cells = [f"**geometric mean**, {case}", ""]
        cells += ["**" + " / ".join(f"{means[f'{kind} {s}']:.1f}" for s in SPARSITIES) + "**" for kind in kinds]
        lines.append("| " + " | ".join([*cells, "", "", "", ""]) + " |")
    return lines


def tensor_layers(name: str) -> list[str]:
    """Ratios of a kernel for tensor cores to the better of cuDNN's layouts in float16, and the geometric means."""
    content = load(name)
    cases = [case.split(" (")[0].split(maxsplit=1) for case in content["geometric_means"]]
    batches = sorted({int(n.removeprefix("N=")) for n, _ in cases})
    sparsities = list(dict.fromkeys(sparsity for _, sparsity in cases))
    versions = ", ".join(f"{key} {value}" for key, value in content["gpu_versions"].items())
    found = {row["layer"]: row for row in content["rows"]}
    names = dict.fromkeys(layer.rsplit(" N=", 1)[0] for layer in found)
    head = " | ".join(f"N={n}: cuDNN µs | {' / '.join(sparsities)}" for n in batches)
    lines = [f"{content['gpu']['name']}; {versions}; {content['environment']['date'][:10]}", "", f"| layer | {head} |"]
    lines.append("|---" * (1 + 2 * len(batches)) + "|")
    for layer in names:
        cells = [layer]
        for n in batches:
            row = found.get(f"{layer} N={n} float16")
            if row is None:
                cells += ["", ""]
                continue
            cells.append(f"{min(row['times'][f'cudnn {layout}']['us'] for layout in ('NCHW', 'NHWC')):.0f}")
            found_here = (row["ratios"].get(f"ours native {s}") for s in sparsities)
            cells.append(" / ".join("–" if ratio is None else f"{ratio:.2f}" for ratio in found_here))
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, "", ", ".join(f"{case}: {mean}" for case, mean in content["geometric_means"].items())]


def models(name: str) -> list[str]:
    """Whole models: the best of torch, and the ratios to it and to each rival."""
    content = load(name)
    rivals = content["rivals"]
    sparsities = list(content["rows"][0]["ours"])
    head = " | ".join(f"vs {rival} {number}" for rival, number in rivals.items())
    lines = [
        describe({"environment": content, **content}),
        "",
        f"| model, {' / '.join(sparsities)} zeros | best of torch, ms | ours, ms | vs best of torch | {head} |",
        "|---" * (4 + len(rivals)) + "|",
    ]
    for row in content["rows"]:
        ours = [row["ours"][sparsity] for sparsity in sparsities]
        cells = [row["model"], f"{row['dense'][row['best_torch']]['median_us'] / 1000:.0f} ({row['best_torch']})"]
        cells.append(" / ".join(f"{one['median_us'] / 1000:.0f}" for one in ours))
        cells.append(" / ".join(f"{one['ratio']:.2f}" for one in ours))
        for rival in rivals:
            found = (one["ratio_to_deepsparse"] if rival == "deepsparse" else one["ratios"][rival] for one in ours)
            cells.append(" / ".join(f"{ratio:.2f}" for ratio in found))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def describe(content: dict[str, Any]) -> str:
    env = content["environment"]
    versions = env["versions"]
    return (
        f"{env['processor']}, {32 * env['vector_lanes']}-bit vectors, {content['threads']} threads; "
        f"torch {versions['torch']}, numba {versions['numba']}; {env['date'][:10]}"
    )


SECTIONS: list[tuple[str, Callable[[str], list[str]], list[str]]] = [
    (
        "Single convolutions on a CPU: ratio to the better of stock torch's NCHW and channels-last",
        layers,
        ["cpu_layers.json", "cpu_layers_avx512.json", "cpu_layers_zen4.json", "cpu_layers_xeon.json"],
    ),
    ("Convolutions on a CPU whose sizes divide nothing", awkward, ["cpu_awkward.json"]),
    (
        "Whole models on a CPU, one picture",
        models,
        [
            "models.json",
            "models_zen4.json",
            "models_zen4_run2.json",
            "models_xeon.json",
            "models_avx512.json",
            "models_avx512_run2.json",
            "models_rrdb.json",
        ],
    ),
    (
        "Single convolutions on a GPU in strict float32: ratio to the better of cuDNN's NCHW and channels-last",
        gpu_layers,
        [
            "cuda_layers.json",
            "cuda_layers_n1.json",
            "cuda_layers_n1b.json",
            "cuda_layers_h200_n8.json",
            "cuda_layers_h200_n32.json",
            "cuda_layers_h200_n128.json",
        ],
    ),
    (
        "Float16 on Hopper's sparse tensor cores, activations in CHWN (`cuda_wgmma`): ratio to the better of cuDNN's "
        "float16 layouts",
        tensor_layers,
        ["tensor_layers_ordered_n32.json", "tensor_layers.json"],
    ),
    (
        "The same in channels-last (`cuda_wgmma_nhwc`); *ordered*: input channels in the order that breaks few quads; "
        "1x1 layers again, of which two blocks may share a tile; the last table with steps that are listed",
        tensor_layers,
        [
            f"tensor_nhwc{run}.json"
            for run in ("_ordered_n32", "_ordered", "_pointwise", "_n32", "_n1", "_n8", "_n128", "")
        ],
    ),
    (
        "Float16 on tensor cores from Ampere on (`cuda_mma`), masks of single weights and of 16 x 1 vectors",
        tensor_layers,
        ["tensor_gathered.json"],
    ),
]


def text() -> str:
    """All tables as Markdown."""
    lines = ["# Measured, in full", "", "Written by `python benchmarks/tables.py` from the files in `results`."]
    for title, table, names in SECTIONS:
        lines += ["", f"## {title}"]
        for name in names:
            first, *rest = table(name)
            lines += ["", f"[{name}](results/{name}): {first}", *rest]
    accuracy = json.loads((RESULTS / "pruning.json").read_text())
    lines += ["", "## Accuracy on Fashion-MNIST", ""]
    lines += ["Test images, in percent: mean ± standard deviation (seeds).", ""]
    lines += [*pruning_report.calibration(accuracy), *pruning_report.report(accuracy)]
    return "\n".join(lines) + "\n"


def main() -> None:
    TABLES.write_text(text())


if __name__ == "__main__":
    main()
