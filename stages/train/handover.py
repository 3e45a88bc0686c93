"""Adapter as others load it: with its tokenizer, the name of its base model, and a card."""

from collections.abc import Mapping
from pathlib import Path

from transformers import AutoConfig

from stages.shared.core import files
from stages.shared.model.loading import is_adapter, save_tokenizer
from stages.shared.step.memory.setup import stored_as

_CARD = """---
{metadata}library_name: peft
pipeline_tag: text-generation
---

# Adapter of {name}

Trained on {name}, its linear layers in {precision}. The tokenizer carries the chat template of
training. Load it with transformers and peft:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained({arguments})
model = PeftModel.from_pretrained(base, "models/adapter")
tokenizer = AutoTokenizer.from_pretrained("models/adapter")
```

{note}
"""
_QUANTIZED = "`models/quantized` of the repository that trained it (`dvc repro quantize`)"


def hand_over(folder: Path, inputs: Mapping[str, Path]) -> None:
    """Add tokenizer and card to a folder of adapter or model files; links stay as they are.

    A base model of the hub is named by id and commit; any other loads from `models/quantized`.
    """
    rows = AutoConfig.from_pretrained(inputs["model"]).get_text_config().vocab_size
    save_tokenizer(inputs["tokenizer"], folder, files.read_json(inputs["format"]), rows)
    if not is_adapter(folder):
        return
    source, config = files.read_json(inputs["source"]), folder / "adapter_config.json"
    name, arguments, metadata = "the base model", '"models/quantized"', ""
    note = f"The base model is {_QUANTIZED}."
    if source["source"] == "pypi":
        note = f"{note[:-1]}, made from {source['file']} of {source['name']} {source['revision']}."
    if source["source"] == "hub":
        name, revision = source["name"], source["revision"]
        arguments, metadata = f'"{name}", revision="{revision}"', f"base_model: {name}\n"
        note = f"The very weights that it was trained on are {_QUANTIZED}."
        base = {"base_model_name_or_path": name, "revision": revision}
        files.write_json(config, files.read_json(config) | base)
    values = {"name": name, "arguments": arguments, "metadata": metadata, "note": note}
    precision = stored_as(inputs["model"] / "config.json").precision
    files.write_text(folder / "README.md", _CARD.format(**values, precision=precision))
