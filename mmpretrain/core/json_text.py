"""JSON that a stranger may have written.

Enter: text, or bytes of UTF-8. Leave: what it says. Refused, as a ValueError whatever is wrong: text that is no JSON,
is nested too deep, or holds a number of thousands of digits.
"""

import json
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """What the text says."""
    try:
        return json.loads(text if isinstance(text, str) else text.decode())
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
