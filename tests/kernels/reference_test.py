"""The reference back-end passes the shared suite, whose oracle is numpy."""

from tests import conformance


class TestReference(conformance.Conformance):
  backend = "reference"
