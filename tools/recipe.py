"""A recipe for the shell scripts and for plan.py: read, checked, and printed as plain values.

    python -m tools.recipe recipes/toy.toml [--seeds N]      what bash needs: lines KEY <tab> VALUE
    python -m tools.recipe recipes/paper_1.5b.toml --check   what is missing here; exit code 2 if so

A list's key is printed once for each of its values, so that the shell need evaluate nothing.
Nothing but Python's standard library: it runs before anything is installed.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

# The keys of [run], which run_all.sh reads; a key's type is its default's.
RUN = {
    "world": "none", "world_args": [], "world_base": "", "base_model": "", "self_model": "",
    "rlvr_source": "", "benchmarks": {}, "cards": 0, "data_per_seed": False, "arms": [],
    "rlvr_arms": [], "study_arms": [], "study_rlvr_arms": [], "n_seeds": 1, "first_seed": 0,
    "rlvr_seeds": 1000, "side_by_side": 1, "rlvr_limits": "equal", "published_rlvr_limits": {},
    "rlvr_drop_overlap": True, "instruction": "", "warmup": "", "warmup_epochs": 1,
    "teacher_model": "", "teacher_solutions": "", "teacher_epochs": 1, "teacher_samples": 8,
    "problems_source": "", "cpu_ranks": 0,
}
WORD_PROBLEMS = "word-problems"      # a world whose base is no toy
SECTIONS = ("run", "prepare-base", "problems", "teacher", "sample", "verify", "score", "select",
            "train", "rlvr", "eval", "plan", "report")
# The word of a command line that names a stage -> the stage's section of a recipe.
SECTION_OF = {
    "tools.prepare_base": "prepare-base", "problems": "problems", "teacher": "teacher",
    "model": "sample", "verify": "verify", "score": "score", "select": "select",
    "03_train_oxa.py": "train", "04_rlvr.py": "rlvr", "05_eval.py": "eval",
}


def die(message):
    """One line on stderr and exit code 2; control characters that a recipe holds are made visible.
    """
    visible = [c if c.isprintable() else repr(c)[1:-1] for c in message]
    print(f"error: {''.join(visible)}", file=sys.stderr)
    raise SystemExit(2)


def human(x):
    """1.5e9 -> '1.5 G'"""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if x >= size:
            return f"{x / size:.3g} {unit}"
    return f"{x:.0f} "


# ----------------------------------------------------------------------------------- read and check


def load_recipe(path, derived=()) -> dict:
    """The sections of a recipe. `from = "paper_1.5b"` at its top names another one beside it: where
    a section does not give a key, that one's value holds. `derived`: recipes that start from it.

    These lines stand in common.py too, which needs packages; a test compares the two.
    """
    path = Path(path)
    if path in derived:
        die(f"recipe {path} starts from itself (`from`)")
    recipe = read_toml(path)
    parent = recipe.pop("from", None)
    if parent is None:
        sections = {}
    elif isinstance(parent, str) and Path(parent).name == parent:
        sections = load_recipe(path.with_name(f"{parent}.toml"), (*derived, path))
    else:
        die(f"recipe {path}: from = {parent!r} is not the name of a recipe beside it")
    for section, values in recipe.items():
        if section not in SECTIONS:
            die(f"recipe {path}: unknown section [{section}]; known: {', '.join(SECTIONS)}")
        if not isinstance(values, dict):
            die(f"recipe {path}: {section} = {values!r} stands in no section")
        sections[section] = sections.get(section, {}) | values
    return sections


def read_toml(path) -> dict:
    if not Path(path).is_file():
        die(f"recipe {path} does not exist")
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:            # TOML and UTF-8 raise ValueErrors
        die(f"recipe {path} is not valid TOML: {error}")


def check_value(key, value):
    """Dies unless `value` is of the key's type, and fit for a command line or a file name."""
    default = RUN[key]
    if key == "benchmarks" and isinstance(value, list):        # the toy's, which have no source
        default = []
    if type(value) is not type(default):
        die(f"[run]: {key} = {value!r} must be of type {type(default).__name__}")
    if isinstance(value, int) and not 0 <= value < 10**6:
        die(f"[run]: {key} = {value} is out of range")
    at_least_1 = ("n_seeds", "side_by_side", "warmup_epochs", "teacher_epochs", "teacher_samples")
    if key in at_least_1 and value < 1:
        die(f"[run]: {key} must be at least 1")
    if key == "instruction":                     # the stages read it from the recipe, not bash
        return
    texts = [value] if isinstance(value, str) else []
    if isinstance(value, (list, dict)):
        texts += value
    if key == "benchmarks" and isinstance(value, dict):
        texts += value.values()
    for text in texts:
        if not isinstance(text, str) or not text.isprintable():
            die(f"[run]: {key}: {text!r} must be a text without control characters")
    if key.endswith("arms") or key in ("benchmarks", "published_rlvr_limits"):
        for name in value:
            if not re.fullmatch(r"\w[\w.-]*", name, flags=re.ASCII):
                die(f"[run]: {key}: {name!r} must be a name of letters, digits, '_', '.' and '-'")


def read_run(recipe) -> dict:
    """[run] with its defaults, checked."""
    given = recipe.get("run", {})
    for key, value in given.items():
        if key not in RUN:
            die(f"[run]: unknown key {key!r}; known: {', '.join(RUN)}")
        check_value(key, value)
    run = {**RUN, **given}
    needed = ["arms", "benchmarks"]
    needed += ["world_base"] if is_toy(run) else ["base_model"]
    if run["world"] == "none":
        needed += ["rlvr_source"]
        if has_teacher_model(run):
            needed += ["problems_source"]
    for key in needed:
        if not run[key]:
            die(f"[run]: {key} is missing")
    for key in ("base_model", "warmup", "teacher_model", "teacher_solutions"):
        if is_toy(run) and run[key]:
            die(f"[run]: {key} = {run[key]!r} is for real models; a toy world has its own")
    if run["world"] == "none" and not isinstance(run["benchmarks"], dict):
        die("[run]: benchmarks must name their sources: [run.benchmarks] NAME = \"hub id or file\"")
    return run


def is_toy(run):
    """Whether the base is one of toy/; `run`: [run] of a recipe with its defaults."""
    return run["world"] not in ("none", WORD_PROBLEMS)


def has_teacher_model(run):
    """Whether the teacher's traces are sampled, not imported."""
    return bool(run["teacher_model"] or run["teacher_solutions"] or run["world"] == WORD_PROBLEMS)


# ------------------------------------------------------------------------------------ for the shell


def settings(recipe, n_seeds=None):
    """Yield (key, value) of all that run_all.sh needs of a recipe, as texts."""
    run = read_run(recipe)
    for key in ("world", "world_base", "base_model", "self_model", "rlvr_source", "cards",
                "side_by_side", "cpu_ranks", "warmup", "warmup_epochs", "teacher_model",
                "teacher_solutions", "teacher_epochs", "teacher_samples", "problems_source"):
        yield key, run[key]
    for key in ("data_per_seed", "rlvr_drop_overlap"):
        yield key, str(run[key]).lower()

    n_seeds = n_seeds or run["n_seeds"]
    seeds = list(range(run["first_seed"], run["first_seed"] + n_seeds))
    arms, rlvr_arms = run["arms"], run["rlvr_arms"]
    if n_seeds > 1:                                  # a study: its controls come with more seeds
        arms = arms + run["study_arms"]
        rlvr_arms = rlvr_arms + run["study_rlvr_arms"]
    lists = {"world_args": run["world_args"], "arms": arms, "rlvr_arms": rlvr_arms, "seeds": seeds,
             "rlvr_seeds": seeds[:run["rlvr_seeds"]], "benchmarks": run["benchmarks"]}
    for key, values in lists.items():
        for value in values:
            yield key, value
    if isinstance(run["benchmarks"], dict):
        for name, source in run["benchmarks"].items():
            yield f"source_of.{name}", source

    if run["rlvr_limits"] not in ("equal", "published"):
        die(f"[run]: rlvr_limits = {run['rlvr_limits']!r} must be \"equal\" or \"published\"")
    for arm in rlvr_arms:
        if arm not in arms:
            die(f"[run]: rlvr_arms: {arm!r} is not one of arms")
        if run["rlvr_limits"] == "published":
            limit = run["published_rlvr_limits"].get(arm)
            if type(limit) is not int or limit < 1:
                die(f"[run]: published_rlvr_limits has no number of tokens for {arm!r}")
            yield f"rlvr_limit.{arm}", limit

    for word, section in SECTION_OF.items():
        values = dict(recipe.get(section, {}))
        if run["instruction"]:                   # a new one is a reason to run every stage again
            values["instruction"] = run["instruction"]
        yield f"section_of.{word}", f"[{section}] " + json.dumps(values, default=str)


# ------------------------------------------------------------------------------------------ missing


def count_cards():
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in done.stdout.splitlines())


def online():
    """Whether the hub answers within 3 s."""
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", ""):
        return False
    host = os.environ.get("HF_ENDPOINT", "https://huggingface.co").split("//")[-1].split("/")[0]
    name, _, port = host.partition(":")
    try:
        socket.create_connection((name, int(port or 443)), timeout=3).close()
        return True
    except OSError:
        return False


def is_here(name, kind):
    """A local path, or a hub id in the cache; `kind`: models or datasets."""
    home = os.environ.get("HF_HOME", Path.home() / ".cache/huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")
    return Path(name).exists() or (cache / f"{kind}--{name.replace('/', '--')}").is_dir()


def missing(recipe, disk=0):
    """What the run needs and this machine has not, as phrases; [] if all is here."""
    run, lacking = {**RUN, **recipe.get("run", {})}, []
    if is_toy(run):
        base = f"toy/{run['world_base']}"
        return [] if is_here(base, "models") else [f"the toy base {base}"]
    cards, wanted = count_cards(), run["cards"]
    if cards < wanted:
        lacking.append(f"{wanted} GPUs (here: {cards})")
    elif wanted and importlib.util.find_spec("vllm") is None and Path(".venv/installed").exists():
        lacking.append("vLLM (pip install -r requirements.txt)")
    models = [run[key] for key in ("base_model", "self_model", "teacher_model")]
    keys = ("rlvr_source", "problems_source", "warmup", "teacher_solutions")
    data = [run[key] for key in keys]
    if not has_teacher_model(run):
        data.append(recipe.get("teacher", {}).get("source"))
    if isinstance(run["benchmarks"], dict):
        data += run["benchmarks"].values()
    away = [name for name in models if name and not is_here(name, "models")]
    away += [name for name in data if name and not is_here(name, "datasets")]
    files = [name for name in away if name.count("/") != 1 or name.startswith((".", "/"))]
    on_hub = [name for name in away if name not in files]
    if files:
        lacking.append("the files " + ", ".join(files))
    if on_hub and not online():
        lacking.append("network to the hub, or local copies of " + ", ".join(on_hub))
    free = shutil.disk_usage(".").free
    if disk > free:
        lacking.append(f"disk: {human(disk)}B needed, {human(free)}B free")
    return lacking


# ------------------------------------------------------------------------------------- command line


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="TOML file")
    parser.add_argument("--check", action="store_true", help="only say what is missing here")
    parser.add_argument("--seeds", help="how many; default: the recipe's n_seeds")
    args = parser.parse_args(argv)
    recipe = load_recipe(args.recipe)
    if args.seeds is not None and not re.fullmatch("[1-9][0-9]{0,3}", args.seeds):
        die(f"--seeds must be a whole number of at least 1, not {args.seeds!r}")
    lines = [f"{key}\t{value}" for key, value in settings(recipe, int(args.seeds or 0))]
    if not args.check:
        print("\n".join(lines))
    elif lacking := missing(recipe):
        die(f"{args.recipe} cannot run here, missing: {'; '.join(lacking)}")


if __name__ == "__main__":
    main()
