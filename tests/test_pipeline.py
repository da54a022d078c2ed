"""`bash run_all.sh` on a miniature of the toy: every stage, a run that is killed and goes on equals
one that is not."""

import json
import os
import signal
import subprocess
import time

import pytest
from conftest import ROOT

# What the miniature changes in recipes/toy.toml, each where it stands first.
CHANGES = {
    'arms = ["sft", "sft_lp", "oxa_mle", "oxa_full"]': 'arms = ["sft", "oxa_full"]',
    'rlvr_arms = ["sft", "oxa_full"]': 'rlvr_arms = ["oxa_full"]',
    'world_args = ["--careful-share", "0.12", "--traces", "16"]':
        'world_args = ["--n-queries", "80", "--traces", "4", "--n-eval", "12", "--n-rlvr", "24"]',
    "n_ce = 1000": "n_ce = 64",
    "n_ul = 1000": "n_ul = 64",
    "epochs = 5": "epochs = 2",
    "k = 8": "k = 4",
    "n = 4\ntemperature": "n = 2\ntemperature",
    "n = 32": "n = 4",
    "save_every = 50": "save_every = 1",
    "max_steps = 15": "max_steps = 2",
}

EVALUATIONS = ("base/eval", "sft/eval", "oxa_full/eval", "oxa_full/eval_rlvr")


def write_miniature(path):
    text = (ROOT / "recipes/toy.toml").read_text()
    for old, new in CHANGES.items():
        assert old in text, old
        text = text.replace(old, new, 1)
    path.write_text(text)
    return path


def start(recipe, folder):
    """`bash run_all.sh RECIPE`, into this folder."""
    env = {**os.environ, "RUNS": str(folder)}
    return subprocess.Popen(["bash", "run_all.sh", str(recipe)], cwd=ROOT, env=env,
                            start_new_session=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


def end_of(run):
    """(exit code, what it printed) when it is at its end."""
    printed, _ = run.communicate(timeout=600)
    return run.returncode, printed


def kill_in_training(run, folder):
    """Kill the run and all that it started, when the training of oxa_full has begun."""
    mark = folder / "mini/seed-0/oxa_full/sft/metrics.jsonl"
    deadline = time.time() + 400
    while not mark.exists() and run.poll() is None and time.time() < deadline:
        time.sleep(0.2)
    assert run.poll() is None, run.communicate()[0]
    os.killpg(run.pid, signal.SIGKILL)
    run.communicate()
    assert run.returncode == -signal.SIGKILL


def benchmarks(folder, evaluation):
    """The numbers of an evaluation."""
    path = folder / "mini/seed-0" / evaluation / "results.json"
    return json.loads(path.read_text())["benchmarks"]


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_as_an_uninterrupted_one(tmp_path):
    """Then the finished run is started again, which only reports, and with an edited recipe, which
    is refused."""
    recipe = write_miniature(tmp_path / "mini.toml")
    whole = tmp_path / "whole"
    broken = tmp_path / "broken"

    # two runs side by side; one is killed and started again
    run_whole = start(recipe, whole)
    run_broken = start(recipe, broken)
    kill_in_training(run_broken, broken)
    assert not (broken / "mini/report/REPORT.md").exists()
    run_again = start(recipe, broken)
    code, printed = end_of(run_whole)
    code_again, printed_again = end_of(run_again)
    assert code == 0, printed
    assert code_again == 0, printed_again
    for evaluation in EVALUATIONS:
        expected = benchmarks(whole, evaluation)
        assert set(expected) == {"id", "hard"}
        assert benchmarks(broken, evaluation) == expected
    assert "C1" in printed
    assert "REPORT.md" in printed
    assert (whole / "mini/report/REPORT.md").exists()

    # what has finished is not run again
    code, printed = end_of(start(recipe, whole))
    commands = [line for line in printed.splitlines() if line.startswith("+ ")]
    assert code == 0, printed
    assert len(commands) == 1, commands
    assert "tools.report" in commands[0]

    # the old result is not the new recipe's
    recipe.write_text(recipe.read_text().replace("lr = 3e-4", "lr = 1e-3"))
    code, printed = end_of(start(recipe, whole))
    assert code == 2, printed
    assert "+ python 03_train_oxa.py" in printed
    assert "REPORT.md" not in printed
    assert "error: " in printed
    assert "other settings" in printed
    assert "lr" in printed
