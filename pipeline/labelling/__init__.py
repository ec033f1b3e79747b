"""People's judgements: the items shown, the log of answers, the page, and the agreement between annotators."""
