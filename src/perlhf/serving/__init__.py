"""`perlhf serve`: runs in use, over an OpenAI-compatible address and a chat page, and what people say of their answers.

Begin at `server` (the application), `engine` (the thread that computes for all requests) and `models` (what is served).
"""
