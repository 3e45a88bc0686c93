"""The section `export` of params.yaml."""

from pathlib import Path
from typing import Literal

from pydantic import ValidationInfo, field_validator

from stages.shared.core import files
from stages.shared.core.errors import UserError
from stages.shared.core.params import Section

BASE_CONFIG, TOKENIZER = Path("models/base/config.json"), Path("models/tokenizer")
Kind = Literal["gguf-f16", "gguf-bf16", "gguf-q8_0", "gguf-q4_0", "gguf-lora", "vllm-lora"]
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # of --max-lora-rank
DEFAULT: list[Kind] = ["gguf-q8_0"]


class Export(Section):
    """File formats."""

    formats: list[Kind]

    @field_validator("formats")
    @classmethod
    def _can_be_had(cls, formats: list[Kind], info: ValidationInfo) -> list[Kind]:
        """Refuse formats that the model cannot be written in, before it is trained.

        The default is not refused: for such a model its metrics say why nothing was exported.
        """
        if len({*formats}) < len(formats):
            raise ValueError("each format once")
        named = formats != DEFAULT and any(name.startswith("gguf") for name in formats)
        fetched = info.context not in (None, "fetch_data", "fetch_model") and BASE_CONFIG.exists()
        if named and fetched:
            from stages.export.architecture import Architecture, Unsupported  # noqa: PLC0415
            from stages.export.vocabulary import Vocabulary  # noqa: PLC0415

            try:
                Architecture(files.read_json(BASE_CONFIG))
                Vocabulary(TOKENIZER)
            except Unsupported as reason:
                raise refusal(str(reason)) from None
        return formats


class Params(Section):
    """The sections that dvc.yaml declares for the stage."""

    export: Export


def refusal(reason: str) -> UserError:
    """An error for formats that the user names and that cannot be had."""
    return UserError(
        f"params.yaml: export.formats: {reason}. Set [] here; llama.cpp's own "
        "convert_hf_to_gguf.py may read models/merged."
    )
