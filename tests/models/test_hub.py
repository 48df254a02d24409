"""A folder as it is, a hub id through the cache, and clear errors offline."""

import huggingface_hub
import pytest
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from elastic_decode.errors import CheckpointError
from elastic_decode.models import hub


def test_folder(tmp_path):
    assert hub.resolve(tmp_path) == hub.resolve(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["./absent", "/absent/model", "~/absent-model", "a/b/c", "../x"])
def test_absent_folder(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "snapshot_download", None)  # never asked
    with pytest.raises(CheckpointError, match="does not exist"):
        hub.resolve(name)


def test_a_file_is_not_a_folder(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="is a file"):
        hub.resolve(path)


def test_only_safe_files_are_asked_for(tmp_path, monkeypatch):
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert hub.resolve("owner/model", revision="v1") == tmp_path
    assert (asked["name"], asked["revision"]) == ("owner/model", "v1")
    wanted = """config.json generation_config.json tokenizer.json tokenizer_config.json merges.txt vocab.json
        tokenizer.model chat_template.jinja model.safetensors model-00001-of-00002.safetensors
        model.safetensors.index.json"""
    unsafe = """pytorch_model.bin model.pt consolidated.safetensors modeling_x.py original/consolidated.00.pth
        onnx/model.safetensors training_args.bin"""
    files = f"{wanted} {unsafe}".split()
    patterns = {"allow_patterns": asked["allow_patterns"], "ignore_patterns": asked["ignore_patterns"]}
    kept = list(huggingface_hub.utils.filter_repo_objects(files, **patterns))
    assert kept == wanted.split()


@pytest.mark.parametrize(
    ("raised", "named"),
    [
        (LocalEntryNotFoundError("no snapshot"), "cannot be reached"),
        (OfflineModeIsEnabled("offline"), "cannot get 'owner/model'"),
        (HFValidationError("bad id"), "neither a folder nor a hub id"),
        (PermissionError("cache"), "cannot get 'owner/model'"),
    ],
)
def test_errors(raised, named, monkeypatch):
    def download(name, **options):
        raise raised

    monkeypatch.setattr(hub, "snapshot_download", download)
    with pytest.raises(CheckpointError, match=named):
        hub.resolve("owner/model")


def test_offline_and_not_cached(tmp_path, monkeypatch):
    """The real client, offline, with an empty cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"'owner/model' is no folder"):
        hub.resolve("owner/model")
