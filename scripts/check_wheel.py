"""Builds the wheel, installs it into a throw-away environment and imports every module from there.

Dependencies are borrowed from the environment that runs this script (a .pth file), so nothing is downloaded.
"""

import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCE = REPOSITORY / "src"

IMPORT_ALL = """
import importlib, pkgutil, sys
import perlhf
assert perlhf.__file__.startswith(sys.prefix), f"imported from {perlhf.__file__}, not from the wheel"
names = [module.name for module in pkgutil.walk_packages(perlhf.__path__, "perlhf.")]
for name in names:
    importlib.import_module(name)
print(f"wheel: {len(names)} modules import")
"""


def main() -> None:
    """Build, compare the list of files, install, import, run the command."""
    with tempfile.TemporaryDirectory() as work:
        directory = Path(work)
        wheel = build(directory)
        check_files(wheel)
        environment = install(wheel, directory / "environment")
        run(environment / "bin" / "python", "-W", "error", "-c", IMPORT_ALL, cwd=directory)
        run(environment / "bin" / "perlhf", "--version", cwd=directory)


def build(directory: Path) -> Path:
    """The wheel, built from a copy of the tree: setuptools would leave its traces in the original."""
    copy = directory / "source"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (copy / name).write_bytes((REPOSITORY / name).read_bytes())
    for file in files_of(SOURCE):
        target = copy / "src" / file
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((SOURCE / file).read_bytes())
    out = directory / "dist"
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(copy), quiet=True)
    (wheel,) = out.glob("perlhf-*.whl")
    return wheel


def files_of(source: Path) -> list[Path]:
    """The package's files, relative to `source`."""
    found = [path for path in (source / "perlhf").rglob("*") if path.is_file()]
    return sorted(path.relative_to(source) for path in found if "__pycache__" not in path.parts)


def check_files(wheel: Path) -> None:
    """Every file of the package is in the wheel: templates and tables as well as modules."""
    with zipfile.ZipFile(wheel) as archive:
        missing = {path.as_posix() for path in files_of(SOURCE)} - set(archive.namelist())
    if missing:
        sys.exit(f"error: the wheel lacks {', '.join(sorted(missing))}; see package-data in pyproject.toml")


def install(wheel: Path, environment: Path) -> Path:
    """A new environment with the wheel and a view of this one's packages."""
    run(sys.executable, "-m", "venv", "--without-pip", str(environment))
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check", "--quiet"]
    run(*pip, "install", "--no-deps", "--no-index", str(wheel))
    own = Path(sysconfig.get_path("purelib", vars={"base": str(environment), "platbase": str(environment)}))
    (own / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return environment


def run(*command: str | Path, cwd: Path | None = None, quiet: bool = False) -> None:
    """Run a command; its output is shown when it fails, or always unless `quiet`."""
    done = subprocess.run(command, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    if done.returncode or not quiet:
        print(done.stdout, end="")
    if done.returncode:
        sys.exit(f"error: {' '.join(str(word) for word in command[:6])} ... failed")


if __name__ == "__main__":
    main()
