"""Training: optimiser, step, data, loop, checkpoints and the objectives of the pipeline.

Import the modules by name. `checkpoint` and `loop` need the extra `train`, the others the base
install.
"""
