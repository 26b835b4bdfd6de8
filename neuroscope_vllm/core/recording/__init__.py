"""Traces on disk: what `--record` keeps, `export` writes and `replay` tells again. Torch-free.

record    what a trace is here
rows      its columns: a row an event
files     parquet files of whole traces, and a folder of them
folder    the folder itself: who may read it, and for how long
"""
