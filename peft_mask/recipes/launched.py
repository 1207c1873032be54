"""How a script ends that may have been launched as several processes."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

_kept: list[object] = []


def keep(trainer: object) -> None:
    """Keep a trainer, and its DistributedDataParallel, from being freed before the process is left (see `run`)."""
    _kept[:] = [trainer]


def run(main: Callable[[], object]) -> None:
    """Call a script's `main`; of several processes, leave each as soon as it is done, without Python's own end.

    On CPUs a process can else wait for ever, or abort: once the process group is destroyed, DistributedDataParallel is
    the last to refer to it. Where that is freed it waits for a thread of gloo, and that one for Python, to free the
    tensors of the last collective (torch 2.13). So what is passed to `keep` is not freed at all.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        main()
        return
    status = 1
    try:
        main()
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
