"""Ranks that hang, die, leave, or are told to stop: the job ends in time, in its own words, with no process left."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

from pathlib import Path

import pytest
from conftest import ROOT
from test_faults import make_world, write

pytestmark = pytest.mark.slow                                # ranks that are waited for

RANK = """
import os, signal, sys, time
sys.path.insert(0, sys.argv[1])
import common
import torch
dist = common.init_distributed()
common.barrier()
open(f"{sys.argv[2]}/{dist.rank}", "w").close()
"""
STOPS = """
if dist.rank == 1:
    os.kill(os.getpid(), signal.SIGSTOP)
common.barrier()
"""
LEAVES = """
if dist.rank == int(sys.argv[3]):
    sys.exit(0)
time.sleep(4)
"""
COMPUTES = """
x, began = torch.randn(2000, 2000), time.time()
while dist.rank == 1 and time.time() < began + 4:
    x @ x
y = torch.randn(4500, 4500) @ torch.randn(4500, 4500)        # one call, seconds long
common.barrier()
"""
SLEEPS = """
time.sleep(2)
common.barrier()
"""

# SIGTERM to both: one is in its loop and notes it, the other has not come there and leaves.
APART = """
if dist.rank == 1:
    stop = common.StopFlag()
os.kill(os.getpid(), signal.SIGTERM)
common.run(common.barrier)
"""


def start_ranks(folder, code, *words, silence=1):
    """Two ranks without a launcher, so that nobody but the ranks ends them; ready, which is a file of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(2):
        env = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
               "MASTER_PORT": str(port), "RANK_SILENCE": str(silence)}
        command = [sys.executable, "-c", RANK + code, str(ROOT), str(folder), *words]
        ranks.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    deadline = time.time() + 120
    while len(list(folder.iterdir())) < 2:
        assert time.time() < deadline
        time.sleep(0.05)
    return ranks


def end_of(ranks):
    """[(exit code, what it said)], of all that end within a minute."""
    ends = []
    for rank in ranks:
        said, _ = rank.communicate(timeout=60)
        ends.append((rank.returncode, said))
    return ends


def test_a_rank_that_is_stopped_ends_the_others(tmp_path):
    ranks = start_ranks(tmp_path, STOPS, silence=2)
    began = time.time()
    try:
        (code, said), = end_of(ranks[:1])
        assert code == 1 and time.time() - began < 10
        assert said == ("error: rank 1 has not answered for 2 s: the job is stopped; "
                        "the same command goes on from here\n")
    finally:
        ranks[1].kill()
        ranks[1].communicate()


@pytest.mark.parametrize("code, words", [(LEAVES, "0"), (LEAVES, "1"), (COMPUTES, "")],
                         ids=["the rank with the store leaves", "the other one leaves", "long computations"])
def test_no_alarm_where_nobody_hangs(tmp_path, code, words):
    ends = end_of(start_ranks(tmp_path, code, words))
    assert [code for code, _ in ends] == [0, 0]
    assert not any("error" in said for _, said in ends)


def test_a_job_that_sleeps_as_a_whole_goes_on(tmp_path):
    ranks = start_ranks(tmp_path, SLEEPS)
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for rank in ranks:
            rank.send_signal(number)
        time.sleep(4 if number == signal.SIGSTOP else 0)
    assert end_of(ranks) == [(0, ""), (0, "")]


def test_a_signal_that_finds_one_rank_before_its_loop_is_no_error(tmp_path):
    ends = end_of(start_ranks(tmp_path, APART))
    assert [code for code, _ in ends] == [143, 143] and not any("error" in said for _, said in ends)


# ------------------------------------------------------------------------------------------------ under torchrun

# Five problems on two ranks: one has three of them and the other two.
UNEVEN = ("04_rlvr.py --model model --problems problems20.jsonl --out run --lr 1e-3 --epochs 1000 --prompts-per-step 5 "
          "--rollouts 24 --max-prompt-tokens 500 --max-response-tokens 12 --token-budget 600 --verify-workers 1")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    make_world(folder)
    write(folder / "problems20.jsonl", [{"pid": f"p{i}", "problem": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(20)])
    return folder


def processes(run):
    """{process id: its rank, or None} of all that carry TEST_RUN=run: torchrun, ranks, verifier workers."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "environ").read_bytes().split(b"\0")
            command = (process / "cmdline").read_bytes()
        except OSError:                                      # ended meanwhile
            continue
        if f"TEST_RUN={run}".encode() in words:              # not a zombie, which has no environment any more
            ranks = [int(word[5:]) for word in words if word.startswith(b"RANK=")]
            found[int(process.name)] = ranks[0] if ranks and b"04_rlvr.py" in command else None
    return found


def wait_until(condition, seconds):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("name, code, said", [
    ("SIGTERM", 1, "stopped; step"), ("Ctrl-C", 1, "stopped; step"), ("kill -9 of torchrun", -9, "stopped; step"),
    # rank 0 sees that the other is gone, or torchrun, which saw it first, tells it to stop
    ("kill -9 of a rank", 1, "rank 0 lost the other ranks|stopped by SIGTERM"),
    ("a rank is stopped", 1, "rank 1 has not answered for 5 s")])
def test_under_torchrun_nothing_is_left(inputs, tmp_path, name, code, said):
    out, log = tmp_path / "run", tmp_path / "log"
    words = UNEVEN.replace("--out run", f"--out {out}").split()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--",
               str(ROOT / words[0]), *words[1:]]
    env = {**os.environ, "TEST_RUN": str(out), "RANK_SILENCE": "5", "TOKENIZERS_PARALLELISM": "false"}
    with open(log, "w") as file:
        launcher = subprocess.Popen(command, cwd=inputs, env=env, stdout=file, stderr=file, start_new_session=True)
    metrics = out / "metrics.jsonl"
    try:
        wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2 or launcher.poll() is not None, 180)
        assert launcher.poll() is None, log.read_text()
        rank_1 = next(pid for pid, rank in processes(out).items() if rank == 1)
        {"SIGTERM": launcher.terminate, "kill -9 of torchrun": launcher.kill,
         "Ctrl-C": lambda: os.killpg(launcher.pid, signal.SIGINT),
         "kill -9 of a rank": lambda: os.kill(rank_1, signal.SIGKILL),
         "a rank is stopped": lambda: os.kill(rank_1, signal.SIGSTOP)}[name]()
        # a rank that does not listen is killed by torchrun after 30 s: only the one that is stopped may need that
        wait_until(lambda: launcher.poll() is not None and not processes(out), 60 if name == "a rank is stopped" else 28)
    finally:
        for pid in processes(out):
            os.kill(pid, signal.SIGKILL)
        launcher.wait()
    text = log.read_text()
    assert launcher.returncode == code and re.search(said, text), text
    rows, saved = metrics.read_text().count("\n"), sorted(path.name for path in out.glob("step-*"))
    assert "stopped;" not in said or saved[-1] == f"step-{rows:06d}"
