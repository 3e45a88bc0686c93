"""Assemble the tuned model for the hub, with its card, and send it with --push.

Reads:  models/merged, models/adapter or models/exported/<format>; params.yaml, reports
Writes: upload/<name>
Run:    python -m stages.tools.upload USER/NAME [--what adapter] [--license ID] [--push]
"""

import re
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import httpx2
import yaml
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from markupsafe import Markup

from stages.evaluate.inputs import MODELS
from stages.export.__main__ import EXPORTED, Kind
from stages.report import comparison, page, sources
from stages.shared.core import files
from stages.shared.core.command import run
from stages.shared.core.errors import UserError

UPLOAD = Path("upload")
SAMPLE = "data/sample"  # public
WHAT = ["merged", "adapter", *(name for name in get_args(Kind) if not name.endswith("-lora"))]
NOTICES = yaml.safe_load((page.TEMPLATES / "notices.yaml").read_text(encoding="utf-8"))


def add_options(parser: ArgumentParser) -> None:
    """Add the repository's name and the folder to upload."""
    parser.add_argument("repo", metavar="USER/NAME", help="of the repository on the hub")
    parser.add_argument("--what", choices=WHAT, default="merged", help="or an exported format")
    parser.add_argument("--license", metavar="ID", help="of the base, as the hub spells it")
    parser.add_argument("--private", action="store_true", help="create a private repository")
    parser.add_argument("--push", action="store_true", help="send it; else it is only assembled")


def main(options: Namespace) -> None:
    """Assemble, and send with --push."""
    repo, name = options.repo, options.repo.rpartition("/")[2]
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"{repo}: is no name of a repository ({error}).") from None
    source = sources.read(Path())
    origin = sources.origin_of(source.parameters)
    licence = options.license or origin.licence
    if licence and licence.startswith("llama3") and not name.startswith("Llama"):
        raise UserError(f"{repo}: the licence {licence} asks for a name with Llama first.")
    if options.push and not licence:
        raise UserError("--license: is not known for this base. Name it as the base's page does.")
    target = UPLOAD / name
    with files.whole_folder(target) as folder:
        library = assemble(folder, options.what, origin)
        text = card(source, options.what, library, repo, licence)
        files.write_text(folder / "README.md", text)
        if licence in NOTICES:
            files.write_text(folder / "NOTICE", NOTICES[licence] + "\n")
        require_portable(folder, source.parameters)
    print(f"{target}: {files.folder_bytes(target) / 1e6:.1f} MB")
    if options.push:
        print(push(target, repo, private=options.private))


def assemble(folder: Path, what: str, origin: sources.Origin) -> str:
    """Link the files of a model or an adapter; returns the library that loads them."""
    source = MODELS.get(what, EXPORTED / what)
    if not source.is_dir():
        raise UserError(f"{source}: not there. `dvc repro` writes it, if export.formats names it.")
    if source in MODELS.values():
        from stages.shared.weights.checkpoint import Weights  # noqa: PLC0415  (brings torch)

        Weights(source)  # refuses a folder that is not whole
    files.link_folder(source, folder)
    path = folder / "adapter_config.json"
    if not path.exists():
        return "gguf" if what.startswith("gguf") else "transformers"
    config = files.read_json(path) | {"base_model_name_or_path": origin.hub}
    files.write_json(path, config)  # by a rename, which leaves the linked original as it is
    return "peft"


def card(source: sources.Sources, what: str, library: str, repo: str, licence: str | None) -> str:
    """README.md: the hub's metadata with measured results, the model card, a snippet."""
    origin = sources.origin_of(source.parameters)
    measured = (source.export if library == "gguf" else source.evaluate).get(what)
    if not measured:
        raise UserError(f"reports: have no metrics of {what}. Run `dvc repro`.")
    described: dict[str, Any] = {
        "task_type": "text-generation",
        "dataset_type": origin.data_set or "held-out",
        "dataset_name": f"held-out conversations ({measured['conversations']})",
    }
    languages = source.evaluate["merged"].get("by_language") or {}
    data = ModelCardData(
        base_model=origin.hub,
        datasets=origin.data_set,
        language=["en"] if "en" in languages else None,
        library_name=None if library == "gguf" else library,
        license=licence,
        pipeline_tag="text-generation",
        tags=["dvc-qlora", page.method(source.parameters).lower().replace(" ", "-"), library],
        model_name=repo.rpartition("/")[2],
        eval_results=[
            EvalResult(
                metric_type=name,
                metric_value=round(measured[name], 6),
                metric_name=name.replace("_", " "),
                **described,
            )
            for name in comparison.METRICS
            if measured.get(name) is not None
        ],
    )
    public = replace(source, parameters=published(source.parameters))
    metadata = Markup(data.to_yaml())  # noqa: S704  (YAML, quoted)
    notice = NOTICES.get(licence, "")
    text = page.model_card(public, what, metadata=metadata, repo=repo, notice=notice)
    return str(ModelCard(text))


def published(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters without the names of this machine's files and folders."""
    data, model = dict(parameters["data"]), dict(parameters["model"])
    is_sample = str(data.get("path")).startswith(SAMPLE)
    data["path"] = "Sample conversations of dvc-qlora" if is_sample else "Unpublished conversations"
    if model.get("source") == "path":
        model["name"] = "a local model"
    return {**parameters, "data": data, "model": model}


def require_portable(folder: Path, parameters: Mapping[str, Any]) -> None:
    """Raise a UserError if a text names a folder or file of this machine."""
    data, model = parameters["data"], parameters["model"]
    names = {str(Path.cwd()), str(Path.home())} - {"/"}
    names |= {str(data["path"])} if data.get("source") == "file" else set()
    names |= {str(model["name"])} if model.get("source") == "path" else set()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".md", "") and path.name != "tokenizer.json":
            text = path.read_text(encoding="utf-8")
            for name in sorted(names):
                if re.search(rf"(?<![\w/-]){re.escape(name)}(?![\w-])", text):
                    raise UserError(f"{path.name}: names {name}, which is of this machine alone.")


def push(folder: Path, repo: str, *, private: bool) -> str:
    """Create the repository if it is not there, and send the folder; returns its address."""
    api = HfApi()
    try:
        url = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload by dvc-qlora")
    except HfHubHTTPError as error:
        status = error.response.status_code
        advice = " Run `hf auth login`." if status in (401, 403) else ""
        raise UserError(f"{repo}: the hub answered {status}; {folder} is whole.{advice}") from None
    except (httpx2.HTTPError, OSError) as error:
        raise UserError(f"{repo}: cannot be sent ({error}); {folder} is whole.") from None
    return str(url)


if __name__ == "__main__":
    run(main, add_options)
