"""Search: Monte Carlo trees over the household, many tasks a batch.

Import the modules by name. `actions` builds a task's table of actions from the base install alone.
`mcts` searches any world, `household` makes the simulator one, `label` sorts what was found into
samples and pairs; these three need the extra `search`.
"""
