"""What holds for the package as a whole: imports, generated pages, pinned versions, and the count of tests in CI."""

import importlib.util
import json
import os
import pkgutil
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import Specifier
from packaging.utils import canonicalize_name

import perlhf

REPOSITORY = Path(__file__).resolve().parents[2]
MODULES = sorted(module.name for module in pkgutil.walk_packages(perlhf.__path__, "perlhf."))
WITHOUT_TORCH = (
    "commands.cli",
    "commands.names",
    "commands.show",
    "comparison",
    "config",
    "data",
    "errors",
    "method.metrics",
    "reports",
    "runs",
    "system",
)

HEAVY_IMPORTS = """
import importlib, json, sys
found = {}
for name in sys.argv[1:]:
    importlib.import_module(name)
    found[name] = sorted({"torch", "transformers"} & set(sys.modules))
print(json.dumps(found))
"""


def script(name: str) -> ModuleType:
    """A file of scripts/ as a module."""
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "scripts" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_help_validation_and_report_modules_import_no_torch():
    starts = tuple(f"perlhf.{name}" for name in WITHOUT_TORCH)
    light = [name for name in MODULES if name in starts or name.startswith(tuple(f"{start}." for start in starts))]
    assert set(starts) <= set(light)
    done = subprocess.run([sys.executable, "-c", HEAVY_IMPORTS, *light], capture_output=True, text=True, check=True)
    heavy = {name: modules for name, modules in json.loads(done.stdout).items() if modules}
    assert not heavy, f"first module to import torch or transformers: {next(iter(heavy))}"


def test_public_names_exist():
    for name in perlhf.__all__:
        assert getattr(perlhf, name).__module__.startswith("perlhf"), name
    assert perlhf.RewardConfig.__name__ == "RewardConfig"
    assert issubclass(perlhf.ConfigError, perlhf.PerlhfError)
    with pytest.raises(AttributeError, match="no attribute 'rewrad'"):
        _ = perlhf.rewrad


def test_command_reference_is_up_to_date():
    page = (REPOSITORY / "docs" / "commands.md").read_text(encoding="utf-8")
    assert page == script("generate_command_reference").reference(), "run `make docs`"


def test_every_dependency_is_pinned_and_explained():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = pins("constraints.txt")
    assert pinned["torch"] == "2.13.0"
    page = (REPOSITORY / "docs" / "dependencies.md").read_text(encoding="utf-8")
    explained = set(re.findall(r"[\w-]+", page))
    extras = project["optional-dependencies"]
    for text in [*project["dependencies"], *extras["dev"]]:
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{name} has no version in constraints.txt"
        assert requirement.specifier.contains(pinned[name]), f"constraints.txt: {name} {pinned[name]} against {text}"
        assert name in explained, f"docs/dependencies.md does not say what {name} is for"


def test_the_lowest_versions_are_the_floors():
    """`transformers>=5.20` is tried with a release of the 5.20 line, so that no floor is a guess."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lowest = pins("constraints-lowest.txt")
    assert lowest["torch"] == pins("constraints.txt")["torch"]
    tested = {"beartype", "bitsandbytes", "hypothesis", "peft", "pytest", "setuptools", "tensorboard"}
    extras = [text for text in project["optional-dependencies"]["dev"] if Requirement(text).name in tested]
    assert len(extras) == len(tested)
    for text in [*project["dependencies"], *extras]:
        requirement = Requirement(text)
        (floor,) = requirement.specifier
        assert floor.operator == ">="
        version = lowest[canonicalize_name(requirement.name)]
        assert Specifier(f"=={floor.version}.*").contains(version), f"constraints-lowest.txt: {version} against {text}"


def pins(name: str) -> dict[str, str]:
    """Package to version of a file of constraints."""
    lines = (REPOSITORY / name).read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_documentation_code_runs():
    page = (REPOSITORY / "docs" / "index.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, "docs/index.md", "exec"), {})


JUNIT = """<testsuites><testsuite>
<testcase classname="tests.unit.test_a" name="test_one"/>
<testcase classname="tests.unit.test_a" name="test_two"><failure message="no"/></testcase>
{more}
</testsuite></testsuites>"""
SKIPPED = '<testcase classname="tests.{place}.test_b" name="test_three"><skipped message="because"/></testcase>'


@pytest.mark.parametrize(
    ("more", "collected", "data", "code", "complaint"),
    [
        ("", 2, True, 0, ""),
        ("", 3, True, 1, "2 tests ran of 3 collected"),
        ("", 0, True, 1, "2 tests ran of 0 collected"),
        (SKIPPED.format(place="real"), 3, True, 1, "skipped: tests.real.test_b::test_three: because"),
        (SKIPPED.format(place="real"), 3, False, 0, ""),
        (SKIPPED.format(place="gpu"), 3, True, 0, ""),
        (
            '<testcase classname="tests.unit.test_a" name="test_two"><error message="torn"/></testcase>',
            3,
            True,
            1,
            "2 tests",
        ),
    ],
    ids=[
        "all ran",
        "one missing",
        "nothing collected",
        "skipped",
        "skipped without data",
        "no GPU",
        "one counted twice",
    ],
)
def test_ci_counts_tests(more, collected, data, code, complaint, tmp_path):
    names = ["tests/unit/test_a.py::test_one", "tests/unit/test_a.py::test_two", "tests/real/test_b.py::test_three"]
    (tmp_path / "collected.txt").write_text("\n".join([*names[:collected], "", f"{collected} tests collected"]))
    (tmp_path / "junit.xml").write_text(JUNIT.format(more=more))
    if data:
        (tmp_path / "MANIFEST.json").write_text("{}")
    done = subprocess.run(
        [sys.executable, REPOSITORY / "scripts" / "check_test_counts.py", "collected.txt", "junit.xml"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "CI": "true", "PERLHF_DATA": str(tmp_path)},
    )
    assert done.returncode == code
    assert complaint in done.stderr
    assert done.stdout.startswith(f"{collected} collected, 1 passed, 1 failed")


def test_ci_knows_a_processor_with_amx(tmp_path):
    has_amx = runpy.run_path(str(REPOSITORY / "scripts" / "check_test_counts.py"))["has_amx"]
    cpuinfo = tmp_path / "cpuinfo"
    assert has_amx(cpuinfo), "nothing is excused where that can't be told"
    for flags, wanted in (("avx512f amx_bf16 amx_tile", True), ("avx512f avx512_bf16", False)):
        cpuinfo.write_text(f"processor : 0\nflags\t\t: fpu {flags} sse\n")
        assert has_amx(cpuinfo) is wanted
