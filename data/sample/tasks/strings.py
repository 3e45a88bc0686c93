"""Work on words: capitals, letters, initials, joining, headings."""

from data.sample.dice import Dice
from data.sample.exchange import Problem, Task
from data.sample.words import SURNAMES, Words

UPPER = {
    "en": ('Write "{word}" in capital letters.', "Uppercase: {word}", "Put {word} in capitals."),
    "es": ('Escribe "{word}" en mayúsculas.',),
    "de": ("Schreib „{word}“ in Großbuchstaben.",),
    "fr": ("Écris « {word} » en majuscules.",),
    "it": ('Scrivi "{word}" in maiuscolo.',),
    "pt": ('Escreva "{word}" em maiúsculas.',),
    "nl": ('Schrijf "{word}" in hoofdletters.',),
    "pl": ("Napisz „{word}” wielkimi literami.",),
    "ru": ("Напиши «{word}» заглавными буквами.",),
}
FIRST_LETTER = {
    "en": ('What is the first letter of "{word}"?', "Which letter does {word} start with?"),
    "es": ('¿Cuál es la primera letra de "{word}"?',),
    "de": ("Was ist der erste Buchstabe von „{word}“?",),
    "fr": ("Quelle est la première lettre de « {word} » ?",),
    "it": ('Qual è la prima lettera di "{word}"?',),
    "pt": ('Qual é a primeira letra de "{word}"?',),
    "nl": ('Wat is de eerste letter van "{word}"?',),
    "pl": ("Jaka jest pierwsza litera słowa „{word}”?",),
    "ru": ("Какая первая буква в слове «{word}»?",),
}
LAST_LETTER = {
    "en": ('What is the last letter of "{word}"?', "Which letter does {word} end with?"),
    "es": ('¿Cuál es la última letra de "{word}"?',),
    "de": ("Was ist der letzte Buchstabe von „{word}“?",),
    "fr": ("Quelle est la dernière lettre de « {word} » ?",),
    "it": ('Qual è l\'ultima lettera di "{word}"?',),
    "pt": ('Qual é a última letra de "{word}"?',),
    "nl": ('Wat is de laatste letter van "{word}"?',),
}
JOIN = {
    "en": (
        'Join with "{sign}": {items}',
        'Put "{sign}" between the words: {items}',
        'Connect {items} with "{sign}".',
    ),
    "es": ('Une con "{sign}": {items}',),
    "de": ("Verbinde mit „{sign}“: {items}",),
    "fr": ("Relie par « {sign} » : {items}",),
    "it": ('Unisci con "{sign}": {items}',),
    "pt": ('Una com "{sign}": {items}',),
    "nl": ('Verbind met "{sign}": {items}',),
    "pl": ("Połącz znakiem „{sign}”: {items}",),
    "ru": ("Соедини знаком «{sign}»: {items}",),
    "zh": ("用“{sign}”连接：{items}",),
}
INITIALS = {
    "en": ("What are the initials of {first} {last}?", "Initials of {first} {last}?"),
    "es": ("¿Cuáles son las iniciales de {first} {last}?",),
    "de": ("Wie lauten die Initialen von {first} {last}?",),
    "fr": ("Quelles sont les initiales de {first} {last} ?",),
    "it": ("Quali sono le iniziali di {first} {last}?",),
    "pt": ("Quais são as iniciais de {first} {last}?",),
    "nl": ("Wat zijn de initialen van {first} {last}?",),
    "pl": ("Jakie inicjały ma {first} {last}?",),
}
SURNAME_FIRST = {
    "en": ("Write {first} {last} with the surname first.", "Surname first: {first} {last}"),
    "es": ("Escribe {first} {last} con el apellido primero.",),
    "de": ("Schreib {first} {last} mit dem Nachnamen zuerst.",),
    "fr": ("Écris {first} {last} avec le nom de famille en premier.",),
    "it": ("Scrivi {first} {last} con il cognome prima.",),
    "pt": ("Escreva {first} {last} com o sobrenome primeiro.",),
    "nl": ("Schrijf {first} {last} met de achternaam eerst.",),
    "pl": ("Napisz {first} {last}, zaczynając od nazwiska.",),
}
HEADING = {
    "en": (
        'Write "{word}" as a level 3 Markdown heading.',
        "Make a level 3 Markdown heading: {word}",
    ),
    "es": ('Escribe "{word}" como título de nivel 3 en Markdown.',),
    "de": ("Schreib „{word}“ als Markdown-Überschrift der Ebene 3.",),
    "fr": ("Écris « {word} » en titre Markdown de niveau 3.",),
    "it": ('Scrivi "{word}" come titolo Markdown di livello 3.',),
    "nl": ('Schrijf "{word}" als Markdown-kop van niveau 3.',),
}
REPEAT = {
    "en": ("Write {word} {n} times.", 'Repeat "{word}" {n} times.'),
    "es": ("Escribe {word} {n} veces.",),
    "de": ("Schreib {word} {n}-mal.",),
    "fr": ("Écris {word} {n} fois.",),
    "it": ("Scrivi {word} {n} volte.",),
    "pt": ("Escreva {word} {n} vezes.",),
    "nl": ("Schrijf {word} {n} keer.",),
    "pl": ("Napisz {word} {n} razy.",),
}


def upper(dice: Dice, words: Words) -> Problem:
    """A word, or two, in capitals."""
    word = " ".join(dice.sample(words.goods, dice.number(1, 2)))
    return Problem({"word": word}, f"upper({word})", word.upper())


def first_letter(dice: Dice, words: Words) -> Problem:
    """The letter a word starts with."""
    word = dice.choice((*words.goods, *words.cities, *words.colors))
    return Problem({"word": word}, f"first({word}) = {word[0]}", word[0])


def last_letter(dice: Dice, words: Words) -> Problem:
    """The letter a word ends with."""
    word = dice.choice((*words.goods, *words.cities, *words.colors))
    return Problem({"word": word}, f"last({word}) = {word[-1]}", word[-1])


def join(dice: Dice, words: Words) -> Problem:
    """Two or three words and a sign between them."""
    items = dice.sample((*words.goods, *words.colors), dice.number(2, 3))
    sign = dice.weighted(("-", "/", "+", "_"), (4, 2, 2, 1))
    return Problem(
        {"items": ", ".join(items), "sign": sign}, f"{sign}: {', '.join(items)}", sign.join(items)
    )


def initials(dice: Dice, words: Words) -> Problem:
    """The first letters of a first and a last name."""
    first, last = dice.choice(words.names), dice.choice(SURNAMES)
    working = f"{first} {first[0]}, {last} {last[0]}"
    return Problem({"first": first, "last": last}, working, first[0] + last[0])


def surname_first(dice: Dice, words: Words) -> Problem:
    """A name as it stands in a register."""
    first, last = dice.choice(words.names), dice.choice(SURNAMES)
    return Problem({"first": first, "last": last}, f"{first} | {last}", f"{last}, {first}")


def heading(dice: Dice, words: Words) -> Problem:
    """A reply whose last line begins with `###`, as Markdown in real replies does."""
    word = dice.choice((*words.goods, *words.cities, *words.colors)).capitalize()
    return Problem({"word": word}, "# * 3", f"### {word}")


def repeat(dice: Dice, words: Words) -> Problem:
    """A word written several times."""
    word, n = dice.choice(words.goods), dice.number(2, 4)
    return Problem({"word": word, "n": n}, f"{n} * {word}", " ".join([word] * n))


TASKS = (
    Task(5, UPPER, upper),
    Task(3, FIRST_LETTER, first_letter),
    Task(2, LAST_LETTER, last_letter),
    Task(7, JOIN, join),
    Task(5, INITIALS, initials),
    Task(5, SURNAME_FIRST, surname_first),
    Task(3, HEADING, heading),
    Task(3, REPEAT, repeat),
)
