"""The reward model: its scalar head and calibration, scoring with any tokenizer, and the report on it."""
