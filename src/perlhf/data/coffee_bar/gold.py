"""The gold scorer of the embedded coffee-bar feedback: seven rules that read nothing but the prompt and the completion.

It stands for what people really want in the simulated task, which a reward model only sees through noisy labels.
Every rule is a matter of words and phrases; there is no arithmetic in the task. Limits: items are known by the names
below, each once in an order, and a kind or rude word is one of those listed.
"""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from perlhf.data.records import Text

RULES = ("items", "details", "only_ordered", "courteous", "civil", "closing", "concise")
MAX_WORDS, FAR_TOO_MANY_WORDS = 40, 60

SIZES, MILKS = ("small", "medium", "large"), ("oat", "almond", "soy", "coconut", "whole milk", "skim milk")
SYRUPS, TWEAKS = ("vanilla", "caramel", "hazelnut"), ("decaf", "iced", "extra hot", "extra shot")
TOPPINGS = ("toasted", "butter", "jam")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_SLOTS = [set(slot) for slot in (SIZES, MILKS, SYRUPS, NUMBERS)]
SERVICES = {"go": ("to go", "takeaway"), "stay": ("for here", "to stay")}

_MILKY = (SIZES, MILKS[:4], SYRUPS, TWEAKS)
MENU: dict[str, tuple[tuple[str, ...], ...]] = {
    **dict.fromkeys(("latte", "cappuccino", "flat white", "mocha", "macchiato", "chai latte"), _MILKY),
    **dict.fromkeys(("americano", "cold brew"), (SIZES, SYRUPS, ("decaf", "extra shot"))),
    **dict.fromkeys(("espresso", "cortado"), (("decaf",),)),
    "hot chocolate": (SIZES, MILKS[:4]),
    "green tea": (SIZES, ("iced",)),
    "lemonade": (SIZES,),
    **dict.fromkeys(("croissant", "bagel", "scone"), (TOPPINGS,)),
    **dict.fromkeys(("muffin", "brownie", "cookie", "cinnamon roll", "ham sandwich"), ()),
}
ITEMS = tuple(MENU)
_NOT_SOLD = ("donut", "cake", "cheesecake", "pie", "pancake", "waffle", "juice", "smoothie", "soda", "pizza")

_ITEM = re.compile(rf"\b({'|'.join(sorted(ITEMS + _NOT_SOLD, key=len, reverse=True))})(?:es|s)?\b")
_DETAIL = re.compile(rf"\b({'|'.join(SIZES + MILKS + SYRUPS + TWEAKS + TOPPINGS)})\b")
_NUMBER = re.compile(rf"\b(an?|{'|'.join(NUMBERS)}|\d+)\b")
_SERVICE = re.compile(r"(?<!ready )\b(?:(to go|takeaway|take away|take out)|(for here|to stay|eat in|drink in))\b")
_REMOVED = re.compile(
    r"\b(?:no more|no|without|(?:cancel|skip|drop|remov)\w*|(?:leave|leaving|left) out)(?: the| a| that| your| my)? *$"
)
_SENTENCE = re.compile(r"[^.!?\n]+[.!?]*")
_CHUNK_END = re.compile(r"[,;:()&]| - |\b(?:and|plus|also|then|as well as)\b")
_WORD = re.compile(r"[a-z0-9']+")

_CUSTOMER = re.compile(
    r"\b((i|we)('d| would) (like|love)(?! to)|(i|we)('ll| will) (have|take)(?! (it|that|this|them|those|everything))"
    r"|i (want|need)(?! to)|(can|could|may|might) (i|we) (please )?(get|have|order|grab|add)|gimme|(give|get|make) me"
    r"|(can|could) you (make|do|get)|for me|let me (have|get an?)|please and thank you|would be great|hoping to get"
    r"|in a rush|the usual|i think i will)\b(?![^.!?]*\b(you|your|name|ready|confirm)\b)"
)
_COURTESY_ANYWHERE = re.compile(r"\b(thank you|thanks|with pleasure|my pleasure|happy to|enjoy)\b")
_COURTESY_OPENING = re.compile(
    r"\W*(of course|certainly|absolutely|sure|gladly|with pleasure|welcome|hello|hi|great|lovely|wonderful|perfect"
    r"|good (morning|afternoon|evening|choice)|no problem)\b"
)
_RUDE = re.compile(
    r"\b(whatever|ugh|hurry up|not my problem|make up your mind|don't care|stupid|idiot|dumb|annoying|shut up"
    r"|next customer|so fussy|just pay|(waste|wasting) my time|what now|be quick|too (busy|tired)|happy now"
    r"|don't have all day)\b"
)
_CONFIRMATION = re.compile(
    r"\b(coming (right )?up|on (its|the|their) way|(be|have|is|are)( \w+){0,3} ready|right away|won't be long"
    r"|few minutes|be right with you|bring (it|that|them|everything)|call your name|enjoy|(start|get) on (it|that))\b"
)


class Order(NamedTuple):
    """What a text names: details by item, where it is consumed, and which items it takes back."""

    items: dict[str, frozenset[str]]
    service: frozenset[str] = frozenset()
    removed: frozenset[str] = frozenset()


def gold(prompt: Text, completion: str) -> float:
    """Mean of `gold_rules`, in [0, 1]; near 0 for empty, unrelated or parroted text."""
    return math.fsum(gold_rules(prompt, completion).values()) / len(RULES)


def gold_reward(prompts: Sequence[Text], completions: Sequence[str]) -> list[float]:
    """`gold` of each pair: usable as `reward: perlhf.data.coffee_bar.gold:gold_reward` in a policy recipe."""
    return [gold(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]


def gold_rules(prompt: Text, completion: str) -> dict[str, float]:
    """The seven rules (keys `RULES`), each in [0, 1].

    `items`: overlap of named and ordered items (intersection over union). `details`: share of sizes, milks, syrups,
    other changes, quantities and to-go/for-here that are stated and right. `only_ordered`: no item or detail that was
    not ordered. `courteous`: opens kindly or thanks, and is not rude. `civil`: nothing rude. `closing`: the last
    sentence asks or confirms. `concise`: 1 up to 40 words, falling to 0 at 60; 0 when it repeats itself. The last
    five count only for an answer (`items` at least 0.5, and not in the customer's own words), so that silence, lists
    of the menu and echoes earn nothing for manner.
    """
    said = _plain(completion)
    ordered, named = ordered_in(prompt), _named(said)
    overlap = len(ordered.items.keys() & named.items.keys()) / max(1, len(ordered.items.keys() | named.items.keys()))
    rules = dict.fromkeys(RULES, 0.0) | {"items": overlap, "details": _details_right(ordered, named)}
    if overlap < 0.5 or _is_echo(prompt, said):
        return rules
    wanted = frozenset[str]().union(*ordered.items.values())
    invented = named.items.keys() - ordered.items.keys() or frozenset[str]().union(*named.items.values()) - wanted
    thanked = _COURTESY_ANYWHERE.search(said) or _COURTESY_OPENING.match(said)
    last = [sentence for sentence in _SENTENCE.findall(said) if _WORD.search(sentence)][-1]
    return rules | {
        "only_ordered": float(not invented),
        "courteous": float(thanked is not None and not _RUDE.search(said)),
        "civil": float(not _RUDE.search(said)),
        "closing": float((last.endswith("?") or _CONFIRMATION.search(last) is not None) and not _RUDE.search(last)),
        "concise": _concise(said),
    }


def _named(text: str) -> Order:
    """Items with their details, in lower-case text.

    A detail belongs to the item of its chunk ("a large latte"), else to the last item before it ("a latte, large"); a
    question without an item ("small or large?") states nothing.
    """
    items: dict[str, frozenset[str]] = {}
    removed: set[str] = set()
    service = frozenset("go" if match[1] else "stay" for match in _SERVICE.finditer(text))
    current = ""
    for sentence in _SENTENCE.findall(text):
        current = "" if sentence.endswith("?") else current
        for chunk in _CHUNK_END.split(sentence):
            matches, start = list(_ITEM.finditer(chunk)), 0
            if not matches and current:
                items[current] |= frozenset(_DETAIL.findall(chunk))
            for index, match in enumerate(matches):
                before, end = chunk[start : match.start()], match.end() if index + 1 < len(matches) else len(chunk)
                if _REMOVED.search(before):
                    removed.add(match[1])
                    items.pop(match[1], None)
                    current = ""
                else:
                    current = match[1]
                    details = frozenset(_DETAIL.findall(chunk[start : match.start()] + ";" + chunk[match.end() : end]))
                    items[current] = items.get(current, frozenset()) | details | _number(before)
                start = match.end()
    return Order(items, service, frozenset(removed))


def _number(before: str) -> frozenset[str]:
    """The quantity in the words before an item, as a detail when it is two or more."""
    numbers = _NUMBER.findall(before)
    number = numbers[-1] if numbers else "one"
    number = dict(zip(map(str, range(11)), NUMBERS, strict=True)).get(number, number)
    return frozenset() if number in ("a", "an", "one") else frozenset([number])


def ordered_in(prompt: Text) -> Order:
    """The order that the user turns add up to; a later turn replaces details or takes items back."""
    items: dict[str, frozenset[str]] = {}
    service: frozenset[str] = frozenset()
    for text in user_turns(prompt):
        turn = _named(_plain(text))
        for item, details in turn.items.items():
            replaced = frozenset[str]().union(*(slot for slot in _SLOTS if slot & details))
            items[item] = (items.get(item, frozenset()) - replaced) | details
        items = {item: details for item, details in items.items() if item not in turn.removed}
        service = turn.service or service
    return Order(items, service)


def _plain(text: str) -> str:
    return text.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")


def user_turns(prompt: Text) -> list[str]:
    """What the customer said, oldest first; plain text is one turn."""
    return [prompt] if isinstance(prompt, str) else [turn["content"] for turn in prompt if turn["role"] == "user"]


def _details_right(ordered: Order, named: Order) -> float:
    """Details ordered and stated over details ordered or stated; each ordered item counts as one of them itself."""
    right = total = 0
    for item, wanted in ordered.items.items():
        stated = named.items.get(item, frozenset())
        right += len(wanted & stated) + 1 if item in named.items else 0
        total += len(wanted | stated) + 1
    if ordered.service and ordered.items:
        right, total = right + (named.service == ordered.service), total + 1
    return right / max(1, total)


def _is_echo(prompt: Text, said: str) -> bool:
    """True when the answer has a customer's phrase ("can I get ...") or only words that the customer used."""
    heard = {word for text in user_turns(prompt) for word in _WORD.findall(_plain(text))}
    return _CUSTOMER.search(said) is not None or not set(_WORD.findall(said)) - heard


def _concise(said: str) -> float:
    words = _WORD.findall(said)
    sentences = [tuple(sentence) for sentence in map(_WORD.findall, _SENTENCE.findall(said)) if sentence]
    runs = list(zip(*(words[offset:] for offset in range(6)), strict=False))
    if len(set(sentences)) < len(sentences) or len(set(runs)) < len(runs) or 2 * len(set(words)) < len(words):
        return 0.0
    return min(1.0, max(0.0, (FAR_TOO_MANY_WORDS - len(words)) / (FAR_TOO_MANY_WORDS - MAX_WORDS)))
