"""Checkpoints in the layout of Hugging Face's transformers: `load` and `save`.

A folder holds ``config.json`` and ``model.safetensors``, or several such files and
``model.safetensors.index.json``. `FAMILIES` has the kinds of models that are known; Mamba and
Mamba-2 are in mamba_ssm's own format too.
"""

import dataclasses
import difflib
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from seqmodels.interop import (
    bamba,
    falcon_h1,
    jamba,
    lfm2,
    mamba,
    nemotron,
    qwen,
    recurrent_gemma,
    tensors,
)
from seqmodels.interop.families import HEAD, Family, differences, merged, spellings
from seqmodels.interop.fields import Fields, json_text, read_json
from seqmodels.interop.layout import Slot, experts_apart, experts_together, to_theirs
from seqmodels.interop.mamba_ssm import native_family
from seqmodels.interop.origin import CONFIG, GENERATION, LoadedLanguageModel, Origin
from seqmodels.models import param_axes
from seqmodels.models.backbone import unstack_layers
from seqmodels.models.language import Dtype, LanguageModel, LanguageModelConfig
from seqmodels.parallel.parameters import parameter_shardings
from seqmodels.training.metrics import write_atomically

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        mamba.MAMBA,
        mamba.MAMBA2,
        mamba.FALCON_MAMBA,
        recurrent_gemma.RECURRENT_GEMMA,
        qwen.QWEN3_5,
        qwen.QWEN3_NEXT,
        lfm2.LFM2,
        bamba.BAMBA,
        bamba.GRANITE,
        jamba.JAMBA,
        nemotron.NEMOTRON_H,
        falcon_h1.FALCON_H1,
    )
}

Params = dict[str, Any]
StorageDtype = Literal["float32", "bfloat16", "float16"]


def load(
    folder: str | Path,
    *,
    dtype: Dtype | None = None,
    require_head: bool = True,
    mesh: Mesh | None = None,
) -> tuple[LanguageModel, Params]:
    """A model and its float32 parameters: ``model.apply({"params": params}, tokens)``.

    The model remembers what else the folder says (other fields of config.json, those of
    generation_config.json, the dtype of each tensor), and `save` writes it back. Of a Qwen3.5 with
    images the text model is read, and is all that `save` writes.

    Args:
      folder: of the checkpoint; nothing outside it is read, but links in it are followed.
      dtype: of the model's activations; None for bfloat16 where the checkpoint's embeddings are.
      require_head: False to also load a base model that has no projection onto the vocabulary,
        where that is not the embeddings' table: its ``hidden`` can be called, its logits cannot.
      mesh: of ``seqmodels.parallel.make_mesh``: each parameter is split over it as a trainer's is,
        as soon as its tensors are read, so that the host never holds the model. None for the
        default device.

    Warns:
      UserWarning: a tensor holds a NaN or an infinite number.

    Raises:
      ValueError: a configuration or tensors that are not those of a known model: the message names
        the first field or tensor, or the file that cannot be read, and says what to do.
    """
    folder = Path(folder)
    values, family, config = _read_config(folder)
    with tensors.Checkpoint(folder) as checkpoint:
        slots, origin = _match(checkpoint, values, family, config, require_head)
        if dtype is None:
            dtype = "bfloat16" if checkpoint.dtype(family.embedding) == "BF16" else "float32"
        experts = config.backbone.experts
        parts = experts_together(
            _parts(checkpoint, slots), 0 if experts is None else experts.experts
        )
        place = _placement(config, mesh)
        arrays = {ours: place(ours, part) for ours, part in parts}
    params = flax.traverse_util.unflatten_dict(arrays, sep="/")
    return LoadedLanguageModel(dataclasses.replace(config, dtype=dtype), origin), params


def read_model(folder: str | Path) -> LanguageModelConfig:
    """The model of a folder, by its config.json alone; raises as `load` does for that."""
    return _read_config(Path(folder))[2]


def save(
    model: LanguageModel,
    params: Mapping[str, Any],
    folder: str | Path,
    *,
    like: str | Path | None = None,
    dtype: StorageDtype | None = None,
    max_file_bytes: int = 5_000_000_000,
) -> None:
    """Writes a checkpoint that transformers, and `load`, can open.

    A model that `load` made, whatever has become of its parameters, is written as its checkpoint
    was: all fields of config.json that do not contradict the model, generation_config.json, names
    and dtypes of the tensors. Any other model is written as transformers would write it, each
    parameter in its own dtype. A tokenizer's files are nobody's here: copy them.

    Args:
      model: the model; ``model.clone(config=...)`` of a loaded one is still a loaded one.
      params: its parameters.
      folder: where to; made if it is not there.
      like: the folder of a checkpoint to write after, for a model that `load` did not make.
      dtype: in which all parameters are stored, for example to halve the file; None for each
        one's own.
      max_file_bytes: a larger checkpoint is divided into several files.

    Raises:
      ValueError: no known family has such a model, ``params`` are not its parameters or beyond
        the range of their dtype, or the folder holds a checkpoint already.
    """
    if dtype is not None and dtype not in get_args(StorageDtype):
        raise ValueError(
            f"save: dtype={dtype!r} must be None or one of {', '.join(get_args(StorageDtype))}"
        )
    folder, config = Path(folder), model.config
    origin = model.origin if isinstance(model, LoadedLanguageModel) else None
    if like is not None:
        origin = _origin(Path(like))
    family, fields = described(config, origin)
    arrays = _arrays(family, config, params, origin, dtype)
    stored = arrays[family.embedding].dtype.name
    if origin is None:
        head = {"architectures": [family.architecture], "model_type": family.model_type}
        fields = head | fields | {"torch_dtype": stored}
    elif dtype is not None:
        fields |= {name: stored for name in ("dtype", "torch_dtype") if name in fields}
    known = {tensor.name: tensor.stored_name for tensor in origin.tensors} if origin else {}
    named = {known.get(name, name): array for name, array in arrays.items()}
    tensors.write(folder, named, max_file_bytes)
    write_atomically(folder / CONFIG, json_text(fields))
    if origin is not None and origin.generation is not None:
        write_atomically(folder / GENERATION, origin.generation)


def _read_config(folder: Path) -> tuple[dict[str, Any], Family, LanguageModelConfig]:
    values = _text_config(read_json(folder / CONFIG), str(folder / CONFIG))
    fields = Fields(values, str(folder / CONFIG))
    family = _family(fields)
    config = fields.checked(lambda: family.read(fields))
    fields.finish()
    return values, family, config


def _text_config(values: dict[str, Any], source: str) -> dict[str, Any]:
    """The fields of the text model, if there are others around it."""
    if values.get("model_type") != qwen.WITH_IMAGES:
        return values
    inner = values.get("text_config")
    if not isinstance(inner, dict):
        raise ValueError(f"{source}: text_config={inner!r} is not an object")
    shared = {name: values[name] for name in ("tie_word_embeddings",) if name in values}
    known = {"model_type": qwen.QWEN3_5.model_type, "architectures": [qwen.QWEN3_5.architecture]}
    return shared | inner | known


def _match(
    checkpoint: tensors.Checkpoint,
    values: Mapping[str, Any],
    family: Family,
    config: LanguageModelConfig,
    require_head: bool,
) -> tuple[dict[str, Slot], Origin]:
    """What is in the tensors, which are there and right, and what to remember."""
    slots = _slots(family, config)
    if family.text_only is not None:
        checkpoint.keep_text(family.text_only)
    for name in slots:
        checkpoint.respell(name, spellings(name))
    origin = Origin.of(checkpoint.folder, values, checkpoint.described())
    held = {tensor.name for tensor in origin.tensors}
    if config.tie_embeddings:
        checkpoint.drop_copy(HEAD, of=family.embedding)
    elif HEAD not in held and held >= set(slots) - {HEAD}:
        if require_head:
            raise ValueError(
                f"{checkpoint.folder}: the tensor {HEAD} {slots[HEAD].shape} is missing, as in a "
                "base model; load(folder, require_head=False) gives a model whose `hidden` can be "
                "called, tie_word_embeddings=true in config.json one with the embeddings as head"
            )
        slots = {name: slot for name, slot in slots.items() if name != HEAD}
    checkpoint.check({name: slot.shape for name, slot in slots.items()})
    return slots, origin


def _parts(
    checkpoint: tensors.Checkpoint, slots: Mapping[str, Slot]
) -> Iterator[tuple[str, np.ndarray]]:
    """Our paths and parameters in float32, tensor by tensor."""
    for theirs, slot in slots.items():
        # Widened on the host: devices flush denormal numbers.
        tensor = checkpoint.tensor(theirs).astype(np.float32)
        if not np.isfinite(tensor).all():
            warnings.warn(
                f"{checkpoint.folder}: the tensor {theirs} holds NaN or infinite numbers; download "
                "it again, or ask who trained it",
                stacklevel=3,
            )
        yield from slot.split(tensor).items()


def _placement(
    config: LanguageModelConfig, mesh: Mesh | None
) -> Callable[[str, np.ndarray], jax.Array]:
    """``place(path, parameter)``: onto the devices that it belongs to."""
    if mesh is None:
        return lambda _, array: jnp.asarray(array)
    tree = _abstract(config)
    shardings = flax.traverse_util.flatten_dict(
        parameter_shardings(param_axes(config, tree), tree, mesh), sep="/"
    )

    def place(path: str, array: np.ndarray) -> jax.Array:
        placed = jax.make_array_from_callback(array.shape, shardings[path], lambda at: array[at])
        return jax.block_until_ready(placed)  # so that the host may forget its copy

    return place


def _origin(folder: Path) -> Origin:
    """That of a folder that need not be loaded."""
    values, family, config = _read_config(folder)
    with tensors.Checkpoint(folder) as checkpoint:
        return _match(checkpoint, values, family, config, require_head=False)[1]


def _arrays(
    family: Family,
    config: LanguageModelConfig,
    params: Mapping[str, Any],
    origin: Origin | None,
    dtype: StorageDtype | None,
) -> dict[str, np.ndarray]:
    """All tensors to be written, under their names."""
    dtypes = {tensor.name: tensor.dtype for tensor in origin.tensors} if origin else {}
    flat = _flat(config, params)
    flat = experts_apart(flat) if family.experts_apart else flat
    arrays = {}
    for theirs, slot in _slots(family, config).items():
        missing = [ours for ours in slot.parts if ours not in flat]
        if missing and theirs == HEAD and origin and HEAD not in dtypes:
            continue
        if missing:
            raise ValueError(f"params: {missing[0]} is missing")
        parts = {ours: np.asarray(flat.pop(ours)) for ours in slot.parts}
        for ours, part in parts.items():
            found, expected = to_theirs(ours, part).shape, slot.parts[ours]
            if found != expected:
                raise ValueError(
                    f"params: {ours} gives {theirs} the shape {found}, expected {expected}"
                )
        array, first = slot.join(parts), next(iter(parts))
        arrays[theirs] = _stored(first, array, dtype or dtypes.get(theirs))
        if theirs == family.embedding and config.tie_embeddings and HEAD in dtypes:
            arrays[HEAD] = _stored(first, array, dtype or dtypes[HEAD])
    if flat:
        raise ValueError(f"params: {next(iter(flat))} is not a parameter of the model")
    return arrays


def _stored(path: str, array: np.ndarray, dtype: str | None) -> np.ndarray:
    """The array in a dtype, None for its own; ValueError for what that cannot hold."""
    dtype = dtype or array.dtype.name
    if dtype not in get_args(StorageDtype):
        raise ValueError(
            f"params: {path} has dtype {dtype}, which is not stored; give save a dtype of "
            + ", ".join(get_args(StorageDtype))
        )
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(array.astype(dtype))
    if not np.isfinite(stored).all() and np.isfinite(array).all():
        raise ValueError(f"params: {path} is beyond the range of {dtype}; give save a wider dtype")
    return stored


def _family(fields: Fields) -> Family:
    native = native_family(fields)
    if native is not None:
        return native
    name = fields.take("model_type", str)
    if name not in FAMILIES:
        near = difflib.get_close_matches(name, FAMILIES, n=1)
        raise ValueError(
            f"{fields.source}: model_type={name!r} is not known"
            + (f", the nearest is {near[0]!r}" if near else "")
            + f"; one of {', '.join(FAMILIES)}"
        )
    return FAMILIES[name]


def described(
    config: LanguageModelConfig, origin: Origin | None = None
) -> tuple[Family, dict[str, Any]]:
    """The family of a model and its config.json; ValueError for what none can say.

    With an origin, its family and its config.json, changed where the model is another.
    """
    if origin is None:
        family = _transformers_family(config)
        written = family.write(config)
    else:
        fields = Fields(origin.values, f"{origin.source}/{CONFIG}")
        family = _family(fields)
        if not family.mixers.issuperset(config.backbone.layout):
            raise ValueError(
                f"{fields.source}: is that of a {family.model_type} model, but the one to be "
                f"saved is a {_transformers_family(config).model_type} model"
            )
        written = merged(origin.values, family.write(family.read(fields)), family.write(config))
    fields = Fields(written, f"as a {family.model_type} model")
    again = fields.checked(lambda: family.read(fields))
    other = differences(config, again, family.implied)
    if other:
        raise ValueError(f"{fields.source}: cannot say {other}")
    return family, written


def _transformers_family(config: LanguageModelConfig) -> Family:
    names = set(config.backbone.layout)
    if config.backbone.single:
        return nemotron.NEMOTRON_H
    if names == {"mamba"} and config.backbone.mlp is None and config.backbone.experts is None:
        plain = config.backbone.mixers[0].mixer_rms_eps is None  # type: ignore[attr-defined]
        return mamba.MAMBA if plain else mamba.FALCON_MAMBA
    if names == {"mamba2"} and config.backbone.mlp is None:
        return mamba.MAMBA2
    if names <= bamba.BAMBA.mixers:
        return bamba.GRANITE if bamba.has_multipliers(config) else bamba.BAMBA
    hybrid = qwen.QWEN3_5 if config.backbone.experts is None else qwen.QWEN3_NEXT
    for family in (
        falcon_h1.FALCON_H1,
        jamba.JAMBA,
        recurrent_gemma.RECURRENT_GEMMA,
        hybrid,
        lfm2.LFM2,
    ):
        if names <= family.mixers:
            return family
    raise ValueError(
        f"LanguageModelConfig: a layout of {', '.join(sorted(names))} is that of no family; "
        f"there are {', '.join(FAMILIES)}"
    )


@functools.lru_cache(maxsize=8)
def _slots(family: Family, config: LanguageModelConfig) -> dict[str, Slot]:
    """Names of tensors -> what is in them, in the order of the layers."""
    views = {
        # That take no memory.
        ours: np.broadcast_to(np.float32(0), leaf.shape)
        for ours, leaf in flax.traverse_util.flatten_dict(_abstract(config), sep="/").items()
    }
    views = experts_apart(views) if family.experts_apart else views
    shapes = {ours: to_theirs(ours, view).shape for ours, view in views.items()}
    slots = family.slots(config, shapes)
    return {name: slots[name] for name in sorted(slots, key=tensors.natural)}


@functools.lru_cache(maxsize=8)
def _abstract(config: LanguageModelConfig) -> Params:
    """The parameters' shapes, each layer's apart."""
    stack = dataclasses.replace(config.backbone, scan_layers=False, remat="none")
    model = LanguageModel(dataclasses.replace(config, backbone=stack))
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]


def _flat(config: LanguageModelConfig, params: Mapping[str, Any]) -> dict[str, Any]:
    """Our paths -> parameters, those of scanned layers apart."""
    params = dict(params)
    if config.backbone.scan_layers and "backbone" in params:
        params["backbone"] = unstack_layers(config.backbone, params["backbone"])
    return flax.traverse_util.flatten_dict(params, sep="/")
