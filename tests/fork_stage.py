"""Runs stages as forks of one warm process, and does them harm where it is told.

A JSON request a line on stdin, a JSON answer a line on stdout:

    argv      the command line of a stage, run in `folder`
    ranks     so many processes, as torchrun starts them
    fault     kill    SIGKILL before file operation `n` of rank `rank`; `torn`: in the midst of a
                      row
              full    that operation fails: no space left on device
              limit   no file can grow over `bytes`: a disk that is full in the midst of a file
              signal  `number` to every rank after `seconds`
              none

    codes     exit code of each rank, negative for a signal
    n         file operations of rank 0, if it came to its end
    hung      the ranks that were killed 15 s after another had ended, or after 20 minutes
    left      processes that were still there 10 s after the last rank
    said      stderr of each rank
    seconds   of wall clock

File operations are what Python's audit events say (files opened for writing, renamed, removed,
directories made and removed) and the rows that are appended.
"""

import errno
import importlib
import json
import os
import resource
import signal
import socket
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common

import torch
# what a stage would import: a fork has it at once
import transformers.models.qwen2.modeling_qwen2

torch.set_num_threads(1)
STAGES = {path.stem: importlib.import_module(path.stem) for path in sorted(ROOT.glob("0*.py"))}
import engines
import grading.verifier

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
EVENTS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")


class Harm:
    """Counts the file operations of this process, and strikes at one of them."""

    def __init__(self, folder, fault):
        self.folder = str(folder)
        self.fault = fault
        self.n = 0
        self.write = common.JsonlWriter.write
        common.JsonlWriter.write = lambda writer, row: self.append(writer, row)
        sys.addaudithook(self.watch)

    def watch(self, event, args):
        if (event == "open" and isinstance(args[0], (str, bytes))
                and isinstance(args[2], int) and args[2] & WRITES):
            self.count(os.fsdecode(args[0]))
        elif event in EVENTS:
            self.count(os.fsdecode(args[0]))

    def count(self, path, is_row=False) -> bool:
        """Strikes if it is time; true: a row is to be torn, by the caller."""
        if os.path.isabs(path) and not path.startswith(self.folder):
            return False
        self.n += 1
        if self.n != self.fault.get("n"):
            return False
        if self.fault["kind"] == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        if not (is_row and self.fault.get("torn")):
            os.kill(os.getpid(), signal.SIGKILL)
        return True

    def append(self, writer, row):
        if self.count(self.folder, is_row=True):
            line = json.dumps(row, ensure_ascii=False).encode()
            os.write(writer.file.fileno(), line[:len(line) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        self.write(writer, row)


def log_of(folder, rank):
    return Path(f"{folder}.rank{rank}.log")


def be_rank(rank, port, request):
    """In the child: the stage, to its end. Raises SystemExit."""
    folder = request["folder"]
    log = os.open(log_of(folder, rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(folder)
    if request["ranks"] > 1:
        os.environ |= {"RANK": str(rank),
                       "LOCAL_RANK": str(rank),
                       "WORLD_SIZE": str(request["ranks"]),
                       "MASTER_ADDR": "127.0.0.1",
                       "MASTER_PORT": str(port)}
    os.environ["FAULT_RUN"] = str(folder)
    fault = request["fault"]
    if fault["kind"] == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault["bytes"], fault["bytes"]))
    harm = Harm(folder, fault if fault.get("rank", 0) == rank
                and fault["kind"] in ("kill", "full") else {})
    script, *argv = request["argv"]
    common.run(lambda: STAGES[script.removesuffix(".py")].main(argv))
    n = harm.n
    Path(f"{folder}.rank{rank}.n").write_text(str(n))
    sys.exit(0)


def left_over(folder) -> list[int]:
    """Processes that this run started and that are still there."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"FAULT_RUN={folder}\0".encode() in (process / "environ").read_bytes():
                found.append(int(process.name))
        except OSError:                                      # ended meanwhile
            continue
    return found


def send(pids, number):
    for pid in pids:
        os.kill(pid, number)


def watch_over(pids: dict, fault) -> tuple[dict, list]:
    """As a launcher: when one rank ends badly the others get SIGTERM, and 15 s later SIGKILL."""
    start = time.time()
    codes, hung = {}, []
    deadline = None
    strike = start + fault["seconds"] if fault["kind"] == "signal" else None
    while pids:
        for rank, pid in list(pids.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                codes[rank] = os.waitstatus_to_exitcode(status)
                del pids[rank]
                if codes[rank] and deadline is None and pids and strike is None:
                    send(pids.values(), signal.SIGTERM)
                    deadline = time.time() + 15
        if strike and time.time() > strike:
            send(pids.values(), fault["number"])
            strike = None
            deadline = time.time() + 15
        if (deadline and time.time() > deadline) or time.time() > start + 1200:
            hung = sorted(pids)
            send(pids.values(), signal.SIGKILL)
            deadline = time.time() + 60
        time.sleep(0.01)
    return codes, hung


def serve(request):
    start = time.time()
    folder = request["folder"]
    ranks = range(request["ranks"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = {}
    for rank in ranks:
        pids[rank] = os.fork()
        if pids[rank] == 0:
            be_rank(rank, port, request)
    codes, hung = watch_over(pids, request["fault"])
    seconds = time.time() - start
    patience = time.time() + 10
    while (left := left_over(folder)) and time.time() < patience:
        time.sleep(0.05)
    send(left, signal.SIGKILL)
    count = Path(f"{folder}.rank0.n")
    n = int(count.read_text()) if count.exists() else None
    count.unlink(missing_ok=True)
    said = [log_of(folder, rank).read_text(errors="replace") for rank in ranks]
    return {"codes": [codes[rank] for rank in ranks],
            "n": n,
            "hung": hung,
            "left": len(left),
            "said": said,
            "seconds": seconds}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), flush=True)
