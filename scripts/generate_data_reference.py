"""Writes docs/data.md from the record types and the readers' own rules. Run by `make docs`; a test compares."""

import dataclasses
import re
from pathlib import Path

from perlhf.config.stages import DataConfig
from perlhf.data import pull, tools
from perlhf.data.containers.decoded import LONGEST
from perlhf.data.containers.packed import MOST_RATIO, MOST_UNPACKED, PACKED_SUFFIXES
from perlhf.data.files import SUFFIXES
from perlhf.data.readers.columns import COLUMNS
from perlhf.data.readers.formats import FORMATS
from perlhf.data.records import Comparison, Demonstration, Prompt, Rating

TARGET = Path(__file__).resolve().parents[1] / "docs" / "data.md"

INTRODUCTION = """# Data

Generated from the code by `make docs`. The rules below are the readers' own documentation; `perlhf data formats` prints
a line of each.

    perlhf data formats                              what can be read and pulled
    perlhf data validate ratings.jsonl               every problem with its line, exit code 2 if there is one
    perlhf data inspect ratings.jsonl                records, groups, labels, lengths, duplicates, an example
    perlhf data convert taskmaster-coffee/reward coffee.jsonl
    perlhf data split coffee.jsonl --output splits   writes train, validation and test files
    perlhf data pull taskmaster-coffee               downloads a published set into data/taskmaster-coffee

## Records

Training needs one of four kinds of record. A prompt is a string, which means a single user message, or a list of chat
messages `{"role": ..., "content": ...}`, whose other keys (`tool_calls`, `reasoning_content`, `name`) go to the chat
template. A completion is the text of one assistant message, without its end token, or messages of which the assistant's
are learned: one that calls tools, or several turns.
"""

GROUPS = """## Groups and splits

Every record has a `group`. All records of a group are on the same side of every split: one conversation, cut after
each of its turns and rated each time, would otherwise be learned from and tested on. Unless a file names it, the
group is the first user turn in lower case without punctuation (question, prompt, screen or story where a reader
says so).

The side of a group is a hash of its name: u = sha256("split_seed:group") read as a fraction of [0, 1). Below
`data.test` ({test:g}) is test, then comes `data.validation` ({validation:g}), the rest is train. So the split
depends on no file order and no other record; records added later never move old ones. Code: `data.split.split_of`.
A side that is empty is an error.

- **train** is learned from.
- **validation** picks the kept checkpoint, nothing else.
- **test** is for `perlhf evaluate`. Choosing a recipe by test results makes them training results.

`data.limit` keeps at most so many records of a side, chosen by a hash of their content, `data.limit_train` of the
training side alone: fewer labels, the same test. Every run records the
SHA-256 of its data in `manifest.json`, and refuses to continue on other data.

`data.label_noise` turns the labels of a share of the training records round, to see what wrong labels do: chosen and
rejected are swapped, up becomes down. A record is turned when a hash of its content and `split_seed` falls below the
share, so the same ones are turned whatever the order of files, and those of a lower share are among those of a higher
one. Baselines learn from the turned labels too; validation and test keep theirs.

## Which records a stage takes

- `perlhf reward` takes comparisons and ratings.
- `perlhf sft` takes demonstrations. A rating with thumbs up becomes one, and so does the chosen side of a
  comparison. Of a conversation the last answer is learned, and one line says how many have earlier ones;
  `data.turns: all` makes a demonstration of each answer after the user's first turn, as OpenAI's fine-tuning trains
  them.
- `perlhf policy` takes prompts. Every record gives its prompt; each different prompt counts once.
- What can serve as none of these is left out, counted and told.

The embedded set has records of every kind, so nothing of it is converted.
"""

FILES = """## Files

`data.paths` takes any number of files, directories (searched for files ending in SUFFIXES, PACKED may follow, or for
shards named like `name-00000-of-00020`), patterns (`data/*.jsonl`, `**` for any folders), directories that `datasets`
saved, names on the hub (`owner/name`) and `builtin:coffee-bar`. Relative paths are looked up in the working directory,
then under `$PERLHF_DATA`. Files are read as a stream, so that their size doesn't matter, packed Parquet and TFRecord
excepted; one line or JSON value may have LONGEST Mi characters.

| written as | what is read | place of a row |
|---|---|---|
| JSON lines | an object a line; a line may also be a text that holds an object as JSON | `file:line` |
| JSON | one array; objects one after another, over any number of lines | `file[index]`, `file:line` |
| JSON, one object | the rows that it wraps, pandas' layouts, or one record | `file[index]` |
| CSV | a header, then cells; the header tells the delimiter (comma, semicolon, tab, bar) | `file:line` |
| TSV | the same with tabs; Taskmaster's splits of three columns have no header | `file:line` |
| Parquet, Arrow, Feather | each row; Arrow's files and streams | `file[index]` |
| `datasets` directories, hub names | each row of the splits that are read | `name/split[index]` |
| TFRecord | each `tf.train.Example` | `file[index]` |

- **One object** is the authors' splits where its lists of objects are called so (`train`, `test`). Otherwise its rows
  are the only list of objects in it, or the one called `data`, `rows`, `records` or the like. pandas' `to_json` is read
  in any `orient`, and so are lists by column. What holds texts or messages of its own is one record.
- **Packed.** Any of them by gzip, zstd, bzip2 or xz, or alone in a zip archive. What unpacks to more than UNPACKED MiB
  and RATIO times its size is refused: 10 MB that hold 4 GB are a mistake or an attack. Who trusts the file unpacks it.
- **Encoding.** UTF-8, and UTF-16 or UTF-32 as a byte-order mark says. Anything else is an error whose hint names the
  `iconv` call.
- **Absent.** A null, an empty cell and NaN (as pandas writes an empty cell) count as absent. So do null keys of
  messages in Parquet and Arrow, where all messages of a column have the same keys. Infinity is an error.
- **Cells.** A cell of a CSV or TSV file is text, quoted as spreadsheets and pandas do; `weight` and `margin` are
  numbers. One that begins like a list of messages or tools, as JSON or as Python prints it, is read as that list, and
  is an error where it can't be. Where a layout has a list, an object or a number, text of one is read as it, in JSON
  lines, too.
- **Odd JSON** that isn't read is one error that names its shape and what mends it: objects as Python prints them, a
  comma after each line or before a bracket, a list on each line, several lists that may be the rows, a web page, a PDF.

Packed files, Parquet, Arrow and TFRecord are known by their content; CSV and TSV by their suffix, unless there is JSON
inside.

### Splits of a set's authors

Many sets come in splits that their authors made: directories of `datasets`, sets of the hub, JSON with `train` and
`test`, files and folders named so (`train.jsonl`, `test-00000-of-00001.parquet`, `dev/a.csv`). A name says its side by
its first word that is one: `train`, `training`; `validation`, `valid`, `val`, `dev`, `eval`, `heldout`; `test`,
`testing`.

**Rule.** Where some names say training and others say that they are held out, only those for training are read, and one
line on standard error says which are not. So nothing that the authors keep for testing is trained on; our own
[groups](#groups-and-splits) divide what is read. Where none says training, those that say nothing are read
(`prefs.jsonl` beside `prefs_test.jsonl`); where all are held out, or none is, all are, but a
`datasets` directory, hub set or JSON file of held-out splits alone is an error until one is named. Rows that several
splits share (`train_sft` and `train_prefs`) are read once. A file that `data.paths` names itself is read in any case.

`data.split` names others: a split, a side (`test` is also `test_sft`), several joined by `+`, or `all`. To measure on
the authors' test split: `perlhf evaluate runs/mine --data.split test --split all`.

`data.config` names a configuration of a hub set, or of a directory of one (by its README, else by its folders), and
`data.revision` a branch, tag or commit of a hub set. `perlhf data validate | inspect | convert` have `--config`,
`--split` and `--revision` for the same, `perlhf data split` has `--data.split` and so on.

### Formats of rows

What a reader leaves out by its rule (ties, missing answers) is counted, and `perlhf data inspect` shows the counts.
Everything else that is wrong is an error with file and line: bad JSON, invalid UTF-8, a missing or misspelt column,
a label that is none, an empty prompt or completion, a key that occurs twice, a truncated gzip file.
"""

LAYOUTS = """## Layouts

`data.format: auto` goes by the columns of a file's first row, and of the rows after it where people's own layouts are
mixed in one file (not with `data.grades: comparisons`): the layouts of TRL, ShareGPT, Alpaca, ms-swift, OpenAI,
UltraFeedback, HelpSteer, arenas, and what Argilla, Label Studio and open-webui export, need no word in the recipe.
When a file should be read by another rule, name the format. Names are also read with capitals and spaces
(`Response A`) where the file has none of ours as it is. Columns that no rule knows are ignored; one that is a single
slip away from a name that is missing (`lable`) is an error. These keys of `data` are options of `perlhf data` too:

    data:
      columns: {prompt: question, chosen: best.text}    our name: the file's; dots go into objects and lists
      ratings: {up: 4, down: 2}                         grades from 4 are a thumbs up, to 2 a thumbs down
      grades: comparisons                               or: answers to one prompt are compared by their grades
      ties: error                                       or skip, the default

A label is true or false, 1 or 0 (or -1), yes or no, up or down, good or bad; numbers of classes (`ClassLabel` of
`datasets`) are read as the names of the classes. A grade (`rating`, `stars`, `score`, `reward`, `helpfulness`) beside
an answer is never ignored: without `data.ratings` or `data.grades` (`ignore` reads the answers as demonstrations) the
file is one error that names a rule that fits. Grades between `down` and `up` are left out and counted; without `down`
every grade below `up` is a thumbs down. Ties (equal scores or grades among them), and comparisons with the same text on
both sides, teach no preference: they are left out and counted. A judgement of safety beside an answer (`is_safe`,
`response_harm_label`) is no verdict on how good it is: `data.columns: {label: is_safe}` makes it one.
"""

FORMATS_HEAD = """## Formats

"""

EMBEDDED = """## The embedded set

`builtin:coffee-bar` is simulated: a program wrote the orders, the answers and the judgements. It needs no download and
comes with rules that score an answer (`gold`), which reward models never see, so that a run can tell a better policy
from one that only scores higher. `builtin:coffee-bar/rating`, `/comparison`, `/demonstration` and `/prompt` name one
kind of its records. Code: `data.coffee_bar.feedback`.

```python
import perlhf
from perlhf.data.coffee_bar.gold import gold

rating = perlhf.read("builtin:coffee-bar/rating")[0]
print(rating.label, gold(rating.prompt, rating.completion))
```

"""

SETS_HEAD = """## Published sets

`perlhf data pull NAME` fetches a set from where its authors publish it, at a fixed commit. `--source DIR` takes a local
copy instead, checked against the SHA-256 in its `MANIFEST.json`. A set is whole or absent. Its licence is its authors';
read it before you train on it.

| name | published in | licence |
|---|---|---|
"""


def reference() -> str:
    """The whole page."""
    defaults = DataConfig()
    records = "\n".join(_record(kind) for kind in (Comparison, Rating, Demonstration, Prompt))
    parts = [INTRODUCTION, records, _columns()]
    parts.append(GROUPS.format(test=defaults.test, validation=defaults.validation))
    parts.append(_files())
    parts.append(LAYOUTS)
    parts.append(FORMATS_HEAD + "\n".join(_format(row) for row in tools.formats()))
    parts.append(EMBEDDED + SETS_HEAD + "".join(_set(name) for name in pull.sources()))
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)


KNOWN = {
    "trl": "Taken when no other format fits.",
    "hh": "Recognised by: `chosen` and `rejected` that begin with a human turn, and no `prompt`.",
    "argilla": "Recognised by: `fields` and `responses`, or columns that end in `.responses` or `-suggestion`.",
}
"""How formats are told apart that no set of columns shows; any other is taken only when named."""


def _files() -> str:
    numbers = {"UNPACKED": MOST_UNPACKED >> 20, "RATIO": MOST_RATIO, "LONGEST": LONGEST >> 20}
    named = {"SUFFIXES": SUFFIXES, "PACKED": PACKED_SUFFIXES}
    lists = {word: ", ".join(f"`{suffix}`" for suffix in suffixes) for word, suffixes in named.items()}
    text = FILES
    for word, shown in {**numbers, **lists}.items():
        text = re.sub(rf"\b{word}\b", str(shown), text)
    return text


def _record(kind: type) -> str:
    fields = [field for field in dataclasses.fields(kind) if field.name != "source"]
    needed = ", ".join(f"`{field.name}`" for field in fields if field.default is dataclasses.MISSING)
    optional = ", ".join(f"`{field.name}`" for field in fields if field.default is not dataclasses.MISSING)
    about = " ".join((kind.__doc__ or "").split())
    return f"- **{kind.__name__}**: {about} Fields: {needed}." + (f" Optional: {optional}." if optional else "")


def _columns() -> str:
    names = ", ".join(f"`{name}`" for name in COLUMNS)
    return (
        f"Files of your own use the column names of TRL: {names}. The format `trl` below says which make what. "
        "`group` defaults to the first user turn, `source` to the file and line."
    )


def _format(row: dict[str, str]) -> str:
    columns = next(one.columns for one in FORMATS if one.name == row["name"])
    sets = "; or ".join(", ".join(f"`{name}`" for name in sorted(names)) for names in columns)
    known = f"Recognised by: {sets}."
    if not columns or row["name"] in KNOWN:
        known = KNOWN.get(row["name"], f"Taken only when named (`data.format: {row['name']}`).")
    summary, rule, text = row["rule"].partition(" Rule: ")
    text = f"{summary}\n\n**Rule.** {text[:1].upper()}{text[1:]}" if rule else summary
    return f"### {row['name']}\n\n{text.replace(' Group: ', ' **Group:** ')}\n\nGives: {row['gives']}. {known}\n"


def _set(name: str) -> str:
    source = pull.sources()[name]
    return f"| `{name}` | {source['repository']} | {source['licence']} |\n"


if __name__ == "__main__":
    TARGET.write_text(reference(), encoding="utf-8")
