"""One file, one result: each experiment is a script with a `Config`, a `main(config)` and a help.

Compiled programs are kept between runs in `~/.cache/egjax/xla`; the usual JAX variables override
that, and an empty `JAX_COMPILATION_CACHE_DIR` turns it off. It is set here because JAX settles
whether it has a cache at its first compilation, and nothing of an experiment runs before this.
"""

import os
from pathlib import Path

_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "egjax" / "xla"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
