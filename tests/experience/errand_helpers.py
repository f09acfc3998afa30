import jax

from egjax.experience.rollouts import Focus

FOCUS = Focus(length=12, objects=24, actions=160)


def state_at(states, *index):
    """One of several stacked states."""
    return jax.tree.map(lambda leaf: leaf[index], states)
