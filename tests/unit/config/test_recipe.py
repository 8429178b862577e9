"""Recipes: values, lines in errors, and every kind of broken file."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from perlhf.config.commands import EvaluateConfig, TableConfig
from perlhf.config.comparison import CompareConfig
from perlhf.config.loop import LoopConfig
from perlhf.config.recipe import describe, load_recipe, read_recipe, validated
from perlhf.config.stages import DataConfig, PolicyConfig, RatingsConfig, RewardConfig, SftConfig
from perlhf.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture
def write(tmp_path: Path):
    def _write(text: str | bytes) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return _write


def refused(path: Path, model: type[BaseModel] = RewardConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, model)
    return str(caught.value)


def test_values_of_every_type(write):
    path = write(
        "run: runs/coffee\nthreads: null\nmargin: 1\nadapter:\n  rank: 4\n  targets: [q_proj, v_proj]\n"
        "optim: {learning_rate: 2e-4}\nencoding:\n  drop_long: true\n  system: no\ndata:\n  paths: ['a.json']\n"
    )
    config = load_recipe(path, RewardConfig)
    assert config.run == Path("runs/coffee")
    assert config.threads is None
    assert config.margin == 1.0
    assert config.adapter.rank == 4
    assert config.adapter.targets == ("q_proj", "v_proj")
    assert config.optim.learning_rate == 0.0002
    assert config.encoding.drop_long is True
    assert config.encoding.system == "no", "only true and false are booleans"
    assert config.data.paths == ("a.json",)
    assert config.adapter.alpha == 32.0, "the rest keeps its default"


def test_names_of_columns_and_rules_of_grades(write):
    text = "data:\n  paths: [a]\n  columns: {prompt: question, chosen: best.text}\n  ratings: {up: 4, down: 2}\n"
    data = load_recipe(write(text), RewardConfig).data
    assert data.columns == {"prompt": "question", "chosen": "best.text"}
    assert data.ratings is not None and (data.ratings.up, data.ratings.down) == (4.0, 2.0)
    assert (
        refused(write(text.replace("question", "3"))).splitlines()[1] == "  allowed: names and values ({name: value})"
    )
    assert "ratings.down 4 is not below ratings.up 4" in refused(write(text.replace("down: 2", "down: 4")))
    assert "`data.ratings.up` is missing" in refused(write(text.replace("up: 4, ", "")))


def test_rules_that_are_not_set_are_not_recorded():
    """A run that was begun before there were such rules goes on."""
    left_out = {"columns", "ratings", "grades", "ties", "limit_train", "label_noise"}
    assert left_out.isdisjoint(DataConfig().model_dump())
    ruled = DataConfig(columns={"prompt": "q"}, ratings=RatingsConfig(up=4), grades="ratings", ties="error")
    assert {"columns", "ratings", "grades", "ties"} <= ruled.model_dump().keys()


def test_unknown_key_names_line_and_nearest(write):
    path = write("run: runs/x\nadapter:\n  # a comment\n  rnk: 4\n")
    assert refused(path) == (
        f"{path}:4: unknown key `adapter.rnk`\n  allowed: rank, alpha, targets, layers, dropout\n  try: `adapter.rank`"
    )


def test_unknown_key_at_the_top(write):
    path = write("\nepocs: 4\n")
    message = refused(path)
    assert message.startswith(f"{path}:2: unknown key `epocs`\n  allowed: run, base,")
    assert message.endswith("try: `epochs`")


@pytest.mark.parametrize(
    ("text", "line", "what", "allowed"),
    [
        ("a: 1", 1, "unknown key `a`", "run, base"),
        ("adapter:\n  rank: 0", 2, "`adapter.rank` can't be 0", "a whole number above 0"),
        ("adapter:\n  rank: four", 2, '`adapter.rank` can\'t be "four"', "a whole number above 0"),
        ("adapter:\n  rank: true", 2, "`adapter.rank` can't be true", "a whole number above 0"),
        ("adapter:\n  rank: '4'", 2, '`adapter.rank` can\'t be "4"', "a whole number above 0"),
        ("adapter: 4", 1, "`adapter` can't be 4", "keys rank, alpha, targets, layers, dropout"),
        ("adapter:\n  targets: 3", 2, "`adapter.targets` can't be 3", "attention or all or a list of texts"),
        ("\n\norder: grupped", 3, '`order` can\'t be "grupped"', "shuffled or grouped\n  try: grouped"),
        ("encoding:\n  drop_long: yes", 2, '`encoding.drop_long` can\'t be "yes"', "true or false"),
        ("threads: 1.5", 1, "`threads` can't be 1.5", "a whole number above 0 and of at most 1024 or null"),
        ("label_smoothing: 0.5", 1, "`label_smoothing` can't be 0.5", "a number of at least 0 and below 0.5"),
        ("data:\n  paths:\n  - a\n  - 3", 4, "`data.paths[1]` can't be 3", "a list of texts"),
        ("data:\n  validation: 0.5\n  test: 0.5", 1, "validation + test = 1 leaves no training group", ""),
        ("run: 3", 1, "`run` can't be 3", "a path"),
        ("margin: 1e999", 1, "`margin` can't be Infinity", "a number of at least 0"),
    ],
)
def test_wrong_value(write, text, line, what, allowed):
    path = write(text)
    message = refused(path)
    assert message.startswith(f"{path}:{line}: {what}")
    assert allowed in message


def test_error_across_keys_names_the_file(write):
    path = write("reward: [runs/r]\nbaseline: group_mean\ncompletions_per_prompt: 1\n")
    assert refused(path, PolicyConfig) == f"{path}: baseline: group_mean needs completions_per_prompt of 2 or more"


def test_missing_key(write):
    assert "`runs` is missing" in refused(write("output: x.json"), TableConfig)


def test_a_null_model_can_be_given(write):
    config = load_recipe(write("run: runs/r\ndata: {limit: 5}"), EvaluateConfig)
    assert config.data == DataConfig(limit=5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs: 1\nseed: 2\nepochs: 2\n", ":3: `epochs` is given twice, first on line 1"),
        ("adapter:\n  rank: 1\n  rank: 2\n", ":3: `adapter.rank` is given twice, first on line 2"),
        (b"run: a\nbase: caf\xe9\n", ":2: byte 0xe9 is not UTF-8"),
        ("", ": the recipe is empty"),
        ("# nothing\n", ": the recipe is empty"),
        ("run: [a\nseed: 1", ":2: bad YAML"),
        ("run: a\n\tseed: 1", ":2: bad YAML"),
        ("run: a\nbase: b\x07", ":2: bad YAML"),
        ("- run\n- base", ":1: a recipe is a mapping of keys to values"),
        ("just text", ":1: a recipe is a mapping of keys to values"),
        ("run: a\n---\nrun: b", ":2: bad YAML"),
        ("data: &d {limit: 1}\nencoding: *d", ":1: anchors and aliases are not used in recipes"),
        ("\ndata: &d\n  paths: *d", ":2: anchors and aliases are not used in recipes"),
        ("run: !!python/object:os.system x", ":1: unknown YAML tag"),
        ("data: !!python/object:os.system {paths: [a]}", ":1: unknown YAML tag 'python/object:os.system'"),
        ("data: !!set {paths}", ":1: unknown YAML tag 'set'"),
        ("seed: !!int x", ":1: 'x' is no YAML int"),
        ("seed: !!float x", ":1: 'x' is no YAML float"),
        ("seed: !!null x", ":1: 'x' is no YAML null"),
        ("packing: !!bool maybe", ":1: 'maybe' is no YAML bool"),
        ('\nrun: "a\\udc00"', r":2: the text 'a\udc00' holds '\udc00', which no file can"),
        ('run: "a\\0"', r":1: the text 'a\x00' holds '\x00', which no file can"),
        ("[a]: 1", ":1: a key can't be a list or mapping"),
        ("run: " + "[" * 5000 + "]" * 5000, ": the recipe is nested too deeply"),
    ],
)
def test_broken_files(write, text, message):
    path = write(text)
    assert str(path) + message in refused(path)


def test_missing_file_names_a_similar_one(write, tmp_path):
    write("seed: 1")
    missing = tmp_path / "recipes.yaml"
    assert refused(missing) == f"{missing}: no such recipe\n  try: {tmp_path / 'recipe.yaml'}"
    assert "can't read the recipe" in refused(tmp_path)


def test_byte_order_mark_and_carriage_returns_are_harmless(write):
    assert load_recipe(write(b"\xef\xbb\xbfepochs: 3\r\nseed: 7\r\n"), SftConfig).epochs == 3


@given(st.binary(max_size=200))
def test_any_bytes_give_a_recipe_or_one_error(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("fuzz") / "recipe.yaml"
    path.write_bytes(content)
    try:
        assert isinstance(read_recipe(path).values, dict)
    except ConfigError as error:
        assert str(error).startswith(str(path))


KEYS = st.sampled_from(["run", "adapter", "rank", "data", "paths", "epochs", "optim"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats(allow_nan=True) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(KEYS, VALUES, max_size=4))
def test_any_values_give_a_model_or_one_error(values):
    try:
        assert isinstance(validated(SftConfig, values), SftConfig)
    except ConfigError as error:
        assert error.what


def test_describe_reads_as_english():
    assert describe(int) == "a whole number"
    assert describe(float | None) == "a number or null"
    assert describe(tuple[str, ...]) == "a list of texts"
    assert describe(DataConfig).startswith("keys format, columns")


def test_every_shipped_recipe_loads():
    models = {"sft": SftConfig, "reward": RewardConfig, "policy": PolicyConfig, "evaluate": EvaluateConfig}
    models |= {"compare": CompareConfig, "loop": LoopConfig}
    seen = set()
    for path in sorted((REPOSITORY / "recipes").rglob("*.y*ml")):
        command = next((name for name in models if path.stem.startswith(name)), None)
        assert command, f"{path}: a recipe's file name begins with its command ({', '.join(models)})"
        load_recipe(path, models[command])
        seen.add(command)
    assert seen >= {"sft", "reward", "policy", "compare"}
