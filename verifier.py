"""Is this answer right?

    verify(response, answer)            -> Verdict(correct, status, predicted)
    verify_many([(response, answer)…])  -> [Verdict…], in order, judged in worker processes that can be killed

`answer` is the gold answer, or a list of golds of which any will do. `correct` is True, False, or None: None means that nothing
is known, because the gold cannot be read or the judge failed, and None is not False. `status` says how the verdict came about:
    ok                                    an answer was read and judged
    no_think_end                          False: the response has no </think>, so it never came to an answer
    no_box unbalanced_box empty_box too_long   False: no answer in the last \\boxed{} or \\fbox{} after the last </think>
    unparsed undefined too_big            False: the answer cannot be read, has no value (1/0), or goes over a limit (9^{9^9})
    gold_unparsed undecided               None: the gold cannot be read, or has no value
    timeout crashed                       None: the worker process hung or died on this pair, twice

What counts as equal. The answer is normalised (Unicode, spacing, fonts, `$`), split into its structure, and its expressions are
compared as numbers: rationals exactly, others to 60 digits, those with variables at random points.
  - Numbers are equal when they are the same number: 1/2 = 0.5 = 5e-1 = \\frac{1}{2}, 1\\frac{4}{5} = 9/5, 0.\\overline{3} = 1/3; 0.33 is
    not 1/3. `N%` equals N and N/100. `12,345` is 12345; `12, 345` is a list.
  - Units, currency and degree signs are dropped, not converted: 5 cm = 5 m = 5. Inside a trigonometric function a degree counts.
  - `x = 5`, `x \\in …`, `f(x) = …` give their right side; `x = x` gives nothing. `p = 5, q = 2` equals (5, 2), names in order.
  - Bare lists, {…} and ± are unordered and of equal size: `204 or 205` is not 204. (…) and […] are ordered, and their kind counts.
  - x < 2 is (-oo, 2); unions are unordered; matrices go by element; a : b and h:mm by part; 204_5 by digits and base.
  - Equations are equal when their `left - right` differ by a constant factor; inequalities likewise, by a sign.
  - Text is equal when its letters are, whatever their case. \\log is \\ln. Odd roots of negative numbers are real.
  - Variables are real, and positive wherever an expression is not real otherwise: \\sqrt{x^2} = |x| is not x, \\ln x^2 = 2 \\ln x.

The answer is hostile text. Nothing of it is executed; no pattern backtracks far; every size, exponent and the work as a whole are
limited by count, not by clock (LIMITS), so a verdict does not depend on the machine. The worker processes are the second wall.
"""
import atexit, functools, json, math, operator, os, random, re, resource, selectors, subprocess, sys, time, unicodedata
from collections import deque, namedtuple
from fractions import Fraction

import mpmath
from mpmath import mp

Verdict = namedtuple("Verdict", "correct status predicted")
LIMITS = {"tail": 20_000, "answer": 2_000, "tokens": 1_500, "depth": 60, "items": 40, "bits": 200_000, "factorial": 5_000,
          "exponent": 10**8, "terms": 1_000, "matrix": 100, "work": 20_000}     # characters, …, operations


class Unreadable(Exception):
    """The text is not an answer that the grammar knows."""


class Undefined(Exception):
    """The expression has no value, or none at any of the points."""


class TooBig(Exception):
    """A limit is passed."""


def limit(name, amount):
    if amount > LIMITS[name]:
        raise TooBig(name)


# ---------------------------------------------------------------------------------------------------------------- 1. extract
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.S)


def extract(response):
    """The content of the last box after the last </think>: (predicted, None), or (None, status)."""
    end = response.rfind("</think>")
    if end < 0:
        return None, "no_think_end"
    tail = response[max(end + len("</think>"), len(response) - LIMITS["tail"]):]
    stack, last = [], None
    for match in BOX.finditer(tail):
        token = match[0]
        if token == "{" or len(token) > 2:
            stack.append((match.end(), token != "{"))
        elif token == "}" and stack:
            start, is_box = stack.pop()
            if is_box:
                last = start, match.start()                     # an outer box closes after the box in it, so the outer one wins
    unclosed = [start for start, is_box in stack if is_box]
    if unclosed and (last is None or unclosed[-1] > last[0]):
        return None, "unbalanced_box"
    if last is None:
        return None, "no_box"
    predicted = tail[slice(*last)].strip()
    return (None, "empty_box") if not predicted else (None, "too_long") if len(predicted) > LIMITS["answer"] else (predicted, None)


# -------------------------------------------------------------------------------------------------------------- 2. normalise
FUNCTIONS = {name: name for name in "sin cos tan cot sec csc sinh cosh tanh coth exp".split()}      # LaTeX name -> mpmath name
FUNCTIONS |= {"arc" + name: "a" + name for name in "sin cos tan cot sec csc".split()} | {"ln": "log", "log": "log", "lg": "log10"}
FUNCTIONS |= {"arsinh": "asinh", "arcosh": "acosh", "artanh": "atanh", "arctg": "atan", "tg": "tan", "ctg": "cot"}
GREEK = {chr(code): "\\" + unicodedata.name(chr(code)).split()[-1].lower().replace("lamda", "lambda") + " "
         for code in [*range(0x3b1, 0x3ca), 0x393, 0x394, 0x398, 0x3a3, 0x3a6, 0x3a8, 0x3a9]}
UNICODE = str.maketrans(GREEK | {
    "−": "-", "–": "-", "—": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ", "÷": "/", "⁄": "/", "∞": r"\infty ",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "±": r"\pm ", "∓": r"\mp ", "∪": r"\cup ", "∈": r"\in ", "∅": r"\emptyset ",
    "ℝ": r"\R ", "√": r"\sqrt ", "°": "°", "º": "°", "′": "'", "’": "'", "²": "^{2}", "³": "^{3}", "⁴": "^{4}", "ⁿ": "^{n}", "⁻": "^-",
    "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "€": "", "£": "", "¥": ""})
STOP_WORDS = (r"\b(?:is|are|if|when|where|for|not|no|mod|with|times|or|and|choose|factorial|squared|cubed|million|billion|thousand|"
              r"trillion|hundred|dozen|to|more|less|than|at|least|most|[ap]\.?m)\b")
WORD = r"\\text\s*\{[^{}]*\}(?:\s*\^\s*(?:\{\s*-?[0-9]\s*\}|[0-9]))?"
UNITS = r"(?:cm|mm|km|kg|ft|mph|min|sec|hrs?|rad|[a-z]{4,})"
RULES = [(re.compile(pattern), new) for pattern, new in [
    (r"[\0\s]+", " "),
    (r"\\\\", "\n"),                                                                        # a row ends; protected from what follows
    (r"\\[$]|[$]|\\[()\[\]]", ""),
    (r"\\(?:left|right)\s*\.|\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|limits|large|Large|boxed|fbox)(?![a-zA-Z])", " "),
    (r"\\(?:mathbf|boldsymbol|bm|mathit|mathsf|mathcal|pmb|bf|it|rm)(?![a-zA-Z])", " "),
    (r"\\(?:text(?:bf|it|rm|sf|tt|normal|up)?|mathrm|mbox|hbox|operatorname\*?)(?![a-zA-Z])\s*", r"\\text"),
    (r"\\text\s*\{([^{}a-zA-Z%s]*)\}" % "µΩÅ", r"\1"),                                       # \text{204}
    (r"^\s*\\text\s*\{\s*\(?\s*([a-zA-Z])\s*\)?\s*\}\s*$|\\text\s*\{\s*([eid])\s*\}", r" \1\2"),           # \text{(B)}, \mathrm{e}
    (r"(?<=[0-9])e\^\{?[+]?\{?(-?[0-9]+)\}?\}?$", r"e^{\1}"),
    (r"\\text\s*\{\s*(%s)\s*\}" % "|".join(sorted(FUNCTIONS, key=len, reverse=True)), r"\\\1 "),
    (r"(?<![0-9.])[0-9]{1,3}(?:(?:\{,\}|,?\\!|\\[,;: ]|~| )[0-9]{3})+(?![0-9])", lambda m: re.sub("[^0-9]", "", m[0])),
    (r"\\[,;:! ]|~|\\(?:quad|qquad|enspace|thinspace)(?![a-zA-Z])", " "),
    (r"\\([%#&_])", r"\1"),
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"), (r"\\[dt]binom(?![a-zA-Z])", r"\\binom"), (r"\\math(?:bb)\s*\{?\s*R\s*\}?", r"\\R "),
    (r"\\(?:leq|leqslant)(?![a-zA-Z])|<=", r"\\le "), (r"\\(?:geq|geqslant)(?![a-zA-Z])|>=", r"\\ge "), (r"\\neq(?![a-zA-Z])|!=", r"\\ne "),
    (r"\\lt(?![a-zA-Z])", "<"), (r"\\gt(?![a-zA-Z])", ">"), (r"\\colon(?![a-zA-Z])", ":"), (r"\\(?:sim|simeq|cong)(?![a-zA-Z])", r"\\approx "),
    (r"\\[lr]?vert(?![a-zA-Z])", "|"), (r"\\lbrace", r"\\{"), (r"\\rbrace", r"\\}"), (r"\\varnothing|\\\{\s*\\\}", r"\\emptyset"),
    (r"\\var(?=epsilon|phi|theta|rho)", r"\\"), (r"\*\*", "^"), (r"\\(?:ast|star|cdotp|bullet)(?![a-zA-Z])|\*", r"\\cdot "),
    (r"\^\s*\{?\s*\\circ(?![a-zA-Z])\s*\}?|\\degree(?![a-zA-Z])", "°"),
    (r"\\text\s*\{\s*(?:and|or)\s*\}|\\(?:lor|land|vee|wedge)(?![a-zA-Z])|(?<=[^a-zA-Z]) *\b(?:and|or)\b(?![^{]*\})|\b(?:and|or)\b(?=[^{}]*$)", ","),
    (r"\\text\s*\{\s*\(?([A-Z])\)? +(?:and|or) +\(?([A-Z])\)?\s*\}", r"\1,\2"),
    (r",[\s,]*,", ","),
    (r"^\s*(?:\\text\s*\{[^{}]*(?:\bis|\bare|:|=)\s*\}|[a-zA-Z ]*\banswer (?:is|:))\s*:?", ""),
    (r"^[\s:=]*(?:\\approx|\\therefore|=)\s*", ""),
    (r"(?:\\text\s*\{)?\s*\bthousand\b\s*\}?", r"\\cdot 10^{3}"), (r"(?:\\text\s*\{)?\s*\bmillion\b\s*\}?", r"\\cdot 10^{6}"),
    (r"(?:\\text\s*\{)?\s*\bbillion\b\s*\}?", r"\\cdot 10^{9}"), (r"(?:\\text\s*\{)?\s*\bpercent\b\s*\}?", "%"),
    (r" +", " "),
]]
UNIT_TAIL = re.compile(r"(?<=[0-9a-zA-Z)}\]!°])(?:\s*(?:/|\\cdot|\\times)?\s*%s)+\s*$" % WORD)
PLAIN_UNIT = re.compile(r"(?<=[0-9)}])°?\s*(?:[CF]|%s(?:\s+[a-z]+)*(?:\s*/\s*[a-z]+)?(?:\^\{?[0-9]\}?)?)\s*$" % UNITS)


@functools.lru_cache(65536)
def normalise(text):
    """One spelling for what is written in many ways; still LaTeX. Row ends become newlines, degree signs °."""
    text = unicodedata.normalize("NFKC", text.translate(UNICODE))
    text = "".join(c for c in text if unicodedata.category(c) != "Cf")
    for pattern, new in RULES:
        text = pattern.sub(new, text)
    text = text.strip().rstrip(" .,;")
    for tail in (UNIT_TAIL, PLAIN_UNIT):
        match = tail.search(text)
        if match and match.start() and not re.search(STOP_WORDS, match[0], re.I) and re.search("[0-9]", text[:match.start()]):
            text = text[:match.start()].rstrip(" .,;")
    return text


# ----------------------------------------------------------------------------------------- 3. expressions: text -> tree -> value
TOKEN = re.compile(r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+(?![0-9a-zA-Z.]))?|\\[a-zA-Z]+|\\[{}|]|[^ ]")
TIMES = {r"\cdot", r"\times"}
ENDS = {None, ")", "]", "}", r"\}", "+", "-", "/", ",", ";", "^", "_", "!", "=", "<", ">", ":", "°", "%", "&", "\n", "'", "?", ".", '"',
        r"\rfloor", r"\rceil", r"\end", r"\pm", r"\mp", r"\div", r"\rangle", r"\cup", r"\cap", r"\in", r"\le", r"\ge", r"\ne", r"\approx",
        r"\to", r"\ldots", r"\dots", r"\cdots", r"\mid", r"\|", r"\circ", r"\equiv"} | TIMES
CLOSERS = {"(": ")", "[": "]", "{": "}", r"\lfloor": r"\rfloor", r"\lceil": r"\rceil", "|": "|"}
GREEK_NAMES = {name.strip() for name in GREEK.values()} | {r"\Gamma", r"\Lambda", r"\Pi", r"\Xi", r"\Upsilon", r"\ell", r"\infty", r"\hbar",
                                                          r"\emptyset", r"\R", r"\nabla"}
ACCENTS = {r"\dot", r"\ddot", r"\hat", r"\bar", r"\vec", r"\tilde", r"\overline", r"\angle", r"\widehat", r"\overrightarrow"}


class Parser:
    """Recursive descent over the tokens of one expression. A tree is a tuple (operation, *arguments), ("num", Fraction) or ("sym", name)."""

    def __init__(self, text):
        self.tokens = TOKEN.findall(text)
        limit("tokens", len(self.tokens))
        self.i = self.depth = self.bars = 0
        self.trig = False

    def peek(self, ahead=0):
        return self.tokens[self.i + ahead] if self.i + ahead < len(self.tokens) else None

    def take(self, expected=None):
        token = self.peek()
        if token is None or expected not in (None, token):
            raise Unreadable(f"{token} where {expected} should be")
        self.i += 1
        return token

    def whole(self):
        tree = self.sum()
        if self.peek() is not None:
            raise Unreadable(f"{self.peek()} after the end")
        return tree

    def sum(self):
        self.depth += 1
        limit("depth", self.depth)
        terms = []
        while not terms or self.peek() in ("+", "-"):
            negative = False
            while self.peek() in ("+", "-"):
                negative ^= self.take() == "-"
            term = self.product()
            terms.append(("neg", term) if negative else term)
        self.depth -= 1
        return terms[0] if len(terms) == 1 else ("+", *terms)

    def starts_factor(self):
        return self.peek() not in ENDS and not (self.bars and self.peek() == "|")

    def product(self):
        factors = [self.power()]
        while True:
            if self.peek() in TIMES:
                self.take()
                factors.append(self.signed())
            elif self.peek() in ("/", r"\div"):
                self.take()
                factors.append(("inv", self.signed()))
            elif self.starts_factor():
                if self.peek()[0] in ".0123456789" and self.peek(-1)[-1] in ".0123456789":
                    raise Unreadable("two numbers side by side")
                factors.append(self.power())
            else:
                return factors[0] if len(factors) == 1 else ("*", *factors)

    def signed(self):
        negative = False
        while self.peek() in ("+", "-"):
            negative ^= self.take() == "-"
        return ("neg", self.power()) if negative else self.power()

    def power(self):
        base = self.primary()
        while True:
            token = self.peek()
            if token == "^":
                base = ("^", base, self.exponent())
            elif token == "!" and self.peek(1) != "!":
                self.take()
                base = ("!", base)
            elif token in ("°", "%"):
                self.take()
                base = ("percent", base) if token == "%" else ("degree", base) if self.trig else base
            else:
                return base

    def exponent(self):
        self.take("^")
        self.depth += 1
        limit("depth", self.depth)
        tree = self.argument(signed=True)
        if self.peek() == "^":
            tree = ("^", tree, self.exponent())
        self.depth -= 1
        return tree

    def argument(self, signed=False):
        """What a command or ^ takes: a group, else one token."""
        if self.peek() in ("+", "-") and signed:
            return ("neg", self.argument()) if self.take() == "-" else self.argument()
        self.depth += 1
        limit("depth", self.depth)
        tree = self.primary()
        self.depth -= 1
        return tree

    def raw(self):
        """The text of a group, or of one token, as it stands, without braces: for names."""
        if self.peek() != "{":
            return self.take()
        start, level = self.i, 0
        while not level or self.i == start or level > 0:
            token = self.take()
            level += (token == "{") - (token == "}")
            if level == 0:
                break
        return "".join(t for t in self.tokens[start:self.i] if t not in ("{", "}", r"\text"))

    def primary(self):
        token = self.take()
        if token[0] in "0123456789" or (token[0] == "." and len(token) > 1):
            return self.number(token)
        if token in CLOSERS:
            self.bars += token == "|"
            outer_bars, self.bars = self.bars, self.bars if token == "|" else 0
            tree = self.sum()
            self.bars = outer_bars - (token == "|")
            self.take(CLOSERS[token])
            return tree if token in "([{" else ({"|": "abs", r"\lfloor": "floor", r"\lceil": "ceil"}[token], tree)
        if token == r"\text":
            return self.argument()
        if token == r"\frac":
            return self.fraction()
        if token == r"\binom":
            return ("binomial", self.argument(), self.argument())
        if token == r"\sqrt":
            degree = ("num", Fraction(2))
            if self.peek() == "[":
                self.take()
                degree = self.sum()
                self.take("]")
            return ("^", self.argument(), ("inv", degree))
        if token[1:] in FUNCTIONS and token[0] == "\\":
            return self.function(token[1:])
        if token in (r"\sum", r"\prod"):
            self.take("_")
            self.take("{")
            name = self.take()
            self.take("=")
            low = self.sum()
            self.take("}")
            self.take("^")
            return (token[1:], ("sym", name), low, self.argument(), self.product())
        if token == r"\int":
            start = self.i - 1
            while self.take() not in ("d", r"\text") or not (self.peek() or "?")[-1].isalpha():
                pass
            self.take()
            return ("sym", "".join(t for t in self.tokens[start:self.i] if t not in "{}"))
        if token == r"\begin":
            return self.matrix()
        if token.isalpha() and token.isascii() or token in GREEK_NAMES | ACCENTS:
            return self.symbol(token)
        raise Unreadable(token)

    def number(self, token):
        value = Fraction(token) if abs(int(re.split("[eE]", token + "e0")[1])) < 10_000 else limit("exponent", math.inf)
        if self.peek() == r"\overline" and "." in token:
            self.take()
            digits = self.raw()
            if not re.fullmatch("[0-9]+", digits):
                raise Unreadable("a bar over no digits")
            value += Fraction(int(digits), (10 ** len(digits) - 1) * 10 ** len(token.split(".")[1]))
        elif self.peek() == r"\frac" and token.isdigit() and self.peek(-2) not in ("^", "_"):
            start = self.i
            self.take()
            part = self.fraction()
            if part[0] == "/" and part[1][0] == part[2][0] == "num" and part[1][1] < part[2][1]:
                return ("num", value + part[1][1] / part[2][1])                                      # a mixed number
            self.i = start
        elif self.peek() == "_":
            raise Unreadable("a number with an index")
        return ("num", value)

    def digit_or_argument(self):
        if (self.peek() or "").isdigit() and len(self.peek()) > 1:
            self.tokens[self.i:self.i + 1] = [self.peek()[0], self.peek()[1:]]              # \frac12 is one half
        return self.argument()

    def fraction(self):
        start = self.i
        over, under = self.raw(), self.raw()
        if re.match(r"d[^a-z+*/-]*", over) and re.fullmatch(r"(d|\\partial)(\\?[a-zA-Z]+)(\^[0-9])?", under) and over[0] == under[0]:
            return ("sym", f"{over}/{under}")                                                       # a derivative
        if over.startswith(r"\partial") and under.startswith(r"\partial"):
            return ("sym", f"{over}/{under}")
        self.i = start
        return ("/", self.digit_or_argument(), self.digit_or_argument())

    def function(self, name):
        inner, exponent = FUNCTIONS[name], None
        base = None
        if self.peek() == "_" and inner == "log":
            self.take()
            base = self.argument()
        if self.peek() == "^":
            exponent = self.exponent()
        if exponent == ("neg", ("num", 1)):
            inner, exponent = "a" + inner, None                                                     # \sin^{-1}
            if inner not in FUNCTIONS.values():
                raise Unreadable(f"the inverse of {name}")
        outer, self.trig = self.trig, self.trig or inner[:3] in ("sin", "cos", "tan", "cot", "sec", "csc")
        if self.peek() in ("(", "[", "{", "|") and not (self.bars and self.peek() == "|"):
            tree = self.argument()
            while self.peek() == "°":
                self.take()
                tree = ("degree", tree) if self.trig else tree
        else:
            factors = [self.signed()]
            while self.starts_factor() and self.peek() not in ("(", "[", r"\sum") and self.peek()[1:] not in FUNCTIONS:
                factors.append(self.power())
            tree = ("*", *factors)
        self.trig = outer
        tree = (inner, tree)
        tree = ("/", tree, ("log", base)) if base else tree
        return ("^", tree, exponent) if exponent else tree

    def matrix(self):
        kind = self.raw()
        if kind not in ("pmatrix", "bmatrix", "vmatrix", "matrix", "Bmatrix", "array", "smallmatrix"):
            raise Unreadable(kind)
        if kind == "array":
            self.raw()
        rows = [[self.sum()]]
        while self.peek() in ("&", "\n"):
            if self.take() == "&":
                rows[-1].append(self.sum())
            elif self.peek() != r"\end":
                rows.append([self.sum()])
        self.take(r"\end")
        if self.raw() != kind or len({len(row) for row in rows}) != 1:
            raise Unreadable("a ragged matrix")
        limit("matrix", len(rows) * len(rows[0]))
        tree = ("matrix", ("num", Fraction(len(rows[0]))), *(cell for row in rows for cell in row))
        return ("det", tree) if kind == "vmatrix" else tree

    def symbol(self, name):
        if name in ACCENTS:
            name += " " + self.raw()
        while self.peek() in ("'", "_"):
            name += self.take()
            if name[-1] == "_":
                name += self.raw()
        return ("sym", name)


CONSTANTS = {"e": lambda: +mp.e, r"\pi": lambda: +mp.pi, "i": lambda: mp.mpc(0, 1)}
spent = [0]


def lift(*values):
    """Rationals stay exact among themselves; beside anything else they become numbers of the current precision."""
    if all(isinstance(v, Fraction) for v in values):
        return values
    return tuple(mp.mpf(v.numerator) / v.denominator if isinstance(v, Fraction) else v for v in values)


def reciprocal(x):
    if x == 0:
        raise Undefined("division by zero")
    return 1 / x


def power(base, exponent):
    if isinstance(base, mp.matrix):
        if not (isinstance(exponent, Fraction) and exponent.denominator == 1 and 0 <= exponent <= 50):
            raise TooBig("a matrix power")
        return base ** int(exponent)
    if isinstance(exponent, mp.matrix):
        raise Unreadable("a matrix as an exponent")
    if base == 0:
        if not isinstance(exponent, mp.mpc) and exponent > 0:
            return Fraction(0)
        raise Undefined("zero to the power of zero or less")
    if isinstance(exponent, Fraction):
        if exponent.denominator == 1 and isinstance(base, Fraction):
            limit("bits", abs(exponent) * max(base.numerator.bit_length(), base.denominator.bit_length()))
            return base ** int(exponent)
        if exponent.denominator % 2 and not isinstance(base, mp.mpc) and base < 0:
            return power(-base, exponent) * (-1) ** (exponent.numerator % 2)
    base, exponent = lift(base, exponent)
    limit("exponent", abs(exponent * mp.log(base)))
    return mp.power(base, exponent)


def factorial(x):
    if isinstance(x, Fraction) and x.denominator == 1:
        limit("factorial", x)
        if x < 0:
            raise Undefined("the factorial of a negative number")
        return Fraction(math.factorial(int(x)))
    limit("factorial", abs(x))
    return mp.gamma(lift(x, mp.mpf(1))[0] + 1)


def binomial(n, k):
    if isinstance(n, Fraction) and isinstance(k, Fraction) and n.denominator == k.denominator == 1 and 0 <= k <= n:
        limit("bits", min(k, n - k) * int(n).bit_length())
        return Fraction(math.comb(int(n), int(k)))
    limit("factorial", abs(n) + abs(k))
    return mp.binomial(*lift(n, k, mp.mpf(1))[:2])


def whole_number(name):
    def rounded(x):
        return Fraction(getattr(math, name)(x)) if isinstance(x, Fraction) else getattr(mp, name)(x)
    return rounded


def numeric(name):
    def function(x):
        x, _ = lift(x, mp.mpf(1))
        if name not in ("log", "log10"):
            limit("exponent", abs(x))
        return getattr(mp, name)(x)
    return function


OPERATIONS = {
    "+": lambda *xs: functools.reduce(operator.add, lift(*xs)), "*": lambda *xs: functools.reduce(operator.mul, lift(*xs)),
    "/": lambda a, b: operator.mul(*lift(a, reciprocal(b))), "inv": reciprocal, "neg": operator.neg, "abs": abs,
    "^": power, "!": factorial, "binomial": binomial, "floor": whole_number("floor"), "ceil": whole_number("ceil"),
    "percent": lambda x: operator.mul(*lift(x, Fraction(1, 100))), "degree": lambda x: lift(x, mp.pi)[0] * mp.pi / 180,
    "matrix": lambda n, *cells: mp.matrix([lift(*cells, mp.mpf(1))[i:i + int(n)] for i in range(0, len(cells), int(n))]),
    "det": mp.det} | {name: numeric(name) for name in set(FUNCTIONS.values())}


def value(tree, point):
    """The value of a tree: a Fraction while everything is rational, else an mpf, mpc or matrix of the current precision."""
    kind, *args = tree
    if kind == "num":
        return args[0]
    if kind == "sym":
        return CONSTANTS[args[0]]() if args[0] in CONSTANTS and args[0] not in point.bound else point[args[0]]
    if kind in ("sum", "prod"):
        (_, name), low, high, body = args
        low, high = value(low, point), value(high, point)
        if not all(isinstance(x, Fraction) and x.denominator == 1 for x in (low, high)):
            raise Undefined("a sum with bounds that are not integers")
        limit("terms", high - low)
        terms = [value(body, point.bind(name, Fraction(k))) for k in range(int(low), int(high) + 1)]
        return OPERATIONS["+" if kind == "sum" else "*"](Fraction(kind == "prod"), *terms)
    result = OPERATIONS[kind](*[value(arg, point) for arg in args])
    bits = max(result.numerator.bit_length(), result.denominator.bit_length()) if isinstance(result, Fraction) else 0
    limit("bits", bits)
    spent[0] += len(args) * (1 + (bits // 4000) ** 2) + 8 * (kind in FUNCTIONS or kind == "^")
    limit("work", spent[0])
    if isinstance(result, (mp.mpf, mp.mpc)) and not mp.isfinite(result):
        raise Undefined(kind)
    return result


class Point(dict):
    """A value for every variable: a pure function of the point's number and the name. The first three points are positive."""
    SCALES = [Fraction(1), Fraction(7), Fraction(1, 5), Fraction(1), Fraction(3), Fraction(2)]
    POSITIVE = 3

    def __init__(self, number, bound=()):
        self.number, self.bound = number, dict(bound)

    def __missing__(self, name):
        if name in self.bound:
            return self.bound[name]
        rng = random.Random(f"{name} {self.number}")
        sign = rng.choice((1, -1)) if self.number >= self.POSITIVE else 1
        self[name] = sign * self.SCALES[self.number] * Fraction(rng.randint(600, 2000), 997)
        return self[name]

    def bind(self, name, number):
        inner = Point(self.number, {**self.bound, name: number})
        return inner


def agree(first, second):
    """Do two computations have the same value? Rationals exactly; else the difference must vanish as the precision grows."""
    differences = []
    for digits in (50, 100):
        with mp.workdps(digits):
            a, b = first(), second()
            if isinstance(a, Fraction) and isinstance(b, Fraction):
                return a == b, True
            if isinstance(a, mp.matrix) != isinstance(b, mp.matrix):
                return False, True
            if isinstance(a, mp.matrix):
                if (a.rows, a.cols) != (b.rows, b.cols):
                    return False, True
                pairs = list(zip(a, b))
            else:
                pairs = [lift(a, b, mp.mpf(1))[:2]]
            real = all(abs(mp.im(x)) <= mp.mpf(10) ** -40 * abs(x) for pair in pairs for x in pair)
            difference = max(abs(x - y) for x, y in pairs)
            size = max(max(abs(x), abs(y)) for x, y in pairs)
            differences.append(difference)
            if difference > size * mp.mpf(10) ** -15 and difference > mp.mpf(10) ** -30:
                return False, real
    return differences[1] <= size * mp.mpf(10) ** -60 or differences[1] <= differences[0] * mp.mpf(10) ** -30, real


def everywhere(first, second, complex_):
    """Do first(point) and second(point) agree at every point where both are real (with i in them: where both are defined)?"""
    decided, otherwise = 0, []
    for number in range(len(Point.SCALES) if not complex_ else Point.POSITIVE):
        point = Point(number)
        try:
            equal, real = agree(lambda: first(point), lambda: second(point))
        except (Undefined, ZeroDivisionError, ValueError):
            continue
        if not point and (real or complex_ or not equal):
            return equal
        if real or complex_:
            if not equal:
                return False
            decided += 1
        elif number < Point.POSITIVE:
            otherwise.append(equal)
    if decided or otherwise:
        return all(otherwise) or bool(decided)
    raise Undefined("no point where both sides have a value")


# --------------------------------------------------------------------------------------------------------------- 4. structure
PIECE = re.compile(r"\\[a-zA-Z]+|\\[{}]|[\s\S]")
OPEN, CLOSE = {"(", "[", "{", r"\{", r"\begin", r"\langle"}, {")", "]", "}", r"\}", r"\end", r"\rangle"}
NAME = re.compile(r"\s*(?:(?:[a-zA-Z]|[A-Z]{2,3}|\\text\s*\{[^{}]*\}|\\(?:dot|hat|bar|vec|overline|angle)\s*(?:\{[a-zA-Z]+\}|[A-Z]+)|(%s)(?![a-zA-Z]))"
                  r"\s*(?:_\s*(?:\{[^{}]*\}|[a-zA-Z0-9]|\\[a-zA-Z]+))?'*\s*(?:\([^()]*\))?|\|[A-Z]+\|)\s*"
                  % "|".join(re.escape(name) for name in sorted(GREEK_NAMES - {r"\infty", r"\R", r"\emptyset"}, key=len, reverse=True)))
RELATIONS = {"=", r"\approx", r"\equiv", "<", ">", r"\le", r"\ge", r"\ne"}
FLIP = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", r"\ne": r"\ne"}
BASE = re.compile(r"\(?\s*([0-9][0-9A-F]*)\s*\)?\s*_\s*(?:\{\s*([0-9]+)\s*\}|([0-9]))")
Expr = namedtuple("Expr", "tree text")                           # an expression
Many = namedtuple("Many", "kind items")                          # kind: set, union (unordered); named; "()" "[)" … ":" (ordered)
Relation = namedtuple("Relation", "op left right name value")   # name: of `name = value`, else None
Text = namedtuple("Text", "words")


def split(text, separators):
    """Split at the separators that stand outside all brackets: (parts, separators found)."""
    parts, found, depth = [""], [], 0
    for piece in PIECE.findall(text):
        depth += (piece in OPEN) - (piece in CLOSE)
        if depth <= 0 and piece in separators:
            parts.append("")
            found.append(piece)
        else:
            parts[-1] += piece
    return [part.strip() for part in parts], found


def fold(text):
    return re.sub(r"\\text|[{}\s\\.]", "", text).casefold()


def many(kind, parts):
    limit("items", len(parts))
    items = []
    for part in parts:
        node = read(part)
        items += node.items if isinstance(node, Many) and node.kind == kind in ("set", "union") else [node]
    names = [item.name if isinstance(item, Relation) else None for item in items]
    if kind == "set" and None not in names and len(set(names)) == len(names) > 1:
        order = sorted(items, key=lambda item: (item.name.startswith("\\"), item.name))
        return Many("named", tuple((item.name, item.value) for item in order))
    return items[0] if len(items) == 1 and kind == "set" else Many(kind, tuple(items))


def read(text):
    """The structure of a normalised answer."""
    text = text.strip()
    if not text or re.search(r"\?|\.\.|\\[lc]?dots", text):
        raise Unreadable(text)
    parts, _ = split(text, {",", ";", "\n"})
    if len(parts) == 1 and not text.startswith(r"\{") and re.search(r"\\(?:pm|mp)(?![a-zA-Z])", text):
        parts = signs(text)
    elif len(parts) > 1:
        parts = [sign for part in parts for sign in ([part] if part.startswith(r"\{") else signs(part))]
    if len(parts) > 1:
        ranges = all(re.search(r"[<>]|\\[lgn]e(?![a-z])|\\cup", part) for part in parts)
        return many("union" if ranges else "set", parts)
    parts, _ = split(text, {r"\cup"})
    if len(parts) > 1:
        return many("union", parts)
    parts, _ = split(text, {r"\in"})
    if len(parts) == 2 and NAME.fullmatch(parts[0]):
        return read(parts[1])
    parts, ops = split(text, RELATIONS)
    if ops:
        return relation(parts, ops)
    if words(text):
        return Text(fold(text))
    match = BASE.fullmatch(text)
    if match:
        return Many("base", (Text(match[1].lstrip("0")), Text(match[2] or match[3])))
    for opening in ("(", "[", r"\{", "{", r"\langle"):
        if text.startswith(opening):
            node = bracket(text, opening)
            if node:
                return node
    parts, _ = split(text, {":"})
    if len(parts) > 1:
        return Many(":", tuple(read(part) for part in parts))
    if text == r"\R":
        return Many("()", (Expr(("neg", ("sym", r"\infty")), r"-\infty"), Expr(("sym", r"\infty"), r"\infty")))
    return Expr(Parser(text).whole(), text)


def words(text):
    inner = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text)
    return re.fullmatch(r"[a-zA-Z' .!-]+", inner) and ("\\text" in text or re.search(r"[a-zA-Z]{4}|[a-z]{2,} +[a-z]{2,}", inner))


def signs(text):
    r"""`a \pm b` is two answers; with \mp the signs are tied, otherwise each is free."""
    pieces = re.split(r"\\(pm|mp)(?![a-zA-Z])", text)
    signs_ = pieces[1::2]
    limit("items", 2 ** len(signs_))
    tied = "mp" in signs_
    result = []
    for choice in range(2 if tied and signs_ else 2 ** len(signs_)):
        marks = ["+-"[(choice if tied else choice >> k & 1) ^ (sign == "mp")] for k, sign in enumerate(signs_)]
        result.append("".join(a + b for a, b in zip(pieces[::2], marks + [""])))
    return result


def bracket(text, opening):
    """A tuple, interval or set, if the bracket that opens the text closes at its end; else None."""
    depth = 0
    tokens = PIECE.findall(text)
    for k, piece in enumerate(tokens):
        depth += (piece in OPEN) - (piece in CLOSE)
        if depth == 0:
            break
    if k != len(tokens) - 1 or depth:
        return None
    closing = tokens[-1]
    inner = "".join(tokens[1:-1])
    parts, _ = split(inner, {",", ";"})
    if opening in (r"\{", "{"):
        builder, _ = split(inner, {"|", ":", r"\mid"})
        if len(builder) == 2 and re.match(NAME.pattern + r"(?:\\in|$)", builder[0]):
            return read(builder[1])
        return many("set", [s for part in parts for s in signs(part)])
    if len(parts) == 1:
        return read(inner)
    limit("items", len(parts))
    return Many(opening + closing, tuple(read(part) for part in parts))


def relation(parts, ops):
    named = [bool(NAME.fullmatch(part)) for part in parts]
    if all(op in ("=", r"\approx", r"\equiv") for op in ops):
        if len(parts) == 2 and fold(parts[0]) == fold(parts[1]):
            raise Unreadable("an identity")
        name_list = re.fullmatch(r"\((.*)\)", parts[0], re.S)
        values = [read(part) for part in parts[1:]]
        if name_list and len(parts) == 2 and isinstance(values[0], Many):
            names = split(name_list[1], {","})[0]
            if all(map(NAME.fullmatch, names)) and len(set(names)) == len(values[0].items):
                return Many("named", tuple(zip(names, values[0].items)))
        if len(parts) > 2 and not all(same(v, values[-1]) for v in values[:-1]):
            raise Unreadable("a chain of values that differ")
        if named[-1] and not named[0]:
            return Relation("=", values[-1], read(parts[0]), parts[-1], read(parts[0]))
        return Relation("=", read(parts[0]), values[-1], parts[0] if named[0] else None, values[-1])
    sides = [read(part) for part in parts]
    if len(parts) == 2 and not all(named):
        if named[1]:
            parts, sides, ops, named = parts[::-1], sides[::-1], [FLIP[ops[0]]], named[::-1]
        op, bound = ops[0], sides[1]
        if named[0] and isinstance(bound, Expr) and not variables(bound.tree):
            low, high = Expr(("neg", ("sym", r"\infty")), r"-\infty"), Expr(("sym", r"\infty"), r"\infty")
            if op == r"\ne":
                return Many("union", (Many("()", (low, bound)), Many("()", (bound, high))))
            return Many("()" if op in "<>" else "(]" if op == r"\le" else "[)", (low, bound) if op in ("<", r"\le") else (bound, high))
    if len(parts) == 3 and named[1] and all(op in ("<", r"\le") for op in ops) or len(parts) == 3 and all(op in (">", r"\ge") for op in ops):
        if ops[0] in (">", r"\ge"):
            sides, ops = sides[::-1], [FLIP[op] for op in ops[::-1]]
        return Many("[("[ops[0] == "<"] + "])"[ops[1] == "<"], (sides[0], sides[2]))
    if len(parts) != 2:
        raise Unreadable("a chain of relations")
    return Relation(ops[0], *sides, None, None)


def variables(tree):
    if tree[0] == "num":
        return set()
    if tree[0] == "sym":
        return {tree[1]} - set(CONSTANTS) - {r"\infty"}
    return set().union(*(variables(arg) for arg in tree[1:]))


def has_i(tree):
    return tree == ("sym", "i") or (tree[0] not in ("num", "sym") and any(has_i(arg) for arg in tree[1:]))


def same(a, b):
    """Are two structures the same answer?"""
    if isinstance(a, Relation) and isinstance(b, Relation):
        if a.name and b.name and a.op == b.op == "=" and same(a.value, b.value):
            return True
        return proportional(a, b)
    if isinstance(a, Relation) or isinstance(b, Relation):
        a, b = (x.value if isinstance(x, Relation) else x for x in (a, b))
        return a is not None and b is not None and (not isinstance(a, Relation)) and same(a, b)
    if isinstance(a, Many) and isinstance(b, Many):
        if "named" in (a.kind, b.kind):
            if a.kind == b.kind:
                return dict(a.items).keys() == dict(b.items).keys() and all(same(v, dict(b.items)[k]) for k, v in a.items)
            a, b = (Many("()" if {a.kind, b.kind} == {"named", "()"} else "set", tuple(v for _, v in x.items)) if x.kind == "named" else x
                    for x in (a, b))
        if a.kind != b.kind or len(a.items) != len(b.items):
            return False
        if a.kind not in ("set", "union"):
            return all(same(x, y) for x, y in zip(a.items, b.items))
        left = list(b.items)
        for item in a.items:
            found = next((k for k, other in enumerate(left) if same(item, other)), None)
            if found is None:
                return False
            left.pop(found)
        return True
    if isinstance(a, Text) and isinstance(b, Text):
        return a == b
    if isinstance(a, Expr) and isinstance(b, Expr):
        return same_value(a.tree, b.tree)
    return False


def same_value(a, b):
    if a == b:
        return True
    if (a[0] == "percent") != (b[0] == "percent"):
        inner, other = (a[1], b) if a[0] == "percent" else (b[1], a)
        if same_value(inner, other):
            return True
    return everywhere(lambda point: value(a, point), lambda point: value(b, point), has_i(a) or has_i(b))


def proportional(a, b):
    """Is (left - right) of one relation a constant, not zero, times that of the other, of a sign that fits the relations?"""
    if not all(isinstance(side, Expr) for side in (a.left, a.right, b.left, b.right)):
        return same(a.left, b.left) and same(a.right, b.right) and a.op == b.op
    tops = [("+", x.left.tree, ("neg", x.right.tree)) for x in (a, b)]
    ratio = ("/", *tops)
    if not variables(tops[0]) or not variables(tops[1]):
        return False
    start = Point(0)
    with mp.workdps(50):
        try:
            first, _ = lift(value(ratio, start), mp.mpf(1))
        except Undefined:
            return False
        if abs(first) < mp.mpf(10) ** -30 or isinstance(first, mp.mpc) and a.op != "=":
            return False
    if b.op != (a.op if a.op == "=" or first > 0 else FLIP[a.op]):
        return False
    return everywhere(lambda point: value(ratio, start), lambda point: value(ratio, point), has_i(ratio))


# ---------------------------------------------------------------------------------------------------------------- 5. judging
NUMBER = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)")
GROUPED = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])")


def quick(predicted, gold):
    """The cheap cases, which are most of the traffic: True, False, or None if it takes more."""
    if predicted == gold:
        return True
    if len(predicted) < 50 and len(gold) < 50 and NUMBER.fullmatch(predicted) and NUMBER.fullmatch(gold):
        return Fraction(predicted) == Fraction(gold)
    return None


def readings(text):
    """`12,345` outside brackets is a number, and only then, if it must be, a list."""
    depth, out = 0, []
    joined = GROUPED.sub(lambda m: m[0] if re.search(r"[(\[]|\\\{", text[:m.start()]) else m[0].replace(",", ""), text)
    return [joined] if joined == text else [joined, text]


def judge(predicted, gold):
    """(correct, status) of one extracted answer against one gold."""
    if quick(predicted, gold):
        return True, "ok"
    spent[0] = 0
    p, g = normalise(predicted), normalise(gold)
    if p == g and p or (r"\text" in p + g and fold(p) == fold(g) != ""):
        return True, "ok"
    try:
        golds = [read(text) for text in readings(g)]
    except (Unreadable, TooBig, RecursionError, ValueError):
        return (True, "ok") if fold(p) == fold(g) else (None, "gold_unparsed")
    try:
        answers = [read(text) for text in readings(p)]
        return any(same(a, b) for a in answers for b in golds), "ok"
    except Unreadable:
        return False, "unparsed"
    except (TooBig, Undefined, RecursionError, ZeroDivisionError, ValueError, OverflowError) as error:
        status = "undefined" if isinstance(error, (Undefined, ZeroDivisionError, ValueError)) else "too_big"
    return False, status


def judge_any(predicted, golds):
    """(correct, status) against several golds: right if it is any of them, unknown if it is none and one could not be judged."""
    verdicts = [judge(predicted, gold) for gold in golds]
    return next((v for wanted in (True, None, False) for v in verdicts if v[0] is wanted), (None, "gold_unparsed"))


def golds_of(answer):
    return (answer,) if isinstance(answer, str) else tuple(answer)


def verify(response, answer):
    """Judge one response against the gold answer (a string, or a list of strings of which any will do)."""
    predicted, status = extract(response)
    if status:
        return Verdict(False, status, None)
    return Verdict(*judge_any(predicted, golds_of(answer)), predicted)


def verify_many(pairs, workers=None):
    return [verify(response, answer) for response, answer in pairs]
