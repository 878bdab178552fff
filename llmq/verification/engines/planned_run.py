"""A planned model as serving engines would see it, for `--dry-run`."""

from llmq.numerics.gguf_types import GGUF
from llmq.run_plan import Plan
from llmq.steps import output_layout
from llmq.verification.engines import checkpoint_facts
from llmq.verification.engines.checkpoint_facts import Linear, Subject


def planned(plan: Plan) -> dict[str, Subject]:
    """The facts about each format of a plan."""
    tokenizer = checkpoint_facts.tokenizer(plan.checkpoint.folder)
    chosen = {layer.name: layer for layer in plan.layers.values()}
    packed = [
        Linear(layer.name, layer.out_features, layer.in_features, layer.scheme.weights, inputs=layer.scheme.inputs)
        for layer in chosen.values()
    ]
    floats = [linear for linear in checkpoint_facts.floats(plan.checkpoint) if linear.name not in chosen]
    subjects = {}
    for name in plan.settings.formats:
        if name.startswith(GGUF):
            subjects[name] = Subject(GGUF, plan.checkpoint.config, {}, (), tokenizer)
            continue
        settings = plan.quantization_config(layout=output_layout.single(name))
        method = str(settings["quant_method"])
        linears = (*packed, *checkpoint_facts.declared(floats, settings))
        subjects[name] = Subject(method, plan.checkpoint.config, settings, linears, tokenizer)
    return subjects
