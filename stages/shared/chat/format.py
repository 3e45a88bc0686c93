"""How conversations were rendered: what `prepare` notes, and others go by."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from stages.shared.core import files

SCHEMA_VERSION = 1


class Format(BaseModel):
    """`data/prepared/format.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int
    template: str
    chat_template: str  # Jinja, for the merged model
    eos_token: str  # what ends a reply; the merged model's end token
    stop_ids: list[int]  # tokens that end a generated reply


def read_format(path: Path) -> Format:
    """Read `format.json`."""
    return Format.model_validate(files.read_json(path))
