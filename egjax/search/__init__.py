"""Search: Monte Carlo trees over the household, many tasks a batch.

Import the modules by name. `actions` builds a task's table of actions from the base install alone.
`mcts` searches any world by one of the `rules`, `moves` goes on in the tree that was grown,
`household` makes the simulator a world, `relaxed` estimates how far its goal is, `best_first`
proves what is shortest, `label` sorts what was found into samples and pairs; those that search need
the extra `search`.
"""
