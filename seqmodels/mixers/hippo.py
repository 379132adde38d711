"""HiPPO initialisation of diagonal state-space models, in NumPy float64 on the host.

An accelerator's eigensolver may choose other eigenvector phases, so nothing here touches JAX.
Sources: Gu et al., "Efficiently Modeling Long Sequences with Structured State Spaces" (S4),
appendix C; Smith et al., "Simplified State Space Layers" (S5), appendix B.
"""

import numpy as np
from jaxtyping import Complex128, Float64


def normal_part(size: int) -> Float64[np.ndarray, "n n"]:
    """HiPPO-LegS ``A + P P^T``, ``(n, n)``: -1/2 on the diagonal plus a skew-symmetric matrix."""
    root = np.sqrt(2.0 * np.arange(size) + 1.0)
    outer = root[:, None] * root[None, :]
    legs = -np.tril(outer, -1) - np.diag(np.arange(size) + 1.0)
    return legs + outer / 2.0


def normal_eigen(
    size: int,
) -> tuple[Complex128[np.ndarray, " half"], Complex128[np.ndarray, "n half"]]:
    """Eigenvalues ``(n/2,)`` and unit eigenvectors ``(n, n/2)`` with negative imaginary part.

    Ascending in the imaginary part. The phase makes the first component of each vector real and
    non-negative; the other half of the spectrum is the complex conjugate.

    Raises:
      ValueError: ``size`` is odd or not positive.
    """
    if size < 2 or size % 2:
        raise ValueError(f"size={size} must be an even number >= 2: eigenvalues come in pairs")
    matrix = normal_part(size)
    imaginary, vectors = np.linalg.eigh(-1j * (matrix + 0.5 * np.eye(size)))
    vectors = vectors * np.exp(-1j * np.angle(vectors[:1]))
    half = size // 2
    return np.mean(np.diag(matrix)) + 1j * imaginary[:half], vectors[:, :half]


def blocked_eigen(
    size: int, blocks: int
) -> tuple[Complex128[np.ndarray, " half"], Complex128[np.ndarray, "n half"]]:
    """``normal_eigen(size / blocks)`` repeated along a block diagonal (S5, appendix B.1.2)."""
    values, vectors = normal_eigen(size // blocks)
    return np.tile(values, blocks), np.kron(np.eye(blocks), vectors)


def normal_input(
    vectors: Complex128[np.ndarray, "n half"], clip: float = 2.0
) -> Complex128[np.ndarray, " half"]:
    """HiPPO-LegS input ``B_n = sqrt(2n + 1)`` in the eigenbasis, ``V* B``, ``(n/2,)``.

    Imaginary parts are clipped to ``[-clip, clip]`` as S4's code does; without it they grow with
    the square of the state size. What is clipped depends on the vectors' phase.
    """
    b = vectors.conj().T @ np.sqrt(2.0 * np.arange(len(vectors)) + 1.0)
    return b.real + 1j * np.clip(b.imag, -clip, clip)


def normal_low_rank(vectors: Complex128[np.ndarray, "n half"]) -> Complex128[np.ndarray, " half"]:
    """The vector ``P_n = sqrt(n + 1/2)`` of ``normal_part`` in the eigenbasis, ``V* P``."""
    return vectors.conj().T @ np.sqrt(np.arange(len(vectors)) + 0.5)
