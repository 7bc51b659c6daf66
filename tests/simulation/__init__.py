"""The whole product on a machine that does not exist, with a clock that does not tick by itself.

::

    disk.py        files: full, read-only, and what a loss of power leaves of what was not flushed
    world.py       the machine: processes, signals, GPUs, ports, clock, boots. Plain data, so that it can be copied
    manners.py     how vLLM, its shell and the driver behave in it
    entries.py     engines.yaml as the world knows it, without asking the product
    invariants.py  what must hold at every step, and what at the end
    files_seam.py  the product's file calls, led to the world's disk
    seam.py        the product's other system calls and NVML's, led to the world
    loop.py        an event loop on the world's clock
    running.py     a daemon in this world: boots, crashes, boots again
    stories.py     what happens to a machine
    exploring.py   a story with a crash, or a fault, at every effect; and at every pair of them
    chance.py      long random stories from a seed
"""
