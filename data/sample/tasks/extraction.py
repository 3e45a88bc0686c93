"""Fields taken out of JSON, of `key=value` pairs and of addresses."""

import json

from data.sample.dice import Dice
from data.sample.exchange import Problem, Task
from data.sample.words import Words

FROM_JSON = {
    "en": (
        'What is "{key}" in {json}?',
        "Get {key} from {json}",
        "{json}\nWhat is the {key}?",
        'Extract "{key}": {json}',
        "Read the {key} out of {json}",
    ),
    "es": ('¿Qué valor tiene "{key}" en {json}?', 'Extrae "{key}": {json}'),
    "de": ('Welchen Wert hat "{key}" in {json}?', 'Lies "{key}" aus: {json}'),
    "fr": ('Que vaut "{key}" dans {json} ?', 'Extrais "{key}" : {json}'),
    "it": ('Che valore ha "{key}" in {json}?', 'Estrai "{key}": {json}'),
    "pt": ('Qual é o valor de "{key}" em {json}?', 'Extraia "{key}": {json}'),
    "nl": ('Wat is de waarde van "{key}" in {json}?', 'Lees "{key}" uit: {json}'),
    "pl": ('Jaką wartość ma "{key}" w {json}?', 'Odczytaj "{key}": {json}'),
    "ru": ('Чему равно "{key}" в {json}?',),
    "zh": ('{json}中"{key}"的值是什么？',),
}
FROM_PAIRS = {
    "en": ("{pairs}\nGive the {key}.", "From {pairs} take the {key}."),
    "es": ('Da el valor de "{key}": {pairs}',),
    "de": ('Nenne den Wert von "{key}": {pairs}',),
    "fr": ('Donne la valeur de "{key}" : {pairs}',),
    "it": ('Dai il valore di "{key}": {pairs}',),
    "pt": ('Dê o valor de "{key}": {pairs}',),
    "nl": ('Geef de waarde van "{key}": {pairs}',),
    "pl": ('Podaj wartość "{key}": {pairs}',),
}
KEY_OF = {
    "en": ("Which key holds {value} in {json}?", "{json}\nWhich key has the value {value}?"),
    "es": ("¿Qué clave tiene el valor {value} en {json}?",),
    "de": ("Welcher Schlüssel hat den Wert {value} in {json}?",),
    "fr": ("Quelle clé a la valeur {value} dans {json} ?",),
    "it": ("Quale chiave ha il valore {value} in {json}?",),
}
DOMAIN = {
    "en": ("What is the domain of {mail}?", "Which domain is in {mail}?"),
    "es": ("¿Cuál es el dominio de {mail}?",),
    "de": ("Wie lautet die Domain von {mail}?",),
    "fr": ("Quel est le domaine de {mail} ?",),
    "it": ("Qual è il dominio di {mail}?",),
    "pt": ("Qual é o domínio de {mail}?",),
    "nl": ("Wat is het domein van {mail}?",),
    "pl": ("Jaka jest domena adresu {mail}?",),
}

HOSTS = ("shop", "mail", "news", "school", "bank", "home", "team", "club")
USERS = ("anna", "ben", "clara", "info", "luis", "marie", "office", "paul", "rita", "sales")


def _record(dice: Dice, words: Words) -> dict[str, str | int]:
    """Two or three fields of a person, in random order."""
    values: tuple[str | int, ...] = (
        dice.choice(words.names),
        dice.choice(words.cities),
        dice.choice(words.colors),
        dice.number(18, 79),
    )
    person = list(zip(words.fields, values, strict=True))
    return dict(dice.sample(person, dice.number(2, 3)))


def from_json(dice: Dice, words: Words) -> Problem:
    """The value of a key."""
    record = _record(dice, words)
    key = dice.choice(list(record))
    slots = {"key": key, "json": json.dumps(record, ensure_ascii=False)}
    return Problem(slots, f"{key} = {record[key]}", str(record[key]))


def from_pairs(dice: Dice, words: Words) -> Problem:
    """The value of a key, from a line that is no JSON."""
    record = _record(dice, words)
    key = dice.choice(list(record))
    pairs = "; ".join(f"{name}={value}" for name, value in record.items())
    return Problem({"key": key, "pairs": pairs}, f"{key} = {record[key]}", str(record[key]))


def key_of(dice: Dice, words: Words) -> Problem:
    """The key of a value."""
    record = _record(dice, words)
    key = dice.choice(list(record))
    slots = {"value": record[key], "json": json.dumps(record, ensure_ascii=False)}
    return Problem(slots, f"{record[key]}: {key}", key)


def domain(dice: Dice, words: Words) -> Problem:
    """What follows the @ of an address; the domains are those reserved for examples."""
    user = f"{dice.choice(USERS)}{dice.number(1, 99)}"
    host = f"{dice.choice(HOSTS)}.example.{dice.choice(('com', 'org', 'net'))}"
    return Problem({"mail": f"{user}@{host}"}, f"{user} @ {host}", host)


TASKS = (
    Task(16, FROM_JSON, from_json),
    Task(6, FROM_PAIRS, from_pairs),
    Task(4, KEY_OF, key_of),
    Task(4, DOMAIN, domain),
)
