"""GGUF files that llama.cpp runs: begin with files, which writes networks and adapters."""
