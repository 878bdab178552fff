"""Convert a quantized checkpoint to a folder with an ONNX graph, and check the file that was written.

Every quantized weight is read back from the file and compared with the source, bit for bit. If ONNX Runtime is
installed, it runs the file, and its logits are compared with those of the float model that was traced.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmq.checkpoint import PROVENANCE_FILE
from llmq.checkpoint.atomic import sync_file, write_text
from llmq.checkpoint.index import ONNX_FILE
from llmq.checkpoint.json_text import json_text
from llmq.checkpoint.writer import CONFIG, put_companions
from llmq.errors import ConfigError, FormatError
from llmq.export import ACTIVATIONS, ONNX
from llmq.export.conversion import Conversion, conversion_identity, writing
from llmq.export.onnx import matmul_nbits, trace
from llmq.export.quantized_source import QuantizedSource
from llmq.formats import float_config
from llmq.report.events import OnEvent, Progress, ignore
from llmq.runtime.onnx_model import OnnxModel, is_installed
from llmq.verification.integrity import checksums

LEVELS = {"none": 0, "int8": 4}  # --activations -> the accuracy level of MatMulNBits
CHECKED = (2, 16)  # the shape of the tokens for which logits are compared
LARGEST, RELATIVE = 1e-4, 1e-5  # difference of logits: absolute, or relative to the largest one if that is more


class OnnxConverter:
    """One conversion to ONNX: `run` performs it, `report` is the result."""

    def __init__(
        self,
        source: str | Path,
        out: Path,
        activations: str = ACTIVATIONS[0],
        *,
        overwrite: bool = False,
        remote_code: bool = False,
    ) -> None:
        if activations not in LEVELS:
            raise ConfigError(f"activations is {activations!r}, expected one of {', '.join(LEVELS)}")
        trace.require_exporter()
        self._origin = QuantizedSource(source, out, remote_code=remote_code)
        self._packed = self._origin.packed
        self._out, self._overwrite, self._remote_code = out, overwrite, remote_code
        self._activations = activations
        self._refuse_grids()
        self.report = Conversion(str(source), str(out), self._origin.format, ONNX)
        self.report.source_bytes = self._origin.checkpoint.nbytes
        self.report.notes += self._origin.notes
        self.report.notes += self._origin.dropped_inputs(ONNX)

    def _refuse_grids(self) -> None:
        """Raise ConfigError for weights that the operator cannot hold."""
        refused = {}
        for module in self._packed.modules:
            if not self._packed.is_affine(module):
                refused[module] = (
                    f"it is stored as {self._packed.grid(module)}, expected an integer grid in plain groups"
                )
            elif (reason := matmul_nbits.refusal(self._packed.scheme(module))) is not None:
                refused[module] = reason
        if refused:
            module, reason = next(iter(refused.items()))
            more = f" ({len(refused) - 1} more weights)" if len(refused) > 1 else ""
            raise ConfigError(
                f"onnx cannot hold {module}{more} unchanged: {reason}",
                hint="quantize the original model to 2, 3, 4 or 8 bits, or use llmq convert --to compressed-tensors "
                "--allow-requantize before",
            )

    def run(self, on_event: OnEvent = ignore) -> None:
        """Convert the checkpoint. The finished folder appears at the end, unless an equal conversion has written it.

        Raises UnsupportedModelError if transformers cannot export the model, or a weight is not in the exported graph.
        """
        identity = conversion_identity(ONNX, self._origin.checkpoint.fingerprint(), activations=self._activations)
        if self.report.is_done(self._out, identity, overwrite=self._overwrite):
            return
        needed = 3 * self._origin.checkpoint.nbytes  # floats of 16 bits become 32, and a shared head may be copied
        with writing(self._out, identity, overwrite=self._overwrite, needed_bytes=needed) as writer:
            on_event(Progress("traced", 0, 1, "graphs"))
            model = trace.float_model(self._origin, remote_code=self._remote_code)
            from llmq.export.onnx.graph import Codes  # imports packages that may be missing

            codes = Codes(self._packed, LEVELS[self._activations])
            exported = trace.export(model, codes)
            on_event(Progress("traced", 1, 1, "graphs"))
            with writer.finishing() as final:
                self._write(exported, final)
                self._compare(codes, final, on_event)
                self._run(model, final)
                self.report.output_bytes = sum(file.stat().st_size for file in final.glob(f"{ONNX_FILE}*"))
                record = {**self._origin.record(self.report), "checksums": checksums(final)}
                record["conversions"][-1]["activations"] = self._activations
                write_text(final / PROVENANCE_FILE, json_text(record))

    def _write(self, exported: Any, final: Path) -> None:
        """The graph, and the files that belong to the model."""
        exported.save_pretrained(final)
        for file in final.iterdir():
            sync_file(file)
        documents = {CONFIG: json_text(float_config(self._origin.checkpoint.config))}
        put_companions(final, self._origin.companions.files, documents)

    def _compare(self, codes: Any, final: Path, on_event: OnEvent) -> None:
        """Raise FormatError if a quantized weight in the file differs from the source in any float."""
        import onnx_ir

        from llmq.export.onnx.graph import stored_weights

        stored = stored_weights(onnx_ir.load(str(final / ONNX_FILE)))
        for done, (module, (node, first)) in enumerate(codes.placed.items(), 1):
            expected = self._packed.weight(module).numpy()
            rows = stored[node].rows(first, first + len(expected))
            if not np.array_equal(rows.dequantize(), expected):
                raise FormatError(
                    f"{module} in the new file differs from the source; no model was written",
                    hint="this is a bug in llmq: please report it with the name of the model",
                )
            on_event(Progress("compared", done, len(codes.placed), "weights", module))
        self.report.compared = len(codes.placed)

    def _run(self, model: Any, final: Path) -> None:
        """Compare the logits of the file with those of the traced model; a note reports the result.

        Raises FormatError if they differ, although the products are computed in float32.
        """
        if not is_installed():
            self.report.notes.append(
                "the file was not run, because onnxruntime is not installed; each weight was compared"
            )
            return
        onnx_model = OnnxModel(final)
        tokens = np.random.default_rng(0).integers(1, model.config.get_text_config().vocab_size, CHECKED)
        with torch.no_grad():
            expected = model(input_ids=torch.from_numpy(tokens), use_cache=False).logits.numpy()
        half = CHECKED[1] // 2
        before, cache = onnx_model.run(tokens[:, :half])
        after, _ = onnx_model.run(tokens[:, half:], cache, half)
        difference = float(np.abs(np.concatenate([before, after], axis=1) - expected).max())
        limit = max(LARGEST, RELATIVE * float(np.abs(expected).max()))
        if self._activations == ACTIVATIONS[0] and not difference <= limit:
            raise FormatError(
                f"{onnx_model.engine} computes something else: logits differ by {difference:.2g}, the limit is "
                f"{limit:.2g}; no model was written",
                hint="try another version of transformers and onnxruntime; if it remains, please report it",
            )
        self.report.notes.append(f"run by {onnx_model.engine}: logits differ from llmq's by at most {difference:.2g}")
