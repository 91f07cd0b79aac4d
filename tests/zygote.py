"""A process that has imported torch once and forks a command line for each line on its stdin.

So a test can start a command, send it signals and read its exit status in some 0.1 s.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import sys
import traceback
from typing import Any, NoReturn

STOPPING = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


def main() -> None:
    import torch

    import distbn_convert.checkpoint.api
    import distbn_convert.checkpoint.edit
    import distbn_convert.checkpoint.folderstore
    import distbn_convert.checkpoint.torchstore
    import distbn_convert.cli  # noqa: F401

    torch.set_num_threads(1)
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            run(json.loads(line))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def run(request: dict[str, Any]) -> NoReturn:
    """Become the command line, with the limits and faults that are asked for."""
    from distbn_convert.checkpoint import temporaries

    status = 99
    try:
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        if request.get("largest_file"):
            limit = (request["largest_file"], resource.RLIM_INFINITY)
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        for target in request.get("broken", ()):
            break_function(target)
        status = command_line(request["args"])
    except BaseException:
        traceback.print_exc()
    finally:
        temporaries._remove_ours(os.getpid())  # torch's own functions at exit take 0.1 s
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def command_line(args: list[str]) -> int:
    """Run the command; signals reach it while it guards against them, not before or after."""
    from distbn_convert import cli

    original = cli.cli.main

    def unblock(*rest: Any, **options: Any) -> Any:
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
            return original(*rest, **options)
        finally:
            signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)

    cli.cli.main = unblock  # type: ignore[method-assign]
    try:
        cli.main(args)
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 98
    return 97


def break_function(target: str) -> None:
    """Make ``module:function`` fail as a broken disk does, or do nothing if it ends in ``!``."""
    module, name = target.rstrip("!").split(":")

    def fail(*args: Any, **options: Any) -> None:
        if not target.endswith("!"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    __import__(module)
    setattr(sys.modules[module], name, fail)


if __name__ == "__main__":
    main()
