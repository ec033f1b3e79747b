"""Settings of the stages, without what a run needs beside them: `help.py` prints them."""
