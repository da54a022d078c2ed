"""Job control of run_all.sh and toy/study.sh (tools/jobs.sh), and hostile recipes: no value reaches a shell."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

ENV = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent", "PYTHON": sys.executable}


def script(folder, lines, side_by_side=1):
    """A run's shell with `lines`; its commands write to `folder`."""
    head = f"set -euo pipefail\ncd {ROOT}\nsource tools/jobs.sh\nwatch_signals\ncd {folder}\nlogs={folder}/logs\n"
    return head + f"side_by_side={side_by_side}\n{lines}\n"


def run(folder, lines, side_by_side=1):
    return subprocess.run(["bash", "-c", script(folder, lines, side_by_side)], capture_output=True, text=True,
                          env=ENV, timeout=60)


def start(folder, lines, side_by_side=1):
    return subprocess.Popen(["bash", "-c", script(folder, lines, side_by_side)], env=ENV, start_new_session=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition, seconds=20):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline
        time.sleep(0.05)


def is_alive(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


# ------------------------------------------------------------------------------------------------- what is run again


def test_a_finished_command_is_not_run_again(tmp_path):
    line = "step a/one bash -c 'echo hello; echo x >> count'"
    first = run(tmp_path, line)
    assert first.returncode == 0 and "hello" in first.stdout and "done: a/one" in first.stdout
    again = run(tmp_path, line)
    assert again.stdout == "" and (tmp_path / "count").read_text() == "x\n"
    mark = (tmp_path / "logs/a/one.done").read_text().splitlines()
    assert mark[1].startswith("seconds ") and (tmp_path / "logs/a/one.log").read_text() == "hello\n"


def test_other_words_values_or_inputs_run_it_again(tmp_path):
    (tmp_path / "in.jsonl").write_text("{}\n")
    (tmp_path / "03_train_oxa.py").write_text("open('count', 'a').write('x')\n")

    def count(words="--data in.jsonl", values='{"lr": 1}'):
        done = run(tmp_path, f"section_of[03_train_oxa.py]='{values}'\nstep one python 03_train_oxa.py {words}")
        assert done.returncode == 0, done.stderr
        return len((tmp_path / "count").read_text())

    assert [count(), count()] == [1, 1]
    assert count(values='{"lr": 2}') == 2 and count(values='{"lr": 2}') == 2         # an edited recipe
    assert count("--data in.jsonl --seed 3", '{"lr": 2}') == 3                         # other words
    later = time.time() + 5
    os.utime(tmp_path / "03_train_oxa.py", (later, later))                             # the code is no input
    assert count("--data in.jsonl --seed 3", '{"lr": 2}') == 3
    os.utime(tmp_path / "in.jsonl", (later, later))                                    # a renewed input
    assert count("--data in.jsonl --seed 3", '{"lr": 2}') == 4


def test_an_output_that_was_removed_is_made_again_and_the_log_before_is_kept(tmp_path):
    for _ in range(2):
        done = run(tmp_path, "step one bash -c 'echo made; mkdir out; echo x >> count' --out out")
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "count").read_text() == "x\n" and not (tmp_path / "logs/one.log.1").exists()
    (tmp_path / "out").rmdir()
    run(tmp_path, "step one bash -c 'echo made; mkdir out; echo x >> count' --out out")
    assert (tmp_path / "count").read_text() == "x\nx\n" and (tmp_path / "logs/one.log.1").read_text() == "made\n"


def test_words_are_printed_as_they_can_be_pasted(tmp_path):
    done = run(tmp_path, "step one printf '%s|' 'a b' \"it's\" '$(id)'")
    assert "a b|it's|$(id)|" in done.stdout
    command = next(line for line in done.stdout.splitlines() if line.startswith("+ "))[2:]
    assert subprocess.run(["bash", "-c", command], capture_output=True, text=True).stdout == "a b|it's|$(id)|"


def test_a_failed_command_ends_the_run_with_its_last_words(tmp_path):
    done = run(tmp_path, "spawn bad bash -c 'echo error: no such thing; exit 7'\nspawn late sleep 30\njoin\necho no", 2)
    assert done.returncode == 7 and "no\n" not in done.stdout
    assert "error: no such thing" in done.stderr and "error: 'bad' ended with code 7" in done.stderr
    assert not (tmp_path / "logs/bad.done").exists()


def test_side_by_side(tmp_path):
    """Four commands of 0.6 s, two at once: never three, and done in less than three times as long as one."""
    each = "bash -c 'touch on.$$; ls on.* | wc -l >> seen; sleep 0.6; rm on.$$'"
    began = time.time()
    done = run(tmp_path, "for i in 1 2 3 4; do spawn step$i " + each + "; done; join", 2)
    assert done.returncode == 0 and done.stdout.count("done: ") == 4
    seen = [int(line) for line in (tmp_path / "seen").read_text().split()]
    assert max(seen) == 2 and time.time() - began < 2.4 + 2


# --------------------------------------------------------------------------------------------- signals, kill -9, the lock


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_commands_too(tmp_path, number, code):
    lines = "spawn one bash -c 'echo $$ > pid; exec sleep 60'\nspawn two sleep 60\njoin"
    shell = start(tmp_path, lines, 2)
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    shell.send_signal(number)
    shell.communicate(timeout=20)
    assert shell.returncode == code and not is_alive(int((tmp_path / "pid").read_text()))


def test_commands_end_with_a_shell_that_is_killed(tmp_path):
    shell = start(tmp_path, "spawn one bash -c 'echo $$ > pid; exec sleep 60'\njoin", 2)
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    pid = int((tmp_path / "pid").read_text())
    shell.kill()
    shell.wait()
    wait_for(lambda: not is_alive(pid), 5)


def test_two_at_once_are_refused_also_after_kill_9(tmp_path):
    """A command that does not listen outlives the shell; the restart names it instead of starting beside it."""
    lines = "lock lock\nspawn one bash -c 'trap \"\" TERM; echo $$ > pid; sleep 60 9>&-; :'\njoin"
    shell = start(tmp_path, lines, 2)
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    pid = (tmp_path / "pid").read_text().strip()
    try:
        for _ in range(2):
            second = run(tmp_path, lines)
            assert second.returncode == 2 and second.stderr.count("\n") == 1
            assert pid in second.stderr and "error: another start of this command is at work" in second.stderr
            shell.kill()
            shell.communicate()
        assert is_alive(pid)
    finally:
        os.killpg(int(shell.pid), signal.SIGKILL)
    wait_for(lambda: not is_alive(pid))
    assert run(tmp_path, "lock lock\necho free").stdout == "free\n"


# ----------------------------------------------------------------------------------------------------- hostile values


HOSTILE = ["$(touch MARK)", "a[$(touch MARK)]", "x; touch MARK; `touch MARK`", "' touch MARK '",
           '"; touch MARK; "', "-e touch MARK", "x}; touch MARK; {"]
NO_TEXT = ["first_seed", "n_seeds", "side_by_side", "cards", "rlvr_seeds", "data_per_seed", "rlvr_limits"]    # by number


def toml_text(text):
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def recipe_with(**values):
    """A recipe whose [run] has these values, TOML."""
    run = {"world": '"none"', "base_model": '"Qwen2.5-0.5B"', "rlvr_source": '"o/x"', "arms": '["sft"]',
           "cards": "1", "benchmarks": '{aime24 = "o/y"}', **values}
    return "[run]\n" + "".join(f"{key} = {value}\n" for key, value in run.items())


def run_all(*arguments, **env):
    return subprocess.run(["bash", ROOT / "run_all.sh", *arguments], capture_output=True, text=True, timeout=60,
                          env={**ENV, **env}, stdin=subprocess.DEVNULL)


def is_refused(done, mark):
    return done.returncode == 2 and done.stderr.startswith("error: ") and not mark.exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_hostile_values_run_nothing(tmp_path, number):
    mark, recipe = tmp_path / "mark", tmp_path / "r.toml"
    text = toml_text(HOSTILE[number].replace("MARK", str(mark)))
    texts = {"self_model": text, "rlvr_source": text, "benchmarks": f"{{aime24 = {text}}}", "world_args": f"[{text}]"}
    recipe.write_text(recipe_with(**texts))                                   # what may be any text
    done = run_all(recipe, "--plan", RUNS=str(tmp_path))
    assert done.returncode == 0 and not mark.exists(), done.stderr
    for values in ({"arms": f"[{text}]"}, {"benchmarks": f"{{{text} = 'x'}}"}, {text: "1"}, {NO_TEXT[number]: text}):
        recipe.write_text(recipe_with(**values))
        done = run_all(recipe, "--plan", RUNS=str(tmp_path))
        assert is_refused(done, mark) and done.stderr.count("\n") == 1
    done = run_all(recipe, RUNS=str(tmp_path))                                # without --plan, too
    assert is_refused(done, mark) and NO_TEXT[number] in done.stderr


def test_hostile_values_of_a_run_that_starts(tmp_path):
    """The world's name reaches its script as one word, and no shell."""
    mark, recipe = tmp_path / "mark", tmp_path / "r.toml"
    name = f"x; touch {mark}; $(touch {mark})"
    recipe.write_text((ROOT / "recipes/toy.toml").read_text().replace('"deep-leap"', toml_text(name)))
    done = run_all(recipe, RUNS=str(tmp_path / "runs"))
    assert done.returncode == 2 and not mark.exists()
    assert "argument --world: invalid choice" in done.stderr and name in done.stderr


def test_hostile_seeds_names_and_environment_run_nothing(tmp_path):
    mark = tmp_path / "mark"
    words = f"x[$(touch {mark})]"
    for arguments in (["toy", "--plan", "--seeds", words], ["toy", "--seeds", words], ["toy", "--seeds"],
                      ["toy", "--plan", "--seeds", "0"], [words], ["--" + words]):
        assert is_refused(run_all(*arguments, RUNS=str(tmp_path)), mark)
    for name in ("NPROC", "NNODES", "NODE_RANK"):
        done = run_all("toy", "--plan", RUNS=str(tmp_path), **{name: words})
        assert is_refused(done, mark) and name in done.stderr
    hostile = tmp_path / f"a[$(touch {mark.name})] 'b'.toml"
    hostile.write_text((ROOT / "recipes/toy.toml").read_text())
    done = run_all(hostile, "--plan", RUNS=str(tmp_path / "$(touch mark)"))
    assert done.returncode == 0 and not mark.exists() and not (ROOT / "mark").exists()
    study = subprocess.run(["bash", ROOT / "toy/study.sh", words], capture_output=True, text=True, timeout=60, env=ENV)
    assert study.returncode == 2 and not mark.exists()


def test_values_with_spaces_and_quotes_arrive_whole(tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text(recipe_with(rlvr_source=toml_text("a 'b' \"c\" $HOME *")))
    done = run_all(recipe, "--plan", RUNS=str(tmp_path))
    command = next(line for line in done.stdout.splitlines() if "rlvr.jsonl" in line and "problems" in line)
    words = subprocess.run(["bash", "-c", "printf '%s\\n' " + command.split("] ", 1)[1]], capture_output=True, text=True)
    assert "a 'b' \"c\" $HOME *" in words.stdout.splitlines()


# ------------------------------------------------------------------------------------------------------------ plan, limits


@pytest.mark.parametrize("kind, limits", [("equal", set()), ("published", {"16384", "18432"})])
def test_response_limits_of_rlvr(tmp_path, kind, limits):
    recipe = tmp_path / "r.toml"
    (tmp_path / "paper_1.5b.toml").write_text((ROOT / "recipes/paper_1.5b.toml").read_text())
    recipe.write_text(f'from = "paper_1.5b"\n[run]\nrlvr_limits = "{kind}"\n')
    done = run_all(recipe, "--plan", RUNS=str(tmp_path / "runs"))
    rlvr = [line.split() for line in done.stdout.splitlines() if "04_rlvr.py" in line]
    given = {words[words.index("--max-response-tokens") + 1] for words in rlvr if "--max-response-tokens" in words}
    assert len(rlvr) == 2 and given == limits and not (tmp_path / "runs").exists()


# --------------------------------------------------------------------------------------------------------- several nodes


@pytest.mark.slow
def test_other_nodes_wait_for_what_node_0_does_alone(tmp_path):
    (tmp_path / "one.py").write_text("print('ran', file=open('ran', 'a'))\n")
    lines = "lock lock\nstep one python one.py\necho went on"
    other = subprocess.Popen(["bash", "-c", script(tmp_path, lines)], env={**ENV, "NODE_RANK": "1"}, text=True,
                             stdout=subprocess.PIPE)
    time.sleep(1)
    assert other.poll() is None and not (tmp_path / "ran").exists()
    first = run(tmp_path, lines)
    assert first.returncode == 0 and "went on" in first.stdout
    assert other.communicate(timeout=20)[0] == "went on\n" and (tmp_path / "ran").read_text() == "ran\n"


@pytest.mark.slow
def test_other_nodes_end_when_node_0_fails(tmp_path):
    (tmp_path / "one.py").write_text("raise SystemExit(3)\n")
    lines = "lock lock\nmkdir -p logs\ntouch logs/node-$NODE_RANK.begun\nstep one python one.py\necho went on"
    other = subprocess.Popen(["bash", "-c", script(tmp_path, lines)], env={**ENV, "NODE_RANK": "1"}, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    time.sleep(1)
    assert other.poll() is None and run(tmp_path, lines).returncode == 3
    out, error = other.communicate(timeout=20)
    assert out == "" and "error: 'one' failed on node 0" in error and other.returncode == 2
