"""Questions about a small table of facts that stands in the prompt."""

from data.sample.dice import Dice
from data.sample.exchange import Problem, Task
from data.sample.words import Words

PRICE = {
    "en": (
        "Prices: {table}. What does {item} cost?",
        "{table}\nHow much is {item}?",
        "Price list: {table}. Price of {item}?",
        "{markdown}\nWhat does {item} cost?",
    ),
    "es": ('Precios: {table}. ¿Cuánto cuesta "{item}"?',),
    "de": ("Preise: {table}. Was kostet „{item}“?",),
    "fr": ("Prix : {table}. Combien coûte « {item} » ?",),
    "it": ('Prezzi: {table}. Quanto costa "{item}"?',),
    "pt": ('Preços: {table}. Quanto custa "{item}"?',),
    "nl": ('Prijzen: {table}. Wat kost "{item}"?',),
    "pl": ("Ceny: {table}. Ile kosztuje „{item}”?",),
    "ru": ("Цены: {table}. Сколько стоит «{item}»?",),
    "zh": ("价格：{table}。{item}多少钱？",),
}
DEAREST = {
    "en": ("Prices: {table}. Which is most expensive?", "{table}\nWhat costs most?"),
    "es": ("Precios: {table}. ¿Qué es lo más caro?",),
    "de": ("Preise: {table}. Was ist am teuersten?",),
    "fr": ("Prix : {table}. Qu'est-ce qui est le plus cher ?",),
    "it": ("Prezzi: {table}. Che cosa costa di più?",),
    "pt": ("Preços: {table}. O que é mais caro?",),
    "nl": ("Prijzen: {table}. Wat is het duurst?",),
    "pl": ("Ceny: {table}. Co jest najdroższe?",),
    "ru": ("Цены: {table}. Что дороже всего?",),
    "zh": ("价格：{table}。哪个最贵？",),
}
TOGETHER = {
    "en": (
        "Prices: {table}. What do {item} and {other} cost together?",
        "{table}\nTotal for {item} and {other}?",
    ),
    "es": ('Precios: {table}. ¿Cuánto cuestan juntos "{item}" y "{other}"?',),
    "de": ("Preise: {table}. Was kosten „{item}“ und „{other}“ zusammen?",),
    "fr": ("Prix : {table}. Combien coûtent ensemble « {item} » et « {other} » ?",),
    "it": ('Prezzi: {table}. Quanto costano insieme "{item}" e "{other}"?',),
    "pt": ('Preços: {table}. Quanto custam juntos "{item}" e "{other}"?',),
    "nl": ('Prijzen: {table}. Wat kosten "{item}" en "{other}" samen?',),
}
WHERE = {
    "en": (
        "{name} lives in {city}, {name2} in {city2}. Where does {who} live?",
        "{name} works in {city} and {name2} in {city2}. Where does {who} work?",
        "{name} is from {city}, {name2} from {city2}. Where is {who} from?",
    ),
    "es": ("{name} vive en {city} y {name2} en {city2}. ¿Dónde vive {who}?",),
    "de": ("{name} wohnt in {city}, {name2} in {city2}. Wo wohnt {who}?",),
    "fr": ("{name} habite à {city}, {name2} à {city2}. Où habite {who} ?",),
    "it": ("{name} vive a {city}, {name2} a {city2}. Dove vive {who}?",),
    "pt": ("{name} mora em {city}, {name2} em {city2}. Onde mora {who}?",),
    "nl": ("{name} woont in {city}, {name2} in {city2}. Waar woont {who}?",),
    "zh": ("{name}住在{city}，{name2}住在{city2}。{who}住在哪里？",),
}
WHO = {
    "en": (
        "{name} lives in {city}, {name2} in {city2}. Who lives in {where}?",
        "{name} flew to {city}, {name2} to {city2}. Who flew to {where}?",
    ),
    "es": ("{name} vive en {city} y {name2} en {city2}. ¿Quién vive en {where}?",),
    "de": ("{name} wohnt in {city}, {name2} in {city2}. Wer wohnt in {where}?",),
    "fr": ("{name} habite à {city}, {name2} à {city2}. Qui habite à {where} ?",),
    "it": ("{name} vive a {city}, {name2} a {city2}. Chi vive a {where}?",),
    "pt": ("{name} mora em {city}, {name2} em {city2}. Quem mora em {where}?",),
    "nl": ("{name} woont in {city}, {name2} in {city2}. Wie woont in {where}?",),
}


def _prices(dice: Dice, words: Words) -> dict[str, int]:
    """Three things and what they cost; no two cost the same."""
    return dict(zip(dice.sample(words.goods, 3), dice.sample(range(2, 30), 3), strict=True))


def _slots(prices: dict[str, int]) -> dict[str, object]:
    rows = [f"| {item} | {price} |" for item, price in prices.items()]
    table = ", ".join(f"{item} {price}" for item, price in prices.items())
    return {"table": table, "markdown": "\n".join(rows)}


def price(dice: Dice, words: Words) -> Problem:
    """Look one thing up."""
    prices = _prices(dice, words)
    item = dice.choice(list(prices))
    return Problem({**_slots(prices), "item": item}, f"{item} = {prices[item]}", str(prices[item]))


def dearest(dice: Dice, words: Words) -> Problem:
    """The thing with the highest price."""
    prices = _prices(dice, words)
    highest = max(prices.values())
    listed = ", ".join(str(price) for price in prices.values())
    [item] = [item for item, price in prices.items() if price == highest]
    return Problem(_slots(prices), f"max({listed}) = {highest}", item)


def together(dice: Dice, words: Words) -> Problem:
    """The sum of two prices."""
    prices = _prices(dice, words)
    item, other = dice.sample(list(prices), 2)
    total = prices[item] + prices[other]
    working = f"{prices[item]} + {prices[other]} = {total}"
    return Problem({**_slots(prices), "item": item, "other": other}, working, str(total))


def _homes(dice: Dice, words: Words) -> tuple[dict[str, object], list[tuple[str, str]]]:
    """Two people and their cities, as slots and as pairs."""
    homes = list(zip(dice.sample(words.names, 2), dice.sample(words.cities, 2), strict=True))
    (name, city), (name2, city2) = homes
    return {"name": name, "city": city, "name2": name2, "city2": city2}, homes


def where(dice: Dice, words: Words) -> Problem:
    """The city of a person."""
    slots, homes = _homes(dice, words)
    who, city = dice.choice(homes)
    return Problem({**slots, "who": who}, f"{who}: {city}", city)


def who(dice: Dice, words: Words) -> Problem:
    """The person of a city."""
    slots, homes = _homes(dice, words)
    name, city = dice.choice(homes)
    return Problem({**slots, "where": city}, f"{city}: {name}", name)


TASKS = (
    Task(10, PRICE, price),
    Task(5, DEAREST, dearest),
    Task(3, TOGETHER, together),
    Task(7, WHERE, where),
    Task(5, WHO, who),
)
