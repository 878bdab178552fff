"""Checks of the files next to the weights: config.json, the tokenizer, and weights of another model."""

from collections.abc import Iterator

from llmq.verification.engines.checkpoint_facts import ONNX, Subject


def config_keys(subject: Subject) -> Iterator[str]:
    for key in ("architectures", "model_type"):
        if not subject.config.get(key):
            yield f"config.json has no {key}"


def onnx_graph(subject: Subject) -> Iterator[str]:
    if subject.method == ONNX:
        yield "the model is an ONNX graph"


def old_names(subject: Subject) -> Iterator[str]:
    config = subject.text_config
    if "dtype" in config and "torch_dtype" not in config:
        yield "config.json has dtype but not torch_dtype"
    if "rope_parameters" in config and "rope_theta" not in config:
        yield "config.json has rope_parameters but not rope_theta"


def tokenizers_backend(subject: Subject) -> Iterator[str]:
    if subject.tokenizer.get("tokenizer_class") == "TokenizersBackend":
        yield "tokenizer_config.json has tokenizer_class TokenizersBackend"


def strays(subject: Subject) -> Iterator[str]:
    if subject.strays:
        yield f"{', '.join(subject.strays[:3])}{' …' if len(subject.strays) > 3 else ''} do not belong to this model"
