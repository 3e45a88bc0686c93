"""How a model is tuned, as far as its memory goes."""

from dataclasses import dataclass
from typing import Literal

from stages.shared import memory
from stages.shared.blocks import LINEAR, Flow
from stages.shared.memory import DensePrecision, Optimizer, Persistent, Precision
from stages.shared.step.adapter_sizes import Adapter
from stages.shared.tensors import Model

Device = Literal["cpu", "cuda"]
SWITCHED_OFF = "QLORA_FUSED is false"


@dataclass(frozen=True)
class Tuning:
    """How a model is tuned.

    Attributes:
        precision: of the linear layers.
        adapter: what is trained beside them; None to train all weights.
        double_quant: of fp4 and nf4.
        compute: what int8, fp4 and nf4 are computed in, and the precision of what stays dense.
        optimizer: adamw or adamw_8bit.
        gradient_checkpointing: whether each block is computed again in the backward pass.
        dropout: whether the adapter's input is dropped out.
        device: whose kernels run.
        paged: count what a paged optimizer may move to the host as being there.
        masters: full fine-tuning in bf16 keeps fp32 weights, as `train` does; False for pure bf16.
        fusing: use the functions of stages/shared/step/fused where they cover what is trained.
        bf16: whether the device has products of bf16, see `precision.has_bf16_matmuls`.
    """

    precision: Precision
    adapter: Adapter | None
    double_quant: bool = False
    compute: DensePrecision = "bf16"
    optimizer: Optimizer = "adamw"
    gradient_checkpointing: bool = False
    dropout: bool = False
    device: Device = "cuda"
    paged: bool = False
    masters: bool = True
    fusing: bool = True
    bf16: bool = True

    @property
    def unfused_because(self) -> str | None:
        """Why a step is computed by the library's own modules; None where it is fused."""
        adapter = self.adapter
        if not self.fusing:
            return SWITCHED_OFF
        if adapter is None:
            return "train.method is full"
        if self.precision == "int8":
            return "quantize.precision is int8"
        reasons = {
            "lora.dropout is not 0": self.dropout,
            "lora.dora is true": adapter.magnitudes,
            "lora.init is pissa or olora": adapter.anchored,
            "lora.modules_to_save are trained too": adapter.copies,
            "lora.bias is not none": adapter.biases,
            "lora.target_modules leave out a linear layer": not adapter.everywhere,
            "lora.target_modules take in the head": adapter.head,
        }
        return next((reason for reason, holds in reasons.items() if holds), None)

    @property
    def fused(self) -> bool:
        """Whether stages/shared/step/fused runs, if the model's blocks are known."""
        return self.unfused_because is None

    @property
    def nested(self) -> bool:
        """Whether what double quantization made of the constants is what stays in memory.

        Not on a CPU in the fused step, see `stages.shared.step.fused.lora.dequantize_absmax`.
        """
        return self.double_quant and not (self.fused and self.device == "cpu")

    @property
    def dense(self) -> str:
        """What is not quantized is in, and products run in; fp32 where the device has no others."""
        has = {"fp16": self.device != "cpu", "bf16": self.bf16}
        return self.kept if has.get(self.kept, True) else "fp32"

    @property
    def kept(self) -> str:
        """What files hold that is not quantized."""
        return memory.dense_precision(self.precision, self.compute)

    @property
    def rounds_masters(self) -> bool:
        """Whether fp32 masters hold more than the file that is made of them."""
        return self.loaded == "fp32" and self.kept != "fp32"

    @property
    def loaded(self) -> str:
        """Precision of the linear layers once they are loaded, or of the masters."""
        if self.adapter is None:
            return "fp32" if self.masters else self.dense
        return self.dense if self.precision in memory.DENSE_BYTES else self.precision

    @property
    def flow(self) -> Flow:
        """What numbers are in as they pass through a block."""
        size = memory.DENSE_BYTES[self.dense]
        if self.adapter is None:
            stream = memory.DENSE_BYTES[self.loaded]
            return Flow(stream=stream, compute=size, trained=True, kernel=self.device == "cuda")
        adapted = self.adapter.layers.intersection(LINEAR)
        return Flow(
            stream=size,
            compute=size,
            rank=self.adapter.multiplied_rank if adapted else 0,
            adapted=adapted,
            widened=not self.fused
            and size < 4
            and (self.loaded in memory.DENSE_BYTES or self.device == "cpu"),
            keeps_input=self.precision == "int8",
            dropout=(1 if self.device == "cuda" else 4) if self.dropout else 0,
            fused=self.fused,
            kernel=self.device == "cuda",
        )

    @property
    def casts_trained(self) -> bool:
        """Whether autocast makes half-precision copies of what is trained in fp32."""
        return self.dense != "fp32" and (self.adapter is not None or self.loaded == "fp32")

    def trained_sizes(self, model: Model) -> list[int]:
        """Elements of each trained tensor, in the order in which the optimizer comes to them."""
        if self.adapter is not None:
            return self.adapter.sizes
        tensors = [t for t in model.tensors if not t.tied]
        return [t.size for t in sorted(tensors, key=lambda t: len(t.shape) < 2)]

    def persistent(self, model: Model) -> Persistent:
        """What is there from step to step; gradients from a step's first micro-batch on."""
        sizes, adapter = self.trained_sizes(model), self.adapter
        optimizer_bytes = memory.optimizer_bytes(self.optimizer, sizes)
        if self.paged:
            optimizer_bytes -= memory.pageable_bytes(self.optimizer, sizes)
        weights_bytes = memory.weights_bytes(
            model.tensors, self.loaded, double_quant=self.nested, dense=self.dense
        )
        if adapter is None:
            gradients = memory.gradients_bytes(sum(sizes), self.loaded)
            return Persistent(weights_bytes, 0, gradients, optimizer_bytes)
        # A bias is among the weights already, in the precision of what is dense.
        widened = (4 - memory.DENSE_BYTES[self.dense]) * sum(adapter.biases)
        return Persistent(
            weights_bytes,
            adapter_bytes=memory.dense_bytes(adapter.held, "fp32") + widened,
            gradients_bytes=memory.gradients_bytes(sum(sizes)),
            optimizer_bytes=optimizer_bytes,
        )
