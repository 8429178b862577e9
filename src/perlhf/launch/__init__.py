"""What starts several workers of one command: `local` as torchrun does on this machine, `on_ray` on a cluster of Ray's.

Both only set the usual environment variables (`perlhf.parallel.place`); nothing else of perlhf knows which it was.
"""
