"""Every tolerance of the suite that stands for rounding, by dtype and use.

Part of the contract, as those of `pallas_kernels.tools.testing`, which are the kernels' own: none
is loosened to make a test pass. Where a use needs more than its dtype's usual one, its line says
why. What stands for something else, such as how far a sample's mean may be off, is in the test.
"""

from typing import Any

from pallas_kernels.tools import testing

# RMSE(error) / RMSE(reference).

FLOAT32 = testing.FLOAT32_TOLERANCE
FLOAT64 = testing.FLOAT64_TOLERANCE
BFLOAT16 = testing.BFLOAT16_TOLERANCE

# Gradients of kernels in bfloat16. They are products of values that the forward pass has rounded
# with cotangents that are rounded too, and come out rounded: three errors of 2^-9 where an output
# has one or two.
BFLOAT16_GRADIENTS = 1e-2

# A mixer or model in bfloat16, against float32: it rounds behind every projection, and a norm over
# few channels amplifies that.
BFLOAT16_MIXER = 2e-2

# One product, or a sum of few terms.
FLOAT32_PRODUCT = 5e-7
FLOAT32_TERMS = 1e-6

# Both sides are float32.
FLOAT32_BOTH = 5e-6

# A softmax over scores of hundreds: their rounding is absolute, and the exponential amplifies it.
FLOAT32_LARGE_SCORES = 2e-5

# A gradient of a mixer's parameter, against another float32 program: a sum over tokens of terms
# that cancel, behind exponentials; in S4 behind a transform of the whole row too.
FLOAT32_MIXER_GRADIENTS = 1e-5
FLOAT32_S4_GRADIENTS = 2e-5

# S4's kernel against its recurrence: the kernel is evaluated in frequencies.
FLOAT32_S4_KERNEL = 1e-5

# A gradient of a model whose length is split, against one device: two norms of narrow heads amplify
# rounding. On one device two backends differ by up to 2.1e-5 (kda) and 7e-6 (gla); of S5 both ways
# the sum that is the real part of Lambda's gradient cancels (2.8e-6, its op's 4e-8). The ops
# themselves are held to FLOAT32.
FLOAT32_SPLIT_GRADIENTS = 3e-5

# Several steps of training, of which each amplifies the rounding of those before.
FLOAT32_TRAINED = 1e-5

# Models of another library, through all their layers; its order of sums is not ours.
FLOAT32_PUBLISHED = 1e-4

# Largest error of a power of a number on the unit circle: of its float32, and of two that add up.
FLOAT32_POWER = 1.5e-7
FLOAT32_POWER_AND_REST = 3e-9

FLOAT32_LOOK_AHEAD = testing.FLOAT32_LOOK_AHEAD

# Of the largest number: angles grow with the position, and so does their rounding.
FLOAT32_OF_LARGEST = 1e-5

# For `np.testing.assert_allclose`, number by number.

Each = dict[str, Any]

EACH_FLOAT32_TERMS: Each = {"rtol": 1e-6}
EACH_FLOAT32_NEAR_ONE: Each = {"rtol": 1e-6, "atol": 1e-6}
EACH_FLOAT32_NORMAL: Each = {"rtol": 1e-6, "atol": 1e-37}  # what is smaller is flushed to 0
EACH_FLOAT32_LOSS: Each = {"rtol": 2e-6}  # of a split length, against one device
EACH_FLOAT32_SUM: Each = {"rtol": 1e-5}
# Sums that may cancel: beside the relative error, one of the size that the terms have.
EACH_FLOAT32_SMALL_TERMS: Each = {"rtol": 1e-5, "atol": 1e-7}
EACH_FLOAT32_TERMS_OF_ONE: Each = {"rtol": 1e-5, "atol": 1e-6}
EACH_FLOAT32_LAYER: Each = {"rtol": 1e-5, "atol": 1e-5}
# One float32 number that sums a whole program's: a tangent, a loss, a variance.
EACH_FLOAT32_TOTAL: Each = {"rtol": 1e-4}
# Several layers, or steps of training.
EACH_FLOAT32_STEP: Each = {"rtol": 1e-4, "atol": 1e-6}
EACH_FLOAT32_LAYERS: Each = {"rtol": 1e-4, "atol": 1e-5}
EACH_FLOAT32_MODEL: Each = {"rtol": 2e-4, "atol": 2e-5}
EACH_FLOAT32_REMAT: Each = {"rtol": 1e-4, "atol": 1e-4}  # gradients, computed in another order
EACH_FLOAT32_DEVICES: Each = {"rtol": 1e-3, "atol": 1e-4}  # Adam divides by what is near zero
EACH_FLOAT32_TIMED: Each = {"rtol": 1e-3, "atol": 1e-5}  # other libraries' code, in a benchmark
# Outputs of about one.
EACH_FLOAT32_FLIPPED: Each = {"atol": 1e-6}
EACH_FLOAT32_CONV: Each = {"atol": 2e-6}
EACH_FLOAT32_OUTPUT: Each = {"atol": 1e-5}
EACH_FLOAT32_OUTPUTS: Each = {"atol": 2e-5}  # of two layers or directions
EACH_FLOAT32_SECOND: Each = {"atol": 1e-4}  # second derivatives, and figures of a whole data set

EACH_FLOAT64_EQUAL: Each = {"rtol": 1e-12}
EACH_FLOAT64_BASIS: Each = {"atol": 1e-12}
EACH_FLOAT64_REBUILT: Each = {"atol": 1e-9}  # through eigenvectors
EACH_FLOAT64_DECAY: Each = {"rtol": 1e-8}  # of what float32 holds as a logarithm
EACH_BFLOAT16: Each = {"rtol": 1e-2, "atol": 1e-2}
