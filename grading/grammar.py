"""LaTeX answers as trees, and trees as numbers: the grammar and the arithmetic of verifier.py.

The text is hostile. Nothing of it is executed; its size, its depth, every exponent and the work as a whole are limited
by count.
"""
import functools
import itertools
import math
import operator
import random
import re
import unicodedata
from fractions import Fraction

from mpmath import mp

LIMITS = {"tail": 20_000, "answer": 2_000, "tokens": 1_500, "depth": 60, "items": 40, "bits": 200_000,
          "factorial": 5_000, # characters, characters, tokens, levels, items, …, operations
          "exponent": 10**8, "terms": 1_000, "work": 10_000}


class Unreadable(Exception):
    """The text is not an answer that the grammar knows."""


class Undefined(Exception):
    """The expression has no value."""


class TooBig(Exception):
    """A limit is passed."""


def limit(name, amount):
    if amount > LIMITS[name]:
        raise TooBig(name)


# ------------------------------------------------------------------------------------------------------ 1. text -> tree
FUNCTIONS = {f: f for f in "sin cos tan cot sec csc sinh cosh tanh coth exp".split()}  # LaTeX name -> mpmath name
FUNCTIONS |= {"arc" + f: "a" + f for f in "sin cos tan cot sec csc".split()} | {"ln": "ln", "log": "ln", "lg": "log10"}
GREEK = {chr(code): "\\" + unicodedata.name(chr(code)).split()[-1].lower().replace("lamda", "lambda")
         for code in [*range(0x3b1, 0x3ca), 0x3c6, 0x3d5]}
GREEK |= {chr(code): GREEK[chr(code + 32)].replace("\\", "").title().join(("\\", "")) 
          for code in (0x393, 0x394, 0x398, 0x39b, 0x3a3, 0x3a6, 0x3a8, 0x3a9)}
# A tree is ("num", Fraction), ("sym", name), ("base", digits, base) or (operation, *trees). Structure is part of it:
# ("set" | "union", …) unordered, ("()" | "(]" | … | ":", …) ordered, ("named", ("=", …), …), and for relations
# (relation, left, right, name or "").
TOKEN = re.compile(r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+(?![0-9a-zA-Z.]))?|\\[a-zA-Z]+|\\[{}|]|[^ ]")
CLOSERS = {"(": ")]", "[": ")]", "{": "}", r"\{": r"\}", r"\langle": r"\rangle", r"\lfloor": r"\rfloor",
           r"\lceil": r"\rceil", "|": "|"}
SYMBOLS = {*GREEK.values(), *(rf"\{name}" for name in "Gamma Lambda Pi Xi ell infty hbar emptyset R nabla".split())}
ACCENTS = {rf"\{name}" for name in "dot ddot hat bar vec tilde overline angle widehat triangle overrightarrow".split()}
COMMANDS = {rf"\{name}" for name in [*FUNCTIONS, *"frac binom sqrt sum prod int begin text".split()]}
FLIP = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", r"\ne": r"\ne", "=": "="}
INFIX = {"\n": 1, "&": 2, ",": 3, ";": 3, r"\in": 4, r"\approx": 4, r"\cup": 5, ":": 6, "+": 7, "-": 7, "/": 8,
         r"\div": 8, r"\cdot": 8, r"\times": 8} | dict.fromkeys(FLIP, 4)  # how tightly they bind; factors side by side as \cdot
NAME = re.compile(r"(?:[a-zA-Z]|[A-Z]{2,3}|\\[a-zA-Z]+(?:\{[^{}]*\})?)"                     # x, AB, \theta, \vec{v}
                  r"(?:_(?:\{[^{}]*\}|\\?[a-zA-Z0-9]+))?'*(?:\([^()]*\))?|\|[A-Z]+\||[a-z](?:\+[a-z])+")
STRUCTURES = {"set", "union", "named", ":", "base", "()", "(]", "[)", "[]", r"\langle\rangle"}
TWO, INFINITY, MINUS_INFINITY = ("num", Fraction(2)), ("sym", r"\infty"), ("neg", ("sym", r"\infty"))


class Parser:
    """Precedence climbing over the tokens of an answer."""

    def __init__(self, text):
        self.tokens, self.at, self.depth, self.bars, self.trig = TOKEN.findall(text), 0, 0, 0, False
        limit("tokens", len(self.tokens))

    def peek(self, ahead=0):
        return self.tokens[self.at + ahead] if self.at + ahead < len(self.tokens) else ""

    def take(self, *expected):
        token = self.peek()
        if not token or expected and token not in expected:
            raise Unreadable(f"'{token}' where {expected or 'more'} should be")
        self.at += 1
        return token

    def whole(self):
        tree = listed(self.expression())
        if self.peek():
            raise Unreadable(f"'{self.peek()}' after the end")
        return tree

    def expression(self, level=0, bare=False):
        """All that binds tighter than `level`; a bare argument (\\sin 2x) ends at any operator, bracket or function."""
        self.depth += 1
        limit("depth", self.depth)
        start = self.at
        if self.peek() in ("+", "-"):
            sign = self.take()
            left = self.expression(max(level, INFIX["+"]), bare)
            left = ("neg", left) if sign == "-" else left
        else:
            left = self.power()
        while INFIX.get(self.peek(), 8 if self.starts_factor() else 0) > level:
            token = self.peek()
            if bare and (token in INFIX or token in "([" or token[1:] in FUNCTIONS):
                break
            strength = INFIX.get(token, 8)
            if strength == INFIX["="]:
                left = self.relations(left, start)
                continue
            if token in INFIX:
                self.take()
            elif token[-1].isdigit() and self.peek(-1)[-1] in "0123456789.":
                raise Unreadable("two numbers side by side")
            right = self.expression(strength, bare)
            right = ("neg", right) if token == "-" else ("inv", right) if token in ("/", r"\div") else right
            kind = {1: "\n", 2: "&", 3: ",", 5: "union", 6: ":", 7: "+", 8: "*"}[strength]
            left = (*(left if left[0] == kind else (kind, left)), right)
        self.depth -= 1
        return left

    def starts_factor(self):
        token = self.peek()
        if token in SYMBOLS | ACCENTS | COMMANDS | CLOSERS.keys():
            return token != "|" or not self.bars
        return token[-1:].isalnum() and token[0] != "\\"

    def relations(self, left, start):
        sides, names, ops = [left], [self.name(start)], []
        while INFIX.get(self.peek()) == INFIX["="]:
            ops.append(self.take())
            start = self.at
            sides.append(self.expression(INFIX["="]))
            names.append(self.name(start))
        return relate(sides, names, ops)

    def name(self, start):
        """The text since `start`, if it can be the name of a value: x, x_1, f(x), AB, \\theta."""
        text = "".join(self.tokens[start:self.at])
        command = self.tokens[start] if self.tokens[start][0] == "\\" else r"\pi"
        return text if NAME.fullmatch(text) and command in SYMBOLS | ACCENTS | {r"\text"} and text != r"\infty" else ""

    def power(self):
        tree = self.primary()
        while self.peek() in ("^", "!", "°", "%", "_"):
            token = self.take()
            if token == "^":
                tree = ("^", tree, self.exponent())
            elif token == "_":
                if tree[0] != "num" or tree[1].denominator > 1:
                    raise Unreadable("an index on what is neither a name nor a number")
                tree = ("base", tree[1], self.raw())
            elif token != "°" or self.trig:
                tree = ({"!": "!", "%": "percent", "°": "degree"}[token], tree)
        return tree

    def exponent(self):
        tree = ("neg", self.argument()) if self.peek() == "-" and self.take() else self.argument()
        return ("^", tree, self.exponent()) if self.peek() == "^" and self.take() else tree

    def argument(self):
        self.depth += 1
        limit("depth", self.depth)
        tree = self.primary()
        self.depth -= 1
        return tree

    def raw(self):
        """A group, or one token, as text without braces: for names."""
        start, level = self.at, 0
        while self.at == start or level > 0:
            level += {"{": 1, "}": -1}.get(self.take(), 0)
        return "".join(token for token in self.tokens[start:self.at] if token not in ("{", "}", r"\text"))

    def primary(self):
        token = self.take()
        if token in COMMANDS:
            return self.command(token)
        if token in CLOSERS:
            return self.group(token)
        if token[0] in ".0123456789" and token != ".":
            return self.number(token)
        if not (token.isalpha() and token.isascii() or token in SYMBOLS | ACCENTS):
            raise Unreadable(token)
        if token == r"\R":
            return ("()", MINUS_INFINITY, INFINITY)
        name = f"{token} {self.raw()}" if token in ACCENTS else token
        while self.peek() in ("'", "_"):
            name += self.take()
            name += self.raw() if name[-1] == "_" else ""
        return ("sym", name)

    def group(self, opening):
        outer, self.bars = self.bars, opening == "|"
        tree = self.expression()
        self.bars = outer
        closing = self.take(*CLOSERS[opening] if opening in "([" else (CLOSERS[opening],))
        if opening in ("{", r"\{"):
            return listed(tree)
        if opening in ("|", r"\lfloor", r"\lceil"):
            return ({"|": "abs"}.get(opening, opening[2:]), tree)
        if tree[0] == ",":
            return (opening + closing, *tree[1:])
        if opening + closing not in ("()", "[]"):
            raise Unreadable("brackets that do not match")
        return tree

    def number(self, token):
        limit("bits", 4 * abs(int(re.split("[eE]", token + "e0")[1])))
        number = Fraction(token)
        if self.peek() in (r"\overline", r"\bar") and "." in token:
            period = self.take() and self.raw()
            if not period.isdigit():
                raise Unreadable("a bar over no digits")
            number += Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(token.split(".")[1]))
        elif self.peek() == r"\frac" and token.isdigit() and self.peek(-2) != "^":
            back = self.at
            part = self.command(self.take())
            if part[0] == "/" and part[1][0] == part[2][0] == "num" and part[1][1] < part[2][1]:
                return ("num", number + part[1][1] / part[2][1])                                    # 1\frac{4}{5}
            self.at = back
        return ("num", number)

    def command(self, token):
        start = self.at
        match token[1:]:
            case "frac":
                if self.peek() == "{" and self.peek(1) in ("d", r"\partial") and self.peek(2) != "_":
                    over, under = self.raw(), self.raw()
                    if re.fullmatch(r"(d|\\partial)\\?[a-zA-Z]+(\^[0-9])?", under):
                        return ("sym", f"{over}/{under}")                                           # a derivative
                    self.at = start
                return ("/", self.digit(), self.digit())
            case "binom":
                return ("binomial", self.digit(), self.digit())
            case "sqrt":
                degree = self.expression() if self.peek() == "[" and self.take() else TWO
                if self.peek() == "]":
                    self.take()
                return ("^", self.argument(), ("inv", degree))
            case "text":
                name = self.raw()
                if re.fullmatch(r"[a-zA-Z'.-]*[a-z][a-zA-Z'.-]*", name):
                    return ("sym", fold(name))                                                      # a word is a symbol
                self.at = start
                return self.argument()
            case "sum" | "prod":
                low = self.take("_") and self.argument()
                if low[0] != "=" or low[1][0] != "sym":
                    raise Unreadable("a sum over nothing")
                return (token[1:], low[1], low[2], self.take("^") and self.argument(), self.expression(INFIX["+"]))
            case "int":
                while self.take() != "d" or not self.peek()[-1:].isalpha():
                    pass
                # equal to itself only
                body = "".join(token for token in self.tokens[start:self.at] if token not in "{}")
                return ("sym", body + self.take())
            case "begin":
                return self.matrix(self.raw())
        return self.function(FUNCTIONS[token[1:]])

    def digit(self):
        if self.peek().isdigit() and len(self.peek()) > 1:
            self.tokens[self.at:self.at + 1] = [self.peek()[0], self.peek()[1:]]  # \frac12 is one half
        return self.argument()

    def matrix(self, kind):
        columns = self.raw() if kind == "array" else ""
        tree = self.expression()
        rows = [row[1:] if row[0] == "&" else (row,) for row in (tree[1:] if tree[0] == "\n" else (tree,))]
        self.take(r"\end")
        known = kind in ("array", "matrix") or kind[1:] == "matrix"
        if self.raw() != kind or len({len(row) for row in rows}) > 1 or not known:
            raise Unreadable(f"{kind} {columns}")
        limit("items", len(rows) * len(rows[0]) / 2)
        tree = ("matrix", ("num", Fraction(len(rows[0]))), *itertools.chain(*rows))
        return ("det", tree) if kind == "vmatrix" else tree

    def function(self, name):
        base = self.argument() if name == "ln" and self.peek() == "_" and self.take() else None
        exponent = self.exponent() if self.peek() == "^" and self.take() else None
        if exponent == ("neg", ("num", 1)):
            name, exponent = "a" + name, None                                                       # \sin^{-1}
        outer, self.trig = self.trig, self.trig or name in ("sin", "cos", "tan", "cot", "sec", "csc")
        bracket = self.peek() in ("(", "[", "{") or self.peek() == "|" and not self.bars
        tree = self.argument() if bracket else self.expression(INFIX["+"], bare=True)
        self.trig = outer
        tree = ("/", (name, tree), ("ln", base)) if base else (name, tree)
        return ("^", tree, exponent) if exponent else tree


def fold(text):
    """The letters and signs of a text, for comparing words."""
    return re.sub(r"\\text|[{}\s\\.]", "", text).casefold()


def listed(tree):
    """A list is a set: of named values, of ranges (a union), or of plain answers; one alone is itself."""
    if tree[0] not in (",", "\n"):
        return tree
    items = [item for part in tree[1:] for item in (part[1:] if part[0] == "," else (part,))]
    limit("items", len(items))
    names = [item[3] if item[0] == "=" else "" for item in items]
    if all(names) and len(set(names)) == len(names):
        return ("named", *sorted(items, key=lambda item: (item[3].startswith("\\"), item[3])))
    if all(item[0] == "union" for item in items):
        return ("union", *(part for item in items for part in item[1:]))
    return ("set", *items)


def relate(sides, names, ops):
    """A chain of relations. What says that one variable lies in a range becomes an interval, in a union of its own."""
    if ops == [r"\in"] and names[0]:
        return sides[1]
    if all(op in ("=", r"\approx") for op in ops):
        if names[-1] and not names[0]:
            sides, names = sides[::-1], names[::-1]
        left, right = sides[0], sides[-1]
        if left == right or not all(same_value(side, right) for side in sides[1:-1]):
            raise Unreadable("x = x, or a chain of different values")
        if left[0] == right[0] == "()" and len(left) == len(right) and all(side[0] == "sym" for side in left[1:]):
            return ("named", *(("=", name, part, name[1]) for name, part in zip(left[1:], right[1:])))
        return ("=", left, right, names[0])
    names = ["" if "+" in name else name for name in names]
    if len(ops) == 2 and set(ops) <= {">", r"\ge"} or len(ops) == 1 and names[1] and not names[0]:
        sides, names, ops = sides[::-1], names[::-1], [FLIP.get(op, op) for op in ops[::-1]]
    if len(ops) == 2 and names[1] and set(ops) <= {"<", r"\le"}:
        return ("union", ("[("[ops[0] == "<"] + "])"[ops[1] == "<"], sides[0], sides[2]))
    if len(ops) > 1 or ops[0] not in FLIP:
        raise Unreadable("a chain of relations")
    if names[0] and not variables(sides[1]):
        below = {"<": "()", r"\le": "(]", r"\ne": "()"}.get(ops[0])
        above = {">": "()", r"\ge": "[)", r"\ne": "()"}.get(ops[0])
        ranges = (below, MINUS_INFINITY, sides[1]), (above, sides[1], INFINITY)
        return ("union", *(range_ for range_ in ranges if range_[0]))
    return (ops[0], *sides, "")


def symbols(tree):
    if tree[0] in ("num", "base"):
        return set()
    if tree[0] == "sym":
        return {tree[1]}
    return set().union(*(symbols(child) for child in tree[1:] if isinstance(child, tuple)))


def variables(tree):
    return symbols(tree) - CONSTANTS.keys() - {r"\infty"}


# -------------------------------------------------------------------------------------------------- 2. tree -> value
CONSTANTS = {"e": lambda: +mp.e, r"\pi": lambda: +mp.pi, "i": lambda: mp.mpc(0, 1)}
# of the points; the first three are positive
SCALES = [Fraction(1), Fraction(7), Fraction(1, 5), Fraction(1), Fraction(3), Fraction(2)]
spent = [0]


def lift(*values):
    """Rationals stay exact among themselves; beside anything else they become numbers of the current precision."""
    if all(isinstance(v, Fraction) for v in values):
        return values
    return tuple(mp.mpf(v.numerator) / v.denominator if isinstance(v, Fraction) else v for v in values)


def inexact(x):
    return lift(x, mp.one)[0]


def charged(result, work=1):
    """The result of an operation, after its size and its work are counted."""
    bits = max(result.numerator.bit_length(), result.denominator.bit_length()) if isinstance(result, Fraction) else 0
    limit("bits", bits)
    spent[0] += work + (bits // 2000) ** 2
    limit("work", spent[0])
    if isinstance(result, (mp.mpf, mp.mpc)) and not mp.isfinite(result):
        raise Undefined("infinite")
    return result


def reciprocal(x):
    if x == 0:
        raise Undefined("division by zero")
    return 1 / x


def power(base, exponent):
    whole = isinstance(exponent, Fraction) and exponent.denominator == 1
    if isinstance(base, mp.matrix) or isinstance(exponent, mp.matrix):
        if not whole or not 0 <= exponent <= 50:
            raise Unreadable("a power of a matrix")
        return base ** int(exponent)
    if base == 0:
        if isinstance(exponent, mp.mpc) or exponent <= 0:
            raise Undefined("zero to the power of zero or less")
        return Fraction(0)
    if whole and isinstance(base, Fraction):
        limit("bits", abs(exponent) * max(base.numerator.bit_length(), base.denominator.bit_length()))
        return base ** int(exponent)
    if isinstance(exponent, Fraction) and exponent.denominator % 2 and not isinstance(base, mp.mpc) and base < 0:
        return power(-base, exponent) * (-1) ** (exponent.numerator % 2)
    base, exponent = inexact(base), inexact(exponent)
    limit("exponent", abs(exponent * mp.log(base)))
    return mp.power(base, exponent)


def factorial(x):
    limit("factorial", abs(x))
    if not isinstance(x, Fraction) or x.denominator > 1:
        return mp.gamma(inexact(x) + 1)
    if x < 0:
        raise Undefined("the factorial of a negative number")
    return charged(Fraction(math.factorial(int(x))), int(x) // 10)


def binomial(n, k):
    if isinstance(n, Fraction) and isinstance(k, Fraction) and n.denominator == k.denominator == 1 and 0 <= k <= n:
        limit("bits", min(k, n - k) * int(n).bit_length())
        return charged(Fraction(math.comb(int(n), int(k))), int(min(k, n - k)) // 10)
    limit("factorial", abs(n) + abs(k))
    return mp.binomial(inexact(n), inexact(k))


def rounded(name):
    return lambda x: Fraction(getattr(math, name)(x)) if isinstance(x, Fraction) else getattr(mp, name)(x)


def numeric(name):
    def function(x):
        limit("exponent", abs(x) if name not in ("ln", "log10") else 0)
        return getattr(mp, name)(inexact(x))
    return function


OPERATIONS = {
    "+": lambda *xs: functools.reduce(lambda a, b: charged(a + b), lift(*xs)),
    "*": lambda *xs: functools.reduce(lambda a, b: charged(a * b), lift(*xs)),
    "/": lambda a, b: operator.mul(*lift(a, reciprocal(b))), "inv": reciprocal, "neg": operator.neg, "abs": abs,
    "^": power,
    "!": factorial, "binomial": binomial, "floor": rounded("floor"), "ceil": rounded("ceil"), "det": mp.det,
    "percent": lambda x: operator.mul(*lift(x, Fraction(1, 100))), "degree": lambda x: inexact(x) * mp.pi / 180,
    "matrix": lambda n, *cells: mp.matrix([[*map(inexact, cells[i:i + int(n)])] for i in range(0, len(cells), int(n))]),
} | {name: numeric(name) for name in {*FUNCTIONS.values(), "asinh", "acosh", "atanh"}}


class Point(dict):
    """A value for every variable, a pure function of the number of the point and the name."""

    def __init__(self, number, **bound):
        super().__init__(bound)
        self.number, self.drawn = number, False

    def __missing__(self, name):
        rng = random.Random(f"{name} {self.number}")
        sign = rng.choice((1, -1)) if self.number > 2 else 1
        self[name], self.drawn = sign * SCALES[self.number] * Fraction(rng.randint(600, 2000), 997), True
        return self[name]


def value(tree, point):
    """A Fraction while all is rational, else an mpf, mpc or matrix of the current precision."""
    kind, *args = tree
    if kind == "num":
        return args[0]
    if kind == "sym":
        return CONSTANTS[args[0]]() if args[0] in CONSTANTS and args[0] not in point else point[args[0]]
    if kind in ("sum", "prod"):
        low, high = value(args[1], point), value(args[2], point)
        if not all(isinstance(bound, Fraction) and bound.denominator == 1 for bound in (low, high)):
            raise Undefined("bounds that are not integers")
        limit("terms", high - low + 1)
        name, body = args[0][1], args[3]
        terms = [value(body, Point(point.number, **{name: Fraction(k)})) for k in range(int(low), int(high) + 1)]
        return OPERATIONS["+" if kind == "sum" else "*"](Fraction(kind == "prod"), *terms)
    if kind not in OPERATIONS:
        raise Unreadable(f"{kind} is not a number")
    values = [value(arg, point) for arg in args]
    matrices = sum(isinstance(v, mp.matrix) for v in values)
    if matrices and kind not in ("*", "^", "neg", "det") and (kind != "+" or matrices < len(values)):
        raise Unreadable(f"{kind} of a matrix")
    return charged(OPERATIONS[kind](*values), 8 if kind == "^" or kind in FUNCTIONS else 1)


def agree(first, second):
    """Do two computations give the same value, and are both real? Rationals are compared exactly; else the difference
    must vanish as the precision grows, which tells e^{pi sqrt(163)} from an integer and sin(pi) from 1e-50."""
    gaps = []
    for digits in (50, 100):
        with mp.workdps(digits):
            a, b = first(), second()
            if isinstance(a, Fraction) and isinstance(b, Fraction):
                return a == b, True
            matrices = [isinstance(x, mp.matrix) for x in (a, b)]
            if any(matrices) and (not all(matrices) or (a.rows, a.cols) != (b.rows, b.cols)):
                return False, True
            pairs = list(zip(a, b)) if any(matrices) else [(inexact(a), inexact(b))]
            real = all(abs(mp.im(x)) <= mp.mpf(10) ** -40 * abs(x) for pair in pairs for x in pair)
            gaps.append(max(abs(x - y) for x, y in pairs))
            size = max(max(abs(x), abs(y)) for x, y in pairs)
            if gaps[-1] > size * mp.mpf(10) ** -15 and gaps[-1] > mp.mpf(10) ** -30:
                return False, real
    vanishes = gaps[1] <= (gaps[0] * mp.mpf(10) ** -30 or mp.mpf(10) ** -80)
    return gaps[1] <= size * mp.mpf(10) ** -60 or vanishes, real


def everywhere(first, second, complex_):
    """Do two functions of a point agree wherever both are real (with i in them: at the positive points)?"""
    counted, others = [], []
    for number in range(3 if complex_ else len(SCALES)):
        point = Point(number)
        try:
            equal, real = agree(lambda: first(point), lambda: second(point))
        except (Undefined, ZeroDivisionError, ValueError):
            continue
        if not point.drawn or not equal and (real or complex_):
            return equal
        if real or complex_:
            counted.append(equal)
        elif number < 3:
            others.append(equal)
    if not counted and not others:
        raise Undefined("no value at any point")
    return all(counted or others)


def same_value(a, b):
    if a[0] != b[0] and "percent" in (a[0], b[0]):
        if same_value(*(tree[1] if tree[0] == "percent" else tree for tree in (a, b))):
            return True
    return everywhere(lambda point: value(a, point), lambda point: value(b, point), "i" in symbols(a) | symbols(b))


def proportional(a, b):
    """Is (left - right) of one relation a constant multiple, not zero, of the other's, of a sign that fits?"""
    ratio = ("/", *(("+", tree[1], ("neg", tree[2])) for tree in (a, b)))
    if not variables(ratio[1]) or not variables(ratio[2]):
        return False
    start = Point(0)
    with mp.workdps(50):
        first = inexact(value(ratio, start))
        if abs(first) < mp.mpf(10) ** -30 or b[0] != (a[0] if a[0] == "=" or mp.re(first) > 0 else FLIP[a[0]]):
            return False
    return everywhere(lambda point: value(ratio, start), lambda point: value(ratio, point), "i" in symbols(ratio))
