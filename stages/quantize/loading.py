"""A model quantized as it is read, a tensor at a time."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.utils.logging import set_tqdm_hook

from stages.quantize.settings import FOUR_BIT, Quantize
from stages.quantize.stored import Weights
from stages.shared import heap
from stages.shared.core import progress
from stages.shared.core.errors import UserError
from stages.shared.precision import DTYPES


def load(weights: Weights, settings: Quantize, device: torch.device) -> PreTrainedModel:
    """Quantize tensor by tensor, so that little but the result is ever in memory.

    Not `models.load_model`: what that sets for the machine it runs on must not be written. And not
    `from_pretrained(folder)`: of what it has read, nothing leaves memory until all is read.

    Raises:
        UserError: weights are missing, or config.json makes no model or one of other sizes.
    """
    empty = _empty(weights.folder)
    try:
        with loading_bar(f"into {settings.precision}"):
            model, found = type(empty).from_pretrained(
                None,
                config=empty.config,
                state_dict=weights.unread(),
                dtype=DTYPES[settings.dense_dtype],
                device_map={"": device},
                quantization_config=quantization_config(settings),
                output_loading_info=True,
            )
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise UserError(
            f"{weights.folder}/config.json: describes other sizes than its *.safetensors hold; "
            "expected the config that the weights were saved with; choose another model"
        ) from None
    require_all(found["missing_keys"], weights.folder)
    return model


def _empty(base: Path) -> PreTrainedModel:
    """The model that the config describes, without weights."""
    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{base}/config.json: transformers can make no model of it ({error!r:.200}); expected "
            "the config of a causal language model; mend it, or choose another model"
        ) from None


def quantization_config(settings: Quantize) -> BitsAndBytesConfig | None:
    """What bitsandbytes is asked for; None for a dense precision."""
    if settings.precision in FOUR_BIT:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=settings.precision,
            bnb_4bit_use_double_quant=settings.double_quant,
            bnb_4bit_compute_dtype=DTYPES[settings.compute_dtype],
        )
    return BitsAndBytesConfig(load_in_8bit=True) if settings.precision == "int8" else None


def require_all(missing: Collection[str], base: Path) -> None:
    """Refuse a base that lacks weights, which transformers would draw at random.

    Raises:
        UserError: names the first of them.
    """
    if missing:
        raise UserError(
            f"{base}: {min(missing)} is in none of its *.safetensors ({len(missing)} weights are "
            "missing); expected all weights of the model that config.json describes; choose "
            "another model"
        )


@contextmanager
def loading_bar(desc: str) -> Iterator[None]:
    """Show our progress bar where transformers, loading tensor by tensor, would show its own.

    Between tensors, what they took and freed is given back.
    """

    def shown(
        _factory: Any, args: tuple[Collection[Any]], _kwargs: dict[str, Any]
    ) -> Iterator[Any]:
        trim = heap.Trimmer()
        with progress.bar(total=len(args[0]), desc=desc, unit="tensor") as bar:
            for item in args[0]:
                yield item
                trim()
                bar.update()

    previous = set_tqdm_hook(shown)
    try:
        yield
    finally:
        set_tqdm_hook(previous)
