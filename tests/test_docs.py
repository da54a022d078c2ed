"""The docs hold together: links lead somewhere, files and flags that they name exist, assumptions
are numbered, and the code cites them."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ASSUMPTIONS = ROOT / "docs/ASSUMPTIONS.md"
PAGES = [ROOT / "README.md", ROOT / "toy/README.md", *sorted((ROOT / "docs").glob("*.md"))]
OF_TODAY = [page for page in PAGES if page.name != "LOG.md"]    # the log names things as they were
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
SOURCES = []
for folder in (".", "grading", "tools", "toy", "bench", "tests"):
    SOURCES += sorted((ROOT / folder).glob("*.py"))
    SOURCES += sorted((ROOT / folder).glob("*.sh"))



def name_of(path):
    return str(path.relative_to(ROOT))


# ------------------------------------------------------------------------------------------- links


def anchors(page):
    """A heading's anchor as GitHub makes it: lower case, no punctuation, hyphens for spaces."""
    found = set()
    for heading in re.findall(r"^#+ (.*)$", page.read_text(), re.M):
        letters = re.sub(r"[^\w\- ]", "", heading.lower())
        found.add(letters.replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        there = page.parent / path if path else page
        assert there.exists(), f"{name_of(page)}: {target} is not there"
        if anchor:
            assert anchor in anchors(there), f"{name_of(page)}: {target}: no such heading"


# ---------------------------------------------------------------------------------- files and flags


@pytest.mark.parametrize("page", OF_TODAY, ids=name_of)
def test_files_that_are_named_exist(page):
    folders = [ROOT, page.parent, ROOT / "recipes", ROOT / "grading", ROOT / "tools"]
    for name in re.findall(r"`([\w./]+\.(?:py|sh|toml|md))`", page.read_text()):
        found = [folder for folder in folders if (folder / name).exists()]
        assert found, f"{name_of(page)} names {name}, which is not there"


@pytest.mark.parametrize("page", OF_TODAY, ids=name_of)
def test_flags_that_are_named_exist(page):
    flags = set()
    for source in SOURCES:
        if source.parent.name != "tests" or source.suffix == ".sh":
            flags.update(re.findall(r"[\"' (|](--[a-z][\w-]*)", source.read_text()))
    for flag in re.findall(r"(?<![\w-])(--[a-z][\w-]*)", page.read_text()):
        assert flag in flags, f"{name_of(page)} names {flag}, which no script takes"


# ----------------------------------------------------------------------------------------- metrics

# Functions whose dictionaries are rows of metrics.jsonl, or entries of results.json.
LOGS = [("03_train_oxa.py", "main"), ("04_rlvr.py", "summary"), ("04_rlvr.py", "policy_loss"),
        ("04_rlvr.py", "check_sync"), ("04_rlvr.py", "main"), ("05_eval.py", "summarise")]
NOT_LOGGED = {"use_reentrant", "gap"}


def keys_of(file, function):
    """Keys of the dictionaries that a function writes out, and of what it sets in one."""
    found = set()
    for node in ast.walk(ast.parse(lines_of(ROOT / file, function, n_above=0))):
        if isinstance(node, ast.Dict):
            found.update(key.value for key in node.keys if isinstance(key, ast.Constant))
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            found.add(getattr(node.slice, "value", None))
    return {key for key in found - NOT_LOGGED if isinstance(key, str)}


@pytest.mark.parametrize("file, function", LOGS)
def test_every_logged_name_is_defined(file, function):
    names = keys_of(file, function)
    assert len(names) > 1, f"{file}: {function} logs nothing"
    defined = set(re.findall(r"`(\w+)`", (ROOT / "docs/METRICS.md").read_text()))
    assert names <= defined, f"METRICS.md does not define {sorted(names - defined)}"


# ------------------------------------------------------------------------------------- assumptions


def assumptions():
    """{number of a row: the place where its choice stands, as FILE: NAME}"""
    places = {}
    for line in ASSUMPTIONS.read_text().splitlines():
        row = re.fullmatch(r"\| A(\d+) \|.*\| `([^`]+)` \|", line)
        if row:
            places[int(row[1])] = row[2]
    return places


def cited(text):
    """Numbers of the rows that a text cites in parentheses: (A17), or (ours, A17 and A18)."""
    found = set()
    for inside in re.findall(r"\(([^()]*)\)", text):
        found.update(map(int, re.findall(r"\bA(\d{1,2})\b", inside)))
    return found


def names_of(node):
    """What a definition of Python defines: a function, a class, a constant."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    return []


def lines_of(path, name, n_above=5):
    """A function, class or constant with the lines above it, or a recipe's section; None: not
    there."""
    text = path.read_text()
    if path.suffix == ".toml":
        section = re.search(rf"^\[{re.escape(name)}\].*?(?=^\[|\Z)", text, re.M | re.S)
        return section and section[0]
    for node in ast.walk(ast.parse(text)):
        if name in names_of(node):
            first = max(0, node.lineno - 1 - n_above)
            return "\n".join(text.splitlines()[first:node.end_lineno])
    return None


def test_assumptions_are_numbered_without_gaps():
    numbers = re.findall(r"^\| A(\d+) \|", ASSUMPTIONS.read_text(), re.M)
    assert list(map(int, numbers)) == list(range(1, len(numbers) + 1))
    assert len(assumptions()) == len(numbers), "a row does not name its place in the code"


@pytest.mark.parametrize("source", [*SOURCES, *RECIPES, *PAGES], ids=name_of)
def test_cited_assumptions_exist(source):
    strange = cited(source.read_text()) - set(assumptions())
    assert not strange, f"{name_of(source)} cites {strange}, which ASSUMPTIONS.md has not"


@pytest.mark.parametrize("number, place", assumptions().items(), ids=str)
def test_the_code_cites_the_assumption_that_it_makes(number, place):
    file, _, name = place.partition(": ")
    assert (ROOT / file).exists(), f"A{number}: {file} is not there"
    lines = lines_of(ROOT / file, name)
    assert lines is not None, f"A{number}: {file} has no {name}"
    assert number in cited(lines), f"{file}: {name} makes the choice A{number} and does not cite it"
