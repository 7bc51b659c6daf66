"""A server that behaves like vLLM as a process, for trying and testing without a GPU.

``python -m sage_reconcile.simulator`` takes vLLM's flags and is ready in a fraction of a second::

    __main__.py     the API server: the leader of the process tree, and how it ends
    flags.py        vLLM's flags in one table, and the simulator's own
    engine.py       the engine core and its workers: what they hold, how they load, whom they outlive
    gpus.py         simulated GPUs: who holds how much memory
    title.py        how vLLM's children hide their command line and environment
    log.py          vLLM's log lines in vLLM's order
    scheduler.py    requests: running, waiting, drained, refused; the canned answer
    protocol.py     the bodies of requests and responses, and the metrics
    server.py       HTTP

Only the standard library is used, and little of it: tests start hundreds of these.
"""
