"""Fields of config.json about attention, as all hybrids have them."""

from typing import Any

from seqmodels.interop.fields import Fields
from seqmodels.mixers import AttentionConfig
from seqmodels.mixers.softmax import SoftmaxConfig

FULL, RECURRENT = "full_attention", "linear_attention"
"""What ``layer_types`` calls the two kinds of layers, whatever the recurrent one is."""


def read_rotary(
    fields: Fields, base: float = 1e4, fraction: float | None = None
) -> tuple[float, float]:
    """Base and rotated share; under `rope_parameters`, or by themselves in older files.

    ``base`` and ``fraction`` are defaults; None for a family that rotates all channels always.
    """
    base = fields.take("rope_theta", float, base)
    share = fields.take("partial_rotary_factor", float, fraction)
    fields.require("rope_scaling", None)
    values = fields.take("rope_parameters", dict, None)
    if values is None:
        return base, 1.0 if fraction is None else share
    inner = Fields(values, f"{fields.source}: rope_parameters")
    inner.require("rope_type", "default")
    # The positions of images and videos; those of text are the same on all their axes.
    inner.ignore("mrope_section", "mrope_interleaved")
    base = inner.take("rope_theta", float, base)
    share = inner.take("partial_rotary_factor", float, share)
    inner.finish()
    return base, 1.0 if fraction is None else share


def written_rotary(config: SoftmaxConfig, *, partial: bool = False) -> dict[str, Any]:
    """The inverse of ``read_rotary``, as transformers 5 writes it; ``partial``: with the share."""
    parameters = {"rope_type": "default", "rope_theta": config.rotary_base or 1e4}
    if partial:
        parameters["partial_rotary_factor"] = config.rotary_fraction
    return {"rope_parameters": parameters}


def read_heads(
    fields: Fields, width: int, heads: int, groups: int | None, size: int | None = None
) -> dict[str, Any]:
    """Heads of queries and of keys, and their size; the arguments behind ``width`` are defaults."""
    # Training only.
    fields.ignore("attention_dropout")
    heads = fields.take("num_attention_heads", int, heads)
    size = fields.take("head_dim", int, size)
    return {
        "heads": heads,
        "kv_heads": fields.take("num_key_value_heads", int, groups),
        "head_size": None if size is None or size * heads == width else size,
    }


def written_heads(config: AttentionConfig) -> dict[str, Any]:
    """The inverse of ``read_heads``, but for the heads' size, which not every family names."""
    return {"num_attention_heads": config.heads, "num_key_value_heads": config.groups}


def read_layers(fields: Fields, kinds: dict[str, str], default: list[str]) -> tuple[str, ...]:
    """Registered names of the layers' mixers; ``kinds``: theirs -> ours.

    Raises:
      ValueError: ``layer_types`` has another kind, or not one for each layer.
    """
    found = fields.take("layer_types", list, default)
    for kind in found:
        if kind not in kinds:
            raise ValueError(
                f"{fields.source}: layer_types may hold only {', '.join(kinds)}, not {kind!r}"
            )
    layers = fields.take("num_hidden_layers", int, len(found))
    if layers != len(found):
        raise ValueError(
            f"{fields.source}: layer_types has {len(found)} entries, one a layer is expected: "
            f"num_hidden_layers={layers}"
        )
    return tuple(kinds[kind] for kind in found)
