"""Settings for all tests: rank promotion raises, and property tests draw the same examples every time."""

import hypothesis
import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
hypothesis.settings.register_profile("moeq_jax", derandomize=True, deadline=None, max_examples=25, database=None)
hypothesis.settings.load_profile("moeq_jax")
