"""Every tolerance of the suite that stands for a dtype's rounding, by dtype and use.

Part of the contract, as those of `pallas_kernels.tools.testing`, which are the kernels' own: none
is loosened to make a test pass. Where a use needs more than its dtype's usual one, its line says
why. Unless it says otherwise a tolerance bounds `RMSE(error) / RMSE(reference)`.
"""

from pallas_kernels.tools.testing import BFLOAT16_TOLERANCE, FLOAT32_TOLERANCE, FLOAT64_TOLERANCE

FLOAT32 = FLOAT32_TOLERANCE
FLOAT64 = FLOAT64_TOLERANCE
BFLOAT16 = BFLOAT16_TOLERANCE

# A gradient of a mixer's parameter, against another float32 program: a sum over tokens of terms
# that cancel, behind exponentials and, in S4, a transform of the whole row.
FLOAT32_MIXER_GRADIENTS = 1e-5

# A mixer or model in bfloat16, against float32: it rounds behind every projection, and a norm over
# few channels amplifies that.
BFLOAT16_MIXER = 2e-2

# Largest difference: what an output may show of a later token, which a transform of the whole row
# spreads as rounding.
LOOK_AHEAD = 1e-5
