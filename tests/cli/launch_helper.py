"""A launcher of the command: every line of standard input is a JSON list of arguments, for two processes that
share the work. It imports everything once and forks, as starting Python anew takes longer than the work.

Prints their ids when they begin, and their exit codes when they have ended.
"""

from __future__ import annotations

import json
import os
import socket
import sys

import moe_sampler.cli.root
import moe_sampler.pipelines.hybrid  # noqa: F401
from moe_sampler.cli import main

COUNT = 2


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def begin(arguments: list[str]) -> list[int]:
    shared = {"WORLD_SIZE": str(COUNT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    os.environ |= shared | {"LOCAL_WORLD_SIZE": str(COUNT), "ACCELERATE_USE_CPU": "true"}
    pids = []
    for rank in range(COUNT):
        pid = os.fork()
        if pid == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            sys.argv = ["moe-sampler", *arguments]
            os.dup2(2, 1)  # what it prints is not for who asked
            try:
                main()
            except SystemExit as end:
                os._exit(int(end.code or 0))
            except BaseException:
                os._exit(70)
            os._exit(0)
        pids.append(pid)
    return pids


print(json.dumps("ready"), flush=True)
for line in sys.stdin:
    pids = begin(json.loads(line))
    print(json.dumps(pids), flush=True)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)
