"""Tests of a real GGUF file are there where one is named: CI has none, and what it skips it must say."""

import os

collect_ignore = [] if os.environ.get("PERLHF_GGUF") else ["test_gguf_real.py"]
