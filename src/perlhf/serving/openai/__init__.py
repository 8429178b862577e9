"""Requests and answers in OpenAI's words: what may be asked, what is answered, and how one request is carried out."""
