"""The training step of the tests, and what they say of optax."""

import pytest

OPTAX_ADAM = pytest.mark.standard_promotion("optax.adam raises a float to an int32 power")
