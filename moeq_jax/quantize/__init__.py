"""The task `quantize`: a checkpoint from disk to disk, one layer in memory at a time.

`task.py` is the order of the sweeps; `needs.py` finds out which of them a method needs. `subject.py` is the opened
checkpoint, `states.py` what flows between blocks, kept on disk; `measure.py` the sweeps before the plan, `planning.py`
the plan, `encode.py` the sweep that writes the quantized layers, `evaluation.py` what they cost. `settings.py` and
`room.py` look for mistakes and for room before any work.
"""
