"""Units and nouns behind a number: which words may stand there, and which are the same."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction


def words(text: str) -> frozenset[str]:
    """The words of a text, as a set."""
    return frozenset(text.split())


_SPELLINGS = {
    "mm": "millimeter millimetre", "cm": "centimeter centimetre", "m": "meter metre",
    "km": "kilometer kilometre", "in": "inch", "ft": "foot feet", "yd": "yard", "mi": "mile",
    "mg": "milligram", "g": "gram gm", "kg": "kilogram kilo", "lb": "pound", "oz": "ounce",
    "s": "second sec", "min": "minute", "h": "hour hr", "day": "", "week": "", "month": "",
    "yr": "year", "ml": "milliliter millilitre", "l": "liter litre", "gal": "gallon",
    "mi/h": "mph", "km/h": "kph kmh kmph", "dollar": "usd buck", "cent": "", "euro": "eur",
    "pound sterling": "gbp", "rupee": "rs inr", "degree": "deg", "radian": "rad",
    "percent": "pct percentage", "sq": "square", "cu": "cubic", "": "unit", "hz": "hertz",
    "kw": "kilowatt", "acre": "",
}  # fmt: skip
_CANONICAL = {
    spelling: unit for unit, names in _SPELLINGS.items() for spelling in (unit, *names.split())
}
# Short forms that are taken for a unit where they stand without \text{}.
_BARE = frozenset(
    spelling for spelling in _CANONICAL if len(spelling) > 1 and spelling not in ("sq", "cu", "min")
)
_IRREGULAR = {
    "feet": "foot", "inches": "inch", "people": "person", "children": "child", "men": "man",
    "women": "woman", "pennies": "penny", "mice": "mouse", "dice": "die", "halves": "half",
}  # fmt: skip
# Words that change what is said: with one of them behind it, a number is not an amount.
_SAYS_MORE = words(
    "and or plus minus times if when where while else otherwise for to from mod modulo not no more"
    " less least most than at between half quarter third squared cubed factorial divided over"
    " multiplied by is are was equals but either neither both except unless until given with"
    " without as the power root maybe perhaps possibly respectively through up down only none all"
    " any each every base choose negative below above imaginary wrong never twice thrice"
    " zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
    " sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety"
    " ones twos threes fours fives sixes sevens eights nines tens twenties"
)
_MULTIPLIERS = {
    "dozen": 12, "hundred": 100, "thousand": 1000, "lakh": 10**5, "million": 10**6,
    "crore": 10**7, "billion": 10**9, "bn": 10**9, "trillion": 10**12,
}  # fmt: skip
_PARTS = {
    "half": 2, "third": 3, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8,
    "ninth": 9, "tenth": 10, "eleventh": 11, "twelfth": 12, "sixteenth": 16, "twentieth": 20,
    "hundredth": 100, "thousandth": 1000, "millionth": 10**6, "billionth": 10**9,
}  # fmt: skip
# Words that change an amount where they end what is said, and else may be part of a noun: "binary"
# but "binary strings", "fifth" but "fifth graders".
_ENDS_AS_MORE = _PARTS.keys() | words(
    "binary octal hex hexadecimal double doubled tripled quadrupled halved false incorrect"
)
CURRENCIES = {"$": "dollar", "€": "euro", "£": "pound sterling", "¥": "yen", "₹": "rupee"}
ORDINALS = frozenset(("st", "nd", "rd", "th"))
_MOST_WORDS = 5


def is_unit(word: str) -> bool:
    """Whether a word in small letters is a unit where it stands bare behind a number."""
    return word in _BARE or singular(word) in _BARE


def singular(word: str) -> str:
    """A noun's singular, by the common rules of English."""
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("ches", "shes", "sses", "xes")):
        return word[:-2]
    if word.endswith("s") and not word.endswith("ss") and len(word) > 2:
        return word[:-1]
    return word


def multiplier(said: Sequence[str]) -> tuple[Fraction, int]:
    """The factor that the first words behind a number are, and how many words they are: hundred
    thousand and dozens, or thousandths alone, as hundred thousandths are read in two ways."""
    factor = Fraction(1)
    for i, word in enumerate(said):
        small = word.casefold()
        if i == 0 and _is_parts(small):
            return Fraction(1, _PARTS[singular(small)]), 1
        if singular(small) not in _MULTIPLIERS:
            return factor, i
        factor *= _MULTIPLIERS[singular(small)]
    return factor, len(said)


def _is_parts(word: str) -> bool:
    """Tenths and the like; a tenth alone may be the one behind the ninth."""
    return singular(word) in _PARTS and word not in _PARTS


def _says_more(word: str, final: bool) -> bool:
    head = word.rpartition("-")[2]  # what ten-thousandths are, and twenty-six at the end is
    said = head if final else word
    if said in _SAYS_MORE or (final and said in _ENDS_AS_MORE):
        return True
    return singular(said) in _MULTIPLIERS or _is_parts(head)


def unit_of(phrase: str) -> str | None:
    """The unit or noun that a phrase names, in one spelling ("" for "units", "th" and the like);
    None if the phrase says something else. Words are separated by blanks; "/", "*" and "^2" may
    stand between and behind them."""
    text = phrase.casefold().replace("*", " ").replace(".", "").replace("{", "").replace("}", "")
    if text.strip("^ ") in ORDINALS:
        return ""
    found = re.findall(r"[^\W\d_]+(?:[-'][^\W\d_]+)*|\^-?[0-9]+|\S", text)
    if not found or len(found) > _MOST_WORDS * 2:
        return None
    parts: list[str] = []
    power = ""
    for i, word in enumerate(found):
        if word in ("/", "per"):
            parts.append("/")
        elif word.startswith("^") and parts and len(word) > 1:
            parts[-1] += word if parts[-1] else ""
        elif word in ("squared", "cubed") and parts:
            parts[-1] += ("^2" if word == "squared" else "^3") if parts[-1] else ""
        elif not word[0].isalpha() or _says_more(word, i == len(found) - 1):
            return None
        elif word in ("a", "an", "of"):
            continue
        else:
            unit = _CANONICAL.get(word, _CANONICAL.get(singular(word), singular(word)))
            if unit in ("sq", "cu"):
                power = "^2" if unit == "sq" else "^3"
                continue
            parts.append(unit + power if unit else "")
            power = ""
    return " ".join(part for part in parts if part).replace(" / ", "/")
