"""One spelling for what is written in many ways: the tables of verifier.py.

`normalise(text)` is still LaTeX, but with one name for each command, plain numbers, no fonts and no
spacing; the end of a row is a newline and a degree sign is °. Nothing here decides what is equal.
`split_unit` and `split_qualifier` take off what stands behind an answer ("cm^2", "for all x");
verifier.py decides when they may.

Each rule is (pattern, replacement), with its reason and an example above it. They run from top to
bottom.
"""
import functools
import re
import unicodedata

# LaTeX name of a function -> its name in values.py
FUNCTIONS = {name: name for name in "sin cos tan cot sec csc sinh cosh tanh coth exp".split()}
FUNCTIONS |= {"arc" + name: "a" + name for name in "sin cos tan cot sec csc".split()}
FUNCTIONS |= {"ln": "ln", "log": "ln", "lg": "log10", "cis": "cis"}
FUNCTIONS |= {name: name for name in ("gcd", "lcm", "max", "min")}
FUNCTION_NAMES = "|".join(sorted({*FUNCTIONS} - {"sec", "min", "max"}, key=len, reverse=True))


# ------------------------------------------------------------------------------------------ Unicode
def greek_letters():
    """Greek character -> LaTeX command with a space behind it."""
    small = [*range(0x3b1, 0x3ca), 0x3c6, 0x3d5]
    capital = (0x393, 0x394, 0x398, 0x39b, 0x39e, 0x3a0, 0x3a3, 0x3a6, 0x3a8, 0x3a9)
    letters = {}
    for code in small:
        name = unicodedata.name(chr(code)).split()[-1].lower()
        letters[chr(code)] = "\\" + name.replace("lamda", "lambda")
    for code in capital:
        name = unicodedata.name(chr(code)).split()[-1].title()
        letters[chr(code)] = "\\" + name.replace("Lamda", "Lambda")
    return letters


GREEK = greek_letters()
CHARACTERS = {character: command + " " for character, command in GREEK.items()} | {
    "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "‒": "-",  # dashes
    "÷": "/", "⁄": "/", "∕": "/", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ",
    "º": "°", "′": "'", "’": "'", "‘": "'", "″": "''", "”": "", "“": "",
    "$": "$", "€": "", "£": "", "¥": "", "₹": "", "¢": "", "₽": "", "₩": "",  # money
    "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "≡": r"\equiv ",
    "⩽": r"\le ", "⩾": r"\ge ", "±": r"\pm ", "∓": r"\mp ", "∪": r"\cup ", "∩": r"\cap ",
    "∖": r"\setminus ", "∈": r"\in ", "∅": r"\emptyset ", "√": r"\sqrt ", "∀": r"\forall ",
    "ℝ": r"\R ", "ℤ": r"\Z ", "ℕ": r"\N ", "ℚ": r"\Q ", "ℂ": r"\C ",
    "∠": r"\angle ", "△": r"\triangle ", "…": r"\ldots ", "⋯": r"\ldots ",
    "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ",
    "∧": r"\land ", "∨": r"\lor ", "，": ", ", "；": "; ", "、": ", ", "。": ".",
}
RAISED = re.compile("[⁰¹²³⁴-⁹⁺⁻]+")  # 10²³: digits that NFKC would set on the line
LOWERED = re.compile("[₀-₉]+")                                   # 101₂, log₂5, x₁
VULGAR = re.compile("[¼-¾⅐-⅞]")                                  # 2⅗
CIRCLED = re.compile("[①-⑨]")                                    # ①③: statements, not 13


def flat(match):
    return unicodedata.normalize("NFKC", match[0]).replace("−", "-")


def vulgar(match):
    over, under = unicodedata.normalize("NFKC", match[0]).split("⁄")
    return rf"\frac{{{over}}}{{{under}}}"


def plain_characters(text):
    """ASCII and LaTeX commands for the characters that stand for them."""
    text = CIRCLED.sub(lambda match: f"({flat(match)})", text)
    text = RAISED.sub(lambda match: f"^{{{flat(match)}}}", text)
    text = LOWERED.sub(lambda match: f"_{{{flat(match)}}}", text)
    text = VULGAR.sub(vulgar, text)
    text = unicodedata.normalize("NFKC", text.translate(str.maketrans(CHARACTERS)))
    return "".join(character for character in text if unicodedata.category(character) != "Cf")


# ----------------------------------------------------------------------------------------- commands
def table(new, names):
    return {name: new for name in names.split()}


COMMANDS = {}
# Size, style, boxes, arrows of speech: \Huge 5, \underline{5}, \implies x=5, \left( \right).
COMMANDS |= table(" ", """left right big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr Biggl Biggr
bigm middle
    displaystyle textstyle scriptstyle limits nolimits tiny small normalsize large Large LARGE huge
    Huge boxed fbox framebox underline uline emph mathstrut notag nonumber blacksquare bigstar
    checkmark therefore implies Rightarrow Longrightarrow hfill centering quad qquad enspace
    thinspace protect""")
# Fonts of a letter: \mathbf{v}.
COMMANDS |= table(r"\font", """mathbf boldsymbol bm mathit mathsf mathcal mathscr mathfrak pmb bf it
    rm sf bfseries""")
# Upright text, and what models set as text: \mathrm{cm}, \operatorname{arctan}.
COMMANDS |= table(r"\text", """text textbf textit textrm textsf texttt textnormal textup textsc
    mathrm mathop mathtt mbox hbox operatorname""")
# Money: \pounds 5.
COMMANDS |= table(" ", "pounds euro yen textdollar textcent cents")
# One name for each command: \dfrac12, \leqslant, \varnothing, \overline{AB}.
for new_name, old_names in (
        (r"\frac", "dfrac tfrac cfrac"), (r"\binom", "dbinom tbinom"),
        (r"\le", "leq leqslant leqq"), (r"\ge", "geq geqslant geqq"), (r"\ne", "neq"),
        ("<", "lt"), (">", "gt"), (":", "colon ratio"), ("|", "vert lvert rvert mid"),
        (r"\approx", "sim simeq cong doteq"), (r"\mod", "pmod bmod mod pod"),
        (r"\{", "lbrace"), (r"\}", "rbrace"), (r"\setminus", "smallsetminus backslash"),
        (r"\cdot", "ast star cdotp bullet"), (r"\ldots", "dots cdots dotsc dotsb vdots"),
        (r"\land", "wedge"), (r"\lor", "vee"), (r"\emptyset", "varnothing"), (r"\R", "Reals reals"),
        (r"\bar", "overline"), (r"\hat", "widehat"), (r"\tilde", "widetilde"),
        (r"\vec", "overrightarrow"), ("°", "degree textdegree"), ("'", "prime"), ("/", "slash")):
    COMMANDS |= table(new_name, old_names)
for variant in ("epsilon", "phi", "theta", "rho", "pi", "sigma"):
    COMMANDS["var" + variant] = "\\" + variant
END = "(?![a-zA-Z])"
COMMAND = re.compile(r"\\([a-zA-Z]+)")


def one_name(match):
    new = COMMANDS.get(match[1])
    if new is None:
        return match[0]
    return new + " " if new[-1].isalpha() else new


# -------------------------------------------------------------------------------------------- rules
TEXT = r"\\text *\{((?:[^{}]|\{[^{}]*\})*)\}"
POWER_OF_TEN = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
TENS = "|".join(POWER_OF_TEN)
# Words before "is" that make the rest another answer than it looks: "no number is 204".
TURNING = "(?i:" + "|".join("""no not none never nor or and if when unless neither either but less
    more than least most below above under over minus negative half twice double except between
    without wrong incorrect false cannot""".split()) + ")"
# Where an item of a list begins and ends.
ITEM = r"(?:^|(?<=,)|(?<=\\land )|(?<=\\lor )) *"
ITEM_END = r" *(?=,|\\land|\\lor|$)"


def without_speaker(match):
    opened = match[1] or match[2]
    return r"\text{" if opened and not match[3] else ""


def joined_digits(match):
    return re.sub("[^0-9]", "", match[0])


def power_of_ten(match):
    return rf" \cdot 10^{{{POWER_OF_TEN[match[1]]}}}"


def statements(match):
    return ",".join(re.findall("[0-9]", match[0]))


def split_words(match):
    """\\text{Alice, Bob} is a list of two words; \\text{204, 205} one of two numbers."""
    parts = [part.strip() for part in re.split(r",|;|\\land|\\lor", match[1])]
    return ",".join(rf"\text{{{part}}}" for part in parts if part)


CASES = r"\\begin{cases}\1\\end{cases}"
FIRST_RULES = [
    # Null bytes and white space of any kind.
    (r"[\0\s]+", " "),
    # A quad that has run into the next letter: 5,\quadx=2.
    (r"\\q?quad(?=[a-zA-Z])", " "),
    # A command escaped once too often: \\frac{1}{2}. (Not \\ before a letter: that ends a row.)
    (r"\\\\(?=(?:frac|sqrt|pi|text|left|right|cdot|times|infty|dfrac)" + END + ")", r"\\"),
    # The end of a row.
    (r"\\\\(?: *\[[^\[\]]*\])?", "\n"),
    # Mathematics inside text: $5$, \(5\), \$5.
    (r"\\?\$|\\[()\[\]]", " "),
    # A bracket that is not there: \left. x \right|.
    (r"\\(?:left|right)\s*\.", " "),
    # What takes space or colour: \hspace{1cm}, \color{red}{5}, \tag{1}, \phantom{0}.
    (r"\\(?:[hv]space|[hv]?phantom|(?:text)?color|colorbox|tag|label|style)\*? *\{[^{}]*\}", " "),
    # A function by pieces or a system in an array with one brace: \left\{ \begin{array}{l} 1, n=1
    # \\ 2, n>1 \end{array} \right.
    (r"\\\{ *\\begin *\{array\} *\{[lcr ]*\}((?s:(?:(?!\\end).)*))\\end *\{array\}"
     r"(?! *\\right *\\\})", CASES),
    # Blackboard letters of number sets: \mathbb{R}, \mathbb Z.
    (r"\\mathbb *\{? *([RZNQC]) *\}?", r"\\\1 "),
    (r"\\mathbb" + END, r"\\mathbf"),
    # Half of the line: \mathbb{R}^+, \mathbb{R}_{>0}, \mathbb{R}_{\ge 0}.
    (r"\\R *(?:\^ *\{? *\+ *\}?|_ *\{? *(?:> *0|\+) *\}?)", r"(0,\\infty)"),
    (r"\\R *_ *\{ *\\geq? *0 *\}", r"[0,\\infty)"),
    (" +", " "),
    # Empty groups hold a place: {}^\circ C.
    (r"(?<![_^a-zA-Z}\\])\{ *\}(?= *\^)", ""),
]
RULES = [
    # A font around one letter, or before anything: \mathbf{v}, {\bf 5}.
    (r"\\font *\{ *([a-zA-Z]) *\}|\\font" + END, r" \1"),
    # Escaped signs: 50\%, \&, and the empty set as braces.
    (r"\\([%#&_])", r"\1"),
    (r"\\\{ *\\\}", r"\\emptyset "),
    # The word before a choice: \text{Option B}.
    (r"^ *\\text *\{ *(?i:option|choice|answer)[ :]*\(? *([A-J]) *\)? *\}", r"\1"),
    # Words that say how well a number is known: \text{about } 5.
    (r"^ *(\\text *\{) *(?:about|around|approximately|approx\.?|roughly)() *(\}?)",
     without_speaker),
    # Who speaks: "The answer is 5", n \text{ is prime}. Words that turn the meaning stay.
    (r"^ *(\\text *\{)?(?![^{}$=]*\b" + TURNING + r"\b)[a-zA-Z' -]*(\\text *\{ *)?"
     r"\b(?:is|are|answer|equals)\b[ :]*(\}?) *:?(?=.*[0-9a-zA-Z])", without_speaker),
    # A choice or one letter in text is the letter: \text{(B)}, \mathrm{e}, \text{C.}
    (r"^\s*\\text *\{ *\(? *([a-zA-Z]) *[).]* *\} *$", r"\1"),
    (r"\\text *\{ *([eid]) *\}", r" \1 "),
    # Text without letters is what it holds: \text{204}, \text{-}5.
    (r"\\text *\{([^{}a-zA-ZµΩÅ°]*)\}", r"\1"),
    # A function's name in text, in Python or plain: \text{cis}, np.arcsin(2), sqrt(2), log_2 5.
    (r"\\text *\{ *(" + FUNCTION_NAMES + r") *\}", r"\\\1 "),
    (r"(?<![a-zA-Z\\])(?:np|math|sympy)\.(?=[a-z])", ""),
    (r"(?<![\\a-zA-Z])(" + FUNCTION_NAMES + r"|sqrt|pi(?![a-z])|infty(?![a-z]))"
     r"(?= *[^a-z ]|$| +[a-z])", r"\\\1 "),
    # sec and min are units too; before an argument they are functions: sec(x), but 12 sec, m/sec.
    (r"(?<![\\a-zA-Z])(?:\\text *\{ *(sec|min|max) *\}|(sec|min|max))"
     r"(?= *(?:[({0-9]|\\[a-zA-Z{]| [a-z](?![a-z])))", r"\\\1\2 "),
    # Digits in groups of three: 10{,}080, 11,\! 111,\! 100, 1\,000, 1 000. (A comma alone is judged
    # later.)
    (r"(?<![0-9.])[0-9]{1,3}(?:(?:\{,\}|,? *\\! *|\\[,;: ]| |~)[0-9]{3})+(?![0-9])", joined_digits),
    # Other spacing: 5\,cm, a\ b, a~b.
    (r"\\[,;:! >]|~", " "),
    (r"\{,\}", ","),
    # Alignment that carries no meaning: \begin{split} x&=5 \end{split}.
    # Names of the same sign: <=, !=, **, ..., 3*4.
    (r"\\(?:begin|end) *\{ *(?:aligned|align\*?|gathered|split|equation\*?) *\}|&(?= *=)", " "),
    (r"<=", r"\\le "), (r">=", r"\\ge "), (r"!=", r"\\ne "), (r"\*\*", "^"), (r"\*", r"\\cdot "),
    (r"\.\.\.+", r"\\ldots "),
    # The line without 0: \mathbb{R}^*.
    (r"\\R *\^ *\{? *\\cdot *\}?", r"\\R \\setminus \\{0\\}"),
    # Degrees and primes: 30^\circ, y^{\prime\prime}, 45^{\prime}.
    (r"\^ *\{? *\\circ" + END + r" *\}?", "°"),
    (r"\^ *\{ *((?:' *)+)\}|\^ *(?=')", r"\1"),
    (r"(?<=') +(?=')", ""),
    # Another spelling of a binomial: {n \choose k}. (An array of two in parentheses is judged
    # later.)
    (r"\{([^{}]*)\\choose" + END + r"([^{}]*)\}", r"\\binom{\1}{\2}"),
    # Residues: 5 \pmod{7}, 5 \text{ mod } 7, 5 (mod 7).
    (r"\(? *(?:\\text *\{ *mod *\}|(?<![a-zA-Z\\])mod)" + END + r" *([0-9a-zA-Z]+) *\)",
     r"\\mod \1"),
    (r"\\text *\{ *mod *\}|(?<![a-zA-Z\\])mod" + END, r"\\mod "),
    (r"\( *\\mod *([0-9a-zA-Z]+) *\)", r"\\mod \1"),
    # Derivatives on one line: dy/dx.
    (r"(?<![a-zA-Z\\])d([a-zA-Z]) */ *d([a-zA-Z])" + END, r"\\frac{d\1}{d\2}"),
    # The end of a last row: \begin{pmatrix} 1 \\ 2 \\ \end{pmatrix}.
    (r"\n *(?=\\end)", " "),
    # Units as a fraction: 30 \frac{\text{km}}{\text{h}}.
    (r"\\frac *\{ *\\text *\{([^{}]*)\} *\} *\{ *\\text *\{([^{}]*)\} *\}", r"\\text{\1/\2}"),
    # A letter x between a number and a power of ten: 3 x 10^8.
    (r"(?<=[0-9]) *(?:\\text *\{ *x *\}|x) *(?=10 *\^)", r"\\times "),
    # A number and words in one \text: \text{204 ways}.
    (r"^ *\\text *\{ *([-+]?[0-9][0-9,.]*) +([^{}]*)\} *$", r"\1\\text{\2}"),
    # And, or: \text{, and }, x>2 \land x<5, \text{ OR }.
    (r"\\text *\{[ ,;]*and *\}|(?<![a-zA-Z\\])and" + END, r"\\land "),
    (r"\\text *\{[ ,;]*or *\}|(?<![a-zA-Z\\])or" + END, r"\\lor "),
    (r"(?i:\\text *\{[ ,;]*OR *\})", r"\\lor "),
    (r"[,;] *(?=\\(?:land|lor)" + END + ")", " "),
    (r",(?: *,)+", ","),
    # What comes before: \textbf{Answer:} 5, Rs. 5, \approx 5, = 5.
    (r"^ *\\text *\{ *[a-zA-Z][a-zA-Z ]+: *\}", ""),
    (r"^ *\\text *\{ *(?:Rs\.?|USD|US|EUR|GBP|INR) *\} *(?=[0-9])", ""),
    (r"^[ :=]*(?:\\approx" + END + r")?[ =]*", ""),
    # Large numbers in words: 1.2 million, \text{ thousand}.
    (r"(?<=[0-9]) *\\text *\{ *(" + TENS + r")s? *\b", lambda m: power_of_ten(m) + r"\text{"),
    (r"(?<=[0-9]) *\b(" + TENS + r")\b", power_of_ten),
    (r"\\text *\{ *\}", ""),
    (r"(?:\\text *\{)? *\bpercent\b *\}?", "%"),
    # A mixed number on one line: 2 1/2.
    (r"(?<![0-9./^_{}\\a-zA-Z] )(?<![0-9./^_{}a-zA-Z\\])([0-9]+) +([0-9]+)/([0-9]+)(?![0-9])",
     r"\1\\frac{\2}{\3}"),
    # A list of statements: (1)(3)(4).
    (r"^ *(?:\( *[0-9] *\) *){2,}$", statements),
    # Roman numerals are names: I and II, (ii).
    (r"^ *(?:\\text *\{ *)?\( *(i{2,3}|iv|vi{0,3}) *\) *\}? *$", r"\\text{\1}"),
    (ITEM + r"([IVX]{2,4})" + ITEM_END, r"\\text{\1}"),
    # Plain words are text, and a list of words is a list: Alice, Bob.
    (ITEM + r"([A-Z][a-z]{2}|[A-Za-z][A-Za-z' .-]*?[a-z]{3}[A-Za-z' .-]*?)" + ITEM_END,
     r"\\text{\1}"),
    # Number sets in words: all real numbers except 2.
    (r"\\text *\{ *(?i:all +real +numbers|all +reals) except *\} *([^,]+)$",
     r"\\R \\setminus \\{\1\\}"),
    (r"\\text *\{ *(?i:all +real +numbers|all +reals|real +numbers) *\}", r"\\R "),
    (r"\\text *\{ *(?i:all +integers) *\}", r"\\Z "),
    (r"\\text *\{((?:[^{},;\\]*(?:[,;]|\\land|\\lor))+[^{}]*)\}", split_words),
    (" +", " "),
]
FIRST_RULES = [(re.compile(pattern), new) for pattern, new in FIRST_RULES]
RULES = [(re.compile(pattern), new) for pattern, new in RULES]


@functools.lru_cache(65_536)
def normalise(text):
    """The one spelling of an answer."""
    text = plain_characters(text)
    for pattern, new in FIRST_RULES:
        text = pattern.sub(new, text)
    text = COMMAND.sub(one_name, text)
    for pattern, new in RULES:
        text = pattern.sub(new, text)
    return text.strip().rstrip(" .,;")


def is_wordy(text):
    return bool(re.search(r"\\text *\{ *[a-zA-Z]+ *[a-zA-Z]|(?<![\\a-zA-Z])[a-zA-Z][a-z]{3}", text))


def fold(text):
    """The letters and signs of a text of words: for comparing 'No solution.' and \\text{no
    solution}."""
    text = re.sub(r"\\text *\{((?:[^{}]|\{[^{}]*\})*)\}", r"\1", text)
    return re.sub(r"\s|(?<![0-9])\.(?![0-9])", "", text).casefold()


# -------------------------------------------------------------------------------------------- units
def listing(text):
    return set(text.split())


PREFIX_LETTERS = {*"kMGm"}
PREFIXES = "da|[YZEPTGMkhdcmunpfaµμ]"
# With a prefix or without: km, kHz, MeV, mol, dB, Mpc.
METRIC = ("m|g|s|A|K|mol|cd|Hz|N|Pa|J|W|C|V|F|Ω|S|Wb|T|H|lm|lx|Bq|Gy|Sv|L|l|eV|bar|b|B|cal|pc|Da|M"
          "|dyn|ohm|Wh|yr|bit|byte|bps")
METRIC_UNIT = re.compile(f"(?:{PREFIXES})?(?:{METRIC})")
# Abbreviations, spelled as they are.
SIGNS = listing("""
    Å ft in yd mi oz lb lbs mph kph rpm fps cc min sec secs hr hrs h d yrs wk mo rad sr deg
    atm torr psi Torr mmHg amu u AU ly gal qt pt tsp tbsp ppm ppb kbps Mbps USD US EUR GBP CNY
    RMB INR Rs AUD CAD JPY erg ergs esu statC G Oe Mx R Btu BTU hp Ah cP Ci cfu nat nats KB MB
    GB TB px sq cu
    """)
# Words that stand beside a unit and leave the number as it is: "square cm", "per hour", "in total",
# "5 cm long".
FILLERS = listing("""
    square cubic per of each total altogether exact exactly approximately about the a an by
    long wide tall high deep old away apart
    """)
# Those that may stand alone: "5 (exact)".
ENOUGH = {"exact", "exactly", "total", "approximately"}
# Words, in either case and number. "tenths", "lakh", "doubled", "below" are not here: they change
# the value.
WORDS = listing("""
    meter metre centimeter centimetre millimeter millimetre kilometer kilometre micrometer
    micron nanometer inch foot feet yard mile angstrom parsec lightyear light-year fathom
    furlong acre hectare liter litre milliliter millilitre gallon quart pint cup ounce pound
    ton tonne gram kilogram milligram microgram stone grain carat second minute hour day week
    fortnight month year decade century centuries millisecond microsecond nanosecond degree
    radian steradian arcminute arcsecond celsius fahrenheit kelvin newton joule kilojoule watt
    kilowatt megawatt volt ampere amp ohm farad henry tesla gauss weber hertz kilohertz
    megahertz gigahertz pascal kilopascal coulomb mole molar lumen lux candela becquerel curie
    gray sievert calorie kilocalorie electronvolt knot revolution turn cycle rotation
    atmosphere erg dyne solar mass masses luminosity luminosities jansky magnitude kmph dollar
    cent penny pennies nickel dime euro yuan yen rupee ruble rouble peso franc mark won buck
    unit cube piece item object thing copy copies way pair triple triplet quadruple solution
    roots number integer value case point line segment side edge vertex vertices face angle
    triangle rectangle polygon circle region term digit factor divisor multiple zeros zeroes
    set subset element sequence permutation combination arrangement function polynomial
    possibility possibilities outcome tuple path route step move game round match matches race
    trip time person people man men woman women child children boy girl student teacher pupil
    worker member player team family families friend guest passenger customer adult kid senior
    employee soldier farmer monkey rabbit duck hen goose geese chicken cow horse sheep pig
    goat dog cat puppy puppies kitten bird fish mouse mice animal insect spider bee ant egg
    apple orange banana pear peach plum lemon melon watermelon grape cherry cherries berry
    berries strawberry strawberries blueberry blueberries potato potatoes tomato tomatoes
    carrot pumpkin vegetable fruit nut cookie cake cupcake pie pizza sandwich sandwiches slice
    muffin donut doughnut candy candies chocolate sweet lollipop gumball bread loaf loaves
    bagel burger taco meal serving bottle can jar glass glasses bag box boxes basket crate
    carton bucket barrel tank package pack packet bundle stack pile row column page book
    magazine newspaper letter word sentence chapter paper sheet notebook pen pencil crayon
    marker eraser sticker stamp card ticket coin bill toy doll ball balloon marble bead block
    brick tile board plank stick rope string ribbon button shirt dress dresses shoe sock hat
    coat car truck bus buses bike bicycle train plane boat ship wheel tire house room floor
    window door chair table desk bed lamp tree plant flower rose tulip leaf leaves seed branch
    branches garden field school class classes classroom city cities town country countries
    street road shop store movie song video photo picture question problem test goal shot hit
    run lap ride visit call message email phone computer robot machine tool nail screw ring
    necklace bracelet gift present prize medal flag sign star planet shell rock drop shelf
    shelves seat place position spot lesson session shift job task project hole tooth teeth
    hand finger leg head eye state
    """)
# Without \text, behind a number and nowhere else: 30 km, 12\pi cm^3. Not mg, ms, mV: these are
# products, too.
PLAIN = listing("""
    cm mm km nm kg Hz kHz MHz GHz eV keV MeV GeV ft mph min sec secs hr hrs rad mol lbs yrs
    kmph USD cents
    """)
SPEED = r"(?:[ck]?m|ft|mi|km) */ *(?:s|h|min|sec|hr)" + END
UNIT_ELEMENT = re.compile(TEXT + r"|\^ *(?:\{ *[-+]? *[0-9] *\}|[0-9])"
                          r"|[MLR]? *_ *\{? *\\odot *\}?|" + SPEED
                          + r"|\\[a-zA-Z]+|[a-zA-Z]+|[^ ]")
JOINTS = {"/", "-", r"\cdot", r"\times"}  # between units, as are exponents and \odot
UNIT_PIECE = re.compile(r"\^ *\{? *[-+]? *[0-9]+ *\}?|[A-Za-zµμΩÅ][A-Za-zµμΩÅ'-]*|[0-9]+|[^ ]")


def is_unit_word(word):
    """cm, kHz, Dollars, M: a declared unit, abbreviated or in words, in one of its numbers."""
    if word in SIGNS or METRIC_UNIT.fullmatch(word):
        return True
    word = word.lower()
    return bool({word, word.removesuffix("s"), word.removesuffix("es")} & WORDS)


def is_unit_text(text):
    """Does a \\text{...} hold declared units only? 'm/s^2', ' square cm', 'erg s^{-1}' do; 'plus
    one' does not."""
    for command, character in ((r"\mu", "µ"), (r"\Omega", "Ω"), (r"\cdot", " ")):
        text = re.sub(re.escape(command) + " *", character, text)
    pieces = UNIT_PIECE.findall(text)
    words = [piece for piece in pieces if piece[0].isalpha()]
    signs = [piece for piece in pieces if not piece[0].isalpha() and piece[0] not in "^./()°-"]
    if signs or not words:
        return False
    units = [word for word in words if word not in FILLERS]
    return all(map(is_unit_word, units)) if units else words[-1] in ENOUGH


def is_unit(element, before, behind):
    """Is one element of an answer a unit, given the one before it and whether a unit is behind
    it?"""
    if element[0] == "\\":
        text = re.fullmatch(TEXT, element)
        if not text:
            return element in (r"\mu", r"\Omega")
        prefix = behind and text[1].strip() in PREFIX_LETTERS     # \text{k}\Omega
        return prefix or is_unit_text(text[1])
    if element == "°":
        return behind                                             # 30 °C; in \sin 30° it counts
    if element in ("C", "F", "K"):
        return before == "°"
    if element in FILLERS and len(element) > 3:
        return behind                                             # 48 square inches
    return is_plain_unit(element)


def is_plain_unit(element):
    if not element[0].isalpha():
        return False
    if element.endswith(("odot", "odot}")):
        return True                                               # M_\odot, solar masses
    return element in PLAIN or "/" in element or len(element) > 3 and is_unit_word(element)


def split_unit(text):
    """(number, unit) of an answer, by declared units only: '5 \\text{ cm}^2' -> ('5', '\\text{
    cm}^2')."""
    elements = list(UNIT_ELEMENT.finditer(text))
    cut = len(elements)
    plain = False
    for k in range(len(elements) - 1, 0, -1):
        element = elements[k][0]
        if element in JOINTS or element[0] in "^_":
            continue  # it joins the unit to its left, if there is one
        if not is_unit(element, elements[k - 1][0], k + 1 == cut < len(elements)):
            break
        cut = k
        plain = plain or is_plain_unit(element)
    if cut == len(elements):
        return text, ""
    start = elements[cut].start()
    number = re.sub(r"(?: |/|\\cdot|\\times|-)+$", "", text[:start])
    letters = re.sub(r"\\[a-zA-Z]+|e", "", number)
    bare = re.sub(TEXT, "", number)
    if not re.search("[0-9a-zA-Z]", bare) or number[-1] in ",;:(=":
        return text, ""
    if plain and re.search("[a-zA-Z]", letters):
        return text, ""
    return number, text[start:]


# --------------------------------------------------------------------------------------- qualifiers
OPEN_TEXT = r"[ ,;]*(?:\\text *\{)?[ ,;(]*"
NAMED = r"[a-zA-Z](?:_\{?[a-zA-Z0-9]\}?)?"
NUMBER_SET = r"\\?[RZNQC] *(?:\^ *\{? *(?:[-+*]|\\cdot) *\}?|_ *\{? *[^{} ]+ *\}?|[+])? *"
QUALIFIERS = [re.compile(pattern) for pattern in (
    # f(x)=x \text{ for all real } x, ... for some a>0
    OPEN_TEXT + r"(?<!\\)\bfor *\}? *(?:\\text *\{)? *"
    r"(?:all|any|every|each|some|arbitrary|integers?|reals?|positive)\b[^=;]*$",
    # 2^n-1 \text{ for } n \ge 1
    OPEN_TEXT + rf"(?<!\\)\bfor *\}}? *{NAMED} *(?:\\ge|\\le|\\in|\\ne|>|<)[^=,;]*$",
    # f(x)=x+c \text{ where } c \text{ is a constant}
    OPEN_TEXT + r"\b(?:where|with)\b[^=;]*"
    r"\b(?:constants?|integers?|reals?|numbers?|arbitrary|parameters?)\b[^=;]*$",
    # f(x)=x \quad \forall x \in \mathbb{R}
    r"[ ,;(]*\\forall" + END + ".*$",
    # f(x)=x+c, c\in\mathbb{R}; k\pi (k \in \mathbb{Z})
    rf"[,;(] *{NAMED}(?: *, *{NAMED})* *\\in *{NUMBER_SET}\)?$",
)]


LIMITING = re.compile(r"\b(?:not|only|otherwise|else|except)\b")


def split_qualifier(text):
    """(answer, qualifier): what only says for which values the answer stands is taken off its
    end."""
    for pattern in QUALIFIERS:
        found = pattern.search(text)
        if found and found.start() > 0 and not LIMITING.search(found[0]):
            return text[:found.start()].rstrip(" ,;"), found[0]
    return text, ""
