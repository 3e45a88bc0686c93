"""LoRA weights are cast once a step on a GPU."""

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear

from stages.shared.step.fused import gpu, lora

LAYER = Linear(torch.nn.Linear(3, 4), lora.ADAPTER, LoraConfig(), r=2)


def cast() -> torch.Tensor:
    return lora.LoraLinears([LAYER], lora.lora_weights(LAYER), torch.bfloat16).a


@pytest.mark.parametrize("on_gpu", [True, False])
def test_cast_cache_keeps_weights_for_a_step_on_a_gpu(
    on_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "on_gpu", lambda device: on_gpu)
    with lora.cast_cache():
        first = cast()
        assert (cast() is first) == on_gpu
    with lora.cast_cache():
        assert cast() is not first
    with pytest.raises(KeyError), lora.cast_cache():
        first = cast()
        raise KeyError
    assert cast() is not first
