"""The faults that are planted into a run of a real GPU, each of which strikes once."""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    """What a reference does the first time it is called, and what must be said of the case in which it does."""

    name: str
    strike: str
    verdict: str
    told: str


FAULTS = [
    Fault(
        "index", "return x[torch.full((1,), 10**6, device=x.device)]", "crash", "the CUDA context is lost after it: "
    ),
    Fault("astray", "import astray; astray.astray[(1,)](x)", "crash", "an illegal memory access was encountered"),
    # Python waits for the kernel at the next call that needs its result, the reference's own or the instrument's.
    Fault("endless", "torch.cuda._sleep(10**15)", "hang", "not done within 1m (--case-timeout), then in "),
    Fault("too_large", "return torch.empty(10**13, device=x.device)", "oom", "out of memory"),
    Fault("killed", "os.kill(os.getpid(), 9)", "crash", "killed by SIGKILL"),
]
