"""People's judgements: what they are shown, what they said, and what comes of it."""
