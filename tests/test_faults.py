"""Faults: bad input to every stage, and (marked `faults`, long) kills at every moment.

    bash tests/run.sh tests/test_faults.py                          bad input, a line a case: bad_input.py
    bash tests/run.sh tests/test_faults.py -m faults -s             the long suite; FAULTS=400 kills, SEED=0

A stage is added with its line in COMMANDS (and its INPUT in bad_input.py).
"""

import importlib
import json
import os
import shutil
import signal
import sys

import pytest

import bad_input
import common
from conftest import make_model

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


@pytest.mark.parametrize("stage, change, sentence", cases())
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
