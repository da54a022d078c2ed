"""The guard: a change that should be neutral is shown to be (a five-step curve of 03 and of 04, the
training sets, one evaluation).

Every stage runs once, by its command line, on a small toy world. What comes out is held against
tests/guard.json: sets and responses by hash, floats to 1e-5 (another CPU may move their last bits).
A change that is meant to move a number renews the file in its own commit, and its message says why:

    python tests/test_guard.py          writes tests/guard.json anew
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STORED = Path(__file__).with_name("guard.json")

ARMS = ("sft", "sft_lp", "oxa_mle", "oxa_full")

# What is compared of a training set, of an evaluation, and of each step of 03 and of 04.
SET_FIELDS = ("sid", "pid", "problem", "response", "objective", "n_tokens")
EVAL_FIELDS = ("pid", "k", "seed", "response", "n_tokens", "finish", "predicted", "correct",
               "status")
SFT_CURVE = ("loss", "ce_loss", "ul_loss", "entropy_ce", "entropy_ul", "grad_norm", "lr")
RLVR_CURVE = ("reward", "loss", "pg_loss", "kl", "entropy", "grad_norm", "response_tokens_mean")

# ------------------------------------------------------------------------------------ what came out


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def hash_of(rows, names):
    """One hash of these fields of all rows, in their order."""
    lines = []
    for row in rows:
        fields = [row[name] for name in names]
        lines.append(json.dumps(fields, ensure_ascii=False))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def curve(path, names):
    """These numbers of each step of a metrics.jsonl."""
    steps = []
    for row in read(path):
        steps.append({name: row[name] for name in names})
    return steps


# ------------------------------------------------------------------------------- running the stages

RECIPE = ("--recipe", "recipes/toy.toml")
WITH_BASE = ("--model", "toy/base")


def run(*words):
    """A stage as the command line runs it: it must end well."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def make_samples(folder):
    """The world; a teacher's and the base's responses in it, verified and scored."""
    problems = folder / "problems.jsonl"
    run("toy/world.py", "--out", folder, "--seed", 0, "--careful-share", 0.12, "--n-queries", 160,
        "--traces", 8, "--n-eval", 16, "--n-rlvr", 48)
    run("01_sample.py", "teacher", *RECIPE, *WITH_BASE, "--problems", problems,
        "--source", folder / "teacher_source.jsonl", "--answers", "join",
        "--out", folder / "teacher.jsonl")
    run("01_sample.py", "model", *RECIPE, *WITH_BASE, "--problems", problems, "--n", 2, "--seed", 0,
        "--out", folder / "self.jsonl")
    for name in ("teacher", "self"):
        samples = folder / f"{name}.jsonl"
        verified = folder / f"{name}.verified.jsonl"
        scored = folder / f"{name}.scored.jsonl"
        run("02_verify_score.py", "verify", "--samples", samples, "--problems", problems,
            "--out", verified)
        run("02_verify_score.py", "score", *RECIPE, *WITH_BASE, "--samples", verified,
            "--out", scored)


def select(folder, arm):
    """The training set of an arm."""
    out = folder / f"{arm}.jsonl"
    run("02_verify_score.py", "select", *RECIPE, "--arm", arm, "--n-ce", 96, "--n-ul", 96,
        "--teacher", folder / "teacher.scored.jsonl", "--self", folder / "self.scored.jsonl",
        "--seed", 0, "--out", out)
    return read(out)


def measure(folder: Path) -> dict:
    """Runs the five stages in `folder`; returns the curves and the hashes."""
    make_samples(folder)
    training_sets = {}
    ppl_mean = {}
    for arm in ARMS:
        rows = select(folder, arm)
        training_sets[arm] = hash_of(rows, SET_FIELDS)
        ppl_mean[arm] = sum(row["ppl"] for row in rows) / len(rows)

    run("03_train_oxa.py", *RECIPE, *WITH_BASE, "--data", folder / "oxa_full.jsonl",
        "--epochs", 5, "--ce-per-step", 64, "--ul-per-step", 64, "--token-budget", 2048,
        "--out", folder / "sft")
    run("04_rlvr.py", *RECIPE, *WITH_BASE, "--problems", folder / "rlvr.jsonl",
        "--prompts-per-step", 8, "--rollouts", 8, "--max-steps", 5, "--token-budget", 2048,
        "--out", folder / "rlvr")
    run("05_eval.py", *RECIPE, *WITH_BASE, "--problems", folder / "id.jsonl", "--n", 4,
        "--out", folder / "eval")
    return {"training_sets": training_sets,
            "ppl_mean": ppl_mean,
            "sft": curve(folder / "sft/metrics.jsonl", SFT_CURVE),
            "rlvr": curve(folder / "rlvr/metrics.jsonl", RLVR_CURVE),
            "evaluation": hash_of(read(folder / "eval/id.jsonl"), EVAL_FIELDS)}


# ----------------------------------------------------------------------------------------- the test


@pytest.mark.slow
def test_training_sets_curves_and_evaluation_are_as_committed(tmp_path):
    stored = json.loads(STORED.read_text())
    found = measure(tmp_path)
    assert found["training_sets"] == stored["training_sets"]
    assert found["evaluation"] == stored["evaluation"]
    assert found["ppl_mean"] == pytest.approx(stored["ppl_mean"], rel=1e-5)
    for stage in ("sft", "rlvr"):
        assert len(stored[stage]) == 5
        assert len(found[stage]) == 5
        for now, then in zip(found[stage], stored[stage]):
            assert now == pytest.approx(then, rel=1e-5, abs=1e-7)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        found = measure(Path(temporary))
    STORED.write_text(json.dumps(found, indent=1) + "\n")
