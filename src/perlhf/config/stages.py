"""Configuration of every command: frozen pydantic models, unknown keys refused.

A field's docstring is its `--help`. A recipe is the YAML form of one stage's model; `perlhf STAGE recipe.yaml
--a.b value` overrides it. This module imports no torch, so help and validation are instant.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from perlhf.config.addresses import VLLM_KEY, check_address, check_addresses

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]

DEFAULT_BASE = "smollm2-135m-instruct-q4_1"
PLAIN_TEMPLATES = ("plain", "plain-bos")
"""Values of `encoding.template` that need no tokenizer's and no file: `role: text` lines; after the begin token."""


class Frozen(BaseModel):
    """Base of all configuration: immutable, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class RatingsConfig(Frozen):
    """Which grades are a thumbs up and which a thumbs down; those between are left out and counted."""

    up: float
    """A grade of at least this is a thumbs up."""
    down: float | None = None
    """A grade of at most this is a thumbs down; null takes every grade below `up`."""

    @model_validator(mode="after")
    def _apart(self) -> "RatingsConfig":
        if self.down is not None and self.down >= self.up:
            raise ValueError(f"ratings.down {self.down:g} is not below ratings.up {self.up:g}")
        return self


class LayoutConfig(Frozen):
    """What is read of a set, and how its rows become records."""

    format: str = "auto"
    """Reader to use (`perlhf data formats` lists them); `auto` goes by the columns of each file's first row."""
    # These are left out of what a run records unless they are set: a record without them is the same run.
    columns: dict[str, str] = Field(default_factory=dict[str, str], exclude_if=lambda names: not names)
    """Our names of columns and the file's, such as `{prompt: question, chosen: best.text}`; dots go into objects."""
    ratings: RatingsConfig | None = Field(default=None, exclude_if=lambda rule: rule is None)
    """For files of grades: which are a thumbs up and which a thumbs down; a file of grades needs it, or `grades`."""
    grades: Literal["ratings", "comparisons", "ignore"] | None = Field(default=None, exclude_if=lambda use: use is None)
    """What grades become: `ratings` (by that rule), `comparisons` of one prompt's answers, or nothing (`ignore`)."""
    ties: Literal["skip", "error"] = Field(default="skip", exclude_if=lambda rule: rule == "skip")
    """Ties and comparisons of equal texts teach no preference: `skip` leaves them out and counts, `error` refuses."""
    turns: Literal["last", "all"] = Field(default="last", exclude_if=lambda which: which == "last")
    """Of conversations without a verdict: the `last` answer is the completion, or each of `all` after a user's turn."""
    config: str | None = Field(default=None, exclude_if=lambda name: name is None)
    """Of a hub set (or a directory of one): the configuration to read, where it has several."""
    split: str | None = Field(default=None, exclude_if=lambda name: name is None)
    """Of a set with its authors' splits: those to read (`test`, `train_sft+train_prefs`, `all`); null: training's."""
    revision: str | None = Field(default=None, exclude_if=lambda name: name is None)
    """Of a hub set: branch, tag or commit."""

    @model_validator(mode="after")
    def _one_rule_for_grades(self) -> "LayoutConfig":
        if self.ratings is not None and self.grades in ("comparisons", "ignore"):
            raise ValueError(f"grades: {self.grades} and ratings are two rules for the same grades; give one of them")
        return self


class DataConfig(LayoutConfig):
    """Which records a stage reads and how they are split by group."""

    paths: tuple[str, ...] = ("builtin:coffee-bar",)
    """Files, directories, hub names or `builtin:coffee-bar`; relative paths are also looked up under $PERLHF_DATA."""
    validation: Fraction = 0.1
    """Share of groups held out to select checkpoints."""
    test: Fraction = 0.2
    """Share of groups held out for `perlhf evaluate`."""
    split_seed: int = 0
    """Changes which groups are held out; splits depend on nothing else."""
    limit: Positive | None = None
    """Use at most this many records of a split (chosen by a hash, stable over file order)."""
    # These two are left out of what a run records unless they are set: a record without them is the same run.
    limit_train: Positive | None = Field(default=None, exclude_if=lambda limit: limit is None)
    """As limit, for the training split alone: how good with so many labels."""
    label_noise: Fraction = Field(default=0.0, exclude_if=lambda share: share == 0)
    """Share of training labels that are swapped or flipped, to see what wrong labels do; held-out labels stay."""

    @model_validator(mode="after")
    def _some_training_data(self) -> "DataConfig":
        if self.validation + self.test >= 1:
            total = self.validation + self.test
            raise ValueError(f"validation + test = {total:g} leaves no training group; allowed: below 1")
        if not self.paths:
            raise ValueError("paths is empty; give at least one file, directory or name")
        return self


class EncodingConfig(Frozen):
    """How a record becomes tokens; the same for training, scoring and sampling."""

    template: str = "tokenizer"
    """`tokenizer`'s, `name:X` of several, `plain` (`role: text` lines), `plain-bos` (begin token first), Jinja file."""
    # Left out of what a run records unless they are set: a record without them is the same run.
    template_kwargs: dict[str, Any] = Field(default_factory=dict[str, Any], exclude_if=lambda variables: not variables)
    """Variables that the template asks for, such as `{enable_thinking: false}`."""
    day: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\d$")] | None = Field(
        default=None, exclude_if=lambda day: day is None
    )
    """Day that a template which writes the date is rendered for (2026-01-31); null takes the day a run starts."""
    unrendered: Literal["error", "warn"] = Field(default="error", exclude_if=lambda rule: rule == "error")
    """Where a template leaves out content, tool calls, reasoning or tools: an `error`, or told once (`warn`)."""
    system: str | None = None
    """System message put before every prompt that has none; null leaves it to the template."""
    max_tokens: Positive = 1024
    """Longest prompt + completion; the start of a longer prompt is cut and counted."""
    drop_long: bool = False
    """Drop (and count) examples whose completion alone exceeds max_tokens; otherwise they are an error."""


class AdapterConfig(Frozen):
    """One LoRA adapter: delta W = (alpha / rank) B A."""

    rank: Positive = 16
    """Rank of the update (the paper uses 1, 4, 8, 16)."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """Scale numerator; with alpha / rank scaling the best learning rate hardly depends on rank."""
    targets: Literal["attention", "all"] | tuple[str, ...] = "attention"
    """`attention` (q, k, v, o: the paper; beside experts what all tokens share), `all` linear layers, or names."""
    layers: Annotated[str, Field(pattern=r"^(all|last:[1-9][0-9]*)$")] = "all"
    """`all` layers of the network, or `last:N`: what lies below the last N is computed without a backward."""
    dropout: Fraction = 0.0
    """Dropout on the adapter's input; always 0 for policy and value."""


class OptimConfig(Frozen):
    """AdamW and its schedule."""

    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Peak rate, of a normalised step where `max_grad_norm` binds; null: default for `tuning` (LoRA ten times full)."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape after warm-up; linear and cosine end at 0."""
    warmup_updates: Annotated[int, Field(ge=0)] = 0
    """Updates over which the learning rate rises linearly; a policy's begin after those of the value alone."""
    weight_decay: NotNegative = 0.0
    """Decoupled weight decay."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients of each adapter are clipped to this norm; one below what they have makes each update count alike."""
    beta1: Fraction = 0.9
    """Decay of AdamW's first moment."""
    beta2: Fraction = 0.999
    """Decay of AdamW's second moment."""


class LogConfig(Frozen):
    """Where metrics go besides metrics.jsonl."""

    tensorboard: bool = False
    """Also write TensorBoard events (extra `tensorboard`)."""
    wandb: str | None = None
    """Also write to this Weights & Biases project (extra `wandb`); nothing is sent unless set."""


class StageConfig(Frozen):
    """What the three training stages share."""

    run: Path
    """Run directory; running the same command again continues it."""
    base: str = DEFAULT_BASE
    """Frozen network: packaged name, hub id (`ORG/NAME[@REVISION]`; `perlhf pull` gets it), directory or GGUF file."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Dtype of the base; `auto` is bfloat16 where the hardware is faster in it, else float32."""
    # Left out of what a run records unless it is set: a record without it is the same run.
    quantize: Literal["none", "int8", "nf4"] = Field(default="none", exclude_if=lambda kind: kind == "none")
    """Keep the base's linear layers in 8 or 4 bits, made so while loading (extra `quantized`); adapters are as ever."""
    # Left out of what a run records unless it is set: a record without it is the same run.
    shard: Literal["none", "full", "node"] = Field(default="none", exclude_if=lambda how: how == "none")
    """`full`: each of several workers holds a part of the base; `node`: each of a machine's; `none`: each all of it."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:N`, or `mps` (never run)."""
    threads: Annotated[int, Field(gt=0, le=1024)] | None = None
    """CPU threads; null leaves it to torch. Bit-equal resume needs the same number."""
    seed: int = 0
    """All randomness is keyed by this."""
    tuning: Literal["lora", "full"] = "lora"
    """`lora` trains an adapter; `full` a float32 copy of all weights (to measure against)."""
    data: DataConfig = DataConfig()
    """Records to learn from."""
    encoding: EncodingConfig = EncodingConfig()
    """From records to tokens."""
    adapter: AdapterConfig = AdapterConfig()
    """Shape of the adapter (ignored by `tuning: full`)."""
    optim: OptimConfig = OptimConfig()
    """Optimiser."""
    packing: Literal["auto", "none", "tree"] = "auto"
    """`tree` computes a shared prefix once and pads nothing; `none` pads sequences; `auto`: `tree` where a base can."""
    tokens_per_microbatch: Positive | None = None
    """Computed tokens in one forward pass; null takes 1024, or encoding.max_tokens if that is more."""
    # Left out of what a run records unless it is set: a record without it is the same run.
    recompute: Literal["auto", "always", "never"] = Field(default="auto", exclude_if=lambda how: how == "auto")
    """Keep layers' inputs alone and compute the rest again in the backward: `auto` where a step wouldn't fit else."""
    checkpoint_every: Positive | None = None
    """Updates between checkpoints; null takes 20 (1 for a LoRA policy)."""
    log: LogConfig = LogConfig()
    """Optional metric writers."""
    # These are left out of what a run records unless they are set: a record without them is the same run.
    check_every: Positive = Field(default=20, exclude_if=lambda updates: updates == 20)
    """Of several workers: updates between comparisons of their adapters, bit by bit; a difference ends the run."""
    start: Path | None = Field(default=None, exclude_if=lambda run: run is None)
    """Run of the same stage (or a directory of peft's) whose adapter is trained on: a second stage after the first."""

    @model_validator(mode="after")
    def _whole_weights_are_tuned(self) -> "StageConfig":
        if self.tuning == "full" and self.quantize != "none":
            raise ValueError(
                f"tuning: full learns all weights, which quantize: {self.quantize} keeps in few bits; "
                "leave quantize out, or take tuning: lora"
            )
        if self.tuning == "full" and self.shard != "none":
            raise ValueError(
                f"tuning: full learns all weights, and shard: {self.shard} spreads weights that stay as they are; "
                "leave shard out, or take tuning: lora"
            )
        for key, value, plain in (("tuning", self.tuning, "lora"), ("shard", self.shard, "none")):
            if self.recompute == "always" and value != plain:
                raise ValueError(
                    f"recompute: always goes with {key}: {plain} alone, not {value}; "
                    f"leave recompute out, or take {key}: {plain}"
                )
        return self

    @property
    def save_every(self) -> int:
        """Updates between checkpoints in force."""
        return self.checkpoint_every or 20

    @property
    def microbatch_tokens(self) -> int:
        """Computed tokens in one forward pass in force: a sequence that fills it alone shares its prefix with none."""
        return self.tokens_per_microbatch or max(1024, self.encoding.max_tokens)


class SftConfig(StageConfig):
    """Supervised fine-tuning of the `sft` adapter on demonstrations."""

    run: Path = Path("runs/sft")
    """Run directory; running the same command again continues it."""
    epochs: Positive = 1
    """Passes over the training demonstrations."""
    examples_per_update: Positive = 16
    """Demonstrations per optimiser step."""
    order: Literal["shuffled", "grouped"] = "shuffled"
    """`shuffled` by record; `grouped` keeps records of a group together, so that more tokens are shared."""
    max_updates: Positive | None = None
    """Stop after this many updates."""
    validate_every: Positive = 20
    """Updates between validations; the adapter with the lowest validation loss is kept."""
    validation_examples: Positive | None = None
    """About this many held-out demonstrations, of whole groups, are validated on; null takes all."""

    @property
    def learning_rate(self) -> float:
        """The peak learning rate in force."""
        return self.optim.learning_rate or (2e-4 if self.tuning == "lora" else 2e-5)


class RewardConfig(StageConfig):
    """Reward model from comparisons (Bradley-Terry), ratings (binary cross-entropy), or both."""

    run: Path = Path("runs/reward")
    """Run directory; running the same command again continues it."""
    # Left out of what a run records unless it is set: a record without it is the same run.
    members: Positive = Field(default=1, exclude_if=lambda count: count == 1)
    """Reward adapters, trained in one pass, each weighing records otherwise: several tell how unsure a score is."""
    sft: Path | None = None
    """SFT run, or a directory of peft's, whose adapter the reward adapter starts from; null starts from the base."""
    epochs: Positive = 1
    """Passes over the training records."""
    examples_per_update: Positive = 16
    """Comparisons and ratings per optimiser step."""
    order: Literal["shuffled", "grouped"] = "shuffled"
    """`shuffled` by record; `grouped` keeps records of a group together, so that more tokens are shared."""
    max_updates: Positive | None = None
    """Stop after this many updates."""
    validate_every: Positive = 20
    """Updates between validations."""
    validation_examples: Positive | None = None
    """About this many held-out records, of whole groups, are validated on; null takes all."""
    head_start: Literal["zero", "probe"] = "zero"
    """The score head at the start: `zero`, or `probe`, fitted on the states of the network as it is (linear probe)."""
    probe_examples: Positive = 4096
    """For `head_start: probe`: about this many training records, of whole groups, are fitted."""
    select: Literal["auto", "auc", "pairwise_accuracy", "loss"] = "auto"
    """Which validation metric picks the kept checkpoint; `auto` is AUC for ratings, else pairwise accuracy."""
    class_weight: Literal["none", "balanced"] = "none"
    """`balanced` weights up and down ratings to count equally, their records' weights included."""
    comparison_weight: NotNegative = 1.0
    """Weight of the comparisons' mean loss when a run has both kinds."""
    rating_weight: NotNegative = 1.0
    """Weight of the ratings' mean loss when a run has both kinds."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of labels taken to be wrong."""
    margin: NotNegative = 0.0
    """Scale of the records' `margin` inside the comparison loss; 0 ignores it."""

    @model_validator(mode="after")
    def _one_start(self) -> "RewardConfig":
        if self.start is not None and self.sft is not None:
            raise ValueError("start and sft both say what the adapter starts from; give one of them")
        if self.start is not None and self.head_start == "probe":
            raise ValueError("head_start: probe would replace the score head that start brings; leave one of them out")
        if self.members > 1 and self.adapter.dropout:
            raise ValueError(
                f"adapter.dropout must be 0 with members: {self.members}, which are computed in one pass; "
                "leave one of them out"
            )
        return self

    @property
    def learning_rate(self) -> float:
        """The peak learning rate in force; a head that fits already wants a lower one (docs/results)."""
        lora, full = (1e-3, 1e-4) if self.head_start == "zero" else (2e-4, 2e-5)
        return self.optim.learning_rate or (lora if self.tuning == "lora" else full)


class ValueConfig(Frozen):
    """The value adapter of `baseline: value`."""

    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Its own learning rate; null takes the default for `tuning`."""
    warmup_updates: Annotated[int, Field(ge=0)] = 3
    """Value-only updates before the policy learns."""


Sampler = Literal["local", "vllm"]


class VllmConfig(Frozen):
    """The server that samples for `sampler: vllm` (docs/vllm.md); its key, if it needs one, is PERLHF_VLLM_KEY."""

    url: str = "http://127.0.0.1:8000"
    """Where it listens."""
    directory: Path | None = None
    """Where versions of the adapter are written for it, which it sees by the same path; null takes RUN/sampler."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 600.0
    """Limit of one request, and of waiting for a server that is gone, such as while it is started again."""

    @field_validator("url")
    @classmethod
    def _without_secrets(cls, url: str) -> str:
        check_address(url, VLLM_KEY)
        return url


def check_sampler(sampler: Sampler, vllm: VllmConfig) -> None:
    """Raises ValueError where a server is described that nothing would ask."""
    if sampler == "local" and vllm != VllmConfig():
        raise ValueError("vllm is of sampler: vllm; leave it out, or set that")


class PolicyConfig(StageConfig):
    """REINFORCE with a KL anchor (the paper's objective; docs/method.md)."""

    run: Path = Path("runs/policy")
    """Run directory; running the same command again continues it."""
    sft: Path | None = None
    """SFT run, or a directory of peft's, that the policy starts from and is anchored to; null anchors to the base."""
    reward: tuple[str, ...] = ()
    """Reward run directories (or peft's), `module:function`, or an http(s) address."""
    combine: Literal["mean", "min", "mean_minus_std"] = "mean"
    """How scores of several reward models become one."""
    # What is left out of what a run records unless it is set: a record without it is the same run.
    reward_weights: tuple[float, ...] | None = Field(default=None, exclude_if=lambda weights: weights is None)
    """One for each of `reward`: the score is their weighted sum, as TRL's; null combines them as `combine` says."""
    reward_timeout_seconds: Annotated[float, Field(gt=0)] = Field(default=60.0, exclude_if=lambda limit: limit == 60)
    """Limit of one request to a service among `reward`, up to the last byte of its answer."""
    updates: Positive = 60
    """Rollouts to learn from."""
    prompts_per_update: Positive = 8
    """Prompts sampled in a rollout."""
    completions_per_prompt: Positive = 4
    """Completions of each prompt."""
    max_completion_tokens: Positive = 64
    """Longest completion, end token included."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Of sampling; all log-probabilities of training are at this temperature. Nothing else bends the distribution."""
    kl_coef: Annotated[float, Field(ge=0, le=1)] = 0.05
    """beta of J = (1 - beta) score - beta KL."""
    baseline: Literal["value", "leave_one_out", "group_mean", "none"] = "value"
    """What is subtracted from the return to form the advantage."""
    gae_lambda: Annotated[float, Field(ge=0, le=1)] = 1.0
    """GAE lambda for `baseline: value`; 1 is the paper's return minus value."""
    advantage_norm: Literal["none", "center", "whiten"] = "none"
    """Over all tokens of the update."""
    clip: Annotated[float, Field(gt=0)] | None = None
    """PPO's ratio clip; null is plain REINFORCE and allows one optimiser step a rollout."""
    steps_per_rollout: Positive = 1
    """Optimiser steps on each rollout (more than 1 needs `clip`)."""
    missing_end_penalty: NotNegative | None = None
    """Paid by a completion without end token; null is one deviation of the reference's scores, 0.5 if all are equal."""
    max_kl: Annotated[float, Field(gt=0)] | None = None
    """Stop when the mean KL per completion exceeds this."""
    value: ValueConfig = ValueConfig()
    """The value adapter."""
    centre_prompts: Positive = 32
    """Prompts whose reference completions centre the scores at the start."""
    validate_every: Positive = 10
    """Updates between evaluations on held-out prompts; the best by held-out reward is kept, be it the start."""
    validation_prompts: Positive = 32
    """Held-out prompts of such an evaluation; up to twice as many others report what is kept."""
    # These are left out of what a run records unless they are set: a record without them is the same run.
    validation_reward: tuple[str, ...] = Field(default=(), exclude_if=lambda sources: not sources)
    """What scores the held-out prompts instead of `reward`, best reward runs of other groups (none: `reward`)."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field(default=(), exclude_if=lambda strings: not strings)
    """Strings that end a completion, such as "\\nUser:"; rewards see the text before the first of them."""
    patience: Positive | None = Field(default=None, exclude_if=lambda evaluations: evaluations is None)
    """Stop after so many evaluations in a row without a better held-out reward; null runs all updates."""
    staleness: Literal[0, 1] = Field(default=0, exclude_if=lambda updates: updates == 0)
    """1 samples the next update's completions while this one is learned from, and corrects for the older policy."""
    sampler: Sampler = Field(default="local", exclude_if=lambda engine: engine == "local")
    """What samples: this process, or a vLLM server on the same base, which gets each version of the adapter."""
    vllm: VllmConfig = Field(default=VllmConfig(), exclude_if=lambda server: server == VllmConfig())
    """The server of `sampler: vllm`."""
    max_rows: Positive | None = Field(default=None, exclude_if=lambda rows: rows is None)
    """Completions that a GPU samples at a time; others wait for their places. Null: all of an update's at once."""
    max_ratio: Annotated[float, Field(ge=1)] | None = Field(default=None, exclude_if=lambda limit: limit is None)
    """Of `staleness: 1` or `sampler: vllm`: ratios of policy to sampler count as at most this (2 is usual) or as is."""
    max_sampler_gap: Annotated[float, Field(gt=0)] = Field(default=0.2, exclude_if=lambda nats: nats == 0.2)
    """Of the same two: an update whose sampler and policy differ by more nats a token, in the mean, ends the run."""
    keep: Literal["best", "last"] = Field(default="best", exclude_if=lambda which: which == "best")
    """Weights to keep: the `best` by held-out reward (the start, where none is clearly better), or the `last`."""
    bounded: bool = Field(default=False, exclude_if=lambda bounded: not bounded)
    """Pay sigmoid(score - score of the reference's answer to the prompt) - 1/2: no score is worth chasing on and on."""
    max_disagreement: Annotated[float, Field(gt=1)] | None = Field(default=None, exclude_if=lambda limit: limit is None)
    """Stop when several reward models disagree by so many times what they do at the first update."""

    @property
    def learning_rate(self) -> float:
        """The policy's peak learning rate in force."""
        return self.optim.learning_rate or (3e-4 if self.tuning == "lora" else 3e-5)

    @property
    def save_every(self) -> int:
        """Updates between checkpoints in force; adapters are small enough to save each time."""
        return self.checkpoint_every or (1 if self.tuning == "lora" else 20)

    @property
    def off_policy(self) -> bool:
        """Whether completions are of an older policy or another engine, and count by their ratio."""
        return self.staleness > 0 or self.sampler != "local"

    @property
    def slots(self) -> int:
        """Adapters that a vLLM server must hold at a time: versions that are asked, and the one that is being sent."""
        return self.staleness + 2

    @property
    def value_learning_rate(self) -> float:
        """The value adapter's learning rate in force."""
        return self.value.learning_rate or (1e-4 if self.tuning == "lora" else 1e-5)

    @field_validator("reward", "validation_reward")
    @classmethod
    def _without_secrets(cls, sources: tuple[str, ...]) -> tuple[str, ...]:
        check_addresses(sources)
        return sources

    @model_validator(mode="after")
    def _consistent(self) -> "PolicyConfig":
        if self.adapter.dropout:
            raise ValueError("adapter.dropout must be 0: sampled and trained log-probabilities would differ")
        if self.clip is None and self.steps_per_rollout > 1:
            raise ValueError(
                "steps_per_rollout > 1 needs clip (such as 0.2): without it a rollout allows one optimiser step"
            )
        if self.baseline in ("leave_one_out", "group_mean") and self.completions_per_prompt < 2:
            raise ValueError(f"baseline: {self.baseline} needs completions_per_prompt of 2 or more")
        if not self.reward:
            raise ValueError("reward is empty; give a reward run directory, module:function or http address")
        if self.max_disagreement is not None and self.completions_per_prompt < 2:
            raise ValueError("max_disagreement needs completions_per_prompt of 2 or more")
        self._check_weights()
        self._check_staleness()
        return self

    def _check_staleness(self) -> None:
        if self.staleness and self.tuning == "full":
            what = "staleness: 1 samples with a copy of the adapter, and tuning: full has none"
            raise ValueError(f"{what}; leave one of them out")
        if self.sampler == "vllm" and self.tuning == "full":
            raise ValueError(
                "sampler: vllm is sent adapters, and tuning: full has none; leave one of them out, or take tuning: lora"
            )
        if self.sampler == "vllm" and self.max_rows is not None:
            raise ValueError("max_rows is of sampler: local (a server has --max-num-seqs); leave it out")
        check_sampler(self.sampler, self.vllm)
        if self.staleness and self.shard != "none" and self.sampler == "local":
            what = f"staleness: 1 samples while it learns, and shard: {self.shard} gathers layers in one order"
            raise ValueError(f"{what}; leave one of them out")
        for key in ("max_ratio", "max_sampler_gap"):
            if not self.off_policy and getattr(self, key) != type(self).model_fields[key].default:
                what = f"{key} is of staleness: 1, where an older policy samples, and of sampler: vllm"
                raise ValueError(f"{what}; leave it out, or set one of them")

    def _check_weights(self) -> None:
        weights = self.reward_weights
        if weights is None:
            return
        if len(weights) != len(self.reward):
            raise ValueError(f"reward_weights has {len(weights)} numbers, reward has {len(self.reward)}; give as many")
        if self.combine != "mean":
            raise ValueError(f"reward_weights and combine: {self.combine} exclude each other; leave one of them out")
        if not any(weights):
            raise ValueError("reward_weights are all 0: nothing would be learned; give one above or below 0")
