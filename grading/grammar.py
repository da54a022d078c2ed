"""LaTeX answers as trees: the grammar of verifier.py.

A tree is a tuple of an operation and its parts.

    ("num", Fraction) ("sym", name) ("base", number, base)    numbers, variables, 204_5
    ("word", letters) ("opaque", text) ("dots",)              text, what cannot be read, \\ldots
    ("+", …) ("*", …) ("^", a, b) ("inv", a) ("sin", a) …     expressions, as in values.py
    ("apply", name, …)                                        f(0), y'(t): a function not known
    ("set", …) ("union", …) ("setminus", a, b)                unordered
    ("()", …) ("(]", …) … (":", …) ("named", ("=", …), …)     ordered
    (relation, left, right, name) ("chain", relations, …)     y = 2x with the name y; a < b < c
    ("either", exact, rounded) ("claim", exact, "rounded") ("mod", residue, modulus)

The text is hostile. Nothing of it is executed; its size and its depth are limited by count.
"""
import itertools
import re
from fractions import Fraction

from grading.spelling import FUNCTIONS, GREEK, fold
from grading.values import (CONSTANTS, FLIP, INFINITY, INTERVALS, MINUS_INFINITY, Point, Unreadable,
                            as_union, common, limit, pieces, rounding, same_value, value, variables)


# --------------------------------------------------------------------------------------- the tables
TOKEN = re.compile(
    r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+(?![0-9a-zA-Z.]))?"  # 12, .5, 6.02e23
    r"|\\[a-zA-Z]+|\\[{}|]|[^ ]")
CLOSERS = {"(": ")]", "[": ")]", "{": "}", r"\{": r"\}", r"\langle": r"\rangle", "|": "|",
           r"\lfloor": r"\rfloor", r"\lceil": r"\rceil"}


def commands(names):
    return {"\\" + name for name in names.split()}


SYMBOLS = {command.strip() for command in GREEK.values()}
SYMBOLS |= commands("ell infty hbar emptyset nabla R Z N Q C")
ACCENTS = commands("dot ddot hat bar vec tilde angle triangle")
COMMANDS = commands(" ".join(FUNCTIONS) + " frac binom sqrt sum prod int begin text ldots")
COMMANDS |= commands("underbrace overbrace")
# How tightly an operator binds; factors side by side bind as \cdot does.
INFIX = {"\n": 1, "&": 2, r"\lor": 3, ";": 3, ",": 4, r"\land": 4}
INFIX |= dict.fromkeys([*FLIP, r"\in", r"\approx", r"\equiv"], 5)
INFIX |= {r"\mod": 6, r"\setminus": 6, r"\cup": 6, ":": 7, "+": 8, "-": 8}
INFIX |= dict.fromkeys(["/", r"\div", r"\cdot", r"\times"], 9)
KINDS = {1: "\n", 2: "&", 3: "or", 4: ",", 6: "union", 7: ":", 8: "+", 9: "*"}
RELATION, SUM, PRODUCT = 5, 8, 9
NUMBER_SETS = [("sym", "\\" + letter) for letter in "ZNQC"] + [("()", MINUS_INFINITY, INFINITY)]
LISTS = {",", "\n", "and", "or"}
STRUCTURES = {"set", "union", "setminus", "named", ":", "base", "chain", "cases", "mod"}
STRUCTURES |= INTERVALS | {r"\langle\rangle"}
TWO = ("num", Fraction(2))
# The name of a value: x, AB, \theta, \vec{v}, x_1, f(x), |AB|, and (as an answer) m+n.
MARKED = (r"\\(?:Delta|delta|angle|triangle|vec|bar|hat|tilde|dot|ddot) *"
          r"(?:[A-Za-z]{1,3}|\\[a-z]+|\{[^{}]*\})")
NAME = re.compile(rf"(?:[a-zA-Z]|[A-Z]{{2,3}}|{MARKED}|" r"\\[a-zA-Z]+(?:\{[^{}]*\})?)"
                  r"(?:_(?:\{[^{}]*\}|\\?[a-zA-Z0-9]+))?"
                  r"'*(?:\^\{-1\}(?=\())?(?:\([^()]*\))?"
                  r"|\|(?:[A-Z]+|\\vec *(?:\{[^{}]*\}|[a-zA-Z]))\||[a-z](?:\+[a-z])+")
# The fraction of a mixed number: \frac{4}{5}, \frac45.
MIXED = re.compile(r"\\frac(?:\{([0-9]+)\}|([0-9]))(?:\{([0-9]+)\}|([0-9])(?![0-9.]))")
# A ratio of lengths or areas: AB/CD = 2/3, S_1/S_2 = 1/4.
LENGTHS = re.compile(r"\\frac\{[A-Z](?:[A-Z]{1,2}|_[^{}]+|_\{[^{}]*\})\}"
                     r"\{[A-Z](?:[A-Z]{1,2}|_[^{}]+|_\{[^{}]*\})\}")
# Letters that are functions even before a sum, f(x+1); another one is a factor there: n(n+1).
FUNCTION_LETTERS = {*"fghFGH", r"\phi", r"\psi", r"\Phi", r"\Psi", r"\Gamma"}


# ------------------------------------------------------------------------------------------- parser
class Parser:
    """Precedence climbing over the tokens of an answer.

    A letter before parentheses is a function if what they hold is one number, one name or a list
    (f(0), I(t), P(a,b)), or if it is in `functions`; f, g, h are, too, if they are not in
    `factors`. `applied` collects the functions found, `sure` those that can be nothing else:
    h(a+b) may be a product.
    """

    def __init__(self, text, functions=frozenset(), factors=frozenset()):
        self.tokens = TOKEN.findall(text)
        limit("tokens", len(self.tokens))
        self.at = 0
        self.depth = 0
        self.bars = 0                    # inside |…|, where a bar closes
        self.trig = False                # inside \sin, where a degree sign counts
        self.functions = functions
        self.factors = factors
        self.applied = set()
        self.sure = set()

    def peek(self, ahead=0):
        """The next token, or one further on (or back); "" beyond the ends."""
        place = self.at + ahead
        return self.tokens[place] if 0 <= place < len(self.tokens) else ""

    def take(self, *expected):
        """The next token, which must be one of those expected."""
        token = self.peek()
        if not token or expected and token not in expected:
            raise Unreadable(f"'{token}' where {expected or 'more'} should be")
        self.at += 1
        return token

    def found(self, token):
        """Take the token if it is the next one."""
        if self.peek() != token:
            return False
        self.at += 1
        return True

    def whole(self):
        """The tree of the whole text."""
        if len(self.tokens) == 1 and self.tokens[0] in INFIX:
            return ("word", self.tokens[0])                        # which sign belongs here? \div
        tree = listed(self.expression())
        if self.peek():
            raise Unreadable(f"'{self.peek()}' after the end")
        return tree

    def expression(self, level=0, bare=False):
        """All that binds tighter than `level`; a bare argument (\\sin 2x) ends at any operator,
        bracket or function."""
        self.depth += 1
        limit("depth", self.depth)
        start = self.at
        if self.peek() in ("+", "-"):
            sign = self.take()
            left = self.expression(max(level, SUM), bare)
            left = ("neg", left) if sign == "-" else left
        else:
            left = self.power()
        while self.strength() > level:
            token = self.peek()
            if bare and (token in INFIX or token in "([" or token[1:] in FUNCTIONS):
                break
            strength = self.strength()
            if strength == RELATION:
                left = self.relations(left, start)
                continue
            left = self.operation(left, strength, bare)
        self.depth -= 1
        return left

    def strength(self):
        """How tightly the next token binds; 0 at the end."""
        token = self.peek()
        if token in INFIX:
            return INFIX[token]
        return PRODUCT if self.starts_factor(token) else 0

    def starts_factor(self, token):
        """Can a factor begin here: 2x, 2\\pi, 2(x+1), 2|x|?"""
        if token in SYMBOLS or token in ACCENTS or token in COMMANDS or token in CLOSERS:
            return token != "|" or not self.bars
        return token[-1:].isalnum() and token[0] != "\\"

    def operation(self, left, strength, bare):
        """One operator and its right side, added to `left`."""
        token = self.peek()
        if token in INFIX:
            self.take()
        elif token[-1].isdigit() and self.peek(-1)[-1] in "0123456789.":
            raise Unreadable("two numbers side by side")
        if strength <= INFIX[","] and not self.peek() and token in (",", ";", "\n"):
            return left
        right = self.expression(strength, bare)
        if token == r"\setminus" or token == "-" and (left in NUMBER_SETS or left[0] in INTERVALS):
            return ("setminus", left, listed(right))
        if token == "-":
            right = ("neg", right)
        if token in ("/", r"\div"):
            right = ("inv", right)
        kind = {r"\land": "and", r"\mod": "mod"}.get(token, KINDS[strength])
        if left[0] == kind:
            return (*left, right)
        return (kind, left, right)

    def relations(self, left, start):
        """a < b < c: all sides of a chain, with the name that each may be."""
        sides = [left]
        names = [self.name(start)]
        signs = []
        while INFIX.get(self.peek()) == RELATION:
            signs.append(self.take())
            start = self.at
            sides.append(self.expression(RELATION))
            names.append(self.name(start))
        limit("items", len(sides))
        return relate(sides, names, signs)

    def name(self, start):
        """The text since `start`, if it can be the name of a value; of a ratio, if its parts
        can."""
        text = ""
        for token in self.tokens[start:self.at]:
            joint = " " if token[0].isalpha() and re.search(r"\\[a-zA-Z]+$", text) else ""
            text += joint + token
        if re.fullmatch(r"\\text\{[^{}]*\}(?:\([^()]*\))?", text):
            return text                                            # Area, Var(X)
        text = re.sub(r"\\text\{([^{}]*)\}", r"\1", text)
        text = re.sub(r"^\{([^{}]*(?:\{[^{}]*\})?)\}$", r"\1", text)
        if LENGTHS.fullmatch(text):
            return text
        text = re.sub(r"^m(?=\\angle)", "", text)
        plain = re.sub(r"^\\(?:sin|cos|tan|cot) ?[0-9]? ?(?=[A-Z\\])", "", text)  # \sin A = 3/5
        if not all(is_name(part) for part in plain.split(":")):
            return ""
        return re.sub(r"_\{?\\?([^{}]*)\}?", r"_\1", text)

    def power(self):
        """A primary with what stands behind it: x^2, 5!, 30°, 50%, 204_5, 45'."""
        tree = self.primary()
        while self.peek() in ("^", "!", "°", "%", "_", "'"):
            token = self.take()
            if token == "^":
                tree = ("^", tree, self.exponent())
            elif token == "_":
                if tree[0] != "num" or tree[1].denominator > 1:
                    raise Unreadable("an index on what is neither a name nor a number")
                tree = ("base", tree[1], self.raw())
            elif token == "!" and self.found("!"):
                tree = ("!!", tree)
            elif token == "°":
                tree = self.arc(tree)
                tree = ("degree", tree) if self.trig else tree
            elif token == "'" and tree[0] != "num":
                raise Unreadable("a prime on what is neither a name nor a number")
            elif token != "'":
                tree = ({"!": "!", "%": "percent"}[token], tree)
        return tree

    def arc(self, degrees):
        """63°45'30'' in degrees."""
        for size in (60, 3600):
            if self.peek()[-1:].isdigit() and self.peek(1) == "'":
                part = ("num", Fraction(self.take()) / size)
                while self.found("'"):
                    pass
                degrees = ("+", degrees, part)
        return degrees

    def exponent(self):
        """What ^ raises to, itself raised if another ^ follows: 2^{2^3}, 2^-1."""
        minus = self.found("-")
        self.found("+")
        tree = self.argument()
        tree = ("neg", tree) if minus else tree
        return ("^", tree, self.exponent()) if self.found("^") else tree

    def argument(self):
        """A group, or one token: of \\frac, \\sqrt, ^."""
        self.depth += 1
        limit("depth", self.depth)
        tree = self.primary()
        self.depth -= 1
        return tree

    def raw(self):
        """A group, or one token, as text without braces: for names."""
        start = self.at
        level = 0
        while self.at == start or level > 0:
            level += {"{": 1, "}": -1}.get(self.take(), 0)
        text = ""
        for token in self.tokens[start:self.at]:
            if token not in ("{", "}", r"\text"):
                text += token[1:] if token[1:] in FUNCTIONS else token
        return text

    def primary(self):
        """A number, a symbol, a group or a command."""
        token = self.take()
        if token in COMMANDS:
            return self.command(token)
        if token in CLOSERS:
            return self.group(token)
        if token[0] in ".0123456789" and token != ".":
            return self.number(token)
        if not (token.isalpha() and token.isascii() or token in SYMBOLS or token in ACCENTS):
            raise Unreadable(token)
        if token == r"\R":
            return ("()", MINUS_INFINITY, INFINITY)
        joined = token == r"\Delta" and (self.peek().isalpha() or self.peek() in SYMBOLS)
        return self.symbol(f"{token} {self.raw()}" if joined or token in ACCENTS else token)

    def symbol(self, name):
        """A variable with its primes and index, or a function and its arguments."""
        while self.peek() in ("'", "_"):
            name += self.take()
            name += self.raw() if name[-1] == "_" else ""
        if name in FUNCTION_LETTERS and self.peek() == "^":
            name += self.power_of_function()
        if self.peek() == "(" and name not in CONSTANTS and self.is_function(name):
            self.take()
            content = self.expression()
            self.take(")")
            self.applied.add(name)
            return ("apply", name, *(content[1:] if content[0] == "," else (content,)))
        return ("sym", name)

    def power_of_function(self):
        """f^{-1}(x), f^2(x): part of the name, if an argument follows."""
        back = self.at
        self.take()
        index = self.raw()
        if self.peek() == "(" and re.fullmatch("-?[0-9]|\\([0-9]\\)", index):
            return "^" + index
        self.at = back
        return ""

    def is_function(self, name):
        """Is a name before parentheses a function, not a factor?"""
        if name in self.functions:
            return True
        if self.simple_argument() or "'" in name or name.startswith((r"\dot", r"\ddot")):
            self.sure.add(name)
            return True
        return name in FUNCTION_LETTERS and name not in self.factors

    def simple_argument(self):
        """Do the parentheses hold numbers and names only, a list of them or one?"""
        place = self.at + 1
        while place < len(self.tokens) and self.tokens[place] != ")":
            token = self.tokens[place]
            follows = self.tokens[place - 1]
            name = len(token) == 1 and token.isalpha() or token in SYMBOLS
            simple = name or token[-1].isdigit() or token in "'_{},-"
            alone = follows in "(,_{-" or token in "'_{},"
            if not simple or not alone:
                return False
            place += 1
        return place > self.at + 1

    def group(self, opening):
        """What brackets of any kind hold: an expression, a tuple, an interval, a list, a set."""
        outer = self.bars
        self.bars = opening == "|"
        if opening == r"\{":
            tree = self.set_or_builder()
        else:
            tree = self.expression()
        self.bars = outer
        closing = self.take(*CLOSERS[opening] if opening in "([" else (CLOSERS[opening],))
        if opening in ("{", r"\{"):
            return listed(tree)
        if opening == "|":
            return ("abs", tree)
        if opening in (r"\lfloor", r"\lceil"):
            return (opening[2:], tree)
        if tree[0] == ",":
            return (opening + closing, *tree[1:])
        if opening + closing not in ("()", "[]"):
            raise Unreadable("brackets that do not match")
        return tree

    def set_or_builder(self):
        """What stands in braces: a list, or a set builder: {x | x < 0}, {(a,b): a < b}."""
        if not self.starts_builder():
            return self.expression()
        outer = self.bars
        self.bars = 1
        self.expression(INFIX[":"])
        if self.found(r"\in"):
            self.expression(INFIX[":"])                            # {x ∈ R : …}
        self.bars = outer
        self.take("|", ":")
        return condition(self.expression())

    def starts_builder(self):
        """Is there a name or a tuple of names before a bar or a colon? Looked up, not tried out:
        a parser that goes back at every brace takes 2^n steps for n of them."""
        for place in range(self.at, min(self.at + 20, len(self.tokens))):
            token = self.tokens[place]
            if token in ("|", ":"):
                return place > self.at
            letter = len(token) == 1 and token.isalpha() or token in SYMBOLS
            if place == self.at and not letter and token != "(":
                return False
            if not letter and not token.isdigit() and token not in "(),_'{}" and token != r"\in":
                return False
        return False

    def number(self, token):
        limit("bits", 4 * abs(int(re.split("[eE]", token + "e0")[1])))
        number = Fraction(token)
        barred = self.peek() in (r"\bar", r"\dot")
        if "." in token and (barred or self.peek() == "(" and self.peek(2) == ")"):
            return ("num", number + self.period(token))
        if token.isdigit() and self.peek(-2) != "^":
            part = MIXED.match("".join(self.tokens[self.at:self.at + 7]))  # 1\frac{4}{5}
            if part and int(part[1] or part[2]) < int(part[3] or part[4]):
                whole = self.command(self.take())
                return ("num", number + whole[1][1] / whole[2][1])
        return ("num", number)

    def period(self, token):
        """What the recurring digits add: 0.\\overline{3}, 0.1(6)."""
        if self.found("("):
            digits = self.take()
            self.take(")")
        else:
            self.take()
            digits = self.raw()
        if not digits.isdigit():
            raise Unreadable("a bar over no digits")
        return Fraction(int(digits), (10 ** len(digits) - 1) * 10 ** len(token.split(".")[1]))

    def command(self, token):
        """What a LaTeX command begins."""
        name = token[1:]
        if name == "frac":
            return self.fraction()
        if name == "binom":
            return ("binomial", self.digit(), self.digit())
        if name == "sqrt":
            return self.root()
        if name == "text":
            return self.word()
        if name in ("sum", "prod"):
            return self.series(name)
        if name == "int":
            return self.integral()
        if name == "begin":
            return self.matrix(self.raw())
        if name == "ldots":
            return ("dots",)
        if name in ("underbrace", "overbrace"):
            return self.opaque(name)
        return self.function(FUNCTIONS[name])

    def fraction(self):
        start = self.at
        if self.peek() == "{" and self.peek(1) in ("d", r"\partial") and self.peek(2) != "_":
            over, under = self.raw(), self.raw()
            if re.fullmatch(r"(d|\\partial)\\?[a-zA-Z]+(\^[0-9])?", under):
                return ("sym", f"{over}/{under}")  # a derivative
            self.at = start
        return ("/", self.digit(), self.digit())

    def digit(self):
        if self.peek().isdigit() and len(self.peek()) > 1:
            first, rest = self.peek()[0], self.peek()[1:]
            self.tokens[self.at:self.at + 1] = [first, rest]       # \frac12 is one half
        return self.argument()

    def root(self):
        degree = TWO
        if self.found("["):
            degree = self.expression()
            self.take("]")
        return ("^", self.argument(), ("inv", degree))

    def word(self):
        """Text with a letter pair in it is a word; else it is what it holds."""
        start = self.at
        text = self.raw()
        if re.fullmatch(r"[a-zA-Z' .,-]*", text) and len(re.findall("[a-zA-Z]", text)) > 1:
            return ("word", fold(text))
        if len(text) == 1 and text.isalpha():
            return self.symbol(text)
        self.at = start
        return self.argument()

    def opaque(self, name):
        start = self.at
        self.raw()
        while self.peek() in ("_", "^"):
            self.take()
            self.raw()
        return ("opaque", name + "".join(self.tokens[start:self.at]))

    def series(self, name):
        self.take("_")
        low = self.argument()
        if low[0] != "=" or low[1][0] != "sym":
            raise Unreadable("a sum over nothing")
        self.take("^")
        high = self.argument()
        return (name, low[1], low[2], high, self.expression(SUM))

    def integral(self):
        """\\int_a^b … dx; without bounds, or with a body that cannot be read, it is equal to its
        own spelling only."""
        start = self.at
        try:
            self.take("_")
            low = self.argument()
            self.take("^")
            high = self.argument()
            body_start = self.at
            while self.peek() != "d" or not self.peek(1)[-1:].isalpha():
                self.take()
            body_end = self.at
            self.take()
            variable = self.take()
            end = self.at
            inner = Parser("", self.functions, self.factors)
            inner.tokens = self.tokens[body_start:body_end]
            body = inner.expression(RELATION) if inner.tokens else ("num", Fraction(1))
            if inner.peek():
                raise Unreadable("a body with an end of its own")
            self.applied |= inner.applied
            self.at = end
            return ("int", ("sym", variable), low, high, body)
        except Unreadable:
            self.at = start
        while self.take() != "d" or not self.peek()[-1:].isalpha():
            pass
        self.take()
        tokens = [token for token in self.tokens[start:self.at] if token not in "{}"]
        return ("opaque", "int" + "".join(tokens))

    def matrix(self, kind):
        columns = self.raw() if kind == "array" else ""
        tree = self.expression()
        rows = []
        for row in tree[1:] if tree[0] == "\n" else (tree,):
            rows.append(row[1:] if row[0] == "&" else (row,))
        self.take(r"\end")
        if self.raw() != kind:
            raise Unreadable(f"{kind} has another end")
        limit("items", len(rows) * len(rows[0]) / 2)
        if kind == "cases":
            return cases(rows)
        known = kind in ("array", "matrix") or kind[1:] == "matrix"
        if not known or len({len(row) for row in rows}) > 1:
            raise Unreadable(f"{kind} {columns}")
        tree = ("matrix", ("num", Fraction(len(rows[0]))), *itertools.chain(*rows))
        return ("det", tree) if kind == "vmatrix" else tree

    def function(self, name):
        base = None
        if name == "ln" and self.found("_"):
            base = self.argument()
        exponent = self.exponent() if self.found("^") else None
        if exponent == ("neg", ("num", 1)):
            name, exponent = "a" + name, None  # \sin^{-1}
        outer = self.trig
        self.trig = outer or name in ("sin", "cos", "tan", "cot", "sec", "csc")
        bracket = self.peek() in ("(", "[", "{") or self.peek() == "|" and not self.bars
        tree = self.argument() if bracket else self.expression(SUM, bare=True)
        self.trig = outer
        if name in ("gcd", "lcm", "max", "min"):
            tree = (name, *(tree[1:] if tree[0] in ("()", "set") else (tree,)))
        elif base:
            tree = ("/", (name, tree), ("ln", base))
        else:
            tree = (name, tree)
        return ("^", tree, exponent) if exponent else tree


# --------------------------------------------------------------------------------- lists, relations
def cases(rows):
    """A system of equations, or a function by pieces: rows of a value and its condition."""
    pairs = []
    for row in rows:                                              # 1, n=1 \\ 2n, n>1
        in_one = len(row) == 1 and row[0][0] == "," and len(row[0]) == 3
        pairs.append(row[0][1:] if in_one else row)
    if all(len(pair) == 2 and pair[0][0] != "=" for pair in pairs):
        rows = pairs
    if all(len(row) == 1 for row in rows):
        return listed(("\n", *(row[0] for row in rows)))
    if any(len(row) != 2 for row in rows):
        raise Unreadable("cases")
    return ("cases", *(("()", *row) for row in rows))


def is_name(text):
    r"""x, AB, \theta, x_{12}, f(x), but not \infty, nor an operation such as \frac."""
    command = re.match(r"\\[a-zA-Z]+", text)
    if command and command[0] not in SYMBOLS and command[0] not in ACCENTS and command[0] != r"\pi":
        return False
    return bool(NAME.fullmatch(text)) and text not in (r"\infty", r"\R", r"\pi")


def listed(tree):
    """A list is a set: of named values, of ranges, or of plain answers; one alone is itself."""
    if tree[0] not in LISTS:
        return tree
    parts = [listed(part) for part in tree[1:]]
    if tree[0] == "or" and all(part[0] in ("named", "()") for part in parts):
        return ("set", *parts)                                     # p=5, q=2 or p=7, q=2
    items = named_together(parts)
    if items:
        return items
    items = []
    for part, before in zip(parts, tree[1:]):
        was_list = before[0] in LISTS and part[0] in ("set", "named")
        items += part[1:] if was_list else (part,)
    limit("items", len(items))
    if any(item[0] == "union" for item in items):
        return ranges(tree[0], items)
    names = [item[3] if item[0] == "=" else "" for item in items]
    if all(names) and len(set(names)) == len(names):
        return ("named", *sorted(items, key=lambda item: (item[3].startswith("\\"), item[3])))
    return ("set", *items)


def named_together(parts):
    """a=b=2, c=3: one named tuple, if every part is named and no name twice; else None."""
    if not any(part[0] == "named" for part in parts):
        return None
    items = []
    for part in parts:
        items += part[1:] if part[0] == "named" else (part,)
    names = [item[3] if item[0] == "=" else "" for item in items]
    if not all(names) or len(set(names)) < len(names):
        return None
    return ("named", *sorted(items, key=lambda item: (item[3].startswith("\\"), item[3])))


def ranges(kind, items):
    """x<1 or x>2 is a union, x>1 and x<2 an intersection, x=1 or x>2 has a point. A comma may mean
    either: it is an intersection if there is one."""
    if kind != "or" and leaves_out_one(items[0]):
        taken = [item for item in items[1:] if item[0] not in ("union", "=")]
        if len(taken) == len(items) - 1:                           # x ≠ 0, 1
            return ("setminus", NUMBER_SETS[-1], ("set", items[0][2][1], *taken))
    items = [item[2] if item[0] == "=" and item[3] else item for item in items]
    if kind != "or" and all(item[0] == "union" for item in items):
        both = pieces(items[0])
        for item in items[1:]:
            other = pieces(item)
            if both is None or other is None:
                raise Unreadable("ranges with ends that are no numbers")
            both = common(both, other)
        if both:
            return as_union(both)
        if kind == "and":
            raise Unreadable("nothing is in all ranges")
    parts = []
    for item in items:
        parts += item[1:] if item[0] in ("union", "set") else (item,)
    return ("union", *parts)


def leaves_out_one(tree):
    """Is this all of the line but one number: x ≠ 0, as (-oo, 0) and (0, oo)?"""
    if tree[0] != "union" or [part[0] for part in tree[1:]] != ["()", "()"]:
        return False
    below, above = tree[1:]
    return len(below) == len(above) == 3 and below[2] == above[1]


def condition(tree):
    """What a set builder {x | …} says: its conditions, without those that only name a number
    set."""
    if tree[0] != ",":
        return tree
    kept = [item for item in tree[1:] if item not in NUMBER_SETS]
    return kept[0] if len(kept) == 1 else (",", *(kept or tree[1:]))


def relate(sides, names, signs):
    """A chain of relations. What says that one variable lies in a range becomes an interval, in a
    union of its own."""
    if signs == [r"\in"] and (names[0] or sides[0][0] == "()"):
        return sides[1]
    if all(sign in ("=", r"\approx", r"\equiv") for sign in signs):
        return equation(sides, names, signs)
    if any(sign not in FLIP for sign in signs):
        raise Unreadable("a chain of relations")
    names = ["" if "+" in name else name for name in names]
    falling = len(signs) > 1 and set(signs) <= {">", r"\ge"}
    if falling or len(signs) == 1 and names[1] and not names[0]:
        sides = sides[::-1]
        names = names[::-1]
        signs = [FLIP[sign] for sign in signs[::-1]]
    if len(signs) == 2 and names[1] and not names[0] and set(signs) <= {"<", r"\le"}:
        return ("union", ("[("[signs[0] == "<"] + "])"[signs[1] == "<"], sides[0], sides[2]))
    letters = [variables(side) for side in sides]
    if len(signs) > 1 or not any(letters):
        if signs[0] in (">", r"\ge"):
            sides = sides[::-1]
            signs = [FLIP[sign] for sign in signs[::-1]]
        return ("chain", ("word", " ".join(signs)), *sides)
    if names[0] and not letters[1]:
        return half_lines(signs[0], sides[1])
    if sides[0][0] == "abs" and not letters[1] and len(letters[0]) == 1 and signs[0] != r"\ne":
        found = distance(signs[0], sides[0][1], *letters[0], sides[1])
        if found:
            return found
    return (signs[0], *sides, "")


def half_lines(sign, end):
    """x < 2 is (-oo, 2); x ≠ 2 is two of them."""
    below = {"<": "()", r"\le": "(]", r"\ne": "()"}.get(sign)
    above = {">": "()", r"\ge": "[)", r"\ne": "()"}.get(sign)
    parts = []
    if below:
        parts.append((below, MINUS_INFINITY, end))
    if above:
        parts.append((above, end, INFINITY))
    return ("union", *parts)


def distance(sign, inner, letter, size):
    """|2x - 1| < 3 is the interval (-1, 2): ends where 2x - 1 is -3 and 3. None if `inner` is not a
    line."""
    heights = [value(inner, Point(0, **{letter: Fraction(x)})) for x in range(3)]
    if not all(isinstance(height, Fraction) for height in heights):
        return None
    slope = heights[1] - heights[0]
    if not slope or heights[2] - heights[1] != slope:
        return None
    start = ("num", -heights[0] / slope)
    reach = ("*", size, ("num", 1 / abs(slope)))
    low = ("+", start, ("neg", reach))
    high = ("+", start, reach)
    if sign in ("<", r"\le"):
        return ("union", ("()" if sign == "<" else "[]", low, high))
    left, right = ("()", "()") if sign == ">" else ("(]", "[)")
    return ("union", (left, MINUS_INFINITY, low), (right, high, INFINITY))


def equation(sides, names, signs):
    """a = b; a name for a value; several names for one value; a chain of equal values."""
    left, right = sides[0], sides[-1]
    if right[0] == "mod" and len(sides) == 2:
        return right if names[0] else ("mod", ("+", left, ("neg", right[1])), right[2])
    tuples = left[0] == right[0] == "()" and len(left) == len(right)
    if tuples and all(part[0] == "sym" for part in left[1:]):
        return ("named", *(("=", part, given, part[1]) for part, given in zip(left[1:], right[1:])))
    if len(sides) == 2 and left == right:
        raise Unreadable("x = x")
    if names[-1] and not any(names[:-1]):
        sides = sides[::-1]
        names = names[::-1]
    n_names = sum(1 for _ in itertools.takewhile(bool, names))
    if n_names == len(sides):
        return ("=", *sides, names[0]) if len(sides) == 2 else ("chain", ("word", "="), *sides)
    if n_names == 0:
        if signs != [r"\approx"] and len(sides) == 2 and (variables(left) or variables(right)):
            return ("=", *sides, "")
        return chain_value(sides, signs)
    given = chain_value(sides[n_names:], signs[n_names:])
    if n_names == 1:
        return ("=", sides[0], given, names[0])
    return ("named", *(("=", side, given, name) for side, name in zip(sides[:n_names], names)))


def chain_value(sides, signs):
    """The value of a chain of equal ones: 10/4 = 5/2. A decimal at its end may be a rounding of the
    others: ("either", exact, rounded); what is called near and is not, or is a number for a formula
    (v = \\sqrt{2gh} = 14), is ("claim", first, last)."""
    exact = sides[0]
    for side, sign in zip(sides[1:], signs):
        if side == exact and len(sides) == 2:
            raise Unreadable("1 = 1")
        if same_value(exact, side):
            continue
        if side is sides[-1] and rounding(side, exact):
            return ("either", exact, side)
        if sign == r"\approx" or variables(exact) and side is sides[-1] and not variables(side):
            return ("claim", exact, side)
        raise Unreadable("a chain of different values")
    return exact
