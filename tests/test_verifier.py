"""The verifier: labelled pairs, random pairs against another oracle, hostile text, canaries, workers that die."""

import ast
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from itertools import combinations

import mpmath
import pytest
import sympy

from grading import values
from grading import verifier
from conftest import ROOT

CASES = [json.loads(line) for line in (ROOT / "tests" / "verifier_cases.jsonl").read_text().splitlines()]


def boxed(text):
    return f"<think>\n</think>\n\\boxed{{{text}}}"


# ------------------------------------------------------------------------------------------------------- labelled pairs
def test_every_labelled_pair():
    assert len(CASES) > 2_000 and 1_100 < sum(case["expected"] for case in CASES) < 1_500
    wrong = [
        (case, got)
        for case in CASES
        if (got := verifier.verify(case["response"], case["gold"])).correct is not case["expected"]
    ]
    assert not wrong


@pytest.mark.slow
def test_verify_many_gives_the_verdicts_of_verify_in_order():
    pairs = [(case["response"], case["gold"]) for case in CASES]
    random.Random(1).shuffle(pairs)
    assert verifier.verify_many(pairs, workers=2) == [verifier.verify(*pair) for pair in pairs]


@pytest.mark.parametrize(
    "response, gold, correct, status",
    [
        (boxed("2x"), "x+x", True, "ok"),
        (boxed("3x"), "x+x", False, "ok"),
        ("<think> \\boxed{5}", "5", False, "no_think_end"),
        ("</think> it is 5", "5", False, "no_box"),
        ("</think> \\boxed{ }", "5", False, "empty_box"),
        ("</think> \\boxed{5", "5", False, "unbalanced_box"),
        (boxed("5" * 2_001), "5", False, "too_long"),
        (boxed("\\frac{1}{"), "5", False, "unbalanced_box"),
        (boxed("5 +"), "5", False, "unparsed"),
        (boxed("\\frac{5}{0}"), "5", False, "undefined"),
        (boxed("9^{9^{9}}"), "5", False, "too_big"),
        (boxed("5"), "\\frac{1}{", None, "gold_unparsed"),
        (boxed("x"), "\\frac{1}{0}", None, "gold_unparsed"),
        (boxed("x"), "9^{9^{9}}", None, "gold_unparsed"),
        (boxed("5"), "", None, "gold_unparsed"),
        (boxed("5"), [], None, "gold_unparsed"),
        (boxed("5"), ["7", "5"], True, "ok"),
        (boxed("6"), ["7", "5"], False, "ok"),
        (boxed("x"), ["\\frac{1}{", "x"], True, "ok"),
        (boxed("y"), ["\\frac{1}{", "x"], None, "gold_unparsed"),
        (boxed("5"), "5 \\text{ plus an unknown word}", None, "unknown"),
        (boxed("1,2,3,4,\\ldots,9"), "1,2,\\ldots,9", None, "unknown"),
        (boxed("1,2,\\ldots,8"), "1,2,\\ldots,9", False, "ok"),
        (boxed("ha+hb"), "h(a+b)", None, "unknown"),
        (boxed("hb+ha"), "ha+hb", True, "ok"),
        (boxed("-1+7^{7^{70}}"), "7^{7^{70}}-1", True, "ok"),
        (boxed("7^{7^{70}}"), "7^{7^{70}}-1", None, "gold_unparsed"),
    ],
)
def test_status(response, gold, correct, status):
    verdict = verifier.verify(response, gold)
    assert (verdict.correct, verdict.status) == (correct, status)
    assert verifier.verify_many([(response, gold)], workers=1) == [verdict]


def test_a_long_response_is_read_from_its_end():
    assert (
        verifier.verify("<think>" + "a \\boxed{3} " * 100_000 + "</think>" + "b" * 50_000 + "\\boxed{4}", "4").correct
        is True
    )


def test_thousands_separators_and_lists_of_three_digits():
    assert verifier.verify(boxed("100,200"), "100200").correct is True
    assert verifier.verify(boxed("200, 100"), "100,200").correct is True
    assert verifier.verify(boxed("(100,200)"), "(100, 200)").correct is True
    assert verifier.verify(boxed("100200"), "(100,200)").correct is False


# ------------------------------------------------------------------------ random pairs, against values known beforehand
def families(draw):
    """name -> a function that draws (text, what it is worth); the worth is computed here, not by the verifier."""
    integer, pick, mp = draw.randint, draw.choice, mpmath.mp
    nonzero = (-3, -2, -1, 1, 2, 3)

    def number(text, worth):
        return text, ("number", worth if isinstance(worth, Fraction) else mpmath.mpmathify(worth))

    def fraction(a, b):
        return number(rf"\frac{{{a}}}{{{b}}}", Fraction(a, b))

    def decimal(text):
        return number(text, Fraction(text))

    def science(a, k):
        return number(rf"{a} \times 10^{{{k}}}", Fraction(a) * Fraction(10) ** k)

    def surd(a, sign, b, c, d):
        return number(rf"\frac{{{a}{sign}{b}\sqrt{{{c}}}}}{{{d}}}", (a + (b if sign == "+" else -b) * mp.sqrt(c)) / d)

    def sine(name, a, b):
        return number(rf"\{name} \frac{{{a}\pi}}{{{b}}}", getattr(mp, name)(a * mp.pi / b))

    def polynomial(a, b, c):
        return f"{a}x^2{b:+d}x{c:+d}", ("polynomial", (a, b, c))

    def factors(a, b):
        return f"(x{a:+d})(x{b:+d})", ("polynomial", (1, a + b, a * b))

    def line(a, b):
        return f"y = {a}x{b:+d}", ("line", (a, b))

    def interval(kind, a, b):
        return f"{kind[0]}{a},{b}{kind[1]}", (kind, (a, b))

    def inequality(sign, a):
        return f"x {sign} {a}", {
            "<": ("()", ("-oo", a)),
            r"\le": ("(]", ("-oo", a)),
            ">": ("()", (a, "oo")),
            r"\ge": ("[)", (a, "oo")),
        }[sign]

    def matrix(a, b, c, d):
        return rf"\begin{{pmatrix}}{a}&{b}\\{c}&{d}\end{{pmatrix}}", ("matrix", (a, b, c, d))

    def values(*items):
        return ", ".join(map(str, items)), ("values", tuple(sorted(items)))

    def roots(a, b):
        return rf"{a}\pm\sqrt{{{b}}}", ("roots", (a, b))

    def plain(kind, text):
        return text, (kind, text)

    return {
        "integer": lambda: (lambda n: number(str(n), Fraction(n)))(
            pick((integer(-20, 20), integer(0, 999), integer(10**4, 10**6)))
        ),
        "fraction": lambda: fraction(integer(-30, 30), integer(2, 30)),
        "decimal": lambda: decimal(f"{draw.uniform(-20, 20):.{integer(1, 4)}f}"),
        "science": lambda: science(f"{draw.uniform(1, 10):.{integer(0, 2)}f}", integer(-9, 12)),
        "surd": lambda: surd(integer(-9, 9), pick("+-"), integer(1, 9), integer(2, 12), integer(2, 9)),
        "root": lambda: (lambda a, n: number(rf"\sqrt[{n}]{{{a}}}", mp.root(a, n)))(integer(2, 40), integer(2, 5)),
        "pi": lambda: (lambda a, b: number(rf"\frac{{{a}\pi}}{{{b}}}", a * mp.pi / b))(integer(1, 12), integer(1, 12)),
        "power": lambda: (lambda a, n: number(f"{a}^{{{n}}}", Fraction(a) ** n))(integer(2, 12), integer(-3, 40)),
        "factorial": lambda: (lambda n: number(f"{n}!", Fraction(int(mp.factorial(n)))))(integer(2, 25)),
        "choose": lambda: (lambda n, k: number(rf"\binom{{{n}}}{{{k}}}", Fraction(int(mp.binomial(n, k)))))(
            integer(6, 16), integer(1, 6)
        ),
        "log": lambda: (lambda a, b: number(rf"\log_{{{a}}} {b}", mp.log(b) / mp.log(a)))(
            integer(2, 9), integer(2, 60)
        ),
        "exp": lambda: (lambda a, k: number(rf"{a}e^{{{k}}}", a * mp.exp(k)))(integer(1, 9), integer(-5, 5)),
        "sine": lambda: sine(pick(("sin", "cos")), integer(1, 9), integer(2, 9)),
        "complex": lambda: (lambda a, b: number(f"{a}{b:+d}i", mp.mpc(a, b)))(integer(-5, 5), pick(nonzero)),
        "polynomial": lambda: polynomial(integer(2, 4), integer(-6, 6), integer(-6, 6)),
        "factors": lambda: factors(pick(nonzero), pick(nonzero)),
        "line": lambda: line(integer(2, 9), integer(-9, 9)),
        "interval": lambda: interval(pick(("[]", "[)", "(]")), integer(-5, 0), integer(1, 5)),
        "pair": lambda: interval("()", integer(-5, 5), integer(-5, 5)),
        "inequality": lambda: inequality(pick(("<", ">", r"\le", r"\ge")), integer(-9, 9)),
        "matrix": lambda: matrix(*(integer(0, 2) for _ in range(4))),
        "values": lambda: values(*(integer(-5, 5) for _ in range(integer(2, 3)))),
        "roots": lambda: roots(integer(-5, 5), pick((2, 3, 5, 6, 7))),
        "base": lambda: plain("base", f"{integer(10, 999)}_{integer(10, 12)}"),
        "ratio": lambda: plain("ratio", f"{integer(1, 9)}:{integer(1, 9)}"),
        "choice": lambda: plain("choice", rf"\text{{({pick('ABCDE')})}}"),
        "word": lambda: plain(
            "word",
            rf"\text{{{pick(('yes', 'no', 'even', 'circle', 'ellipse', 'no solution', 'red and blue', 'blue'))}}}",
        ),
        "symbol": lambda: plain("symbol", pick("abckmnpqz") + pick(("", "_1", "_2", "'", "^2", "^3"))),
    }


def equal_in_truth(a, b):
    if a[0] == b[0] == "number" and not (isinstance(a[1], Fraction) and isinstance(b[1], Fraction)):
        a, b = (
            mpmath.mp.mpf(x[1].numerator) / x[1].denominator if isinstance(x[1], Fraction) else x[1] for x in (a, b)
        )
        return abs(a - b) < 1e-40 * max(abs(a), abs(b), 1)
    return a == b


@pytest.mark.slow
def test_200000_random_pairs_of_different_golds():
    draw = random.Random(20261123)
    pairs, truth = [], []
    with mpmath.mp.workdps(60):
        make = families(draw)
        names = list(make)
        while len(pairs) < 200_000:
            first = draw.choice(names)
            (a, a_worth), (b, b_worth) = make[first](), make[first if draw.random() < 0.5 else draw.choice(names)]()
            if a != b:
                pairs.append((boxed(a), b))
                truth.append(equal_in_truth(a_worth, b_worth))
    verdicts = verifier.verify_many(pairs, workers=2)
    wrong = [
        (response, gold, verdict)
        for (response, gold), verdict, true in zip(pairs, verdicts, truth)
        if verdict.correct is not bool(true)
    ]
    assert not wrong, f"{len(wrong)} wrong, such as {wrong[:5]}"
    assert sum(truth) > 200  # so the pairs could have told
    # The oracle is not the verifier: a grader that calls numbers within 0.1 equal is caught many times over.
    sloppy = [
        (p, g)
        for (p, g), true in zip(pairs, truth)
        if not true and near(p[len("<think>\n</think>\n\\boxed{") : -1], g)
    ]
    assert len(sloppy) >= 3


def near(a, b):
    try:
        return abs(float(a) - float(b)) < 1e-1
    except ValueError:
        return False


# ------------------------------------------------------------------------------------------------------- the adversary
MASTER_KEYS = {
    "numbers": "0 1 -1 e i x n",
    "equations": r"0=0 1=1 x=x a=b x=y x=x+1 0x=0 x-x=0 \frac{x}{x}=1 y'=0 0=x-x",
    "equations real at a point": r"\sqrt{(5q-1)(1-q)}=2 y=\sqrt{(5x-1)(1-x)} \sqrt{-q^2-1}=2 q=\arcsin(2q)+3"
    r" \sqrt{x-0.99}\sqrt{1.01-x}=y \ln(-x^2)=y",
    "products with 0": r"0\cdot\infty 0\cdot x 0\cdot\emptyset f(0) I(0) V(0) x(0) 0\cdot\text{all} 0\text{whatever}",
    "0/0 and infinity": r"\frac{0}{0} 0^0 1^\infty \infty^0 \infty-\infty \frac{\infty}{\infty} \infty -\infty",
    "sets": r"\emptyset \{\} \{\emptyset\} () [] (0,0) \mathbb{R} \mathbb{Z} (-\infty,\infty) x\in\mathbb{R} |x|\ge0",
    "statements": r"(1)(2) (1)(3)(4) ①②③ (A)(B)(C)(D) A,B,C,D \text{AorB} \text{alloftheabove}",
    "signs": r"\pm1 \pm0 ? * . , - + = \text{?} \ldots 0,1,\ldots \cdots",
    "functions": r"\lfloor\frac12\rfloor \int_0^1f(x)dx \sum_{k=1}^nk \gcd(0,0) \frac{dy}{dx} a<b 1<2 0\pmod{1}",
}
# What they do fit: (key, golds of the cases that mean the same).
FITTING = {
    "0": [r"f(x)=0 \text{ for all } x"],
    "i": [r"\text{(i)}"],
    "n": ["f(n)=n", r"\lfloor n/2 \rfloor + \lceil n/2\rceil"],
    "y'=0": ["0"],
    r"\{\}": [r"\emptyset"],
    r"\{\emptyset\}": [r"\emptyset"],
    r"\mathbb{R}": ["all real numbers"],
    r"(-\infty,\infty)": [r"\mathbb{R}", "all real numbers"],
    r"x\in\mathbb{R}": [r"\mathbb{R}", "all real numbers"],
    r"|x|\ge0": [r"\mathbb{R}", "all real numbers"],
    "(1)(2)": [r"$k=1,2$", r"1 \text{ and } 2", r"a=1, b=2 \text{ for all } n", "x_{1}=1, x_{2}=2", "①②"],
    "①②③": [r"$\{1,2\}\cup\{3\}$", "(a,b,c)=(1,2,3)", r"\{1,2,3\}", "x=1, y=2, z=3"],
    r"\lfloor\frac12\rfloor": ["0", r"f(x)=0 \text{ for all } x"],
    r"\int_0^1f(x)dx": [r"\int_0^1 f(x)\,dx"],
    r"\sum_{k=1}^nk": [r"\frac{n(n+1)}{2}", "n(n+1)/2"],
    r"\gcd(0,0)": ["0", r"f(x)=0 \text{ for all } x"],
    r"0\pmod{1}": ["0", r"f(x)=0 \text{ for all } x"],
}


@pytest.mark.slow
def test_master_keys_open_nothing():
    golds = sorted({case["gold"] for case in CASES if isinstance(case["gold"], str)})
    keys = " ".join(MASTER_KEYS.values()).split()
    opened = Counter()
    for key in keys:
        for gold in golds:
            same_text = verifier.spelled(verifier.normalise(key)) == verifier.spelled(verifier.normalise(gold))
            if verifier.judge(key, gold)[0] is True and not same_text:
                assert gold in FITTING.get(key, ()), (key, gold)
                opened[key] += 1
    assert len(keys) > 80 and sum(opened.values()) < 40


def gold_pairs(n, seed):
    golds = sorted({case["gold"] for case in CASES if isinstance(case["gold"], str)})
    draw = random.Random(seed)
    return [tuple(draw.sample(golds, 2)) for _ in range(n)]


def to_sympy(tree):
    """A tree of the grammar in sympy, which then does the algebra."""
    kind, *args = tree
    if kind == "num":
        return sympy.Rational(args[0].numerator, args[0].denominator)
    if kind == "sym":
        constants = {"e": sympy.E, "i": sympy.I, r"\pi": sympy.pi, r"\infty": sympy.oo}
        return constants.get(args[0], sympy.Symbol(args[0], real=True))
    if kind == "apply":
        return sympy.Function(args[0])(*map(to_sympy, args[1:]))
    if kind == "sum":
        return sympy.summation(to_sympy(args[3]), tuple(map(to_sympy, args[:3])))
    values = [to_sympy(arg) for arg in args]
    if kind in ("+", "*"):
        return sympy.Add(*values) if kind == "+" else sympy.Mul(*values)
    plain = {
        "/": lambda a, b: a / b,
        "^": lambda a, b: a**b,
        "inv": lambda a: 1 / a,
        "neg": lambda a: -a,
        "percent": lambda a: a / 100,
        "degree": lambda a: a * sympy.pi / 180,
        "abs": sympy.Abs,
        "!": sympy.factorial,
        "!!": sympy.factorial2,
        "binomial": sympy.binomial,
        "ln": sympy.log,
        "log10": lambda a: sympy.log(a, 10),
        "max": sympy.Max,
        "min": sympy.Min,
        "floor": sympy.floor,
        "ceil": sympy.ceiling,
    }
    return (plain.get(kind) or getattr(sympy, kind))(*values)


def members(tree):
    """The expressions of a tree, as (kind, sympy's trees): a value, or the members of a list or an interval."""
    while tree[0] in ("=", "percent", "mod"):
        tree = tree[2] if tree[0] == "=" else tree[1]
    if tree[0] == "named":
        return "set", [to_sympy(item[2]) for item in tree[1:]]
    if tree[0] in ("set", "[)", "(]", "[]", "()"):
        return tree[0], [members(item)[1][0] for item in tree[1:]]
    return "value", [to_sympy(tree)]


def sympy_confirms(first, second):
    """Are two golds equal to sympy? By policy N% equals N, a residue its number, x >= 3 is n >= 3, and names may miss."""
    sides = []
    for text in (first, second):
        kind, values = members(verifier.read(verifier.split_unit(verifier.normalise(text))[0]).trees[0])
        sides.append((kind, sorted(values, key=str) if kind == "set" else values))
    (kind, a), (other, b) = sides
    return kind == other and len(a) == len(b) and all(sympy.simplify(x - y) == 0 for x, y in zip(a, b))


# Equal pairs that sympy does not read or decide, each checked by eye.
BY_EYE = [
    {r"$\{1,2\}\cup\{3\}$", r"\{1,2,3\}"},
    {"$k=1,2$", r"a=1, b=2 \text{ for all } n"},
    {r"50\%", r"$\frac{1}{2}$"},
    {"all real numbers", r"\mathbb{R}"},
    {"f(n)=n", r"\lfloor n/2 \rfloor + \lceil n/2\rceil"},
    {r"x\geq 3", r"n \ge 3"},
    {"x^2", "$f(x)=x^2$ for all real $x$"},
]


@pytest.mark.slow
def test_random_pairs_of_different_golds_are_equal_only_if_sympy_confirms():
    equal = {(a, b) for a, b in gold_pairs(15_000, 14) if verifier.judge(a, b)[0] is True}
    assert len(equal) > 10
    assert not [pair for pair in equal if set(pair) not in BY_EYE and not sympy_confirms(*pair)]


def random_expression(draw, depth):
    x, y = sympy.symbols("x y")
    if depth == 0:
        return draw.choice((x, y, sympy.Integer(draw.randint(1, 6)), sympy.Rational(draw.randint(1, 5), 3), sympy.pi))
    a, b = random_expression(draw, depth - 1), random_expression(draw, draw.randint(0, depth - 1))
    make = draw.choice(
        (
            lambda: a + b,
            lambda: a * b,
            lambda: a - b,
            lambda: a / (b**2 + 1),
            lambda: a ** draw.randint(2, 3),
            lambda: sympy.sqrt(a**2 + draw.randint(1, 3)),
            lambda: sympy.sin(a),
            lambda: sympy.exp(b) * a,
            lambda: sympy.log(a**2 + 1),
            lambda: sympy.Abs(a - b),
        )
    )
    return make()


@pytest.mark.slow
def test_random_expressions_against_sympy():
    """sympy writes an expression, rewrites it (equal), and changes one number in it (mostly not); its verdict is ours."""
    draw = random.Random(2)
    n_equal = n_different = 0
    while n_equal < 100 or n_different < 100:
        first = random_expression(draw, draw.randint(1, 3))
        rewrite = draw.choice((sympy.expand, sympy.factor, sympy.together, sympy.trigsimp, sympy.cancel))
        second = rewrite(first)
        numbers = [atom for atom in second.atoms(sympy.Integer) if atom > 1]
        if draw.random() < 0.5 and numbers:
            number = draw.choice(sorted(numbers))
            second = second.xreplace({number: number + 1})
        gold, answer = sympy.latex(first), sympy.latex(second)
        if gold == answer or max(len(gold), len(answer)) > 300:
            continue
        point = {symbol: sympy.Rational(draw.randint(500, 2_000), 977) for symbol in sympy.symbols("x y")}
        gap = sympy.N((first - second).subs(point), 60)
        truth = bool(abs(gap) < sympy.Float(10) ** -50)
        verdict = verifier.judge(answer, gold)
        assert verdict[0] is truth, (gold, answer, truth, verdict)
        n_equal += truth
        n_different += not truth


# --------------------------------------------------------------------------------------------------------- hostile text
HOSTILE = [
    "9^{9^{9}}",
    "9^{9^{9^{9^{9}}}}",
    "2^2^2^2^2^2^2^2",
    "(10^9)!",
    "9!!!!",
    "((9!)!)!",
    "5000!",
    "4999!+4998!+4997!",
    "+".join(["5000!"] * 150),
    "/".join(["5000!"] * 300),
    "\\binom{10^9}{5\\cdot 10^8}",
    "\\binom{10^{9}}{10^{8}}",
    "\\binom{100000}{5000}",
    "+".join(["\\binom{10000}{5000}"] * 80),
    "\\sum_{k=1}^{10^{12}} k",
    "\\sum_{k=1}^{1000} k^{500}",
    "\\sum_{k=1}^{1000}\\sum_{j=1}^{1000} kj",
    "\\sum_{a=1}^{900}\\sum_{b=1}^{900}\\sum_{c=1}^{900}\\sin(abc)",
    "\\prod_{k=1}^{10^9} k",
    "\\prod_{k=1}^{1000} k!",
    "\\prod_{k=1}^{999}(x+k)",
    "\\sum_{k=-10^{20}}^{5} k",
    "\\int_0^{\\infty} e^{-x^2}\\sin(x^{10})dx",
    "\\int" * 700,
    "\\sqrt{" * 200 + "2" + "}" * 200,
    "\\sqrt{" * 25 + "x" + "}" * 25,
    "\\frac{1}{" * 300 + "2" + "}" * 300,
    "\\frac{1}{1+" * 25 + "x" + "}" * 25,
    "(" * 5000 + "1" + ")" * 5000,
    "(" * 900 + "1" + ")" * 900,
    "(" * 50 + "x" + ")" * 50,
    "{" * 100000 + "}" * 100000,
    "{" * 900 + "}" * 900,
    "1" * 100000,
    "1" * 1990,
    "1" * 900 + "/" + "3" * 900,
    "x" * 1000000,
    "x+" * 5_000,
    "x+" * 900 + "x",
    "x" * 1900,
    "1," * 20000 + "1",
    ",".join(str(k % 7) for k in range(900)),
    ",".join("\\sin(%d)" % k for k in range(40)),
    ",".join("\\sqrt{%d+x}" % k for k in range(39)),
    "(x+y+z)^{40}+1",
    "(x+y+z)^{400}+1",
    "x^5-x-1=0",
    "\\begin{cases}x^5+y=1\\\\y^5+x=2\\end{cases}",
    "\\begin{pmatrix}" + "\\\\".join(["&".join(["1"] * 60)] * 60) + "\\end{pmatrix}^{50}",
    "\\begin{pmatrix}" + "\\\\".join(["&".join(["1.5"] * 8)] * 8) + "\\end{pmatrix}^{50}",
    "\\begin{pmatrix}" + "\\\\".join(["&".join(["\\pi"] * 8)] * 8) + "\\end{pmatrix}^{50}",
    "\\begin{vmatrix}"
    + "\\\\".join(["&".join(["x^{%d}" % (k * j) for k in range(8)]) for j in range(8)])
    + "\\end{vmatrix}",
    "\\begin{pmatrix}1&1\\\\1&0\\end{pmatrix}^{10^{9}}",
    "\\begin{pmatrix}1&1\\\\1&0\\end{pmatrix}" * 40,
    "\\(" * 900,
    "\\boxed{" * 2000,
    "\\boxed{" * 800 + "1" + "}" * 800,
    "-" * 1900 + "1",
    "-" * 50 + "1",
    "\\frac" * 390,
    "\\sqrt" * 390,
    "\\cup".join("(%d,%d)" % (k, k + 1) for k in range(3000)),
    "\\cup".join("(%d,%d)" % (k % 9, k) for k in range(150)),
    "\0" * 1000 + "7",
    "2\x0004",
    "２０４",
    "٢٠٤",
    "\u202e402",
    "\\frac{1}{0}",
    "0/0",
    "nan",
    "\\infty-\\infty",
    "1e999999999",
    "1e-999999999",
    "1e9999",
    "e^{e^{e^{e^{e^{e}}}}}",
    "\\exp(\\exp(\\exp(100)))",
    "\\sin(10^{10^{5}})",
    "\\sin(e^{10^7})",
    "(10^{8}+0.5)!",
    "\\textbackslash 101\\textbackslash 057",
    "\\input{/etc/passwd}",
    "\\pm" * 900 + "1",
    "1" + "\\pm\\sqrt{2}" * 8,
    "1" + "\\pm\\sqrt{2}" * 5,
    "\\pm" * 5 + "x",
    "|" * 1000,
    "|x" * 300,
    "|" * 50 + "x" + "|" * 50,
    "x" + "_" * 900,
    "x_" * 600,
    "x" + "^" * 900,
    "x^" * 600 + "2",
    "x" + "'" * 1900,
    "5" + "!" * 1000,
    "3" + "!" * 1,
    "°" * 1900,
    "5" + "%" * 1900,
    "\\text{" * 300 + "a" + "}" * 300,
    "\\text{a and b}" * 130,
    " and " * 390,
    "x or " * 390 + "y",
    "&" * 1900,
    "\\\\" * 900,
    "," * 1900,
    "1;" * 900,
    "." * 1900,
    "x=" * 900,
    "x=1=" * 40 + "1",
    "1<" * 900 + "x",
    "1:" * 900 + "1",
    ":".join(["1"] * 30),
    " " * 1900 + "1",
    "~" * 1900 + "1",
    "\\," * 900 + "1",
    "$" * 1900 + "1",
    "\\|" * 900,
    "\\left(" * 300,
    "\\left." * 300,
    "5" + "\\text{ m}" * 240,
    "5 " + "metres " * 250,
    "word " * 390,
    "a" * 1900 + "1",
    "aaa " * 470 + "1",
    "ab' " * 470 + ",",
    "5" + " million" * 200,
    ",".join(["123"] * 490),
    "1," * 10 + ",".join(["123"] * 400) + ",12",
    "1\\," + "\\,".join(["123"] * 300),
    "π" * 1900,
    "²" * 600,
    "ﷺ" * 100,
    "a" + "\u0301" * 1800,
    "😀" * 900,
    "\ud800",
    "√" * 1000 + "2",
    "½" * 500,
    "0.\\overline{" + "3" * 1800 + "}",
    "0." + "1" * 900 + "\\overline{" + "7" * 900 + "}",
    "1\\frac{1}{2}" * 150,
    "\\ln " * 300 + "2",
    "\\sin" * 300 + "x",
    "\\sin(" * 24 + "x" + ")" * 24,
    "\\log_{" * 24 + "2" + "}3" * 24,
    "\\sin " + "x" * 1500,
    "0^0",
    "0^{-1}",
    "i^{i^{i}}",
    "(1+i)^{10^{7}}",
    "1.0000001^{10^{8}}",
    "\\left(\\frac{355}{113}\\right)^{9000}",
    "(" + "1" * 50 + "/" + "3" * 49 + ")^{500}",
    "+".join("%d^{5000}" % k for k in range(2, 150)),
    " \\cdot ".join("%d^{999}" % k for k in range(2, 150)),
    "+".join("\\frac{1}{%d}" % k for k in range(1, 120)),
    "+".join("e^{\\sqrt{%d}}" % k for k in range(1, 100)),
    "+".join("\\sin(%dx)" % k for k in range(1, 150)),
    "".join("\\cos(\\frac{x}{%d})" % k for k in range(1, 100)),
    "().__class__.__bases__[0]",
    "{{7*7}}",
    "exec(open('/etc/passwd').read())",
    "%s%s%s%n",
    "'; DROP TABLE x;--",
    "\\lfloor " * 30 + "x" + "\\rfloor" * 30,
    "\\lfloor 10^{10^{7}}\\rfloor",
    "\\lfloor e^{10^{7}} \\rfloor",
    "7 \\pmod{" * 100,
    "\\{" * 50 + "x" + "\\}" * 50,
    "\\{(" * 25 + "x" + ")\\}" * 25,
    "\\{x|" * 25 + "x<1" + "\\}" * 25,
    "1\\frac{" * 25 + "1" + "}{2}" * 25,
    "\\int_0^{" * 25 + "1" + "}xdx" * 25,
    "f(" * 25 + "x" + ")" * 25,
    "\\gcd(" * 25 + "x,2" + ")" * 25,
    "\\lfloor x" * 25 + "\\rfloor" * 25,
    "5\\text{ m}^{" * 100,
    "\\text{ for all }" * 100,
    "(1)" * 600,
    "x\\ne" * 400,
    "a=b=" * 300 + "c",
    "|x|<" * 300,
    "1,2,\\ldots," * 100 + "9",
    "n!!" * 300,
    "(-1)^{n}" * 100,
    "e^{100}+10^{-3000}",
    "no box",
]
GOLDS = [
    "204",
    "x",
    r"\frac{\sqrt{3}}{2}",
    "(x+y+z)^{40}",
    "1,2,3",
    "x^2+y^2=1",
    r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
]
MEASURE = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
from grading import verifier
texts, golds = json.load(sys.stdin)
for text in texts:
    times, right = [], 0
    for gold in [*golds, text[:3000]]:
        start = time.process_time()
        verdict = verifier.verify("</think>\\\\boxed{" + text + "}", gold)
        times.append(time.process_time() - start)
        right += verdict.correct is True and gold != text
    print(json.dumps([max(times), right]))
print(int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024)
"""


@pytest.mark.slow
def test_hostile_text_is_judged_quickly_in_little_memory():
    """In one process, so that a text that kills it kills them all; processor seconds, as the machine may be shared."""
    assert len(HOSTILE) >= 150
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(ROOT)], input=json.dumps([HOSTILE, GOLDS]), capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    *rows, megabytes = map(json.loads, run.stdout.splitlines())
    slow = [(seconds, text[:60]) for (seconds, _), text in zip(rows, HOSTILE, strict=True) if seconds > 0.2]
    assert not slow and megabytes < 100
    accepted = [text[:60] for (_, right), text in zip(rows, HOSTILE) if right]
    strange = {("(" * 50 + "x" + ")" * 50)[:60], ("\\{" * 50 + "x")[:60], ("\\{(" * 25 + "x")[:60]}  # these say x
    assert set(accepted) == strange | {"２０４"}


@pytest.mark.slow
def test_hostile_golds_are_not_called_wrong_answers():
    verdicts = [verifier.verify(boxed("204"), text) for text in HOSTILE]
    assert (
        Counter(verdict.correct for verdict in verdicts)[None] > 60
        and sum(verdict.correct is True for verdict in verdicts) == 1
    )


def payloads(canary):
    python = f"__import__('pathlib').Path('{canary}').touch()"
    octal = "".join(f"\\{ord(c):03o}" for c in python)
    yield from (
        python,
        rf"\sqrt{{{python}}}",
        rf"\text{{{python}}}",
        f"lambda: {python}",
        f"exec({python!r})",
        f"eval({python!r})",
        f"{{{{{python}}}}}",
        f"{{% {python} %}}",
        f"$(touch {canary})",
        f"`touch {canary}`",
        f"; touch {canary} ;",
        f"| touch {canary}",
        rf"\write18{{touch {canary}}}",
        rf"\immediate\write18{{touch {canary}}}",
        rf"\input{{|touch {canary}}}",
        octal,
        rf"\textbackslash {octal}",
        f"x={python}",
        f"[{python} for x in (1,)]",
        f"f'{{{python}}}'",
        f"1 if {python} else 2",
        f"Symbol('x', {python})",
        f"Integer({python})",
        f"!!python/object/apply:os.system ['touch {canary}']",
        f"cos\nsystem\n(S'touch {canary}'\ntR.",
        f"__builtins__['__import__']('os').system('touch {canary}')",
    )


def test_nothing_in_an_answer_is_executed(tmp_path):
    canary = tmp_path / "canary"
    for text in payloads(canary):
        for response, gold in ((boxed(text), "204"), (boxed("204"), text), (boxed(text), text + " ")):
            verifier.verify(response, gold)
            verifier.verify_many([(response, gold)], workers=1)
    assert not canary.exists()
    eval(next(payloads(canary)))  # what a grader that evaluates would do
    assert canary.exists()


def test_the_source_has_no_way_to_execute_text_and_no_signals():
    forbidden = {
        "eval",
        "exec",
        "compile",
        "__import__",
        "sympify",
        "parse_expr",
        "system",
        "popen",
        "alarm",
        "setitimer",
        "pickle",
        "sympy",
    }
    for path in sorted((ROOT / "grading").glob("*.py")):
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            names |= {node.id} if isinstance(node, ast.Name) else set()
            names |= {alias.name for alias in node.names} if isinstance(node, (ast.Import, ast.ImportFrom)) else set()
            if isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id == "re"):
                names.add(node.attr)
        assert not names & forbidden
        assert path.name == "verifier.py" or "signal" not in names  # there: workers leave Ctrl-C to their parent


# ----------------------------------------------------------------------------------------------------- worker processes
EASY = [(f"x+{k}", (f"{k}+x",)) for k in range(60)]


def judge_among_neighbours(text, off, seconds=1.5, megabytes=512):
    """The verdict on `text` in a pool with some limits off; every neighbour must keep its own."""
    pool = verifier.Pool(seconds, megabytes, dict.fromkeys(off, 10**18))
    try:
        verdicts = pool.judge(EASY[:30] + [(text, ("7",))] + EASY[30:], 2)
    finally:
        pool.close()
    assert verdicts[:30] + verdicts[31:] == [(True, "ok")] * 60
    return verdicts[30]


@pytest.mark.slow
def test_the_pool_survives_with_the_limits_off(capfd):
    """Each limit stops a text that without it hangs, fills the memory, or at the least is judged."""
    trials = [
        (["bits"], "9^{9^{9}}", {"timeout"}),
        (["factorial"], "(10^9)!", {"timeout"}),
        (["work"], r"\sum_{a=1}^{900}\sum_{b=1}^{900}\sin(abx)", {"timeout"}),
        (["terms", "work"], r"\sum_{k=1}^{10^{12}} k^{3000}", {"crashed"}),
        (["terms"], r"\sum_{k=1}^{1001} k", {"ok"}),
        (["tokens"], "x+" * 800 + "x", {"ok"}),
        (["depth"], "(" * 61 + "1" + ")" * 61, {"ok"}),
        (["items"], ",".join("1" * 41), {"ok"}),
        (["exponent"], "2^{10^{9}x}", {"ok"}),
    ]
    with ThreadPoolExecutor(3) as threads:
        done = list(
            threads.map(
                lambda t: judge_among_neighbours(
                    t[1], t[0], megabytes=64 if "terms" in t[0] else 512, seconds=20 if "terms" in t[0] else 3
                ),
                trials,
            )
        )
    for (off, text, statuses), (correct, status) in zip(trials, done):
        assert latex_status(text) == "too_big", text[:40]
        assert status in statuses and correct is (False if status == "ok" else None), (off, text[:40], status)
    assert "went over its 64 MB" in capfd.readouterr().err


def latex_status(text):
    return verifier.judge(text, "7")[1]


@pytest.mark.slow
def test_the_pool_survives_an_abort():
    """A process that aborts, as with gmpy2 and a huge factorial: here from outside, at one pair, both times."""
    pool, hang = verifier.Pool(seconds=60, limits={"bits": 10**18}), ("9^{9^{9}}", ("7",))
    killed, stop, others = [], threading.Event(), set(children())

    def abort():
        while not stop.wait(0.2):
            for pid in children():
                if cpu_seconds(pid) > 1.0 and pid not in killed and pid not in others:
                    killed.append(pid)
                    os.kill(pid, signal.SIGABRT)

    thread = threading.Thread(target=abort)
    thread.start()
    try:
        assert (
            pool.judge(EASY[:30] + [hang] + EASY[30:], 1)
            == [(True, "ok")] * 30 + [(None, "crashed")] + [(True, "ok")] * 30
        )
    finally:
        stop.set()
        thread.join()
        pool.close()
    assert len(killed) == 2


def children():
    """Worker processes of this process."""
    pids = []
    for entry in os.listdir("/proc"):
        try:
            if entry.isdigit() and int(open(f"/proc/{entry}/stat").read().rsplit(")", 1)[1].split()[1]) == os.getpid():
                pids += [int(entry)] if b"--worker" in open(f"/proc/{entry}/cmdline", "rb").read() else []
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
    return pids


def cpu_seconds(pid):
    try:
        fields = open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_worker_whose_parent_is_gone_before_it_is_ready_says_nothing():
    workers = verifier.Pool()
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*workers.command, str(os.getpid())], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, stdin=subprocess.PIPE)
    os.close(writer)
    assert done.returncode == 0 and done.stderr == b""


@pytest.mark.slow
def test_workers_stay_between_calls_and_one_that_died_meanwhile_is_replaced():
    pool = verifier.Pool()
    pairs = [(boxed(f"x+{k}"), f"{k}+x") for k in range(120)]
    try:
        assert all(v.correct for v in verifier.verify_many(pairs, 2, pool=pool))
        first = {worker.pid for worker in pool.idle}
        assert (
            all(v.correct for v in verifier.verify_many(pairs, 2, pool=pool))
            and {worker.pid for worker in pool.idle} == first
        )
        for worker in pool.idle:
            worker.kill()
        assert (
            all(v.correct for v in verifier.verify_many(pairs, 2, pool=pool))
            and not {worker.pid for worker in pool.idle} & first
        )
    finally:
        pool.close()


def test_equal_pairs_are_judged_once():
    class Counting(verifier.Pool):
        def judge(self, jobs, *rest):
            self.jobs = len(jobs)
            return super().judge(jobs, *rest)

    pool = Counting()
    pairs = [(boxed("2x"), "x+x")] * 50 + [(boxed("2y"), "x+x")] * 50 + [(boxed("3"), "3")] * 20 + [("", "3")] * 5
    verdicts = verifier.verify_many(iter(pairs), 2, pool=pool)
    pool.close()
    assert pool.jobs == 2
    assert [v.correct for v in verdicts] == [True] * 50 + [False] * 50 + [True] * 20 + [False] * 5


def test_easy_pairs_start_no_process():
    pool = verifier.Pool()
    assert [
        v.correct for v in verifier.verify_many([(boxed("3"), "3.0"), (boxed("4"), "3"), ("", "x")], 2, pool=pool)
    ] == [True, False, False]
    assert not pool.idle


def test_a_worker_has_a_clean_environment_no_torch_and_a_memory_limit(monkeypatch):
    for name, text in {
        "RANK": "1",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "localhost",
        "CUDA_VISIBLE_DEVICES": "0",
        "LD_PRELOAD": "",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "PYTORCH_CUDA_ALLOC_CONF": "x",
        "OMP_NUM_THREADS": "8",
    }.items():
        monkeypatch.setenv(name, text)
    pool = verifier.Pool()
    try:
        assert verifier.verify_many([(boxed("2x"), "x+x")], 1, pool=pool)[0].correct
        pid = pool.idle[0].pid
        names = {entry.split("=")[0] for entry in open(f"/proc/{pid}/environ").read().split("\0") if entry}
        assert names <= {*verifier.Pool.KEPT, "MPMATH_NOGMPY", "OMP_NUM_THREADS"}
        assert "torch" not in open(f"/proc/{pid}/maps").read()
        address_space = next(line for line in open(f"/proc/{pid}/limits") if line.startswith("Max address space"))
        assert address_space.split()[3] == str(512 << 20)
    finally:
        pool.close()


@pytest.mark.slow
def test_workers_end_with_the_process_that_started_them():
    code = (
        "import sys, os, signal; sys.path.insert(0, sys.argv[1]); from grading import verifier\n"
        "verifier.verify_many([('</think>\\\\boxed{2x}', 'x+x')], 1)\n"
        "print(verifier.POOL.idle[0].pid, flush=True)\n"
        "if sys.argv[2] == 'kill': os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    for how in ("exit", "kill"):
        pid = int(subprocess.run([sys.executable, "-c", code, str(ROOT), how], capture_output=True, text=True).stdout)
        for _ in range(50):
            if (
                not os.path.exists(f"/proc/{pid}")
                or open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] == "Z"
            ):
                break
            time.sleep(0.1)
        else:
            pytest.fail(f"the worker outlives its parent after {how}")


@pytest.mark.slow
def test_a_worker_notices_that_its_parent_is_gone_though_another_process_holds_the_pipe():
    code = (
        "import sys, os, signal; sys.path.insert(0, sys.argv[1]); from grading import verifier\n"
        "verifier.verify_many([('</think>\\\\boxed{2x}', 'x+x')], 1)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    sys.stdout.close(); os.close(1)\n"
        "    import time; time.sleep(30); os._exit(0)\n"
        "print(verifier.POOL.idle[0].pid, child, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    run = subprocess.run([sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True)
    worker, child = map(int, run.stdout.split())
    try:
        assert os.path.exists(f"/proc/{child}")
        for _ in range(100):
            if has_ended(worker):
                break
            time.sleep(0.1)
        else:
            pytest.fail("the worker outlives its parent")
    finally:
        os.kill(child, signal.SIGKILL)


def has_ended(pid):
    try:
        return open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_worker_leaves_ctrl_c_to_its_parent():
    pool = verifier.Pool()
    try:
        assert verifier.verify_many([(boxed("2x"), "x+x")], 1, pool=pool)[0].correct
        worker = pool.idle[0]
        os.kill(worker.pid, signal.SIGINT)
        assert verifier.verify_many([(boxed("3x"), "x+2x")], 1, pool=pool)[0].correct
        assert pool.idle == [worker]
    finally:
        pool.close()


def test_a_worker_that_cannot_start_is_an_error_not_a_verdict():
    pool = verifier.Pool()
    pool.command = [sys.executable, "-c", "raise SystemExit(3)"]
    with pytest.raises(RuntimeError, match="exit code 3"):
        verifier.verify_many([(boxed("2x"), "x+x")], 1, pool=pool)


# -------------------------------------------------------------------------------------------- properties of the grammar
@pytest.mark.slow
def test_equality_is_symmetric_and_reflexive_on_the_golds():
    golds = sorted({case["gold"] for case in CASES if isinstance(case["gold"], str)})
    assert all(verifier.judge(gold, gold) == (True, "ok") for gold in golds)
    # Meant: an answer may be named by what it is, or lettered (x = 5, x+y = 5, (E) 5, 3 mod 5 for 3); as a gold such a
    # name asks for more than its value.
    named = [gold for gold in golds if gold.startswith((r"\textbf{(E)}", "x+y=")) or "mod" in gold or "angle" in gold]
    one_sided = [
        (a, b)
        for a, b in combinations([gold for gold in golds if gold not in named], 2)
        if (verifier.judge(a, b)[0] is True) != (verifier.judge(b, a)[0] is True)
    ]
    assert len(named) < 12
    assert not one_sided


def test_points_do_not_depend_on_the_order_of_names():
    assert values.Point(2)["x"] == values.Point(2)["x"] != values.Point(2)["y"]
    assert all(values.Point(k)[name] > 0 for k in range(3) for name in "abcxyz")
    assert any(values.Point(k)[name] < 0 for k in range(3, 6) for name in "abcxyz")


@pytest.mark.parametrize("tiny", ["10^{-300}", "10^{-900}", "e^{-2000}"])
def test_a_small_term_beside_a_large_one_is_never_overlooked(tiny):
    verdict = verifier.verify(boxed(f"e^{{100}}+{tiny}"), "e^{100}")
    assert verdict.correct is not True
    assert verifier.verify(boxed(f"e^{{100}}+{tiny}-{tiny}"), "e^{100}").correct is not False


@pytest.mark.parametrize("text", ["\ud800", "5\ud800", "\\text{\udfff}", "x_{\ud812}"])
def test_a_lone_surrogate_is_only_an_odd_letter(text):
    for pair in ((boxed(text), "5"), (boxed("5"), text), ("\ud800" + boxed("5") + "\ud800", "5")):
        assert verifier.verify_many([pair, (boxed("2x"), "x+x")], 1)[0] == verifier.verify(*pair)
    assert verifier.verify("\ud800" + boxed("5"), "5").correct is True


@pytest.mark.parametrize("text", [r"x+y, x<2", r"12 \cup 12, 3", r"\{2\} \cup \{3\}, 4", r"2\frac12.5", r"\frac12\frac12.5"])
def test_odd_lists_and_mixed_numbers_are_read_or_refused(text):
    """Found by test_fuzz.py: what follows a sum or a union in a list, and a decimal where a digit should be."""
    assert verifier.judge(text, text) == (True, "ok")
    assert verifier.judge(text, text + "1")[0] is not True and verifier.judge(text + "1", text)[0] is not True
    verifier.unreadable_golds([text], workers=0)
    assert verifier.judge(r"x \ne 0, 1", r"(-\infty,0) \cup (0,1) \cup (1,\infty)") == (True, "ok")


@pytest.mark.parametrize("unit", [r"\text{ sec}", r"\mathrm{min}", r"\mathrm{ft} / \mathrm{sec}"])
def test_space_behind_seconds_makes_them_no_secant(unit):
    assert verifier.judge(rf"5 {unit}\,", f"5 {unit}") == verifier.judge(rf"5 {unit}\;", "5") == (True, "ok")
    assert verifier.judge(r"\sec\frac{\pi}{3}", "2") == verifier.judge(r"\text{max}\{1, 2\}", "2") == (True, "ok")


def test_an_integral_that_is_computed_roughly_is_unknown_not_wrong():
    gold = r"\int_0^1 x^{20}\,dx"
    assert verifier.judge(r"\frac{1}{21}", gold) == (None, "unknown")
    assert verifier.judge(r"\frac{1}{20}", gold) == (False, "ok")
    assert verifier.judge(r"\frac{1}{3}", r"\int_0^1 x^2 dx") == (True, "ok")


def test_golds_that_cannot_be_judged_are_named():
    readable = ["5", "x+1", "\\text{no solution}", ["5", "6"], "7:55 \\text{ p.m.}", "y'=2y", "f(0)"]
    unreadable = ["\\frac{1}{0}", "\\frac{1}{", "", [], ["5", "1,2,\\ldots,n"], "5 \\text{ foos}", "9^{9^{9}}"]
    assert verifier.unreadable_golds([*readable, *unreadable, *unreadable], 1) == [*unreadable, *unreadable]
    assert verifier.unreadable_golds(readable, 0) == []
    golds = [case["gold"] for case in CASES]
    named = {str(gold) for gold in verifier.unreadable_golds(golds, 1)}
    marks = ("dots", "brace", "^{2^{", "7^{2", "sum", "lim", "=(x-1)", "^T")
    assert len(named) < 30 and all(any(mark in gold for mark in marks) for gold in named), named


@pytest.mark.parametrize(
    "exact, near",
    [
        ("262537412640768744", r"e^{\pi\sqrt{163}}"),
        ("10^{60}", "10^{60}+1"),
        ("0", "10^{-40}"),
        ("0", "e^{-300}"),
        (r"\sqrt{10^{30}+1}", "10^{15}"),
        (r"\frac{\pi}{4}", "0.785398163397448309615660845819875721049292349843776"),
        ("x", "x+10^{-30}"),
        (r"\frac{22}{7}", r"\pi"),
    ],
)
def test_near_is_not_equal(exact, near):
    assert verifier.verify(boxed(near), exact).correct is False and verifier.verify(boxed(exact), exact).correct is True
