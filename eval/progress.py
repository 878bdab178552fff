"""Compare the predicted with the real end of a job, from its events.

    python eval/progress.py gptq TEXT --samples 64 --seqlen 512

It quantizes the bundled model and prints CPU seconds, which depend little on other processes. Each line is one event.
"""

import argparse
import tempfile
import time
from pathlib import Path

from llmq.config import QuantConfig
from llmq.job import Job
from llmq.report.events import Event
from llmq.report.timeline import Timeline
from llmq.setting_fields import merged

MODEL = Path(__file__).parent / "models" / "tiny-python-llama"
STEP = 0.05  # of the job, between two printed lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method")
    parser.add_argument("text")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=512)
    given = parser.parse_args()
    settings = {"method": given.method, "samples": given.samples, "seqlen": given.seqlen, "calibration": [given.text]}
    lines: list[tuple[float, str, float | None]] = []
    with tempfile.TemporaryDirectory() as folder:
        job = Job(MODEL, Path(folder) / "out", merged(QuantConfig(), settings), device="cpu")
        start, timeline = time.process_time(), Timeline(time.process_time)

        def record(event: Event) -> None:
            timeline.take(event)
            shown = f"{timeline.current} {timeline.position}"
            lines.append((time.process_time() - start, shown, timeline.remaining))

        job.run(record)
        whole, printed = time.process_time() - start, -1.0
    print(f"{given.method}: {whole:.1f} s; done, stage, predicted end compared with the real one")
    for now, shown, remaining in lines:
        if remaining is not None and now / whole >= printed + STEP:
            printed = now / whole
            print(f"{printed:5.0%}  {shown:32} {(now + remaining) / whole - 1:+.0%}")


if __name__ == "__main__":
    main()
