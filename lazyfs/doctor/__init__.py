"""
`lazyfs doctor`: looks at everything a node needs, and says what to do about each thing that is not as it should be.

    for result in examine(Subject(config.load(), image)): print(result)

Layer: between cli and everything it looks at. Who calls: cli.doctor. A check is a function from a Subject to Results;
it changes nothing, and one that does not end is left behind: examine() never hangs. Parts: `kernel`, `node`,
`containerd`, `registry`.
"""

from lazyfs.doctor.examine import examine
from lazyfs.doctor.results import Result, Status, Subject

__all__ = ["Result", "Status", "Subject", "examine"]
