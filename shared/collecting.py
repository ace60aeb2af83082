"""When Python looks for cyclic garbage: not while a service is made, and never again among what made it.

Importing torch and the rest makes a quarter of a million objects that stay. To look through them again and again takes
0.4 s of a start, and each full collection later stops every thread for 0.1 to 0.2 s, a frame's whole latency many times
over.

A service's main module imports this before all else, which stops collecting, and calls `resume` after its imports. Once
a service stands, it calls `leave_alone`.
"""

import atexit
import gc

_was_on = gc.isenabled()
gc.disable()
atexit.register(gc.unfreeze)  # libraries look at the end whether all of theirs was freed, and complain


def resume() -> None:
    """Collect again, where it was done before, but not what there is now."""
    leave_alone()
    if _was_on:
        gc.enable()


def leave_alone() -> None:
    """Take what there is now, 3 % of it garbage at most, out of all later collections: it stays for good."""
    gc.freeze()
