"""The zygote: a fresh process that imports what engine processes need, stays single-threaded, and forks them.

A fork is only clean from a process with one thread and no initialised accelerator: the zygote checks before each fork
and refuses otherwise; the process is then spawned. The model process asks it, and so do the children that it forked,
which hold the other end of its socket; it ends with the model process.
"""
