"""Export: quantized models as files."""
