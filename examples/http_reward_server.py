"""A reward service with the standard library alone, for a scorer that lives in another program or on another machine.

    python examples/http_reward_server.py --port 8000          serves until interrupted
    perlhf policy --reward http://127.0.0.1:8000               trains against it, in another terminal

    python examples/http_reward_server.py --base path/to/my-model   serves, trains a short policy, and ends

The protocol: perlhf posts {"prompts": [...], "completions": [...]}, the service answers {"scores": [...]}, one finite
number for each completion, in order.
"""

import argparse
import json
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import perlhf


def score(prompt: Any, completion: str) -> float:
    """1 for an answer of one to twelve words, else 0. Put your own scorer here."""
    return float(1 <= len(completion.split()) <= 12)


class Handler(BaseHTTPRequestHandler):
    """Answers POST at any path."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        pairs = zip(asked["prompts"], asked["completions"], strict=True)
        body = json.dumps({"scores": [score(prompt, completion) for prompt, completion in pairs]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Silent: perlhf shows its own progress."""


def train(address: str, base: str, run: Path, updates: int) -> dict[str, Any]:
    """A short policy run against the service."""
    perlhf.pull(base)  # does nothing when the base is there
    config = perlhf.PolicyConfig(
        run=run,
        base=base,
        reward=(address,),
        encoding={"max_tokens": 256},
        baseline="leave_one_out",
        updates=updates,
        max_completion_tokens=24,
    )
    return perlhf.policy(config)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any] | None:
    """Serves; with --base also trains, and returns the run's result."""
    parser = argparse.ArgumentParser(description="Serve rewards over HTTP.")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--base", help="train a short policy on this base against the service, then end")
    parser.add_argument("--run", type=Path, default=Path("runs/example-http"), help="run directory of that policy")
    parser.add_argument("--updates", type=int, default=5, help="rollouts of that policy")
    options = parser.parse_args(arguments)

    with ThreadingHTTPServer(("127.0.0.1", options.port), Handler) as server:
        address = f"http://127.0.0.1:{server.server_port}"
        print(f"rewards at {address}")
        if options.base is None:
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                return None
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            result = train(address, options.base, options.run, options.updates)
        finally:
            server.shutdown()
            thread.join()
    print(f"mean score on held-out prompts: {result['score_before']:.2f} before, {result['score_after']:.2f} after")
    return result


if __name__ == "__main__":
    main()
