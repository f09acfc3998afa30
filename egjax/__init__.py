"""Episodic grounding of language models in JAX.

A household simulator, batched tree search, behaviour-ratio distillation and preference
optimisation; each sub-package is imported by itself and brings only the libraries it needs.
"""

__all__ = ["__version__"]

__version__ = "0.1.0"
