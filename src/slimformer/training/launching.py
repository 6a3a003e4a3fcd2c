"""Says whether a launcher started several processes of this program, and starts those that accelerate does not. It imports no torch.

`accelerate launch --cpu --num_processes 2` starts one process unless MPI is there (huggingface/accelerate issue 2741), and tells it
of two only by the address at which they would meet. The command line then hands itself to torch's own launcher.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

COUNT_FLAGS = ("--num_processes", "--num-processes")


def launched() -> bool:
    """Whether several processes of this program were started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def helps() -> bool:
    """Whether this is not the first of several processes."""
    return launched() and os.environ.get("RANK", "0") != "0"


def wanted_processes(command: Sequence[str]) -> int:
    """The number of processes that a command line of accelerate asks for; 1 if it asks for none.

    >>> wanted_processes(["accelerate", "launch", "--num_processes", "2", "--cpu", "-m", "slimformer"])
    2
    """
    for flag, value in zip(command, [*command[1:], ""], strict=False):
        name, _, inside = flag.partition("=")
        if name in COUNT_FLAGS and (inside or value).isdigit():
            return int(inside or value)
    return 1


def start_all() -> None:
    """Replaces this process by torch's launcher of several if accelerate was asked for them and started one."""
    alone = "WORLD_SIZE" not in os.environ and "MASTER_PORT" in os.environ
    if not alone or os.environ.get("ACCELERATE_USE_CPU", "").lower() != "true":
        return
    import psutil

    parent = psutil.Process().parent()
    count = wanted_processes(parent.cmdline()) if parent is not None else 1
    if count > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count), "-m", "slimformer"]
        os.execv(sys.executable, [sys.executable, *launcher, *sys.argv[1:]])
