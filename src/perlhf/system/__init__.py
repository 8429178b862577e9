"""Files, the machine, progress and HTTP: what perlhf needs of its surroundings. Begin with `files`."""
