"""The program of a helper process: one more on the machine of a run's first process, which started it.

Ends when its standard input closes, so that no helper outlives the process it helps.
Imports nothing heavy before it watches for that.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

from phinetune.base.errors import PhinetuneError
from phinetune.runs.stopping import StopRequest


def main() -> int:
    """Take part in the run; `Processes` gives the arguments."""
    folder, project = Path(sys.argv[1]), Path(sys.argv[2])
    rank, size, is_sharded = int(sys.argv[3]), int(sys.argv[4]), bool(int(sys.argv[5]))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    stop = StopRequest()

    def ask(*_: object) -> None:
        stop.is_wanted = True

    signal.signal(signal.SIGTERM, ask)
    from phinetune.runs.following import follow
    from phinetune.runs.processes import Place, local_store, ready_file
    from phinetune.training.distributed import joined

    store = local_store(folder, size)
    ready_file(folder, rank).touch()
    try:
        with joined(rank, size, store=store, is_sharded=is_sharded) as ranks:
            follow(project, Place(rank=rank, size=size, local_rank=rank), ranks, stop)
    except PhinetuneError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def _end_with_parent() -> None:
    while os.read(0, 1):
        pass
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
