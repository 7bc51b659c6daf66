"""sage-reconcile: edit ``engines.yaml``, and the inference engines on this machine follow.

The way of the data, in the order in which to read it::

    host/documents.py  engines.yaml -> plain data with the place of each value
    core/resolve.py    -> Desired: every engine, defaults applied, every fault named
    host/local.py      the machine -> Observed: GPUs, what we started, what the kernel says of it
    core/sizing.py     what an engine takes of a GPU before it was ever started (host/models.py reads the model,
                       host/hub.py asks for one that is not here)
    core/measured.py   what starts were seen to take, learned from their logs and the driver (host/learned.py)
    core/diagnosis.py  why one failed, and what to write instead
    core/planner.py    Desired + Observed + now -> Plan: what to stop and start, where, in which order, why
    core/check.py      an independent judge of plans
    reconcile.py       one pass of all this, and the carrying out       (start reading here)
    in_force.py        which content of the file is in force: read, refused, held back, confirmed (core/guard.py)
    telling.py         what happens, told to the log and to the events in the state folder (core/events.py)
    daemon.py          when a pass is due (host/notify.py tells systemd how it goes, core/service_unit.py is the unit)
    cli/               the commands
    control_plane.py   the same from Python
    core/changes.py    what start, stop, scale, set and restart change in the file; host/edits.py writes it, in place
"""

__version__ = "0.1.0"
