"""The embedded, simulated feedback (`feedback`) and the rules that give its gold score (`gold`)."""
