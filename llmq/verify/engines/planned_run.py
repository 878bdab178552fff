"""A model that is not there yet, as serving engines would find it: what `--dry-run` asks them about."""

from llmq.numerics.gguf_types import GGUF
from llmq.plan import Plan
from llmq.steps import output_layout
from llmq.verify.engines import checkpoint_facts
from llmq.verify.engines.checkpoint_facts import Linear, Subject


def planned(plan: Plan) -> dict[str, Subject]:
    """What each format of a plan would be."""
    tokenizer = checkpoint_facts.tokenizer(plan.checkpoint.folder)
    chosen = {layer.name: layer for layer in plan.layers.values()}
    packed = [
        Linear(layer.name, layer.out_features, layer.in_features, layer.scheme.weights) for layer in chosen.values()
    ]
    floats = [linear for linear in checkpoint_facts.floats(plan.checkpoint) if linear.name not in chosen]
    found = {}
    for name in plan.settings.formats:
        if name.startswith(GGUF):
            found[name] = Subject(GGUF, plan.checkpoint.config, {}, (), tokenizer)
            continue
        settings = plan.quantization_config(layout=output_layout.single(name))
        method = str(settings["quant_method"])
        linears = (*packed, *checkpoint_facts.declared(floats, settings))
        found[name] = Subject(method, plan.checkpoint.config, settings, linears, tokenizer)
    return found
