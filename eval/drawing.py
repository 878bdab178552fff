"""Compare calibration sequences that are drawn from many documents with packed ones; prints a row per run.

    python eval/drawing.py                                   the bundled model, gptq and fast, three draws
    python eval/drawing.py --models babyllama-tok361-pad384 --methods gptq --seeds 0 1 --samples 32

Texts are those of eval/subjects.py. KL is KL(float ‖ quantized) in nats per token on the same evaluation sequences.
Each pair of rows differs only in `packing`. `documents` is the number of documents in the calibration sequences.
"""

import argparse
import itertools
import sys
import tempfile
import time
from pathlib import Path

import llmq
from llmq.cli.terminal import quiet_transformers
from llmq.evaluation.measure import measure_many

sys.path.insert(0, str(Path(__file__).resolve().parent))
from subjects import MODELS, SEQLEN, WINDOWS, folder_of, texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["tiny-python-llama"])
    parser.add_argument("--methods", nargs="+", default=["gptq", "fast"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=64)
    arguments = parser.parse_args()
    quiet_transformers()
    for model in arguments.models:
        with tempfile.TemporaryDirectory() as scratch:
            compare(model, arguments, Path(scratch))


def compare(model: str, arguments: argparse.Namespace, scratch: Path) -> None:
    """Quantize one model in all ways, then measure the results together, so that the original runs once."""
    calibration, evaluation = texts(model, scratch)
    rows, folders = [], []
    for method, seed, packing in itertools.product(arguments.methods, arguments.seeds, (True, False)):
        folder, start = scratch / f"{method}-{seed}-{packing}", time.process_time()
        report = llmq.quantize(
            str(folder_of(model)), folder, method=method, seed=seed, packing=packing, seqlen=SEQLEN,
            samples=arguments.samples, calibration=calibration,
        )  # fmt: skip
        assert report.calibration is not None, "methods without text have no draws"
        documents = report.calibration["manifest"][0]["read"]
        rows.append((method, seed, "packed" if packing else "drawn", documents, time.process_time() - start))
        folders.append(folder)
    for row, measured in zip(
        rows, measure_many(folder_of(model), folders, evaluation, seqlen=SEQLEN, limit=WINDOWS), strict=True
    ):
        method, seed, drawing, documents, seconds = row
        kl = measured.model.kl_mean
        print(f"{model} {method} seed {seed} {drawing:6} documents {documents:4} KL {kl:.5f} {seconds:.1f} CPU-s")


if __name__ == "__main__":
    main()
