"""The graph of a quantized model: transformers' exporter traces the float model, and products get quantized weights.

    MatMul(x, Ŵᵀ) ──► MatMulNBits(x, codes, scales, zero points)

The exporter calls `Codes.quantize` with the finished graph, after all of its optimizations. Weights that are stacked in
one product stay in one node if they have the same grid; otherwise the outputs of several nodes are concatenated.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, cast

import numpy as np
import onnx_ir
from transformers.exporters.configs import ExportFormat
from transformers.exporters.quantizers.base import ExportQuantizer

from llmq.errors import UnsupportedModelError
from llmq.export.onnx.matmul_nbits import Grid, NodeWeight, node_weight
from llmq.export.onnx.products import Columns, KnownWeights, Matrix
from llmq.runtime.checkpoint_weights import PackedWeights

DOMAIN, OPERATOR = "com.microsoft", "MatMulNBits"
PRODUCTS = ("MatMul", "FusedMatMul", "Gemm")
VIEWS = ("Transpose", "Squeeze", "Split")  # operators that give parts of a weight
PLAIN = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transBatchA": 0, "transBatchB": 0}  # what a product must have


class Codes(ExportQuantizer):  # type: ignore[misc]  # transformers is not typed
    """Puts the packed weights of a checkpoint into an exported graph.

    level   the accuracy level of all nodes: 0 computes in float32, 4 rounds inputs to 8 bits
    placed  module -> the name of the node that holds its rows, and the first of them
    """

    supported_formats = (ExportFormat.ONNX,)

    def __init__(self, packed: PackedWeights, level: int) -> None:
        super().__init__()
        self._packed, self._known, self._level = packed, KnownWeights(packed), level
        self.placed: dict[str, tuple[str, int]] = {}

    def quantize(self, model: onnx_ir.Model, sample_inputs: Any, export_format: Any) -> onnx_ir.Model:
        """Replace the products with quantized weights; raises UnsupportedModelError if a weight is not in the graph."""
        graph = model.graph
        for node in list(graph):
            matrix = _weight_of(node)
            if matrix is None:
                continue
            columns = self._known.columns(matrix)
            if any(part.module is not None for part in columns):
                self._replace(graph, node, matrix, columns)
        missing = [module for module in self._packed.modules if module not in self.placed]
        if missing:
            raise UnsupportedModelError(
                f"the exported graph has no product with {missing[0]} ({len(missing)} of {len(self._packed.modules)} "
                "quantized weights); no model was written, because these weights would be floats in it",
                hint="llmq convert --to gguf, or --to float and an exporter that knows the model",
            )
        _remove_unused(graph)
        _fix_sizes(graph)
        model.opset_imports[DOMAIN] = 1
        return model

    def _replace(self, graph: Any, node: Any, matrix: Matrix, columns: Sequence[Columns]) -> None:
        """Put nodes for runs of columns with the same grid in the place of one product."""
        outputs, added = [], []
        for grid, run in self._runs(columns):
            new = self._node(graph, node, matrix, grid, run)
            added.append(new)
            outputs.append(new.outputs[0])
        if len(outputs) > 1:
            added.append(onnx_ir.node("Concat", outputs, {"axis": -1}, name=f"{node.name}.joined"))
        if node.op_type == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None:
            added.append(onnx_ir.node("Add", [added[-1].outputs[0], node.inputs[2]], name=f"{node.name}.bias"))
        old, last = node.outputs[0], added[-1].outputs[0]
        last.name, last.shape, last.type = old.name, old.shape, old.type
        graph.insert_before(node, added)
        onnx_ir.convenience.replace_all_uses_with(old, last, replace_graph_outputs=True)
        graph.remove(node, safe=True)

    def _runs(
        self, columns: Sequence[Columns]
    ) -> Iterator[tuple[Grid | None, list[tuple[Columns, NodeWeight | None]]]]:
        """Neighbouring columns that fit into one node: of the same grid, or floats."""
        weights = [
            (part, None if part.module is None else node_weight(self._packed.read(part.module))) for part in columns
        ]
        for grid, run in groupby(weights, key=lambda entry: None if entry[1] is None else entry[1].grid):
            yield grid, list(run)

    def _node(
        self, graph: Any, node: Any, matrix: Matrix, grid: Grid | None, run: Sequence[tuple[Columns, NodeWeight | None]]
    ) -> Any:
        """A node for one run of columns, and its weight as initializers."""
        start, stop = run[0][0].start, run[-1][0].stop
        if grid is None:
            name = f"{node.name}.columns{start}"
            value = _initializer(graph, name, np.ascontiguousarray(matrix[:, start:stop]))
            return onnx_ir.node("MatMul", [node.inputs[0], value], name=f"{name}.product")
        weight = cast(NodeWeight, run[0][1])
        for _, more in run[1:]:
            weight = weight.joined(cast(NodeWeight, more))
        name = "+".join(str(part.module) for part, _ in run)
        unique = name if all(part.module not in self.placed for part, _ in run) else f"{name}.{node.name}"
        for part, _ in run:
            self.placed[str(part.module)] = (unique, part.start - start)
        arrays = {"B": weight.B, "scales": weight.scales, "zero_points": weight.zero_points}
        values = [_initializer(graph, f"{unique}.{key}", array) for key, array in arrays.items() if array is not None]
        attributes = {
            "K": grid.K, "N": len(weight.B), "bits": grid.bits, "block_size": grid.block_size,
            "accuracy_level": self._level,
        }  # fmt: skip
        return onnx_ir.node(OPERATOR, [node.inputs[0], *values], attributes, domain=DOMAIN, name=unique)


def stored_weights(model: onnx_ir.Model) -> dict[str, NodeWeight]:
    """Name of a node -> its weight, of all quantized products of a graph that was read from a file."""
    weights = {}
    for node in model.graph:
        if (node.domain, node.op_type) == (DOMAIN, OPERATOR):
            K, bits, size = (node.attributes[key].as_int() for key in ("K", "bits", "block_size"))
            B, scales, *zeros = (value.const_value.numpy() for value in node.inputs[1:] if value is not None)
            grid = Grid(K, bits, size, has_zeros=bool(zeros))
            weights[str(node.name)] = NodeWeight(grid, B, scales, zeros[0] if zeros else None)
    return weights


def _weight_of(node: Any) -> Matrix | None:
    """The constant weight (K, N) float32 of a product x W, or None for another node."""
    if node.op_type not in PRODUCTS:
        return None
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    if any(attributes.get(name, plain) != plain for name, plain in PLAIN.items()):
        return None
    matrix: Matrix | None = _constant(node.inputs[1])
    if matrix is None or matrix.ndim != 2 or matrix.dtype != np.float32:
        return None
    return matrix.T if attributes.get("transB", 0) else matrix


def _constant(value: Any) -> Any:
    """The array of a value that does not depend on inputs, or None: an initializer, or a part of one.

    The exporter multiplies with experts one by one: parts of one initializer.
    """
    if value is None:
        return None
    if value.const_value is not None:
        return value.const_value.numpy()
    producer = value.producer()
    if producer is None or producer.op_type not in VIEWS or (inner := _constant(producer.inputs[0])) is None:
        return None
    attributes = {name: attribute.value for name, attribute in producer.attributes.items()}
    if producer.op_type == "Transpose":
        return inner.transpose(attributes.get("perm"))
    if producer.op_type == "Squeeze":
        axes = _constant(producer.inputs[1]) if len(producer.inputs) > 1 else None
        return inner.squeeze(None if axes is None else tuple(axes.tolist()))
    if len(producer.inputs) > 1:  # parts of given lengths; the exporter splits evenly
        return None
    return np.array_split(inner, len(producer.outputs), axis=attributes.get("axis", 0))[value.index()]


def _initializer(graph: Any, name: str, array: Any) -> Any:
    tensor = onnx_ir.tensor(array, name=name)
    value = onnx_ir.Value(name=name, const_value=tensor, shape=tensor.shape, type=onnx_ir.TensorType(tensor.dtype))
    graph.register_initializer(value)
    return value


def _remove_unused(graph: Any) -> None:
    """Remove nodes and weights that nothing reads any longer."""
    outputs = {id(value) for value in graph.outputs}
    for node in reversed(list(graph)):
        if not any(value.uses() or id(value) in outputs for value in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and id(value) not in outputs:
            del graph.initializers[name]


def _fix_sizes(graph: Any) -> None:
    """Declare sizes of inputs that tracing found to be fixed: the exporter leaves them as variables named "64"."""
    for value in graph.inputs:
        sizes = [getattr(size, "value", size) for size in value.shape]
        value.shape = onnx_ir.Shape([int(size) if str(size).isdigit() else size for size in sizes])
