"""The theory of arXiv 2604.06515 as a numerical experiment: a two-layer expert-choice MoE, trained and quantized."""
