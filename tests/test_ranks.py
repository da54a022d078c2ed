"""Ranks that hang, die, leave, or are told to stop: the job ends in time, in its own words, with no process left."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT

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
