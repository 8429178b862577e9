"""Configuration of `perlhf loop`: rounds of answers, questions, labels, reward models and a policy."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from perlhf.config.addresses import JUDGE_KEY, check_address
from perlhf.config.labelling import Order, Port, Share
from perlhf.config.stages import (
    DEFAULT_BASE,
    AdapterConfig,
    DataConfig,
    EncodingConfig,
    Frozen,
    OptimConfig,
    PolicyConfig,
    Positive,
    RewardConfig,
    Sampler,
    StageConfig,
    VllmConfig,
    check_sampler,
)

DEMO: dict[str, Any] = {
    "run": "runs/loop-demo",
    "labeller": "simulated",
    "noise": 0.1,
    "rounds": 3,
    "labels_per_round": 20,
    "prompts_per_round": 24,
    "answers_per_prompt": 3,
    "held_out_labels": 24,
    "duels": 10,
    "encoding": {"system": "You take orders in a coffee bar.", "max_tokens": 512},
    "reward": {
        "members": 2,
        "adapter": {"rank": 8, "targets": "all"},
        "optim": {"learning_rate": 1e-3},
        "epochs": 1,
    },
    "policy": {
        "adapter": {"rank": 8, "targets": "all"},
        "optim": {"learning_rate": 3e-4},
        "updates": 3,
        "prompts_per_update": 4,
        "max_completion_tokens": 32,
        "validation_prompts": 2,
    },
}
"""What `--demo` stands for; a recipe and options override it."""


class LoopEncodingConfig(EncodingConfig):
    """How a record becomes tokens; the same for all steps."""

    drop_long: bool = True
    """Leave out (and count) labels about answers that alone exceed max_tokens; `false` stops the loop at one."""


class LoopRewardConfig(Frozen):
    """The ensemble of reward adapters on the base, trained on from the last round's, on all labels so far."""

    members: Positive = 4
    """Reward adapters, trained in one pass; `disagreement` and `information` are of two or more."""
    adapter: AdapterConfig = AdapterConfig()
    """Shape of each."""
    optim: OptimConfig = OptimConfig()
    """Optimiser."""
    epochs: Positive = 2
    """Passes over all labels so far, in each round."""
    examples_per_update: Positive = 8
    """Comparisons per optimiser step."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of labels taken to be wrong."""


class LoopPolicyConfig(Frozen):
    """The policy, trained on from the last round's and held to the start by its KL."""

    adapter: AdapterConfig = AdapterConfig()
    """Shape of the policy's adapter."""
    optim: OptimConfig = OptimConfig()
    """Optimiser."""
    updates: Positive = 10
    """Rollouts of each round."""
    prompts_per_update: Positive = 8
    """Prompts sampled in a rollout."""
    completions_per_prompt: Annotated[int, Field(ge=2)] = 4
    """Completions of each prompt; their mean is the baseline of one another."""
    max_completion_tokens: Positive = 64
    """Longest completion, end token included."""
    validation_prompts: Positive = 16
    """Held-out prompts on which a round's policy is measured by its reward models; up to twice as many report it."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Of sampling, in training and for questions."""
    kl_coef: Annotated[float, Field(ge=0, le=1)] = 0.05
    """beta of J = (1 - beta) score - beta KL, to the start."""
    combine: Literal["mean", "min", "mean_minus_std"] = "mean"
    """How scores of the reward models become one."""
    bounded: bool = False
    """Pay sigmoid(score - score of the start's answer to the prompt), so that no score is worth chasing without end."""
    max_kl: Annotated[float, Field(gt=0)] | None = None
    """End a round's policy when the mean KL per completion exceeds this."""
    max_disagreement: Annotated[float, Field(gt=1)] | None = None
    """End a round's policy when its reward models disagree by so many times what they do at its first update."""


class LoopConfig(Frozen):
    """Label, learn, label again: rounds of answers, questions, labels, reward models and a policy."""

    run: Path = Path("runs/loop")
    """Directory of the loop; running the same command again continues it."""
    demo: bool = False
    """Fill in what isn't given with a small loop on the embedded feedback, judged by its rules with wrong answers."""
    project: Path | None = None
    """Labelling project whose database holds the labels; null is RUN/labels."""
    rounds: Positive = 4
    """Rounds; more may be asked for later."""
    labels_per_round: Positive = 40
    """Questions to learn from in each round, each about another prompt."""
    order: Order = "disagreement"
    """Which questions: `random`, where reward models disagree most, or where a label tells most (`information`)."""
    random_share: Share = 0.25
    """Share of a round's questions that are random whatever `order` says; each label records which it was."""
    prompts_per_round: Positive = 80
    """Training prompts that are answered in a round, from which questions are chosen."""
    answers_per_prompt: Annotated[int, Field(ge=2, le=16)] = 4
    """Answers to each of these, half of them by the policy of the last round, half by the start."""
    held_out_labels: Positive = 40
    """Random questions about held-out prompts, asked once, that measure the reward models of every round."""
    duels: Positive = 20
    """Held-out prompts on which each round's policy is held beside the start, by labels."""
    labeller: Literal["people", "judge", "simulated"] = "people"
    """Who answers: people on the page of `perlhf label`, a `judge`, or the rules of the embedded feedback."""
    noise: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of a simulated labeller's answers that are wrong."""
    judge: str | None = None
    """OpenAI-compatible address of a judge, asked in both orders."""
    judge_model: str = "default"
    """Model name given to the judge."""
    judge_timeout_seconds: Annotated[float, Field(gt=0)] = 60.0
    """Limit of one request to the judge, up to the last byte of its answer."""
    page: Port | None = None
    """Open the labelling page at this port while the loop runs; null leaves that to `perlhf label`."""
    base: str = DEFAULT_BASE
    """Frozen network: packaged name, hub id (`ORG/NAME[@REVISION]`; `perlhf pull` gets it), directory or GGUF file."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Dtype of the base; `auto` is bfloat16 where the hardware is faster in it, else float32."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:N`, or `mps` (never run)."""
    threads: Annotated[int, Field(gt=0, le=1024)] | None = None
    """CPU threads; null leaves it to torch. Equal results after a kill need the same number."""
    seed: int = 0
    """All randomness is keyed by this."""
    sft: Path | None = None
    """SFT run, or a directory of peft's, that the policy starts from; null starts from the base, as rewards do."""
    data: DataConfig = DataConfig()
    """Prompts. Validation and test groups are never learned from: they measure."""
    encoding: LoopEncodingConfig = LoopEncodingConfig()
    """From records to tokens."""
    tokens_per_microbatch: Positive | None = None
    """Computed tokens in one forward pass; null takes 1024, or encoding.max_tokens if that is more."""
    reward: LoopRewardConfig = LoopRewardConfig()
    """The reward adapters."""
    policy: LoopPolicyConfig = LoopPolicyConfig()
    """The policy."""
    # These are left out of what a loop records unless they are set: a record without them is the same loop.
    sampler: Sampler = Field(default="local", exclude_if=lambda engine: engine == "local")
    """What samples in training, for questions and for duels: this process, or a vLLM server on the same base."""
    vllm: VllmConfig = Field(default=VllmConfig(), exclude_if=lambda server: server == VllmConfig())
    """The server of `sampler: vllm`."""
    bootstrap: Positive = 1000
    """Resamples of groups behind every interval."""

    @field_validator("judge")
    @classmethod
    def _judge_without_secrets(cls, address: str | None) -> str | None:
        if address is not None:
            check_address(address, JUDGE_KEY)
        return address

    @model_validator(mode="after")
    def _consistent(self) -> "LoopConfig":
        if (self.labeller == "judge") != (self.judge is not None):
            raise ValueError("labeller: judge and judge: ADDRESS belong together; give both, or neither")
        if self.labeller != "simulated" and self.noise:
            raise ValueError(f"noise is of a simulated labeller; leave it out with labeller: {self.labeller}")
        embedded = all(path.split("/")[0] == "builtin:coffee-bar" for path in self.data.paths)
        if self.labeller == "simulated" and not embedded:
            raise ValueError(
                "labeller: simulated answers by the rules of builtin:coffee-bar, which data.paths must name"
            )
        if self.labeller != "people" and self.page is not None:
            raise ValueError("page is for labeller: people; leave it out")
        if self.labels_per_round > self.prompts_per_round:
            raise ValueError(
                f"labels_per_round {self.labels_per_round} exceeds prompts_per_round {self.prompts_per_round}; "
                "each question of a round is about another prompt"
            )
        if self.order != "random" and self.reward.members < 2:
            raise ValueError(f"order: {self.order} needs reward.members of 2 or more; one has nobody to disagree with")
        if self.reward.adapter.dropout and self.reward.members > 1:
            raise ValueError("reward.adapter.dropout must be 0 with reward.members above 1; leave one of them out")
        if self.policy.max_disagreement is not None and self.reward.members < 2:
            raise ValueError("policy.max_disagreement needs reward.members of 2 or more")
        if self.policy.adapter.dropout:
            raise ValueError("policy.adapter.dropout must be 0: sampled and trained log-probabilities would differ")
        if not self.data.validation or not self.data.test:
            raise ValueError("data.validation and data.test must be above 0: the loop measures on groups held out")
        check_sampler(self.sampler, self.vllm)
        return self

    @property
    def labels(self) -> Path:
        """The labelling project."""
        return self.project or self.run / "labels"

    @property
    def slots(self) -> int:
        """Adapters that a vLLM server must hold at a time, so that it can sample for all steps."""
        return self.policy_stage(self.run, self.run, None, self.seed).slots

    def stage(self) -> StageConfig:
        """What the stages share, to open the base with."""
        return StageConfig(run=self.run, data=self.data, **self.shared())

    def reward_stage(self, run: Path, labels: Path, start: Path | None, seed: int) -> RewardConfig:
        """The reward adapters of a round, which start from the base.

        Validation and test groups are one side, which chooses nothing: the last update is kept. The seed of all rounds
        is one, so that a member weighs a group alike in all of them.
        """
        held_out = self.data.validation + self.data.test
        return RewardConfig(
            run=run,
            data=DataConfig(paths=(str(labels),), validation=held_out, test=0.0, split_seed=self.data.split_seed),
            seed=seed,
            start=start,
            validate_every=1_000_000,
            **self.reward.model_dump(),
            **self.shared(),
        )

    def policy_stage(self, run: Path, reward: Path, start: Path | None, seed: int) -> PolicyConfig:
        """A round's policy, as it is after its last update: what labels say of it is known later."""
        return PolicyConfig(
            run=run,
            data=self.data,
            seed=seed,
            sft=self.sft,
            start=start,
            reward=(str(reward),),
            baseline="leave_one_out",
            keep="last",
            centre_prompts=16,
            validate_every=self.policy.updates,
            sampler=self.sampler,
            vllm=self.vllm,
            **self.policy.model_dump(),
            **self.shared(),
        )

    def shared(self) -> dict[str, Any]:
        """What all stages have alike."""
        names = ("base", "dtype", "device", "threads", "encoding", "tokens_per_microbatch")
        return {name: getattr(self, name) for name in names}
