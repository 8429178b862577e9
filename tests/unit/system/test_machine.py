import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import perlhf
from perlhf.system import machine
from perlhf.system.machine import (
    COMPILED_PRODUCTS,
    bound_compiled_products,
    cpu_computes_in_bf16,
    environment,
    free_memory_bytes,
    peak_memory_bytes,
)


def git(directory: Path, *arguments: str) -> str:
    options = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(directory), *options, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def environment_of(package_parent: Path) -> dict:
    code = "import json; from perlhf.system.machine import environment; print(json.dumps(environment()))"
    variables = os.environ | {"PYTHONPATH": str(package_parent), "GIT_CEILING_DIRECTORIES": str(package_parent.parent)}
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=variables)
    return json.loads(done.stdout)


def package_in(directory: Path) -> None:
    """A copy of what `environment` needs."""
    source = Path(perlhf.__file__).parent
    (directory / "perlhf" / "system").mkdir(parents=True)
    for name in (
        "__init__.py",
        "errors.py",
        "system/__init__.py",
        "system/before_torch.py",
        "system/machine.py",
    ):
        shutil.copy(source / name, directory / "perlhf" / name)


@pytest.mark.parametrize("tracked", [False, True])
def test_no_program_of_a_repository_that_the_package_lies_in_is_run(tmp_path, tracked):
    package_in(tmp_path)
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", *(["perlhf"] if tracked else ["perlhf/errors.py"]))
    git(tmp_path, "commit", "-q", "-m", "theirs")
    trap, ran = tmp_path / "trap.sh", tmp_path / "ran"
    trap.write_text(f'#!/bin/sh\necho "$0" >> "{ran}"\n')
    trap.chmod(0o755)
    (tmp_path / "hooks").mkdir()
    shutil.copy(trap, tmp_path / "hooks" / "post-index-change")
    for key, value in (("fsmonitor", trap), ("hooksPath", tmp_path / "hooks")):
        git(tmp_path, "config", f"core.{key}", str(value))
    git(tmp_path, "config", "diff.external", str(trap))
    os.utime(tmp_path / "perlhf" / "__init__.py", (1, 1))
    git(tmp_path, "status")
    assert ran.read_text(), "the traps work"
    ran.unlink()
    assert (environment_of(tmp_path)["commit"] is not None) == tracked
    assert not ran.exists()


def test_git_is_asked_of_the_package_alone(tmp_path, monkeypatch):
    """Not of the repository whose hook runs a command, nor where packages are installed."""
    package_in(tmp_path / "site-packages")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "with what is installed")
    assert environment_of(tmp_path / "site-packages")["commit"] is None
    package_in(tmp_path / "own")
    git(tmp_path / "own", "init", "-q")
    git(tmp_path / "own", "add", ".")
    git(tmp_path / "own", "commit", "-q", "-m", "package")
    own = git(tmp_path / "own", "rev-parse", "HEAD")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    assert environment_of(tmp_path / "own")["commit"] == own


def test_a_git_that_can_not_be_run(tmp_path, monkeypatch):
    (tmp_path / "git").write_text("no program")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment()["commit"] is None


def test_commit_is_that_of_the_package_and_only_if_it_is_tracked(tmp_path):
    package_in(tmp_path)
    outside = environment_of(tmp_path)
    assert (outside["commit"], outside["uncommitted_changes"]) == (None, None)
    assert (outside["threads"], outside["versions"]["torch"]) == (None, torch.__version__), "told without loading it"
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "of somebody else's repository")
    assert environment_of(tmp_path)["commit"] is None
    git(tmp_path, "add", "perlhf/__init__.py", "perlhf/system/machine.py")
    git(tmp_path, "commit", "-q", "-m", "package")
    clean = environment_of(tmp_path)
    assert (clean["commit"], clean["uncommitted_changes"]) == (git(tmp_path, "rev-parse", "HEAD"), False)
    with open(tmp_path / "perlhf" / "__init__.py", "a") as file:
        file.write("\n")
    assert environment_of(tmp_path)["uncommitted_changes"] is True


def test_versions_hardware_and_threads():
    found = environment()
    assert found["versions"]["perlhf"] == perlhf.__version__ and found["versions"]["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["hardware"]["memory_bytes"] > 2**28 and found["hardware"]["cpu"]


def test_peak_memory_is_of_this_process_and_stays():
    code = (
        "from perlhf.system.machine import cuda_peak_bytes, peak_memory_bytes as peak\n"
        "before = peak(); block = bytearray(200_000_000); block[::4096] = bytes(len(block[::4096]))\n"
        "with_block = peak(); del block; print(before, with_block, peak(), cuda_peak_bytes())"
    )
    # Started from this process, which holds torch and so far more: the child's own peak must not inherit that.
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    before, with_block, after, cuda = map(int, done.stdout.split())
    megabyte = 1_000_000  # the system's own count is this exact
    assert before < 100 * megabyte < 150 * megabyte < peak_memory_bytes()
    assert 199 * megabyte <= with_block - before < 250 * megabyte
    assert after >= with_block - megabyte and cuda == 0


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("vendor_id : GenuineIntel\nflags\t\t: avx512f avx512_bf16 amx_bf16 amx_tile\n", True),
        ("vendor_id : GenuineIntel\nflags\t\t: avx512f avx512_bf16\n", False),  # half the float32 rate
        ("vendor_id : AuthenticAMD\nflags\t\t: avx512f avx512_bf16\n", True),
        ("Features\t: fp asimd bf16 i8mm\n", True),
        ("vendor_id : GenuineIntel\nflags\t\t: avx2 avx512f avx512_vnni\n", False),
        ("", False),
    ],
)
def test_bf16_where_it_is_the_faster_one(cpuinfo: str, expected: bool):
    assert cpu_computes_in_bf16(cpuinfo)[0] is expected


def test_compiled_products_are_bounded_unless_the_user_says_how_many():
    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    variables: dict[str, str] = {}
    bound_compiled_products(variables)
    assert variables == {name: str(COMPILED_PRODUCTS)}
    variables[name] = "7"
    bound_compiled_products(variables)
    assert variables == {name: "7"}


def test_free_memory_is_the_gpus_where_one_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 81000\necho 500\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert free_memory_bytes("auto") == free_memory_bytes("cuda:0") == 81000 * 2**20
    assert free_memory_bytes("cuda:1") == 500 * 2**20 and free_memory_bytes("cuda:2") is None
    tool.unlink()
    for device in ("cpu", "auto"):
        own = free_memory_bytes(device)
        assert own is not None and 2**20 < own < environment()["hardware"]["memory_bytes"]
    assert free_memory_bytes("cuda") is None


def test_memory_of_a_container_is_what_that_has_left(tmp_path: Path) -> None:
    """Groups lie in one another; each may have a limit, and pages of files that can be dropped are free."""
    inner = tmp_path / "cgroup" / "outer" / "inner"
    inner.mkdir(parents=True)
    for group, limit, used in ((inner, "max", 5), (inner.parent, "1000", 700)):
        (group / "memory.max").write_text(limit + "\n")
        (group / "memory.current").write_text(f"{used}\n")
        (group / "memory.stat").write_text("anon 300\ninactive_file 400\n")
    own = tmp_path / "own"
    own.write_text("12:cpu:/old\n0::/outer/inner\n")
    assert machine._groups(tmp_path / "cgroup", own) == [(1000, 300)]
    assert machine._groups(tmp_path / "cgroup", tmp_path / "none") == []
    own.write_text("0::/../../etc\n")
    assert machine._groups(tmp_path / "cgroup", own) == []


def test_free_memory_is_that_of_the_container(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_groups", lambda: [(1000, 300), (2000, 1900)])
    assert free_memory_bytes("cpu") == free_memory_bytes("mps") == 100 and machine.memory_bytes() == 1000
