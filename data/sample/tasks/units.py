"""Conversions between units: by powers of ten, and of time."""

from data.sample.dice import Dice
from data.sample.exchange import Problem, Task
from data.sample.words import Words

DECIMAL = (
    ("km", "m", 1000),
    ("m", "cm", 100),
    ("cm", "mm", 10),
    ("kg", "g", 1000),
    ("t", "kg", 1000),
    ("l", "ml", 1000),
)
CYRILLIC = {
    "km": "км", "m": "м", "cm": "см", "mm": "мм", "kg": "кг", "g": "г", "t": "т",
    "l": "л", "ml": "мл",
}  # fmt: skip

CONVERT = {
    "en": (
        "Convert {n} {old} to {new}.",
        "{n} {old} in {new}?",
        "Express {n} {old} in {new}.",
        "What is {n} {old} in {new}?",
    ),
    "es": ("Convierte {n} {old} a {new}.", "¿Cuánto es {n} {old} en {new}?"),
    "de": ("Rechne {n} {old} in {new} um.", "Wie viel sind {n} {old} in {new}?"),
    "fr": ("Convertis {n} {old} en {new}.", "Combien font {n} {old} en {new} ?"),
    "it": ("Converti {n} {old} in {new}.", "Quanto fa {n} {old} in {new}?"),
    "pt": ("Converta {n} {old} em {new}.", "Quanto é {n} {old} em {new}?"),
    "nl": ("Zet {n} {old} om in {new}.", "Hoeveel is {n} {old} in {new}?"),
    "pl": ("Zamień {n} {old} na {new}.", "Ile to jest {n} {old} w {new}?"),
    "ru": ("Переведи {n} {old} в {new}.",),
    "zh": ("把{n} {old}换算成{new}。",),
}
MINUTES = {
    "en": ("How many minutes are {n} hours?", "{n} hours in minutes?"),
    "es": ("¿Cuántos minutos son {n} horas?",),
    "de": ("Wie viele Minuten sind {n} Stunden?",),
    "fr": ("Combien de minutes font {n} heures ?",),
    "it": ("Quanti minuti sono {n} ore?",),
    "pt": ("Quantos minutos são {n} horas?",),
    "nl": ("Hoeveel minuten zijn {n} uur?",),
    "pl": ("{n} h to ile minut?",),
}
DAYS = {
    "en": ("How many days are {n} weeks?", "{n} weeks in days?"),
    "es": ("¿Cuántos días son {n} semanas?",),
    "de": ("Wie viele Tage sind {n} Wochen?",),
    "fr": ("Combien de jours font {n} semaines ?",),
    "it": ("Quanti giorni sono {n} settimane?",),
    "pt": ("Quantos dias são {n} semanas?",),
    "nl": ("Hoeveel dagen zijn {n} weken?",),
}


def _units(dice: Dice, words: Words) -> tuple[str, str, int]:
    large, small, factor = dice.choice(DECIMAL)
    if words.language == "ru":
        return CYRILLIC[large], CYRILLIC[small], factor
    return large, small, factor


def to_smaller(dice: Dice, words: Words) -> Problem:
    """A whole number of the larger unit."""
    large, small, factor = _units(dice, words)
    n = dice.number(2, 60)
    slots = {"n": n, "old": large, "new": small}
    return Problem(slots, f"{n} * {factor} = {n * factor}", f"{n * factor} {small}")


def to_larger(dice: Dice, words: Words) -> Problem:
    """A number of the smaller unit that makes a whole number of the larger."""
    large, small, factor = _units(dice, words)
    n = dice.number(2, 60)
    slots = {"n": n * factor, "old": small, "new": large}
    return Problem(slots, f"{n * factor} / {factor} = {n}", f"{n} {large}")


def minutes(dice: Dice, words: Words) -> Problem:
    """Hours into minutes."""
    n = dice.number(2, 15)
    return Problem({"n": n}, f"{n} * 60 = {n * 60}", str(n * 60))


def days(dice: Dice, words: Words) -> Problem:
    """Weeks into days."""
    n = dice.number(2, 15)
    return Problem({"n": n}, f"{n} * 7 = {n * 7}", str(n * 7))


TASKS = (
    Task(6, CONVERT, to_smaller),
    Task(4, CONVERT, to_larger),
    Task(1, MINUTES, minutes),
    Task(1, DAYS, days),
)
