"""The three stages, one loop each: `sft`, `reward`, `policy`. Begin with `policy`."""
