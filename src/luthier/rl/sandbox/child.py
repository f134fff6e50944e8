"""The first code of a sandboxed process: behind the walls, then an answer or a judge. Read `walls.py` first.

    python -I -S -B -c BOOTSTRAP '{"role": "answer", "walls": "namespaces", "channel": 3, ...}'   (program on stdin)

Started by `processes.py`, never imported by the package.
"""

import json
import os
import sys

from . import answer, judge, walls, wire

REFUSED = 97  # the exit code where the kernel refuses the walls; stderr names the wall


def main() -> None:
    config = json.loads(sys.argv[1])
    walls.end_with_parent(config["parent"])
    source = os.fdopen(0, "rb", closefd=False).read().decode("utf-8", "replace")
    os.environ.clear()
    try:
        walls.enter(config, config["work"])
    except walls.NoWalls as error:
        os.write(2, str(error).encode())
        os._exit(REFUSED)
    if config["role"] == "probe":
        os._exit(0)
    empty = os.open("/dev/null", os.O_RDWR)
    for handle in (0, 1, 2):
        os.dup2(empty, handle)
    channel = wire.Channel(config["channel"], config["channel"])
    if config["role"] == "answer":
        answer.AnswerProcess(channel).serve(source)
    else:
        reason = judge.Judge(channel).run(source)
        wire.send_all(config["verdict"], json.dumps({"passed": not reason, "reason": reason}).encode())
    os._exit(0)
