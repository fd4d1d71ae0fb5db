"""The conversation: transcript, turns, the read-answer loop, and the screens that draw it."""
