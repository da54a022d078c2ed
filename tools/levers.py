"""What drawing responses takes, and what a changed setting would do to memory and time: lines that
`--plan` prints under 03 and 04.

Numbers only, from the traced steps (tools/roofline.py) and from a model of decoding; nothing here
was seen on a card. Standard library only.
"""

import heapq
import math
from statistics import NormalDist

from tools import roofline

# ------------------------------------------------------------------------------- a step of training


def largest_budget(model, s, cards, p):
    """The most tokens of a micro-batch that fit a card, to the thousand; 0 if none do."""
    fits = 0
    for tokens in range(1024, 131072 + 1, 1024):
        pack = roofline.traced_train(model, {**s, "token_budget": tokens}, cards)
        if pack and sum(pack["memory"].values()) <= p["card_gb"] * 1e9:
            fits = tokens
    return fits


def train_levers(model, s, cards, kinds, p):
    """Lines: a larger pack, no recomputation, compiled layers."""
    if roofline.traced_train(model, s, cards) is None:
        return []
    total = sum(kinds.values())
    lines = [f"--token-budget: up to {largest_budget(model, s, cards, p):,} tokens fit"]
    if s["gradient_checkpointing"]:
        without = {**s, "gradient_checkpointing": False}
        fits = largest_budget(model, without, cards, p)
        if fits:
            lines.append(f"--gradient-checkpointing off: packs of at most {fits:,} tokens fit, "
                         "no longer sequence; a forward pass of four is saved")
    fused = sum(kinds[kind] for kind in roofline.FUSED) / total
    lines.append(f"--compile could save part of the {fused:.0%} in the layers' elementwise "
                 "kernels and casts, nothing else")
    return lines


# ----------------------------------------------------------------------- drawing a step's rollouts


def lengths_of(n, mean, longest):
    """n lengths of a log-normal response length (sigma 0.6), cut at `longest`, the longest last."""
    sigma = 0.6
    normal = NormalDist(math.log(mean) - sigma ** 2 / 2, sigma)
    logs = [normal.inv_cdf((k + 0.5) / n) for k in range(n)]
    return [min(math.exp(log), longest) for log in logs]


def drain_seconds(model, lengths, cache, p):
    """To draw responses of these lengths (rising) on one card with `cache` bytes for keys and
    values, the longest started first.

    Every step of decoding takes its overhead and one reading of the weights, and of the keys and
    values of what is running: `max_seqs` responses, or as many as the cache holds.
    """
    bandwidth = p["bandwidth_tbs"] * 1e12 * p["decode_efficiency"]
    a_token = 2 * model.n_params / (p["peak_tflops"] * 1e12 * p["utilisation"])      # its products
    a_step = p["decode_overhead_ms"] / 1e3 + 2 * model.n_params / bandwidth
    n_tokens = sum(lengths)
    read = 0.0                                              # bytes of keys and values
    for length in lengths:
        read += length * (p["prompt_tokens"] + length / 2) * model.kv_bytes()

    at_once = max(1, min(len(lengths), p["max_seqs"], cache * n_tokens / read))
    slots = [0.0] * int(at_once)                            # when each is free, in steps
    for length in reversed(lengths):
        heapq.heapreplace(slots, slots[0] + length)
    return max(slots) * a_step + read / bandwidth + n_tokens * a_token


def rlvr_levers(model, s, cards, cache, p):
    """Lines: what drawing the rollouts of one step takes, and would take. cache: bytes of a card
    for keys and values."""
    n = s["prompts_per_step"] * s["rollouts"] / cards
    limit, mean = s["max_response_tokens"], p["rlvr_tokens"]

    def a_rollout(times=1, max_seqs=p["max_seqs"], longest=limit, done=1.0):
        """Seconds a rollout; the step ends when the share `done` is, and the rest is carried on."""
        drawn = lengths_of(max(1, round(n * times)), mean, longest)
        last = drawn[math.ceil(len(drawn) * done) - 1]
        drawn = [min(length, last) for length in drawn]
        return drain_seconds(model, drawn, cache, {**p, "max_seqs": max_seqs}) / len(drawn)

    now = a_rollout()
    changes = {"twice the prompts a step": a_rollout(times=2),
               "four times": a_rollout(times=4),
               "half the sequences at once": a_rollout(max_seqs=min(n, p["max_seqs"]) / 2),
               f"a limit of {limit * 3 // 4:,} tokens": a_rollout(longest=limit * 3 // 4),
               "ending the step when 95% are done": a_rollout(done=0.95),
               "when 80% are": a_rollout(done=0.8)}
    told = ", ".join(f"{name} {seconds / now:.0%}" for name, seconds in changes.items())
    return [f"a rollout would take, of its {now:.1f} s (lengths are taken as log-normal): {told}"]
