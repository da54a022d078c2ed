"""Faults: bad input to every stage, and (marked `faults`, long) kills at every moment.

    bash tests/run.sh tests/test_faults.py                          bad input, a line a case: bad_input.py
    bash tests/run.sh tests/test_faults.py -m faults -s             the long suite: FAULTS=400 kills, STOPS=80
                                                                    stops (STAGES="train rlvr": of these alone), SEED=0

A stage is added with its line in COMMANDS (and its INPUT in bad_input.py).
"""

import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter

import pytest
import torch

import bad_input
import common
from conftest import ROOT, make_model

COMMANDS = {
    "problems": "01_sample.py problems --source problems.jsonl --out out.jsonl",
    "teacher": "01_sample.py teacher --source source.jsonl --answers column --model model "
               "--out out.jsonl --problems-out out_problems.jsonl",
    "model": "01_sample.py model --model model --problems problems.jsonl --n 2 --max-tokens 8 "
             "--max-prompt-tokens 500 --out out.jsonl",
    "verify": "02_verify_score.py verify --samples samples.jsonl --problems problems.jsonl "
              "--workers 1 --block 5 --out out.jsonl",
    "score": "02_verify_score.py score --samples verified.jsonl --model model --block 5 "
             "--token-budget 600 --max-score-tokens 600 --out out.jsonl",
    "select": "02_verify_score.py select --arm oxa_full --teacher scored.jsonl "
              "--self self.jsonl --n-ce 4 --n-ul 4 --out out.jsonl",
    "show": "02_verify_score.py show --samples samples.jsonl",
    "train": "03_train_oxa.py --model model --data train.jsonl --out run --epochs 2 --lr 1e-3 "
             "--ce-per-step 2 --ul-per-step 2 --save-every 1 --token-budget 600 --max-tokens 600",
    "rlvr": "04_rlvr.py --model model --problems problems.jsonl --out run --lr 1e-3 --max-steps 3 "
            "--prompts-per-step 2 --rollouts 2 --max-prompt-tokens 500 --max-response-tokens 8 "
            "--save-every 1 --token-budget 600 --verify-workers 1",
    "eval": "05_eval.py --model model --problems problems.jsonl --out run --n 2 --max-tokens 8 "
            "--entropy-samples 1 --token-budget 600 --verify-workers 1",
}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_world(folder):
    """The inputs of every stage, small: eight problems, two responses each."""
    make_model(folder / "model")
    problems = [{"pid": f"p{i}", "problem": f"What is {i} + 1?", "answer": str(i + 1), "source": "x"} for i in range(8)]
    source = [{"query": p["problem"], "answer": p["answer"],
               "DeepSeek-R1_Response_List": [f"<think>a</think>\\boxed{{{p['answer']}}}"]} for p in problems]
    samples = []
    for p in problems:
        for k in range(2):
            text = f"<think>{'so ' * k}</think>\\boxed{{{int(p['answer']) + k}}}"
            samples.append({"sid": f"{p['pid']}:x:{k}", "pid": p["pid"], "source": "x", "k": k, "seed": 1,
                            "response": text, "n_tokens": len(text) + 1, "finish": "stop"})
    verified = []
    for i, s in enumerate(samples):
        verified.append({**s, "predicted": "1", "correct": i % 2 == 0, "status": "ok", "problem": problems[i // 2]["problem"]})
    scored = [{**row, "nll_sum": 9.0, "n_scored": 10, "ppl": 2.5, "scorer": "m", "ppl_context": "response"} for row in verified]
    train = [{"sid": row["sid"], "pid": row["pid"], "problem": row["problem"], "response": row["response"],
              "objective": "ce" if row["correct"] else "ul", "ppl": 2.5, "n_tokens": row["n_tokens"]} for row in scored]
    for name, rows in {"problems": problems, "source": source, "samples": samples, "verified": verified,
                       "scored": scored, "self": scored, "train": train}.items():
        write(folder / f"{name}.jsonl", rows)
    (folder / "link").symlink_to("self.jsonl")
    os.mkfifo(folder / "fifo")


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    return folder


def copy_of(world, folder):
    """The world again; the model is linked, a case that changes it makes a copy."""
    folder.mkdir(exist_ok=True)
    for path in world.iterdir():
        if path.name == "model":
            (folder / "model").mkdir()
            for file in path.iterdir():
                (folder / "model" / file.name).hardlink_to(file)
        elif path.name == "fifo":
            os.mkfifo(folder / "fifo")
        else:
            shutil.copy(path, folder / path.name, follow_symlinks=False)
    return folder


def run_here(stage, more=()):
    """A stage in this process, as its last line runs it: exit code, 0 if it comes to its end."""
    script, *argv = COMMANDS[stage].split()
    module = importlib.import_module(script.removesuffix(".py"))
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        common.run(lambda: module.main([*argv, *more]))
        return 0
    except SystemExit as stop:
        return stop.code or 0
    finally:
        common.release_locks()
        for number, handler in kept.items():
            signal.signal(number, handler)


def cases():
    for number, (stages, change, sentence) in enumerate(bad_input.CASES):
        for stage in stages.split():
            yield pytest.param(stage, change, sentence, id=f"{stage}-{number}-{sentence[:40]}")


@pytest.mark.parametrize("stage, change, sentence", list(cases()))
def test_bad_input_is_one_sentence(world, tmp_path, monkeypatch, capsys, stage, change, sentence):
    folder = copy_of(world, tmp_path / "w")
    more = change(folder, stage) or []
    monkeypatch.chdir(folder)
    before = {path.name: path.read_bytes() for path in folder.glob("*.jsonl") if path.is_file()}
    code = run_here(stage, more)
    said = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert code == 2 and said and sentence in said[-1], said
    for name, data in before.items():
        assert (folder / name).read_bytes() == data, "an input was touched"
    assert not list(folder.rglob("*.tmp*")) and not (folder / "run/final").exists()


@pytest.mark.parametrize("stages, change, why", bad_input.MEANT, ids=lambda x: x if isinstance(x, str) else "")
def test_what_is_accepted_is_meant(world, tmp_path, monkeypatch, stages, change, why):
    for stage in stages.split():
        folder = copy_of(world, tmp_path / stage)
        more = change(folder, stage) or []
        monkeypatch.chdir(folder)
        assert run_here(stage, more) == 0


# --------------------------------------------------------------------------------------- starting over

OTHER = {"teacher": "--limit 5", "model": "--seed 7", "verify": "--problems others.jsonl", "score": "--only wrong",
         "train": "--lr 2e-3", "rlvr": "--lr 2e-3", "eval": "--seed 7"}
FOREIGN = ("out.rankings.jsonl", "out.txt", "run/notes.txt", "run/step-1.log", "run/problems.rank.jsonl", "run/x/final/a")


@pytest.mark.slow
@pytest.mark.parametrize("stage", OTHER)
def test_other_settings_are_refused_and_force_starts_over(world, tmp_path, monkeypatch, capsys, stage):
    """What --force leaves is what a first run leaves, and files that are not the stage's."""
    ends = []
    for name in ("fresh", "again"):
        folder = copy_of(world, tmp_path / name)
        others = [{**json.loads(line), "answer": "1"} for line in (folder / "problems.jsonl").read_text().splitlines()]
        write(folder / "others.jsonl", others)
        for path in FOREIGN:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text("mine")
        monkeypatch.chdir(folder)
        more = OTHER[stage].split()
        if name == "again":
            assert run_here(stage) == 0
            before = contents(folder)
            assert run_here(stage, more) == 2
            assert "--force starts over" in capsys.readouterr().err and differences(contents(folder), before) == []
            more.append("--force")
        assert run_here(stage, more) == 0
        ends.append(contents(folder))
    assert differences(*ends) == [] and differences(before, ends[0]) != []
    assert all((folder / path).read_text() == "mine" for path in FOREIGN)


# ----------------------------------------------------------------------------------- kills and stops

GROWING = ("teacher", "model", "verify", "score", "select", "train", "rlvr", "eval")
ON_TWO_RANKS = ("model", "score", "train", "rlvr", "eval")
TIMING = ("second", "flops", "mfu", "eta")           # what may differ between two runs, by part of its name


@pytest.fixture(scope="module")
def stages():
    """call(stage, folder, ranks, **fault) -> what fork_stage.py answers."""
    words = [sys.executable, str(ROOT / "tests/fork_stage.py")]
    server = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                              env={**os.environ, "TOKENIZERS_PARALLELISM": "false"})

    def call(stage, folder, ranks=1, kind="none", more=(), **fault):
        argv = [*COMMANDS[stage].split(), *more]
        request = {"argv": argv, "folder": str(folder), "ranks": ranks, "fault": {"kind": kind, **fault}}
        print(json.dumps(request), file=server.stdin, flush=True)
        return json.loads(server.stdout.readline())

    yield call
    server.stdin.close()
    server.wait()


def without_timing(x):
    if isinstance(x, dict):
        return {name: without_timing(y) for name, y in x.items() if not any(word in name for word in TIMING)}
    return x


def plain(x):
    """Tensors as bytes, so that == says whether they are the same."""
    if isinstance(x, dict):
        return {name: plain(y) for name, y in x.items()}
    if isinstance(x, (list, tuple)):
        return [plain(y) for y in x]
    return (x.dtype, x.shape, x.numpy().tobytes()) if isinstance(x, torch.Tensor) else x


def contents(folder):
    """{name: bytes} of every file; where a file tells the time, what else it tells."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and not path.is_symlink():
            found[name] = path.read_bytes()
            if path.name == "metrics.jsonl":
                found[name] = [without_timing(json.loads(line)) for line in found[name].splitlines()]
            elif path.name == "state.pt":                    # a zip whose layout is torch's affair
                found[name] = plain(torch.load(path, weights_only=True))
            elif path.name == "results.json":
                found[name] = without_timing(json.loads(found[name]))
    return found


class Uninterrupted:
    """What each stage leaves, and how many file operations it makes, on so many ranks; made once."""

    def __init__(self, world, stages, folder):
        self.world, self.stages, self.folder, self.known = world, stages, folder, {}

    def of(self, stage, ranks):
        if (stage, ranks) not in self.known:
            folder = copy_of(self.world, self.folder / f"{stage}-{ranks}")
            answer = self.stages(stage, folder, ranks)
            assert answer["codes"] == [0] * ranks, answer["said"]
            self.known[stage, ranks] = contents(folder), answer["n"], answer["seconds"]
        return self.known[stage, ranks]


@pytest.fixture(scope="module")
def whole(world, stages, tmp_path_factory):
    return Uninterrupted(world, stages, tmp_path_factory.mktemp("whole"))


def differences(found, expected):
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))


def check_end(stages, stage, folder, ranks, expected):
    """The same command again, to its end: the same files with the same contents, no process left."""
    answer = stages(stage, folder, ranks)
    assert answer["codes"] == [0] * ranks and not answer["left"] and not answer["hung"], answer
    assert differences(contents(folder), expected) == []


def no_traceback(answer):
    return not any("Traceback" in text for text in answer["said"])


@pytest.mark.slow
@pytest.mark.parametrize("stage", GROWING)
def test_a_stage_that_is_killed_goes_on_to_the_same_bytes(world, stages, whole, tmp_path, stage):
    """One kill, in the midst of its file operations (the long suite: at every kind of moment)."""
    expected, n, _ = whole.of(stage, 1)
    folder = copy_of(world, tmp_path / "w")
    answer = stages(stage, folder, kind="kill", n=n // 2, torn=True)
    assert answer["codes"] == [-signal.SIGKILL] and not answer["left"], answer
    check_end(stages, stage, folder, 1, expected)


@pytest.mark.slow
@pytest.mark.parametrize("stage", GROWING)
def test_a_full_disk_is_one_sentence_and_nothing_is_lost(world, stages, whole, tmp_path, stage):
    expected, n, _ = whole.of(stage, 1)
    n_refused = 0
    for place in (1, n // 2, n - 1):
        folder = copy_of(world, tmp_path / str(place))
        answer = stages(stage, folder, kind="full", n=place)
        if answer["codes"] == [0]:               # to make a directory that is there, or to remove, needs no disk
            assert differences(contents(folder), expected) == []
            continue
        n_refused += 1
        assert answer["codes"] in ([1], [2]) and no_traceback(answer), answer
        assert "No space left on device" in answer["said"][0]
        check_end(stages, stage, folder, 1, expected)
    assert n_refused >= 1


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["train", "rlvr"])
def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one_whole(world, stages, whole, tmp_path, stage):
    expected, _, _ = whole.of(stage, 1)
    folder = copy_of(world, tmp_path / "w")
    size = (folder / "model/model.safetensors").stat().st_size
    for limit in (size // 2, size + 100_000):                # in the midst of the weights, and of state.pt
        answer = stages(stage, folder, kind="limit", bytes=limit)
        assert answer["codes"] == [1] and no_traceback(answer), answer
        assert "the checkpoint cannot be written" in answer["said"][0]
        assert not list((folder / "run").glob("step-*"))
    check_end(stages, stage, folder, 1, expected)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["train", "rlvr"])
def test_two_ranks_start_over_together(world, stages, tmp_path, stage):
    """None of them takes the finished run, which another is about to remove, for its own."""
    ends = []
    for name, runs in (("fresh", 1), ("again", 2)):
        folder = copy_of(world, tmp_path / name)
        for more in [["--seed", "7"], [*OTHER[stage].split(), "--force"]][-runs:]:
            answer = stages(stage, folder, 2, more=more)
            assert answer["codes"] == [0, 0], answer
        ends.append(contents(folder))
    assert differences(*ends) == []


@pytest.mark.faults
def test_random_kills(world, stages, whole, tmp_path):
    """FAULTS kills, half of them on two ranks where a stage has them; each file operation as likely."""
    seed, n_kills = int(os.environ.get("SEED", 0)), int(os.environ.get("FAULTS", 400))
    draw, counts = random.Random(seed), Counter()
    kinds = [(stage, 1) for stage in GROWING] + [(stage, 2) for stage in ON_TWO_RANKS] * 2
    while counts["kills"] < n_kills:
        stage, ranks = kinds[counts["runs"] % len(kinds)]
        expected, n, seconds = whole.of(stage, ranks)
        folder = copy_of(world, tmp_path / f"{counts['runs']}")
        counts["runs"] += 1
        for _ in range(draw.randint(1, 3)):
            rank = draw.randrange(ranks)
            if draw.random() < 0.7:
                fault = {"kind": "kill", "n": draw.randint(1, n), "rank": rank, "torn": draw.random() < 0.5}
            else:
                fault = {"kind": "signal", "number": 9, "seconds": draw.uniform(0, seconds)}
            answer = stages(stage, folder, ranks, **fault)
            where = f"seed {seed}, run {counts['runs']}, {stage} on {ranks}: {fault}, {answer}"
            counts["kills"] += any(answer["codes"])
            counts[f"kills on {ranks}"] += any(answer["codes"])
            assert not answer["hung"] and not answer["left"], where
        answer = stages(stage, folder, ranks)
        assert answer["codes"] == [0] * ranks, f"{where}\nthen {answer}"
        unequal = differences(contents(folder), expected)
        assert unequal == [], f"{where}\nunequal: {unequal}"
        shutil.rmtree(folder)
    print(f"seed {seed}: {dict(counts)}; 0 lost, 0 doubled, 0 unequal, 0 left processes")


@pytest.mark.faults
def test_random_stops(world, stages, whole, tmp_path):
    """STOPS times Ctrl-C or SIGTERM at a random moment: no traceback, gone in time, nothing lost."""
    seed, n_stops = int(os.environ.get("SEED", 0)), int(os.environ.get("STOPS", 80))
    draw, counts = random.Random(seed), Counter()
    kinds = [(stage, 1) for stage in GROWING] + [(stage, 2) for stage in ON_TWO_RANKS]
    if "STAGES" in os.environ:                           # these alone, on as many ranks as they have
        kinds = [(stage, 2 if stage in ON_TWO_RANKS else 1) for stage in os.environ["STAGES"].split()]
    longest = 0
    while counts["stops"] < n_stops:
        stage, ranks = kinds[counts["runs"] % len(kinds)]
        expected, n, seconds = whole.of(stage, ranks)
        folder = copy_of(world, tmp_path / f"{counts['runs']}")
        counts["runs"] += 1
        number, moment = draw.choice([signal.SIGINT, signal.SIGTERM]), draw.uniform(0, seconds)
        answer = stages(stage, folder, ranks, kind="signal", number=number, seconds=moment)
        where = f"seed {seed}, {stage} on {ranks}, signal {number} after {moment:.2f} s: {answer}"
        # -number: Python has put its handlers away, after the stage's last line
        assert set(answer["codes"]) <= {0, 128 + number, -number} and no_traceback(answer), where
        assert not answer["hung"] and not answer["left"], where
        longest = max(longest, answer["seconds"] - moment)
        counts["stops"] += any(answer["codes"])
        answer = stages(stage, folder, ranks)
        assert answer["codes"] == [0] * ranks, f"{where}\nthen {answer}"
        assert differences(contents(folder), expected) == [], where
        shutil.rmtree(folder)
    print(f"seed {seed}: {dict(counts)}; the slowest left after {longest:.1f} s")


@pytest.mark.faults
@pytest.mark.parametrize("stage", GROWING)
def test_a_full_disk_at_every_operation(world, stages, whole, tmp_path, stage):
    expected, n, _ = whole.of(stage, 1)
    n_refused = 0
    for place in range(1, n + 1):
        folder = copy_of(world, tmp_path / str(place))
        answer = stages(stage, folder, kind="full", n=place)
        if answer["codes"] == [0]:               # to make a directory that is there, or to remove, needs no disk
            assert differences(contents(folder), expected) == [], place
        else:
            n_refused += 1
            assert answer["codes"] in ([1], [2]) and no_traceback(answer), (place, answer)
            check_end(stages, stage, folder, 1, expected)
        shutil.rmtree(folder)
    assert n_refused > n // 2
    print(f"{stage}: a full disk at each of {n} operations, {n_refused} refused")
