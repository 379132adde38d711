"""Checkpoints in the layout of Hugging Face's transformers: `load` and `save`.

A folder holds ``config.json`` and ``model.safetensors``, or several such files and
``model.safetensors.index.json``. Mamba, Mamba-2, Falcon Mamba and RecurrentGemma are known.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from seqmodels.interop import mamba, recurrent_gemma, tensors
from seqmodels.interop.families import HEAD, Family, differences, to_ours, to_theirs
from seqmodels.interop.fields import Fields
from seqmodels.models.backbone import unstack_layers
from seqmodels.models.language import Dtype, LanguageModel, LanguageModelConfig
from seqmodels.training.metrics import write_atomically

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (mamba.MAMBA, mamba.MAMBA2, mamba.FALCON_MAMBA, recurrent_gemma.RECURRENT_GEMMA)
}

Params = dict[str, Any]


def load(folder: str | Path, *, dtype: Dtype | None = None) -> tuple[LanguageModel, Params]:
    """A model and its float32 parameters: ``model.apply({"params": params}, tokens)``.

    Args:
      folder: of the checkpoint; nothing outside it is read, but links in it are followed.
      dtype: of the model's activations; None for bfloat16 where the checkpoint's embeddings are.

    Raises:
      ValueError: a configuration or tensors that are not those of a known model: the message names
        the first field or tensor, or the file that cannot be read.
    """
    folder = Path(folder)
    fields = Fields.read(folder / "config.json")
    family = _family(fields)
    config = fields.checked(lambda: family.read(fields))
    fields.finish()
    with tensors.Checkpoint(folder) as checkpoint:
        paths, shapes = _layout(family, config)
        if config.tie_embeddings:
            checkpoint.drop_copy(HEAD, of=family.embedding)
        checkpoint.check(shapes)
        if dtype is None:
            dtype = "bfloat16" if checkpoint.dtype(family.embedding) == "BF16" else "float32"
        flat = {
            ours: jnp.asarray(to_ours(ours, checkpoint.tensor(theirs)), jnp.float32)
            for theirs, ours in paths.items()
        }
    params = flax.traverse_util.unflatten_dict(flat, sep="/")
    return LanguageModel(dataclasses.replace(config, dtype=dtype)), params


def save(
    model: LanguageModel,
    params: Mapping[str, Any],
    folder: str | Path,
    *,
    dtype: Dtype | None = None,
    max_file_bytes: int = 5_000_000_000,
) -> None:
    """Writes a checkpoint that transformers, and `load`, can open.

    Args:
      model: the model.
      params: its parameters.
      folder: where to; made if it is not there.
      dtype: in which all parameters are stored; None for the model's.
      max_file_bytes: a larger checkpoint is divided into several files.

    Raises:
      ValueError: no known family has such a model, ``params`` are not its parameters, or the
        folder holds a checkpoint already.
    """
    folder, config = Path(folder), model.config
    family, fields = described(config)
    paths, shapes = _layout(family, config)
    flat = _flat(config, params)
    stored = jnp.dtype(dtype or config.dtype)
    arrays = {}
    for theirs, ours in paths.items():
        if ours not in flat:
            raise ValueError(f"params: {ours} is missing")
        array = to_theirs(ours, np.asarray(flat.pop(ours)))
        if array.shape != shapes[theirs]:
            raise ValueError(
                f"params: {ours} gives {theirs} the shape {array.shape}, expected {shapes[theirs]}"
            )
        arrays[theirs] = np.ascontiguousarray(array.astype(stored))
    if flat:
        raise ValueError(f"params: {next(iter(flat))} is not a parameter of the model")
    tensors.write(folder, arrays, max_file_bytes)
    head = {"architectures": [family.architecture], "model_type": family.model_type}
    text = json.dumps(head | fields | {"torch_dtype": stored.name}, indent=2)
    write_atomically(folder / "config.json", text + "\n")


def _family(fields: Fields) -> Family:
    name = fields.take("model_type", str)
    if name not in FAMILIES:
        raise ValueError(
            f"{fields.source}: model_type={name!r} is not known; one of {', '.join(FAMILIES)}"
        )
    return FAMILIES[name]


def described(config: LanguageModelConfig) -> tuple[Family, dict[str, Any]]:
    """The family of a model and its config.json; ValueError for what none can say."""
    names = set(config.backbone.layout)
    if names == {"mamba"}:
        plain = config.backbone.mixer(0).mixer_rms_eps is None  # type: ignore[attr-defined]
        family = mamba.MAMBA if plain else mamba.FALCON_MAMBA
    elif names == {"mamba2"}:
        family = mamba.MAMBA2
    elif names <= {"rg_lru", "sliding_window"}:
        family = recurrent_gemma.RECURRENT_GEMMA
    else:
        raise ValueError(
            f"LanguageModelConfig: a layout of {', '.join(sorted(names))} is that of no family; "
            f"there are {', '.join(FAMILIES)}"
        )
    written = family.write(config)
    fields = Fields(written, f"as a {family.model_type} model")
    again = fields.checked(lambda: family.read(fields))
    other = differences(config, again, family.implied)
    if other:
        raise ValueError(f"{fields.source}: cannot say {other}")
    return family, written


@functools.lru_cache(maxsize=8)
def _layout(
    family: Family, config: LanguageModelConfig
) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """Their names -> our paths, and their names -> their shapes; in the order of the layers."""
    stack = dataclasses.replace(config.backbone, scan_layers=False, remat="none")
    model = LanguageModel(dataclasses.replace(config, backbone=stack))
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    tree = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    paths, shapes = {}, {}
    for ours, leaf in flax.traverse_util.flatten_dict(tree, sep="/").items():
        theirs = family.theirs(ours)
        paths[theirs] = ours
        # The shape of a view that takes no memory.
        shapes[theirs] = to_theirs(ours, np.broadcast_to(np.float32(0), leaf.shape)).shape
    order = sorted(paths, key=tensors.natural)
    return {name: paths[name] for name in order}, {name: shapes[name] for name in order}


def _flat(config: LanguageModelConfig, params: Mapping[str, Any]) -> dict[str, Any]:
    """Our paths -> parameters, those of scanned layers apart."""
    params = dict(params)
    if config.backbone.scan_layers and "backbone" in params:
        params["backbone"] = unstack_layers(config.backbone, params["backbone"])
    return flax.traverse_util.flatten_dict(params, sep="/")
