"""How long ranks wait for each other at the end of a step, by the knee that model.plan_packs
balances with.

    python bench/packs.py [--steps 100 --sequences 128 --mean 9000]                # seconds

Steps of sequences with log-normal lengths (sigma 0.6, cut at 32,768 tokens) are split over 8 ranks.
A pack's seconds come from the roofline of tools/roofline.py, as on an H100, shares in the middle of
their ranges: a prediction, no measurement. Under DDP ranks meet at the end of a step; under
fully_shard in every pack. Idle is the share of all ranks' time that is spent waiting. The first
knee balances tokens alone.
"""

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

import model
from tools import roofline
from tools.sizes import KNOWN

BUDGET = 32768
RANKS = 8
KNEES = (1e12, 9216, 32768, model.ATTENTION_KNEE, 65536)
MODELS = (("Qwen2.5-Math-1.5B", "ddp"), ("Qwen2.5-Math-7B", "shard"))


def middle_of(assumed: dict) -> dict:
    """The middle of each range of [plan]."""
    return {key: statistics.mean(value) if isinstance(value, list) else value
            for key, value in assumed.items()}


def seconds_per_token_and_square(name: str, way: str) -> tuple[float, float]:
    """Of a traced full pack: seconds per token of all but attention, and attention's seconds per
    squared token. The optimizer is left out: it is the same on all ranks."""
    pack = roofline.traced_pack(KNOWN[name], way, True, BUDGET, RANKS)
    seconds = roofline.pack_seconds(pack, BUDGET, BUDGET, middle_of(roofline.ASSUMED))
    attention = seconds.pop("attention")
    seconds.pop("optimizer")
    return sum(seconds.values()) / BUDGET, attention / BUDGET ** 2


def idle_shares(lengths, per_token: float, per_square: float) -> tuple[float, float]:
    """Idle share of one step when ranks meet at its end, and when they meet in every pack."""
    busy = []                                              # ranks -> packs -> seconds
    for packs in model.plan_packs(lengths, BUDGET, RANKS):
        seconds = []
        for pack in packs:
            tokens = sum(lengths[i] for i in pack)
            squares = sum(lengths[i] ** 2 for i in pack)
            seconds.append(tokens * per_token + squares * per_square)
        busy.append(seconds)
    busy_RP = np.array(busy)
    whole = busy_RP.sum()
    at_end = 1 - whole / (RANKS * busy_RP.sum(1).max())
    at_packs = 1 - whole / (RANKS * busy_RP.max(0).sum())
    return at_end, at_packs


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--mean", type=float, default=9000, help="tokens of a sequence")
    args = parser.parse_args()

    sigma = 0.6
    generator = np.random.default_rng(0)
    drawn = generator.lognormal(np.log(args.mean) - sigma ** 2 / 2, sigma,
                                (args.steps, args.sequences))
    steps = np.minimum(drawn, BUDGET).astype(int).tolist()

    for name, way in MODELS:
        per_token, per_square = seconds_per_token_and_square(name, way)
        print(f"{name}: attention takes as long as all the rest at "
              f"{per_token / per_square:,.0f} tokens")
        for knee in KNEES:
            model.ATTENTION_KNEE = knee
            idle = np.array([idle_shares(lengths, per_token, per_square) for lengths in steps])
            at_end, at_packs = 100 * idle.mean(0)
            print(f"  knee {knee:15,.0f}: idle {at_end:5.2f} % at the end of a step (DDP), "
                  f"{at_packs:5.2f} % in packs (fully_shard)")


if __name__ == "__main__":
    main()
