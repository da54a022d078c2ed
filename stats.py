"""The statistics of evaluation and report: unbiased Pass@k, and intervals over problems and seeds.

Shapes: P problems, S seeds, K values of k.
"""

import functools
import math
import statistics

import numpy as np


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased Pass@k from c correct of n samples: 1 - C(n-c, k) / C(n, k) (Chen et al. 2021)."""
    if n - c < k:
        return 1.0
    return 1.0 - math.prod((n - c - i) / (n - i) for i in range(k))


def pass_curve(n: int, c: int) -> np.ndarray:
    """Pass@k for k = 1..n, [n]: the running product of (n-c-i) / (n-i), which is 0 from k = n-c+1 on."""
    i = np.arange(n)
    return 1.0 - np.cumprod(np.maximum(n - c - i, 0) / (n - i))


def t_quantile(p: float, freedom: float) -> float:
    """Quantile p > 0.5 of Student's t: with t = sqrt(f) tan(a) the density of the angle a goes as cos(a)^(f-1)."""
    angle = np.linspace(0, math.pi / 2, 20001)[:-1]
    density = np.cos(angle) ** (freedom - 1)
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(freedom) * math.tan(np.interp(p - 0.5, mass / mass[-1] / 2, angle))


@functools.lru_cache(maxsize=16)
def redraw(m: int, n_boot: int, *seed: int) -> np.ndarray:
    """[n_boot, m] changes of the weights of m units when they are drawn anew, times sqrt(m / (m - 1))."""
    if m == 1:
        return np.zeros((n_boot, 1))
    times = np.random.default_rng(seed).multinomial(m, [1 / m] * m, size=n_boot)
    return math.sqrt(m / (m - 1)) * (times / m - 1 / m)


def bootstrap(benchmarks: list, same_problems: bool = True, n_boot: int = 2000, level: float = 0.95, seed: int = 0):
    """Mean and interval over problems and seeds. `benchmarks`: for each benchmark a list over seeds of [P, K] values
    (scores, or paired differences of two arms) -> (mean, low, high), each [K]; benchmarks weigh alike.

    A replicate adds two independent parts: problems drawn anew (the same draw for all seeds if their problems are the
    same, `same_problems`, else one per seed) and seeds drawn anew (the same draw for all benchmarks). Deviations are
    scaled by sqrt(m / (m - 1)) for m drawn units, and the percentile interval is stretched by Student's t over normal,
    with Satterthwaite's degrees of freedom: resampling 5 seeds as they are covers too little (0.88 in place of 0.95).
    """
    n_seeds = len(benchmarks[0])
    by_seed = by_problem = 0
    parts = []                                                         # [P, K] each, with a draw of problems of its own
    for seeds in benchmarks:
        means = np.stack([x.mean(axis=0) for x in seeds])                                                       # [S, K]
        by_seed = by_seed + redraw(n_seeds, n_boot, seed, 0) @ means / len(benchmarks)
        parts += [np.mean(seeds, axis=0)] if same_problems else [x / n_seeds for x in seeds]
    for i, part in enumerate(parts, 1):
        by_problem = by_problem + redraw(len(part), n_boot, seed, i) @ part / len(benchmarks)
    units = sum(len(part) - 1 for part in parts)
    mean = np.mean([np.mean([x.mean(axis=0) for x in seeds], axis=0) for seeds in benchmarks], axis=0)
    var_seed, var_problem = by_seed.var(axis=0), by_problem.var(axis=0)
    freedom = (var_seed + var_problem) ** 2 / np.maximum(
        var_seed ** 2 / max(n_seeds - 1, 1) + var_problem ** 2 / max(units, 1), 1e-300)
    normal = statistics.NormalDist().inv_cdf((1 + level) / 2)
    stretch = np.array([t_quantile((1 + level) / 2, max(f, 1.0)) / normal for f in freedom])
    low, high = np.quantile(by_seed + by_problem, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return mean, mean + stretch * low, mean + stretch * high
