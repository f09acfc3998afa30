"""The household: VirtualHome's evolving graph as pure JAX functions over arrays.

Device: `world` (step, legal), `goals` (satisfied, perform). Host: `graph` (JSON), `text` (scripts,
English), `robothow` and `eai` (data), `household` (an embedded one), `replay`, `rules` and `vocab`
(tables).
"""
