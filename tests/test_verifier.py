"""The verifier: labelled pairs, random pairs against another oracle, hostile text, canaries,
workers that die."""

import ast
import json
import operator
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
from pathlib import Path

import mpmath
import pytest
import sympy

from grading import values
from grading import verifier
from conftest import ROOT

CASES_FILE = ROOT / "tests" / "verifier_cases.jsonl"
CASES = [json.loads(line) for line in CASES_FILE.read_text().splitlines()]


def boxed(text):
    return f"<think>\n</think>\n\\boxed{{{text}}}"


def golds_of_cases():
    """Every gold answer of the labelled pairs that is one text, in order."""
    return sorted({case["gold"] for case in CASES if isinstance(case["gold"], str)})


# ----------------------------------------------------------------------------------- labelled pairs


def test_every_labelled_pair():
    n_right = sum(case["expected"] for case in CASES)
    assert len(CASES) > 2_000
    assert 1_100 < n_right < 1_500

    wrong = []
    for case in CASES:
        verdict = verifier.verify(case["response"], case["gold"])
        if verdict.correct is not case["expected"]:
            wrong.append((case, verdict))
    assert not wrong


@pytest.mark.slow
def test_verify_many_gives_the_verdicts_of_verify_in_order():
    pairs = [(case["response"], case["gold"]) for case in CASES]
    random.Random(1).shuffle(pairs)
    expected = [verifier.verify(*pair) for pair in pairs]
    assert verifier.verify_many(pairs, workers=2) == expected


@pytest.mark.parametrize("response, gold, correct, status", [
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
    (boxed("7^{7^{70}}"), "7^{7^{70}}-1", None, "gold_unparsed")])
def test_status(response, gold, correct, status):
    verdict = verifier.verify(response, gold)
    assert verdict.correct is correct
    assert verdict.status == status
    assert verifier.verify_many([(response, gold)], workers=1) == [verdict]


def test_a_long_response_is_read_from_its_end():
    thinking = "<think>" + "a \\boxed{3} " * 100_000 + "</think>"
    answer = "b" * 50_000 + "\\boxed{4}"
    assert verifier.verify(thinking + answer, "4").correct is True


def test_thousands_separators_and_lists_of_three_digits():
    assert verifier.verify(boxed("100,200"), "100200").correct is True
    assert verifier.verify(boxed("200, 100"), "100,200").correct is True
    assert verifier.verify(boxed("(100,200)"), "(100, 200)").correct is True
    assert verifier.verify(boxed("100200"), "(100,200)").correct is False


# ---------------------------------------------------- random pairs, against values known beforehand

# Each family draws (text, what it is worth), the worth being (kind, value): computed here, not by
# the verifier. The value of a number is a Fraction, or mpmath's at its present precision.

NONZERO = (-3, -2, -1, 1, 2, 3)
WORDS = ("yes", "no", "even", "circle", "ellipse", "no solution", "red and blue", "blue")


def number(text, value):
    return text, ("number", value)


def an_integer(draw):
    small = draw.randint(-20, 20)
    middling = draw.randint(0, 999)
    large = draw.randint(10**4, 10**6)
    n = draw.choice((small, middling, large))
    return number(str(n), Fraction(n))


def a_fraction(draw):
    a = draw.randint(-30, 30)
    b = draw.randint(2, 30)
    return number(rf"\frac{{{a}}}{{{b}}}", Fraction(a, b))


def a_decimal(draw):
    x = draw.uniform(-20, 20)
    digits = draw.randint(1, 4)
    text = f"{x:.{digits}f}"
    return number(text, Fraction(text))


def a_power_of_ten(draw):
    x = draw.uniform(1, 10)
    digits = draw.randint(0, 2)
    k = draw.randint(-9, 12)
    a = f"{x:.{digits}f}"
    return number(rf"{a} \times 10^{{{k}}}", Fraction(a) * Fraction(10) ** k)


def a_surd(draw):
    a = draw.randint(-9, 9)
    sign = draw.choice("+-")
    b = draw.randint(1, 9)
    c = draw.randint(2, 12)
    d = draw.randint(2, 9)
    signed = b if sign == "+" else -b
    text = rf"\frac{{{a}{sign}{b}\sqrt{{{c}}}}}{{{d}}}"
    return number(text, (a + signed * mpmath.mp.sqrt(c)) / d)


def a_root(draw):
    a = draw.randint(2, 40)
    n = draw.randint(2, 5)
    return number(rf"\sqrt[{n}]{{{a}}}", mpmath.mp.root(a, n))


def a_part_of_pi(draw):
    a = draw.randint(1, 12)
    b = draw.randint(1, 12)
    return number(rf"\frac{{{a}\pi}}{{{b}}}", a * mpmath.mp.pi / b)


def a_power(draw):
    a = draw.randint(2, 12)
    n = draw.randint(-3, 40)
    return number(f"{a}^{{{n}}}", Fraction(a) ** n)


def a_factorial(draw):
    n = draw.randint(2, 25)
    return number(f"{n}!", Fraction(int(mpmath.mp.factorial(n))))


def a_binomial(draw):
    n = draw.randint(6, 16)
    k = draw.randint(1, 6)
    return number(rf"\binom{{{n}}}{{{k}}}", Fraction(int(mpmath.mp.binomial(n, k))))


def a_logarithm(draw):
    a = draw.randint(2, 9)
    b = draw.randint(2, 60)
    return number(rf"\log_{{{a}}} {b}", mpmath.mp.log(b) / mpmath.mp.log(a))


def an_exponential(draw):
    a = draw.randint(1, 9)
    k = draw.randint(-5, 5)
    return number(rf"{a}e^{{{k}}}", a * mpmath.mp.exp(k))


def a_sine_or_cosine(draw):
    name = draw.choice(("sin", "cos"))
    a = draw.randint(1, 9)
    b = draw.randint(2, 9)
    function = getattr(mpmath.mp, name)
    return number(rf"\{name} \frac{{{a}\pi}}{{{b}}}", function(a * mpmath.mp.pi / b))


def a_complex_number(draw):
    a = draw.randint(-5, 5)
    b = draw.choice(NONZERO)
    return number(f"{a}{b:+d}i", mpmath.mp.mpc(a, b))


def a_polynomial(draw):
    a = draw.randint(2, 4)
    b = draw.randint(-6, 6)
    c = draw.randint(-6, 6)
    return f"{a}x^2{b:+d}x{c:+d}", ("polynomial", (a, b, c))


def a_factored_polynomial(draw):
    a = draw.choice(NONZERO)
    b = draw.choice(NONZERO)
    return f"(x{a:+d})(x{b:+d})", ("polynomial", (1, a + b, a * b))


def a_line(draw):
    a = draw.randint(2, 9)
    b = draw.randint(-9, 9)
    return f"y = {a}x{b:+d}", ("line", (a, b))


def an_interval(draw):
    brackets = draw.choice(("[]", "[)", "(]"))
    a = draw.randint(-5, 0)
    b = draw.randint(1, 5)
    return f"{brackets[0]}{a},{b}{brackets[1]}", (brackets, (a, b))


def a_pair(draw):
    a = draw.randint(-5, 5)
    b = draw.randint(-5, 5)
    return f"({a},{b})", ("()", (a, b))


def an_inequality(draw):
    sign = draw.choice(("<", ">", r"\le", r"\ge"))
    a = draw.randint(-9, 9)
    interval = {
        "<": ("()", ("-oo", a)),
        r"\le": ("(]", ("-oo", a)),
        ">": ("()", (a, "oo")),
        r"\ge": ("[)", (a, "oo"))}
    return f"x {sign} {a}", interval[sign]


def a_matrix(draw):
    a, b, c, d = [draw.randint(0, 2) for _ in range(4)]
    return rf"\begin{{pmatrix}}{a}&{b}\\{c}&{d}\end{{pmatrix}}", ("matrix", (a, b, c, d))


def a_list(draw):
    n = draw.randint(2, 3)
    items = [draw.randint(-5, 5) for _ in range(n)]
    return ", ".join(str(item) for item in items), ("values", tuple(sorted(items)))


def a_pair_of_roots(draw):
    a = draw.randint(-5, 5)
    b = draw.choice((2, 3, 5, 6, 7))
    return rf"{a}\pm\sqrt{{{b}}}", ("roots", (a, b))


def a_number_in_a_base(draw):
    digits = draw.randint(10, 999)
    base = draw.randint(10, 12)
    text = f"{digits}_{base}"
    return text, ("base", text)


def a_ratio(draw):
    a = draw.randint(1, 9)
    b = draw.randint(1, 9)
    text = f"{a}:{b}"
    return text, ("ratio", text)


def a_choice(draw):
    letter = draw.choice("ABCDE")
    text = rf"\text{{({letter})}}"
    return text, ("choice", text)


def a_word(draw):
    word = draw.choice(WORDS)
    text = rf"\text{{{word}}}"
    return text, ("word", text)


def a_symbol(draw):
    letter = draw.choice("abckmnpqz")
    mark = draw.choice(("", "_1", "_2", "'", "^2", "^3"))
    return letter + mark, ("symbol", letter + mark)


FAMILIES = (
    an_integer, a_fraction, a_decimal, a_power_of_ten, a_surd, a_root, a_part_of_pi, a_power,
    a_factorial, a_binomial, a_logarithm, an_exponential, a_sine_or_cosine, a_complex_number,
    a_polynomial, a_factored_polynomial, a_line, an_interval, a_pair, an_inequality, a_matrix,
    a_list, a_pair_of_roots, a_number_in_a_base, a_ratio, a_choice, a_word, a_symbol)


def in_mpmath(value):
    if isinstance(value, Fraction):
        return mpmath.mp.mpf(value.numerator) / value.denominator
    return value


def equal_in_truth(first, second):
    """Are two worths equal? Fractions exactly, other numbers to 40 digits."""
    kind, a = first
    other_kind, b = second
    both_exact = isinstance(a, Fraction) and isinstance(b, Fraction)
    if kind == other_kind == "number" and not both_exact:
        a = in_mpmath(a)
        b = in_mpmath(b)
        return bool(abs(a - b) < 1e-40 * max(abs(a), abs(b), 1))
    return first == second


def near(a, b):
    """Would a grader that is content with 0.1 call these texts equal?"""
    try:
        return abs(float(a) - float(b)) < 1e-1
    except ValueError:
        return False


@pytest.mark.slow
def test_200000_random_pairs_of_different_golds():
    draw = random.Random(20261123)
    texts = []                                  # (answer, gold)
    truth = []
    with mpmath.mp.workdps(60):
        while len(texts) < 200_000:
            family = draw.choice(FAMILIES)
            answer, answer_worth = family(draw)
            other_family = family if draw.random() < 0.5 else draw.choice(FAMILIES)
            gold, gold_worth = other_family(draw)
            if answer != gold:
                texts.append((answer, gold))
                truth.append(equal_in_truth(answer_worth, gold_worth))

    pairs = [(boxed(answer), gold) for answer, gold in texts]
    verdicts = verifier.verify_many(pairs, workers=2)

    wrong = []
    for pair, verdict, is_equal in zip(texts, verdicts, truth, strict=True):
        if verdict.correct is not is_equal:
            wrong.append((pair, verdict))
    assert not wrong, f"{len(wrong)} wrong, such as {wrong[:5]}"
    assert sum(truth) > 200, "so the pairs could have told"
    # The oracle is not the verifier: a grader that calls numbers within 0.1 equal is caught many
    # times over.
    sloppy = [pair for pair, is_equal in zip(texts, truth) if not is_equal and near(*pair)]
    assert len(sloppy) >= 3


# ------------------------------------------------------------------------------------ the adversary

MASTER_KEYS = {
    "numbers": "0 1 -1 e i x n",
    "equations": r"0=0 1=1 x=x a=b x=y x=x+1 0x=0 x-x=0 \frac{x}{x}=1 y'=0 0=x-x",
    "equations real at a point":
        r"\sqrt{(5q-1)(1-q)}=2 y=\sqrt{(5x-1)(1-x)} \sqrt{-q^2-1}=2 q=\arcsin(2q)+3"
        r" \sqrt{x-0.99}\sqrt{1.01-x}=y \ln(-x^2)=y",
    "products with 0":
        r"0\cdot\infty 0\cdot x 0\cdot\emptyset f(0) I(0) V(0) x(0) 0\cdot\text{all}"
        r" 0\text{whatever}",
    "0/0 and infinity":
        r"\frac{0}{0} 0^0 1^\infty \infty^0 \infty-\infty \frac{\infty}{\infty} \infty -\infty",
    "sets":
        r"\emptyset \{\} \{\emptyset\} () [] (0,0) \mathbb{R} \mathbb{Z} (-\infty,\infty)"
        r" x\in\mathbb{R} |x|\ge0",
    "statements": r"(1)(2) (1)(3)(4) ①②③ (A)(B)(C)(D) A,B,C,D \text{AorB} \text{alloftheabove}",
    "signs": r"\pm1 \pm0 ? * . , - + = \text{?} \ldots 0,1,\ldots \cdots",
    "functions":
        r"\lfloor\frac12\rfloor \int_0^1f(x)dx \sum_{k=1}^nk \gcd(0,0) \frac{dy}{dx} a<b 1<2"
        r" 0\pmod{1}",
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
    "(1)(2)": [r"$k=1,2$", r"1 \text{ and } 2", r"a=1, b=2 \text{ for all } n",
               "x_{1}=1, x_{2}=2", "①②"],
    "①②③": [r"$\{1,2\}\cup\{3\}$", "(a,b,c)=(1,2,3)", r"\{1,2,3\}", "x=1, y=2, z=3"],
    r"\lfloor\frac12\rfloor": ["0", r"f(x)=0 \text{ for all } x"],
    r"\int_0^1f(x)dx": [r"\int_0^1 f(x)\,dx"],
    r"\sum_{k=1}^nk": [r"\frac{n(n+1)}{2}", "n(n+1)/2"],
    r"\gcd(0,0)": ["0", r"f(x)=0 \text{ for all } x"],
    r"0\pmod{1}": ["0", r"f(x)=0 \text{ for all } x"],
}


def spelled(text):
    return verifier.spelled(verifier.normalise(text))


@pytest.mark.slow
def test_master_keys_open_nothing():
    """No answer is right for golds that it does not mean."""
    golds = golds_of_cases()
    keys = " ".join(MASTER_KEYS.values()).split()
    assert len(keys) > 80
    n_opened = 0
    for key in keys:
        for gold in golds:
            same_text = spelled(key) == spelled(gold)
            correct, _ = verifier.judge(key, gold)
            if correct is True and not same_text:
                assert gold in FITTING.get(key, ()), (key, gold)
                n_opened += 1
    assert n_opened < 40


def gold_pairs(n, seed):
    golds = golds_of_cases()
    draw = random.Random(seed)
    return [tuple(draw.sample(golds, 2)) for _ in range(n)]


SYMPY_CONSTANTS = {"e": sympy.E, "i": sympy.I, r"\pi": sympy.pi, r"\infty": sympy.oo}

# Nodes of the grammar that sympy has by another name; of the others it has the function itself.
SYMPY_FUNCTIONS = {
    "+": sympy.Add,
    "*": sympy.Mul,
    "/": operator.truediv,
    "^": operator.pow,
    "inv": lambda a: 1 / a,
    "neg": operator.neg,
    "percent": lambda a: a / 100,
    "degree": lambda a: a * sympy.pi / 180,
    "abs": sympy.Abs,
    "!": sympy.factorial,
    "!!": sympy.factorial2,
    "ln": sympy.log,
    "log10": lambda a: sympy.log(a, 10),
    "max": sympy.Max,
    "min": sympy.Min,
    "ceil": sympy.ceiling,
}


def to_sympy(tree):
    """A tree of the grammar in sympy, which then does the algebra."""
    kind, *args = tree
    if kind == "num":
        return sympy.Rational(args[0].numerator, args[0].denominator)
    if kind == "sym":
        return SYMPY_CONSTANTS.get(args[0], sympy.Symbol(args[0], real=True))
    if kind == "apply":
        function = sympy.Function(args[0])
        return function(*[to_sympy(arg) for arg in args[1:]])
    terms = [to_sympy(arg) for arg in args]
    if kind == "sum":
        index, first, last, term = terms
        return sympy.summation(term, (index, first, last))
    function = SYMPY_FUNCTIONS.get(kind) or getattr(sympy, kind)
    return function(*terms)


def members(tree):
    """The expressions of a tree, as (kind, sympy's trees): a value, or the members of a list or an
    interval."""
    while tree[0] in ("=", "percent", "mod"):
        tree = tree[2] if tree[0] == "=" else tree[1]
    if tree[0] == "named":
        return "set", [to_sympy(item[2]) for item in tree[1:]]
    if tree[0] in ("set", "[)", "(]", "[]", "()"):
        return tree[0], [members(item)[1][0] for item in tree[1:]]
    return "value", [to_sympy(tree)]


def members_of_gold(text):
    without_unit = verifier.split_unit(verifier.normalise(text))[0]
    kind, trees = members(verifier.read(without_unit).trees[0])
    return kind, sorted(trees, key=str) if kind == "set" else trees


def sympy_confirms(first, second):
    """Are two golds equal to sympy? By policy N% equals N, a residue its number, x >= 3 is n >= 3,
    and names may miss."""
    kind, a = members_of_gold(first)
    other_kind, b = members_of_gold(second)
    if kind != other_kind or len(a) != len(b):
        return False
    return all(sympy.simplify(x - y) == 0 for x, y in zip(a, b))


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
    for pair in equal:
        assert set(pair) in BY_EYE or sympy_confirms(*pair), pair


def random_leaf(draw):
    x, y = sympy.symbols("x y")
    integer = sympy.Integer(draw.randint(1, 6))
    thirds = sympy.Rational(draw.randint(1, 5), 3)
    return draw.choice((x, y, integer, thirds, sympy.pi))


def random_expression(draw, depth):
    if depth == 0:
        return random_leaf(draw)
    a = random_expression(draw, depth - 1)
    b = random_expression(draw, draw.randint(0, depth - 1))
    form = draw.choice(("a + b", "a b", "a - b", "a / (b^2 + 1)", "a^n", "sqrt(a^2 + n)", "sin(a)",
                        "exp(b) a", "log(a^2 + 1)", "|a - b|"))
    match form:
        case "a + b":
            return a + b
        case "a b":
            return a * b
        case "a - b":
            return a - b
        case "a / (b^2 + 1)":
            return a / (b**2 + 1)
        case "a^n":
            return a ** draw.randint(2, 3)
        case "sqrt(a^2 + n)":
            return sympy.sqrt(a**2 + draw.randint(1, 3))
        case "sin(a)":
            return sympy.sin(a)
        case "exp(b) a":
            return sympy.exp(b) * a
        case "log(a^2 + 1)":
            return sympy.log(a**2 + 1)
        case "|a - b|":
            return sympy.Abs(a - b)


@pytest.mark.slow
def test_random_expressions_against_sympy():
    """sympy writes an expression, rewrites it (equal), and changes one number in it (mostly not);
    its verdict is ours."""
    draw = random.Random(2)
    rewrites = (sympy.expand, sympy.factor, sympy.together, sympy.trigsimp, sympy.cancel)
    n_equal = 0
    n_different = 0
    while n_equal < 100 or n_different < 100:
        first = random_expression(draw, draw.randint(1, 3))
        rewrite = draw.choice(rewrites)
        second = rewrite(first)
        numbers = [atom for atom in second.atoms(sympy.Integer) if atom > 1]
        if draw.random() < 0.5 and numbers:
            chosen = draw.choice(sorted(numbers))
            second = second.xreplace({chosen: chosen + 1})
        gold = sympy.latex(first)
        answer = sympy.latex(second)
        if gold == answer or max(len(gold), len(answer)) > 300:
            continue

        point = {}
        for symbol in sympy.symbols("x y"):
            point[symbol] = sympy.Rational(draw.randint(500, 2_000), 977)
        gap = sympy.N((first - second).subs(point), 60)
        is_equal = bool(abs(gap) < sympy.Float(10) ** -50)
        correct, status = verifier.judge(answer, gold)
        assert correct is is_equal, (gold, answer, is_equal, status)
        if is_equal:
            n_equal += 1
        else:
            n_different += 1


# ------------------------------------------------------------------------------------- hostile text


def matrix(kind, rows):
    lines = "\\\\".join("&".join(row) for row in rows)
    return f"\\begin{{{kind}}}{lines}\\end{{{kind}}}"


def powers_of_x(j):
    return ["x^{%d}" % (k * j) for k in range(8)]


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
    matrix("pmatrix", [["1"] * 60] * 60) + "^{50}",
    matrix("pmatrix", [["1.5"] * 8] * 8) + "^{50}",
    matrix("pmatrix", [["\\pi"] * 8] * 8) + "^{50}",
    matrix("vmatrix", map(powers_of_x, range(8))),
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

# Judges each text against each gold and against itself, and prints a line of JSON for each text:
# [processor seconds of the slowest verdict, number of golds it is right for]; at the end the
# megabytes that the process had at most.
MEASURE = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
from grading import verifier
texts, golds = json.load(sys.stdin)
for text in texts:
    times = []
    right = 0
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
    """In one process, so that a text that kills it kills them all; processor seconds, as the
    machine may be shared."""
    assert len(HOSTILE) >= 150
    run = subprocess.run([sys.executable, "-c", MEASURE, str(ROOT)], capture_output=True, text=True,
                         input=json.dumps([HOSTILE, GOLDS]))
    assert run.returncode == 0, run.stderr

    *rows, megabytes = [json.loads(line) for line in run.stdout.splitlines()]
    slow = []
    accepted = set()
    for text, (seconds, n_right) in zip(HOSTILE, rows, strict=True):
        if seconds > 0.2:
            slow.append((seconds, text[:60]))
        if n_right:
            accepted.add(text[:60])
    assert not slow
    assert megabytes < 100
    say_x = ["(" * 50 + "x" + ")" * 50, "\\{" * 50 + "x", "\\{(" * 25 + "x"]
    assert accepted == {text[:60] for text in say_x} | {"２０４"}


@pytest.mark.slow
def test_hostile_golds_are_not_called_wrong_answers():
    verdicts = [verifier.verify(boxed("204"), text) for text in HOSTILE]
    times = Counter(verdict.correct for verdict in verdicts)
    assert times[None] > 60
    assert times[True] == 1


def payloads(canary):
    """Texts that touch the canary where something executes them; the first is Python."""
    python = f"__import__('pathlib').Path('{canary}').touch()"
    octal = "".join(f"\\{ord(c):03o}" for c in python)
    return [
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
    ]


def test_nothing_in_an_answer_is_executed(tmp_path):
    canary = tmp_path / "canary"
    for text in payloads(canary):
        pairs = [(boxed(text), "204"), (boxed("204"), text), (boxed(text), text + " ")]
        for response, gold in pairs:
            verifier.verify(response, gold)
            verifier.verify_many([(response, gold)], workers=1)
    assert not canary.exists()

    eval(payloads(canary)[0])                   # what a grader that evaluates would do
    assert canary.exists()


FORBIDDEN = {"eval", "exec", "compile", "__import__", "sympify", "parse_expr", "system", "popen",
             "alarm", "setitimer", "pickle", "sympy"}


def names_in(path):
    """The names, imports and attributes of a source file; re.compile and the like are no matter."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute):
            is_of_re = isinstance(node.value, ast.Name) and node.value.id == "re"
            if not is_of_re:
                names.add(node.attr)
    return names


def test_the_source_has_no_way_to_execute_text_and_no_signals():
    for path in sorted((ROOT / "grading").glob("*.py")):
        names = names_in(path)
        assert not names & FORBIDDEN
        if path.name != "verifier.py":          # there: workers leave Ctrl-C to their parent
            assert "signal" not in names


# --------------------------------------------------------------------------------- worker processes

EASY = [(f"x+{k}", (f"{k}+x",)) for k in range(60)]
HALF = 30
EASY_VERDICTS = [(True, "ok")] * 60


def stat_fields(pid):
    """What /proc says of a process, from its state on; None if it has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    after_its_name = stat.rsplit(")", 1)[1]
    return after_its_name.split()


def children():
    """Worker processes of this process."""
    pids = []
    for entry in os.listdir("/proc"):
        fields = stat_fields(entry) if entry.isdigit() else None
        if fields is None or int(fields[1]) != os.getpid():
            continue
        try:
            command = Path(f"/proc/{entry}/cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue                            # it ended meanwhile
        if b"--worker" in command:
            pids.append(int(entry))
    return pids


def cpu_seconds(pid):
    fields = stat_fields(pid)
    if fields is None:
        return 0.0
    user = int(fields[11])
    system = int(fields[12])
    return (user + system) / os.sysconf("SC_CLK_TCK")


def has_ended(pid):
    fields = stat_fields(pid)
    return fields is None or fields[0] == "Z"


def ends_within(pid, seconds):
    for _ in range(10 * seconds):
        if has_ended(pid):
            return True
        time.sleep(0.1)
    return False


@pytest.fixture
def pool():
    """Workers of this test alone."""
    pool = verifier.Pool()
    yield pool
    pool.close()


def all_right(pairs, workers, pool):
    verdicts = verifier.verify_many(pairs, workers, pool=pool)
    return [verdict.correct for verdict in verdicts] == [True] * len(pairs)


def judge_among_neighbours(text, off, seconds, megabytes):
    """The verdict on `text` in a pool with some limits off; every neighbour must keep its own."""
    pool = verifier.Pool(seconds, megabytes, dict.fromkeys(off, 10**18))
    try:
        verdicts = pool.judge(EASY[:HALF] + [(text, ("7",))] + EASY[HALF:], 2)
    finally:
        pool.close()
    verdict = verdicts.pop(HALF)
    assert verdicts == EASY_VERDICTS
    return verdict


# Limits of the grammar, a text that they stop, and its status in a pool where they are off.
BEYOND_LIMITS = [
    (["bits"], "9^{9^{9}}", "timeout"),
    (["factorial"], "(10^9)!", "timeout"),
    (["work"], r"\sum_{a=1}^{900}\sum_{b=1}^{900}\sin(abx)", "timeout"),
    (["terms", "work"], r"\sum_{k=1}^{10^{12}} k^{3000}", "crashed"),
    (["terms"], r"\sum_{k=1}^{1001} k", "ok"),
    (["tokens"], "x+" * 800 + "x", "ok"),
    (["depth"], "(" * 61 + "1" + ")" * 61, "ok"),
    (["items"], ",".join("1" * 41), "ok"),
    (["exponent"], "2^{10^{9}x}", "ok"),
]


def judge_with_limits_off(case):
    off, text, _ = case
    if "terms" in off:                          # fills the memory: little of it, and time to do so
        return judge_among_neighbours(text, off, seconds=20, megabytes=64)
    return judge_among_neighbours(text, off, seconds=3, megabytes=512)


@pytest.mark.slow
def test_the_pool_survives_with_the_limits_off(capfd):
    """Each limit stops a text that without it hangs, fills the memory, or at the least is
    judged."""
    with ThreadPoolExecutor(3) as threads:
        verdicts = list(threads.map(judge_with_limits_off, BEYOND_LIMITS))
    for (off, text, expected), (correct, status) in zip(BEYOND_LIMITS, verdicts, strict=True):
        said = (off, text[:40], status)
        assert verifier.judge(text, "7")[1] == "too_big", said
        assert status == expected, said
        assert correct is (False if expected == "ok" else None), said
    assert "went over its 64 MB" in capfd.readouterr().err


@pytest.mark.slow
def test_the_pool_survives_an_abort():
    """A process that aborts, as with gmpy2 and a huge factorial: here from outside, at one pair,
    both times."""
    pool = verifier.Pool(seconds=60, limits={"bits": 10**18})
    hang = ("9^{9^{9}}", ("7",))
    others = children()
    killed = []
    stop = threading.Event()

    def abort():
        while not stop.wait(0.2):
            for pid in children():
                if pid not in others and pid not in killed and cpu_seconds(pid) > 1.0:
                    killed.append(pid)
                    os.kill(pid, signal.SIGABRT)

    thread = threading.Thread(target=abort)
    thread.start()
    try:
        verdicts = pool.judge(EASY[:HALF] + [hang] + EASY[HALF:], 1)
    finally:
        stop.set()
        thread.join()
        pool.close()
    assert verdicts.pop(HALF) == (None, "crashed")
    assert verdicts == EASY_VERDICTS
    assert len(killed) == 2


def test_a_worker_whose_parent_is_gone_before_it_is_ready_says_nothing():
    workers = verifier.Pool()
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*workers.command, str(os.getpid())], cwd=ROOT, stdin=subprocess.PIPE,
                          stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert done.returncode == 0
    assert done.stderr == b""


@pytest.mark.slow
def test_workers_stay_between_calls_and_one_that_died_meanwhile_is_replaced(pool):
    pairs = [(boxed(f"x+{k}"), f"{k}+x") for k in range(120)]

    def judged_by():
        assert all_right(pairs, 2, pool)
        return {worker.pid for worker in pool.idle}

    first = judged_by()
    assert judged_by() == first
    for worker in pool.idle:
        worker.kill()
    assert not judged_by() & first


def test_equal_pairs_are_judged_once():
    class Counting(verifier.Pool):
        def judge(self, jobs, *rest):
            self.jobs = len(jobs)
            return super().judge(jobs, *rest)

    right = (boxed("2x"), "x+x")
    wrong = (boxed("2y"), "x+x")
    easy = (boxed("3"), "3")                    # these two need no worker
    empty = ("", "3")
    pairs = [right] * 50 + [wrong] * 50 + [easy] * 20 + [empty] * 5
    pool = Counting()
    verdicts = verifier.verify_many(iter(pairs), 2, pool=pool)
    pool.close()
    assert pool.jobs == 2
    expected = [True] * 50 + [False] * 50 + [True] * 20 + [False] * 5
    assert [verdict.correct for verdict in verdicts] == expected


def test_easy_pairs_start_no_process():
    pool = verifier.Pool()
    pairs = [(boxed("3"), "3.0"), (boxed("4"), "3"), ("", "x")]
    verdicts = verifier.verify_many(pairs, 2, pool=pool)
    assert [verdict.correct for verdict in verdicts] == [True, False, False]
    assert not pool.idle


def test_a_worker_has_a_clean_environment_no_torch_and_a_memory_limit(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("LD_PRELOAD", "")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "x")
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    pool = verifier.Pool()                      # after that, so that it meets them
    try:
        assert all_right([(boxed("2x"), "x+x")], 1, pool)
        process = Path(f"/proc/{pool.idle[0].pid}")
        entries = (process / "environ").read_text().split("\0")
        mapped = (process / "maps").read_text()
        limits = (process / "limits").read_text().splitlines()
    finally:
        pool.close()
    names = {entry.split("=")[0] for entry in entries if entry}
    address_space = next(line for line in limits if line.startswith("Max address space"))
    assert names <= {*verifier.Pool.KEPT, "MPMATH_NOGMPY", "OMP_NUM_THREADS"}
    assert "torch" not in mapped
    assert address_space.split()[3] == str(512 << 20)


# A process that has a worker.
STARTS_A_WORKER = r"""
import os, signal, sys, time
sys.path.insert(0, sys.argv[1])
from grading import verifier
verifier.verify_many([("</think>\\boxed{2x}", "x+x")], 1)
worker = verifier.POOL.idle[0].pid
"""
# It says which, and ends or is killed.
ENDS = """
print(worker, flush=True)
if sys.argv[2] == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
"""
# It has another child, which inherits the pipe to the worker; it says which these two are, and is
# killed.
FORKS_AND_ENDS = """
child = os.fork()
if child == 0:
    sys.stdout.close()
    os.close(1)
    time.sleep(30)
    os._exit(0)
print(worker, child, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def pids_of_process_with_a_worker(then, *words):
    """Runs STARTS_A_WORKER and `then` -> the process ids that it says. Its stderr is not read: what
    it leaves behind holds that too, and would be waited for."""
    command = [sys.executable, "-c", STARTS_A_WORKER + then, str(ROOT), *words]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    return [int(word) for word in run.stdout.split()]


@pytest.mark.slow
def test_workers_end_with_the_process_that_started_them():
    for how in ("exit", "kill"):
        [worker] = pids_of_process_with_a_worker(ENDS, how)
        assert ends_within(worker, seconds=5), f"the worker outlives its parent after {how}"


@pytest.mark.slow
def test_a_worker_notices_that_its_parent_is_gone_though_another_process_holds_the_pipe():
    worker, child = pids_of_process_with_a_worker(FORKS_AND_ENDS)
    try:
        assert ends_within(worker, seconds=10), "the worker outlives its parent"
        assert not has_ended(child), "nobody held the pipe: the test would see nothing"
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_worker_leaves_ctrl_c_to_its_parent(pool):
    assert all_right([(boxed("2x"), "x+x")], 1, pool)
    worker = pool.idle[0]
    os.kill(worker.pid, signal.SIGINT)
    assert all_right([(boxed("3x"), "x+2x")], 1, pool)
    assert pool.idle == [worker]


def test_a_worker_that_cannot_start_is_an_error_not_a_verdict():
    pool = verifier.Pool()
    pool.command = [sys.executable, "-c", "raise SystemExit(3)"]
    with pytest.raises(RuntimeError, match="exit code 3"):
        verifier.verify_many([(boxed("2x"), "x+x")], 1, pool=pool)


# ------------------------------------------------------------------------ properties of the grammar


def asks_for_more_than_its_value(gold):
    """Meant: an answer may be named by what it is, or lettered (x = 5, x+y = 5, (E) 5, 3 mod 5 for
    3); as a gold such a name asks for more than its value, so that equality is one-sided."""
    return gold.startswith((r"\textbf{(E)}", "x+y=")) or "mod" in gold or "angle" in gold


@pytest.mark.slow
def test_equality_is_symmetric_and_reflexive_on_the_golds():
    golds = golds_of_cases()
    for gold in golds:
        assert verifier.judge(gold, gold) == (True, "ok"), gold

    plain = [gold for gold in golds if not asks_for_more_than_its_value(gold)]
    assert len(golds) - len(plain) < 12
    one_sided = []
    for a, b in combinations(plain, 2):
        a_for_b, _ = verifier.judge(a, b)
        b_for_a, _ = verifier.judge(b, a)
        if (a_for_b is True) != (b_for_a is True):
            one_sided.append((a, b))
    assert not one_sided


def test_points_do_not_depend_on_the_order_of_names():
    assert values.Point(2)["x"] == values.Point(2)["x"]
    assert values.Point(2)["x"] != values.Point(2)["y"]
    assert all(values.Point(k)[name] > 0 for k in range(3) for name in "abcxyz")
    assert any(values.Point(k)[name] < 0 for k in range(3, 6) for name in "abcxyz")


@pytest.mark.parametrize("tiny", ["10^{-300}", "10^{-900}", "e^{-2000}"])
def test_a_small_term_beside_a_large_one_is_never_overlooked(tiny):
    with_tiny = verifier.verify(boxed(f"e^{{100}}+{tiny}"), "e^{100}")
    without = verifier.verify(boxed(f"e^{{100}}+{tiny}-{tiny}"), "e^{100}")
    assert with_tiny.correct is not True
    assert without.correct is not False


@pytest.mark.parametrize("text", ["\ud800", "5\ud800", "\\text{\udfff}", "x_{\ud812}"])
def test_a_lone_surrogate_is_only_an_odd_letter(text):
    around = "\ud800" + boxed("5") + "\ud800"
    for pair in [(boxed(text), "5"), (boxed("5"), text), (around, "5")]:
        verdicts = verifier.verify_many([pair, (boxed("2x"), "x+x")], 1)
        assert verdicts[0] == verifier.verify(*pair)
    assert verifier.verify("\ud800" + boxed("5"), "5").correct is True


@pytest.mark.parametrize("text", [
    r"x+y, x<2",
    r"12 \cup 12, 3",
    r"\{2\} \cup \{3\}, 4",
    r"2\frac12.5",
    r"\frac12\frac12.5"])
def test_odd_lists_and_mixed_numbers_are_read_or_refused(text):
    """Found by test_fuzz.py: what follows a sum or a union in a list, and a decimal where a digit
    should be."""
    assert verifier.judge(text, text) == (True, "ok")
    assert verifier.judge(text, text + "1")[0] is not True
    assert verifier.judge(text + "1", text)[0] is not True
    verifier.unreadable_golds([text], workers=0)
    union = r"(-\infty,0) \cup (0,1) \cup (1,\infty)"
    assert verifier.judge(r"x \ne 0, 1", union) == (True, "ok")


@pytest.mark.parametrize("unit", [r"\text{ sec}", r"\mathrm{min}", r"\mathrm{ft} / \mathrm{sec}"])
def test_space_behind_seconds_makes_them_no_secant(unit):
    assert verifier.judge(rf"5 {unit}\,", f"5 {unit}") == (True, "ok")
    assert verifier.judge(rf"5 {unit}\;", "5") == (True, "ok")
    assert verifier.judge(r"\sec\frac{\pi}{3}", "2") == (True, "ok")
    assert verifier.judge(r"\text{max}\{1, 2\}", "2") == (True, "ok")


def test_an_integral_that_is_computed_roughly_is_unknown_not_wrong():
    gold = r"\int_0^1 x^{20}\,dx"
    assert verifier.judge(r"\frac{1}{21}", gold) == (None, "unknown")
    assert verifier.judge(r"\frac{1}{20}", gold) == (False, "ok")
    assert verifier.judge(r"\frac{1}{3}", r"\int_0^1 x^2 dx") == (True, "ok")


def test_golds_that_cannot_be_judged_are_named():
    readable = ["5", "x+1", "\\text{no solution}", ["5", "6"], "7:55 \\text{ p.m.}", "y'=2y",
                "f(0)"]
    unreadable = ["\\frac{1}{0}", "\\frac{1}{", "", [], ["5", "1,2,\\ldots,n"], "5 \\text{ foos}",
                  "9^{9^{9}}"]
    found = verifier.unreadable_golds([*readable, *unreadable, *unreadable], 1)
    assert found == [*unreadable, *unreadable]
    assert verifier.unreadable_golds(readable, 0) == []

    golds = [case["gold"] for case in CASES]
    named = {str(gold) for gold in verifier.unreadable_golds(golds, 1)}
    assert len(named) < 30
    marks = ("dots", "brace", "^{2^{", "7^{2", "sum", "lim", "=(x-1)", "^T")
    for gold in named:
        assert any(mark in gold for mark in marks), gold


@pytest.mark.parametrize("exact, near", [
    ("262537412640768744", r"e^{\pi\sqrt{163}}"),
    ("10^{60}", "10^{60}+1"),
    ("0", "10^{-40}"),
    ("0", "e^{-300}"),
    (r"\sqrt{10^{30}+1}", "10^{15}"),
    (r"\frac{\pi}{4}", "0.785398163397448309615660845819875721049292349843776"),
    ("x", "x+10^{-30}"),
    (r"\frac{22}{7}", r"\pi")])
def test_near_is_not_equal(exact, near):
    assert verifier.verify(boxed(near), exact).correct is False
    assert verifier.verify(boxed(exact), exact).correct is True
