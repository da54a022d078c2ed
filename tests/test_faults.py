"""Faults: bad input to every stage, and (marked `faults`, long) kills at every moment.

    bash tests/run.sh tests/test_faults.py                   bad input, a line a case: bad_input.py
    bash tests/run.sh tests/test_faults.py -m faults -s      the long suite: FAULTS=400 kills,
                                                             STOPS=80 stops, SEED=0
                                                             (STAGES="train rlvr": stops of these)

A stage is added with its line in COMMANDS (and its INPUT in bad_input.py).
"""

import contextlib
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

# ---------------------------------------------------------------------------- inputs of every stage


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def problem_rows():
    """Eight problems."""
    rows = []
    for i in range(8):
        rows.append({"pid": f"p{i}",
                     "problem": f"What is {i} + 1?",
                     "answer": str(i + 1),
                     "source": "x"})
    return rows


def source_rows(problems):
    """The problems as a teacher's data set has them, each with a response."""
    rows = []
    for problem in problems:
        answer = problem["answer"]
        rows.append({"query": problem["problem"],
                     "answer": answer,
                     "DeepSeek-R1_Response_List": [f"<think>a</think>\\boxed{{{answer}}}"]})
    return rows


def sample_rows(problems):
    """Two responses to each problem: a right one, then a wrong one."""
    rows = []
    for problem in problems:
        pid = problem["pid"]
        for k in range(2):
            text = f"<think>{'so ' * k}</think>\\boxed{{{int(problem['answer']) + k}}}"
            rows.append({"sid": f"{pid}:x:{k}",
                         "pid": pid,
                         "source": "x",
                         "k": k,
                         "seed": 1,
                         "response": text,
                         "n_tokens": len(text) + 1,
                         "finish": "stop"})
    return rows


def verified_rows(samples, problems):
    text_of = {problem["pid"]: problem["problem"] for problem in problems}
    rows = []
    for sample in samples:
        rows.append({**sample,
                     "predicted": "1",
                     "correct": sample["k"] == 0,
                     "status": "ok",
                     "problem": text_of[sample["pid"]]})
    return rows


def scored_rows(verified):
    score = {"nll_sum": 9.0, "n_scored": 10, "ppl": 2.5, "scorer": "m", "ppl_context": "response"}
    return [{**row, **score} for row in verified]


def training_rows(scored):
    rows = []
    for row in scored:
        rows.append({"sid": row["sid"],
                     "pid": row["pid"],
                     "problem": row["problem"],
                     "response": row["response"],
                     "objective": "ce" if row["correct"] else "ul",
                     "ppl": 2.5,
                     "n_tokens": row["n_tokens"]})
    return rows


def make_world(folder):
    """The inputs of every stage, small, and a link and a FIFO for bad input."""
    make_model(folder / "model")
    problems = problem_rows()
    samples = sample_rows(problems)
    verified = verified_rows(samples, problems)
    scored = scored_rows(verified)
    write(folder / "problems.jsonl", problems)
    write(folder / "source.jsonl", source_rows(problems))
    write(folder / "samples.jsonl", samples)
    write(folder / "verified.jsonl", verified)
    write(folder / "scored.jsonl", scored)
    write(folder / "self.jsonl", scored)
    write(folder / "train.jsonl", training_rows(scored))
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


# ---------------------------------------------------------------------------------------- bad input


@contextlib.contextmanager
def handlers_and_locks_given_back():
    """A stage that runs in this process leaves it its signal handlers, and no lock."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        common.release_locks()
        for number, handler in kept.items():
            signal.signal(number, handler)


def run_here(stage, more=()):
    """A stage in this process, as its last line runs it: exit code, 0 if it comes to its end."""
    script, *argv = COMMANDS[stage].split()
    module = importlib.import_module(script.removesuffix(".py"))
    with handlers_and_locks_given_back():
        try:
            common.run(lambda: module.main([*argv, *more]))
        except SystemExit as stop:
            return stop.code or 0
    return 0


def cases():
    for number, (stages, change, sentence) in enumerate(bad_input.CASES):
        for stage in stages.split():
            case_id = f"{stage}-{number}-{sentence[:40]}"
            yield pytest.param(stage, change, sentence, id=case_id)


@pytest.mark.parametrize("stage, change, sentence", list(cases()))
def test_bad_input_is_one_sentence(
        world, tmp_path, monkeypatch, capsys, stage, change, sentence):
    folder = copy_of(world, tmp_path / "w")
    more = change(folder, stage) or []
    monkeypatch.chdir(folder)
    inputs = [path for path in folder.glob("*.jsonl") if path.is_file()]
    before = {path: path.read_bytes() for path in inputs}

    code = run_here(stage, more)

    said = capsys.readouterr().err
    errors = [line for line in said.splitlines() if "error: " in line]
    assert code == 2, errors
    assert errors
    assert sentence in errors[-1], errors
    for path, data in before.items():
        assert path.read_bytes() == data, "an input was touched"
    assert not list(folder.rglob("*.tmp*"))
    assert not (folder / "run/final").exists()


def text_alone(value):
    """Ids of the cases in MEANT: their texts, and nothing for the function."""
    return value if isinstance(value, str) else ""


@pytest.mark.parametrize("stages, change, why", bad_input.MEANT, ids=text_alone)
def test_what_is_accepted_is_meant(world, tmp_path, monkeypatch, stages, change, why):
    for stage in stages.split():
        folder = copy_of(world, tmp_path / stage)
        more = change(folder, stage) or []
        monkeypatch.chdir(folder)
        assert run_here(stage, more) == 0


# -------------------------------------------------------------------- what a stage leaves, compared

TIMING = ("second", "flops", "mfu", "eta")  # what may differ between two runs, by part of its name


def without_timing(x):
    if not isinstance(x, dict):
        return x
    kept = {}
    for name, y in x.items():
        if not any(word in name for word in TIMING):
            kept[name] = without_timing(y)
    return kept


def plain(x):
    """Tensors as bytes, so that == says whether they are the same."""
    if isinstance(x, dict):
        return {name: plain(y) for name, y in x.items()}
    if isinstance(x, (list, tuple)):
        return [plain(y) for y in x]
    if isinstance(x, torch.Tensor):
        return x.dtype, x.shape, x.numpy().tobytes()
    return x


def content_of(path):
    """The bytes of a file; where it tells the time, what else it tells."""
    if path.name == "state.pt":                    # a zip whose layout is torch's affair
        return plain(torch.load(path, weights_only=True))
    data = path.read_bytes()
    if path.name == "metrics.jsonl":
        return [without_timing(json.loads(line)) for line in data.splitlines()]
    if path.name == "results.json":
        return without_timing(json.loads(data))
    return data


def contents(folder):
    """{name: content} of every file."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            found[str(path.relative_to(folder))] = content_of(path)
    return found


def differences(found, expected):
    """Names of the files that are in one only, or not the same in both."""
    names = found.keys() | expected.keys()
    return sorted(name for name in names if found.get(name) != expected.get(name))


# ------------------------------------------------------------------------------------ starting over

# Other settings than those of COMMANDS.
OTHER = {"teacher": "--limit 5", "model": "--seed 7", "verify": "--problems others.jsonl",
         "score": "--only wrong", "train": "--lr 2e-3", "rlvr": "--lr 2e-3", "eval": "--seed 7"}

# Files that are not a stage's, with names much like those that are.
FOREIGN = ("out.rankings.jsonl", "out.txt", "run/notes.txt", "run/step-1.log",
           "run/problems.rank.jsonl", "run/x/final/a")


def world_with_foreign_files(world, folder):
    """The world, its problems with other answers in others.jsonl, and the FOREIGN files."""
    copy_of(world, folder)
    others = []
    for line in (folder / "problems.jsonl").read_text().splitlines():
        others.append({**json.loads(line), "answer": "1"})
    write(folder / "others.jsonl", others)
    for name in FOREIGN:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("stage", OTHER)
def test_other_settings_are_refused_and_force_starts_over(
        world, tmp_path, monkeypatch, capsys, stage):
    """What --force leaves is what a first run leaves, and files that are not the stage's."""
    other = OTHER[stage].split()

    fresh = world_with_foreign_files(world, tmp_path / "fresh")
    monkeypatch.chdir(fresh)
    assert run_here(stage, other) == 0
    expected = contents(fresh)

    again = world_with_foreign_files(world, tmp_path / "again")
    monkeypatch.chdir(again)
    assert run_here(stage) == 0
    before = contents(again)
    assert differences(before, expected) != [], "the other settings change nothing"

    assert run_here(stage, other) == 2
    assert "--force starts over" in capsys.readouterr().err
    assert differences(contents(again), before) == []

    assert run_here(stage, [*other, "--force"]) == 0
    assert differences(contents(again), expected) == []
    for name in FOREIGN:
        assert (again / name).read_text() == "mine"


# ---------------------------------------------------------------------------------- kills and stops

GROWING = ("teacher", "model", "verify", "score", "select", "train", "rlvr", "eval")
ON_TWO_RANKS = ("model", "score", "train", "rlvr", "eval")

# (stage, number of ranks)
ALONE = [(stage, 1) for stage in GROWING]
IN_PAIRS = [(stage, 2) for stage in ON_TWO_RANKS]


@pytest.fixture(scope="module")
def stages():
    """call(stage, folder, ranks, **fault) -> what fork_stage.py answers."""
    server = subprocess.Popen(
        [sys.executable, str(ROOT / "tests/fork_stage.py")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false"})

    def call(stage, folder, ranks=1, kind="none", more=(), **fault):
        request = {"argv": [*COMMANDS[stage].split(), *more],
                   "folder": str(folder),
                   "ranks": ranks,
                   "fault": {"kind": kind, **fault}}
        print(json.dumps(request), file=server.stdin, flush=True)
        return json.loads(server.stdout.readline())

    yield call
    server.stdin.close()
    server.wait()


class Uninterrupted:
    """What each stage leaves, and how many file operations it makes, on so many ranks; made
    once."""

    def __init__(self, world, stages, folder):
        self.world = world
        self.stages = stages
        self.folder = folder
        self.known = {}

    def of(self, stage, ranks):
        """(contents, number of file operations, seconds)"""
        if (stage, ranks) not in self.known:
            folder = copy_of(self.world, self.folder / f"{stage}-{ranks}")
            answer = self.stages(stage, folder, ranks)
            assert answer["codes"] == [0] * ranks, answer["said"]
            self.known[stage, ranks] = contents(folder), answer["n"], answer["seconds"]
        return self.known[stage, ranks]


@pytest.fixture(scope="module")
def whole(world, stages, tmp_path_factory):
    return Uninterrupted(world, stages, tmp_path_factory.mktemp("whole"))


def check_end(stages, stage, folder, ranks, expected):
    """The same command again, to its end: the same files with the same contents, no process
    left."""
    answer = stages(stage, folder, ranks)
    assert answer["codes"] == [0] * ranks, answer
    assert not answer["left"], answer
    assert not answer["hung"], answer
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
    assert answer["codes"] == [-signal.SIGKILL], answer
    assert not answer["left"], answer
    check_end(stages, stage, folder, 1, expected)


def run_on_a_full_disk(world, stages, whole, stage, folder, place):
    """File operation number `place` finds the disk full: the stage stops without a traceback, and
    the same command goes on from there -> what it said, None where it was not refused."""
    expected, _, _ = whole.of(stage, 1)
    copy_of(world, folder)
    answer = stages(stage, folder, kind="full", n=place)
    if answer["codes"] == [0]:  # to make a directory that is there, or to remove, needs no disk
        assert differences(contents(folder), expected) == [], place
        return None
    assert answer["codes"] in ([1], [2]), (place, answer)
    assert no_traceback(answer), (place, answer)
    check_end(stages, stage, folder, 1, expected)
    return answer["said"][0]


@pytest.mark.slow
@pytest.mark.parametrize("stage", GROWING)
def test_a_full_disk_is_one_sentence_and_nothing_is_lost(world, stages, whole, tmp_path, stage):
    _, n, _ = whole.of(stage, 1)
    n_refused = 0
    for place in (1, n // 2, n - 1):
        said = run_on_a_full_disk(world, stages, whole, stage, tmp_path / str(place), place)
        if said is not None:
            n_refused += 1
            assert "No space left on device" in said
    assert n_refused >= 1


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["train", "rlvr"])
def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one_whole(
        world, stages, whole, tmp_path, stage):
    expected, _, _ = whole.of(stage, 1)
    folder = copy_of(world, tmp_path / "w")
    size = (folder / "model/model.safetensors").stat().st_size
    for limit in (size // 2, size + 100_000):      # in the midst of the weights, and of state.pt
        answer = stages(stage, folder, kind="limit", bytes=limit)
        assert answer["codes"] == [1], answer
        assert no_traceback(answer), answer
        assert "the checkpoint cannot be written" in answer["said"][0]
        assert not list((folder / "run").glob("step-*"))
    check_end(stages, stage, folder, 1, expected)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["train", "rlvr"])
def test_two_ranks_start_over_together(world, stages, tmp_path, stage):
    """None of them takes the finished run, which another is about to remove, for its own."""
    forced = [*OTHER[stage].split(), "--force"]
    fresh = copy_of(world, tmp_path / "fresh")
    again = copy_of(world, tmp_path / "again")
    for folder, more in [(fresh, forced), (again, ["--seed", "7"]), (again, forced)]:
        answer = stages(stage, folder, 2, more=more)
        assert answer["codes"] == [0, 0], answer
    assert differences(contents(fresh), contents(again)) == []


# ----------------------------------------------------------------------------------- the long suite


def random_fault(draw, n, seconds, ranks):
    """The end of one rank: at one of its `n` file operations, or at any moment of the run."""
    rank = draw.randrange(ranks)
    if draw.random() < 0.7:
        return {"kind": "kill",
                "n": draw.randint(1, n),
                "rank": rank,
                "torn": draw.random() < 0.5}
    return {"kind": "signal", "number": 9, "seconds": draw.uniform(0, seconds)}


@pytest.mark.faults
def test_random_kills(world, stages, whole, tmp_path):
    """FAULTS kills, half of them on two ranks where a stage has them; each file operation as
    likely."""
    seed = int(os.environ.get("SEED", 0))
    n_kills = int(os.environ.get("FAULTS", 400))
    draw = random.Random(seed)
    counts = Counter()
    kinds = ALONE + IN_PAIRS * 2
    while counts["kills"] < n_kills:
        stage, ranks = kinds[counts["runs"] % len(kinds)]
        expected, n, seconds = whole.of(stage, ranks)
        folder = copy_of(world, tmp_path / f"{counts['runs']}")
        counts["runs"] += 1
        for _ in range(draw.randint(1, 3)):
            fault = random_fault(draw, n, seconds, ranks)
            answer = stages(stage, folder, ranks, **fault)
            where = f"seed {seed}, run {counts['runs']}, {stage} on {ranks}: {fault}, {answer}"
            counts["kills"] += any(answer["codes"])
            counts[f"kills on {ranks}"] += any(answer["codes"])
            assert not answer["hung"], where
            assert not answer["left"], where
        answer = stages(stage, folder, ranks)
        assert answer["codes"] == [0] * ranks, f"{where}\nthen {answer}"
        unequal = differences(contents(folder), expected)
        assert unequal == [], f"{where}\nunequal: {unequal}"
        shutil.rmtree(folder)
    print(f"seed {seed}: {dict(counts)}; 0 lost, 0 doubled, 0 unequal, 0 left processes")


@pytest.mark.faults
def test_random_stops(world, stages, whole, tmp_path):
    """STOPS times Ctrl-C or SIGTERM at a random moment: no traceback, gone in time, nothing
    lost."""
    seed = int(os.environ.get("SEED", 0))
    n_stops = int(os.environ.get("STOPS", 80))
    draw = random.Random(seed)
    counts = Counter()
    kinds = ALONE + IN_PAIRS
    if "STAGES" in os.environ:                     # these alone, on as many ranks as they have
        chosen = os.environ["STAGES"].split()
        kinds = [(stage, 2 if stage in ON_TWO_RANKS else 1) for stage in chosen]
    longest = 0
    while counts["stops"] < n_stops:
        stage, ranks = kinds[counts["runs"] % len(kinds)]
        expected, _, seconds = whole.of(stage, ranks)
        folder = copy_of(world, tmp_path / f"{counts['runs']}")
        counts["runs"] += 1
        number = draw.choice([signal.SIGINT, signal.SIGTERM])
        moment = draw.uniform(0, seconds)
        answer = stages(stage, folder, ranks, kind="signal", number=number, seconds=moment)
        where = (f"seed {seed}, {stage} on {ranks}, signal {number} after {moment:.2f} s: "
                 f"{answer}")
        # -number: Python has put its handlers away, after the stage's last line
        assert set(answer["codes"]) <= {0, 128 + number, -number}, where
        assert no_traceback(answer), where
        assert not answer["hung"], where
        assert not answer["left"], where
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
    _, n, _ = whole.of(stage, 1)
    n_refused = 0
    for place in range(1, n + 1):
        folder = tmp_path / str(place)
        said = run_on_a_full_disk(world, stages, whole, stage, folder, place)
        if said is not None:
            n_refused += 1
        shutil.rmtree(folder)
    assert n_refused > n // 2
    print(f"{stage}: a full disk at each of {n} operations, {n_refused} refused")
