"""The labelling page: its server, what it shows of conversations and scores; beside them templates, style, script."""
