"""Sampling by a vLLM server: begin with `server.Server`."""
