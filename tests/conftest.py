"""Settings of the whole suite: 8 simulated devices, no silent rank promotion, no timed asserts."""

import hypothesis
import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# The first example of a test compiles, which takes long; how long is not what is tested.
hypothesis.settings.register_profile("suite", deadline=None)
hypothesis.settings.load_profile("suite")


@pytest.fixture(autouse=True, scope="module")
def _programs_of_other_modules_are_dropped():
    """Thousands of compiled programs take more memory than a small machine has."""
    yield
    jax.clear_caches()
