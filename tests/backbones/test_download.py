"""Released weights: fetched once, whole or not at all, and recognised afterwards."""

from __future__ import annotations

import hashlib
import logging
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from backbones import WeightsError, create_model, load_weights
from backbones.registry import MODELS
from backbones.weights.download import ZOO, cached_path, download, local_file
from tests.backbones.test_weights import TINY, VIT, tiny


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path / "home" / "hub" / "checkpoints"


def release(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Make ``url`` the address of the released weights of rev_vit_small."""
    record = replace(MODELS["rev_vit_small"], weights=url)
    monkeypatch.setitem(MODELS, "rev_vit_small", record)


class Handler(BaseHTTPRequestHandler):
    """Serves one file.

    Attributes:
        content: of the file.
        end: after how many bytes the connection breaks off.
        downloads: how often somebody read more than the headers.
    """

    content: bytes
    end: int | None
    downloads: int

    def do_GET(self) -> None:
        if self.path == "/gone.pyth":
            self.send_error(404)
            return
        self.send_response(200)
        if self.path != "/unknown_length.pyth":
            self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        if self.headers["User-Agent"] == "torch.hub":
            Handler.downloads += 1
        self.wfile.write(self.content[: self.end])

    def log_message(self, *_args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    Handler.content, Handler.end, Handler.downloads = VIT.read_bytes(), None, 0
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        threading.Thread(target=served.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{served.server_address[1]}"
        served.shutdown()


@pytest.mark.parametrize("name", ("whole.pyth", "unknown_length.pyth"))
def test_a_file_is_downloaded_once(server: str, cache: Path, name: str) -> None:
    for _ in range(2):
        path = download(f"{server}/{name}")
    assert path.read_bytes() == VIT.read_bytes() and Handler.downloads == 1
    record = path.with_name(path.name + ".sha256")
    assert record.read_text() == f"{hashlib.sha256(VIT.read_bytes()).hexdigest()}  {path.name}\n"
    assert sorted(cache.iterdir()) == sorted([path, record]), "a partial file is left"


def test_a_download_that_fails_leaves_nothing(server: str, cache: Path) -> None:
    url, Handler.end = f"{server}/model.pyth", 5000
    with pytest.raises(WeightsError, match="Not Found"):
        download(f"{server}/gone.pyth")
    with pytest.raises(WeightsError, match=r"broke off after 5000 of \d+ bytes") as caught:
        load_weights(tiny(), url)
    assert url in str(caught.value) and str(cached_path(url)) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(cache.iterdir())
    Handler.end = None
    assert download(url).read_bytes() == VIT.read_bytes()


def test_several_at_once_download_it_once(server: str, cache: Path) -> None:
    """Every process of a distributed run asks for the same weights at the same time."""
    with ThreadPoolExecutor(8) as pool:  # a file lock tells threads apart as it does processes
        for attempt in range(20):  # what can go wrong between two of them seldom does
            paths = list(pool.map(download, [f"{server}/model{attempt}.pyth"] * 8))
            assert paths[0].read_bytes() == VIT.read_bytes() and len(set(paths)) == 1
            assert Handler.downloads == attempt + 1
    assert len(list(cache.iterdir())) == 2 * 20, "a partial file is left"


def test_without_a_network_it_says_where_to_put_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/REV_VIT_S.pyth"
        release(monkeypatch, url)
        with pytest.raises(WeightsError, match="cannot download") as caught:
            create_model("rev_vit_small", pretrained=True, num_classes=5, **TINY)
        assert url in str(caught.value) and "\n" not in str(caught.value)
        assert f"put it at {cached_path(url)}" in str(caught.value)
        cached_path(url).write_bytes(VIT.read_bytes())
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
    released = MODELS["rev_vit_base"].weights
    assert released is not None and cached_path(released) == cache / "REV_VIT_B.pyth"
    assert local_file("~/model.pth") == Path.home() / "model.pth"
    put = cached_path(ZOO["mae_vit_base"])
    put.parent.mkdir(parents=True, exist_ok=True)
    put.write_bytes(b"weights")  # by hand
    assert local_file("mae_vit_base") == put == cache / "mae_pretrain_vit_base.pth"
    for url in ("ftp://a.org/model.pth", "https://a.org", "https://a.org/"):
        with pytest.raises(WeightsError, match="no address of a file"):
            download(url)


def test_pretrained(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    release(monkeypatch, VIT.as_uri())
    with caplog.at_level(logging.INFO, "backbones"):
        model = create_model("rev_vit_small", pretrained=True, num_classes=7, **TINY)
    assert (
        "41 tensors loaded" in caplog.text
        and "left out head.weight, head.bias: 5 classes" in caplog.text
    )
    reference = tiny()
    load_weights(reference, VIT)
    assert model.norm.weight.equal(reference.norm.weight)
    with pytest.raises(WeightsError, match="does not fit this RevViT"):
        create_model("rev_vit_small", pretrained=True, **{**TINY, "depth": 1})


def test_models_without_released_weights() -> None:
    assert sum(record.weights is not None for record in MODELS.values()) == 4
    with pytest.raises(ValueError, match=r"'vit_small', only for .*rev_vit_base, rev_vit_small"):
        create_model("vit_small", pretrained=True)
