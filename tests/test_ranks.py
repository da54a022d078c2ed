"""Ranks that hang, die, leave, or are told to stop: the job ends in time, in its own words, with no
process left."""

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

pytestmark = pytest.mark.slow                   # ranks that are waited for

# ------------------------------------------------------------------------------- without a launcher

# How the program of every rank begins: it joins the others, and says by a file that it is ready.
RANK = """
import os, signal, sys, time
sys.path.insert(0, sys.argv[1])
import common
import torch
dist = common.init_distributed()
common.barrier()
open(f"{sys.argv[2]}/{dist.rank}", "w").close()
"""
# How it may go on:
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
x = torch.randn(2000, 2000)
began = time.time()
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


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_until(condition, seconds):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline
        time.sleep(0.05)


def start_ranks(folder, code, *words, silence=1):
    """Two ranks without a launcher, so that nobody but the ranks ends them; ready, which is a file
    of each."""
    def all_are_ready():
        return len(list(folder.iterdir())) >= 2

    port = free_port()
    ranks = []
    for rank in range(2):
        env = {**os.environ,
               "RANK": str(rank),
               "LOCAL_RANK": str(rank),
               "WORLD_SIZE": "2",
               "MASTER_ADDR": "127.0.0.1",
               "MASTER_PORT": str(port),
               "RANK_SILENCE": str(silence)}
        command = [sys.executable, "-c", RANK + code, str(ROOT), str(folder), *words]
        ranks.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE,
                                      stderr=subprocess.STDOUT, text=True))
    wait_until(all_are_ready, 120)
    return ranks


def end_of(ranks):
    """[(exit code, what it said)], of all that end within a minute."""
    ends = []
    for rank in ranks:
        said, _ = rank.communicate(timeout=60)
        ends.append((rank.returncode, said))
    return ends


def send(ranks, number):
    for rank in ranks:
        rank.send_signal(number)


def test_a_rank_that_is_stopped_ends_the_others(tmp_path):
    ranks = start_ranks(tmp_path, STOPS, silence=2)
    began = time.time()
    try:
        [(code, said)] = end_of(ranks[:1])
        assert code == 1
        assert time.time() - began < 10
        assert said == ("error: rank 1 has not answered for 2 s: the job is stopped; "
                        "the same command goes on from here\n")
    finally:
        ranks[1].kill()
        ranks[1].communicate()


@pytest.mark.parametrize("program, words", [(LEAVES, "0"), (LEAVES, "1"), (COMPUTES, "")], ids=[
    "the rank with the store leaves",
    "the other one leaves",
    "long computations"])
def test_no_alarm_where_nobody_hangs(tmp_path, program, words):
    for code, said in end_of(start_ranks(tmp_path, program, words)):
        assert code == 0, said
        assert "error" not in said


def test_a_job_that_sleeps_as_a_whole_goes_on(tmp_path):
    ranks = start_ranks(tmp_path, SLEEPS)
    send(ranks, signal.SIGSTOP)
    time.sleep(4)
    send(ranks, signal.SIGCONT)
    assert end_of(ranks) == [(0, ""), (0, "")]


def test_a_signal_that_finds_one_rank_before_its_loop_is_no_error(tmp_path):
    for code, said in end_of(start_ranks(tmp_path, APART)):
        assert code == 143, said
        assert "error" not in said


# ----------------------------------------------------------------------------------- under torchrun

# Five problems on two ranks: one has three of them and the other two.
UNEVEN = ("--model model --problems problems20.jsonl --lr 1e-3 --epochs 1000 --prompts-per-step 5 "
          "--rollouts 24 --max-prompt-tokens 500 --max-response-tokens 12 --token-budget 600 "
          "--verify-workers 1")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder of what UNEVEN names."""
    folder = tmp_path_factory.mktemp("inputs")
    make_world(folder)
    problems = []
    for i in range(20):
        problems.append({"pid": f"p{i}", "problem": f"What is {i} + 1?", "answer": str(i + 1)})
    write(folder / "problems20.jsonl", problems)
    return folder


def processes(run):
    """{process id: its rank, or None} of all that carry TEST_RUN=run: torchrun, ranks, verifier
    workers."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "environ").read_bytes().split(b"\0")
            command = (process / "cmdline").read_bytes()
        except OSError:                         # ended meanwhile
            continue
        if f"TEST_RUN={run}".encode() not in words:
            continue                            # another's, or a zombie, which has no environment
        ranks = [int(word[5:]) for word in words if word.startswith(b"RANK=")]
        is_rank = bool(ranks) and b"04_rlvr.py" in command
        found[int(process.name)] = ranks[0] if is_rank else None
    return found


def start_under_torchrun(inputs, out, log):
    """UNEVEN on two ranks; whatever it starts carries TEST_RUN=out."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc_per_node", "2", "--", str(ROOT / "04_rlvr.py"), "--out", str(out),
               *UNEVEN.split()]
    env = {**os.environ,
           "TEST_RUN": str(out),
           "RANK_SILENCE": "5",
           "TOKENIZERS_PARALLELISM": "false"}
    with open(log, "w") as file:
        return subprocess.Popen(command, cwd=inputs, env=env, stdout=file, stderr=file,
                                start_new_session=True)


def harm(what, launcher, rank_1):
    """Do this to the job, whose rank 1 has this process id."""
    if what == "SIGTERM":
        launcher.terminate()
    elif what == "Ctrl-C":
        os.killpg(launcher.pid, signal.SIGINT)
    elif what == "kill -9 of torchrun":
        launcher.kill()
    elif what == "kill -9 of a rank":
        os.kill(rank_1, signal.SIGKILL)
    elif what == "a rank is stopped":
        os.kill(rank_1, signal.SIGSTOP)
    else:
        raise ValueError(what)


@pytest.mark.parametrize("what, code, said", [
    ("SIGTERM", 1, "stopped; step"),
    ("Ctrl-C", 1, "stopped; step"),
    ("kill -9 of torchrun", -9, "stopped; step"),
    # rank 0 sees that the other is gone, or torchrun, which saw it first, tells it to stop
    ("kill -9 of a rank", 1, "rank 0 lost the other ranks|stopped by SIGTERM"),
    ("a rank is stopped", 1, "rank 1 has not answered for 5 s")])
def test_under_torchrun_nothing_is_left(inputs, tmp_path, what, code, said):
    out = tmp_path / "run"
    log = tmp_path / "log"
    metrics = out / "metrics.jsonl"
    # a rank that does not listen is killed by torchrun after 30 s: only the one that is stopped may
    # need that
    seconds_to_end = 60 if what == "a rank is stopped" else 28

    def has_two_steps_or_ended():
        has_two_steps = metrics.exists() and metrics.read_text().count("\n") >= 2
        return has_two_steps or launcher.poll() is not None

    def nothing_is_left():
        return launcher.poll() is not None and not processes(out)

    launcher = start_under_torchrun(inputs, out, log)
    try:
        wait_until(has_two_steps_or_ended, 180)
        assert launcher.poll() is None, log.read_text()
        rank_1 = next(pid for pid, rank in processes(out).items() if rank == 1)
        harm(what, launcher, rank_1)
        wait_until(nothing_is_left, seconds_to_end)
    finally:
        for pid in processes(out):
            os.kill(pid, signal.SIGKILL)
        launcher.wait()

    text = log.read_text()
    assert launcher.returncode == code, text
    assert re.search(said, text), text
    if "stopped;" in said:
        n_steps = metrics.read_text().count("\n")
        saved = sorted(path.name for path in out.glob("step-*"))
        assert saved[-1] == f"step-{n_steps:06d}", "the last step that was done is saved"
