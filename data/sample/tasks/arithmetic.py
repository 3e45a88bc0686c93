"""Sums: in digits, in words, in a story, step by step."""

from data.sample.dice import Dice
from data.sample.exchange import Problem, Task
from data.sample.words import Words

ADD = {
    "en": ("What is {a} plus {b}?", "Add {a} and {b}.", "Work out {a} + {b}.", "{a} plus {b} is?"),
    "es": ("¿Cuánto es {a} más {b}?", "Suma {a} y {b}."),
    "de": ("Wie viel ist {a} plus {b}?", "Addiere {a} und {b}."),
    "fr": ("Combien font {a} plus {b} ?", "Additionne {a} et {b}."),
    "it": ("Quanto fa {a} più {b}?", "Somma {a} e {b}."),
    "pt": ("Quanto é {a} mais {b}?", "Some {a} e {b}."),
    "nl": ("Hoeveel is {a} plus {b}?", "Tel {a} en {b} op."),
    "pl": ("Ile to jest {a} plus {b}?", "Dodaj {a} i {b}."),
    "ru": ("Сколько будет {a} плюс {b}?",),
    "zh": ("{a}加{b}等于多少？",),
}
SUBTRACT = {
    "en": ("What is {a} minus {b}?", "Take {b} away from {a}.", "Subtract {b} from {a}."),
    "es": ("¿Cuánto es {a} menos {b}?", "Resta {b} de {a}."),
    "de": ("Wie viel ist {a} minus {b}?", "Zieh {b} von {a} ab."),
    "fr": ("Combien font {a} moins {b} ?", "Soustrais {b} de {a}."),
    "it": ("Quanto fa {a} meno {b}?", "Sottrai {b} da {a}."),
    "pt": ("Quanto é {a} menos {b}?", "Subtraia {b} de {a}."),
    "nl": ("Hoeveel is {a} min {b}?", "Trek {b} af van {a}."),
    "pl": ("Ile to jest {a} minus {b}?", "Odejmij {b} od {a}."),
    "ru": ("Сколько будет {a} минус {b}?",),
    "zh": ("{a}减{b}等于多少？",),
}
TIMES = {
    "en": ("What is {a} times {b}?", "Multiply {a} by {b}."),
    "es": ("¿Cuánto es {a} por {b}?",),
    "de": ("Wie viel ist {a} mal {b}?",),
    "fr": ("Combien font {a} fois {b} ?",),
    "it": ("Quanto fa {a} per {b}?",),
    "pt": ("Quanto é {a} vezes {b}?",),
    "nl": ("Hoeveel is {a} keer {b}?",),
    "pl": ("Ile to jest {a} razy {b}?",),
}
IN_WORDS = {
    "en": (
        "What is {x} plus {y}, in digits?",
        "Give the sum of {x} and {y} as a number.",
        "Write {x} plus {y} as one number.",
    ),
    "es": ("¿Cuánto es {x} más {y}, en cifras?",),
    "de": ("Wie viel ist {x} plus {y}, in Ziffern?",),
    "fr": ("Combien font {x} plus {y}, en chiffres ?",),
    "it": ("Quanto fa {x} più {y}, in cifre?",),
    "pt": ("Quanto é {x} mais {y}, em algarismos?",),
    "nl": ("Hoeveel is {x} plus {y}, in cijfers?",),
    "pl": ("Ile to jest {x} plus {y}, cyframi?",),
}
STORY_OF_MORE = {
    "en": (
        "{name} has {a} books and gets {b} more. How many now?",
        "{name} picks {a} apples, then {b} more. How many in all?",
        "{a} people sit on a bus and {b} get on. How many are there?",
        "A shelf holds {a} jars; {name} adds {b}. How many jars?",
    ),
    "es": ("{name} tiene {a} libros y recibe {b} más. ¿Cuántos tiene ahora?",),
    "de": ("{name} hat {a} Bücher und bekommt {b} dazu. Wie viele sind es jetzt?",),
    "fr": ("{name} a {a} livres et en reçoit {b} de plus. Combien cela fait-il ?",),
    "it": ("{name} ha {a} libri e ne riceve altri {b}. Quanti sono ora?",),
    "pt": ("{name} tem {a} livros e ganha mais {b}. Quantos são agora?",),
    "nl": ("{name} heeft {a} boeken en krijgt er {b} bij. Hoeveel zijn het er nu?",),
    "pl": ("{name} ma {a} zł i dostaje jeszcze {b} zł. Ile zł ma teraz?",),
}
STORY_OF_LESS = {
    "en": (
        "{name} had {a} coins and spent {b}. How many are left?",
        "Of {a} eggs, {b} broke. How many are whole?",
        "{name} bakes {a} buns and sells {b}. How many remain?",
    ),
    "es": ("{name} tenía {a} euros y gastó {b}. ¿Cuántos le quedan?",),
    "de": ("{name} hatte {a} Euro und gab {b} aus. Wie viele Euro bleiben?",),
    "fr": ("{name} avait {a} euros et en a dépensé {b}. Combien reste-t-il ?",),
    "it": ("{name} aveva {a} euro e ne ha spesi {b}. Quanti ne restano?",),
    "pt": ("{name} tinha {a} euros e gastou {b}. Quantos restam?",),
    "nl": ("{name} had {a} euro en gaf er {b} uit. Hoeveel euro blijft er over?",),
    "pl": ("{name} ma {a} zł i wydaje {b} zł. Ile zł zostaje?",),
}
IN_STEPS = {
    "en": ("Add {a}, {b} and {c} step by step.", "Show the steps: {a} + {b} + {c}"),
    "es": ("Suma {a}, {b} y {c} paso a paso.",),
    "de": ("Addiere {a}, {b} und {c} Schritt für Schritt.",),
    "fr": ("Additionne {a}, {b} et {c} étape par étape.",),
    "it": ("Somma {a}, {b} e {c} passo per passo.",),
    "pt": ("Some {a}, {b} e {c} passo a passo.",),
    "nl": ("Tel {a}, {b} en {c} stap voor stap op.",),
}


def _sum(a: int, b: int, **slots: object) -> Problem:
    return Problem({"a": a, "b": b, **slots}, f"{a} + {b} = {a + b}", str(a + b))


def _difference(a: int, b: int, **slots: object) -> Problem:
    return Problem({"a": a, "b": b, **slots}, f"{a} - {b} = {a - b}", str(a - b))


def add(dice: Dice, words: Words) -> Problem:
    """A number of at most two digits plus a small one."""
    return _sum(dice.number(3, 60), dice.number(2, 19))


def subtract(dice: Dice, words: Words) -> Problem:
    """A difference that is positive."""
    b = dice.number(2, 19)
    return _difference(b + dice.number(2, 40), b)


def times(dice: Dice, words: Words) -> Problem:
    """The multiplication table."""
    a, b = dice.number(2, 12), dice.number(2, 9)
    return Problem({"a": a, "b": b}, f"{a} * {b} = {a * b}", str(a * b))


def in_words(dice: Dice, words: Words) -> Problem:
    """Numbers written as words, the sum in digits."""
    a, b = dice.number(2, 12), dice.number(2, 12)
    return _sum(a, b, x=words.numbers[a - 2], y=words.numbers[b - 2])


def story_of_more(dice: Dice, words: Words) -> Problem:
    """A sum to be found in a story."""
    return _sum(dice.number(3, 40), dice.number(2, 12), name=dice.choice(words.names))


def story_of_less(dice: Dice, words: Words) -> Problem:
    """A difference to be found in a story."""
    b = dice.number(2, 12)
    return _difference(b + dice.number(3, 30), b, name=dice.choice(words.names))


def in_steps(dice: Dice, words: Words) -> Problem:
    """Three numbers, added in two steps under a heading."""
    a, b, c = dice.number(2, 20), dice.number(2, 9), dice.number(2, 9)
    working = f"{a} + {b} = {a + b}\n{a + b} + {c} = {a + b + c}"
    return Problem({"a": a, "b": b, "c": c}, working, str(a + b + c), heading=words.steps)


TASKS = (
    Task(5, ADD, add),
    Task(4, SUBTRACT, subtract),
    Task(2, TIMES, times),
    Task(4, IN_WORDS, in_words),
    Task(4, STORY_OF_MORE, story_of_more),
    Task(3, STORY_OF_LESS, story_of_less),
    Task(5, IN_STEPS, in_steps),
)
