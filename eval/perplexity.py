"""Perplexity of a model by the WikiText protocol.

    python eval/perplexity.py PATH [--text FILE] [--wikitext] [--seqlen 2048]

The same as `llmq eval PATH`, for scripts: prints one number.  Without --text the WikiText-2 test set comes from the
Hub; with --wikitext, FILE is its raw form.
"""

import argparse

from llmq.cli.eval import WIKITEXT
from llmq.cli.terminal import quiet_transformers
from llmq.evaluation.measure import measure

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("path")
parser.add_argument("--text", default=WIKITEXT)
parser.add_argument("--wikitext", action="store_true")
parser.add_argument("--seqlen", type=int)
parser.add_argument("--device", default="auto")

if __name__ == "__main__":
    arguments = parser.parse_args()
    quiet_transformers()
    measured = measure(
        arguments.path,
        None,
        arguments.text,
        wikitext=arguments.wikitext,
        seqlen=arguments.seqlen,
        device=arguments.device,
    )
    print(f"{measured.model.perplexity:.4f}")
