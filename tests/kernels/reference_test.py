"""The reference back-end passes the shared suite, whose oracle is numpy."""

import jax.numpy as jnp
import pytest

from moeq_jax.kernels import varying
from tests import conformance


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch):
  """Outputs are NaN where nothing is written."""
  monkeypatch.setattr(varying, "zeros", lambda shape, dtype, like: jnp.full(shape, jnp.nan, dtype))


class TestReference(conformance.Conformance):
  backend = "reference"
