"""What the documentation says is so: its Python runs, its commands parse, its links and names lead somewhere."""

import importlib
import importlib.util
import pkgutil
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from perlhf.commands.cli import launched, planned
from perlhf.commands.names import COMMANDS, DATA_COMMANDS, LABEL_COMMANDS
from perlhf.config.command_line import parse
from perlhf.config.commands import EvaluateConfig
from perlhf.config.recipe import submodel
from perlhf.config.stages import PolicyConfig, RewardConfig, SftConfig

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "docs" / "results"
PAGES = [
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted((REPOSITORY / "docs").glob("*.md")),
    RESULTS / "index.md",
]
NAMES = [str(page.relative_to(REPOSITORY)) for page in PAGES]
METHOD = REPOSITORY / "docs" / "method.md"
LISTS = re.compile(r"^- (Code|Key|Test): (.*(?:\n  .*)*)", re.MULTILINE)


def test_there_is_something_to_check():
    assert {"README.md", "docs/index.md", "docs/method.md", "docs/recipes.md", "docs/data.md"} <= set(NAMES)
    assert len(list(python_blocks(REPOSITORY / "README.md"))) == 1
    assert len(list(commands(REPOSITORY / "docs" / "recipes.md"))) > 20
    for kind in ("Code", "Key", "Test"):
        assert len(named(kind)) > 20, kind


def test_the_readme_is_short():
    assert len((REPOSITORY / "README.md").read_text(encoding="utf-8").split()) < 700


# ---- code ---------------------------------------------------------------------------------------------------------


def python_blocks(page: Path) -> Iterator[str]:
    return iter(re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    """The blocks of a page run one after another, as a reader would type them."""
    (tmp_path / "recipes").symlink_to(REPOSITORY / "recipes")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for number, block in enumerate(python_blocks(page), start=1):
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)


def test_yaml_blocks_are_recipes(tmp_path):
    blocks = [
        block
        for page in PAGES
        for block in re.findall(r"^```yaml\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    ]
    assert blocks
    for number, block in enumerate(blocks):
        recipe = tmp_path / f"{number}.yaml"
        recipe.write_text(block, encoding="utf-8")
        parse(COMMANDS["reward"], [str(recipe)])


# ---- command lines ------------------------------------------------------------------------------------------------


def commands(page: Path) -> Iterator[list[str]]:
    """Words of each `perlhf ...` line that a reader could type; what follows two spaces is a remark."""
    if page.name == "commands.md":
        return
    for line in re.findall(r"^    (?:[A-Z_]+=\S+ )*(perlhf .*)$", page.read_text(encoding="utf-8"), re.MULTILINE):
        words = shlex.split(re.split(r"  +", line)[0], comments=True)
        yield words[1:]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_command_lines_parse(page, monkeypatch):
    """Recipes are read, options and values are checked; nothing is run."""
    monkeypatch.chdir(REPOSITORY)
    for words in commands(page):
        parses(words)


def parses(words: list[str]) -> None:
    table, rest = (DATA_COMMANDS, words[1:]) if words[0] == "data" else (COMMANDS, words)
    if words[0] == "label":
        table, rest = LABEL_COMMANDS, words[1:] if words[1] in LABEL_COMMANDS else words
    assert rest[0] in table, words
    if rest[0] == "launch":
        own, started = launched(rest[1:])
        parses(started)
        rest = ["launch", *own]
    if rest[0] == "plan":
        own, stages = planned(rest[1:])
        for stage, its in stages.items():
            parses([stage, *its, *(["--reward", "runs/reward"] if stage == "policy" and len(stages) > 1 else [])])
        rest = ["plan", *own]
    try:
        parse(table[rest[0]], rest[1:])
    except SystemExit as stopped:
        pytest.fail(f"perlhf {' '.join(words)}: exit code {stopped.code}")


def test_every_result_says_what_made_it(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.syspath_prepend(REPOSITORY / "scripts")
    made = importlib.import_module("results_kept").commands(RESULTS)
    assert made.keys() >= {path.name for path in RESULTS.iterdir() if path.is_dir()}
    for command in dict.fromkeys(command for given in made.values() for command in given):
        words = shlex.split(command)
        if words[0].endswith(".py"):
            assert (REPOSITORY / words[0]).exists(), command
        else:
            parses(words)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_in_the_text_exist(page):
    for command in re.findall(r"`perlhf ([a-z]+(?: [a-z]+)?)", page.read_text(encoding="utf-8")):
        first, _, second = command.partition(" ")
        assert first in {*COMMANDS, "data", "label"}, command
        assert first != "data" or not second or second in DATA_COMMANDS, command


# ---- names --------------------------------------------------------------------------------------------------------


def named(kind: str) -> list[str]:
    """What the method page names after `- Code:`, `- Key:` or `- Test:`."""
    found = LISTS.findall(METHOD.read_text(encoding="utf-8"))
    return [name for label, text in found if label == kind for name in re.findall(r"`([^`]+)`", text)]


@pytest.mark.parametrize("name", dict.fromkeys(named("Code")))
def test_code_that_the_method_page_names_exists(name):
    pkgutil.resolve_name(f"perlhf.{name}")


@pytest.mark.parametrize("name", dict.fromkeys(named("Key")))
def test_keys_that_the_method_page_names_exist(name):
    assert any(has_key(model, name) for model in (SftConfig, RewardConfig, PolicyConfig, EvaluateConfig))


def has_key(model: type[BaseModel] | None, name: str) -> bool:
    first, _, rest = name.partition(".")
    if model is None or first not in model.model_fields:
        return False
    return not rest or has_key(submodel(model.model_fields[first].annotation), rest)


def test_files_and_tests_that_the_pages_name_exist():
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    files = set(re.findall(r"\b(?:src/perlhf|tests|scripts|examples|benchmarks)/[\w/]+(?:\.\w+)?", text))
    assert len(files) > 20
    assert not [file for file in files if not (REPOSITORY / file).exists()]
    missing = [
        f"{file}::{name}"
        for file, name in re.findall(r"(tests/[\w/]+\.py)::(\w+)", text)
        if not re.search(rf"^ *(?:def|class) {name}\b", (REPOSITORY / file).read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert not missing


def test_every_decision_of_the_method_page_has_a_test():
    """A section or paragraph that names code names the test that guards it."""
    found = LISTS.findall(METHOD.read_text(encoding="utf-8"))
    assert all("`tests/" in text for label, text in found if label == "Test")
    labels = [label for label, _ in found]
    assert labels.count("Code") == labels.count("Test")
    for before, after in zip(labels, [*labels[1:], "Code"], strict=True):
        assert (before == "Test") == (after == "Code"), labels


def test_default_learning_rates_of_the_method_page():
    rows = re.findall(r"^\| `perlhf (\w+)`(.*) \| (\S+) \| (\S+) \|$", METHOD.read_text(encoding="utf-8"), re.MULTILINE)
    shown = {f"{stage}{more}": (float(lora), float(full)) for stage, more, lora, full in rows}
    reward = ("module:function",)
    assert shown == {
        "sft": (SftConfig().learning_rate, SftConfig(tuning="full").learning_rate),
        "reward": (RewardConfig().learning_rate, RewardConfig(tuning="full").learning_rate),
        "reward with `head_start: probe`": (
            RewardConfig(head_start="probe").learning_rate,
            RewardConfig(head_start="probe", tuning="full").learning_rate,
        ),
        "policy": (
            PolicyConfig(reward=reward).learning_rate,
            PolicyConfig(reward=reward, tuning="full").learning_rate,
        ),
        "policy, its value": (
            PolicyConfig(reward=reward).value_learning_rate,
            PolicyConfig(reward=reward, tuning="full").value_learning_rate,
        ),
    }


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_to_files_lead_somewhere(page):
    for target in re.findall(r"(?<!!)\[[^\]]*\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


# ---- generated pages ----------------------------------------------------------------------------------------------


def test_data_reference_is_up_to_date():
    spec = importlib.util.spec_from_file_location("generator", REPOSITORY / "scripts" / "generate_data_reference.py")
    assert spec and spec.loader
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    assert (REPOSITORY / "docs" / "data.md").read_text(encoding="utf-8") == generator.reference(), "run `make docs`"


def test_tables_of_the_scale_page_are_up_to_date():
    spec = importlib.util.spec_from_file_location("generator", REPOSITORY / "scripts" / "generate_scale.py")
    assert spec and spec.loader
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    text = (REPOSITORY / "docs" / "scale.md").read_text(encoding="utf-8")
    assert text == generator.page(text), "run `make docs`"


def test_every_recipe_is_described():
    text = (REPOSITORY / "docs" / "recipes.md").read_text(encoding="utf-8")
    recipes = [str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "recipes").rglob("*.yaml")]
    assert recipes
    assert not [recipe for recipe in recipes if f"`{recipe}`" not in text]
