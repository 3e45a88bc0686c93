"""Load, train, and sum up what came of it."""

from pathlib import Path
from typing import Any

import transformers

from stages.shared import models
from stages.shared.examples import read_examples
from stages.train import computing, trainable
from stages.train.curve import Curve
from stages.train.settings import Params
from stages.train.trainer import StepTrainer


def train(settings: Params, data: Path, model_folder: Path, keep: Path) -> tuple[dict, Curve]:
    """Train, and keep the weights of the best evaluation.

    Args:
        settings: the parameters.
        data: holds train.parquet and eval.parquet.
        model_folder: the (quantized) model to start from.
        keep: an existing folder that the best adapter, or model, is written into.

    Returns:
        The metrics for `reports/train.json`, and the loss curve.
    """
    how = computing.resolve()
    examples = read_examples(data / "train.parquet")
    held_out = read_examples(data / "eval.parquet")
    transformers.set_seed(settings.train.seed)  # before the adapter's random matrices are drawn
    model = (
        trainable.load_for_lora(model_folder, settings.lora, how.device)
        if settings.train.method == "lora"
        else trainable.load_for_full(model_folder, how.device)
    )
    if how.gradient_checkpointing:
        model.config.use_cache = False
    dtype = models.compute_dtype(model_folder, how.device)
    trainer = StepTrainer(model, examples, held_out, settings.train, how, dtype, keep)
    with trainer.progress:
        trainer.train()
        trainer.evaluate()  # the last step, unless it has been
    return _metrics(trainer), trainer.curve


def _metrics(trainer: StepTrainer) -> dict[str, Any]:
    weights = trainer.trained.parameters()
    curve, how, step = trainer.curve, trainer.computing, trainer.state.global_step
    steps_per_epoch = len(trainer.get_train_dataloader())
    train_loss = curve.train_loss(curve.best_step, steps_per_epoch)
    return {
        "trainable_parameters": sum(p.numel() for p in weights if p.requires_grad),
        "steps": step,
        "loss": train_loss,
        "eval_loss": curve.best_loss,
        "generalization_gap": None if train_loss is None else curve.best_loss - train_loss,
        "best_step": curve.best_step,
        "best_epoch": curve.rows[curve.best_step]["epoch"],
        "stopped_early": step < trainer.args.max_steps,
        "peak_memory_bytes": computing.peak_memory_bytes(how.device),
        "predicted_memory_bytes": None,
        "tokens_per_second": round(trainer.tokens / trainer.seconds, 1),
        "supervised_tokens_per_second": round(trainer.supervised_tokens / trainer.seconds, 1),
        "device": how.device.type,
        "optimizer": trainer.args.optim.value,
        "micro_batch_tokens": how.micro_batch_tokens,
        "gradient_checkpointing": how.gradient_checkpointing,
        "resumed_from_step": None,
    }
