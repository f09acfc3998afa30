"""Counts until it is asked to stop; for tests of what several processes do about signals."""

import time

from egjax import hosts
from egjax.train.signals import stop_on_signals

hosts.start_hosts()
with stop_on_signals() as asked:
    stop, looks = hosts.Agreed(asked, "loop"), 0
    while not stop:
        looks += 1
        print(looks, flush=True)
        time.sleep(0.02 * (1 + 2 * hosts.index()))  # not in step
    stop.close()
print("left", flush=True)
hosts.finish()
