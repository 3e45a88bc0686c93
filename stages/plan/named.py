"""Models by name: the configs that are shipped, and the user's own."""

from pathlib import Path

from stages.shared.core.errors import UserError

CONFIGS = Path(__file__).parent / "configs"
BASE = Path("models/base/config.json")


def names() -> str:
    """Of the shipped configs, for a message."""
    return ", ".join(sorted(path.stem for path in CONFIGS.glob("*.json")))


def config_path(model: str | None) -> Path:
    """The config of a model that is named, or of the base model.

    Raises:
        UserError: there is none.
    """
    if model is None:
        return BASE
    given, shipped = Path(model), CONFIGS / f"{model}.json"
    path = given / "config.json" if given.is_dir() else given
    if not path.is_file() and not shipped.is_file():
        raise UserError(
            f"--model is {model!r}; expected a folder with a config.json, such a file, or one of "
            f"{names()}; download the model's config.json"
        )
    return path if path.is_file() else shipped
