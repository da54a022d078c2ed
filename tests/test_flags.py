"""The flags of every command against tests/flags.txt, the recipes' keys and plan.py's defaults.

A new flag is a decision: it goes into tests/flags.txt by hand, or by `python tests/test_flags.py`,
which renews the list.
"""

import importlib
import sys
from pathlib import Path

import pytest

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))

from conftest import ROOT

import common
from tools import plan, recipe as recipes

LIST = ROOT / "tests/flags.txt"
SCRIPTS = ["01_sample", "02_verify_score", "03_train_oxa", "04_rlvr", "05_eval",
           "tools.prepare_base", "tools.report"]
RECIPES = sorted(path.name for path in (ROOT / "recipes").glob("*.toml"))


class Seen(Exception):
    """A script's parser was seen."""


def all_commands():
    """Command, e.g. "02_verify_score select" -> (section of a recipe, its parser), by asking each
    script for its parser."""
    found = {}

    def look(parser, section=None, argv=None):
        if parser.commands:
            for name, each in parser.commands.items():
                found[f"{script} {name}"] = each.section, each
        else:
            found[script] = section, parser
        raise Seen

    real = common.parse_args
    common.parse_args = look
    try:
        for script in SCRIPTS:
            try:
                importlib.import_module(script).parse_args([])
            except Seen:
                pass
    finally:
        common.parse_args = real
    return found


def flags_of(parser):
    """--flag for an option, NAME for a positional argument."""
    return sorted(action.option_strings[-1] if action.option_strings else action.dest.upper()
                  for action in parser.flags.values())


def listing(commands):
    return "".join(f"{command}: {' '.join(flags_of(parser))}\n"
                   for command, (_, parser) in commands.items())


@pytest.fixture(scope="module")
def commands():
    return all_commands()


def test_every_flag_is_in_the_list(commands):
    expected = dict(line.split(": ", 1) for line in LIST.read_text().splitlines())
    for command, (_, parser) in commands.items():
        assert " ".join(flags_of(parser)) == expected.pop(command), (
            f"{command}: if meant, python tests/test_flags.py")
    assert not expected


def test_defaults_of_the_plan_are_those_of_the_scripts(commands):
    parsers = dict(commands.values())
    for section, defaults in plan.DEFAULTS.items():
        for key, value in defaults.items():
            assert parsers[section].get_default(key) == value, (section, key)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_keys_are_flags_of_their_script(name, commands, monkeypatch):
    """Every section of every recipe through the real command line of its script."""
    monkeypatch.chdir(ROOT)
    by_section = {section: (command.split(), parser)
                  for command, (section, parser) in commands.items()}
    for section, values in recipes.load_recipe(ROOT / "recipes" / name).items():
        if section in ("run", "plan"):
            continue
        (script, *command), parser = by_section[section]
        argv = [*command, "--recipe", f"recipes/{name}"]
        for action in parser.flags.values():
            if action.required and action.dest not in values:
                argv += [*action.option_strings[-1:],
                         str(action.choices[0] if action.choices else "x")]
        args = importlib.import_module(script).parse_args(argv)
        assert {key: getattr(args, key) for key in values} == values


if __name__ == "__main__":
    LIST.write_text(listing(all_commands()))
