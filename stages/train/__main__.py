"""Train the adapter, or in full fine-tuning all weights, and keep the best evaluation.

Reads:  data/prepared/train.parquet, data/prepared/eval.parquet, models/quantized,
        models/base (for lora.init loftq); data/prepared/format.json, models/tokenizer and
        models/source.json, which go with the adapter
Writes: models/adapter, reports/train.json, reports/details/train.json, reports/train/loss.csv
Run:    python -m stages.train
        Stopped or killed, it resumes from its last checkpoint when it is run again. The loss
        so far is in .checkpoints/<fingerprint>/loss.csv after every step.
"""

from pathlib import Path

from stages.shared.core import files, params
from stages.shared.core.command import quick_imports, run
from stages.shared.core.machine import device, machine, root
from stages.train.config import Params

INPUTS = {
    "train": Path("data/prepared/train.parquet"),
    "eval": Path("data/prepared/eval.parquet"),
    "model": Path("models/quantized"),
    "original": Path("models/base"),
}
HANDED_OVER = {
    "model": INPUTS["model"],
    "tokenizer": Path("models/tokenizer"),
    "format": Path("data/prepared/format.json"),
    "source": Path("models/source.json"),
}
ADAPTER = Path("models/adapter")
METRICS = Path("reports/train.json")
CURVE = Path("reports/train/loss.csv")
DETAILS = Path("reports/details/train.json")  # with the machine and versions
COMPARED = {
    *("trainable_parameters", "steps", "loss", "eval_loss", "generalization_gap", "best_step"),
    *("stopped_early", "peak_memory_bytes", "predicted_memory_bytes", "tokens_per_second"),
    *("supervised_tokens_per_second", "device", "optimizer", "micro_batch_tokens"),
    *("gradient_checkpointing", "resumed_from_step", "trainable_by_kind"),
}


def main() -> None:
    """Read, train, write."""
    settings = params.load(Params, "train")
    # Imported late: a mistake in params.yaml is reported before the seconds that torch takes.
    with quick_imports():
        import stages.shared.model.loading  # noqa: F401, PLC0415  (before peft)

        # isort: split
        from stages.shared.parallel.group import joined  # noqa: PLC0415
        from stages.train.checkpoints import claim, fingerprint, identity  # noqa: PLC0415
        from stages.train.devices import train, train_on  # noqa: PLC0415
        from stages.train.handover import hand_over  # noqa: PLC0415
        from stages.train.recipe import Data  # noqa: PLC0415

    loftq = settings.train.method == "lora" and settings.lora.init == "loftq"
    read = [path for role, path in INPUTS.items() if role != "original" or loftq]
    same = identity(settings, device().type, read)
    for path in HANDED_OVER.values():
        path.stat()  # a missing one is an error now, not after hours of training
    with joined(device()) as member:
        if member and not member[0].is_main:
            train_on(*member, settings, INPUTS, Data.read(INPUTS), same)  # the first one writes
            return
        with claim(root(), fingerprint(same), machine().keep_checkpoints) as checkpoints:
            result = train(settings, INPUTS, checkpoints, same, member)
            with files.whole_folder(ADAPTER) as partial:
                files.link_folder(checkpoints.best, partial)
                hand_over(partial, HANDED_OVER)
            result.history.write(CURVE)
            files.write_report(METRICS, DETAILS, result.metrics, COMPARED)
            checkpoints.clear()


if __name__ == "__main__":
    run(main)
