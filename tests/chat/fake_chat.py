"""A program for the terminal tests: the real chat, screen and prompt over the fake engine. Argument: seconds per word."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from dsv4cli import console, settings
from dsv4cli.chat.conversation import Conversation
from dsv4cli.chat.loop import talk
from dsv4cli.commands.chat import screen
from dsv4cli.engine.records import Token
from tests.support.fake_engine import FakeEngine

MARKDOWN = """# Title

Some **bold** words and `code`,
in two lines.

- one
- two

```python
print(vector<int>)
```

The end."""
LONG = " ".join(f"word{number}" for number in range(400))
FACTS = [("model", "fake"), ("release", "april"), ("context", "1,000 tokens")]


class Remarking(FakeEngine):
    """Has something to say about the machine in the middle of the answer to "remark"."""

    def chat(self, messages: Sequence[dict[str, Any]], **options: Any) -> Iterator[Token]:
        for token in super().chat(messages, **options):
            if messages[-1]["content"].startswith("remark") and token.index == 8:
                console.note("The GPU has less free memory.")
            yield token


def main() -> None:
    delay = float(sys.argv[1]) if len(sys.argv) > 1 else 0.0
    chosen = settings.load()
    engine = Remarking({"markdown": MARKDOWN, "long": LONG}, delay=delay)
    talk(Conversation(engine, screen(chosen), chosen, lambda: FACTS))


if __name__ == "__main__":
    main()
