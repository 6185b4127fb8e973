"""Calibration: one pass of forward and backward over batches of text, into `artifacts.Stats`."""
