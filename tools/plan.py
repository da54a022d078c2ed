"""What a run costs before it is started: tokens, a card's memory by part, hours, disk.

    bash run_all.sh paper_1.5b --plan

prints each command of the run with its figures, and what is missing here. It needs no card, no
network, no model, and nothing but Python's standard library.

Exact, and tested against real tiny models: parameters, gradients, optimizer state, KV cache,
checkpoints. Modelled: activations and time, in the functions under "memory and speed". What only a
run can tell (lengths of responses, shares of wrong answers) stands in the recipe's [plan].

Deliberate simplifications: communication, import, verification and start-up take no time; responses
of a kind have one mean length, and SPREAD stands for the longer ones that a mean token sits in.
"""

import argparse
import json
import os
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

from tools.recipe import SECTION_OF, die, human, load_recipe, missing

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
    "eval": {"n": 32, "n_of": [], "max_tokens": 32768, "entropy_samples": 4},
}
# What [plan] of a recipe may name; units are in recipes/paper_1.5b.toml.
ASSUMED = {
    "card": "H100 SXM", "card_gb": 80, "peak_tflops": 989, "bandwidth_tbs": 3.35,
    "utilisation": 0.4, "decode_efficiency": 0.4, "decode_overhead_ms": 8, "max_seqs": 256,
    "prompt_tokens": 150, "teacher_queries": 100000, "teacher_traces": 300000,
    "teacher_tokens": 11000, "self_tokens": 7000, "wrong_share": 0.4,
    "rlvr_problems": 10000, "rlvr_tokens": 11000, "eval_tokens": 12000,
}
N_PROBLEMS = {"aime24": 30, "aime25": 30, "brumo25": 30, "cmimc25": 40, "hmmt25": 30,
              "minerva": 272, "math500": 500}

# ---------------------------------------------------------------------------------- sizes of models


@dataclass(frozen=True)
class Model:
    """A Qwen2-shaped decoder; parameters are counted, not looked up."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    inter: int
    vocab: int
    tied: bool
    head_dim: int = 0

    @property
    def width(self):
        """Of a layer's queries."""
        return self.heads * (self.head_dim or self.hidden // self.heads)

    @property
    def kv_width(self):
        return self.width // self.heads * self.kv_heads

    @property
    def n_linear(self):
        """Parameters of the layers' linear maps, the biases of q, k and v included."""
        qkv = (self.hidden + 1) * (self.width + 2 * self.kv_width)
        return self.layers * (qkv + self.width * self.hidden + 3 * self.hidden * self.inter)

    @property
    def n_output(self):
        """Of the output layer, which is the embedding if tied."""
        return self.vocab * self.hidden

    @property
    def n_params(self):
        norms = (2 * self.layers + 1) * self.hidden
        return self.n_linear + norms + self.n_output * (1 if self.tied else 2)

    def frozen_bytes(self):
        """On a card: linear maps in bf16, embedding and norms in float32."""
        linear = self.n_linear + (0 if self.tied else self.n_output)
        return 2 * linear + 4 * (self.n_params - linear)

    def kv_bytes(self):
        """Of one token, bf16."""
        return 2 * 2 * self.layers * self.kv_width


KNOWN = {
    "Qwen2.5-0.5B": Model(896, 24, 14, 2, 4864, 151936, True),
    "Qwen2.5-Math-1.5B": Model(1536, 28, 12, 2, 8960, 151936, True),
    "Qwen2.5-Math-7B": Model(3584, 28, 28, 4, 18944, 152064, False),
    "DeepSeek-R1-Distill-Qwen-1.5B": Model(1536, 28, 12, 2, 8960, 151936, False),
    "DeepSeek-R1-Distill-Qwen-7B": Model(3584, 28, 28, 4, 18944, 152064, False),
}


def find_model(name):
    """A known model by the end of its name, or a directory with config.json; None if neither."""
    config = Path(name) / "config.json"
    if not config.is_file():
        return KNOWN.get(Path(name).name)
    c = json.loads(config.read_text())
    return Model(c["hidden_size"], c["num_hidden_layers"], c["num_attention_heads"],
                 c["num_key_value_heads"], c["intermediate_size"], c["vocab_size"],
                 c.get("tie_word_embeddings", False), c.get("head_dim") or 0)


# --------------------------------------------------------------------------------- memory and speed


def forward_flops(model, length):
    """FLOPs of one token in a sequence of mean `length`: (layers, output layer)."""
    attention = 2 * model.layers * model.width * SPREAD * length       # causal: half of the square
    return 2 * model.n_linear + attention, 2 * model.n_output


def activation_bytes(model, tokens, checkpointing):
    """What a pack of `tokens` keeps for backward: (layers, output layer with a chunk of logits)."""
    one_layer = 24 * model.hidden + 4 * (model.width + model.kv_width) + 8 * model.inter   # a token
    kept = model.layers * one_layer
    if checkpointing:                       # each layer's input, and one layer at a time in full
        kept = model.layers * 4 * model.hidden + one_layer
    output = 2.5 * 4 * LOGIT_CHUNK + 6 * model.n_output + 4 * tokens * model.hidden
    return tokens * kept, output


def score_seconds(model, tokens, length, flops):
    """Of a forward pass over `tokens` in sequences of mean `length`, at `flops` a second."""
    return tokens * sum(forward_flops(model, length)) / flops


def train_seconds(model, tokens, length, checkpointing, flops):
    """Forward, backward (twice that), forward again if activations are recomputed; logits twice."""
    layers, output = forward_flops(model, length)
    return tokens * ((4 if checkpointing else 3) * layers + 4 * output) / flops


def decode_seconds(model, n, length, longest, cache, p):
    """To draw n responses of mean `length` on one card with `cache` bytes for keys and values.

    A step of decoding reads the weights once, and keys and values of every running sequence. There
    are as many steps as the longest response has tokens, or as it takes if not all fit at once.
    """
    flops = p["peak_tflops"] * 1e12 * p["utilisation"]
    bandwidth = p["bandwidth_tbs"] * 1e12 * p["decode_efficiency"]
    a_sequence = (p["prompt_tokens"] + SPREAD * length / 2) * model.kv_bytes()
    at_once = max(1, min(n, p["max_seqs"], cache / a_sequence))
    steps = max(longest, n * length / at_once)
    a_step = p["decode_overhead_ms"] / 1e3 + 2 * model.n_params / bandwidth
    return steps * a_step + n * length * (a_sequence / bandwidth + 2 * model.n_params / flops)


def training_memory(model, s, cards):
    """Part -> bytes on a card while a full pack is in backward; `s`: settings of train or rlvr."""
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
    notes: list = field(default_factory=list)


class Plan:
    """Costs of a recipe's commands on `cards` over all nodes. A method a section, `s` its flags."""

    def __init__(self, recipe, cards):
        run = recipe.get("run", {})
        unknown = set(recipe.get("plan", {})) - set(ASSUMED)
        if unknown:
            die(f"[plan]: unknown keys {sorted(unknown)}; known: {', '.join(sorted(ASSUMED))}")
        self.recipe = recipe
        self.cards = max(1, cards)
        self.p = {**ASSUMED, **recipe.get("plan", {})}
        self.flops = self.p["peak_tflops"] * 1e12 * self.p["utilisation"] * self.cards
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
        return Cost(n * length, seconds, n * length * TEXT_BYTES, memory, [f"{n:,} samples"])

    def score(self, s, model):
        n, length = self.responses(s.get("samples", "teacher"))
        tokens = n * length * (self.p["wrong_share"] if s["only"] == "wrong" else 1)
        layers, _ = activation_bytes(model, s["token_budget"], checkpointing=False)
        memory = {"weights": model.frozen_bytes(), "output layer": 8 * LOGIT_CHUNK,
                  "activations": layers / model.layers + 8 * s["token_budget"] * model.hidden}
        seconds = score_seconds(model, tokens, length, self.flops)
        return Cost(tokens, seconds, tokens * TEXT_BYTES, memory)

    def select(self, s, model):
        n_ul = s["n_ul"] if s["arm"] == "oxa_full" else 0
        tokens = s["n_ce"] * self.p["teacher_tokens"] + n_ul * self.p["self_tokens"]
        notes = [f"{s['n_ce']:,} + {n_ul:,} examples"]
        return Cost(tokens, disk=tokens * TEXT_BYTES, notes=notes)

    def train(self, s, model):
        recompute = s["gradient_checkpointing"]
        steps = self.settings("select")["n_ce"] // s["ce_per_step"] * s["epochs"]
        n_ul = s["ul_per_step"] if "oxa_full" in Path(s.get("data", "oxa_full")).parts else 0
        notes = [f"{steps:,} steps of {s['ce_per_step']} + {n_ul} sequences"]
        total = Cost(disk=checkpoint_bytes(model, s["keep"]), notes=notes,
                     memory=training_memory(model, s, self.cards))
        for n, kind in ((s["ce_per_step"], "teacher_tokens"), (n_ul, "self_tokens")):
            length = self.p["prompt_tokens"] + self.p[kind]
            tokens = steps * n * length
            total.tokens += tokens
            total.seconds += train_seconds(model, tokens, length, recompute, self.flops)
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
        training = train_seconds(model, tokens, length, s["gradient_checkpointing"], self.flops)
        training *= s["updates_per_batch"]
        if s["kl_coef"]:
            memory["reference"] = model.frozen_bytes()
            training += score_seconds(model, tokens, length, self.flops)

        problems = self.settings("problems")["limit"] or self.p["rlvr_problems"]
        problems = min(problems, self.p["rlvr_problems"])
        whole = problems // s["prompts_per_step"] * s["epochs"]
        steps = min(whole, s["max_steps"] or whole)
        a_step = drawing + training
        notes = [f"{steps:,} steps of {n} rollouts; {a_step:.0f} s a step: {drawing:.0f} drawing, "
                 f"{training:.0f} training"]
        if steps < whole:
            days = whole * a_step / 86400
            notes.append(f"the whole {whole:,} steps would take {days:.0f} days on these cards, "
                         f"for each arm; this recipe stops after {steps:,}")
        disk = checkpoint_bytes(model, s["keep"])
        return Cost(steps * n * length, steps * a_step, disk, memory, notes)

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
        seconds += score_seconds(model, measured, length, self.flops)
        notes = [f"{n_problems:,} problems, {n:,} samples"]
        return Cost(n * length, seconds, n * length * TEXT_BYTES, memory, notes)


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


def describe(cost, plan):
    """Lines under a command."""
    facts = []
    if cost.tokens:
        count = human(cost.tokens).replace("G", "billion").replace("M", "million")
        facts.append(f"{count} tokens")
    if cost.seconds and not plan.toy:
        facts.append(f"{cost.seconds / 3600:.1f} h on {plan.cards} x {plan.p['card']}")
    if cost.disk:
        facts.append(f"disk {human(cost.disk)}B")
    lines = ["; ".join(facts + cost.notes[:1]), *cost.notes[1:]]
    if cost.memory and not plan.toy:
        parts = " + ".join(f"{part} {size / GB:.1f}" for part, size in cost.memory.items() if size)
        total, card = sum(cost.memory.values()) / GB, plan.p["card_gb"]
        verdict = "fits" if total <= card else "DOES NOT FIT"
        lines.append(f"a card's memory, GB: {parts} = {total:.1f} of {card}: {verdict}")
    return [line for line in lines if line]


def show(path, recipe, commands, cards):
    """The whole plan: each command with its figures, then totals, assumptions, what is missing."""
    plan = Plan(recipe, cards)
    place = "on a CPU" if plan.toy else f"{plan.cards} cards"
    billions = plan.base.n_params / 1e9
    print(f"Plan of {path}: {plan.base_name}, {billions:.3f} billion parameters, {place}")
    hours, disk = {}, 0
    for number, line in enumerate(commands, 1):
        print(f"[{number}] {line}")
        section, settings = read_command(shlex.split(line), plan)
        if section:
            cost = plan.cost(section, settings)
            disk += cost.disk
            hours[section] = hours.get(section, 0) + cost.seconds / 3600
            for text in describe(cost, plan):
                print(f"      {text}")
    print(f"\nIn all: disk {human(disk)}B", end="")
    if plan.toy:
        print("; minutes on a CPU, see docs/LOG.md")
    else:
        total = sum(hours.values())
        shares = ", ".join(f"{section} {h:.2g} h" for section, h in hours.items() if h)
        print(f", {total:.3g} h on {plan.cards} cards = {total * plan.cards:,.0f} card hours "
              f"({shares})")
        assumed = ", ".join(f"{key} {value}" for key, value in plan.p.items())
        print(f"Assumed (recipe, [plan]): {assumed}")
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
