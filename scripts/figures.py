"""Draw the figures of docs/QUANTIZATION.md from measured results and from the bundled model.

    python scripts/figures.py                    draw all figures into docs/pictures
    python scripts/figures.py --measure TEXT     first measure the errors of layers, which takes a minute

The figures need matplotlib (extra `plots`). Equal results give equal figures with the same version of matplotlib.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure

import llmq
from llmq.checkpoint.reader import Checkpoint
from llmq.config import QuantConfig
from llmq.numerics import affine_grid
from llmq.numerics.scheme import WeightScheme
from llmq.setting_fields import merged

ROOT = Path(__file__).resolve().parents[1]
PICTURES, RESULTS = ROOT / "docs" / "pictures", ROOT / "eval" / "results"
MODEL = ROOT / "eval" / "models" / "tiny-python-llama"
LAYER_ERRORS = RESULTS / "layer_errors.json"
ROW = ("model.layers.0.mlp.down_proj.weight", 5, 128)  # the name of a weight, a row of it, and the columns of a group
COLOURS = {"rtn": "#7f7f7f", "gptq": "#1f77b4", "fast": "#d95f02", "balanced": "#1b7837"}  # readable on white
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "llmq", "font.family": "sans-serif", "axes.grid": True,
         "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}  # fmt: skip


def grid() -> Figure:
    """One group of weights, and the values that 4 bits offer with two scales."""
    name, row, columns = ROW
    weight = Checkpoint.open(MODEL).tensor(name)[row : row + 1, :columns].to(torch.float32)
    scheme = WeightScheme(4, columns)
    figure, axes = figure_of(2, 1, height=3.6, sharex=True)
    titles = "the scale that covers all weights", "the scale with the least error"
    for place, title, fit in zip(axes, titles, (affine_grid.fit_minmax, affine_grid.fit_searched), strict=True):
        chosen = fit(weight, scheme, torch.float16)
        scale = float(chosen.scales)
        values = torch.arange(-8, 8) * scale
        nearest = values[(weight[0, :, None] - values).abs().argmin(1)]
        error = float((weight[0] - nearest).square().sum() / weight.square().sum())
        place.vlines(values, 0, 1, colors=COLOURS["gptq"], linewidth=1.2, label="values of the grid")
        place.plot(weight[0], torch.full((columns,), 0.5), "|", color="black", markersize=14, label="weights")
        place.set_title(f"{title}: step {abs(scale):.4f}, squared error {error:.2%}", fontsize=10, loc="left")
        place.set_yticks([])
        place.grid(visible=False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", fontsize=8, ncols=2)
    axes[-1].set_xlabel(f"{columns} weights of one row of {name.removesuffix('.weight')}")
    return figure


def layers() -> Figure:
    """The error of each layer with round to nearest and with GPTQ."""
    record = json.loads(LAYER_ERRORS.read_text("utf-8"))
    errors: dict[str, list[float]] = record["layers"]
    figure, (axes,) = figure_of(1, 1, height=4.6)
    names = list(errors)
    for offset, (label, number, colour) in enumerate((("round to nearest", 1, "rtn"), ("GPTQ", 0, "gptq"))):
        heights = [100 * errors[name][number] for name in names]
        places = [place + 0.4 * offset for place in range(len(names))]
        axes.barh(places, heights, 0.4, color=COLOURS[colour], label=label)
    axes.set_yticks([place + 0.2 for place in range(len(names))], [shown(name) for name in names], fontsize=7)
    axes.invert_yaxis()
    axes.set_ylabel("block and layer")
    axes.set_xlabel("error of the layer's output on text, % of the output")
    axes.legend(loc="lower right")
    return figure


def bits() -> Figure:
    """KL divergence against bits per weight."""
    runs = [run for run in read("sweep") if run["model"] == MODEL.name and run["group_size"] == 128]
    figure, (axes,) = figure_of(1, 1, height=3.8)
    for method, colour in COLOURS.items():
        points = sorted((run["bits_per_weight"], run["kl_mean"]) for run in runs if run["method"] == method)
        axes.plot(*zip(*points, strict=True), "o-", color=colour, label=method)
    logarithmic(axes)
    axes.set_xticks(sorted({run["bits_per_weight"] for run in runs}))
    axes.xaxis.set_major_formatter("{x:.2f}")
    axes.set_xlabel("bits per weight, with scales (groups of 128)")
    axes.set_ylabel("KL divergence, nats per token")
    axes.legend()
    return figure


def equal_bytes() -> Figure:
    """KL divergence of files of equal size, for llama.cpp's quantizer and llmq."""
    runs = {(run["recipe"], run["method"]): run for run in read("imatrix") if run["model"] == MODEL.name}
    recipes = sorted({recipe for recipe, _ in runs}, key=lambda recipe: runs[recipe, "fast"]["bytes"])
    figure, (axes,) = figure_of(1, 1, height=3.6)
    methods = {"llama.cpp, imatrix": "rtn", "gptq": "gptq", "fast": "fast"}
    for offset, (method, colour) in enumerate(methods.items()):
        places = [place + 0.12 * (offset - 1) for place in range(len(recipes))]
        label = "llama.cpp with an importance matrix" if offset == 0 else f"llmq, {method}"
        heights = [runs[recipe, method]["kl_mean"] for recipe in recipes]
        axes.plot(places, heights, "o", markersize=9, color=COLOURS[colour], label=label)
    sizes = [f"{recipe}\n{runs[recipe, 'fast']['bytes'] / 1e6:.2f} MB" for recipe in recipes]
    axes.set_xticks(range(len(recipes)), sizes, fontsize=8)
    logarithmic(axes)
    axes.set_ylabel("KL divergence, nats per token")
    axes.grid(visible=False, axis="x")
    axes.legend()
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {"grid": grid, "layers": layers, "bits": bits, "equal-bytes": equal_bytes}


def figure_of(rows: int, columns: int, *, height: float, **options: Any) -> tuple[Figure, list[Any]]:
    """A figure of the width of a page, with a white ground in every theme, and its axes."""
    figure = Figure(figsize=(7, height), layout="constrained", facecolor="white")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **options).flat)


def logarithmic(axes: Any) -> None:
    """A logarithmic axis for KL divergences, with plain numbers."""
    axes.set_yscale("log")
    axes.set_yticks([0.003, 0.01, 0.03, 0.1, 0.3])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")


def shown(path: str) -> str:
    """`0 v_proj` for `model.layers.0.self_attn.v_proj`."""
    parts = path.split(".")
    return f"{parts[2]} {parts[-1]}"


def read(name: str) -> list[dict[str, Any]]:
    """The results of an experiment."""
    records: list[dict[str, Any]] = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))
    return records


def measure(text: str) -> None:
    """Write the errors of all layers: of GPTQ, and of round to nearest."""
    settings = {"method": "gptq", "samples": 32, "seqlen": 256, "calibration": [text], "validate": 0}
    with tempfile.TemporaryDirectory() as folder:
        report = llmq.quantize(MODEL, Path(folder) / "out", config=merged(QuantConfig(), settings), device="cpu")
    errors = {layer.name: [layer.error, layer.rtn_error] for block in report.blocks for layer in block.layers}
    shortened = {**settings, "calibration": Path(text).name}
    record = {"settings": shortened, "versions": dict(report.versions), "layers": errors}
    LAYER_ERRORS.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def draw(name: str, folder: Path) -> Path:
    """Draw one figure into a folder."""
    file = folder / f"{name}.svg"
    with matplotlib.rc_context(STYLE):
        FIGURES[name]().savefig(file, format="svg", metadata={"Date": None})
    file.write_text("\n".join(line.rstrip() for line in file.read_text("utf-8").splitlines()) + "\n", encoding="utf-8")
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", metavar="TEXT")
    given = parser.parse_args()
    if given.measure:
        measure(given.measure)
    for name in FIGURES:
        file = draw(name, PICTURES)
        print(f"{file.relative_to(ROOT)}: {file.stat().st_size} bytes")


if __name__ == "__main__":
    main()
