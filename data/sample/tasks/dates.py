"""Weekdays, months and dates."""

from data.sample.dice import Dice
from data.sample.exchange import Problem, Task
from data.sample.words import Words

IN_DAYS = {
    "en": (
        "Today is {day}. Which weekday is it in {n} days?",
        "What day is {n} days after {day}?",
        "It is {day} now. What day comes {n} days later?",
    ),
    "es": ("Hoy es {day}. ¿Qué día será dentro de {n} días?",),
    "de": ("Heute ist {day}. Welcher Tag ist in {n} Tagen?",),
    "fr": ("Aujourd'hui, c'est {day}. Quel jour serons-nous dans {n} jours ?",),
    "it": ("Oggi è {day}. Che giorno sarà tra {n} giorni?",),
    "pt": ("Hoje é {day}. Que dia será daqui a {n} dias?",),
    "nl": ("Vandaag is het {day}. Welke dag is het over {n} dagen?",),
    "pl": ("Dziś jest {day}. Jaki dzień będzie za {n} dni?",),
    "ru": ("Сегодня {day}. Какой день будет через {n} дня?",),
    "zh": ("今天是{day}，{n}天后是星期几？",),
}
DAY_BEFORE = {
    "en": ("Which day comes just before {day}?", "What day was it before {day}?"),
    "es": ("¿Qué día va justo antes del {day}?",),
    "de": ("Welcher Tag kommt vor {day}?",),
    "fr": ("Quel jour précède {day} ?",),
    "it": ("Quale giorno viene prima di {day}?",),
    "pt": ("Que dia vem antes de {day}?",),
    "nl": ("Welke dag komt voor {day}?",),
}
MONTH_AFTER = {
    "en": ("Which month follows {month}?", "What month comes after {month}?"),
    "es": ("¿Qué mes sigue a {month}?",),
    "de": ("Welcher Monat folgt auf {month}?",),
    "fr": ("Quel mois vient après {month} ?",),
    "it": ("Quale mese segue {month}?",),
    "pt": ("Que mês vem depois de {month}?",),
    "nl": ("Welke maand komt na {month}?",),
    "zh": ("{month}的下一个月是几月？",),
}
ISO = {
    "en": (
        "Write {d} {month} {year} as YYYY-MM-DD.",
        "{month} {d}, {year} in ISO form?",
        "ISO date for {d} {month} {year}?",
    ),
    "es": ("Escribe el {d} de {month} de {year} como AAAA-MM-DD.",),
    "de": ("Schreib {d}. {month} {year} als JJJJ-MM-TT.",),
    "fr": ("Écris {d} {month} {year} sous la forme AAAA-MM-JJ.",),
    "it": ("Scrivi {d} {month} {year} come AAAA-MM-GG.",),
    "pt": ("Escreva {d} de {month} de {year} como AAAA-MM-DD.",),
    "nl": ("Schrijf {d} {month} {year} als JJJJ-MM-DD.",),
    "zh": ("把{year}年{month}{d}日写成YYYY-MM-DD。",),
}
DAYS_BETWEEN = {
    "en": (
        "How many days from {a} {month} to {b} {month}?",
        "From {month} {a} to {month} {b}: how many days?",
    ),
    "es": ("¿Cuántos días van del {a} al {b} de {month}?",),
    "de": ("Wie viele Tage sind es vom {a}. bis zum {b}. {month}?",),
    "fr": ("Combien de jours du {a} au {b} {month} ?",),
    "pt": ("Quantos dias vão de {a} a {b} de {month}?",),
    "nl": ("Hoeveel dagen zijn het van {a} tot {b} {month}?",),
}


def in_days(dice: Dice, words: Words) -> Problem:
    """The weekday two to four days on (in Russian, those numbers share one form of the noun)."""
    start, n = dice.number(0, 6), dice.number(2, 4)
    week = [words.weekdays[(start + ahead) % 7] for ahead in range(n + 1)]
    working = " ".join([week[0], *(f"+{ahead} {week[ahead]}" for ahead in range(1, n + 1))])
    return Problem({"day": week[0], "n": n}, working, week[-1])


def day_before(dice: Dice, words: Words) -> Problem:
    """The weekday before."""
    today = dice.number(0, 6)
    before, day = words.weekdays[today - 1], words.weekdays[today]
    return Problem({"day": day}, f"{before} < {day}", before)


def month_after(dice: Dice, words: Words) -> Problem:
    """The month after."""
    now = dice.number(0, 11)
    month, after = words.months[now], words.months[(now + 1) % 12]
    return Problem({"month": month}, f"{month} < {after}", after)


def iso(dice: Dice, words: Words) -> Problem:
    """A date in figures."""
    year, m, d = dice.number(1990, 2029), dice.number(1, 12), dice.number(2, 28)
    month = words.months[m - 1]
    working = f"{month} = {m:02}, {d} = {d:02}"
    return Problem({"d": d, "month": month, "year": year}, working, f"{year}-{m:02}-{d:02}")


def days_between(dice: Dice, words: Words) -> Problem:
    """Days between two dates of one month."""
    a = dice.number(2, 14)
    b = a + dice.number(2, 14)
    slots = {"a": a, "b": b, "month": dice.choice(words.months)}
    return Problem(slots, f"{b} - {a} = {b - a}", str(b - a))


TASKS = (
    Task(4, IN_DAYS, in_days),
    Task(1, DAY_BEFORE, day_before),
    Task(1, MONTH_AFTER, month_after),
    Task(5, ISO, iso),
    Task(2, DAYS_BETWEEN, days_between),
)
