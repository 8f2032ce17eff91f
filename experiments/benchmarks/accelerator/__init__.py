"""One command that measures what this device does with everything that is compiled for it; see `__main__`."""
