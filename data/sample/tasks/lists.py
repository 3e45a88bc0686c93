"""Short lists: sorted, reversed, counted; their largest, smallest and last."""

from data.sample.dice import Dice
from data.sample.exchange import Problem, Task
from data.sample.words import Words

SORT_NUMBERS = {
    "en": (
        "Sort these numbers: {items}",
        "Put {items} in ascending order.",
        "Order from small to large: {items}",
        "Arrange {items} from lowest to highest.",
    ),
    "es": ("Ordena de menor a mayor: {items}",),
    "de": ("Sortiere aufsteigend: {items}",),
    "fr": ("Trie dans l'ordre croissant : {items}",),
    "it": ("Ordina dal più piccolo al più grande: {items}",),
    "pt": ("Ordene do menor para o maior: {items}",),
    "nl": ("Sorteer van klein naar groot: {items}",),
    "pl": ("Posortuj rosnąco: {items}",),
    "ru": ("Упорядочи по возрастанию: {items}",),
    "zh": ("从小到大排列：{items}",),
}
SORT_WORDS = {
    "en": (
        "Sort alphabetically: {items}",
        "Put these words in alphabetical order: {items}",
        "Order {items} from A to Z.",
    ),
    "es": ("Ordena alfabéticamente: {items}",),
    "de": ("Sortiere alphabetisch: {items}",),
    "fr": ("Trie par ordre alphabétique : {items}",),
    "it": ("Metti in ordine alfabetico: {items}",),
    "pt": ("Coloque em ordem alfabética: {items}",),
    "nl": ("Zet op alfabetische volgorde: {items}",),
    "pl": ("Ułóż alfabetycznie: {items}",),
}
LARGEST = {
    "en": ("Which number is largest: {items}?", "The biggest of {items}?"),
    "es": ("¿Cuál es el mayor: {items}?",),
    "de": ("Welche Zahl ist am größten: {items}?",),
    "fr": ("Quel est le plus grand : {items} ?",),
    "it": ("Qual è il più grande: {items}?",),
    "pt": ("Qual é o maior: {items}?",),
    "nl": ("Wat is het grootste getal: {items}?",),
    "pl": ("Która liczba jest największa: {items}?",),
    "ru": ("Какое число самое большое: {items}?",),
    "zh": ("哪个数最大：{items}？",),
}
SMALLEST = {
    "en": ("Which number is smallest: {items}?", "The lowest of {items}?"),
    "es": ("¿Cuál es el menor: {items}?",),
    "de": ("Welche Zahl ist am kleinsten: {items}?",),
    "fr": ("Quel est le plus petit : {items} ?",),
    "nl": ("Wat is het kleinste getal: {items}?",),
}
COUNT = {
    "en": ("How many items: {items}?", "Count the words: {items}"),
    "es": ("¿Cuántas palabras hay: {items}?",),
    "de": ("Wie viele Wörter sind das: {items}?",),
    "fr": ("Combien de mots : {items} ?",),
    "it": ("Quante parole: {items}?",),
    "pt": ("Quantas palavras: {items}?",),
    "nl": ("Hoeveel woorden zijn dit: {items}?",),
    "pl": ("Ile to słów: {items}?",),
    "ru": ("Сколько слов: {items}?",),
}
LAST = {
    "en": ("What is the last item of {items}?", "Which word comes last: {items}?"),
    "es": ("¿Cuál es la última palabra: {items}?",),
    "de": ("Was ist das letzte Wort: {items}?",),
    "fr": ("Quel est le dernier mot : {items} ?",),
    "it": ("Qual è l'ultima parola: {items}?",),
    "pt": ("Qual é a última palavra: {items}?",),
    "nl": ("Wat is het laatste woord: {items}?",),
    "pl": ("Jakie jest ostatnie słowo: {items}?",),
    "ru": ("Какое слово последнее: {items}?",),
    "zh": ("最后一个词是什么：{items}？",),
}
REVERSE = {
    "en": ("Reverse the order: {items}", "Write this list backwards: {items}"),
    "es": ("Invierte el orden: {items}",),
    "de": ("Kehre die Reihenfolge um: {items}",),
    "fr": ("Inverse l'ordre : {items}",),
    "it": ("Inverti l'ordine: {items}",),
    "pt": ("Inverta a ordem: {items}",),
    "nl": ("Keer de volgorde om: {items}",),
    "pl": ("Odwróć kolejność: {items}",),
}


def numbered(items: list[str]) -> str:
    """A list with its positions: "1 tea, 2 milk"."""
    return ", ".join(f"{position} {item}" for position, item in enumerate(items, start=1))


def _numbers(dice: Dice) -> list[int]:
    return dice.sample(range(2, 60), 3)


def _goods(dice: Dice, words: Words, most: int) -> list[str]:
    return dice.sample(words.goods, dice.number(2, most))


def sort_numbers(dice: Dice, words: Words) -> Problem:
    """Three numbers in ascending order."""
    numbers = _numbers(dice)
    ordered = [str(number) for number in sorted(numbers)]
    items = ", ".join(str(number) for number in numbers)
    return Problem({"items": items}, " < ".join(ordered), ", ".join(ordered))


def sort_words(dice: Dice, words: Words) -> Problem:
    """Three words whose first letters differ, so that they alone decide."""
    by_letter = {word[0].casefold(): word for word in dice.sample(words.goods, len(words.goods))}
    letters = dice.sample(list(by_letter), 3)
    ordered = sorted(letters)
    items = ", ".join(by_letter[letter] for letter in letters)
    answer = ", ".join(by_letter[letter] for letter in ordered)
    return Problem({"items": items}, " < ".join(ordered), answer)


def largest(dice: Dice, words: Words) -> Problem:
    """The largest of three numbers."""
    numbers = _numbers(dice)
    items = ", ".join(str(number) for number in numbers)
    return Problem({"items": items}, f"max({items}) = {max(numbers)}", str(max(numbers)))


def smallest(dice: Dice, words: Words) -> Problem:
    """The smallest of three numbers."""
    numbers = _numbers(dice)
    items = ", ".join(str(number) for number in numbers)
    return Problem({"items": items}, f"min({items}) = {min(numbers)}", str(min(numbers)))


def count(dice: Dice, words: Words) -> Problem:
    """How many things there are in a list."""
    items = _goods(dice, words, 5)
    return Problem({"items": ", ".join(items)}, numbered(items), str(len(items)))


def last(dice: Dice, words: Words) -> Problem:
    """The last thing of a list."""
    items = _goods(dice, words, 4)
    return Problem({"items": ", ".join(items)}, numbered(items), items[-1])


def reverse(dice: Dice, words: Words) -> Problem:
    """A list from its end."""
    items = _goods(dice, words, 3)
    return Problem({"items": ", ".join(items)}, numbered(items), ", ".join(reversed(items)))


TASKS = (
    Task(4, SORT_NUMBERS, sort_numbers),
    Task(4, SORT_WORDS, sort_words),
    Task(4, LARGEST, largest),
    Task(3, SMALLEST, smallest),
    Task(4, COUNT, count),
    Task(5, LAST, last),
    Task(4, REVERSE, reverse),
)
