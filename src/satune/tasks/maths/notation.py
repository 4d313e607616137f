r"""What is written in a box as a list of tokens: one spelling for what can be spelt in many ways.

Signs of Unicode become LaTeX, spacing and layout commands vanish, the text inside ``\text{}``
becomes words, digits become whole numbers. One pass, in time linear in the text.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Literal, NamedTuple

from satune.tasks.maths.units import ORDINALS, is_unit, words

Kind = Literal["number", "letter", "initial", "word", "bare", "command", "sign", "begin", "end"]


class Token(NamedTuple):
    r"""One token. ``bare`` is a run of letters outside ``\text{}`` that looks like a word,
    ``initial`` a single letter inside; a command's text has no backslash; a number reads 12.5 or,
    with a period, 0.1(6)."""

    kind: Kind
    text: str
    blank: bool = False
    """Whether a blank stands before it."""


FUNCTIONS = words(
    "sin cos tan cot sec csc arcsin arccos arctan arccot arcsec arccsc sinh cosh tanh coth"
    " arsinh arcosh artanh arcsinh arccosh arctanh log ln lg exp"
)
GREEK = words(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi"
    " rho sigma tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi"
    " Omega ell"
)
_SPOKEN = FUNCTIONS | GREEK | {"sqrt", "pi"}  # commands that people write without the backslash

_SAME_COMMAND = {
    **dict.fromkeys(("dfrac", "tfrac", "cfrac", "nicefrac", "sfrac"), "frac"),
    **dict.fromkeys(("dbinom", "tbinom"), "binom"),
    **dict.fromkeys(("leq", "leqslant", "leqq"), "le"),
    **dict.fromkeys(("geq", "geqslant", "geqq"), "ge"),
    **dict.fromkeys(("times", "cdotp", "ast", "bullet"), "cdot"),
    **dict.fromkeys(("approxeq", "simeq", "doteq"), "approx"),
    **dict.fromkeys(("lvert", "rvert", "vert"), "|"),
    **dict.fromkeys(("ldots", "cdots"), "dots"),
    **dict.fromkeys(("land", "wedge"), "and"),
    **dict.fromkeys(("lor", "vee"), "or"),
    **dict.fromkeys(("varnothing", "O"), "emptyset"),
    **dict.fromkeys(("lbrace", "lcurly"), "{"),
    **dict.fromkeys(("rbrace", "rcurly"), "}"),
    "neq": "ne", "infin": "infty", "lbrack": "[", "rbrack": "]", "lparen": "(", "rparen": ")",
    "lt": "<", "gt": ">", "div": "/", "colon": ":", "backslash": "setminus", "operatorname*":
    "operatorname", "widehat": "hat", "widetilde": "tilde", "lang": "langle", "rang": "rangle",
    "overrightarrow": "vec",
}  # fmt: skip
# Commands that stand for a sign; \{ and \} differ from braces, which only group.
_SIGNS = {
    "{": "\\{", "}": "\\}", "[": "[", "]": "]", "(": "(", ")": ")", "|": "|", "<": "<", ">": ">",
    "/": "/", ":": ":", "%": "%", "$": "$", "&": "and", "cdot": "*",
}  # fmt: skip
_DROPPED = words(
    "left right middle big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr Biggl Biggr displaystyle"
    " textstyle scriptstyle limits nolimits bf rm it sf tt em bfseries itshape boldmath large Large"
    " LARGE huge Huge small normalsize tiny centering mathbf boldsymbol bm pmb mathit mathsf mathtt"
    " mathnormal underline uline boxed fbox ensuremath mathop mathord mathbin mathrel mathstrut"
    " strut hline therefore implies Rightarrow Longrightarrow notag nonumber emph overbrace"
    " underbrace angle measuredangle triangle mathopen mathclose mathinner smash"
)
_TEXT = words("text textbf textit textrm textsf texttt textnormal textup mbox hbox")
_ROMAN = frozenset(("mathrm", "operatorname"))
_SKIPPED = words("color colorbox textcolor hspace vspace phantom hphantom vphantom label tag")

_THOUSANDS = r"[0-9]{1,3}(?:(?:%s)[0-9]{3})+(?![0-9]|,[0-9])"
_ALPHABETIC = words("word bare letter initial")
_BLANK = r"\s|~|\\[,;:> ]|\\(?:quad|qquad|thinspace|medspace|enspace)(?![A-Za-z])"


def _scanner(separators: str) -> re.Pattern[str]:
    return re.compile(
        rf"""(?P<blank>(?:{_BLANK})+)
        |(?P<nothing>\\!|\$|`|\\[\[\]()]|\\(?:left|right)\s*\.)
        |(?P<row>\\\\(?:\s{{0,9}}\[[^\[\]]{{0,20}}\])?)
        |\\(?P<edge>begin|end)\s{{0,9}}\{{(?P<environment>[A-Za-z]{{1,20}}\*?)\}}
        |\\(?P<command>[A-Za-z]+\*?|.)
        |(?P<number>(?P<whole>{_THOUSANDS % separators}|[0-9]+|(?=\.[0-9]))
            (?P<part>\.[0-9]*
                (?:\\(?:overline|bar|dot)\s?\{{?(?P<period>[0-9]+)\}}?
                |(?<=[0-9]{{3}})(?P<dots>\.\.\.|\\(?:ldots|dots|cdots)))
              |\.[0-9]+)?)
        |(?P<meridiem>[AaPp]\.\s?[Mm](?![A-Za-z])\.?)
        |(?P<letters>[^\W\d_]+(?:[-'][^\W\d_]+)*)
        |(?P<sign>.)""",
        re.DOTALL | re.VERBOSE,
    )


_OUTSIDE = _scanner(r",\\!|\{,\}|\\,|\\\s|~|\s|,")
# Inside brackets a plain comma separates: (1,200) is a pair.
_INSIDE = _scanner(r",\\!|\{,\}|\\,|\\\s|~|\s")


def tokens_of(text: str) -> list[Token]:
    """The tokens of an answer."""
    text = re.sub(r"(?<=[0-9])(?:\\!)+(?=[0-9])", "", _latex(text))  # drawn nearer, still digits
    if "\\begin" not in text:
        text = re.sub(r"\\\\(?=[A-Za-z])", r"\\", text)  # escaped once too often
    return _Lexer(text).tokens


class _Lexer:
    def __init__(self, text: str) -> None:
        self.tokens: list[Token] = []
        self._blank = False
        self._mode = "math"
        self._next_mode: str | None = None
        # The modes around each open group, and where its tokens begin.
        self._groups: list[tuple[str, int]] = []
        self._brackets = 0
        at = 0
        while at < len(text):
            scanner = _INSIDE if self._brackets > 0 else _OUTSIDE
            found = scanner.match(text, at)
            assert found is not None  # the last alternative takes any character
            at = found.end()
            if found["letters"] and self._mode == "math":
                # Hyphens and apostrophes belong to words of texts only.
                run = re.match(r"[^\W\d_]+", found["letters"])
                assert run is not None
                at = found.start() + run.end()
            self._take(found, text[found.start() : at])

    def _take(self, found: re.Match[str], text: str) -> None:
        if found["blank"] is not None:
            self._blank = True
            return
        if found["nothing"] is not None:
            return
        mode, self._next_mode = self._next_mode, None
        if text == "{":
            self._groups.append((self._mode, len(self.tokens)))
            self._mode = mode or self._mode
            if self._mode == "math":
                self._emit("sign", "{")
        elif text == "}" and self._groups:
            if self._mode == "math":
                self._emit("sign", "}")
            elif self._mode == "text":
                self._close_text(self._groups[-1][1])
            self._mode = self._groups.pop()[0]
        elif self._mode != "skip":
            self._inner(found, text)

    def _inner(self, found: re.Match[str], text: str) -> None:
        if found["row"] is not None:
            self._emit("command", "\\")
        elif found["edge"] is not None:
            name = found["environment"].rstrip("*")
            self._emit("begin" if found["edge"] == "begin" else "end", name)
            self._next_mode = "skip" if found["edge"] == "begin" and name == "array" else None
        elif found["command"] is not None:
            self._command(found["command"])
        elif found["number"] is not None:
            self._emit("number", _number(found))
        elif found["meridiem"] is not None:
            self._emit("word", text[0] + "m")
        elif found["letters"] is not None:
            self._letters(text)
        else:
            self._brackets += (text in "([") - (text in ")]")
            self._emit("sign", text)

    def _command(self, name: str) -> None:
        name = _SAME_COMMAND.get(name, name)
        if name in _TEXT:
            self._next_mode = "text"
        elif name in _ROMAN:
            self._next_mode = "roman"
        elif name in _SKIPPED:
            self._next_mode = "skip"
        elif name in ("and", "or"):
            self._emit("word", name)
        elif name in ("degree", "textdegree"):
            self._emit("sign", "^")
            self._emit("command", "circ")
        elif name in _SIGNS:
            sign = _SIGNS[name]
            self._brackets += (sign in ("\\{", "(", "[")) - (sign in ("\\}", ")", "]"))
            self._emit("sign", sign)
        elif name not in _DROPPED:
            self._emit("command", name)

    def _letters(self, run: str) -> None:
        small = run.casefold()
        directly = bool(self.tokens) and self.tokens[-1].kind == "number" and not self._blank
        if self._mode != "math" and len(run) == 1:
            self._emit("initial", run)
        elif self._mode == "text" or small in ("and", "or") or (small in ORDINALS and directly):
            self._emit("word", run)
        elif run in _SPOKEN:
            self._emit("command", run)
        elif small in ("infinity", "infty"):
            self._emit("command", "infty")
        elif self._mode == "roman" and len(run) > 1:
            self._emit("word", run)
        elif _looks_like_a_word(run):
            self._emit("bare", run)
        else:
            for letter in run:
                self._emit("letter", letter)

    def _close_text(self, start: int) -> None:
        """Single letters among words are words: "a dog"."""
        inside = self.tokens[start:]
        if any(t.kind == "word" and t.text.casefold() not in ("and", "or") for t in inside):
            self.tokens[start:] = [
                t._replace(kind="word") if t.kind == "initial" else t for t in inside
            ]

    def _emit(self, kind: Kind, text: str) -> None:
        self.tokens.append(Token(kind, text, self._blank))
        self._blank = False


def dense(tokens: Sequence[Token]) -> str:
    """The tokens without blanks, except before and behind words."""
    parts: list[str] = []
    for before, token in zip((None, *tokens), tokens, strict=False):
        kinds = {before.kind, token.kind} if before else set[str]()
        if kinds <= _ALPHABETIC and kinds & {"word", "bare"}:
            parts.append(" ")
        parts.append(f"\\{token.text}" if token.kind in ("command", "begin", "end") else token.text)
    return "".join(parts)


def _looks_like_a_word(run: str) -> bool:
    """Whether letters side by side are a word or a unit, not a product of variables: products
    have one or two letters, no vowel, or letters that are neighbours in the alphabet."""
    small = run.casefold()
    if small == "no" or (len(run) > 1 and is_unit(small)):
        return True
    if len(run) < 3 or not any(vowel in small for vowel in "aeiou"):
        return False
    return len(run) > 4 or ord(max(small)) - ord(min(small)) > 3


def _number(found: re.Match[str]) -> str:
    whole = re.sub(r"[^0-9]", "", found["whole"]) or "0"
    part = re.match(r"\.?([0-9]*)", found["part"] or "")
    assert part is not None
    if found["period"]:
        return f"{whole}.{part[1]}({found['period']})"
    if found["dots"]:
        # 0.333..., 0.1666... and 0.1212... show their period twice, or three times if it is short.
        shown = re.fullmatch(r"([0-9]*?)(?:([0-9])\2{2,}|([0-9]{2,9}?)\3+)", part[1][-40:])
        if shown and len(part[1]) <= 40:
            return f"{whole}.{shown[1]}({shown[2] or shown[3]})"
    return f"{whole}.{part[1]}" if part[1] else whole


_LATEX = {
    **dict.fromkeys("°˚º", "^\\circ "), **dict.fromkeys("−–—‒‐‑﹣⁻₋", "-"),
    **dict.fromkeys("·⋅∙•×✕⨯", "\\cdot "), **dict.fromkeys("÷∕⁄", "/"),
    **dict.fromkeys("≤⩽≦", "\\le "), **dict.fromkeys("≥⩾≧", "\\ge "),
    **dict.fromkeys("≈≅≃", "\\approx "), **dict.fromkeys("∅⌀", "\\emptyset "),
    **dict.fromkeys("…⋯", "..."), **dict.fromkeys("′’‘", "'"), **dict.fromkeys("⟨〈", "\\langle "),
    **dict.fromkeys("⟩〉", "\\rangle "), **dict.fromkeys("、", ","), **dict.fromkeys("。", "."),
    "√": "\\surd ", "∛": "\\sqrt[3]", "∜": "\\sqrt[4]", "∞": "\\infty ", "±": "\\pm ",
    "∓": "\\mp ", "≠": "\\ne ", "∪": "\\cup ", "∩": "\\cap ", "∈": "\\in ", "∖": "\\setminus ",
    "ℝ": "\\mathbb{R}", "∧": "\\and ", "∨": "\\or ", "⌊": "\\lfloor ", "⌋": "\\rfloor ",
    "⌈": "\\lceil ", "⌉": "\\rceil ", "ϕ": "\\phi ", "ϵ": "\\epsilon ", "∣": "|",
}  # fmt: skip


def _latex(text: str) -> str:
    """The text with Unicode's signs, scripts, fractions and styled letters in LaTeX."""
    return re.sub(r"[^\x00-\x7f]+", lambda found: _latex_of(found[0]), text)


def _latex_of(run: str) -> str:
    parts: list[str] = []
    script = ""  # the script that is open: ^, _ or none
    for character in run:
        form, _, codes = unicodedata.decomposition(character).partition(" ")
        known = _LATEX.get(character)
        wanted = {"<super>": "^", "<sub>": "_"}.get(form, "")
        if known is not None and wanted and character == "º":
            wanted = ""  # an ordinal's sign, written for a degree's
        if script and wanted != script:
            parts.append("}")
        if wanted and wanted != script:
            parts.append(wanted + "{")
        script = wanted
        if known is not None:
            parts.append(known)
        elif form == "<fraction>":
            upper, _, lower = unicodedata.normalize("NFKC", character).partition("\u2044")
            parts.append(f"\\frac{{{upper}}}{{{lower or '1'}}}")
        elif unicodedata.category(character) in ("Cf", "Mn"):
            pass
        else:
            parts.append(
                "".join(_plain(c, codes) for c in unicodedata.normalize("NFKC", character))
            )
    return "".join(parts) + ("}" if script else "")


def _plain(character: str, codes: str) -> str:
    digit = unicodedata.decimal(character, None)
    if digit is not None:
        return str(digit)
    name = unicodedata.name(character, "")
    found = re.fullmatch(r"GREEK (SMALL|CAPITAL) LETTER (?:FINAL )?([A-Z]+)", name)
    if found:
        letter = {"LAMDA": "LAMBDA"}.get(found[2], found[2]).lower()
        if letter == "pi" and found[1] == "SMALL":
            return "\\pi "
        command = letter if found[1] == "SMALL" else letter.capitalize()
        if command in GREEK:
            return f"\\{command} "
    return _LATEX.get(character, character)
