"""The parameters of training."""

from stages.shared.core.params import Section
from stages.shared.step.config import Lora, Train


class Params(Section):
    """What dvc.yaml declares for `train`."""

    lora: Lora
    train: Train
