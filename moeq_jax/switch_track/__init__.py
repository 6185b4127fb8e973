"""The Switch Transformer track of arXiv 2604.06515: a fine-tuned encoder-decoder quantized by every order, measured by
loss and ROUGE. `task.run` is the run (task `switch_track`)."""
