"""150 hostile texts as ids, names, captions, answers: none drives a terminal, ends a table's cell
or is Markdown or HTML."""

import importlib
import itertools
import json
import re

import pytest

import common
from tools import recipe, report

PARTS = ["\x1b[31mred", "\x1b]0;title\x07", "\x9b2J", "\r", "\x08" * 5, "\n# heading",
         "\n| a | b |\n| --- | --- |", "|", "\\|", "\u202eevil\u202c", "\u2066x",
         "\u2028", "\u200b", "<b>bold</b>", "<img src=x onerror=alert(1)>", "<!-- ", "-->",
         "&lt;i&gt;", "[a](http://b)", "![a](b.png)", "](x)", "**b**", "__b__",
         "_i_", "~~s~~", "`code`", "``", "```\n", "~~~\n", "# h", "- item", "1. item", "> quote",
         "---", "\t", "$(touch x)", "{{ x }}", "x" * 20_000, "\ud800",
         "\x00", "é√", "[x]: http://y", "<http://y>", "\\"]
TEXTS = (PARTS + [f"{a}{b}" for a, b in
                  itertools.islice(itertools.combinations(PARTS, 2), 0, None, 8)])[:150]


def is_harmless(text):
    return all(c.isprintable() or c == "\n" for c in text)


def markup_in(text):
    """What of a line of Markdown is not plain text; code between single backticks is."""
    text = re.sub(r"\\\\", "", text)
    text = re.sub(r"(?<!\\)`[^`]*(?<!\\)`", "", text)
    return re.findall(r"(?<!\\)(?:[<`*~\[\]]|\|)|(?<![\\A-Za-z0-9])_(?=\S)|(?<!\\)&[a-z]+;", text)


def test_there_are_150():
    assert len(set(TEXTS)) == 150


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_a_report_shows_it_as_text(text):
    shown = report.safe(text)
    assert is_harmless(shown) and "\n" not in shown and not markup_in(shown), shown[:300]
    row = report.table(["a", "b"], [[shown, "1"]]).splitlines()
    assert len(row) == 3 and len(re.findall(r"(?<!\\)(?:\\\\)*\|", row[2])) == 3, row[2][:300]
    paragraph = report.paragraph(text)
    assert not re.match(r"\s|[-+#>=]|\d+[.)]|_{3}", paragraph), paragraph[:80]


def test_errors_rows_and_tables_show_it(tmp_path, capsys, monkeypatch):
    for text in TEXTS:
        for die in (common.die, recipe.die):
            with pytest.raises(SystemExit):
                die(f"{text}: no such thing")
            said = capsys.readouterr().err
            assert said.count("\n") == 1 and is_harmless(said) and said.startswith("error: ")
        common.print_row([text, 1, None], text, text)
        assert is_harmless(capsys.readouterr().out)
    rows = []
    for i, text in enumerate(TEXTS):
        sound = text.encode("utf-8", "replace").decode() + str(i)
        rows.append({"sid": sound,
                     "pid": sound,
                     "problem": sound,
                     "response": sound,
                     "correct": True,
                     "status": text.replace("\ud800", ""),
                     "predicted": sound,
                     "ppl": 2.0,
                     "n_tokens": 3,
                     "finish": "stop",
                     "objective": "ce"})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    importlib.import_module("02_verify_score").main(
        ["show", "--samples", "rows.jsonl", "--show", "150"])
    assert is_harmless(capsys.readouterr().out)


def test_the_evaluation_table_keeps_its_columns(capsys):
    evaluate = importlib.import_module("05_eval")
    share = {"value": 0.5, "low": 0.4, "high": 0.6}
    result = {"n_problems": 3,
              "n_samples": 2,
              "pass_at_1": share,
              "pass_at_n": share,
              "entropy": share,
              "unknown_rate": 0.0,
              "truncation_rate": 0.0,
              "no_answer_rate": 0.0,
              "duplicate_rate": 0.0,
              "mean_tokens": 3.0}
    names = [text for text in TEXTS if len(text) < 200]
    for name in names:
        evaluate.print_table({"model": name,
                              "temperature": name,
                              "top_p": 1,
                              "max_tokens": 1,
                              "grader": "g",
                              "benchmarks": {name: result}})
        out = capsys.readouterr().out
        assert is_harmless(out)


def test_no_recipe_brings_it_to_the_shell(capsys):
    good = recipe.load_recipe("recipes/toy.toml")
    n_told = 0
    for text in TEXTS:
        for key, value in (("arms", [text]),
                           ("benchmarks", [text]),
                           ("world_base", text),
                           ("rlvr_source", text),
                           ("world_args", [text])):
            try:
                lines = list(recipe.settings({**good, "run": {**good["run"], key: value}}))
            except SystemExit:
                said = capsys.readouterr().err
                assert said.count("\n") == 1 and is_harmless(said)
                continue
            n_told += 1
            assert all(f"{name}{told}".isprintable() for name, told in lines)
    assert n_told > 50
