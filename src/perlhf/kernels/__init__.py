"""How the network is computed: its modules, attention over prefix trees, the cache of keys and values, C++ for CPUs."""
