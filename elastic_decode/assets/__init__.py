"""What comes in the package besides code: the bundled tiny model, which `make bundled-model` trains."""

from pathlib import Path


def tiny_model_path() -> Path:
    """The folder of the bundled model: config.json, model.safetensors, tokenizer.json with a chat template.

    It loads in `Engine.from_pretrained` and in transformers as it is. Raises FileNotFoundError where the
    package was installed without it.
    """
    folder = Path(__file__).parent / "tiny"
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"the bundled model is not in {folder}; reinstall, or run `make bundled-model`"
        )
    return folder
