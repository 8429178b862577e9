"""Configuration of `perlhf compare RECIPE`: which cells are trained, and what is called a difference beforehand."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from perlhf.config.addresses import check_addresses
from perlhf.config.stages import Frozen, NotNegative, PolicyConfig, Positive, RewardConfig

Rates = Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)]
StageName = Literal["reward", "policy"]


@dataclass(frozen=True)
class Side:
    """One way of tuning: all weights (rank 0), or adapters of a rank on some layers."""

    rank: int
    targets: Literal["attention", "all"] | None

    @property
    def name(self) -> str:
        """`full`, `r8-attention`."""
        return f"r{self.rank}-{self.targets}" if self.rank else "full"


class CompareConfig(Frozen):
    """LoRA of several ranks beside full tuning on one recipe: quality with intervals, memory, speed and a verdict.

    Every cell is a run in a process of its own under `output`; running the same command again goes on where it was.
    """

    output: Path = Path("runs/compare")
    """Directory of the cells, compare.json and compare.html."""
    reward: RewardConfig | None = None
    """Reward stage to compare (its `run`, `seed`, `tuning`, rank, targets and learning rate are set by the cells)."""
    policy: PolicyConfig | None = None
    """Policy stage to compare; all cells share the reward models that it names."""
    full: bool = True
    """Also full tuning, which the others are compared with; without it they are compared with the first rank."""
    ranks: tuple[Positive, ...] = (16, 8, 4, 1)
    """LoRA ranks."""
    targets: Annotated[tuple[Literal["attention", "all"], ...], Field(min_length=1)] = ("attention", "all")
    """Layers that adapters are on; each rank is run with each."""
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0, 1, 2)
    """Seeds of every side; learning rates are tried with the first of them."""
    rate_seeds: Positive = Field(default=1, exclude_if=lambda number: number == 1)
    """How many seeds each learning rate is tried with: one alone may choose a rate that fails with others."""
    ranks_of_one_seed: tuple[Positive, ...] = ()
    """LoRA ranks that get the first seed alone, to save time; how far seeds differ is taken from the other sides."""
    lora_learning_rates: Rates = (2e-4, 5e-4, 1e-3)
    """Learning rates tried for each LoRA side; the best on validation groups is kept."""
    full_learning_rates: Rates = (3e-5, 1e-4, 3e-4)
    """Learning rates tried for full tuning: as many as for LoRA."""
    margin: NotNegative = 0.02
    """Difference in quality, fixed beforehand, within which two sides are called equivalent."""
    bootstrap: Positive = 1000
    """Resamples of groups behind every interval."""
    scorers: tuple[str, ...] = ()
    """What scores policies when they are evaluated, best reward runs of other groups (none: those they learn from)."""
    also_test: tuple[str, ...] = ()
    """Other sets that reward models are tested on too, the whole of each, read as `auto` finds."""
    jobs: Positive = 1
    """Cells that run at a time, where memory has room; they share the cores, and the speed that is measured."""
    prompts: Positive = 200
    """Prompts that a policy is evaluated on."""

    @field_validator("scorers")
    @classmethod
    def _without_secrets(cls, sources: tuple[str, ...]) -> tuple[str, ...]:
        check_addresses(sources)
        return sources

    @property
    def sides(self) -> list[Side]:
        """All sides; the first is what the others are compared with."""
        adapters = [Side(rank, targets) for targets in self.targets for rank in self.ranks]
        return [*([Side(0, None)] if self.full else []), *adapters]

    def stage(self, name: StageName) -> RewardConfig | PolicyConfig:
        """The configuration of a stage that is compared."""
        stage = self.reward if name == "reward" else self.policy
        assert stage is not None, f"no stage {name}"
        return stage

    @property
    def stages(self) -> list[StageName]:
        """Stages that are compared."""
        names: tuple[StageName, ...] = ("reward", "policy")
        return [name for name in names if getattr(self, name) is not None]

    def seeds_of(self, side: Side) -> tuple[int, ...]:
        """Seeds of a side, all at the learning rate that is chosen."""
        return self.seeds[:1] if side.rank in self.ranks_of_one_seed else self.seeds

    def rate_seeds_of(self, side: Side) -> tuple[int, ...]:
        """Those of a side's seeds that every learning rate is tried with."""
        return self.seeds_of(side)[: self.rate_seeds]

    def runs(self, side: Side) -> int:
        """Number of runs of a side in each stage."""
        tried = len(self.rate_seeds_of(side))
        return len(self.rates(side)) * tried + len(self.seeds_of(side)) - tried

    def rates(self, side: Side) -> tuple[float, ...]:
        """Learning rates that are tried for a side."""
        return self.lora_learning_rates if side.rank else self.full_learning_rates

    @model_validator(mode="after")
    def _comparable(self) -> "CompareConfig":
        if not self.stages:
            raise ValueError("neither reward nor policy is given; give the stage to compare")
        if len(self.sides) < 2:
            raise ValueError("one side alone can't be compared; give more ranks, or full: true")
        if self.full and len(self.lora_learning_rates) != len(self.full_learning_rates):
            raise ValueError(
                f"{len(self.lora_learning_rates)} lora_learning_rates and {len(self.full_learning_rates)} "
                "full_learning_rates: both sides get the same number of tries"
            )
        if self.full and self.policy and self.policy.sampler == "vllm":
            what = "policy.sampler: vllm is sent adapters, and full: true compares with runs that have none"
            raise ValueError(f"{what}; leave one of them out")
        if missing := set(self.ranks_of_one_seed) - set(self.ranks):
            raise ValueError(f"ranks_of_one_seed names {min(missing)}, which isn't among ranks {list(self.ranks)}")
        if self.policy and (both := set(self.scorers) & set(self.policy.validation_reward)):
            raise ValueError(f"{min(both)} is in scorers and in policy.validation_reward: it would judge what it chose")
        if self.also_test and self.reward is None:
            raise ValueError("also_test is for reward models; policies are evaluated on their own prompts")
        names = [Path(path).name for path in self.also_test]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"also_test has two sets of the name {min(twice)}; tables call each by its last part")
        for key in ("ranks", "targets", "seeds", "lora_learning_rates", "full_learning_rates"):
            values = getattr(self, key)
            if len(set(values)) < len(values):
                raise ValueError(f"{key} holds a value twice")
        return self
