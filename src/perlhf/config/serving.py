"""Configuration of serving: which runs, where, and how much at a time."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from perlhf.config.addresses import VLLM_KEY, HostName, check_address
from perlhf.config.labelling import Port
from perlhf.config.stages import Frozen, Positive


class ServeConfig(Frozen):
    """Serve runs on one base over an OpenAI-compatible address, and a chat page whose thumbs train the next version."""

    runs: tuple[str, ...] = ()
    """Policy, SFT and reward runs, or `perlhf loop`'s directory: DIRECTORY or NAME=DIRECTORY; none serves the base."""
    base: str | None = None
    """The network; null is the first run's, or the packaged one when no run is given."""
    project: Path | None = None
    """Labelling project that takes what people say of answers; made where there is none. null takes no feedback."""
    host: str = "127.0.0.1"
    """Address to listen at. Any but this machine's own needs a token."""
    port: Port = 8000
    """Port to listen at; 0 takes a free one."""
    allow_hosts: tuple[HostName, ...] = ()
    """Further names under which clients may ask, such as that of a proxy."""
    allow_origins: tuple[str, ...] = ()
    """Origins of other pages whose scripts may ask (CORS), such as `https://chat.example`; none by default."""
    token_file: Path | None = None
    """File with the token that clients send as their API key; without, `$PERLHF_TOKEN`, or a new one is printed."""
    adapters: Path | None = None
    """Directory below which runs may be loaded and unloaded while it serves (`/v1/load_lora_adapter`)."""
    refresh_seconds: Annotated[float, Field(ge=0)] = 5.0
    """How often runs are looked at for a new version, as a loop's next round makes; 0 never."""
    max_completion_tokens: Positive = 1024
    """Longest answer where a request names no length."""
    max_rows: Positive = 32
    """Completions sampled together; further ones wait."""
    max_waiting: Positive = 256
    """Requests that wait at most; further ones are told to come again (429)."""
    max_tokens: Positive = 32_768
    """Tokens whose keys and values are kept: of all rows together, and of earlier conversations."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 600.0
    """Of one request, waiting and all."""
    log_requests: bool = False
    """Print each request's path, status and time; never what was asked or answered."""
    dtype: Literal["run", "auto", "bfloat16", "float32"] = "run"
    """Of the base; `run` is that of the first run."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:N`, or `mps` (never run)."""
    threads: Positive | None = None
    """CPU threads; null takes torch's choice."""
    engine: Literal["local", "vllm"] = "local"
    """What computes answers: this process, or a vLLM server; scores are computed here either way."""
    vllm_python: Path | None = None
    """Python of an environment with vLLM, which is started for `engine: vllm`."""
    vllm_url: str | None = None
    """Or address of a vLLM server that runs on the same base and files; its key is `$PERLHF_VLLM_KEY`."""
    accept_changes: bool = False
    """Go on where base, data, adapters or reward code aren't as the run recorded them; what changed is told."""

    @field_validator("vllm_url")
    @classmethod
    def _check_url(cls, url: str | None) -> str | None:
        if url is not None:
            check_address(url, VLLM_KEY)
            if "$" in url:
                raise ValueError(f"variables aren't filled in here; the server's key is ${VLLM_KEY}")
        return url

    @model_validator(mode="after")
    def _one_vllm(self) -> "ServeConfig":
        given = [key for key in ("vllm_python", "vllm_url") if getattr(self, key) is not None]
        if self.engine == "local" and given:
            raise ValueError(f"{given[0]} is of engine: vllm; leave it out, or set that")
        if self.engine == "vllm" and len(given) != 1:
            raise ValueError(
                "engine: vllm takes one of vllm_python (to start a server) and vllm_url (of one that runs)"
            )
        return self
