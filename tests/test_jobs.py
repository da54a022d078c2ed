"""Job control of run_all.sh and toy/study.sh (tools/jobs.sh), and hostile recipes: no value reaches
a shell."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

ENV = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent", "PYTHON": sys.executable}


def bash(*words, **settings):
    """Run bash to its end; `settings`: environment variables."""
    return subprocess.run(["bash", *words], stdin=subprocess.DEVNULL, capture_output=True,
                          text=True, env={**ENV, **settings}, timeout=60)


def script(folder, lines, side_by_side=1):
    """A run's shell with `lines`; its commands write to `folder`."""
    return f"""
        set -euo pipefail
        cd {ROOT}
        source tools/jobs.sh
        watch_signals
        cd {folder}
        logs={folder}/logs
        side_by_side={side_by_side}
        {lines}
    """


def run(folder, lines, side_by_side=1):
    return bash("-c", script(folder, lines, side_by_side))


def start(folder, lines, side_by_side=1, **settings):
    """The same, not waited for, in a process group of its own."""
    command = ["bash", "-c", script(folder, lines, side_by_side)]
    return subprocess.Popen(command, env={**ENV, **settings}, start_new_session=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition, seconds=20):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline
        time.sleep(0.05)


def is_alive(pid):
    """A zombie is not."""
    stat = Path(f"/proc/{pid}/stat")
    if not stat.exists():
        return False
    _, after_name = stat.read_text().rsplit(")", 1)
    return after_name.split()[0] != "Z"


def wait_for_end(pid, seconds=20):
    def has_ended():
        return not is_alive(pid)

    wait_for(has_ended, seconds)


def wait_for_pid(folder):
    """The process id that a command writes to the file `pid`."""
    file = folder / "pid"

    def is_written():
        return file.exists() and file.read_text()

    wait_for(is_written)
    return int(file.read_text())


# -------------------------------------------------------------------------------- what is run again


def test_a_finished_command_is_not_run_again(tmp_path):
    line = "step a/one bash -c 'echo hello; echo x >> count'"
    first = run(tmp_path, line)
    assert first.returncode == 0
    assert "hello" in first.stdout
    assert "done: a/one" in first.stdout

    again = run(tmp_path, line)
    assert again.stdout == ""
    assert (tmp_path / "count").read_text() == "x\n"
    mark = (tmp_path / "logs/a/one.done").read_text().splitlines()
    assert mark[1].startswith("seconds ")
    assert (tmp_path / "logs/a/one.log").read_text() == "hello\n"


def test_other_words_values_or_inputs_run_it_again(tmp_path):
    """Each change that matters runs the command once more; a new version of the code does not."""
    code = tmp_path / "03_train_oxa.py"
    code.write_text("open('count', 'a').write('x')\n")
    data = tmp_path / "in.jsonl"
    data.write_text("{}\n")

    def times_run(words="--data in.jsonl", values='{"lr": 1}'):
        """Ask for the command; -> how often it has run by now."""
        done = run(tmp_path, f"""
            section_of[03_train_oxa.py]='{values}'
            step one python 03_train_oxa.py {words}
        """)
        assert done.returncode == 0, done.stderr
        return len((tmp_path / "count").read_text())

    assert times_run() == 1
    assert times_run() == 1

    edited = '{"lr": 2}'
    assert times_run(values=edited) == 2, "an edited recipe"
    assert times_run(values=edited) == 2

    words = "--data in.jsonl --seed 3"
    assert times_run(words, edited) == 3, "other words"

    later = time.time() + 5
    os.utime(code, (later, later))
    assert times_run(words, edited) == 3, "the code is no input"
    os.utime(data, (later, later))
    assert times_run(words, edited) == 4, "a renewed input"


def test_an_output_that_was_removed_is_made_again_and_the_log_before_is_kept(tmp_path):
    line = "step one bash -c 'echo made; mkdir out; echo x >> count' --out out"
    count = tmp_path / "count"
    log_before = tmp_path / "logs/one.log.1"
    for _ in range(2):
        done = run(tmp_path, line)
        assert done.returncode == 0, done.stderr
    assert count.read_text() == "x\n"
    assert not log_before.exists()

    (tmp_path / "out").rmdir()
    run(tmp_path, line)
    assert count.read_text() == "x\nx\n"
    assert log_before.read_text() == "made\n"


def test_words_are_printed_as_they_can_be_pasted(tmp_path):
    done = run(tmp_path, "step one printf '%s|' 'a b' \"it's\" '$(id)'")
    assert "a b|it's|$(id)|" in done.stdout
    commands = [line for line in done.stdout.splitlines() if line.startswith("+ ")]
    pasted = bash("-c", commands[0].removeprefix("+ "))
    assert pasted.stdout == "a b|it's|$(id)|"


def test_a_failed_command_ends_the_run_with_its_last_words(tmp_path):
    done = run(tmp_path, """
        spawn bad bash -c 'echo error: no such thing; exit 7'
        spawn late sleep 30
        join
        echo no
    """, side_by_side=2)
    assert done.returncode == 7
    assert "no\n" not in done.stdout
    assert "error: no such thing" in done.stderr
    assert "error: 'bad' ended with code 7" in done.stderr
    assert not (tmp_path / "logs/bad.done").exists()


def test_side_by_side(tmp_path):
    """Four commands of 0.6 s, two at once: never three, and done in less than three times as long
    as one."""
    began = time.time()
    done = run(tmp_path, """
        for i in 1 2 3 4; do
          spawn step$i bash -c 'touch on.$$; ls on.* | wc -l >> seen; sleep 0.6; rm on.$$'
        done
        join
    """, side_by_side=2)
    seconds = time.time() - began
    assert done.returncode == 0
    assert done.stdout.count("done: ") == 4
    at_once = [int(line) for line in (tmp_path / "seen").read_text().split()]
    assert max(at_once) == 2
    assert seconds < 2.4 + 2


# ----------------------------------------------------------------------- signals, kill -9, the lock


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_commands_too(tmp_path, number, code):
    shell = start(tmp_path, """
        spawn one bash -c 'echo $$ > pid; exec sleep 60'
        spawn two sleep 60
        join
    """, side_by_side=2)
    pid = wait_for_pid(tmp_path)
    shell.send_signal(number)
    shell.communicate(timeout=20)
    assert shell.returncode == code
    assert not is_alive(pid)


def test_commands_end_with_a_shell_that_is_killed(tmp_path):
    shell = start(tmp_path, """
        spawn one bash -c 'echo $$ > pid; exec sleep 60'
        join
    """, side_by_side=2)
    pid = wait_for_pid(tmp_path)
    shell.kill()
    shell.wait()
    wait_for_end(pid, seconds=5)


def test_two_at_once_are_refused_also_after_kill_9(tmp_path):
    """A command that does not listen outlives the shell; the restart names it instead of starting
    beside it."""
    lines = """
        lock lock
        spawn one bash -c 'trap "" TERM; echo $$ > pid; sleep 60 9>&-; :'
        join
    """
    shell = start(tmp_path, lines, side_by_side=2)
    pid = wait_for_pid(tmp_path)

    def refuses_a_second_start():
        second = run(tmp_path, lines)
        assert second.returncode == 2
        assert second.stderr.count("\n") == 1
        assert str(pid) in second.stderr
        assert "error: another start of this command is at work" in second.stderr

    try:
        refuses_a_second_start()
        shell.kill()
        shell.communicate()
        refuses_a_second_start()
        assert is_alive(pid)
    finally:
        os.killpg(shell.pid, signal.SIGKILL)
    wait_for_end(pid)
    third = run(tmp_path, """
        lock lock
        echo free
    """)
    assert third.stdout == "free\n"


# ----------------------------------------------------------------------------------- hostile values

# A shell that evaluates one of these makes the file MARK.
HOSTILE = [
    "$(touch MARK)",
    "a[$(touch MARK)]",
    "x; touch MARK; `touch MARK`",
    "' touch MARK '",
    '"; touch MARK; "',
    "-e touch MARK",
    "x}; touch MARK; {"]

# Keys of [run] in which no text may stand; each is tried with the hostile text of the same number.
NO_TEXT = ["first_seed", "n_seeds", "side_by_side", "cards", "rlvr_seeds", "data_per_seed",
           "rlvr_limits"]


def toml_text(text):
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def recipe_with(values):
    """A recipe whose [run] has these values, as TOML spells them."""
    run = {"world": '"none"',
           "base_model": '"Qwen2.5-0.5B"',
           "rlvr_source": '"o/x"',
           "arms": '["sft"]',
           "cards": "1",
           "benchmarks": '{aime24 = "o/y"}',
           **values}
    lines = [f"{key} = {value}\n" for key, value in run.items()]
    return "[run]\n" + "".join(lines)


def run_all(*arguments, **settings):
    return bash(ROOT / "run_all.sh", *arguments, **settings)


def check_refused(done, mark):
    """It ended with an error of ours, and nothing hostile ran."""
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert not mark.exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_hostile_values_run_nothing(tmp_path, number):
    mark = tmp_path / "mark"
    text = toml_text(HOSTILE[number].replace("MARK", str(mark)))
    no_text = NO_TEXT[number]
    recipe = tmp_path / "r.toml"
    runs = str(tmp_path)

    # where any text may stand
    recipe.write_text(recipe_with({
        "self_model": text,
        "rlvr_source": text,
        "benchmarks": "{aime24 = " + text + "}",
        "world_args": "[" + text + "]"}))
    done = run_all(recipe, "--plan", RUNS=runs)
    assert done.returncode == 0, done.stderr
    assert not mark.exists()

    # where it may not
    for key, value in (
            ("arms", "[" + text + "]"),
            ("benchmarks", "{" + text + " = 'x'}"),
            (text, "1"),
            (no_text, text)):
        recipe.write_text(recipe_with({key: value}))
        done = run_all(recipe, "--plan", RUNS=runs)
        check_refused(done, mark)
        assert done.stderr.count("\n") == 1

    # the last one without --plan, too
    done = run_all(recipe, RUNS=runs)
    check_refused(done, mark)
    assert no_text in done.stderr


def test_hostile_values_of_a_run_that_starts(tmp_path):
    """The world's name reaches its script as one word, and no shell."""
    mark = tmp_path / "mark"
    name = f"x; touch {mark}; $(touch {mark})"
    toy = (ROOT / "recipes/toy.toml").read_text()
    recipe = tmp_path / "r.toml"
    recipe.write_text(toy.replace('"deep-leap"', toml_text(name)))

    done = run_all(recipe, RUNS=str(tmp_path / "runs"))
    assert done.returncode == 2
    assert not mark.exists()
    assert "argument --world: invalid choice" in done.stderr
    assert name in done.stderr


def test_hostile_seeds_names_and_environment_run_nothing(tmp_path):
    mark = tmp_path / "mark"
    words = f"x[$(touch {mark})]"
    for arguments in (
            ["toy", "--plan", "--seeds", words],
            ["toy", "--seeds", words],
            ["toy", "--seeds"],
            ["toy", "--plan", "--seeds", "0"],
            [words],
            ["--" + words]):
        check_refused(run_all(*arguments, RUNS=str(tmp_path)), mark)

    for name in ("NPROC", "NNODES", "NODE_RANK"):
        done = run_all("toy", "--plan", RUNS=str(tmp_path), **{name: words})
        check_refused(done, mark)
        assert name in done.stderr

    hostile_path = tmp_path / f"a[$(touch {mark.name})] 'b'.toml"
    hostile_path.write_text((ROOT / "recipes/toy.toml").read_text())
    done = run_all(hostile_path, "--plan", RUNS=str(tmp_path / "$(touch mark)"))
    assert done.returncode == 0
    assert not mark.exists()
    assert not (ROOT / "mark").exists()

    study = bash(ROOT / "toy/study.sh", words)
    assert study.returncode == 2
    assert not mark.exists()


def test_values_with_spaces_and_quotes_arrive_whole(tmp_path):
    source = "a 'b' \"c\" $HOME *"
    recipe = tmp_path / "r.toml"
    recipe.write_text(recipe_with({"rlvr_source": toml_text(source)}))

    plan = run_all(recipe, "--plan", RUNS=str(tmp_path))
    lines = plan.stdout.splitlines()
    line = next(line for line in lines if "rlvr.jsonl" in line and "problems" in line)
    _, command = line.split("] ", 1)
    words = bash("-c", "printf '%s\\n' " + command)
    assert source in words.stdout.splitlines()


# ------------------------------------------------------------------------------------- plan, limits


@pytest.mark.parametrize("kind, limits", [("equal", set()), ("published", {"16384", "18432"})])
def test_response_limits_of_rlvr(tmp_path, kind, limits):
    """The published scripts give the two arms unequal limits; "equal" gives none of its own."""
    paper = (ROOT / "recipes/paper_1.5b.toml").read_text()
    (tmp_path / "paper_1.5b.toml").write_text(paper)
    recipe = tmp_path / "r.toml"
    recipe.write_text(f'from = "paper_1.5b"\n[run]\nrlvr_limits = "{kind}"\n')

    plan = run_all(recipe, "--plan", RUNS=str(tmp_path / "runs"))
    n_commands = 0
    given = set()
    for line in plan.stdout.splitlines():
        if "04_rlvr.py" in line:
            n_commands += 1
            words = line.split()
            if "--max-response-tokens" in words:
                given.add(words[words.index("--max-response-tokens") + 1])
    assert n_commands == 2
    assert given == limits
    assert not (tmp_path / "runs").exists()


# ------------------------------------------------------------------------------------ several nodes


@pytest.mark.slow
def test_other_nodes_wait_for_what_node_0_does_alone(tmp_path):
    ran = tmp_path / "ran"
    (tmp_path / "one.py").write_text("print('ran', file=open('ran', 'a'))\n")
    lines = """
        lock lock
        step one python one.py
        echo went on
    """
    other = start(tmp_path, lines, NODE_RANK="1")
    time.sleep(1)
    assert other.poll() is None
    assert not ran.exists()

    first = run(tmp_path, lines)
    assert first.returncode == 0
    assert "went on" in first.stdout
    out, _ = other.communicate(timeout=20)
    assert out == "went on\n"
    assert ran.read_text() == "ran\n"


@pytest.mark.slow
def test_other_nodes_end_when_node_0_fails(tmp_path):
    (tmp_path / "one.py").write_text("raise SystemExit(3)\n")
    lines = """
        lock lock
        mkdir -p logs
        touch logs/node-$NODE_RANK.begun
        step one python one.py
        echo went on
    """
    other = start(tmp_path, lines, NODE_RANK="1")
    time.sleep(1)
    assert other.poll() is None

    first = run(tmp_path, lines)
    assert first.returncode == 3
    out, error = other.communicate(timeout=20)
    assert other.returncode == 2
    assert out == ""
    assert "error: 'one' failed on node 0" in error
