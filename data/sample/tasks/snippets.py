"""Lines of Python, and what they print."""

import json

from data.sample.dice import Dice
from data.sample.exchange import Problem, Task
from data.sample.tasks.lists import numbered
from data.sample.words import WORDS, Words

PRINTS = {
    "en": (
        "What does this print?\n{code}",
        "Output of this Python code?\n{code}",
        "What is printed?\n```python\n{code}\n```",
    ),
    "es": ("¿Qué imprime este código?\n{code}",),
    "de": ("Was gibt dieser Code aus?\n{code}",),
    "fr": ("Qu'affiche ce code ?\n{code}",),
    "it": ("Che cosa stampa questo codice?\n{code}",),
    "pt": ("O que este código imprime?\n{code}",),
    "nl": ("Wat drukt deze code af?\n{code}",),
    "pl": ("Co wypisze ten kod?\n{code}",),
    "ru": ("Что выведет этот код?\n{code}",),
    "zh": ("这段代码输出什么？\n{code}",),
}

GOODS = WORDS["en"].goods  # code is English wherever it is written


def variable(dice: Dice, words: Words) -> Problem:
    """A variable that is added to."""
    name, a, b = dice.choice("abnxyz"), dice.number(2, 40), dice.number(2, 9)
    code = f"{name} = {a}\nprint({name} + {b})"
    return Problem({"code": code}, f"{a} + {b} = {a + b}", str(a + b))


def index(dice: Dice, words: Words) -> Problem:
    """An item of a list, by its position."""
    items = dice.sample(GOODS, 3)
    at = dice.number(0, 2)
    working = ", ".join(f"[{position}] {item}" for position, item in enumerate(items))
    return Problem({"code": f"print({json.dumps(items)}[{at}])"}, working, items[at])


def length(dice: Dice, words: Words) -> Problem:
    """The length of a list."""
    items = dice.sample(range(1, 30), dice.number(2, 5))
    working = numbered([f"({item})" for item in items])
    return Problem({"code": f"print(len({items}))"}, working, str(len(items)))


def joined(dice: Dice, words: Words) -> Problem:
    """Texts joined by a sign."""
    items, sign = dice.sample(GOODS, dice.number(2, 3)), dice.choice("-/+_")
    code = f'print("{sign}".join({json.dumps(items)}))'
    return Problem({"code": code}, f"{sign}: {', '.join(items)}", sign.join(items))


def value(dice: Dice, words: Words) -> Problem:
    """A value of a dictionary."""
    prices = dict(zip(dice.sample(GOODS, 2), dice.sample(range(2, 30), 2), strict=True))
    key = dice.choice(list(prices))
    code = f'd = {json.dumps(prices)}\nprint(d["{key}"])'
    return Problem({"code": code}, f"{key} = {prices[key]}", str(prices[key]))


def branch(dice: Dice, words: Words) -> Problem:
    """A comparison that chooses between two texts."""
    a, b = dice.number(2, 50), dice.number(2, 50)
    yes, no = dice.sample(GOODS, 2)
    code = f'print("{yes}" if {a} > {b} else "{no}")'
    return Problem({"code": code}, f"{a} > {b} = {a > b}", yes if a > b else no)


def swapped(dice: Dice, words: Words) -> Problem:
    """Two variables printed in the other order."""
    a, b = dice.sample(GOODS, 2)
    return Problem({"code": f'a, b = "{a}", "{b}"\nprint(b, a)'}, f"b = {b}, a = {a}", f"{b} {a}")


TASKS = (
    Task(2, PRINTS, variable),
    Task(2, PRINTS, index),
    Task(1, PRINTS, length),
    Task(2, PRINTS, joined),
    Task(3, PRINTS, value),
    Task(2, PRINTS, branch),
    Task(2, PRINTS, swapped),
)
