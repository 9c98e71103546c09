"""What no shard may hold, wherever it is met: in a tar, in the index beside it, in a file that is to be packed."""

import re

MAX_SAMPLE_BYTES = (1 << 31) - (1 << 12)
"""Of all members of a sample, headers included: what Linux gives by one read."""
MAX_HEADER_BYTES = 1 << 20
"""Of a long name or a pax header: longer ones are no names, and are never read into memory."""
CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f-\x9f]")
"""In a name they break lines of reports, or command the terminal that shows it."""
PICKLE_EXTENSIONS = frozenset({"pkl", "pickle", "pyd", "pth", "pt"})
