"""Exit statuses that programs which start runs tell apart."""

STOPPED = 75  # a signal stopped the run before its end, and it saved; EX_TEMPFAIL, "try again later"
PEER_FAILED = 71  # the run cannot go on without another process, which failed; EX_OSERR
