"""Which models may be given several conversations in one row.

A packed row keeps conversations apart by its positions and by what `stages/shared/attention.py` is
told: both concern attention alone. A state that runs along the row (Mamba, linear attention), a
convolution, or a mask of a model's own making knows nothing of them, and would let each
conversation see those before it. So only architectures share a row that were seen to keep them
apart; of any other, each conversation is computed by itself, as the library computes it.
"""

from typing import Any

# Each is tested, with a window shorter than a conversation where it has one
# (tests/shared/test_row_sharing.py).
SHARING = frozenset(
    {
        "apertus",
        "arcee",
        "bitnet",
        "cohere",
        "cohere2",
        "ernie4_5",
        "exaone4",
        "gemma",
        "gemma3_text",
        "glm",
        "glm4",
        "gpt2",
        "gpt_bigcode",
        "gpt_neox",
        "granite",
        "hunyuan_v1_dense",
        "llama",
        "mistral",
        "mixtral",
        "nemotron",
        "olmo",
        "olmo2",
        "olmo3",
        "opt",
        "phi",
        "phi3",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "seed_oss",
        "smollm3",
        "stablelm",
        "starcoder2",
    }
)
# Of batches of prompts, padded on the left: their replies depend on what stands beside them.
ANSWERING_ALONE = frozenset({"rwkv"})
# Kinds of rotary embedding whose frequencies depend on the longest conversation of the row.
BY_LENGTH = frozenset({"dynamic", "longrope"})


def shares_a_row(config: Any) -> bool:
    """Whether conversations that are packed into one row of this model do not see each other.

    Args:
        config: of the model, as transformers has it.
    """
    return config.model_type in SHARING and not BY_LENGTH & _rotary_kinds(config)


def answers_in_batches(config: Any) -> bool:
    """Whether prompts of several lengths, padded on the left, leave each other's replies alone.

    Args:
        config: of the model, as transformers has it.
    """
    return config.model_type not in ANSWERING_ALONE and not BY_LENGTH & _rotary_kinds(config)


def _rotary_kinds(config: Any) -> set[str]:
    """Of all layers; a model may have parameters for each kind of them."""
    parameters = getattr(config, "rope_parameters", None) or {}
    every = (parameters, *(part for part in parameters.values() if isinstance(part, dict)))
    return {part["rope_type"] for part in every if "rope_type" in part}
