"""Run directories to HTML pages. Begin with `page`."""
