"""The `perlhf` command (`cli`) and the commands that train nothing."""
