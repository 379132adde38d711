"""Our kernels beside PyTorch's attention and flash-linear-attention's Triton kernels, on one GPU.

Neither is a dependency: a row whose package is not there says so. All read the same numbers in
bfloat16, forward and backward with all gradients, and take turns in one process.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.kernels import results
from experiments.kernels.results import TIMED, Result
from experiments.kernels.timing import milliseconds
from experiments.kernels.values import values
from pallas_kernels.tools.families import FAMILIES
from pallas_kernels.tools.programs import Shape, program
from pallas_kernels.tools.testing import rmse_ratio

BOTH = "forward+backward"
PACKAGES = ("torch", "flash-linear-attention", "triton")


@dataclasses.dataclass(frozen=True)
class Peer:
    """A function of flash-linear-attention that computes what one of our ops does.

    Attributes:
      family, shape: our op, and the shape that its speed is held to.
      module, function: theirs.
      renamed: their names of our operands, where they differ.
    """

    family: str
    shape: str
    module: str
    function: str
    renamed: Mapping[str, str] = dataclasses.field(default_factory=lambda: {"log_decay": "g"})


PEERS = (
    Peer("linear_attention", "head-bench", "fla.ops.simple_gla", "chunk_simple_gla"),
    Peer("linear_attention", "key-bench", "fla.ops.gla", "chunk_gla"),
    Peer("delta_rule", "gated-delta-bench", "fla.ops.gated_delta_rule", "chunk_gated_delta_rule"),
    Peer("delta_rule", "kda-bench", "fla.ops.kda", "chunk_kda"),
)


def rows(repetitions: int, scale: float = 1.0) -> Iterator[Result]:
    """One row for each peer; ``scale`` shortens the rows of tokens."""
    for peer in PEERS:
        shape = FAMILIES[peer.family].named(peer.shape)
        yield compared(peer, shape if scale == 1.0 else shape.scaled(scale), repetitions)


def compared(peer: Peer, shape: Shape, repetitions: int) -> Result:
    """Ours, theirs and softmax attention of the same heads; what is missing is said."""
    operands = shape.operands()
    given = values(operands)
    cotangent = values({"cotangent": operands["v"]}, seed=1)["cotangent"]
    ours = jax.jit(program(FAMILIES[peer.family].op, shape, BOTH)[0])
    programs: dict[str, Callable[[], Any]] = {
        "seqmodels": functools.partial(ours, *given.values(), cotangent)
    }
    missing, difference = [], None
    try:
        programs["torch attention"] = _attention(given, cotangent)
    except ImportError as error:
        missing.append(str(error))
    try:
        run = _theirs(peer, given, cotangent)
        difference = rmse_ratio(run(), np.asarray(programs["seqmodels"]()[0], np.float32))
        programs["fla"] = run
    except ImportError as error:
        missing.append(str(error))
    times = milliseconds(programs, (), repetitions)
    figures: dict[str, Any] = {f"{name} ms": time for name, time in times.items()}
    figures |= {} if difference is None else {"difference from fla": difference}
    figures |= {"missing": "; ".join(missing)} if missing else {}
    return Result(
        case=f"{peer.family} beside {peer.function}",
        device=jax.devices()[0].device_kind,
        kind=TIMED if len(programs) > 1 else results.NOT_RUN,
        shape=f"{operands['v'].shape} {peer.shape}, {operands['v'].dtype}",
        figures=figures,
        ratios={n: time / times["seqmodels"] for n, time in times.items() if n != "seqmodels"},
    )


def _theirs(peer: Peer, given: Mapping[str, Any], cotangent: Any) -> Callable[[], np.ndarray]:
    op = getattr(importlib.import_module(peer.module), peer.function)
    tensors = {peer.renamed.get(name, name): _tensor(x) for name, x in _ungrouped(given).items()}
    return _both(lambda: op(**tensors)[0], tensors.values(), _tensor(cotangent))


def _attention(given: Mapping[str, Any], cotangent: Any) -> Callable[[], np.ndarray]:
    """PyTorch's fastest causal attention of the queries, keys and values; grouped keys repeated."""
    import torch

    heads = (_ungrouped(given)[name] for name in ("q", "k", "v"))
    q, k, v, do = (_tensor(jnp.moveaxis(x, 1, 2)) for x in (*heads, cotangent))
    attend = functools.partial(
        torch.nn.functional.scaled_dot_product_attention, q, k, v, is_causal=True
    )
    return _both(attend, (q, k, v), do)


def _ungrouped(given: Mapping[str, Any]) -> dict[str, Any]:
    """With as many queries and keys as values: theirs know no groups."""
    heads = given["v"].shape[2]
    both = {n: jnp.repeat(given[n], heads // given[n].shape[2], axis=2) for n in ("q", "k")}
    return {**given, **both}


def _both(forward: Callable[[], Any], inputs: Any, cotangent: Any) -> Callable[[], np.ndarray]:
    """Forward and backward, waited for; the output, copied only where it is looked at."""
    import torch

    def run() -> Any:
        for x in inputs:
            x.grad = None
        output = forward()
        output.backward(cotangent)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return output.detach().float()

    return run


def _tensor(x: Any) -> Any:
    """A tensor of the same numbers and type, on the GPU where PyTorch has one."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    wide = torch.from_numpy(np.asarray(x, np.float32).copy())
    dtype = torch.bfloat16 if x.dtype == jnp.bfloat16 else torch.float32
    return wide.to(device, dtype).requires_grad_()
