"""A link in user space: a TCP relay that makes a fast connection as slow, far and lossy as a given line.

Kernels without netem are common, and shaping them needs root. This needs neither: a process that takes connections and
passes their bytes on, later. See ``spec`` for what can be said about a line, and ``line`` for what is modelled.
"""
