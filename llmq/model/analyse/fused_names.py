"""Which layers serving engines run as one, by their names: such layers must have the same grid."""

from collections.abc import Collection, Mapping

FUSED: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "w13": ("w1", "w3"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
}
"""Name of a fused layer -> the last names of its layers."""


def fused_with(path: str, paths: Collection[str]) -> list[str]:
    """Those of `paths` that engines fuse with the layer at `path`, without itself."""
    parent, _, last = path.rpartition(".")
    members = next((members for members in FUSED.values() if last in members), ())
    candidates = [f"{parent}.{member}" if parent else member for member in members if member != last]
    return [candidate for candidate in candidates if candidate in paths]
