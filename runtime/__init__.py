"""Infrastructure: command line, devices, distributed processes, signals, run folders and files.

This package knows nothing about data, models or training; all other packages may import it.
"""
