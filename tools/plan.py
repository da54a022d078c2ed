"""What a run costs before it is started: tokens, a card's memory by part, hours, disk.

    bash run_all.sh paper_1.5b --plan

prints each command of the run with its figures, and what is missing here. It needs no card, no
network, no model, and nothing but Python's standard library.

Exact, and tested against real tiny models: parameters, gradients, optimizer state, KV cache,
checkpoints. Traced: memory and kernels of training and scoring (tools/trace.py, tools/roofline.py);
what was not traced has no hours. Assumed, in the recipe's [plan]: what only a run can tell (lengths
of responses, shares of wrong answers), and what only a card can (which share of its peak each kind
of kernel reaches): a range, so hours are a range.

Deliberate simplifications: communication, import, verification and start-up take no time; in
training and scoring responses of a kind have one mean length, and SPREAD stands for the longer ones
that a mean token sits in.
"""

import argparse
import os
import re
import shlex
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tools import levers, roofline
from tools.recipe import RUN, SECTION_OF, die, human, is_toy, load_recipe, missing
from tools.sizes import KNOWN, find_model

GB = 1e9
SPREAD = 1.3          # mean over tokens of their sequence's length, over the mean length
TEXT_BYTES = 3.3      # of a token of a response

# Defaults of the scripts' flags that enter the arithmetic; a test compares them with the parsers.
DEFAULTS = {
    "problems": {"limit": 0},
    "sample": {"n": 8, "limit": 0, "max_tokens": 25000, "gpu_memory": 0.9},
    "score": {"only": "all", "token_budget": 32768},
    "select": {"n_ce": 50000, "n_ul": 50000},
    "train": {"epochs": 6, "ce_per_step": 128, "ul_per_step": 128, "token_budget": 32768, "keep": 1,
              "gradient_checkpointing": False, "shard": False},
    "rlvr": {"prompts_per_step": 64, "rollouts": 8, "epochs": 20, "max_steps": 0, "keep": 2,
             "max_response_tokens": 18432, "token_budget": 32768, "kl_coef": 0.001,
             "updates_per_batch": 1, "gradient_checkpointing": False, "shard": False,
             "gpu_memory": 0.3, "sleep": False},
    "eval": {"n": 32, "n_of": [], "max_tokens": 32768, "entropy_samples": 4,
             "token_budget": 32768},
}
# What [plan] of a recipe may name; units are in recipes/paper_1.5b.toml. Where only a card can
# tell: [pessimist, optimist].
ASSUMED = {
    **roofline.ASSUMED, "card": "H100 SXM", "card_gb": 80,
    "utilisation": 0.4, "decode_efficiency": 0.4, "decode_overhead_ms": 8, "max_seqs": 256,
    "prompt_tokens": 150, "teacher_queries": 100000, "teacher_traces": 300000,
    "teacher_tokens": 11000, "self_tokens": 7000, "wrong_share": 0.4,
    "rlvr_problems": 10000, "rlvr_tokens": 11000, "eval_tokens": 12000, "eval_problems": 160,
    "base_solutions": 1000, "teacher_solutions": 10000,
    "cpu_training": 0, "cpu_drawing": 1, "cpu_scoring": 1,
}
N_PROBLEMS = {"aime24": 30, "aime25": 30, "brumo25": 30, "cmimc25": 40, "hmmt25": 30,
              "minerva": 272, "math500": 500}

# --------------------------------------------------------------------------------- memory and speed


def kernel_seconds(pack, tokens, length, budget, p, steps=0):
    """Kind of kernel -> seconds on one card: `tokens` in sequences of mean `length` and packs of
    `budget`, and the ends of `steps` steps. {} if not traced."""
    if pack is None:
        return {}
    seconds = roofline.pack_seconds(pack, budget, SPREAD * length, p)
    for kind in seconds:
        seconds[kind] *= steps if kind == "optimizer" else tokens / budget
    return seconds


def training_memory(model, s, cards):
    """Part -> bytes on a card while a full pack is in backward; without the pack's own part if that
    was not traced. `s`: settings of train or rlvr."""
    pack = roofline.traced_train(model, s, cards)
    if pack:
        return pack["memory"]
    of_weight = {"weights": 4, "gradients": 4, "optimizer": 8}
    split = cards if s["shard"] else 1
    return {part: size * model.n_params / split for part, size in of_weight.items()}


def engine_memory(model, share, p):
    """Part -> bytes of vLLM: what weights and work leave of its share holds keys and values."""
    weights, work = 2 * model.n_params, 3 * GB
    cache = max(0, share * p["card_gb"] * GB - weights - work)
    return {"vLLM weights": weights, "vLLM work": work, "KV cache": cache}


def checkpoint_bytes(model, keep):
    """`keep` checkpoints with optimizer state, and the final weights, all float32."""
    return (12 * keep + 4) * model.n_params


# --------------------------------------------------------------------------------- a command's cost


def check_values(recipe):
    """Dies unless the values that enter the arithmetic are of their defaults' kinds, and sound."""
    for section, defaults in {**DEFAULTS, "plan": ASSUMED}.items():
        for key, value in recipe.get(section, {}).items():
            reason = misfit(key, value, {"model": "", **defaults}.get(key), section == "plan")
            if reason:
                die(f"[{section}]: {key} = {value!r} {reason}")


def misfit(key, value, default, is_assumed):
    """Why a value cannot be planned with, or None; a number that is assumed may be a range."""
    if default is None:                              # enters no figure
        return None
    if isinstance(value, str) and not value.isprintable():
        return "has control characters"
    if isinstance(default, (bool, str)):
        return None if type(value) is type(default) else f"is not {type(default).__name__}"
    if key == "n_of":
        texts = value if isinstance(value, list) else [None]
        sound = all(re.fullmatch("[^=]+=[0-9]{1,9}", str(text)) for text in texts)
        return None if sound else 'is no list of "NAME=N"'
    numbers = value if is_assumed and isinstance(value, list) and len(value) == 2 else [value]
    for number in numbers:
        if type(number) not in (int, float) or not 0 <= number < 1e15:
            return "is not a finite number of at least 0"
        if number == 0 and (is_assumed or key == "token_budget" or key.endswith("per_step")):
            return "must be above 0"
    return None


@dataclass
class Cost:
    tokens: float = 0
    seconds: float = 0
    disk: float = 0                                   # bytes
    core: float = 0                                   # seconds of one CPU core
    memory: dict = field(default_factory=dict)        # part -> bytes on one card
    kinds: dict = field(default_factory=dict)         # kind of kernel -> seconds on one card
    drawing: float = 0                                # seconds of a step of RLVR
    training: float = 0                               # the same
    whole: int = 0                                    # steps of the paper, if more than these
    levers: list = field(default_factory=list)        # what a changed setting would do
    note: str = ""


class Plan:
    """Costs of a recipe's commands on `cards` over all nodes, as the pessimist or the optimist sees
    them. A method a section, `s` its flags."""

    def __init__(self, recipe, cards, end=roofline.PESSIMIST):
        run = recipe.get("run", {})
        unknown = set(recipe.get("plan", {})) - set(ASSUMED)
        if unknown:
            die(f"[plan]: unknown keys {sorted(unknown)}; known: {', '.join(sorted(ASSUMED))}")
        check_values(recipe)
        self.recipe = recipe
        self.cards = max(1, cards)
        self.digits = 1                         # of hours; a run that a CPU can do takes few
        self.p = roofline.at_end({**ASSUMED, **recipe.get("plan", {})}, end)
        if self.p["cpu_training"]:
            self.digits = 2
        self.toy = is_toy({**RUN, **run})
        self.base_name = f"toy/{run['world_base']}" if self.toy else run.get("base_model", "")
        self.base = find_model(self.base_name)
        if self.base is None:
            die(f"the sizes of {self.base_name} are not known; known: {', '.join(KNOWN)}, or a "
                "local directory")

    def settings(self, section, **given):
        return {**DEFAULTS.get(section, {}), **self.recipe.get(section, {}), **given}

    def cost(self, section, s):
        """Of a command: its section and settings."""
        model = find_model(s.get("model", "")) or self.base
        if section == "prepare-base":
            return Cost(disk=4 * model.n_params)
        if section in ("teacher", "verify"):
            n, length = self.responses(s.get("samples", "teacher"))
            return Cost(n * length, disk=n * length * TEXT_BYTES, note=f"{n:,} responses")
        if section not in ("sample", "score", "select", "train", "rlvr", "eval"):
            return Cost()
        cost = getattr(self, section)(s, model)
        if section in ("score", "train", "rlvr") and not cost.kinds and not self.toy:
            cost.note += "; not traced (tools/trace.py), so without hours and activations"
        return cost

    def core_seconds(self, drawn=0, trained=0, scored=0):
        """Of one CPU core, for numbers of tokens; 0 if [plan] has no speeds of a core."""
        p = self.p
        if not p["cpu_training"]:
            return 0
        seconds = drawn / p["cpu_drawing"]
        seconds += trained / p["cpu_training"]
        seconds += scored / p["cpu_scoring"]
        return seconds

    def responses(self, file):
        """(number, mean length) of the teacher's or the model's own responses, by their file."""
        if not Path(file).name.startswith("self"):
            n = self.p["teacher_traces"]
            samples = self.recipe.get("run", {}).get("teacher_samples")
            if samples and file.endswith("teacher.jsonl"):
                # the right ones and the wrong ones
                n = self.p["teacher_queries"] * samples
            return n, self.p["teacher_tokens"]
        s, queries = self.settings("sample"), self.p["teacher_queries"]
        return min(queries, s["limit"] or queries) * s["n"], self.p["self_tokens"]

    def draw(self, n, length, longest, model, memory):
        """Seconds to draw n responses on all cards, each with the memory of `engine_memory`."""
        lengths = levers.lengths_of(round(n / self.cards), length, longest)
        return levers.drain_seconds(model, lengths, memory["KV cache"], self.p)

    def sample(self, s, model):
        n, length = self.responses("self")
        if s.get("name") == "teacher":
            n, length = self.p["teacher_queries"] * s["n"], self.p["teacher_tokens"]
        memory = engine_memory(model, s["gpu_memory"], self.p)
        return Cost(tokens=n * length,
                    seconds=self.draw(n, length, s["max_tokens"], model, memory),
                    core=self.core_seconds(drawn=n * length),
                    disk=n * length * TEXT_BYTES,
                    memory=memory,
                    note=f"{n:,} samples")

    def score(self, s, model):
        n, length = self.responses(s.get("samples", "teacher"))
        tokens = n * length * (self.p["wrong_share"] if s["only"] == "wrong" else 1)
        pack = roofline.traced_pack(model, "frozen", False, s["token_budget"])
        kinds = kernel_seconds(pack, tokens / self.cards, length, s["token_budget"], self.p)
        return Cost(tokens=tokens,
                    seconds=sum(kinds.values()),
                    core=self.core_seconds(scored=tokens),
                    disk=tokens * TEXT_BYTES,
                    memory=pack["memory"] if pack else {"weights": model.frozen_bytes()},
                    kinds=kinds)

    def select(self, s, model):
        n_ul = s["n_ul"] if s["arm"] == "oxa_full" else 0
        tokens = s["n_ce"] * self.p["teacher_tokens"] + n_ul * self.p["self_tokens"]
        return Cost(tokens=tokens,
                    disk=tokens * TEXT_BYTES,
                    note=f"{s['n_ce']:,} + {n_ul:,} examples")

    def train(self, s, model):
        n_ce = self.settings("select")["n_ce"]
        out = Path(s.get("out", "")).name
        if out in ("base", "teacher"):          # which run_all.sh has made, as recipes/laptop.toml
            n_ce = self.p[f"{out}_solutions"]
        steps = n_ce // s["ce_per_step"] * s["epochs"]
        n_ul = s["ul_per_step"] if "oxa_full" in Path(s.get("data", "oxa_full")).parts else 0
        ce_length = self.p["prompt_tokens"] + self.p["teacher_tokens"]
        ul_length = self.p["prompt_tokens"] + self.p["self_tokens"]
        ce_tokens = steps * s["ce_per_step"] * ce_length
        ul_tokens = steps * n_ul * ul_length
        tokens = ce_tokens + ul_tokens
        length = (ce_tokens * ce_length + ul_tokens * ul_length) / tokens      # of a mean token

        pack = roofline.traced_train(model, s, self.cards)
        here = tokens / self.cards
        kinds = kernel_seconds(pack, here, length, s["token_budget"], self.p, steps)
        return Cost(tokens=tokens,
                    seconds=sum(kinds.values()),
                    core=self.core_seconds(trained=tokens),
                    disk=checkpoint_bytes(model, s["keep"]),
                    memory=training_memory(model, s, self.cards),
                    kinds=kinds,
                    levers=levers.train_levers(model, s, self.cards, kinds, self.p),
                    note=f"{steps:,} steps of {s['ce_per_step']} + {n_ul} sequences")

    def rlvr(self, s, model):
        engine = engine_memory(model, s["gpu_memory"], self.p)
        memory = training_memory(model, s, self.cards)
        if not s["sleep"]:
            memory |= engine
        n = s["prompts_per_step"] * s["rollouts"]
        length = min(self.p["rlvr_tokens"], s["max_response_tokens"])
        drawing = self.draw(n, length, s["max_response_tokens"], model, engine)

        here = n * (length + self.p["prompt_tokens"]) / self.cards
        pack = roofline.traced_train(model, s, self.cards)
        kinds = kernel_seconds(pack, here, length, s["token_budget"], self.p, steps=1)
        training = sum(kinds.values()) * s["updates_per_batch"]
        if s["kl_coef"]:
            memory["reference"] = model.frozen_bytes()
            frozen = roofline.traced_pack(model, "frozen", False, s["token_budget"])
            reference = kernel_seconds(frozen, here, length, s["token_budget"], self.p)
            training += sum(reference.values())

        problems = self.settings("problems")["limit"] or self.p["rlvr_problems"]
        problems = min(problems, self.p["rlvr_problems"])
        whole = problems // s["prompts_per_step"] * s["epochs"]
        steps = min(whole, s["max_steps"] or whole)
        # A group's prompt is read once.
        read = n * length + s["prompts_per_step"] * self.p["prompt_tokens"]
        core = self.core_seconds(drawn=n * length, trained=read * s["updates_per_batch"],
                                 scored=read if s["kl_coef"] else 0)
        return Cost(tokens=steps * n * length,
                    seconds=steps * (drawing + training),
                    core=steps * core,
                    disk=checkpoint_bytes(model, s["keep"]),
                    memory=memory,
                    kinds=kinds,
                    drawing=drawing,
                    training=training,
                    whole=whole if steps < whole else 0,
                    levers=levers.rlvr_levers(model, s, self.cards, engine["KV cache"], self.p),
                    note=f"{steps:,} steps of {n} rollouts")

    def eval(self, s, model):
        n_of = dict(pair.split("=") for pair in s["n_of"])
        n_problems = n = 0
        for name in self.recipe["run"]["benchmarks"]:
            here = N_PROBLEMS.get(name, self.p["eval_problems"])
            n_problems += here
            n += here * int(n_of.get(name, s["n"]))

        length = min(self.p["eval_tokens"], s["max_tokens"])
        memory = engine_memory(model, 0.9, self.p)
        measured = n_problems * s["entropy_samples"] * length
        pack = roofline.traced_pack(model, "frozen", False, s["token_budget"])
        entropy = kernel_seconds(pack, measured / self.cards, length, s["token_budget"], self.p)
        drawing = self.draw(n, length, s["max_tokens"], model, memory)
        return Cost(tokens=n * length,
                    seconds=drawing + sum(entropy.values()),
                    core=self.core_seconds(drawn=n * length, scored=measured),
                    disk=n * length * TEXT_BYTES,
                    memory=memory,
                    note=f"{n_problems:,} problems, {n:,} samples")


# --------------------------------------------------------------------------------- the printed plan


def read_command(words, plan):
    """Words of a command line -> (section, its settings), or (None, {}) for what is no stage."""
    start = next((i for i, word in enumerate(words) if word in SECTION_OF), None)
    if start is None:
        return None, {}
    section = SECTION_OF[words[start]]
    settings = plan.settings(section)
    flag = ""
    for word in words[start + 1:]:
        if word.startswith("--"):
            flag = word[2:].replace("-", "_")
        else:                               # of several values the last, which no figure depends on
            kind = type(settings.get(flag, ""))
            settings[flag] = kind(word) if kind in (int, float) else word
    return section, settings


def span(slow, fast, digits=0):
    """Optimist to pessimist; one number if they agree."""
    low = f"{fast:,.{digits}f}"
    high = f"{slow:,.{digits}f}"
    return low if low == high else f"{low} to {high}"


def describe(slow, fast, plan):
    """Lines under a command, from the pessimist's cost and the optimist's."""
    facts = []
    if slow.tokens:
        count = human(slow.tokens).replace("G", "billion").replace("M", "million")
        facts.append(f"{count} tokens")
    if slow.seconds and not plan.toy:
        hours = span(slow.seconds / 3600, fast.seconds / 3600, plan.digits)
        facts.append(f"{hours} h on {plan.cards} x {plan.p['card']}")
    if slow.core:
        facts.append(f"{slow.core / 3600:.2f} h of a CPU core")
    if slow.disk:
        facts.append(f"disk {human(slow.disk)}B")
    if slow.note:
        facts.append(slow.note)
    lines = ["; ".join(facts)] if facts else []
    if plan.toy or not slow.memory:
        return lines

    if slow.drawing:
        step = slow.drawing + slow.training, fast.drawing + fast.training
        lines.append(f"a step {span(*step)} s: drawing {span(slow.drawing, fast.drawing)}, "
                     f"training {span(slow.training, fast.training)}")
    if slow.whole:
        days = span(slow.whole * step[0] / 86400, slow.whole * step[1] / 86400)
        lines.append(f"the whole {slow.whole:,} steps would take {days} days on these GPUs, for "
                     "each arm; this recipe stops earlier")
    if slow.kinds:
        total = sum(slow.kinds.values())
        shares = []
        for kind in sorted(slow.kinds, key=slow.kinds.get, reverse=True):
            if slow.kinds[kind] > 0.005 * total:
                shares.append(f"{kind} {slow.kinds[kind] / total:.0%}")
        lines.append(f"where a GPU's time goes: {', '.join(shares)}")
    parts = " + ".join(f"{part} {size / GB:.1f}" for part, size in slow.memory.items() if size)
    total, card = sum(slow.memory.values()) / GB, plan.p["card_gb"]
    verdict = "fits" if total <= card else "DOES NOT FIT"
    lines.append(f"a GPU's memory, GB: {parts} = {total:.1f} of {card}: {verdict}")
    return lines + slow.levers


def show(path, recipe, commands, cards):
    """The whole plan: each command with its figures, then totals, assumptions, what is missing."""
    plan = Plan(recipe, cards, roofline.PESSIMIST)
    kinder = Plan(recipe, cards, roofline.OPTIMIST)
    place = "on a CPU" if plan.toy else f"{plan.cards} GPUs"
    billions = plan.base.n_params / 1e9
    print(f"Plan of {path}: {plan.base_name}, {billions:.3f} billion parameters, {place}")

    slow_hours, fast_hours = Counter(), Counter()                   # by section
    disk = core = 0
    for number, line in enumerate(commands, 1):
        print(f"[{number}] {line}")
        section, settings = read_command(shlex.split(line), plan)
        if section:
            slow, fast = plan.cost(section, settings), kinder.cost(section, settings)
            if section in slow_hours:
                slow.levers.clear()                 # told under the first command
            disk += slow.disk
            core += slow.core / 3600
            slow_hours[section] += slow.seconds / 3600
            fast_hours[section] += fast.seconds / 3600
            for text in describe(slow, fast, plan):
                print(f"      {text}")
    print(f"\nIn all: disk {human(disk)}B", end="")
    if plan.toy:
        print("; minutes on a CPU, see docs/LOG.md")
    else:
        slow, fast = slow_hours.total(), fast_hours.total()
        card_hours = span(slow * plan.cards, fast * plan.cards)
        parts = [f"{section} {span(slow_hours[section], fast_hours[section], plan.digits)} h"
                 for section in +slow_hours]
        print(f", {span(slow, fast, plan.digits)} h on {plan.cards} GPUs = "
              f"{card_hours} GPU hours ({', '.join(parts)})")
        if core:
            run = {**RUN, **recipe["run"]}
            n_cores = run["side_by_side"] * max(1, run["cpu_ranks"])
            print(f"Without a GPU: {core:.1f} h of a CPU core, {core / n_cores:.1f} h on {n_cores}"
                  " cores, and the starts of the commands")
        named = {**ASSUMED, **recipe.get("plan", {})}
        assumed = ", ".join(f"{key} {value}" for key, value in named.items())
        print(f"Assumed (recipe, [plan]; ranges from pessimist to optimist): {assumed}")
        print("Predicted by a roofline over traced kernels; no figure here was seen on a GPU.")
    lacking = missing(recipe, disk)
    print("Missing here: " + "; ".join(lacking) if lacking else "Nothing is missing here.")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="TOML file; the commands are read from stdin")
    args = parser.parse_args(argv)
    recipe = load_recipe(args.recipe)
    cards = recipe.get("run", {}).get("cards", 1) * int(os.environ.get("NNODES", 1))
    show(args.recipe, recipe, sys.stdin.read().splitlines(), cards)


if __name__ == "__main__":
    main()
