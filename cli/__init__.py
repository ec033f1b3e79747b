"""What all programs share: how settings are read and refused, what a folder of results holds, and the command `tieback`."""
