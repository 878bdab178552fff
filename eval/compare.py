"""Several quantized models against one original: a table, or JSON.

python eval/compare.py ORIGINAL QUANTIZED… --text FILE [--seqlen 2048] [--windows 64] [--json]
"""

import argparse

from llmq.cli.terminal import print_json, print_table, quiet_transformers
from llmq.measure import measure

COLUMNS = ("model", "bits/weight", "perplexity", "KL mean", "KL median", "KL 99 %", "same top-1")

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("original")
parser.add_argument("quantized", nargs="+")
parser.add_argument("--text", required=True)
parser.add_argument("--seqlen", type=int)
parser.add_argument("--windows", type=int)
parser.add_argument("--device", default="auto")
parser.add_argument("--json", action="store_true")

if __name__ == "__main__":
    arguments = parser.parse_args()
    quiet_transformers()
    found = {
        path: measure(
            path, arguments.original, arguments.text,
            seqlen=arguments.seqlen, limit=arguments.windows, device=arguments.device,
        )
        for path in arguments.quantized
    }  # fmt: skip
    if arguments.json:
        print_json({path: measured.to_dict() for path, measured in found.items()})
    else:
        original = next(iter(found.values())).original
        assert original is not None, "measured against the original"
        rows = [(arguments.original, "-", f"{original.perplexity:.4f}", "-", "-", "-", "-")]
        for path, measured in found.items():
            model = measured.model
            rows.append(
                (path, f"{measured.size.bits_per_weight or 0:.3f}", f"{model.perplexity:.4f}", f"{model.kl_mean:.5f}",
                 f"{model.kl_median:.5f}", f"{model.kl_99:.4f}", f"{model.same_top_1:.2%}")
            )  # fmt: skip
        print_table(arguments.text, COLUMNS, rows)
