"""Failing well, recipes, and the files between stages: each fault is made, none is simulated."""

import argparse
import json
import os
import resource
import signal
import sys
import time

import pytest

import common

# ------------------------------------------------------------------------------------------ helpers


def refused(capsys, function, *args, code=2, **options) -> str:
    """The one sentence with which `function` ends the program."""
    with pytest.raises(SystemExit) as stop:
        function(*args, **options)
    assert stop.value.code == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


def in_child(function, *args) -> tuple[int, str]:
    """Calls `function` in a process of its own: (exit code, negative for a signal; its stderr)."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            os.dup2(writer, 2)
            os.close(writer)
            sys.stderr = os.fdopen(2, "w")
            common.HELD.clear()                              # a new process holds no lock
            function(*args)
            code = 0
        except SystemExit as stop:
            code = stop.code
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as file:
        said = file.read()
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), said


def settings(**flags):
    return argparse.Namespace(**{"n": 2, "out": "out.jsonl", "workers": 1, **flags})


def write_rows(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts_in(folder):
    """Name -> text of each file."""
    return {path.name: path.read_text() for path in folder.iterdir()}


# ------------------------------------------------------------------------------------------ recipes


def parse(argv, section="train"):
    """Parse a command line with a flag of each kind."""
    parser = common.make_parser("doc")
    parser.add_argument("--lr", type=float, default=1.0)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard", action="store_true")
    parser.add_argument("--mode", choices=["a", "b"], default="a")
    parser.add_argument("--self")
    parser.add_argument("--problems", nargs="+", default=[])
    return common.parse_args(parser, section, argv)


BAD_RECIPES = [
    ("[train]\nlearning = 1", "[train]: unknown key 'learning'; known: lr, mode"),
    ("[train]\nrecipe = 'x'", "unknown key 'recipe'"),
    ("[trian]\nsteps = 1", "unknown section [trian]"),
    ("steps = 1", "unknown section [steps]"),
    ("train = 1", "train = 1 stands in no section"),
    ("[train]\nsteps = 'five'", "steps = 'five' is not int"),
    ("[train]\nsteps = 5.0", "steps = 5.0 is not int"),
    ("[train]\nsteps = true", "steps = True is not int"),
    ("[train]\nlr = 'fast'", "lr = 'fast' is not float"),
    ("[train]\nlr = [1.0]", "lr = [1.0] is not float"),
    ("[train]\nlr = 2024-01-01", "is not float"),
    ("[train]\nshard = 'false'", "shard = 'false' is not true or false"),
    ("[train]\nshard = 0", "shard = 0 is not true or false"),
    ("[train]\nmode = 'c'", "mode = 'c' is not one of ['a', 'b']"),
    ("[train]\nself = 3", "self = 3 is not str"),
    ("[train]\nproblems = 'a'", "problems = 'a' is not a list"),
    ("[train]\nproblems = []", "problems = [] is not a list"),
    ("[train]\nproblems = [1]", "problems = [1] is not str"),
    ("[train]\nlr = nan", "--lr must be a finite number, got nan"),
    ("[train]\nlr = inf", "--lr must be a finite number, got inf"),
    ("[train]\nsteps = 1000000000000", "--steps must be below 2^31"),
    ("[train]\nseed = -1", "--seed must be at least 0"),
    ("[train", "is not valid TOML"),
    ("[train]\nlr = 1\nlr = 2", "is not valid TOML"),
    ("from = 'r'", "starts from itself"),
    ("from = 'nowhere'", "nowhere.toml does not exist"),
    ("from = '../r'", "is not the name of a recipe beside it"),
    ("from = 3", "is not the name of a recipe beside it"),
]


@pytest.mark.parametrize("text, sentence", BAD_RECIPES)
def test_a_bad_recipe_is_one_sentence(tmp_path, capsys, text, sentence):
    recipe = tmp_path / "r.toml"
    recipe.write_text(text + "\n")
    argv = ["--recipe", str(recipe)]
    if "steps" not in text:
        argv += ["--steps", "1"]
    assert sentence in refused(capsys, parse, argv)


@pytest.mark.parametrize("flags, sentence", [
    ("--lr nan", "--lr must be a finite number"),
    ("--lr=-inf", "--lr must be a finite number"),
    ("--seed -1", "--seed must be at least 0"),
    (f"--steps {2**40}", "--steps must be below 2^31")])
def test_a_flag_that_is_no_sound_number_is_one_sentence(capsys, flags, sentence):
    assert sentence in refused(capsys, parse, ["--steps", "1", *flags.split()])


def test_a_recipe_that_is_no_file_is_one_sentence(tmp_path, capsys):
    def said_of(recipe):
        return refused(capsys, parse, ["--steps", "1", "--recipe", str(recipe)])

    assert "does not exist" in said_of(tmp_path)
    assert "does not exist" in said_of(tmp_path / "none.toml")
    latin = tmp_path / "latin.toml"
    latin.write_bytes(b"# \xe9\n")
    assert "is not valid TOML" in said_of(latin)


def test_a_recipe_may_start_from_another(tmp_path):
    """Its own keys go over the other's, and the rest is the other's."""
    small = tmp_path / "small.toml"
    small.write_text("from = 'big'\n[train]\nsteps = 1\n")
    (tmp_path / "big.toml").write_text("[train]\nlr = 2.0\nsteps = 5\n[eval]\nn = 3\n")
    args = parse(["--recipe", str(small)])
    assert args.lr == 2.0
    assert args.steps == 1
    assert common.load_recipe(small)["eval"] == {"n": 3}


def test_switches_lists_and_flags_over_a_recipe(tmp_path):
    """A recipe can set flags of every kind, and the command line goes over it."""
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        "[train]\nsteps = 5\nlr = 2\nshard = true\nproblems = ['a', 'b']\nself = 'x'\n")
    args = parse(["--lr", "7", f"--recipe={recipe}"])
    assert args.steps == 5
    assert args.lr == 7.0
    assert args.shard is True
    assert args.problems == ["a", "b"]
    assert args.self == "x"
    recipe.write_text("[train]\nsteps = 5\nshard = false\n")
    assert parse(["--recipe", str(recipe)]).shard is False


def test_a_sub_command_reads_its_own_section(tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text("[sample]\nn = 3\n[score]\nn = 9\n")
    parser = common.make_parser("doc")
    commands = parser.add_subparsers(dest="command", required=True)
    model = common.add_command(commands, "model", "m", section="sample")
    model.add_argument("--n", type=int, required=True)
    score = common.add_command(commands, "score", "s")
    score.add_argument("--n", type=int, required=True)
    args = common.parse_args(parser, argv=["model", "--recipe", str(recipe)])
    assert args.command == "model"
    assert args.n == 3


# --------------------------------------------------------------------------------------------- rows

FIELDS = {"sid": str, "pid": str, "n_tokens": int, "finish": str, "response": str,
          "ppl": (float, int, type(None)), "answer": (str, list)}
SOUND = {"sid": "a:x:0", "pid": "a", "n_tokens": 3, "finish": "stop", "response": "", "ppl": 1.5,
         "answer": "4"}

BAD_FIELDS = [
    ({"sid": ""}, "'sid' is '', expected a text"),
    ({"pid": " \n"}, "'pid' is ' \\n', expected a text"),
    ({"n_tokens": 0}, "'n_tokens' is 0, expected at least 1"),
    ({"n_tokens": -7}, "at least 1"),
    ({"n_tokens": 2**40}, "below 2^31"),
    ({"n_tokens": True}, "'n_tokens' is bool, expected int"),
    ({"n_tokens": 3.0}, "is float, expected int"),
    ({"finish": "eos"}, "expected 'stop' or 'length'"),
    ({"ppl": -1.0}, "'ppl' is -1.0, expected null, or a finite number of at least 1"),
    ({"ppl": 0}, "of at least 1"),
    ({"ppl": "2"}, "is str, expected float or int or NoneType"),
    ({"answer": ""}, "'answer' is ''"),
    ({"answer": []}, "'answer' is []"),
    ({"answer": [None]}, "'answer' is [None]"),
    ({"answer": [["4"]]}, "'answer' is [['4']]"),
    ({"answer": [""]}, "'answer' is ['']"),
    ({"answer": 4}, "is int, expected str or list"),
    ({"response": None}, "is NoneType, expected str")]


@pytest.mark.parametrize("change, sentence", BAD_FIELDS)
def test_a_field_without_sense_is_one_sentence_with_file_and_line(
        tmp_path, capsys, change, sentence):
    path = write_rows(tmp_path / "x.jsonl", SOUND, {**SOUND, **change})
    said = refused(capsys, list, common.read_jsonl(path, FIELDS))
    assert f"{path}:2: field" in said
    assert sentence in said


@pytest.mark.parametrize("change", [
    {},
    {"ppl": None},
    {"ppl": 1},
    {"ppl": 0.9999999},
    {"answer": ["4", "four"]}])
def test_sound_rows_are_read_as_they_are(tmp_path, change):
    row = {**SOUND, **change}
    path = write_rows(tmp_path / "x.jsonl", row)
    assert list(common.read_jsonl(path, FIELDS)) == [row]


BAD_LINES = [
    (b'{"ppl": NaN}', "NaN is no number of JSON"),
    (b'{"ppl": -Infinity}', "-Infinity is no number"),
    (b'{"ppl": 1e400}', "1e400 is no number of JSON"),
    (b'{"x": ' + b"[" * 10_000 + b"]" * 10_000 + b"}", "nested too deeply"),
    (b'{"x": "\\ud800"}', "stands alone, which is no character"),
    (b'{"x": ["\\uDFFF"]}', "stands alone"),
    (b'{"x": "\xed\xa0\x80"}', "not valid JSON"),
    (b'{"x": "\xe9"}', "not valid JSON"),
    (b'{"x": ' + b"9" * 5000 + b"}", "not valid JSON"),
    (b"", "not valid JSON"),
    (b"[1]", "must be a JSON object"),
    (b'{"x": "' + b"y" * 2**24 + b'"}', "longer than 16,777,216 bytes")]


@pytest.mark.parametrize("line, sentence", BAD_LINES)
def test_a_bad_line_is_one_sentence_with_file_and_line(tmp_path, capsys, line, sentence):
    """And that sentence does not quote the whole line."""
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"ppl": 2.0}\n' + line + b"\n")
    fields = {"ppl": (float, type(None))} if b"ppl" in line else {}
    said = refused(capsys, list, common.read_jsonl(path, fields))
    assert f"{path}:2: " in said
    assert sentence in said
    assert len(said) < 400


def test_characters_beyond_the_first_plane_are_no_halves_of_pairs(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"x": "\\ud83d\\ude00 \\\\ud800"}\n')
    assert list(common.read_jsonl(path)) == [{"x": "\U0001f600 \\ud800"}]


def test_a_key_that_occurs_twice_is_refused_where_rows_have_keys(tmp_path, capsys):
    first = {"pid": "a", "k": 0}
    second = {"pid": "a", "k": 1}
    path = write_rows(tmp_path / "x.jsonl", first, second, first)
    assert len(list(common.read_jsonl(path))) == 3

    said = refused(capsys, list, common.read_jsonl(path, key="pid"))
    assert "x.jsonl:2: 'a' occurs twice" in said
    said = refused(capsys, common.stored_keys, path, ("pid", "k"))
    assert "x.jsonl:3: ('a', 0) occurs twice" in said
    said = refused(capsys, common.stored_keys, path, "sid")
    assert "has no key" in said


def test_a_directory_is_no_file_of_rows(tmp_path, capsys):
    assert "is a directory" in refused(capsys, list, common.read_jsonl(tmp_path))


# ----------------------------------------------------------------------------- appending, replacing


def limit_file_size(limit):
    """Of this process: what the system then refuses stands in for a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def fill_up(path, limit):
    """Append rows, more than the limit on the file's size has room for."""
    def main():
        _, writer = common.append_jsonl(path, "k")
        with writer:
            for k in range(1000):
                writer.write({"k": k, "text": "x" * 50})

    limit_file_size(limit)
    common.run(main)


@pytest.mark.parametrize("limit", [1, 70, 1000, 1001, 1050])
def test_a_full_disk_is_one_sentence_and_leaves_whole_rows(tmp_path, limit):
    """And the next start goes on behind them."""
    path = tmp_path / "x.jsonl"
    assert in_child(fill_up, path, limit) == (1, f"error: {path}: File too large\n")
    text = path.read_text()
    assert text == "" or text.endswith("\n")
    found = [json.loads(line)["k"] for line in text.splitlines()]
    assert found == list(range(text.count("\n")))

    _, writer = common.append_jsonl(path, "k")
    with writer:
        writer.write({"k": -1})
    assert path.read_text() == text + '{"k": -1}\n'


@pytest.mark.parametrize("error, code", [
    (OSError(28, "No space left on device"), 1),
    (OSError(30, "Read-only file system"), 1),
    (OSError(24, "Too many open files"), 1),
    (MemoryError("17 GiB"), 1),
    (PermissionError(13, "Permission denied", "x"), 2),
    (IsADirectoryError(21, "Is a directory", "x"), 2)])
def test_what_the_system_refuses_is_one_sentence(capsys, error, code):
    """With code 1 where the machine is at fault, 2 where the path is wrong."""
    def main():
        raise error

    said = refused(capsys, common.run, main, code=code)
    assert str(error.args[-1]) in said


def test_no_file_handles_is_one_sentence(tmp_path):
    path = tmp_path / "x.jsonl"

    def main():
        common.append_jsonl(path, "k")

    def without_handles():
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, 4096))
        common.run(main)

    assert in_child(without_handles) == (1, f"error: {path}: Too many open files\n")


def test_a_program_error_keeps_its_traceback():
    def main():
        raise ValueError("a bug")

    with pytest.raises(ValueError):
        common.run(main)


def test_a_file_that_is_replaced_is_the_old_one_or_the_whole_new_one(tmp_path):
    """After an exception, after a kill, and after neither."""
    path = tmp_path / "x.jsonl"
    path.write_text("old")
    with pytest.raises(KeyError):
        with common.replace_file(path) as file:
            file.write("half")
            raise KeyError
    assert texts_in(tmp_path) == {"x.jsonl": "old"}

    def killed():
        with common.replace_file(path) as file:
            file.write("half")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(killed) == (-signal.SIGKILL, "")
    assert path.read_text() == "old"

    with common.replace_file(path) as file:
        file.write("new")
    assert texts_in(tmp_path) == {"x.jsonl": "new"}


@pytest.mark.parametrize("limit", [3, 100])
def test_a_file_that_cannot_be_replaced_stays(tmp_path, limit):
    path = tmp_path / "x.jsonl"
    path.write_text("old")

    def main():
        with common.replace_file(path) as file:
            file.write("new " * 1000)

    def limited():
        limit_file_size(limit)
        common.run(main)

    assert in_child(limited) == (1, f"error: {path}: File too large\n")
    assert texts_in(tmp_path) == {"x.jsonl": "old"}


def test_a_step_log_is_cut_back_to_its_step(tmp_path, capsys):
    """Rows of later steps and half a row go; a file that is no such log is refused."""
    path = write_rows(tmp_path / "m.jsonl", {"step": 1}, {"step": 1}, {"step": 2}, {"step": 3})
    with open(path, "a") as file:
        file.write('{"step": 4')
    with common.step_log(path, 2) as log:
        log.write({"step": 3, "new": True})
    steps = [row["step"] for row in common.read_jsonl(path)]
    assert steps == [1, 1, 2, 3]
    assert path.read_text().count("new") == 1

    write_rows(path, {"steps": 1})
    assert "m.jsonl:1: not a row of a step" in refused(capsys, common.step_log, path, 2)


def test_only_the_parts_of_the_ranks_are_merged(tmp_path):
    """Files of similar names stay, and a name with brackets is no pattern."""
    merged = tmp_path / "id.jsonl"
    others = ["id.rankings.jsonl", "id.ranked.jsonl", "id.rank.jsonl", "id.rank[1].jsonl",
              "xid.rank0.jsonl", "i[d].jsonl"]
    for name in others:
        write_rows(tmp_path / name, {"k": 9})
    write_rows(tmp_path / "id.rank0.jsonl", {"k": 2})
    write_rows(tmp_path / "id.rank12.jsonl", {"k": 1})
    common.merge_parts(merged, "k", int)
    assert merged.read_text() == '{"k": 1}\n{"k": 2}\n'
    assert sorted(os.listdir(tmp_path)) == sorted(["id.jsonl", *others])

    bracketed = tmp_path / "i[d].jsonl"
    write_rows(tmp_path / "i[d].rank0.jsonl", {"k": 4})
    common.merge_parts(bracketed, "k", int)
    assert bracketed.read_text() == '{"k": 4}\n{"k": 9}\n'


# ------------------------------------------------------------------------------------------ outputs


def test_an_output_is_a_regular_file_and_no_input(tmp_path, capsys):
    """Nor named as a rank's part; what was refused is untouched."""
    def claim(name, inputs=()):
        common.claim_output(tmp_path / name, inputs)

    def replace(name):
        with common.replace_file(tmp_path / name):
            pytest.fail("was opened")

    data = write_rows(tmp_path / "data.jsonl", {"k": 0})
    (tmp_path / "link").symlink_to(data)
    (tmp_path / "hard").hardlink_to(data)
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    for name in ("link", "fifo", "folder"):
        assert "is no regular file" in refused(capsys, claim, name)
        assert "is no regular file" in refused(capsys, replace, name)
    for name in ("data.jsonl", "hard", "folder/../data.jsonl"):
        assert "is an input of this command" in refused(capsys, claim, name, [data])
    assert "that of a part" in refused(capsys, claim, "id.rank0.jsonl")
    assert data.read_text() == '{"k": 0}\n'
    assert not list(tmp_path.glob("*.tmp"))


def test_an_unfinished_input_and_one_of_another_version_are_refused(tmp_path, capsys):
    data = write_rows(tmp_path / "data.jsonl", {"k": 0})
    out = tmp_path / "out.jsonl"

    common.write_meta(data, "samples", settings(), rows=None)
    said = refused(capsys, common.start_output, out, "verified", settings(), [data])
    assert "data.jsonl is unfinished" in said
    common.write_meta(data, "samples", settings(), rows=1)
    common.start_output(out, "verified", settings(), [data])

    meta = common.read_meta(data)
    common.meta_path(data).write_text(json.dumps({**meta, "schema_version": 0}))
    assert "is of schema version 0" in refused(capsys, common.claim_output, out, [data])
    common.meta_path(data).write_text('{"rows": ')
    assert "is not valid JSON" in refused(capsys, common.claim_output, out, [data])


def start_again(begun, schema="samples", **flags):
    """Start the output of `begun`; its `workers` may differ."""
    data, model, out = begun
    common.start_output(out, schema, settings(**flags), [data, model], ("workers",))


@pytest.fixture
def begun(tmp_path):
    """An output that was begun with two inputs: a file and a model directory."""
    data = write_rows(tmp_path / "data.jsonl", {"k": 0})
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(bytes(3 * 2**20))
    out = tmp_path / "out.jsonl"
    start_again((data, model, out))
    write_rows(out, {"sid": "a"})
    return data, model, out


def test_the_same_settings_go_on(begun):
    _, _, out = begun
    start_again(begun, workers=9, out="x")
    assert out.read_text() == '{"sid": "a"}\n'


def test_other_settings_inputs_weights_and_schemas_are_refused_by_name(begun, capsys):
    data, model, out = begun
    said = refused(capsys, start_again, begun, n=3)
    assert f"{out} was begun with other settings (n)" in said
    said = refused(capsys, start_again, begun, schema="eval")
    assert "(schema samples 1, now eval 1)" in said

    with open(model / "model.safetensors", "r+b") as file:      # the last byte, the size stays
        file.seek(-1, 2)
        file.write(b"x")
    said = refused(capsys, start_again, begun)
    assert f"(the contents of {model})" in said
    write_rows(data, {"k": 1})
    said = refused(capsys, start_again, begun)
    assert f"(the contents of {data}, the contents of {model})" in said

    out.unlink()
    start_again(begun, n=3)                     # nothing was written: a new beginning


def test_a_flag_newer_than_the_output_is_no_other_setting(begun, capsys):
    """But every setting is another one if the sidecar has none."""
    _, _, out = begun
    meta = common.read_meta(out)
    start_again(begun, dtype="float32")
    common.meta_path(out).write_text(json.dumps({**meta, "args": {}}))
    assert "other settings" in refused(capsys, start_again, begun)


def start_run(run, **flags):
    """Start the metrics of a training run; `workers` may differ."""
    common.start_output(run / "metrics.jsonl", "metrics", settings(**flags),
                        may_differ=("workers",), run=run)


def test_a_finished_run_keeps_the_record_of_what_made_it(tmp_path, capsys):
    def recorded_workers():
        return common.read_meta(tmp_path / "metrics.jsonl")["args"]["workers"]

    start_run(tmp_path, workers=1)
    assert recorded_workers() == 1
    start_run(tmp_path, workers=2)
    assert recorded_workers() == 2
    (tmp_path / "final").mkdir()
    (tmp_path / "final/config.json").write_text("{}")
    start_run(tmp_path, workers=3)
    assert recorded_workers() == 2
    assert "other settings (n)" in refused(capsys, start_run, tmp_path, n=3)


def test_the_settings_of_a_run_belong_to_its_checkpoints(tmp_path, capsys):
    """A run without a row in its log, but with a checkpoint, was begun."""
    start_run(tmp_path)
    (tmp_path / "step-000010").mkdir()
    said = refused(capsys, start_run, tmp_path, n=3)
    assert f"{tmp_path} was begun with other settings (n); remove {tmp_path}" in said
    start_run(tmp_path)
    common.meta_path(tmp_path / "metrics.jsonl").unlink()
    said = refused(capsys, start_run, tmp_path)
    assert "step-000010 is there, but" in said
    assert "metrics.meta.json" in said


def test_force_starts_over(begun, capsys):
    """The output and its parts go; inputs and files of similar names stay; and what starts next
    goes on without the flag."""
    data, model, out = begun
    write_rows(common.part_path(out, 1), {"sid": "b"})
    foreign = []
    for name in ("out.rankings.jsonl", "out.jsonl.old", "notes.txt"):
        foreign.append(write_rows(out.with_name(name), {}))

    refused(capsys, start_again, begun, n=3)
    start_again(begun, n=3, force=True)
    assert not out.exists()
    assert not common.parts_of(out)
    for path in (data, model, *foreign):
        assert path.exists(), path
    assert common.read_meta(out)["args"] == vars(settings(n=3))

    write_rows(out, {"sid": "a"})
    start_again(begun, n=3)
    assert out.exists()


def all_but_locks(folder):
    return sorted(path for path in folder.rglob("*") if path.suffix != ".lock")


def test_force_removes_only_what_this_command_made(begun, capsys):
    """What it did not make stays, and then all the rest stays too."""
    data, model, out = begun

    def said(path=out, schema="samples", inputs=(data,), **more):
        before = all_but_locks(path.parent)
        words = refused(capsys, common.start_output, path, schema, settings(force=True), inputs,
                        **more)
        assert all_but_locks(path.parent) == before
        return words

    no_sidecar = f"but no {common.meta_path(out)} that says that this command made it"
    assert no_sidecar in said(schema="eval")
    absent = data.with_name("gone.jsonl")
    assert "gone.jsonl: no such file; nothing was removed" in said(inputs=[absent])
    hand_made = write_rows(out.with_name("mine.jsonl"), {"sid": "a"})
    assert "mine.jsonl is there, but no" in said(hand_made)

    run = out.parent / "run"
    log = run / "metrics.jsonl"
    (run / "final").mkdir(parents=True)
    (run / "final/config.json").write_text("{}")
    assert "final is there, but no" in said(log, "metrics", run=run)
    common.write_meta(log, "metrics", settings())
    assert "final is, or holds, an input" in said(log, "metrics", [run / "final"], run=run)
    (run / "final/eval").mkdir()
    assert "final/eval is not of a checkpoint" in said(log, "metrics", run=run)
    (run / "final/eval").rmdir()
    (run / "step-000001").symlink_to(model)
    assert "step-000001 is a link or device" in said(log, "metrics", run=run)
    (run / "step-000001").unlink()

    (run / "step-1.log").write_text("mine")
    common.start_output(log, "metrics", settings(force=True), [data], run=run)
    assert set(os.listdir(run)) == {"step-1.log", "metrics.meta.json", "metrics.jsonl.lock"}


def test_a_recipe_cannot_start_over(tmp_path, capsys):
    recipe = tmp_path / "r.toml"
    recipe.write_text("[train]\nforce = true\n")
    parser = common.make_parser("x")
    common.add_force_flag(parser.add_argument)
    said = refused(capsys, common.parse_args, parser, "train", ["--recipe", str(recipe)])
    assert "force = True would start over every time" in said


def test_a_second_process_on_one_output_is_refused_until_the_first_ends(tmp_path):
    out = tmp_path / "out.jsonl"
    lock_file = tmp_path / "out.jsonl.lock"
    held = tmp_path / "held"

    def hold():
        common.lock(out)
        held.touch()
        time.sleep(60)

    owner = os.fork()
    if owner == 0:
        try:
            hold()
        finally:
            os._exit(0)
    while not held.exists():
        time.sleep(0.01)

    code, said = in_child(common.start_output, out, "samples", settings())
    assert code == 2
    assert f"is being written by another process (pid {owner})" in said
    os.kill(owner, signal.SIGKILL)
    os.waitpid(owner, 0)
    assert lock_file.exists(), "a kill leaves the file, not the lock"

    def third():
        common.start_output(out, "samples", settings())
        common.release_locks()

    assert in_child(third) == (0, "")
    assert not lock_file.exists()


def test_a_worker_does_not_hold_its_owners_lock(tmp_path):
    """A verifier's worker that outlives its killed owner must not keep the next start out."""
    out = tmp_path / "out.jsonl"

    def owner():
        common.lock(out)
        worker = os.fork()
        if worker == 0:
            os.close(2)
            time.sleep(60)
            os._exit(0)
        (tmp_path / "worker").write_text(str(worker))
        os.kill(os.getpid(), signal.SIGKILL)

    code, _ = in_child(owner)
    assert code == -signal.SIGKILL
    worker = int((tmp_path / "worker").read_text())
    try:
        assert in_child(common.lock, out) == (0, "")
    finally:
        os.kill(worker, signal.SIGKILL)
