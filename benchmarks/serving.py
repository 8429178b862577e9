"""Tokens a second and time to the first one of `perlhf serve`, for 1, 8 and 32 clients that stream at once.

A server in a process of its own serves the packaged base with two policies of rank 16 (untrained; at 32 clients both
are asked, each by half). A client asks with a prompt of 56 tokens for 64 new ones at temperature 1 and reads its
stream; tokens are those that the server counts (llama-cpp-python's tells none: its pieces), since some answers end
early. Just before and after the 32, on the same threads and with one adapter, our own sampler draws 32 x 64 tokens
for such prompts in one call (`perlhf.rollout.local.sample`, as `benchmarks/policy.py sampling_vs_generate` does):
`ratio` is the server's rate at 32 clients over the mean of these two. With `--prompts 8` the 32 are four each of eight
prompts, as in that benchmark. With `--llama-server`, llama.cpp's program of that name, that server is asked the same
once, on the file that `perlhf export --gguf` makes of the first policy, merged. Medians of `--repeats` are printed as
JSON.
Run: python benchmarks/serving.py [--threads 2] [--repeats 3] [--prompts 32] [--llama-server PATH]
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import harness

ROWS, TOKENS, RANK = 32, 64, 16
QUESTION = "{}: that is the number of an old house in the hills. Tell me its long story, in many sentences."
"""Begins with a number, so that no prompt has more than the template's beginning in common with another."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=ROWS, help="different ones among the 32")
    parser.add_argument("--llama-server", help="llama.cpp's program")
    parser.add_argument("--sampler", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.sampler:
        print(json.dumps(sampled(arguments.sampler, arguments.threads, arguments.prompts)))
        return
    found: dict[str, list[dict[str, float]]] = {}
    ratios: list[float] = []
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        own = [sys.executable, __file__, "--threads", str(arguments.threads), "--sampler", str(place / "one")]
        own += ["--prompts", str(arguments.prompts)]
        subprocess.run([sys.executable, "-c", _MAKE, str(place), str(RANK)], check=True)

        def sample_alone() -> float:
            done = subprocess.run(own, check=True, capture_output=True, text=True)
            found.setdefault("sampler, 32 rows", []).append(json.loads(done.stdout.splitlines()[-1]))
            return found["sampler, 32 rows"][-1]["rate"]

        for _ in range(arguments.repeats):
            with ours(place, arguments.threads) as address:
                asyncio.run(_streamed(address, ("one", "two"), 2))
                measure(found, "perlhf serve", address, 1, ("one",))
                measure(found, "perlhf serve", address, 8, ("one",))
                before = sample_alone()
                both = measure(found, "perlhf serve", address, ROWS, ("one", "two"), arguments.prompts)
                ratios.append(both["rate"] / statistics.mean([before, sample_alone()]))
        if arguments.llama_server:
            with llama_cpp(arguments.llama_server, _exported(place), arguments.threads) as address:
                asyncio.run(_streamed(address, ("one",), 2))
                for streams in (1, 8, ROWS):
                    measure(found, "llama.cpp", address, streams, ("one",))
    medians = {
        side: {key: round(statistics.median(run[key] for run in runs), 3) for key in runs[0]}
        for side, runs in found.items()
    }
    load = os.getloadavg()[1]
    told = {"ratio": round(statistics.median(ratios), 3), "ratios": [round(one, 3) for one in ratios]}
    print(json.dumps(told | {"sides": medians, "load": load, "machine": harness.machine(arguments.threads)}, indent=2))


_MAKE = """
import sys
from pathlib import Path
from perlhf.config.stages import DEFAULT_BASE, EncodingConfig
from perlhf.model.bases.found import Base
from perlhf.model.bases.loading import load_tokenizer
from perlhf.model.encoding.encode import Encoder
from perlhf.model.model import Model
from perlhf.model.saved import save_adapter
base = Base.find(DEFAULT_BASE)
model, encoder = Model.load(base), Encoder(load_tokenizer(base), EncodingConfig())
for number, name in enumerate(("one", "two")):
    model.add_adapter(name, "policy", rank=int(sys.argv[2]), targets="all", seed=number)
    save_adapter(model, name, Path(sys.argv[1]) / name, encoder)
"""
"""Writes two untrained adapters; in a process of its own, so that this one stays small beside what it measures."""


def sampled(adapter: Path, threads: int, different: int) -> dict[str, float]:
    """Our sampler on 32 rows at once, of so many different prompts."""
    import torch

    from perlhf.config.stages import DEFAULT_BASE, EncodingConfig
    from perlhf.model.bases.found import Base
    from perlhf.model.bases.loading import end_ids, load_tokenizer
    from perlhf.model.encoding.encode import Encoder
    from perlhf.model.model import Model
    from perlhf.model.saved import load_adapter
    from perlhf.rollout.local import Ends, sample, uniforms

    torch.set_num_threads(threads)
    base = Base.find(DEFAULT_BASE)
    model, encoder = Model.load(base), Encoder(load_tokenizer(base), EncodingConfig(), end_ids(base))
    load_adapter(model, adapter, "one")
    prompts = [encoder.prompt([{"role": "user", "content": QUESTION.format(number)}]) for number in range(different)]

    def draw(length: int) -> int:
        draws, ends = uniforms(0, 1, range(different), ROWS // different, length), Ends.of(encoder)
        return sample(
            model, prompts, adapter="one", draws=draws, ends=ends, temperature=1.0, max_completion_tokens=length
        ).tokens

    draw(4)
    began = time.perf_counter()
    tokens = draw(TOKENS)
    return {"rate": tokens / (time.perf_counter() - began), "tokens": tokens, "prompt_tokens": len(prompts[0])}


@contextlib.contextmanager
def ours(place: Path, threads: int) -> Iterator[str]:
    """`perlhf serve` on both policies."""
    words = [sys.executable, "-m", "perlhf", "serve", str(place / "one"), str(place / "two"), "--port", "0"]
    with _started([*words, "--threads", str(threads), "--dtype", "auto"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield next(found.group() for line in process.stdout if (found := re.match(r"http://[^/]+", line)))


@contextlib.contextmanager
def llama_cpp(program: str, file: Path, threads: int) -> Iterator[str]:
    """llama.cpp's server, with a place for each of the clients."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [program, "--model", str(file), "--port", str(port), "--alias", "one", "--no-ui"]
    words += ["--parallel", str(ROWS), "--ctx-size", str(ROWS * 256), "--threads", str(threads)]
    words += ["--threads-batch", str(threads)]
    with _started(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        address = f"http://127.0.0.1:{port}"
        while True:
            assert process.poll() is None, "llama.cpp's server has ended"
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{address}/health").close()
                break
            time.sleep(0.2)
        yield address


def measure(
    found: dict[str, list[dict[str, float]]],
    side: str,
    address: str,
    streams: int,
    models: tuple[str, ...],
    different: int = ROWS,
) -> dict[str, float]:
    """Lets so many clients stream."""
    done = asyncio.run(_streamed(address, models, streams, different))
    found.setdefault(f"{side}, {streams} streams", []).append(done)
    return done


async def _streamed(address: str, models: tuple[str, ...], streams: int, different: int = ROWS) -> dict[str, float]:
    host, port = address.removeprefix("http://").split(":")
    began = time.perf_counter()
    numbers = [100 * streams + n % different for n in range(streams)]
    asked = [_stream(host, int(port), models[n % len(models)], numbers[n], n) for n in range(streams)]
    done = await asyncio.gather(*asked)
    seconds = time.perf_counter() - began
    tokens = sum(count for count, _ in done)
    waited = [first for _, first in done]
    p50, p95 = (float(np.percentile(waited, q)) for q in (50, 95))
    return {"rate": tokens / seconds, "tokens": tokens, "first_p50": p50, "first_p95": p95}


async def _stream(host: str, port: int, model: str, number: int, seed: int) -> tuple[int, float]:
    """Tokens of one answer, and seconds to the first of them."""
    body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": QUESTION.format(number)}]}
    body |= {"max_tokens": TOKENS, "temperature": 1.0, "top_p": 1.0, "seed": seed, "stream": True}
    body["stream_options"] = {"include_usage": True}
    raw = json.dumps(body).encode()
    began, first, pieces, counted = time.perf_counter(), 0.0, 0, 0
    reader, writer = await asyncio.open_connection(host, port)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Connection: close\r\nContent-Length: {len(raw)}\r\n\r\n".encode() + raw)
    status = await reader.readline()
    assert b" 200 " in status, status
    async for line in reader:
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        counted = (event.get("usage") or {}).get("completion_tokens", counted)
        if event["choices"] and event["choices"][0]["delta"].get("content"):
            first = first or time.perf_counter() - began
            pieces += 1
    writer.close()
    return counted or pieces, first


def _exported(place: Path) -> Path:
    words = [sys.executable, "-m", "perlhf", "export", str(place / "one"), str(place / "gguf"), "--gguf"]
    subprocess.run([*words, "--format", "merged", "--dtype", "bfloat16"], check=True, stdout=sys.stderr)
    return place / "gguf" / "model.gguf"


@contextlib.contextmanager
def _started(words: list[str], **streams: Any) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(words, text=True, **streams)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


if __name__ == "__main__":
    main()
