"""Experience: trajectories and preference pairs on disk, and text samples made from them.

Import the modules by name; `tfds` needs the extra `data`, the others only numpy and jax.
"""
