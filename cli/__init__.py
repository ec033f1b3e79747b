"""Parts that all programs share: settings from flags, errors, the files of a result, and the command `tieback`."""
