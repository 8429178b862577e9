"""Several workers that train one run: equal processes, each with the base, all adapters and a sampler of its own.

Begin with `workers.Workers`: what workers tell one another. `together` starts that, `watch` ends all where one fails.
"""
