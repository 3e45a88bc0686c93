"""Conversations that call tools: `python data/sample_tools/generate.py` writes them beside it."""

import json
import random
from pathlib import Path
from typing import Any

CITIES = "Oslo Lima Cairo Quito Turin Kyoto Perth Accra Delhi Bergen Malmö Porto".split()  # noqa: SIM905
NAMES = "Ana Ben Chloe Dmitri Eva Farid Grace Hugo Ines Jonas Kira Liam".split()  # noqa: SIM905
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()  # noqa: SIM905
EVENTS = ["a call", "lunch", "chess", "yoga", "a review", "choir", "the dentist", "a lesson"]
MONEY = ["euros", "dollars", "yen", "pounds", "francs", "rupees"]
NEWS = ["I am late", "the train is full", "dinner is ready", "see you at six", "call me back"]
# Description, parameters, requests, a result and what is said of it.
TOOLS: dict[str, tuple[str, dict[str, str], list[str], str, str]] = {
    "get_weather": (
        "Weather of a city now.",
        {"city": "string"},
        ["What is the weather in {city}?", "Is it cold in {city}?", "Does it rain in {city}?"],
        '{{"degrees": {n}}}',
        "It is {n} degrees in {city}.",
    ),
    "set_timer": (
        "Start a timer.",
        {"minutes": "integer"},
        [
            "Set a timer for {minutes} minutes.",
            "Wake me in {minutes} minutes.",
            "{minutes} minutes, go.",
        ],
        "started",
        "The timer runs for {minutes} minutes.",
    ),
    "convert": (
        "Convert an amount of money.",
        {"amount": "number", "source": "string", "target": "string"},
        ["How much are {amount} {source} in {target}?", "Change {amount} {source} into {target}."],
        "{n}",
        "{amount} {source} are {n} {target}.",
    ),
    "send_message": (
        "Send a text to a person.",
        {"to": "string", "text": "string"},
        ["Tell {to}: {text}.", "Write to {to} that {text}.", "Message {to}: {text}"],
        "sent",
        "I sent it to {to}.",
    ),
    "add_event": (
        "Add an event to the calendar.",
        {"day": "string", "hour": "integer", "title": "string"},
        ["Put {title} on {day} at {hour}.", "I have {title} on {day} at {hour} o'clock, note it."],
        "added",
        "{title} is in your calendar for {day} at {hour}.",
    ),
}  # fmt: skip


def schema(name: str) -> dict[str, Any]:
    """A tool in OpenAI's form."""
    description, parameters, *_ = TOOLS[name]
    properties = {key: {"type": kind} for key, kind in parameters.items()}
    described = {"type": "object", "properties": properties, "required": [*properties]}
    function = {"name": name, "description": description, "parameters": described}
    return {"type": "function", "function": function}


def row(rng: random.Random) -> dict[str, Any]:
    """A request, the call, and in a third of the rows its result and an answer."""
    values: dict[str, Any] = {"city": rng.choice(CITIES), "minutes": rng.randint(2, 90)}
    source, target = rng.sample(MONEY, 2)
    values |= {"amount": rng.randint(3, 999), "source": source, "target": target}
    values |= {"to": rng.choice(NAMES), "text": rng.choice(NEWS), "day": rng.choice(DAYS)}
    values |= {"hour": rng.randint(7, 20), "title": rng.choice(EVENTS)}
    name = rng.choice([*TOOLS])
    _, parameters, requests, result, answer = TOOLS[name]
    arguments = {key: values[key] for key in parameters}
    function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
    call = {"id": f"call{rng.randint(10000, 99999)}", "type": "function", "function": function}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": rng.choice(requests).format(**values)},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    if rng.random() < 1 / 3:
        values["n"] = rng.randint(1, 40)
        said = answer.format(**values)
        messages.append(
            {"role": "tool", "tool_call_id": call["id"], "content": result.format(**values)}
        )
        messages.append({"role": "assistant", "content": said[0].upper() + said[1:]})
    others = [other for other in TOOLS if other != name]
    names = [name] if rng.random() < 0.5 else rng.sample([name, rng.choice(others)], 2)
    return {"messages": messages, "tools": [schema(one) for one in names]}


def main(count: int = 300) -> None:
    """Write rows whose requests all differ."""
    rng, seen = random.Random(25), dict[str, str]()  # noqa: S311
    while len(seen) < count:
        made = row(rng)
        seen.setdefault(made["messages"][0]["content"], json.dumps(made, ensure_ascii=False))
    path = Path(__file__).with_name("conversations.jsonl")
    path.write_text("".join(f"{line}\n" for line in seen.values()), encoding="utf-8")


if __name__ == "__main__":
    main()
