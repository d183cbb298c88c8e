"""This machine and this process: the command line, devices, processes, signals, run folders and files.

Knows nothing of data, models or training; everything above it may import it.
"""
