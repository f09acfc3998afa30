"""Waits for a storage that has stopped answering, as a save does; for tests."""

import sys
import threading
from pathlib import Path

from egjax import hosts
from experiments import lease


def wait(*_: object) -> None:
    threading.Event().wait()


lease.BEAT, lease.SETTLE, run = 0.1, 0.1, Path(sys.argv[1])
hosts.start_hosts()
with (lease.leased if hosts.index() == 0 else lease.watched)(run, "marker"):
    hosts.barrier("the last that is whole")
    if hosts.index() == 0:
        lease._text = wait
        threading.Thread(target=wait).start()  # as Orbax has them: Python's end waits for it
        raise SystemExit("asked to stop")
    hosts.barrier("never reached")
