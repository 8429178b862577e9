"""Which commands there are, what is read from each one's command line, and what `--help` says above its options.

Nothing here imports torch, nor what any command does.
"""

from collections.abc import Mapping
from typing import Any

from perlhf.config import commands, comparison, labelling, loop, serving, stages
from perlhf.config.command_line import Command

COMMANDS: Mapping[str, Command[Any]] = {
    "demo": Command("perlhf demo", commands.DemoConfig),
    "pull": Command("perlhf pull", commands.PullConfig, ("base",)),
    "base": Command("perlhf base", commands.BaseConfig, ("base",), json=True),
    "plan": Command("perlhf plan", commands.PlanConfig, json=True),
    "sft": Command("perlhf sft", stages.SftConfig, dry_run=True),
    "reward": Command("perlhf reward", stages.RewardConfig, dry_run=True),
    "policy": Command("perlhf policy", stages.PolicyConfig, dry_run=True),
    "evaluate": Command("perlhf evaluate", commands.EvaluateConfig, ("run",)),
    "score": Command("perlhf score", commands.ScoreConfig, ("run", "data.paths")),
    "launch": Command("perlhf launch", commands.LaunchConfig),
    "chat": Command("perlhf chat", commands.ChatConfig, ("run",)),
    "serve": Command("perlhf serve", serving.ServeConfig, ("runs",)),
    "loop": Command("perlhf loop", loop.LoopConfig, dry_run=True),
    "compare": Command("perlhf compare", comparison.CompareConfig, dry_run=True),
    "table": Command("perlhf table", commands.TableConfig, ("runs",)),
    "report": Command("perlhf report", commands.ReportConfig, ("runs",)),
    "average": Command("perlhf average", commands.AverageConfig, ("runs",)),
    "export": Command("perlhf export", commands.ExportConfig, ("run", "output")),
}
DATA_COMMANDS: Mapping[str, Command[Any]] = {
    "formats": Command("perlhf data formats", commands.DataFormatsConfig),
    "validate": Command("perlhf data validate", commands.DataValidateConfig, ("paths",)),
    "inspect": Command("perlhf data inspect", commands.DataInspectConfig, ("paths",)),
    "split": Command("perlhf data split", commands.DataSplitConfig, ("data.paths",)),
    "convert": Command("perlhf data convert", commands.DataConvertConfig, ("path", "output")),
    "pull": Command("perlhf data pull", commands.DataPullConfig, ("name",)),
}
LABEL_COMMANDS: Mapping[str, Command[Any]] = {
    "label": Command("perlhf label", labelling.LabelConfig, ("project",)),
    "invite": Command("perlhf label invite", labelling.LabelInviteConfig, ("project", "name")),
    "answers": Command("perlhf label answers", labelling.LabelAnswersConfig, ("output",)),
    "export": Command("perlhf label export", labelling.LabelExportConfig, ("project", "output")),
    "import": Command("perlhf label import", labelling.LabelImportConfig, ("project", "source")),
    "backup": Command("perlhf label backup", labelling.LabelBackupConfig, ("project", "output")),
}
STAGES: Mapping[str, type[Any]] = {
    "sft": stages.SftConfig,
    "reward": stages.RewardConfig,
    "policy": stages.PolicyConfig,
}
SHARED = ("sft", "reward", "policy", "evaluate", "score")
"""Commands whose work several workers share; any other is done by one process."""
COMPUTING = ("demo", "sft", "reward", "policy", "evaluate", "score", "chat", "serve", "loop")
"""Commands that run the network: worth a restart under another allocator."""
DATA_SUMMARY = "List, check, inspect, split, convert and pull data sets."


def overview(prog: str, about: str, summaries: Mapping[str, str]) -> str:
    """The text of `--help` above the commands' own."""
    lines = [f"  {name:<10}{summary}" for name, summary in summaries.items()]
    usage = f"usage: {prog} COMMAND [recipe.yaml] [--option value ...]"
    return "\n".join(
        [usage, "", about, "", "commands:", *lines, "", f"`{prog} COMMAND --help` lists a command's options."]
    )


def summaries(commands: Mapping[str, Command[Any]]) -> dict[str, str]:
    """First line of each command's documentation."""
    return {name: command.about.splitlines()[0] for name, command in commands.items()}


def top_level_help() -> str:
    """What `perlhf --help` prints."""
    entries = summaries(COMMANDS)
    groups = {"data": DATA_SUMMARY, "label": summaries(LABEL_COMMANDS)["label"]}
    ordered = {
        name: groups.get(name) or entries[name] for name in ("demo", "pull", "base", "plan", "data", "label", *entries)
    }
    return overview("perlhf", "Align language models by training small adapters on one frozen base.", ordered)


def data_help() -> str:
    """What `perlhf data --help` prints."""
    return overview("perlhf data", DATA_SUMMARY, summaries(DATA_COMMANDS)).replace(" [recipe.yaml]", "", 1)


def label_help() -> str:
    """What `perlhf label --help` prints."""
    about = "Open a page on which people judge answers; what they say becomes records."
    entries = {"PROJECT": "Open the page of this project.", **summaries(LABEL_COMMANDS)}
    del entries["label"]
    usage = "usage: perlhf label PROJECT [--option value ...]\n       perlhf label COMMAND PROJECT ..."
    lines = [f"  {name:<10}{summary}" for name, summary in entries.items()]
    more = "`perlhf label COMMAND --help` and `perlhf label PROJECT --help` list options."
    return "\n".join([usage, "", about, "", *lines, "", more])
