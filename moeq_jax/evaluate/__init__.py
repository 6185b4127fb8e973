"""Evaluation: held-out loss, and how far a quantized model has moved from the full-precision one."""
