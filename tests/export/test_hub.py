"""Uploads: what is sent, what is refused before and after the export, and that the export stays."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from click.testing import CliRunner, Result
from huggingface_hub import HfApi, RepoUrl

from ast_sparse.cli.export import main
from ast_sparse.errors import UserError
from ast_sparse.export.export import export_model
from ast_sparse.export.hub import check_push, push_folder
from ast_sparse.storage.files import read_json
from ast_sparse.storage.load import load_causal_lm
from tests.export.sparse_models import save_training_checkpoint, sparse_model


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No token of the developer, and an address where nobody answers."""
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the public methods of the client were called with; the repository is public."""
    calls: dict[str, Any] = {"is_private": False}

    def create_repo(self: HfApi, repo_id: str, **kwargs: Any) -> RepoUrl:
        calls["created"] = (repo_id, kwargs)
        return RepoUrl(f"{self.endpoint}/{repo_id}", endpoint=self.endpoint)

    def upload_folder(self: HfApi, **kwargs: Any) -> None:
        folder = Path(kwargs["folder_path"])
        calls["uploaded"] = kwargs
        calls["files"] = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(HfApi, "repo_info", lambda self, repo_id: SimpleNamespace(private=calls["is_private"]))
    return calls


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_training_checkpoint(sparse_model(slorb_k=8), tmp_path / "checkpoint")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def error_line(result: Result) -> str:
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert result.stderr.rstrip().endswith(line)
    return line


def test_the_finished_export_is_uploaded_with_a_card_that_names_the_repository(
    source: Path, tmp_path: Path, sent: dict[str, Any]
) -> None:
    result = run(source, tmp_path / "out", "--push-to-hub", "me/model")
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith("Uploaded to http://127.0.0.1:9/me/model\n")  # the hub of HF_ENDPOINT
    assert sent["created"] == ("me/model", {"private": None, "exist_ok": True})
    assert sent["uploaded"]["repo_id"] == "me/model" and sent["uploaded"]["folder_path"] == tmp_path / "out"
    assert sent["files"] >= {"README.md", "config.json", "model.safetensors", "slorb/adapter_config.json"}
    assert 'from_pretrained("me/model")' in (tmp_path / "out" / "README.md").read_text()
    adapter = read_json(tmp_path / "out" / "slorb" / "adapter_config.json")
    assert adapter["base_model_name_or_path"] == "me/model"  # not a folder of this machine


def test_weights_of_an_earlier_upload_go(tmp_path: Path, sent: dict[str, Any]) -> None:
    export_model(sparse_model(), tmp_path / "out", push_to_hub="me/model")
    stale = sent["uploaded"]["delete_patterns"]
    old = ["model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "slorb/x", "my.bin"]
    assert list(huggingface_hub.utils.filter_repo_objects(old, allow_patterns=stale)) == old[:-1]


def test_private_is_never_public(source: Path, tmp_path: Path, sent: dict[str, Any]) -> None:
    line = error_line(run(source, tmp_path / "out", "--push-to-hub", "me/model", "--private"))
    assert "me/model exists and is public" in line and "uploaded" not in sent
    assert sent["created"][1]["private"] is True
    sent["is_private"] = True
    assert run(source, tmp_path / "other", "--push-to-hub", "me/model", "--private").exit_code == 0
    assert sent["uploaded"]["repo_id"] == "me/model"
    line = error_line(run(source, tmp_path / "third", "--private"))
    assert "--private (True) has no effect without --push-to-hub" in line and not (tmp_path / "third").exists()


def test_what_can_be_known_before_is_refused_before(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: dict[str, Any]
) -> None:
    for name in ("a/b/c d", "model"):
        line = error_line(run(source, tmp_path / "out", "--push-to-hub", name))
        assert f"--push-to-hub: '{name}' is not a repository id. Use USER/NAME." in line
    monkeypatch.delenv("HF_TOKEN")
    line = error_line(run(source, tmp_path / "out", "--push-to-hub", "me/model"))
    assert "hf auth login" in line and not (tmp_path / "out").exists() and "created" not in sent
    with pytest.raises(UserError, match="push_to_hub: me/model needs a token"):
        check_push("me/model")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    line = error_line(run(source, tmp_path / "out", "--push-to-hub", "me/model"))
    assert "while HF_HUB_OFFLINE is set" in line and not (tmp_path / "out").exists()
    line = error_line(run(source, "--table", "--push-to-hub", "me/model"))
    assert "has no effect without OUT" in line


def test_a_hub_that_does_not_answer_leaves_the_export(source: Path, tmp_path: Path) -> None:
    line = error_line(run(source, tmp_path / "an out", "--push-to-hub", "me/model"))
    assert "--push-to-hub: me/model was not uploaded: the hub cannot be reached" in line
    assert line.endswith(f"upload it later with: hf upload me/model '{tmp_path / 'an out'}'")
    load_causal_lm(tmp_path / "an out")


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A hub that answers every request with the status in the list."""
    status = [500]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(status[0])
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield status
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, "the hub does not accept the token. Run `hf auth login`."),
        (403, "the token may not write there."),
        (500, "Server error '500"),
    ],
)
def test_a_refusal_of_the_hub_is_one_line(status: int, said: str, tmp_path: Path, answer: list[int]) -> None:
    answer[0] = status
    with pytest.raises(UserError) as caught:
        push_folder(tmp_path, "me/model")
    assert f"push_to_hub: me/model was not uploaded: {said}" in str(caught.value) and "\n" not in str(caught.value)
    assert f"hf upload me/model {tmp_path}" in str(caught.value)
