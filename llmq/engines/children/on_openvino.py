"""OpenVINO, for models that `llmq convert --to onnx` has written."""

import on_onnxruntime  # type: ignore[import-not-found]  # next to this file


class Engine(on_onnxruntime.Engine):  # type: ignore[misc]
    name = "openvino"
