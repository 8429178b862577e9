"""The tiny random base with adapters that do something, for tests that run the real network."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from perlhf.config.stages import EncodingConfig
from perlhf.method.packing import Batch, Ids, Packing, Tokens, completed, pack
from perlhf.model.bases.found import Base
from perlhf.model.bases.loading import load_tokenizer
from perlhf.model.encoding.encode import Encoder
from perlhf.model.model import Model

VOCAB = 272
START, END = 0, 1


def open_model(directory: Path) -> Model:
    return Model.load(Base(directory), "float32", "cpu")


def open_encoder(directory: Path, config: EncodingConfig | None = None) -> Encoder:
    return Encoder(load_tokenizer(Base(directory)), config or EncodingConfig(max_tokens=256))


def apart(sequences: Sequence[Ids], packing: Packing = "tree", device: torch.device | str = "cpu") -> Batch:
    """Sequences without completions, each an example."""
    return pack([[Tokens(ids)] for ids in sequences], packing, device)


def answers(prompts: Sequence[Ids], completions: Sequence[Ids], packing: Packing = "tree") -> Batch:
    """Prompts with their completions, each an example."""
    return pack([[completed(p, c)] for p, c in zip(prompts, completions, strict=True)], packing)


def digest(model: Model, name: str) -> str:
    """SHA-256 over all tensors of an adapter: whether it changed."""
    tensors = model.adapters[name].tensors().values()
    return hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in tensors)).hexdigest()


@torch.no_grad()
def randomise(model: Model, name: str, seed: int = 0, size: float = 0.2) -> None:
    """Random weights for an adapter, as training would have left: the update is as large as the base's own weights."""
    draw = torch.Generator().manual_seed(seed)
    for key, tensor in model.adapters[name].tensors().items():
        noise = torch.randn(tensor.shape, generator=draw) * size
        if key.startswith("base."):
            tensor.add_(noise * 0.2)
        else:
            tensor.copy_(noise)


def random_ids(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Sequences of ordinary tokens (no control tokens)."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(2, VOCAB, (length,), generator=draw).tolist() for length in lengths]


@torch.no_grad()
def reference_logprobs(network: torch.nn.Module, prompt: Ids, completion: Ids, temperature: float = 1.0) -> Tensor:
    """Log-probabilities of a completion by a plain forward pass of transformers over prompt + completion alone."""
    logits = network(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1].float()
    chosen = torch.log_softmax(logits / temperature, -1)
    return chosen[torch.arange(len(completion)), torch.tensor(completion)]


@torch.no_grad()
def merged_network(directory: Path, model: Model, *adapters: str) -> LlamaForCausalLM:
    """transformers' own network with the named adapters' updates added into its weights."""
    network = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
    for name in adapters:
        for path, pair in model.adapters[name].pairs.items():
            network.get_parameter(path + ".weight").add_(pair.scale * pair.b @ pair.a)
    return network
