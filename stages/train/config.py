"""The parameters of training."""

from stages.shared.core.params import Section
from stages.shared.step.config import Lora, Train


class Params(Section):
    """The sections that dvc.yaml declares for the stage."""

    lora: Lora
    train: Train
