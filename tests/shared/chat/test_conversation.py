"""What a conversation is known by."""

import hashlib
import json
import random

import pytest

from stages.shared.chat.conversation import conversation_id, language_of
from tests.conversations import assistant, random_conversation, system, user


def test_the_identifier_is_the_hash_of_the_messages_as_json() -> None:
    odd = [system('"\\/\b\f\n\r\t\x00\x1f\x7f'), user("é\u2028\ue000"), assistant("😀 ")]
    draw = random.Random(0)
    for messages in [odd, *(random_conversation(draw) for _ in range(100))]:
        pairs = [[m["role"], m["content"]] for m in messages]
        text = json.dumps(pairs, ensure_ascii=False, separators=(",", ":"))
        assert conversation_id(messages) == hashlib.sha256(text.encode()).hexdigest()


def test_the_identifier_stays_what_it_was() -> None:
    """Duplicates are found by it, and people may have noted it down."""
    known = hashlib.sha256(b'[["user","two"],["assistant","four"]]').hexdigest()
    assert conversation_id([user("two"), assistant("four")]) == known


@pytest.mark.parametrize(
    ("question", "answered", "language"),
    [
        ("What is the capital of France?", "The capital of France is Paris.", "en"),
        ("¿Cuál es la capital de Francia?", "La capital de Francia es París.", "other"),
        ("Wie heißt die Hauptstadt?", "Sie heißt Paris.", "other"),
        ("What is the Russian for yes?", "да, да, да, да, да", "other"),
        ("2 + 2", "4", "other"),
        ("Is the sky blue? 😀", "It is — on most days.", "en"),
    ],
)
def test_language_is_guessed_from_users_and_replies(
    question: str, answered: str, language: str
) -> None:
    turns = [user(question), assistant(answered)]
    assert language_of([system("You are the best."), *turns]) == language
