"""What a run costs, before it is started: tokens, memory of a card by part, hours, disk; and what is missing here.

    bash run_all.sh paper_1.5b --plan                 every command of the run with its figures
    python -m tools.plan recipes/paper_1.5b.toml --check    only what is missing here: one sentence and exit code 2

Needs no card, no network and no model (known ones are listed here, others are read from a local config.json), and
nothing but Python's standard library: it runs before anything is installed.

Exact, and tested against real tiny models: parameters, gradients, optimizer state, KV cache, checkpoint sizes.
Modelled: activations (by layer), and time, from FLOPs and bytes at the utilisation that the recipe's [plan] names. What
only a run can tell (lengths of responses, shares of wrong answers) stands in [plan] too.

Deliberate simplifications: communication, import, verification and start-up take no time; all sequences of a kind have
the same mean length, with SPREAD for the longer ones that a mean token sits in.
"""

import argparse
import importlib.util
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

GB = 1e9
SPREAD = 1.3          # mean over tokens of their sequence's length, over the mean length
TEXT_BYTES = 3.3      # of a response, a token
LOGIT_CHUNK = 2**28   # logits alive at once on CUDA (model.OutputLayer)

# Defaults of the scripts that enter the arithmetic (tests compare them with the parsers), and of [plan].
DEFAULTS = {
    "prepare-base": {},
    "problems": {"limit": 0},
    "teacher": {"limit": 0},
    "sample": {"n": 8, "limit": 0, "max_tokens": 25000, "max_prompt_tokens": 1536, "gpu_memory": 0.9},
    "verify": {},
    "score": {"only": "all", "token_budget": 32768},
    "select": {"n_ce": 50000, "n_ul": 50000, "arm": "oxa_full"},
    "train": {"epochs": 6, "ce_per_step": 128, "ul_per_step": 128, "token_budget": 32768, "keep": 1, "shard": False,
              "gradient_checkpointing": False},
    "rlvr": {"prompts_per_step": 64, "rollouts": 8, "epochs": 20, "max_steps": 0, "max_prompt_tokens": 1536,
             "max_response_tokens": 18432, "token_budget": 32768, "gradient_checkpointing": False, "shard": False,
             "kl_coef": 0.001, "updates_per_batch": 1, "keep": 2, "gpu_memory": 0.3,
             "sleep": False},
    "eval": {"n": 32, "n_of": [], "max_tokens": 32768, "entropy_samples": 4, "token_budget": 32768},
}
ASSUMED = {"card": "H100 SXM", "card_gb": 80, "peak_tflops": 989, "bandwidth_tbs": 3.35, "utilisation": 0.4,
           "decode_efficiency": 0.4, "decode_overhead_ms": 8, "max_seqs": 256, "prompt_tokens": 150,
           "teacher_queries": 100000, "teacher_traces": 300000, "teacher_tokens": 11000, "self_tokens": 7000,
           "wrong_share": 0.4, "rlvr_problems": 10000, "rlvr_tokens": 11000, "eval_tokens": 12000}
PROBLEMS = {"aime24": 30, "aime25": 30, "brumo25": 30, "cmimc25": 40, "hmmt25": 30, "minerva": 272, "math500": 500}
SECTION = {"tools.prepare_base": "prepare-base", "03_train_oxa.py": "train", "04_rlvr.py": "rlvr", "05_eval.py": "eval",
           "model": "sample"}


def die(message):
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


# ----------------------------------------------------------------------------------------------------------- sizes


@dataclass(frozen=True)
class Model:
    """Sizes of a Qwen2-shaped decoder; parameters are counted, not looked up."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    inter: int
    vocab: int
    tied: bool
    head_dim: int = 0

    @property
    def width(self):                       # of the queries of a layer
        return self.heads * (self.head_dim or self.hidden // self.heads)

    @property
    def kv_width(self):
        return self.width // self.heads * self.kv_heads

    @property
    def n_linear(self):                    # in linear layers, biases of q, k, v included, the output layer not
        attention = (self.hidden + 1) * (self.width + 2 * self.kv_width) + self.width * self.hidden
        return self.layers * (attention + 3 * self.hidden * self.inter)

    @property
    def n_output(self):                    # weights of the output layer (the embedding's, if tied)
        return self.vocab * self.hidden

    @property
    def n_params(self):
        return self.n_linear + (2 * self.layers + 1) * self.hidden + (1 if self.tied else 2) * self.n_output

    def frozen_bytes(self):                # on a card: linear layers in bf16, the rest in float32
        linear = self.n_linear + (0 if self.tied else self.n_output)
        return 2 * linear + 4 * (self.n_params - linear)

    def kv_bytes(self, width=2):           # of one token
        return 2 * self.layers * self.kv_width * width

    def forward_flops(self, length):       # of one token in a sequence of mean `length`: (layers, output layer)
        return 2 * self.n_linear + 2 * self.layers * self.width * SPREAD * length, 2 * self.n_output

    def layer_bytes(self):                 # kept for backward inside one layer, a token: norms float32, the rest bf16
        return 24 * self.hidden + 2 * (2 * self.width + 2 * self.kv_width) + 8 * self.inter


KNOWN = {
    "Qwen2.5-0.5B": Model(896, 24, 14, 2, 4864, 151936, True),
    "Qwen2.5-Math-1.5B": Model(1536, 28, 12, 2, 8960, 151936, True),
    "Qwen2.5-Math-7B": Model(3584, 28, 28, 4, 18944, 152064, False),
    "DeepSeek-R1-Distill-Qwen-1.5B": Model(1536, 28, 12, 2, 8960, 151936, False),
    "DeepSeek-R1-Distill-Qwen-7B": Model(3584, 28, 28, 4, 18944, 152064, False),
}


def find_model(name):
    """A known model by the last part of its name, or a local directory with config.json. -> Model or None."""
    for config in (Path(name) / "config.json", Path(name) / "final" / "config.json"):
        if config.is_file():
            c = json.loads(config.read_text())
            return Model(c["hidden_size"], c["num_hidden_layers"], c["num_attention_heads"], c["num_key_value_heads"],
                         c["intermediate_size"], c["vocab_size"], c.get("tie_word_embeddings", False),
                         c.get("head_dim") or 0)
    return KNOWN.get(Path(name).name)


# ----------------------------------------------------------------------------------------------------------- costs


@dataclass
class Cost:
    tokens: float = 0
    seconds: float = 0
    memory: dict = None           # part -> bytes on one card
    disk: float = 0
    notes: tuple = ()


class Planner:
    """Costs of the commands of one recipe. `cards`: over all nodes."""

    def __init__(self, recipe, cards):
        run = recipe.get("run", {})
        self.recipe, self.cards = recipe, max(1, cards)
        self.p = {**ASSUMED, **recipe.get("plan", {})}
        unknown = set(self.p) - set(ASSUMED)
        if unknown:
            die(f"[plan]: unknown keys {sorted(unknown)}; known: {', '.join(sorted(ASSUMED))}")
        self.toy = run.get("world", "none") != "none"
        self.base_name = f"toy/{run['world_base']}" if self.toy else run.get("base_model", "Qwen2.5-Math-1.5B")
        self.base = find_model(self.base_name)
        if self.base is None:
            die(f"the sizes of {self.base_name} are not known; known: {', '.join(KNOWN)}, or a local directory")
        self.flops = self.p["peak_tflops"] * 1e12 * self.p["utilisation"]
        self.bandwidth = self.p["bandwidth_tbs"] * 1e12 * self.p["decode_efficiency"]

    def settings(self, section, given=()):
        return {**DEFAULTS[section], **self.recipe.get(section, {}), **dict(given)}

    # --- building blocks

    def decode(self, model, n, length, longest, memory):
        """Seconds to draw n responses of mean `length` on all cards, with `memory` bytes of KV cache on each.

        A step of decoding reads the weights once and every running sequence's keys and values; there are as many steps
        as the longest response has tokens, or as the sequences need that do not fit side by side.
        """
        context = self.p["prompt_tokens"] + SPREAD * length / 2
        here = n / self.cards
        at_once = max(1.0, min(here, self.p["max_seqs"], memory / (context * model.kv_bytes())))
        steps = max(longest, here * length / at_once)
        step = self.p["decode_overhead_ms"] / 1e3 + 2 * model.n_params / self.bandwidth
        return (steps * step + here * length * context * model.kv_bytes() / self.bandwidth
                + here * length * 2 * model.n_params / self.flops)

    def forward(self, model, tokens, length):
        return tokens * sum(model.forward_flops(length)) / self.flops / self.cards

    def update(self, model, tokens, length, checkpointing):
        """Forward, backward (twice that), the forward again where activations are recomputed; logits are made twice."""
        layers, output = model.forward_flops(length)
        return tokens * ((4 if checkpointing else 3) * layers + 4 * output) / self.flops / self.cards

    def training_memory(self, model, s):
        """Bytes on a card while a full pack is in backward."""
        split = self.cards if s["shard"] else 1
        rows = s["token_budget"]
        parts = {"weights": 4 * model.n_params / split, "gradients": 4 * model.n_params / split,
                 "optimizer": 8 * model.n_params / split}
        if s["shard"]:      # two layers and the root (embedding, output layer) are whole for a while, with gradients
            root = (1 if model.tied else 2) * model.n_output
            parts["gathered"] = 2 * 2 * (root + 2 * model.n_linear / model.layers)
        else:
            parts["bf16 copies"] = 2 * model.n_linear
            if self.cards > 1:
                parts["DDP buckets"] = 4 * model.n_params
        kept = rows * model.hidden * 4 * model.layers + rows * model.layer_bytes()
        parts["activations"] = kept if s["gradient_checkpointing"] else rows * model.layer_bytes() * model.layers
        parts["output chunk"] = 2.5 * 4 * LOGIT_CHUNK + (4 + 2) * model.n_output + 4 * rows * model.hidden
        return parts

    def engine_memory(self, model, share):
        card = share * self.p["card_gb"] * GB
        rest = max(0, card - 2 * model.n_params - 3 * GB)
        return {"vLLM weights": 2 * model.n_params, "KV cache": rest, "vLLM work": 3 * GB}

    def checkpoint(self, model, n_states):
        """Bytes of `n_states` checkpoints with optimizer state and the final weights, all float32."""
        return (n_states * 12 + 4) * model.n_params

    # --- stages: one method a recipe section

    def sample(self, s, model):
        queries = self.p["teacher_queries"]
        n = min(queries, s["limit"] or queries) * s["n"]
        tokens, memory = n * self.p["self_tokens"], self.engine_memory(model, s["gpu_memory"])
        seconds = self.decode(model, n, self.p["self_tokens"], s["max_tokens"], memory["KV cache"])
        return Cost(tokens, seconds, memory, tokens * TEXT_BYTES, (f"{n:,.0f} samples",))

    def teacher(self, s, model):
        tokens = self.p["teacher_traces"] * self.p["teacher_tokens"]
        return Cost(tokens, 0, None, tokens * TEXT_BYTES, (f"{self.p['teacher_traces']:,} traces",))

    def verify(self, s, model):
        tokens = self.responses(s)[1]
        return Cost(tokens, 0, None, tokens * TEXT_BYTES)

    def responses(self, s):
        """(mean length, tokens) of the responses that a verify or score command reads."""
        if Path(str(s.get("samples", "teacher"))).name.startswith("self"):
            sample = self.settings("sample")
            n = min(self.p["teacher_queries"], sample["limit"] or self.p["teacher_queries"]) * sample["n"]
            return self.p["self_tokens"], n * self.p["self_tokens"]
        return self.p["teacher_tokens"], self.p["teacher_traces"] * self.p["teacher_tokens"]

    def score(self, s, model):
        length, tokens = self.responses(s)
        tokens *= self.p["wrong_share"] if s["only"] == "wrong" else 1
        rows = s["token_budget"]
        memory = {"weights": self.base.frozen_bytes(), "activations": rows * (model.layer_bytes() + 8 * model.hidden),
                  "output chunk": 2 * 4 * LOGIT_CHUNK}
        return Cost(tokens, self.forward(self.base, tokens, length), memory, tokens * TEXT_BYTES)

    def select(self, s, model):
        n_ul = s["n_ul"] if s["arm"] == "oxa_full" else 0
        tokens = s["n_ce"] * self.p["teacher_tokens"] + n_ul * self.p["self_tokens"]
        return Cost(tokens, 0, None, tokens * TEXT_BYTES, (f"{s['n_ce']:,} + {n_ul:,} examples",))

    def train(self, s, model):
        parts = Path(str(s.get("data", ""))).parts
        arm = next((a for a in ("sft_lp", "oxa_mle", "oxa_full", "sft") if a in parts), "oxa_full")
        chosen = self.settings("select")
        steps = chosen["n_ce"] // s["ce_per_step"] * s["epochs"]
        ce, ul = steps * s["ce_per_step"], steps * s["ul_per_step"] if arm == "oxa_full" else 0
        prompt = self.p["prompt_tokens"]
        lengths = [(ce, prompt + self.p["teacher_tokens"]), (ul, prompt + self.p["self_tokens"])]
        tokens = sum(n * length for n, length in lengths)
        seconds = sum(self.update(model, n * length, length, s["gradient_checkpointing"]) for n, length in lengths)
        notes = (f"{steps:,} steps of {s['ce_per_step']}" + (f" + {s['ul_per_step']}" if ul else "") + " sequences",)
        return Cost(tokens, seconds, self.training_memory(model, s), self.checkpoint(model, s["keep"]), notes)

    def rlvr_step(self, s, model):
        """Seconds of one step: (rollouts, reference and update)."""
        n, length = s["prompts_per_step"] * s["rollouts"], min(self.p["rlvr_tokens"], s["max_response_tokens"])
        memory = self.engine_memory(model, s["gpu_memory"])["KV cache"]
        tokens = n * (length + self.p["prompt_tokens"])
        rest = s["updates_per_batch"] * self.update(model, tokens, length, s["gradient_checkpointing"])
        rest += self.forward(model, tokens, length) if s["kl_coef"] else 0
        return self.decode(model, n, length, s["max_response_tokens"], memory), rest

    def rlvr(self, s, model):
        limit = self.settings("problems")["limit"]
        problems = min(limit or self.p["rlvr_problems"], self.p["rlvr_problems"])
        whole = problems // s["prompts_per_step"] * s["epochs"]
        steps = min(whole, s["max_steps"] or whole)
        draw, rest = self.rlvr_step(s, model)
        n, length = s["prompts_per_step"] * s["rollouts"], min(self.p["rlvr_tokens"], s["max_response_tokens"])
        memory = self.training_memory(model, s)
        if s["kl_coef"]:
            memory["reference"] = model.frozen_bytes()
        engine = self.engine_memory(model, s["gpu_memory"])
        notes = [f"{steps:,} steps of {n} rollouts; {draw + rest:.0f} s a step: {draw:.0f} drawing, "
                 f"{rest:.0f} training"]
        if s["sleep"]:
            while_drawing = sum(engine.values()) + sum(memory.get(k, 0) for k in ("weights", "optimizer", "reference"))
            notes.append(f"vLLM sleeps while the trainer works; while it draws, {while_drawing / GB:.1f} GB are used")
        else:
            memory |= engine
        if steps < whole:
            days = whole * (draw + rest) / 86400
            weeks = f"about {round(days / 7)} weeks" if days > 10 else f"{days / 7:.1f} weeks"
            notes.append(f"the whole {whole:,} steps of the paper would take {days:.0f} days ({weeks}) on these cards, "
                         f"for each arm; this recipe stops after {steps:,}")
        return Cost(steps * n * length, steps * (draw + rest), memory, self.checkpoint(model, s["keep"]), tuple(notes))

    def eval(self, s, model):
        paths = s.get("problems") or []
        names = [Path(path).name.removesuffix(".jsonl") for path in paths]
        names = names or list(self.recipe.get("run", {}).get("benchmarks", {}))
        n_of = dict(pair.split("=") for pair in s["n_of"])
        per_problem = {name: int(n_of.get(name, s["n"])) for name in names}
        counts = {name: PROBLEMS.get(name, 160) for name in names}
        for name, path in zip(names, paths):
            if Path(path).is_file():
                counts[name] = sum(1 for _ in open(path, "rb"))
        n, n_problems = sum(counts[name] * per_problem[name] for name in names), sum(counts.values())
        length = min(self.p["eval_tokens"], s["max_tokens"])
        memory = self.engine_memory(model, 0.9)
        seconds = self.decode(model, n, length, s["max_tokens"], memory["KV cache"])
        seconds += self.forward(model, n_problems * s["entropy_samples"] * length, length)
        return Cost(n * length, seconds, memory, n * length * TEXT_BYTES, (f"{n_problems:,} problems, {n:,} samples",))

    def cost(self, section, settings):
        """Cost of one command; None where there is nothing to reckon."""
        if not hasattr(self, section.replace("-", "_")):
            return Cost(disk=4 * self.base.n_params) if section == "prepare-base" else None
        model = find_model(str(settings.get("model", ""))) or self.base
        return getattr(self, section)(settings, model)


# --------------------------------------------------------------------------------------------------------- commands


def read_command(words, planner):
    """Words of a command line -> (section, settings), or (None, {}) for what is no stage."""
    script = next((i for i, word in enumerate(words) if word.endswith(".py") or word in SECTION), None)
    name = Path(words[script]).name if script is not None else ""
    if name[:2] not in ("01", "02", "03", "04", "05") and name not in SECTION:
        return None, {}
    section, rest = SECTION.get(name), words[script + 1:]
    if section is None:
        section, rest = SECTION.get(rest[0], rest[0]), rest[1:]
    given, key = {}, None
    for word in rest:
        if word.startswith("--"):
            key = word[2:].replace("-", "_")
            given[key] = True
        elif given[key] is True:
            given[key] = word
        else:
            given[key] = [*(given[key] if isinstance(given[key], list) else [given[key]]), word]
    settings = planner.settings(section)
    for key, value in given.items():
        number = isinstance(settings.get(key), (int, float)) and isinstance(value, str)
        listed = key in ("problems", "n_of") and section == "eval" and isinstance(value, str)
        settings[key] = type(settings[key])(value) if number else [value] if listed else value
    return section, settings


def human(x):
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if x >= size:
            return f"{x / size:.3g} {unit}"
    return f"{x:.0f} "


def describe(cost, planner):
    """Lines under a command."""
    p, lines = planner.p, []
    tokens = human(cost.tokens).replace("G", "billion").replace("M", "million").strip()
    head = [f"{tokens} tokens"] if cost.tokens else []
    if cost.seconds and not planner.toy:
        head.append(f"{cost.seconds / 3600:.1f} h on {planner.cards} x {p['card']}")
    if cost.disk:
        head.append(f"disk {human(cost.disk)}B")
    lines.append("; ".join([*head, *cost.notes[:1]]))
    lines += cost.notes[1:]
    if cost.memory and not planner.toy:
        total = sum(cost.memory.values()) / GB
        verdict = "fits" if total <= p["card_gb"] else "DOES NOT FIT"
        lines.append("a card's memory, GB: " + " + ".join(f"{k} {v / GB:.1f}" for k, v in cost.memory.items())
                     + f" = {total:.1f} of {p['card_gb']}: {verdict}")
    return [f"      {line}" for line in lines if line]


def show(recipe_path, recipe, commands, cards):
    """The whole plan: each command in order with its figures, then totals, assumptions, and what is missing here."""
    planner = Planner(recipe, cards)
    p, hours, disk = planner.p, {}, 0
    print(f"Plan of {recipe_path}: {planner.base_name}, {planner.base.n_params / 1e9:.3f} billion parameters, "
          + ("on a CPU" if planner.toy else f"{planner.cards} cards"))
    for number, line in enumerate(commands, 1):
        print(f"[{number}] {line}")
        section, settings = read_command(shlex.split(line), planner)
        cost = planner.cost(section, settings) if section else None
        if cost:
            hours[section] = hours.get(section, 0) + cost.seconds / 3600
            disk += cost.disk
            print("\n".join(describe(cost, planner)))
    whole = sum(hours.values())
    print(f"\nIn all: disk {human(disk)}B" + ("; minutes on a CPU, see docs/LOG.md" if planner.toy else
          f", {whole:.3g} h on {planner.cards} cards = {whole * planner.cards:,.0f} card hours ("
          + ", ".join(f"{name} {h:.2g} h" for name, h in hours.items() if h) + ")"))
    if not planner.toy:
        print(f"Reckoned for {p['card']}: {p['peak_tflops']} TFLOP/s peak, {p['utilisation']:.0%} of it used in training "
              f"and scoring; {p['bandwidth_tbs']} TB/s, {p['decode_efficiency']:.0%} of it used in decoding."
              "\nAssumed (recipe, [plan]): "
              + ", ".join(f"{k} {v}" for k, v in p.items() if k not in ("card", "peak_tflops", "bandwidth_tbs")))
    lacking = missing(recipe, disk, planner)
    print("Missing here: " + "; ".join(lacking) if lacking else "Nothing is missing here.")


# ---------------------------------------------------------------------------------------------------------- missing


def count_cards():
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=5).stdout
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.splitlines())


def online():
    """Whether the hub answers at all (3 s)."""
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
    """A local path, or a hub id in the cache."""
    home = os.environ.get("HF_HOME", Path.home() / ".cache/huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")
    return Path(name).exists() or (cache / f"{kind}--{name.replace('/', '--')}").is_dir()


def missing(recipe, disk=0, planner=None):
    """What the run needs and this machine has not, as phrases; [] if all is here."""
    run, lacking = recipe.get("run", {}), []
    if run.get("world", "none") != "none":
        return [] if is_here(f"toy/{run['world_base']}", "models") else [f"the toy base toy/{run['world_base']}"]
    cards = count_cards()
    if cards < run.get("cards", 0):
        lacking.append(f"{run['cards']} cards (here: {cards})")
    elif run.get("cards", 0) and importlib.util.find_spec("vllm") is None and Path(".venv/installed").exists():
        lacking.append("vLLM (pip install -r requirements.txt)")
    models = [run[key] for key in ("base_model", "self_model") if key in run]
    data = [recipe.get("teacher", {}).get("source"), run.get("rlvr_source"), *run.get("benchmarks", {}).values()]
    away = [m for m in models if not is_here(m, "models")] + [d for d in data if d and not is_here(d, "datasets")]
    local = [name for name in away if name.count("/") != 1 or name.startswith((".", "/"))]
    if local:
        lacking.append("the files " + ", ".join(local))
    if set(away) - set(local) and not online():
        lacking.append("network to the hub, or local copies of " + ", ".join(a for a in away if a not in local))
    free = shutil.disk_usage(".").free
    if disk > free:
        lacking.append(f"disk: {human(disk)}B needed, {human(free)}B free")
    return lacking


# ------------------------------------------------------------------------------------------------------ command line


def load(path):
    try:
        return tomllib.loads(Path(path).read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        die(f"recipe {path} cannot be read: {error}")


def shell_variables(recipe):
    """[run] as bash assignments; lists become arrays, `benchmarks = {name = source}` an array of names and a variable
    source_NAME for each."""
    lines = []
    for key, value in recipe.get("run", {}).items():
        if isinstance(value, dict):
            lines += [f"source_{name}={shlex.quote(source)}" for name, source in value.items()]
            value = list(value)
        if isinstance(value, list):
            lines.append(f"{key}=({' '.join(shlex.quote(str(v)) for v in value)})")
        else:
            lines.append(f"{key}={shlex.quote(str(value).lower() if isinstance(value, bool) else str(value))}")
    return "\n".join(lines)


def total_cards(recipe, nodes=None):
    return recipe.get("run", {}).get("cards", 1) * int(nodes or os.environ.get("NNODES", 1))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="TOML file")
    parser.add_argument("--check", action="store_true", help="only say what is missing here; exit code 2 if so")
    parser.add_argument("--shell", action="store_true", help="print [run] as bash assignments, for run_all.sh")
    parser.add_argument("--nodes", type=int, help="nodes of the recipe's cards (default: NNODES, else 1)")
    args = parser.parse_args(argv)
    recipe = load(args.recipe)
    if args.shell:
        return print(shell_variables(recipe))
    if args.check:
        lacking = missing(recipe)
        if lacking:
            die(f"{args.recipe} cannot run here, missing: {'; '.join(lacking)}")
        return
    commands = [line.rstrip("\n") for line in sys.stdin] if not sys.stdin.isatty() else []
    if not commands:
        die("the commands are read from stdin: bash run_all.sh RECIPE --plan")
    show(args.recipe, recipe, commands, total_cards(recipe, args.nodes))


if __name__ == "__main__":
    main()
