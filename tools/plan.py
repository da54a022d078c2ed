"""What a run costs before it is started: tokens, a card's memory by part, hours, disk.

    bash run_all.sh paper_1.5b --plan

prints each command of the run with its figures, and what is missing here. It needs no card, no
network, no model, and nothing but Python's standard library.

Exact, and tested against real tiny models: parameters, gradients, optimizer state, KV cache,
checkpoints. Traced: memory and kernels of a training step (tools/trace.py, tools/roofline.py); for
a model that was not traced, the formulas under "memory and speed". Assumed, in the recipe's [plan]:
what only a run can tell (lengths of responses, shares of wrong answers), and what only a card can
(which share of its peak each kind of kernel reaches): a range, so hours are a range.

Deliberate simplifications: communication, import, verification and start-up take no time; responses
of a kind have one mean length, and SPREAD stands for the longer ones that a mean token sits in.
"""

import argparse
import os
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

from tools import levers, roofline
from tools.recipe import SECTION_OF, die, human, load_recipe, missing
from tools.sizes import KNOWN, find_model

GB = 1e9
SPREAD = 1.3          # mean over tokens of their sequence's length, over the mean length
TEXT_BYTES = 3.3      # of a token of a response
LOGIT_CHUNK = 2**28   # logits alive at once on CUDA (model.OutputLayer)

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
    "rlvr_problems": 10000, "rlvr_tokens": 11000, "eval_tokens": 12000,
}
N_PROBLEMS = {"aime24": 30, "aime25": 30, "brumo25": 30, "cmimc25": 40, "hmmt25": 30,
              "minerva": 272, "math500": 500}

# --------------------------------------------------------------------------------- memory and speed


def forward_flops(model, length):
    """FLOPs of one token in a sequence of mean `length`: (layers, output layer)."""
    attention = 2 * model.layers * model.width * SPREAD * length       # causal: half of the square
    return 2 * model.n_linear + attention, 2 * model.n_output


def activation_bytes(model, tokens, checkpointing):
    """What a pack of `tokens` keeps for backward: (layers, output layer with a chunk of logits).
    The formula, where there is no trace."""
    one_layer = 24 * model.hidden + 4 * (model.width + model.kv_width) + 8 * model.inter   # a token
    kept = model.layers * one_layer
    if checkpointing:                       # each layer's input, and one layer at a time in full
        kept = model.layers * 4 * model.hidden + one_layer
    output = 2.5 * 4 * LOGIT_CHUNK + 6 * model.n_output + 4 * tokens * model.hidden
    return tokens * kept, output


def score_seconds(model, tokens, length, budget, p):
    """Kind of kernel -> seconds on one card of a forward pass over `tokens`, in sequences of mean
    `length` and packs of `budget`."""
    pack = roofline.traced_pack(model, "frozen", False, budget)
    if pack is None:
        return {"all": tokens * sum(forward_flops(model, length)) / formula_flops(p)}
    return of_tokens(pack, tokens, length, budget, p)


def train_seconds(model, tokens, length, s, cards, p):
    """The same of forward and backward; the end of a step is not in it. `s`: settings of train or
    rlvr."""
    pack = roofline.traced_train(model, s, cards)
    if pack is None:                        # backward twice the forward; logits are made twice
        layers, output = forward_flops(model, length)
        passes = 4 if s["gradient_checkpointing"] else 3
        return {"all": tokens * (passes * layers + 4 * output) / formula_flops(p)}
    seconds = of_tokens(pack, tokens, length, s["token_budget"], p)
    del seconds["optimizer"]
    return seconds


def of_tokens(pack, tokens, length, budget, p):
    """Kind -> seconds of as many packs as hold `tokens`."""
    a_pack = roofline.pack_seconds(pack, budget, SPREAD * length, p)
    return {kind: seconds * tokens / budget for kind, seconds in a_pack.items()}


def step_end_seconds(model, s, cards, p):
    """Clipping and AdamW, on one card; 0 if not traced."""
    pack = roofline.traced_train(model, s, cards)
    return roofline.kernel_seconds("optimizer", pack["work"]["optimizer"], p) if pack else 0.0


def formula_flops(p):
    """A second, of a card, where there is no trace."""
    return p["peak_tflops"] * 1e12 * p["utilisation"]


def decode_seconds(model, n, length, longest, cache, p):
    """To draw n responses of mean `length` on one card with `cache` bytes for keys and values.

    A step of decoding reads the weights once, and keys and values of every running sequence. There
    are as many steps as the longest response has tokens, or as it takes if not all fit at once.
    """
    flops = formula_flops(p)
    bandwidth = p["bandwidth_tbs"] * 1e12 * p["decode_efficiency"]
    a_sequence = (p["prompt_tokens"] + SPREAD * length / 2) * model.kv_bytes()
    at_once = max(1, min(n, p["max_seqs"], cache / a_sequence))
    steps = max(longest, n * length / at_once)
    a_step = p["decode_overhead_ms"] / 1e3 + 2 * model.n_params / bandwidth
    return steps * a_step + n * length * (a_sequence / bandwidth + 2 * model.n_params / flops)


def training_memory(model, s, cards):
    """Part -> bytes on a card while a full pack is in backward; `s`: settings of train or rlvr."""
    pack = roofline.traced_train(model, s, cards)
    if pack:
        return pack["memory"]
    split = cards if s["shard"] else 1
    memory = {"weights": 4 * model.n_params / split, "gradients": 4 * model.n_params / split,
              "optimizer": 8 * model.n_params / split}
    if s["shard"]:                          # the root and two layers are whole for a while
        root = model.n_output * (1 if model.tied else 2)
        memory["gathered"] = 4 * (root + 2 * model.n_linear / model.layers)
    else:
        memory["bf16 copies"] = 2 * model.n_linear
        memory["DDP buckets"] = 4 * model.n_params if cards > 1 else 0
    layers, output = activation_bytes(model, s["token_budget"], s["gradient_checkpointing"])
    return {**memory, "activations": layers, "output layer": output}


def engine_memory(model, share, p):
    """Part -> bytes of vLLM: what weights and work leave of its share holds keys and values."""
    weights, work = 2 * model.n_params, 3 * GB
    cache = max(0, share * p["card_gb"] * GB - weights - work)
    return {"vLLM weights": weights, "vLLM work": work, "KV cache": cache}


def checkpoint_bytes(model, keep):
    """`keep` checkpoints with optimizer state, and the final weights, all float32."""
    return (12 * keep + 4) * model.n_params


# --------------------------------------------------------------------------------- a command's cost


@dataclass
class Cost:
    tokens: float = 0
    seconds: float = 0
    disk: float = 0                                   # bytes
    memory: dict = field(default_factory=dict)        # part -> bytes on one card
    kinds: dict = field(default_factory=dict)         # kind of kernel -> seconds on one card
    phases: dict = field(default_factory=dict)        # of a step of RLVR -> seconds
    whole: int = 0                                    # steps of the paper, if more than these
    levers: list = field(default_factory=list)        # what a changed setting would do
    notes: list = field(default_factory=list)


class Plan:
    """Costs of a recipe's commands on `cards` over all nodes, as the pessimist or the optimist sees
    them. A method a section, `s` its flags."""

    def __init__(self, recipe, cards, end=roofline.PESSIMIST):
        run = recipe.get("run", {})
        unknown = set(recipe.get("plan", {})) - set(ASSUMED)
        if unknown:
            die(f"[plan]: unknown keys {sorted(unknown)}; known: {', '.join(sorted(ASSUMED))}")
        self.recipe = recipe
        self.cards = max(1, cards)
        self.p = roofline.at_end({**ASSUMED, **recipe.get("plan", {})}, end)
        self.toy = run.get("world", "none") != "none"
        self.base_name = f"toy/{run['world_base']}" if self.toy else run.get("base_model", "")
        self.base = find_model(self.base_name)
        if self.base is None:
            die(f"the sizes of {self.base_name} are not known; known: {', '.join(KNOWN)}, or a "
                "local directory")

    def settings(self, section, **given):
        return {**DEFAULTS.get(section, {}), **self.recipe.get(section, {}), **given}

    def cost(self, section, s):
        model = find_model(s.get("model", "")) or self.base
        if section == "prepare-base":
            return Cost(disk=4 * model.n_params)
        if section in ("teacher", "verify"):
            n, length = self.responses(s.get("samples", "teacher"))
            return Cost(n * length, disk=n * length * TEXT_BYTES, notes=[f"{n:,} responses"])
        if section in ("sample", "score", "select", "train", "rlvr", "eval"):
            return getattr(self, section)(s, model)
        return Cost()

    def responses(self, file):
        """(number, mean length) of the teacher's or the model's own responses, by their file."""
        if not Path(file).name.startswith("self"):
            return self.p["teacher_traces"], self.p["teacher_tokens"]
        s, queries = self.settings("sample"), self.p["teacher_queries"]
        return min(queries, s["limit"] or queries) * s["n"], self.p["self_tokens"]

    def sample(self, s, model):
        n, length = self.responses("self")
        memory = engine_memory(model, s["gpu_memory"], self.p)
        cache = memory["KV cache"]
        seconds = decode_seconds(model, n / self.cards, length, s["max_tokens"], cache, self.p)
        return Cost(tokens=n * length,
                    seconds=seconds,
                    disk=n * length * TEXT_BYTES,
                    memory=memory,
                    notes=[f"{n:,} samples"])

    def score(self, s, model):
        n, length = self.responses(s.get("samples", "teacher"))
        tokens = n * length * (self.p["wrong_share"] if s["only"] == "wrong" else 1)
        layers, _ = activation_bytes(model, s["token_budget"], checkpointing=False)
        one_layer = layers / model.layers + 8 * s["token_budget"] * model.hidden
        memory = {"weights": model.frozen_bytes(),
                  "output layer": 8 * LOGIT_CHUNK,
                  "activations": one_layer}
        pack = roofline.traced_pack(model, "frozen", False, s["token_budget"])
        if pack:
            memory = pack["memory"]
        kinds = score_seconds(model, tokens / self.cards, length, s["token_budget"], self.p)
        return Cost(tokens=tokens,
                    seconds=sum(kinds.values()),
                    disk=tokens * TEXT_BYTES,
                    memory=memory,
                    kinds=kinds)

    def select(self, s, model):
        n_ul = s["n_ul"] if s["arm"] == "oxa_full" else 0
        tokens = s["n_ce"] * self.p["teacher_tokens"] + n_ul * self.p["self_tokens"]
        notes = [f"{s['n_ce']:,} + {n_ul:,} examples"]
        return Cost(tokens, disk=tokens * TEXT_BYTES, notes=notes)

    def train(self, s, model):
        steps = self.settings("select")["n_ce"] // s["ce_per_step"] * s["epochs"]
        n_ul = s["ul_per_step"] if "oxa_full" in Path(s.get("data", "oxa_full")).parts else 0
        notes = [f"{steps:,} steps of {s['ce_per_step']} + {n_ul} sequences"]
        total = Cost(disk=checkpoint_bytes(model, s["keep"]),
                     memory=training_memory(model, s, self.cards),
                     notes=notes)

        for n, kind in ((s["ce_per_step"], "teacher_tokens"), (n_ul, "self_tokens")):
            length = self.p["prompt_tokens"] + self.p[kind]
            tokens = steps * n * length
            total.tokens += tokens
            seconds = train_seconds(model, tokens / self.cards, length, s, self.cards, self.p)
            for part in seconds:
                total.kinds[part] = total.kinds.get(part, 0) + seconds[part]

        total.kinds["optimizer"] = steps * step_end_seconds(model, s, self.cards, self.p)
        total.seconds = sum(total.kinds.values())
        total.levers = levers.train_levers(model, s, self.cards, total.kinds, self.p)
        return total

    def rlvr(self, s, model):
        engine = engine_memory(model, s["gpu_memory"], self.p)
        memory = training_memory(model, s, self.cards)
        if not s["sleep"]:
            memory.update(engine)
        n = s["prompts_per_step"] * s["rollouts"]
        longest = s["max_response_tokens"]
        length = min(self.p["rlvr_tokens"], longest)
        tokens = n * (length + self.p["prompt_tokens"])
        drawing = decode_seconds(model, n / self.cards, length, longest, engine["KV cache"], self.p)

        here = tokens / self.cards
        kinds = train_seconds(model, here, length, s, self.cards, self.p)
        kinds["optimizer"] = step_end_seconds(model, s, self.cards, self.p)
        training = sum(kinds.values()) * s["updates_per_batch"]
        if s["kl_coef"]:
            memory["reference"] = model.frozen_bytes()
            reference = score_seconds(model, here, length, s["token_budget"], self.p)
            training += sum(reference.values())

        problems = self.settings("problems")["limit"] or self.p["rlvr_problems"]
        problems = min(problems, self.p["rlvr_problems"])
        whole = problems // s["prompts_per_step"] * s["epochs"]
        steps = min(whole, s["max_steps"] or whole)

        return Cost(tokens=steps * n * length,
                    seconds=steps * (drawing + training),
                    disk=checkpoint_bytes(model, s["keep"]),
                    memory=memory,
                    kinds=kinds,
                    phases={"drawing": drawing, "training": training},
                    whole=whole if steps < whole else 0,
                    notes=[f"{steps:,} steps of {n} rollouts"],
                    levers=levers.rlvr_levers(model, s, self.cards, self.p))

    def eval(self, s, model):
        n_of = dict(pair.split("=") for pair in s["n_of"])
        n_problems = n = 0
        for name in self.recipe["run"]["benchmarks"]:
            n_problems += N_PROBLEMS.get(name, 160)
            n += N_PROBLEMS.get(name, 160) * int(n_of.get(name, s["n"]))

        length = min(self.p["eval_tokens"], s["max_tokens"])
        memory = engine_memory(model, 0.9, self.p)
        cache = memory["KV cache"]
        seconds = decode_seconds(model, n / self.cards, length, s["max_tokens"], cache, self.p)

        measured = n_problems * s["entropy_samples"] * length
        entropy = score_seconds(model, measured / self.cards, length, s["token_budget"], self.p)
        seconds += sum(entropy.values())
        notes = [f"{n_problems:,} problems, {n:,} samples"]
        return Cost(tokens=n * length,
                    seconds=seconds,
                    disk=n * length * TEXT_BYTES,
                    memory=memory,
                    notes=notes)


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
        hours = span(slow.seconds / 3600, fast.seconds / 3600, digits=1)
        facts.append(f"{hours} h on {plan.cards} x {plan.p['card']}")
    if slow.disk:
        facts.append(f"disk {human(slow.disk)}B")

    lines = ["; ".join(facts + slow.notes[:1]), *slow.notes[1:]]
    if not plan.toy:
        lines += step_lines(slow, fast) + memory_lines(slow, plan) + slow.levers
    return [line for line in lines if line]


def step_lines(slow, fast):
    """What a step of RLVR takes, and where a card's time goes in training and scoring."""
    lines = []
    if slow.phases:
        step = sum(slow.phases.values()), sum(fast.phases.values())
        phases = []
        for phase, seconds in slow.phases.items():
            phases.append(f"{phase} {span(seconds, fast.phases[phase])}")
        lines.append(f"a step {span(*step)} s: {', '.join(phases)}")
        if slow.whole:
            days = span(slow.whole * step[0] / 86400, slow.whole * step[1] / 86400)
            lines.append(f"the whole {slow.whole:,} steps would take {days} days on these cards, "
                         "for each arm; this recipe stops earlier")

    if len(slow.kinds) > 1:
        total = sum(slow.kinds.values())
        told = []
        for kind in sorted(slow.kinds, key=slow.kinds.get, reverse=True):
            share = slow.kinds[kind] / total
            if share > 0.005:
                told.append(f"{kind} {share:.0%}")
        lines.append(f"where a card's time goes: {', '.join(told)}")
    return lines


def memory_lines(cost, plan):
    if not cost.memory:
        return []
    parts = " + ".join(f"{part} {size / GB:.1f}" for part, size in cost.memory.items() if size)
    total, card = sum(cost.memory.values()) / GB, plan.p["card_gb"]
    verdict = "fits" if total <= card else "DOES NOT FIT"
    return [f"a card's memory, GB: {parts} = {total:.1f} of {card}: {verdict}"]


def show(path, recipe, commands, cards):
    """The whole plan: each command with its figures, then totals, assumptions, what is missing."""
    plan = Plan(recipe, cards, roofline.PESSIMIST)
    kinder = Plan(recipe, cards, roofline.OPTIMIST)
    place = "on a CPU" if plan.toy else f"{plan.cards} cards"
    billions = plan.base.n_params / 1e9
    print(f"Plan of {path}: {plan.base_name}, {billions:.3f} billion parameters, {place}")

    hours, disk = {}, 0
    for number, line in enumerate(commands, 1):
        print(f"[{number}] {line}")
        section, settings = read_command(shlex.split(line), plan)
        if section:
            slow, fast = plan.cost(section, settings), kinder.cost(section, settings)
            if section in hours:
                slow.levers.clear()                 # told under the first command
            disk += slow.disk
            before = hours.get(section, (0, 0))
            hours[section] = (before[0] + slow.seconds / 3600,
                              before[1] + fast.seconds / 3600)
            for text in describe(slow, fast, plan):
                print(f"      {text}")
    print(f"\nIn all: disk {human(disk)}B", end="")
    if plan.toy:
        print("; minutes on a CPU, see docs/LOG.md")
    else:
        slow = sum(pair[0] for pair in hours.values())
        fast = sum(pair[1] for pair in hours.values())
        card_hours = span(slow * plan.cards, fast * plan.cards)
        parts = []
        for section, pair in hours.items():
            if pair[0]:
                parts.append(f"{section} {span(*pair, digits=1)} h")
        print(f", {span(slow, fast, digits=1)} h on {plan.cards} cards = {card_hours} card hours "
              f"({', '.join(parts)})")
        named = {**ASSUMED, **recipe.get("plan", {})}
        assumed = ", ".join(f"{key} {value}" for key, value in named.items())
        print(f"Assumed (recipe, [plan]; ranges from pessimist to optimist): {assumed}")
        print("Predicted by a roofline over traced kernels; no figure here was seen on a card.")
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
