"""Released weights: fetched once, whole or not at all, and recognised afterwards."""

from __future__ import annotations

import hashlib
import logging
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from backbones import WeightsError, create_model, list_models, load_weights
from backbones.download import RELEASED_WEIGHTS, cached_path, download
from tests.backbones.test_weights import TINY, VIT, tiny


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path / "home" / "hub" / "checkpoints"


class Handler(BaseHTTPRequestHandler):
    requests: list[str]

    def do_GET(self) -> None:
        self.requests.append(self.path)
        content = VIT.read_bytes()
        self.send_response(404 if self.path == "/gone.pyth" else 200)
        if self.path != "/unknown_length.pyth":
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:5000] if self.path == "/broken.pyth" else content)

    def log_message(self, *_args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    Handler.requests = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_address[1]}"
        served.shutdown()


@pytest.mark.parametrize("name", ("whole.pyth", "unknown_length.pyth"))
def test_a_file_is_downloaded_once(server: str, cache: Path, name: str) -> None:
    for _ in range(2):
        path = download(f"{server}/{name}")
    assert path.read_bytes() == VIT.read_bytes() and Handler.requests == [f"/{name}"]
    record = path.with_name(path.name + ".sha256")
    assert record.read_text() == f"{hashlib.sha256(VIT.read_bytes()).hexdigest()}  {path.name}\n"
    assert sorted(cache.iterdir()) == sorted([path, record]), "a partial file is left"


@pytest.mark.parametrize(
    "name, message", (("broken.pyth", "after 5000 of|IncompleteRead"), ("gone.pyth", "Not Found"))
)
def test_a_broken_download_leaves_nothing(
    server: str, cache: Path, name: str, message: str
) -> None:
    url = f"{server}/{name}"
    with pytest.raises(WeightsError, match=message) as caught:
        load_weights(tiny(), url)
    assert url in str(caught.value) and str(cached_path(url)) in str(caught.value)
    assert not list(cache.iterdir())


def test_without_a_network_the_error_says_where_to_put_the_file(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/REV_VIT_S.pyth"
        monkeypatch.setitem(RELEASED_WEIGHTS, "rev_vit_small", url)
        with pytest.raises(WeightsError, match="cannot download") as caught:
            create_model("rev_vit_small", pretrained=True, num_classes=5, **TINY)
        assert url in str(caught.value) and "\n" not in str(caught.value)
        assert f"put it at {cache / 'REV_VIT_S.pyth'}" in str(caught.value)
        (cache / "REV_VIT_S.pyth").write_bytes(VIT.read_bytes())
        create_model("rev_vit_small", pretrained=True, num_classes=5, **TINY)


def test_a_file_that_changed_is_refused(cache: Path) -> None:
    path = download(VIT.as_uri())
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(WeightsError, match=r"not the file of the checksum in .*\.sha256; delete"):
        load_weights(tiny(), VIT.as_uri())
    for file in cache.iterdir():
        file.unlink()
    assert load_weights(tiny(), VIT.as_uri()).source == VIT.as_uri()


def test_addresses(cache: Path) -> None:
    one, other = (cached_path(f"https://{host}.org/model.pth?x=1") for host in "ab")
    assert one != other and one.suffix == other.suffix == ".pth"
    released = cached_path(RELEASED_WEIGHTS["rev_vit_base"])
    assert released == cache / "REV_VIT_B.pyth"
    for url in ("ftp://a.org/model.pth", "https://a.org", "https://a.org/"):
        with pytest.raises(WeightsError, match="no address of a file"):
            download(url)


def test_create_model_pretrained(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(RELEASED_WEIGHTS, "rev_vit_small", VIT.as_uri())
    with caplog.at_level(logging.INFO, "backbones"):
        model = create_model("rev_vit_small", pretrained=True, num_classes=7, **TINY)
    assert "41 tensors loaded" in caplog.text and "left out head.weight: 5 classes" in caplog.text
    reference = tiny()
    load_weights(reference, VIT)
    assert model.norm.weight.equal(reference.norm.weight)
    with pytest.raises(WeightsError, match="does not fit this RevViT"):
        create_model("rev_vit_small", pretrained=True, **{**TINY, "depth": 1})


def test_models_without_released_weights() -> None:
    assert set(RELEASED_WEIGHTS) <= set(list_models())
    with pytest.raises(ValueError, match=r"'vit_small', only for .*rev_vit_base, rev_vit_small"):
        create_model("vit_small", pretrained=True)
