"""Runs commands of ldm-sg for tests/test_reliability.py, each in a fork of this process, which has imported everything, and kills
some of them: a JSON line in, {"args": [...], "after": seconds or null}, a JSON line out, {"killed": bool, "code": int}."""

import json
import os
import signal
import sys
import time

import ldm_sg.build
import ldm_sg.training.fit
import ldm_sg.verbs.annotate  # noqa: F401
from ldm_sg.cli import main


def child(args: list[str], log: str) -> None:
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = [sys.argv[0], *args]
    try:
        main()
    except SystemExit as err:
        os._exit(err.code if isinstance(err.code, int) else 1)
    os._exit(0)


def run(args: list[str], after: float | None, log: str) -> dict:
    if (pid := os.fork()) == 0:
        child(args, log)
    start = time.monotonic()
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return {"killed": False, "code": os.waitstatus_to_exitcode(status), "seconds": time.monotonic() - start}
        if after is not None and time.monotonic() - start > after:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return {"killed": True, "code": -9, "seconds": after}
        time.sleep(0.002)


if __name__ == "__main__" and len(sys.argv) > 1 and sys.argv[1] == "zygote":
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(run(asked["args"], asked["after"], asked["log"])), flush=True)
elif __name__ == "__main__":
    main()  # another rank of a run that was started here
