"""Encoding: a codec on every expert at every candidate width, once; errors are kept, and codes where they fit."""
