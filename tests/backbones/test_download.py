"""Released weights: fetched once, whole or not at all, and recognised afterwards."""

from __future__ import annotations

import hashlib
import logging
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from backbones import WeightsError, create_model, list_models, load_weights
from backbones.weights.download import RELEASED_WEIGHTS, cached_path, download
from tests.backbones.test_weights import TINY, VIT, tiny


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path / "home" / "hub" / "checkpoints"


class Handler(BaseHTTPRequestHandler):
    """Serves one file, with faults.

    Attributes:
        content: of the file.
        etag: tells its version; None for a server that does not.
        ranges: whether a part of the file can be had.
        breaks: after how many bytes the connection breaks, for each of the next requests.
        requests: path, and first byte asked for, of each request.
    """

    content: bytes
    etag: str | None
    ranges: bool
    breaks: list[int]
    requests: list[tuple[str, int]]

    def do_GET(self) -> None:
        if self.path == "/gone.pyth":
            self.send_error(404)
            return
        start = 0
        wanted = self.headers.get("Range")
        if self.ranges and wanted and self.headers.get("If-Range") == self.etag:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        self.requests.append((self.path, start))
        size = len(self.content)
        if start and start >= size:
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        if self.path != "/unknown_length.pyth":
            self.send_header("Content-Length", str(size - start))
        if self.etag is not None:
            self.send_header("ETag", self.etag)
        self.end_headers()
        end = start + self.breaks.pop(0) if self.breaks else size
        self.wfile.write(self.content[start:end])

    def log_message(self, *_args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    Handler.content, Handler.etag, Handler.ranges = VIT.read_bytes(), '"1"', True
    Handler.breaks, Handler.requests = [], []
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        threading.Thread(target=served.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{served.server_address[1]}"
        served.shutdown()


@pytest.mark.parametrize("name", ("whole.pyth", "unknown_length.pyth"))
def test_a_file_is_downloaded_once(server: str, cache: Path, name: str) -> None:
    for _ in range(2):
        path = download(f"{server}/{name}")
    assert path.read_bytes() == VIT.read_bytes() and Handler.requests == [(f"/{name}", 0)]
    record = path.with_name(path.name + ".sha256")
    assert record.read_text() == f"{hashlib.sha256(VIT.read_bytes()).hexdigest()}  {path.name}\n"
    assert sorted(cache.iterdir()) == sorted([path, record]), "a partial file is left"


def test_a_file_that_is_not_there_leaves_nothing(server: str, cache: Path) -> None:
    with pytest.raises(WeightsError, match="Not Found"):
        download(f"{server}/gone.pyth")
    assert not list(cache.iterdir())


def test_a_broken_download_goes_on_where_it_was(server: str, cache: Path) -> None:
    Handler.breaks = [5000, 7000]
    path = download(f"{server}/model.pyth")
    assert path.read_bytes() == VIT.read_bytes()
    assert [start for _, start in Handler.requests] == [0, 5000, 12000]
    assert len(list(cache.iterdir())) == 2, "a partial file is left"


def test_the_next_call_goes_on_too(server: str, cache: Path) -> None:
    url = f"{server}/model.pyth"
    Handler.breaks = [5000, 0]
    with pytest.raises(WeightsError, match=r"kept for the next try") as caught:
        load_weights(tiny(), url)
    assert url in str(caught.value) and str(cached_path(url)) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not cached_path(url).exists()
    assert download(url).read_bytes() == VIT.read_bytes()
    assert [start for _, start in Handler.requests] == [0, 5000, 5000]
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("reason", ("no ranges", "no version", "another version", "another size"))
def test_a_download_that_cannot_go_on_starts_over(server: str, reason: str) -> None:
    url = f"{server}/model.pyth"
    Handler.breaks = [5000, 0]
    if reason == "no version":
        Handler.etag = None
    with pytest.raises(WeightsError):
        download(url)
    Handler.requests.clear()
    if reason == "no ranges":
        Handler.ranges = False
    elif reason == "another version":
        Handler.content, Handler.etag = Handler.content[::-1], '"2"'
    elif reason == "another size":
        Handler.content = Handler.content[:4000]
    assert download(url).read_bytes() == Handler.content
    assert [start for _, start in Handler.requests][-1] == 0


def test_a_server_that_always_breaks_off_is_not_asked_for_ever(server: str) -> None:
    Handler.breaks, Handler.ranges = [5000] * 9, False
    with pytest.raises(WeightsError, match=r"after 5000 of|IncompleteRead"):
        download(f"{server}/model.pyth")
    assert len(Handler.requests) == 2


def test_several_at_once_download_it_once(server: str, cache: Path) -> None:
    """Every process of a distributed run asks for the same weights at the same time."""
    with ThreadPoolExecutor(8) as pool:  # a file lock tells threads apart as it does processes
        for attempt in range(20):  # what can go wrong between two of them seldom does
            paths = list(pool.map(download, [f"{server}/model{attempt}.pyth"] * 8))
            assert paths[0].read_bytes() == VIT.read_bytes() and len(set(paths)) == 1
            assert len(Handler.requests) == attempt + 1
    assert len(list(cache.iterdir())) == 2 * 20, "a partial file is left"


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
