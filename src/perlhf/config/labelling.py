"""Configuration of labelling: what people are asked, and in which order."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from perlhf.config.addresses import HostName
from perlhf.config.stages import (
    DataConfig,
    Fraction,
    Frozen,
    LayoutConfig,
    Positive,
    Sampler,
    VllmConfig,
    check_sampler,
)

Share = Annotated[float, Field(ge=0, le=1)]
Port = Annotated[int, Field(ge=0, le=65535)]
Order = Literal["random", "disagreement", "information"]


class QuestionsConfig(LayoutConfig):
    """Where questions come from, and in which order they are asked."""

    paths: tuple[str, ...] = ("builtin:coffee-bar/comparison",)
    """Comparisons, ratings, or prompts with `completions`; `[]` where a loop or `label answers` brings them."""
    limit: Positive | None = None
    """Ask at most this many questions of `paths`, chosen by a hash."""
    overlap: Share = 0.0
    """Share of questions that two people answer, so that agreement is known."""
    tests: tuple[str, ...] = ()
    """Records with known verdicts that are asked like others, to see who answers them rightly."""
    test_share: Fraction = 0.05
    """Share of a labeller's questions that are such hidden tests."""
    order: Order = "random"
    """First what `rewards` disagree about most, or where a label tells most about them (`information`)."""
    rewards: tuple[str, ...] = ()
    """Reward runs (two or more, or one of several members) whose scores of the answers make that order."""
    random_share: Share = 0.25
    """Share of the questions that keep a random place whatever `order` says; each label records which."""
    seed: int = 0
    """Of the order, of which side stands left, and of what is asked twice."""

    @model_validator(mode="after")
    def _order_has_its_models(self) -> "QuestionsConfig":
        if self.order != "random" and not self.rewards:
            raise ValueError(f"questions.order: {self.order} needs reward runs in questions.rewards")
        if self.order == "random" and self.rewards:
            raise ValueError("questions.rewards make an order; give questions.order: disagreement or information")
        return self


class ProjectConfig(Frozen):
    """A labelling project: `project.yaml` in its directory."""

    title: Annotated[str, Field(min_length=1, max_length=200)] = "Which answer is better?"
    """Heading of the page."""
    instructions: str = "Read the conversation and both answers. Choose the answer that you would rather be given."
    """What people are to go by (Markdown), always one key away."""
    kind: Literal["comparison", "rating", "scale"] = "comparison"
    """`comparison` of two answers, thumbs for one (`rating`), or 1 to 5 on each of the `criteria` (`scale`)."""
    criteria: tuple[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_ -]{0,39}$")], ...] = ()
    """For `scale`: names of what is graded, such as `[helpful, honest]`."""
    up: Annotated[float, Field(gt=1, le=5)] = 4.0
    """For `scale`: a mean grade of at least this is exported as a thumbs up, any other as a thumbs down."""
    questions: QuestionsConfig = QuestionsConfig()
    """What is asked."""
    lease_minutes: Positive = 30
    """A question that is open on somebody's page is given to nobody else for so long."""
    redact: bool = False
    """Mask mail addresses, phone numbers and card numbers before anything is shown or stored."""
    explain: tuple[str, ...] = ()
    """Reward runs on one base that show, when asked after an answer, what moved its score; several: their mean."""

    @model_validator(mode="after")
    def _criteria_fit(self) -> "ProjectConfig":
        if (self.kind == "scale") != bool(self.criteria):
            raise ValueError("criteria belong to kind: scale, and kind: scale needs at least one")
        if self.questions.order != "random" and self.kind != "comparison":
            raise ValueError(f"questions.order: {self.questions.order} is for kind: comparison")
        if len(set(self.criteria)) != len(self.criteria):
            raise ValueError("criteria has a name twice")
        return self


class LabelConfig(Frozen):
    """Open a page on which people judge answers; what they say is kept in PROJECT/labels.sqlite."""

    project: Path
    """Directory of the project; one without project.yaml gets one with these settings."""
    settings: ProjectConfig = ProjectConfig()
    """For a new project: what is asked. A project that exists is changed in its project.yaml."""
    redact: bool = False
    """For a new project: `settings.redact`, which masks mail addresses, phone numbers and card numbers."""
    host: str = "127.0.0.1"
    """Address to listen at. Any but this machine's own needs a link for each labeller (`perlhf label invite`)."""
    port: Port = 8765
    """Port to listen at; 0 takes a free one."""
    allow_hosts: tuple[HostName, ...] = ()
    """Further names under which browsers may ask for the page, such as that of a proxy."""


def _name(name: str) -> str:
    """As the page takes names: one space between words."""
    name = " ".join(name.split())
    if not name or not name.isprintable():
        raise ValueError("a name has letters, and nothing that can't be shown")
    return name


class LabelInviteConfig(Frozen):
    """Make a link for one labeller (or anew for one who lost it); it is shown once and kept as a hash."""

    project: Path
    """Directory of the project."""
    name: Annotated[str, Field(min_length=1, max_length=60), AfterValidator(_name)]
    """Who gets it: seen by the project's owner alone."""
    owner: bool = False
    """The link also opens the owner's page: progress, agreement, labellers; who had it keeps it."""
    address: str = "http://127.0.0.1:8765"
    """How labellers reach the page."""


class LabelAnswersConfig(Frozen):
    """Have runs answer prompts, and write the answers as a file that a project asks people about."""

    output: Path
    """JSON lines to write: prompts with `completions`, and `by` whom each is; name it in `questions.paths`."""
    project: Path | None = None
    """Project that asks about answers as they come, its page open or not; killed, the same command goes on."""
    by: Annotated[tuple[str, ...], Field(min_length=1)] = ("base",)
    """Who answers: `base`, SFT and policy runs (DIRECTORY or NAME=DIRECTORY); `@0.7` behind one is its temperature."""
    answers: Positive = 2
    """Of each of them, to each prompt."""
    data: DataConfig = DataConfig()
    """Prompts."""
    split: Literal["train", "validation", "test", "all"] = "train"
    """Groups whose prompts are answered; held-out ones are to measure with."""
    base: str | None = None
    """The network; null is the first run's, or the packaged one when none of them is a run."""
    system: str | None = None
    """System message; null is that of each run, and none for the base."""
    max_completion_tokens: Positive = 256
    """Longest answer."""
    sampler: Sampler = "local"
    """What samples: this process, or a vLLM server on the same base."""
    vllm: VllmConfig = VllmConfig()
    """The server of `sampler: vllm`."""
    accept_changes: bool = False
    """Go on where base or adapters aren't as a run recorded them; what changed is told."""
    dtype: Literal["run", "bfloat16", "float32"] = "run"
    """Of the base; `run` is that of the first run, or what the hardware is faster in."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:N`, or `mps` (never run)."""
    seed: int = 0
    """Of sampling."""

    @model_validator(mode="after")
    def _consistent(self) -> "LabelAnswersConfig":
        check_sampler(self.sampler, self.vllm)
        return self


class LabelExportConfig(Frozen):
    """Write what people said as records that `perlhf data validate` and every stage read."""

    project: Path
    """Directory of the project."""
    output: Path
    """Directory to write."""
    format: Literal["jsonl", "datasets"] = "jsonl"
    """`jsonl` files, or a directory that `datasets.load_from_disk` opens."""
    overlap: Literal["all", "majority"] = "all"
    """Of questions with several labels: `all`, each with weight 1/n, or the `majority`, where there is one."""
    without: tuple[str, ...] = ()
    """Names of labellers whose labels are left out."""


class LabelImportConfig(Frozen):
    """Take labels of an export (of this project or another copy of it) into a project."""

    project: Path
    """Directory of the project."""
    source: Path
    """Directory that `perlhf label export` wrote."""


class LabelBackupConfig(Frozen):
    """Copy a project's labels into a file, also while the page is in use."""

    project: Path
    """Directory of the project."""
    output: Path
    """File to write."""
