"""Entry of a service that the demo starts: ends with its parent, whatever ends the parent, then is `sightline`.

The kernel is asked to send SIGTERM when the parent dies (prctl, Linux), so that even a parent killed by SIGKILL leaves
no service behind. Arguments: the parent's process id, then those of `sightline`.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    parent = int(sys.argv[1])
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before the request
            raise SystemExit(1)
    from cli.main import main as sightline

    sightline(sys.argv[2:])


if __name__ == "__main__":
    main()
