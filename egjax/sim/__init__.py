"""The household: VirtualHome's evolving graph as pure JAX functions over arrays.

Device: `world` (step, legal), `goals` (satisfied). Host: `graph` (JSON), `text` (scripts, English),
`robothow` (data), `household` (an embedded one), `replay`, `rules` and `vocab` (tables).
"""
