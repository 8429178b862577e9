"""Policy steps and sampling, side by side: ours against TRL's RLOOTrainer and transformers' `generate`; peak memory.

A step is 8 prompts (HH, at most 256 tokens) x 4 completions x 64 tokens, leave-one-out, KL weight 0.05, rank 16 on
attention, paid by a reward model on the same base: an adapter here, a second network there. All completions have full
length: there the end token is forbidden, here a token that is never sampled stands for it. TRL and PEFT come with the
extra `bench`. Run: python benchmarks/policy.py sampling_vs_generate
"""

import tempfile
import time
from functools import partial
from itertools import islice
from types import SimpleNamespace
from typing import Any, Literal

import harness
from harness import Benchmark, Work
from reward import RANK, Clock, classifier, lora, trainer_arguments

PROMPTS, COMPLETIONS, TOKENS, PROMPT_TOKENS = 8, 4, 64, 256
KL_COEF, LEARNING_RATE = 0.05, 1e-4
NEVER_SAMPLED = "<file_sep>"


def ours(tuning: Literal["lora", "full"] = "lora", baseline: str = "leave_one_out") -> Work:
    """One step: sample, probe, score, reference, advantages, learn. No side warms up: a step is long enough."""
    stage = _stage(tuning, baseline)
    (step,) = _steps(stage, 1)
    return Work(1, step["seconds"], {"dtype": str(stage.model.dtype)} | step)


def trl() -> Work:
    """TRL's RLOOTrainer, one step."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import RLOOConfig, RLOOTrainer  # pyright: ignore[reportMissingImports]  of the extra `bench`

    from perlhf.model.bases.found import Base

    config, encoder, prompts, dtype = _problem()
    where = Base.find(config.base).directory
    # The template's text, which tokenises to the ids that our side samples from.
    texts = [encoder.tokenizer.decode(encoder.prompt(prompt.prompt)) for prompt in prompts]
    clock = Clock(warm_up=False)
    with tempfile.TemporaryDirectory() as directory:
        arguments = RLOOConfig(
            directory,
            per_device_train_batch_size=PROMPTS * COMPLETIONS,
            num_generations=COMPLETIONS,
            max_completion_length=TOKENS,
            generation_kwargs={"min_new_tokens": TOKENS},
            beta=KL_COEF,
            **trainer_arguments(1, dtype),
        )
        reward = classifier(config, dtype, encoder.pad_id)
        RLOOTrainer(
            AutoModelForCausalLM.from_pretrained(where, dtype=dtype),
            reward,
            arguments,
            train_dataset=Dataset.from_list([{"prompt": text} for text in texts]),
            processing_class=encoder.tokenizer,
            reward_processing_classes=encoder.tokenizer,
            peft_config=lora("CAUSAL_LM"),
            callbacks=[clock.callback()],
        ).train()
    return Work(1, clock.seconds, {"dtype": str(dtype)})


def sampling(quantize: str = "none") -> Work:
    """Our sampler with an active adapter."""
    from perlhf.rollout.local import Ends, sample, uniforms

    stage = _stage("lora", "leave_one_out", quantize=quantize)
    ids = [stage.encoder.prompt(prompt.prompt) for prompt in stage.prompts[:PROMPTS]]

    def draw(length: int) -> int:
        rollout = sample(
            stage.model,
            ids,
            adapter="policy",
            draws=uniforms(0, 1, range(PROMPTS), COMPLETIONS, length),
            ends=Ends.of(stage.encoder),
            temperature=1.0,
            max_completion_tokens=length,
        )
        return rollout.tokens

    draw(4)
    began = time.perf_counter()
    tokens = draw(TOKENS)
    return Work(tokens, time.perf_counter() - began, {"dtype": str(stage.model.dtype)})


def generate(adapted: bool) -> Work:
    """transformers' `generate` on left-padded prompts, with or without a PEFT adapter."""
    import torch
    from transformers import AutoModelForCausalLM

    from perlhf.model.bases.found import Base

    config, encoder, prompts, dtype = _problem()
    network: Any = AutoModelForCausalLM.from_pretrained(Base.find(config.base).directory, dtype=dtype)
    if adapted:
        from peft import get_peft_model

        network = get_peft_model(network, lora("CAUSAL_LM"))
    encoder.tokenizer.padding_side = "left"
    ids = [encoder.prompt(prompt.prompt) for prompt in prompts[:PROMPTS]]
    batch = encoder.tokenizer.pad({"input_ids": ids}, return_tensors="pt")

    def draw(length: int) -> int:
        with torch.no_grad():
            out = network.generate(
                **batch,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                num_return_sequences=COMPLETIONS,
                min_new_tokens=length,
                max_new_tokens=length,
                pad_token_id=encoder.pad_id,
            )
        return len(out) * (out.shape[1] - batch["input_ids"].shape[1])

    draw(4)
    began = time.perf_counter()
    tokens = draw(TOKENS)
    return Work(tokens, time.perf_counter() - began, {"dtype": str(dtype)})


def peak(shape: str, quantize: str = "none") -> Work:
    """A step with reference, policy, value and reward adapters; `shape` names a network with random weights."""
    if shape == "135m":
        stage, prompts = _stage("lora", "value"), PROMPTS
    else:
        stage, prompts = _stage("lora", "value", _random_base(shape, quantize)), 1
        stage.config = stage.config.model_copy(update={"prompts_per_update": 1, "max_completion_tokens": 32})
    (step,) = _steps(stage, 1)
    base = stage.model.base
    parameters = sum(p.numel() for p in base.parameters() if p.is_floating_point())
    parameters += sum(m.in_features * m.out_features for m in base.modules() if getattr(m, "quantised", None))
    details = {"parameters": parameters, "dtype": str(stage.model.dtype)}
    return Work(prompts, step["seconds"], details | step)


def _problem() -> tuple[Any, Any, list[Any], Any]:
    """Policy configuration, encoder, the prompts of every step, and the dtype that `dtype: auto` takes."""
    from perlhf.config.recipe import load_recipe
    from perlhf.config.stages import OptimConfig, PolicyConfig, RewardConfig, ValueConfig
    from perlhf.data.records import Comparison, Prompt
    from perlhf.data.splits import load
    from perlhf.model.bases.found import Base
    from perlhf.model.bases.loading import load_tokenizer, pick_device, pick_dtype
    from perlhf.model.encoding.encode import Encoder

    recipe = load_recipe(harness.REPOSITORY / "recipes" / "hh" / "reward.yaml", RewardConfig)
    config = PolicyConfig(
        run=recipe.run,
        device="cpu",
        data=recipe.data,
        encoding=recipe.encoding,
        adapter=recipe.adapter.model_copy(update={"rank": RANK, "targets": "attention"}),
        optim=OptimConfig(learning_rate=LEARNING_RATE),
        reward=("unused",),
        prompts_per_update=PROMPTS,
        completions_per_prompt=COMPLETIONS,
        max_completion_tokens=TOKENS,
        kl_coef=KL_COEF,
        baseline="leave_one_out",
        value=ValueConfig(warmup_updates=0),
    )
    encoder = Encoder(load_tokenizer(Base.find(config.base)), config.encoding)
    records = (r for r in load(config.data, ("comparison",), "train") if isinstance(r, Comparison))
    short = (r for r in records if len(encoder.prompt(r.prompt)) <= PROMPT_TOKENS)
    prompts = [Prompt(r.prompt, r.group) for r in islice(short, PROMPTS)]
    dtype, _ = pick_dtype(config.dtype, pick_device(config.device).type)
    return config, encoder, prompts, dtype


def _stage(tuning: Literal["lora", "full"], baseline: str, network: Any = None, quantize: str = "none") -> Any:
    """What `perlhf policy` opens, with a new SFT adapter as reference and a reward adapter with a random head."""
    import torch

    from perlhf.model.bases.found import Base
    from perlhf.model.model import Model
    from perlhf.model.open import new_adapter, open_model
    from perlhf.rollout.scorers import Scorers
    from perlhf.training.policy_step import POLICY, VALUE, Setup

    config, encoder, prompts, _ = _problem()
    config = config.model_copy(update={"tuning": tuning, "baseline": baseline, "quantize": quantize})
    if network is None:
        model, _ = open_model(config, Base.find(config.base))
    else:
        model = Model(network, {"name": "random", "sha256": "0"})
    encoder.end_id = encoder.tokenizer.convert_tokens_to_ids(NEVER_SAMPLED)
    encoder.end_ids = (encoder.end_id,)
    shape = {"rank": RANK, "targets": "attention"}
    reference = None
    if baseline == "value":
        reference = model.add_adapter("sft", "sft", **shape).name
        model.freeze(reference)
    new_adapter(model, POLICY, "policy", config, start=reference)
    if baseline == "value":
        new_adapter(model, VALUE, "value", config, start=reference)
    reward = model.add_adapter("reward_0", "reward", **shape)
    assert reward.score_head is not None
    torch.nn.init.normal_(reward.score_head, std=0.02)
    model.freeze("reward_0")
    setup = Setup(config, model, encoder, Scorers(("reward_0",), (), "mean"), prompts, [], reference)
    # Not frozen, unlike the real one: a benchmark makes it smaller.
    return SimpleNamespace(**vars(setup) | {"packing": setup.packing})


def _steps(stage: Any, count: int) -> list[dict[str, float]]:
    """Seconds of each policy step, whole and by part."""
    from perlhf.training import optim
    from perlhf.training.policy_step import POLICY, VALUE, At, Centre, policy_step

    rates = {POLICY: LEARNING_RATE, VALUE: LEARNING_RATE}
    adapters = {name: stage.model.adapters[name] for name in rates if name in stage.model.adapters}
    optimizers = optim.build({n: (a.trainable_by_name(), rates[n]) for n, a in adapters.items()}, stage.config.optim)
    steps = []
    for step in range(1, count + 1):
        began = time.perf_counter()
        done = policy_step(stage, optimizers, Centre(0.0, 1.0, 1.0), At(step, step))
        parts = {key: value for key, value in done.values.items() if key.startswith("seconds_")}
        steps.append({"seconds": time.perf_counter() - began} | parts)
        assert "grad_norm" in done.values, "the policy did not learn"
        sampled, wanted = done.known.mask.sum(-1).float().mean().item(), stage.config.max_completion_tokens
        assert sampled == wanted, f"completions of {sampled} tokens, not {wanted}"
    return steps


SHAPES: dict[str, dict[str, Any]] = {
    "1_7b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "num_attention_heads": 32},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
}


def _random_base(shape: str, quantize: str = "none") -> Any:
    """A Llama-like network in bfloat16 whose weights are made in place, so that no float32 copy ever exists; a million
    random numbers again and again, which takes seconds.

    With `quantize: nf4` each linear layer is quantised as it is made, by bitsandbytes as transformers does it while it
    loads. Those of the first layer of the network are; the others are copies of them, which take the same memory.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=49152, tie_word_embeddings=shape == "1_7b", **SHAPES[shape])
    with torch.device("meta"):
        network: Any = LlamaForCausalLM(config)
    network = network.to(torch.bfloat16)
    if quantize == "nf4":
        _put_nf4(network)
    numbers = torch.randn(2**20).mul_(0.02).to(torch.bfloat16)
    for name, parameter in list(network.named_parameters()):
        if not parameter.is_meta:
            continue
        module, _, leaf = name.rpartition(".")
        made = torch.nn.Parameter(torch.empty(parameter.shape, dtype=torch.bfloat16), requires_grad=False)
        if name.endswith("norm.weight"):
            torch.nn.init.ones_(made)
        else:
            for part in made.data.view(-1).split(len(numbers)):
                part.copy_(numbers[: len(part)])
        setattr(network.get_submodule(module), leaf, made)
    rotary = network.model.rotary_emb.to_empty(device="cpu")
    rotary.__init__(config)
    network.tie_weights()
    return network


def _put_nf4(network: Any) -> None:
    """Quantised layers with random weights in the place of the linear ones below the head."""
    import copy

    import torch

    from perlhf.model.bases.quantised import loading_arguments, own_layers

    settings = loading_arguments(network.config, "nf4", torch.bfloat16)["quantization_config"]
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    replace_with_bnb_linear(network, ["lm_head"], settings)
    first: dict[str, Any] = {}
    for name, module in network.model.layers.named_modules():
        if type(module).__name__ != "Linear4bit":
            continue
        kind = name.partition(".")[2]
        if kind not in first:
            dense = torch.empty(module.out_features, module.in_features, dtype=torch.bfloat16).normal_(std=0.02)
            first[kind] = type(module.weight)(dense, **module.weight.__dict__ | {"module": None}).to("cpu")
        module.weight = copy.deepcopy(first[kind])
    own_layers(network, torch.bfloat16)


BENCHMARKS = (
    Benchmark("policy_vs_trl_rloo", "steps/s", {"perlhf": ours, "TRL RLOOTrainer": trl}),
    Benchmark(
        "sampling_vs_generate",
        "tokens/s",
        {
            "perlhf, with adapter": sampling,
            "generate, bare base": partial(generate, False),
            "generate, PEFT adapter": partial(generate, True),
        },
    ),
    Benchmark(
        "policy_lora_vs_full",
        "steps/s",
        {"LoRA": partial(ours, "lora", "value"), "full tuning": partial(ours, "full", "value")},
    ),
    Benchmark(
        "sampling_quantised",
        "tokens/s",
        {"nf4": partial(sampling, "nf4"), "whole": sampling, "int8": partial(sampling, "int8")},
    ),
    Benchmark("policy_peak_memory", "prompts/s", {"perlhf": partial(peak, "135m")}, once=True),
    Benchmark("policy_peak_memory_1_7b", "prompts/s", {"perlhf": partial(peak, "1_7b")}, once=True),
    Benchmark("policy_peak_memory_7b", "prompts/s", {"perlhf": partial(peak, "7b")}, once=True),
    Benchmark("policy_peak_memory_7b_nf4", "prompts/s", {"perlhf, nf4": partial(peak, "7b", "nf4")}, once=True),
)

if __name__ == "__main__":
    harness.main(BENCHMARKS, __doc__)
