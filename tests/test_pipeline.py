"""`bash run_all.sh` on a miniature of the toy: every stage, a run that is killed and goes on equals one that is not."""

import json
import os
import signal
import subprocess
import time

import pytest
from conftest import ROOT

CHANGES = {'arms = ["sft", "sft_lp", "oxa_mle", "oxa_full"]': 'arms = ["sft", "oxa_full"]',
           'rlvr_arms = ["sft", "oxa_full"]': 'rlvr_arms = ["oxa_full"]',
           'world_args = ["--careful-share", "0.12", "--traces", "16"]': 'world_args = ["--n-queries", "80", "--traces", "4", "--n-eval", "12", "--n-rlvr", "24"]',
           "n_ce = 1000": "n_ce = 64", "n_ul = 1000": "n_ul = 64", "epochs = 5": "epochs = 2", "k = 8": "k = 4", "n = 4\ntemperature": "n = 2\ntemperature", "n = 32": "n = 4",
           "save_every = 50": "save_every = 1", "max_steps = 15": "max_steps = 2"}


def start(recipe, folder):
    env = {**os.environ, "RUNS": str(folder)}
    return subprocess.Popen(["bash", "run_all.sh", str(recipe)], cwd=ROOT, env=env, start_new_session=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_as_an_uninterrupted_one(tmp_path):
    text = (ROOT / "recipes/toy.toml").read_text()
    for old, new in CHANGES.items():
        assert old in text, old
        text = text.replace(old, new, 1)
    recipe = tmp_path / "mini.toml"
    recipe.write_text(text)
    whole, broken = start(recipe, tmp_path / "whole"), start(recipe, tmp_path / "broken")
    mark, deadline = tmp_path / "broken/mini/seed-0/oxa_full/sft/metrics.jsonl", time.time() + 400
    while not mark.exists() and broken.poll() is None and time.time() < deadline:
        time.sleep(0.2)
    assert broken.poll() is None, broken.communicate()[0]
    os.killpg(broken.pid, signal.SIGKILL)
    broken.communicate()
    assert broken.returncode == -signal.SIGKILL and not (tmp_path / "broken/mini/report/REPORT.md").exists()
    again = start(recipe, tmp_path / "broken")
    out_whole, _ = whole.communicate(timeout=600)
    out_again, _ = again.communicate(timeout=600)
    assert whole.returncode == 0, out_whole
    assert again.returncode == 0, out_again
    for name in ("base/eval", "sft/eval", "oxa_full/eval", "oxa_full/eval_rlvr"):
        results = [json.loads((tmp_path / run / "mini/seed-0" / name / "results.json").read_text())["benchmarks"]
                   for run in ("whole", "broken")]
        assert results[0] == results[1] and set(results[0]) == {"id", "hard"}
    assert "C1" in out_whole and "REPORT.md" in out_whole and (tmp_path / "whole/mini/report/REPORT.md").exists()
    third = start(recipe, tmp_path / "whole")
    out_third, _ = third.communicate(timeout=600)
    commands = [line for line in out_third.splitlines() if line.startswith("+ ")]
    assert third.returncode == 0 and len(commands) == 1 and "tools.report" in commands[0], commands

    recipe.write_text(recipe.read_text().replace("lr = 3e-4", "lr = 1e-3"))       # the old result is not the new recipe's
    edited = start(recipe, tmp_path / "whole")
    out_edited, _ = edited.communicate(timeout=600)
    assert edited.returncode == 2 and "+ python 03_train_oxa.py" in out_edited and "REPORT.md" not in out_edited
    assert "error: " in out_edited and "other settings" in out_edited and "lr" in out_edited
