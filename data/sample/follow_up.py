"""What somebody says after a reply: a question about its answer, or thanks."""

from collections.abc import Callable
from dataclasses import dataclass

from data.sample.dice import Dice
from data.sample.exchange import Exchange, Phrases, Problem, put

ADD = {
    "en": ("Now add {b}.", "Add {b} to that.", "And with {b} more?"),
    "es": ("Ahora suma {b}.",),
    "de": ("Jetzt plus {b}.",),
    "fr": ("Maintenant, ajoute {b}.",),
    "it": ("Ora aggiungi {b}.",),
    "pt": ("Agora some {b}.",),
    "nl": ("Tel er nu {b} bij op.",),
    "pl": ("Teraz dodaj {b}.",),
    "ru": ("Теперь прибавь {b}.",),
    "zh": ("再加{b}。",),
}
UPPER = {
    "en": ("Now in capital letters.", "The same in capitals, please."),
    "es": ("Ahora en mayúsculas.",),
    "de": ("Jetzt in Großbuchstaben.",),
    "fr": ("Maintenant en majuscules.",),
    "it": ("Ora in maiuscolo.",),
    "pt": ("Agora em maiúsculas.",),
    "nl": ("Nu in hoofdletters.",),
    "pl": ("Teraz wielkimi literami.",),
    "ru": ("Теперь заглавными буквами.",),
}
FIRST_LETTER = {
    "en": ("And its first letter?", "What letter does it start with?"),
    "es": ("¿Y su primera letra?",),
    "de": ("Und der erste Buchstabe?",),
    "fr": ("Et sa première lettre ?",),
    "it": ("E la prima lettera?",),
    "pt": ("E a primeira letra?",),
    "nl": ("En de eerste letter?",),
    "pl": ("A pierwsza litera?",),
    "ru": ("А первая буква?",),
}
DASHES = {
    "en": ('Now join them with "-".', "Put dashes between them."),
    "es": ('Ahora únelos con "-".',),
    "de": ("Verbinde sie jetzt mit „-“.",),
    "fr": ("Maintenant, relie-les par « - ».",),
    "it": ('Ora uniscili con "-".',),
    "pt": ('Agora junte com "-".',),
    "nl": ('Verbind ze nu met "-".',),
    "pl": ("Teraz połącz je znakiem „-”.",),
}
THANKS = {
    "en": ("Thanks!", "Great, thank you.", "Perfect, that is all.", "Are you sure?", "Why?"),
    "es": ("¡Gracias!", "Perfecto.", "¿Estás seguro?"),
    "de": ("Danke!", "Perfekt, das war alles.", "Bist du sicher?"),
    "fr": ("Merci !", "Parfait, c'est tout.", "C'est sûr ?"),
    "it": ("Grazie!", "Perfetto, è tutto.", "Ne sei sicuro?"),
    "pt": ("Obrigado!", "Perfeito, é só isso.", "Tem certeza?"),
    "nl": ("Bedankt!", "Mooi, dat was alles.", "Weet je het zeker?"),
    "pl": ("Dzięki!", "Świetnie, to wszystko.", "Na pewno?"),
    "ru": ("Спасибо!", "Точно?"),
    "zh": ("谢谢！", "确定吗？"),
}


@dataclass(frozen=True)
class FollowUp:
    """A question that takes the last answer up."""

    phrases: Phrases
    fits: Callable[[str], bool]
    solve: Callable[[Dice, str], Problem]


def _add(dice: Dice, answer: str) -> Problem:
    a, b = int(answer), dice.number(2, 9)
    return Problem({"b": b}, f"{a} + {b} = {a + b}", str(a + b))


def _upper(dice: Dice, answer: str) -> Problem:
    return Problem({}, f"upper({answer})", answer.upper())


def _first_letter(dice: Dice, answer: str) -> Problem:
    return Problem({}, f"first({answer}) = {answer[0]}", answer[0])


def _dashes(dice: Dice, answer: str) -> Problem:
    return Problem({}, f"-: {answer}", answer.replace(", ", "-"))


def _is_word(answer: str) -> bool:
    return answer.isalpha() and len(answer) > 1 and not answer.isupper()


FOLLOW_UPS = (
    FollowUp(ADD, str.isdecimal, _add),
    FollowUp(UPPER, _is_word, _upper),
    FollowUp(FIRST_LETTER, _is_word, _first_letter),
    FollowUp(DASHES, lambda answer: ", " in answer, _dashes),
)


def follow_up(dice: Dice, language: str, answer: str) -> Exchange | None:
    """A question about the last answer; None where nothing fits it."""
    fitting = [f for f in FOLLOW_UPS if language in f.phrases and f.fits(answer)]
    if not fitting:
        return None
    chosen = dice.choice(fitting)
    return put(chosen.solve(dice, answer), dice.choice(chosen.phrases[language]))
