import hashlib
import io
import json
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from perlhf.data.pull import pull, safe_extract, sources
from perlhf.data.read import read
from perlhf.errors import DataError, StorageError

PANDALM = sources()["pandalm"]
ROW = {"instruction": "Say.", "input": "", "response1": "a", "response2": "b"}
CONTENT = json.dumps([ROW | {"annotator1": 1, "annotator2": 1, "annotator3": 1}]).encode()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


class Cut(BaseHTTPRequestHandler):
    """Promises more bytes than it sends."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "100")
        self.end_headers()
        self.wfile.write(b"short")

    def log_message(self, format: str, *args: object) -> None:
        pass


def serve(handler) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def published(tmp_path: Path) -> Path:
    place = tmp_path / "web" / PANDALM["repository"] / PANDALM["commit"] / "data" / "testset-v1.json"
    place.parent.mkdir(parents=True)
    place.write_bytes(CONTENT)
    return tmp_path / "web"


@pytest.fixture
def address(published: Path) -> Iterator[str]:
    yield from serve(partial(Quiet, directory=str(published)))


@pytest.fixture
def cut_address() -> Iterator[str]:
    yield from serve(Cut)


def local_copy(directory: Path, name: str, content: bytes, sha256: str | None = None) -> Path:
    (directory / name).parent.mkdir(parents=True, exist_ok=True)
    (directory / name).write_bytes(content)
    entry = {"file": name, "sha256": sha256 or hashlib.sha256(content).hexdigest()}
    (directory / "MANIFEST.json").write_text(json.dumps([entry]))
    return directory


def test_the_list_of_sets_is_complete() -> None:
    known = sources()
    assert {name: len(one["files"]) for name, one in known.items()} == {
        "taskmaster-coffee": 15,
        "taskmaster-ticketing": 9,
        "hh-rlhf": 1,
        "hhh-alignment": 1,
        "oasst": 1,
        "pandalm": 1,
        "llmbar": 5,
        "mt-bench": 1,
        "feedbackqa": 6,
        "squality": 2,
        "uibert": 2,
    }
    assert all(
        len(one["commit"]) == 40 and one["licence"] and one["repository"].count("/") == 1 for one in known.values()
    )


def test_download(tmp_path: Path, address: str, published: Path) -> None:
    target = pull("pandalm", tmp_path / "out", address=address)
    assert target == tmp_path / "out" / "pandalm"
    assert (target / "testset-v1.json").read_bytes() == CONTENT
    manifest = json.loads((target / "MANIFEST.json").read_text())
    (entry,) = manifest["files"]
    assert manifest["licence"] == "Apache-2.0"
    assert entry["sha256"] == hashlib.sha256(CONTENT).hexdigest() and entry["bytes"] == len(CONTENT)
    assert entry["address"] == f"{address}/WeOpenML/PandaLM/{PANDALM['commit']}/data/testset-v1.json"
    assert len(read(str(target))) == 1
    (published / PANDALM["repository"] / PANDALM["commit"] / "data" / "testset-v1.json").unlink()
    assert pull("pandalm", tmp_path / "out", address=address) == target, "a second pull downloads nothing"
    (target / "testset-v1.json").write_bytes(b"changed")
    with pytest.raises(DataError, match="the SHA-256 is"):
        pull("pandalm", tmp_path / "out", address=address)


def test_failed_downloads_leave_nothing(
    tmp_path: Path, address: str, cut_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with pytest.raises(DataError, match="the server answered 404"):
        pull("oasst", out, address=address)
    with pytest.raises(DataError, match="the download ended after 5 of 100 bytes"):
        pull("oasst", out, address=cut_address)
    monkeypatch.setenv("PERLHF_DATA_ADDRESS", "http://127.0.0.1:9")
    with pytest.raises(DataError, match="the download failed") as caught:
        pull("oasst", out)
    assert "--source" in (caught.value.hint or "") and str(caught.value.where).startswith(
        "http://127.0.0.1:9/LAION-AI/"
    )
    assert list(out.iterdir()) == []


def test_unknown_set_and_taken_directory(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no set is called 'pandlm'") as caught:
        pull("pandlm", tmp_path)
    assert caught.value.hint == "did you mean 'pandalm'?"
    (tmp_path / "pandalm").mkdir()
    with pytest.raises(DataError, match="was not made by pull"):
        pull("pandalm", tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="can't write"):
        pull("pandalm", tmp_path / "file" / "below", source=local_copy(tmp_path / "s", "pandalm/a.json", CONTENT))


def test_local_copy_is_checked(tmp_path: Path) -> None:
    good = local_copy(tmp_path / "good", "pandalm/deep/a.json", CONTENT)
    target = pull("pandalm", tmp_path / "out", source=good)
    assert (target / "deep" / "a.json").read_bytes() == CONTENT
    bad = local_copy(tmp_path / "bad", "pandalm/a.json", CONTENT, sha256="0" * 64)
    with pytest.raises(DataError, match="the SHA-256 is") as caught:
        pull("pandalm", tmp_path / "other", source=bad)
    assert caught.value.where == str(bad / "pandalm/a.json") and "0" * 64 in (caught.value.allowed or "")
    assert list((tmp_path / "other").iterdir()) == []


@pytest.mark.parametrize(
    ("manifest", "match"),
    [
        (None, "can't read MANIFEST.json"),
        ("{", "not valid JSON"),
        ("[{}]", "not a list of files"),
        ("[]", "lists no file below pandalm/"),
        ('[{"file": "pandalm/gone.json", "sha256": ""}]', "listed in MANIFEST.json but missing"),
        ('[{"file": "pandalm/../../a.json", "sha256": ""}]', "outside its directory"),
    ],
)
def test_bad_manifests(tmp_path: Path, manifest: str | None, match: str) -> None:
    (tmp_path / "source").mkdir()
    if manifest is not None:
        (tmp_path / "source" / "MANIFEST.json").write_text(manifest)
    with pytest.raises(DataError, match=match):
        pull("pandalm", tmp_path / "out", source=tmp_path / "source")
    assert list((tmp_path / "out").iterdir()) == []


def zipped(*names: str, mode: int = 0) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in names:
            member = zipfile.ZipInfo(name)
            member.external_attr = mode << 16
            archive.writestr(member, CONTENT)
    return stream.getvalue()


def tarred(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, link
        member.size = len(CONTENT) if kind == tarfile.REGTYPE else 0
        archive.addfile(member, io.BytesIO(CONTENT))
    return stream.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.zip", zipped("fine.json", "../evil.json"), "outside its directory"),
        ("a.zip", zipped("/evil.json"), "outside its directory"),
        ("a.zip", zipped("C:\\evil.json"), "outside its directory"),
        ("a.zip", zipped("x\\..\\..\\evil.json"), "outside its directory"),
        ("a.zip", zipped("link", mode=0o120777), "a link or device"),
        ("a.zip", b"PK nonsense", "the archive is damaged"),
        ("a.tar.gz", tarred("../evil.json"), "outside its directory"),
        ("a.tar.gz", tarred("a/../../evil.json"), "outside its directory"),
        ("a.tar.gz", tarred("/evil.json"), "outside its directory"),
        ("a.tgz", tarred("link", tarfile.SYMTYPE, "/etc"), "a link or device"),
        ("a.tgz", tarred("link", tarfile.LNKTYPE, "../x"), "a link or device"),
        ("a.tar", b"nonsense", "the archive is damaged"),
    ],
)
def test_unsafe_archives_are_refused_whole(tmp_path: Path, name: str, content: bytes, match: str) -> None:
    source = local_copy(tmp_path / "source", f"pandalm/{name}", content)
    with pytest.raises(DataError, match=match) as caught:
        pull("pandalm", tmp_path / "out", source=source)
    assert caught.value.where == name
    assert list((tmp_path / "out").iterdir()) == [] and not list(tmp_path.rglob("evil.json"))


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.zip", zipped("x/", "x/a.json")), ("a.tar.gz", tarred("x/a.json")), ("a.tgz", tarred("x/a.json"))],
)
def test_archives_are_unpacked(tmp_path: Path, name: str, content: bytes) -> None:
    target = pull("pandalm", tmp_path / "out", source=local_copy(tmp_path / "source", f"pandalm/{name}", content))
    assert (target / "x" / "a.json").read_bytes() == CONTENT
    (tmp_path / name).write_bytes(content)
    assert safe_extract(tmp_path / name, tmp_path / "here") == [tmp_path / "here" / "x" / "a.json"]


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"null", b"\n", b"<html>404</html>", b'[{"instruction": "Say.'])
def test_what_is_no_data_is_refused(tmp_path: Path, published: Path, address: str, content: bytes) -> None:
    (published / PANDALM["repository"] / PANDALM["commit"] / "data" / "testset-v1.json").write_bytes(content)
    with pytest.raises(DataError, match="what came is no data"):
        pull("pandalm", tmp_path / "out", address=address)
    assert not (tmp_path / "out" / "pandalm").exists()


def test_a_pinned_hash_is_checked_and_a_missing_one_is_told(
    tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pull("pandalm", tmp_path / "out", address=address)
    assert "no SHA-256 is known beforehand of 1 files of pandalm" in capsys.readouterr().err
    for digest, fits in ((hashlib.sha256(CONTENT).hexdigest(), True), ("0" * 64, False)):
        pinned = PANDALM | {"sha256": {"testset-v1.json": digest}}
        monkeypatch.setattr("perlhf.data.pull.sources", lambda pinned=pinned: {"pandalm": pinned})
        if fits:
            pull("pandalm", tmp_path / "pinned", address=address)
            assert "no SHA-256" not in capsys.readouterr().err
        else:
            with pytest.raises(DataError, match="the published file's"):
                pull("pandalm", tmp_path / "other", address=address)
    assert not (tmp_path / "other" / "pandalm").exists()
